"""The objective `adv-comp-sum`: its equation on full logits, its attack, and the comp-sum loss where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fallline.adapters import attach
from fallline.errors import InputError
from fallline.gradients import per_example
from fallline.objectives.adv_comp_sum import COMPETITORS, DELTA, AdvCompSum
from fallline.step import ask, take_step
from step.helpers import assert_left_as_found

from .rows import WORDS, Row
from .rows.likelihood import comp_sum
from .test_common import Capped, built, made, run

OPTIONS: dict[str, Any] = {"tau": 1.3, "scale": 2.0, "weight": 0.7, "radius": 0.3, "steps": 3, "competitors": 4}


def row(**changes: Any) -> Row:
    return Row("adv-comp-sum", lambda logits, batch, o: {}, OPTIONS | changes)


class Tau:
    tau = OPTIONS["tau"]


def reference(model: Any, batch: Any, rivals: int) -> dict[str, Tensor]:
    """Values from full logits at x and x', a token at a time."""
    x = model.get_input_embeddings()(batch["input_ids"])
    clean, moved = (model(inputs_embeds=e).logits for e in (x, x + batch[DELTA]))
    found: dict[str, list[Tensor]] = {"comp-sum": [], "smooth": []}
    for b, labels in enumerate(batch["labels"].tolist()):
        sums = {term: clean.new_zeros(()) for term in found}
        for t, y in enumerate(labels):
            if y < 0:
                continue
            others = [k for k in clean[b, t].argsort(descending=True).tolist() if k != y][:rivals]
            change = torch.stack(
                [(moved[b, t, y] - moved[b, t, k]) - (clean[b, t, y] - clean[b, t, k]) for k in others]
            )
            w = batch["token_weight"][b, t]
            sums["comp-sum"] = sums["comp-sum"] + w * comp_sum(clean[b, t] / OPTIONS["scale"], y, Tau)
            sums["smooth"] = sums["smooth"] + w * OPTIONS["weight"] * change.norm()
        for term, value in sums.items():
            found[term].append(value)
    return {term: torch.stack(values) for term, values in found.items()}


def flat(model: nn.Module) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


@pytest.mark.parametrize("rivals", [4, WORDS + 5], ids=["some", "all"])
def test_values_and_gradients_are_the_equation(rivals: int) -> None:
    model, what = made(), row(competitors=rivals)
    here = run(what, model)
    batch, problem, _ = ask(here)
    assert batch[COMPETITORS].shape[2] == min(rivals, WORDS - 1)
    value = reference(model, batch, rivals)
    found = here.objective(model, batch).value
    for term, v in value.items():
        torch.testing.assert_close(found[term].detach(), v.detach(), rtol=1e-5, atol=1e-5)
    count = here.objective.count(batch)["smooth"].sum()
    loss = sum((v * batch["weight"]).sum() / count for v in value.values())
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    problem()
    torch.testing.assert_close(flat(model), wanted, rtol=1e-6, atol=1e-6 * wanted.abs().max().item())


def test_however_a_step_is_cut_its_attack_and_gradient_are_those_of_one_batch() -> None:
    found, bends = [], []
    for micro, packed in ((8, False), (3, False), (5, True), (1, True)):
        model = made()
        signals = take_step(run(row(), model, micro=micro, packed=packed))
        found.append(flat(model))
        bends.append(signals["loss"])
    for other, loss in zip(found[1:], bends[1:], strict=True):
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(loss, bends[0], rtol=1e-9, atol=0)


def test_the_attack_stays_in_the_ball_and_bends_more() -> None:
    seen = []
    for steps in (0, 1, 4):
        model = made()
        batch, _, _ = ask(run(row(steps=steps), model, packed=True))
        radius = OPTIONS["radius"] * model.get_input_embeddings().weight.norm(dim=1).mean()
        norm = batch[DELTA].norm(dim=2)
        assert (norm <= radius * (1 + 1e-9)).all()
        assert (norm[batch["segment"] < 0] == 0).all()
        seen.append(built(row())(model, batch).value["smooth"].sum().item())
    assert (norm > 0.999 * radius).sum() > (batch["labels"] >= 0).sum() / 2, "the ball is met"
    assert min(seen[1:]) > 1.5 * seen[0]


