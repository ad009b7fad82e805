"""PEFT checkpoints, both ways, after training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from fallline.adapters import attach, load, save
from fallline.adapters.layers import adapted
from fallline.errors import InputError

from .models import fit, gpt2, llama, logits

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's about Transformers


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("options", [{"rank": 4}, {"rank": 3, "alpha": 5.0, "rslora": False}])
def test_peft_loads_what_we_save(make: Any, options: dict[str, Any], tmp_path: Path) -> None:
    base = logits(make())
    model = attach(make(), "lora", **options)
    fit(model)
    tuned = logits(model)
    assert (tuned - base).abs().max() > 0.1, "the change must be clearly there"
    save(model, tmp_path, base="some/model")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(logits(theirs), tuned, rtol=1e-6, atol=1e-6)
    again = load(make(), tmp_path)
    assert torch.equal(logits(again), tuned)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "some/model"
    assert len(settings["target_modules"]) < len(adapted(model)), "names in place of paths where they will do"
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(logits(merged), tuned, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": "all-linear"},
        {"r": 4, "lora_alpha": 8, "rank_pattern": {"layers.0.*": 2, "h.0.*": 2}, "target_modules": "all-linear"},
        {
            "r": 2,
            "alpha_pattern": {"q_proj": 5, "c_attn": 5},
            "target_modules": "all-linear",
            "init_lora_weights": "gaussian",
        },
    ],
)
def test_we_load_what_peft_saves(make: Any, options: dict[str, Any], tmp_path: Path) -> None:
    config = peft.LoraConfig(**options, task_type="CAUSAL_LM", fan_in_fan_out=make is gpt2)
    theirs = peft.get_peft_model(make(), config)
    fit(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = load(make(), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-6, atol=1e-6)
    save(ours, tmp_path / "ours")  # and back
    back = peft.PeftModel.from_pretrained(make(), tmp_path / "ours")
    torch.testing.assert_close(logits(back), logits(theirs), rtol=1e-6, atol=1e-6)


def test_both_train_alike_from_the_same_beginning(tmp_path: Path) -> None:
    base = llama(torch.float64)  # in float32, Adam makes large steps of what rounding leaves of a zero
    save(attach(llama(torch.float64), "lora", rank=4), tmp_path)
    ours = load(llama(torch.float64), tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(torch.float64), tmp_path, is_trainable=True)
    fit(ours, steps=50, lr=5e-3)
    fit(theirs, steps=50, lr=5e-3)
    assert (logits(ours) - logits(base)).abs().max() > 0.1
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-7, atol=1e-7)


def test_paths_are_written_where_names_would_match_more(tmp_path: Path) -> None:
    model = attach(llama(), "lora", rank=2, targets="layers.1.self_attn.q_proj")
    fit(model)
    save(model, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


def test_a_model_that_generates_nothing_and_has_blocks_named_as_its_layers(tmp_path: Path) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        linear = torch.nn.Linear
        return torch.nn.Sequential(torch.nn.Sequential(linear(4, 8)), torch.nn.Sequential(linear(8, 3)))

    model = attach(make(), "lora", rank=2)
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_()
    save(model, tmp_path)
    x = torch.randn(5, 4)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(make(), tmp_path)(x), model(x))


def test_a_rank_and_a_strength_of_a_path_that_another_ends_in(tmp_path: Path) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        model = torch.nn.Sequential()
        model.body = torch.nn.Sequential()
        model.body.fc, model.fc = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        return model

    config = peft.LoraConfig(r=2, target_modules=["fc"], rank_pattern={"^fc": 3}, alpha_pattern={"^fc": 40})
    config.init_lora_weights = False
    theirs: Any = peft.get_peft_model(make(), config)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    save(load(make(), tmp_path / "theirs"), tmp_path / "ours")
    x = torch.randn(5, 4)
    torch.testing.assert_close(load(make(), tmp_path / "ours")(x), theirs(x))
    torch.testing.assert_close(peft.PeftModel.from_pretrained(make(), tmp_path / "ours")(x), theirs(x))


def test_a_loaded_adapter_goes_on_training_beside_others(tmp_path: Path) -> None:
    model = attach(llama(), "lora", rank=2)
    fit(model)
    save(model, tmp_path)
    before = logits(model)
    load(model, tmp_path, name="second")
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    fit(model)
    assert not torch.allclose(logits(model), before, atol=1e-3)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(attach(llama(), "lora", rank=2), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("peft_type", "LOHA", "the adapter is a 'LOHA'; only LORA, .* can be loaded"),
        ("use_dora", True, "'use_dora' is True, which this version does not know"),
        ("modules_to_save", ["lm_head"], "'modules_to_save' is"),
        ("bias", "all", "trained biases"),
        ("r", 0, "cannot be used: 'rank' must be above 0, got 0"),
        ("lora_alpha", None, "adapter_config.json cannot be used: 'alpha' must be a number"),
        ("alpha_pattern", {"(": 3}, "adapter_config.json cannot be used"),
        ("init_lora_weights", "pissa", "'init_lora_weights' is 'pissa', which changes the base weights"),
    ],
)
def test_what_we_cannot_compute_is_refused(saved: Path, key: str, value: object, message: str) -> None:
    path = saved / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    model = llama()
    with pytest.raises(InputError, match=message):
        load(model, saved)
    assert not adapted(model)


def test_tensors_that_do_not_fit_are_refused(saved: Path) -> None:
    file = saved / "adapter_model.safetensors"
    whole = load_file(file)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    cases = {
        "has only one of lora_A and lora_B": {k: v for k, v in whole.items() if k != name},
        r"do not fit 'model.layers.0.self_attn.q_proj' with its weight of 32 × 32": whole | {name: torch.zeros(2, 9)},
        "the model has no linear layer 'model.layers.9": whole
        | {name.replace("layers.0", "layers.9"): torch.zeros(2, 32)},
        "is not of a LoRA on a linear layer": whole | {"base_model.model.lora_embedding_A": torch.zeros(1)},
        "holds no tensors": {},
    }
    for message, tensors in cases.items():
        save_file(tensors, file)
        with pytest.raises(InputError, match=message):
            load(llama(), saved)
    file.write_bytes(b"\x00" * 20)
    with pytest.raises(InputError, match="cannot read"):
        load(llama(), saved)
    file.unlink()
    with pytest.raises(InputError, match="cannot read"):
        load(llama(), saved)
    with pytest.raises(InputError, match=r"cannot read .*adapter_config.json"):
        load(llama(), saved / "nowhere")


def test_saving_an_adapter_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no adapter 'other'; valid: default"):
        save(attach(llama(), "lora"), tmp_path, name="other")
    with pytest.raises(InputError, match="no adapter 'default'"):
        save(llama(), tmp_path)
