"""Time of one update of a 58 M-parameter Llama, against torch's fused AdamW, the peers, and the speed of memory.

    python benchmarks/optimizer_step.py [--threads 2] [--pairs 15] [--only muon]

The shapes are those of the GaLore papers' 60M model (hidden 512, intermediate 1376, 8 layers, 32 000 words, untied),
float32, with dense gradients. Beside each time: the bytes per second that the cards' least traffic makes of it, as a
share of what copying a large tensor reaches, and the ratio to AdamW that would be the limit at equal bytes per second.

Muon has its own comparison, of hidden matrices alone: torch's, ours, and the matrix products that its five iterations
are made of (benchmarks/results/muon_step.json). Peers from other packages are timed where they are installed:
pip install pytorch_optimizer.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fallline.catalog import by_role, cost, find
from fallline.optim import create
from fallline.optim.roles import roles
from harness import compare, save, table

IDS = ("adamw", "sgd", "scale", "stable-spam", "muon")
SHAPE = {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8}
FRAME = ["src/fallline/optim/base.py", "src/fallline/optim/chain.py"]
ITERATIONS = 5


def build() -> torch.nn.Module:
    """The model, with a gradient for every parameter."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_attention_heads=8, tie_word_embeddings=False)
    model = LlamaForCausalLM(config)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    return model


def sources(*ids: str) -> list[str]:
    """The files that the time of these optimizers depends on."""
    return [*FRAME, *{path: None for id in ids for path in find("optimizer", id).sources()}]


def traffic(id: str, model: torch.nn.Module) -> float:
    """Least bytes that one update moves, by the card."""
    module = find("optimizer", id).load()
    numbers = {k: v for k, v in dataclasses.asdict(module.Config()).items() if isinstance(v, int | float)}
    total = 0.0
    for (_, p), role in zip(model.named_parameters(), roles(model).values(), strict=True):
        rows = p.shape[0] if p.ndim > 1 else 1
        size = {"n": p.numel(), "rows": rows, "cols": p.numel() // rows}
        total += cost(by_role(module.CARD.traffic_bytes, role), **size, **numbers)
    return total


def against_adamw(model: torch.nn.Module, pairs: int) -> None:
    """All but Muon."""
    ids = [id for id in IDS if id != "muon"]
    contestants: dict[str, Callable[[], Any]] = {
        "torch AdamW fused": torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True).step
    }
    contestants |= {id: create(id, model, lr=1e-5).step for id in ids}
    if find_spec("pytorch_optimizer") is not None:
        from pytorch_optimizer import StableSPAM

        own = build()  # it overwrites the gradients
        contestants["pytorch_optimizer StableSPAM"] = StableSPAM(own.parameters(), lr=1e-5).step
    source, target = torch.randn(2, 1 << 26)
    contestants["copy"] = lambda: target.copy_(source)

    timing = compare(contestants, pairs=pairs)
    found = timing["contestants"]
    copied = 2 * source.numel() * source.element_size()
    bandwidth = copied / found["copy"]["median"]
    limits = {}
    print(table(timing))
    for id in ids:
        moved = traffic(id, model)
        speed = moved / found[id]["median"]
        limits[id] = {
            "bytes": moved,
            "bytes_per_second": speed,
            "share_of_copy": speed / bandwidth,
            "limit": moved / traffic("adamw", model),
        }
        print(
            f"{id:<24} {speed / 1e9:6.1f} GB/s, {speed / bandwidth:5.1%} of copy; "
            f"ratio {found[id]['ratio']:.3f}, limit by traffic {limits[id]['limit']:.3f}"
        )
    parameters = sum(p.numel() for p in model.parameters())
    record = {"parameters": parameters, "time": timing, "copy_bytes_per_second": bandwidth, "traffic": limits}
    print(save("optimizer_step", record, sources(*ids)))


def products(shapes: Counter[tuple[int, int]]) -> Callable[[], None]:
    """The products of Muon's iterations, one matrix after another: X Xᵀ, A A and C X, five times."""
    pairs = {shape: (torch.randn(*sorted(shape)), torch.randn(min(shape), min(shape))) for shape in shapes}

    def run() -> None:
        for shape, number in shapes.items():
            X, A = pairs[shape]
            for _ in range(ITERATIONS * number):
                torch.mm(X, X.T)
                torch.mm(A, A)
                torch.mm(A, X)

    return run


def muon(model: torch.nn.Module, pairs: int) -> None:
    """Muon on hidden matrices, against torch's and against its matrix products."""
    matrices = [(n, p) for n, p in model.named_parameters() if roles(model)[n] == "matrix"]
    shapes = Counter(tuple(p.shape) for _, p in matrices)
    contestants = {
        "torch Muon": torch.optim.Muon([p for _, p in matrices], lr=1e-5).step,
        "muon": create("muon", {n: (p, "matrix") for n, p in matrices}, lr=1e-5).step,
        "polar express": create(
            "muon", {n: (p, "matrix") for n, p in matrices}, lr=1e-5, orthogonalise="polar-express"
        ).step,
        "its matrix products": products(shapes),
        "muon, whole model": create("muon", model, lr=1e-5).step,
    }
    timing = compare(contestants, pairs=pairs)
    print(table(timing))
    flops = sum(k * ITERATIONS * (4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3) for s, k in shapes.items())
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    record = {
        "parameters": sum(p.numel() for _, p in matrices),
        "flops": flops,
        "processor_multiplies_bfloat16": native,
        "time": timing,
    }
    print(save("muon_step", record, sources("muon")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--only", choices=("elementwise", "muon"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = build()
    if options.only != "muon":
        against_adamw(model, options.pairs)
    if options.only != "elementwise":
        muon(model, min(options.pairs, 7))


if __name__ == "__main__":
    main()
