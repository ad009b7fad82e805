"""The memory of a run before it begins: weights, optimizer state, and what a step holds at its height.

    peak = weights + state + max(forward, loss, backward, gradients, update) + overhead

State and the workspace of an update come from the optimizer's card, everything else from a trace of the code that will
run (`activations`). Nothing of this takes the memory it is about.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig

from ...adapters.layers import inject
from ...catalog import Card, bytes_of, find
from ...errors import InputError
from ...footprint import Shapes
from ...models.base import ModelOptions
from ...models.loading import has_sdpa
from ...optim.precision import BUCKET, DTYPES, Precision, pick_precision
from ...optim.roles import ROLES, Role, classify
from ...quantised import stands_for
from ...recipe import Choice, Recipe
from .activations import Moment, Pass, Traced, alike, skeleton, stand_in, trace

KERNELS = 3 << 20
GAPS = 0.01
"""Bytes, and share of the sum, that processes take beside their tensors on a CPU, with freed memory given back at once.
Fitted once, on fourteen development runs of an earlier draw of `benchmarks/memory_forecast.py`."""

ROUNDING = 7
"""Bytes for each element of a parameter that its stochastic rounding takes beside its copy and its gradient."""


@dataclass(frozen=True)
class Setup:
    """What is sized; the choices are those of a recipe.

    Attributes:
        shape: the model's 🤗 configuration.
        options: how the model computes.
        precision: as in a recipe, but ``auto``.
        rows: of a micro-batch. length: tokens of a row. several: does a step have several micro-batches?
        device: ``cpu`` or ``cuda``.
    """

    shape: PretrainedConfig
    options: ModelOptions
    adapter: Choice
    objective: Choice
    estimator: Choice
    optimizer: Choice
    precision: Precision
    rows: int
    length: int
    several: bool = False
    device: str = "cpu"


class Leaf(NamedTuple):
    """Parameters that are alike: role, shape of what they stand for, bytes of each one's weight, whether they are
    trained, and the bytes that the model was loaded with, before it was quantised."""

    role: Role
    shape: tuple[int, ...]
    bytes: int
    trained: bool
    loaded: int

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Forecast:
    """Bytes.

    Attributes:
        parameters, trained: how many.
        weights: frozen ones, adapters and buffers too, and the copy that is held of a reference. gradients: of all
            trained parameters. optimizer: its state, with float32 masters.
        moments: phase → what is held beyond weights and state at its height; ``update`` among them;
            ``load`` where quantised weights are loaded whole.
        roles: role → weights, gradients and optimizer state.
        flops: floating-point operations of a micro-batch's forward and backward.
        traffic: least bytes that an update moves.
        assumed: what was taken for granted, in words; empty: nothing.
    """

    parameters: int
    trained: int
    weights: float
    gradients: float
    optimizer: float
    moments: dict[str, Moment]
    roles: dict[str, dict[str, float]]
    flops: float
    traffic: float
    assumed: str

    @property
    def height(self) -> str:
        """The phase with the highest sum."""
        return max(self.moments, key=lambda phase: self.moments[phase].total)

    @property
    def activations(self) -> float:
        """The most that anything but weights, gradients and state takes."""
        return max(moment.rest for moment in self.moments.values())

    @property
    def overhead(self) -> float:
        """What kernels and allocator take beside tensors."""
        return KERNELS + GAPS * (self.weights + self.optimizer + self.moments[self.height].total)

    @property
    def peak(self) -> float:
        """The most at one time."""
        return self.weights + self.optimizer + self.moments[self.height].total + self.overhead


def setup_of(recipe: Recipe, shape: PretrainedConfig, device: str) -> Setup:
    """What of a recipe decides about memory; `shape`: the model's."""
    settings, options = recipe.settings, recipe.model.options
    options = replace(options, compile=False)  # compiled code cannot be traced; what it holds is taken to be the same
    if options.attention == "sdpa" and not has_sdpa(shape):
        options = replace(options, attention="eager")  # the only one it has
    rows = settings.micro or settings.batch
    return Setup(
        shape=shape,
        options=options,
        adapter=recipe.adapter,
        objective=recipe.objective,
        estimator=recipe.estimator,
        optimizer=recipe.optimizer,
        precision=pick_precision(settings.precision, device),
        rows=rows,
        length=recipe.data.options.length,
        several=rows < settings.batch,
        device=device,
    )


def forecast(setup: Setup) -> Forecast:
    """Size one setup.

    Raises:
        InputError: the options do not fit the model.
    """
    leaves, buffers, layers = leaves_of(setup)
    traced, assumed = trace_or_assume(setup, layers)
    return summed(setup, leaves, buffers, traced, assumed)


def trace_or_assume(setup: Setup, layers: int | None) -> tuple[Traced, str]:
    """Trace a setup. One that cannot be run on shapes is traced with plain backpropagation, or else given the
    activations of a Llama of the same sizes; the second value says so.

    Raises:
        InputError: none of these can be traced, or the options do not fit the model.
    """
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True  # it would tell what is told below
    kind, reason = setup.shape.model_type, ""
    try:
        for here, assumed in attempts(setup):
            same = here.shape is setup.shape
            try:
                found = trace(asked(here), layers=layers if same else here.shape.num_hidden_layers)
            except InputError:
                raise
            except Exception as error:  # whatever code says that was asked for values it does not have
                reason = reason or str(error).split("\n")[0]
            else:
                return found, assumed and f"{assumed}, as {setup.estimator.id} on a {kind!r} model cannot be traced"
    finally:
        log.disabled = before
    raise InputError(f"{setup.estimator.id} on a {kind!r} model cannot be sized: {reason}")


