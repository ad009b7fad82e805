"""Time of one update of a 58 M-parameter Llama, against torch's fused AdamW, the peers, and what limits it.

    python benchmarks/optimizer_step.py GROUP [--pairs 15] [--threads 2]

GROUP is one of `GROUPS`, or nothing for all; each writes a file of its own. The shapes are those of the GaLore papers'
60M model (hidden 512, intermediate 1376, 8 layers, 32 000 words, untied), float32, with dense gradients. Contestants of
a group are timed in turn; their ratios are to torch's fused AdamW in the same rounds. Beside them

- the ratio that the least traffic of the card would allow, if it moved as many bytes a second as AdamW;
- ``products``, where a rule multiplies matrices: those products alone, one matrix after another;
- the bytes of state, counted and by the card;
- how long the low-rank methods take to find new bases, all matrices at once.

Rules of the group ``orthogonal`` have hidden matrices alone, as torch's Muon does; the others have the whole model.
Peers from other packages are timed where they are installed, see CONTRIBUTING.md. A peer that changes the gradients has
a model of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fallline.catalog import by_role, cost, find
from fallline.optim import create
from fallline.optim.roles import Role, roles
from harness import compare, save, table

SHAPE = {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8}
FRAME = ["src/fallline/optim/base.py", "src/fallline/optim/chain.py"]
RATE = 1e-5
RANK = 128
ITERATIONS = {"muon": 5, "swan": 8, "mngd": 8, "lanton": 10}
"""Of the polar factor; LANTON has two of five."""

ADAMW = "torch AdamW fused"

Step = Callable[[], Any]
Leaves = dict[str, tuple[nn.Parameter, Role]]


class Ours(NamedTuple):
    """A contestant of ours: its name in the table, the method and its options."""

    name: str
    id: str
    options: Mapping[str, Any] = {}


class Peer(NamedTuple):
    """Somebody else's: whose time it is beside, where it is from and how it is made."""

    of: str
    package: str
    name: str
    options: Mapping[str, Any] = {}


def plain(*ids: str) -> tuple[Ours, ...]:
    """Contestants with default options."""
    return tuple(Ours(id, id) for id in ids)


GROUPS: dict[str, tuple[tuple[Ours, ...], tuple[Peer, ...]]] = {
    "elementwise": (
        plain("adamw", "sgd", "lion", "diffgrad", "spam", "stable-spam", "adafactor"),
        (
            Peer("stable-spam", "pytorch_optimizer", "StableSPAM"),
            Peer("diffgrad", "pytorch_optimizer", "DiffGrad"),
            Peer("lion", "pytorch_optimizer", "Lion"),
            Peer("adafactor", "torch.optim", "Adafactor"),
        ),
    ),
    "normalised": (plain("adamw", "scale", "sinkgd"), ()),
    "orthogonal": (
        (
            *plain("muon"),
            Ours("muon, polar express", "muon", {"orthogonalise": "polar-express"}),
            *plain("swan", "mngd"),
            Ours("lanton", "lanton", {"alpha": 1.0, "noise_momentum": 0.99}),
        ),
        (Peer("muon", "torch.optim", "Muon"),),
    ),
    "low-rank": (
        (
            *(Ours(id, id, {"rank": RANK}) for id in ("galore", "fira", "apollo")),
            Ours("apollo-mini", "apollo-mini"),
            Ours("frugal", "frugal"),
        ),
        (
            Peer("galore", "galore_torch", "GaLoreAdamW"),
            Peer("fira", "fira", "FiraAdamW"),
            Peer("apollo", "apollo_torch", "APOLLOAdamW"),
        ),
    ),
    "eight-bit": (
        plain("adamw", "adamw-8bit"),
        (
            Peer("adamw-8bit", "torchao.optim", "AdamW8bit"),
            Peer("adamw-8bit", "bitsandbytes.optim", "AdamW8bit"),
        ),
    ),
}


def build() -> nn.Module:
    """The model, with a gradient for every parameter."""
    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**SHAPE, num_attention_heads=8, tie_word_embeddings=False))
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    return model


def leaves(model: nn.Module, group: str) -> Leaves:
    """What the contestants of a group update."""
    found = roles(model)
    named = {name: (p, found[name]) for name, p in model.named_parameters()}
    return {n: pair for n, pair in named.items() if group != "orthogonal" or pair[1] == "matrix"}


def peer_step(peer: Peer, group: str) -> Step:
    """One update by a peer, of a model of its own."""
    here = leaves(build(), group)
    options = {"lr": RATE, **peer.options}
    matrices = [p for p, role in here.values() if role == "matrix"]
    others = [p for p, role in here.values() if role != "matrix"]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others}]
    if group == "low-rank":
        groups[0] |= {"rank": RANK, "update_proj_gap": 200, "scale": 0.25, "alpha": 0.25, "proj_type": "std"}
        options["no_deprecation_warning"] = True
    if peer.package == "apollo_torch":
        groups[0] |= {"proj": "random", "scale_type": "channel", "scale": 1}
    return getattr(import_module(peer.package), peer.name)([g for g in groups if g["params"]], **options).step


def products(ours: Ours, shapes: Counter[tuple[int, ...]]) -> Step | None:
    """The matrix products of a rule alone, one matrix after another; None where it has none.

    Polar factors: X Xᵀ, A A and A X in each iteration. Low-rank rules: the gradient into the subspace and the
    update out of it; APOLLO only the first.
    """
    pairs = {shape: (torch.randn(*sorted(shape)), torch.randn(min(shape), min(shape))) for shape in shapes}
    thin = {shape: torch.randn(RANK, min(shape)) for shape in shapes}

    def polar() -> None:
        for shape, number in shapes.items():
            X, A = pairs[shape]
            for _ in range(ITERATIONS[ours.id] * number):
                torch.mm(X, X.T)
                torch.mm(A, A)
                torch.mm(A, X)

    def projected() -> None:
        for shape, number in shapes.items():
            (X, _), P = pairs[shape], thin[shape]
            for _ in range(number):
                R = torch.mm(P, X)
                if ours.id != "apollo":
                    torch.mm(P.T, R)

    if ours.id in ITERATIONS:
        return polar
    return projected if ours.id in ("galore", "fira", "apollo") else None


