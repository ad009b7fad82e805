"""EVA's beginning against its equations, PEFT's, and in runs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from fallline.adapters import attach
from fallline.adapters.begin import Begin, data_from, data_of
from fallline.adapters.layers import adapted
from fallline.drivers.setting import build
from fallline.errors import InputError
from fallline.recipe import Recipe
from fallline.step import Run, take_step
from fallline.trees import copied

from .models import gpt2, llama, logits, tokens
from .table import batches

R, ALPHA = 2, 8.0
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def decaying() -> Any:
    """A model whose inputs have directions that can be told apart."""
    model = llama()
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        U, _, Vh = torch.linalg.svd(table, full_matrices=False)
        table.copy_(3 * (U * 0.7 ** torch.arange(32)) @ Vh)
    return model


def inputs_of(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Path → [rows, L, n], the input of each adapted layer."""
    found: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda layer, args, y, path=path: found.update({path: args[0].detach()}))
        for path, layer in adapted(model).items()
    ]
    model.eval()(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("make", [llama, gpt2])
def test_it_begins_with_the_principal_components_of_each_input(make: Any) -> None:
    ids = tokens(rows=6)
    labels = ids.clone()
    labels[:, :4] = -100
    plain = logits(make().double())
    model = attach(make().double(), "eva", rank=R, rho=1.0, alpha=ALPHA, data=[{"input_ids": ids, "labels": labels}])
    assert torch.equal(logits(model), plain)
    layers = adapted(model)
    for path, x in inputs_of(model, ids).items():
        X = x[:, 3:-1].flatten(0, 1)  # what comes before a label: the model shifts them
        A: Any = layers[path].adapters["default"].lora_A.detach()
        Vh = torch.linalg.svd(X - X.mean(0), full_matrices=False)[2]
        torch.testing.assert_close((A * Vh[:R]).sum(1).abs(), torch.ones(R, dtype=torch.float64))
    assert len(layers) == len(inputs_of(model, ids)) > 0


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_move_and_neither_their_sum_nor_the_strength_changes(rslora: bool) -> None:
    model = llama()
    before = sum(1 for _ in adapted(attach(llama(), "lora")))
    attach(model, "eva", rank=4, rho=3.0, rslora=rslora, data=batches() * 9)
    layers = adapted(model)
    ranks = {path: layer.methods["default"].config.rank for path, layer in layers.items()}
    assert sum(ranks.values()) == 4 * before
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) <= 12
    for path, layer in layers.items():
        method: Any = layer.methods["default"]
        P: Any = layer.adapters["default"]
        assert method.scale == pytest.approx(ALPHA / (2 if rslora else 4))
        assert [len(P.lora_A), P.lora_B.shape[1]] == [ranks[path]] * 2
        torch.testing.assert_close(P.lora_A @ P.lora_A.t(), torch.eye(ranks[path]), rtol=1e-5, atol=1e-5)
    alike = [layers[f"model.layers.0.self_attn.{name}_proj"].adapters["default"].lora_A for name in "qkv"]
    few = min(map(len, alike))
    assert all(torch.equal(A[:few], alike[0][:few]) for A in alike)


class Pair(nn.Module):
    """Two layers beside each other; all inputs of the second are multiples of one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.thin = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(loss=(self.wide(x) + self.thin(x[:, :1].expand(-1, 16))).square().mean())


def test_a_layer_has_no_more_rank_than_its_inputs_and_may_have_none() -> None:
    x = torch.randn(80, 16, generator=torch.Generator().manual_seed(0)) * 0.9 ** torch.arange(16)
    layers = adapted(attach(Pair(), "eva", rank=4, data=[{"x": x}]))
    assert {path: len(layer.adapters["default"].lora_A) for path, layer in layers.items()} == {"wide": 7, "thin": 1}  # type: ignore[arg-type]
    still = x.clone()
    still[:, 0] = 1
    model = attach(Pair(), "eva", rank=2, data=[{"x": still}])
    assert {path: layer.methods["default"].config.rank for path, layer in adapted(model).items()} == {"wide": 4}
    assert type(model.thin) is nn.Linear
    assert sorted(vars(model.thin)) == sorted(vars(nn.Linear(1, 1)))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "wide.adapters.default.lora_A",
        "wide.adapters.default.lora_B",
    }


@pytest.mark.filterwarnings("ignore")
def test_it_begins_as_pefts_does() -> None:
    """On the same batches until all has converged. PEFT looks at the labels' own tokens, we at those before them."""
    ids = torch.randint(0, 64, (24, 20), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[:, :5] = -100
    labels[::3, 15:] = -100
    ahead = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    ours = [{"input_ids": a, "labels": b} for a, b in zip(ids.split(4), labels.split(4), strict=True)]
    moved = [{"input_ids": a, "labels": b} for a, b in zip(ids.split(4), ahead.split(4), strict=True)]
    settings = peft.EvaConfig(tau=0.999)
    config = peft.LoraConfig(r=R, target_modules=PROJECTIONS, init_lora_weights="eva", eva_config=settings)
    theirs = peft.get_peft_model(decaying(), config)
    peft.initialize_lora_eva_weights(theirs, moved, show_progress_bar=False)
    model = attach(decaying(), "eva", rank=R, tau=0.999, data=ours * 9)  # PEFT goes round by itself
    A: dict[str, Any] = {path: layer.adapters["default"].lora_A for path, layer in adapted(model).items()}
    B = {name: p for name, p in theirs.named_parameters() if "lora_A" in name}
    B = {name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight"): p for name, p in B.items()}
    assert {path: len(each) for path, each in A.items()} == {path: len(each) for path, each in B.items()}
    assert set(map(len, A.values())) == {1, 2, 3}
    for path, each in A.items():
        torch.testing.assert_close((each * B[path]).sum(1).abs(), torch.ones(len(each)), rtol=0, atol=1e-5)


def test_padding_does_not_count_and_labels_of_whole_rows_ask_for_all() -> None:
    ids, real = tokens(rows=2, length=4), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])

    def counted(**batch: Tensor) -> list[list[int]] | None:
        found = data_from(nn.Linear(1, 1), [batch], "eva").counted(batch)
        return None if found is None else found.int().tolist()

    assert counted(input_ids=ids, labels=ids, attention_mask=real) == [[0, 1, 1, 0], [1, 1, 1, 0]]
    assert counted(input_ids=ids, labels=torch.tensor([0, 1])) is None
    assert counted(input_ids=ids, attention_mask=real) == real.tolist()


