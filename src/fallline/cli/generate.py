"""`fallline generate`: a model continues a text."""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from ..drivers.train import interruptible
from ..drivers.trained import Trained, open_trained
from ..errors import InputError
from ..generate import ends, positions, stream, text_of
from ..noise import rng

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; see `fallline.generate.stream`. `top_k` 0: all. `seed`: of the draws."""

    tokens: int
    temperature: float
    top_k: int
    seed: int

    @classmethod
    def of(cls, args: Namespace) -> Sampling:
        """The options of a command.

        Raises:
            InputError: out of bounds.
        """
        if args.max_tokens < 1:
            raise InputError(f"--max-tokens must be at least 1, got {args.max_tokens}")
        if not 0 <= args.temperature < float("inf"):
            raise InputError(f"--temperature must be a finite number, at least 0, got {args.temperature}")
        if args.top_k < 0:
            raise InputError(f"--top-k must be at least 1, or 0 for all, got {args.top_k}")
        return cls(args.max_tokens, args.temperature, args.top_k, args.seed)

    def draw(self, model: Any, ids: Sequence[int], turn: int, eos: Collection[int]) -> Iterator[int]:
        """The tokens after `ids`. Draws depend on the seed and on `turn`, on every device alike."""
        return stream(
            model,
            ids,
            self.tokens,
            generator=rng(self.seed, turn, "talk"),
            temperature=self.temperature,
            top_k=self.top_k or None,
            eos=eos,
        )


def generate(args: Namespace) -> int:
    """Print what the model writes after the prompt, as it comes."""
    sampling = Sampling.of(args)
    if args.prompt is None:
        standard_input()
    trained = open_trained(args.model, args.device)
    ids = encode(trained, args.prompt if args.prompt is not None else read_prompt())
    tokens = sampling.draw(trained.model, ids, 0, ends(trained.model, trained.tokenizer))
    stopped = show(text_of(tokens, trained.tokenizer, ids))
    return 0 if stopped is None else 128 + stopped


def show(pieces: Iterator[str]) -> int | None:
    """Print what a model writes as it comes, until the first Ctrl-C or SIGTERM.

    On a terminal without control characters: those could set its title, fill the clipboard or erase what stands there.

    Returns:
        The signal that ended it, or None.
    """
    terminal = sys.stdout is not None and sys.stdout.isatty()
    try:
        # an exception out of a signal can be lost in a destructor that happens to run: ask after each piece
        with interruptible() as stopped:
            for piece in pieces:
                print(CONTROL.sub("\ufffd", piece) if terminal else piece, end="", flush=True)
                if stopped() is not None:
                    break
            return stopped()
    finally:
        print(flush=True)


def read_prompt() -> str:
    """All of standard input but a newline at its end.

    Raises:
        InputError: it is closed, or not UTF-8.
    """
    source = standard_input()
    if source.isatty():
        print("write the prompt, and end it with Ctrl-D on a line of its own", file=sys.stderr)
    try:
        return source.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt is not UTF-8: byte {error.start + 1} is {error.object[error.start]:#x}") from None


def standard_input() -> TextIO:
    """
    Raises:
        InputError: it is closed.
    """
    if sys.stdin is None:  # Python's way to say so
        raise InputError("standard input is closed; there is nothing to read")
    return sys.stdin


def encode(trained: Trained, prompt: str) -> list[int]:
    """The prompt as the tokenizer makes it; an empty one is the token that starts a text.

    Raises:
        InputError: it is longer than the model takes, or empty where no token starts a text.
    """
    ids: list[int] = list(trained.tokenizer(well_formed(prompt))["input_ids"])
    if not ids:
        tokenizer = trained.tokenizer
        ids = [id for id in (tokenizer.bos_token_id, tokenizer.eos_token_id) if id is not None][:1]
    if not ids:
        raise InputError(f"{trained.name} has no token that starts a text; give a prompt")
    most = positions(trained.model)
    if most is not None and len(ids) >= most:
        raise InputError(f"the prompt has {len(ids)} tokens, {trained.name} has room for {most - 1} before its own")
    return ids


def well_formed(text: str) -> str:
    """The text, if it is one.

    Raises:
        InputError: it holds bytes that are no UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the text is not UTF-8 at character {error.start + 1}") from None
    return text
