"""Transforms that remember gradients in a subspace only.

X [b, a], the basis P [r, a] and R = X Pᵀ [b, r] are those of `fallline.optim.subspace`; N is Adam's direction for R,
M/(√V + ε), and c its bias correction √(1 − β₂ᵗ)/(1 − β₁ᵗ). The moments are kept when P is found anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..contracts import Change
from ..kernels.low_rank import ROUNDING, SMALL, adam_direction, add_product, residual_step, scaled_step
from ..linalg import norm, row_norms
from .chain import Chain, chain
from .clipping import GrowthLimit
from .moments import Adam
from .roles import ROLES, Role
from .state import State, only_moved
from .subspace import Subspace, sides, tall
from .transform import Context, Members, Transform


class Visit(NamedTuple):
    """State of all transforms and this one's, W and X [b, a], P [r, a], R [b, r], D = −η c N [b, r], and c."""

    state: State
    own: State
    W: Tensor
    X: Tensor
    P: Tensor
    R: Tensor
    D: Tensor
    correction: float


class InSubspace(Transform):
    """What they share: a basis, and Adam's moments of what the gradient is in it.

    Args:
        subspace: finds the basis.
        adam: whose moments; its `reset_every` must be 0.
    """

    acts_on = "matrix"
    whole = True

    def __init__(self, subspace: Subspace, adam: Adam) -> None:
        self.subspace, self.adam = subspace, adam

    def init(self, param: Tensor) -> State:
        a, b = sides(param)
        R = torch.empty(b, min(self.subspace.rank, a), dtype=param.dtype, device=param.device)
        return self.subspace.init(param) | self.adam.init(R)

    def parts(self, X: Tensor, state: State, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """P [r, a], R [b, r] and N [b, r]; updates basis and moments."""
        P = self.subspace.basis(X, state, ctx)
        R = X @ P.t()
        return P, R, self.adam.direction(R.clone(), state, ctx.step)

    def visits(self, members: Members, lr: float | Tensor) -> Iterator[Visit]:
        """What a fast path needs of each parameter; updates basis and moments.

        Args:
            members: parameters with their states by transform.
            lr: η in D.
        """
        for ctx, state in members:
            own = state[type(self).__name__.lower()]
            X = tall(ctx.grad)
            P = self.subspace.basis(X, own, ctx)
            R = X @ P.t()
            for name in ("exp_avg", "exp_avg_sq"):  # a loaded state has the parameter's strides where it has its shape
                own[name] = own[name].contiguous()
            t, eps = self.adam.age(ctx.step), self.adam.added_corrected(ctx.step)
            D = adam_direction(R, own["exp_avg"], own["exp_avg_sq"], betas=self.adam.betas, eps=eps, t=t, lr=lr)
            yield Visit(state, own, tall(ctx.param), X, P, R, D, self.adam.correction(ctx.step))

    def direction(self, X: Tensor, state: State, ctx: Context) -> Tensor:
        """The next u, seen as X is, [b, a]."""
        raise NotImplementedError

    def update(self, u: Tensor, state: State, ctx: Context) -> Tensor:
        G = u.flatten(1)
        X = tall(G)
        U = self.direction(X, state, ctx)
        return (U if X is G else U.t()).reshape(u.shape)

    def remap(self, state: State, change: Change) -> State | None:
        """Kept where nothing but the place changed; else anew, as a basis is of all elements together."""
        return super().remap(state, change) if only_moved(change) else None


class LowRankAdam(InSubspace):
    """Adam in the subspace: u ← α c N P.

    Args:
        subspace, adam: as above.
        alpha: α.
    """

    def __init__(self, subspace: Subspace, adam: Adam, alpha: float) -> None:
        super().__init__(subspace, adam)
        self.alpha = alpha

    def direction(self, X: Tensor, state: State, ctx: Context) -> Tensor:
        P, _, N = self.parts(X, state, ctx)
        return N.mul_(self.alpha * self.adam.correction(ctx.step)) @ P

    def fused(self, members: Members, lr: float | Tensor, decay: float) -> None:
        """This transform as a whole rule."""
        for v in self.visits(members, lr):
            add_product(v.W, v.D, v.P, lr, decay, self.alpha)


class LowRankAdamWithRest(InSubspace):
    """Adam in the subspace, and beside it the rest of the gradient by as much as Adam scales its row:

        S_i = φ_i (X − κ R P)_i,   φ_i = ‖N_i‖/(‖R_i‖ + 1e-8);   S limited in growth;   u ← c (α N P + S)

    Less than 1e-7 ‖φ∘X‖ is rounding: the limit takes ‖S‖ for that at least.

    Args:
        subspace, adam: as above.
        alpha, kappa: α and κ.
        limit: of S.
    """

    def __init__(self, subspace: Subspace, adam: Adam, alpha: float, kappa: float, limit: GrowthLimit) -> None:
        super().__init__(subspace, adam)
        self.alpha, self.kappa, self.limit = alpha, kappa, limit

    def init(self, param: Tensor) -> State:
        return super().init(param) | {"limit": self.limit.init(param)}

    def direction(self, X: Tensor, state: State, ctx: Context) -> Tensor:
        P, R, N = self.parts(X, state, ctx)
        phi = scaling(N, R, "row")
        S = phi * (X - self.kappa * (R @ P))
        size = torch.maximum(norm(row_norms(S)), ROUNDING * norm(phi * row_norms(X)))
        S.mul_(self.limit.factor(state["limit"], size))
        return S.add_(N @ P, alpha=self.alpha).mul_(self.adam.correction(ctx.step))

    def fused(self, members: Members, lr: float | Tensor, decay: float) -> None:
        """This transform as a whole rule."""
        for v in self.visits(members, 1.0):
            residual_step(
                v.W,
                v.X,
                v.R,
                v.P,
                v.D,
                alpha=self.alpha,
                kappa=self.kappa,
                correction=v.correction,
                limit=partial(self.limit.factor, v.own["limit"]),
                lr=lr,
                decay=decay,
            )


class AdamScaling(InSubspace):
    """The gradient by as much as Adam would scale it in the subspace: u_i ← φ_i X_i, φ as `scaling` has it.

    Args:
        subspace, adam: as above.
        per: one φ for each row of X, or one for all.
    """

    def __init__(self, subspace: Subspace, adam: Adam, per: Literal["row", "matrix"]) -> None:
        super().__init__(subspace, adam)
        self.per = per

    def direction(self, X: Tensor, state: State, ctx: Context) -> Tensor:
        _, R, N = self.parts(X, state, ctx)
        return scaling(N, R, self.per) * X


class BiasCorrection(Transform):
    """u ← f c u, Adam's correction for one that came without.

    Args:
        adam: whose c.
        factor: f.
    """

    def __init__(self, adam: Adam, factor: float) -> None:
        self.adam, self.factor = adam, factor

    def update(self, u: Tensor, state: State, ctx: Context) -> Tensor:
        return u.mul_(self.factor * self.adam.correction(ctx.step))


def scaled(scaling: AdamScaling, limit: GrowthLimit, factor: float) -> Chain:
    """The gradient as Adam in a subspace would scale it, limited in growth and multiplied: u ← f c limit(φ∘X)."""

    def fused(members: Members, lr: float | Tensor, decay: float) -> None:
        for v in scaling.visits(members, 1.0):
            scaled_step(
                v.W,
                v.X,
                v.R,
                v.D,
                per=scaling.per,
                factor=factor,
                correction=v.correction,
                limit=partial(limit.factor, v.state["growthlimit"]),
                lr=lr,
                decay=decay,
            )

    return chain(scaling, limit, BiasCorrection(scaling.adam, factor), fused=fused)


def low_rank_rules(matrix: Chain, adam: Adam) -> dict[Role, Chain]:
    """`matrix` for hidden matrices and adapters, Adam for the rest."""
    rest = chain(adam, fused=adam.fused)
    return {role: matrix if role in ("matrix", "adapter") else rest for role in ROLES}


def scaling(N: Tensor, R: Tensor, per: Literal["row", "matrix"]) -> Tensor:
    """φ = ‖N‖/(‖R‖ + 1e-8), of each row [b, 1] or of the whole []."""
    size = {"row": lambda Y: torch.linalg.vector_norm(Y, dim=1, keepdim=True), "matrix": torch.linalg.vector_norm}[per]
    return size(N) / (size(R) + SMALL)
