"""The papers' claims about memory, beside what the cards' formulas give on the papers' own models.

    python benchmarks/memory_claims.py

Arithmetic, no measurement: shapes come from the models on torch's meta device, bytes of state from the cards, scaled
from float32 to the two bytes per element (bfloat16) that the papers count in. `total` is weights and optimizer state;
gradients and activations are in none of these claims.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from fallline.catalog import by_role, cost, find
from fallline.drivers.skeleton import skeleton
from fallline.optim.roles import Role, roles
from harness import save

HALF = 2 / 4
"""bfloat16 in bytes of float32, which the cards count in."""

Shape = tuple[Role, int, int]
"""Role, rows and columns of a parameter; a vector has one row."""


class Claim(NamedTuple):
    """What a paper says, and what comes out.

    Attributes:
        method, model, rank: of what; no rank where the rule has none.
        counted, claimed: in words.
        computed: per cent.
    """

    method: str
    model: str
    rank: int | None
    counted: str
    claimed: str
    computed: float


@cache
def shapes(model: str) -> tuple[Shape, ...]:
    """Of every parameter of a preset with 32 000 words."""
    bones = skeleton(model)
    found = roles(bones)
    return tuple(
        (found[name], p.shape[0] if p.ndim > 1 else 1, p.numel() // (p.shape[0] if p.ndim > 1 else 1))
        for name, p in bones.named_parameters()
    )


def weights(model: str) -> float:
    """Bytes in bfloat16."""
    return sum(2.0 * m * n for _, m, n in shapes(model))


def state(model: str, method: str, **options: Any) -> float:
    """Bytes of optimizer state, its elements in bfloat16."""
    module = find("optimizer", method).load()
    config = dataclasses.asdict(module.Config(**options))
    numbers = {k: v for k, v in config.items() if isinstance(v, int | float)}
    total = 0.0
    for role, m, n in shapes(model):
        total += HALF * cost(by_role(module.CARD.state_bytes, role), n=m * n, rows=m, cols=n, **numbers)
    return total


def eight_bit(model: str, rank: int, per_row: int = 0) -> float:
    """Bytes of low-rank state with moments in 8 bits and bases in bfloat16; other parameters' moments in 8 bits too.

    Args:
        per_row: more bfloat16 numbers for each output unit of a matrix.
    """
    total = 0.0
    for role, m, n in shapes(model):
        a, b = min(m, n), max(m, n)
        r = min(rank, a)
        moment = 1 + 4 / 256
        total += 2 * r * b * moment + 2 * r * a + 2 * per_row * m if role == "matrix" else 2 * m * n * moment
    return total


def of_adam(model: str, method: str, **options: Any) -> float:
    """Weights and state as a share of Adam's, in per cent."""
    return 100 * (weights(model) + state(model, method, **options)) / (weights(model) + state(model, "adamw"))


def below_adam(model: str, found: float) -> float:
    """By how much less than Adam's state this is, in per cent."""
    return 100 * (1 - found / state(model, "adamw"))


def claims() -> Iterator[Claim]:
    """Claim by claim."""
    total = "weights and state, of Adam's"
    for model, more in (
        ("60m", ""),
        ("130m", ""),
        ("350m", "; 0.80 of 2.21 GB"),
        ("1b", "; 2.81 of 8.04 GB"),
        ("7b", ""),
    ):
        yield Claim("scale", model, None, total, f"35 to 45 %{more}", of_adam(model, "scale"))
    for model in ("60m", "1b", "7b"):
        yield Claim("apollo-mini", model, 1, total, "like SGD's (33 %)", of_adam(model, "apollo-mini"))
    for model, rank in (("60m", 128), ("130m", 256), ("350m", 256), ("1b", 512), ("7b", 1024)):
        less = below_adam(model, state(model, "galore", rank=rank))
        yield Claim("galore", model, rank, "state, below Adam's", "up to 65.5 %", less)
    for rank in (1024, 512, 128):
        counted = "state with moments in 8 bits, below Adam's in bfloat16"
        yield Claim("galore", "7b", rank, counted, "up to 82.5 %", below_adam("7b", eight_bit("7b", rank)))
        normed = below_adam("7b", eight_bit("7b", rank, per_row=3))
        yield Claim("gradnormlorp", "7b", rank, counted, "up to 89.5 %", normed)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None).parse_args()
    found = list(claims())
    print(f"{'method':<13} {'model':<6} {'rank':>5}  {'computed':>9}  {'claimed':<30} counted")
    for claim in found:
        start = f"{claim.method:<13} {claim.model:<6} {claim.rank or '':>5}"
        print(f"{start}  {claim.computed:7.1f} %  {claim.claimed:<30} {claim.counted}")
    files = [f"src/fallline/optim/{name}.py" for name in ("adamw", "scale", "galore", "apollo_mini", "roles")]
    files += ["src/fallline/models/llama.py", "src/fallline/drivers/skeleton.py", "benchmarks/memory_claims.py"]
    print(save("memory_claims", {"claims": [claim._asdict() for claim in found]}, files).name)


if __name__ == "__main__":
    main()
