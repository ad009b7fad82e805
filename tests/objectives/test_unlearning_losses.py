"""The unlearning family: limits, signs, TRL, streams cut in any way, adapters, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fallline.adapters import attach
from fallline.adapters.layers import disabled
from fallline.catalog import find
from fallline.contracts import Draw
from fallline.errors import InputError
from fallline.gradients.per_example import PerExampleNorms
from fallline.isolation import isolated
from fallline.objectives.flat import PAIRS, Config
from fallline.objectives.forgetting import REFERENCE, Told
from fallline.reference import Reference
from fallline.step import Run, take_step
from pairs import Whole, batch_of, draws, llama, logps, source, streamed
from step.helpers import assert_left_as_found, gradients, make

from .rows.unlearning import ROWS
from .test_common import Capped
from .test_common import made as gpt2
from .test_preference_trl import TOLERANCE
from .test_preference_trl import dpo as trl_dpo

METHODS = sorted({row.id for row in ROWS})
PULLED = ["ga", "kl-retain", "npo", "flat"]  # linear; with a rule of its own; a column; two terms of pairs


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FALLLINE_CACHE", str(tmp_path / "cache"))


def objective(id: str, **options: Any) -> Any:
    module = find("objective", id).load()
    return module.build(module.Config.from_mapping(options, id))


def told(s: Tensor, n: Tensor | None = None, logp_ref: Tensor | None = None, mean_p: Tensor | None = None) -> Told:
    ones = torch.ones_like(s)
    return Told(s, ones if n is None else n, -s if logp_ref is None else logp_ref, ones if mean_p is None else mean_p)


def slope(id: str, s: Tensor, n: Tensor, logp_ref: Tensor, **options: Any) -> Tensor:
    """∂forget/∂s, before coefficients."""
    s = s.clone().requires_grad_()
    value = objective(id, forget=1.0, **options).link(told(s, n, logp_ref))["forget"]
    (found,) = torch.autograd.grad(value.sum(), s)
    return found


def some() -> tuple[Tensor, Tensor, Tensor]:
    """s, |y| and log π_ref of forty answers."""
    g = torch.Generator().manual_seed(0)
    s, ref = (torch.rand(40, generator=g, dtype=torch.float64) * 60 for _ in range(2))
    return s, torch.randint(1, 9, (40,), generator=g).double(), -ref


def test_negative_preferences_fade_between_ascent_and_nothing() -> None:
    s, n, ref = some()
    torch.testing.assert_close(slope("npo", s, n, ref, beta=1e-5), -torch.ones_like(s), rtol=1e-3, atol=0)
    torch.testing.assert_close(slope("simnpo", s, n, ref, beta=1e-5), -1 / n, rtol=1e-3, atol=0)
    for beta in (0.1, 1.0):  # w = 2 π^β / (π^β + π_ref^β)
        weight = 2 / (1 + torch.exp(beta * (ref + s)))
        torch.testing.assert_close(slope("npo", s, n, ref, beta=beta), -weight)
    far = torch.full_like(s, 1e4)
    assert slope("npo", far, n, ref).abs().max() < 1e-12
    start = objective("npo", beta=0.3).link(told(s))["forget"]  # π = π_ref
    torch.testing.assert_close(start, torch.full_like(s, 2 / 0.3 * math.log(2)))
    once, twice = (objective("simnpo", delta=1.0).link(told(k * s, k * n))["forget"] for k in (1, 2))
    torch.testing.assert_close(once, twice)


def test_npo_is_trl_s_dpo_whose_chosen_answer_has_not_moved() -> None:
    """Chosen answers without a token have ratio 0."""
    drawn = [((prompt, []), lost) for (prompt, _), lost in draws()]
    beta = 0.3
    wanted, grads = trl_dpo(drawn, "sigmoid", beta)
    found = streamed([(lost,) for _, lost in drawn], [])
    made, model = objective("npo", beta=beta, retain=0.0), llama(torch.float32)
    run: Any = SimpleNamespace(reference=Reference(llama(torch.float32, seed=1), "trl"))
    batch = made.prepare(run, batch_of(found))
    loss = made(model, batch).value["forget"].mean()
    loss.backward()
    torch.testing.assert_close(loss.detach().float() * beta / 2, wanted, **TOLERANCE)
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad * beta / 2, grad, **TOLERANCE)


#: f of each divergence.
CONVEX: dict[str, Any] = {
    "kl": lambda u: u * u.log(),
    "pearson": lambda u: (u - 1) ** 2,
    "jensen-shannon": lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
    "jeffrey": lambda u: (u - 1) * u.log(),
    "reverse-kl": lambda u: -u.log(),
    "hellinger": lambda u: (u.sqrt() - 1) ** 2,
    "neyman": lambda u: (1 - u) ** 2 / u,
    "total-variation": lambda u: (u - 1).abs() / 2,
}


@pytest.mark.parametrize("kind", CONVEX)
def test_a_divergence_is_its_convex_conjugate_and_pulls_the_right_way(kind: str) -> None:
    g, conjugate = PAIRS[kind]
    v = torch.linspace(1e-3, 0.999, 30, dtype=torch.float64)
    u = torch.logspace(-6, 3, 400_001, dtype=torch.float64)
    f = CONVEX[kind](u)
    best = torch.stack([(u * t - f).max() for t in g(v)])
    torch.testing.assert_close(conjugate(v), best, rtol=0, atol=1e-4 if kind == "total-variation" else 1e-7)
    made = objective("flat", divergence=kind)
    p = torch.cartesian_prod(v, v).requires_grad_()
    value = made.link(told(p[:, 0], mean_p=p))
    (down,) = torch.autograd.grad(sum(x.sum() for x in value.values()), p)
    assert down[:, 1].max() < 0 < down[:, 0].min(), "the refusal is learned, the answer forgotten"
    assert set(PAIRS) == set(CONVEX)
    assert Config().divergence == "total-variation"


def streams(number: int = 5, kept: int = 4) -> Any:
    """Answers to forget, each with a refusal, and others to keep."""
    return streamed(draws(number), [(first,) for first, _ in draws(kept, 1)] if kept else [])


def run(made: Any, found: Any, micro: int = 99, packed: bool = True, **more: Any) -> Run:
    """A run over all examples, with a reference that is another model."""
    given: dict[str, Any] = {"net": llama(), "reference": Reference(llama(seed=1), "another")} | more
    return make(objective=made, source=found, sampler=Whole(found, packed), micro=micro, **given)


@pytest.mark.parametrize("id", PULLED)
def test_packing_and_accumulation_change_nothing(id: str) -> None:
    """Not even micro-batches of one stream alone."""
    found, made, seen = streams(), objective(id), []
    for micro, packed in ((99, True), (1, True), (99, False), (2, False)):
        here = run(made, found, micro, packed)
        seen.append((take_step(here), gradients(here)))
    (first, grads), *others = seen
    names = {"loss", "forget_nll", "retain_kl" if id == "kl-retain" else "retain_nll"} | {"refusal_nll"} & first.keys()
    assert names <= first.keys()
    for signals, other in others:
        for name in names:
            torch.testing.assert_close(signals[name], first[name], rtol=1e-7, atol=1e-9)
        for name, g in grads.items():
            torch.testing.assert_close(other[name], g, rtol=1e-6, atol=1e-7 * g.abs().max().item())


def test_with_an_adapter_the_reference_is_the_model_without_it() -> None:
    """The same as with a copy; gradients of single examples; and blocks that are run a second time."""
    found, seen = streams(), []
    for kind in ("copy", "off", "checkpointed"):
        model = llama()
        copy = Reference(model, "begin")
        attach(model, "lora", rank=2)
        for name, p in model.named_parameters():
            if "lora_B" in name or name.endswith(".B"):
                p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2), dtype=p.dtype)
        if kind == "checkpointed":
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        made = objective("npo", keep="kl")
        made.reads, made.observe = frozenset({"example_grad_norm"}), lambda run, signals: None
        here = run(
            made, found, 2, net=model, optimizer=sgd, estimator=PerExampleNorms(),
            reference=copy if kind == "copy" else Reference(model, "begin", disabled),
        )  # fmt: skip
        seen.append((take_step(here), gradients(here)))
        assert seen[-1][0]["retain_kl"] > 1e-3
    (first, grads), *others = seen
    assert grads
    for signals, other in others:
        torch.testing.assert_close(signals["example_grad_norm"], first["example_grad_norm"], rtol=1e-6, atol=1e-9)
        for name, g in grads.items():
            torch.testing.assert_close(other[name], g, rtol=1e-6, atol=1e-9)


def sgd(named: dict[str, Any]) -> Any:
    return torch.optim.SGD([p for p in named.values() if p.requires_grad], lr=0.1)


@pytest.mark.parametrize("kind", [None, Capped], ids=["plain", "capped"])
def test_the_divergence_is_torch_s_and_nothing_at_the_start(kind: Any) -> None:
    model, began = (gpt2(*[kind] * bool(kind), seed=seed) for seed in (0, 1))
    found = streams()
    batch = {k: v[:, :16] if v.dim() == 2 else v for k, v in batch_of(found).items()}
    batch = {k: v % 23 if k == "input_ids" else v for k, v in batch.items()}
    batch["labels"] = batch["labels"].where(batch["labels"] < 23, 3)
    made = objective("kl-retain", forget=1e-300)
    for first, far in ((began, True), (model, False)):
        made.hold(Reference(first, "began"))
        value = made(model, batch).value["retain"]
        (slope,) = torch.autograd.grad(value.sum(), [model.lm_head.weight])
        assert (slope.abs().max() > 1e-3) == far
        if not far:
            assert value.abs().max() < 1e-12
            assert slope.abs().max() < 1e-12
            continue
        kept = (batch["domain"][batch["segment"].clamp(min=0)] == 1) & (batch["labels"] >= 0) & (batch["segment"] >= 0)
        inputs = isolated(model, batch)
        said, wanted = (m(**inputs).logits[kept].log_softmax(-1) for m in (model, first))
        torch.testing.assert_close(value.sum(), F.kl_div(said, wanted, log_target=True, reduction="sum"))


def test_an_answer_that_is_the_refusal_and_ascent_beside_descent() -> None:
    drawn = [(first, first) for first, _ in draws(3)]
    model, batch = llama(), batch_of(streamed(drawn, [(first,) for first, _ in draws(2, 1)]))
    value = objective("flat")(model, batch).value
    torch.testing.assert_close(value["template"], -value["forget"])
    grads = torch.autograd.grad(value["template"].sum() + value["forget"].sum(), list(model.parameters()))
    assert max(g.abs().max() for g in grads) < 1e-12
    for id, sign in (("ga", -1), ("graddiff", -1), ("idk", 1)):
        found = objective(id)(model, batch).value
        causal = objective("causal")(model, batch | {"labels": objective(id).asked(batch)}).value["nll"].double()
        torch.testing.assert_close(found["forget"], torch.where(batch["domain"] == 0, sign * causal, 0))
        if id != "ga":
            torch.testing.assert_close(found["retain"], torch.where(batch["domain"] == 1, causal, 0))


def test_only_answers_to_forget_are_asked_of_the_reference() -> None:
    found, made = streams(), objective("npo")
    reference, batch = Reference(llama(seed=1), "another"), batch_of(streams())
    asked: list[int] = []
    with reference.model() as model:
        reference.logps(batch_of(streams(1, 1)))  # tries the head
        model.get_decoder().register_forward_pre_hook(lambda m, a, k: asked.append(1), with_kwargs=True)
    column = made.prepare(run(made, found, reference=reference), batch)[REFERENCE]
    assert len(asked) == 5
    with torch.no_grad():
        wanted = logps(llama(seed=1), draws(5))[:, 0]
    torch.testing.assert_close(column[batch["domain"] == 0].sort().values, wanted.sort().values)
    assert not column[batch["domain"] == 1].any()


@pytest.mark.parametrize("id", METHODS)
def test_a_step_without_examples_and_what_prepare_leaves(id: str) -> None:
    here = run(objective(id), streams())
    nobody = Draw(torch.zeros(0).long(), torch.zeros(0))
    here.sampler = type("Nobody", (), {"draw": lambda self, step, rng: nobody})()
    assert take_step(here)["loss"] == 0
    assert_left_as_found(run(objective(id), streams()), "objective")


def test_what_is_refused() -> None:
    found, alone = streams(), streams(kept=0)
    plain = streamed([(first,) for first, _ in draws(5)], [(first,) for first, _ in draws(4, 1)])
    with pytest.raises(InputError, match=r"data does not say what; use data: {name: unlearning, forget: …}"):
        make(net=llama(), objective=objective("ga"), source=source(draws()))
    with pytest.raises(InputError, match="compares with the model as the run began"):
        run(objective("npo"), found, reference=None)
    for id in ("graddiff", "kl-retain", "npo", "simnpo", "idk"):
        with pytest.raises(InputError, match=r"nothing to keep; give data: {retain: …}"):
            run(objective(id), alone)
    for id in ("idk", "flat"):
        with pytest.raises(InputError, match=r"the data has none; give data: {refusals: …}"):
            run(objective(id), plain)
    for id, options in (("npo", {"retain": 0.0}), ("ga", {}), ("flat", {})):
        signals = take_step(run(objective(id, **options), alone))
        assert "forget_nll" in signals
        assert "retain_nll" not in signals
    with pytest.raises(InputError, match="its share of each stream; use sampler: uniform"):
        make(net=llama(), objective=objective("ga"), source=found)
    with pytest.raises(InputError, match="'keep' has no effect unless 'retain' is above 0"):
        objective("npo", retain=0.0, keep="kl")


def test_cards_say_what_the_classes_declare() -> None:
    for id in METHODS:
        card, made = find("objective", id).card, objective(id)
        assert card.couples == made.couples
        assert made.reference == any(need.startswith("a reference") for need in card.needs)
        assert "SmolLM2" in card.checked
        assert not made.state_dict()