def bytes_of(ours: Ours, here: Leaves, formula: str) -> float:
    """Bytes by the card: its `state_bytes` or `traffic_bytes`."""
    module = find("optimizer", ours.id).load()
    options = dataclasses.asdict(module.Config(**ours.options))
    known = {k: v for k, v in options.items() if isinstance(v, int | float | str)}
    total = 0.0
    for p, role in here.values():
        rows = p.shape[0] if p.ndim > 1 else 1
        size = {"n": p.numel(), "rows": rows, "cols": p.numel() // rows}
        total += cost(by_role(getattr(module.CARD, formula), role), **size, **known)
    return total


def counted(tree: Any) -> Iterator[Tensor]:
    """The tensors of a state."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from counted(value)


def refreshes() -> dict[str, float]:
    """Seconds, medians of five, to find bases of rank 128 for all hidden matrices: ours, exact, and galore-torch."""
    from fallline.optim.subspace import Subspace, tall
    from fallline.optim.transform import Context

    gradients = [p.grad for p, _ in leaves(build(), "orthogonal").values() if p.grad is not None]
    ways: dict[str, Step] = {}
    for kind in ("iteration", "svd"):
        space = Subspace(RANK, 200, kind, spread=False)  # type: ignore[arg-type]
        states = [space.init(g) for g in gradients]
        contexts = [Context(str(i), g, g, 0, torch.tensor(RATE), 0) for i, g in enumerate(gradients)]

        def find_all(space: Any = space, states: Any = states, contexts: Any = contexts) -> None:
            for g, state, ctx in zip(gradients, states, contexts, strict=True):
                space.basis(tall(g), state, ctx)

        find_all()  # the first starts from nothing
        for ctx in contexts:
            ctx.step = 200
        ways[kind] = find_all
    if find_spec("galore_torch") is not None:
        projector = import_module("galore_torch.galore_projector").GaLoreProjector(rank=RANK)

        def theirs() -> None:
            for g in gradients:
                projector.get_orthogonal_matrix(g, RANK, type="right" if len(g) >= g.shape[1] else "left")

        ways["galore_torch"] = theirs
    timing = compare(ways, pairs=7, warmup=0)
    print(table(timing))
    return {name: statistics.median(times) for name, times in timing["rounds"].items()}


def measure(group: str, pairs: int) -> None:
    """One group: timed, printed, written."""
    ours, peers = GROUPS[group]
    model = build()
    here = leaves(model, group)
    reference = torch.optim.AdamW([p for p, _ in here.values()], lr=RATE, fused=True)
    contestants: dict[str, Step] = {ADAMW: reference.step}
    optimizers = {o.name: create(o.id, here, lr=RATE, **o.options) for o in ours}
    contestants |= {name: optimizer.step for name, optimizer in optimizers.items()}
    shapes = Counter(tuple(p.shape) for p, role in here.values() if role == "matrix")
    for o in ours:
        alone = products(o, shapes)
        if alone is not None:
            contestants[f"{o.name}: products"] = alone
    beside: dict[str, list[str]] = {}
    for peer in peers:
        if find_spec(peer.package.partition(".")[0]) is not None:
            name = f"{peer.package} {peer.name}"
            contestants[name] = peer_step(peer, group)
            beside.setdefault(peer.of, []).append(name)
    timing = compare(contestants, pairs=pairs)
    print(f"\n{group}\n{table(timing)}")
    seconds, found = timing["rounds"], {}
    reference_bytes = 28.0 * sum(p.numel() for p, _ in here.values())
    for o in ours:
        state = sum(t.numel() * t.element_size() for t in counted(optimizers[o.name].state_dict()["state"]))
        by_card = bytes_of(o, here, "state_bytes")
        assert state == by_card, f"{o.name} keeps {state} bytes, its card says {by_card}"
        others = [*beside.get(o.name, ()), *[n for n in (f"{o.name}: products",) if n in contestants]]
        found[o.name] = {
            "options": dict(o.options),
            "state_bytes": state,
            "limit_by_traffic": bytes_of(o, here, "traffic_bytes") / reference_bytes,
            "ratio_to": {
                other: statistics.median(a / b for a, b in zip(seconds[o.name], seconds[other], strict=True))
                for other in others
            },
        }
        ratios = "".join(f", {ratio:.3f} of {other}" for other, ratio in found[o.name]["ratio_to"].items())
        print(
            f"{o.name:<24} {timing['contestants'][o.name]['ratio']:.3f} of AdamW, by traffic "
            f"{found[o.name]['limit_by_traffic']:.3f}{ratios}; state {state / 2**20:.1f} MiB"
        )
    record = {"parameters": sum(p.numel() for p, _ in here.values()), "time": timing, "methods": found}
    if group == "low-rank":
        record["refresh_seconds"] = refreshes()
    if group == "orthogonal":
        record["processor_multiplies_bfloat16"] = (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        )
    files = {path: None for o in ours for path in find("optimizer", o.id).sources()}
    print(save(f"optimizer_step_{group.replace('-', '_')}", record, [*FRAME, *files]).name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", nargs="?", choices=GROUPS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for group in [args.group] if args.group else GROUPS:
        measure(group, args.pairs)


if __name__ == "__main__":
    main()
