"""bfloat16 parameters: small updates count, rounding is fair, and a resumed run is bit-equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fallline.contracts import Change
from fallline.errors import InputError
from fallline.noise import rng
from fallline.optim import precision as module
from fallline.optim.chain import chain
from fallline.optim.precision import LowPrecision, low_precision, round_stochastic

from .parameters import equal, gradient, make, tensors, through_disk
from .rows import Row
from .table import ROWS
from .toy_transforms import GlobalClip

each = pytest.mark.parametrize("row", ROWS, ids=str)
modes = pytest.mark.parametrize("mode", ["bfloat16", "bfloat16-stochastic"])


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.up = nn.Linear(4, 5)
        self.head = nn.Linear(5, 9, bias=False)
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(torch.randn(p.shape, generator=rng(0, 0, name)))
        self.to(dtype)


def own() -> list[tuple[str, nn.Parameter]]:
    """An objective's parameter, which stays float32."""
    return [("objective.tau", nn.Parameter(torch.ones(3)))]


def wrapped(row: Row, mode: Any, model: nn.Module, extra: list[tuple[str, nn.Parameter]] | None = None):
    return low_precision(lambda params: make(row.id, params, row.options), model, extra or [], mode, seed=5)


def run(
    optimizer: torch.optim.Optimizer, model: nn.Module, extra: Any, start: int, stop: int, scale: float = 1.0
) -> None:
    for step in range(start, stop):
        for name, p in [*model.named_parameters(), *extra]:
            p.grad = (gradient(step, name, tuple(p.shape)) * scale).to(p.dtype)
        optimizer.step()


def weights(model: nn.Module, extra: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in [*model.named_parameters(), *extra]}


def test_rounding_is_fair():
    """The mean of many roundings is the value, within four standard errors; each is one of the two neighbours."""
    noise = torch.Generator().manual_seed(0)
    x = torch.tensor([1.0, 1.001, 1.0039, -0.3, 1e-20, 3e38, 0.0, -7.77])
    n = 100_000
    rounded = round_stochastic(x.expand(n, -1).contiguous(), noise).double()
    down = (x.view(torch.int32) & -65536).view(torch.float32)
    up = ((x.view(torch.int32) & -65536) + 65536).view(torch.float32)
    assert ((rounded == down.double()) | (rounded == up.double())).all()
    spacing = (up.double() - down.double()).abs()
    assert ((rounded.mean(0) - x.double()).abs() <= 4 * spacing * 0.5 / n**0.5).all()
    assert (rounded[:, 0] == 1).all()  # already a bfloat16 value


def test_parameters_are_rounded_by_noise_of_their_own():
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False, dtype=torch.bfloat16) for _ in range(2)))
    for layer in model:
        nn.init.ones_(layer.weight)
        layer.weight.grad = torch.ones_like(layer.weight)
    low_precision(lambda params: make("sgd", params, {"lr": 1e-3}), model, [], "bfloat16-stochastic").step()
    first, second = model.parameters()
    assert first.float().std() > 0
    assert not torch.equal(first, second)


def test_layout_in_memory_survives_a_resume():
    found, saved = [], None
    for turned in (False, True):
        model = Model()
        for module_ in (model.up, model.head) if turned else ():
            module_.weight = nn.Parameter(module_.weight.detach().T.contiguous().T)
        for start, stop in ((0, 2), (2, 4)):
            optimizer = wrapped(ROWS[0], "bfloat16", model)
            if start:
                optimizer.load_state_dict(saved)
            run(optimizer, model, [], start, stop)
            saved = through_disk(optimizer.state_dict())
        found.append(weights(model, []))
    assert equal(*found)


def test_rounding_shows_what_is_not_finite():
    odd = torch.tensor([float("nan"), float("inf"), -float("inf")])
    odd = torch.cat([odd, torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)])
    rounded = round_stochastic(odd.expand(100, -1).contiguous(), torch.Generator().manual_seed(0))
    assert rounded[:, 0].isnan().all()
    assert (rounded[:, 1] == float("inf")).all()
    assert (rounded[:, 2] == -float("inf")).all()
    assert rounded[:, 3].isnan().all()


