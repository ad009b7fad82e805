"""How fast this machine is at what a run will do, tried for a few seconds.

A pass takes its floating-point operations by the rate of a real forward and backward, of a model with one of the
layers; an update takes the bytes it moves by the rate of a copy. Products that an update does (Muon's) are not in it.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM

from ...adapters.layers import inject
from ...models.base import finish
from ...optim.precision import DTYPES
from .activations import fewer, problem
from .forecast import Forecast, Setup, asked, trace_or_assume

SECONDS = 5.0
WORDS = 1024
"""Of the model that is tried: its head must not decide."""
TURN = 0.5
"""Seconds that a try should at least take: short ones say little."""


class Speed(NamedTuple):
    """Floating-point operations and bytes per second."""

    flops: float
    bytes: float

    def step(self, found: Forecast, times: int) -> float:
        """Seconds of a step of so many micro-batches."""
        return times * found.flops / self.flops + found.traffic / self.bytes


def calibrate(setup: Setup, device: torch.device) -> Speed:
    """Try it.

    Args:
        setup: whose passes are tried. device: where.
    """
    began = time.perf_counter()
    small = fewer(setup.shape, 1)
    text = small.get_text_config()
    text.vocab_size, text.pad_token_id = WORDS, None
    here = replace(setup, shape=small, rows=1, length=min(setup.length, 64), several=False)
    while (here.rows, here.length) != (setup.rows, setup.length):
        if statistics.median(passes(here, device, began)) > TURN:
            break
        if here.length < setup.length:
            here = replace(here, length=min(setup.length, 4 * here.length))
        else:
            here = replace(here, rows=min(setup.rows, 2 * here.rows))
    seconds = passes(here, device, began + SECONDS)
    flops = trace_or_assume(here, None)[0].flops
    return Speed(flops / statistics.median(seconds), copies(device))


def passes(setup: Setup, device: torch.device, until: float) -> list[float]:
    """Seconds of forwards and backwards after one that does not count, until then, but at least two."""
    with device:
        model = AutoModelForCausalLM.from_config(
            setup.shape, dtype=DTYPES[setup.precision], attn_implementation=setup.options.attention
        )
    model = finish(model.train(), setup.options)
    adapter = setup.adapter.module.build(setup.adapter.options)
    if adapter is not None:
        inject(model, adapter, seed=0)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    objective = setup.objective.module.build(setup.objective.options)
    estimator = setup.estimator.module.build(setup.estimator.options)
    seconds = list[float]()
    while len(seconds) < 3 or time.perf_counter() < until:
        question = problem(asked(setup), model, objective, params, device)
        start = time.perf_counter()
        estimator(question)
        wait(device)
        seconds.append(time.perf_counter() - start)
        for p in params.values():
            p.grad = None
    return seconds[1:]


def copies(device: torch.device) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.ones(1 << 25, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * 4 * source.numel() / statistics.median(seconds)


def wait(device: torch.device) -> None:
    """Until the device is through."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
