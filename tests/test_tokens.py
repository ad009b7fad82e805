"""Token losses against full logits in float64, and what they promise about cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fallline.cross_entropy import (
    IGNORED,
    WORDS_AT_ONCE,
    _LinearCrossEntropy,
    chunk_size,
    full_cross_entropy,
    linear_cross_entropy,
    multiple,
    twice_differentiable,
)
from fallline.tokens import per_example, per_token

ROWS, LENGTH, DIM, WORDS = 4, 5, 8, 30


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[list[Tensor], Tensor, Tensor]:
    """([hidden, weight, bias], labels with a masked row and a masked token, upstream)."""
    g = noise()
    leaves = [torch.randn(ROWS, LENGTH, DIM, generator=g, dtype=torch.float64)]
    leaves += [torch.randn(WORDS, DIM, generator=g, dtype=torch.float64)]
    leaves += [torch.randn(WORDS, generator=g, dtype=torch.float64)] if bias else []
    labels = torch.randint(WORDS, (ROWS, LENGTH), generator=g)
    labels[1], labels[2, 3] = IGNORED, IGNORED
    upstream = torch.randn(ROWS, LENGTH, generator=g, dtype=torch.float64)
    wide = torch.promote_types(dtype, torch.float32)
    return [t.to(dtype).requires_grad_() for t in leaves], labels, upstream.to(wide)


def reference(leaves: list[Tensor], labels: Tensor, upstream: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Values and gradients by full logits in float64."""
    double = [t.detach().double().requires_grad_() for t in leaves]
    logits = F.linear(*double)
    values = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    return values.detach(), list(torch.autograd.grad(values, double, upstream.double()))


def ours(leaves: list[Tensor], labels: Tensor, upstream: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
    bias = leaves[2] if len(leaves) > 2 else None
    values = linear_cross_entropy(leaves[0], leaves[1], labels, bias=bias, **options)
    return values.detach(), list(torch.autograd.grad(values, leaves, upstream))


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference by the largest entry."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


@pytest.mark.parametrize("share", ["none", "exact", "threefold", "another", "zero"])
@pytest.mark.parametrize("chunk", [1, 5, 7, 100, None])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_exact_whatever_the_share(share: str, chunk: int | None, bias: bool) -> None:
    leaves, labels, upstream = problem(bias=bias)
    shares = {
        "none": None,
        "exact": upstream,
        "threefold": upstream / 3,
        "another": torch.rand(ROWS, LENGTH, generator=noise(1), dtype=torch.float64),
        "zero": torch.zeros_like(upstream),
    }
    values, grads = ours(leaves, labels, upstream, share=shares[share], chunk=chunk)
    true_values, true_grads = reference(leaves, labels, upstream)
    torch.testing.assert_close(values, true_values, rtol=1e-12, atol=1e-12)
    assert values[1].tolist() == [0.0] * LENGTH
    for got, true in zip(grads, true_grads, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # bfloat16: logits of size 8 are rounded to 2⁻⁵; gradients carry a few roundings of 2⁻⁹
    [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)],
)
@pytest.mark.parametrize("share", [False, True])
def test_lower_precision_is_near_float64(dtype: torch.dtype, tolerance: float, share: bool) -> None:
    leaves, labels, upstream = problem(dtype)
    values, grads = ours(leaves, labels, upstream, share=upstream if share else None, chunk=6)
    true_values, true_grads = reference(leaves, labels, upstream)
    assert values.dtype == torch.float32
    assert apart(values, true_values) < tolerance
    for got, true, leaf in zip(grads, true_grads, leaves, strict=True):
        assert got.dtype == leaf.dtype
        assert apart(got, true) < tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_more_words_than_one_product_takes(dtype: torch.dtype, bias: bool) -> None:
    g, words = noise(), 2 * WORDS_AT_ONCE + 100
    leaves = [torch.randn(s, generator=g).to(dtype).requires_grad_() for s in ([3, 4, 6], [words, 6], [words])][
        : 2 + bias
    ]
    labels = torch.randint(words, (3, 4), generator=g)
    upstream = torch.rand(3, 4, generator=g).to(torch.promote_types(dtype, torch.float32))
    values, grads = ours(leaves, labels, upstream, share=upstream, chunk=5)
    true_values, true_grads = reference(leaves, labels, upstream)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    assert apart(values, true_values) < tolerance
    assert all(apart(got, true) < tolerance for got, true in zip(grads, true_grads, strict=True))


def test_many_chunks_in_bfloat16_lose_no_more_than_one() -> None:
    hidden = torch.ones(512, 4, dtype=torch.bfloat16)
    weight = torch.zeros(8, 4, dtype=torch.bfloat16, requires_grad=True)
    labels, share = torch.zeros(512, dtype=torch.long), torch.ones(512)
    linear_cross_entropy(hidden, weight, labels, share=share, chunk=1).sum().backward()
    assert weight.grad is not None
    assert weight.grad[1].tolist() == [64.0] * 4  # 512 / 8; a bfloat16 sum of 1/8 stops growing at 32
    assert weight.grad[0].tolist() == [-448.0] * 4


