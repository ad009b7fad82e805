"""What every objective must do. A row of table.py buys all of it."""

from __future__ import annotations

import dataclasses
import io
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import CausalLMOutput

from fallline import cross_entropy
from fallline.catalog import entries, find
from fallline.contracts import Batch
from fallline.gradients import backprop, per_example
from fallline.isolation import isolated
from fallline.optim import create
from fallline.reference import Reference
from fallline.step import Run, take_step
from fallline.tokens import twice_differentiable
from preference_rules import ROWS as PAIRS

from .rows import WORDS, Row
from .table import ROWS

each = pytest.mark.parametrize("row", ROWS, ids=str)


class Capped(GPT2LMHeadModel):
    """Its logits are no linear map of what the decoder returns."""

    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        hidden = self.get_decoder()(input_ids, **inputs).last_hidden_state
        return CausalLMOutput(logits=4 * torch.tanh(self.lm_head(hidden) / 4))


def made(
    kind: type[Any] = GPT2LMHeadModel, dtype: torch.dtype = torch.float64, words: int = WORDS, seed: int = 0
) -> Any:
    """A model that computes in float64 from end to end, as Llama's norms do not; some words are a hundred times as
    probable as others."""
    torch.manual_seed(seed)
    size = {"n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2, "bos_token_id": None, "eos_token_id": None}
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = kind(GPT2Config(vocab_size=words, tie_word_embeddings=False, **size, **rates)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.7 * torch.randn(p.shape, dtype=torch.float64))
    return model.to(dtype)


def beginning(words: int = WORDS) -> Reference:
    """A model that is not the one that is trained, as the one that the run began with."""
    return Reference(made(words=words, seed=1), f"another of {words} words")


def built(row: Row, words: int = WORDS, **changes: Any) -> nn.Module:
    module = find("objective", row.id).load()
    objective: Any = module.build(module.Config(**row.options | changes))
    if getattr(objective, "reference", False):
        objective.hold(beginning(words))
    return objective  # type: ignore[no-any-return]


def batch_of(row: Row, objective: Any, packed: bool = False, dtype: torch.dtype = torch.float64) -> Batch:
    """All of the row's examples as the step would give them."""
    drawn = row.draw(packed)
    batch = row.source()(drawn, torch.Generator())
    batch |= {"example_id": drawn.ids, "weight": drawn.weight.double()}
    batch = {name: c.to(dtype) if c.is_floating_point() else c for name, c in batch.items()}
    if getattr(objective, "columns", {}):
        batch = objective.prepare(SimpleNamespace(reference=beginning()), batch)
    counts = objective.count(batch)
    return batch | {f"share/{term}": batch["weight"] / count.sum() for term, count in counts.items()}


def loss_of(objective: nn.Module, model: Any, batch: Batch) -> Tensor:
    """As the step sums it."""
    value = objective(model, batch).value
    return torch.stack([(v * batch[f"share/{term}"]).sum() for term, v in value.items()]).sum()


def gradients(loss: Tensor, model: nn.Module, **options: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), **options))


def truth(row: Row, objective: Any, model: Any) -> tuple[dict[str, Tensor], Tensor]:
    """The reference's values, and the loss that the step would make of them."""
    batch = batch_of(row, objective)
    config = find("objective", row.id).load().Config(**row.options)
    logits = model(**isolated(model, batch)).logits
    if getattr(objective, "reference", False):
        with torch.no_grad():
            batch["reference_logits"] = made(seed=1)(**isolated(model, batch)).logits
    value = row.reference(logits, batch, config)
    return value, torch.stack([(v * batch[f"share/{term}"]).sum() for term, v in value.items()]).sum()


def run(row: Row, model: Any, *, micro: int = 8, packed: bool = False, parts: Any = None, **words: Any) -> Run:
    """A real one, all of the row's examples a step."""

    class Fixed:
        def draw(self, step: int, rng: torch.Generator) -> Any:
            return row.draw(packed)

    optimizer = create("adamw", model, lr=1e-2)
    given: dict[str, Any] = {
        "objective": built(row),
        "source": row.source(),
        "estimator": backprop.build(backprop.Config()),
        "sampler": Fixed(),
        "optimizer": optimizer,
        "schedule": torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=10),
        "parts": parts or {},
        "reference": beginning(),
    }
    return Run(model=model, micro=micro, **given | words)


OWN = {"entangle-mask", "adv-comp-sum", "lat", "uoe"}
"""Functions of more than an answer's logits, whose tests are their own."""


def test_every_objective_has_a_row_here_or_among_those_on_pairs() -> None:
    assert {row.id for row in ROWS} | PAIRS.keys() | OWN == {id for kind, id in entries() if kind == "objective"}


