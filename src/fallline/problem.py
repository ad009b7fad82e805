"""The problem that a step's estimator and closures are given: this batch's loss as a function of the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from . import linalg
from .contracts import STEP_GIVES, Batch, Loss, Signals
from .errors import InputError, NonFiniteError, nearest
from .noise import seed_forward
from .ranks import all_ints, all_rows, all_scalars, all_sum, rank, world
from .sequences import overheard
from .tokens import twice_differentiable

if TYPE_CHECKING:
    from .step import Run

_AUX: ContextVar[tuple[dict[str, Tensor], bool] | None] = ContextVar("aux", default=None)


def aux(name: str, value: Tensor) -> None:
    """Add a term to the loss from inside a block or adapter: value [B], weighted by the run's coefficient for `name`.

    It is divided by the number of examples; a value [] is that of every example alike. Does nothing outside a step's
    forward, hence also while activation checkpointing runs a block again.

    Raises:
        InputError: the block runs without gradients while the step asks for them, so the term would not be trained.
    """
    found = _AUX.get()
    if found is not None:
        table, grad = found
        if grad and not torch.is_grad_enabled():
            raise InputError(f"the term {name!r} is added without gradients; checkpoint with use_reentrant=False")
        table[name] = table[name] + value if name in table else value


@dataclass
class Problem:
    """This step's loss as a function of the parameters: same batch, same dropout, however often it is asked.

    It is a torch closure: calling it clears `.grad`, runs the estimator and returns the loss of the whole step. A
    closure stops the run where the loss is not finite; `value` does not, and is what judges a trial step.

    Attributes:
        run: the run.
        micro: this rank's micro-batches.
        total: term → [], the denominator over all micro-batches and ranks, known before the first forward; under the
            empty name that of examples.
        params: the trained parameters by name, in forward order.
        sizes: the number of examples on each rank.
        want: the signals somebody reads.
        signals: what the first evaluation learned.
    """

    run: Run
    micro: Sequence[Batch]
    total: dict[str, Tensor]
    params: dict[str, nn.Parameter]
    sizes: Sequence[int]
    want: frozenset[str] = frozenset()
    signals: Signals = field(default_factory=dict)
    _asked: int = 0
    _first: dict[int, Loss] = field(default_factory=dict)  # what each micro-batch's first forward answered

    def zero(self) -> Tensor:
        """A loss of nothing, [], with the dtype and device of the loss: where sums over micro-batches begin."""
        return torch.zeros_like(self.total[""])

    def table(self, i: int) -> dict[str, Tensor]:
        """Micro-batch i's terms × examples, {term: [b]}, normalised: summed over all of it and all ranks, the loss."""
        run, batch = self.run, self.micro[i]
        seed = getattr(run.estimator, "secret", run.seed)  # dropout of a private run is private too
        seed_forward(seed, run.step, f"model/{rank()}/{i}", run.device)  # the same when asked again
        weight = batch["weight"]
        share = {term: weight / n for term, n in self.total.items()}
        extra: dict[str, Tensor] = {}
        token = _AUX.set((extra, torch.is_grad_enabled()))
        try:
            with run.clock("forward"):
                loss = run.objective(run.model, batch | {f"share/{term}": s for term, s in share.items()})
        finally:
            _AUX.reset(token)
        value = dict(loss.value)
        for name, v in extra.items():
            if name not in run.coefficients:
                raise InputError(f"a block adds the term {name!r}; {nearest(name, run.coefficients)}")
            value[f"aux/{name}"] = run.coefficients[name] * (v if v.ndim else v.expand_as(weight))
            share[f"aux/{name}"] = share[""]
        for term, v in value.items():
            if term not in share or v.shape != weight.shape:  # a scalar would be broadcast, and counted B times
                raise ValueError(f"term {term!r}: shape {list(v.shape)}, must be counted and {list(weight.shape)}")
        if i not in self._first:
            self._first[i] = Loss(_detached(value), _detached(loss.metrics))
        return {term: v * share[term] for term, v in value.items()}

    def answers(self, i: int) -> tuple[dict[str, Tensor], Tensor]:
        """Micro-batch i's table, and the log-probabilities of each example's sequences [b, K] of which it is made.

        Raises:
            InputError: the objective asked for none, or more than once.
        """
        with overheard() as told:
            table = self.table(i)
        if len(told) != 1:
            raise InputError(f"the objective asks {len(told)} times for the log-probabilities of answers, must be once")
        return table, told[0]

    def rows(self, i: int) -> Tensor:
        """Micro-batch i's part of the loss by example, [b]."""
        return torch.stack(list(self.table(i).values())).sum(0)

    def loss(self, i: int) -> Tensor:
        """Micro-batch i's part of the loss, []."""
        return torch.stack([value.sum() for value in self.table(i).values()]).sum()

    @torch.no_grad()
    def value(self) -> Tensor:
        """The loss without gradients, [], the same on all ranks: for zeroth order and line searches."""
        return all_sum(sum((self.loss(i) for i in range(len(self.micro))), self.zero()))

    @torch.enable_grad()
    def product(self, v: Mapping[str, Tensor], kind: Literal["hessian", "fisher"]) -> dict[str, Tensor]:
        """A curvature product on the trainable parameters, {name: like the parameter}, summed over ranks.

        Args:
            v: direction, by parameter name.
            kind: ``hessian``, H v; or ``fisher``, Σ_b g_b ⟨g_b, v⟩ with g_b the gradient of example b's part of the
                loss (weights and normalisation included).
        """
        if kind not in ("hessian", "fisher"):
            raise InputError(f"unknown curvature product {kind!r}; {nearest(kind, ['hessian', 'fisher'])}")
        names, ps = zip(*self.params.items(), strict=True)
        direction = [v[name] for name in names]
        total = [torch.zeros_like(p, requires_grad=False) for p in ps]
        for i in range(len(self.micro)):
            with twice_differentiable():
                rows = self.rows(i)
                u = torch.ones_like(rows, requires_grad=True)
                g = torch.autograd.grad(rows, ps, u, create_graph=True, materialize_grads=True)
                along = torch.stack([(a * b).sum() for a, b in zip(g, direction, strict=True)]).sum()
                if kind == "hessian":
                    found = torch.autograd.grad(along, ps, materialize_grads=True)
                else:
                    (slope,) = torch.autograd.grad(along, u, retain_graph=True)  # ⟨g_b, v⟩ for each example
                    found = torch.autograd.grad(rows, ps, slope, materialize_grads=True)
            for t, f in zip(total, found, strict=True):
                t += f
        return {name: all_sum(t) for name, t in zip(names, total, strict=True)}

    def reduce(self) -> None:
        """Sum `.grad` over ranks; the estimator calls it once, when all micro-batches are through.

        A parameter without a gradient on any rank keeps none, so that optimizers skip it as they would on one rank.
        """
        if world() == 1:
            return
        ps = list(self.params.values())
        used = all_sum(torch.tensor([p.grad is not None for p in ps], dtype=torch.long, device=self.run.device))
        for p, n in zip(ps, used.tolist(), strict=True):
            if n:
                p.grad = all_sum(torch.zeros_like(p) if p.grad is None else p.grad.contiguous())

    def __call__(self) -> Tensor:
        run = self.run
        run.optimizer.zero_grad()
        with torch.enable_grad():
            found = run.estimator(self)
        self._asked += 1
        with torch.no_grad():
            by_name = {name: p.grad for name, p in self.params.items() if p.grad is not None}
            grads, zero = list(by_name.values()), self.zero()
            norms = linalg.norms(grads, zero.dtype) if grads else zero.new_zeros(0)
            norm = norms.norm()
            if not bool(torch.isfinite(found["loss"] + norm)):
                raise NonFiniteError(self._diagnosis(found["loss"], norm))
            if run.clip is not None and grads:
                torch._foreach_mul_(grads, (run.clip / (norm + 1e-6)).clamp(max=1))
            if self._asked == 1:  # a line search asks again; the step reports the first answer
                self._report(found)
                self.signals["grad_norm"] = norm
                if "layer_grad_norm" in self.want:
                    layer = dict(zip(by_name, norms.unbind(), strict=True))
                    self.signals["layer_grad_norm"] = torch.stack([layer.get(name, zero) for name in self.params])
        return found["loss"]

    def _report(self, found: Signals) -> None:
        """Put together the signals of the first evaluation."""
        first = [self._first[i] for i in sorted(self._first)]
        metrics: Signals = {}
        for loss in first:
            for name, m in loss.metrics.items():
                metrics[name] = metrics[name] + m if name in metrics else m
        taken = metrics.keys() & (STEP_GIVES | self.run.estimator.gives | found.keys())
        if taken:
            raise ValueError(f"the objective's metric {min(taken)!r} has the name of a signal; rename it")
        self.signals |= all_scalars(metrics, self.zero())
        if "example_loss" in self.want:
            self.signals["example_loss"] = all_rows(self._rows(), self.sizes)
        if "term_loss" in self.want:
            sums = {term: self.zero() for term in self.total if term}
            for batch, loss in zip(self.micro, first, strict=True):
                for term in sums:
                    sums[term] = sums[term] + (loss.value[term] * batch["weight"] / self.total[term]).sum()
            self.signals["term_loss"] = all_sum(torch.stack(list(sums.values())))
        for name in sorted(found):
            self.signals[name] = all_rows(found[name], self.sizes) if name.startswith("example_") else found[name]

    def _rows(self) -> Tensor:
        """The signal `example_loss` on this rank, [b]."""
        one = self.total[""]
        rows = [self.zero().new_zeros(0)]
        for i in sorted(self._first):
            rows.append(sum((v * (one / self.total.get(t, one)) for t, v in self._first[i].value.items()), self.zero()))
        return torch.cat(rows)

    def _diagnosis(self, loss: Tensor, norm: Tensor) -> str:
        """What to tell the user; all ranks say the same."""
        empty = torch.zeros(0, dtype=torch.long, device=self.run.device)
        ids = all_rows(torch.cat([empty, *(batch["example_id"] for batch in self.micro)]), self.sizes)
        sound = all_rows(self._rows().isfinite().to(torch.uint8), None).bool()
        guilty = ids if len(sound) != len(ids) or bool(sound.all()) else ids[~sound]
        shown = ", ".join(str(i) for i in guilty[:8].tolist()) + (" …" if len(guilty) > 8 else "")
        bad = [name for name, p in self.params.items() if p.grad is not None and not bool(p.grad.isfinite().all())]
        first, layer = self._first_bad() if bad else None, ""
        if bad:
            layer = f"; first non-finite gradient in backward order: {first}" if first else f"; non-finite: {bad[-1]}"
        where = "as they were before it" if self._asked == 1 else f"at its trial point {self._asked}"
        return (
            f"step {self.run.step}: loss is {loss.item():g} and gradient norm {norm.item():g}, stopped before the "
            f"update, the weights are {where}; example ids {shown}{layer}"
        )

    def _first_bad(self) -> str | None:
        """Run backward again to see which parameter's gradient is the first that is not finite, on the first rank that
        has one. None: the loss's own gradient is finite, the estimator made the bad one."""
        seen: list[int] = []

        def note(j: int, p: Tensor) -> None:
            if not bool(p.grad.isfinite().all()):  # type: ignore[union-attr]
                seen.append(j)

        hooks = [p.register_post_accumulate_grad_hook(partial(note, j)) for j, p in enumerate(self.params.values())]
        with torch.enable_grad():
            for i in range(len(self.micro)):
                self.run.optimizer.zero_grad()
                loss = self.loss(i)
                if not seen and loss.requires_grad:
                    loss.backward()
        for hook in hooks:
            hook.remove()
        found = [j for (j,) in all_ints(seen[0] if seen else -1, device=self.run.device) if j >= 0]
        return list(self.params)[found[0]] if found else None


def _detached(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in values.items()}
