"""Rules of which hidden matrices are the subject: matrices of one shape together, and Adam for everything else."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .chain import Chain, chain
from .moments import Adam
from .muon import batches
from .orthogonalise import Orthogonalise
from .roles import Role
from .transform import Members, Transform


def beside_adam(matrix: Chain, betas: tuple[float, float], eps: float) -> dict[Role, Chain]:
    """`matrix` for hidden matrices and adapters; Adam, ε beside the corrected root, for all other roles."""
    adam = Adam(betas, eps, corrected=True)
    rest = chain(adam, fused=adam.fused)
    return {
        "matrix": matrix,
        "embedding": rest,
        "head": rest,
        "vector": rest,
        "adapter": matrix,
        "objective": rest,
    }


def batched(*transforms: Transform) -> Chain:
    """`chain(*transforms)`, whose fast path orthogonalises matrices of one shape together."""
    rule = chain(*transforms)
    return replace(rule, fused=partial(together, rule))


def together(rule: Chain, members: Members, lr: float | Tensor, decay: float) -> None:
    """The transforms of a rule one after another, then the update, for matrices of one shape at a time."""
    for batch in batches(members):
        U = torch.stack([ctx.grad for ctx, _ in batch])
        for label, transform in rule.items():
            if isinstance(transform, Orthogonalise):
                U = transform.direction(U)
                continue
            for u, (ctx, state) in zip(U, batch, strict=True):
                found = transform.update(u, state[label], ctx)
                if found is not u:
                    u.copy_(found)
        for u, (ctx, _) in zip(U.mul_(lr), batch, strict=True):
            if decay:
                ctx.param.mul_(1 - lr * decay)
            ctx.param.sub_(u)
