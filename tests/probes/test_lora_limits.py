"""Sizes of queries, keys and values: the definition on inputs found another way, and a run that does not notice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from adapters.models import fit, gpt2, llama, tokens
from adapters.table import ROWS, Row
from fallline.adapters import attach
from fallline.adapters.layers import adapted
from fallline.drivers.setting import build
from fallline.errors import InputError
from fallline.probes.lora_limits import change, matrix, ratios
from fallline.recipe import Recipe
from fallline.step import Run, take_step


@torch.no_grad()
def reference(
    model: Any, pieces: list[Tensor], attention: str, size: int, made: dict[str, tuple[str, int, int]]
) -> Any:
    """Head by head and part by part, on each piece alone, in its hidden states before the norm of each layer.

    Args:
        attention: path of a layer's, but for its number. made: q, k, v → its projection, its first output, its heads.
    """
    bound = math.sqrt(math.log(max(len(piece) for piece in pieces)))
    states = [model(input_ids=piece[None], output_hidden_states=True).hidden_states for piece in pieces]
    found: dict[str, Any] = {}
    for i in range(2):
        path = attention.format(i)
        block = model.get_submodule(path.rpartition(".")[0])
        norm = block.ln_1 if hasattr(block, "ln_1") else block.input_layernorm
        X = torch.cat([norm(state[i])[0] for state in states])
        for one, (name, first, heads) in made.items():
            layer = model.get_submodule(f"{path}.{name}")
            W = layer.weight if isinstance(layer, torch.nn.Linear) else layer.weight.t()
            D = layer.methods["default"].delta(layer.adapters["default"], layer.matrix)
            for part, of in (("base", W), ("adapter", D), ("both", W + D)):
                values = []
                for h in range(heads):
                    rows = of[first + h * size : first + (h + 1) * size]
                    largest = max(abs((x @ w).item()) for x in X for w in rows)
                    values.append(largest / (1 if one == "v" else size**0.25) / bound)
                found.setdefault(path, {}).setdefault(one, {})[part] = values
    return found


def same(found: Any, wanted: Any) -> None:
    told = {p: {o: {k: v.tolist() for k, v in by.items()} for o, by in made.items()} for p, made in found.items()}
    assert {p: {o: set(by) for o, by in made.items()} for p, made in told.items()} == {
        p: {o: set(by) for o, by in made.items()} for p, made in wanted.items()
    }
    for path, made in wanted.items():
        for one, by in made.items():
            for part, values in by.items():
                assert told[path][one][part] == pytest.approx(values, rel=1e-9), (path, one, part)


def test_packed_padded_rows_and_grouped_heads() -> None:
    """Padding would be by far the largest, and pieces that saw each other would give other inputs."""
    model = attach(llama().double(), "lora", rank=2)
    fit(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[63] *= 100
    noise = torch.Generator().manual_seed(3)
    pieces = [torch.randint(0, 60, (n,), generator=noise) for n in (7, 3, 5)]
    pad = torch.full((2,), 63)
    batch = {
        "input_ids": torch.stack([torch.cat([*pieces[:2], pad[:0]]), torch.cat([pieces[2], pad, pad, pad[:1]])]),
        "position_ids": torch.stack([torch.tensor([*range(7), *range(3)]), torch.arange(10)]),
        "segment": torch.tensor([[0] * 7 + [1] * 3, [2] * 5 + [-1] * 5]),
    }
    made = {"q": ("q_proj", 0, 4), "k": ("k_proj", 0, 2), "v": ("v_proj", 0, 2)}
    model.eval()
    found = ratios(model, [batch])
    same(found, reference(model, pieces, "model.layers.{}.self_attn", 8, made))
    one_by_one = ratios(model, [{k: v[i : i + 1] for k, v in batch.items()} for i in range(2)])
    same(one_by_one, {p: {o: {k: v.tolist() for k, v in b.items()} for o, b in m.items()} for p, m in found.items()})


def test_a_fused_layer_without_columns_of_packing() -> None:
    model = attach(gpt2().double(), "lora", rank=2)
    fit(model)
    model.eval()
    made = {one: ("c_attn", 32 * i, 2) for i, one in enumerate("qkv")}
    found = ratios(model, [{"input_ids": tokens()}])
    same(found, reference(model, list(tokens()), "transformer.h.{}.attn", 16, made))


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_base_and_adapter_are_what_the_layer_adds_up(row: Row, make: Any) -> None:
    model = row.on(make().double())
    fit(model, lr=row.rate)
    model.eval()
    for layer in adapted(model).values():
        x = torch.randn(3, matrix(layer).shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        bias = 0 if layer.bias is None else layer.bias
        more = change(layer, x)
        assert more is not None
        torch.testing.assert_close(x @ matrix(layer).t() + more + bias, layer(x), rtol=1e-6, atol=1e-8)


def make(corpus: Path, probes: str, adapter: str) -> Run:
    return build(
        Recipe.parse(
            "model: {name: llama, preset: tiny}\n"
            f"data: {{name: text, path: {corpus}, length: 16, vocab: 320, validation: 0.2}}\n"
            "optimizer: adamw\nschedule: constant\nsteps: 4\nbatch: 2\nmicro: 1\n"
            f"probes: {probes}\nadapter: {adapter}\n"
        )
    ).run


@pytest.mark.parametrize("adapter", ["none", "{name: lora, rank: 2, dropout: 0.2, targets: [q_proj, v_proj]}"])
def test_a_run_reports_and_does_not_change(corpus: Path, adapter: str) -> None:
    plain = make(corpus, "[]", adapter)
    probed = make(corpus, "[{name: lora-limits, every: 2, rows: 3}]", adapter)
    seen = []
    for _ in range(4):
        take_step(plain)
        take_step(probed)
        seen.append(probed.parts["lora-limits"].metrics())
    for (name, a), b in zip(plain.model.named_parameters(), probed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert [bool(told) for told in seen] == [True, False, True, True]
    told = json.loads(json.dumps(seen[-1]))["lora_limits"]
    assert set(told["below"]) == {"q", "k", "v"}
    of_q = {"base", "both"} | ({"adapter"} if adapter != "none" else set())
    assert set(told["below"]["q"]) == of_q
    assert set(told["below"]["k"]) == {"base", "both"}
    heads = [v for by in told["heads"].values() for v in by["q"]["base"]]
    assert told["below"]["q"]["base"] == sum(v < 1 for v in heads) / len(heads)
    assert told["largest"]["q"]["base"] == max(heads)
    assert (told["largest"]["q"]["adapter"] > 0) if adapter != "none" else True
    first, last = (each["lora_limits"]["largest"]["q"] for each in (seen[0], seen[-1]))
    assert first["both"] != last["both"]


def test_attention_that_is_not_known_is_refused() -> None:
    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    with pytest.raises(InputError, match=r"knows attention by layers named q_proj, .*; GPTNeoXForCausalLM has none"):
        ratios(GPTNeoXForCausalLM(config), [])
    model = llama()
    model.config.num_key_value_heads = 4
    with pytest.raises(InputError, match=r"self_attn\.k_proj has 16 outputs, its heads would have 32"):
        ratios(model, [])
    with pytest.raises(InputError, match="needs pieces of two tokens"):
        ratios(llama(), [{"input_ids": tokens(length=1)}])
