"""The margin family: equations, slopes, TRL, and that no cut into rows or micro-batches changes anything."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fallline.catalog import find
from fallline.contracts import Draw
from fallline.errors import InputError
from fallline.gradients.per_example import PerExampleNorms
from fallline.objectives.kto import Z
from fallline.objectives.margin import REFERENCE, pairs
from fallline.step import take_step
from pairs import batch_of, draws, llama, logps, objective, order_of, run, source
from preference_rules import ROWS, P
from step.helpers import assert_left_as_found, gradients, make
from step.toys import Texts

EACH = [(id, options) for id, row in ROWS.items() for options in row.options]
each = pytest.mark.parametrize(("id", "options"), EACH, ids=[f"{id}-{i}" for i, (id, _) in enumerate(EACH)])
methods = pytest.mark.parametrize("id", list(ROWS))
kinds = pytest.mark.parametrize("id", ["dpo", "cpo", "sppo", "kto"])  # one term; one by labels; one a side; a column


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FALLLINE_CACHE", str(tmp_path / "cache"))


def values(number: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """log π and log π_ref, far and near, and label counts: [B, 2] each. Here every link's bends are met."""
    g = torch.Generator().manual_seed(0)
    n = torch.randint(1, 9, (number, 2), generator=g)
    scale = 10 ** torch.linspace(-1, 1.3, number, dtype=torch.float64).unsqueeze(1)
    logp, ref = (-torch.rand(number, 2, generator=g, dtype=torch.float64) * n * scale for _ in range(2))
    return logp, ref, n


Z0 = 0.7


def columns_of(made: Any, ref: Tensor) -> dict[str, Tensor]:
    """What `prepare` would add."""
    known = {REFERENCE: ref, Z: ref.new_full((len(ref),), Z0)}
    return {name: known[name] for name in made.columns}


@each
def test_value_and_slopes_are_the_equations(id: str, options: dict[str, Any]) -> None:
    made, (logp, ref, n) = objective(id, **options), values()
    logp.requires_grad_()
    columns = columns_of(made, ref)
    got = made.link(pairs(logp, n, columns))
    assert list(got) == list(made.terms)
    (slopes,) = torch.autograd.grad(sum(v.sum() for v in got.values()), logp)
    for b in range(len(n)):
        p = P(*logp[b].tolist(), *ref[b].tolist(), *n[b].tolist())
        true, d_w, d_l = ROWS[id].rule(p, **options, **({"z": Z0} if id == "kto" else {}))
        assert {k: v[b].item() for k, v in got.items()} == pytest.approx(true, rel=1e-10, abs=1e-12)
        assert (-slopes[b, 0].item(), slopes[b, 1].item()) == pytest.approx((d_w, d_l), rel=1e-9, abs=1e-12)
    assert torch.autograd.gradcheck(lambda logp: tuple(made.link(pairs(logp, n, columns)).values()), logp)


@kinds
def test_packing_and_accumulation_change_nothing(id: str) -> None:
    found, made = source(draws()), objective(id)
    seen = []
    for micro, packed in ((99, True), (1, True), (99, False), (2, False)):
        here = run(made, found, micro, packed)
        signals = take_step(here)
        seen.append((signals, gradients(here)))
    (first, grads), *others = seen
    assert first["reward_accuracy"] > 0
    for signals, other in others:
        for name in ("loss", "chosen_logp", "rejected_logp", "reward_margin", "reward_accuracy"):
            torch.testing.assert_close(signals[name], first[name], rtol=1e-9, atol=1e-9)
        for name, g in grads.items():
            torch.testing.assert_close(other[name], g, rtol=1e-6, atol=1e-9 * g.abs().max().item())


