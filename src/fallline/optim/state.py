"""What an optimizer keeps for a parameter, and how it follows the parameter to another shape, place or file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..contracts import Change
from ..errors import InputError

State = dict[str, Any]
"""Of one parameter: nested dicts of tensors, numbers and strings."""


def follow(state: State, change: Change) -> State | None:
    """State of a replaced parameter: all of it where nothing but the place changed; else what has the parameter's shape
    is carried over, and single values stay.

    Returns:
        The state, or None when a tensor has yet another shape.
    """
    assert change.old is not None
    assert change.new is not None
    if only_moved(change):
        return dict(placed(state, change.new))
    found: State = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            inner = follow(dict(value), change)
            if inner is None:
                return None
            found[key] = inner
        elif isinstance(value, Tensor) and value.shape == change.old.shape:
            found[key] = carried(value, change.new, change.index)
        elif isinstance(value, Tensor) and value.ndim > 0:
            return None
        else:
            found[key] = value
    return found


def only_moved(change: Change) -> bool:
    """Whether a replaced parameter has the elements it had, in their order, and nothing but its place is new."""
    assert change.old is not None
    assert change.new is not None
    return change.index is None and change.old.shape == change.new.shape


def carried(values: Tensor, new: Tensor, index: Tensor | None) -> Tensor:
    """`values` in the shape of `new`, zero where an element is new.

    Args:
        values: of the old shape.
        new: of the new one.
        index: as in `Change`.

    Raises:
        InputError: other numbers of dimensions, and no index.
    """
    out = torch.zeros_like(new, dtype=values.dtype)
    if index is not None:
        index = index.to(values.device)
        return out.copy_(torch.where(index >= 0, values.flatten()[index.clamp(min=0)], 0))
    if values.ndim != new.ndim:
        raise InputError(f"a parameter changed from {tuple(values.shape)} to {tuple(new.shape)}: give Change.index")
    corner = tuple(slice(min(a, b)) for a, b in zip(values.shape, new.shape, strict=True))
    out[corner] = values[corner]
    return out


def placed(value: Any, p: Tensor) -> Any:
    """A copy of saved state on the device of `p`, in its own dtype; with the strides of `p` where it has its shape."""
    if isinstance(value, Mapping):
        return {k: placed(v, p) for k, v in value.items()}
    if not isinstance(value, Tensor):
        return value
    like = p if value.shape == p.shape and isinstance(value, DTensor) == isinstance(p, DTensor) else value
    return torch.empty_like(like, dtype=value.dtype, device=p.device, requires_grad=False).copy_(value)
