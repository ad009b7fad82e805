"""Random pairs of answers, and a real model that is small enough to ask for everything."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fallline.catalog import find
from fallline.contracts import Draw
from fallline.data.packed import whole_rows
from fallline.data.paired import PairedSource, pack_pairs
from fallline.data.streams import Part, StreamedSource, joined
from fallline.reference import Reference
from fallline.step import Run
from step.helpers import make

WORDS, LENGTH, PAD = 40, 32, 0

Sequence = tuple[list[int], list[int]]  # prompt, answer


def llama(dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    for p in model.parameters():  # so that answers differ much in likelihood
        p.data *= 3
    return model


def draws(number: int = 7, seed: int = 0) -> list[tuple[Sequence, Sequence]]:
    """Chosen and rejected to the same prompt, of 1 … 7 tokens each."""
    g = np.random.default_rng(seed)
    found = []
    for _ in range(number):
        prompt = g.integers(3, WORDS, g.integers(1, 6)).tolist()
        chosen, rejected = (g.integers(3, WORDS, g.integers(1, 8)).tolist() for _ in range(2))
        found.append(((prompt, chosen), (prompt, rejected)))
    return found


def source(pairs: list[tuple[Sequence, Sequence]], length: int = LENGTH) -> PairedSource:
    """These pairs in packed rows; example i is not always pair i, but `order_of` tells."""
    tokens = [np.array(prompt + answer, np.uint32) for pair in pairs for prompt, answer in pair]
    asked = [np.arange(len(p) + len(a)) >= len(p) for pair in pairs for p, a in pair]
    sizes = np.array([len(t) for t in tokens]).reshape(-1, 2)
    size = sizes.sum(1)
    start = np.cumsum(size) - size
    return pack_pairs(
        np.concatenate(tokens), np.concatenate(asked), start, size, sizes[:, 0], np.arange(len(pairs)), length, PAD
    )


def streamed(forget: list[tuple[Sequence, ...]], retain: list[tuple[Sequence, ...]]) -> StreamedSource:
    """Examples of one or two sequences each, in two streams."""
    examples = [*forget, *retain]
    tokens = [np.array(prompt + answer, np.uint32) for one in examples for prompt, answer in one]
    asked = [np.arange(len(p) + len(a)) >= len(p) for one in examples for p, a in one]
    size = np.array([sum(len(p) + len(a) for p, a in one) for one in examples])
    second = np.array([sum(map(len, one[0])) for one in examples])
    start = np.cumsum(size) - size

    def part(which: slice) -> PairedSource:
        return pack_pairs(
            np.concatenate(tokens), np.concatenate(asked), start[which], size[which], second[which],
            np.arange(len(examples))[which], LENGTH, PAD,
        )  # fmt: skip

    lost, kept = slice(0, len(forget)), slice(len(forget), None)
    return joined([Part("forget", 0, 0.5, part(lost)), Part("retain", 1, 0.5, part(kept))])


def order_of(found: PairedSource) -> list[int]:
    """Which pair each example is."""
    return np.argsort(np.argsort(found.start)).tolist()


def logps(model: Any, pairs: list[tuple[Sequence, Sequence]]) -> Tensor:
    """[B, 2] log p of the answers, each sequence alone, from full logits in float64."""

    def one(prompt: list[int], answer: list[int]) -> Tensor:
        ids = torch.tensor([prompt + answer])
        logp = model(ids).logits[0].double().log_softmax(-1)
        return sum(logp[len(prompt) + i - 1, token] for i, token in enumerate(answer))

    return torch.stack([torch.stack([one(*sequence) for sequence in pair]) for pair in pairs])


def batch_of(found: PairedSource, rows: int | None = None) -> dict[str, Tensor]:
    """All its examples in one batch, in the order of `order_of`."""
    (batch,) = found.batches(len(found.rows) - 1 if rows is None else rows)
    return batch


def objective(id: str, **options: Any) -> Any:
    module = find("objective", id).load()
    return module.build(module.Config.from_mapping(options, id))


class Whole:
    """Every example, in packed rows or one a row."""

    by_stream = True

    def __init__(self, found: Any, packed: bool) -> None:
        self.found, self.packed = found, packed

    def draw(self, step: int, rng: torch.Generator) -> Draw:
        drawn = whole_rows(self.found.rows, torch.arange(len(self.found.rows) - 1))
        weight = 1 + torch.arange(len(drawn.ids)) % 3
        return Draw(drawn.ids, weight.float(), drawn.row if self.packed else None)


def run(made: Any, found: Any, micro: int, packed: bool = True, net: Any = None, **more: Any) -> Run:
    """A run over all pairs, with a reference that is another model."""
    return make(
        net=llama() if net is None else net, objective=made, source=found, sampler=Whole(found, packed), micro=micro,
        reference=Reference(llama(seed=1), "another"), **more,
    )  # fmt: skip
