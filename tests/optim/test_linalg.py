"""Norms of plain and of sharded tensors; a chain on sharded parameters does what it does on whole ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

from fallline.linalg import column_norms, norm, norms, row_norms
from fallline.optim import create


def test_plain():
    x = torch.arange(12.0).view(3, 2, 2)
    assert norm(x) == x.flatten().norm()
    torch.testing.assert_close(row_norms(x), x.flatten(1).norm(dim=1, keepdim=True))
    torch.testing.assert_close(column_norms(x.flatten(1)), x.flatten(1).norm(dim=0, keepdim=True))


def test_half_precision_is_summed_in_float32():
    x = torch.full((1, 70_000), 2.0, dtype=torch.float16)
    for found in (norm(x), row_norms(x).squeeze()):
        assert found.dtype == torch.float32
        assert found == pytest.approx(2 * 70_000**0.5, rel=1e-6)


def sharded(rank: int, meeting: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    noise = torch.Generator().manual_seed(0)
    weight, grads = torch.randn(6, 8, generator=noise), torch.randn(3, 6, 8, generator=noise)
    for placement in (Shard(0), Shard(1), Replicate()):
        x = distribute_tensor(weight.clone(), mesh, [placement])
        torch.testing.assert_close(norm(x), weight.norm())
        torch.testing.assert_close(row_norms(x).full_tensor(), weight.norm(dim=1, keepdim=True))
        torch.testing.assert_close(column_norms(x).full_tensor(), weight.norm(dim=0, keepdim=True))
        for role in ("matrix", "embedding", "head"):
            p, q = nn.Parameter(weight.clone()), nn.Parameter(x.clone())
            whole = create("scale", {"w": (p, role)}, lr=0.1, weight_decay=0.1)
            parts = create("scale", {"w": (q, role)}, lr=0.1, weight_decay=0.1)
            for g in grads:
                p.grad, q.grad = g, distribute_tensor(g.clone(), mesh, [placement])
                whole.step()
                parts.step()
            torch.testing.assert_close(q.full_tensor(), p)
    dist.destroy_process_group()


@pytest.mark.slow
def test_sharded(tmp_path: Path):
    mp.spawn(sharded, args=(str(tmp_path / "meeting"),), nprocs=2)


def test_norms_of_large_tensors_keep_their_digits():
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(3000, 2000, generator=g), torch.randn(7, generator=g), torch.zeros(5, 5)]
    true = torch.stack([t.double().norm() for t in tensors])
    torch.testing.assert_close(norms(tensors, torch.float32).double(), true, rtol=1e-6, atol=0)
