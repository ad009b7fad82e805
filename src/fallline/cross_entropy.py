"""The head and its cross-entropy without full logits.

The head's logits, N tokens × V words, are the largest tensors of a training step: 0.4 GB for 2048 tokens and 49 152
words in float32, and an ordinary cross-entropy holds three of that size. Here they exist one chunk of tokens at a time.

Shapes: N tokens, c tokens in a chunk, D hidden size, V words. Labels are already shifted: ``labels[t]`` is what
position t must predict, −100 where nothing is asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .per_example import HeadGradients, Piece, Spans, pieces

IGNORED = -100
"""The label of a token that is not scored."""

CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 512 << 20}
"""Bytes of one chunk of float32 logits. CPU: measured, more gains nothing. CUDA: not measured."""

LEAST_CHUNK = 256
"""Fewest tokens in a chunk: every chunk reads the whole head twice and its gradient once."""

WORDS_AT_ONCE = 2048
"""Rows of the head in one matrix product on CPU: a sixth faster there than all of them, for chunks of 256 tokens."""

_TWICE: ContextVar[bool] = ContextVar("twice_differentiable", default=False)
_PLANNED: ContextVar[str | None] = ContextVar("planned", default=None)


class TokenLoss(Protocol):
    """Another loss of a token by its logits, for `linear_cross_entropy` in place of −log p.

    It is written twice: with its derivative, for a chunk of logits that will be gone afterwards, and plainly.
    """

    def __call__(self, z: Tensor, y: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
        """Values [c] of logits z [c, V], which may be overwritten, and labels y [c, 1]; and the derivative by z [c, V]
        where `slope` asks for it."""

    def plain(self, z: Tensor, y: Tensor) -> Tensor:
        """The same values by operations that can be differentiated twice, and z is left alone."""


@contextmanager
def planned_for(device: str) -> Iterator[None]:
    """Inside, chunks are those of this kind of device: to size there, on shapes, what will run elsewhere."""
    token = _PLANNED.set(device)
    try:
        yield
    finally:
        _PLANNED.reset(token)


def on_cpu(t: Tensor) -> bool:
    """Whether a tensor is on a CPU, or to be."""
    return (_PLANNED.get() or t.device.type) == "cpu"


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Inside, forwards use only operations whose gradients can be differentiated again.

    The cross-entropy forms full logits, `scaled_dot_product_attention` runs on its plain kernel and compiled modules
    run uncompiled, so memory is that of ordinary PyTorch.
    """
    token = _TWICE.set(True)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        _TWICE.reset(token)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    share: Tensor | None = None,
    chunk: int | None = None,
    rule: TokenLoss | None = None,
) -> Tensor:
    """Each token's −log p(label) with p = softmax(weight · hidden + bias), in chunks of tokens.

        z = W h + b [V],   value = log Σ_v exp z_v − z_label,   ∂value/∂z = p − e_label

    Gradients are exact for whatever gradient arrives at the values; `share` says which one to prepare for. With it
    they are formed in the forward, while the chunk is there: 6 N V D floating-point operations in all, those of
    ordinary PyTorch. Without it, or when what arrives is no multiple of it, the backward computes the logits again:
    8 N V D. Hidden's gradient is separable by token and never needs this, so a frozen head is always cheap. On CUDA
    comparing what arrives with `share` waits for the device, once per backward.

    Memory beyond the arguments: one chunk of logits (two on CUDA and in low precision) and the gradients [N, D] and
    [V, D]; in low precision with several chunks, weight's is summed in float32.

    Args:
        hidden: [..., D], what the head reads.
        weight: [V, D], the head's.
        labels: [...] int64, already shifted; −100 gives value 0 and no gradient.
        bias: [V], the head's.
        share: [...], the derivative of the final loss by each value, or a multiple of it.
        chunk: tokens in a chunk; None lets `chunk_size` choose.
        rule: another function of the logits in place of −log p, of which all of the above holds as well.

    Returns:
        [...], float32, or float64 for float64 input: the softmax is computed in the same.

    Raises:
        ValueError: shapes do not fit.
        RuntimeError: a graph of the backward was asked for outside `twice_differentiable`.
    """
    for name, t in (("labels", labels), ("share", share)):
        if t is not None and t.shape != hidden.shape[:-1]:
            raise ValueError(
                f"{name} has shape {list(t.shape)}, must be {list(hidden.shape[:-1])} like hidden's tokens"
            )
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}, must be at least 1 token")
    if _TWICE.get():
        return full_cross_entropy(F.linear(hidden, weight, bias), labels, rule)
    head = HeadGradients.of(weight, bias) if torch.is_grad_enabled() else None
    if torch.is_autocast_enabled(hidden.device.type):  # products with out= are not cast for us
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if head is not None:
        head.watch.rowwise(hidden, "the head")
    h, y = hidden.flatten(0, -2), labels.flatten()
    s = None if share is None else share.flatten()
    live = None
    spans = None if head is None else head.watch.layout.spans(len(h))
    if on_cpu(h) and bool((y == IGNORED).any()):  # elsewhere, asking would wait for the device
        live = (y != IGNORED).nonzero().squeeze(1)
        h, y, s = h.index_select(0, live), y[live], None if s is None else s[live]
        spans = None if spans is None else spans.some(live)
    c = chunk or chunk_size(len(h), len(weight), _PLANNED.get() or h.device.type)
    needs = [t is not None and t.requires_grad for t in (h, weight, bias)]
    values: Tensor
    if head is not None and spans is not None:
        values = _Watched.apply(h, weight, bias, y, s, pieces(spans, c), spans, head, rule)
    elif torch.is_grad_enabled() and any(needs):
        values = _LinearCrossEntropy.apply(h, weight, bias, y, s, c, rule)
    else:
        values = _sweep(h, weight, bias, y, evenly(len(h), c), rule=rule)[0]
    if live is not None:
        values = values.new_zeros(labels.numel()).index_copy(0, live, values)
    return values.view(labels.shape)


