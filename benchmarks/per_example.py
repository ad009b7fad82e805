"""Per-example gradient norms and clipped sums of a Llama, against plain backpropagation and the usual ways.

    python benchmarks/per_example.py [--model 6.8M] [--length 64]

Batches of 16 rows in float32; the loss is the mean over all tokens. Contestants:

- ``plain``: forward and backward, as training does;
- ``norms``: the same with every example's gradient norm;
- ``norms + clipped sum``: and the sum of the gradients, each scaled down to at most `CLIP`, in place of their sum;
- ``vmap(grad)``: every example's gradient stored, by `torch.func`; then norms and clipped sum. Its losses come from
  full logits, as `linear_cross_entropy` has no rule for vmap; nor has torch's attention on CPU, which it calls row by
  row, but 🤗's eager attention is no faster there and takes more memory;
- ``loop``: one example at a time, norms and clipped sum;
- ``opacus norms``, ``opacus norms + clipped sum``: ghost clipping, with its two backward passes for the sum. 🤗's
  RMSNorm is registered with it here. It refuses tied weights and sees the head only where that forms full logits;
- ``plain, untied``: what Opacus' two stand on, without Opacus: an untied copy of the model, full logits. Their ratios
  to it are printed beside those to ``plain``.

All norms and all clipped sums agree with the loop's before anything is timed. Every contestant's peak memory is that of
a process of its own, in which more than `ROOM` bytes are refused; a peer that does not fit is left out, and the record
says so. These processes give freed blocks of `FREED` bytes and more back at once (glibc's MALLOC_MMAP_THRESHOLD_):
otherwise the holes that the allocator happens to keep would decide, and not what is held. The operations of matrix
products and attention, counted as they run, say which ratio to expect where nothing else costs time.

One case or all, with the peers or ours alone; cases measured before, with the same code on the same machine, stay in
the record.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import opacus
import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleModuleFastGradientClipping, register_grad_sampler
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fallline.catalog import code_hash
from fallline.per_example import Norms, PerExample
from fallline.tokens import full_cross_entropy, per_example, token_losses
from harness import RESULTS, ROOT, compare, machine, peak_memory, peak_of, save, table

ROWS, CLIP, TOLERANCE, ROOM, FREED = 16, 0.05, 1e-4, 20 << 30, 1 << 20

MODELS = {
    "6.8M": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "vocab_size": 8000, "tied": True},
    "58M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "vocab_size": 32000, "tied": False},
}
"""A small model of our own making, with one matrix for embedding and head, and the GaLore papers' 60M model."""

LENGTHS = (64, 256, 1024)

NAMES = (
    "plain",
    "norms",
    "norms + clipped sum",
    "vmap(grad)",
    "loop",
    "plain, untied",
    "opacus norms",
    "opacus norms + clipped sum",
)
OURS = NAMES[:3]

ENGINE = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "src/fallline/per_example").glob("*.py"))
SOURCES = [*ENGINE, "src/fallline/cross_entropy.py", "src/fallline/tokens.py", "benchmarks/per_example.py"]


class Found(NamedTuple):
    """What a contestant answers: norms [B] of the gradients of the examples' parts of the loss, where it takes them,
    and the gradients it ends with, clipped or not, by parameter."""

    norms: Tensor | None
    gradient: dict[str, Tensor]


Contestant = Callable[[], Found]


def build(size: str, tied: bool) -> LlamaForCausalLM:
    """The model, the same weights whether or not its head is a copy."""
    shape: dict[str, Any] = {name: value for name, value in MODELS[size].items() if name != "tied"}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=8, tie_word_embeddings=MODELS[size]["tied"]))
    if MODELS[size]["tied"] and not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model.train()


def rows(size: str, length: int) -> tuple[dict[str, Tensor], Tensor]:
    """A batch of random words, all predicted, and the share [R, L] of each token in the loss."""
    ids = torch.randint(0, MODELS[size]["vocab_size"], (ROWS, length + 1), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids[:, :-1].clone(), "labels": ids[:, 1:].clone(), "example_id": torch.arange(ROWS)}
    return batch, torch.full((ROWS, length), 1 / (ROWS * length))


def clipping(norms: Tensor) -> Tensor:
    """The factor of each example, [B]; Opacus' formula."""
    return (CLIP / (norms + 1e-6)).clamp(max=1)


def lengths(each: Mapping[str, Tensor]) -> Tensor:
    """The norms of examples' gradients [B, …], [B]. By rows: in one go, float32 is wrong by 1e-4 and more."""
    rows = [torch.linalg.vector_norm(g, dim=-1).flatten(1) if g.dim() > 2 else g for g in each.values()]
    return torch.linalg.vector_norm(torch.cat(rows, 1), dim=1)


