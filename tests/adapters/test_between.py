"""Adapters that change shape in mid-run: values, optimizer state, and resuming across the change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fallline import checkpoint
from fallline.adapters import attach
from fallline.adapters.between import Between
from fallline.adapters.layers import adapted, inject
from fallline.adapters.rerank import resize, sizes
from fallline.adapters.sora import Config, Sora
from fallline.drivers.setting import build
from fallline.drivers.train import train
from fallline.errors import InputError
from fallline.optim import create
from fallline.recipe import Recipe
from fallline.step import take_step

from .models import llama, stop_at

SORA = "{name: sora, rank: 6, threshold: 0.15, prune_every: 2}"
CHANGING = {
    "sora": SORA,
    "lamda": "{name: lamda, rank: 8, eta: 0.8}",
    "triadapt": "{name: triadapt, rank: 3, block: 1, every: 2}",
}
every = pytest.mark.parametrize("adapter", CHANGING.values(), ids=CHANGING)


def recipe(corpus: Path, out: Path, adapter: str, *more: str) -> Recipe:
    return Recipe.parse(
        f"model: {{name: llama, preset: tiny}}\ndata: {{name: text, path: {corpus}, length: 16, vocab: 320}}\n"
        f"adapter: {adapter}\noptimizer: {{name: adamw, lr: 1e-2}}\nsteps: 6\nbatch: 2\nmicro: 1\nsample: 0\n"
        f"out: {out}\neval: {{every: 6, rows: 2}}\ncheckpoint: {{every: 1, keep: 9}}\n",
        *more,
    )


def state(folder: Path) -> tuple[dict[str, torch.Tensor], Any]:
    """All tensors of the newest checkpoint, and all else."""
    last = checkpoint.find(folder)[-1].path
    return load_file(last / "state.safetensors"), unordered(json.loads((last / "state.json").read_text()))


def unordered(tree: Any) -> Any:
    """Without the order of names in the optimizer's groups, which says nothing."""
    if isinstance(tree, dict):
        return {k: sorted(v) if k == "params" else unordered(v) for k, v in tree.items()}
    return [unordered(v) for v in tree] if isinstance(tree, list) else tree


@every
def test_a_run_cut_around_its_changes_ends_with_the_same_bits(corpus: Path, tmp_path: Path, adapter: str) -> None:
    """All of its state, in bfloat16, where the optimizer works on copies; cut before and after a change."""

    more = ("precision=bfloat16",)
    whole = train(recipe(corpus, tmp_path / "whole", adapter, *more), progress=None)
    shapes = [record["adapter_trained" if "lamda" in adapter else "adapter_ranks"] for record in whole.metrics[1:]]
    assert len(set(shapes)) > 2, "there must be several changes"
    for resume, step in ((False, 3), (True, 5)):
        with pytest.raises(KeyboardInterrupt):
            train(recipe(corpus, tmp_path / "cut", adapter, *more), resume=resume, progress=None, watch=stop_at(step))
    train(recipe(corpus, tmp_path / "cut", adapter, *more), resume=True, progress=None)
    (a, rest), (b, other) = state(tmp_path / "whole"), state(tmp_path / "cut")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert rest == other


