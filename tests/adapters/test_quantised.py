"""Adapters beside frozen weights of few bits: the same as beside a dense copy of them, at a fraction of the memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from adapters.models import fit, gpt2, llama, logits, state, tokens
from adapters.table import ROWS, Row
from adapters.test_run import recipe as run_recipe
from adapters.test_run import state as saved_state
from fallline import adapters
from fallline.cli.main import main
from fallline.drivers.plan.question import explain
from fallline.drivers.train import train
from fallline.drivers.trained import open_trained
from fallline.errors import InputError
from fallline.footprint import Shapes
from fallline.models.identity import fingerprint
from fallline.quantised import BLOCK, QuantisedLinear, count, quantise, rounded
from fallline.recipe import Recipe

bnb = pytest.importorskip("bitsandbytes")

KINDS: Any = ("nf4", "int8")


def pair(kind: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A quantised model, and one with dense copies of its weights."""
    few, dense = llama(dtype), llama(dtype)
    quantise(few, kind)
    with torch.no_grad():
        for path, layer in few.named_modules():
            if isinstance(layer, QuantisedLinear):
                dense.get_submodule(path).weight.copy_(layer.matrix())
    return few, dense


def held(model: Any) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def recipe(base: Path, corpus: Path, out: Path, *more: str) -> Recipe:
    return run_recipe(base, corpus, out, "model.quantise=nf4", *more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_are_those_of_bitsandbytes(kind: Any, dtype: torch.dtype) -> None:
    dense, few = llama(dtype), llama(dtype)
    names = set(few.state_dict())
    quantise(few, kind)
    layer, W = few.model.layers[1].mlp.up_proj, dense.model.layers[1].mlp.up_proj.weight.detach()
    if kind == "nf4":
        theirs = bnb.nn.Linear4bit(32, 48, bias=False, quant_type="nf4")
        theirs.weight = bnb.nn.Params4bit(W, requires_grad=False, quant_type="nf4", compress_statistics=False)
        theirs = theirs.to("cpu")
        found = theirs.weight.quant_state
        codes = torch.stack([theirs.weight.data >> 4, theirs.weight.data & 15], -1).view(-1, BLOCK).int()
        whole = (found.code[codes] * found.absmax[:, None]).view(48, 32).to(dtype)
        assert torch.equal(layer.scales, theirs.weight.quant_state.absmax)
    else:
        theirs = bnb.nn.Int8Params(W, requires_grad=False, has_fp16_weights=False).to("cpu")
        whole = (theirs.CB.float() * theirs.SCB[:, None] / 127).to(dtype)
        theirs = nn.Module()
        theirs.weight = bnb.nn.Int8Params(W, requires_grad=False, has_fp16_weights=False).to("cpu").CB
    assert torch.equal(layer.weight, theirs.weight)
    assert layer.matrix().dtype == dtype
    torch.testing.assert_close(layer.matrix(), whole)
    error = (layer.matrix().float() - W.float()).norm() / W.float().norm()
    assert error < {"nf4": 0.11, "int8": 0.01}[kind]
    assert not any(p.requires_grad for p in (layer.weight, layer.scales))
    assert {name for name in few.state_dict() if not name.endswith("scales")} == names
    for name in ("embed_tokens", "norm"):
        assert torch.equal(getattr(few.model, name).weight, getattr(dense.model, name).weight)
    assert count(few) == count(dense) == sum(p.numel() for p in dense.parameters())


@pytest.fixture(scope="session")
def even(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose rows are whole blocks, which bitsandbytes' own layers need on some processors."""
    folder = tmp_path_factory.mktemp("even")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("shape", [(48, 32), (33, 160), (129, 62), (63, 64)])
def test_rows_need_not_be_whole_blocks(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer: Any = nn.Sequential(nn.Linear(*reversed(shape)))
    W = layer[0].weight.detach().clone()
    quantise(layer, "nf4")
    assert (layer[0].matrix() - W).norm() < 0.11 * W.norm()


@pytest.mark.parametrize("row", [row for row in ROWS if row.needs != "gradient"], ids=lambda row: row.id)
def test_every_adapter_does_as_beside_a_dense_copy(row: Row) -> None:
    few, dense = pair("nf4")
    base = logits(few)
    assert torch.equal(base, logits(dense))
    row.on(few), row.on(dense)
    begun = state(few)
    fit(few, 3), fit(dense, 3)
    found = logits(few)
    torch.testing.assert_close(found, logits(dense), rtol=0, atol=1e-5)
    assert (found - base).abs().max() > 1e-2, "the adapter does something"
    frozen = {name: p for name, p in state(few).items() if ".adapters." not in name}
    assert all(torch.equal(p, begun[name]) for name, p in frozen.items())
    with adapters.disabled(few):
        assert torch.equal(logits(few), base)
    adapters.remove(few)
    assert type(few.model.layers[0].mlp.up_proj) is QuantisedLinear
    assert torch.equal(logits(few), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_too_and_with_checkpointing(dtype: torch.dtype) -> None:
    few, dense = pair("int8", dtype)
    for model in (few, dense):
        adapters.attach(model, "lora", rank=4)
    few.activation_checkpointing_enable({"use_reentrant": False})
    few.train()
    fit(few, 3), fit(dense, 3)
    torch.testing.assert_close(logits(few), logits(dense), rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.id in ("lora", "miss", "bat", "allora")], ids=lambda r: r.id
)
def test_no_whole_weight_waits_for_the_backward(row: Row) -> None:
    """Three layers of 512² and few tokens, on shapes: what is held between forward and backward."""
    with Shapes() as held:
        model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512), nn.Linear(512, 512))
        quantise(model, "nf4")
        row.on(model)
        x = torch.ones(4, 512)
        before = held.now
        held.begin()
        loss = model(x).sum()
        assert held.height - before > 4 * 512 * 512, "there is one for a moment"
        assert held.now - before < 512 * 512 / 4
        held.begin()
        loss.backward()
        most = 3.5 if row.id == "bat" else 1.5  # which forms the changed weight, and its gradient
        assert 1 < (held.height - before) / (4 * 512 * 512) < most, "nor do those of several layers lie there then"


def test_the_gradient_by_the_input_is_exact() -> None:
    layer: Any = nn.Linear(33, 48).double().float()
    quantise(layer := nn.Sequential(layer), "nf4")
    x = torch.randn(5, 33, requires_grad=True)
    y = layer(x)
    g = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, g, create_graph=True)
    W = layer[0].matrix()
    assert torch.equal(dx, g @ W)
    (twice,) = torch.autograd.grad(layer(x.tanh()).sum(), x, create_graph=True)
    twice.sum().backward()
    by_tanh = W.sum(0) * (-2 * x.tanh() * (1 - x.tanh() ** 2))
    torch.testing.assert_close(x.grad, by_tanh.detach())


