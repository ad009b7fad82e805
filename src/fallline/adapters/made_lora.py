"""LoRAs whose A and B are made of their parameters at each use: joined with frozen ones, weighed by a gate.

ΔW = s B' A',   (A', B') = pair(P)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.lora_linear import lora_linear
from ..per_example import watching
from .base import Adapter, LoraFactors, Weight
from .ranked import RankedLora


class MadeLora(RankedLora):
    """A LoRA with a `pair` of its own; `apply` must be given too, for it is what the per-example engine sees."""

    def pair(self, P: Any) -> tuple[Tensor, Tensor]:
        """A' [r', n] and B' [m, r']."""
        raise NotImplementedError

    def delta(self, P: Any, W: Weight) -> Tensor:
        A, B = self.pair(P)
        wide = torch.promote_types(A.dtype, torch.float32)
        return self.scale * B.to(wide) @ A.to(wide)

    def linear(self, P: Any, x: Tensor, W: Weight, bias: Tensor | None, training: bool) -> Tensor:
        frozen = W()
        trained = frozen.requires_grad or (bias is not None and bias.requires_grad)  # thawed beside the adapter
        if trained or (training and self.config.dropout) or watching() is not None:
            return Adapter.linear(self, P, x, W, bias, training)
        A, B = self.pair(P)
        return lora_linear(x, frozen, bias, A, B, self.scale)

    def factors(self, P: Any) -> LoraFactors:
        A, B = self.pair(P)
        return LoraFactors(A, self.scale * B, len(A))

    def peft_config(self) -> dict[str, Any]:
        return {"lora_dropout": self.config.dropout, "use_rslora": False}
