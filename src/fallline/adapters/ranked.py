"""LoRAs whose rank may differ from layer to layer, and change."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Self

from .lora import Lora


class RankedLora(Lora):
    """A LoRA that can have another rank at the same s."""

    config: Any

    def at_size(self, size: int) -> Self:
        alpha = self.scale * (math.sqrt(size) if self.config.rslora else size)
        return type(self)(replace(self.config, rank=size, alpha=alpha))
