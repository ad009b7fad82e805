"""Packing and drawing against a slow, obvious reference: lists, one token at a time."""

from __future__ import annotations

import random
from itertools import groupby, pairwise

import numpy as np
import pytest
import torch

from fallline.contracts import Draw
from fallline.data.packed import PackedSource, pack, pack_whole, whole_rows
from fallline.errors import InputError
from fallline.noise import rng

PAD = 999_999
Piece = list[int]


def documents(sizes: list[int], shuffle: int = 0) -> tuple[list[Piece], PackedSource, int]:
    """Documents of unique tokens in packing order, stored in another order, and packed into rows of 8 … 16."""
    length = 8 + shuffle % 9
    tokens = np.arange(sum(sizes), dtype=np.uint32) * 3 + 5
    start = np.cumsum(sizes) - sizes
    order = random.Random(shuffle).sample(range(len(sizes)), len(sizes))
    docs = [tokens[start[i] : start[i] + sizes[i]].tolist() for i in order]
    return docs, pack(tokens, start[order], np.array(sizes)[order], length, PAD), length


def reference_rows(docs: list[Piece], length: int) -> list[list[Piece]]:
    """Full rows, each a list of pieces."""
    stream = [(d, token) for d, doc in enumerate(docs) for token in doc]
    full = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
    return [[[t for _, t in part] for _, part in groupby(row, key=lambda x: x[0])] for row in full]


def reference_batch(rows: list[list[Piece]], length: int) -> dict[str, list[list[int]]]:
    """The columns of rows that hold these pieces."""
    batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": [], "segment": []}
    example = 0
    for row in rows:
        ids, labels, positions, segment = [], [], [], []
        for piece in row:
            for i, token in enumerate(piece):
                ids.append(token)
                labels.append(piece[i + 1] if i + 1 < len(piece) else -100)
                positions.append(i)
                segment.append(example)
            example += 1
        while len(ids) < length:
            ids.append(PAD)
            labels.append(-100)
            positions.append(positions[-1] + 1)
            segment.append(-1)
        for name, column in zip(batch, (ids, labels, positions, segment), strict=True):
            batch[name].append(column)
    return batch


def call(source: PackedSource, draw: Draw) -> dict[str, list[list[int]]]:
    batch = source(draw, rng(0, 0, "test"))
    assert all(column.dtype == torch.int64 for column in batch.values())
    return {name: column.tolist() for name, column in batch.items()}


def random_sizes(seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.choice([0, 1, 1, 2, 3, 7, 8, 9, draw.randint(1, 90)]) for _ in range(draw.randint(3, 40))] + [20]


@pytest.mark.parametrize("seed", range(40))
def test_full_rows(seed: int) -> None:
    docs, source, length = documents(random_sizes(seed), seed)
    rows = reference_rows(docs, length)
    assert source.rows.dtype == torch.int64
    assert source.rows.diff().tolist() == [len(row) for row in rows]
    assert len(source) == sum(map(len, rows))
    which = random.Random(seed).choices(range(len(rows)), k=5)
    draw = whole_rows(source.rows, torch.tensor(which))
    assert call(source, draw) == reference_batch([rows[r] for r in which], length)
    assert draw.weight.tolist() == [1.0] * len(draw.ids)


@pytest.mark.parametrize("seed", range(40))
def test_single_examples_and_rows_that_are_not_full(seed: int) -> None:
    docs, source, length = documents(random_sizes(seed), seed)
    pieces = [piece for row in reference_rows(docs, length) for piece in row]
    ids = random.Random(seed).choices(range(len(pieces)), k=12)
    alone = Draw(torch.tensor(ids), torch.ones(12))
    assert call(source, alone) == reference_batch([[pieces[i]] for i in ids], length)

    rows: list[list[Piece]] = [[]]
    row = []
    for i in ids:  # as many as fit, and at most three
        if sum(map(len, rows[-1])) + len(pieces[i]) > length or len(rows[-1]) == 3:
            rows.append([])
        rows[-1].append(pieces[i])
        row.append(len(rows) - 1)
    packed = Draw(torch.tensor(ids), torch.ones(12), torch.tensor(row))
    assert call(source, packed) == reference_batch(rows, length)


@pytest.mark.parametrize("seed", range(20))
def test_every_token_once_but_for_the_dropped_tail(seed: int) -> None:
    docs, source, length = documents(random_sizes(seed), seed)
    whole = [token for doc in docs for token in doc]
    seen = [t for batch in source.batches(3) for row in batch["input_ids"].tolist() for t in row]
    assert seen == whole[: len(seen)]
    assert len(whole) - len(seen) < length


def test_a_label_is_never_of_another_document() -> None:
    docs, source, _ = documents([*random_sizes(7), 200], 7)
    successor = {a: b for doc in docs for a, b in pairwise(doc)}
    labelled = 0
    for batch in source.batches(4):
        for token, label in zip(batch["input_ids"].flatten().tolist(), batch["labels"].flatten().tolist(), strict=True):
            assert label in (-100, successor.get(token))
            labelled += label != -100
    assert labelled == int(source.size.sum()) - len(source)  # one in each piece has none


