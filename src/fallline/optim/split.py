"""Transforms that keep Adam's moments for a part of a matrix, and give the rest a step without memory.

For u seen as a matrix G [m, n], more than two dimensions as (first, all others):

    R = down(G),   E = G − up(R),   u ← up(Adam(R)) + c · sign(E),   or + c · E

and at the first update and every T updates the part is chosen anew and Adam begins again, from M = V = 0 and t = 1. A
part is ⌊ρ L + ½⌋ of L things, by what is split:

| transform | what | chosen | kept beside moments |
|---|---|---|---|
| `LineSplit` | columns or rows | adjacent ones from a random place on | nothing |
| `EntrySplit` | entries | at random | a bit for each |
| `SubspaceSplit` | directions of the short side | leading singular vectors of G | they |
| `TensorSplit` | whole tensors of a set | at random, or in order | its place in the set |
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from ..contracts import Change
from ..kernels.bits import draw, positions
from ..kernels.split_adam import (
    Remainder,
    adam_slices,
    column_adam_step,
    entry_adam_step,
    rest_step,
    sign_beyond_rounding,
    subspace_adam_step,
)
from ..linalg import row_norms, sum_dtype
from ..noise import key
from .moments import Adam
from .state import State, only_moved
from .subspace import finite, leading, sides, tall
from .transform import Context, Members, Transform

Order = Literal["random", "ascending", "descending"]

MOMENTS = ("exp_avg", "exp_avg_sq")


def share(density: float, length: int) -> int:
    """⌊ρ L + ½⌋."""
    return int(density * length + 0.5)


def forget(state: State) -> None:
    """Moments of zero."""
    for name in MOMENTS:
        state[name].zero_()


def cyclic(first: int, size: int, length: int) -> list[slice]:
    """first … first + size − 1, the first of `length` after the last, as one slice or two."""
    stop = first + size
    return [slice(first, stop)] if stop <= length else [slice(first, length), slice(0, stop - length)]


class Split(Transform):
    """What they share: when the part is chosen, and what the rest takes.

    Args:
        density: ρ.
        every: T.
        adam: whose moments; its `reset_every` must be 0.
        remainder: what the rest takes, its sign or itself.
        ratio: c.
    """

    acts_on = "matrix"

    def __init__(self, density: float, every: int, adam: Adam, remainder: Remainder, ratio: float) -> None:
        self.density, self.every, self.adam = density, every, adam
        self.remainder, self.ratio = remainder, ratio

    def told(self) -> str:
        return f" (density {self.density})"

    def begin(self, G: Tensor, state: State, ctx: Context) -> int:
        """How many updates Adam had since the part was chosen; chooses it if it is time to."""
        if state["since"] < 0 or ctx.step % self.every == 0:
            state["since"] = ctx.step
            self.choose(G, state, ctx)
        return ctx.step - int(state["since"])

    def choose(self, G: Tensor, state: State, ctx: Context) -> None:
        """A new part, and moments of zero."""
        raise NotImplementedError

    def direction(self, R: Tensor, state: State, age: int) -> Tensor:
        """Adam(R), with its bias correction; overwrites R."""
        return self.adam.direction(R, state, age).mul_(self.adam.correction(age))

    def rest(self, E: Tensor) -> Tensor:
        """c · sign(E) or c · E; overwrites E."""
        return (E.sign_() if self.remainder == "sign" else E).mul_(self.ratio)

    def step_options(self, age: int, lr: float | Tensor, decay: float) -> dict[str, Any]:
        """What all fast paths need to know."""
        return {"betas": self.adam.betas, "eps": self.adam.added_corrected(age), "t": age + 1, "lr": lr, "decay": decay}

    def rest_options(self, lr: float | Tensor) -> dict[str, Any]:
        """What fast paths need to know of the rest."""
        return {"remainder": self.remainder, "rate": lr * self.ratio}

    def remap(self, state: State, change: Change) -> State | None:
        """Kept where nothing but the place changed; else anew, with a part of its own at the next update."""
        return super().remap(state, change) if only_moved(change) else None

    def fused(self, members: Members, lr: float | Tensor, decay: float) -> None:
        """This transform as a whole rule."""
        for ctx, state in members:
            own = state[type(self).__name__.lower()]
            age = self.begin(ctx.grad, own, ctx)
            for name in MOMENTS:  # a loaded state has the parameter's strides where it has its shape
                if name in own and own[name].shape == ctx.param.shape:
                    own[name] = own[name].contiguous()
            self.step(ctx.param, ctx.grad, own, age, lr, decay)

    def step(self, W: Tensor, G: Tensor, state: State, age: int, lr: float | Tensor, decay: float) -> None:
        """W ← (1 − η λ) W − η u, in place, for W and G [m, n]."""
        raise NotImplementedError


class LineSplit(Split):
    """Columns or rows: k adjacent ones from a random place on, the first after the last.

    A run of them is read, written and left out without an index.

    Args:
        axis: 0 for rows, 1 for columns.
        density, every, adam, remainder, ratio: as for `Split`.
    """

    whole = True

    def __init__(
        self, axis: Literal[0, 1], density: float, every: int, adam: Adam, remainder: Remainder, ratio: float
    ) -> None:
        super().__init__(density, every, adam, remainder, ratio)
        self.axis = axis

    def told(self) -> str:
        return f" of {('rows', 'columns')[self.axis]}{super().told()}"

    def init(self, param: Tensor) -> State:
        shape = [param.shape[0], param.shape[1:].numel()]
        shape[self.axis] = share(self.density, shape[self.axis])
        moments = self.adam.init(torch.empty(shape, dtype=param.dtype, device=param.device))
        return {"since": -1, "first": 0, **moments}

    def choose(self, G: Tensor, state: State, ctx: Context) -> None:
        state["first"] = key(ctx.seed, ctx.step, f"split/{ctx.name}") % max(1, G.shape[self.axis])
        forget(state)

    def runs(self, state: State, length: int) -> list[slice]:
        """The lines of `length` that Adam has, in the order of its moments."""
        return cyclic(state["first"], state["exp_avg"].shape[self.axis], length)

    def update(self, u: Tensor, state: State, ctx: Context) -> Tensor:
        G = u.flatten(1)
        age = self.begin(G, state, ctx)
        runs = self.runs(state, G.shape[self.axis])
        R = torch.cat([G.narrow(self.axis, run.start, run.stop - run.start) for run in runs], dim=self.axis)
        N = self.direction(R, state, age).split([run.stop - run.start for run in runs], dim=self.axis)
        U = self.rest(G)
        for run, found in zip(runs, N, strict=True):
            U.narrow(self.axis, run.start, run.stop - run.start).copy_(found)
        return U.view_as(u)

    def step(self, W: Tensor, G: Tensor, state: State, age: int, lr: float | Tensor, decay: float) -> None:
        M, V = (state[name] for name in MOMENTS)
        runs = self.runs(state, W.shape[self.axis])
        adam, rest = self.step_options(age, lr, decay), self.rest_options(lr)
        if self.axis == 1:
            column_adam_step(W, G, M, V, runs=runs, **adam, **rest)
            return
        done = 0
        for run in runs:
            here = slice(done, done + run.stop - run.start)
            adam_slices(W[run], G[run], M[here], V[here], **adam)
            done = here.stop
        for run in cyclic((state["first"] + len(M)) % max(1, len(W)), len(W) - len(M), len(W)):
            rest_step(W[run], G[run], **rest, keep=1 - lr * decay if decay else None)


class EntrySplit(Split):
    """Single entries, drawn at random."""

    whole = True

    def init(self, param: Tensor) -> State:
        n = param.numel()
        moments = self.adam.init(torch.empty(share(self.density, n), dtype=param.dtype, device=param.device))
        return {"since": -1, "mask": torch.zeros(-(-n // 8), dtype=torch.uint8, device=param.device), **moments}

    def choose(self, G: Tensor, state: State, ctx: Context) -> None:
        state["mask"].copy_(draw(G.numel(), len(state["exp_avg"]), ctx.rng("split")))
        forget(state)

    def update(self, u: Tensor, state: State, ctx: Context) -> Tensor:
        age = self.begin(u, state, ctx)
        where = positions(state["mask"], len(state["exp_avg"]))
        N = self.direction(u.take(where), state, age)
        return self.rest(u).put_(where, N)

    def step(self, W: Tensor, G: Tensor, state: State, age: int, lr: float | Tensor, decay: float) -> None:
        where = positions(state["mask"], len(state["exp_avg"]))
        moments = (state[name] for name in MOMENTS)
        options = self.step_options(age, lr, decay) | self.rest_options(lr)
        entry_adam_step(W, G, *moments, where=where, **options)


class SubspaceSplit(Split):
    """The leading right singular vectors of G, turned where it is wide, as in `fallline.optim.subspace`.

    E counts as zero where it is within rounding of that, and so do entries of the basis: what has no gradient stays
    where it is.
    """

    whole = True

    def init(self, param: Tensor) -> State:
        a, b = sides(param)
        r = share(self.density, a)
        R = torch.empty(b, r, dtype=param.dtype, device=param.device)
        P = torch.zeros(r, a, dtype=sum_dtype(param), device=param.device)
        return {"since": -1, "basis": P, **self.adam.init(R)}

    def choose(self, G: Tensor, state: State, ctx: Context) -> None:
        P = leading(finite(tall(G)), len(state["basis"]))
        tiny = 8 * torch.finfo(P.dtype).eps
        state["basis"].copy_(torch.where(P.abs() > tiny, P, 0))
        forget(state)

    def update(self, u: Tensor, state: State, ctx: Context) -> Tensor:
        G = u.flatten(1)
        X = tall(G)
        age = self.begin(G, state, ctx)
        P = state["basis"]
        R = X @ P.t()
        E = torch.addmm(X, R, P, alpha=-1)
        if self.remainder == "sign":
            sign_beyond_rounding(E, row_norms(X))
        U = E.mul_(self.ratio).addmm_(self.direction(R, state, age), P)
        return (U if X is G else U.t()).reshape(u.shape)

    def step(self, W: Tensor, G: Tensor, state: State, age: int, lr: float | Tensor, decay: float) -> None:
        moments = (state[name] for name in MOMENTS)
        options = self.step_options(age, lr, decay) | self.rest_options(lr)
        subspace_adam_step(tall(W), tall(G), state["basis"], *moments, **options)


class TensorSplit(Split):
    """Whole tensors: a few have Adam, all others none of its state.

    Which depends on seed, update and the tensor's place among the names of the set, as it was when the tensor had its
    first update; that is part of its state. A parameter that came later takes its place among them; those there were do
    not notice, nor when their state is loaded where it belongs to the set from the start.

    Args:
        names: of the set.
        order: in which their turn comes; ascending and descending by name, numbers in it as numbers.
        density, every, adam, remainder, ratio: as for `Split`.
    """

    def __init__(
        self,
        names: Sequence[str],
        order: Order,
        density: float,
        every: int,
        adam: Adam,
        remainder: Remainder,
        ratio: float,
    ) -> None:
        super().__init__(density, every, adam, remainder, ratio)
        self.names, self.order = tuple(names), order

    def init(self, param: Tensor) -> State:
        return {"since": -1}

    def place(self, name: str) -> State:
        """Where a tensor is among the names of the set and its own."""
        names = self.names if name in self.names else (*self.names, name)
        return {"place": places(names)[name], "of": len(names)}

    def active(self, place: int, of: int, step: int, seed: int) -> bool:
        """Whether it is the turn of the tensor at this place, of so many, in the T updates that this one is of."""
        turn, size = step // self.every, share(self.density, of)
        if self.order == "random":
            return place in drawn(of, turn * self.every, seed)[:size]
        if self.order == "descending":
            place = of - 1 - place
        return (place - turn * size) % of < size

    def choose(self, G: Tensor, state: State, ctx: Context) -> None:
        for name in MOMENTS:
            state.pop(name, None)
        if "place" not in state:
            state.update(self.place(ctx.name))
        if self.active(state["place"], state["of"], ctx.step, ctx.seed):
            state.update(self.adam.init(ctx.param))

    def update(self, u: Tensor, state: State, ctx: Context) -> Tensor:
        age = self.begin(u, state, ctx)
        if "exp_avg" in state:
            return self.direction(u, state, age)
        return self.rest(u)

    def step(self, W: Tensor, G: Tensor, state: State, age: int, lr: float | Tensor, decay: float) -> None:
        if "exp_avg" in state:
            adam_slices(W, G, *(state[name] for name in MOMENTS), **self.step_options(age, lr, decay))
        else:
            rest_step(W, G, **self.rest_options(lr), keep=1 - lr * decay if decay else None)

    def remap(self, state: State, change: Change) -> State | None:
        return Transform.remap(self, state, change)


@lru_cache(maxsize=4)
def drawn(of: int, step: int, seed: int) -> list[int]:
    """So many places, in random order."""
    return sorted(range(of), key=lambda place: key(seed, step, f"split/{place}"))


@lru_cache(maxsize=4)
def places(names: tuple[str, ...]) -> dict[str, int]:
    """Name → place, in order."""
    return {name: i for i, name in enumerate(sorted(names, key=by_numbers))}


def by_numbers(name: str) -> list[Any]:
    """What to sort by, so that ``layers.10`` comes after ``layers.9``."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
