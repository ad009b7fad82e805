"""Examples for fine-tuning: what a line asks the model to learn, and that as tokens.

A line is a JSON object of one of three forms, told apart by its keys; keys of no form, and keys that are null, are
ignored.

| form | learned |
|---|---|
| ``text`` | all of it |
| ``prompt``, ``completion`` | the completion and the end of it |
| ``messages`` | every assistant message and the token that ends it |

Prompt and completion may be texts or lists of messages. Messages, with ``tools`` beside them where there are any, go
through the tokenizer's chat template. What is learned of it is found by rendering: assistant message i begins where
``messages[:i]`` with the generation prompt ends, and ends where ``messages[:i + 1]`` ends, without the white space
there. What follows the last one is left out.

Tokens are those that generation meets. Where the tokens of prompt and answer together begin with the prompt's, they are
taken; elsewhere (a prompt that ends in a space, which would join the answer's first word) the rest is tokenized apart,
without the space that SentencePiece puts before a text.

Special tokens that the template writes become special tokens. A line that spells one out itself is refused, in all
forms: a reader of text would see it as characters, a template would let it end a turn, and nothing says which was
meant.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..errors import InputError

FORMS = (("text",), ("prompt", "completion"), ("messages",))

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Plain:
    """Text to learn, after text that is given.

    Attributes:
        id: a hash of the fields of its form.
        prompt: what is given; None for the form ``text``.
        answer: what is learned.
    """

    id: str
    prompt: str | None
    answer: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation.

    Attributes:
        id: a hash of the fields of its form.
        messages: up to the last one that is learned.
        learned: which of them are, rising.
        tools: what the template is told of tools, or None.
    """

    id: str
    messages: list[Message]
    learned: tuple[int, ...]
    tools: list[Any] | None


class Marked(NamedTuple):
    """A text whose parts are in turn given and learned.

    Attributes:
        text: the whole.
        cuts: where its parts end: text[: cuts[0]] is given, text[cuts[0] : cuts[1]] learned, and so on to the end.
    """

    text: str
    cuts: tuple[int, ...]


# a line


def parse(line: str, templated: bool) -> Plain | Chat:
    """The example in a line.

    Args:
        line: JSON.
        templated: whether texts of ``prompt`` and ``completion`` are a user's and an assistant's message.

    Raises:
        InputError: not a JSON object, not of exactly one form, a field of the wrong type or empty, no assistant message
            to learn or nothing before it. The message does not say where.
    """
    fields = read_fields(line, '{"prompt": …, "completion": …}')
    found = [form for form in FORMS if all(key in fields for key in form)]
    if len(found) != 1:
        raise InputError(_no_form(fields) if not found else _two_forms(found))
    (form,) = found
    own = {key: fields[key] for key in (*form, "tools") if key in fields}
    id = hash_of(own)
    if form == ("text",):
        return Plain(id, None, text_field(own, "text"))
    if form == ("messages",):
        return conversation(id, [], messages_field(own, "messages"), own.get("tools"))
    kinds = {type(own[key]) for key in form}
    if kinds == {list}:
        return conversation(id, messages_field(own, "prompt"), messages_field(own, "completion"), own.get("tools"))
    if kinds != {str}:
        got = " and ".join(kind_of(own[key]) for key in form)
        raise InputError(f"'prompt' and 'completion' must be two texts or two lists of messages, got {got}")
    prompt, completion = own["prompt"], text_field(own, "completion")
    if not templated:
        return Plain(id, prompt, completion)
    asked, answer = {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}
    return conversation(id, [asked], [answer], own.get("tools"))


def read_fields(line: str, like: str) -> dict[str, Any]:
    """What is not null of the object in a line; `like`: what one looks like.

    Raises:
        InputError: it is not JSON, or not an object.
    """
    try:
        read = json.loads(line)
    except json.JSONDecodeError as error:
        reason = f"{error.msg[0].lower()}{error.msg[1:]}".removesuffix(" at")
        raise InputError(f"not JSON: {reason} at column {error.colno}; each line must be one whole object") from None
    except ValueError:
        raise InputError("not JSON that can be read: it has a number of thousands of digits") from None
    if not isinstance(read, dict):
        raise InputError(f"{kind_of(read)}, must be a JSON object such as {like}")
    return {key: value for key, value in read.items() if value is not None}


