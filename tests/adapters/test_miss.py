"""MiSS against its equation, the LoRA that it is, and PEFT's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from fallline.adapters import attach, load, save
from fallline.adapters.layers import adapted
from fallline.errors import InputError
from fallline.kernels.fold_linear import fold, fold_linear, fold_linear_plain

from .models import fit, gpt2, llama, logits, tokens

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's about Transformers


def given(n: int, r: int, m: int, k: int, lead: tuple[int, ...] = (2, 5), bias: bool = True) -> list[Any]:
    noise = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=noise, dtype=torch.float64)

    b = draw(m) if bias else None
    return [draw(*lead, n).requires_grad_(), draw(m, n), b, draw(k, r).requires_grad_()]


@pytest.mark.parametrize(("n", "r", "m", "k"), [(8, 4, 6, 6), (9, 4, 6, 6), (3, 3, 6, 2), (7, 5, 6, 1)])
@pytest.mark.parametrize("lead", [(2, 5), (0,), ()])
def test_the_fused_layer_is_the_plain_one(n: int, r: int, m: int, k: int, lead: tuple[int, ...]) -> None:
    x, W, b, B = given(n, r, m, k, lead, bias=bool(lead))
    for turned in (W, W.t().contiguous().t()):
        fused, plain = fold_linear(x, turned, b, B), fold_linear_plain(x, turned, b, B)
        torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)
        up = torch.randn(plain.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        both = [torch.autograd.grad(y, (x, B), up) for y in (fused, plain)]
        torch.testing.assert_close(both[0], both[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("n", "r", "m", "k"), [(8, 4, 6, 6), (7, 5, 6, 2)])
def test_derivatives_are_right_to_second_order(n: int, r: int, m: int, k: int) -> None:
    x, W, b, B = given(n, r, m, k, (3,))
    assert torch.autograd.gradcheck(lambda x, B: fold_linear(x, W, b, B), (x, B))
    assert torch.autograd.gradgradcheck(lambda x, B: fold_linear(x, W, b, B), (x, B))


@pytest.mark.parametrize("r", [8, 7])
@pytest.mark.parametrize("mini", [0, 16])
def test_it_is_the_lora_with_a_matrix_of_ones(r: int, mini: int) -> None:
    model = attach(llama(torch.float64), "miss", rank=r, mini=mini)
    fit(model)
    for layer in adapted(model).values():
        method, P, W = layer.methods["default"], layer.adapters["default"], layer.matrix()
        (m, n), B = W.shape, P.B.detach()
        A = torch.zeros(r, n, dtype=torch.float64)
        A[torch.arange(n) % r, torch.arange(n)] = 1
        rows = B[torch.arange(m) % len(B)]
        assert torch.equal(method.delta(P, layer.matrix), rows @ A)
        x = torch.randn(4, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            torch.testing.assert_close(fold(x, r), x @ A.t(), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(
                method.linear(P, x, layer.matrix, None, True), x @ (W + rows @ A).t(), rtol=1e-12, atol=1e-12
            )


def test_of_a_layers_input_only_rank_numbers_are_kept() -> None:
    model = attach(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)), "miss", rank=8)
    kept: list[tuple[int, ...]] = []
    x = torch.randn(100, 64, requires_grad=True)
    with saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        model(x).sum()
    assert sorted(shape for shape in kept if 100 in shape) == [(100, 8), (100, 8)]
    assert set(kept) == {(100, 8), (64, 64), (64, 8)}, "and the weights, which are there anyway"


@pytest.mark.parametrize(
    ("id", "options"), [("miss", {"rank": 7}), ("miss", {"rank": 8, "mini": 16}), ("bat", {"rank": 8})]
)
def test_ours_and_pefts_train_alike(id: str, options: Any, tmp_path: Path) -> None:
    base = llama(torch.float64)
    save(attach(llama(torch.float64), id, **options), tmp_path)
    ours = load(llama(torch.float64), tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(torch.float64), tmp_path, is_trainable=True)
    fit(ours, steps=50, lr=5e-3)
    fit(theirs, steps=50, lr=5e-3)
    assert (logits(ours) - logits(base)).abs().max() > 0.1
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 6, "miss_dropout": 0.2},
        {"r": 6, "init_weights": False},
        {"r": 8, "init_weights": "mini", "mini_r": 4},
        {"r": 4, "init_weights": "bat"},
    ],
)
def test_we_load_what_peft_saves(options: Any, tmp_path: Path) -> None:
    config = peft.MissConfig(**options, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(llama(), config)
    fit(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = load(llama(), tmp_path / "theirs")
    assert (logits(ours) - logits(llama())).abs().max() > 0.05
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-6, atol=1e-6)
    save(ours, tmp_path / "ours")  # and back
    back = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours")
    torch.testing.assert_close(logits(back), logits(theirs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_weights": "other"}, "'init_weights' is 'other', which this version does not know"),
        ({"bias": "MiSS_only"}, "trained biases"),
        ({"r": 0}, "cannot be used: 'rank' must be above 0"),
        ({"r": 4}, r"miss_block \[8, 32\] does not fit 'model.layers.0.*' with its weight of 32 × 32 and 'r' = 4"),
        ({"use_fast": True}, "'use_fast' is True, which this version does not know"),
    ],
)
def test_what_we_cannot_compute_is_refused(options: Any, message: str, tmp_path: Path) -> None:
    save(attach(llama(), "miss", rank=8, targets="q_proj"), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))
    model = llama()
    with pytest.raises(InputError, match=message):
        load(model, tmp_path)
    assert not adapted(model)


@pytest.mark.parametrize(
    ("id", "options", "message"),
    [
        ("miss", {"rank": 33}, r"pieces of 'rank' inputs, and a weight of 32 × 32 has 32, got 'rank' = 33"),
        ("miss", {"mini": 5}, r"divide the 32 of a weight of 32 × 32, got 'mini' = 5"),
        ("bat", {"rank": 5}, r"blocks of 'rank' × 'rank', and one of 32 × 32 cannot be cut so, got 'rank' = 5"),
    ],
)
def test_sizes_that_do_not_go_are_refused(id: str, options: Any, message: str) -> None:
    model = llama()
    with pytest.raises(InputError, match=message):
        attach(model, id, **({"rank": 8} | options))
    assert not adapted(model)


@pytest.mark.parametrize("options", [{"rank": 8, "mini": 16}, {"rank": 7}])
def test_the_forms_hold_for_conv1d_under_autocast_and_after_a_round_trip(options: Any, tmp_path: Path) -> None:
    model = attach(gpt2(), "miss", **options)
    fit(model)
    save(model, tmp_path)
    assert torch.equal(logits(load(gpt2(), tmp_path)), logits(model))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
