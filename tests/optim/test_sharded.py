"""Every chain on parameters sharded over two processes: the updates of whole ones, and checkpoints of torch's own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from fallline.contracts import Change
from fallline.optim.base import Named
from fallline.optim.chain import ChainOptimizer

from .parameters import Parameters, gradient, make, parameters, tensors, train
from .rows import Row
from .table import ROWS

CHAINS = [row for row in ROWS if isinstance(make(row.id, parameters(), row.options), ChainOptimizer)]


def sharded(mesh: DeviceMesh) -> Parameters:
    """`parameters()`, matrices cut along one dimension or the other, the rest on every rank."""
    found: Parameters = {}
    for i, (name, (p, role)) in enumerate(parameters().items()):
        placement = Shard(i % 2 if p.ndim == 2 else 0) if p.ndim > 1 else Replicate()
        found[name] = (nn.Parameter(distribute_tensor(p.detach(), mesh, [placement])), role)
    return found


def train_sharded(optimizer: Named, params: Parameters, start: int, stop: int) -> None:
    for step in range(start, stop):
        for name, (p, _) in params.items():
            assert isinstance(p, DTensor)
            p.grad = distribute_tensor(gradient(step, name, tuple(p.shape)), p.device_mesh, p.placements)
        optimizer.step()


def same(params: Parameters, expected: Parameters, row: Row) -> None:
    for name, (p, _) in params.items():
        assert isinstance(p, DTensor)
        torch.testing.assert_close(p.full_tensor(), expected[name][0], rtol=1e-9, atol=1e-9, msg=f"{row}: {name}")


def process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for row in CHAINS:
        whole, parts = parameters(), sharded(mesh)
        here, there = make(row.id, whole, row.options), make(row.id, parts, row.options)
        train(here, whole, 0, 8)
        train_sharded(there, parts, 0, 8)
        same(parts, whole, row)

        path = os.path.join(folder, str(row))
        dcp.save({"optimizer": there.state_dict()}, checkpoint_id=path)
        again = make(row.id, parts, row.options)
        values = {name: p.detach().clone() for name, (p, _) in parts.items()}
        train_sharded(again, parts, 0, 8)  # a place for all that is loaded; what there is may depend on the update
        for name, (p, _) in parts.items():
            p.data.copy_(values[name])
        saved: dict[str, Any] = {"optimizer": again.state_dict()}
        dcp.load(saved, checkpoint_id=path)
        again.load_state_dict(saved["optimizer"])
        kept, loaded = (tensors(o.state_dict()["state"]) for o in (there, again))
        assert [type(t) for t in kept.values()] == [type(t) for t in loaded.values()]
        name = "layers.0.up.weight"  # put in another place, as a part that changes the model does
        old, role = parts[name]
        new = nn.Parameter(old.detach().clone())
        again.remap([Change(name, old, new)])
        parts[name] = new, role
        train(here, whole, 8, 12)
        train_sharded(again, parts, 8, 12)
        same(parts, whole, row)
    dist.destroy_process_group()


@pytest.mark.slow
def test_sharded_updates_and_checkpoints(tmp_path: Path):
    mp.spawn(process, args=(str(tmp_path),), nprocs=2)
