"""Unlearning in one expert: of a mixture of experts train one, the one that what is to be forgotten goes to most.

    s_i^(l) = 1/Z Σ_j 1/L_j Σ_t g_{i,t}^(l),   (l*, i*) = argmax s,   over Z examples j to forget, of L_j tokens each
    loss = ℓ + α mean_t ‖g_t^(l*) − e_{i*}‖²

g_t [E] is the router's softmax over all experts of a layer, before the top k are taken; ℓ is a loss of the unlearning
family, named by `of`. Trained are expert i* and the router of its layer, everything else is frozen. The paper finds
that a router left alone sends what is to be forgotten to other experts, which meets the loss and ruins those; the
anchor holds it. Shared experts are no candidates.

s is taken once, before step 0, over the first `TOKENS` tokens to forget, without dropout; the expert is part of the
run's state. What counts as a token, in s and in the anchor, is one of the answer's sequence, its prompt included, not
padding, and not the refusal beside it.

Terms: those of ℓ, and `anchor`, counted by these tokens. Cost: a forward of the tokens for s; each step that of ℓ, with
gradients and moments of one expert and a router.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calibrate import evaluating
from ..catalog import Card
from ..contracts import Batch, Change, Couples, Loss
from ..errors import InputError
from ..experts import is_softmax, mixtures, overheard, probabilities, split_off
from ..isolation import isolated
from ..options import Options, option
from ..sequences import sequence_counts
from ..step import Run
from ..tokens import per_example, per_token
from .forgetting import ANSWER, Forgetting
from .inner import inner

CARD = Card(
    id="uoe",
    kind="objective",
    summary="Unlearning in one expert of a mixture, the most used one, its router held; under npo or another loss.",
    paper="SEUF: Is Unlearning One Expert Enough for Mixture-of-Experts LLMs?",
    year=2025,
    equation="ℓ + α mean_t ‖g_t − e_i‖², i the expert with the largest mean g on what is to be forgotten",
    couples="none",
    needs=(
        "streams: data unlearning, and what the loss named by 'of' needs",
        "a 🤗 mixture of experts whose routers are a softmax, without an adapter",
    ),
    flops="a forward of 100 000 tokens to forget, once; the backward ends at the expert's layer",
    claim="with the same losses utility up to 35 % and forget quality up to 5 % higher, training 0.06 % of the weights",
    checked=(
        "effect not shown; choice, anchor, loss and slopes against a float64 reference of single sequences; without "
        "the anchor the plain loss and its slices; all else to the bit under adamw and muon with weight decay, in "
        "float32 and bfloat16, for Qwen2-MoE, Mixtral and GPT-OSS; resume. A mixture of 4 experts in 3 layers that "
        "knows invented people and things, rates tuned alike, three seeds: right answers about things that unlearning "
        "never saw, when the people are forgotten, 67 [47, 84] % around ga (alone 64 [53, 73]), 30 [0, 58] % around "
        "graddiff (79 [67, 87]), 30 [7, 64] % around npo (82 [76, 89]); 97 % before. Of the tokens to forget the "
        "expert gets 50 % before, 82 to 84 % under uoe, 45 to 51 % under the losses alone (python "
        "benchmarks/expert_unlearning.py)"
    ),
    evidence=("benchmarks/results/expert_unlearning.json",),
    departures=(
        "the anchor is a mean over tokens, where the paper writes the norm of a layer's; one expert only: the paper "
        "finds more to be worse. RMU is no loss here"
    ),
    tags=("unlearning", "forgetting", "mixture of experts", "moe", "router", "seuf", "few parameters"),
)

TOKENS = 100_000
"""To forget, that the expert is chosen by, to the end of an example: the paper finds as many to be enough."""

log = logging.getLogger("fallline")


@dataclass(frozen=True)
class Config(Options):
    of: str = option("npo", "the loss: an objective of the unlearning family", source="ours; the paper takes several")
    options: Any = option(None, "the options of that loss, by name; null: its defaults")  # noqa: RUF009
    anchor: float = option(1.0, "α, the weight of the router's anchor", ge=0, source="paper, the best of its sweep")

    def check(self) -> None:
        self.loss()

    def loss(self) -> Forgetting:
        """ℓ.

        Raises:
            InputError: it is none of the family, or its options are wrong.
        """
        made = inner(self.of, self.options)
        if not isinstance(made, Forgetting) or type(made).prepare is not Forgetting.prepare:  # lat attacks
            raise InputError(
                f"'of' must be an unlearning objective that makes no attack, such as npo; {self.of!r} is not"
            )
        return made


def told_tokens(of: Forgetting, batch: Batch) -> Tensor:
    """[R, L] bool: tokens of what is to be forgotten, of examples that ℓ asks."""
    forget, _ = of.members(batch, sequence_counts(batch | {"labels": of.asked(batch)}))
    found = per_token(forget, batch)
    return found & (batch["side"] == ANSWER) if "side" in batch else found


def distances(g: Tensor, expert: int) -> Tensor:
    """‖g_t − e_i‖² [...] of g [..., E]."""
    aim = F.one_hot(torch.tensor(expert, device=g.device), g.shape[-1])
    return (g - aim).square().sum(-1)


class Chosen:
    """The part of a run that chooses the expert, before step 0, and trains it and its router alone.

    Attributes:
        layer: path of its layer's experts; empty: none is chosen yet.
        expert: i*.
    """

    def __init__(self, of: Forgetting) -> None:
        self.of, self.layer, self.expert = of, "", -1

    def check(self, run: Run) -> None:
        """
        Raises:
            InputError: the model is no mixture of experts that can be read, is compiled, or is not trained whole; the
                run is private; the optimizer cannot follow.
        """
        model: Any = run.model
        found = mixtures(model)
        if not found:
            raise InputError(
                f"objective 'uoe' trains one expert of a mixture, and {type(model).__name__} has none that is known: a "
                "router, 'gate' or 'router', beside 'experts' in stacks of one slice each"
            )
        frozen = next((name for name, p in model.named_parameters() if not p.requires_grad), None)
        if frozen is not None:
            raise InputError(
                f"objective 'uoe' chooses itself what is trained, and {frozen!r} is frozen; leave out the adapter, or "
                "freeze nothing"
            )
        if getattr(model.get_decoder(), "_compiled_call_impl", None) is not None:
            raise InputError(
                "objective 'uoe' listens to routers, which compiled code does not allow; leave out compile"
            )
        if hasattr(run.estimator, "secret"):
            raise InputError(
                "objective 'uoe' chooses its expert from the data, which the guarantee of a private run does not cover"
            )
        if not hasattr(run.optimizer, "remap"):
            raise InputError(
                f"objective 'uoe' changes what is trained, which the optimizer {type(run.optimizer).__name__} cannot "
                "follow; take one of fallline.optim"
            )
        ids = torch.arange(8, device=run.device).unsqueeze(0) % model.get_input_embeddings().weight.shape[0]
        with torch.no_grad(), evaluating(model), overheard(found) as told:
            model.get_decoder()(**isolated(model, {"input_ids": ids}))
        for path, mixture in found.items():
            if path not in told or not is_softmax(told[path], mixture.number):
                raise InputError(
                    f"objective 'uoe' needs routers whose weights are a softmax of what they answer first, and the one "
                    f"of {path!r} in {type(model).__name__} is not"
                )

    def setup(self, run: Run) -> Sequence[Change]:
        """Choose, and tell."""
        shares = attribution(run, self.of)
        layer = max(shares, key=lambda path: shares[path].max().item())
        s = shares[layer]
        changes = self.narrow(run.model, layer, int(s.argmax()))
        trained = sum(p.numel() for p in run.trainable().values())
        log.warning(
            "objective 'uoe': expert %d of %r gets %.1f %% of what is to be forgotten, of %d experts; %s parameters "
            "are trained, it and its router", self.expert, layer, 100 * s.max().item(), len(s), f"{trained:,}",
        )  # fmt: skip
        return changes

    def restructure(self, run: Run, state: Mapping[str, Any]) -> Sequence[Change]:
        if self.layer or not state["layer"]:  # a rewind; a state from before step 0
            return ()
        return self.narrow(run.model, state["layer"], state["expert"])

    def narrow(self, model: nn.Module, layer: str, expert: int) -> list[Change]:
        """From now on this expert and its router are all that is trained."""
        mixture = mixtures(model)[layer]
        before = {name for name, p in model.named_parameters() if p.requires_grad}  # split_off freezes the stacks
        own, kept = set(split_off(mixture, expert).parameters()), set(mixture.router.parameters())
        changes = []
        for name, p in model.named_parameters():
            if p in own:
                changes.append(Change(name, None, p))
            elif name in before and p not in kept:
                p.requires_grad_(False)
                changes.append(Change(name, p, None))
        self.layer, self.expert = layer, expert
        return changes

    def metrics(self) -> dict[str, int]:
        """Which expert it is, for the log; layers are counted as the numbers in their names."""
        layer = next((int(part) for part in self.layer.split(".") if part.isdigit()), 0)
        return {"chosen_layer": layer, "chosen_expert": self.expert}

    def state_dict(self) -> dict[str, Any]:
        return {"layer": self.layer, "expert": self.expert}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """`restructure` has done it."""


@torch.no_grad()
def attribution(run: Run, of: Forgetting) -> dict[str, Tensor]:
    """s [E] float64 of each mixture, by its path.

    Raises:
        InputError: there is nothing to forget.
    """
    source: Any = run.source
    model: Any = run.model
    found = mixtures(model)
    sums = {path: torch.zeros(m.number, dtype=torch.float64, device=run.device) for path, m in found.items()}
    tokens = examples = 0
    with evaluating(model), overheard(found) as told:
        for drawn in source.batches(run.micro):
            batch = {name: column.to(run.device) for name, column in drawn.items()}
            counted = told_tokens(of, batch)
            length = per_example(counted.long(), batch)
            first = length.cumsum(0) - length + tokens < TOKENS  # whole examples, however the rows are cut
            length = length * first
            here = counted & per_token(first, batch)
            if bool(here.any()):
                model.get_decoder()(**isolated(model, batch))
                each = per_token(1 / length.clamp(min=1).double(), batch)[here]
                for path, answer in told.items():
                    g = probabilities(answer).double().view(*here.shape, -1)
                    sums[path] += (each.unsqueeze(1) * g[here]).sum(0)
            tokens, examples = tokens + int(length.sum()), examples + int((length > 0).sum())
            if tokens >= TOKENS:
                break
    if not examples:
        raise InputError("objective 'uoe' finds nothing to forget by which to choose an expert")
    return {path: s / examples for path, s in sums.items()}


class UOE(nn.Module):
    """See the module docstring.

    Attributes:
        of: ℓ. chosen: the part of the run.
    """

    couples: ClassVar[Couples] = "none"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.of = config, config.loss()
        self.chosen = Chosen(self.of)
        self.parts = {"uoe": self.chosen}
        self.reference, self.columns, self.trade_off = self.of.reference, self.of.columns, self.of.trade_off
        self.hold = self.of.hold

    def check(self, run: Run) -> None:
        """Refuse what ℓ refuses."""
        self.of.check(run)

    def prepare(self, run: Run, batch: Batch) -> Batch:
        """As ℓ does.

        Raises:
            InputError: no expert is chosen.
        """
        if not self.chosen.layer:
            raise InputError("objective 'uoe' has chosen no expert yet; call run.setup() before the first step")
        return self.of.prepare(run, batch)

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Those of ℓ; `anchor` [B] int64: tokens."""
        return self.of.count(batch) | {"anchor": per_example(told_tokens(self.of, batch).long(), batch)}

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        layer, expert = self.chosen.layer, self.chosen.expert
        if not layer:  # a forward that is only sized
            loss = self.of(model, batch)
            return Loss(loss.value | {"anchor": torch.zeros_like(loss.value["retain"])}, loss.metrics)
        with overheard({layer: mixtures(model)[layer]}) as told:
            loss = self.of(model, batch)
        counted = told_tokens(self.of, batch)
        gap = distances(probabilities(told[layer]), expert).view(counted.shape)
        anchor = per_example(torch.where(counted, gap, 0).double(), batch)
        loss.value["anchor"] = (self.config.anchor * anchor).to(loss.value["retain"].dtype)
        if "share/anchor" in batch:
            sent = (told[layer][2] == expert).any(-1).view(counted.shape) & counted
            for name, each in (("router_gap", anchor.detach()), ("routed", per_example(sent.double(), batch))):
                loss.metrics[name] = (batch["share/anchor"] * each).sum()
        return loss


def build(config: Config) -> nn.Module:
    return UOE(config)
