"""What is special to FRUGAL: its two ends, that a part and the rest make the whole, and whose turn it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fallline.catalog import find
from fallline.contracts import Change
from fallline.errors import InputError
from fallline.kernels import split_adam
from fallline.linalg import row_norms
from fallline.noise import rng
from fallline.optim import create
from fallline.optim.chain import ChainOptimizer
from fallline.optim.moments import Adam
from fallline.optim.split import TensorSplit, cyclic, share

from .parameters import SHAPES, equal, gradient, make, parameters, tensors, through_disk, train, values
from .rows.frugal import NAMES, OPTIONS, active, frugal

COORDINATES = ("columns", "rows", "entries", "block")
SPLITS = (*COORDINATES, "svd")

each = pytest.mark.parametrize("split", SPLITS)
coordinates = pytest.mark.parametrize("split", COORDINATES)
paths = pytest.mark.parametrize("plain", [False, True], ids=["", "plain"])


def config(**options: Any) -> Any:
    return find("optimizer", "frugal").load().Config(**options)


def random(*shape: int, step: int = 0) -> Tensor:
    return torch.randn(shape, generator=rng(0, step, "x"), dtype=torch.float64)


def moves(p: nn.Parameter, optimizer: ChainOptimizer, updates: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Gradient and what was subtracted, update by update."""
    for step in range(updates):
        p.grad = random(*p.shape, step=step)
        before = p.detach().clone()
        optimizer.step()
        yield p.grad, before - p.detach()


def one(split: str, shape: tuple[int, ...] = (8, 12), **options: Any) -> tuple[nn.Parameter, Any]:
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    return p, create("frugal", [("a.weight", p)], split=split, **{"lr": 1.0} | options)


