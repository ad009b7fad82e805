"""The command line without a run: help, the catalogue, the resolved recipe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

import fallline
from fallline import __version__
from fallline.cli.main import main
from fallline.recipe import Recipe

ROOT = Path(__file__).parent.parent


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\nfrom fallline.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as e:\n    assert e.code == 0\n"
        "assert 'torch' not in sys.modules and 'yaml' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("train", "methods", "demo"))


def test_importing_the_package_imports_no_torch() -> None:
    code = "import fallline, sys; assert 'torch' not in sys.modules; assert 'train' in fallline.__all__"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(callable(getattr(fallline, name)) for name in fallline.__all__ if name != "__version__")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"fallline {__version__}\n"


def test_methods_are_listed_and_searched(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "memory"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "scale" in [line.split()[1] for line in lines]
    assert not any(line.startswith("schedule") for line in lines)
    assert main(["methods", "newton-schulz"]) == 0
    assert capsys.readouterr().out.split()[:2] == ["optimizer", "muon"]
    assert main(["methods", "zebra"]) == 2
    assert "no method matches 'zebra'" in capsys.readouterr().err


def test_a_card_is_shown_with_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "show", "scale"]) == 0
    shown = capsys.readouterr().out
    for part in ("A Minimalist Optimizer Design", "state bytes", "checked", "options", "lr = 0.001"):
        assert part in shown
    assert max(map(len, shown.splitlines())) <= 120
    assert main(["methods", "show", "scale", "--json"]) == 0
    (card,) = json.loads(capsys.readouterr().out)
    assert card["id"] == "scale"
    assert {o["name"] for o in card["options"]} >= {"lr", "weight_decay"}
    assert main(["methods", "show", "skale"]) == 2
    assert "did you mean 'scale'?" in capsys.readouterr().err
    assert main(["methods", "show"]) == 2


def test_print_recipe_reads_back(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(ROOT / "recipes" / "tiny.yaml")
    assert main(["train", path, "--print-recipe", "optimizer=scale", "steps=7"]) == 0
    shown = capsys.readouterr().out
    assert Recipe.parse(shown) == Recipe.load(path, "optimizer=scale", "steps=7")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "r.yaml", "--out", "runs/mine"], "no option 'out'; what the recipe says is replaced by key=value, "),
        (["train", "r.yaml", "--out", "runs/mine"], "here perhaps out=runs/mine"),
        (["train", "r.yaml", "--steps=7", "seed=1"], "here perhaps steps=7"),
        (["train", "r.yaml", "--resum"], "did you mean 'resume'?"),
        (["compare", "r.yaml", "--sees", "3"], "fallline compare has no option 'sees'; did you mean 'seeds'?"),
        (["plan", "tiny", "--lenght", "5"], "did you mean 'length'?"),
        (["plan", "tiny", "adapter=lora"], "fallline plan takes no 'adapter=lora'; usage: fallline plan"),
    ],
)  # fmt: skip
def test_a_word_that_a_command_does_not_take(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert told in shown
    assert shown.count("\n") == 1


def test_a_path_that_the_system_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["train", "x" * 300], ["chat", "x" * 300], ["report", "x" * 300], ["train", "x" * 300 + ".yaml"]):
        assert main(words) == 2
        shown = capsys.readouterr().err
        assert "xxx" in shown
        assert shown.count("\n") == 1


def test_overrides_may_follow_options(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(ROOT / "recipes" / "tiny.yaml")
    assert main(["train", path, "steps=3", "--print-recipe", "seed=5"]) == 0
    shown = Recipe.parse(capsys.readouterr().out)
    assert (shown.settings.steps, shown.settings.seed) == (3, 5)


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m fallline methods | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_roles_are_shown_without_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optim", "roles", "7b"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("7b: 6,738,415,616 parameters in 291 tensors\n")
    assert "matrix: 6,476,005,376 parameters" in shown
    assert "  model.layers.*.mlp.down_proj.weight  [4096 × 11008] in 32 layers" in shown
    assert "head: 131,072,000 parameters\n  lm_head.weight  [32000 × 4096]" in shown


def test_roles_of_a_tied_folder_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    ).save_pretrained(tmp_path)  # fmt: skip
    assert main(["optim", "roles", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model.embed_tokens.weight"] == {"role": "head", "shape": [32, 8]}
    assert found["model.norm.weight"]["role"] == "vector"
    assert main(["optim", "roles", str(tmp_path)]) == 0
    assert "tied, trained under the name above: lm_head.weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("60M", "model '60M' is neither a preset nor a folder; did you mean '60m'?"),
        ("./nothing", "there is no model folder './nothing'"),
    ],
)
def test_roles_of_no_model(name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optim", "roles", name]) == 2
    assert message in capsys.readouterr().err
