"""The margin family against TRL's own code: its trainers' losses on the same ragged pairs and the same models."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fallline.catalog import find
from fallline.reference import Reference
from fallline.tokens import IGNORED
from pairs import PAD, batch_of, draws, llama, order_of, source

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # float32


def ours(id: str, drawn: Any, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """The step's loss and gradients, on packed rows."""
    module = find("objective", id).load()
    made = module.build(module.Config.from_mapping(options, id))
    found = source(drawn)
    model, batch = llama(torch.float32), batch_of(found)
    assert (batch["segment"] < 0).any()
    run: Any = SimpleNamespace(  # what prepare asks of a run
        model=model, source=found, reference=Reference(llama(torch.float32, seed=1), "trl"), micro=9, seed=0, step=0,
        device=torch.device("cpu"),
    )  # fmt: skip
    batch = made.prepare(run, batch)
    counts = made.count(batch)
    loss = sum(v.sum() / counts[term].sum() for term, v in made(model, batch).value.items())
    loss.backward()
    return loss.detach().float(), [p.grad for p in model.parameters()]


def padded(drawn: Any, side: int) -> dict[str, Tensor]:
    """One answer of every pair as rows, padded on the right."""
    answers = [pair[side] for pair in drawn]
    ids = [torch.tensor(prompt + answer) for prompt, answer in answers]
    labels = [torch.tensor([IGNORED] * len(prompt) + answer) for prompt, answer in answers]
    return {
        "input_ids": pad_sequence(ids, True, PAD),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True, 0),
        "labels": pad_sequence(labels, True, IGNORED),
    }


def both(drawn: Any) -> dict[str, Tensor]:
    """Chosen, then rejected, as rows of one length."""
    table = padded([(row,) for side in (0, 1) for row in (pair[side] for pair in drawn)], 0)
    mask = (table.pop("labels") != IGNORED).long()
    return table | {"completion_mask": mask}


def stub(kind: type, **attributes: Any) -> Any:
    """A trainer that has no more than its loss needs: its own code runs, without data sets, arguments and loops."""
    trainer = object.__new__(kind)
    common = {
        "accelerator": Accelerator(cpu=True), "aux_loss_enabled": False, "is_encoder_decoder": False, "alpha": 0.0,
        "pad_token_id": PAD, "padding_value": PAD, "ld_alpha": None, "precompute_ref_logps": False,
        "use_weighting": False, "label_smoothing": 0.0, "f_divergence_type": "reverse_kl", "loss_weights": [1.0],
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None), "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0, "_tp_size": 1,
    }  # fmt: skip
    vars(trainer).update(common | attributes)
    return trainer


def dpo(drawn: Any, loss_type: str, beta: float) -> tuple[Tensor, list[Tensor]]:
    from trl import DPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    model, reference = (llama(torch.float32, seed=seed) for seed in (0, 1))
    for one in (model, reference):
        add_fused_lm_head(one, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    trainer = stub(DPOTrainer, model=model.train(), ref_model=reference, loss_types=[loss_type], beta=beta)
    loss = trainer._compute_loss(model, both(drawn), False)
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


def crossed(drawn: Any, found: Any) -> Any:
    """Each prompt with the answers of the pair half the data set further on, in the order of the examples."""
    order = order_of(found)
    far = [order[(b + len(order) // 2) % len(order)] for b in range(len(order))]
    return [tuple((drawn[i][0][0], answer) for _, answer in drawn[j]) for i, j in zip(order, far, strict=True)]


def kto(drawn: Any, beta: float, desirable: float, undesirable: float) -> tuple[Tensor, list[Tensor]]:
    from trl import KTOTrainer
    from trl.trainer.utils import add_fused_lm_head

    model, reference = (llama(torch.float32, seed=seed) for seed in (0, 1))
    for one in (model, reference):
        add_fused_lm_head(one, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    trainer = stub(
        KTOTrainer, model=model.train(), ref_model=reference, loss_type="kto", beta=beta, calculate_KL=True,
        desirable_weight=desirable, undesirable_weight=undesirable,
    )  # fmt: skip
    rows = both(drawn) | {f"KL_{name}": column for name, column in both(crossed(drawn, source(drawn))).items()}
    loss = trainer._compute_loss(model, rows | {"label": torch.arange(2 * len(drawn)) < len(drawn)}, False)
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


def cpo(drawn: Any, loss_type: str, **attributes: Any) -> tuple[Tensor, list[Tensor]]:
    from trl.experimental.cpo import CPOTrainer

    return concatenated(stub(CPOTrainer, loss_type=loss_type, **attributes), drawn)


def orpo(drawn: Any, **attributes: Any) -> tuple[Tensor, list[Tensor]]:
    from trl.experimental.orpo import ORPOTrainer

    return concatenated(stub(ORPOTrainer, **attributes), drawn)


def concatenated(trainer: Any, drawn: Any) -> tuple[Tensor, list[Tensor]]:
    model = llama(torch.float32)
    rows = {
        f"{name}_{key}": v for side, name in enumerate(("chosen", "rejected")) for key, v in padded(drawn, side).items()
    }
    loss, _ = trainer.get_batch_loss_metrics(model, rows)
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


def one_token_prompts(drawn: Any) -> Any:
    return [tuple((prompt[:1], answer) for prompt, answer in pair) for pair in drawn]


CASES = {
    "dpo": (lambda d: ours("dpo", d, beta=0.3), lambda d: dpo(d, "sigmoid", 0.3), 1.0),
    "ipo": (lambda d: ours("ipo", d, tau=0.3), lambda d: dpo(d, "ipo", 0.3), 1.0),
    "sppo": (lambda d: ours("sppo", d, beta=0.3), lambda d: dpo(d, "sppo_hard", 0.3), 1.0),
    "kto": (
        lambda d: ours("kto", d, beta=0.3, desirable=1.5, undesirable=0.7),
        lambda d: kto(d, beta=0.3, desirable=1.5, undesirable=0.7),
        1.0,
    ),
    "cpo": (
        lambda d: ours("cpo", d, beta=0.3, alpha=0.5, label_smoothing=0.1),
        lambda d: cpo(d, "sigmoid", beta=0.3, cpo_alpha=0.5, label_smoothing=0.1),
        1.0,
    ),
    "simpo": (
        lambda d: ours("simpo", d, beta=1.5, gamma=0.6),
        lambda d: cpo(d, "simpo", beta=1.5, simpo_gamma=0.6, cpo_alpha=0.0),
        1.0,
    ),
    # TRL's hinge is max(0, 1 − βm): 1/β of it, and of its likelihood's weight, is ours
    "slic": (
        lambda d: ours("slic", d, delta=4.0, anchor=2.0),
        lambda d: cpo(d, "hinge", beta=0.25, cpo_alpha=0.5),
        0.25,
    ),
    # TRL's likelihood covers the prompt, of which a prompt of one token has nothing that can be predicted
    "orpo": (lambda d: ours("orpo", d, weight=0.7), lambda d: orpo(d, beta=0.7), 1.0),
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FALLLINE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("id", list(CASES))
def test_values_and_gradients_are_those_of_trl(id: str) -> None:
    mine, theirs, scale = CASES[id]
    drawn = one_token_prompts(draws()) if id == "orpo" else draws()
    loss, grads = mine(drawn)
    other, others = theirs(drawn)
    torch.testing.assert_close(scale * loss, other, **TOLERANCE)
    for g, h in zip(grads, others, strict=True):
        torch.testing.assert_close(scale * g, h, rtol=1e-5, atol=1e-5 * h.abs().max().item())
