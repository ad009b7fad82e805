from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fallline.contracts import Batch, Draw
from fallline.data import uniform
from fallline.data.data_diet import Config, build, chosen
from fallline.data.packed import PackedSource, pack, pack_whole
from fallline.data.scores import examples_hash, read_scores
from fallline.errors import InputError
from fallline.noise import rng

SIZES = np.array([5, 1, 30, 8, 8, 3, 50, 2, 11, 4, 4, 4, 6])
START = np.cumsum(SIZES) - SIZES


def documents(length: int = 8) -> PackedSource:
    return pack(np.arange(SIZES.sum(), dtype=np.uint16), START, SIZES, length, 0)


def whole() -> PackedSource:
    tokens = np.arange(SIZES.sum(), dtype=np.uint16)
    return pack_whole(tokens, np.ones(len(tokens), bool), START, SIZES, np.arange(len(SIZES)), 50, 0)


class Ten:
    """Examples that are not packed."""

    rows = None

    def __len__(self) -> int:
        return 10

    def __call__(self, draw: Draw, rng: torch.Generator) -> Batch:
        return {"x": draw.ids}


def scored(path: Path, source: Any) -> tuple[str, Tensor]:
    """A file of scores of a source's examples, all different, and the scores."""
    scores = torch.rand(len(source), generator=torch.Generator().manual_seed(1))
    save_file({"scores": scores}, path, {"examples": examples_hash(source)})
    return str(path), scores


def equal(a: Draw, b: Draw) -> bool:
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x is y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("make", [documents, whole, Ten])
@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_each_kept_example_once_an_epoch(tmp_path: Path, make: Any, keep: float) -> None:
    source = make()
    file, scores = scored(tmp_path / "s", source)
    sampler = build(Config(scores=file, keep=keep), source, 1, seed=3)
    number = sampler.epochs.number
    draws = [sampler.draw(s, rng(0, 0, "")) for s in range(2 * number)]
    kept = set(scores.argsort(descending=True)[: round(keep * len(scores))].tolist())
    for epoch in (draws[:number], draws[number:]):
        assert Counter(i for draw in epoch for i in draw.ids.tolist()) == Counter(kept)
    assert [d.ids.tolist() for d in draws[:number]] != [d.ids.tolist() for d in draws[number:]]
    batch = source(build(Config(scores=file, keep=keep), source, 5, seed=3).draw(2, rng(0, 0, "")), rng(0, 0, ""))
    if keep < 1 and isinstance(source, PackedSource):
        assert number < len(source.rows) - 1, "what is left is put together"
        assert (batch["segment"] >= 0).float().mean() > 0.8


def test_a_function_of_seed_and_step(tmp_path: Path) -> None:
    source = documents()
    config = Config(scores=scored(tmp_path / "s", source)[0])
    sampler = build(config, source, 3, seed=3)
    forward = [sampler.draw(s, rng(3, s, "draw")) for s in range(12)]
    for s in reversed(range(12)):
        assert equal(build(config, source, 3, seed=3).draw(s, rng(8, 8, "other")), forward[s])
        assert equal(sampler.draw(s, rng(3, s, "draw")), forward[s])
    other = build(config, source, 3, seed=4)
    assert set(sampler.ids.tolist()) == set(other.ids.tolist())
    assert any(not equal(other.draw(s, rng(4, s, "draw")), forward[s]) for s in range(3))


@pytest.mark.parametrize("make", [documents, whole, Ten])
def test_all_kept_is_uniform(tmp_path: Path, make: Any) -> None:
    source = make()
    ours = build(Config(scores=scored(tmp_path / "s", source)[0], keep=1), source, 3, seed=2)
    plain = uniform.build(uniform.Config(), source, 3, seed=2)
    assert all(equal(ours.draw(s, rng(0, 0, "")), plain.draw(s, rng(0, 0, ""))) for s in range(9))


def test_which_are_chosen() -> None:
    scores = torch.tensor([0.1, torch.nan, 0.9, 0.5, 0.7, 0.3, 0.5])  # six with a score

    def ids(**options: Any) -> list[int]:
        return chosen(scores, Config(scores="", **options), seed=0).tolist()

    assert ids(keep=0.5) == [2, 3, 4]
    assert ids(keep=0.5, order="easiest") == [0, 3, 5]
    assert ids(keep=0.5, offset=0.34) == [3, 5, 6]
    assert ids(keep=1.0) == [0, 2, 3, 4, 5, 6]
    assert ids(keep=0.001) == [2]
    picked = Counter(i for seed in range(600) for i in chosen(scores, Config(scores="", order="random"), seed).tolist())
    assert set(picked) == {0, 2, 3, 4, 5, 6}
    assert all(abs(n - 300) < 5 * 150**0.5 for n in picked.values())  # five standard deviations


def test_what_is_refused(tmp_path: Path) -> None:
    source = documents()
    file, scores = scored(tmp_path / "s", source)
    with pytest.raises(InputError, match="over 1"):
        Config(scores=file, keep=0.8, offset=0.3)
    with pytest.raises(InputError, match="'offset' has no effect unless 'order' is hardest"):
        Config.from_mapping({"scores": file, "order": "random", "offset": 0.1}, "sampler 'data-diet'")
    with pytest.raises(InputError, match="at least 1 row"):
        build(Config(scores=file), source, 0, seed=0)
    with pytest.raises(InputError, match=r"sampler 'data-diet': there is no file '.*gone' of scores"):
        build(Config(scores=str(tmp_path / "gone")), source, 1, seed=0)
    (tmp_path / "text").write_text("not scores")
    with pytest.raises(InputError, match="is not a file of scores"):
        read_scores(tmp_path / "text", source)
    save_file({"weight": scores}, tmp_path / "model")
    with pytest.raises(InputError, match="is not a file of scores"):
        read_scores(tmp_path / "model", source)
    told = {"examples": examples_hash(source)}
    for strange in (scores.long(), scores[:, None], scores[0], scores[1:]):
        save_file({"scores": strange.clone()}, tmp_path / "strange", told)
        with pytest.raises(InputError, match="is not a file of scores"):
            read_scores(tmp_path / "strange", source)
    for other in (documents(length=9), whole()):
        with pytest.raises(InputError, match=rf"scores of {len(source)} other examples than the {len(other)} of this"):
            read_scores(file, other)
    save_file({"scores": scores * torch.nan}, tmp_path / "none", told)
    with pytest.raises(InputError, match="no example has a label"):
        build(Config(scores=str(tmp_path / "none")), source, 1, seed=0)


def test_a_resume_with_other_scores_is_refused(tmp_path: Path) -> None:
    source = documents()
    file, scores = scored(tmp_path / "s", source)
    state = build(Config(scores=file), source, 1, seed=0).state_dict()
    build(Config(scores=file), source, 1, seed=0).load_state_dict(state)
    save_file({"scores": -scores}, file, {"examples": examples_hash(source)})
    with pytest.raises(InputError, match="not those that the run began with"):
        build(Config(scores=file), source, 1, seed=0).load_state_dict(state)
