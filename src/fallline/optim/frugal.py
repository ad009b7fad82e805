"""FRUGAL: Adam for a part of every matrix at a time, and the sign of the gradient, which needs no memory, for the rest.

With G [m, n], learning rate η, weight decay λ, and a part of share ρ that is chosen anew at update 1 and then every T:

    matrices     R = down(G),   E = G − up(R)
                 W ← (1 − η λ) W − η up(Adam(R)) − η c sign(E)               with `remainder` sgd, − η c E
    others       W ← (1 − η λ) W − η Adam(G)

where Adam has ε beside the corrected root and, for matrices, begins again from M = V = 0 and t = 1 with every new part.

    split        the part                                                     bytes of state of a float32 matrix
    columns      k = ⌊ρ n + ½⌋ adjacent columns from a random place on        8 m k
    rows         k = ⌊ρ m + ½⌋ adjacent rows from a random place on           8 k n
    entries      k = ⌊ρ m n + ½⌋ entries, drawn at random                     8 k + ⌈m n/8⌉
    svd          r = ⌊ρ a + ½⌋ leading right singular vectors of G [b, a]     4 (2 r b + r a)
    block        ⌊ρ N + ½⌋ of all N matrices, whole                           8 m n or nothing: on average 8 ρ m n

As Adam moves an element by about η in an update, so does the sign: every update is of full rank. Columns, rows and
whole matrices move 12 + 16 ρ bytes per parameter, where AdamW moves 28. `remainder_lr_ratio` 0 leaves the rest where it
is: with block, that is BAdam.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..catalog import Card
from ..options import Options, option
from .chain import Chain, ChainOptimizer, chain, partition
from .moments import Adam
from .roles import ROLES, Params, Role, leaves
from .split import EntrySplit, LineSplit, Split, SubspaceSplit, TensorSplit

CARD = Card(
    id="frugal",
    kind="optimizer",
    summary="Adam for a quarter of every matrix at a time, sign descent for the rest: a quarter of the state.",
    paper="FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training",
    year=2024,
    repository="fzmushko/FRUGAL",
    equation="R = down(G); W ← W − η up(Adam(R)) − η c sign(G − up(R)); another part, and Adam anew, every T updates",
    acts_on="matrix",
    state_bytes={
        "embedding": "8 * n",
        "head": "8 * n",
        "vector": "8 * n",
        "objective": "8 * n",
        "any": "8 * rows * ((density * cols + 0.5) // 1) * (split == 'columns')"
        " + 8 * cols * ((density * rows + 0.5) // 1) * (split == 'rows')"
        " + (8 * ((density * n + 0.5) // 1) + (n + 7) // 8) * (split == 'entries')"
        " + 4 * ((density * min(rows, cols) + 0.5) // 1) * (2 * max(rows, cols) + min(rows, cols)) * (split == 'svd')"
        " + 8 * density * n * (split == 'block')",
    },
    traffic_bytes={
        "embedding": "28 * n",
        "head": "28 * n",
        "vector": "28 * n",
        "objective": "28 * n",
        "any": "12 * n + 16 * rows * ((density * cols + 0.5) // 1) * (split == 'columns')"
        " + 16 * cols * ((density * rows + 0.5) // 1) * (split == 'rows')"
        " + (16 * ((density * n + 0.5) // 1) + 2 * ((n + 7) // 8)) * (split == 'entries')"
        " + 8 * ((density * min(rows, cols) + 0.5) // 1) * (2 * max(rows, cols) + min(rows, cols)) * (split == 'svd')"
        " + 16 * density * n * (split == 'block')",
    },
    workspace_bytes={
        "matrix": "6 * n + 6 * n * (split == 'entries') + 10 * n * (split == 'svd')",
        "adapter": "6 * n + 6 * n * (split == 'entries') + 10 * n * (split == 'svd')",
        "any": "0",
    },
    flops="with split svd: 6 r m n for each matrix, and a singular value decomposition at one of refresh_every updates",
    claim="Llama 60M to 1B on C4: lower perplexity than GaLore and BAdam at the same memory, close to Adam's; GLUE "
    "with RoBERTa also at ρ = 0",
    checked=(
        "the equation in float64 for all splits; at ρ = 1 torch's AdamW made anew every T updates, at ρ = 0 "
        "the sign alone; what Adam does not have moves by exactly ηc; state bytes of all splits. Compared "
        "once, by no test: the released code in float64 over fifty updates and seven refreshes with the same "
        "random choices, equal to 1e-14 for all splits and remainders; effect at 10 M parameters, 64 steps "
        "with a new part every 20, rate tuned alike, three seeds: validation loss 6.480 ± 0.031 where adamw "
        "has 6.775 ± 0.040, difference −0.30 [−0.42, −0.17] (studies/optimizers-early/report.json). One "
        "update of a 58 M Llama on two CPU cores: 1.31 ± 12 % of torch's fused AdamW (python "
        "benchmarks/optimizer_step.py low-rank --pairs 15)"
    ),
    evidence=("studies/optimizers-early/report.json", "benchmarks/results/optimizer_step_low_rank.json"),
    departures="bytes and traffic of split block are an average over matrices. Columns and rows are "
    "adjacent ones from a random place on, where the released code draws each: they need no index and no "
    "gathering, and single ones are what entries are for. A share of L things is ⌊ρL + ½⌋ of them, where the "
    "released code takes ⌊ρL⌋ columns, rows or entries. With svd, what is left of the gradient, and entries "
    "of the basis, count as zero within rounding, where the released code takes rounding's sign and moves by "
    "ηc. Each matrix counts its own updates, where the first one's counter decides for all; a matrix of "
    "another shape begins anew, with t = 1. Blocks are drawn by their place among all names, and have their order; no "
    "order mirror. No learning rate of matrices beside c, no projection on the long side or to random directions, "
    "no moments kept over a refresh, so GaLore is not a setting of it; no weight decay on vectors; adapters "
    "are treated as matrices",
    tags=("memory", "adam", "sign", "sparse", "low-rank", "reset"),
)


SPLIT: frozenset[Role] = frozenset({"matrix", "adapter"})
"""Roles that are split; the others have Adam whole."""


@dataclass(frozen=True)
class Config(Options):
    """FRUGAL's hyper-parameters."""

    lr: float = option(1e-3, "peak learning rate η", gt=0, source="released scripts for pre-training")
    split: Literal["columns", "rows", "entries", "svd", "block"] = option(
        "columns",
        "what a part is made of",
        source="released fine-tuning scripts; those for pre-training have block, in descending order",
    )
    density: float = option(
        0.25, "ρ, share of the matrices that Adam has", ge=0, le=1, source="paper; released scripts"
    )
    refresh_every: int = option(
        200, "T, updates with one part", ge=1, source="paper; released scripts, 500 for fine-tuning"
    )
    block_order: Literal["random", "ascending", "descending"] = option(
        "random",
        "in which the turn of matrices comes; ascending and descending by name",
        source="released code; descending in its scripts",
        used_if=("split is block", lambda c: c.split == "block"),
    )
    remainder: Literal["sign", "sgd"] = option(
        "sign", "what the rest takes: the sign of its gradient, or the gradient", source="paper; released code"
    )
    remainder_lr_ratio: float = option(
        1.0, "c, learning rate of the rest in units of lr", ge=0, source="paper, pre-training; 0.1 for fine-tuning"
    )
    betas: tuple[float, float] = option((0.9, 0.999), "Adam's β₁ and β₂", ge=0, lt=1, source="released scripts")
    eps: float = option(1e-8, "Adam's ε", gt=0, source="released scripts")
    weight_decay: float = option(0.0, "λ, on matrices, embedding and head", ge=0, source="released scripts")