@each
@pytest.mark.parametrize(("packed", "early"), [(False, True), (True, True), (True, False)], ids=str)
@pytest.mark.parametrize("kind", [GPT2LMHeadModel, Capped])
def test_equation(row: Row, kind: type[Any], packed: bool, early: bool) -> None:
    model, objective = made(kind), built(row)
    value, loss = truth(row, objective, model)
    wanted = gradients(loss, model)
    batch = batch_of(row, objective, packed)
    given = batch if early else {name: c for name, c in batch.items() if not name.startswith("share/")}
    found = objective(model, given).value
    assert list(found) == list(objective.count(batch)) == list(value)
    for term, v in value.items():
        torch.testing.assert_close(found[term].detach(), v.detach(), rtol=1e-9, atol=1e-9)
    ours = torch.stack([(v * batch[f"share/{term}"]).sum() for term, v in found.items()]).sum()
    for got, want in zip(gradients(ours, model), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@each
def test_however_a_step_is_cut_its_gradient_is_that_of_one_batch(row: Row) -> None:
    found = []
    for micro, packed in ((8, False), (3, False), (1, False), (5, True), (2, True)):
        model = made()
        one = run(row, model, micro=micro, packed=packed)
        take_step(one)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-9)


@each
def test_resumed_twice_is_bit_equal(row: Row) -> None:
    def steps(one: Run, until: int, losses: list[float]) -> Run:
        while one.step < until:
            losses.append(take_step(one)["loss"].item())
        return one

    straight: list[float] = []
    whole = steps(run(row, made(dtype=torch.float32), micro=3), 7, straight)
    assert straight[-1] < straight[0]
    losses, saved = [], None
    for until in (2, 5, 7):
        one = run(row, made(dtype=torch.float32), micro=3)
        if saved is not None:
            saved.seek(0)
            one.load_state_dict(torch.load(saved, weights_only=True))
        steps(one, until, losses)
        saved = io.BytesIO()
        torch.save(one.state_dict(), saved)
    assert losses == straight
    for name, p in whole.model.state_dict().items():
        assert torch.equal(one.model.state_dict()[name], p)


@each
@pytest.mark.parametrize("kind", [GPT2LMHeadModel, Capped])
def test_where_nothing_is_asked_nothing_is_learned(row: Row, kind: type[Any]) -> None:
    class Silent:
        def __init__(self) -> None:
            self.own = row.source()

        def __call__(self, draw: Any, rng: torch.Generator) -> Batch:
            return {n: c.fill_(-100) if n == "labels" else c for n, c in self.own(draw, rng).items()}

        def __len__(self) -> int:
            return len(self.own)

        rows = None

    model = made(kind)
    signals = take_step(run(row, model, micro=3, source=Silent()))
    assert signals["loss"] == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@each
def test_every_option_has_an_effect_of_its_own(row: Row) -> None:
    config, model, found = find("objective", row.id).load().Config, made(), {}
    missing = {f.name for f in dataclasses.fields(config)} - {n for r in ROWS if r.id == row.id for n in r.changes}
    assert not missing
    for change in [{}, *({name: value} for name, value in row.changes.items())]:
        objective = built(row, **change)
        grad = gradients(loss_of(objective, model, batch_of(row, objective)), model)
        found[str(change)] = torch.cat([g.flatten() for g in grad])
    for (a, x), (b, y) in combinations(found.items(), 2):
        assert (x - y).abs().max() > 1e-6, f"{a} and {b} give the same gradient"


def test_no_two_objectives_are_the_same() -> None:
    found, model = {}, made()
    for row in ROWS:
        objective = built(row)
        grad = gradients(loss_of(objective, model, batch_of(row, objective)), model)
        found[str(row)] = torch.cat([g.flatten() for g in grad])
    for (a, x), (b, y) in combinations(found.items(), 2):
        assert (x - y).abs().max() > 1e-4, f"{a} and {b} give the same gradient"


@each
@pytest.mark.parametrize("kind", [GPT2LMHeadModel, Capped])
def test_gradcheck(row: Row, kind: type[Any]) -> None:
    model, objective = made(kind), built(row)
    batch = batch_of(row, objective)
    names = [name for name, _ in model.named_parameters()]

    def loss(*values: Tensor) -> Tensor:
        given = {f"model.{name}": v for name, v in zip(names, values, strict=True)}
        return torch.func.functional_call(Scored(model, objective), given, (batch,))

    loss(*model.parameters())  # tries the head
    assert torch.autograd.gradcheck(loss, tuple(model.parameters()), fast_mode=True)


