"""How much of an adapter's change is lost by rounding the sum to few bits again, which is why merging so is refused.

    python benchmarks/quantised_merge.py

W, Gaussian, 512 × 512, is rounded to Q(W); ΔW is a random change of rank 8 with so much of W's norm. What is wrong of
the change after merging is ‖Q(Q(W) + ΔW) − (Q(W) + ΔW)‖ / ‖ΔW‖: at 1 it is as good as no change.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor, nn

from fallline.quantised import Kind, QuantisedLinear, quantise
from harness import save

SIDE, RANK = 512, 8
SIZES = (0.002, 0.01, 0.05, 0.2)


class Layer(nn.Module):
    """What `quantise` takes: a model with one linear layer beside its head."""

    def __init__(self, W: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(*W.shape, bias=False)
        self.layer.weight.data.copy_(W)

    def get_output_embeddings(self) -> None:
        return None


def rounded(W: Tensor, kind: Kind) -> Tensor:
    """Q(W)."""
    model: Any = Layer(W)
    quantise(model, kind)
    assert isinstance(model.layer, QuantisedLinear)
    return model.layer.matrix()


def main() -> None:
    draw = torch.Generator().manual_seed(0)
    W = torch.randn(SIDE, SIDE, generator=draw)
    change = torch.randn(SIDE, RANK, generator=draw) @ torch.randn(RANK, SIDE, generator=draw)
    found: dict[str, dict[str, float]] = {}
    for kind in get_args(Kind):
        base = rounded(W, kind)
        found[kind] = {}
        for size in SIZES:
            delta = change * (size * W.norm() / change.norm())
            found[kind][f"{size:g}"] = float((rounded(base + delta, kind) - (base + delta)).norm() / delta.norm())
        print(kind, {size: round(value, 2) for size, value in found[kind].items()})
    print(save("quantised_merge", {"wrong": found}, ["src/fallline/quantised.py"]))


if __name__ == "__main__":
    main()
