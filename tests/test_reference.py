"""What the reference says: the model of the start, once an example, to the bit however it is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fallline.adapters import attach
from fallline.adapters.layers import disabled
from fallline.contracts import Draw
from fallline.folders import cache_dir
from fallline.models.identity import fingerprint
from fallline.noise import rng
from fallline.reference import Reference
from fallline.sequences import sequence_logps
from fallline.tokens import plain_head
from pairs import batch_of, draws, llama, source


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FALLLINE_CACHE", str(tmp_path / "cache"))


def moved(model: Any) -> Any:
    """The model after some training, in train mode."""
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3), dtype=p.dtype)
    return model.train()


def by_id(batch: dict[str, Tensor], values: Tensor) -> dict[int, list[float]]:
    return dict(zip(batch["example_id"].tolist(), values.tolist(), strict=True))


class Counted:
    """Forwards of a reference."""

    def __init__(self, reference: Reference) -> None:
        self.number = 0
        with reference.model() as model:
            plain_head(model, model.device)  # tries the head, which is no forward of an example
            model.get_decoder().register_forward_pre_hook(self.count)

    def count(self, *args: Any) -> None:
        self.number += 1


@pytest.mark.parametrize("adapter", [False, True])
def test_it_is_the_model_of_the_start_whatever_is_trained(adapter: bool) -> None:
    model, batch = llama(), batch_of(source(draws()))
    name, true = fingerprint(model), sequence_logps(model, batch).detach()
    if adapter:
        attach(model, "lora", rank=2)
    reference = Reference(moved(model), name, disabled) if adapter else Reference(model, name)
    moved(model)
    state = [(p.detach().clone(), p.requires_grad, p.grad) for p in model.parameters()]
    generator = torch.get_rng_state()
    got = reference.logps(batch)
    torch.testing.assert_close(got, true, rtol=1e-12, atol=1e-12)
    assert not got.requires_grad
    assert (sequence_logps(model, batch) - true).abs().max() > 0.1, "the trained model is another one"
    assert model.training
    assert all(m.training for m in model.modules())
    assert torch.equal(torch.get_rng_state(), generator)
    for p, (value, trained, grad) in zip(model.parameters(), state, strict=True):
        assert torch.equal(p, value)
        assert p.requires_grad == trained
        assert p.grad is grad
    with reference.model() as frozen:
        assert not frozen.training
        assert adapter == (frozen is model), "with an adapter all weights are shared"


def test_each_example_is_asked_once_and_the_bits_do_not_depend_on_the_batch() -> None:
    pairs = draws(9)
    found = source(pairs)
    model = llama(torch.float32)
    name = fingerprint(model)
    first = Reference(model, name)
    forwards = Counted(first)
    whole = batch_of(found)
    once = by_id(whole, first.logps(whole))
    assert forwards.number == len(pairs)
    assert by_id(whole, first.logps(whole)) == once
    assert forwards.number == len(pairs), "kept in memory"

    second = Reference(model, name)  # another run
    forwards = Counted(second)
    assert by_id(whole, second.logps(whole)) == once
    assert forwards.number == 0, "kept in the cache folder"

    (file,) = (cache_dir() / "reference").iterdir()
    for damage in (lambda raw: b"", lambda raw: raw[:-5], lambda raw: raw[:20] + b"\xff" + raw[21:]):
        file.write_bytes(damage(file.read_bytes()))
        again = Reference(model, name)
        forwards = Counted(again)
        told: dict[int, list[float]] = {}
        for batch in found.batches(1):  # row by row: other shapes, other neighbours
            told |= by_id(batch, again.logps(batch))
        assert told == once
        assert forwards.number >= 1
        assert Reference(model, name).logps(whole).tolist() == list(once.values()), "the file is whole again"

    config = llama(torch.float32)
    config.config.rms_norm_eps *= 2
    Reference(config, name).logps(whole)
    assert len(list((cache_dir() / "reference").iterdir())) == 2, "another model, another file"


def test_padded_rows_and_an_example_without_a_label() -> None:
    model, g = llama(), torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(3, 40, (3, 6), generator=g),
        "labels": torch.randint(3, 40, (3, 6), generator=g),
        "example_id": torch.arange(3),
    }
    batch["labels"][0, 3:], batch["labels"][1] = -100, -100
    got = Reference(model, "padded").logps(batch, 1)
    torch.testing.assert_close(got, sequence_logps(model, batch, 1).detach(), rtol=1e-12, atol=1e-12)
    assert got[1].tolist() == [0.0]
    found = source(draws(2))
    nobody = found(Draw(torch.zeros(0).long(), torch.ones(0)), rng(0, 0, "x")) | {"example_id": torch.zeros(0).long()}
    for none in ({k: v[:0] for k, v in batch.items()}, nobody):
        assert Reference(model, "none").logps(none).shape == (0, 2)


def test_a_folder_that_cannot_be_written_stops_no_run(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    model, batch = llama(), batch_of(source(draws(3)))
    reference = Reference(model, "name")
    torch.testing.assert_close(reference.logps(batch), sequence_logps(model, batch).detach(), rtol=1e-12, atol=1e-12)
    reference.logps(batch_of(source(draws(3, seed=5))))
    assert sum("set FALLLINE_CACHE" in r.message for r in caplog.records) == 1
