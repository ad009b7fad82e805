"""What is special to SPAM: when it clips and resets, what a spike then does, sparse moments, and its peer."""

from __future__ import annotations

from importlib import import_module
from itertools import pairwise
from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fallline.catalog import find
from fallline.contracts import Change
from fallline.errors import InputError
from fallline.kernels.bits import pack, positions
from fallline.kernels.elementwise import SOURCE
from fallline.kernels.native import compiled
from fallline.optim import create
from fallline.optim.adams import SpikeAdam

from .parameters import equal, gradient, make, parameters, tensors, through_disk, train, values
from .rows.spikes import spam
from .table import ROWS

OPTIONS = {str(row): row.options for row in ROWS if row.id == "spam"}
NAME = "layers.0.up.weight"
NEVER = {"threshold": 0.0, "reset_every": 0}

plain_too = pytest.mark.parametrize("plain", [False, True], ids=["", "plain"])


def config(**options: Any) -> Any:
    return find("optimizer", "spam").load().Config(**options)


def one(p: nn.Parameter, plain: bool = False, **options: Any) -> Any:
    optimizer = create("spam", [("a.weight", p)], **options)
    optimizer.plain = plain
    return optimizer


@pytest.mark.parametrize("row", OPTIONS)
def test_clip_and_reset_happen_on_the_inputs_of_the_common_tests(row: str):
    """Else the test of the equation would not see them; in many updates some elements are clipped and others not."""
    o, memory, W = config(**OPTIONS[row]), {"name": NAME}, np.zeros((7, 3))
    some, resets = 0, 0
    for step in range(50):
        W = spam("matrix", W, gradient(step, NAME, (7, 3)).numpy(), memory, step + 1, 1e-2, o)
        some += bool(memory["clipped"].any() and not memory["clipped"].all())
        resets += step > 0 and memory["k"] == 1
    assert some >= 8
    assert resets == 50 // o.reset_every


@plain_too
def test_without_clip_and_reset_it_is_adam(plain: bool):
    p, q = (nn.Parameter(gradient(99, NAME, (7, 3))) for _ in range(2))
    mine, theirs = one(p, plain, lr=1e-2, **NEVER), torch.optim.Adam([q], lr=1e-2)
    for step in range(30):
        p.grad = gradient(step, NAME, (7, 3))
        q.grad = p.grad.clone()
        theirs.param_groups[0]["eps"] = 1e-6 / sqrt(1 - 0.999 ** (step + 1))  # beside the uncorrected root
        mine.step()
        theirs.step()
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@plain_too
def test_a_spike_moves_the_moment_by_no_more_than_its_limit(plain: bool):
    """One element a thousand times too large: M moves by (1 − β₁) √(θ V), and V by less than θ parts in a thousand."""
    for theta in (4.0, 5000.0):
        p = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
        optimizer = one(p, plain, threshold=theta, clip_after=20)
        state = optimizer.state[p]
        for step in range(30):
            p.grad = 0.1 * (1 + 0.3 * gradient(0, str(step), (4, 4)).tanh())
            if step == 29:
                before, V = state["spikeadam"]["exp_avg"].clone(), state["spikeadam"]["exp_avg_sq"][1, 2].clone()
                p.grad[1, 2] *= 1000
            optimizer.step()
        moved = (state["spikeadam"]["exp_avg"] - 0.9 * before)[1, 2]
        assert moved.item() == pytest.approx(0.1 * (theta * V).sqrt().item(), rel=1e-12)
        now = state["spikeadam"]["exp_avg_sq"][1, 2]
        assert now.item() == pytest.approx(((0.999 + 0.001 * theta) * V).item(), rel=1e-12)


@plain_too
def test_it_clips_only_where_the_second_moment_can_be_trusted(plain: bool):
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = one(p, plain, threshold=1e-4, clip_after=4, reset_every=10)
    clipped = []
    for update in range(1, 31):
        V = optimizer.state[p]["spikeadam"]["exp_avg_sq"].clone() if update > 1 else torch.zeros(3).double()
        p.grad = 1 + update * torch.ones(3).double()
        optimizer.step()
        V = V * (update % 10 > 0) * 0.999
        clipped.append((optimizer.state[p]["spikeadam"]["exp_avg_sq"] - V < 0.0009 * p.grad**2).all().item())
    assert [update for update, was in zip(range(1, 31), clipped, strict=True) if was] == [
        update for update in range(1, 31) if update % 10 >= 4
    ]


def test_the_rate_after_a_reset():
    """None lost before the first, then a hundredth, and all of it after K updates."""
    adam = SpikeAdam((0.9, 0.999), 1e-6, threshold=0, clip_after=20, reset_every=500, reset_step=False, rewarm=150)
    shares = [adam.share(update - 1) for update in range(1, 1200)]
    assert shares[:499] == [1.0] * 499
    assert shares[499] == pytest.approx(0.01)
    assert shares[499 + 75] == pytest.approx(0.5, abs=0.01)
    assert np.all(np.diff(shares[499:650]) > 0)
    assert shares[649:999] == [1.0] * 350
    assert shares[999] == shares[499]