def full_cross_entropy(logits: Tensor, labels: Tensor, rule: TokenLoss | None = None) -> Tensor:
    """Each token's −log p(label) from logits [..., V] that exist already, 0 where the label is −100.

    Args:
        logits: [..., V], cast to float32 unless float64.
        labels: [...] int64, already shifted.
        rule: another function of the logits in place of −log p.

    Returns:
        [...], float32 or float64.
    """
    z = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    y = labels.flatten()
    if rule is None:
        return F.cross_entropy(z, y, reduction="none", ignore_index=IGNORED).view(labels.shape)
    masked = y == IGNORED
    return rule.plain(z, y.masked_fill(masked, 0).unsqueeze(1)).masked_fill(masked, 0).view(labels.shape)


def nll(z: Tensor, y: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
    """−log p as a `TokenLoss`, with its derivative p − e_y."""
    # max p = 1 / Σ exp(z − max z) gives the log-sum in two reads that never underflow
    top, at_label = z.amax(1), z.gather(1, y).squeeze(1)
    p = torch.softmax(z, 1, out=z) if on_cpu(z) else torch.softmax(z, 1)  # row by row, so in place is safe on CPU
    value = top - p.amax(1).log() - at_label
    return value, minus_label(p, y) if slope else None


def minus_label(p: Tensor, y: Tensor) -> Tensor:
    """p − e_y, in place: p [c, V], y [c, 1]."""
    return p.scatter_add_(1, y, p.new_full(y.shape, -1))


def chunk_size(tokens: int, words: int, device: str = "cpu") -> int:
    """Tokens in a chunk: as many as `CHUNK_BYTES` allows but at least `LEAST_CHUNK`, all chunks about equal."""
    most = max(LEAST_CHUNK, CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (4 * words))
    return max(1, math.ceil(tokens / math.ceil(max(tokens, 1) / most)))


class _LinearCrossEntropy(torch.autograd.Function):
    """`linear_cross_entropy` on [N, D]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        share: Tensor | None,
        chunk: int,
        rule: TokenLoss | None = None,
    ) -> Tensor:
        needs = ctx.needs_input_grad[:3]
        early = share is not None or not any(needs[1:])
        ctx.save_for_backward(hidden, weight, bias, labels, share)
        ctx.chunk, ctx.rule = chunk, rule
        wanted = needs if early else (False,) * 3
        values, *formed = _sweep(hidden, weight, bias, labels, evenly(len(hidden), chunk), share, wanted, rule=rule)
        ctx.formed = formed if early else None
        return values

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_cross_entropy was asked for a gradient that can be differentiated again (create_graph=True); "
                "run forward and backward inside fallline.tokens.twice_differentiable()"
            )
        hidden, weight, bias, labels, share = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        upstream = upstream.masked_fill(labels == IGNORED, 0)
        formed, ctx.formed = ctx.formed, None  # handed out once: the receiver may write on it
        factor = 1.0
        if formed is not None and any(needs[1:]):
            found = multiple(upstream, share.masked_fill(labels == IGNORED, 0))
            formed, factor = (formed, found) if found is not None else (None, 1.0)
        if formed is None:
            chunks = evenly(len(hidden), ctx.chunk)
            _, *formed = _sweep(hidden, weight, bias, labels, chunks, upstream, needs, rule=ctx.rule)
        dh, dw, db = formed
        if dh is not None:
            dh.mul_(upstream.unsqueeze(1))
        if factor != 1.0:
            for grad in (dw, db):
                if grad is not None:
                    grad.mul_(factor)
        return dh, dw, db, None, None, None, None


class _Watched(torch.autograd.Function):
    """`linear_cross_entropy` on [N, D] that tells a watch each example's gradients of the head."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        share: Tensor | None,
        chunks: Sequence[Piece],
        spans: Spans,
        head: HeadGradients,
        rule: TokenLoss | None,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, labels, share)
        ctx.chunks, ctx.spans, ctx.head, ctx.rule, ctx.formed = chunks, spans, head, rule, None
        if share is None:
            return _sweep(hidden, weight, bias, labels, chunks, rule=rule)[0]
        collector = head.collect(hidden, len(weight), spans)
        needs = (ctx.needs_input_grad[0], False, False)
        values, dh, _, _ = _sweep(
            hidden, weight, bias, labels, chunks, share, needs, collector.visit, collector.G, rule
        )
        ctx.formed = dh, collector
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, share = ctx.saved_tensors
        upstream = upstream.masked_fill(labels == IGNORED, 0)
        if ctx.formed is None or multiple(upstream, share.masked_fill(labels == IGNORED, 0)) != 1.0:
            collector = ctx.head.collect(hidden, len(weight), ctx.spans)
            needs = (ctx.needs_input_grad[0], False, False)
            dh = _sweep(
                hidden, weight, bias, labels, ctx.chunks, upstream, needs, collector.visit, collector.G, ctx.rule
            )[1]
        else:
            dh, collector = ctx.formed
        ctx.formed = None
        collector.arrive()
        return None if dh is None else dh.mul_(upstream.unsqueeze(1)), *[None] * 8


