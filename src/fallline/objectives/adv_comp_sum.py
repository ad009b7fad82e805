"""Smooth adversarial comp-sum: a comp-sum loss, and how far a small change of the input can bend the margins.

    Δ_t(x) = [z_label − z_k] over the competitors k of token t
    value_t = Φ^τ(Σ_k exp(−Δ_t,k(x) / ρ)) + ν max_{x'} ‖Δ_t(x') − Δ_t(x)‖₂

Φ^τ is the loss of `comp-sum`, with logits over ρ; x are the input embeddings and x' = x + δ with
‖δ_s‖₂ ≤ γ · (mean norm of an embedding) at every token s of the example. The maximum is sought once for all tokens of
an example, by projected gradient ascent on Σ_t ‖·‖² from a random point of the ball. Both sides of the difference are
trained.

In the first term all words compete, in the second those `competitors` with the largest logits at x. The attack is made
in `prepare`, where it does not depend on the cut of the step (`fallline.pgd`), with dropout off; in the forward, x and
x' meet the same dropout. At x' = x the norm has slope 0.

Terms: `comp-sum` and `smooth`, both counted by labels; the columns it reads are those of `per_token`. Cost: 2 + steps
forwards, as many backwards as steps + 2, those of the attack without weights; a column of δ [R, L, D] for the step, and
head rows [N, competitors, D] for N labels of a micro-batch. Full logits never exist.
"""

from __future__ import annotations

from contextvars import Context
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batches import split
from ..calibrate import evaluating
from ..catalog import Card
from ..contracts import Batch, Couples, Loss
from ..cross_entropy import chunk_size, nll
from ..errors import InputError
from ..isolation import isolated
from ..noise import secret_rng
from ..options import Options, option
from ..pgd import added, ascend, ball, frozen
from ..step import Run
from ..tokens import IGNORED, TokenLoss, label_counts, per_example, per_token, plain_head, token_losses_and_hidden
from .comp_sum import CompSum

CARD = Card(
    id="adv-comp-sum",
    kind="objective",
    summary="Comp-sum loss plus the largest bend of the margins under small changes of the input embeddings.",
    paper="Cross-Entropy Loss Functions: Theoretical Analysis and Applications",
    year=2023,
    equation="Φ^τ(Σ exp(−Δ(x)/ρ)) + ν max_{‖x′ − x‖ ≤ γ} ‖Δ(x′) − Δ(x)‖₂",
    couples="none",
    needs=("labels", "a model whose logits are a plain linear map of what its decoder returns"),
    flops="1 + steps forwards and backwards more, those of the attack without weights",
    claim="robust accuracy above TRADES' with better clean accuracy on CIFAR-10, CIFAR-100 and SVHN",
    checked=(
        "effect not shown; values and gradients against float64 on full logits; γ = 0 and ν = 0 are comp-sum; δ inside "
        "the ball at every token, the bend larger than at its start, on a linear map γ σ_max; cut and packed alike to "
        "1e-6 in float64"
    ),
    departures=(
        "no code of the authors' is known, and the structure is a reading of digests; for language models inputs are "
        "embeddings, competitors the likeliest words, and one δ serves all tokens of an example, so that a token's "
        "maximum is bounded from below. The weight penalty is the optimizer's"
    ),
    tags=("adversarial", "robust", "embeddings", "pgd", "smooth", "likelihood"),
)

DELTA, COMPETITORS = "delta", "competitors"
"""Columns: δ [R, L, D] in at least float32, and k [R, L, competitors] int64."""

SMALL = 1e-6
"""ε in √(s² + ε²) − ε, which has a slope at s = 0."""


@dataclass(frozen=True)
class Config(Options):
    tau: float = option(1.0, "τ, see `comp-sum`", ge=0, le=2, source="paper")
    scale: float = option(1.0, "ρ, what logits are divided by", gt=0, source="ours, not tuned")
    weight: float = option(1.0, "ν, what the bend counts", ge=0, source="ours, not tuned")
    radius: float = option(0.1, "γ, of the ball, in mean norms of an embedding", ge=0, source="ours, not tuned")
    steps: int = option(3, "of the attack", ge=0, source="ours, not tuned")
    competitors: int = option(8, "words whose margins are bent", gt=0, source="ours, not tuned")


