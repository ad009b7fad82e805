"""What is special to Stable-SPAM: what clip, norm and reset promise, and where the released code does otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fallline.catalog import find
from fallline.kernels import clipped_adam
from fallline.kernels.clipped_adam import cut, measured
from fallline.optim import create
from fallline.optim.clipping import AdaClip, AdaGN
from fallline.optim.transform import Context

from .parameters import SHAPES, equal, gradient, make, parameters, tensors, through_disk, train, values
from .rows.steadied import stable_spam
from .table import ROWS

OPTIONS = next(row.options for row in ROWS if row.id == "stable-spam")
NAME = "layers.0.up.weight"


def config(**options: Any) -> Any:
    return find("optimizer", "stable-spam").load().Config(**options)


def context(u: Tensor, step: int) -> Context:
    return Context("a.weight", u, u, step, torch.tensor(1.0), 0)


def test_clip_norm_and_reset_happen_on_the_inputs_of_the_common_tests():
    """Else the test of the equation would not see them."""
    clip, scale, o = AdaClip(OPTIONS["gamma3"]), AdaGN(0.7, 0.9, 1e-8), config(**OPTIONS)
    states: list[Any] = [clip.init(torch.zeros(7, 3).double()), scale.init(torch.zeros(7, 3).double())]
    clips, sizes, resets, memory, W = 0, [], 0, {}, np.zeros((7, 3))
    for step in range(50):
        g = gradient(step, NAME, (7, 3))
        u = clip.update(g.clone(), states[0], context(g, step))
        clips += bool((u != g).any())
        sizes.append(scale.update(u, states[1], context(g, step)).norm())
        W = stable_spam("matrix", W, g.numpy(), memory, step + 1, 1e-2, o)
        resets += step > 0 and memory["age"] == 1
    assert 10 <= clips <= 40
    assert torch.stack(sizes).std() > 0.1
    assert resets == 7


def test_the_largest_lands_on_the_limit_and_others_above_it_below():
    clip = AdaClip(0.5)
    state = clip.init(torch.zeros(4))
    clip.update(torch.tensor([1.0, 0, 0, 0]), state, context(torch.zeros(4), 0))
    u = torch.tensor([-8.0, 6.0, 4.0, 0.5])
    limit = (0.25 * 1 + 0.5 * 8) / 0.75
    found = clip.update(u.clone(), state, context(u, 1))
    torch.testing.assert_close(found, torch.tensor([-limit, 6 * limit / 8, 4.0, 0.5]))


def test_without_memory_of_the_largest_nothing_is_clipped():
    clip = AdaClip(0.0)
    state = clip.init(torch.zeros(5).double())
    for step in range(6):
        g = gradient(step, "norm.weight", (5,))
        assert torch.equal(clip.update(g.clone(), state, context(g, step)), g)


def test_the_norm_is_its_average_by_the_root_of_its_average_square():
    scale = AdaGN(0.7, 0.9, 1e-8)
    state, norms = scale.init(torch.zeros(7, 3).double()), []
    for step in range(8):
        g = gradient(step, NAME, (7, 3))
        norms.append(g.norm())
        found = scale.update(g.clone(), state, context(g, step))
        back = torch.arange(step, -1, -1).double()
        a, b = (gamma**back / (gamma**back).sum() for gamma in (0.7, 0.9))
        nu = torch.stack(norms)
        torch.testing.assert_close(found.norm(), (a * nu).sum() / (b * nu**2).sum().sqrt())
        torch.testing.assert_close(found / found.norm(), g / g.norm())


def test_a_constant_gradient_has_norm_one_and_is_not_clipped():
    clip, scale = AdaClip(0.999), AdaGN(0.7, 0.9, 1e-8)
    g = gradient(0, NAME, (7, 3))
    first, second = clip.init(g), scale.init(g)
    for step in range(20):
        u = clip.update(g.clone(), first, context(g, step))
        torch.testing.assert_close(u, g, rtol=1e-13, atol=0)
        assert scale.update(u, second, context(g, step)).norm() == pytest.approx(1, rel=1e-7)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_scale_of_the_gradients_does_not_matter(factor: float):
    plain, scaled = parameters(), parameters()
    train(make("stable-spam", plain, OPTIONS | {"eps": 1e-30}), plain, 0, 20)
    optimizer = make("stable-spam", scaled, OPTIONS | {"eps": 1e-30})
    for step in range(20):
        for name, (p, _) in scaled.items():
            p.grad = factor * gradient(step, name, tuple(p.shape))
        optimizer.step()
    for name in SHAPES:
        torch.testing.assert_close(scaled[name][0], plain[name][0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("plain", [False, True], ids=["", "plain"])
def test_with_its_parts_neutral_it_is_torch_adamw(plain: bool):
    """No memory in clip and norm, gradients of norm one, no reset."""
    p, q = (nn.Parameter(gradient(99, NAME, (7, 3)).float()) for _ in range(2))
    neutral = {"gamma1": 0.0, "gamma2": 0.0, "gamma3": 0.0, "reset_every": 0, "weight_decay": 0.1}
    mine = create("stable-spam", [("a.weight", p)], lr=1e-2, **neutral)
    mine.plain = plain
    theirs = torch.optim.AdamW([q], lr=1e-2, weight_decay=0.1)
    for step in range(30):
        g = gradient(step, NAME, (7, 3)).float()
        p.grad, q.grad = g / g.norm(), g / g.norm()
        mine.step()
        theirs.step()
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def released(W: np.ndarray, G: np.ndarray, s: dict[str, Any], update: int, lr: float, o: Any) -> np.ndarray:
    """What the released code does: one counter for all, and at a reset the old moments once more."""
    s["t"] = s.get("t", 0) + 1
    top = np.abs(G).max()
    s["m"] = o.gamma3 * s.get("m", 0) + (1 - o.gamma3) * top
    limit = s["m"] / (1 - o.gamma3 ** s["t"])
    G = np.where(np.abs(G) > limit, G / top * limit, G)
    size = np.linalg.norm(G)
    s["a"] = o.gamma1 * s.get("a", 0) + (1 - o.gamma1) * size
    s["b"] = o.gamma2 * s.get("b", 0) + (1 - o.gamma2) * size**2
    mean, square = s["a"] / (1 - o.gamma1 ** s["t"]), s["b"] / (1 - o.gamma2 ** s["t"])
    G = G / size * mean / (np.sqrt(square) + o.eps)
    b1, b2 = o.betas
    M = b1 * s.get("M", 0) + (1 - b1) * G
    V = b2 * s.get("V", 0) + (1 - b2) * G**2
    s["M"], s["V"] = M, V
    if update % o.reset_every == 0:
        s["M"], s["V"], s["t"] = 0, 0, 1
    return W - lr * M / (1 - b1 ** s["t"]) / (np.sqrt(V / (1 - b2 ** s["t"])) + o.eps)


def test_it_is_the_released_code_until_the_first_reset():
    o = config(**OPTIONS | {"weight_decay": 0.0})
    p = nn.Parameter(gradient(99, NAME, (7, 3)))
    optimizer = create("stable-spam", [("a.weight", p)], **OPTIONS | {"weight_decay": 0.0})
    W, memory, apart = p.detach().numpy().copy(), {}, []
    for step in range(10):
        p.grad = gradient(step, NAME, (7, 3))
        optimizer.step()
        W = released(W, p.grad.numpy(), memory, step + 1, o.lr, o)
        apart.append(np.abs(p.detach().numpy() - W).max())
    assert max(apart[: o.reset_every - 1]) < 1e-12
    assert min(apart[o.reset_every - 1 :]) > 1e-3


def test_the_update_of_a_reset_is_the_first_one_again():
    """Each element moves by the learning rate: with t = 1, Adam is the sign of the gradient."""
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = create("stable-spam", [("a", p)], lr=1.0, reset_every=5)
    for update in range(1, 16):
        before = p.detach().clone()
        p.grad = gradient(update, "objective.tau", (3,))
        optimizer.step()
        moved = before - p.detach()
        assert torch.allclose(moved, p.grad.sign(), atol=1e-3) == (update in (1, 5, 10, 15))


def test_resumed_across_a_reset_is_bit_equal():
    straight, params = parameters(torch.float32), parameters(torch.float32)
    whole, optimizer = make("stable-spam", straight, OPTIONS), make("stable-spam", params, OPTIONS)
    train(whole, straight, 0, 16)
    for start, stop in ((0, 6), (6, 7), (7, 16)):  # before, at and after update 7
        train(optimizer, params, start, stop)
        saved = through_disk(optimizer.state_dict())
        optimizer = make("stable-spam", params, OPTIONS)
        optimizer.load_state_dict(saved)
    assert equal(values(params), values(straight))
    assert equal(tensors(optimizer.state_dict()), tensors(whole.state_dict()))


def test_a_spike_moves_little_and_is_soon_forgotten():
    """Twenty updates after one element was a thousand times too large, adamw still holds it back; ours hardly."""
    shares = {}
    for id, options in (("stable-spam", {}), ("adamw", {"betas": (0.9, 0.999), "weight_decay": 0.0})):
        found = []
        for spike in (1.0, 1000.0):
            p = nn.Parameter(torch.zeros(16, 16, dtype=torch.float64))
            optimizer = create(id, [("a.weight", p)], lr=1.0, **options)
            for step in range(320):
                p.grad = 1 + 0.3 * gradient(0, str(step), (16, 16))
                if step == 300:
                    p.grad[3, 5] *= spike
                before = p.detach().clone()
                optimizer.step()
            found.append((before - p.detach())[3, 5].item())
        shares[id] = abs(found[1] / found[0] - 1)
    assert shares["adamw"] > 0.5
    assert shares["stable-spam"] < 0.25


@pytest.mark.parametrize("plain", [False, True], ids=["", "plain"])
def test_zeros_do_nothing_and_nan_is_shown(plain: bool):
    p = nn.Parameter(torch.ones(2, 3))
    optimizer = create("stable-spam", [("a.weight", p)])
    optimizer.plain = plain
    p.grad = torch.zeros(2, 3)
    optimizer.step()
    assert torch.equal(p, torch.ones(2, 3))
    p.grad = torch.ones(2, 3)
    optimizer.step()
    assert (p < 1).all()
    p.grad[0, 1] = float("nan")
    optimizer.step()
    assert p[0, 1].isnan()


@pytest.mark.parametrize("size", [1 << 20, 4, 40], ids=str)
def test_slices_together_are_the_whole(size: int, monkeypatch: pytest.MonkeyPatch):
    """Of a parameter that is whole, turned or with gaps in memory; steps in which some slices are clipped."""
    monkeypatch.setattr(clipped_adam, "SLICE", size)
    g = gradient(0, NAME, (7, 3)).float()
    peaks, squares = measured(cut(g.view(-1)))
    assert peaks.amax() == g.abs().max()
    torch.testing.assert_close(squares.sum().sqrt(), g.norm())
    found = []
    for layout in ("plain", "whole", "turned", "gaps"):
        start = gradient(99, NAME, (7, 3)).float()
        data = {"turned": start.t().contiguous().t(), "gaps": torch.zeros(7, 6)[:, ::2].copy_(start)}
        p = nn.Parameter(data.get(layout, start))
        assert p.is_contiguous() == (layout in ("plain", "whole"))
        optimizer = create("stable-spam", [("a.weight", p)], **OPTIONS)
        optimizer.plain = layout == "plain"
        for step in range(9):
            p.grad = gradient(step, NAME, (7, 3)).float()
            optimizer.step()
        found.append(p.detach().contiguous())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-6)


def test_the_gradient_is_left_as_it_is():
    p = nn.Parameter(torch.zeros(7, 3))
    optimizer = create("stable-spam", [("a.weight", p)], **OPTIONS)
    for step in range(8):
        g = gradient(step, NAME, (7, 3)).float()
        p.grad = g.clone()
        optimizer.step()
        assert torch.equal(p.grad, g)
