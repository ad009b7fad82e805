"""Choosing layers, several adapters, merging and removing."""

from __future__ import annotations

import copy

import pytest
import torch

from fallline.adapters import activate, attach, disabled, merge, names, remove, unmerge
from fallline.adapters.layers import adapted, given, select
from fallline.errors import InputError

from .models import fit, gpt2, llama, logits, state


def test_all_linear_is_every_linear_layer_but_the_head() -> None:
    model = llama(tied=False)
    chosen = select(model, ("all-linear",))
    assert len(chosen) == 2 * 7
    assert "lm_head" not in chosen
    assert len(select(gpt2(), ("all-linear",))) == 2 * 4


@pytest.mark.parametrize(
    ("target", "paths"),
    [
        ("q_proj", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        ("layers.1.mlp.up_proj", ["model.layers.1.mlp.up_proj"]),
        ("model.layers.0.self_attn.[qk]_proj", ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]),
        ("lm_head", ["lm_head"]),
    ],
)
def test_targets_are_names_paths_or_patterns(target: str, paths: list[str]) -> None:
    assert select(llama(), (target,)) == paths


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("q_prj", "no linear layer is named 'q_prj'; did you mean 'q_proj'"),
        ("embed_tokens", "model.embed_tokens is a Embedding, adapters go on linear layers"),
    ],
)
def test_a_target_that_is_no_linear_layer_is_refused(target: str, message: str) -> None:
    model = llama()
    with pytest.raises(InputError, match=message):
        attach(model, "lora", targets=target)
    assert not adapted(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_linear_layer_of_another_kind_is_not_passed_over() -> None:
    class Linear4bit(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), Linear4bit(2, 2))
    with pytest.raises(InputError, match="1 is a Linear4bit, which cannot have an adapter"):
        attach(model, "lora")


def test_base_names_stay_and_only_the_adapter_is_trained() -> None:
    model = llama()
    before = state(model)
    attach(model, "lora", rank=2)
    fit(model)
    after = state(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == after.keys() - before.keys()
    assert given(model) == set(llama().state_dict())


def test_several_adapters_each_by_name_and_added_up() -> None:
    model = attach(llama(), "lora", rank=2, name="one", targets="q_proj")
    fit(model)
    one = logits(model)
    attach(model, "lora", rank=3, name="two", seed=5, targets=("q_proj", "up_proj"))
    assert names(model) == ["one", "two"]
    fit(model)
    two = logits(model)
    activate(model, "one")
    assert torch.equal(logits(model), one)
    assert all("adapters.one" in name for name, p in model.named_parameters() if p.requires_grad)
    activate(model, "one", "two")
    both = logits(model)
    assert not torch.allclose(both, one, atol=1e-3)
    assert not torch.allclose(both, two, atol=1e-3)
    merge(model)
    torch.testing.assert_close(logits(model), both, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="no adapter 'thre'; valid: one, two"):
        activate(model, "thre")


def test_without_adapters_the_base_answers() -> None:
    base = logits(llama())
    model = attach(llama(), "lora", rank=2)
    fit(model)
    tuned = logits(model)
    with disabled(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), tuned)
    activate(model)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_merged_equals_trained_and_unmerging_is_exact(make: object) -> None:
    model = attach(make(), "lora", rank=4)  # type: ignore[operator]
    base = state(model)
    fit(model)
    tuned = logits(model)
    merge(model, keep=True)
    torch.testing.assert_close(logits(model), tuned, rtol=1e-5, atol=1e-5)
    assert any(not torch.equal(p, base[name]) for name, p in model.named_parameters() if ".adapters." not in name)
    unmerge(model)
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if ".adapters." not in n)
    assert torch.equal(logits(model), tuned)


def test_merging_into_bfloat16_rounds_the_sum_once() -> None:
    model = attach(llama(torch.bfloat16), "lora", rank=4)
    fit(model)
    layers = adapted(model)
    assert {layer.adapters["default"].lora_A.dtype for layer in layers.values()} == {torch.float32}
    wanted = {
        path: (
            layer.weight.double() + layer.methods["default"].delta(layer.adapters["default"], layer.matrix).double()
        ).bfloat16()
        for path, layer in layers.items()
    }
    tuned = logits(model).float()
    merge(model)
    for path, layer in layers.items():
        off = (layer.weight.float() - wanted[path].float()).abs()
        assert bool((off <= wanted[path].float().abs() * 2**-7).all())  # one unit in the last place, at a tie
        assert (off > 0).float().mean() < 0.01
    assert (logits(model).float() - tuned).abs().max() < 0.05 * tuned.abs().max()


