"""IPO: bring the margin of the log-ratios to a fixed value, in place of pushing it without end.

    value = (Δ̄ − 1/(2τ))²,   Δ̄ = r_w/|y_w| − r_l/|y_l|,   or Δ = r_w − r_l with `average: false`

Where preferences are certain a logistic loss has no minimum and the reference no hold; a square has one, at 1/(2τ).

Cost: see `margin`; and the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..catalog import Card
from ..options import Options, option
from .margin import Margin, Pairs

CARD = Card(
    id="ipo",
    kind="objective",
    summary="Identity preference optimisation: the margin between log-ratios is drawn to a fixed value.",
    paper="A General Theoretical Paradigm to Understand Learning from Human Preferences",
    year=2023,
    equation="(Δ̄ − 1/(2τ))²",
    couples="none",
    needs=("pairs: data preference", "a reference: the model as the run began"),
    flops="a forward of each pair under the reference, once; the head's logits a second time in the backward",
    checked=(
        "effect not shown; values and gradients agree with TRL's DPOTrainer(ipo) to 1e-5 in float32 on ragged pairs; "
        "1/(2τ)² at π = π_ref"
    ),
    departures=(
        "the paper's equation 17 has sums over tokens; TRL's DPOTrainer averages them and reports that the authors "
        "confirm it, its OnlineDPOTrainer sums. Averages are the default here, sums an option"
    ),
    tags=("preference", "alignment", "margin", "reference", "square"),
)


@dataclass(frozen=True)
class Config(Options):
    tau: float = option(0.1, "τ, how strongly the reference holds: the margin ends at 1/(2τ)", gt=0, source="TRL 1.16")
    average: bool = option(True, "log-ratios per label, in place of their sums", source="TRL 1.16, see the card")


def losses(p: Pairs, tau: float, average: bool) -> Tensor:
    """[B], see the module docstring."""
    margin = p.r_w / p.n_w - p.r_l / p.n_l if average else p.delta
    return (margin - 1 / (2 * tau)).square()


class IPO(Margin):
    """See the module docstring."""

    reference: ClassVar[bool] = True

    def link(self, p: Pairs) -> dict[str, Tensor]:
        return {"pair": losses(p, self.config.tau, self.config.average)}


def build(config: Config) -> nn.Module:
    return IPO(config)
