"""Opening what was trained: runs, adapters, folders and names; and what is said when it cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM

from fallline import checkpoint
from fallline.drivers.trained import open_trained
from fallline.errors import InputError
from talkers import adapter_run, byte_tokenizer, full_run, save_model

IDS = torch.arange(3, 43)[None]


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def test_a_finished_run_gives_the_weights_it_ended_with(tmp_path: Path, corpus: Path) -> None:
    result = full_run(tmp_path / "run", corpus, "checkpoint={every: 2}")
    found = open_trained(str(tmp_path / "run"))
    assert torch.equal(logits(found.model), logits(result.run.model.eval()))
    assert not found.model.training
    assert (found.folder, found.adapter) == (tmp_path / "run" / "model", False)
    assert found.tokenizer.decode(found.tokenizer("The assert statement").input_ids) == "The assert statement"


def test_an_interrupted_run_gives_its_newest_good_checkpoint(
    tmp_path: Path, corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    full_run(run, corpus, "checkpoint={every: 2, keep: 3}")
    (run / "model").unlink()
    older, newer = [saved.path / "model" for saved in checkpoint.find(run)][-2:]
    assert open_trained(str(run)).folder == newer
    with (newer / "model.safetensors").open("r+b") as file:  # the size stays
        file.seek(-4, 2)
        file.write(b"\1\2\3\4")
    found = open_trained(str(run))
    assert found.folder == older
    assert "passing over a checkpoint" in caplog.text
    assert torch.equal(logits(found.model), logits(AutoModelForCausalLM.from_pretrained(older)))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(InputError, match=f"has no checkpoint to open; continue the run first: .* {run} --resume"):
        open_trained(str(run))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_adapter_run_gives_its_base_with_the_adapter(tmp_path: Path, corpus: Path, precision: str) -> None:
    base = save_model(tmp_path / "base", byte_tokenizer())
    result = adapter_run(tmp_path / "run", tmp_path / "base", corpus, f"precision={precision}")
    found = open_trained(str(tmp_path / "run"))
    assert found.adapter
    assert found.model.dtype == getattr(torch, precision)
    assert torch.equal(logits(found.model), logits(result.run.model.eval()))
    assert (logits(found.model) - logits(base)).abs().max() > 0.1, "it has learned something"
    assert found.tokenizer.chat_template == byte_tokenizer().chat_template


def test_a_base_that_has_changed_is_refused(tmp_path: Path, corpus: Path) -> None:
    save_model(tmp_path / "base", byte_tokenizer())
    adapter_run(tmp_path / "run", tmp_path / "base", corpus)
    save_model(tmp_path / "base", byte_tokenizer(), seed=1)
    with pytest.raises(InputError, match=r"the model '.*base' that .*run began with has changed since"):
        open_trained(str(tmp_path / "run"))
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(InputError, match=r"there is no model folder '.*base'"):
        open_trained(str(tmp_path / "run"))
    record = tmp_path / "run" / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"precision": "int1"}))
    with pytest.raises(InputError, match=r"run\.json is damaged"):
        open_trained(str(tmp_path / "run"))


def test_an_adapter_that_peft_wrote(tmp_path: Path) -> None:
    save_model(tmp_path / "base", byte_tokenizer())
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    theirs = get_peft_model(base, LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    folder = tmp_path / "adapter"
    theirs.save_pretrained(folder)
    found = open_trained(str(folder))
    assert torch.allclose(logits(found.model), logits(theirs.eval()), atol=1e-5)
    assert (found.folder, found.adapter) == (folder, True)
    assert found.tokenizer.chat_template == byte_tokenizer().chat_template, "the base's"

    settings = json.loads((folder / "adapter_config.json").read_text())
    for base_name, words in (
        (str(tmp_path / "gone"), r"there is no model folder '.*gone' \(the base model in .*adapter_config\.json\)"),
        (None, r"adapter_config\.json does not say which model it is for"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": base_name}))
        with pytest.raises(InputError, match=words):
            open_trained(str(folder))


def test_a_folder_keeps_its_dtype(tmp_path: Path) -> None:
    save_model(tmp_path / "half", byte_tokenizer(), dtype=torch.bfloat16)
    found = open_trained(str(tmp_path / "half"))
    assert found.model.dtype == torch.bfloat16
    assert torch.equal(
        logits(found.model), logits(LlamaForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.bfloat16))
    )


def test_an_architecture_that_has_eager_attention_only(tmp_path: Path) -> None:
    config = Gemma2Config(
        vocab_size=len(byte_tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert open_trained(str(tmp_path)).model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smollm2-135m-instrct", "did you mean 'smollm2-135m-instruct'"),
        ("llama", "begins untrained"),
        ("pretrained", "needs the option 'path'"),
        ("./nothing", "there is no model folder './nothing'"),
    ],
)
def test_unknown_names(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        open_trained(name)


def test_the_nearest_run_is_named(tmp_path: Path, corpus: Path) -> None:
    full_run(tmp_path / "mine-1", corpus)
    with pytest.raises(InputError, match=f"there is no run '{tmp_path}/mine-2'; did you mean '{tmp_path}/mine-1'"):
        open_trained(str(tmp_path / "mine-2"))
    with pytest.raises(InputError, match="is not available here"):
        open_trained(str(tmp_path / "mine-1"), "cuda:99")