def test_improbable_labels_have_a_finite_loss() -> None:
    hidden = torch.tensor([[1.0, 0.0]])
    weight = torch.tensor([[200.0, 0.0], [-200.0, 0.0], [0.0, 0.0]])
    assert linear_cross_entropy(hidden, weight, torch.tensor([1])).item() == 400.0
    assert linear_cross_entropy(hidden, weight, torch.tensor([0])).item() == 0.0


def test_all_tokens_masked_gives_zero_gradients() -> None:
    leaves, labels, upstream = problem()
    values, grads = ours(leaves, torch.full_like(labels, IGNORED), upstream, share=upstream)
    assert values.abs().max() == 0
    assert all(bool((grad == 0).all()) for grad in grads)


def test_masked_labels_inside_the_kernel() -> None:
    """Where asking how many labels are masked would wait for the device, masked tokens go through the kernel."""
    leaves, labels, upstream = problem()
    for share in (None, upstream.flatten(), torch.rand(ROWS * LENGTH, generator=noise(2), dtype=torch.float64)):
        values = _LinearCrossEntropy.apply(leaves[0].flatten(0, 1), *leaves[1:], labels.flatten(), share, 6)
        grads = torch.autograd.grad(values, leaves, upstream.flatten())
        true_values, true_grads = reference(leaves, labels, upstream)
        torch.testing.assert_close(values.detach(), true_values.flatten(), rtol=1e-12, atol=1e-12)
        for got, true in zip(grads, true_grads, strict=True):
            torch.testing.assert_close(got, true, rtol=1e-12, atol=1e-12)


def test_shapes_that_do_not_fit() -> None:
    (hidden, weight, _), labels, upstream = problem()
    with pytest.raises(ValueError, match=r"labels has shape \[4, 4\], must be \[4, 5\]"):
        linear_cross_entropy(hidden, weight, labels[:, 1:])
    with pytest.raises(ValueError, match=r"share has shape \[4\], must be \[4, 5\]"):
        linear_cross_entropy(hidden, weight, labels, share=upstream[:, 0])
    with pytest.raises(ValueError, match="at least 1"):
        linear_cross_entropy(hidden, weight, labels, chunk=-1)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(hidden, weight, labels.clamp(min=0) + WORDS - 3)


def test_gradcheck() -> None:
    leaves, labels, upstream = problem()
    for share in (None, upstream):

        def loss(h: Tensor, w: Tensor, b: Tensor, share: Tensor | None = share) -> Tensor:
            return linear_cross_entropy(h, w, labels, bias=b, share=share, chunk=6)

        assert torch.autograd.gradcheck(loss, leaves)


def test_a_tied_head_gets_the_sum_of_both_gradients() -> None:
    g = noise()
    weight = torch.randn(WORDS, DIM, generator=g, dtype=torch.float64, requires_grad=True)
    ids, labels = torch.randint(WORDS, (2, ROWS * LENGTH), generator=g)
    share = torch.full((len(ids),), 1 / len(ids), dtype=torch.float64)
    (
        linear_cross_entropy(F.embedding(ids, weight).tanh(), weight, labels, share=share, chunk=6) * share
    ).sum().backward()
    (true,) = torch.autograd.grad(F.cross_entropy(F.embedding(ids, weight).tanh() @ weight.t(), labels), weight)
    torch.testing.assert_close(weight.grad, true, rtol=1e-12, atol=1e-12)


def test_asking_twice_gives_the_same_gradient_although_the_first_was_written_on() -> None:
    leaves, labels, upstream = problem()
    values = linear_cross_entropy(leaves[0], leaves[1], labels, bias=leaves[2], share=upstream)
    first = torch.autograd.grad(values, leaves, upstream, retain_graph=True)
    kept = [grad.clone() for grad in first]
    for grad in first:
        grad.zero_()
    for again, true in zip(torch.autograd.grad(values, leaves, upstream), kept, strict=True):
        torch.testing.assert_close(again, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("share", "frozen", "products"),
    # of 2 N V D operations: logits, hidden's gradient, weight's gradient, and logits once more
    [("exact", False, 3), ("none", False, 4), ("none", True, 2), ("another", True, 2), ("another", False, 6)],
)
def test_operations_are_those_promised(share: str, frozen: bool, products: int) -> None:
    leaves, labels, upstream = problem(bias=False)
    labels = labels.clamp(min=0)
    shares = {"none": None, "exact": upstream, "another": upstream.abs()}
    leaves[1].requires_grad_(not frozen)
    with FlopCounterMode(display=False) as counter:
        values = linear_cross_entropy(leaves[0], leaves[1], labels, share=shares[share], chunk=7)
        values.backward(upstream)
    assert counter.get_total_flops() == products * 2 * labels.numel() * WORDS * DIM
    assert (leaves[1].grad is None) == frozen


