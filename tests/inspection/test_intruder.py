"""Intruder dimensions: planted ones are found, others are not, PEFT counts the same, and the command tells."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import Tensor, nn

from fallline.adapters import attach, merge, remove, save
from fallline.cli.main import main
from fallline.drivers.inspection import Opened, inspect
from fallline.drivers.train import train
from fallline.errors import InputError, NonFiniteError
from fallline.metrics import read
from fallline.noise import rng
from fallline.probes.intruder import GRID, clusters, matches
from fallline.recipe import Recipe
from talkers import byte_tokenizer, save_model


def weight(size: int, seed: int, spectrum: str) -> Tensor:
    W = torch.randn(size, size, generator=rng(seed, 0, "W"), dtype=torch.float64)
    if spectrum == "decaying":
        U, _, V = torch.linalg.svd(W)
        W = (U * torch.arange(1, size + 1).double().pow(-1.0)) @ V
    return W


def planted(W: Tensor, seed: int, times: float = 10.0) -> Tensor:
    """W and one direction at random, far stronger than any of its own."""
    noise = rng(seed, 0, "planted")
    u, v = (nn.functional.normalize(torch.randn(n, generator=noise, dtype=torch.float64), dim=0) for n in W.shape)
    return W + times * torch.linalg.matrix_norm(W, 2) * torch.outer(u, v)


def reference(W0: Tensor, W1: Tensor, top: int) -> list[float]:
    """c_j, vector by vector, from the eigenvectors of W Wᵀ in numpy."""
    kept = min(W0.shape)

    def left(W: Tensor) -> Any:
        values, vectors = np.linalg.eigh((W @ W.t()).numpy())
        return vectors[:, np.argsort(-values)][:, :kept]

    U0, U1 = left(W0), left(W1)
    return [max(abs(float(U1[:, j] @ U0[:, i])) for i in range(kept)) for j in range(min(top, kept))]


@pytest.mark.parametrize("spectrum", ["gaussian", "decaying"])
@pytest.mark.parametrize("size", [64, 128])
def test_nothing_new_is_none_and_one_planted_is_one(size: int, spectrum: str) -> None:
    for seed in range(20):
        W = weight(size, seed, spectrum)
        assert matches(W, W, 10).tolist() == pytest.approx([1.0] * 10, abs=1e-9)
        c = matches(W, planted(W, seed), 10)
        assert (c < 0.5).nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize("shape", [(48, 48), (32, 80), (80, 32), (1, 9)])
def test_matches_are_the_equation(shape: tuple[int, int]) -> None:
    """Some above ε, some below; the same after turning both from the right, and in float32."""
    noise = rng(1, 0, "shapes")
    W0, more = (torch.randn(shape, generator=noise, dtype=torch.float64) for _ in range(2))
    W1 = W0 + 0.5 * more
    c = matches(W0, W1, 50)
    assert c.tolist() == pytest.approx(reference(W0, W1, 50), abs=1e-7)
    assert shape == (1, 9) or bool((c < 0.5).any() and (c > 0.5).any())
    Q = torch.linalg.qr(torch.randn(shape[1], shape[1], generator=noise, dtype=torch.float64))[0]
    torch.testing.assert_close(matches(W0 @ Q, W1 @ Q, 50), c, rtol=0, atol=1e-9)
    torch.testing.assert_close(matches(W0.float(), W1.float(), 50).double(), c, rtol=0, atol=1e-3)


def test_clusters_forgive_turns_within_them_and_nothing_else() -> None:
    """Four equal singular values: a turn of their vectors is no new direction, though each has moved; one outside of
    all that W₀ has is still one, and σ = 0 is no cluster for it to hide in."""
    Q = torch.linalg.qr(torch.randn(4, 4, generator=rng(5, 0, "turn"), dtype=torch.float64))[0]
    W0 = torch.zeros(12, 12, dtype=torch.float64)
    W0.diagonal()[:6] = torch.tensor([8.0, 5.0, 5.0, 5.0, 5.0, 1.0])
    W1 = W0.clone()
    W1[1:5, 1:5] = Q @ torch.diag(torch.tensor([5.003, 5.002, 5.001, 5.0], dtype=torch.float64))
    W1[6:, 6:] += 20 / 6  # along (1, …, 1) of what W₀ does not touch
    plain, clustered = matches(W0, W1, 6), matches(W0, W1, 6, width=1e-3)
    assert plain[1] == pytest.approx(1)
    assert bool((plain[2:] < 0.95).any())
    assert clustered[1:].tolist() == pytest.approx([1.0] * 5)
    assert clustered[0] < 0.5
    S = torch.tensor([3.0, 2.999, 2.9985, 2.9965, 1.0, 1e-9, 1e-9])
    assert clusters(S, 1e-3, 1e-8).tolist() == [0, 0, 0, 1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore")
def test_peft_counts_the_same(tmp_path: Path) -> None:
    model = attach(save_model(tmp_path / "base", byte_tokenizer()), "lora", rank=2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.05 * (1 + len(name) % 5), generator=rng(0, 0, name))
    save(model, tmp_path / "adapter", base=str(tmp_path / "base"))
    told: list[str] = []
    theirs = peft.PeftModel.from_pretrained(save_model(tmp_path / "again", byte_tokenizer()), tmp_path / "adapter")
    reduce_intruder_dimension(theirs, logging_sink=told.append)
    wanted = {}
    for line in told[:-1]:
        path, said = re.fullmatch(r"base_model\.model\.(.*?): (.*)", line).groups()  # type: ignore[union-attr]
        wanted[path] = 0 if said == "No intruders" else int(said.removeprefix("Intruders: "))
    found = inspect(str(tmp_path / "adapter"), "intruder", {}).record["found"]
    assert {path: len(of["intruders"]) for path, of in found["layers"].items()} == wanted
    assert found["intruders"] == sum(wanted.values()) > 0
    assert min(wanted.values()) < max(wanted.values())


def recipe(folder: Path, out: str, *overrides: str) -> Recipe:
    return Recipe.parse(
        f"model: {folder / 'base'}\noptimizer: {{name: adamw, lr: 1e-3}}\nschedule: constant\nsteps: 20\nbatch: 8\n"
        f"data: {{name: jsonl, path: {folder / 'lines.jsonl'}, length: 64}}\n"
        f"sample: 0\neval: {{every: 1000, rows: 2}}\nout: {folder / out}\n",
        *overrides,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and runs of it: all parameters, and a LoRA of rank 1 at thirty times the rate."""
    folder = tmp_path_factory.mktemp("intruder")
    save_model(folder / "base", byte_tokenizer())
    rows = [{"text": f"the {a} of the {b}"} for a in "abcdefgh" for b in "ijklmnop"]
    (folder / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(recipe(folder, "full"), progress=None)
    train(recipe(folder, "lora", "adapter={name: lora, rank: 1}", "optimizer.lr=3e-2"), progress=None)
    return folder


def test_a_lora_has_intruders_and_full_fine_tuning_none(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for run in ("full", "lora"):
        assert main(["audit", str(home / run), "--inspect", "intruder", "top=8"]) == 0
        shown = capsys.readouterr().out
        record = json.loads((home / run / "audit" / "intruder.json").read_text())
        page = (home / run / "audit" / "intruder.html").read_text()
        assert record["remarks"][0] in " ".join(shown.split())
        assert record["command"] in page.replace("&#x27;", "'")
        assert page.count("<svg viewBox") == 1
        assert "<script" not in page
        assert record["inspection"] == {"name": "intruder", "top": 8, "epsilon": 0.5, "width": 0.0}
        assert len(record["found"]["layers"]) == 14  # all that train: 7 in each of two layers
        found[run] = record["found"]
        losses = [row["val_loss"] for row in read(home / run / "metrics.jsonl") if "val_loss" in row]
        assert losses[-1] < losses[0] - 0.3
    assert found["full"]["intruders"] == 0
    assert found["lora"]["intruders"] >= 3
    counts = found["lora"]["counts"]
    assert counts["0.5"][-1] == found["lora"]["intruders"]
    assert found["lora"]["top"] == [1, 2, 5, 8]
    assert all(list(row) == sorted(row) for row in counts.values())
    assert [row[-1] for row in counts.values()] == sorted(row[-1] for row in counts.values())
    assert list(counts) == [f"{e:g}" for e in GRID]


def test_the_same_whichever_way_the_model_is_stored(home: Path, tmp_path: Path) -> None:
    """A run, its adapter's folder, and the merged model beside its base."""
    opened = Opened(str(home / "lora"), None, "cpu")
    layers = {c.path: matches(c.before, c.after, 10).tolist() for c in opened.changed()}
    merge(opened.model)
    remove(opened.model)
    opened.model.save_pretrained(tmp_path / "merged")
    opened.tokenizer.save_pretrained(tmp_path / "merged")
    for name, base in ((home / "lora" / "model", None), (tmp_path / "merged", str(home / "base"))):
        record = inspect(str(name), "intruder", {}, base=base, out=tmp_path / "out").record
        found = {path: of["matches"] for path, of in record["found"]["layers"].items()}
        assert found.keys() == layers.keys()
        for path, values in layers.items():
            assert found[path] == pytest.approx(values, abs=1e-4)


def test_refused_in_one_line(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora, base = str(home / "lora"), str(home / "base")
    other = tmp_path / "other"
    save_model(other, byte_tokenizer())
    model = save_model(tmp_path / "wide", byte_tokenizer())
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(48, 31))
    opened = Opened(str(other), base, "cpu")
    opened.__dict__["base"] = model
    with pytest.raises(InputError, match=r"up_proj\.weight \[48, 32\] and its base one of \[48, 31\]; they are not of"):
        list(opened.changed())
    for argv, said in (
        ([lora, "--inspect", "intrudr"], "unknown inspection 'intrudr'; did you mean 'intruder'?"),
        ([lora, "--inspect", "intruder", "topp=3"], "inspection 'intruder' has no option 'topp'; did you mean 'top'?"),
        ([lora, "--inspect", "intruder", "top=0"], "'top' must be above 0, got 0"),
        ([lora, "--inspect", "intruder", "top"], "an option is key=value, got 'top'"),
        ([lora, "--inspect", "intruder", "top=2", "top=3"], "'top' is given twice"),
        ([lora, "--inspect", "intruder", "--base", base], "says itself which model it was made from"),
        ([base, "--inspect", "intruder"], "does not say which model it was made from; name that: --base MODEL"),
        ([str(other), "--inspect", "intruder", "--base", base], "no linear layer whose weight differs from its base's"),
        (["owner/name", "--inspect", "intruder"], "say where the report goes: --out FOLDER"),
        ([lora, "--inspect", "intruder", "--members", "x"], "--members is of membership inference and has no effect"),
        ([lora, "--inspect", "intruder", "--batch", "4"], "--batch is of membership inference and has no effect"),
        ([lora], "give --members FILE and --non-members FILE, or --inspect ID"),
        ([lora, "--members", "x"], "give --members FILE and --non-members FILE, or --inspect ID"),
        ([lora, "top=3", "--members", "x", "--non-members", "y"], "top=3 has no effect without --inspect"),
    ):
        assert main(["audit", *argv]) == 2, argv
        shown = capsys.readouterr()
        assert shown.out == ""
        assert said in shown.err.splitlines()[-1]
    assert not (other / "audit").exists()


def test_weights_that_are_not_finite_are_named(home: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "broken", byte_tokenizer())
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(NonFiniteError, match=r"the weight of model\.layers\.1\.self_attn\.k_proj is not finite"):
        inspect(str(tmp_path / "broken"), "intruder", {}, base=str(home / "base"))