@coordinates
@paths
def test_with_all_of_it_adam_has_resets(split: str, plain: bool):
    """At density 1 it is AdamW, made anew every T updates."""
    p, q = (nn.Parameter(random(8, 12, step=99)) for _ in range(2))
    options = {"density": 1.0, "refresh_every": 7, "weight_decay": 0.1, "betas": (0.9, 0.99)}
    mine = create("frugal", [("a.weight", p)], lr=1e-2, split=split, **options)
    mine.plain = plain
    for step in range(20):
        if step % 7 == 0:
            theirs = torch.optim.AdamW([q], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
        p.grad = random(8, 12, step=step)
        q.grad = p.grad.clone()
        mine.step()
        theirs.step()
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@each
@paths
def test_with_none_of_it_there_is_only_the_sign(split: str, plain: bool):
    p = nn.Parameter(random(8, 12, step=99))
    W = p.detach().clone()
    mine = create("frugal", [("a.weight", p)], lr=1e-2, split=split, density=0.0, weight_decay=0.1)
    mine.plain = plain
    for step in range(5):
        p.grad = random(8, 12, step=step)
        p.grad[step] = 0
        mine.step()
        W = (1 - 1e-3) * W - 1e-2 * p.grad.sign()
    torch.testing.assert_close(p.detach(), W, rtol=1e-14, atol=1e-14)
    assert sum(t.numel() for name, t in tensors(mine.state_dict()["state"]).items() if "mask" not in name) == 0


@pytest.mark.parametrize("split", ["columns", "rows", "entries"])
@paths
def test_part_and_rest_are_a_partition(split: str, plain: bool):
    """What Adam does not have moves by exactly η c; what it has is a part of the right size, and soon another."""
    p, optimizer = one(split, remainder_lr_ratio=4.0, refresh_every=3)
    optimizer.plain = plain
    parts = []
    for step, (g, moved) in enumerate(moves(p, optimizer, 9)):
        rest = (moved - 4 * g.sign()).abs() < 1e-12
        assert (~rest).sum() == 24
        assert (moved[~rest].abs() < 1.5).all()
        if step % 3 == 0:
            parts.append(~rest)
            torch.testing.assert_close(moved[~rest], g.sign()[~rest], rtol=1e-6, atol=0)
        assert torch.equal(~rest, parts[-1])
        lines = {"columns": parts[-1].all(0), "rows": parts[-1].all(1)}.get(split)
        if lines is not None:
            assert lines.sum() == {"columns": 3, "rows": 2}[split]
            assert (lines != lines.roll(1)).sum() == 2, "adjacent, the last and the first too"
    assert not torch.equal(parts[0], parts[1]) or not torch.equal(parts[1], parts[2])


@each
@paths
def test_what_is_left_alone_at_ratio_zero(split: str, plain: bool):
    """Of a split into blocks that is BAdam: what has no turn stays where it is."""
    params = parameters()
    start = values(params)
    optimizer = make("frugal", params, OPTIONS | {"split": split, "remainder_lr_ratio": 0.0, "weight_decay": 0.0})
    optimizer.plain = plain
    for p, _ in params.values():
        p.grad = random(*p.shape)
        assert p.grad.all()
    optimizer.step()
    for name in NAMES:
        moved = (params[name][0].detach() - start[name]).flatten(1)
        m, n = moved.shape
        if split == "svd":
            assert torch.linalg.matrix_rank(moved, rtol=1e-9) == share(0.4, min(m, n))
        else:
            expected = {
                "columns": m * share(0.4, n),
                "rows": share(0.4, m) * n,
                "entries": share(0.4, m * n),
                "block": m * n * (name in active(1, config(**OPTIONS))),
            }
            assert (moved != 0).sum() == expected[split]


def test_refreshes_wraps_and_zeros_happen_on_the_inputs_of_the_common_tests():
    """Else the test of the equation would not see them."""
    for split in SPLITS:
        o, memory = config(**OPTIONS | {"split": split}), {"name": "layers.0.up.weight"}
        W, zeros = torch.zeros(7, 3).double().numpy(), 0
        for step in range(50):
            G = gradient(step, "layers.0.up.weight", (7, 3)).numpy()
            W = frugal("matrix", W, G, memory, step + 1, 1e-2, o)
            zeros += (G == 0).any()
        assert memory["refreshes"] == 10
        assert zeros == 50
    runs = {
        len(cyclic(first, share(OPTIONS["density"], length), length)) for length in (3, 7) for first in range(length)
    }
    assert runs == {1, 2}
    assert {name in active(t, config(**OPTIONS)) for t in (1, 6, 11, 16, 21) for name in NAMES} == {True, False}


def test_cyclic_runs_hold_each_line_once():
    for length in range(1, 6):
        for size in range(length + 1):
            for first in range(length):
                lines = [i for run in cyclic(first, size, length) for i in range(run.start, run.stop)]
                assert lines == [(first + i) % length for i in range(size)]


def test_a_subspace_and_what_is_left_of_the_gradient():
    """With the gradient itself for the rest, the update beside the subspace is what of the gradient is beside it."""
    for shape in ((12, 8), (8, 12), (6, 2, 4)):
        p, optimizer = one("svd", shape, remainder="sgd", refresh_every=4)
        for g, moved in moves(p, optimizer, 10):
            P = optimizer.state_dict()["state"]["a.weight"]["subspacesplit"]["basis"]
            G, U = (x.flatten(1) if shape[0] >= x[0].numel() else x.flatten(1).t() for x in (g, moved))
            assert P.shape == (2, min(G.shape))
            torch.testing.assert_close(P @ P.t(), torch.eye(2, dtype=P.dtype))
            torch.testing.assert_close(U - U @ P.t() @ P, G - G @ P.t() @ P)
    Vh = torch.linalg.svd(random(12, 8), full_matrices=False).Vh
    p, optimizer = one("svd", (12, 8))
    next(moves(p, optimizer, 1))
    P = optimizer.state_dict()["state"]["a.weight"]["subspacesplit"]["basis"]
    torch.testing.assert_close(P @ Vh[:2].t(), (P @ Vh[:2].t()).sign() * torch.eye(2, dtype=P.dtype))


@paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_of_a_gradient_inside_the_subspace_nothing_is_left(dtype: torch.dtype, plain: bool):
    """Rounding has a sign, too, by which elements would move as far as any."""
    for shape in ((40, 16), (16, 40)):
        p = nn.Parameter(torch.zeros(shape, dtype=dtype))
        optimizer = create("frugal", [("a.weight", p)], lr=1.0, split="svd", remainder_lr_ratio=100.0, eps=1e-3)
        optimizer.plain = plain
        p.grad = (random(shape[0], 3) @ random(3, shape[1], step=1)).to(dtype)
        p.grad[3] = 0
        optimizer.step()
        assert p.abs().max() < 10
        assert not p[3].any()


def test_rounding_is_small_beside_a_row():
    X = random(5, 8)
    E = torch.stack([X[0], 1e-10 * X[1], -1e-17 * X[2], torch.zeros(8), X[4].clone().fill_(1e-300)])
    found = split_adam.sign_beyond_rounding(E.clone(), row_norms(X))
    assert torch.equal(found, torch.stack([X[0].sign(), X[1].sign(), *torch.zeros(3, 8, dtype=X.dtype)]))
    assert not split_adam.sign_beyond_rounding(torch.zeros(2, 3), torch.zeros(2, 1)).any()


def test_so_many_blocks_have_state_and_the_others_none():
    for order in ("random", "ascending", "descending"):
        params = parameters()
        options = OPTIONS | {"split": "block", "block_order": order}
        optimizer = make("frugal", params, options)
        for step in range(15):
            train(optimizer, params, step, step + 1)
            state = optimizer.state_dict()["state"]
            turn = active(step + 1, config(**options))
            assert len(turn) == 2
            for name in NAMES:
                found = sum(t.numel() for t in tensors(state[name]).values())
                assert found == (2 * params[name][0].numel() if name in turn else 0)


def test_in_order_all_have_their_turn_before_any_again():
    names = [f"layers.{i}.weight" for i in range(12)]
    adam = Adam((0.9, 0.999), 1e-8, corrected=True)
    for order in ("ascending", "descending"):
        split = TensorSplit(names, order, 0.25, 10, adam, "sign", 1.0)
        turns = [
            [i for i in range(12) if split.active(**split.place(names[i]), step=step, seed=0)]
            for step in range(0, 80, 10)
        ]
        expected = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
        assert turns == 2 * (expected if order == "ascending" else expected[::-1])
    split = TensorSplit(names, "random", 0.25, 10, adam, "sign", 1.0)
    for step in range(0, 200, 10):
        turn = [name for name in names if split.active(**split.place(name), step=step, seed=0)]
        assert len(turn) == 3
        assert turn == [name for name in names if split.active(**split.place(name), step=step + 9, seed=0)]
    draws = [[name for name in names if split.active(**split.place(name), step=0, seed=seed)] for seed in range(4)]
    assert len({*map(tuple, draws)}) > 1


@pytest.mark.parametrize("order", ["random", "ascending", "descending"])
def test_a_new_block_takes_its_place_and_the_others_do_not_notice(order: str):
    options = OPTIONS | {"split": "block", "block_order": order}
    with_it, without = parameters(), parameters()
    optimizer, other = make("frugal", with_it, options), make("frugal", without, options)
    p = nn.Parameter(random(4, 4))
    optimizer.remap([Change("layers.9.new.weight", None, p)])
    turns = 0
    for step in range(100):
        p.grad = random(4, 4, step=step)
        train(optimizer, with_it, step, step + 1)
        train(other, without, step, step + 1)
        if step % 5 == 0:
            turns += "exp_avg" in optimizer.state[p]["tensorsplit"]
    assert equal(values(with_it), values(without))
    assert 2 <= turns <= 16


@pytest.mark.parametrize("order", ["random", "ascending", "descending"])
def test_resumed_after_a_new_block_is_bit_equal(order: str):
    """The optimizer that resumes has it from the start; those there were before go on as without."""
    options = {"split": "block", "block_order": order, "density": 0.5, "refresh_every": 2, "lr": 1e-2}

    def matrices(*names: str) -> dict[str, nn.Parameter]:
        return {f"{name}.weight": nn.Parameter(random(4, 4, step=i)) for i, name in enumerate(names)}

    def go(optimizer: Any, params: dict[str, nn.Parameter], start: int, stop: int) -> None:
        for step in range(start, stop):
            for i, p in enumerate(params.values()):
                p.grad = random(4, 4, step=100 * step + i)
            optimizer.step()

    straight, params = matrices("a", "c", "d", "e"), matrices("a", "c", "d", "e")
    pair = [create("frugal", found.items(), **options) for found in (straight, params)]
    for found, optimizer in zip((straight, params), pair, strict=True):
        found["b.weight"] = nn.Parameter(random(4, 4, step=9))
        optimizer.remap([Change("b.weight", None, found["b.weight"])])
        go(optimizer, found, 0, 3)
    again = create("frugal", params.items(), **options)
    again.load_state_dict(through_disk(pair[1].state_dict()))
    go(pair[0], straight, 3, 20)
    go(again, params, 3, 20)
    assert equal({k: p.detach() for k, p in params.items()}, {k: p.detach() for k, p in straight.items()})
    assert equal(tensors(again.state_dict()["state"]), tensors(pair[0].state_dict()["state"]))


@pytest.mark.parametrize(
    ("saved", "here"),
    [({"split": "columns"}, {"split": "rows"}), *(({"split": s}, {"split": s, "density": 0.5}) for s in SPLITS)],
    ids=str,
)
def test_saved_moments_of_another_part_are_refused(saved: dict[str, Any], here: dict[str, Any]):
    params = parameters(torch.float32)
    optimizer, other = make("frugal", params, OPTIONS | saved), make("frugal", params, OPTIONS | here)
    train(optimizer, params, 0, 2)
    with pytest.raises(InputError, match=r"state is of .*density 0\.4.*, this is .*density 0\."):
        other.load_state_dict(optimizer.state_dict())
    make("frugal", params, OPTIONS | saved).load_state_dict(optimizer.state_dict())


def test_names_are_read_once_of_an_iterator():
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    optimizer = create("frugal", model.named_parameters(), split="block", density=0.5)
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()["state"]
    assert sum("exp_avg" in state[f"{i}.weight"]["tensorsplit"] for i in (0, 1)) == 1


@pytest.mark.parametrize("split", ["columns", "rows", "entries", "svd"])
def test_of_another_shape_it_begins_anew_with_a_part_of_its_own(split: str):
    """In the middle of an interval: zero moments must have a bias correction of their own."""
    options = {"lr": 1.0, "split": split, "refresh_every": 100}
    p, q = (nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in ((8, 12), (10, 12)))
    optimizer = create("frugal", [("a.weight", p)], **options)
    for _ in moves(p, optimizer, 30):
        pass
    optimizer.remap([Change("a.weight", p, q)])
    for g, moved in moves(q, optimizer, 1):
        if split == "svd":
            assert moved.abs().max() < 4
        else:
            torch.testing.assert_close(moved, g.sign(), rtol=1e-6, atol=0)


@each
def test_resumed_between_and_at_refreshes_is_bit_equal(split: str):
    options = OPTIONS | {"split": split}
    straight, params = parameters(torch.float32), parameters(torch.float32)
    whole, optimizer = make("frugal", straight, options), make("frugal", params, options)
    train(whole, straight, 0, 17)
    for start, stop in ((0, 4), (4, 5), (5, 6), (6, 12), (12, 17)):
        train(optimizer, params, start, stop)
        saved = through_disk(optimizer.state_dict())
        optimizer = make("frugal", params, options)
        optimizer.load_state_dict(saved)
    assert equal(values(params), values(straight))
    assert equal(tensors(optimizer.state_dict()), tensors(whole.state_dict()))


@each
@pytest.mark.parametrize("remainder", ["sign", "sgd"])
@pytest.mark.parametrize("rate", [float, torch.tensor], ids=["float", "tensor"])
def test_slices_together_are_the_whole(split: str, remainder: str, rate: Any, monkeypatch: pytest.MonkeyPatch):
    """Of a parameter that is whole, turned or with gaps in memory."""
    monkeypatch.setattr(split_adam, "SLICE", 100)
    found = []
    for layout in ("plain", "whole", "turned", "gaps"):
        start = random(9, 5, step=99).float()
        data = {"turned": start.t().contiguous().t(), "gaps": torch.zeros(9, 10)[:, ::2].copy_(start)}
        p = nn.Parameter(data.get(layout, start))
        assert p.is_contiguous() == (layout in ("plain", "whole"))
        options = {"density": 0.5, "refresh_every": 3, "weight_decay": 0.1, "remainder": remainder}
        optimizer = create("frugal", [("a.weight", p)], lr=1e-2, split=split, **options)
        optimizer.plain = layout == "plain"
        optimizer.param_groups[0]["lr"] = rate(1e-2)
        for step in range(8):
            p.grad = random(9, 5, step=step).float()
            optimizer.step()
        found.append(p.detach().contiguous())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-6)


@each
@paths
def test_the_gradient_is_left_as_it_is(split: str, plain: bool):
    params = parameters(torch.float32)
    optimizer = make("frugal", params, OPTIONS | {"split": split})
    optimizer.plain = plain
    train(optimizer, params, 0, 3)
    for name, shape in SHAPES.items():
        assert torch.equal(params[name][0].grad, gradient(2, name, shape[1], torch.float32))
