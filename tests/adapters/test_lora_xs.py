"""LoRA-XS and LoRA-SB against their equations, in float64."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

from fallline.adapters import attach
from fallline.adapters.layers import adapted
from fallline.errors import InputError

from .models import llama, logits
from .table import batches

R = 5


def test_xs_trains_a_core_between_the_weights_singular_vectors() -> None:
    torch.manual_seed(0)
    model = attach(torch.nn.Sequential(torch.nn.Linear(9, 7)).double(), "lora-xs", rank=R, scale=2.0)
    layer = adapted(model)["0"]
    P: Any = layer.adapters["default"]
    W = layer.matrix().detach()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(P.B @ P.A, (U[:, :R] * S[:R]) @ Vh[:R], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(P.B.t() @ P.B, torch.eye(R, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    assert 0 < P.core.abs().max() < 1e-4
    noise = torch.Generator().manual_seed(1)
    P.core.data.normal_(generator=noise)
    x, g = (torch.randn(4, k, dtype=torch.float64, generator=noise) for k in (9, 7))
    y = model(x)
    wanted = x @ (W + 2 * P.B @ P.core @ P.A).t() + model[0].bias
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    y.backward(g)
    torch.testing.assert_close(P.core.grad, 2 * P.B.t() @ g.t() @ x @ P.A.t(), rtol=1e-11, atol=1e-11)


def test_only_rank_numbers_of_the_input_are_kept() -> None:
    model = attach(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)), "lora-xs", rank=2)
    kept: list[int] = []
    x = torch.randn(100, 64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        model(x).sum()
    assert max(kept) <= 64 * 64, "a weight, never the input of a layer"
    assert sum(k for k in kept if k % 100 == 0) == 2 * 2 * 100


@pytest.mark.filterwarnings("ignore")
def test_pefts_psoft_without_rotation_makes_the_same_change() -> None:
    """Its change is (U √S) (C − I) (√S Vᵀ) with a core C of its own: ours is U R S Vᵀ with R = √S (C − I) /√S."""
    config = peft.PsoftConfig(
        r=R, psoft_alpha=R, psoft_orth=False, psoft_mag_a=False, psoft_mag_b=False, ab_svd_init="pissa_init",
        target_modules=["q_proj"], task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = peft.get_peft_model(llama(), config)
    ours = attach(llama(), "lora-xs", rank=R, targets="q_proj")
    noise = torch.Generator().manual_seed(3)
    for path, layer in adapted(ours).items():
        (core,) = (p for n, p in theirs.named_parameters() if path in n and p.requires_grad)
        root = torch.linalg.svdvals(layer.matrix().detach())[:R].sqrt()
        moved = 3 * torch.randn(R, R, generator=noise)
        signs = (
            torch.linalg.svd(layer.matrix().detach(), full_matrices=False)[0][:, :R].t() @ layer.adapters["default"].B
        )
        with torch.no_grad():
            core.add_(moved)
            R_ours = root[:, None] * moved / root
            layer.adapters["default"].core.copy_(signs.t() @ R_ours @ signs)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    assert (logits(ours) - logits(llama())).abs().max() > 1e-3


def test_sb_begins_with_the_best_part_of_adams_first_step() -> None:
    model = llama().double().eval()
    loss = torch.stack([model(**batch).loss for batch in batches()]).mean()
    names = {n: p for n, p in model.named_parameters() if "proj" in n}
    true = dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True))
    attach(model, "lora-sb", rank=R, first_rate=1e-3, data=batches())
    for path, layer in adapted(model).items():
        P: Any = layer.adapters["default"]
        update = -1e-3 * true[f"{path}.weight"].sign()
        U, S, Vh = torch.linalg.svd(update, full_matrices=False)
        wanted = (U[:, :R] * S[:R]) @ Vh[:R]
        found = layer.methods["default"].delta(P, layer.matrix)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
        left = (update - found).norm() ** 2
        torch.testing.assert_close(left, (S[R:] ** 2).sum(), rtol=1e-6, atol=0)
        for basis in (P.A, P.B.t()):
            torch.testing.assert_close(basis @ basis.t(), torch.eye(R, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_a_plain_step_of_sb_is_the_projection_of_full_tunings() -> None:
    model = attach(llama().double(), "lora-sb", rank=R, data=batches(), targets="q_proj")
    layer = adapted(model)["model.layers.0.self_attn.q_proj"]
    P: Any = layer.adapters["default"]
    layer.weight.requires_grad_(True)
    model(**batches()[0]).loss.backward()
    G = layer.weight.grad
    stepped = P.B @ P.core.grad @ P.A
    torch.testing.assert_close(stepped, P.B @ P.B.t() @ G @ P.A.t() @ P.A, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("id", "more"), [("lora-xs", {}), ("lora-sb", {"data": batches()})])
def test_a_rank_above_the_weights_is_refused(id: str, more: Any) -> None:
    with pytest.raises(InputError, match=r"one of 32 × 32 has 32, got 'rank' = 33"):
        attach(llama(), id, rank=33, **more)
