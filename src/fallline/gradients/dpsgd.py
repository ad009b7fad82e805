"""Private training: each example's gradient is clipped, and noise is added to their sum.

    .grad = (Σ_b c_b g_b + N(0, (zC)²)) / size         g_b: gradient of example b's own loss, Σ_terms value_b
    flat           c_b = min(1, C / ‖g_b‖)
    automatic      c_b = C / (‖g_b‖ + 0.01)             AUTO-S: nothing to tune in C but the scale of the update
    per-layer      each parameter p by itself, with C/√L:      c_bp = min(1, C / (√L ‖g_bp‖)),  L trained parameters
    per-layer-normalised                                       c_bp = C / (√L (‖g_bp‖ + 1e-12))

Whatever the mode, an example moves the sum by C at most. Every example is drawn with the same probability on its own
(sampler `poisson`) and `size` is the expected number of a draw; an empty draw gives noise alone. Over the run's steps
this is (ε, δ)-private for adding or removing one example, by the count of `fallline.privacy`; the run's record says so
under `privacy`. Given ε, the noise z is calibrated for that many steps.

What is private are the weights, at every step, and what is computed from them: optimizer, learning rate and `clip` work
on the noisy gradient, so any will do. What is not: losses, metrics files, whatever a probe makes of losses, and the
choice of hyper-parameters by several runs. A part of your own, or a `prepare`, must not act on losses. Dropout is drawn
from the secret too. The unit is one example; who has several in the data is not protected as a
whole. What held-out data show of themselves is not counted either. Checkpoints hold the secret from which the noise is
drawn: hand on `model`, not them.

The noise is pseudo-random (Philox), in float32, and is not hardened against attacks on rounding. `loss` is the sum of
the drawn examples' losses by their expected number: per example, not per token.

Cost: the ordinary forward and backward with norms (`fallline.per_example`); flat and automatic clipping keep the
factors of the per-example gradients of a micro-batch for their second use. Noise: some 20 ns a trained parameter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from .. import privacy
from ..catalog import Card
from ..contracts import Batch, Signals
from ..errors import InputError
from ..noise import secret, secret_rng
from ..options import Options, option
from ..per_example import Norms
from ..problem import Problem
from ..ranks import all_ints, all_sum
from .watched import Watched

if TYPE_CHECKING:
    from ..step import Run

CARD = Card(
    id="dpsgd",
    kind="estimator",
    summary="Private training: clipped per-example gradients plus noise, with ε and δ in the run's record.",
    paper="Deep Learning with Differential Privacy",
    year=2016,
    equation="(Σ_b min(1, C/‖g_b‖) g_b + N(0, (zC)²)) / (q N)",
    needs=(
        "sampler poisson",
        "data whose examples are whole records: jsonl with no text longer than a row",
        "float32 parameters",
        "layers whose per-example gradients are known",
        "the package dp-accounting",
    ),
    flops="norms and weighted sums of per-example gradients, within the one backward pass",
    claim="97% on MNIST at (8, 1e-5), 73% on CIFAR-10 at (8, 1e-5)",
    checked=(
        "all four ways to clip against float64 one-at-a-time backward; noise by chi-square; ε against the RDP and PRV "
        "accountants. A small Llama on 1000 invented people at ε = 4, δ = 5e-4: loss on other people "
        "5.55 → 2.02, without privacy 1.03 at its best; membership by gradient norm AUC "
        "0.508 [0.483, 0.534], by loss 0.529 [0.503, 0.554], above 0.998 where learned by heart; rates not tuned "
        "(python benchmarks/membership.py)"
    ),
    evidence=("benchmarks/results/membership.json",),
    departures=(
        "the denominator is the expected number of examples, as in later accountants, in place of a fixed lot; "
        "automatic clipping keeps C as a factor, where the authors' code pins it to 1; per-layer normalisation acts on "
        "every example, where the federated recipe it is from starts when the whole norm passes C"
    ),
    tags=("privacy", "differential privacy", "dp-sgd", "clipping", "noise", "auto-s"),
)

_WHAT = "estimator 'dpsgd'"
PUBLIC = frozenset({"grad_norm", "layer_grad_norm", "lr"})
"""Signals that come after the noise."""


@dataclass(frozen=True)
class Config(Options):
    """How private, and how examples are clipped."""

    epsilon: float | None = option(
        None, "ε of the whole run; the noise is calibrated for it. This or 'noise'", gt=0, le=50
    )
    noise: float | None = option(
        None, "z, the noise's standard deviation in units of max_norm; 0 is not private. This or 'epsilon'", ge=0
    )
    delta: float | None = option(None, "δ; null: 1 / (2 · examples)", gt=0, lt=1)
    max_norm: float = option(
        1.0, "C, the norm to which examples' gradients are clipped", gt=0, source="opacus' MNIST example"
    )
    clipping: Literal["flat", "automatic", "per-layer", "per-layer-normalised"] = option(
        "flat", "which norms are clipped, and how", source="Abadi et al., algorithm 1"
    )
    seed: int | None = option(
        None,
        "null: one that nobody knows, kept in checkpoints only; a number: repeatable, and the noise is known to "
        "whoever reads the recipe",
        ge=0,
    )

    def check(self) -> None:
        if (self.epsilon is None) == (self.noise is None):
            raise InputError("give one of 'epsilon' and 'noise'")
        if self.noise is not None and 0 < self.noise < 0.1:
            raise InputError(f"'noise' must be 0, which is not private, or at least 0.1, got {self.noise:g}")


def weights(norm: Tensor, limit: float, clipping: str) -> Tensor:
    """c_b, [B]: what brings gradients of these norms to `limit` at most; a gradient of 0 is left alone.

    Args:
        norm: [B]. limit: C, or C/√L of one parameter. clipping: the mode.
    """
    if clipping == "automatic":
        return limit / (norm + 0.01)
    if clipping == "per-layer-normalised":
        return limit / (norm + 1e-12)
    return (limit / norm).clamp(max=1)


class DPSGD:
    """See the module docstring.

    Attributes:
        config: the options.
        secret: where the noise comes from.
        noise: z, known once the run is put together.
    """

    gives: ClassVar[frozenset[str]] = frozenset()  # the norms of examples are private
    repeatable: ClassVar[bool] = False  # each evaluation spends privacy

    def __init__(self, config: Config) -> None:
        self.config = config
        self.secret = secret(config.seed)
        self._last = -1  # the newest step whose gradient was given out by this process
        self._watched = Watched()

    def check(self, run: Run) -> None:
        """Refuse what would void the guarantee, and find the noise and what it guarantees.

        Raises:
            InputError: the sampler does not draw by chance alone; examples are no whole records, or depend on each
                other, or choose what is trained on; low precision; an unknown layer; δ too large; steps not known;
                dp-accounting is not installed.
        """
        rate, unit, number = getattr(run.sampler, "rate", None), getattr(run.source, "unit", ""), len(run.source)
        if rate is None:
            raise InputError(f"{_WHAT} needs examples that are each drawn by chance alone; take the sampler 'poisson'")
        if not unit:
            raise InputError(
                f"{_WHAT} protects single examples, and here several may be of one document; take data 'jsonl', its "
                "lines no longer than 'length'"
            )
        if run.objective.couples != "none":
            raise InputError(f"{_WHAT}: the objective couples examples, so that none can be clipped by itself")
        for name in ("sampler", "objective", "schedule"):
            read = sorted(frozenset(getattr(getattr(run, name), "reads", ())) - PUBLIC)
            if read:
                raise InputError(f"{_WHAT}: the {name} acts on the signal {read[0]!r}, which is not private")
        for name, p in run.trainable().items():
            if torch.finfo(p.dtype).bits < 32:
                raise InputError(
                    f"{_WHAT} needs float32 parameters, {name!r} is {str(p.dtype).removeprefix('torch.')}: its rounded "
                    "sums could pass 'max_norm'; set precision: float32, or train an adapter"
                )
        if run.steps is None:
            raise InputError(f"{_WHAT} needs to know for how many steps privacy must last: Run(steps=…)")
        delta = 1 / (2 * number) if self.config.delta is None else self.config.delta
        if delta * number >= 1:
            raise InputError(
                f"{_WHAT}: 'delta' must be below 1 / {number}, the number of examples, got {delta:g}: giving out one "
                "example whole would pass as private"
            )
        self._watched.engine(run)
        self.secret = all_ints(self.secret, device=run.device)[0][0]
        if self.config.noise is None:
            assert self.config.epsilon is not None
            self.noise = privacy.calibrated(self.config.epsilon, rate, run.steps, delta)
        else:
            self.noise = self.config.noise
        epsilon = privacy.epsilon(self.noise, rate, run.steps, delta)
        hidden = self.config.seed is None and getattr(run.sampler, "secretly", False)
        self._record = {
            "unit": unit,
            "randomness": "secret" if hidden else "known from the recipe",
            "neighbouring": "add or remove one",
            "epsilon": epsilon if math.isfinite(epsilon) else None,
            "delta": delta,
            "noise_multiplier": self.noise,
            "sampling_rate": rate,
            "steps": run.steps,
            "max_norm": self.config.max_norm,
            "clipping": self.config.clipping,
            "accountant": privacy.accountant(),
        }

    def record(self) -> dict[str, Any]:
        """What the run's record says of privacy; ε is None where there is none."""
        return {"privacy": self._record}

    def __call__(self, problem: Problem) -> Signals:
        """Set `.grad`, of every trained parameter.

        Returns:
            ``loss`` [], the whole step's.

        Raises:
            InputError: examples see each other; the step was taken before or is past those that were counted; an
                example comes twice, shares a row or has a weight.
        """
        run, C = problem.run, self.config.max_norm
        if not self._last < run.step < self._record["steps"]:
            raise InputError(
                f"{_WHAT}: the noise of step {run.step} is not there: steps 0 to {self._record['steps'] - 1} were "
                "counted, each once, so a run cannot go back or on"
            )
        check_examples(problem.micro)
        engine = self._watched.tried(problem)
        size, total = problem.total[""], problem.zero()
        whole = self.config.clipping in ("flat", "automatic")
        limit = C if whole else C / math.sqrt(len(problem.params))

        def weigh(name: str, squared: Tensor) -> Tensor:
            return weights(size * squared.clamp(min=0).sqrt(), limit, self.config.clipping)

        for i, batch in enumerate(problem.micro):
            norms = Norms(bound=True)
            with engine.watch(batch, norms, keep=whole, weigh=None if whole else weigh) as seen:
                loss = problem.loss(i)
                if loss.requires_grad:
                    with run.clock("backward"):
                        loss.backward()
            if whole:
                with run.clock("backward"):
                    seen.add(weigh("", norms.total()))
            total += loss.detach()
        problem.reduce()
        self._last = run.step
        for name, p in problem.params.items():  # the same on every rank
            drawn = secret_rng(self.secret, run.step, f"dpsgd/{name}").standard_normal(p.numel(), dtype=np.float32)
            z = torch.from_numpy(drawn).view(p.shape).to(p.device, p.dtype).mul_(self.noise * C / size)
            p.grad = z if p.grad is None else p.grad.add_(z)
        return {"loss": all_sum(total)}

    def state_dict(self) -> dict[str, Any]:
        return {"secret": self.secret, "noise": self.noise, "last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue, with the very noise of before: another dp-accounting may calibrate it a little otherwise.

        Raises:
            InputError: the state is of another guarantee.
        """
        if not math.isclose(state["noise"], self.noise, rel_tol=1e-2):
            raise InputError(f"{_WHAT}: the saved run has noise {state['noise']:g}, this one {self.noise:g}")
        self.secret, self.noise = state["secret"], state["noise"]
        self._last = max(self._last, state["last"])  # a rewind takes no step back


def check_examples(micro: Sequence[Batch]) -> None:
    """Refuse a rank's micro-batches in which an example counts for more than itself.

    Raises:
        InputError: an example comes twice, as `prepare` may make it, shares a row, or has a weight.
    """
    if not micro:
        return
    ids = torch.cat([batch["example_id"] for batch in micro])
    if len(ids.unique()) < len(ids):
        raise InputError(f"{_WHAT}: an example comes more than once in a step, so it could move the sum by more than C")
    if any(len(batch["segment"]) != len(batch["example_id"]) for batch in micro if "segment" in batch):
        raise InputError(f"{_WHAT}: examples share a row, where they might see each other")
    if not all(bool((batch["weight"] == 1).all()) for batch in micro):
        raise InputError(f"{_WHAT}: examples are weighted, perhaps by what the others are; weights must be 1")


def build(config: Config) -> DPSGD:
    return DPSGD(config)
