"""RandLoRA against its equation, in float64, and against PEFT's."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.autograd.graph import saved_tensors_hooks

from fallline.adapters import attach, load, save
from fallline.adapters.layers import adapted
from fallline.errors import InputError
from fallline.kernels import basis_linear as kernel
from fallline.kernels.basis_linear import basis_linear, basis_linear_plain

from .models import fit, gpt2, llama, logits, tokens

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's about Transformers
R, P, D, S = 3, 2, 5, 1.7


def given(up: bool, lead: tuple[int, ...] = (2, 4)) -> list[Any]:
    noise = torch.Generator().manual_seed(0)
    shapes = [(*lead, R * P if up else D), (R, P), (P, D), (R, D)]
    x, lam, gam, A = (torch.randn(s, generator=noise, dtype=torch.float64) for s in shapes)
    return [x.requires_grad_(), lam.requires_grad_(), gam.requires_grad_(), A, S]


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("piece", [1, 2 * P * D, 1 << 20])
@pytest.mark.parametrize("lead", [(2, 4), (0,), ()])
def test_values_and_gradients_are_those_of_the_plain_form(
    up: bool, piece: int, lead: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "PIECE", piece)
    args = given(up, lead)
    found, plain = basis_linear(*args, up=up), basis_linear_plain(*args, up=up)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)
    g = torch.randn(plain.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    both = [torch.autograd.grad(y, args[:3], g) for y in (found, plain)]
    torch.testing.assert_close(both[0], both[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("up", [True, False])
def test_derivatives_are_right_to_second_order(up: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "PIECE", P * D)
    x, lam, gam, A, s = given(up, (3,))
    assert torch.autograd.gradcheck(lambda x, b, c: basis_linear(x, b, c, A, s, up=up), (x, lam, gam))
    assert torch.autograd.gradgradcheck(lambda x, b, c: basis_linear(x, b, c, A, s, up=up), (x, lam, gam))


@pytest.mark.parametrize(("m", "n"), [(7, 5), (5, 7), (6, 6)])
def test_the_change_is_the_sum_of_the_paper(m: int, n: int) -> None:
    """By number, in the order of PEFT's flattening; a larger layer decides about the sizes of A and B."""
    model = torch.nn.Sequential(torch.nn.Linear(n, m), torch.nn.Linear(m, 9)).double()
    attach(model, "randlora", rank=2, alpha=3.0)
    layer = adapted(model)["0"]
    own: Any = layer.adapters["default"]
    assert own.shared.A.shape == (2, max(m, n))
    assert own.shared.B.shape == (9, -(-max(m, n) // 2), 2)
    noise = torch.Generator().manual_seed(1)
    own.lam.data.normal_(generator=noise)
    own.gam.data.normal_(generator=noise)
    d, p = min(m, n), own.lam.shape[1]
    wanted = torch.zeros(max(m, n), d, dtype=torch.float64)
    for i in range(2 * p):
        k, b = divmod(i, p)
        wanted += torch.outer(
            own.shared.B[: max(m, n), i // 2, i % 2], own.lam[k, b] * own.shared.A[k, :d] * own.gam[b]
        )
    wanted = 1.5 * (wanted if n <= m else wanted.t())
    torch.testing.assert_close(layer.methods["default"].delta(own, layer.matrix), wanted, rtol=1e-12, atol=1e-12)
    assert torch.linalg.matrix_rank(wanted) == d


def test_with_constant_gamma_the_change_has_rank_r() -> None:
    model = attach(torch.nn.Sequential(torch.nn.Linear(32, 48)), "randlora", rank=4)
    layer = adapted(model)["0"]
    own: Any = layer.adapters["default"]
    assert bool((own.lam == 0).all())
    assert bool((own.gam == 1 / 32).all())
    own.lam.data.normal_(generator=torch.Generator().manual_seed(1))

    def rank() -> int:
        return int(torch.linalg.matrix_rank(layer.methods["default"].delta(own, layer.matrix).double(), rtol=1e-5))

    assert rank() == 4
    own.gam.data.normal_(generator=torch.Generator().manual_seed(1))
    assert rank() == 32


def test_with_rank_one_every_change_can_be_made() -> None:
    """As many parameters as the weight has, and d more; no LoRA with as many can do that."""
    d = 24
    model = attach(torch.nn.Sequential(torch.nn.Linear(d, d)).double(), "randlora", rank=1, alpha=1.0)
    layer = adapted(model)["0"]
    own: Any = layer.adapters["default"]
    wanted = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    own.lam.data.fill_(1)
    own.gam.data.copy_(torch.linalg.solve(own.shared.B.flatten(1), wanted) / own.shared.A)
    torch.testing.assert_close(layer.methods["default"].delta(own, layer.matrix), wanted, rtol=1e-8, atol=1e-8)
    assert sum(p.numel() for p in own.parameters()) == d * (d + 1)


def test_the_random_matrices_are_one_for_all_layers_and_follow_from_the_seed(tmp_path: Path) -> None:
    model = attach(llama(), "randlora", rank=6, seed=1)

    def bases(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        own = [layer.adapters["default"].shared for layer in adapted(model).values()]
        assert all(one.A is own[0].A and one.B is own[0].B for one in own)
        return own[0].A, own[0].B

    A, B = bases(model)
    assert not any("shared" in name for name in model.state_dict())
    assert not A.requires_grad
    assert 0.97 < B.std() < 1.03
    for other in (attach(llama(), "randlora", rank=6, seed=1), copy.deepcopy(model)):
        assert torch.equal(bases(other)[0], A)
        assert torch.equal(bases(other)[1], B)
    assert not torch.equal(bases(attach(llama(), "randlora", rank=6, seed=2))[0], A)
    for dtype in (torch.bfloat16, torch.float64):  # one still, and the same values
        narrow = bases(attach(llama(dtype), "randlora", rank=6, seed=1))
        moved = bases(copy.deepcopy(model).to(dtype))
        assert narrow[1].dtype == moved[1].dtype == dtype
        assert torch.equal(narrow[1].float(), B)
        assert torch.equal(moved[1].float(), B)
    save(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert [k for k in stored if "randlora_B" in k] == ["base_model.randlora_B"]


def test_neither_the_scaled_matrices_nor_their_products_are_kept() -> None:
    model = attach(torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 64)), "randlora", rank=16)
    own: Any = adapted(model)["0"].adapters["default"]
    kept: dict[int, tuple[int, ...]] = {}
    x = torch.randn(100, 64, requires_grad=True)
    with saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), tuple(t.shape)) and t, lambda t: t
    ):
        model(x).sum()
    there = [x, own.shared.A, own.shared.B, *model.parameters()]
    new = [shape for at, shape in kept.items() if at not in {t.untyped_storage().data_ptr() for t in there}]
    assert new == [(100, 64)], "what the second layer's parameters see"


