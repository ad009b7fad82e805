"""Pairs of answers, one preferred to the other: what a line says.

A line is a JSON object with ``chosen`` and ``rejected``; other keys than those below, and keys that are null, are
ignored.

| ``prompt`` | ``chosen``, ``rejected`` | answered is |
|---|---|---|
| a text | texts | the prompt |
| messages | messages that follow | the prompt |
| none | whole conversations | what both begin with, up to where their assistants part |

Messages, with ``tools`` beside them where there are any, go through the chat template, as in `conversation`; of an
answer that is several messages, the assistant's are learned. Chosen and rejected are answers to the same: whatever
parts them first must be an assistant's message.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from ..errors import InputError
from .conversation import (
    Chat,
    Message,
    Plain,
    conversation,
    hash_of,
    kind_of,
    messages_field,
    named_keys,
    read_fields,
    text_field,
)

SIDES = ("chosen", "rejected")
_LIKE = '{"prompt": …, "chosen": …, "rejected": …}'


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt.

    Attributes:
        id: a hash of the line's fields.
        prompt: a hash of what is answered.
        chosen, rejected: each answer with its prompt.
    """

    id: str
    prompt: str
    chosen: Plain | Chat
    rejected: Plain | Chat


def parse_pair(line: str, templated: bool) -> Pair:
    """The pair in a line.

    Args:
        line: JSON.
        templated: whether texts are a user's and an assistant's message.

    Raises:
        InputError: not a JSON object, a field that is missing, empty or of the wrong type, answers to different
            prompts, an answer without an assistant's message. The message does not say where.
    """
    fields = read_fields(line, _LIKE)
    own = {key: fields[key] for key in ("prompt", *SIDES, "tools") if key in fields}
    id = hash_of(own)
    missing = [key for key in SIDES if key not in own]
    kinds = {type(own[key]) for key in ("prompt", *SIDES) if key in own}
    if missing or ("prompt" not in own and kinds == {str}):
        raise InputError(_lacks(fields, [*missing, *(["prompt"] if "prompt" not in own else [])]))
    if len(kinds) != 1 or not kinds <= {str, list}:
        got = ", ".join(f"{key} {kind_of(own[key])}" for key in ("prompt", *SIDES) if key in own)
        raise InputError(
            f"a pair is three texts, or three lists of messages, or two whole conversations as 'chosen' and 'rejected' "
            f"without 'prompt'; got {got}"
        )
    tools = own.get("tools")
    if kinds == {str}:
        chosen, rejected = (text_field(own, key) for key in SIDES)
        prompt = hash_of({"prompt": own["prompt"]})
        if not templated:
            return Pair(id, prompt, Plain(id, own["prompt"], chosen), Plain(id, own["prompt"], rejected))
        given = [{"role": "user", "content": own["prompt"]}]
        answers = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    elif "prompt" in own:
        given, answers = messages_field(own, "prompt"), [messages_field(own, key) for key in SIDES]
    else:
        given, answers = _parted(*(messages_field(own, key) for key in SIDES))
    for key, answer in zip(SIDES, answers, strict=True):
        if answer[0]["role"] != "assistant":
            raise InputError(
                f"{key!r} goes on with a message of the role {answer[0]['role']!r}: both must answer the same, so that "
                "they part at an assistant's message"
            )
    chosen_chat, rejected_chat = (conversation(id, given, answer, tools) for answer in answers)
    return Pair(id, hash_of({"prompt": given, "tools": tools}), chosen_chat, rejected_chat)


def _parted(a: list[Message], b: list[Message]) -> tuple[list[Message], list[list[Message]]]:
    """What two conversations begin with, and how each goes on. Of equal ones, the last answer is how they go on."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
    if same == min(len(a), len(b)):  # one is how the other begins
        same = max((i for i in range(same) if a[i]["role"] == "assistant"), default=same - 1)
    return a[:same], [a[same:], b[same:]]


def _lacks(fields: dict[str, Any], missing: list[str]) -> str:
    spare = [key for key in fields if key not in ("prompt", *SIDES, "tools")]
    near = ((key, difflib.get_close_matches(key, spare, 1)) for key in missing)
    hint = next((f"; did you mean {key!r} by {close[0]!r}?" for key, close in near if close), "")
    return f"{named_keys(fields)}, but a pair has 'prompt', 'chosen' and 'rejected'{hint}"
