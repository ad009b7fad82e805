"""The estimator `entangle-norm`: its equation from one backward for each answer, its guarantee, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fallline.adapters import attach
from fallline.errors import InputError
from fallline.gradients import backprop, entangle_norm
from fallline.gradients.entangle_norm import weights
from fallline.objectives import causal
from fallline.step import take_step
from pairs import draws, llama, logps, objective, order_of, run, source
from preference_rules import ROWS, P
from step.helpers import gradients

COMPARING = [id for id in ROWS if id not in ("sppo", "kto")]
LIKELIHOODS = {"cpo": 1.0, "slic": 1.0, "orpo": 1.0, "rrhf": 1.0}
"""Weights of the term `nll`."""


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FALLLINE_CACHE", str(tmp_path / "cache"))


def estimator() -> Any:
    return entangle_norm.build(entangle_norm.Config())


def stepped(id: str, drawn: Any = None, micro: int = 99, packed: bool = True, net: Any = None, **more: Any) -> Any:
    here = run(objective(id), source(draws() if drawn is None else drawn), micro, packed, net, **more)
    return take_step(here), here


def flat(here: Any) -> Tensor:
    found = gradients(here)
    return torch.cat([found.get(n, torch.zeros_like(p)).flatten() for n, p in here.trainable().items()])


def each_alone(model: Any, pairs: Any) -> Tensor:
    """[B, 2, P], the gradient of each answer's log-probability."""
    params = [p for p in model.parameters() if p.requires_grad]
    rows = [torch.autograd.grad(v, params, retain_graph=True) for v in logps(model, pairs).flatten()]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).view(len(pairs), 2, -1)


def reference(id: str, here: Any, drawn: Any, g: Tensor) -> Tensor:
    """The equation, a pair at a time."""
    with torch.no_grad():
        pi, ref = (logps(llama(seed=seed), drawn).tolist() for seed in (0, 1))
    n = [[len(answer) for _, answer in pair] for pair in drawn]
    total, labels = torch.zeros(g.shape[2], dtype=torch.float64), sum(chosen for chosen, _ in n)
    for b, weight in enumerate(here.sampler.draw(0, torch.Generator()).weight.tolist()):
        _, d_w, d_l = ROWS[id].rule(P(*pi[b], *ref[b], *n[b]))
        likelihood = LIKELIHOODS.get(id, 0.0)
        d_w -= likelihood
        c, sign = (d_w * d_l) ** 0.5, 1 if d_w > 0 else -1
        w, l = g[b]  # noqa: E741
        total -= weight / len(n) * c * sign * (w / w.norm() - l / l.norm())
        total -= weight / labels * likelihood * w
    return total


@pytest.fixture(scope="module")
def alone() -> Tensor:
    return each_alone(llama(), [draws()[i] for i in order_of(source(draws()))])


@pytest.mark.parametrize("id", COMPARING)
def test_the_gradient_is_the_equation(id: str, alone: Tensor) -> None:
    plain = stepped(id, estimator=backprop.build(backprop.Config()))[0]["loss"]
    cuts = ((99, True), (1, True), (2, False)) if id == "cpo" else ((3, True),)
    for micro, packed in cuts:
        signals, here = stepped(id, None, micro, packed, estimator=estimator())
        true = reference(id, here, [draws()[i] for i in order_of(here.source)], alone)
        torch.testing.assert_close(flat(here), true, rtol=0, atol=1e-6 * true.abs().max().item())
        torch.testing.assert_close(signals["loss"], plain, rtol=1e-9, atol=0)


