"""Latent adversarial training: refuse even while a small change of hidden states pushes towards the bad answer.

    attack: δ = argmin_{‖δ_t‖ ≤ ε} −a_t log π_δ(y_f) / |y_f| + a_a A_δ(y_e) / |y_e|,  untargeted: argmin log π_δ(y_e)
    A_δ(y) = −Σ_t log(1 − π_δ(y_t | ·)),   0 for a label with log π < −5
    refusal = −c_t log π_δ(y_e),   forget = c_a A_δ(y_f),   retain = −α log π(y_r)

y_f is the answer to forget, y_e the refusal, y_r what is kept. π_δ is the model with δ [K, D] added for every token of
the prompt, at what the embeddings or decoder layers of K `places` give out. It is one δ for both sequences of an
example: a token is of the prompt while both sequences agree and nothing was asked yet. From δ = 0 the attack goes
`steps` steps of Adam, each followed by the projection of every token's δ at every place into its ball.

The attack is made in `prepare`, with dropout off and weights that ask for no gradient; each example's is its own,
however the step is cut. Three terms, each counted by its own labels.

Cost: a step more, of all rows; for the attack, `steps` forwards and as many backwards without weights of the rows with
something to forget, without activation checkpointing; a column of δ [R, L, K, D] for the step. The head is
6 N V D floating-point operations, as its gradient is formed in the forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calibrate import evaluating
from ..catalog import Card
from ..contracts import FORGET, Batch, Loss
from ..cross_entropy import nll
from ..errors import InputError
from ..options import Options, option
from ..pgd import Adam, added, ascend, frozen
from ..sequences import per_sequence, sequence_counts
from ..step import Run
from ..tokens import IGNORED, per_token, plain_head, token_losses
from .forgetting import ANSWER, REFUSAL, Forgetting

CARD = Card(
    id="lat",
    kind="objective",
    summary="Latent adversarial training: refusals that hold while the prompt's hidden states are attacked.",
    paper="Latent Adversarial Training Improves Robustness to Persistent Harmful Behaviors in LLMs",
    year=2024,
    repository="https://github.com/aengusl/latent-adversarial-training",
    equation="−c_t log π_δ(y_e) − c_a Σ log(1 − π_δ(y_f)) − α log π(y_r), ‖δ_t‖ ≤ ε the worst for the model",
    couples="none",
    needs=(
        "streams: data unlearning with refusals and something to keep",
        "a 🤗 model whose decoder has a list of its layers",
    ),
    flops="steps forwards and backwards more of what is to be forgotten, those without weights",
    claim="robust to jailbreaks at far less compute than R2D2; backdoors removed; unlearning that is harder to undo",
    checked=(
        "effect not shown; attack, values and gradients against a float64 reference on full logits with torch's Adam; "
        "δ in its balls, their edges met, 0 off the prompt; the attack's loss falls; without steps or at ε = 0 the "
        "plain objective; cut and packed alike to 1e-6 in float64; adapters, activation checkpointing"
    ),
    departures=(
        "every step is attacked anew and takes one update, there four updates meet one δ. δ is added at what a layer "
        "gives out, there at its MLP's output, which is the same where that is added to the residual stream as it is. "
        "The attack's losses are means by example, there by batch; Adam has no weight decay, there 0.01. Weights are "
        "taken as they are, there over their sum. Gradients that are not finite stop the run, there they become 0. "
        "−log(1 − p) is taken from the margin, so that its gradient is finite at p = 1. Left out: attacks on answers, "
        "the divergence in place of the retained likelihood, DPO as the loss, RMU-LAT. The untargeted attack raises "
        "the loss of the refusal alone"
    ),
    tags=("unlearning", "adversarial", "refusal", "jailbreak", "robust", "latent", "pgd", "hidden states"),
)

DELTA = "delta"
"""The column [R, L, K, D] of δ, in at least float32."""

LEAST = -5.0
"""log p below which a label is unlikely enough."""

_PAPER = "the authors' configuration for Llama-2-7B-chat"
_ATTACKED = ("'steps' is above 0", lambda c: c.steps > 0)
_TARGETED = ("'targeted' is true and 'steps' above 0", lambda c: c.targeted and c.steps > 0)


@dataclass(frozen=True)
class Config(Options):
    targeted: bool = option(
        True, "the attack seeks the answer to forget; false: any way to make the refusal unlikely", source=_PAPER,
        used_if=_ATTACKED,
    )  # fmt: skip
    places: tuple[int, ...] | None = option(
        None, "where δ is added: 0 what the embeddings give out, k what layer k does; null: 0, and the layers after "
        "1/4, 1/2, 3/4 and 15/16 of all, as in 0, 9, 17, 25, 31 of 32",
        ge=0, source=_PAPER, used_if=_ATTACKED,
    )  # fmt: skip
    radius: float = option(
        6.0, "ε, of a token's ball at each place, in units of hidden states", ge=0, source=_PAPER, used_if=_ATTACKED
    )
    steps: int = option(16, "of the attack", ge=0, source=_PAPER)
    rate: float = option(0.05, "Adam's, in the attack", gt=0, source=_PAPER, used_if=_ATTACKED)
    attack_toward: float = option(
        0.5, "a_t, what the answer's likelihood counts in the attack", gt=0, source=_PAPER, used_if=_TARGETED
    )
    attack_away: float = option(
        0.5, "a_a, what leaving the refusal counts in the attack", ge=0, source=_PAPER, used_if=_TARGETED
    )
    toward: float = option(0.5, "c_t, the weight of the refusal", gt=0, source=_PAPER)
    away: float = option(0.5, "c_a, the weight of leaving the answer", ge=0, source=_PAPER)
    retain: float = option(1.5, "α, the weight of what is kept", ge=0, source=_PAPER)

    def check(self) -> None:
        if self.places is not None and (not self.places or len(set(self.places)) < len(self.places)):
            raise InputError(f"'places' must name at least one place, each once, got {list(self.places)}")


def leaving(margin: Tensor) -> Tensor:
    """−log(1 − p), 0 where log p < −5, of margins log p − log(1 − p)."""
    return torch.where(F.logsigmoid(margin) < LEAST, 0, -F.logsigmoid(-margin))


class Steering:
    """−log p of some labels and `leaving` of others, a `TokenLoss` of places.

    Args:
        labels: [P] int64, of each place. away: [P] bool, which are to be left.
    """

    def __init__(self, labels: Tensor, away: Tensor) -> None:
        self.labels, self.away = labels, away

    def __call__(self, z: Tensor, y: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
        label, at = self.labels[y], self.away[y.squeeze(1)].nonzero().squeeze(1)
        left = label[at]
        others = z[at]
        margin = others.gather(1, left).squeeze(1)
        others.scatter_(1, left, -torch.inf)
        margin -= others.logsumexp(1)
        value, g = nll(z, label, slope)
        value[at] = leaving(margin)
        if g is not None:  # ∂ margin / ∂z = e_label − softmax over the others
            p = torch.where(F.logsigmoid(margin) < LEAST, 0, margin.sigmoid()).unsqueeze(1)
            g[at] = (-p * others.softmax(1)).scatter_(1, left, p)
        return value, g

    def plain(self, z: Tensor, y: Tensor) -> Tensor:
        label = self.labels[y]
        margin = z.gather(1, label).squeeze(1) - z.scatter(1, label, -torch.inf).logsumexp(1)
        stay = F.cross_entropy(z, label.squeeze(1), reduction="none")
        return torch.where(self.away[y.squeeze(1)], leaving(margin), stay)


def steering(labels: Tensor, away: Tensor) -> tuple[Steering, Tensor]:
    """The rule for labels [R, L] of which some are to be left, and the places to give the head."""
    places = torch.arange(labels.numel(), device=labels.device).view_as(labels)
    rule = Steering(labels.clamp(min=0).flatten(), away.flatten())
    return rule, places.masked_fill(labels == IGNORED, IGNORED)


class LAT(Forgetting):
    """See the module docstring."""

    terms: ClassVar = {"refusal": "labels", "forget": "labels"}
    sides: ClassVar[tuple[int, ...]] = (ANSWER, REFUSAL)

    def __init__(self, config: Config) -> None:
        super().__init__(config, keep=config.retain)

    def token_columns(self, model: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Columns [R, L, …] that `prepare` adds."""
        if not self.config.steps:
            return {}
        table = _embeddings(model).weight
        many = len(self._places(0))  # as many in any model, also where some coincide and stay 0
        return {DELTA: ((many, table.shape[1]), torch.promote_types(table.dtype, torch.float32))}

    def check(self, run: Run) -> None:
        """Refuse data without refusals, and a model without the places."""
        super().check(run)
        if not self.config.steps:
            return
        layers, name = _layers(run.model), type(run.model).__name__
        if not layers:
            raise InputError(f"objective 'lat' needs a decoder with a list of its layers, and that of {name} has none")
        wide = [p for p in self._places(len(layers)) if p > len(layers)]
        if wide:
            raise InputError(f"objective 'lat': 'places' has {wide[0]}, and {name} has layers 1 … {len(layers)}")
        owner: Any = run.model
        size, width = owner.config.get_text_config().hidden_size, _embeddings(run.model).weight.shape[1]
        if size != width:
            raise InputError(
                f"objective 'lat' needs embeddings as wide as hidden states, and {name} has {width} and {size}"
            )

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """term → [B] int64: labels of the refusal, of the answer, and of what is kept."""
        n = sequence_counts(batch | {"labels": self.asked(batch)})
        forget, retain = self.members(batch, n)
        return {"refusal": n[:, REFUSAL] * forget, "forget": n[:, ANSWER] * forget, "retain": n.sum(1) * retain}

    def prepare(self, run: Run, batch: Batch) -> Batch:
        """Add the attack δ."""
        told = self.token_columns(run.model)
        if not told:
            return batch
        (shape, dtype), labels = told[DELTA], self.asked(batch)
        n = sequence_counts(batch | {"labels": labels})
        forget, _ = self.members(batch, n)
        column = torch.zeros(*labels.shape, *shape, dtype=dtype, device=labels.device)
        first, second = prompts(batch, labels, forget)
        if not len(first):
            return batch | {DELTA: column}
        side = batch["side"]
        each = torch.where(forget, 1 / n.clamp(min=1).to(dtype).t(), 0)  # [2, B]
        if self.config.targeted:
            weight = _by_side(batch, -self.config.attack_toward * each[0], -self.config.attack_away * each[1])
            away = side == REFUSAL
        else:
            weight = _by_side(batch, 0 * each[0], each[1])
            away = torch.zeros_like(side, dtype=torch.bool)
        labels = labels.masked_fill(weight == 0, IGNORED)

        plain_head(run.model, run.device)  # tried on other shapes than δ's
        length = labels.shape[1]
        with evaluating(run.model), frozen(run.model.parameters()):
            for rows in (first // length).unique().split(run.micro):
                row = torch.full((len(labels),), -1, device=rows.device)
                row[rows] = torch.arange(len(rows), device=rows.device)
                here = row[first // length] >= 0
                at = torch.cat([row[t[here] // length] * length + t[here] % length for t in (first, second)])
                inputs = {name: batch[name][rows] for name in ("input_ids", "position_ids")}
                column[rows] = self._attack(run.model, inputs, labels[rows], away[rows], weight[rows], at, column[rows])
        return batch | {DELTA: column}

    def _attack(
        self, model: nn.Module, inputs: Batch, labels: Tensor, away: Tensor, weight: Tensor, at: Tensor, zero: Tensor
    ) -> Tensor:
        """δ [r, L, K, D] of r rows.

        Args:
            inputs, labels, away: of these rows. weight: [r, L], what tokens count. zero: [r, L, K, D].
            at: [2 n], the places of prompt tokens, in the first sequence and in the second, in flat rows.
        """
        rule, places = steering(labels, away)

        def spread(delta: Tensor) -> Tensor:
            return zero.flatten(0, 1).index_copy(0, at, torch.cat([delta, delta])).view_as(zero)

        def value(delta: Tensor) -> Tensor:
            with self._disturbed(model, spread(delta)):
                return (weight * token_losses(model, inputs | {"labels": places}, None, rule)).sum()

        start, o = zero.new_zeros(len(at) // 2, *zero.shape[2:]), self.config
        return spread(ascend(value, start, steps=o.steps, size=o.rate, radius=o.radius, rule=Adam()))

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        asked, o = self.asked(batch), self.config
        n = sequence_counts(batch | {"labels": asked})
        forget, retain = self.members(batch, n)
        rule, places = steering(asked, (per_token(batch["domain"], batch) == FORGET) & (batch["side"] == ANSWER))
        share = None
        if "share/retain" in batch:
            parts = (o.away, batch["share/forget"]), (o.toward, batch["share/refusal"])
            share = _by_side(batch, *(torch.where(forget, c * s, 0) for c, s in parts))
            share = share + per_token(torch.where(retain, o.retain * batch["share/retain"], 0), batch)
        plain_head(model, asked.device)  # tried on other shapes than δ's
        with self._disturbed(model, batch.get(DELTA)):
            tokens = token_losses(model, batch | {"labels": places}, share, rule)
        sums = per_sequence(tokens.double(), batch)
        found = {
            "refusal": torch.where(forget, sums[:, REFUSAL], 0),
            "forget": torch.where(forget, sums[:, ANSWER], 0),
            "retain": torch.where(retain, sums.sum(1), 0),
        }
        value = {term: c * found[term] for term, c in zip(found, (o.toward, o.away, o.retain), strict=True)}
        if share is None:
            return Loss(value)
        names = {"refusal": "refusal_nll", "forget": "forget_away"} | ({"retain": "retain_nll"} if self._keeps else {})
        metrics = {name: (batch[f"share/{term}"] * found[term].detach()).sum() for term, name in names.items()}
        return Loss({term: v.to(batch[f"share/{term}"].dtype) for term, v in value.items()}, metrics)

    @contextmanager
    def _disturbed(self, model: nn.Module, delta: Tensor | None) -> Iterator[None]:
        """Inside, the model's places give out δ [r, L, K, D] more."""
        with ExitStack() as hooks:
            if delta is not None:
                modules = [_embeddings(model), *_layers(model)]
                places = self._places(len(modules) - 1)
                for place in sorted(set(places)):
                    if place < len(modules):  # a plan tries models of fewer layers
                        hooks.enter_context(added(modules[place], delta[:, :, places.index(place)]))
            yield

    def _places(self, layers: int) -> tuple[int, ...]:
        """Places in a model of so many layers, which may coincide where they are not told."""
        told: tuple[int, ...] | None = self.config.places
        return (0, *(layers * part // 16 + 1 for part in (4, 8, 12, 15))) if told is None else told


def prompts(batch: Batch, asked: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """Where the prompts of examples lie: tokens up to which both sequences agree and nothing was asked.

    Args:
        batch: with `side` and `position_ids`. asked: [R, L] labels. members: [B] bool, of which examples.

    Returns:
        [n], [n] int64: places in flat rows, in the first sequence and, in the same order, in the second.
    """
    ids, side, position = batch["input_ids"], batch["side"], batch["position_ids"]
    place = torch.arange(ids.numel(), device=ids.device).view_as(ids)
    row = torch.arange(len(ids), device=ids.device).unsqueeze(1).expand_as(ids)
    owner = batch.get("segment", row)
    begin = place.new_full((len(members) + 1,), ids.numel())
    begin = begin.scatter_reduce(0, owner.flatten() + 1, place.flatten(), "amin")[1:]
    twin = (per_token(begin, batch) + position).clamp(0, max(0, ids.numel() - 1))  # there in the first sequence

    same = (side == REFUSAL) & per_token(members, batch) & (owner == owner.flatten()[twin])
    same &= (side.flatten()[twin] == ANSWER) & (ids == ids.flatten()[twin])
    learned = (asked != IGNORED) | (asked.flatten()[twin] != IGNORED)
    start = (torch.arange(ids.shape[1], device=ids.device) - position).clamp(min=0)

    def earlier(which: Tensor) -> Tensor:
        """How many there are before a token, in its sequence."""
        upto = which.long().cumsum(1) - which.long()
        return upto - upto.gather(1, start)

    second = (same & (earlier(~same | learned) == 0)).flatten().nonzero().squeeze(1)
    return twin.flatten()[second], second


def _by_side(batch: Batch, answer: Tensor, refusal: Tensor) -> Tensor:
    """Each token's example's value [R, L], by sequence: of values [B] for the answer and for the refusal."""
    return torch.where(batch["side"] == REFUSAL, per_token(refusal, batch), per_token(answer, batch))


def _embeddings(model: nn.Module) -> Any:
    owner: Any = model
    return owner.get_input_embeddings()


def _layers(model: nn.Module) -> list[nn.Module]:
    """The decoder's layers; none where there is no list of so many."""
    owner: Any = model
    number = owner.config.get_text_config().num_hidden_layers
    lists = [m for m in owner.get_decoder().children() if isinstance(m, nn.ModuleList) and len(m) == number]
    return list(lists[0]) if len(lists) == 1 else []


def build(config: Config) -> nn.Module:
    return LAT(config)