class Scaled:
    """A loss of logits over ρ, as a `TokenLoss`. tau: τ. scale: ρ."""

    def __init__(self, tau: float, scale: float) -> None:
        self.inner: TokenLoss | None = None if tau == 1 else CompSum(tau)
        self.scale = scale

    def plain(self, z: Tensor, y: Tensor) -> Tensor:
        z = z / self.scale
        return F.cross_entropy(z, y.squeeze(1), reduction="none") if self.inner is None else self.inner.plain(z, y)

    def __call__(self, z: Tensor, y: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
        value, g = (self.inner or nll)(z.div_(self.scale), y, slope)
        return value, None if g is None else g.div_(self.scale)


class AdvCompSum(nn.Module):
    """See the module docstring."""

    couples: ClassVar[Couples] = "none"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.rule = Scaled(config.tau, config.scale)

    def token_columns(self, model: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Columns [R, L, …] that `prepare` adds."""
        table = _parts(model)[0].weight
        many = min(self.config.competitors, len(_parts(model)[1].weight) - 1)
        return {DELTA: ((table.shape[1],), _wide(table)), COMPETITORS: ((many,), torch.int64)}

    def check(self, run: Run) -> None:
        """
        Raises:
            InputError: the model's logits are no plain linear map.
        """
        if not plain_head(run.model, run.device):
            raise InputError(
                "objective 'adv-comp-sum' needs logits that are a plain linear map of what the decoder returns, and "
                f"those of {type(run.model).__name__} are not; take comp-sum"
            )

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """How many labels of each example are asked, [B] int64."""
        return dict.fromkeys(("comp-sum", "smooth"), label_counts(batch))

    def prepare(self, run: Run, batch: Batch) -> Batch:
        """Add the competitors at x, and the attack δ."""
        radius = self.config.radius * _mean_norm(_parts(run.model)[0])
        columns = self.token_columns(run.model)
        shapes = {name: (*batch["labels"].shape, *shape) for name, (shape, _) in columns.items()}
        start = self._start(run, batch, shapes[DELTA], radius).to(run.device, columns[DELTA][1])
        found = {name: [start.new_zeros(0, *shape[1:], dtype=columns[name][1])] for name, shape in shapes.items()}
        with evaluating(run.model), frozen(run.model.parameters()):
            for micro in split(batch | {DELTA: start}, run.micro):
                for name, column in self._attack(run.model, micro, radius).items():
                    found[name].append(column)
        return batch | {name: torch.cat(columns) for name, columns in found.items()}

    def _start(self, run: Run, batch: Batch, shape: tuple[int, ...], radius: float) -> Tensor:
        """A point of the ball for every token, by example; 0 for tokens of nobody's."""
        start = torch.zeros(shape, dtype=torch.float64)
        segment = batch["segment"].cpu() if "segment" in batch else torch.arange(shape[0])[:, None].expand(shape[:2])
        for b, id in enumerate(batch["example_id"].tolist()):
            here = segment == b
            # numpy's, whose first numbers are the same however many follow: padding may
            drawn = secret_rng(run.seed, run.step, f"attack/{id}").standard_normal((int(here.sum()), shape[2]))
            start[here] = torch.from_numpy(drawn) * (radius / shape[2] ** 0.5)
        return ball(start, radius)

    def _attack(self, model: nn.Module, batch: Batch, radius: float) -> dict[str, Tensor]:
        """Competitors and δ of a micro-batch that has the start."""
        with torch.no_grad():
            clean = _hidden(model, batch)
            rivals = self._rivals(model, clean, batch["labels"])
        batch = batch | {COMPETITORS: rivals}

        def bent(delta: Tensor) -> Tensor:
            with added(_parts(model)[0], delta):
                return self._bend(model, _hidden(model, batch) - clean, batch).sum()

        size = 2.5 * radius / max(1, self.config.steps)  # reaches every point of the ball from every other
        delta = ascend(bent, batch[DELTA], steps=self.config.steps, size=size, radius=radius)
        return {DELTA: delta, COMPETITORS: rivals}

    def _rivals(self, model: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
        """[R, L, competitors]: the words but the label with the largest logits."""
        head = _parts(model)[1]
        many = min(self.config.competitors, len(head.weight) - 1)
        h, y = hidden.flatten(0, 1), labels.flatten().clamp(min=0)
        found = []
        for rows in torch.arange(len(h), device=h.device).split(chunk_size(len(h), len(head.weight), h.device.type)):
            z = F.linear(h[rows], head.weight, head.bias)
            found.append(z.scatter_(1, y[rows].unsqueeze(1), -torch.inf).topk(many, 1).indices)
        return torch.cat([y.new_zeros(0, many), *found]).view(*labels.shape, many)

    def _bend(self, model: nn.Module, moved: Tensor, batch: Batch) -> Tensor:
        """‖Δ_t(x') − Δ_t(x)‖² of every label, [R, L], from how its hidden state moved; 0 where nothing is asked."""
        weight, labels = _parts(model)[1].weight, batch["labels"]
        at = (labels.flatten() != IGNORED).nonzero().squeeze(1)
        rivals, y = batch[COMPETITORS].flatten(0, 1)[at], labels.flatten()[at]
        wide = _wide(weight)
        rows = (weight[y].unsqueeze(1) - weight[rivals]).to(wide)
        bend = (rows @ moved.flatten(0, 1)[at].to(wide).unsqueeze(2)).square().sum((1, 2))
        return bend.new_zeros(labels.numel()).index_copy(0, at, bend).view(labels.shape)

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        asked, weight = batch.get("share/comp-sum"), batch.get("token_weight")
        share = None if asked is None else per_token(asked, batch) * (1 if weight is None else weight)
        on = [batch["labels"].device] if batch["labels"].is_cuda else []
        with torch.random.fork_rng(on):  # so that x' meets the same dropout
            values, clean = token_losses_and_hidden(model, batch, share, self.rule)
        with added(_parts(model)[0], batch[DELTA]):
            # a context of its own: what blocks tell the step, they told at x
            changed: Tensor = Context().run(_hidden, model, batch)
        bend = self._bend(model, changed - clean, batch)
        smooth = self.config.weight * ((bend + SMALL**2).sqrt() - SMALL)
        if weight is not None:
            values, smooth = values * weight, smooth * weight
        return Loss({"comp-sum": per_example(values, batch), "smooth": per_example(smooth.to(values), batch)})


def _parts(model: nn.Module) -> tuple[Any, Any]:
    """Embedding and head."""
    owner: Any = model
    return owner.get_input_embeddings(), owner.get_output_embeddings()


def _hidden(model: nn.Module, batch: Batch) -> Tensor:
    owner: Any = model
    found: Tensor = owner.get_decoder()(**isolated(model, batch)).last_hidden_state
    return found


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


@torch.no_grad()
def _mean_norm(embedding: nn.Module) -> float:
    """Of what an embedding gives for its words, in the mean."""
    table: Any = embedding.weight
    total = 0.0
    for ids in torch.arange(len(table), device=table.device).split(4096):
        total += torch.linalg.vector_norm(embedding(ids), dim=-1, dtype=_wide(table)).sum().item()
    return total / len(table)


def build(config: Config) -> nn.Module:
    return AdvCompSum(config)
