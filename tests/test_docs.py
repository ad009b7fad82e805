"""What the documentation shows runs."""

from __future__ import annotations

import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from fallline.catalog import entries, find
from fallline.recipe import Recipe

ROOT = Path(__file__).parent.parent


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def test_the_optimizer_in_contributing_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = blocks("CONTRIBUTING.md", "python")
    module = types.ModuleType("fallline.optim.lion_sign")
    module.__package__ = "fallline.optim"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(source, module.__dict__)
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    optimizer = module.build(module.Config(lr=0.25), layer)
    layer.weight.grad = torch.tensor([[1.0, -2.0, 3.0], [-0.5, 0.25, 0.0]])
    optimizer.step()
    assert torch.equal(layer.weight, before - 0.25 * layer.weight.grad.sign())


def test_the_recipe_in_the_readme_is_the_one_that_ships() -> None:
    (shown,) = blocks("README.md", "yaml")
    shipped = Recipe.load(ROOT / "recipes" / "tiny.yaml", "eval.every=50", "eval.rows=64")
    assert Recipe.parse(shown).to_mapping() == shipped.to_mapping()


def test_the_examples_to_forget_and_to_keep_share_out_the_facts() -> None:
    facts, forget, retain = (
        (ROOT / "examples" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        for name in ("facts", "forget", "retain")
    )
    assert sorted(forget + retain) == sorted(facts)


@pytest.mark.parametrize(("file", "least"), [("README.md", 11), ("docs/compare.md", 7)])
def test_every_command_that_is_shown_parses(file: str, least: int) -> None:
    from fallline.cli.main import parser

    shown = [shlex.split(line, comments=True) for b in blocks(file, "sh") for line in b.splitlines()]
    commands = [words[1:] for words in shown if words[:1] == ["fallline"]]
    assert len(commands) >= least
    for words in commands:
        _, rest = parser().parse_known_args(words)
        assert all("=" in word and not word.startswith("-") for word in rest)


def test_the_optimizer_in_your_own_loop() -> None:
    (source,) = [b for b in blocks("README.md", "python") if "create(" in b]
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    loss = model(torch.ones(1, 3)).sum()
    exec(source, {"model": model, "loss": loss})
    assert not torch.equal(model.weight, before)
    assert model.weight.grad is None


def test_the_objectives_that_are_shown_exist() -> None:
    lines = [line for block in blocks("docs/objectives.md", "yaml") for line in block.splitlines()]
    shown = [yaml.safe_load(line)["objective"] for line in lines]
    for given in shown:
        options = {key: value for key, value in given.items() if key != "name"}
        find("objective", given["name"]).load().Config.from_mapping(options, given["name"])
    table = re.findall(r"^\| `([a-z-]+)` \|", (ROOT / "docs/objectives.md").read_text(encoding="utf-8"), re.MULTILINE)
    tags = {id: find(kind, id).card.tags for kind, id in entries() if kind == "objective"}
    likelihoods = {id for id, own in tags.items() if "likelihood" in own and "preference" not in own}
    assert {given["name"] for given in shown} == likelihoods
    assert set(table) == likelihoods | {"causal"}