def taken(model: nn.Module) -> dict[str, Tensor]:
    """The gradients in `.grad`, which is empty afterwards."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def plain(model: LlamaForCausalLM, batch: Mapping[str, Tensor], share: Tensor) -> Contestant:
    def run() -> Found:
        (token_losses(model, batch, share) * share).sum().backward()
        return Found(None, taken(model))

    return run


def full(model: LlamaForCausalLM, batch: Mapping[str, Tensor], share: Tensor) -> Contestant:
    """``plain`` with full logits."""

    def run() -> Found:
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        (full_cross_entropy(logits, batch["labels"]) * share).sum().backward()
        return Found(None, taken(model))

    return run


def ours(model: LlamaForCausalLM, batch: Mapping[str, Tensor], share: Tensor, clipped: bool) -> Contestant:
    engine = PerExample(model)

    def run() -> Found:
        reader = Norms()
        with engine.watch(batch, reader, keep=clipped) as seen:
            per_example(token_losses(model, batch, share) * share, batch).sum().backward()
        norms = reader.total().sqrt()
        if clipped:
            seen.add(clipping(norms))
        return Found(norms, taken(model))

    return run


def vmapped(model: LlamaForCausalLM, batch: Mapping[str, Tensor], share: Tensor) -> Contestant:
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], ids: Tensor, labels: Tensor, share: Tensor) -> Tensor:
        answer = functional_call(model, params, (), {"input_ids": ids.unsqueeze(0), "use_cache": False})
        return (F.cross_entropy(answer.logits.squeeze(0), labels, reduction="none") * share).sum()

    def run() -> Found:
        each = vmap(grad(loss), (None, 0, 0, 0))(params, batch["input_ids"], batch["labels"], share)
        norms = lengths(each)
        factor = clipping(norms)
        return Found(norms, {name: torch.tensordot(factor, g, 1) for name, g in each.items()})

    return run


def loop(model: LlamaForCausalLM, batch: Mapping[str, Tensor], share: Tensor) -> Contestant:
    def run() -> Found:
        norms = torch.empty(ROWS)
        total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for i in range(ROWS):
            one = {name: column[i : i + 1] for name, column in batch.items()}
            (token_losses(model, one, share[i : i + 1]) * share[i : i + 1]).sum().backward()
            found = taken(model)
            norms[i] = lengths({name: g.unsqueeze(0) for name, g in found.items()})
            factor = clipping(norms[i]).item()
            torch._foreach_add_([total[name] for name in found], list(found.values()), alpha=factor)
        return Found(norms, total)

    return run


def ghost(model: LlamaForCausalLM, batch: Mapping[str, Tensor], share: Tensor, clipped: bool) -> Contestant:
    # strict=False: 🤗 keeps the rotary frequencies in a buffer
    wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=CLIP, loss_reduction="sum", strict=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # its zero_grad is all that is called

    def run() -> Found:
        logits = wrapped(input_ids=batch["input_ids"], use_cache=False).logits
        losses = (full_cross_entropy(logits, batch["labels"]) * share).sum(1)
        if clipped:
            DPTensorFastGradientClipping(wrapped, optimizer, losses, loss_reduction="sum").backward()
            return Found(wrapped.per_sample_gradient_norms, taken(model))
        losses.sum().backward()
        return Found(wrapped.get_norm_sample(), taken(model))

    return run


@register_grad_sampler(LlamaRMSNorm)
def rms_norm(layer: LlamaRMSNorm, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Each example's gradient of the gain, [B, D]: Σ_t x̂_t ∘ g_t."""
    (x,) = activations
    unit = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + layer.variance_epsilon)
    return {layer.weight: (unit * backprops).sum(1)}


def contestant(name: str, size: str, length: int) -> Contestant:
    """One contestant, with a model of its own."""
    batch, share = rows(size, length)
    model = build(size, tied=not (name.startswith("opacus") or name == "plain, untied"))
    clipped = name.endswith("clipped sum")
    if name.startswith("opacus"):
        return ghost(model, batch, share, clipped)
    if name.startswith("norms"):
        return ours(model, batch, share, clipped)
    return {"plain": plain, "plain, untied": full, "vmap(grad)": vmapped, "loop": loop}[name](model, batch, share)


def agree(found: Mapping[str, Found], size: str, length: int) -> dict[str, float]:
    """The largest relative error of each contestant, norms and gradients together, against loops.

    Raises:
        AssertionError: one is above `TOLERANCE`, ten times that for Opacus, or `CLIP` clips nothing.
    """
    batch, share = rows(size, length)
    apart = {name: "opacus" in name or "untied" in name for name in found}
    loops = {way: loop(build(size, tied=not way), batch, share)() for way in set(apart.values())}
    errors = {}
    for name, (norms, gradient) in found.items():
        reference, differences = loops[apart[name]], []
        assert reference.norms is not None
        if norms is not None:
            differences.append(((norms - reference.norms) / reference.norms).abs().max())
            assert (norms > CLIP).any(), f"{name}: nothing to clip in {norms.tolist()}"
        if name in ("plain", "plain, untied", "norms", "opacus norms"):  # not clipped
            expected = found["plain, untied" if apart[name] else "plain"].gradient
        else:
            expected = reference.gradient
        differences += [(gradient[n] - g).norm() / g.norm() for n, g in expected.items()]
        errors[name] = float(torch.stack(differences).max())  # NaN if one is, and then not below the limit
        limit = 10 * TOLERANCE if name.startswith("opacus") else TOLERANCE  # its Gram matrices lose digits in long rows
        assert errors[name] < limit, f"{name} is wrong by {errors[name]:.1e}"
    return errors


