"""The objective `lat`: attack and step written from the equations with torch's Adam, and what no attack may change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from fallline.adapters import attach
from fallline.catalog import find
from fallline.contracts import Draw
from fallline.errors import InputError
from fallline.gradients.per_example import PerExampleNorms
from fallline.objectives.lat import DELTA, Steering, prompts
from fallline.step import Run, ask, take_step
from pairs import WORDS, Whole, draws, llama, streamed
from step.helpers import assert_left_as_found, gradients, make

from . import test_common as common
from .rows import Row
from .rows.unlearning import Labels, Streams, forgetting, nll

ATTACK: dict[str, Any] = {
    "places": (0, 1, 2), "radius": 0.8, "steps": 5, "rate": 0.2, "attack_toward": 0.7, "attack_away": 0.4,
    "toward": 0.6, "away": 0.9, "retain": 1.1,
}  # fmt: skip


def objective(**options: Any) -> Any:
    module = find("objective", "lat").load()
    return module.build(module.Config(**ATTACK | options))


def gpt2(seed: int = 0) -> Any:
    """In float64 from end to end, and unsure enough that some labels are nearly certain and others are not."""
    torch.manual_seed(seed)
    size = {"n_positions": 48, "n_embd": 8, "n_layer": 2, "n_head": 2, "bos_token_id": None, "eos_token_id": None}
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, tie_word_embeddings=False, **size, **rates)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5 * torch.randn(p.shape, dtype=torch.float64))
    return model


def streams(number: int = 5, kept: int = 4) -> Any:
    return streamed(draws(number), [(first,) for first, _ in draws(kept, 1)])


def run(made: Any, found: Any = None, micro: int = 99, packed: bool = True, **more: Any) -> Run:
    found = streams() if found is None else found
    sampler = Whole(found, packed)
    sampler.by_stream = True  # type: ignore[attr-defined]
    return make(objective=made, source=found, sampler=sampler, micro=micro, **{"net": gpt2()} | more)


def sgd(named: dict[str, Any]) -> Any:
    return torch.optim.SGD([p for p in named.values() if p.requires_grad], lr=0.1)


# The reference: one sequence at a time, through GPT-2's parts, full logits.

Told = tuple[list[int], list[int]]  # tokens, labels


def sequences(batch: Any, b: int) -> list[Told]:
    """Of example b, in order; one or two."""
    found = []
    for side in (0, 1):
        here = (batch["segment"] == b) & (batch["side"] == side)
        found.append((batch["input_ids"][here].tolist(), batch["labels"][here].tolist()))
    return [one for one in found if one[0]]


def prompt_of(labels: list[int]) -> int:
    return next(t for t, y in enumerate(labels) if y >= 0) + 1


def said(model: Any, one: Told, delta: Tensor | None) -> list[tuple[Tensor, int]]:
    """(log p [V], label) of each label; delta: [prompt, places, D]."""
    ids, labels = one
    body = model.transformer

    def moved(h: Tensor, place: int) -> Tensor:
        if delta is None:
            return h
        n = len(delta)
        return torch.cat([h[:, :n] + delta[:, place], h[:, n:]], 1)

    h = moved(body.wte(torch.tensor([ids])), 0) + body.wpe(torch.arange(len(ids)))
    for k, block in enumerate(body.h):
        h = moved(block(h), k + 1)
    logits = model.lm_head(body.ln_f(h))[0]
    return [(z - z.exp().sum().log(), y) for z, y in zip(logits, labels, strict=True) if y >= 0]


def likely(found: list[tuple[Tensor, int]]) -> Tensor:
    return sum((-z[y] for z, y in found), torch.zeros((), dtype=torch.float64))


def left(found: list[tuple[Tensor, int]]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for z, y in found:
        if z[y] >= -5:
            total = total - (1 - z[y].exp()).log()
    return total


def pushed(model: Any, answer: Told, refusal: Told, delta: Tensor, o: Any) -> Tensor:
    """What the attack lowers."""
    mine, good = said(model, answer, delta), said(model, refusal, delta)
    if not o.targeted:
        return -likely(good) / len(good)
    return o.attack_toward * likely(mine) / len(mine) + o.attack_away * left(good) / len(good)


def attack(model: Any, answer: Told, refusal: Told, o: Any) -> Tensor:
    n = prompt_of(answer[1])
    assert n == prompt_of(refusal[1])
    delta = torch.zeros(n, 3, 8, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=o.rate)
    for _ in range(o.steps):
        (delta.grad,) = torch.autograd.grad(pushed(model, answer, refusal, delta, o), delta)
        adam.step()
        with torch.no_grad():
            delta /= (delta.norm(dim=2, keepdim=True) / o.radius).clamp(min=1)
    return delta.detach()


def placed(batch: Any, b: int, side: int) -> Tensor:
    """δ in the column, of one sequence [tokens, places, D]."""
    return batch[DELTA][(batch["segment"] == b) & (batch["side"] == side)]


@pytest.mark.parametrize("targeted", [True, False])
def test_the_whole_step_is_the_equation(targeted: bool) -> None:
    model, made = gpt2(), objective(targeted=targeted)
    o, here = made.config, run(made, net=model, micro=2)
    batch, problem, _ = ask(here)
    value: dict[str, list[Tensor]] = {"refusal": [], "forget": [], "retain": []}
    edge, fell, ignored = 0, 0.0, 0
    for b, domain in enumerate(batch["domain"].tolist()):
        told = sequences(batch, b)
        zero = torch.zeros((), dtype=torch.float64)
        if domain == 1:
            assert not placed(batch, b, 0).any()
            row = [zero, zero, o.retain * likely(said(model, told[0], None))]
        else:
            delta = attack(model, *told, o)
            for side in (0, 1):
                column = placed(batch, b, side)
                torch.testing.assert_close(column[: len(delta)], delta, rtol=1e-6, atol=1e-8)
                assert not column[len(delta) :].any()
            before, after = (pushed(model, *told, d, o).item() for d in (torch.zeros_like(delta), delta))
            assert after < before
            fell += before - after
            edge += int((delta.norm(dim=2) > o.radius * (1 - 1e-9)).sum())
            answer, refusal = (said(model, one, delta) for one in told)
            ignored += sum(int(z[y] < -5) for z, y in answer)
            row = [o.toward * likely(refusal), o.away * left(answer), zero]
        for term, v in zip(value.values(), row, strict=True):
            term.append(v)
    assert (batch[DELTA].norm(dim=3) <= o.radius * (1 + 1e-12)).all()
    assert edge > 10, "the projection acts"
    assert fell > 1
    assert ignored, "a label that counts no more"

    count, total = made.count(batch), 0
    for term, rows in value.items():
        torch.testing.assert_close(made(model, batch).value[term].detach(), torch.stack(rows).detach())
        total = total + (torch.stack(rows) * batch["weight"]).sum() / count[term].sum()
    wanted = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    problem()
    for (name, p), g in zip(model.named_parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-6, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


def test_however_a_step_is_cut_its_attack_and_gradient_are_those_of_one_batch() -> None:
    seen = []
    for micro, packed in ((99, True), (1, True), (99, False), (2, False)):
        here = run(objective(), micro=micro, packed=packed)
        signals = take_step(here)
        seen.append((torch.stack([signals[n] for n in ("loss", "refusal_nll", "forget_away", "retain_nll")]), here))
    first, *others = [(told, gradients(here)) for told, here in seen]
    for told, grads in others:
        torch.testing.assert_close(told, first[0], rtol=1e-8, atol=1e-9)
        for name, g in first[1].items():
            torch.testing.assert_close(grads[name], g, rtol=1e-6, atol=1e-8)


def test_no_ball_is_no_attack_and_places_that_are_not_told_are_spread_out() -> None:
    seen = []
    for options in ({"steps": 0}, {"radius": 0.0}, {"radius": 1e-9}, {"places": None}):
        here = run(objective(**options))
        loss = take_step(here)["loss"]
        seen.append((loss, gradients(here)))
    (loss, plain), (same, none), (near, _), (far, _) = seen
    assert torch.equal(loss, same)
    assert all(torch.equal(none[name], g) for name, g in plain.items())
    assert near == pytest.approx(loss.item(), rel=1e-6)
    assert abs(far - loss) > 0.1
    made = objective(places=None)
    assert made._places(32) == (0, 9, 17, 25, 31)
    assert {n: max(made._places(n)) for n in (1, 2, 12)} == {1: 1, 2: 2, 12: 12}


#: Without an attack the objective is one of logits alone, whose common tests are those of all.
PLAIN = Row(
    "lat",
    forgetting(
        lambda answer, refusal, first, o: {
            "refusal": o.toward * nll(refusal),
            "forget": o.away * left([(z.log_softmax(0), y) for z, y in answer]),
        },
        (0, 1),
    ),
    {"steps": 0, "toward": 0.7, "away": 1.3, "retain": 0.6},
    source=Streams,
)


def test_the_reference_s_labels_are_of_the_family() -> None:
    z: Labels = [(torch.randn(WORDS, dtype=torch.float64), 3)]
    torch.testing.assert_close(nll(z), likely([(x.log_softmax(0), y) for x, y in z]))


@pytest.mark.parametrize("kind", [GPT2LMHeadModel, common.Capped])
def test_without_an_attack_it_does_what_every_objective_must(kind: Any) -> None:
    for packed in (False, True):
        common.test_equation(PLAIN, kind, packed, True)
    common.test_gradcheck(PLAIN, kind)
    common.test_where_nothing_is_asked_nothing_is_learned(PLAIN, kind)
    if kind is GPT2LMHeadModel:
        common.test_a_hessian_product_is_that_of_the_equation(PLAIN)
        common.test_norms_of_examples_are_those_of_one_backward_each(PLAIN)
        for scale in (0.0, 1e-3, 1e2):
            common.test_float32_is_near_float64_at_the_extremes(PLAIN, scale)


def test_what_is_all_but_certain_has_a_finite_value_and_slope() -> None:
    """−log(1 − p) of the odds: 1 − p is 0 in float32 from a margin of 17 on."""
    z = torch.zeros(3, 5, dtype=torch.float64)
    z[:, 2] = torch.tensor([90.0, 20.0, -4.0])
    y, kept = torch.arange(3).unsqueeze(1), torch.full((3,), 2)
    rule = Steering(kept, torch.ones(3, dtype=torch.bool))
    wanted = torch.tensor([90, 20, 0]) - torch.tensor([4, 4, 1]).log()
    value, slope = rule(z.float(), y, True)
    torch.testing.assert_close(value, wanted)
    exact = z.clone().requires_grad_()
    torch.testing.assert_close(rule.plain(exact, y).float(), wanted)
    (g,) = torch.autograd.grad(rule.plain(exact, y).sum(), exact)
    torch.testing.assert_close(slope, g.float())
    assert g[0].tolist() == pytest.approx([-0.25, -0.25, 1, -0.25, -0.25])
    assert not g[2].any()


def test_full_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    common.test_full_logits_never_exist_and_products_are_those_promised(PLAIN, monkeypatch)


def test_every_option_has_an_effect_of_its_own() -> None:
    changes: dict[str, Any] = {
        "targeted": False, "places": (0, 1), "radius": 0.3, "steps": 2, "rate": 0.1, "attack_toward": 2.0,
        "attack_away": 0.0, "toward": 0.1, "away": 0.0, "retain": 0.0,
    }  # fmt: skip
    assert changes.keys() == find("objective", "lat").load().Config.__dataclass_fields__.keys()
    seen = []
    for change in ({}, *({name: value} for name, value in changes.items())):
        here = run(objective(**change))
        take_step(here)
        seen.append(torch.cat([g.flatten() for g in gradients(here).values()]))
    for i, g in enumerate(seen):
        assert all((g - other).abs().max() > 1e-5 for other in seen[:i]), list(changes)[i - 1]


def test_adapters_checkpointed_blocks_and_norms_of_single_examples() -> None:
    seen = []
    for kind in ("plain", "checkpointed"):
        model = attach(llama(), "lora", rank=2)
        for name, p in model.named_parameters():
            if name.endswith(".B"):
                p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2), dtype=p.dtype)
        if kind == "checkpointed":
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        made = objective()
        made.reads, made.observe = frozenset({"example_grad_norm"}), lambda run, signals: None
        here = run(made, micro=2, net=model, optimizer=sgd, estimator=PerExampleNorms())
        seen.append((take_step(here)["example_grad_norm"], gradients(here)))
    (norms, grads), (again, others) = seen
    assert grads
    assert (norms > 0).all()
    torch.testing.assert_close(again, norms, rtol=1e-6, atol=1e-9)
    for name, g in grads.items():
        torch.testing.assert_close(others[name], g, rtol=1e-6, atol=1e-9)


def test_examples_that_lack_something_have_no_part_and_nothing_is_nan() -> None:
    """No answer; no refusal; no prompt; an answer that is the refusal."""
    forget = [
        (([3, 4], []), ([3, 4], [5])),
        (([3, 4], [6]), ([3, 4], [])),
        (([3], [6, 7]), ([3], [8])),
        (([3, 9], [6]), ([3, 9], [6])),
        (([3, 9], [6]), ([9, 3], [6])),
    ]
    found = streamed(forget, [(([3, 4], [5]),)])
    for options in ({}, {"targeted": False}, {"radius": 1e4, "rate": 1e3, "steps": 9}):
        made = objective(**options)
        here = run(made, found)
        batch, problem, _ = ask(here)
        count = made.count(batch)
        assert sorted(count["forget"].tolist()) == [0, 0, 0, 1, 1, 2]
        attacked = [bool(batch[DELTA][batch["segment"] == b].any()) for b in range(6)]
        same = {b for b in range(6) if sequences(batch, b)[0][0][:2] == [3, 9]}
        assert sum(attacked) in (2, 3), same
        assert batch[DELTA].isfinite().all()
        assert problem().isfinite()
    nobody = Draw(torch.zeros(0).long(), torch.zeros(0))
    here = run(objective())
    here.sampler = type("Nobody", (), {"draw": lambda self, step, rng: nobody})()
    assert take_step(here)["loss"] == 0


def test_prompts_end_where_sequences_part_or_something_was_asked() -> None:
    answer, refusal = [5, 6, 7, 8, 9], [5, 6, 7, 3]
    batch = {
        "input_ids": torch.tensor([[1, *answer, *refusal, 0]]),
        "side": torch.tensor([[0, *[0] * 5, *[1] * 4, -1]]),
        "segment": torch.tensor([[0, *[1] * 9, -1]]),
        "position_ids": torch.tensor([[0, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]),
    }
    asked = torch.full((1, 11), -100)
    both = torch.tensor([True, True])
    assert [t.tolist() for t in prompts(batch, asked, both)] == [[1, 2, 3], [6, 7, 8]]
    for at in (2, 7):  # in the first sequence, in the second
        some = asked.clone()
        some[0, at] = 1
        assert [t.tolist() for t in prompts(batch, some, both)] == [[1, 2], [6, 7]]
    assert not len(prompts(batch, asked, torch.tensor([True, False]))[0])


def test_prepare_leaves_all_as_found_and_the_model_answers_as_before() -> None:
    here = run(objective(), micro=2)
    here.model.train()
    assert_left_as_found(here, "objective")
    ids = torch.arange(6).unsqueeze(0)
    model, before = gpt2(), gpt2()(ids).logits
    batch, problem, _ = ask(run(objective(), net=model))
    problem.value()
    assert torch.equal(model(ids).logits, before)
    made: Any = objective()
    for name, (shape, dtype) in made.token_columns(model).items():
        assert (batch[name].shape[2:], batch[name].dtype) == (torch.Size(shape), dtype)
    assert objective(steps=0).token_columns(model) == {}
    half = llama(torch.bfloat16)
    assert take_step(run(objective(), net=half))["loss"].isfinite()


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match=r"'places' has 3, and GPT2LMHeadModel has layers 1 … 2"):
        run(objective(places=(0, 3)))
    for places in ((), (1, 1)):
        with pytest.raises(InputError, match=r"'places' must name at least one place, each once"):
            objective(places=places)
    with pytest.raises(InputError, match=r"the data has none; give data: {refusals: …}"):
        run(objective(), streamed([(first,) for first, _ in draws(5)], [(first,) for first, _ in draws(4, 1)]))
    config = find("objective", "lat").load().Config
    with pytest.raises(InputError, match="'rate' has no effect unless 'steps' is above 0"):
        config.from_mapping({"steps": 0, "rate": 1.0}, "objective 'lat'")
    model = gpt2()
    model.transformer.h = nn.Sequential(*model.transformer.h)
    with pytest.raises(InputError, match="needs a decoder with a list of its layers"):
        run(objective(), net=model)
