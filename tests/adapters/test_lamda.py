"""LaMDA against its equations: where it begins, what freezes when, and that what is frozen stays."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fallline.adapters import attach
from fallline.adapters.between import between
from fallline.adapters.lamda import Config, Lamda, frozen_columns
from fallline.adapters.layers import adapted, inject
from fallline.adapters.rerank import resize
from fallline.drivers.setting import build
from fallline.errors import InputError
from fallline.optim import create
from fallline.recipe import Recipe
from fallline.step import take_step

from .models import llama, tokens


def parts(layer: Any) -> tuple[Any, torch.Tensor]:
    P = layer.adapters["default"]
    return P, layer.methods["default"].second(P).detach().clone()


def test_the_beginning_is_of_the_leading_singular_vectors() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7)).double()
    inject(model, Lamda(Config(rank=3)), seed=0)
    layer = adapted(model)["0"]
    P, B = parts(layer)
    U, _, Vh = torch.linalg.svd(layer.matrix().detach())
    torch.testing.assert_close(P.A.t() @ P.A, Vh[:3].t() @ Vh[:3], rtol=0, atol=1e-12)
    torch.testing.assert_close((B.t() @ U[:, :3]).abs(), torch.eye(3).double(), rtol=0, atol=1e-12)  # in their order
    torch.testing.assert_close((P.A @ Vh[:3].t()).abs(), torch.eye(3).double(), rtol=0, atol=1e-12)
    assert not P.core.any()


@pytest.mark.parametrize("trained", [4, 3, 1, 0])
def test_value_and_gradients_are_the_equations(trained: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7)).double()
    inject(model, Lamda(Config(rank=4, scale=0.7)), seed=0)
    resize(model, "default", {"0": trained}, noise=lambda path: torch.Generator())
    layer = adapted(model)["0"]
    P: Any = layer.adapters["default"]
    with torch.no_grad():
        for t in (*P.parameters(), *P.buffers()):
            t.normal_()
    P, B = parts(layer)
    A, C, W = P.A.clone(), P.core.detach().clone(), layer.matrix().detach()
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    g = torch.randn(4, 7, dtype=torch.float64)
    y = model(x)
    torch.testing.assert_close(y, x @ (W + 0.7 * B @ C @ A).t() + model[0].bias, rtol=1e-12, atol=1e-12)
    y.backward(g)
    G = g.t() @ x.detach()
    torch.testing.assert_close(P.core.grad, 0.7 * B.t() @ G @ A.t(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(x.grad, g @ (W + 0.7 * B @ C @ A), rtol=1e-11, atol=1e-11)
    assert {n for n, _ in P.named_parameters()} == ({"core", "B"} if trained else {"core"})
    if trained:
        wanted = (0.7 * G @ A.t() @ C.t())[:, 4 - trained :]
        torch.testing.assert_close(P.B.grad, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("rank", "steps", "eta"), [(4, 10, 0.3), (8, 7, 0.5), (3, 100, 1.0), (5, 11, 0.1)])
def test_the_schedule(rank: int, steps: int, eta: float) -> None:
    exact = Fraction(str(eta))
    found = [frozen_columns(rank, k, steps, eta) for k in range(steps)]
    assert found == [min(rank, rank * k // (exact * steps)) for k in range(steps)]


def test_training_is_that_of_columns_which_leave_the_optimizer_one_by_one() -> None:
    """The reference has each column of B as a parameter of its own, and torch's AdamW, which forgets it when it
    freezes: in float64, with decay, at uneven steps."""
    torch.manual_seed(0)
    rank, steps, s = 4, 12, 0.7
    model = nn.Sequential(nn.Linear(6, 8)).double()
    inject(model, Lamda(Config(rank=rank, scale=s, eta=0.5)), seed=0)
    layer = adapted(model)["0"]
    P, B = parts(layer)
    A, W, b = P.A.clone(), layer.matrix().detach(), model[0].bias.detach()
    x, target = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)

    C = nn.Parameter(torch.zeros(rank, rank, dtype=torch.float64))
    columns = [nn.Parameter(column) for column in B.t().clone()]
    theirs = torch.optim.AdamW([C, *columns], lr=0.05, betas=(0.9, 0.95), weight_decay=0.1)
    ours = create("adamw", model, lr=0.05, weight_decay=0.1)
    for k in range(steps):
        for column in columns[: rank * k // 6]:
            column.requires_grad_(False)
            column.grad = None
        ours.remap(between(model, "default", k, steps, seed=0))
        for optimizer, y in (
            (theirs, x @ (W + s * torch.stack(columns, 1) @ C @ A).t() + b),
            (ours, model(x)),
        ):
            optimizer.zero_grad()
            (y - target).square().mean().backward()
            optimizer.step()
        P, B = parts(layer)
        torch.testing.assert_close(B, torch.stack(columns, 1).detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(P.core, C, rtol=1e-10, atol=1e-12)
    assert not hasattr(P, "B")
    assert (B - torch.linalg.svd(W).U[:, :rank]).abs().max() > 0.1


def test_in_a_run_columns_freeze_and_stay(corpus: Path) -> None:
    steps, rank = 8, 6
    recipe = Recipe.parse(
        f"model: {{name: llama, preset: tiny}}\ndata: {{name: text, path: {corpus}, length: 16, vocab: 320}}\n"
        f"adapter: {{name: lamda, rank: {rank}, eta: 0.5}}\n"
        "optimizer: {name: adamw, lr: 1e-2, weight_decay: 0.1}\n"
        f"steps: {steps}\nbatch: 2\nmicro: 1\n"
    )
    run = build(recipe).run
    layers = list(adapted(run.model).values())
    r2 = rank * rank * len(layers)
    counts, last = [], [parts(layer)[1] for layer in layers]
    for k in range(steps):
        take_step(run)
        frozen = min(rank, rank * k // 4)
        for i, layer in enumerate(layers):
            _, B = parts(layer)
            assert torch.equal(B[:, :frozen], last[i][:, :frozen])
            assert frozen == rank or (B[:, frozen:] != last[i][:, frozen:]).any(0).all()
            last[i] = B
        counts.append(run.parts["adapter"].metrics()["adapter_trained"])
        assert counts[-1] == sum(p.numel() for p in run.trainable().values())
    assert counts[0] == r2 + rank * sum(layer.matrix().shape[0] for layer in layers)
    assert counts == sorted(counts, reverse=True)
    assert counts[4:] == [r2] * 4 < counts[3:4]
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in run.trainable().values()}


def test_fewer_bytes_are_kept_for_the_backward_than_loras() -> None:
    kept = []
    for id in ("lora", "lamda"):
        model = llama()
        if id == "lora":
            attach(model, id, rank=8)
        else:
            inject(model, Lamda(Config(rank=8)), seed=0)
        seen: dict[int, int] = {}

        def note(t: torch.Tensor, seen: dict[int, int] = seen) -> torch.Tensor:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            loss = model.train()(input_ids=tokens(rows=8), labels=tokens(rows=8)).loss
        weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
        kept.append(sum(size for place, size in seen.items() if place not in weights))
        loss.backward()
    assert kept[1] < kept[0]


def test_it_takes_a_run() -> None:
    model = llama()
    with pytest.raises(InputError, match=r"changes its shape during the run.* use a recipe"):
        attach(model, "lamda", rank=4)
    assert not adapted(model)
    with pytest.raises(InputError, match=r"'lamda' takes 'rank' directions.* got 'rank' = 33"):
        inject(model, Lamda(Config(rank=33)), seed=0)
