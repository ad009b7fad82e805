"""−log p and first choices of tokens against full logits; an exact match against what greedy decoding writes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from fallline.generate import generate
from fallline.token_scores import scores, token_scores
from fallline.tokens import IGNORED
from test_token_errors import TINY, WORDS


def tiny(capped: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**TINY)) if capped else LlamaForCausalLM(LlamaConfig(**TINY))
    return model.double().eval()


@pytest.mark.parametrize("capped", [False, True])  # a cap on the logits: they are formed whole
def test_equal_to_full_logits(capped: bool) -> None:
    model = tiny(capped)
    ids = torch.arange(24).view(2, 12) % WORDS
    labels = torch.roll(ids, -1, 1)
    labels[:, -1] = IGNORED
    labels[0, 2:5] = IGNORED
    with torch.no_grad():
        z = model(ids).logits
    labels[1, :4] = z.argmax(-1)[1, :4]  # some are the first choice
    value, first = token_scores(model, {"input_ids": ids, "labels": labels})
    asked = labels != IGNORED
    expected = F.cross_entropy(z.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED).view_as(value)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(first.bool(), (z.argmax(-1) == labels) & asked)
    assert first.sum() >= 4


def test_an_answer_of_first_choices_is_what_greedy_decoding_writes() -> None:
    model = tiny()
    prompt = [3, 1, 4, 1]
    said = generate(model, prompt, 6, generator=torch.Generator(), temperature=0, top_k=None, eos=None)
    for answer, right in ((said[4:], True), ([*said[4:-1], (said[-1] + 1) % WORDS], False)):
        ids = torch.tensor([prompt + answer])
        labels = torch.roll(ids, -1, 1)
        labels[:, -1] = IGNORED
        labels[:, : len(prompt) - 1] = IGNORED
        _, first = token_scores(model, {"input_ids": ids, "labels": labels})
        assert bool(first.sum() == len(answer)) is right


def test_of_equal_logits_the_first_counts() -> None:
    z = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    assert scores(z, torch.tensor([0, 1]))[1].tolist() == [1, 0]


def test_nothing_asked_is_nothing_told() -> None:
    ids = torch.zeros(1, 5, dtype=torch.long)
    assert not token_scores(tiny(), {"input_ids": ids, "labels": torch.full_like(ids, IGNORED)}).any()
