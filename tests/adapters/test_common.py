"""What every adapter promises."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from fallline.adapters import attach, disabled, follow, load, merge, save, scaled
from fallline.adapters.between import between
from fallline.adapters.layers import adapted
from fallline.catalog import entries
from fallline.drivers.train import train
from fallline.errors import InputError
from fallline.optim import create
from fallline.per_example import Norms, PerExample
from fallline.recipe import Recipe

from .models import gpt2, llama, logits, state, stop_at, tokens
from .table import ROWS, Row, batches

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's about Transformers
every = pytest.mark.parametrize("row", ROWS, ids=str)


def fit(row: Row, model: Any, steps: int = 5) -> list[float]:
    """Train on a few tokens; the loss before each step."""
    ids = tokens()
    model.train()
    torch.manual_seed(0)  # dropout's
    optimizer = create("adamw", model, lr=row.rate, betas=(0.9, 0.999), weight_decay=0.01)
    follow(model, optimizer)
    losses = []
    for step in range(steps):
        optimizer.remap(between(model, "default", step, steps, seed=0))
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def test_every_adapter_of_the_catalogue_has_a_row() -> None:
    here = {id for (kind, id), entry in entries().items() if kind == "adapter" and "fallline" in entry.module}
    alone = {"none", "o3"}  # o3 is for unlearning runs and has tests of its own
    assert here - alone == {row.id for row in ROWS}


@every
@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_beginning_and_the_trained_parameters(row: Row, make: Any) -> None:
    base, model = logits(make()), row.on(make())
    if row.as_before:
        torch.testing.assert_close(logits(model), base, rtol=0, atol=row.more.get("nearly", 1e-5) * base.abs().max())
    layers = adapted(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(".adapters." in name for name in trained)
    wanted = 0
    for layer in layers.values():
        wanted += row.trained(*layer.matrix().shape) * (layer.methods["default"].config.rank if row.by_rank else 1)
    assert sum(p.numel() for p in trained.values()) == wanted
    again = row.on(make())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    grads = [p.grad for p in trained.values() if p.grad is not None]
    assert any(bool(g.any()) for g in grads), "it must be able to learn"


@every
@pytest.mark.parametrize("make", [llama, gpt2])
def test_after_training_all_ways_agree(row: Row, make: Any, tmp_path: Path) -> None:
    """Applied, dense, merged, disabled, saved as PEFT stores it and loaded by PEFT and by us."""
    plain = logits(make())
    model = row.on(make())
    losses = fit(row, model)
    assert losses[-1] < losses[0]
    tuned = logits(model)
    assert (tuned - plain).abs().max() > 0.05, "the change must be clearly there"
    with disabled(model):
        assert torch.equal(logits(model), plain)
    noise = torch.Generator().manual_seed(2)
    for layer in adapted(model).values():
        method, P, W = layer.methods["default"], layer.adapters["default"], layer.matrix
        x = torch.randn(5, W().shape[1], generator=noise)
        with torch.no_grad():
            change = x @ method.delta(P, W).t()
            for y in (method.apply(P, x, W, False), method.linear(P, x, W, None, False) - x @ W().t()):
                torch.testing.assert_close(y, change, rtol=1e-4, atol=1e-4 * float(change.abs().max()))
    save(model, tmp_path)
    if make is llama or row.peft_conv1d:
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path)
        assert type(theirs.peft_config["default"]).__name__.lower() == f"{row.peft}config".lower()
        torch.testing.assert_close(logits(theirs), tuned, rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(TypeError, match=r"Conv1D.* is not supported"):
            peft.PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(logits(load(make(), tmp_path)), tuned, rtol=1e-4, atol=1e-5)
    merge(model)
    torch.testing.assert_close(logits(model), tuned, rtol=1e-4, atol=2e-5)


@every
@pytest.mark.parametrize("make", [llama, gpt2])
def test_scaled_by_a_factor_the_change_is_what_is_scaled(row: Row, make: Any) -> None:
    """At 0 and 1 to the bit; between them, and merged there, as the dense change says."""
    plain = logits(make())
    model = row.on(make())
    fit(row, model)
    tuned, dense = logits(model), make().eval()
    for path, layer in adapted(model).items():
        change = layer.methods["default"].delta(layer.adapters["default"], layer.matrix).detach()
        dense.get_submodule(path).weight.data += 0.3 * (change if make is llama else change.t())
    for factor, wanted in ((0, plain), (1, tuned)):
        with scaled(model, factor):
            assert torch.equal(logits(model), wanted)
    with scaled(model, 0.3):
        torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=2e-5)
    assert torch.equal(logits(model), tuned)
    with scaled(model, 0.3):
        merge(model)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=2e-5)
    with pytest.raises(InputError, match="merged into the weights"), scaled(model, 0.5):
        pass


@every
def test_merging_into_bfloat16_loses_no_more_than_its_rounding(row: Row) -> None:
    model = row.on(llama(torch.bfloat16))
    fit(row, model)
    kinds = {p.dtype for n, p in model.state_dict().items() if ".adapters." in n}
    assert kinds == {torch.float32}
    tuned = logits(model).float()
    merge(model)
    assert (logits(model).float() - tuned).abs().max() < 0.05 * tuned.abs().max()


@every
def test_micro_batches_checkpointing_and_copies_give_the_same_gradients(row: Row) -> None:
    found = []
    ids = tokens(rows=4)
    first = row.on(llama().double())
    fit(row, first, 2)
    for cut, checkpointing in ((4, False), (1, False), (4, True)):
        model = copy.deepcopy(first).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for part in ids.split(cut):
            (model(input_ids=part, labels=part).loss * len(part) / len(ids)).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for other in found[1:]:
        for name, g in found[0].items():
            torch.testing.assert_close(other[name], g, rtol=1e-9, atol=1e-12)


@every
def test_every_option_changes_what_is_trained(row: Row) -> None:
    def result(**options: Any) -> dict[str, torch.Tensor]:
        model = row.on(llama(), **options)
        fit(row, model, 3)
        return {k: v for k, v in model.state_dict().items() if ".adapters." in k} | {"logits": logits(model)}

    fields = set(row.config().__dataclass_fields__) - {"targets", "rows"}
    assert set(row.others) == fields
    plain = result()
    for key, value in (row.others | {"targets": "q_proj"}).items():
        found = result(**{key: value})
        assert found.keys() != plain.keys() or any(
            found[k].shape != plain[k].shape or not torch.equal(found[k], plain[k]) for k in plain
        ), key


@every
def test_per_example_norms_are_exact_or_refused_by_name(row: Row) -> None:
    model = row.on(llama().double())
    fit(row, model, 2)
    ids = tokens(rows=3)

    def losses() -> torch.Tensor:
        found = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        each = torch.nn.functional.cross_entropy(found, ids[:, 1:].flatten(), reduction="none")
        return each.view(3, -1).sum(1)

    params = [p for p in model.parameters() if p.requires_grad]
    true = [torch.cat([g.flatten() for g in torch.autograd.grad(losses()[i], params)]).norm().item() for i in range(3)]
    norms = Norms()
    refused = nullcontext() if row.per_example else pytest.raises(InputError, match=r"adapters\.default")
    with refused, PerExample(model).watch(3, norms):
        losses().sum().backward()
    if not row.per_example:
        return
    assert norms.total().sqrt().tolist() == pytest.approx(true, rel=1e-9)


@every
def test_data_to_begin_from_is_asked_for_and_only_where_it_is_used(row: Row) -> None:
    model = llama()
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(InputError, match=r"begins from data: give|does not begin from data"):
        attach(model, row.id, **row.options, **({} if row.needs else {"data": batches()}))
    if row.needs:
        for data, message in (([], "no data"), (iter(batches()), "gone through several times")):
            with pytest.raises(InputError, match=message):
                attach(model, row.id, **row.options, data=data)
        broken = [{"input_ids": tokens()}]
        with pytest.raises(InputError, match="gives no loss on the 'data'"):
            attach(model, row.id, **row.options, data=broken)
    assert not adapted(model)
    assert [p.requires_grad for p in model.parameters()] == before
    assert torch.equal(logits(model), logits(llama()))


@every
def test_a_run_that_is_interrupted_twice_ends_with_the_same_bits(
    row: Row, base: Path, corpus: Path, tmp_path: Path
) -> None:
    options = ", ".join(f"{k}: {v}" for k, v in row.options.items())

    def recipe(out: Path) -> Recipe:
        return Recipe.parse(
            f"model: {base}\nadapter: {{name: {row.id}, {options}}}\n"
            f"data: {{name: text, path: {corpus}, length: 32, validation: 0.2}}\n"
            f"optimizer: {{name: adamw, lr: {row.rate}}}\nsteps: 6\nbatch: 4\nmicro: 2\nsample: 0\nout: {out}\n"
            "eval: {every: 3, rows: 4}\ncheckpoint: {every: 2, keep: 9}\n"
        )

    whole = train(recipe(tmp_path / "whole"), progress=None)
    assert len({record["loss"] for record in whole.metrics[1:]}) == 6
    for resume, step in ((False, 3), (True, 5)):
        with pytest.raises(KeyboardInterrupt):
            train(recipe(tmp_path / "cut"), resume=resume, progress=None, watch=stop_at(step))
    cut = train(Recipe.load(tmp_path / "cut"), resume=True, progress=None)
    a, b = state(whole.run.model), state(cut.run.model)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