def test_ours_and_pefts_train_alike(tmp_path: Path) -> None:
    base = llama(torch.float64)
    save(attach(llama(torch.float64), "randlora", rank=6, alpha=12.0), tmp_path)
    ours = load(llama(torch.float64), tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(torch.float64), tmp_path, is_trainable=True).double()
    for model in (ours, theirs):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    grads = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    for path, layer in adapted(ours).items():
        own: Any = layer.adapters["default"]
        for mine, name in ((own.lam, "lambda"), (own.gam, "gamma")):
            other = grads[f"base_model.model.{path}.randlora_{name}"]
            torch.testing.assert_close(mine.grad, other, rtol=1e-7, atol=1e-10)
    ours.zero_grad()
    theirs.zero_grad()
    fit(ours, steps=50, lr=5e-3)
    fit(theirs, steps=50, lr=5e-3)
    assert (logits(ours) - logits(base)).abs().max() > 0.1
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("options", [{"r": 6, "randlora_alpha": 12, "randlora_dropout": 0.1}, {"r": 5, "sparse": True}])
def test_we_load_what_peft_saves(make: Any, options: Any, tmp_path: Path) -> None:
    config = peft.RandLoraConfig(**options, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(make(), config)
    fit(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = load(make(), tmp_path / "theirs")
    assert (logits(ours) - logits(make())).abs().max() > 0.05
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    save(ours, tmp_path / "ours")  # and back
    back = peft.PeftModel.from_pretrained(make(), tmp_path / "ours")
    torch.testing.assert_close(logits(back), logits(theirs), rtol=1e-5, atol=1e-5)


def test_what_we_cannot_compute_is_refused(tmp_path: Path) -> None:
    save(attach(llama(), "randlora", rank=6), tmp_path)
    config, file = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    settings, whole = json.loads(config.read_text()), load_file(file)
    name = "base_model.model.model.layers.0.self_attn.q_proj.randlora_gamma"
    A = "base_model.randlora_A"
    cases: list[tuple[str, dict[str, Any], dict[str, torch.Tensor]]] = [
        ("randlora_A and randlora_B are not there; save with", {}, {k: v for k, v in whole.items() if k != A}),
        (r"randlora_A \[6, 1, 20\] and .* are too small for the model", {}, whole | {A: torch.zeros(6, 1, 20)}),
        (r"or not of 'r' = 5", {"r": 5}, whole),
        (r"randlora_gamma \[2, 2\] and .* do not fit 'model.layers.0.self", {}, whole | {name: torch.zeros(2, 2)}),
        ("do not fit", {}, {k: v for k, v in whole.items() if k != name}),
        ("'use_fast' is True, which this version", {"use_fast": True}, whole),
        ("cannot be used: 'rank' must be above 0", {"r": 0}, whole),
    ]
    for message, options, tensors in cases:
        config.write_text(json.dumps(settings | options))
        save_file(tensors, file)
        model = llama()
        with pytest.raises(InputError, match=message):
            load(model, tmp_path)
        assert not adapted(model)