def recipe(corpus: Path, *more: str) -> Recipe:
    return Recipe.parse(
        "model: {name: llama, preset: tiny}\nadapter: {name: eva, rank: 3, rho: 3, rows: 6}\n"
        f"data: {{name: text, path: {corpus}, length: 32, vocab: 320, validation: 0.2}}\n"
        "optimizer: {name: adamw, lr: 1e-2}\nsteps: 6\nbatch: 4\nmicro: 2\nsample: 0\n",
        *more,
    )


def begun(corpus: Path, *more: str) -> Run:
    run = build(recipe(corpus, *more)).run
    run.setup()
    return run


def test_in_a_run_the_tokens_count_that_have_labels_behind_them(corpus: Path) -> None:
    run = build(recipe(corpus)).run
    data = data_of(run, 6)
    for batch in data.batches():
        keep: Any = data.counted(batch)
        assert torch.equal(keep, batch["labels"] != -100)
        last = batch["segment"].diff(dim=1, append=torch.full((len(keep), 1), -1)) != 0
        assert torch.equal(keep, ~last), "all but the last token of each piece"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_follows_the_ranks_and_finds_them_again_twice(corpus: Path, precision: str) -> None:
    more = (f"precision={precision}",)
    untouched = build(recipe(corpus, *more)).run
    whole = begun(corpus, *more)
    ranks = {path: layer.methods["default"].config.rank for path, layer in adapted(whole.model).items()}
    assert len(set(ranks.values())) > 1
    assert sum(ranks.values()) == 3 * len(untouched.trainable()) // 2
    assert whole.given == untouched.given
    for _ in range(4):
        take_step(whole)
    held = Counter(id(p) for group in whole.optimizer.param_groups for p in group["params"])
    assert held == Counter(map(id, whole.trainable().values()))
    assert {group["role"] for group in whole.optimizer.param_groups if group["params"]} == {"adapter"}
    cut = begun(corpus, *more)
    for _ in range(2):
        take_step(cut)
        state = copied(cut.state_dict())
        cut = build(recipe(corpus, *more)).run
        cut.load_state_dict(state)
    for _ in range(2):
        take_step(cut)
    a, b = (copied(run.state_dict()) for run in (whole, cut))
    assert a["adapter"] == b["adapter"] == {"ranks": ranks}
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    for name, state in a["optimizer"]["state"].items():
        assert all(torch.equal(t, b["optimizer"]["state"][name][key]) for key, t in state.items())


def test_a_private_run_and_more_rank_than_an_input_has_are_refused() -> None:
    run: Any = SimpleNamespace(model=attach(llama(), "eva", rank=2, data=batches()), estimator=SimpleNamespace())
    Begin().check(run)
    run.estimator.secret = 1
    with pytest.raises(InputError, match="'eva' begins from the data, which the guarantee of a private run does"):
        Begin().check(run)
    model = llama()
    with pytest.raises(InputError, match=r"that of a weight 32 × 32 has 32"):
        attach(model, "eva", rank=33, data=batches())
    with pytest.raises(InputError, match=r"64 directions cannot be told from 36 tokens"):
        attach(model, "eva", rank=32, data=batches())
    assert not adapted(model)
    assert all(p.requires_grad for p in model.parameters())


class Student(nn.Module):
    """Two layers, the first to be adapted."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.first, self.second = nn.Linear(64, 32, bias=False), nn.Linear(32, 8, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.randn(32, 64, generator=g) / 8)
            self.second.weight.copy_(torch.randn(8, 32, generator=g) / 6)

    def answer(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(x).tanh())
        return found

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return SimpleNamespace(loss=(self.answer(x) - y).square().mean())


@pytest.mark.parametrize("seed", [0, 1])
def test_on_inputs_of_rank_four_it_descends_further_than_lora(seed: int) -> None:
    """In 50 steps: at equal rates, and at the best of the same rates for each."""
    g = torch.Generator().manual_seed(100 + seed)
    plane = torch.linalg.qr(torch.randn(64, 4, generator=g)).Q
    x = torch.randn(256, 4, generator=g) * torch.tensor([4.0, 3.0, 2.0, 1.0]) @ plane.t()
    y = Student(seed + 50).answer(x).detach()

    def after(rate: float, id: str, **more: Any) -> float:
        model = attach(Student(seed), id, rank=4, targets="first", **more)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
        for _ in range(50):
            loss = model(x, y).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found: float = model(x, y).loss.item()
        return found

    rates = (0.01, 0.03, 0.1, 0.3, 1.0)
    random = [after(rate, "lora") for rate in rates]
    eva = [after(rate, "eva", data=[{"x": x, "y": y}]) for rate in rates]
    assert all(a < b for a, b in zip(eva[:3], random[:3], strict=True))
    assert min(eva) < min(random)
    assert random.index(min(random)) == 3, "both were tuned: the best rate is not the last"
