"""The gradient noise scale: the batch size at which the noise of the gradient is as large as the gradient.

With g_b the gradient of example b, scaled so that their mean ḡ is the step's gradient, and B examples in the step,

    tr Σ = (Σ_b ‖g_b‖² − B ‖ḡ‖²) / (B − 1),   |G|² = (B ‖ḡ‖² − mean_b ‖g_b‖²) / (B − 1),   B_noise = tr Σ / |G|²

Both parts are unbiased for independent examples: they are the estimates of McCandlish et al. 2018, appendix A.1, with a
small batch of one example, averaged over the examples. ‖ḡ‖² itself is too large by tr Σ / B, so dividing by it would
never show a scale above B. A ratio of unbiased estimates is biased, and single steps are noisy, so each part has its
own running mean over steps, and only the means are divided. |G|² may come out negative where the noise hides the
gradient; then there is no scale to report. Steps with fewer than two examples are left out. Where examples differ in
how many labels they have, those with more weigh more, and the parts are unbiased up to the scatter of a batch's number
of labels.

It needs g_b whose mean is ḡ. With a sampler that draws every example by chance alone, such as `poisson`, the gradient
is divided by the expected number of examples, whatever was drawn; such samplers are refused.

Costs nothing beyond the norms that the estimator `per-example` takes. The gradients are those the optimizer gets before
clipping; an estimator that adds noise to them would add it to the scale too.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..catalog import Card
from ..contracts import Change, Signals
from ..errors import InputError
from ..options import Options, option
from ..step import Run

CARD = Card(
    id="gradient-noise-scale",
    kind="probe",
    summary="Noise of the gradient relative to its size, the useful batch size, in metrics.jsonl.",
    paper="An Empirical Model of Large-Batch Training",
    year=2018,
    equation="tr Σ / |G|²; tr Σ = (Σ‖g_b‖² − B‖ḡ‖²)/(B − 1), |G|² = (B‖ḡ‖² − mean‖g_b‖²)/(B − 1)",
    reads=("example_grad_norm", "grad_norm"),
    needs=(
        "estimator: per-example",
        "two examples a step",
        "a sampler that draws a set number of examples or rows, not poisson",
    ),
    flops="none beyond the estimator's norms",
    checked="equals the covariance of gradients taken one at a time; finds a known scale of 40 within 10 % from "
    "batches of 8; a run with the probe is bit-identical to one without, and resumes exactly",
    tags=("metrics", "gradient", "noise", "variance", "batch size", "critical batch size"),
)


@dataclass(frozen=True)
class Config(Options):
    """How long the running means remember."""

    decay: float = option(
        0.99, "weight of the past in the running means", ge=0, lt=1, source="EleutherAI/gpt-neox, gradient_noise_scale"
    )


def estimates(norms: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """tr Σ and |G|² of one step, unbiased, in float64.

    Args:
        norms: [B], ‖g_b‖, with B at least 2.
        norm: [], ‖ḡ‖.

    Returns:
        [] and [].
    """
    many, each, mean = len(norms), norms.double().square().mean(), norm.double().square()
    return (each - mean) * many / (many - 1), (many * mean - each) / (many - 1)


class GradientNoiseScale:
    """Keeps the running means; they are part of the run's state."""

    reads: ClassVar[frozenset[str]] = frozenset({"example_grad_norm", "grad_norm"})

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._steps = 0
        self._trace = self._square = torch.zeros((), dtype=torch.float64)
        self._warned = False

    def check(self, run: Run) -> None:
        """Refuse draws whose number is left to chance.

        Raises:
            InputError: the sampler is such.
        """
        if getattr(run.sampler, "rate", None) is not None:
            raise InputError(
                "probe 'gradient-noise-scale' needs gradients that are means over the examples drawn, and this sampler "
                "has them divided by the expected number; take the sampler 'uniform', or leave the probe out"
            )

    def after_step(self, run: Run, signals: Signals) -> Sequence[Change]:
        norms = signals["example_grad_norm"]
        if len(norms) < 2:
            if not self._warned and not self._steps:
                self._warned = True
                logging.getLogger("fallline").warning(
                    "gradient-noise-scale compares the examples of a step; this one has fewer than two and is left "
                    "out; where all are so, raise 'batch'"
                )
            return ()
        trace, square = estimates(norms, signals["grad_norm"])
        self._steps += 1
        self._trace = self.decay * self._trace + (1 - self.decay) * trace
        self._square = self.decay * self._square + (1 - self.decay) * square
        return ()

    def metrics(self) -> dict[str, float]:
        """``gradient_variance`` (tr Σ) and ``gradient_square`` (|G|²), means over the steps so far, and their ratio
        ``gradient_noise_scale``, in examples, where |G|² is positive; nothing before the first step."""
        if not self._steps:
            return {}
        begun = 1 - self.decay**self._steps  # the means started at zero
        trace, square = self._trace.item() / begun, self._square.item() / begun
        ratio = {"gradient_noise_scale": trace / square} if square > 0 else {}
        return {"gradient_variance": trace, "gradient_square": square} | ratio

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "trace": self._trace, "square": self._square}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._steps, self._trace, self._square = state["steps"], state["trace"], state["square"]


def build(config: Config) -> GradientNoiseScale:
    return GradientNoiseScale(config.decay)
