"""What every optimizer must do. A row of table.py buys all of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fallline.catalog import bytes_of, entries, find
from fallline.kernels import row_norm
from fallline.optim.chain import ChainOptimizer

from .parameters import SHAPES, equal, gradient, make, parameters, tensors, through_disk, train, values
from .rows import Row
from .table import ROWS

each = pytest.mark.parametrize("row", ROWS, ids=str)
MADE = [(row, make(row.id, parameters(), row.options)) for row in ROWS]
CHAINS = [row for row, made in MADE if isinstance(made, ChainOptimizer)]
FAST = [row for row, made in MADE if any(rule.fused for rule in getattr(made, "rules", {}).values())]


def test_every_optimizer_has_a_row():
    assert {row.id for row in ROWS} == {id for kind, id in entries() if kind == "optimizer"}


@each
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=str)
def test_equation(row: Row, dtype: torch.dtype, tolerance: float):
    """Fifty steps with a changing rate; with fast paths and, where there are any, without."""
    ways = {"fast": False} | ({"plain": True} if row in FAST else {})
    found = {way: parameters(dtype) for way in ways}
    optimizers = {way: make(row.id, params, row.options) for way, params in found.items()}
    for way, plain in ways.items():
        optimizers[way].plain = plain
    peaks = [group["lr"] for group in optimizers["fast"].param_groups]
    config = find("optimizer", row.id).load().Config(**row.options)
    expected = {name: p.detach().double().numpy().copy() for name, (p, _) in parameters(dtype).items()}
    memory: dict[str, dict[str, Any]] = {name: {"name": name} for name in SHAPES}
    for step in range(50):
        factor = 1 / (1 + step % 7)
        for way, optimizer in optimizers.items():
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            train(optimizer, found[way], step, step + 1)
        for name, (role, shape) in SHAPES.items():
            G = gradient(step, name, shape, dtype).double().numpy()
            lr = row.options["lr"] * factor
            expected[name] = row.reference(role, expected[name], G, memory[name], step + 1, lr, config)
    for way, params in found.items():
        for name, (p, _) in params.items():
            error = f"{name}, {way}"
            np.testing.assert_allclose(
                p.detach().numpy(), expected[name], rtol=tolerance, atol=tolerance, err_msg=error
            )


@pytest.mark.parametrize("row", FAST, ids=str)
@pytest.mark.parametrize("rate", [float, torch.tensor], ids=["float", "tensor"])
def test_fast_path_equals_plain_path(row: Row, rate: Callable[[float], Any], monkeypatch: pytest.MonkeyPatch):
    """In one block and in many, whatever the layout in memory."""

    def after(plain: bool) -> dict[str, Tensor]:
        params = {name: (strided(p), role) for name, (p, role) in parameters(torch.float32).items()}
        optimizer = make(row.id, params, row.options)
        optimizer.plain = plain
        for group in optimizer.param_groups:
            group["lr"] = rate(group["lr"])
        train(optimizer, params, 0, 6)
        return values(params)

    expected = after(plain=True)
    for block in (1 << 22, 40):
        monkeypatch.setattr(row_norm, "BLOCK", block)
        found = after(plain=False)
        for name in SHAPES:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)


@each
def test_layout_in_memory_does_not_matter(row: Row):
    """Of parameters, of gradients, and of both."""
    plain = parameters(torch.float32)
    train(make(row.id, plain, row.options), plain, 0, 6)
    for odd_p, odd_g in ((True, False), (False, True), (True, True)):
        params = {name: (strided(p) if odd_p else p, role) for name, (p, role) in parameters(torch.float32).items()}
        optimizer = make(row.id, params, row.options)
        for step in range(6):
            for name, (p, _) in params.items():
                g = gradient(step, name, tuple(p.shape), p.dtype)
                p.grad = strided(g).detach() if odd_g else g
            optimizer.step()
            if step == 2:
                optimizer.load_state_dict(through_disk(optimizer.state_dict()))
        for name in SHAPES:
            torch.testing.assert_close(params[name][0], plain[name][0], rtol=1e-6, atol=1e-6)


def strided(x: Tensor) -> nn.Parameter:
    """The same values with its dimensions in reverse order in memory."""
    backwards = list(reversed(range(x.ndim)))
    return nn.Parameter(x.detach().permute(backwards).clone(memory_format=torch.contiguous_format).permute(backwards))


@each
def test_accumulated_gradients_are_gradients(row: Row):
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for size in (6, 2, 5):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        optimizer = make(row.id, model, row.options)
        for _ in range(5):
            optimizer.zero_grad()
            for part in x.split(size):
                (model(part) ** 2).sum().backward()
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[2], found[0], rtol=1e-9, atol=1e-9)


@each
def test_resumed_twice_is_bit_equal(row: Row):
    straight = parameters(torch.float32)
    whole = make(row.id, straight, row.options)
    train(whole, straight, 0, 12)
    for stops in ((1, 2), (3, 8), (9, 10)):
        params, saved, start = parameters(torch.float32), None, 0
        for stop in (*stops, 12):
            params = {name: (nn.Parameter(p.detach().clone()), role) for name, (p, role) in params.items()}
            optimizer = make(row.id, params, row.options)
            if saved is not None:
                optimizer.load_state_dict(through_disk(saved))
            train(optimizer, params, start, stop)
            start, saved = stop, optimizer.state_dict()
        assert equal(values(params), values(straight)), stops
        assert equal(tensors(saved), tensors(whole.state_dict())), stops


@each
def test_loaded_state_keeps_its_dtype(row: Row):
    """A float32 moment of a bfloat16 parameter stays float32, whatever made it so."""
    params = parameters(torch.bfloat16)
    optimizer = make(row.id, params, row.options)
    train(optimizer, params, 0, 2)
    saved = optimizer.state_dict()
    wide = {**saved, "state": {name: widened(state) for name, state in saved["state"].items()}}
    optimizer.load_state_dict(wide)
    assert equal(tensors(optimizer.state_dict()["state"]), tensors(wide["state"]))


def widened(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: widened(value) for key, value in tree.items()}
    return tree.float() + 1e-6 if isinstance(tree, Tensor) else tree


@each
def test_parameters_keep_dtype_and_half_precision_follows(row: Row):
    exact, half = parameters(torch.float32), parameters(torch.bfloat16)
    for params in (exact, half):
        train(make(row.id, params, row.options), params, 0, 5)
    for name, (p, _) in half.items():
        assert p.dtype == torch.bfloat16
        torch.testing.assert_close(p.float(), exact[name][0], rtol=0.05, atol=0.1)


@each
def test_order_of_parameters_does_not_matter(row: Row):
    forward = parameters(torch.float32)
    backward = dict(reversed(parameters(torch.float32).items()))
    for params in (forward, backward):
        train(make(row.id, params, row.options), params, 0, 5)
    assert equal(values(forward), {name: values(backward)[name] for name in forward})


@each
def test_without_gradient_nothing_happens(row: Row):
    all_ = parameters(torch.float32)
    train(make(row.id, all_, row.options), all_, 0, 3)
    theirs = values(all_)
    for name in SHAPES:
        params = parameters(torch.float32)
        optimizer = make(row.id, params, row.options)
        train(optimizer, params, 0, 3, without=(name,))
        assert torch.equal(params[name][0], parameters(torch.float32)[name][0])
        assert name not in optimizer.state_dict()["state"]
        if optimizer.separable:
            mine = values(params)
            assert equal({k: v for k, v in mine.items() if k != name}, {k: v for k, v in theirs.items() if k != name})


@each
def test_a_pause_leaves_state_alone(row: Row):
    params = parameters(torch.float32)
    optimizer = make(row.id, params, row.options)
    train(optimizer, params, 0, 3)
    before = tensors(optimizer.state_dict()["state"].get("lm_head.weight", {}))
    before = {key: value.clone() for key, value in before.items()}
    train(optimizer, params, 3, 6, without=("lm_head.weight",))
    assert equal(tensors(optimizer.state_dict()["state"].get("lm_head.weight", {})), before)


@each
@pytest.mark.parametrize("decay", [0.0, 0.1], ids=["", "decay"])
def test_zero_gradient_changes_nothing_but_decay(row: Row, decay: float):
    params = parameters(torch.float64)
    start = values(params)
    options = {k: v for k, v in row.options.items() if k not in ("momentum", "nesterov")}
    optimizer = make(row.id, params, options | {"weight_decay": decay})
    for _ in range(4):
        for p, _ in params.values():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for name, (p, role) in params.items():
        factor = (1 - options["lr"] * decay) ** 4 if role in ("matrix", "embedding", "head", "adapter") else 1.0
        torch.testing.assert_close(p.detach(), start[name] * factor, rtol=1e-14, atol=0)


@each
def test_every_option_has_an_effect_of_its_own(row: Row):
    config = find("optimizer", row.id).load().Config
    unused = {f.name for f in dataclasses.fields(config)} - set(row.changes)
    assert all("used_if" in config.__dataclass_fields__[name].metadata for name in unused)
    found = {}
    for change in [{}, *({name: value} for name, value in row.changes.items())]:
        params = parameters()
        options = row.options | change
        train(make(row.id, params, options), params, 0, 6)
        found[str(change)] = torch.cat([p.detach().flatten() for p, _ in params.values()])
    for (a, x), (b, y) in combinations(found.items(), 2):
        assert (x - y).abs().max() > 1e-6, f"{a} and {b} give the same trajectory"


def test_no_two_methods_are_the_same():
    found = {}
    for row in ROWS:
        params = parameters()
        train(make(row.id, params, row.options | {"lr": 1e-2}), params, 0, 6)
        found[str(row)] = torch.cat([p.detach().flatten() for p, _ in params.values()])
    for (a, x), (b, y) in combinations(found.items(), 2):
        assert (x - y).abs().max() > 1e-3, f"{a} and {b} give the same trajectory"


@each
def test_a_schedule_is_obeyed(row: Row):
    found = []
    for tensor in (False, True):
        params = parameters(torch.float32)
        optimizer = make(row.id, params, row.options)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64) if tensor else group["lr"]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: [1.0, 0.5, 0.25, 0.0][t])
        for step in range(3):
            train(optimizer, params, step, step + 1)
            schedule.step()
        found.append(values(params))
        train(optimizer, params, 3, 4)  # at rate zero
        assert equal(values(params), found[-1])
    for name in SHAPES:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("row", CHAINS, ids=str)
def test_card_says_how_much_it_looks_at_together(row: Row):
    optimizer = make(row.id, parameters(), row.options)
    assert isinstance(optimizer, ChainOptimizer)
    transforms = [t for rule in optimizer.rules.values() for t in rule.transforms]
    most = max((t.acts_on for t in transforms), key=["element", "row", "matrix", "group"].index)
    assert find("optimizer", row.id).card.acts_on == most


@each
def test_state_bytes_are_those_of_the_card(row: Row):
    params = parameters(torch.float32)
    optimizer = make(row.id, params, row.options)
    train(optimizer, params, 0, 2)
    module = find("optimizer", row.id).load()
    card, options = module.CARD, dataclasses.asdict(module.Config(**row.options))
    state = optimizer.state_dict()["state"]
    for name, (p, role) in params.items():
        if row.factors_last_two and p.ndim > 2:
            continue
        found = sum(t.numel() * t.element_size() for t in tensors(state.get(name, {})).values())
        if row.matrix_bytes and role in ("matrix", "adapter"):
            assert found in [bytes_of({"any": f}, role, p.shape, options) for f in row.matrix_bytes], (name, role)
            continue
        assert found == bytes_of(card.state_bytes, role, p.shape, options), (name, role)
        assert bytes_of(card.traffic_bytes, role, p.shape, options) >= 12 * p.numel() + 2 * found - 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("row", CHAINS, ids=str)
@pytest.mark.parametrize("plain", [False, True], ids=["", "plain"])
def test_no_update_waits_for_the_gpu(row: Row, plain: bool):
    """The fourth: at the first, tables are copied and a singular value decomposition may be taken."""
    params = {name: (nn.Parameter(p.detach().cuda()), role) for name, (p, role) in parameters(torch.float32).items()}
    optimizer = make(row.id, params, row.options | ({"refresh_every": 100} if "refresh_every" in row.options else {}))
    optimizer.plain = plain
    for step in range(4):
        for name, (p, _) in params.items():
            p.grad = gradient(step, name, tuple(p.shape), p.dtype).cuda()
        if step == 3:
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@cache
def tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


@each
def test_a_tiny_llama_learns(row: Row):
    model = deepcopy(tiny_llama())
    tokens = torch.randint(0, 48, (4, 17), generator=torch.Generator().manual_seed(1))
    options = find("optimizer", row.id).load().Config.__dataclass_fields__
    required = {name: row.options[name] for name, f in options.items() if f.default is dataclasses.MISSING}
    optimizer = make(row.id, model, required | {"lr": row.lr})
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
