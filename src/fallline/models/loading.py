"""Loading what 🤗 Transformers saved: a causal language model and its tokenizer, by local folder or hub id.

Nothing is made up: a checkpoint that lacks a tensor is refused, where 🤗 Transformers draws a random one and warns.
Code that comes with a checkpoint is not run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from ..errors import InputError
from ..quantised import library
from .base import LoadedOptions, ModelOptions, finish


@contextmanager
def loading(what: str, path: str) -> Iterator[None]:
    """Whatever goes wrong inside is told in one line."""
    try:
        with quietly():
            yield
    except Exception as error:  # readers of foreign files raise anything
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise InputError(f"cannot load the {what} of model {path!r}: {reason}") from error


@contextmanager
def quietly() -> Iterator[None]:
    """Inside, 🤗 draws its progress bars on terminals only."""
    hidden = is_progress_bar_enabled() and not sys.stderr.isatty()
    if hidden:
        disable_progress_bar()
    try:
        yield
    finally:
        if hidden:
            enable_progress_bar()


def configuration(path: str) -> Any:
    """The 🤗 configuration behind `path`.

    Raises:
        InputError: there is none, or not of a causal language model.
    """
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        below = folder / "model" / "config.json"
        hint = f"did you mean {str(below.parent)!r}?" if below.is_file() else "a 🤗 model folder has one"
        raise InputError(f"model folder {path!r} has no config.json; {hint}")
    if folder.is_file():
        raise InputError(f"model {path!r} is a file; give the folder that holds config.json")
    if not folder.is_dir() and (path.count("/") > 1 or path.startswith((".", "~", "/")) or path.endswith("/")):
        raise InputError(f"there is no model folder {path!r}")
    with loading("configuration", path):
        found = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if type(found) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"model {path!r} is a {found.model_type!r}, which is no causal language model")
    return found


def check_length(shape: Any, length: int, path: str) -> None:
    """Refuse rows that are longer than the model has positions.

    Raises:
        InputError: they are.
    """
    positions = getattr(shape.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise InputError(f"rows of {length} tokens are longer than the {positions} positions of model {path!r}")


def has_sdpa(shape: Any) -> bool:
    """Whether the models of this configuration can use torch's fused attention."""
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(shape)]
    capped = getattr(shape.get_text_config(), "attn_logit_softcapping", None)  # transformers 5.10 lets sdpa drop it
    return not capped and getattr(kind, "_supports_sdpa", True)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer that comes with the model.

    Raises:
        InputError: no model at `path`, or no tokenizer with it.
    """
    configuration(path)  # its errors are the clearer ones
    with loading("tokenizer", path):
        found = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if not set(found.get_vocab()) - set(found.all_special_tokens):  # what 🤗 makes when the files are missing
        raise InputError(f"model {path!r} has no tokenizer: save one next to it")
    return found


def load_model(
    path: str,
    options: ModelOptions,
    *,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    """The model, with what the options ask for switched on.

    Args:
        path: folder or hub id.
        options: how it computes.
        tokenizer: what `load_tokenizer` gave.
        length: of the rows it will be trained on.
        dtype: of the parameters, whatever the checkpoint's.
        device: where they live.

    Raises:
        InputError: no such model, not a causal one, damaged or incomplete weights, rows longer than it has positions,
            or it cannot be quantised.
    """
    shape = configuration(path)
    check_length(shape, length, path)
    if isinstance(options, LoadedOptions) and options.quantise:
        library()
    if options.attention == "sdpa" and not has_sdpa(shape):
        raise InputError(f"a {shape.model_type!r} model has no sdpa attention; set attention: eager")
    with loading("weights", path):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=shape,
            dtype=dtype,
            attn_implementation=options.attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below
            trust_remote_code=False,
        )
    model, report = loaded
    missing = sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"])
    if missing:
        raise InputError(
            f"the weights of model {path!r} do not fit its config.json: {len(missing)} tensors are missing or "
            f"of another shape, the first {missing[0]!r}"
        )
    words = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > words:
        raise InputError(f"the tokenizer has {len(tokenizer)} words, model {path!r} has {words}")
    placed: Any = finish(model, options)
    return placed.to(device)  # of quantised weights only the bits
