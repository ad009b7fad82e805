"""A step of an adapter that PEFT has too, on SmolLM2-135M-Instruct: forward, backward, update; ours against PEFT's.

    python benchmarks/adapter_step.py [lora-ga eva miss bat randlora]

As in `lora_step.py`: all linear layers, the same weights, torch's fused AdamW, and our loss for both, so that the
layers alone differ. The record has each adapter's time as a multiple of PEFT's, and both peaks of a third step, above
what the process held before the model and less the model's weights: the limit for either is 1.03. What begins from data
is begun on two rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import peft
import torch

from fallline.adapters import attach
from fallline.drivers.compare.meter import forget_peak
from fallline.metrics import peak_memory as process_peak
from fallline.metrics import resident_memory
from fallline.tokens import token_losses
from harness import compare, peak_memory, save, table
from lora_step import LENGTH, ROWS, base, text

LORA = {"r": 16, "lora_alpha": 8, "use_rslora": True}
ADAPTERS: Mapping[str, tuple[Mapping[str, Any], Callable[[], peft.PeftConfig]]] = {
    "lora-ga": ({"rank": 16}, lambda: peft.LoraConfig(**LORA)),  # what PEFT trains once it has begun is a LoRA
    "eva": ({"rank": 16, "rho": 1.0}, lambda: peft.LoraConfig(**LORA)),
    "miss": ({"rank": 64}, lambda: peft.MissConfig(r=64)),
    "bat": ({"rank": 64}, lambda: peft.MissConfig(r=64, init_weights="bat")),
    "randlora": ({"rank": 32}, lambda: peft.RandLoraConfig(r=32)),
}
"""Our options and PEFT's configuration."""


def contestant(id: str, name: str) -> Callable[[], float]:
    """One step; gives its loss."""
    ids, batch, share = text()
    model = base()
    options, config = ADAPTERS[id]
    if name == "peft":
        settings = config()
        settings.target_modules = "all-linear"
        settings.task_type = "CAUSAL_LM"
        peft.get_peft_model(model, settings)
    else:
        data = {"data": [{"input_ids": ids, "labels": ids}]} if id in ("lora-ga", "eva") else {}
        attach(model, id, **options, **data)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step() -> float:
        loss = (token_losses(model, batch, share) * share).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def peak(id: str, name: str) -> int:
    """Bytes at the peak of a third step, beyond the weights of the model: adapter, moments, gradients, activations."""
    before = resident_memory()
    step = contestant(id, name)
    step()
    step()
    forget_peak()
    step()
    return process_peak() - before - sum(p.numel() * p.element_size() for p in base().parameters())


def measured(id: str, pairs: int) -> dict[str, Any]:
    """One adapter, measured and printed."""
    names = ("peft", "fallline")
    peaks = peak_memory(__file__, names, "--adapter", id, times=3)
    timing = compare({name: contestant(id, name) for name in names}, pairs=pairs)
    print(f"\n{id}\n{table(timing, peaks)}")
    return {"time": timing, "peak": peaks, "peak_ratio": peaks["fallline"] / peaks["peft"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("adapters", nargs="*", choices=[*ADAPTERS, []], help="all when none is named")
    parser.add_argument("--pairs", type=int, default=9, help="rounds that count")
    parser.add_argument("--peak", help="print the peak bytes of one contestant and stop")
    parser.add_argument("--adapter", choices=ADAPTERS, help="whose peak")
    args = parser.parse_args()
    if args.peak:
        print(peak(args.adapter, args.peak))
        return
    for id in args.adapters or ADAPTERS:
        name = f"adapter_step_{id.replace('-', '_')}"
        sources = [f"src/fallline/adapters/{id.replace('-', '_')}.py", "src/fallline/adapters/layers.py"]
        about = {"tokens": [ROWS, LENGTH], "options": ADAPTERS[id][0], "peft": peft.__version__}
        print(save(name, about | measured(id, args.pairs), sources))


if __name__ == "__main__":
    main()
