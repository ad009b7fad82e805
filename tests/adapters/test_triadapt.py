"""TriAdaptLoRA against its equations: the matrix in the middle, which layers grow, and what growing leaves alone."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import nn

from fallline.adapters.between import between
from fallline.adapters.layers import adapted, inject
from fallline.adapters.rerank import resize, sizes
from fallline.adapters.triadapt import Config, Triadapt, how_many
from fallline.errors import InputError
from fallline.optim import create

from .models import llama, logits, tokens


def middle(P: Any, first: int, block: int) -> torch.Tensor:
    """C, element by element of what the parameters hold."""
    starts = [0]
    while hasattr(P, f"A_{len(starts)}"):
        starts.append(first + block * (len(starts) - 1))
    r = starts[-1] + (block if len(starts) > 1 else first)
    C = torch.zeros(r, r, dtype=torch.float64)
    for j, start in enumerate(starts):
        L, U = getattr(P, f"L_{j}").detach(), getattr(P, f"U_{j}").detach()
        for i in range(L.shape[0]):
            for k in range(L.shape[1]):
                C[start + i, k] += L[i, k]
                C[k, start + i] += U[k, i]
    return C


def grown(first: int, block: int, size: int, **more: Any) -> tuple[Any, Any]:
    """A layer with weights of 7 × 9 at this rank, all of its tensors random."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7)).double()
    inject(model, Triadapt(Config(first=first, block=block, **more)), seed=0)
    resize(model, "default", {"0": size}, noise=lambda path: torch.Generator())
    layer = adapted(model)["0"]
    for p in layer.adapters["default"].parameters():
        p.data.normal_()
    return model, layer


@pytest.mark.parametrize(("first", "block", "size"), [(1, 2, 1), (1, 2, 5), (3, 1, 5), (2, 4, 6)])
def test_value_and_gradients_are_the_equations(first: int, block: int, size: int) -> None:
    model, layer = grown(first, block, size, rank=5, alpha=3.0, rslora=False)
    P, W = layer.adapters["default"], layer.matrix().detach()
    count = 1 + (size - first) // block
    assert sum(p.numel() for p in P.parameters()) == size * 16 + sum(
        2 * a * stop for a, stop in [(first, first), *((block, first + block * j) for j in range(1, count))]
    )
    A = torch.cat([getattr(P, f"A_{j}").detach() for j in range(count)], 0)
    B = torch.cat([getattr(P, f"B_{j}").detach() for j in range(count)], 1)
    C, s = middle(P, first, block), 3.0 / 5
    x, g = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    y = model(x)
    torch.testing.assert_close(y, x @ (W + s * B @ C @ A).t() + model[0].bias, rtol=1e-11, atol=1e-11)
    apply = layer.methods["default"].apply(P, x, layer.matrix, False)  # what the per-example engine sees
    torch.testing.assert_close(apply, x @ (s * B @ C @ A).t(), rtol=1e-11, atol=1e-11)
    y.backward(g)
    G = s * g.t() @ x
    dA, dB, dC = C.t() @ B.t() @ G, G @ A.t() @ C.t(), B.t() @ G @ A.t()
    stops = [first + block * j for j in range(count)]
    for j, (start, stop) in enumerate(zip([0, *stops], stops, strict=False)):
        for key, wanted in (
            ("A", dA[start:stop]),
            ("B", dB[:, start:stop]),
            ("L", dC[start:stop, :stop]),
            ("U", dC[:stop, start:stop]),
        ):
            torch.testing.assert_close(getattr(P, f"{key}_{j}").grad, wanted, rtol=1e-10, atol=1e-10)


