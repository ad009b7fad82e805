"""What every optimizer must do when parameters are frozen, thawed, added or grow; bought by the rows of table.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fallline.contracts import Change
from fallline.optim.base import Named

from .parameters import equal, make, parameters, tensors, through_disk, train, values
from .rows import Row
from .table import ROWS

each = pytest.mark.parametrize("row", ROWS, ids=str)


@each
def test_frozen_and_kept_is_a_pause(row: Row):
    """Frozen with `keep`, saved, loaded and thawed, a parameter goes on as if it had only had no gradients."""
    name = "lm_head.weight"
    paused, params = parameters(torch.float32), parameters(torch.float32)
    optimizer = make(row.id, paused, row.options)
    train(optimizer, paused, 0, 3)
    train(optimizer, paused, 3, 5, without=(name,))
    train(optimizer, paused, 5, 8)

    frozen = make(row.id, params, row.options)
    train(frozen, params, 0, 3)
    p = params[name][0]
    frozen.remap([Change(name, p, None, policy="keep")])
    assert p.grad is None
    train(frozen, params, 3, 4, without=(name,))
    saved = through_disk(frozen.state_dict())
    again = make(row.id, params, row.options)
    again.remap([Change(name, p, None)])
    again.load_state_dict(saved)
    train(again, params, 4, 5, without=(name,))
    again.remap([Change(name, None, p)])
    train(again, params, 5, 8)
    assert equal(values(params), values(paused))


@each
def test_frozen_and_dropped_begins_anew(row: Row):
    name = "lm_head.weight"
    params = parameters(torch.float32)
    optimizer = make(row.id, params, row.options)
    train(optimizer, params, 0, 3)
    p = params[name][0]
    optimizer.remap([Change(name, p, None)])
    rest = {k: v for k, v in params.items() if k != name}
    at_freeze = p.detach().clone()
    train(optimizer, rest, 3, 5)
    assert torch.equal(p, at_freeze)
    assert name not in optimizer.state_dict()["state"]
    optimizer.remap([Change(name, None, p)])
    fresh = {name: (nn.Parameter(p.detach().clone()), params[name][1])}
    train(make(row.id, fresh, row.options), fresh, 5, 8)
    train(optimizer, params, 5, 8)
    assert torch.equal(p, fresh[name][0])


@each
def test_growth_keeps_the_state_of_old_elements(row: Row):
    """Two more rows at the end, then the rows reversed by an index: what continues has its state, the rest zero."""
    params = parameters(torch.float32)
    optimizer = make(row.id, params, row.options)
    train(optimizer, params, 0, 3)
    for name in ("lm_head.weight", "layers.0.up.weight", "norm.weight"):
        old, role = params[name]
        shape = (old.shape[0] + 2, *old.shape[1:])
        new = nn.Parameter(torch.zeros(shape))
        before = moments(optimizer, name, old.shape)
        optimizer.remap([Change(name, old, new)])
        after = moments(optimizer, name, new.shape)
        assert after.keys() == before.keys()
        for key in before:
            assert torch.equal(after[key][: old.shape[0]], before[key])
            assert not after[key][old.shape[0] :].any()
        index = torch.arange(new.numel()).view(shape).flip(0)
        index[0] = -1
        turned = nn.Parameter(torch.zeros(shape))
        optimizer.remap([Change(name, new, turned, index=index)])
        for key, value in moments(optimizer, name, turned.shape).items():
            assert torch.equal(value[1:], after[key].flip(0)[1:])
            assert not value[0].any()
        params[name] = (turned, role)
    train(optimizer, params, 3, 5)
    assert [group["params"] for group in optimizer.state_dict()["groups"]]
    assert all(p.isfinite().all() for p, _ in params.values())


def moments(optimizer: Named, name: str, shape: torch.Size) -> dict[str, Tensor]:
    """The state tensors of a parameter that have its shape."""
    state = tensors(optimizer.state_dict()["state"].get(name, {}))
    return {key: value.clone() for key, value in state.items() if value.shape == shape}


@each
def test_a_new_parameter_joins_the_group_of_its_role(row: Row):
    params = parameters(torch.float32)
    optimizer = make(row.id, params, row.options)
    p = nn.Parameter(torch.ones(2, 2))
    optimizer.remap([Change("layers.9.new.weight", None, p)])
    groups = {group["role"]: group for group in optimizer.state_dict()["groups"]}
    assert "layers.9.new.weight" in groups["matrix"]["params"]
    p.grad = torch.ones(2, 2)
    optimizer.step()
    assert not torch.equal(p, torch.ones(2, 2))