def hash_of(fields: dict[str, Any]) -> str:
    """A hash of some fields, in hexadecimal.

    Raises:
        InputError: a text in them is none.
    """
    try:
        return hashlib.sha256(json.dumps(fields, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
    except UnicodeEncodeError as error:
        raise InputError(f"half a surrogate pair, {error.object[error.start]!r}, is no text; remove it") from None


def _no_form(fields: dict[str, Any]) -> str:
    known = {key for form in FORMS for key in form}
    spare = [key for key in fields if key not in known]
    near = ((key, difflib.get_close_matches(key, spare, 1)) for form in FORMS for key in form if key not in fields)
    hint = next((f"; did you mean {key!r} by {close[0]!r}?" for key, close in near if close), "")
    return f"{named_keys(fields)}, but an example has {_forms(FORMS, ' or ')}{hint}"


def _two_forms(found: Sequence[tuple[str, ...]]) -> str:
    return f"{_forms(found, ' as well as ')} stand in one line: keep what is to be learned, rename or remove the other"


def _forms(forms: Sequence[tuple[str, ...]], join: str) -> str:
    return join.join(" with ".join(map(repr, form)) for form in forms)


def named_keys(fields: dict[str, Any]) -> str:
    """Which keys an object has, in words."""
    names = [repr(key if len(key) < 40 else f"{key[:39]}…") for key in fields]
    return f"has {', '.join(names[:6])}{', …' if len(names) > 6 else ''}" if names else "has nothing"


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def text_field(fields: dict[str, Any], key: str) -> str:
    """A field that must be a text with something in it."""
    value = fields[key]
    if not isinstance(value, str):
        raise InputError(f"{key!r} must be a text, got {kind_of(value)}")
    if not value.strip():
        raise InputError(f"{key!r} is empty or blank: there is nothing to learn; remove the line")
    return value


def messages_field(fields: dict[str, Any], key: str) -> list[Message]:
    """A field that must be messages."""
    value = fields[key]
    if not isinstance(value, list):
        raise InputError(f"{key!r} must be a list of messages, got {kind_of(value)}")
    if not value:
        raise InputError(f"{key!r} is empty: it must have messages with 'role' and 'content'")
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise InputError(
                f"message {number} of {key!r} must be an object with 'role' and 'content', is {kind_of(message)}"
            )
        if not isinstance(message.get("role"), str) or not message.keys() & {"content", "tool_calls"}:
            raise InputError(
                f"message {number} of {key!r} {named_keys(message)}; it needs a text 'role', and 'content'"
            )
        if not isinstance(message.get("content"), str | list | None):
            raise InputError(
                f"the 'content' of message {number} of {key!r} is {kind_of(message['content'])}, must be text"
            )
    return value


def conversation(id: str, given: list[Message], more: list[Message], tools: Any) -> Chat:
    """A conversation of which the assistant's messages in `more` are learned."""
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise InputError(f"'tools' must be a list of objects, got {kind_of(tools)}")
    messages = [*given, *more]
    learned = tuple(i for i, m in enumerate(messages) if i >= len(given) and m["role"] == "assistant")
    if not learned:
        roles = ", ".join(dict.fromkeys(repr(m["role"]) for m in more))
        raise InputError(f"no message has the role 'assistant', so there is nothing to learn; there is {roles}")
    if learned[0] == 0:
        raise InputError("the conversation begins with the assistant: put what it answers before it")
    for i in learned:
        if not any(v.strip() if isinstance(v, str) else v for k, v in messages[i].items() if k != "role"):
            raise InputError(f"message {i + 1}, an assistant's, is empty or blank: there is nothing to learn")
    return Chat(id, messages[: learned[-1] + 1], learned, tools)


# a line as text


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """What finds a special token of the tokenizer spelled out in a text."""
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def marked(example: Plain | Chat, tokenizer: PreTrainedTokenizerBase, specials: re.Pattern[str]) -> Marked:
    """An example as the text that the model sees, without what the tokenizer itself puts around a text.

    Args:
        example: a chat only where the tokenizer has a chat template.
        tokenizer: gives the template.
        specials: from `special_tokens`.

    Raises:
        InputError: the example spells out a special token, or the chat template refuses it, drops what is to be learned
            or rewrites earlier messages. The message does not say where.
    """
    content = [example.prompt, example.answer] if isinstance(example, Plain) else [example.messages, example.tools]
    for text in _strings(content):
        if spelled := specials.search(text):
            raise InputError(
                f"its text spells out {spelled[0]!r}, a special token of the model's tokenizer, which only the chat "
                "template may write; give turns as 'messages', or remove it"
            )
    if isinstance(example, Plain):
        text = (example.prompt or "") + example.answer
        return Marked(text, (len(text) - len(example.answer), len(text)))
    return _rendered(example, tokenizer)


def _rendered(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> Marked:
    def render(number: int, prompted: bool) -> str:
        messages = chat.messages[:number]
        try:
            return str(
                tokenizer.apply_chat_template(
                    messages, tools=chat.tools, add_generation_prompt=prompted, tokenize=False
                )
            )
        except Exception as error:  # a template is a program of strangers and raises anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"the model's chat template refuses these messages: {reason}") from None

    whole, cuts = render(len(chat.messages), False), []
    for i in chat.learned:
        before = render(i, True)
        after = whole if i + 1 == len(chat.messages) else render(i + 1, False)
        if not (whole.startswith(before) and whole.startswith(after)):
            raise InputError(
                f"the model's chat template does not leave the text before or after message {i + 1}, an assistant's, "
                "as it was when more follows, so what is to be learned cannot be told; end the conversation with that "
                "message, or give prompt and completion as texts with chat: false"
            )
        end = len(before) + len(after[len(before) :].rstrip())
        if end <= len(before):
            raise InputError(f"the model's chat template shows nothing of message {i + 1}, an assistant's")
        cuts += [len(before), end]
    return Marked(whole[: cuts[-1]], tuple(cuts))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _strings(part)


# a text as tokens


def tokenized(batch: Sequence[Marked], tokenizer: PreTrainedTokenizerBase) -> list[list[list[int]]]:
    """The token ids of each part of each text, without what the tokenizer itself puts around a text.

    Special tokens are recognised: what may not hold any has been through `marked`.
    """
    ends = iter(_ids([text[:cut] for text, cuts in batch for cut in cuts], tokenizer))
    heads = [[next(ends) for _ in cuts] for _, cuts in batch]
    stable = [_stable(head) for head in heads]
    apart = [
        text[start:end] for (text, cuts), n in zip(batch, stable, strict=True) for start, end in pairwise(cuts[n - 1 :])
    ]
    alone = iter(_going_on(apart, tokenizer))
    return [
        [whole[len(head[i - 1]) if i else 0 :] for i, whole in enumerate(head[:n])] + [next(alone) for _ in head[n:]]
        for head, n in zip(heads, stable, strict=True)
    ]


def _stable(heads: list[list[int]]) -> int:
    """How many of these, from the first, each begin with the one before."""
    begins = [b[: len(a)] == a for a, b in pairwise(heads)]
    return 1 + sum(accumulate(begins, operator.and_))


def _going_on(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The token ids of texts that go on from others: without the space that some tokenizers put before every text."""
    found = _ids(texts, tokenizer)
    if not texts:
        return found
    line, plain, after = _ids(["\n", "a", "\na"], tokenizer)
    if after == line + plain:
        return found
    behind = _ids([f"\n{text}" for text in texts], tokenizer)
    return [b[len(line) :] if b[: len(line)] == line else ids for b, ids in zip(behind, found, strict=True)]


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not texts:  # which tokenizers refuse
        return []
    ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return [found if text else [] for text, found in zip(texts, ids, strict=True)]  # some begin even nothing with "▁"


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before a text that it is asked to continue."""
    with_special, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    at = next(i for i in range(len(with_special)) if with_special[i : i + len(bare)] == bare)
    return list(with_special[:at])