def test_small_updates_count_only_with_low_precision():
    """Two hundred steps of 1/1000 from 1, where half a unit in the last place is 1/256 below."""
    found = {}
    for mode in ("lost", "bfloat16", "bfloat16-stochastic"):
        model = nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
        nn.init.ones_(model.weight)
        optimizer: torch.optim.Optimizer
        if mode == "lost":
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, foreach=True)
        else:
            optimizer = low_precision(lambda params: make("sgd", params, {"lr": 1e-3}), model, [], mode)
        for _ in range(200):
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
        found[mode] = model.weight.detach().float()
    assert (found["lost"] == 1).all()
    torch.testing.assert_close(found["bfloat16"], torch.full((32, 64), 0.8).bfloat16().float())
    assert found["bfloat16-stochastic"].std() > 0
    assert found["bfloat16-stochastic"].mean().item() == pytest.approx(0.8, abs=2e-3)


@each
def test_masters_are_the_float32_run(row: Row):
    """With gradients that bfloat16 holds exactly, the master is bit for bit the float32 parameter."""
    half, full = Model(), Model().float()
    optimizer = wrapped(row, "bfloat16", half)
    other = low_precision(lambda params: make(row.id, params, row.options), full, [], "float32")
    for step in range(6):
        for name, p in half.named_parameters():
            p.grad = gradient(step, name, tuple(p.shape), torch.bfloat16)
        for name, q in full.named_parameters():
            q.grad = gradient(step, name, tuple(q.shape), torch.bfloat16).float()
        optimizer.step()
        other.step()
    master = {name: s["master"] for name, s in optimizer.state_dict()["state"].items()}
    assert equal(master, {name: q.detach() for name, q in full.named_parameters()})
    for name, p in half.named_parameters():
        assert torch.equal(p, master[name].bfloat16())


@each
@modes
def test_resumed_is_bit_equal(row: Row, mode: str):
    straight, beside = Model(), own()
    whole = wrapped(row, mode, straight, beside)
    run(whole, straight, beside, 0, 9)
    model, extra, saved, start = Model(), own(), None, 0
    for stop in (2, 5, 9):
        fresh, more = Model(), own()
        fresh.load_state_dict(model.state_dict())
        more[0][1].data.copy_(extra[0][1].data)
        optimizer = wrapped(row, mode, fresh, more)
        if saved is not None:
            optimizer.load_state_dict(through_disk(saved))
        run(optimizer, fresh, more, start, stop)
        model, extra, start, saved = fresh, more, stop, optimizer.state_dict()
    assert equal(weights(model, extra), weights(straight, beside))
    assert equal(tensors(saved), tensors(whole.state_dict()))
    kinds = {t.dtype for t in tensors(saved["inner"]["state"]).values() if t.is_floating_point()}
    assert kinds <= {torch.float32}


@each
@modes
def test_in_buckets_it_is_the_same(row: Row, mode: str, monkeypatch: pytest.MonkeyPatch):
    found = []
    for bucket in (1, 1 << 26):
        monkeypatch.setattr(module, "BUCKET", bucket)
        model = Model()
        run(wrapped(row, mode, model), model, [], 0, 5)
        found.append(weights(model, []))
    assert equal(*found)


def test_rules_over_all_parameters_are_not_cut_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BUCKET", 1)
    model, full = Model(), Model().float()
    clipped = chain(GlobalClip(0.5))
    run(low_precision(lambda params: clipped(params, lr=1.0), model), model, [], 0, 1)
    run(clipped(full, lr=1.0), full, [], 0, 1)
    for p, q in zip(model.parameters(), full.parameters(), strict=True):
        torch.testing.assert_close(p.float(), q, rtol=1e-2, atol=1e-2)


def test_without_masters_nothing_is_kept_between_steps():
    model = Model()
    optimizer = wrapped(ROWS[1], "bfloat16-stochastic", model)
    run(optimizer, model, [], 0, 2)
    assert isinstance(optimizer, LowPrecision)
    copies = [p for group in optimizer.inner.param_groups for p in group["params"]]
    assert len(copies) == 4
    assert all(p.untyped_storage().nbytes() == 4 and p.grad is None for p in copies)
    assert not tensors(optimizer.state_dict()["state"])


