"""Models by folder or hub id: what is loaded, and what is refused in one line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fallline.catalog import find
from fallline.errors import InputError
from fallline.isolation import check_isolation
from fallline.models import pretrained
from fallline.models.identity import fingerprint

CPU = torch.device("cpu")
SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        ["the rain in Spain"],
        trainers.BpeTrainer(vocab_size=270, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False),
    )
    return hf.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")


@pytest.fixture(scope="module")
def good(tokenizer, tmp_path_factory):
    """A folder with a tiny Llama of 64 positions and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "good"
    config = hf.LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **SIZE)
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def broken(good, tmp_path):
    """A copy of `good` to break."""
    return shutil.copytree(good, tmp_path / "broken")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """The hub answers nothing, at once."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def load(path, length=64, dtype=torch.float32, **options):
    config = pretrained.Config(path=str(path), **options)
    tokenizer = pretrained.tokenizer(config)
    return pretrained.build(config, tokenizer=tokenizer, length=length, seed=0, dtype=dtype, device=CPU)


def reconfigure(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_loads_weights_and_tokenizer_as_they_are(good, tokenizer):
    state = torch.get_rng_state()
    model = load(good, attention="eager")
    assert fingerprint(model) == fingerprint(hf.AutoModelForCausalLM.from_pretrained(good))
    assert model.config._attn_implementation == "eager"
    found = pretrained.tokenizer(pretrained.Config(path=str(good)))
    assert found.get_vocab() == tokenizer.get_vocab()
    assert found.eos_token == "<eos>"
    assert torch.equal(torch.get_rng_state(), state)
    check_isolation(model)


def test_the_type_asked_for_wins(good):
    assert {p.dtype for p in load(good, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    half = load(good, dtype=torch.bfloat16)
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32


def test_checkpointing(good):
    assert load(good, checkpointing=True).model.layers[0].gradient_checkpointing
    assert not load(good).model.layers[0].gradient_checkpointing


def test_another_architecture(tokenizer, tmp_path):
    config = hf.GPT2Config(
        vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert isinstance(load(tmp_path, 32), hf.GPT2LMHeadModel)
    with pytest.raises(InputError, match=r"rows of 33 tokens are longer than the 32 positions"):
        load(tmp_path, 33)


def refused(words, path, **options):
    with pytest.raises(InputError, match=words) as error:
        load(path, **options)
    assert "\n" not in str(error.value)


def test_rows_longer_than_the_model(good):
    refused("rows of 65 tokens are longer than the 64 positions", good, length=65)


def test_places_without_a_model(good, tmp_path):
    refused("no model folder", tmp_path / "nowhere")
    refused("no model folder './x'", "./x")
    refused("no model folder 'x/'", "x/")
    refused("is a file; give the folder", good / "config.json")
    refused("has no config.json; a 🤗 model folder has one", tmp_path)
    shutil.copytree(good, tmp_path / "model")
    refused("has no config.json; did you mean .*model'", tmp_path)


def test_ids_that_the_hub_does_not_give():
    refused("cannot load the configuration of model 'nobody/nothing'", "nobody/nothing")
    refused("cannot load the configuration of model 'two words'", "two words")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{nope", "not a valid JSON file"),
        ('{"model_type": "unheard"}', "model type `unheard`"),
        ('{"hidden_size": 3}', "cannot load the configuration"),
        ('{"model_type": "llama", "hidden_size": "x"}', "'hidden_size' expected int"),
        ('{"model_type": "t5"}', "is a 't5', which is no causal language model"),
        ('{"model_type": "vit"}', "is a 'vit', which is no causal language model"),
        ('{"model_type": "own", "auto_map": {"AutoConfig": "a.B"}}', "trust_remote_code"),
    ],
)
def test_configurations(broken, text, words):
    (broken / "config.json").write_text(text)
    refused(words, broken)


def test_weights(broken, good):
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused("cannot load the weights", broken)
    weights.unlink()
    refused("cannot load the weights .*no file named", broken)
    shutil.copy(good / "model.safetensors", weights)
    reconfigure(broken, num_hidden_layers=2)
    refused("9 tensors are missing or of another shape, the first 'model.layers.1.input_layernorm.weight'", broken)
    reconfigure(broken, num_hidden_layers=1, intermediate_size=64)
    refused("3 tensors are missing or of another shape, the first 'model.layers.0.mlp.down_proj.weight'", broken)


def test_tokenizers(broken, tmp_path, tokenizer):
    (broken / "tokenizer.json").unlink()
    (broken / "tokenizer_config.json").unlink()
    refused("cannot load the tokenizer|has no tokenizer", broken)
    config = hf.GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")  # 🤗 makes one of a single word
    refused("has no tokenizer", tmp_path / "gpt2")


def test_a_tokenizer_with_more_words_than_the_model(tokenizer, tmp_path):
    hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=100, max_position_embeddings=64, **SIZE)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    refused(f"the tokenizer has {len(tokenizer)} words, model .* has 100", tmp_path)


def test_attention_that_the_architecture_lacks(tokenizer, tmp_path):
    config = hf.Gemma2Config(vocab_size=300, head_dim=8, num_key_value_heads=1, max_position_embeddings=64, **SIZE)
    hf.Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    refused("a 'gemma2' model has no sdpa attention; set attention: eager", tmp_path)
    check_isolation(load(tmp_path, attention="eager"))


def test_checkpointing_that_the_architecture_lacks(tokenizer, tmp_path):
    hf.OpenAIGPTLMHeadModel(
        hf.OpenAIGPTConfig(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    refused("OpenAIGPTLMHeadModel cannot checkpoint", tmp_path, attention="eager", checkpointing=True)


def test_in_the_catalogue():
    module = find("model", "pretrained").load()
    assert module.Config.brings_tokenizer
    with pytest.raises(InputError, match="needs the option 'path'"):
        module.Config.from_mapping({}, "model 'pretrained'")
