"""Memory of a beginning from data beside that of the training that follows, on SmolLM2-135M-Instruct.

    python benchmarks/adapter_begin.py

For each adapter that begins from gradients or inputs: the peak of the process while it begins, on 2 batches of the size
it is trained with, and while it takes three steps with torch's fused AdamW, both with the model's own loss as a plain
loop has it; each in a process of its own, above what it held before the model. The promise is that beginning never
takes more.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch

from fallline.adapters import attach
from fallline.drivers.compare.meter import forget_peak
from fallline.metrics import peak_memory as process_peak
from fallline.metrics import resident_memory
from harness import peak_memory, save
from lora_step import base

BATCHES, ROWS, LENGTH = 2, 2, 128
ADAPTERS: Mapping[str, Mapping[str, Any]] = {
    "lora-ga": {"rank": 16},
    "lora-sb": {"rank": 64},
    "eva": {"rank": 16},
}


def peak_of(id: str, what: str) -> int:
    """Bytes above the process before the model: while it begins, or while it is trained afterwards."""
    ids = torch.randint(0, 49152, (BATCHES, ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    before = resident_memory()
    model = base()
    forget_peak()
    attach(model, id, **ADAPTERS[id], data=[{"input_ids": batch, "labels": batch} for batch in ids])
    if what == "begin":
        return process_peak() - before
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    forget_peak()
    for batch in (*ids, ids[0]):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return process_peak() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peak", help="print the peak bytes of one of the two and stop")
    parser.add_argument("--adapter", choices=ADAPTERS)
    args = parser.parse_args()
    if args.peak:
        print(peak_of(args.adapter, args.peak))
        return
    found: dict[str, Any] = {}
    for id in ADAPTERS:
        peaks = peak_memory(__file__, ("begin", "train"), "--adapter", id)
        found[id] = peaks | {"ratio": peaks["begin"] / peaks["train"]}
        print(f"{id:8} begins {peaks['begin'] / 2**20:.0f} MiB, trains {peaks['train'] / 2**20:.0f} MiB", flush=True)
    sources = (
        "adapters/begin",
        "calibrate",
        "calibrate_inputs",
        *(f"adapters/{id.replace('-', '_')}" for id in ADAPTERS),
    )
    print(
        save(
            "adapter_begin",
            {"tokens": [ROWS, LENGTH], "options": ADAPTERS, "peaks": found},
            [f"src/fallline/{name}.py" for name in sources],
        )
    )


if __name__ == "__main__":
    main()