def test_a_run_saves_the_adapter_alone_and_others_load_it(
    even: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(recipe(even, corpus, tmp_path / "run"), progress=None)
    assert result.metrics[-1]["val_loss"] < result.metrics[0]["val_loss"]
    trained = logits(result.run.model)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(even)
    assert record["model"]["parameters"] == sum(p.numel() for p in plain.parameters()), "the model's, no adapter's"
    assert record["versions"]["bitsandbytes"] == bnb.__version__
    folder = tmp_path / "run" / "model"
    assert not any(path.name.startswith("model") for path in folder.iterdir())

    again = open_trained(str(tmp_path / "run"), "cpu").model
    torch.testing.assert_close(logits(again), trained, rtol=0, atol=1e-5)
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    theirs: Any = AutoModelForCausalLM.from_pretrained(even, quantization_config=bits, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, folder)
    theirs.train()  # in evaluation bitsandbytes computes in bfloat16 on some processors
    with torch.no_grad():
        found = theirs(input_ids=tokens()).logits
    torch.testing.assert_close(found, trained, rtol=0, atol=1e-4)

    whole = logits(peft.PeftModel.from_pretrained(plain, folder))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "merged"), "--merge"]) == 0
    said = capsys.readouterr().out
    assert "trained beside weights in nf4, written for the weights in full precision" in said
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, whole, rtol=0, atol=1e-4)
    few = logits(AutoModelForCausalLM.from_pretrained(even, quantization_config=bits, dtype=torch.float32))
    lost = (merged - trained).abs().max()
    effect = (trained - few).abs().max()
    assert lost < effect / 2, "what is lost is small beside what was learned"