def rules(config: Config, names: Sequence[str]) -> dict[Role, Chain]:
    """The method: a chain for each role.

    Args:
        config: hyper-parameters.
        names: of the matrices, for a split into blocks.
    """
    adam = Adam(config.betas, config.eps, corrected=True)
    common = config.density, config.refresh_every, adam, config.remainder, config.remainder_lr_ratio
    split: Split
    match config.split:
        case "columns" | "rows":
            split = LineSplit(1 if config.split == "columns" else 0, *common)
        case "entries":
            split = EntrySplit(*common)
        case "svd":
            split = SubspaceSplit(*common)
        case "block":
            split = TensorSplit(names, config.block_order, *common)
    matrix, rest = chain(split, fused=split.fused), chain(adam, fused=adam.fused)
    return {role: matrix if role in SPLIT else rest for role in ROLES}


def build(config: Config, params: Params, *, seed: int = 0) -> ChainOptimizer:
    """The optimizer.

    Args:
        config: hyper-parameters.
        params: model, name → (parameter, role), or (name, parameter) pairs.
        seed: of the run, which the parts depend on.

    Raises:
        InputError: parameters without names.
    """
    params = params if isinstance(params, nn.Module | Mapping) else list(params)
    names = [name for name, (_, role) in leaves(params).trained.items() if role in SPLIT]
    return partition(rules(config, names))(params, lr=config.lr, weight_decay=config.weight_decay, seed=seed)