@plain_too
@pytest.mark.parametrize("again", [False, True], ids=["t goes on", "t begins again"])
def test_the_first_step_after_a_reset(plain: bool, again: bool):
    """With t going on it is (1 − β₁)/√(1 − β₂) = 3.16 times the sign of the gradient, of which s leaves a hundredth."""
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    betas = (0.9, 0.999)
    optimizer = one(p, plain, lr=1.0, betas=betas, reset_every=20_000, clip_after=19_999, reset_step=again, eps=1e-30)
    p.grad = torch.ones(3).double()
    optimizer.step()
    optimizer.state[p]["step"] = 19_999  # as if it had made so many
    before = p.detach().clone()
    p.grad = torch.tensor([1.0, -2.0, 0.5]).double()
    optimizer.step()
    size = 0.01 * (1.0 if again else 0.1 / sqrt(0.001))
    torch.testing.assert_close(before - p.detach(), size * p.grad.sign(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("row", OPTIONS)
def test_resumed_across_a_reset_is_bit_equal(row: str):
    straight, params = parameters(torch.float32), parameters(torch.float32)
    whole, optimizer = make("spam", straight, OPTIONS[row]), make("spam", params, OPTIONS[row])
    train(whole, straight, 0, 16)
    for start, stop in ((0, 3), (3, 4), (4, 5), (5, 16)):
        train(optimizer, params, start, stop)
        saved = through_disk(optimizer.state_dict())
        optimizer = make("spam", params, OPTIONS[row])
        optimizer.load_state_dict(saved)
    assert equal(values(params), values(straight))
    assert equal(tensors(optimizer.state_dict()), tensors(whole.state_dict()))


def test_spikes_cost_it_less_than_adam():
    """A language model of 24 words, each followed by one of its own. Every tenth gradient is a thousand times too large
    in a third of its elements."""
    words = torch.arange(24)
    losses = {}
    for name, options in {"spam": {"reset_every": 0}, "adam": NEVER}.items():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Embedding(24, 16), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 24))
        optimizer = create("spam", model, lr=1e-2, **options)
        for step in range(100):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(words), (5 * words + 7) % 24)
            loss.backward()
            if step % 10 == 9:
                for i, p in enumerate(model.parameters()):
                    noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
                    p.grad += 1000 * p.grad.std() * noise * (noise.abs() > 1)
            optimizer.step()
        losses[name] = loss.item()
    assert losses["spam"] < 0.6 * losses["adam"], losses


@plain_too
def test_sparse_only_some_elements_move_and_they_change_at_a_reset(plain: bool):
    p = nn.Parameter(torch.zeros(9, 11, dtype=torch.float64))
    optimizer = one(p, plain, lr=1.0, density=0.3, reset_every=6, clip_after=2, rewarm=0)
    moved = []
    for update in range(1, 19):
        before = p.detach().clone()
        p.grad = gradient(update, "a", (9, 11)) + 3
        optimizer.step()
        moved.append(p.detach() != before)
    assert all(int(m.sum()) == int(0.3 * 99) for m in moved)
    changed = [not torch.equal(a, b) for a, b in pairwise(moved)]
    assert [i + 2 for i, was in enumerate(changed) if was] == [6, 12, 18]
    assert torch.stack([moved[0], moved[6], moved[12], moved[17]]).any(0).sum() > 60
    state = optimizer.state_dict()["state"]["a.weight"]["randomentries"]
    assert {len(m) for m in tensors(state["inner"]).values()} == {29}
    assert state["mask"].shape == (13,)


def test_saved_moments_of_other_elements_are_refused():
    params = parameters(torch.float32)
    half, quarter = make("spam", params, {"density": 0.5}), make("spam", params, {"density": 0.25})
    train(half, params, 0, 2)
    with pytest.raises(InputError, match=r"state is of .*\(density 0\.5\).*, this is .*\(density 0\.25\)"):
        quarter.load_state_dict(half.state_dict())


def test_sparse_draws_follow_the_seed_and_the_name():
    def drawn(name: str, seed: int) -> Tensor:
        p = nn.Parameter(torch.zeros(8, 8))
        optimizer = create("spam", [(name, p)], seed=seed, density=0.5)
        p.grad = torch.ones(8, 8)
        optimizer.step()
        return p.detach() != 0

    assert torch.equal(drawn("a.weight", 0), drawn("a.weight", 0))
    assert not torch.equal(drawn("a.weight", 0), drawn("a.weight", 1))
    assert not torch.equal(drawn("a.weight", 0), drawn("b.weight", 0))


def test_sparse_is_for_hidden_matrices():
    params = parameters(torch.float32)
    optimizer = make("spam", params, {"density": 0.5})
    train(optimizer, params, 0, 1)
    state = optimizer.state_dict()["state"]
    assert {params[name][1] for name, s in state.items() if "randomentries" in s} == {"matrix"}
    assert all("spikeadam" in s for name, s in state.items() if params[name][1] != "matrix")


def test_a_matrix_too_small_for_one_element_stays_as_it_is():
    p = nn.Parameter(torch.ones(1, 3))
    optimizer = one(p, density=0.1)
    p.grad = torch.ones(1, 3)
    optimizer.step()
    assert torch.equal(p, torch.ones(1, 3))


