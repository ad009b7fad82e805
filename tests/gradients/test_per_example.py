"""The estimator `per-example` through the real step."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fallline.contracts import Batch, Couples, Loss
from fallline.errors import InputError, NonFiniteError
from fallline.gradients import backprop, per_example
from fallline.objectives import causal
from fallline.step import Run, take_step
from fallline.tokens import token_losses

from .test_backprop import WORDS, Fixed, Texts, draw


class Keeps:
    """A part that reads norms and keeps the step's signals."""

    reads = frozenset({"example_grad_norm", "example_loss"})
    seen: Any = None

    def after_step(self, run: Run, signals: Any) -> tuple[()]:
        self.seen = signals
        return ()


class KeepsTerms(Keeps):
    reads = frozenset({"example_term_grad_norm"})


class TwoTerms(nn.Module):
    """Even examples count in one term, all in the other; the second has a parameter of its own."""

    couples: ClassVar[Couples] = "none"

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(1, 1, bias=False).double()

    def count(self, batch: Batch) -> dict[str, Tensor]:
        even = (batch["example_id"] % 2 == 0).long()
        return {"even": even, "all": torch.ones_like(even)}

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        rows = token_losses(model, batch).sum(1)
        even = (batch["example_id"] % 2 == 0).to(rows)
        return Loss({"even": rows * even, "all": self.scale(rows[:, None] / 10).squeeze(1).square()})


def run(estimator: Any, *, micro: int = 11, part: Any = None, objective: Any = None, packed: bool = False) -> Run:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    config = LlamaConfig(vocab_size=WORDS, hidden_size=16, intermediate_size=20, num_hidden_layers=1, **heads)
    model = LlamaForCausalLM(config).double()
    objective = objective or causal.build(causal.Config())
    params = [p for p in [*model.parameters(), *objective.parameters()] if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=0.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    sampler = Fixed(draw(packed, w2=0.5, w3=2.0))
    parts = {} if part is None else {"part": part}
    return Run(model, objective, Texts(), sampler, estimator, optimizer, schedule, micro, parts=parts)


def build() -> Any:
    return per_example.build(per_example.Config())


def grads(one: Run) -> dict[str, Tensor]:
    return {name: p.grad for name, p in one.trainable().items() if p.grad is not None}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("micro", [11, 4, 1])
def test_gradient_and_norms(micro: int, packed: bool) -> None:
    plain, part = run(backprop.build(backprop.Config()), packed=packed), Keeps()
    ours = run(build(), micro=micro, part=part, packed=packed)
    take_step(plain)
    take_step(ours)
    for name, g in grads(plain).items():
        assert torch.allclose(grads(ours)[name], g, rtol=1e-6, atol=1e-9), name
    wanted = []
    whole = run(backprop.build(backprop.Config()), packed=packed)
    batch = whole.source(whole.sampler.draw(0, torch.Generator()), torch.Generator())
    d = whole.sampler.draw(0, torch.Generator())
    batch |= {"example_id": d.ids, "weight": d.weight.double()}
    rows = (
        whole.objective(whole.model, batch).value["nll"] * batch["weight"] / whole.objective.count(batch)["nll"].sum()
    )
    for row in rows:
        found = torch.autograd.grad(row, list(whole.model.parameters()), retain_graph=True, materialize_grads=True)
        wanted.append(torch.cat([g.flatten() for g in found]).norm() * len(rows))
    assert torch.allclose(part.seen["example_grad_norm"], torch.stack(wanted), rtol=1e-6, atol=1e-9)


def test_nobody_reads_nothing_is_watched() -> None:
    plain, ours = run(backprop.build(backprop.Config())), run(build())
    ours.model.model.layers[0].mlp = Odd()
    plain.model.model.layers[0].mlp = Odd()
    for one in (plain, ours):
        take_step(one)
    assert all(torch.equal(g, grads(plain)[name]) for name, g in grads(ours).items())


class Odd(nn.Module):
    """A layer that nothing is known about."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.w = nn.Parameter(torch.randn(16, dtype=torch.float64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w


def test_terms_one_at_a_time() -> None:
    part = KeepsTerms()
    ours = run(build(), part=part, objective=TwoTerms())
    take_step(ours)
    plain = run(backprop.build(backprop.Config()), objective=TwoTerms())
    take_step(plain)
    for name, g in grads(plain).items():
        assert torch.allclose(grads(ours)[name], g, rtol=1e-6, atol=1e-9), name
    found = part.seen["example_term_grad_norm"]
    assert found.shape == (11, 2)
    assert (found[1::2, 0] == 0).all()
    problem_params = list(plain.trainable().values())
    d = plain.sampler.draw(0, torch.Generator())
    batch = plain.source(d, torch.Generator()) | {"example_id": d.ids, "weight": d.weight.double()}
    values, counts = plain.objective(plain.model, batch).value, plain.objective.count(batch)
    for t, term in enumerate(("even", "all")):
        for b, row in enumerate(values[term] * batch["weight"] / counts[term].sum()):
            each = torch.autograd.grad(row, problem_params, retain_graph=True, materialize_grads=True)
            wanted = 11 * torch.cat([g.flatten() for g in each]).norm()
            assert torch.allclose(found[b, t], wanted, rtol=1e-6, atol=1e-9), (term, b)


def test_an_unknown_layer_stops_the_first_step() -> None:
    one = run(build(), part=Keeps())
    one.model.model.layers[0].mlp = Odd()
    one.model.model.layers[0].mlp.w.requires_grad_(True)
    one.optimizer.add_param_group({"params": [one.model.model.layers[0].mlp.w]})
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp is a Odd"):
        take_step(one)


class SeesAll(causal.Causal):
    """Says that examples are independent, and weighs each by the mean of all."""

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        rows = super().forward(model, batch).value["nll"]
        return Loss({"nll": rows * rows.mean()})


def test_examples_that_see_each_other_are_refused_at_every_step() -> None:
    one = run(build(), part=Keeps(), objective=SeesAll())
    for _ in range(2):
        with pytest.raises(InputError, match="not those of one example"):
            take_step(one)


def test_the_first_micro_batch_with_two_examples_is_tried() -> None:
    one = run(build(), part=Keeps(), objective=SeesAll(), micro=4)
    one.sampler = Fixed(draw(ids=[1]))
    take_step(one)
    one.sampler = Fixed(draw(ids=[1, 3, 5]))
    with pytest.raises(InputError, match="not those of one example"):
        take_step(one)


def test_a_gradient_that_is_not_finite_is_told_as_ever() -> None:
    one = run(build(), part=Keeps())
    with torch.no_grad():
        one.model.model.norm.weight[0] = torch.nan
    with pytest.raises(NonFiniteError, match="example ids"):
        take_step(one)
