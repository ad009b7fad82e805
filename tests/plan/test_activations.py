"""What a pass is said to hold is what the real pass holds; few layers stand for many."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from fallline.drivers.plan import Setup, activations, forecast, setup_of
from fallline.drivers.plan.activations import Marks, alike, problem, skeleton, trace
from fallline.drivers.plan.forecast import asked
from fallline.drivers.plan.question import recipe_of
from fallline.footprint import Held, Shapes

from .models import config


def setup(name: str, *words: str, layers: int = 6, length: int = 48) -> Setup:
    eager = ["model.attention=eager"] if name == "gemma2" else []
    return setup_of(recipe_of([*eager, *words], length, batch=3), config(name, layers), "cpu")


CASES = [
    ("llama",),
    ("llama", "model.checkpointing=true", "adapter=lora"),
    ("llama", "precision=bfloat16"),
    ("gpt2", "micro=1"),
    ("qwen2", "micro=1"),
]


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_few_layers_stand_for_many(case: tuple[str, ...]):
    here = setup(*case)
    found = trace(asked(here), layers=6)
    whole = trace(asked(here), layers=None)
    assert found.flops == pytest.approx(whole.flops, rel=1e-9)
    for phase, moment in whole.heights.items():
        assert found.heights[phase].total == pytest.approx(moment.total, rel=1e-9), phase
        assert found.heights[phase].rest == pytest.approx(moment.rest, rel=1e-9), phase


def test_a_model_whose_layers_differ_is_traced_whole():
    with Shapes():
        for name, layers in (("llama", 6), ("gemma2", None)):
            here = setup(name)
            assert alike(skeleton(here.shape, torch.float32, here.options)) == layers


@pytest.mark.parametrize("case", [case for case in CASES if "precision=bfloat16" not in case], ids=" ".join)
def test_heights_are_those_of_real_tensors(case: tuple[str, ...]):
    """The same pass with values, its storages counted as they come and go."""
    here = setup(*case)
    told = trace(asked(here), layers=None)
    with Held() as held:
        pass_ = asked(here)
        model = AutoModelForCausalLM.from_config(here.shape, attn_implementation="sdpa").train()
        model = activations.finish(model, here.options)
        adapter = here.adapter.module.build(here.adapter.options)
        if adapter is not None:
            activations.inject(model, adapter, seed=0)
        objective = here.objective.module.build(here.objective.options)
        params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        question = problem(pass_, model, objective, params, torch.device("cpu"))
        for _ in range(2):  # the first also tries the head
            for p in params.values():
                p.grad = None
            seen = Marks(held, model, params)
            here.estimator.module.build(here.estimator.options)(question)
            found = seen.end()
            question._first.clear()
    for phase, moment in told.heights.items():
        assert found[phase].total == pytest.approx(moment.total, rel=0.02), phase


def test_gradients_of_earlier_micro_batches_lie_there_all_the_time():
    """Counted on real tensors, of which the second pass has to add to the first one's gradients."""
    here = setup("llama", "micro=1")
    assert here.several
    told = forecast(here)
    with Held() as held:
        model = AutoModelForCausalLM.from_config(here.shape, attn_implementation="sdpa").train()
        objective = here.objective.module.build(here.objective.options)
        params = dict(model.named_parameters())
        base = held.now
        question = problem(asked(here), model, objective, params, torch.device("cpu"))
        for _ in range(2):
            held.begin()
            here.estimator.module.build(here.estimator.options)(question)
            question._first.clear()
    assert held.height - base == pytest.approx(max(m.total for m in told.moments.values()), rel=0.02)


def test_checkpointing_holds_less_and_adapters_no_gradients_of_frozen_weights():
    plain, spared, adapted = (
        trace(asked(setup("llama", *words)), layers=6)
        for words in ((), ("model.checkpointing=true",), ("adapter=lora",))
    )
    assert spared.heights["forward"].rest < 0.3 * plain.heights["forward"].rest
    assert adapted.heights["gradients"].gradients < 0.5 * plain.heights["gradients"].gradients
