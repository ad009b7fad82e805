"""`fallline chat`: a conversation with a model, on a terminal or through a pipe."""

from __future__ import annotations

import importlib
import signal
import sys
from argparse import Namespace
from collections.abc import Generator, Iterator
from contextlib import closing, suppress

from ..data.conversation import special_tokens
from ..drivers.trained import Trained, open_trained
from ..errors import InputError
from ..generate import ends, positions, text_of
from .generate import Sampling, show, standard_input, well_formed

Message = dict[str, str]


class Conversation:
    """What was said so far, and the model that answers.

    Attributes:
        system: the message that comes before all, or none.
        turns: the user's and the assistant's messages in turn.
        asked: questions so far, forgotten ones too.
        eos: the tokens that end an answer.
    """

    def __init__(self, trained: Trained, system: str | None, sampling: Sampling) -> None:
        """
        Raises:
            InputError: the model has no chat template, or the system message cannot be used.
        """
        if not getattr(trained.tokenizer, "chat_template", None):
            raise InputError(
                f"{trained.name} has no chat template, so it cannot take turns; fallline generate {trained.name} "
                "continues a text"
            )
        self.trained, self.sampling = trained, sampling
        self.specials = special_tokens(trained.tokenizer)
        self.system = [self.message("system", system)] if system is not None else []
        self.eos = ends(trained.model, trained.tokenizer) | self.turn_end()
        self.reset()

    def reset(self) -> None:
        """Forget all turns."""
        self.turns: list[Message] = []
        self.asked = 0

    def ask(self, text: str) -> Generator[str]:
        """The answer, piece by piece. However far it is read is remembered when the iterator ends or is closed.

        Raises:
            InputError: at once: the text cannot be asked. The conversation is as it was.
        """
        turns, ids = self.fit([*self.turns, self.message("user", text)])
        return self._answer(turns, ids)

    def _answer(self, turns: list[Message], ids: list[int]) -> Generator[str]:
        drawn, said = [], ""

        def tokens() -> Iterator[int]:
            for token in self.sampling.draw(self.trained.model, ids, self.asked, self.eos):
                drawn.append(token)
                yield token

        try:
            for piece in text_of(tokens(), self.trained.tokenizer):
                said += piece
                yield piece
            if drawn[-1] not in self.eos:
                full = len(drawn) < self.sampling.tokens
                why = "the model has no more positions" if full else "--max-tokens sets how many it may have"
                note(f"the answer was cut after {len(drawn)} tokens; {why}")
        finally:
            said = self.specials.sub("", said)  # spelled out of other tokens, it would end a turn next time
            self.turns = [*turns, {"role": "assistant", "content": said}]
            self.asked += 1

    def message(self, role: str, content: str) -> Message:
        """
        Raises:
            InputError: the content spells out a special token, or is no text.
        """
        spelled = self.specials.search(well_formed(content))
        if spelled:
            raise InputError(f"a message cannot contain {spelled[0]!r}, with which the model marks turns")
        return {"role": role, "content": content}

    def turn_end(self) -> set[int]:
        """The special token that the template writes after an answer, if it does: what a model that was not made for
        chat learns to end with when it is trained on conversations."""
        tokenizer, answer = self.trained.tokenizer, "forty-two"
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
        try:
            text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        except Exception:  # `tokens` tells it when there is something to ask
            return set()
        if answer not in text:
            return set()
        end = self.specials.match(text.rpartition(answer)[2].lstrip())
        return {int(tokenizer.get_vocab()[end[0]])} if end else set()

    def fit(self, turns: list[Message]) -> tuple[list[Message], list[int]]:
        """The turns that fit the model with an answer, and they as tokens: the oldest are dropped.

        An answer is given room for what may be drawn, or a quarter of the model's positions where that is less.

        Raises:
            InputError: the last message alone is too long.
        """
        most = positions(self.trained.model)
        ids = self.tokens(turns)
        if most is None:
            return turns, ids
        dropped, room = 0, min(self.sampling.tokens, most // 4)
        while len(ids) + room > most and len(turns) > 1:
            turns, dropped = turns[2:], dropped + 1
            ids = self.tokens(turns)
        if len(ids) >= most:
            raise InputError(f"the message makes {len(ids)} tokens, {self.trained.name} has room for {most - 1}")
        if dropped:
            note(f"the conversation outgrew the model's {most} positions; turns forgotten: {dropped}")
        return turns, ids

    def tokens(self, turns: list[Message]) -> list[int]:
        """The conversation in the model's template, up to where the assistant answers.

        Raises:
            InputError: the template refuses it.
        """
        tokenizer = self.trained.tokenizer
        try:
            text = tokenizer.apply_chat_template([*self.system, *turns], tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program of strangers and raises anything
            reason = " ".join(str(error).split())
            raise InputError(f"the chat template of {self.trained.name} refuses the conversation: {reason}") from error
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def chat(args: Namespace) -> int:
    """Answer until the input ends. On a terminal, Ctrl-C stops an answer; at the prompt it leaves, as Ctrl-D does."""
    sampling = Sampling.of(args)
    typed = standard_input().isatty()
    conversation = Conversation(open_trained(args.model, args.device), args.system, sampling)
    if typed:
        note(f"{conversation.trained.name}: Ctrl-C stops an answer, /reset forgets the conversation, Ctrl-D leaves")
    for line in prompted() if typed else piped():
        if line.strip() == "/reset":
            conversation.reset()
        elif line.strip():
            try:
                with closing(conversation.ask(line)) as answer:
                    stopped = show(answer)
            except InputError as error:
                if not typed:
                    raise
                note(f"fallline: error: {error}")
                continue
            if stopped is not None and not (typed and stopped == signal.SIGINT):
                return 128 + stopped
    return 0


def prompted() -> Iterator[str]:
    """Lines typed on a terminal, until Ctrl-D or Ctrl-C."""
    with suppress(ImportError):  # lines can be edited and called back
        importlib.import_module("readline")
    while True:
        try:
            yield input("> ")
        except UnicodeDecodeError:
            note("fallline: error: the line is not UTF-8")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def piped() -> Iterator[str]:
    """The lines of standard input.

    Raises:
        InputError: not UTF-8.
    """
    try:
        for line in sys.stdin:
            yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8: {error.object[error.start]:#x}") from None


def note(text: str) -> None:
    """What is not part of an answer."""
    print(text, file=sys.stderr, flush=True)
