"""A LoRA step on SmolLM2-135M-Instruct, rank 16 on all linear layers: forward, backward, update; ours against PEFT's.

    python benchmarks/lora_step.py

All begin from the same weights and use torch's fused AdamW. Contestants:

- ``peft``: PEFT's layers, and 🤗's loss on full logits, as PEFT users train;
- ``fallline``: our layers and loss;
- ``peft, our loss``: PEFT's layers under `token_losses`: what the chunked loss alone brings;
- ``full``: full fine-tuning, with our loss;
- ``products``: the matrix products of the linear layers, the adapters and the head alone, 4 T n m + 6 T r (n + m)
  operations for each layer and 4 T D V for the head: less than that no LoRA step can do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import peft
import torch
from peft import LoraConfig, get_peft_model

from fallline.adapters import attach
from fallline.adapters.layers import adapted
from fallline.models import smollm2_135m_instruct as smollm2
from fallline.tokens import token_losses
from harness import compare, peak_memory, peak_of, save, table

RANK, ROWS, LENGTH = 16, 2, 128

NAMES = ("peft", "fallline", "peft, our loss", "full", "products")  # the two that matter one after the other

SOURCES = (
    "src/fallline/adapters/lora.py",
    "src/fallline/adapters/layers.py",
    "src/fallline/kernels/lora_linear.py",
    "src/fallline/tokens.py",
)


def base() -> Any:
    """The model, in float32."""
    config = smollm2.Config()
    words: Any = smollm2.tokenizer(config)
    cpu = torch.device("cpu")
    return smollm2.build(config, tokenizer=words, length=LENGTH, seed=0, dtype=torch.float32, device=cpu).train()


def text() -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Random tokens; them as a batch; each label's share of the loss."""
    ids = torch.randint(0, 49152, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    return ids, {"input_ids": ids, "labels": labels}, torch.full(ids.shape, 1 / (ROWS * (LENGTH - 1)))


def contestant(name: str) -> Callable[[], float]:
    """One step of a contestant; gives its loss."""
    ids, batch, share = text()
    model = base()
    if name == "products":
        return products(attach(model, "lora", rank=RANK))
    if name.startswith("peft"):
        theirs = get_peft_model(
            model, LoraConfig(r=RANK, lora_alpha=8, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    elif name == "fallline":
        attach(model, "lora", rank=RANK)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> float:
        if name == "peft":
            loss = theirs(input_ids=ids, labels=ids).loss
        else:
            loss = (token_losses(model, batch, share) * share).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def products(model: Any) -> Callable[[], float]:
    """The matrix products of one step, of real sizes; the lowest layers' inputs need no gradient."""
    tokens = ROWS * LENGTH
    first = "model.layers.0.self_attn."
    lowest = {f"{first}{name}_proj" for name in "qkv"}
    shapes = [(layer.matrix(), path not in lowest) for path, layer in adapted(model).items()]
    widest = max(max(W.shape) for W, _ in shapes)
    x, g = torch.randn(tokens, widest), torch.randn(tokens, widest)
    head = model.lm_head.weight
    logits = torch.empty(tokens, len(head))
    hidden = torch.randn(tokens, head.shape[1])
    thin = torch.randn(widest, RANK)

    def run() -> float:
        for W, inner in shapes:
            m, n = W.shape
            xs, gs, A, B = x[:, :n], g[:, :m], thin[:n].t(), thin[:m]
            y = xs @ W.t()
            h = xs @ A.t()
            y.addmm_(h, B.t())
            gB = gs @ B
            gs.t() @ h
            gB.t() @ xs
            if inner:
                (gs @ W).addmm_(gB, A)
        torch.mm(hidden, head.t(), out=logits)
        torch.mm(logits, head)
        return 0.0

    return torch.no_grad()(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=9, help="rounds that count")
    parser.add_argument("--peak", choices=NAMES, help="print the peak bytes of one contestant and stop")
    args = parser.parse_args()
    if args.peak:
        print(peak_of(contestant(args.peak)))
        return
    peaks = peak_memory(__file__, NAMES[:4], times=3)
    steps = {name: contestant(name) for name in NAMES}
    losses = {name: steps[name]() for name in NAMES[:4]}
    for name, loss in losses.items():
        assert abs(loss - losses["peft"]) < 1e-4, f"{name} begins with another loss: {losses}"
    timing = compare(steps, pairs=args.pairs)
    print(table(timing, peaks))
    setting = {"tokens": [ROWS, LENGTH], "rank": RANK, "peft": peft.__version__}
    print(save("lora_step", setting | {"losses": losses, "time": timing, "peak": peaks}, SOURCES))


if __name__ == "__main__":
    main()
