"""The chain: what it applies, and that three very different rules fit its contract."""

from __future__ import annotations

import inspect
from math import sqrt

import pytest
import torch
from torch import Tensor, nn

from fallline.contracts import Change
from fallline.errors import InputError
from fallline.noise import rng
from fallline.optim import create
from fallline.optim.chain import Context, Transform, chain, partition
from fallline.optim.moments import Adam, Ema
from fallline.optim.state import State

from . import toy_transforms
from .parameters import equal, gradient, parameters, through_disk, train, values
from .toy_transforms import GlobalClip, LowRank, NoiseAdaptive


def test_the_toys_are_short():
    for toy in (GlobalClip, NoiseAdaptive, LowRank):
        assert len(inspect.getsource(toy).splitlines()) < 40, toy
    assert "optimizer" not in inspect.getsource(toy_transforms)


def matrices(*shapes: tuple[int, int]) -> dict[str, tuple[nn.Parameter, str]]:
    return {
        f"layers.{i}.weight": (nn.Parameter(torch.randn(s, generator=rng(0, i, "p"), dtype=torch.float64)), "matrix")
        for i, s in enumerate(shapes)
    }


def test_an_empty_chain_is_gradient_descent_with_decoupled_decay():
    params = parameters()
    start = values(params)
    train(chain()(params, lr=0.1, weight_decay=0.5), params, 0, 1)
    for name, (p, role) in params.items():
        decay = 0.5 if role in ("matrix", "embedding", "head", "adapter") else 0.0
        expected = (1 - 0.1 * decay) * start[name] - 0.1 * gradient(0, name, tuple(p.shape))
        torch.testing.assert_close(p.detach(), expected, rtol=1e-14, atol=1e-14)


def test_gradients_are_left_as_they_came():
    params = parameters()
    optimizer = chain(Ema(0.5), Adam((0.9, 0.99), 1e-8))(params, lr=0.1)
    train(optimizer, params, 0, 1)
    for name, (p, _) in params.items():
        assert p.grad is not None
        assert torch.equal(p.grad, gradient(0, name, tuple(p.shape)))


def test_a_rate_for_each_role_and_a_rule_for_each_role():
    params = parameters()
    start = values(params)
    rest = ("matrix", "embedding", "head", "adapter", "objective")
    optimizer = partition(dict.fromkeys(rest, chain()) | {"vector": chain(Ema(0.75))})(
        params, lr={"vector": 1.0} | dict.fromkeys(rest, 0.1)
    )
    train(optimizer, params, 0, 1)
    for name, (p, role) in params.items():
        step = 0.25 if role == "vector" else 0.1
        torch.testing.assert_close(start[name] - p.detach(), step * gradient(0, name, tuple(p.shape)))


def test_a_role_without_a_rule_is_refused():
    with pytest.raises(InputError, match=r"parameter 'embed\.weight' is a embedding, for which"):
        partition({"matrix": chain()})(parameters(), lr=0.1)


@pytest.mark.parametrize("id", ["adamw", "sgd", "scale"])
def test_a_sparse_gradient_is_refused(id: str):
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = create(id, table, lr=0.1)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(InputError, match=r"the gradient of 'weight' is sparse"):
        optimizer.step()


def test_fast_adam_equals_adam_on_every_role():
    found = []
    adam = Adam((0.9, 0.99), 1e-3)
    for plain in (False, True):
        params = parameters()
        optimizer = chain(adam, fused=adam.fused)(params, lr=0.1, weight_decay=0.5)
        optimizer.plain = plain
        train(optimizer, params, 0, 2, without=("norm.weight",))  # so that it is steps behind the others
        train(optimizer, params, 2, 6)
        found.append(values(params))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-12, atol=1e-12)


def test_two_transforms_of_one_kind_keep_two_states():
    params = matrices((3, 2))
    optimizer = chain(Ema(0.5), Ema(0.25))(params, lr=1.0)
    train(optimizer, params, 0, 1)
    state = optimizer.state_dict()["state"]["layers.0.weight"]
    g = gradient(0, "layers.0.weight", (3, 2))
    torch.testing.assert_close(state["ema"]["average"], 0.5 * g)
    torch.testing.assert_close(state["ema2"]["average"], 0.375 * g)


