"""The probe `entangle`: gradients of single answers, what a small step does to them, and a run that does not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fallline.adapters import attach
from fallline.contracts import Batch, Loss
from fallline.errors import InputError
from fallline.objectives import causal
from fallline.objectives.margin import Margin
from fallline.probes.entangle import Config, Gram, build, look
from fallline.step import Run, ask, take_step
from pairs import draws, llama, logps, objective, order_of, run, source
from preference_rules import ROWS, P
from step.helpers import equal, gradients, saved


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FALLLINE_CACHE", str(tmp_path / "cache"))


def probed(one: Run) -> dict[str, float]:
    probe = build(Config(every=1))
    probe.check(one)
    assert probe.before_step(one) == ()
    return probe.metrics()


def truth(model: Any, pairs: Any) -> Tensor:
    """[B, 2, P], the gradient of each answer's log-probability, one backward each."""
    params = [p for p in model.parameters() if p.requires_grad]
    flat = [torch.autograd.grad(v, params, retain_graph=True) for v in logps(model, pairs).flatten()]
    return torch.stack([torch.cat([g.flatten() for g in one]) for one in flat]).view(len(pairs), 2, -1)


@pytest.fixture(scope="module")
def each_alone() -> Tensor:
    return truth(llama(), [draws()[i] for i in order_of(source(draws()))])


ANCHORS = {"cpo": 1.0, "slic": 1.0, "orpo": 1.0, "rrhf": 1.0}
"""What the likelihood of the chosen answer is weighed with."""


@pytest.mark.parametrize("id", list(ROWS))
def test_norms_products_and_slopes_are_those_of_one_backward_each(id: str, each_alone: Tensor) -> None:
    here = run(objective(id), source(draws()), micro=1)
    _, problem, _ = ask(here)
    found, (w, l) = look(problem), each_alone.unbind(1)  # noqa: E741
    for name, true in (("ww", w * w), ("ll", l * l), ("wl", w * l)):
        torch.testing.assert_close(getattr(found, name), true.sum(1), rtol=1e-6, atol=1e-9)
    assert not gradients(here)
    drawn = [draws()[i] for i in order_of(here.source)]
    with torch.no_grad():
        pi, ref = (logps(llama(seed=seed), drawn).tolist() for seed in (0, 1))
    n = [[len(answer) for _, answer in pair] for pair in drawn]
    z = {"z": problem.micro[0]["kto_z"][0].item()} if id == "kto" else {}
    for b, weight in enumerate(here.sampler.draw(0, torch.Generator()).weight.tolist()):
        _, d_w, d_l = ROWS[id].rule(P(*pi[b], *ref[b], *n[b]), **z)
        d_w += ANCHORS.get(id, 0) * (len(n) / sum(chosen for chosen, _ in n) - 1)  # it is counted by labels
        assert found.d_w[b].item() == pytest.approx(weight * d_w, rel=1e-6, abs=1e-9)
        assert found.d_l[b].item() == pytest.approx(weight * d_l, rel=1e-6, abs=1e-9)


def test_however_a_step_is_cut_the_probe_says_the_same() -> None:
    first, *others = (
        probed(run(objective("cpo"), source(draws()), micro, packed))
        for micro, packed in ((99, True), (1, True), (99, False), (2, False))
    )
    assert {f"entangle_{name}" for name in ("cosine", "ratio", "both_fall", "ideal")} <= first.keys()
    assert -1 < first["entangle_cosine"] < 1
    for other in others:
        assert other == pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize(("id", "rate"), [("dpo", 6e-4), ("sppo", 1.5e-6)])