def attempts(setup: Setup) -> Iterator[tuple[Setup, str]]:
    """What to trace for a setup, and what is assumed by that."""
    yield setup, ""
    plain = default("estimator", "backprop")
    if setup.estimator.id != plain.id:
        yield replace(setup, estimator=plain), "activations of plain backpropagation"
    with suppress(Exception):  # its sizes are none that a Llama could have
        same = replace(setup, estimator=plain, shape=stand_in(setup.shape))
        yield same, "activations of plain backpropagation of a Llama of the same sizes"


def default(kind: str, id: str) -> Choice:
    """A method with its defaults."""
    return Choice(kind, id, find(kind, id).load().Config())


def asked(setup: Setup) -> Pass:
    """What of a setup is traced."""
    return Pass(
        setup.shape, DTYPES[setup.precision], setup.options, setup.adapter, setup.objective, setup.estimator,
        setup.rows, setup.length, setup.device,
    )  # fmt: skip


def leaves_of(setup: Setup) -> tuple[Counter[Leaf], int, int | None]:
    """How many parameters of each kind; bytes of buffers; the number of layers if they are alike.

    Raises:
        InputError: there is no such model without values, or the options do not fit it.
    """
    with Shapes():
        try:
            model = skeleton(setup.shape, DTYPES[setup.precision], setup.options)
        except InputError:
            raise
        except Exception as error:  # whatever its code says to tensors without values
            kind, reason = setup.shape.model_type, str(error).split("\n")[0]
            raise InputError(f"a {kind!r} model cannot be made of shapes alone: {reason}") from error
        layers = alike(model)
        adapter = setup.adapter.module.build(setup.adapter.options)
        if adapter is not None:
            inject(model, adapter, seed=0)
        roles = classify(model)
        packed = stands_for(model)
        found: Counter[Leaf] = Counter()
        for name, p in model.named_parameters():
            size = p.numel() * p.element_size()
            shape, loaded = tuple(p.shape), size
            if id(p) in packed:
                shape, loaded = (packed[id(p)],), packed[id(p)] * DTYPES[setup.precision].itemsize
            found[Leaf(roles[name], shape, size, p.requires_grad, loaded)] += 1
        return found, sum(b.numel() * b.element_size() for b in model.buffers()), layers


def holds_reference(setup: Setup) -> bool:
    """Will the weights lie in memory a second time, as the model that an objective compares with?"""
    objective = setup.objective.module.build(setup.objective.options)
    alone = setup.adapter.module.build(setup.adapter.options) is None  # else both share all weights
    return alone and getattr(objective, "reference", False)


def separable(optimizer: Choice) -> bool:
    """Does an optimizer treat parameters one by one?"""
    params = {"layers.0.weight": (nn.Parameter(torch.zeros(2, 2)), "matrix")}
    return bool(optimizer.module.build(optimizer.options, params, seed=0).separable)


def summed(setup: Setup, leaves: Counter[Leaf], buffers: int, traced: Traced, assumed: str) -> Forecast:
    """Put parts together."""
    card: Card = setup.optimizer.module.CARD
    options = vars(setup.optimizer.options)
    master = setup.precision == "bfloat16"
    copies = 1 + holds_reference(setup)
    roles: dict[str, dict[str, float]] = {}
    workspace = traffic = 0.0
    narrow = widest = 0  # elements trained in less than float32, of which float32 copies are made or kept; in one leaf
    for leaf, times in leaves.items():
        parts = roles.setdefault(leaf.role, {"weights": 0, "gradients": 0, "optimizer": 0})
        parts["weights"] += copies * times * leaf.bytes
        if leaf.trained:
            low = leaf.elements * (leaf.bytes < 4 * leaf.elements)
            narrow, widest = narrow + times * low, max(widest, low)
            beside = bytes_of(card.workspace_bytes, leaf.role, leaf.shape, options)
            workspace = max(workspace, beside, 0 if master else ROUNDING * low)
            state = bytes_of(card.state_bytes, leaf.role, leaf.shape, options) + 4 * low * master
            traffic += times * bytes_of(card.traffic_bytes, leaf.role, leaf.shape, options)
            parts["gradients"] += times * leaf.bytes
            parts["optimizer"] += times * state
    bucket = narrow  # of these copies, those that are there at a time
    if narrow > BUCKET and separable(setup.optimizer):
        bucket = max(widest, BUCKET)
    gradients = sum(parts["gradients"] for parts in roles.values())
    workspace += bucket * (4 if master else 8)
    moments: dict[str, Moment] = {
        phase: moment.after(gradients) if setup.several else moment for phase, moment in traced.heights.items()
    }
    state = sum(parts["optimizer"] for parts in roles.values())
    loading = sum(times * (leaf.loaded - leaf.bytes) for leaf, times in leaves.items())
    if loading and setup.device == "cpu":  # where quantised weights are loaded whole, before there is any state
        moments["load"] = Moment(max(0.0, loading - state), max(0.0, loading - state))
    return Forecast(
        parameters=sum(times * leaf.elements for leaf, times in leaves.items()),
        trained=sum(times * leaf.elements for leaf, times in leaves.items() if leaf.trained),
        weights=sum(parts["weights"] for parts in roles.values()) + copies * buffers,
        gradients=gradients,
        optimizer=state,
        moments=moments | {"update": Moment(gradients + workspace, workspace)},
        roles={role: roles[role] for role in ROLES if role in roles},
        flops=traced.flops,
        traffic=traffic,
        assumed=assumed,
    )