def operations(step: Contestant) -> int:
    """Floating-point operations of one step in matrix products and attention."""

    def attention(q: Any, k: Any, v: Any, *rest: Any, **more: Any) -> int:
        return sdpa_flop_count(q, k, v) // 2  # the kernel leaves out what a causal mask hides

    def attention_back(g: Any, q: Any, k: Any, v: Any, *rest: Any, **more: Any) -> int:
        return sdpa_backward_flop_count(g, q, k, v) // 2

    def product(total: Any, a: Any, b: Any, **more: Any) -> int:
        return 2 * math.prod(a) * b[-1]

    aten = torch.ops.aten
    kernels = {  # those that torch does not count
        aten.addmm_: product,
        aten.baddbmm_: product,
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_back,
    }
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        step()
    return counter.get_total_flops()


def peaks_of(size: str, length: int, peers: bool) -> tuple[dict[str, int], dict[str, str]]:
    """Peak bytes of each contestant, and why others have none."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(FREED)  # for the processes that measure; this one's is set
    options = ("--model", size, "--length", str(length))
    peaks, left_out = dict(peak_memory(__file__, OURS, *options, times=3)), {}
    if not peers:
        return peaks, dict.fromkeys(NAMES[3:], "not asked for")
    for name in NAMES[3:]:
        try:
            peaks |= peak_memory(__file__, [name], *options)
        except subprocess.CalledProcessError as error:
            if "allocate memory" not in error.stderr:
                raise
            left_out[name] = f"does not fit in {ROOM / 2**30:.0f} GiB"
    return peaks, left_out


def case(size: str, length: int, pairs: int, peers: bool) -> dict[str, Any]:
    """One model and length, measured and printed."""
    peaks, left_out = peaks_of(size, length, peers)
    steps = {name: contestant(name, size, length) for name in NAMES if name not in left_out}
    errors = agree({name: step() for name, step in steps.items()}, size, length)
    flops = {name: operations(steps[name]) for name in OURS}
    timing = compare(steps, pairs=pairs)
    count = sum(p.numel() for p in build(size, tied=True).parameters())
    print(f"\n{size}: {count:,} parameters, {ROWS} rows of {length} tokens")
    print(table(timing, peaks))
    seconds, found = timing["rounds"], {}
    for name in OURS:
        found[name] = flops[name] / flops["plain"]
        print(f"{name}: {flops[name] / 1e9:.1f} GFLOP, {found[name]:.3f} × plain")
    beside = {}
    for name in ("opacus norms", "opacus norms + clipped sum"):
        if name in steps and "plain, untied" in steps:
            ratios = sorted(a / b for a, b in zip(seconds[name], seconds["plain, untied"], strict=True))
            beside[name] = ratios[len(ratios) // 2]
            print(f"{name}: {beside[name]:.3f} × plain, untied")
    for name, why in left_out.items():
        print(f"{name}: left out, {why}")
    return {
        "parameters": count, "rows": ROWS, "length": length, "time": timing, "peak": peaks,
        "peak_ratio": {name: peaks[name] / peaks["plain"] for name in OURS}, "ratio_to_untied": beside,
        "flops": flops, "flops_ratio": found, "errors": errors, "left_out": left_out,
    }  # fmt: skip


def earlier() -> dict[str, Any]:
    """The cases in the record, if it was made by the same code on the same machine."""
    path = RESULTS / "per_example.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    now = {source: code_hash(ROOT / source) for source in SOURCES}
    same = record.get("sources") == now and record.get("machine") == machine()
    return record["cases"] if same and record["opacus"] == opacus.__version__ else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=MODELS, help="one model instead of both")
    parser.add_argument("--length", type=int, choices=LENGTHS, help="one length instead of all")
    parser.add_argument("--ours", action="store_true", help="leave out the peers")
    parser.add_argument("--pairs", type=int, default=9, help="rounds that count")
    parser.add_argument("--peak", choices=NAMES, help="print the peak bytes of one contestant and stop")
    args = parser.parse_args()
    if args.peak:
        resource.setrlimit(resource.RLIMIT_DATA, (ROOM, ROOM))
        print(peak_of(contestant(args.peak, args.model, args.length)))
        return
    for size in [args.model] if args.model else MODELS:
        for length in [args.length] if args.length else LENGTHS:
            cases = earlier() | {f"{size}/{length}": case(size, length, args.pairs, not args.ours)}
            about = {"opacus": opacus.__version__, "peak_environment": {"MALLOC_MMAP_THRESHOLD_": FREED}}
            path = save("per_example", about | {"cases": cases}, SOURCES)
    print(f"\nwritten: {path.name}")


if __name__ == "__main__":
    main()