def test_growing_leaves_the_function_and_what_is_new_learns() -> None:
    model = llama().double()
    inject(model, Triadapt(Config(rank=6, block=2)), seed=0)
    optimizer = create("adamw", model, lr=1e-2)
    ids = tokens()

    def step() -> None:
        optimizer.zero_grad()
        model.train()(input_ids=ids, labels=ids).loss.backward()

    for _ in range(3):
        step()
        optimizer.step()
    before, known = logits(model), {n: p for n, p in model.named_parameters() if p.requires_grad}
    states = {n: {k: torch.clone(torch.as_tensor(v)) for k, v in optimizer.state[p].items()} for n, p in known.items()}
    assert (before - logits(llama().double())).abs().max() > 1e-3
    for size in (3, 5):  # twice, so that there is a block to grow beside
        optimizer.remap(
            resize(model, "default", dict.fromkeys(adapted(model), size), noise=lambda p: torch.Generator())
        )
        torch.testing.assert_close(logits(model), before, rtol=1e-12, atol=1e-12)
    now = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for n, p in known.items():
        assert now[n] is p
        for k, v in states[n].items():
            assert torch.equal(torch.as_tensor(optimizer.state[p][k]), v)
    new = {n: p for n, p in now.items() if n not in known}
    assert {n.rpartition(".")[2] for n in new} == {f"{key}_{j}" for key in "ABLU" for j in (1, 2)}
    assert all(not optimizer.state.get(p) for p in new.values())
    step()
    assert all(p.grad.any() for n, p in new.items() if n.rpartition(".")[2][0] in "BU")
    optimizer.step()
    step()
    assert all(p.grad.any() for p in new.values())


@pytest.mark.parametrize("growth", ["linear", "exponential"])
@pytest.mark.parametrize(("every", "warmup"), [(1, 0), (3, 2)])
def test_layers_that_grow_most_get_a_block(growth: Any, every: int, warmup: int) -> None:
    """Against the rule, written apart; parameters move at random between the steps."""
    first, block, rank, steps, layers = 1, 2, 4, 40, 7
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(layers))).double()
    config = Config(first=first, block=block, rank=rank, growth=growth, every=every, warmup=warmup)
    inject(model, Triadapt(config), seed=0)
    noise = torch.Generator().manual_seed(3)

    def importance() -> list[float]:
        found = []
        for layer in adapted(model).values():
            P = layer.adapters["default"]
            C = middle(P, first, block)
            found.append(
                math.sqrt(sum(float(v) ** 2 for v in C.flatten())) / sum(hasattr(P, f"A_{j}") for j in range(9))
            )
        return found

    last, ranks, several = importance(), [first] * layers, 0
    for t in range(steps):
        target = rank * layers
        if t > warmup and (t - warmup) % every == 0 and sum(ranks) < target:
            share, missing = Fraction(t - warmup, steps - warmup), target - sum(ranks)
            count = int(missing * share) if growth == "linear" else int(missing ** float(share) + 1e-12)
            count = min(layers, max(1, count))
            now = importance()
            scores = [a - b for a, b in zip(now, last, strict=True)]
            for i in sorted(range(layers), key=lambda i: -scores[i])[:count]:
                ranks[i] += block
            last = now
            several += count > 1
            assert sum(ranks) <= target - 1 + block * count
        between(model, "default", t, steps, seed=0)
        assert list(sizes(model, "default").values()) == ranks
        for p in model.parameters():
            if p.requires_grad:
                p.data += 0.05 * torch.randn(p.shape, dtype=p.dtype, generator=noise)
    assert sum(ranks) >= rank * layers
    assert len(set(ranks)) > 1
    assert several or every == 1  # both kinds of count were met


def test_numbers_of_layers_that_are_whole_are_not_one_less() -> None:
    for missing, k, steps in ((50, 29, 50), (100, 29, 100), (100, 57, 100), (7, 3, 10)):
        assert how_many(missing, k / steps, "linear", 999) == missing * k // steps
    for root in range(1, 20):
        assert how_many(root**2, 0.5, "exponential", 999) == root
        assert how_many(root**3, 1 / 3, "exponential", 999) == root


def test_a_rank_to_be_reached_that_it_begins_with_is_refused() -> None:
    with pytest.raises(InputError, match="4 does not grow to 4"):
        Config(first=4, rank=4)
