"""Loops of C and their slices: that they compile, refuse tensors that do not fit, and average as torch does."""

from __future__ import annotations

import os
import shlex
import shutil

import pytest
import torch
from torch import nn

from fallline.kernels import eight_bit_adam, elementwise, split_adam
from fallline.kernels.elementwise import loops
from fallline.kernels.native import compiled
from fallline.kernels.slices import slices
from fallline.optim import create

WAYS = ["C", "tensors", "plain"]


@pytest.mark.parametrize("module", [elementwise, eight_bit_adam], ids=["elementwise", "eight_bit_adam"])
def test_source_compiles(module: object):
    """Without it nothing else would fail, it would only be slower."""
    if shutil.which(shlex.split(os.environ.get("CC", "cc"))[0]) is None:
        pytest.skip("no C compiler")
    assert compiled(module.SOURCE) is not None  # type: ignore[attr-defined]


def test_tensors_of_other_shapes_are_refused():
    """Both would write past the end of the small one."""
    big, small = torch.zeros(4, 6), torch.zeros(4, 5)
    with pytest.raises(ValueError, match=r"must be of shape \[4, 6\] here; got \[4, 5\]"):
        loops("lion", (big, big, small), (0.1, 0.1, 0.1, 1.0))
    for written, read in (((big, small), (big,)), ((big,), (small,))):
        with pytest.raises(ValueError, match=r"got \[4, 5\]"):
            next(slices(written, read, 64))


def test_moments_that_are_not_of_the_part_are_refused():
    W, few = torch.zeros(4, 6), torch.zeros(4, 2)
    adam = {"betas": (0.9, 0.99), "eps": 1e-8, "t": 1, "lr": 0.1, "decay": 0.0}
    rest = {"remainder": "sign", "rate": 0.1}
    for call in (
        lambda: split_adam.column_adam_step(W, W, few, few, runs=[slice(0, 3)], **adam, **rest),  # type: ignore[arg-type]
        lambda: split_adam.entry_adam_step(W, W, few, few, where=torch.arange(9), **adam, **rest),  # type: ignore[arg-type]
        lambda: split_adam.subspace_adam_step(W, W, torch.eye(3, 6), few, few, **adam, **rest),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=r"got \[4, 2\]"):
            call()


@pytest.mark.parametrize("wrong", ["codes", "scales"])
def test_codes_and_scales_that_do_not_fit_are_refused(wrong: str):
    W, codes, scales = torch.zeros(4, 6), torch.zeros(4, 6, dtype=torch.uint8), torch.zeros(4, 2)
    bad = {"codes": codes, "scales": scales} | {wrong: {"codes": codes[:3], "scales": scales[:, :1]}[wrong]}
    leaf = eight_bit_adam.Leaf(W, W, codes, scales, bad["codes"], bad["scales"])
    with pytest.raises(ValueError, match=r"must be of shape"):
        eight_bit_adam.eight_bit_adam_step([leaf], betas=(0.9, 0.99), eps=1e-8, t=1, lr=0.1, decay=0.0, block=4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("id", ["spam", "diffgrad", "lion", "adamw-8bit"])
def test_an_average_of_nothing_is_the_gradient(id: str, way: str, monkeypatch: pytest.MonkeyPatch):
    """At β = 0 what a large gradient left must be gone, and not cancel the small one that follows."""
    if way == "C" and compiled(elementwise.SOURCE) is None:
        pytest.skip("no C compiler")
    if way == "tensors":
        for module in (elementwise, eight_bit_adam):
            monkeypatch.setattr(module, "compiled", lambda source: None)
    p = nn.Parameter(torch.zeros(64, 64))
    options = {"spam": {"reset_every": 0}}.get(id, {})
    betas = (0.9, 0.0) if id == "lion" else (0.0, 0.99)
    optimizer = create(id, {"a.weight": (p, "matrix")}, betas=betas, **options)
    optimizer.plain = way == "plain"  # type: ignore[attr-defined]
    for size in (1.0, 1e-9):
        p.grad = torch.full((64, 64), size)
        optimizer.step()
    (state,) = (values for key, values in optimizer.state[p].items() if key not in ("step", "sign"))
    M = state["average" if id == "lion" else "exp_avg"]
    M = M["scales"] if id == "adamw-8bit" else M
    torch.testing.assert_close(M, torch.full_like(M, 1e-9), rtol=1e-6, atol=0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("id", ["spam", "diffgrad", "adamw-8bit"])
def test_second_moments_of_huge_gradients_are_finite(id: str, way: str, monkeypatch: pytest.MonkeyPatch):
    """Squares of 3e19 are not, (1 − β₂) of them are."""
    if way == "C" and compiled(elementwise.SOURCE) is None:
        pytest.skip("no C compiler")
    if way == "tensors":
        for module in (elementwise, eight_bit_adam):
            monkeypatch.setattr(module, "compiled", lambda source: None)
    p = nn.Parameter(torch.zeros(64, 64))
    optimizer = create(id, {"a.weight": (p, "matrix")}, lr=1.0)
    optimizer.plain = way == "plain"  # type: ignore[attr-defined]
    p.grad = torch.full((64, 64), 3e19)
    optimizer.step()
    assert p.isfinite().all()
    assert (p != 0).all()