def test_empty_draw() -> None:
    _, source, length = documents([30, 5])
    for row in (None, torch.zeros(0, dtype=torch.int64)):
        batch = source(Draw(torch.zeros(0, dtype=torch.int64), torch.zeros(0), row), rng(0, 0, "test"))
        assert set(batch) == {"input_ids", "labels", "position_ids", "segment"}
        assert {(c.shape, c.dtype) for c in batch.values()} == {((0, length), torch.int64)}


def test_parts_of_a_draw_are_its_rows() -> None:
    docs, source, length = documents([*random_sizes(3), 100], 3)
    rows = reference_rows(docs, length)
    draw = whole_rows(source.rows, torch.arange(5))
    for rank in range(2):
        assert call(source, draw.part(rank, 2)) == reference_batch(rows[:5][rank::2], length)


def test_pieces_that_do_not_fit_are_refused() -> None:
    _, source, _ = documents([40])
    with pytest.raises(InputError, match="more than 8 tokens"):
        source(Draw(torch.tensor([0, 1]), torch.ones(2), torch.tensor([0, 0])), rng(0, 0, "test"))


def test_batches_in_order_with_limit() -> None:
    docs, source, length = documents([*random_sizes(9), 100], 9)
    rows = reference_rows(docs, length)
    assert len(rows) > 7
    got = list(source.batches(3, 7))
    assert [len(b["input_ids"]) for b in got] == [3, 3, 1]
    assert torch.cat([b["example_id"] for b in got]).tolist() == list(range(sum(map(len, rows[:7]))))
    for i, batch in enumerate(got):
        columns = {name: batch[name].tolist() for name in ("input_ids", "labels", "position_ids", "segment")}
        assert columns == reference_batch(rows[:7][3 * i : 3 * i + 3], length)
        assert batch["weight"].tolist() == [1.0] * len(batch["example_id"])
    assert sum(len(b["input_ids"]) for b in source.batches(4)) == len(rows)
    assert sum(len(b["input_ids"]) for b in source.batches(4, 10**9)) == len(rows)
    assert list(source.batches(4, 0)) == []


def test_too_little_for_a_row_packs_nothing() -> None:
    _, source, _ = documents([3, 4])
    assert (len(source), source.rows.tolist()) == (0, [0])


def test_rows_of_a_source_that_packs_nothing() -> None:
    draw = whole_rows(None, torch.tensor([4, 2]))
    assert draw.ids.tolist() == [4, 2]
    assert draw.row is None


# examples that stay whole


def best_fit(sizes: list[int], order: list[int], length: int) -> list[list[int]]:
    """Rows of example numbers: each longest one left goes where it leaves the least room, among equals the newest."""
    rows: list[tuple[int, list[int]]] = []  # in the order in which their room was last changed
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], order[i])):
        fitting = [(length - sum(sizes[j] for j in row) - sizes[i], -at) for at, (_, row) in enumerate(rows)]
        room, at = min(((room, at) for room, at in fitting if room >= 0), default=(0, 1))
        rows.append((room, [*rows.pop(-at)[1], i] if at < 1 else [i]))
    return sorted((row for _, row in rows), key=lambda row: order[row[0]])


def whole(sizes: list[int], seed: int) -> tuple[PackedSource, list[Piece], list[bool], list[int], int]:
    draw = random.Random(seed)
    length = max(sizes) + draw.randint(0, 9)
    tokens = np.arange(sum(sizes), dtype=np.uint32) * 3 + 5
    asked = np.array([draw.random() < 0.6 for _ in tokens])
    start = np.cumsum(sizes) - sizes
    order = draw.sample(range(10**6), len(sizes))
    source = pack_whole(tokens, asked, start, np.array(sizes), np.array(order), length, PAD)
    pieces = [tokens[s : s + n].tolist() for s, n in zip(start, sizes, strict=True)]
    return source, pieces, asked.tolist(), order, length


@pytest.mark.parametrize("seed", range(40))
def test_whole_examples_by_best_fit(seed: int) -> None:
    draw = random.Random(seed)
    sizes = [draw.choice([1, 2, 3, 7, draw.randint(1, 30)]) for _ in range(draw.randint(1, 60))]
    source, pieces, asked, order, length = whole(sizes, seed)
    rows = best_fit(sizes, order, length)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    expected = reference_batch([[pieces[i] for i in row] for row in rows], length)
    label = dict(zip((t for p in pieces for t in p), asked, strict=True)) | {-100: False}
    expected["labels"] = [[t if label[t] else -100 for t in row] for row in expected["labels"]]
    assert call(source, whole_rows(source.rows, torch.arange(len(rows)))) == expected


def test_whole_examples_fill_rows_and_mix_lengths() -> None:
    draw = random.Random(0)
    sizes = [draw.randint(3, 100) for _ in range(3000)]
    source, *_ = whole([*sizes, 256], 0)
    rows = len(source.rows) - 1
    assert sum(sizes) > 0.97 * rows * source.length
    longest = [int(source.size[first]) for first in source.rows[:-1]]  # the first of a row
    half = rows // 2
    assert abs(sum(longest[:half]) / half - sum(longest[half:]) / (rows - half)) < 10, "not the long ones first"


def test_whole_examples_that_are_none() -> None:
    none = np.zeros(0, np.int64)
    source = pack_whole(np.zeros(9, np.uint32), np.ones(9, bool), none, none, none, 8, PAD)
    assert (len(source), source.rows.tolist()) == (0, [0])
