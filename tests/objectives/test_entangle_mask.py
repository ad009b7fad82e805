"""The objective `entangle-mask`: its equation on full logits, for every loss it masks, and the limits it must have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fallline.adapters import attach
from fallline.contracts import Draw
from fallline.errors import InputError
from fallline.gradients.entangle_norm import EntangleNorm
from fallline.gradients.per_example import PerExampleNorms
from fallline.objectives.entangle_mask import Config, EntangleMask, build
from fallline.step import take_step
from pairs import draws, llama, objective, order_of, run, source
from preference_rules import ROWS, P
from step.helpers import assert_left_as_found, gradients

MASKED = [id for id in ROWS if id != "kto"]
LIKELIHOODS = {"cpo": 1.0, "slic": 1.0, "orpo": 1.0, "rrhf": 1.0}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FALLLINE_CACHE", str(tmp_path / "cache"))


def made(of: str = "dpo", shut: bool = True, **options: Any) -> EntangleMask:
    """With a gate that is open for some tokens and shut for others."""
    found: Any = build(Config(width=16, of=of, **options)).double()
    if shut:
        with torch.no_grad():
            found.gate.weight.copy_(torch.randn(1, 16, generator=torch.Generator().manual_seed(5)))
            found.gate.bias.fill_(-0.7)
    return found


def tokens(model: Any, gate: nn.Module, pairs: Any) -> list[list[tuple[Tensor, Tensor]]]:
    """Of each answer, log p and μ of each label, from full logits, each sequence alone."""

    def one(prompt: list[int], answer: list[int]) -> tuple[Tensor, Tensor]:
        out = model(torch.tensor([prompt + answer]), output_hidden_states=True)
        at = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        logp = out.logits[0, at].double().log_softmax(-1)
        h = out.hidden_states[-1][0, at].detach().double()
        mu = 1 / (1 + (-(h @ gate.weight.double().t()).squeeze(1) - gate.bias.double()).exp())
        return logp[range(len(answer)), answer], mu

    return [[one(*sequence) for sequence in pair] for pair in pairs]


def reference(id: str, objective: EntangleMask, weight: list[float], drawn: Any) -> tuple[float, Tensor, float]:
    """The step's loss; something whose gradient is the loss's; and the mean of μ."""
    model, ref = llama(), llama(seed=1)
    ours, theirs = tokens(model, objective.gate, drawn), tokens(ref, objective.gate, drawn)
    n = [[len(answer) for _, answer in pair] for pair in drawn]
    labels, every = sum(w for w, _ in n), sum(map(sum, n))
    loss, linear, mean = 0.0, torch.zeros((), dtype=torch.float64), 0.0
    for b, factor in enumerate(weight):
        (w, mu_w), (l, mu_l) = ours[b]  # noqa: E741
        ref_w, ref_l = ((mu * x).sum().item() for (x, _), mu in zip(theirs[b], (mu_w, mu_l), strict=True))
        masked_w, masked_l = (mu_w * w).sum(), (mu_l * l).sum()
        terms, d_w, d_l = ROWS[id].rule(P(masked_w.item(), masked_l.item(), ref_w, ref_l, *n[b]))
        likelihood = LIKELIHOODS.get(id, 0.0)
        terms |= {"nll": -likelihood * w.sum().item()}
        mask = mu_w.sum() + mu_l.sum()
        for term, value in terms.items():
            loss += factor * value / (labels if term == "nll" else len(n))
        loss += factor * objective.config.sparsity * mask.item() / every
        # ref is masked as well, by a μ that is trained
        refs = [(mu * x.detach()).sum() for (x, _), mu in zip(theirs[b], (mu_w, mu_l), strict=True)]
        has = objective.masked.reference
        linear = linear + factor / len(n) * (
            -(d_w - likelihood) * (masked_w - has * refs[0]) + d_l * (masked_l - has * refs[1])
        )
        linear = linear - factor / labels * likelihood * w.sum()
        linear = linear + factor * objective.config.sparsity * mask / every
        mean += factor * mask.item() / every
    params = [*model.parameters(), *objective.gate.parameters()]
    return loss, torch.cat([g.flatten() for g in torch.autograd.grad(linear, params)]), mean


def flat(here: Any) -> Tensor:
    return torch.cat([g.flatten() for g in gradients(here).values()])


@pytest.mark.parametrize("id", MASKED)
def test_value_and_gradient_are_the_equation_however_the_step_is_cut(id: str) -> None:
    for micro, packed in ((99, True), (1, True), (2, False)) if id == "cpo" else ((3, True),):
        one = made(id, sparsity=0.7)
        here = run(one, source(draws()), micro, packed)
        drawn = [draws()[i] for i in order_of(here.source)]
        weights = here.sampler.draw(0, torch.Generator()).weight.tolist()
        loss, true, mean = reference(id, one, weights, drawn)
        assert 0.2 < mean / (sum(weights) / len(weights)) < 0.8, "the mask takes part"
        signals = take_step(here)
        assert signals["loss"].item() == pytest.approx(loss, rel=1e-6)
        assert signals["mask_mean"].item() == pytest.approx(mean, rel=1e-6)
        torch.testing.assert_close(flat(here), true, rtol=0, atol=2e-6 * true.abs().max().item())


@pytest.mark.parametrize("id", ["dpo", "cpo", "sppo"])
def test_an_open_mask_at_no_price_is_the_loss_itself(id: str) -> None:
    one = made(id, shut=False, sparsity=0.0)
    nn.init.constant_(one.gate.bias, 60.0)
    found = [run(what, source(draws()), 2) for what in (one, objective(id))]
    ours, plain = (take_step(here) for here in found)
    for name in ("loss", "chosen_logp", "rejected_logp", "reward_margin", "reward_accuracy"):
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-6, atol=1e-7)
    ours, plain = (gradients(here) for here in found)
    for name, g in plain.items():
        torch.testing.assert_close(ours[name], g, rtol=1e-5, atol=1e-6 * g.abs().max().item())


def test_it_begins_near_the_loss_itself_and_the_price_closes_it() -> None:
    assert torch.sigmoid(build(Config(width=4)).gate(torch.randn(3, 4))).tolist() == [[pytest.approx(0.98)]] * 3
    here = run(made(shut=False, sparsity=10.0), source(draws()), 9)
    means = [take_step(here)["mask_mean"].item() for _ in range(6)]
    assert means == sorted(means, reverse=True)
    assert means[-1] < 0.9 * means[0]


class Nobody:
    def draw(self, step: int, rng: torch.Generator) -> Draw:
        return Draw(torch.zeros(0).long(), torch.zeros(0))


def test_pairs_without_labels_and_equal_ones() -> None:
    (prompt, chosen), (_, rejected) = draws()[0]
    empty, alike = ((prompt, chosen), (prompt, [])), ((prompt, chosen), (prompt, chosen))
    for drawn in ([empty, empty], []):
        here = run(made(), source(drawn or draws()), 9)
        if not drawn:
            here.sampler = Nobody()
        assert take_step(here)["loss"] == 0
        assert not any(g.any() for g in gradients(here).values())
    here = run(made(sparsity=0.0), source([alike]), 9)
    take_step(here)
    assert flat(here).abs().max() < 1e-7
    both = run(made(), source([((prompt, chosen), (prompt, rejected)), empty]), 9)
    take_step(both)
    one = run(made(), source([((prompt, chosen), (prompt, rejected))]), 9)
    take_step(one)
    g, h = flat(both), flat(one)
    assert (g / g.norm() - h / h.norm()).abs().max() < 1e-6


def test_norms_of_examples() -> None:
    here, one = run(made(), source(draws()), 2, estimator=PerExampleNorms()), made()
    here.objective.reads = frozenset({"example_grad_norm"})
    here.objective.observe = lambda run, signals: None
    norms = take_step(here)["example_grad_norm"]
    weights = here.sampler.draw(0, torch.Generator()).weight
    plain = run(one, source(draws()), 9)
    plain.sampler = type("One", (), {"draw": lambda self, step, rng: Draw(torch.tensor([3]), weights[3:4])})()
    total = sum(len(a) + len(b) for (_, a), (_, b) in draws())
    labels = sum(len(answer) for _, answer in [draws()[i] for i in order_of(plain.source)][3])
    one.config = Config(width=16, sparsity=one.config.sparsity * labels * len(draws()) / total)  # one pair's labels
    take_step(plain)
    torch.testing.assert_close(norms[3], flat(plain).norm(), rtol=1e-5, atol=0)


def test_bfloat16_with_an_adapter() -> None:
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        one = made("simpo", sparsity=0.1).float()
        here = run(one, source(draws()), 2, net=attach(llama(dtype), "lora", rank=2))
        signals = take_step(here)
        found.append((signals["loss"].double(), flat(here).double()))
    (a, g), (b, h) = found
    assert b == pytest.approx(a.item(), rel=0.05)
    assert (g - h).norm() < 0.15 * g.norm()


def test_prepare_leaves_all_as_found_and_refusals() -> None:
    assert_left_as_found(run(made(), source(draws()), 9), "objective")
    with pytest.raises(InputError, match="'width' must be 16, this model's hidden size"):
        run(build(Config(width=8)), source(draws()), 9)
    with pytest.raises(InputError, match="such as dpo; 'kto' is not"):
        Config(width=8, of="kto")
    with pytest.raises(InputError, match="such as dpo; 'causal' is not"):
        Config(width=8, of="causal")
    with pytest.raises(InputError, match=r"unknown objective 'dop'.*dpo"):
        Config(width=8, of="dop")
    with pytest.raises(InputError, match=r"objective 'dpo' has no option 'bta'.*beta"):
        Config(width=8, options={"bta": 1})
    with pytest.raises(InputError, match="'options' must be options of 'dpo' by name, got 3"):
        Config(width=8, options=3)
    with pytest.raises(
        InputError, match=r"estimator 'entangle-norm' .* this objective is no function of two log-probabilities"
    ):
        run(made(), source(draws()), 9, estimator=EntangleNorm())


def test_options_reach_the_masked_loss() -> None:
    assert made(options={"beta": 0.5}).masked.config.beta == 0.5
    assert made("simpo").reference is False
    assert list(made().token_columns(nn.Module())) == ["reference_token_logp"]
