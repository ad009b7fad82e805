"""Schedules: how large the updates are, over time.

    schedule = fallline.schedules.create("cosine", optimizer, steps=1000)

What they share is in `fallline.schedules.base`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..catalog import find

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from .base import ScaledLR


def create(id: str, optimizer: Optimizer, *, steps: int, **options: Any) -> ScaledLR:
    """A schedule by name, for any training loop and any torch optimizer.

    Args:
        id: as `fallline methods` lists it.
        optimizer: its groups' ``lr`` are the peak rates.
        steps: updates of the whole run. A run that resumes has the same.
        options: the method's hyper-parameters.

    Returns:
        A torch learning-rate scheduler: `step` it after each `optimizer.step`.

    Raises:
        InputError: unknown method or option, a value out of bounds, or a run too short for it.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD(torch.nn.Linear(3, 2).parameters(), lr=1.0)
        >>> schedule = create("linear", optimizer, steps=4, warmup=0)
        >>> optimizer.step(); schedule.step()
        >>> schedule.get_last_lr()
        [0.75]
    """
    module = find("schedule", id).load()
    return module.build(module.Config.from_mapping(options, f"schedule {id!r}"), optimizer, steps)