def test_a_weight_set_from_outside_is_taken_over():
    """Where the parameter no longer is the rounded master, somebody wrote to it; elsewhere the master stays."""
    model = nn.Linear(3, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    optimizer = low_precision(lambda params: make("sgd", params, {"lr": 1e-3}), model)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    with torch.no_grad():
        model.weight[0, 1] = 5.0
    optimizer.step()
    master = optimizer.state_dict()["state"]["weight"]["master"]
    torch.testing.assert_close(master, torch.tensor([[0.998, 4.999, 0.998]]), rtol=0, atol=1e-6)


def test_weights_are_the_models_and_not_a_loaded_masters():
    model = nn.Linear(3, 1, bias=False, dtype=torch.bfloat16)
    optimizer = low_precision(lambda params: make("sgd", params, {"lr": 0.5}), model)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    saved = through_disk(optimizer.state_dict())
    optimizer.step()
    now = model.weight.detach().float()
    optimizer.load_state_dict(saved)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach().float(), now - 0.5, rtol=2**-8, atol=0)


@modes
def test_a_frozen_parameter_joins_its_role_when_thawed(mode: str):
    model = nn.ModuleDict({"table": nn.Embedding(5, 3), "up": nn.Linear(3, 3)}).bfloat16()
    model["table"].requires_grad_(False)
    optimizer = wrapped(ROWS[-1], mode, model)
    assert isinstance(optimizer, LowPrecision)
    model["table"].requires_grad_(True)
    optimizer.remap([Change("table.weight", None, model["table"].weight)])
    for part in (optimizer, optimizer.inner):
        groups = {group["role"]: group["params"] for group in part.state_dict()["groups"]}
        assert groups["embedding"] == ["table.weight"]


@modes
def test_schedules_and_float32_parameters(mode: str):
    model, extra = Model(), own()
    optimizer = wrapped(ROWS[0], mode, model, extra)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: float(t < 1))
    run(optimizer, model, extra, 0, 1)
    schedule.step()
    before = weights(model, extra)
    run(optimizer, model, extra, 1, 2)  # at rate zero
    assert equal(weights(model, extra), before)
    assert extra[0][1].dtype == torch.float32
    assert not torch.equal(extra[0][1], torch.ones(3))


@each
@modes
def test_freezing_thawing_and_growing(row: Row, mode: str):
    model = Model()
    optimizer = wrapped(row, mode, model)
    run(optimizer, model, [], 0, 2)
    p = model.head.weight
    kept = {k: v.clone() for k, v in tensors(optimizer.state_dict()).items() if "head" in k}
    optimizer.remap([Change("head.weight", p, None, policy="keep")])
    assert "head.weight" not in optimizer.state_dict()["state"]
    run(optimizer, Frozen(model, "head.weight"), [], 2, 3)
    optimizer.remap([Change("head.weight", None, p)])
    assert equal({k: v for k, v in tensors(optimizer.state_dict()).items() if "head" in k}, kept)
    wide = nn.Linear(5, 11, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        wide.weight[:9] = p
        wide.weight[9:] = 3.0
    model.head = wide
    optimizer.remap([Change("head.weight", p, wide.weight)])
    run(optimizer, model, [], 3, 4, scale=0.0)
    if row.options.get("momentum", 0) == 0 and row.id == "sgd":
        torch.testing.assert_close(wide.weight[9:], torch.full((2, 5), 3.0, dtype=torch.bfloat16))
    if mode == "bfloat16":
        master = optimizer.state_dict()["state"]["head.weight"]["master"]
        torch.testing.assert_close(master, wide.weight.float(), rtol=2**-8, atol=0)
        assert (master[9:] - 3.0).abs().max() < 0.1


class Frozen:
    """The model without one parameter, as `run` sees it."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name

    def named_parameters(self):
        return [(n, p) for n, p in self.model.named_parameters() if n != self.name]


def test_other_half_precision_is_refused():
    with pytest.raises(InputError, match=r"parameter 'weight' is torch.float16; only bfloat16 and float32"):
        low_precision(lambda params: make("sgd", params, {}), nn.Linear(2, 2, bias=False, dtype=torch.float16))