class Scored(nn.Module):
    """A model with its loss."""

    def __init__(self, model: nn.Module, objective: nn.Module) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch) -> Tensor:
        return loss_of(self.objective, self.model, batch)


@each
def test_a_hessian_product_is_that_of_the_equation(row: Row) -> None:
    model, objective = made(), built(row)
    v = [torch.randn(p.shape, generator=torch.Generator().manual_seed(3), dtype=p.dtype) for p in model.parameters()]

    def product(loss: Tensor) -> list[Tensor]:
        along = sum((g * d).sum() for g, d in zip(gradients(loss, model, create_graph=True), v, strict=True))
        return gradients(along, model)

    batch = batch_of(row, objective)
    with twice_differentiable():
        found = product(loss_of(objective, model, batch))
        wanted = product(truth(row, objective, model)[1])
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@each
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1e2, 1e3], ids=["alike", "near", "far", "farthest"])
def test_float32_is_near_float64_at_the_extremes(row: Row, scale: float) -> None:
    """Words all alike; and −log p up to thousands."""
    found = []
    for dtype in (torch.float64, torch.float32):
        model, objective = made(dtype=torch.float32), built(row)
        with torch.no_grad():
            model.lm_head.weight.mul_(scale)
        model = model.to(dtype)
        batch = batch_of(row, objective, dtype=dtype)
        value = objective(model, batch).value
        grad = gradients(loss_of(objective, model, batch), model)
        assert all(bool(t.isfinite().all()) for t in [*value.values(), *grad])
        found.append([torch.cat([v.detach().double() for v in value.values()]), *(g.double() for g in grad)])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(y, x, rtol=2e-3, atol=1e-3 * float(x.abs().max()) + 1e-5)


class Sizes(TorchDispatchMode):
    """How many elements each new tensor had."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen |= {t.numel() for t in (out if isinstance(out, list | tuple) else [out]) if isinstance(t, Tensor)}
        return out


@each
def test_full_logits_never_exist_and_products_are_those_promised(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "LEAST_CHUNK", 5)
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", 1)
    words = 400
    model, objective = made(dtype=torch.float32, words=words), built(row, words)
    batch = batch_of(row, objective, dtype=torch.float32)
    with torch.no_grad():
        objective(model, batch)  # tries the heads
    began: Any = getattr(objective, "_reference", None)
    if began is not None:  # its decoder runs, its head is what counts
        said = began._model.transformer(**isolated(model, batch)).last_hidden_state
        rows = (batch["domain"] == 1).nonzero().squeeze(1)
        monkeypatch.setattr(
            began._model, "get_decoder", lambda: lambda **_: SimpleNamespace(last_hidden_state=said[rows])
        )
    hidden = model.transformer(**isolated(model, batch)).last_hidden_state.detach().requires_grad_()
    monkeypatch.setattr(model, "get_decoder", lambda: lambda **_: SimpleNamespace(last_hidden_state=hidden))
    asked = objective.asked(batch) if hasattr(objective, "asked") else batch["labels"]
    labels = int((asked >= 0).sum())
    with Sizes() as sizes, FlopCounterMode(display=False) as counter:
        loss_of(objective, model, batch).backward()
    assert max(sizes.seen) == words * model.config.n_embd  # a gradient of the head's
    assert counter.get_total_flops() == (row.products * labels + row.more(batch)) * 2 * words * model.config.n_embd


@each
def test_norms_of_examples_are_those_of_one_backward_each(row: Row) -> None:
    class Keeps:
        reads = frozenset({"example_grad_norm"})
        seen: Any = None

        def after_step(self, run: Run, signals: Any) -> tuple[()]:
            self.seen = signals["example_grad_norm"]
            return ()

    model, objective, keeps = made(), built(row), Keeps()
    batch = batch_of(row, objective)
    table = objective(model, batch).value
    rows = torch.stack([v * batch[f"share/{term}"] for term, v in table.items()]).sum(0)
    wanted = [torch.cat([g.flatten() for g in gradients(r, model, retain_graph=True)]).norm() for r in rows]
    for micro, packed in ((3, False), (5, True)):
        estimator = per_example.build(per_example.Config())
        take_step(run(row, made(), micro=micro, packed=packed, estimator=estimator, parts={"keeps": keeps}))
        torch.testing.assert_close(keeps.seen, len(rows) * torch.stack(wanted), rtol=1e-6, atol=1e-9)


@each
def test_the_card_says_what_the_objective_declares(row: Row) -> None:
    objective: Any = built(row)
    assert objective.couples == find("objective", row.id).card.couples
