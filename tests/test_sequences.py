"""Log-probabilities of sequences against each sequence alone, with full logits."""

from __future__ import annotations

import torch

from fallline.sequences import per_sequence, sequence_counts, sequence_logps
from pairs import batch_of, draws, llama, logps, order_of, source


def test_packed_and_padded_sequences_are_those_of_each_alone() -> None:
    model, pairs = llama(), draws()
    found = source(pairs)
    batch = batch_of(found)
    assert len(found.rows) - 1 < len(pairs), "rows hold several pairs"
    assert (batch["segment"] < 0).any(), "and padding"
    order = order_of(found)
    true = logps(model, [pairs[i] for i in order])
    got = sequence_logps(model, batch)
    torch.testing.assert_close(got, true, rtol=1e-12, atol=1e-12)
    assert sequence_counts(batch).tolist() == [[len(pairs[i][side][1]) for side in (0, 1)] for i in order]

    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = [torch.autograd.grad((t * weight).sum(), list(model.parameters())) for t in (got, true)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_float32_is_near() -> None:
    pairs = draws()
    found = source(pairs)
    got = sequence_logps(llama(torch.float32), batch_of(found))
    assert got.dtype == torch.float64, "summed in float64, whatever the model's dtype"
    torch.testing.assert_close(got, logps(llama(), [pairs[i] for i in order_of(found)]), rtol=2e-6, atol=2e-5)


def test_without_side_an_example_is_one_sequence() -> None:
    values = torch.arange(6.0).view(2, 3)
    rows = {"example_id": torch.arange(2)}
    assert per_sequence(values, rows, 1).tolist() == [[3.0], [12.0]]
    assert per_sequence(values, rows).tolist() == [[3.0, 0.0], [12.0, 0.0]]
    packed = {"example_id": torch.arange(3), "segment": torch.tensor([[0, 0, 1], [2, 2, -1]])}
    assert per_sequence(values, packed, 1).tolist() == [[1.0], [2.0], [7.0]]
    nobody = {"example_id": torch.arange(0), "segment": torch.zeros(0, 3).long()}
    assert per_sequence(torch.zeros(0, 3), nobody).shape == (0, 2)