def test_half_precision_is_computed_in_float32_and_rounded_once():
    p = nn.Parameter(torch.full((2, 2), 1.0, dtype=torch.bfloat16))
    optimizer = chain(Ema(0.5))({"a": (p, "matrix")}, lr=2.0)
    p.grad = torch.full((2, 2), 2.0**-9, dtype=torch.bfloat16)
    optimizer.step()
    assert torch.equal(p, torch.full((2, 2), (1 - 2.0**-9), dtype=torch.float32).bfloat16())
    assert optimizer.state_dict()["state"]["a"]["ema"]["average"].dtype == torch.float32


class Seen(Transform):
    """Records what it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, float, int]] = []

    def update(self, u: Tensor, state: State, ctx: Context) -> Tensor:
        draw = int(torch.randint(1 << 30, (), generator=ctx.rng("noise")))
        assert torch.equal(ctx.grad, ctx.param.grad)  # type: ignore[arg-type]
        self.seen.append((ctx.name, ctx.step, float(ctx.lr), draw))
        return u


def test_context_counts_a_parameters_own_steps_and_draws_by_name():
    spy = Seen()
    params = matrices((2, 2), (2, 2))
    optimizer = chain(spy)(params, lr=0.1, seed=7)
    train(optimizer, params, 0, 1, without=("layers.1.weight",))
    train(optimizer, params, 1, 2)
    draws = [
        int(torch.randint(1 << 30, (), generator=rng(7, t, f"noise/layers.{i}.weight")))
        for i, t in [(0, 0), (0, 1), (1, 0)]
    ]
    assert spy.seen == [
        ("layers.0.weight", 0, 0.1, draws[0]),
        ("layers.0.weight", 1, 0.1, draws[1]),
        ("layers.1.weight", 0, 0.1, draws[2]),
    ]


def test_global_clip_sees_all_parameters_of_all_chains():
    params = parameters()
    start = values(params)
    optimizer = partition(
        {role: chain(GlobalClip(1.0)) for role in ("matrix", "embedding", "head", "vector", "adapter", "objective")}
    )(params, lr=1.0)
    assert not optimizer.separable
    train(optimizer, params, 0, 1)
    moved = torch.cat([(start[name] - p).flatten() for name, p in values(params).items()])
    g = torch.cat([gradient(0, name, tuple(p.shape)).flatten() for name, (p, _) in params.items()])
    assert g.norm() > 1
    torch.testing.assert_close(moved, g / g.norm())
    mine, torchs = parameters(torch.float32), parameters(torch.float32)
    optimizer = chain(GlobalClip(1.0))(mine, lr=1.0)
    other = chain()(torchs, lr=1.0)
    for step in range(4):
        train(optimizer, mine, step, step + 1)
        for name, (p, _) in torchs.items():
            p.grad = gradient(step, name, tuple(p.shape), torch.float32)
        nn.utils.clip_grad_norm_([p for p, _ in torchs.values()], 1.0)
        other.step()
    for name, (p, _) in mine.items():
        torch.testing.assert_close(p, torchs[name][0], rtol=1e-5, atol=1e-6)


def test_measuring_does_not_depend_on_order():
    """To the bit: 10⁸ + 4 + 4 is 10⁸ in float32, 4 + 4 + 10⁸ is not."""

    class Told(GlobalClip):
        def update(self, u: Tensor, state: State, ctx: Context) -> Tensor:
            told.add(float(ctx.measured["square"]))
            return super().update(u, state, ctx)

    told: set[float] = set()
    for order in ("abc", "cba", "bac"):
        params = {name: (nn.Parameter(torch.zeros(1)), "matrix") for name in order}
        optimizer = chain(Told(1.0))(params, lr=1.0)
        for name, (p, _) in params.items():
            p.grad = torch.full((1,), {"a": 1e4, "b": 2.0, "c": 2.0}[name])
        optimizer.step()
    assert len(told) == 1


def test_the_least_noisy_layer_of_a_group_has_the_full_rate():
    quiet, noisy = "layers.0.weight", "layers.1.weight"
    params = matrices((3, 3), (3, 3)) | {"lm_head.weight": (nn.Parameter(torch.zeros(3, 3).double()), "head")}
    adaptive = chain(NoiseAdaptive(0.1, 0.9))
    optimizer = partition({"matrix": adaptive, "head": chain(NoiseAdaptive(0.1, 0.9))})(params, lr=1.0)
    g, H = torch.ones(3, 3, dtype=torch.float64), 0.0
    for step in range(5):
        before = values(params)
        shake = (-1) ** step * 0.5
        for name, (p, _) in params.items():
            p.grad = g.clone() if name == quiet else g + shake
        optimizer.step()
        moved = {name: before[name] - p for name, p in values(params).items()}
        H = 0.9 * H + 0.1 * 9.0 if step > 0 else 0.0  # nine elements moved by one
        torch.testing.assert_close(moved[quiet], g)
        torch.testing.assert_close(moved["lm_head.weight"], g + shake)  # alone in its group
        rate = sqrt(0.1 / sqrt(0.1**2 + H))
        torch.testing.assert_close(moved[noisy], (g + shake) * rate)


def test_low_rank_stays_in_its_space_and_resumes():
    params = matrices((6, 5), (4, 5))
    start = values(params)
    make = chain(LowRank(2, every=3, inner=Adam((0.9, 0.99), 1e-8)))
    optimizer = make(params, lr=0.1, seed=3)
    train(optimizer, params, 0, 3)
    state = optimizer.state_dict()["state"]["layers.0.weight"]["lowrank"]
    assert {key: tuple(t.shape) for key, t in state["inner"].items()} == {"exp_avg": (6, 2), "exp_avg_sq": (6, 2)}
    P = state["P"].clone()
    expected = torch.empty(2, 5, dtype=torch.float64).normal_(generator=rng(3, 0, "project/layers.0.weight")) / sqrt(2)
    torch.testing.assert_close(P, expected)
    moved = start["layers.0.weight"] - values(params)["layers.0.weight"]
    torch.testing.assert_close(moved @ torch.linalg.pinv(P) @ P, moved)

    saved = through_disk(optimizer.state_dict())
    again = {name: (nn.Parameter(p.detach().clone()), role) for name, (p, role) in params.items()}
    resumed = make(again, lr=0.1, seed=3)
    resumed.load_state_dict(saved)
    for opt, ps in ((optimizer, params), (resumed, again)):
        train(opt, ps, 3, 8)
    assert equal(values(params), values(again))
    assert not torch.equal(optimizer.state_dict()["state"]["layers.0.weight"]["lowrank"]["P"], P)


def test_a_transform_may_remap_its_own_state():
    params = matrices((4, 5))
    optimizer = chain(LowRank(2, every=100, inner=Adam((0.9, 0.99), 1e-8)))(params, lr=0.1)
    train(optimizer, params, 0, 2)
    old, _ = params["layers.0.weight"]

    def state() -> State:
        return optimizer.state_dict()["state"]["layers.0.weight"]

    before = state()["lowrank"]
    taller = nn.Parameter(torch.zeros(6, 5, dtype=torch.float64))
    optimizer.remap([Change("layers.0.weight", old, taller)])
    assert torch.equal(state()["lowrank"]["P"], before["P"])
    assert torch.equal(state()["lowrank"]["inner"]["exp_avg"][:4], before["inner"]["exp_avg"])
    assert state()["step"] == 2
    wider = nn.Parameter(torch.zeros(6, 8, dtype=torch.float64))
    optimizer.remap([Change("layers.0.weight", taller, wider)])
    assert tuple(state()["lowrank"]["P"].shape) == (2, 8)
    assert not state()["lowrank"]["inner"]["exp_avg"].any()


def test_state_of_another_shape_begins_anew_by_default():
    class RowNorms(Transform):
        def init(self, param: Tensor) -> State:
            return {"norms": torch.zeros(param.shape[0])}

        def update(self, u: Tensor, state: State, ctx: Context) -> Tensor:
            state["norms"] += 1
            return u

    params = matrices((4, 5))
    optimizer = chain(RowNorms())(params, lr=0.1)
    train(optimizer, params, 0, 2)
    old, _ = params["layers.0.weight"]
    optimizer.remap([Change("layers.0.weight", old, nn.Parameter(torch.zeros(6, 5)))])
    assert "layers.0.weight" not in optimizer.state_dict()["state"]
    params["layers.0.weight"] = optimizer.param_groups[0]["params"][0], "matrix"
    train(optimizer, params, 2, 3)
    state = optimizer.state_dict()["state"]["layers.0.weight"]
    assert state["step"] == 1
    assert torch.equal(state["rownorms"]["norms"], torch.ones(6))