@every
def test_a_run_rewinds_across_its_changes(corpus: Path, tmp_path: Path, adapter: str) -> None:
    run = build(recipe(corpus, tmp_path, adapter)).run
    run.mark("start")

    def five() -> dict[str, torch.Tensor]:
        for _ in range(5):
            take_step(run)
        return {k: v.clone() for k, v in run.model.state_dict().items() if ".adapters." in k}

    take_step(run)
    first = five()
    run.rewind("start")
    take_step(run)
    again = five()
    assert first.keys() == again.keys()
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_dropping_shut_ranks_computes_the_same(corpus: Path, tmp_path: Path) -> None:
    """Plain descent, so that nothing opens a gate again; in the run that drops nothing they all stay shut."""
    text = ("optimizer=sgd", "optimizer.lr=0.3", "adapter.threshold=0.1")
    dropping, keeping = (build(recipe(corpus, tmp_path, SORA, *text, f"adapter.prune_every={n}")).run for n in (2, 0))
    shut: dict[str, torch.Tensor] = {}
    before = sizes(dropping.model, "default")
    for _ in range(6):
        losses = [take_step(run)["loss"] for run in (dropping, keeping)]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
        for path, layer in adapted(keeping.model).items():
            now = layer.adapters["default"].gate == 0
            assert not (shut.get(path, now) & ~now).any(), "a gate opened again: this compares nothing"
            shut[path] = now
        assert len({run.parts["adapter"].metrics()["adapter_ranks"] for run in (dropping, keeping)}) == 1
    after = sizes(dropping.model, "default")
    assert sizes(keeping.model, "default") == before
    assert sum(after.values()) < 0.8 * sum(before.values())
    for path in after:
        left = ~shut[path]
        ours, theirs = (
            dict(adapted(run.model)[path].adapters["default"].named_parameters()) for run in (dropping, keeping)
        )
        if after[path] == left.sum():
            torch.testing.assert_close(ours["lora_A"], theirs["lora_A"][left], rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(ours["lora_B"], theirs["lora_B"][:, left], rtol=1e-3, atol=1e-5)


def test_the_optimizers_state_follows_element_by_element() -> None:
    model = llama()
    inject(model, Sora(Config(rank=5, threshold=1e-9)), seed=0)
    optimizer = create("adamw", model, lr=1e-2)
    for p in model.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    optimizer.step()
    path, layer = next(iter(adapted(model).items()))
    P: Any = layer.adapters["default"]
    scale = layer.methods["default"].scale
    P.gate.data[[0, 3]] = 0
    left = [1, 2, 4]
    old = {key: (p.detach().clone(), dict(optimizer.state[p])) for key, p in P.named_parameters()}
    others = {p for p in model.parameters() if p.requires_grad} - set(P.parameters())
    optimizer.remap(resize(model, "default", sizes(model, "default") | {path: 3}, noise=lambda path: torch.Generator()))
    for key, p in layer.adapters["default"].named_parameters():
        was, moments = old[key]
        pick = (lambda t: t[:, left]) if key == "lora_B" else (lambda t: t[left])
        assert torch.equal(p, pick(was))
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[p][moment], pick(moments[moment]))
        assert optimizer.state[p]["step"] == moments["step"]
    assert layer.methods["default"].scale == pytest.approx(scale)
    assert others < {p for group in optimizer.param_groups for p in group["params"]}


def test_a_layer_without_an_open_rank_keeps_one() -> None:
    model = llama()
    inject(model, Sora(Config(rank=3, prune_every=2)), seed=0)
    path, layer = next(iter(adapted(model).items()))
    layer.adapters["default"].gate.data.zero_()
    method = layer.methods["default"]
    layers = {path: (method, layer.adapters["default"])}
    assert method.sizes(layers, 1, 9) == method.sizes(layers, 0, 9) == {}
    assert method.sizes(layers, 2, 9) == {path: 1}
    resize(model, "default", sizes(model, "default") | {path: 1}, noise=lambda path: torch.Generator())
    assert layer.adapters["default"].lora_A.shape == (1, layer.matrix().shape[1])
    assert not method.delta(layer.adapters["default"], layer.matrix).any()


@every
def test_per_example_gradients_follow(corpus: Path, tmp_path: Path, adapter: str) -> None:
    run = build(recipe(corpus, tmp_path, adapter, "estimator=per-example")).run
    plain = build(recipe(corpus, tmp_path, adapter)).run
    for _ in range(5):
        ours, theirs = take_step(run)["loss"], take_step(plain)["loss"]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)


def test_the_number_of_steps_must_be_known_and_attach_refuses(corpus: Path, tmp_path: Path) -> None:
    run = build(recipe(corpus, tmp_path, SORA)).run
    run.steps = None
    with pytest.raises(InputError, match=r"'sora' changes as the run goes on; say how many 'steps'"):
        Between().check(run)
    with pytest.raises(InputError, match=r"'sora' with these options changes its shape"):
        attach(llama(), "sora", prune_every=3)