def test_without_gradients_only_logits_are_computed() -> None:
    leaves, labels, upstream = problem(bias=False)
    labels = labels.clamp(min=0)
    for grad, hidden, weight in ((False, *leaves), (True, *(t.detach() for t in leaves))):
        with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
            linear_cross_entropy(hidden, weight, labels, share=upstream)
        assert counter.get_total_flops() == 2 * labels.numel() * WORDS * DIM


class Sizes(TorchDispatchMode):
    """Remembers how many elements each new tensor had."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen |= {t.numel() for t in (out if isinstance(out, list | tuple) else [out]) if isinstance(t, Tensor)}
        return out


@pytest.mark.parametrize("share", [False, True])
def test_no_tensor_is_larger_than_a_chunk_or_a_gradient(share: bool) -> None:
    g, n, words = noise(), 96, 500
    hidden, weight = (
        torch.randn(n, 4, generator=g).requires_grad_(),
        torch.randn(words, 4, generator=g).requires_grad_(),
    )
    labels, upstream = torch.randint(words, (n,), generator=g), torch.full((n,), 1 / n)
    with Sizes() as sizes:
        values = linear_cross_entropy(hidden, weight, labels, share=upstream if share else None, chunk=16)
        (values * upstream).sum().backward()
    assert max(sizes.seen) == 16 * words
    with Sizes() as sizes:
        full_cross_entropy(F.linear(hidden, weight), labels)
    assert max(sizes.seen) == n * words  # the measure does see full logits


def test_chunks_are_about_equal_and_bounded() -> None:
    assert chunk_size(2048, 49152) == 256
    assert chunk_size(1000, 49152) == 250
    assert chunk_size(4096, 64) == 4096
    assert chunk_size(1, 49152) == 1
    assert chunk_size(0, 49152) == 1


def test_multiple_accepts_rounding_and_nothing_else() -> None:
    share = torch.rand(1000, generator=noise())
    assert multiple(share, share) == 1.0
    assert multiple(share * 3 / 7, share) == pytest.approx(3 / 7, rel=1e-6)
    assert multiple(torch.zeros_like(share), share) == 0.0
    for at, change in ((17, 1 + 1e-5), (0, -1.0), (999, 0.0), (5, float("nan"))):
        other = share.clone()
        other[at] *= change
        assert multiple(other, share) is None


def test_differentiating_twice() -> None:
    leaves, labels, upstream = problem()
    values = linear_cross_entropy(leaves[0], leaves[1], labels, bias=leaves[2], share=upstream)
    with pytest.raises(RuntimeError, match="twice_differentiable"):
        torch.autograd.grad(values, leaves, upstream, create_graph=True)

    def curvature(values: Tensor) -> list[Tensor]:
        grads = torch.autograd.grad(values, leaves, upstream, create_graph=True)
        return list(torch.autograd.grad([(g * g.detach()).sum() for g in grads], leaves))

    with twice_differentiable():
        got = curvature(linear_cross_entropy(leaves[0], leaves[1], labels, bias=leaves[2], share=upstream))
        q = torch.randn(1, 1, 4, 8, generator=noise(), requires_grad=True)
        (slope,) = torch.autograd.grad(F.scaled_dot_product_attention(q, q, q).sum(), q, create_graph=True)
        slope.sum().backward()  # the fused kernel has no second derivative
    true = curvature(
        F.cross_entropy(F.linear(*leaves).flatten(0, 1), labels.flatten(), reduction="none").view(ROWS, -1)
    )
    for a, b in zip(got, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert "_LinearCrossEntropy" in str(linear_cross_entropy(leaves[0], leaves[1], labels.clamp(min=0))._base.grad_fn)


def test_autocast_computes_the_products_in_low_precision() -> None:
    leaves, labels, upstream = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        values, grads = ours(leaves, labels, upstream, share=upstream)
    true_values, true_grads = reference(leaves, labels, upstream)
    assert 1e-5 < apart(values, true_values) < 2e-2
    for got, true in zip(grads, true_grads, strict=True):
        assert got.dtype == torch.float32
        assert apart(got, true) < 2e-2


def test_per_example_and_per_token_are_transposes() -> None:
    segment = torch.tensor([[0, 0, 1, -1], [2, 3, 3, 3], [-1, -1, -1, -1]])
    packed = {"segment": segment, "example_id": torch.arange(4), "input_ids": segment}
    unpacked = {"example_id": torch.arange(3), "input_ids": segment}
    for batch, examples in ((packed, 4), (unpacked, 3)):
        values = torch.randn(3, 4, generator=noise(), dtype=torch.float64)
        rows = torch.randn(examples, generator=noise(1), dtype=torch.float64)
        torch.testing.assert_close((per_example(values, batch) * rows).sum(), (values * per_token(rows, batch)).sum())
    values = torch.arange(12).view(3, 4)
    assert per_example(values, packed).tolist() == [1, 2, 4, 18]
    assert per_example(values, unpacked).tolist() == [6, 22, 38]
    values = values.double()
    values[segment < 0] = float("nan")
    assert per_example(values, packed).isfinite().all()
    values[0, 2] = float("nan")
    assert per_example(values, packed).isnan().tolist() == [False, True, False, False]