def test_a_tiny_step_moves_the_answers_as_told_to_second_order(id: str, rate: float) -> None:
    """The error of the first order falls with the square of the step."""
    pair, errors = draws()[:1], []
    for eta in (rate, rate / 2):
        here = run(objective(id), source(pair), 9)
        told, before = probed(here), logps(here.model, pair).detach()[0]
        take_step(here)
        with torch.no_grad():
            for name, p in llama().named_parameters():
                here.model.get_parameter(name).copy_(p - eta * gradients(here)[name])
        moved = logps(here.model, pair).detach()[0] - before
        expected = eta * torch.tensor([told["entangle_chosen_move"], told["entangle_rejected_move"]]).double()
        assert (moved - expected).abs().max() < 1e-2 * expected.abs().max()
        errors.append((moved - expected).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_equal_answers_and_answers_without_labels(dtype: torch.dtype) -> None:
    (prompt, (chosen, _)), net = (draws()[0][0][0], (draws()[0][0][1], 0)), llama(dtype)
    alike = ((prompt, chosen), (prompt, chosen))
    same = probed(run(objective("dpo"), source([alike, alike]), 9, net=net))
    assert same["entangle_ratio"] == pytest.approx(1, abs=0.05 if dtype is torch.bfloat16 else 1e-5)
    assert same["entangle_chosen_move"] == same["entangle_rejected_move"] == 0
    assert same["entangle_ideal"] == same["entangle_both_fall"] == same["entangle_both_rise"] == 0
    empty = ((prompt, chosen), (prompt, []))
    assert probed(run(objective("dpo"), source([alike, empty]), 9, net=net))["entangle_ratio"] == pytest.approx(
        same["entangle_ratio"], rel=0.05
    )
    assert probed(run(objective("dpo"), source([empty, empty]), 9, net=net)) == {}


def test_the_cases() -> None:
    """‖g_w‖² = 1, ‖g_l‖² = 4 and the other way round, with products below, between, and, where d_w > d_l, above."""

    def one(ww: float, ll: float, wl: float, d_w: float = 1.0) -> dict[str, float]:
        return Gram(*torch.tensor([[ww], [ll], [wl], [d_w], [1.0]]).double()).told(0)

    names = ("ideal", "both_fall", "both_rise")
    assert [one(1, 4, 0.5)[n] for n in names] == [1, 0, 0]
    assert [one(1, 4, -1.5)[n] for n in names] == [1, 0, 0]
    assert [one(1, 4, 1.5)[n] for n in names] == [0, 1, 0]
    assert [one(4, 1, 1.5)[n] for n in names] == [0, 0, 1]
    assert [one(1, 4, 1.5, d_w=2.0)[n] for n in names] == [1, 0, 0]
    nothing = one(0, 4, 0)
    assert {"cosine", "ratio"}.isdisjoint(nothing)
    assert nothing["rejected_move"] == -4


def test_with_an_adapter_its_parameters_are_what_counts() -> None:
    net = attach(llama(), "lora", rank=2)
    for name, p in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, generator=torch.Generator().manual_seed(0))
    here = run(objective("simpo"), source(draws()), 2, net=net)
    found, g = look(ask(here)[1]), truth(net, [draws()[i] for i in order_of(here.source)])
    torch.testing.assert_close(found.wl, (g[:, 0] * g[:, 1]).sum(1), rtol=1e-4, atol=1e-6 * found.ww.max().item())


def test_a_probed_run_is_bit_identical() -> None:
    """Dropout and all."""
    ends: list[Any] = []
    for parts in ({}, {"entangle": build(Config(every=2))}):
        net = llama(torch.float32)
        for layer in net.model.layers:
            layer.self_attn.attention_dropout = 0.3
        here = run(objective("dpo"), source(draws()), 2, net=net, parts=parts)
        losses, seen = [], []
        for _ in range(3):
            losses.append(take_step(here)["loss"])
            seen += [part.metrics() for part in parts.values()]
        ends.append([losses, saved(here)["model"], saved(here)["optimizer"]])
    assert [bool(found) for found in seen] == [True, False, True]
    assert equal(*ends)


class Twice(Margin):
    """Asks for log-probabilities, and again."""

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        super().forward(model, batch)
        return super().forward(model, batch)


class Penalised(Margin):
    """With a term of its own."""

    terms = {"pair": "pairs", "size": "pairs"}  # noqa: RUF012

    def link(self, p: Any) -> dict[str, Tensor]:
        return {"pair": -p.delta, "size": self.size.expand_as(p.delta)}

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        self.size = sum(p.square().sum() for p in model.parameters())
        return super().forward(model, batch)


def test_refusals() -> None:
    with pytest.raises(InputError, match=r"probe 'entangle': the objective does not compare .* such as dpo"):
        run(causal.build(causal.Config()), source(draws()), 9, parts={"entangle": build(Config())})
    for made, message in ((Twice(None), "asks 2 times"), (Penalised(None), "term 'size' is no function")):
        made.link = made.link if isinstance(made, Penalised) else objective("cpo").link  # type: ignore[method-assign]
        made.terms = {"pair": "pairs", "nll": "labels"} if isinstance(made, Twice) else made.terms  # type: ignore[misc]
        with pytest.raises(InputError, match=message):
            take_step(run(made, source(draws()), 9, parts={"entangle": build(Config())}))