def evenly(tokens: int, chunk: int) -> list[Piece]:
    """All tokens in chunks."""
    return [Piece(slice(i, min(i + chunk, tokens)), 0, 0) for i in range(0, tokens, chunk)]


def multiple(upstream: Tensor, share: Tensor) -> float | None:
    """The c for which upstream = c · share up to rounding, or None when there is none. Waits for the device.

    Args:
        upstream: [N]. share: [N].
    """
    share = share.to(upstream.dtype)
    if torch.equal(upstream, share):
        return 1.0
    at = share.abs().argmax()
    c = upstream[at] / share[at]
    error = (upstream - c * share).abs()
    within = error <= 4 * torch.finfo(share.dtype).eps * (c * share).abs()  # false for nan
    return float(c) if bool(within.all()) else None


def _sweep(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    chunks: Sequence[Piece],
    upstream: Tensor | None = None,
    needs: Sequence[bool] = (False, False, False),
    visit: Callable[[Piece, Tensor, Tensor, Tensor], None] | None = None,
    room: Tensor | None = None,
    rule: TokenLoss | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """One pass over the chunks: values and gradients.

    Args:
        hidden: [N, D]. weight: [V, D]. bias: [V]. labels: [N].
        chunks: of tokens.
        upstream: [N], for weight's and bias's gradient.
        needs: which gradients of hidden, weight, bias to form.
        visit: is shown every chunk's output gradients for upstream 1, inputs, and upstream.
        room: [N, V], where every chunk may leave its output gradients.
        rule: None is `nll`.

    Returns:
        values [N]; hidden's gradient [N, D] for upstream 1 at every token; weight's [V, D] and bias's [V] for
        `upstream`. None where not needed.
    """
    n, words = len(hidden), len(weight)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    summed = weight.dtype if len(chunks) < 2 else wide  # a sum over chunks in low precision would lose bits
    values = hidden.new_empty(n, dtype=wide)
    dh = torch.empty_like(hidden) if needs[0] else None
    dw = torch.zeros_like(weight, dtype=summed) if needs[1] else None
    db = weight.new_zeros(words, dtype=wide) if needs[2] else None
    masked = labels == IGNORED
    target = labels.masked_fill(masked, 0).unsqueeze(1)
    if upstream is not None:
        upstream = upstream.masked_fill(masked, 0).to(wide).unsqueeze(1)
    logits = hidden.new_empty(
        0 if room is not None else max((piece.tokens.stop - piece.tokens.start for piece in chunks), default=0), words
    )
    at_once = WORDS_AT_ONCE if on_cpu(hidden) and not _PLANNED.get() else words  # shapes are not faster in parts
    loss, slope = rule or nll, visit is not None or any(needs)
    for piece in chunks:
        rows = piece.tokens
        x, y = hidden[rows], target[rows]
        z = logits[: len(x)] if room is None else room[rows]
        for first in range(0, words, at_once):
            part = slice(first, first + at_once)
            if bias is None:
                torch.mm(x, weight[part].t(), out=z[:, part])
            else:
                torch.addmm(bias[part], x, weight[part].t(), out=z[:, part])
        values[rows], gradient = loss(z.to(wide), y, slope)
        if gradient is None:
            continue
        g = gradient.to(hidden.dtype)
        if dh is not None:
            torch.mm(g, weight, out=dh[rows])
        if upstream is not None and visit is not None:
            visit(piece, g, x, upstream[rows])
        if upstream is not None and dw is not None:
            gt, ux = g.t(), (upstream[rows] * x).to(x.dtype)
            if dw.dtype == ux.dtype:
                torch.addmm(dw, gt, ux, out=dw)
            else:
                dw += gt @ ux
        if upstream is not None and db is not None:
            db.addmv_(gradient.t(), upstream[rows].squeeze(1))
    values.masked_fill_(masked, 0)
    return values, dh, None if dw is None else dw.to(weight.dtype), None if db is None else db.to(weight.dtype)
