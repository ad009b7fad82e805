"""Documents to datasets: the split, the order, the tokenizers, the fingerprint, the cache."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fallline.data.dataset import DataOptions, Dataset, make_dataset
from fallline.data.documents import Document, contents
from fallline.data.packed import PackedSource
from fallline.data.tokenizer import END, encode, learned_tokenizer
from fallline.errors import InputError

MakeUp = Callable[[int], list[Document]]
SMALL = DataOptions(length=16, vocab=300, validation=0.2)


def make(documents: list[Document], config: DataOptions = SMALL) -> Dataset:
    return make_dataset(documents, config, None, "data 'made-up'")


def texts(source: PackedSource, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The documents of a source in packing order, put together from its rows; the first and last may be cut."""
    tokens = [t for batch in source.batches(64) for row in batch["input_ids"].tolist() for t in row]
    return [text for text in tokenizer.decode(tokens).split(END) if text]


def numbers(source: PackedSource, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Which made-up documents a source holds, in order, without the shortest ones, which do not say."""
    found = [text.split()[0] for text in texts(source, tokenizer)[:-1]]
    return [int(word) for word in found if word != "y"]


def test_no_document_is_on_both_sides(made_up: MakeUp) -> None:
    documents = made_up(300)
    data = make(documents)
    train, validation = (numbers(s, data.tokenizer) for s in (data.train, data.validation))
    assert not set(train) & set(validation)
    assert len(train) == len(set(train))
    told = sum(not d.text.isspace() and d.text not in ("", "y") for d in documents)
    assert told - 4 <= len(train) + len(validation) <= told  # all, but for the dropped tails
    assert 0.1 * told < len(validation) < 0.3 * told


def test_texts_come_back_whole(made_up: MakeUp) -> None:
    documents = made_up(300)
    data = make(documents)
    originals = {d.text for d in documents}
    for source in (data.train, data.validation):
        for text in texts(source, data.tokenizer)[:-1]:  # the last one may be cut
            assert text in originals


def test_split_and_order_stay_when_documents_are_added(made_up: MakeUp) -> None:
    documents = made_up(200)
    new = [Document(f"new{i}", f"{1000 + i} more") for i in range(20)]
    before, after = make(documents), make([*new[:10], *reversed(documents), *new[10:]])
    for old, source in ((before.train, after.train), (before.validation, after.validation)):
        then, now = numbers(old, before.tokenizer), [n for n in numbers(source, after.tokenizer) if n < 1000]
        common = min(len(then), len(now))  # the dropped tails differ
        assert common > 0.9 * len(then)
        assert then[:common] == now[:common]


def test_order_is_mixed(made_up: MakeUp) -> None:
    data = make(made_up(300))
    order = numbers(data.train, data.tokenizer)
    rising = sum(a < b for a, b in itertools.pairwise(order))
    assert 0.4 * len(order) < rising < 0.6 * len(order)


def test_summary_and_fingerprint(made_up: MakeUp) -> None:
    documents = made_up(200)
    data = make(documents)
    kept = [d for d in documents if d.text.strip()]
    tokens = sum(len(data.tokenizer.encode(d.text, add_special_tokens=False)) + 2 for d in kept)
    assert data.summary == {
        "documents": len(kept),
        "characters": sum(len(d.text) for d in kept),
        "tokens": tokens,
        "vocabulary": 300,
        "train_rows": len(data.train.rows) - 1,
        "validation_rows": len(data.validation.rows) - 1,
    }
    digest = hashlib.sha256()
    for d in kept:
        for part in (d.id.encode(), d.text.encode()):
            digest.update(len(part).to_bytes(8, "little") + part)
    assert data.fingerprint == digest.hexdigest()


def test_fingerprint_tells_documents_apart() -> None:
    sets = [("a", "bc"), ("ab", "c"), ("a", "bd")], [("a", "bc"), ("a", "bd")], [("a", "bd"), ("a", "bc")], [("a", "b")]
    assert len({contents([Document(*pair) for pair in pairs]).fingerprint for pairs in sets}) == 4


def test_every_option_has_an_effect(made_up: MakeUp) -> None:
    documents = made_up(300)
    base = make(documents)
    longer = make(documents, DataOptions(length=32, vocab=300, validation=0.2))
    richer = make(documents, DataOptions(length=16, vocab=350, validation=0.2))
    less = make(documents, DataOptions(length=16, vocab=300, validation=0.1))
    assert longer.train.length == 32
    assert len(richer.tokenizer) == 350
    assert set(numbers(less.validation, less.tokenizer)) < set(numbers(base.validation, base.tokenizer))


@pytest.mark.parametrize("wrong", [{"length": 7}, {"vocab": 256}, {"validation": 0.0}, {"validation": 1.0}])
def test_impossible_options(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        DataOptions.from_mapping(wrong, "data 'made-up'")


# the learned tokenizer


def test_it_saves_and_loads(made_up: MakeUp, tmp_path: Path) -> None:
    tokenizer = make(made_up(200)).tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = f"unseen: ZÜRICH {END}\r\n\0 🦀"
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert loaded.encode(text, add_special_tokens=False, split_special_tokens=True) == ids
    assert loaded.decode(ids) == text
    assert {loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id} == {loaded.convert_tokens_to_ids(END)}
    assert loaded.all_special_tokens == [END]


def test_text_cannot_spell_a_special_token() -> None:
    documents = [Document(str(i), f"{i} before {END} after") for i in range(100)]
    fingerprint = contents(documents).fingerprint
    tokenizer = learned_tokenizer(documents, fingerprint, 300)
    encoded = encode(documents, fingerprint, tokenizer)
    end = tokenizer.eos_token_id
    assert int((encoded.tokens == end).sum()) == 2 * len(documents)
    first = encoded.tokens[: encoded.size[0]].tolist()
    assert (first[0], first[-1]) == (end, end)
    assert tokenizer.decode(first[1:-1]) == documents[0].text


def test_a_text_too_small_for_the_vocabulary_gives_fewer_entries() -> None:
    data = make([Document(str(i), "abcdefgh" * 4) for i in range(60)], DataOptions(length=8, vocab=9000))
    assert 257 < len(data.tokenizer) == data.summary["vocabulary"] < 300


# a model's own tokenizer


def own(start: str | None, end: str | None, vocabulary: int = 300) -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["?", "<s>", "</s>", *(f"w{i}" for i in range(vocabulary - 3))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=start, eos_token=end, unk_token="?")


@pytest.mark.parametrize("start", [None, "<s>"])
@pytest.mark.parametrize("end", [None, "</s>"])
@pytest.mark.parametrize(("vocabulary", "dtype"), [(300, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_start_and_end_where_the_tokenizer_has_them(
    start: str | None, end: str | None, vocabulary: int, dtype: type
) -> None:
    tokenizer = own(start, end, vocabulary)
    largest = f"w{vocabulary - 4}"
    documents = [Document("a", f"w0 w1 {largest}"), Document("b", "w2"), Document("c", "w3 w4")]
    encoded = encode(documents, contents(documents).fingerprint, tokenizer)
    ids = [[3, 4, vocabulary - 1], [5], [6, 7]]
    expected = [[1] * (start is not None) + text + [2] * (end is not None) for text in ids]
    assert encoded.tokens.dtype == dtype
    assert encoded.tokens.tolist() == [t for text in expected for t in text]
    assert encoded.size.tolist() == [len(text) for text in expected]


def test_a_tokenizer_without_a_fast_form() -> None:
    tokenizer = ByT5Tokenizer()
    documents = [Document(str(i), f"müde {i}") for i in range(80)]
    config = DataOptions(length=16, validation=0.2)
    data = make_dataset(documents, config, tokenizer, "data 'made-up'")
    assert data.tokenizer is tokenizer
    assert data.summary["tokens"] == sum(len(d.text.encode()) + 1 for d in documents)
    assert data.train.pad == tokenizer.pad_token_id


def test_two_tokenizers_do_not_share_tokens() -> None:
    documents = [Document(str(i), f"w{i} w1") for i in range(200)]
    with_end, without = (
        make_dataset(documents, DataOptions(length=8), own(None, end), "data 'made-up'") for end in ("</s>", None)
    )
    assert with_end.summary["tokens"] == 600
    assert without.summary["tokens"] == 400


def test_documents_that_become_no_tokens_are_left_out() -> None:
    tokenizer = own(None, None)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("-", "removed")
    documents = [Document(str(i), "-" if i % 3 else "w1-" * 9) for i in range(300)]
    data = make_dataset(documents, DataOptions(length=8), tokenizer, "data 'made-up'")
    assert data.summary["tokens"] == 900
    assert int(data.train.size.min()) >= 1


def test_a_vocabulary_size_for_a_tokenizer_that_is_not_learned() -> None:
    with pytest.raises(InputError, match="'vocab' has no effect") as caught:
        make_dataset([Document("a", "b")], DataOptions(vocab=500), own(None, None), "data 'made-up'")
    assert "\n" not in str(caught.value)


# too little


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "there is no text"),
        ([Document("a", " "), Document("b", "")], "there is no text"),
        (
            [Document("a", "long enough " * 999)],
            r"too little text to (train|validate) on: 0 tokens in 0 of 1 documents",
        ),
        ([Document(str(i), "short") for i in range(40)], r"one row of 'length' needs 256"),
    ],
)
def test_too_little_text(documents: list[Document], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make(documents, DataOptions())
    assert str(caught.value).startswith("data 'made-up': ")
    assert "\n" not in str(caught.value)


# the cache


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def same(a: Dataset, b: Dataset) -> bool:
    return (
        a.fingerprint == b.fingerprint
        and a.summary == b.summary
        and a.tokenizer.get_vocab() == b.tokenizer.get_vocab()
        and np.array_equal(a.train.tokens, b.train.tokens)
        and np.array_equal(a.train.start, b.train.start)
        and np.array_equal(a.validation.start, b.validation.start)
    )


def test_the_second_time_nothing_is_tokenized(made_up: MakeUp, fresh_cache: Path) -> None:
    documents = made_up(200)

    class Counted:
        passes = 0

        def __iter__(self) -> Iterator[Document]:
            self.passes += 1
            return iter(documents)

    counted = Counted()
    first = make_dataset(counted, SMALL, None, "data 'made-up'")
    assert counted.passes == 3  # hash, learn, tokenize
    second = make_dataset(counted, SMALL, None, "data 'made-up'")
    assert counted.passes == 4
    assert same(first, second)


def test_damaged_entries_are_made_again(made_up: MakeUp, fresh_cache: Path) -> None:
    documents = made_up(200)
    first = make(documents)
    before = files(fresh_cache)
    assert sorted(name.split("/")[0] for name in before) == ["tokenizers", "tokens"]
    for name in before:
        path = fresh_cache / name
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 255
        path.unlink()
        path.write_bytes(raw)
        assert same(first, make(documents))
        assert files(fresh_cache) == before


CHILD = """
import json, sys, time
from pathlib import Path
import numpy as np
from fallline.data.dataset import DataOptions, make_dataset
from fallline.data.documents import Document

folder = Path(sys.argv[1])
documents = [Document(*pair) for pair in json.loads((folder / "documents.json").read_text())]
(folder / "ready").touch()
while not (folder / "go").exists():
    time.sleep(0.001)
for vocab in range(300, 320):
    data = make_dataset(documents, DataOptions(length=16, vocab=vocab, validation=0.2), None, "data")
    assert len(data.tokenizer) == vocab
    for batch in data.train.batches(64):
        assert int(batch["input_ids"].max()) < vocab
"""


def test_two_processes_at_once_and_again_elsewhere(
    made_up: MakeUp, fresh_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This one, and one with hashes of its own."""
    documents = made_up(200)
    (tmp_path / "documents.json").write_text(json.dumps([[d.id, d.text] for d in documents]))
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "ready").exists():
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.01)
    (tmp_path / "go").touch()
    for vocab in range(300, 320):
        data = make(documents, DataOptions(length=16, vocab=vocab, validation=0.2))
        assert len(data.tokenizer) == vocab
        for batch in data.train.batches(64):
            assert int(batch["input_ids"].max()) < vocab
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 0, errors
    together = files(fresh_cache)
    assert len(together) == 40  # no temporary file is left

    monkeypatch.setenv("FALLLINE_CACHE", str(tmp_path / "alone"))
    for vocab in range(300, 320):
        make(documents, DataOptions(length=16, vocab=vocab, validation=0.2))
    assert files(tmp_path / "alone") == together  # learning is deterministic, to the byte