def test_an_interrupted_run_resumes_to_the_same_bits(base: Path, corpus: Path, tmp_path: Path) -> None:
    train(recipe(base, corpus, tmp_path / "whole"), progress=None)
    out = tmp_path / "cut"

    def watch(record: Any) -> str:
        if record["step"] == 5:
            raise KeyboardInterrupt
        return ""

    with pytest.raises(KeyboardInterrupt):
        train(recipe(base, corpus, out), progress=None, watch=watch)
    train(Recipe.load(out), resume=True, progress=None)
    assert saved_state(out) == saved_state(tmp_path / "whole")


def test_merged_in_place_most_of_a_change_would_be_lost() -> None:
    model = llama()
    quantise(model, "nf4")
    adapters.attach(model, "lora", rank=4)
    fit(model)
    with pytest.raises(InputError, match=r"q_proj is quantised to nf4, too coarse to merge into; save the adapter"):
        adapters.merge(model)
    layer: Any = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        W, change = layer.matrix(), layer.methods["default"].delta(layer.adapters["default"], layer.matrix)
        change *= 0.02 * W.norm() / change.norm()  # of the size that fine-tuning has
        bits, scales = rounded(W + change, "nf4")
        layer.weight.copy_(bits), layer.scales.copy_(scales)
        kept = layer.matrix() - W
    assert (kept - change).norm() > change.norm()


def test_the_plan_knows_the_bits(base: Path) -> None:
    few = explain(str(base), "adapter=lora,rank=4,quantise=nf4", memory=2**30).forecast
    model = AutoModelForCausalLM.from_pretrained(base)
    adapters.attach(model, "lora", rank=4)
    dense = held(model)
    assert few.parameters == sum(p.numel() for p in model.parameters())
    adapters.remove(model)
    quantise(model, "nf4")
    adapters.attach(model, "lora", rank=4)
    assert few.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert few.weights == held(model) < dense / 2
    assert few.weights + few.optimizer + few.moments["load"].total == dense, "when it is loaded"


def test_what_cannot_be_quantised(base: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(words: str, *more: str) -> None:
        with pytest.raises(InputError, match=words):
            train(recipe(base, corpus, tmp_path / "run", *more), progress=None)
        assert not (tmp_path / "run").exists()

    refused(
        r"'quantise' holds weights that cannot be trained; add an adapter, such as adapter: lora \(in", "adapter=none"
    )
    refused(
        "adapter 'lora-ga' begins from gradients of the weights, which quantised", "adapter={name: lora-ga, rank: 2}"
    )
    refused("cannot be compiled; leave out 'compile' or 'quantise'", "model.compile=true")
    with pytest.raises(InputError, match="model 'llama' has no option 'quantise'"):
        Recipe.parse("model: {name: llama, preset: tiny, quantise: nf4}\ndata: python-docs\nsteps: 1\nadapter: lora")
    for model, words in (
        (gpt2(), r"h.0.attn.c_attn is a Conv1D, whose weight cannot be quantised: only linear layers of torch can"),
        (nn.Sequential(nn.Linear(2, 2).double()), r"the weight of 0 is torch.float64, which cannot be quantised"),
        (nn.Embedding(2, 2), "Embedding has no linear layer to quantise"),
    ):
        before = fingerprint(model)
        with pytest.raises(InputError, match=words):
            quantise(model, "nf4")
        assert fingerprint(model) == before
    with pytest.raises(InputError, match="weights are quantised to nf4 or int8, got 'fp4'"):
        quantise(llama(), "fp4")  # type: ignore[arg-type]
    few = llama()
    quantise(few, "nf4")
    with pytest.raises(InputError, match="lora-ga' begins from gradients"):
        adapters.attach(few, "lora-ga", rank=2, data=[{"input_ids": tokens(), "labels": tokens()}])
    assert adapters.names(few) == []
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    refused(r"need the package bitsandbytes \(.*\); pip install 'fallline\[quantised\]'")
