"""Which of n elements: a bit for each, eight to a byte, the first the lowest."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(flags: Tensor) -> Tensor:
    """uint8 [⌈n/8⌉] of flags [n], bool."""
    whole = torch.nn.functional.pad(flags.to(torch.uint8), (0, -len(flags) % 8)).view(-1, 8)
    return (whole << places(flags)).sum(1, dtype=torch.uint8)


def draw(n: int, size: int, generator: torch.Generator) -> Tensor:
    """uint8 [⌈n/8⌉], on the generator's device: `size` of n, at random."""
    places = torch.randperm(n, generator=generator, device=generator.device)[:size]
    return pack(torch.zeros(n, dtype=torch.bool, device=generator.device).index_fill_(0, places, True))


def positions(bits: Tensor, size: int) -> Tensor:
    """Where the `size` bits are that are set, increasing, int64 [size]. A device is not asked how many they are."""
    table = (torch.arange(256, device=bits.device).unsqueeze(1) >> places(bits) & 1).to(torch.uint8)
    flags = table.view(torch.int64).squeeze(1).take(bits.long()).view(torch.bool)
    found = flags.nonzero() if bits.device.type == "cpu" else torch.nonzero_static(flags, size=size)
    return found.squeeze(1)


def places(like: Tensor) -> Tensor:
    """0 … 7 of a byte."""
    return torch.arange(8, dtype=torch.uint8, device=like.device)