@pytest.mark.parametrize("change", [{"radius": 0.0}, {"weight": 0.0}], ids=str)
@pytest.mark.parametrize("tau", [1.0, 1.3, 0.5])
def test_without_a_ball_or_a_weight_it_is_comp_sum(change: dict[str, float], tau: float) -> None:
    model, plain = made(), made()
    ours = take_step(run(row(tau=tau, scale=1.0, **change), model))
    theirs = take_step(run(Row("comp-sum", lambda logits, batch, o: {}, {"tau": tau}), plain))
    torch.testing.assert_close(ours["loss"], theirs["loss"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(flat(model), flat(plain), rtol=1e-9, atol=1e-9)


def test_both_inputs_meet_the_same_dropout_and_the_step_is_the_same_when_asked_again() -> None:
    model = made()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    _, problem, _ = ask(run(row(radius=1e-9), model, micro=3))
    assert sum(problem.table(i)["smooth"].abs().sum() for i in range(3)) < 1e-6
    _, problem, _ = ask(run(row(), model, micro=3))
    assert torch.equal(problem.value(), problem.value())
    _, again, _ = ask(run(row(), model, micro=3))
    assert torch.equal(problem.value(), again.value())


def test_gradcheck() -> None:
    model, objective = made(), built(row(competitors=3))
    batch, _, _ = ask(run(row(competitors=3), model))
    names = [name for name, _ in model.named_parameters()]

    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return torch.stack([v.sum() for v in objective(self.model, batch).value.values()]).sum()

    scored = Scored()

    def loss(*values: Tensor) -> Tensor:
        given = {f"model.{name}": v for name, v in zip(names, values, strict=True)}
        return torch.func.functional_call(scored, given, ())

    assert torch.autograd.gradcheck(loss, tuple(model.parameters()), fast_mode=True, atol=1e-4)


def test_where_nothing_is_asked_nothing_is_learned() -> None:
    what = row()

    class Silent:
        rows = None

        def __init__(self) -> None:
            self.own = what.source()

        def __len__(self) -> int:
            return len(self.own)

        def __call__(self, draw: Any, rng: torch.Generator) -> Any:
            return {n: c.fill_(-100) if n == "labels" else c for n, c in self.own(draw, rng).items()}

    model = made()
    assert take_step(run(what, model, micro=3, source=Silent()))["loss"] == 0
    assert not flat(model).any()


def test_an_adapter_per_example_norms_and_low_precision() -> None:
    """Of a trained head single examples cannot be told apart, which is said by name."""
    norms = []
    for kind in (torch.float64, torch.bfloat16):
        model = attach(made(dtype=kind), "lora", rank=2)
        one = run(row(), model, micro=3, packed=True, estimator=per_example.build(per_example.Config()))
        one.objective.reads, one.objective.observe = frozenset({"example_grad_norm"}), lambda run, signals: None
        norms.append(take_step(one)["example_grad_norm"].double())
    assert (norms[0] - norms[1]).norm() < 0.2 * norms[0].norm()
    model = made()
    one = run(row(), model, estimator=per_example.build(per_example.Config()))
    one.objective.reads, one.objective.observe = frozenset({"example_grad_norm"}), lambda run, signals: None
    with pytest.raises(InputError, match=r"'lm_head\.weight'"):
        take_step(one)


def test_prepare_leaves_all_as_found_and_refusals() -> None:
    one = run(row(), made(dtype=torch.float32), micro=3)
    assert_left_as_found(one, "objective")
    with torch.no_grad():
        batch = one.objective.prepare(
            one, one.source(one.sampler.draw(0, torch.Generator()), torch.Generator()) | {"example_id": torch.arange(8)}
        )
    assert batch[DELTA].any()
    with pytest.raises(InputError, match="objective 'adv-comp-sum' needs logits that are a plain linear map"):
        run(row(), made(Capped))


def test_what_a_plan_is_told_is_what_prepare_adds() -> None:
    model = made()
    batch, _, _ = ask(run(row(), model, packed=True))
    objective: Any = built(row())
    assert isinstance(objective, AdvCompSum)
    for name, (shape, dtype) in objective.token_columns(model).items():
        assert (batch[name].shape[2:], batch[name].dtype) == (torch.Size(shape), dtype)
    assert F.one_hot(batch[COMPETITORS], WORDS).sum(2).max() == 1
