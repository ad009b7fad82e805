from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fallline.contracts import Batch, Draw
from fallline.data import jsonl
from fallline.data.packed import PackedSource, pack
from fallline.data.poisson import Config, Poisson, build
from fallline.errors import InputError
from fallline.noise import rng

N, ROWS, STEPS = 200, 20, 1000


class Examples:
    rows = None

    def __len__(self) -> int:
        return N

    def __call__(self, draw: Draw, rng: torch.Generator) -> Batch:
        return {"x": draw.ids}


def drawn(sampler: Poisson) -> torch.Tensor:
    """[STEPS, N] whether an example is in a step."""
    table = torch.zeros(STEPS, N)
    for s in range(STEPS):
        table[s, sampler.draw(s, rng(0, s, "draw")).ids] = 1
    return table


def test_each_example_by_chance_alone() -> None:
    """Sums of squares of independent standardised draws: chi-square, five standard deviations wide."""
    table = drawn(build(Config(seed=7), Examples(), ROWS, seed=0))
    q = ROWS / N
    z = (table - q) / (q * (1 - q)) ** 0.5
    assert abs(z.sum()) < 5 * (STEPS * N) ** 0.5
    for sums, length in ((z.sum(0), STEPS), (z.sum(1), N)):  # of an example over steps; of a step: its size
        assert abs((sums.square() / length - 1).sum()) < 5 * (2 * len(sums)) ** 0.5
    pairs = (z.t() @ z / STEPS**0.5)[torch.triu(torch.ones(N, N), 1).bool()]
    assert abs((pairs.square() - 1).sum()) < 8 * (2 * len(pairs)) ** 0.5
    following = (z[1:] * z[:-1]).sum(0) / (STEPS - 1) ** 0.5
    assert abs((following.square() - 1).sum()) < 5 * (2 * N) ** 0.5
    assert table.sum(1).std() > 3, "the size of a draw varies"


def test_a_draw_is_one_example_a_row_of_weight_one_and_expected_size() -> None:
    draw = build(Config(seed=7), Examples(), ROWS, seed=0).draw(0, rng(0, 0, "draw"))
    assert draw.row is None
    assert draw.size == ROWS
    assert draw.weight.tolist() == [1.0] * len(draw.ids)
    assert draw.ids.dtype == torch.int64


def test_a_secret_is_not_the_seed_and_goes_with_the_state() -> None:
    one, other = (build(Config(), Examples(), ROWS, seed=3) for _ in range(2))
    assert one.secret != other.secret
    assert max(one.secret, other.secret) > 2**40
    assert not torch.equal(drawn(one), drawn(other))
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert torch.equal(drawn(one), drawn(other))


def test_empty_and_full_draws_of_packed_text() -> None:
    sizes = np.array([5, 1, 8, 8, 3])
    source = pack(np.arange(sizes.sum(), dtype=np.uint16), np.cumsum(sizes) - sizes, sizes, 8, 0)
    everything = build(Config(), source, len(source), seed=0)
    assert everything.rate == 1
    assert everything.draw(0, rng(0, 0, "draw")).ids.tolist() == list(range(len(source)))
    batch = source(Draw(torch.zeros(0, dtype=torch.long), torch.zeros(0)), rng(0, 0, "noise"))
    assert {tuple(column.shape) for column in batch.values()} == {(0, 8)}


@pytest.mark.parametrize("rows", [0, N + 1])
def test_impossible_sizes(rows: int) -> None:
    with pytest.raises(InputError, match=f"'batch' must be 1 to {N}"):
        build(Config(), Examples(), rows, seed=0)


@pytest.mark.parametrize("long", [False, True])
def test_lines_say_whether_examples_are_whole(tmp_path: Path, long: bool) -> None:
    path = tmp_path / "lines.jsonl"
    lines = [{"text": f"Line {i}."} for i in range(40)]
    if long:
        lines.append({"text": "And so on, and so on. " * 40})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    dataset = jsonl.build(jsonl.Config(path=str(path), length=64, vocab=300, validation=0.1), None)
    units = {source.unit for source in (dataset.train, dataset.validation)}
    assert ("" in units) == long
    assert any(unit.startswith("line, given the tokenizer") for unit in units)


def test_pieces_of_documents_are_no_unit() -> None:
    assert PackedSource.unit == ""
