"""Weights, gradients and state are those of a real run; what an update takes beside them is what the card says."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV2Config, MixtralConfig, OpenAIGPTConfig

from fallline.catalog import bytes_of, entries, find
from fallline.drivers.compare.meter import split
from fallline.drivers.plan import forecast, setup_of, speed
from fallline.drivers.plan.question import plan, recipe_of
from fallline.drivers.plan.table import Row, combinations
from fallline.drivers.setting import build
from fallline.drivers.skeleton import shape_of
from fallline.errors import InputError
from fallline.footprint import Held
from fallline.optim.precision import Precision, low_precision
from fallline.recipe import Recipe
from fallline.step import take_step

from .models import config

OPTIMIZERS = sorted(id for kind, id in entries() if kind == "optimizer")
OPTIONS = {"lanton": {"alpha": 1.0, "noise_momentum": 0.9}}


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("optimizer=scale",),
        ("adapter=lora",),
        ("precision=bfloat16",),
        ("precision=bfloat16-stochastic",),
        ("precision=bfloat16", "adapter=lora", "optimizer=adamw-8bit"),
    ],
    ids=" ".join,
)
def test_what_stays_is_what_a_run_has(words: tuple[str, ...]):
    recipe = Recipe.parse(
        "model: {name: llama, preset: tiny}\ndata: {name: python-docs, length: 32, vocab: 512}\nsteps: 2\nbatch: 2\n"
        "schedule: constant",
        *words,
    )
    run = build(recipe).run
    take_step(run)
    real = split(run, 0)
    found = forecast(setup_of(recipe, run.model.config, "cpu"))
    assert found.weights == real["weights"]
    assert found.gradients == real["gradients"]
    assert found.optimizer == pytest.approx(real["optimizer"], rel=1e-3)  # and a few step counts
    assert found.parameters == sum(p.numel() for p in run.model.parameters())
    assert found.trained == sum(p.numel() for p in run.trainable().values())
    for role in found.roles.values():
        assert set(role) == {"weights", "gradients", "optimizer"}
    assert sum(role["optimizer"] for role in found.roles.values()) == found.optimizer


class Matrices(nn.Module):
    """Hidden matrices, or a table and a vector."""

    def __init__(self, m: int, n: int, number: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, m, bias=False) for _ in range(number))


class Others(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3000, 128)
        self.norm = nn.Parameter(torch.ones(3000))


ASKED = [
    *((id, OPTIONS.get(id, {})) for id in OPTIMIZERS),
    ("galore", {"basis": "svd"}),
    ("frugal", {"split": "entries"}),
    ("frugal", {"split": "svd"}),
    ("spam", {"density": 0.5}),
]


@pytest.mark.parametrize(("id", "options"), ASKED, ids=str)
@pytest.mark.parametrize("model", [Matrices(512, 1024), Matrices(1024, 512), Others()], ids=["wide", "tall", "others"])
def test_workspace_is_that_of_the_card(id: str, options: dict[str, Any], model: nn.Module):
    """Counted are tensors; what C loops and torch's kernels take for themselves is small. In the first update bases and
    parts are found."""
    module = find("optimizer", id).load()
    config = module.Config(**options | ({"rank": 64} if "rank" in module.Config.__dataclass_fields__ else {}))
    optimizer = module.build(config, model, seed=0)
    params = list(model.parameters())
    for p in params:
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    beside = []
    for _ in range(2):
        with Held() as held:
            for p in params:
                held.know(p, p.grad, *flat(optimizer.state[p]))
            optimizer.step()
            beside.append(held.height - held.now)  # what is left is state
    for p in params:
        p.grad = None
    if id == "adamw-8bit":  # it begins by rounding zeros, most of which take no memory on a CPU
        beside = beside[1:]
    role = "head" if isinstance(model, Others) else "matrix"
    card = module.CARD.workspace_bytes
    told = max(bytes_of(card, role if p.ndim > 1 else "vector", p.shape, vars(config)) for p in params)
    assert max(beside) < 1.05 * told + 5e6, (beside, told)
    assert told < 2 * max(beside) + 5e6, (beside, told)


def flat(tree: object) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [t for value in tree.values() for t in flat(value)] if isinstance(tree, dict) else []


@pytest.mark.parametrize("precision", ["bfloat16", "bfloat16-stochastic"])
def test_copies_of_a_large_parameter_are_there_at_once(precision: Precision, monkeypatch: pytest.MonkeyPatch):
    """Counted on real tensors; a bucket is smaller here than the largest parameter."""
    for module in ("fallline.optim.precision", "fallline.drivers.plan.forecast"):
        monkeypatch.setattr(import_module(module), "BUCKET", 1 << 12)
    here = setup_of(recipe_of([f"precision={precision}"], 32, 2), config("llama", 2), "cpu")
    model = AutoModelForCausalLM.from_config(here.shape, dtype=torch.bfloat16)
    adamw = here.optimizer
    optimizer = low_precision(lambda p: adamw.module.build(adamw.options, p), model, precision=precision)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    with Held() as held:
        held.know(*model.parameters(), *(p.grad for p in model.parameters()), *flat(optimizer.state_dict()))
        optimizer.step()
    assert forecast(here).moments["update"].rest == pytest.approx(held.height, rel=0.05)


def test_seven_billion_parameters_are_planned_from_shapes():
    found = forecast(setup_of(recipe_of(["precision=bfloat16"], 2048, 1), shape_of("7b"), "cuda"))
    assert found.parameters == 6_738_415_616
    assert found.weights == pytest.approx(2 * found.parameters, rel=1e-4)
    assert found.optimizer == pytest.approx((8 + 4) * found.parameters, rel=1e-4)
    assert found.peak > 16 * found.parameters


def test_the_table_is_in_the_order_it_states():
    memory = 150e6
    rows = plan_tiny(memory)
    assert [row.order for row in rows] == sorted(row.order for row in rows)
    beyond = [row.forecast.peak for row in rows if row.fits == "no"]
    assert beyond == sorted(beyond), "the least first"
    for row in rows:
        assert (row.fits == "no") == (row.forecast.peak > memory)
    assert {row.fits for row in rows} >= {"yes", "no"}
    assert {row.setup.adapter.id for row in rows} >= {"none", "lora"}
    assert {row.setup.options.checkpointing for row in rows} == {False, True}
    ids = {row.setup.optimizer.id for row in rows}
    assert ids == set(OPTIMIZERS) - {"lanton"}, "all that need no options"


def test_more_memory_takes_more_rows_at_a_time():
    def most(memory: float) -> int:
        rows = [row for row in plan_tiny(memory) if row.setup.adapter.id == "lora" and row.fits == "yes"]
        return max(row.setup.rows for row in rows if not row.setup.options.checkpointing)

    assert most(85e6) < most(95e6) < most(150e6) == 8


@cache
def plan_tiny(memory: float) -> list[Row]:
    return plan("tiny", memory=memory, length=64, batch=8)


def test_an_architecture_without_alike_layers_is_sized_too():
    found = forecast(setup_of(recipe_of(["model.attention=eager"], 32, 2), config("gemma2", 3), "cpu"))
    assert found.peak > found.weights + found.optimizer


def test_what_cannot_be_traced_is_named_with_what_was_assumed():
    experts = MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=300, num_local_experts=4,
    )  # fmt: skip
    found = forecast(setup_of(recipe_of([], 32, 2), experts, "cpu"))
    assert "'mixtral'" in found.assumed
    assert found.parameters == sum(p.numel() for p in AutoModelForCausalLM.from_config(experts).parameters())


def test_a_model_that_is_none_is_one_clear_line():
    """A forecast must not end a run with the error of code that it only tries."""
    experts = DeepseekV2Config(hidden_size=64, num_attention_heads=4, num_hidden_layers=2, vocab_size=300)
    with pytest.raises(InputError, match="'deepseek_v2' model cannot be"):
        forecast(setup_of(recipe_of([], 32, 2), experts, "cpu"))


def test_what_a_model_cannot_do_is_no_row():
    shape = OpenAIGPTConfig(n_embd=64, n_layer=2, n_head=4, vocab_size=300)
    rows = combinations(setup_of(recipe_of([], 32, 1), shape, "cpu"), memory=1e12)
    assert {row.setup.options.checkpointing for row in rows} == {False}
    assert {row.setup.adapter.id for row in rows} >= {"none"}


def test_compiled_code_is_sized_as_what_is_compiled():
    plain, compiled = (
        setup_of(recipe_of(words, 32, 2), config("llama"), "cpu") for words in ([], ["model.compile=true"])
    )
    assert compiled.options == plain.options


def test_an_estimator_that_needs_values_is_sized_as_backpropagation():
    words = ["estimator={name: dpsgd, noise: 1.0}", "sampler={name: poisson}"]
    found = forecast(setup_of(recipe_of(words, 32, 2), config("llama", 2), "cpu"))
    plain = forecast(setup_of(recipe_of([], 32, 2), config("llama", 2), "cpu"))
    assert found.peak >= plain.peak


def test_speed_is_that_of_real_passes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speed, "SECONDS", 0.2)
    monkeypatch.setattr(speed, "WORDS", 128)
    shape = config("llama", 3)
    shape.pad_token_id = 299  # a word that the model tried does not have
    here = setup_of(recipe_of([], 64, 2), shape, "cpu")
    found = speed.calibrate(here, torch.device("cpu"))
    assert 1e7 < found.flops < 1e14
    assert 1e7 < found.bytes < 1e13
    told = forecast(here)
    assert found.step(told, 4) - found.step(told, 3) == pytest.approx(told.flops / found.flops)


@pytest.mark.parametrize(
    ("adapter", "objective"), [("none", "dpo"), ("lora", "kto"), ("none", "kl-retain"), ("lora", "npo")]
)
def test_a_reference_is_a_second_model_or_the_same_without_its_adapter(adapter: str, objective: str):
    recipe = "model: {name: llama, preset: tiny}\ndata: {name: python-docs, length: 32}\nsteps: 2\nbatch: 2"
    shape = config("llama", 3)
    plain, compared = (
        forecast(setup_of(Recipe.parse(recipe, f"adapter={adapter}", f"objective={id}"), shape, "cpu"))
        for id in ("causal", objective)
    )
    assert not compared.assumed, "pairs are traced"
    assert compared.weights == plain.weights * (2 if adapter == "none" else 1)
    assert compared.gradients == plain.gradients