@pytest.mark.parametrize("id", [id for id in COMPARING if id not in LIKELIHOODS] + ["cpo", "slic"])
def test_no_chosen_answer_falls_and_no_rejected_one_rises(id: str) -> None:
    """Not even where plain descent does so: the answers of these pairs have a long end in common."""
    g, dragged = torch.Generator().manual_seed(0), 0
    for _ in range(3):
        prompt, end = (torch.randint(3, 40, (k,), generator=g).tolist() for k in (3, 8))
        first, second = torch.randperm(37, generator=g)[:2].add(3).tolist()
        pair = [((prompt, [first, *end]), (prompt, [second, *end]))]
        w, l = each_alone(llama(), pair)[0]  # noqa: E741
        made = objective(id, **({"alpha": 0.0} if id == "cpo" else {"anchor": 0.0} if id == "slic" else {}))
        for kind in (backprop.build(backprop.Config()), estimator()):
            here = run(made, source(pair), 9, estimator=kind)
            take_step(here)
            down = flat(here)
            # where the loss is content, as of `ipo` beyond its margin, it wants the reverse
            sign = 1 if (down @ (w - l)) <= 0 else -1
            chosen, rejected = (-sign * (down @ x / x.norm()) for x in (w, l))
            if kind.__class__ is backprop.Backprop:
                dragged += bool(chosen < 0 or rejected > 0)
            else:
                assert chosen >= -1e-6 * down.norm()
                assert rejected <= 1e-6 * down.norm()
    assert dragged or id == "slic", "plain descent does so as well"


def test_where_norms_are_equal_it_is_plain_descent_to_a_factor() -> None:
    g = torch.Generator().manual_seed(0)
    d, norm = torch.rand(5, 1, generator=g).double() * torch.tensor([[-1.0, 1.0]]), torch.full((5, 2), 3.0).double()
    torch.testing.assert_close(weights(norm, d, d), d / 3 + d)


def test_no_gradient_no_slope_no_label_and_equal_answers() -> None:
    """An answer of which the model is certain; a pair that is ordered; answers that are nothing, or the same."""
    D = torch.tensor([[-1.0, 1.0], [0.0, 0.0], [-1.0, 0.0]]).double()
    norm = torch.tensor([[0.0, 2.0], [1.0, 2.0], [0.0, 0.0]]).double()
    assert weights(norm, D, D * 0).tolist() == [[0, 0.5], [0, 0], [0, 0]]
    (prompt, chosen), (_, rejected) = draws()[0]
    empty, alike = ((prompt, chosen), (prompt, [])), ((prompt, chosen), (prompt, chosen))
    whole = ((prompt, chosen), (prompt, rejected))
    for drawn in ([empty], [empty, empty], [alike], [alike, empty]):
        signals, here = stepped("dpo", drawn, estimator=estimator())
        assert signals["loss"].isfinite()
        assert flat(here).abs().max() < 1e-7
    _, both = stepped("cpo", [whole, empty], estimator=estimator())
    _, one = stepped("cpo", [whole], estimator=estimator())
    torch.testing.assert_close(flat(both) / flat(both).norm(), flat(one) / flat(one).norm(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_and_an_adapter_are_near(dtype: torch.dtype) -> None:
    found = []
    for kind in (torch.float64, dtype):
        net = attach(llama(kind), "lora", rank=2)
        for name, p in net.named_parameters():
            if "lora_B" in name:
                p.data.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
        found.append(flat(stepped("simpo", None, 2, net=net, estimator=estimator())[1]).double())
    apart = (found[0] - found[1]).norm() / found[0].norm()
    assert apart < (0.15 if dtype is torch.bfloat16 else 1e-4)


def test_refusals() -> None:
    for made, message in (
        (objective("kto"), "each answer by itself; take dpo"),
        (objective("sppo"), "each answer by itself; take dpo"),
        (causal.build(causal.Config()), "this objective is no function of two log-probabilities; take dpo"),
    ):
        with pytest.raises(InputError, match=rf"estimator 'entangle-norm' .* {message}"):
            run(made, source(draws()), 9, estimator=estimator())
    made = objective("dpo")
    made.head = nn.Linear(1, 1)
    with pytest.raises(InputError, match=r"the objective trains 'objective\.head\.weight' as well"):
        run(made, source(draws()), 9, estimator=estimator())
