"""What is special to AdamW with moments in 8 bits."""

from __future__ import annotations

import os
from importlib import import_module
from threading import active_count, current_thread
from time import sleep
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fallline.catalog import find
from fallline.errors import InputError
from fallline.kernels import eight_bit_adam
from fallline.kernels.eight_bit import dequantise
from fallline.kernels.native import compiled, in_parallel, warn
from fallline.optim import create

from .parameters import SHAPES, gradient, make, parameters, train
from .rows import adam
from .rows.rounded import adamw_8bit
from .table import ROWS

OPTIONS = next(row.options for row in ROWS if row.id == "adamw-8bit")
SHAPE = (48, 700)


def one(p: nn.Parameter, **options: Any) -> Any:
    return create("adamw-8bit", {"a.weight": (p, "matrix")}, lr=1e-2, **options)


def grad(step: int, columns: Tensor | float = 1.0) -> Tensor:
    return gradient(step, "a.weight", SHAPE).float() * columns


def test_rounding_is_seen_by_the_common_tests():
    """Whole and short blocks, and scales below zero; else no test would see them."""
    params = parameters()
    optimizer = make("adamw-8bit", params, OPTIONS)
    negative, short = 0, 0
    for step in range(50):
        train(optimizer, params, step, step + 1)
        for name, state in optimizer.state_dict()["state"].items():
            M = state.get("eightbit", {}).get("exp_avg")
            if isinstance(M, dict):
                negative += int((M["scales"] < 0).sum())
                short += SHAPES[name][1][-1] % OPTIONS["block_size"] > 0
    assert negative > 500
    assert short > 50


@pytest.mark.parametrize("plain", [False, True], ids=["", "plain"])
def test_equation_where_second_moments_would_become_zero(plain: bool):
    """Neighbours whose gradients differ by up to a million times."""
    options = OPTIONS | {"block_size": 8, "min_8bit_size": 1}
    config = find("optimizer", "adamw-8bit").load().Config(**options)
    p = nn.Parameter(gradient(99, "a", (6, 14)))
    optimizer = create("adamw-8bit", {"a.weight": (p, "matrix")}, **options)
    optimizer.plain = plain
    W, memory, least = p.detach().numpy().copy(), {}, 0  # type: ignore[var-annotated]
    for step in range(50):
        p.grad = gradient(step, "a", (6, 14)) * 10.0 ** -torch.arange(14).double().fmod(7)
        optimizer.step()
        W = adamw_8bit("matrix", W, p.grad.numpy(), memory, step + 1, options["lr"], config)
        least += int((optimizer.state_dict()["state"]["a.weight"]["eightbit"]["exp_avg_sq"]["codes"] == 1).sum())
    np.testing.assert_allclose(p.detach().numpy(), W, rtol=1e-12, atol=1e-12)
    assert least > 500


@pytest.mark.parametrize("way", ["C", "tensors", "turned"])
@pytest.mark.parametrize("block", [256, 700, 7], ids=str)
def test_fast_paths_equal_the_plain_one(way: str, block: int, monkeypatch: pytest.MonkeyPatch):
    """Up to rare numbers that lie on the border of two codes, which differ in the last bit of float32."""
    if way == "tensors":
        monkeypatch.setattr(eight_bit_adam, "compiled", lambda source: None)
    elif way == "C" and compiled(eight_bit_adam.SOURCE) is None:
        pytest.skip("no C compiler")
    monkeypatch.setattr(eight_bit_adam, "SHARE", 5000)
    found = []
    for plain in (False, True):
        p = nn.Parameter(gradient(99, "a.weight", SHAPE).float())
        if way == "turned":
            p = nn.Parameter(p.detach().t().contiguous().t())
        optimizer = one(p, weight_decay=0.1, block_size=block)
        optimizer.plain = plain
        for step in range(6):
            p.grad = grad(step)
            optimizer.step()
        moments = optimizer.state_dict()["state"]["a.weight"]["eightbit"]
        found.append((p.detach(), *(t for m in moments.values() for t in m.values())))
    (p, *fast), (q, *plain_state) = found
    assert ((p - q).abs() > 1e-6).float().mean() < 1e-3
    torch.testing.assert_close(p, q, rtol=0, atol=1e-3)
    for mine, other in zip(fast, plain_state, strict=True):
        if mine.dtype == torch.uint8:
            assert (mine != other).float().mean() < 1e-3
        else:
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=0)


