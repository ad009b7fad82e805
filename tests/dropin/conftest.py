"""A tokenizer for the facts that TRL is given."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from fallline.data.documents import Document
from fallline.data.tokenizer import learned_tokenizer

from .tiny import FACTS


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    texts = [fact["prompt"] + fact["completion"] for fact in FACTS]
    return learned_tokenizer([Document(text, text) for text in texts], "dropin", 280)
