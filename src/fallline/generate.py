"""Text from a causal language model, one token at a time."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError, NonFiniteError


def generate(
    model: nn.Module,
    ids: Sequence[int],
    new_tokens: int,
    *,
    generator: torch.Generator,
    temperature: float = 0.8,
    top_k: int | None = 50,
    eos: int | Collection[int] | None = None,
) -> list[int]:
    """Continue `ids`; arguments and errors are those of `stream`.

    Returns:
        `ids` and the new tokens, with `eos` where it came; fewer than asked after `eos` or when the model has no more
        positions.
    """
    new = stream(model, ids, new_tokens, generator=generator, temperature=temperature, top_k=top_k, eos=eos)
    return [*ids, *new]


def stream(
    model: nn.Module,
    ids: Sequence[int],
    new_tokens: int,
    *,
    generator: torch.Generator,
    temperature: float = 0.8,
    top_k: int | None = 50,
    eos: int | Collection[int] | None = None,
) -> Iterator[int]:
    """The tokens after `ids`: each is drawn from softmax(logits / temperature) over the `top_k` likeliest.

    Keys and values of earlier tokens are cached, so a token costs one forward of one token.

    Args:
        model: a 🤗 causal language model. In evaluation mode from the first token until the iterator ends or is closed,
            then as it was.
        ids: the beginning, at least one token.
        new_tokens: how many to add.
        generator: of all draws, on any device.
        temperature: 0 takes the likeliest token and draws nothing.
        top_k: None: all.
        eos: the token, or tokens, that end the text.

    Returns:
        An iterator over the new tokens, `eos` included where it came. It ends there, after `new_tokens`, or when the
        model has no more positions.

    Raises:
        InputError: at once: nothing to begin with, or more than the model has positions; temperature or top_k out of
            bounds.
    """
    most = positions(model)
    room = new_tokens if most is None else min(new_tokens, most - len(ids))
    if not ids or room < 0:
        raise InputError(f"'ids' must be 1 to {most or 'any number of'} tokens, got {len(ids)}")
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise InputError(f"temperature must be at least 0 and top_k at least 1, got {temperature!r} and {top_k!r}")
    last = {eos} if isinstance(eos, int) else set(eos or ())
    return _tokens(model, list(ids), room, generator, temperature, top_k, last)


@torch.no_grad()
def _tokens(
    model: Any,
    feed: list[int],
    room: int,
    generator: torch.Generator,
    temperature: float,
    top_k: int | None,
    last: set[int],
) -> Iterator[int]:
    keep = last_only(model)
    cache = None
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        for _ in range(room):
            with torch.compiler.set_stance("force_eager"):  # a compiled model would compile again for each length
                answer = model(
                    input_ids=torch.tensor([feed], device=model.device), past_key_values=cache, use_cache=True, **keep
                )
            cache = answer.past_key_values
            token = pick(answer.logits[0, -1], generator, temperature, top_k)
            yield token
            if token in last:
                break
            feed = [token]
    finally:
        for module in training:
            module.training = True


def last_only(model: Any) -> dict[str, int]:
    """What has a model give the logits of the last position only, where it knows how: the head on all of a long prompt
    would take more memory than the rest of the model."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


@torch.no_grad()
def following(model: Any, ids: Sequence[int]) -> Tensor:
    """The logits [V] of the token after `ids`, of a model in evaluation mode."""
    answer = model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False, **last_only(model))
    logits: Tensor = answer.logits[0, -1]
    return logits


def pick(logits: Tensor, generator: torch.Generator, temperature: float, top_k: int | None) -> int:
    """One token from logits [V]; see `stream`."""
    if temperature == 0:
        return int(logits.argmax())
    values, tokens = logits.float().topk(min(top_k or len(logits), len(logits)))
    if not bool(values[0].isfinite()):
        raise NonFiniteError("the model's logits are not finite; its weights are damaged, or its dtype is too narrow")
    chance = torch.softmax((values - values[0]) / temperature, 0).to(generator.device)
    return int(tokens[int(torch.multinomial(chance, 1, generator=generator))])


def positions(model: Any) -> int | None:
    """The most tokens a 🤗 model takes; None: it does not say."""
    most: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return most


def ends(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end a text: those of the model's generation configuration, and the tokenizer's."""
    told = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = told if isinstance(told, list) else [told]
    return {token for token in (*several, tokenizer.eos_token_id) if token is not None}


def text_of(tokens: Iterable[int], tokenizer: Any, before: Sequence[int] = ()) -> Iterator[str]:
    """A stream of tokens as a stream of text, each piece as soon as its characters are whole.

    Joined, the pieces are the text of `before` and the tokens, less the text of `before`; special tokens have none. A
    character that the stream leaves unfinished is its last piece, decoded as the tokenizer does (U+FFFD).

    Args:
        tokens: read one by one.
        tokenizer: a 🤗 tokenizer.
        before: what the tokens follow. Many tokenizers drop the space before the first word of a text; with `before`
            it stays.
    """

    def decode(ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    window = list(before)
    known, shown = len(window), len(decode(window))
    for token in tokens:
        window.append(token)
        text = decode(window)
        if len(text) > shown and not text.endswith("\ufffd"):
            yield text[shown:]
            del window[:known]  # what was shown last is context enough
            known, shown = len(window), len(decode(window))
    if rest := decode(window)[shown:]:
        yield rest
