"""The objective `uoe`: choice, anchor and step written from the equations on one sequence at a time, and what must not
move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fallline.adapters import attach
from fallline.errors import InputError
from fallline.experts import Stack, is_softmax, mixtures, probabilities
from fallline.objectives import uoe
from fallline.objectives.uoe import attribution, distances
from fallline.optim import adamw, create
from fallline.optim.precision import low_precision
from fallline.reference import Reference
from fallline.step import Run, ask, take_step
from mixtures import mixture
from pairs import Whole, draws, llama, objective, order_of, streamed
from step.helpers import assert_left_as_found, equal, gradients, make, saved

FORGET: Any = [*draws(5), (([3, 4], []), ([3, 4], [5]))]  # with refusals; the last asks nothing of its answer
RETAIN: Any = [(first,) for first, _ in draws(4, 1)]
DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FALLLINE_CACHE", str(tmp_path / "cache"))


def run(made: Any = None, net: Any = None, micro: int = 99, packed: bool = True, **more: Any) -> Run:
    net, found = mixture() if net is None else net, streamed(FORGET, RETAIN)
    begun = Reference(mixture(dtype=DOUBLE, seed=1), "another")
    given = {"optimizer": lambda named: create("adamw", net, lr=1e-2, weight_decay=0.3), "reference": begun}
    return make(
        net=net, objective=made or objective("uoe", of="graddiff"), source=found, sampler=Whole(found, packed),
        micro=micro, **given | more,
    )  # fmt: skip


# The reference: one sequence at a time, full logits, gates from what goes into the routers.


def said(model: Any, sequence: tuple[list[int], list[int]]) -> tuple[Tensor, list[Tensor]]:
    """Σ −log p of the answer, and g [tokens, E] of each layer."""
    prompt, answer = sequence
    inputs: list[Tensor] = []
    routers = [layer.mlp.gate for layer in model.model.layers]
    hooks = [r.register_forward_pre_hook(lambda m, args: inputs.append(args[0])) for r in routers]
    logits = model(torch.tensor([prompt + answer])).logits[0].double()
    for hook in hooks:
        hook.remove()
    scores = [(h @ r.weight.t()).double().exp() for h, r in zip(inputs, routers, strict=True)]
    at = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    nll = [logits[t].exp().sum().log() - logits[t, y] for t, y in zip(at, answer, strict=True)]
    return sum(nll, torch.zeros((), dtype=DOUBLE)), [e / e.sum(1, keepdim=True) for e in scores]


def shares(model: Any, sequences: list[Any]) -> list[Tensor]:
    """s of each layer."""
    found = [said(model, one)[1] for one in sequences]
    return [sum(g[layer].mean(0) for g in found) / len(found) for layer in range(2)]


@pytest.mark.parametrize(("micro", "packed"), [(99, True), (1, True), (2, False)])
def test_the_choice_is_the_equation_over_the_first_examples_whole(
    micro: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, here = mixture(dtype=DOUBLE), run(net=mixture(dtype=DOUBLE), micro=micro, packed=packed)
    order = [i for i in order_of(here.source) if i < len(FORGET)]
    asked = [FORGET[i][0] for i in order if FORGET[i][0][1]]
    for limit in (100_000, 12):
        monkeypatch.setattr(uoe, "TOKENS", limit)
        sizes = torch.tensor([len(p) + len(a) for p, a in asked])
        used = asked[: int((sizes.cumsum(0) - sizes < limit).sum())]
        assert (len(used) < len(asked)) == (limit == 12)
        with torch.no_grad():
            wanted = shares(model, used)
        found = attribution(here, here.objective.of)
        for s, w in zip(found.values(), wanted, strict=True):
            torch.testing.assert_close(s, w, rtol=1e-6, atol=0)
            assert s.sum().item() == pytest.approx(1, abs=1e-6)
    monkeypatch.undo()
    here.setup()
    whole = torch.stack(shares(model, asked)).argmax().item()
    layer, expert = divmod(int(whole), 4)
    assert here.parts["uoe"].metrics() == {"chosen_layer": layer, "chosen_expert": expert}


@pytest.mark.parametrize("base", ["graddiff", "npo"])
@pytest.mark.parametrize(("micro", "packed"), [(99, True), (1, True), (2, False)])
def test_loss_and_gradient_are_the_equation(base: str, micro: int, packed: bool) -> None:
    options: dict[str, Any] = {"forget": 0.7, "retain": 1.3}
    made = objective("uoe", of=base, options=options, anchor=0.6)
    here = run(made, mixture(dtype=DOUBLE), micro, packed)
    model, began = mixture(dtype=DOUBLE), mixture(dtype=DOUBLE, seed=1)
    here.setup()
    layer, expert = here.parts["uoe"].metrics().values()
    batch, problem, _ = ask(here)
    order, examples = order_of(here.source), [*FORGET, *RETAIN]
    values: dict[str, list[tuple[float, Tensor, int]]] = {"forget": [], "retain": [], "anchor": []}
    for weight, b in zip(batch["weight"].tolist(), batch["example_id"].tolist(), strict=True):
        i = order[b]
        answer = examples[i][0]
        if not answer[1]:
            continue
        s, g = said(model, answer)
        labels = len(answer[1])
        if i >= len(FORGET):
            values["retain"].append((weight, 1.3 * s, labels))
            continue
        with torch.no_grad():
            ref = said(began, answer)[0]
        npo = -0.7 * 2 / 0.1 * (1 / (1 + (-0.1 * (s - ref)).exp())).log()
        values["forget"].append((weight, npo, 1) if base == "npo" else (weight, -0.7 * s, labels))
        far = sum((x - int(k == expert)) ** 2 for k, x in enumerate(g[layer].unbind(1)))
        values["anchor"].append((weight, 0.6 * far.sum(), len(far)))
    loss: Any = sum(w * v / sum(n for *_, n in rows) for rows in values.values() for w, v, _ in rows)
    assert values["anchor"][0][1] > 0.1
    assert problem().item() == pytest.approx(loss.item(), rel=1e-6)
    loss.backward()
    home = model.model.layers[layer].mlp
    wanted = [home.gate.weight.grad, home.experts.gate_up_proj.grad[expert], home.experts.down_proj.grad[expert]]
    for (name, g), w in zip(gradients(here).items(), wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


def test_without_an_anchor_it_is_the_loss_itself_on_fewer_parameters() -> None:
    here, plain = run(objective("uoe", of="graddiff", anchor=0)), run(objective("graddiff"))
    here.setup()
    (layer, expert), seen = here.parts["uoe"].metrics().values(), [take_step(r) for r in (here, plain)]
    for name in ("loss", "forget_nll", "retain_nll"):
        assert torch.equal(seen[0][name], seen[1][name])
    whole = gradients(plain)
    for name, g in gradients(here).items():
        home = name.replace(f"expert_{expert}.", "")
        assert torch.equal(g, whole[home] if home == name else whole[home][expert])
    assert f"layers.{layer}." in name


def test_a_router_that_is_all_for_one_has_no_anchor() -> None:
    g = probabilities((torch.tensor([[0.0, 1e4, 0, 0], [0, 0, 0, 0]]),))
    assert distances(g, 1).tolist() == [0, 0.75]
    assert distances(g, 2).tolist() == [2, 0.75]


def test_the_anchor_holds_what_ascent_lets_go() -> None:
    ends = []
    for anchor in (0.0, 10.0):
        here = run(objective("uoe", of="ga", anchor=anchor))
        here.setup()
        seen = [take_step(here)["router_gap"].item() for _ in range(12)]
        ends.append(seen[-1] / seen[0])
    assert ends[1] < 0.9 * min(1, ends[0])


def followed(kind: str, id: str, dtype: torch.dtype = torch.float32, checkpointing: bool = False) -> tuple[Run, Any]:
    """A run of three steps, and the model's state before."""
    net = mixture(kind, dtype=dtype)
    if checkpointing:
        net.gradient_checkpointing_enable({"use_reentrant": False})
    if dtype == torch.bfloat16:
        config = adamw.Config(lr=1e-2, weight_decay=0.3)
        here = run(net=net, optimizer=lambda named: low_precision(lambda p: adamw.build(config, p, seed=0), net))
    else:
        here = run(net=net, optimizer=lambda named: create(id, net, lr=1e-2, weight_decay=0.3), micro=2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.train()
    here.setup()
    for _ in range(3):
        take_step(here)
    return here, before


@pytest.mark.parametrize(
    ("kind", "id", "dtype"),
    [
        ("Qwen2Moe", "adamw", torch.float32),
        ("Qwen2Moe", "muon", torch.float32),
        ("Qwen2Moe", "adamw", torch.bfloat16),
        ("Mixtral", "adamw", torch.float32),
        ("GptOss", "adamw", torch.float32),
    ],
)
def test_all_else_stays_to_the_bit(kind: str, id: str, dtype: torch.dtype) -> None:
    here, before = followed(kind, id, dtype)
    after, chosen = here.model.state_dict(), here.parts["uoe"]
    assert list(after) == list(before), "the state is that of a whole model"
    router = chosen.layer.replace("experts", "router" if kind == "GptOss" else "gate")
    for name, value in after.items():
        rows = [i for i, (a, b) in enumerate(zip(value, before[name], strict=True)) if not torch.equal(a, b)]
        if name.startswith(router + "."):
            assert rows
        else:
            assert rows == ([chosen.expert] if name.startswith(chosen.layer) else []), name
    trained = {name.replace(f".expert_{chosen.expert}", "") for name in here.trainable()}
    assert trained == {name for name in after if name.startswith((router + ".", chosen.layer))}


def test_checkpointed_activations_are_the_same() -> None:
    (one, _), (two, _) = (followed("Qwen2Moe", "adamw", checkpointing=on) for on in (False, True))
    assert equal(saved(one)["model"], saved(two)["model"])


def test_a_run_that_goes_on_is_the_run_to_the_bit() -> None:
    whole = run()
    whole.setup()
    for _ in range(2):
        take_step(whole)
    whole.mark("here")
    take_step(whole)
    state = saved(whole)
    take_step(whole)
    later = run()
    later.load_state_dict(state)
    take_step(later)
    assert equal(saved(later), saved(whole))
    whole.rewind("here")
    take_step(whole)
    take_step(whole)
    assert equal(saved(whole), saved(later))


def test_a_stack_has_second_derivatives_by_its_part() -> None:
    stack = torch.randn(3, 2, 2, dtype=DOUBLE)
    part = stack[1].clone().requires_grad_()

    def through(x: Tensor) -> Tensor:
        return (Stack.apply(stack, x, 1) ** 3).sum()  # type: ignore[no-untyped-call, no-any-return]

    (g,) = torch.autograd.grad(through(part), part, create_graph=True)
    torch.testing.assert_close(g, 3 * part**2)


def test_prepare_leaves_all_as_found_and_needs_a_choice() -> None:
    here = run(objective("uoe"))
    with pytest.raises(InputError, match="has chosen no expert yet"):
        take_step(here)
    here.setup()
    assert_left_as_found(here, "objective")
    batch = ask(here)[0]
    assert {"reference_logp"} <= batch.keys()
    fresh = objective("uoe", of="ga")
    assert not fresh(mixture(), batch).value["anchor"].any(), "a forward that is sized"


def test_softmax_routers_are_told_from_others() -> None:
    scores = 2 * torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    for k in (1, 2):
        g, at = scores.softmax(1).topk(k)
        one_by_one = scores.sigmoid().gather(1, at)
        for weights in (g, 2.5 * g, g / g.sum(1, keepdim=True), scores.topk(k).values.softmax(1)):
            assert is_softmax((scores, weights, at), 4)
            assert is_softmax((scores, weights.bfloat16(), at), 4)
        assert not is_softmax((scores, one_by_one, at), 4)
    assert not is_softmax((scores, one_by_one / one_by_one.sum(1, keepdim=True), at), 4)
    assert not is_softmax((scores, g, at), 5)
    assert not is_softmax(scores, 4)
    assert [list(mixtures(model)) for model in (llama(), mixture("GptOss"))] == [
        [], ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"],
    ]  # fmt: skip


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="LlamaForCausalLM has none that is known"):
        run(net=llama())
    with pytest.raises(InputError, match=r"needs routers whose weights are a softmax .* Glm4MoeForCausalLM is not"):
        run(net=mixture("Glm4Moe", topk_group=1, n_group=1))
    with pytest.raises(InputError, match="is frozen; leave out the adapter"):
        run(net=attach(mixture(), "lora", rank=2))
    compiled = mixture()
    compiled.get_decoder().compile()
    with pytest.raises(InputError, match="leave out compile"):
        run(net=compiled)
    private = type("Private", (), {"secret": 1, "gives": frozenset(), "repeatable": False})
    with pytest.raises(InputError, match="a private run does not cover"):
        run(estimator=private())
    with pytest.raises(InputError, match=r"which the optimizer SGD cannot follow"):
        run(optimizer=lambda named: torch.optim.SGD(list(named.values()), lr=0.1))
    for of in ("lat", "uoe", "dpo"):
        with pytest.raises(InputError, match=f"must be an unlearning objective that makes no attack.*'{of}' is not"):
            objective("uoe", of=of)
    with pytest.raises(InputError, match=r"objective 'npo' has no option 'bta'.*beta"):
        objective("uoe", options={"bta": 1})
    with pytest.raises(InputError, match="'options' must be options of 'npo' by name, got 3"):
        objective("uoe", options=3)
    here = run()
    here.source = streamed([(([3, 4], []),)], RETAIN)
    with pytest.raises(InputError, match="finds nothing to forget"):
        here.setup()