def test_saved_blocks_of_another_size_are_refused():
    found = [one(nn.Parameter(torch.ones(SHAPE)), block_size=size) for size in (256, 128)]
    found[0].param_groups[0]["params"][0].grad = grad(0)
    found[0].step()
    with pytest.raises(InputError, match=r"state is of .*\(blocks of 256\).*, this is .*\(blocks of 128\)"):
        found[1].load_state_dict(found[0].state_dict())


def test_without_a_compiler_there_is_no_library(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """Which is said once of each."""
    source = "int seven(void) { return 7; }"
    library = compiled(source)
    assert library is None or library.seven() == 7
    for command in ("", "no-such-compiler", "false"):
        compiled.cache_clear()
        monkeypatch.setitem(os.environ, "CC", command)
        warn.cache_clear()
        assert compiled(source) is None
        assert compiled(source + " ") is None
    compiled.cache_clear()
    warn.cache_clear()
    assert [record.args for record in caplog.records] == [("",), ("no-such-compiler",), ("false",)]


@pytest.mark.parametrize("threads", [1, 3])
def test_all_tasks_are_done_once(threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    done: list[int] = []
    in_parallel([lambda i=i: done.append(i) for i in range(50)])  # type: ignore[misc]
    in_parallel([])
    torch.set_num_threads(before)
    assert sorted(done) == [*range(50)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bad", [0, 20, 49])
def test_an_error_of_any_thread_is_raised_and_no_thread_is_left(threads: int, bad: int):
    before, running = torch.get_num_threads(), active_count()
    torch.set_num_threads(threads)
    here = current_thread()

    def task(i: int) -> None:
        if threads > 1 and current_thread() is here:
            sleep(0.001)  # so that helpers have most tasks
        if i == bad:
            raise ArithmeticError(i)

    try:
        with pytest.raises(ArithmeticError, match=str(bad)):
            in_parallel([lambda i=i: task(i) for i in range(50)])  # type: ignore[misc]
    finally:
        torch.set_num_threads(before)
    assert active_count() == running


def test_embeddings_and_vectors_stay_float32():
    params = {
        "embed.weight": (nn.Parameter(torch.ones(100, 64)), "embedding"),
        "lm_head.weight": (nn.Parameter(torch.ones(100, 64)), "head"),
        "norm.weight": (nn.Parameter(torch.ones(5000)), "vector"),
    }
    optimizer = create("adamw-8bit", params)
    for p, _ in params.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = optimizer.state_dict()["state"]
    assert state["embed.weight"]["adam"]["exp_avg"].dtype == torch.float32
    assert state["norm.weight"]["adam"]["exp_avg_sq"].dtype == torch.float32
    assert state["lm_head.weight"]["eightbit"]["exp_avg"]["codes"].dtype == torch.uint8


def test_a_moment_of_either_sign_keeps_its_size():
    """With −0.993 for −1, as in the paper, the largest of a block would settle 6 % too small where it is negative."""
    for sign in (1.0, -1.0):
        p = nn.Parameter(torch.zeros(16, 256))
        optimizer = one(p)
        for _ in range(60):
            p.grad = torch.full((16, 256), sign)
            optimizer.step()
        M = optimizer.state_dict()["state"]["a.weight"]["eightbit"]["exp_avg"]
        torch.testing.assert_close(dequantise(**M, signed=True), torch.full((16, 256), sign * (1 - 0.9**60)))


@pytest.mark.parametrize("small", [1e-4, 1e-5, 1e-6])
def test_small_second_moments_do_not_make_huge_steps(small: float):
    """Rounded to zero they would: times 30 with β₂ = 0.999 while the gradient stays, M/ε when it becomes zero."""
    p = nn.Parameter(torch.zeros(16, 256))
    optimizer = one(p, weight_decay=0.0)
    largest = 0.0
    for step in range(300):
        before = p.detach().clone()
        p.grad = torch.full((16, 256), small)
        p.grad[:, ::2] = 1.0
        if step >= 280:
            p.grad.zero_()
        optimizer.step()
        largest = max(largest, float((p.detach() - before).abs().max()) / 1e-2)
    V = optimizer.state_dict()["state"]["a.weight"]["eightbit"]["exp_avg_sq"]
    assert (V["codes"][:, 1::2] >= 1).all()
    assert largest < 1.05


def peers(peer: Any, least: float, columns: Tensor | float = 1.0) -> dict[str, Tensor]:
    """Where 50 updates lead: ours, exact AdamW, and the peer; gradients are at least so large, or zero."""
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    start = gradient(99, "a.weight", (48, 512)).float()
    found = {}
    for name, build in (
        ("ours", lambda p: create("adamw-8bit", {"a.weight": (p, "matrix")}, **options)),
        ("exact", lambda p: torch.optim.AdamW([p], **options)),
        ("peer", lambda p: peer([p], **options)),
    ):
        p = nn.Parameter(start.clone())
        optimizer = build(p)
        for step in range(50):
            g = gradient(step, "a.weight", (48, 512)).float()
            p.grad = (g + least * 10.0 ** (-2 * (step % 3)) * g.sign()) * columns
            optimizer.step()
        found[name] = p.detach() - start
    return found


def apart(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


@pytest.mark.peer
@pytest.mark.parametrize("name", ["torchao.optim", "bitsandbytes.optim"])
def test_fifty_updates_are_those_of_the_peers(name: str, monkeypatch: pytest.MonkeyPatch):
    peer = import_module(name).AdamW8bit
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    found = peers(peer, least=0.5)
    assert apart(found["ours"], found["exact"]) < 0.015
    assert apart(found["ours"], found["peer"]) < 0.02
    assert apart(found["ours"], found["exact"]) < apart(found["peer"], found["exact"])


@pytest.mark.peer
def test_columns_of_other_sizes_lead_torchao_astray(monkeypatch: pytest.MonkeyPatch):
    """Its second moments become zero where an input feature is a thousand times smaller than its neighbours."""
    peer = import_module("torchao.optim").AdamW8bit
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    found = peers(peer, least=0.0, columns=torch.linspace(-2, 2, 512))
    assert apart(found["ours"], found["exact"]) < 0.05
    assert apart(found["peer"], found["exact"]) > 0.3


def test_reference_without_rounding_is_adam():
    config = find("optimizer", "adamw-8bit").load().Config(**OPTIONS | {"min_8bit_size": 10**9})
    W, mine, other = gradient(99, "a", (7, 3)).numpy(), {}, {}  # type: ignore[var-annotated]
    for t in range(1, 9):
        G = gradient(t, "a", (7, 3)).numpy()
        np.testing.assert_allclose(
            adamw_8bit("matrix", W, G, mine, t, 0.1, config),
            adam(W, G, other, t, 0.1, config.betas, config.eps, decay=0.1),
            rtol=1e-12,
        )


def test_a_tiny_language_model_learns_as_with_float32():
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens = torch.randint(0, 64, (4, 33), generator=torch.Generator().manual_seed(1))
    losses: dict[str, list[float]] = {}
    for id in ("adamw", "adamw-8bit"):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=64, hidden_size=128, intermediate_size=344, num_hidden_layers=2, num_attention_heads=4
            )
        )
        optimizer = create(id, model, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01)
        losses[id] = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            losses[id].append(loss.item())
    assert losses["adamw"][-1] < 0.7 * losses["adamw"][0]
    np.testing.assert_allclose(losses["adamw-8bit"], losses["adamw"], rtol=0.01)