def test_what_cannot_be_merged_or_unmerged_is_refused() -> None:
    model = llama()
    with pytest.raises(InputError, match="no active adapter"):
        merge(model)
    attach(model, "lora", rank=2, targets="lm_head")
    before = state(model)
    with pytest.raises(InputError, match=r"the weight of lm_head is also that of model.embed_tokens"):
        merge(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    other = attach(llama(), "lora", rank=2)
    with pytest.raises(InputError, match="nothing to unmerge"):
        unmerge(other)
    merge(other)
    with pytest.raises(InputError, match="merge with keep=True"):
        unmerge(other)
    frozen = {name for name, p in other.named_parameters() if not p.requires_grad}
    for act in (lambda: attach(other, "lora", name="new"), lambda: activate(other, "default")):
        with pytest.raises(InputError, match="merged into the weights"):
            act()
    assert {name for name, p in other.named_parameters() if not p.requires_grad} == frozen


def test_removing_leaves_plain_layers() -> None:
    base = logits(llama())
    model = attach(llama(), "lora", rank=2, name="one", targets="q_proj")
    attach(model, "lora", rank=2, name="two")
    fit(model)
    remove(model, "two")
    assert names(model) == ["one"]
    assert len(adapted(model)) == 2
    remove(model)
    assert not adapted(model)
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert vars(model.model.layers[0].self_attn.q_proj).keys() == vars(llama().model.layers[0].self_attn.q_proj).keys()
    assert torch.equal(logits(model), base)
    assert list(model.state_dict()) == list(llama().state_dict())


def test_a_merged_model_without_its_adapter_is_a_plain_one(tmp_path: object) -> None:
    from transformers import AutoModelForCausalLM

    model = attach(llama(), "lora", rank=2)
    fit(model)
    tuned = logits(model)
    merge(model)
    remove(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), tuned, rtol=1e-5, atol=1e-5)


def test_names_are_checked() -> None:
    model = attach(llama(), "lora")
    with pytest.raises(InputError, match="has an adapter 'default' already"):
        attach(model, "lora")
    with pytest.raises(InputError, match=r"letters, digits and underscores and no torch word, got 'a\.b'"):
        attach(model, "lora", name="a.b")
    with pytest.raises(InputError, match="no torch word, got 'train'"):
        attach(llama(), "lora", name="train")


def test_layers_that_something_else_has_taken_over_are_refused() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = llama()
    add_hook_to_module(model.model.layers[1].mlp.up_proj, ModelHook())
    with pytest.raises(InputError, match=r"model.layers.1.mlp.up_proj is offloaded, or its forward was replaced"):
        attach(model, "lora")
    assert not adapted(model)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(InputError, match="wraps a model; give the model itself"):
        attach(torch.compile(llama()), "lora")


def test_a_bias_or_weight_that_is_thawed_beside_the_adapter_is_trained() -> None:
    model = attach(gpt2(), "lora", rank=2)
    thawed = {name: p for name, p in model.named_parameters() if name.endswith(("c_fc.bias", "c_proj.weight"))}
    for p in thawed.values():
        p.requires_grad_(True)
    before = state(model)
    fit(model)
    assert thawed
    assert all(not torch.equal(p, before[name]) for name, p in thawed.items())


def test_a_copy_is_independent() -> None:
    model = attach(llama(), "lora", rank=2)
    twin = copy.deepcopy(model)
    fit(model)
    assert torch.equal(logits(twin), logits(llama()))
    remove(twin)
    assert names(model) == ["default"]


def test_hooks_and_identity_of_a_layer_stay() -> None:
    model = llama()
    layer = model.model.layers[0].self_attn.q_proj
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    attach(model, "lora", rank=2)
    assert model.model.layers[0].self_attn.q_proj is layer
    logits(model)
    assert seen


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        model = attach(llama(), "lora", rank=2)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        fit(model, steps=3)
        found.append(state(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