@torch.no_grad()
def mismatch(drawn: Any, order: list[int]) -> float:
    """z₀ of all pairs: the prompt of each, with the answers of the one that is half of them further on."""
    far = [order[(b + len(order) // 2) % len(order)] for b in range(len(order))]
    crossed = [tuple((drawn[i][0][0], drawn[j][side][1]) for side in (0, 1)) for i, j in zip(order, far, strict=True)]
    pi, ref = (logps(llama(seed=seed), crossed) for seed in (0, 1))
    found = (pi - ref).mean().item()
    assert found > 0.1, "nothing is cut off"
    return found


@kinds
def test_the_step_is_the_equation_on_full_logits(id: str) -> None:
    drawn = draws()
    found, made = source(drawn), objective(id)
    here = run(made, found, 99)
    signals = take_step(here)
    order = order_of(found)
    weight = here.sampler.draw(0, torch.Generator()).weight.tolist()
    with torch.no_grad():
        pi, ref = (logps(llama(seed=seed), [drawn[i] for i in order]).tolist() for seed in (0, 1))
    n = [[len(answer) for _, answer in drawn[i]] for i in order]
    more = {"z": mismatch(drawn, order)} if id == "kto" else {}
    parts = [ROWS[id].rule(P(*pi[b], *ref[b], *n[b]), **more)[0] for b in range(len(n))]
    loss = 0.0
    for term, what in made.terms.items():
        count = len(n) if what == "pairs" else sum(w for w, _ in n)
        loss += sum(w * part[term] for w, part in zip(weight, parts, strict=True)) / count
    assert signals["loss"].item() == pytest.approx(loss, rel=1e-9)
    mean = sum(w * a for w, (a, _) in zip(weight, pi, strict=True)) / len(n)
    assert signals["chosen_logp"].item() == pytest.approx(mean, rel=1e-9)


@methods
def test_a_pair_without_labels_and_an_equal_pair(id: str) -> None:
    """The first has no part in anything, the second no slope in what compares; nothing is NaN."""
    made, drawn = objective(id), draws(4)
    drawn[1] = (drawn[1][0], drawn[1][0])
    found = source(drawn)
    model, batch = llama(), batch_of(found)
    batch |= columns_of(made, logps(llama(seed=1), [drawn[i] for i in order_of(found)]).detach())
    order = order_of(found)
    empty, equal = order.index(0), order.index(1)
    batch["labels"] = batch["labels"].masked_fill((batch["segment"] == empty) & (batch["side"] == 1), -100)
    batch["share/pair"] = torch.ones(4, dtype=torch.float64)
    loss = made(model, batch)
    for term, count in made.count(batch).items():
        assert count[empty] == 0
        assert loss.value[term][empty] == 0
        assert (count > 0).sum() == 3
    total = sum(v.sum() for v in loss.value.values())
    assert all(g.isfinite().all() for g in torch.autograd.grad(total, list(model.parameters()), retain_graph=True))
    if "pair" in loss.value:
        grads = torch.autograd.grad(loss.value["pair"][equal], list(model.parameters()))
        assert max(g.abs().max() for g in grads) < 1e-10
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert all(not count.any() for count in made.count(batch).values())
    assert all(not value.any() for value in made(model, batch).value.values())


def test_what_the_losses_are_where_the_model_is_the_reference() -> None:
    logp, _, n = values()
    at = {id: made.link(pairs(logp, n, columns_of(made, logp))) for id in ROWS if (made := objective(id)).reference}
    zero = torch.zeros(len(n), dtype=torch.float64)
    torch.testing.assert_close(at["dpo"]["pair"], zero + math.log(2))
    torch.testing.assert_close(at["dpop"]["pair"], zero + math.log(2))
    kto = objective("kto").link(pairs(logp, n, {REFERENCE: logp, Z: zero}))
    torch.testing.assert_close(kto["chosen"] + kto["rejected"], zero + 0.5)
    torch.testing.assert_close(at["ipo"]["pair"], zero + 1 / 0.2**2)
    torch.testing.assert_close(at["sppo"]["chosen"] + at["sppo"]["rejected"], zero + 1 / (2 * 0.01**2))
    same = n[:, :1].expand(-1, 2)
    torch.testing.assert_close(
        objective("rdpo").link(pairs(logp, same, {REFERENCE: logp * 2}))["pair"],
        objective("dpo").link(pairs(logp, same, {REFERENCE: logp * 2}))["pair"],
    )


def test_swapped_preferences() -> None:
    """The gradient turns round, but for its weight σ(−z), which becomes σ(z)."""
    logp, ref, n = values()
    logp.requires_grad_()
    there, back = (
        torch.autograd.grad(
            objective("dpo").link(pairs(logp[:, order], n[:, order], {REFERENCE: ref[:, order]}))["pair"].sum(), logp
        )[0]
        for order in ([0, 1], [1, 0])
    )
    z = 0.1 * ((logp - ref)[:, 0] - (logp - ref)[:, 1]).detach()
    torch.testing.assert_close(there / torch.sigmoid(-z)[:, None], -back / torch.sigmoid(z)[:, None])


def test_the_engine_for_single_examples_takes_pairs() -> None:
    """Each pair's gradient norm is that of a step on it alone."""
    found, made = source(draws()), objective("dpo")
    here = run(made, found, 2, estimator=PerExampleNorms())
    made.reads, made.observe = frozenset({"example_grad_norm"}), lambda run, signals: None
    norms = take_step(here)["example_grad_norm"]
    for b in (0, 3):
        alone = run(objective("dpo"), found, 9)
        alone.sampler = type("One", (), {"draw": lambda self, step, rng, b=b: Draw(torch.tensor([b]), torch.ones(1))})()
        grads = gradients((take_step(alone), alone)[1])
        weight = here.sampler.draw(0, torch.Generator()).weight[b]
        norm = torch.stack([g.norm() for g in grads.values()]).norm()
        torch.testing.assert_close(norms[b], weight * norm, rtol=1e-6, atol=0)  # rotary angles are float32


@kinds
def test_a_step_without_examples(id: str) -> None:
    here = run(objective(id), source(draws()), 9)
    nobody = Draw(torch.zeros(0).long(), torch.zeros(0))
    here.sampler = type("Nobody", (), {"draw": lambda self, step, rng: nobody})()
    assert take_step(here)["loss"] == 0


def test_the_only_pair_of_an_evaluation_is_not_measured_against_itself() -> None:
    """kto's z₀ is of other prompts' answers; where there are none it says nothing."""
    here, alone = run(objective("kto"), source(draws()), 9), source(draws(1))
    own = (logps(llama(), draws(1)) - logps(llama(seed=1), draws(1))).mean().item()
    assert own > 0.1, "it would count"
    here.source = alone
    assert here.objective.prepare(here, batch_of(alone))[Z].tolist() == [0.0]


def test_prepare_leaves_all_as_found_and_refusals() -> None:
    found = source(draws())
    for id in ("dpo", "kto"):
        assert_left_as_found(run(objective(id), found, 9), "objective")
    with pytest.raises(InputError, match=r"no such pairs; use data: {name: preference, path: …}"):
        make(net=llama(), objective=objective("dpo"), source=Texts())
    with pytest.raises(InputError, match="compares with the model as the run began"):
        make(net=llama(), objective=objective("dpo"), source=found)
    with pytest.raises(InputError, match="one pair only"):
        run(objective("kto"), source(draws(1)), 9)
    private = type("Private", (PerExampleNorms,), {"repeatable": False})()
    with pytest.raises(InputError, match="none can be private by itself"):
        run(objective("kto"), found, 9, estimator=private)


def test_cards_say_what_the_classes_declare() -> None:
    for id in ROWS:
        card, made = find("objective", id).card, objective(id)
        assert card.couples == made.couples
        assert made.reference == any(need.startswith("a reference") for need in card.needs)
        assert "effect not shown" in card.checked
        assert not made.state_dict()