@pytest.mark.parametrize("n", [1, 7, 8, 9, 1000])
def test_bits(n: int):
    for seed, part in enumerate((0.0, 0.3, 1.0)):
        flags = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < part
        bits = pack(flags)
        assert bits.shape == (-(-n // 8),)
        assert torch.equal(positions(bits, int(flags.sum())), flags.nonzero().squeeze(1))
        assert [bool(int(bits[i // 8]) >> i % 8 & 1) for i in range(n)] == flags.tolist()


def test_a_clip_that_can_never_be_is_refused():
    with pytest.raises(InputError, match=r"'clip_after' must be below 'reset_every' 20, or nothing is ever clipped"):
        config(reset_every=20)
    config(reset_every=20, threshold=0.0)
    config(reset_every=0)


@pytest.mark.peer
@pytest.mark.parametrize("shape", [(7, 3), (5,)], ids=str)
def test_agrees_with_pytorch_optimizer_before_a_reset(shape: tuple[int, ...]):
    """Fifty steps with spikes that it clips; before its fourth version the clip of matrices was lost."""
    peer = import_module("pytorch_optimizer")
    p, q = (nn.Parameter(gradient(99, NAME, shape)) for _ in range(2))
    a = create("spam", [("a.weight", p)], lr=1e-2, threshold=2.0)
    b = peer.SPAM([q], lr=1e-2, threshold=2)
    for step in range(50):
        p.grad = gradient(step, NAME, shape)
        q.grad = p.grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [None, 1 << 20, 4, 40], ids=str)
def test_parts_together_are_the_whole(size: int | None, monkeypatch: pytest.MonkeyPatch):
    """In C, and in slices without; of a parameter that is whole, turned or with gaps in memory; some are clipped."""
    if size is None:
        if compiled(SOURCE) is None:
            pytest.skip("no C compiler")
        monkeypatch.setattr("fallline.kernels.elementwise.SHARE", 4)
    else:
        monkeypatch.setattr("fallline.kernels.elementwise.compiled", lambda source: None)
        monkeypatch.setattr("fallline.kernels.spike_adam.SLICE", size)
    for options in OPTIONS.values():
        found = []
        for layout in ("plain", "whole", "turned", "gaps"):
            start = gradient(99, NAME, (7, 3)).float()
            data = {"turned": start.t().contiguous().t(), "gaps": torch.zeros(7, 6)[:, ::2].copy_(start)}
            p = nn.Parameter(data.get(layout, start))
            optimizer = one(p, layout == "plain", **options)
            for step in range(9):
                p.grad = gradient(step, NAME, (7, 3)).float()
                optimizer.step()
                assert torch.equal(p.grad, gradient(step, NAME, (7, 3)).float())
            found.append(p.detach().contiguous())
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", ["C", "slices", "plain"])
def test_elements_whose_gradients_begin_late_are_not_held_at_zero(way: str, monkeypatch: pytest.MonkeyPatch):
    """New rows of a matrix that grew, when clips have begun: V is 0 there, and so would be the limit, for ever."""
    if way == "slices":
        monkeypatch.setattr("fallline.kernels.elementwise.compiled", lambda source: None)
    p, q = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(6, 4))
    optimizer = one(p, way == "plain", lr=1e-2, threshold=2.0, clip_after=3)
    for step in range(8):
        p.grad = 1 + gradient(step, NAME, (4, 4)).float().tanh()
        optimizer.step()
    optimizer.remap([Change("a.weight", p, q)])
    for step in range(8):
        q.grad = torch.ones(6, 4)
        q.grad[5, 3] = step > 3
        optimizer.step()
    assert (q[4:].flatten()[:-1] < -0.01).all()
    assert q[5, 3] < -0.005


@pytest.mark.parametrize("way", ["C", "slices", "plain"])
def test_a_spike_beside_a_nan_is_clipped(way: str, monkeypatch: pytest.MonkeyPatch):
    if way == "slices":
        monkeypatch.setattr("fallline.kernels.elementwise.compiled", lambda source: None)
    p = nn.Parameter(torch.zeros(3))
    optimizer = one(p, way == "plain", threshold=4.0, clip_after=2)
    for spikes in ([1.0, 1.0, 1.0], [1.0, 1000.0, float("nan")]):
        p.grad = torch.tensor(spikes)
        optimizer.step()
    limit = (4 * 0.001) ** 0.5
    moment = optimizer.state[p]["spikeadam"]["exp_avg"]
    torch.testing.assert_close(moment[:2], torch.full((2,), 0.09 + 0.1 * limit))
    assert p.isnan().tolist() == [False, False, True]


@plain_too
def test_nan_is_shown_where_it_is(plain: bool):
    p = nn.Parameter(torch.ones(2, 3))
    optimizer = one(p, plain, clip_after=1)
    for value in (1.0, float("nan")):
        p.grad = torch.ones(2, 3)
        p.grad[0, 1] = value
        optimizer.step()
    assert p.isnan().nonzero().tolist() == [[0, 1]]
