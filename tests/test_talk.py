"""`fallline generate` and `fallline chat`: what comes out of them, through pipes and on a terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from fallline.cli.chat import Conversation
from fallline.cli.generate import Sampling
from fallline.cli.main import main
from fallline.drivers.trained import open_trained
from fallline.errors import InputError
from fallline.generate import generate
from fallline.noise import rng
from talkers import TEMPLATE, byte_tokenizer, save_model

POSITIONS = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says nonsense, with a chat template."""
    folder = tmp_path_factory.mktemp("talker")
    save_model(folder, byte_tokenizer(), positions=POSITIONS)
    return folder


class Spoken:
    """What a command printed, and how it ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err.splitlines()


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Run a command with something on its standard input."""

    def run(*argv: str, stdin: str | bytes = "") -> Spoken:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))
        capsys.readouterr()
        code = main(list(argv))
        return Spoken(code, *capsys.readouterr())

    return run


def answer(folder: Path, prompt: str | list[dict[str, str]], turn: int = 0, tokens: int = 30, **options: float) -> str:
    """What the model says after a text or a conversation, by `generate`, which has tests of its own."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if isinstance(prompt, str):
        ids = tokenizer(prompt).input_ids
    else:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
    kind = {"temperature": 0.0} | options
    seed = int(kind.pop("seed", 0))
    whole = generate(model, ids, tokens, generator=rng(seed, turn, "talk"), eos=tokenizer.eos_token_id, **kind)
    return str(tokenizer.decode(whole[len(ids) :], skip_special_tokens=True))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# generate


def test_generate_prints_what_is_new_and_nothing_else(folder: Path, say) -> None:  # type: ignore[no-untyped-def]
    options = ("--max-tokens", "30", "--temperature", "0")
    expected = answer(folder, "Once, Zoë") + "\n"
    for spoken in (
        say("generate", str(folder), "Once, Zoë", *options),
        say("generate", str(folder), *options, "Once, Zoë"),
        say("generate", *options, str(folder), stdin="Once, Zoë\n"),
    ):
        assert (spoken.code, spoken.out, spoken.err) == (0, expected, [])
    assert say("generate", str(folder), *options, stdin="Once, Zoë\n\n").out != expected, "one newline is the shell's"


def test_generate_draws_by_the_seed(folder: Path, say) -> None:  # type: ignore[no-untyped-def]
    first = say("generate", str(folder), "a", "--max-tokens", "30", "--seed", "4", "--top-k", "5")
    assert first.out == answer(folder, "a", temperature=0.8, top_k=5, seed=4) + "\n"
    assert say("generate", str(folder), "a", "--max-tokens", "30", "--seed", "5", "--top-k", "5").out != first.out
    all_of_them = say("generate", str(folder), "a", "--max-tokens", "30", "--top-k", "0")
    assert all_of_them.out == answer(folder, "a", temperature=0.8, top_k=len(byte_tokenizer())) + "\n"


def test_generate_from_nothing(folder: Path, say) -> None:  # type: ignore[no-untyped-def]
    start = AutoTokenizer.from_pretrained(folder).bos_token
    spoken = say("generate", str(folder), "", "--temperature", "0", "--max-tokens", "9")
    assert spoken.out == answer(folder, start, tokens=9) + "\n"


def test_a_prompt_may_begin_with_a_dash(folder: Path, say) -> None:  # type: ignore[no-untyped-def]
    few = ("--temperature", "0", "--max-tokens", "9")
    for argv in (("- a", *few), (*few, "- a"), (*few, "--", "- a")):
        assert say("generate", str(folder), *argv).out == answer(folder, "- a", tokens=9) + "\n"


@pytest.mark.parametrize(
    ("argv", "stdin", "words"),
    [
        (["x", "--max-tokens", "0"], b"", "--max-tokens must be at least 1, got 0"),
        (["x", "--temperature", "-1"], b"", "--temperature must be a finite number, at least 0, got -1.0"),
        (["x", "--temperature", "nan"], b"", "--temperature must be a finite number, at least 0, got nan"),
        (["x", "--top-k", "-1"], b"", "--top-k must be at least 1, or 0 for all, got -1"),
        (["x" * POSITIONS], b"", f"the prompt has {POSITIONS} tokens, .* has room for {POSITIONS - 1} before its own"),
        ([], b"caf\xe9", "the prompt is not UTF-8: byte 4 is 0xe9"),
        (["caf\udce9"], b"", "the text is not UTF-8 at character 4"),
    ],
)
def test_generate_is_refused_in_one_line(folder: Path, say, argv: list[str], stdin: bytes, words: str) -> None:  # type: ignore[no-untyped-def]
    spoken = say("generate", str(folder), *argv, stdin=stdin)
    assert (spoken.code, spoken.out) == (2, "")
    (line,) = spoken.err
    assert re.fullmatch(f"fallline: error: {words}", line)


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_a_closed_standard_input_is_told(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", None)  # what Python makes of `<&-`
    assert main([command, str(folder)]) == 2
    assert capsys.readouterr().err == "fallline: error: standard input is closed; there is nothing to read\n"


# chat


def test_a_piped_conversation_remembers_until_it_is_reset(folder: Path, say) -> None:  # type: ignore[no-untyped-def]
    spoken = say("chat", str(folder), "--max-tokens", "30", stdin="Hello\nAnd you?\n\n/reset\nHello\n")
    first = answer(folder, [user("Hello")])
    second = answer(folder, [user("Hello"), assistant(first), user("And you?")])
    assert second != answer(folder, [user("And you?")]), "what was said before matters"
    assert (spoken.code, spoken.out) == (0, f"{first}\n{second}\n{first}\n")
    assert spoken.err == ["the answer was cut after 30 tokens; --max-tokens sets how many it may have"] * 3


def test_the_system_message_comes_first(folder: Path, say) -> None:  # type: ignore[no-untyped-def]
    spoken = say("chat", str(folder), "--max-tokens", "30", "--system", "Be brief.", stdin="Hello\n/reset\nHello\n")
    expected = answer(folder, [{"role": "system", "content": "Be brief."}, user("Hello")])
    assert spoken.out == f"{expected}\n{expected}\n"
    assert expected != answer(folder, [user("Hello")])


def test_answers_are_drawn_anew_each_turn(folder: Path, say) -> None:  # type: ignore[no-untyped-def]
    options = ("--max-tokens", "30", "--temperature", "2", "--seed", "3")
    spoken = say("chat", str(folder), *options, stdin="Hello\nHello\n")
    first = answer(folder, [user("Hello")], temperature=2.0, seed=3)
    second = answer(folder, [user("Hello"), assistant(first), user("Hello")], 1, temperature=2.0, seed=3)
    assert spoken.out == f"{first}\n{second}\n"


def test_the_oldest_turns_are_forgotten_when_they_no_longer_fit(folder: Path, say) -> None:  # type: ignore[no-untyped-def]
    long = "y" * 100
    spoken = say("chat", str(folder), "--max-tokens", "30", stdin=f"Hello\n{long}\nHow?\n")
    first = answer(folder, [user("Hello")])
    second = answer(folder, [user("Hello"), assistant(first), user(long)])
    third = answer(folder, [user(long), assistant(second), user("How?")])
    assert spoken.out == f"{first}\n{second}\n{third}\n"
    forgotten = [line for line in spoken.err if "forgotten" in line]
    assert forgotten == [f"the conversation outgrew the model's {POSITIONS} positions; turns forgotten: 1"]


@pytest.mark.parametrize(
    ("stdin", "words"),
    [
        (b"x<|im_end|>\n", r"a message cannot contain '<\|im_end\|>', with which the model marks turns"),
        (b"y" * 300, rf"the message makes 3\d\d tokens, .* has room for {POSITIONS - 1}"),
        (b"caf\xe9", "standard input is not UTF-8: 0xe9"),
    ],
)
def test_a_message_that_cannot_be_asked(folder: Path, say, stdin: bytes, words: str) -> None:  # type: ignore[no-untyped-def]
    spoken = say("chat", str(folder), stdin=stdin)
    assert (spoken.code, spoken.out) == (2, "")
    (line,) = spoken.err
    assert re.fullmatch(f"fallline: error: {words}", line)


def test_an_answer_ends_where_the_template_ends_a_turn(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token_id
    tokenizer.eos_token = "<|im_start|>"  # as with a base model whose own end of text is another token
    save_model(tmp_path, tokenizer)
    trained = open_trained(str(tmp_path))
    conversation = Conversation(trained, None, Sampling(30, 0.0, 50, 0))
    assert conversation.eos == {end, tokenizer.eos_token_id}
    with pytest.raises(InputError, match=r"cannot contain '<.im_end.>'"):
        Conversation(trained, "a<|im_end|>b", Sampling(30, 0.0, 50, 0))


def test_models_that_cannot_chat(tmp_path: Path, say) -> None:  # type: ignore[no-untyped-def]
    save_model(tmp_path / "plain", byte_tokenizer(None))
    spoken = say("chat", str(tmp_path / "plain"), stdin="Hello\n")
    assert spoken.code == 2
    assert f"has no chat template, so it cannot take turns; fallline generate {tmp_path}" in spoken.err[-1]
    save_model(tmp_path / "strict", byte_tokenizer(TEMPLATE.replace("'tool'", "'system'")))
    spoken = say("chat", str(tmp_path / "strict"), "--system", "Be brief.", stdin="Hello\n")
    assert spoken.code == 2
    assert spoken.err[-1].endswith("strict refuses the conversation: no tools here")


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *argv: str) -> None:
        self.fd, slave = pty.openpty()
        command = [sys.executable, "-m", "fallline", *argv]
        env = os.environ | {"TERM": "dumb"}
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=env,
            # what a shell starts in the background ignores interrupts, which is inherited; on a terminal nothing does
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(slave)
        self.seen = b""

    def until(self, mark: str) -> str:
        """What is printed up to `mark`."""
        end = time.monotonic() + 60
        while mark.encode() not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.fd], [], [], 1)[0]:
                self.seen += os.read(self.fd, 4096)
        text, _, self.seen = self.seen.partition(mark.encode())
        return text.decode()

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    """A chat that answers at length."""
    save_model(tmp_path, byte_tokenizer(), positions=100_000)
    opened = Terminal("chat", str(tmp_path), "--max-tokens", "90000")
    yield opened
    opened.process.kill()
    os.close(opened.fd)


def test_on_a_terminal_an_answer_is_stopped_and_the_conversation_goes_on(tmp_path: Path, terminal: Terminal) -> None:
    assert "Ctrl-C stops an answer" in terminal.until("> ")
    terminal.type("Hello\n")
    terminal.until("Hello\r\n")
    while len(terminal.seen) < 20:
        terminal.seen += os.read(terminal.fd, 4096)
    told = answer(tmp_path, [user("Hello")], tokens=40)
    shown = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", told).replace("\n", "\r\n")
    assert shown != told, "the answer has control characters, which a terminal must not get"
    assert terminal.seen.decode(errors="ignore")[:10] == shown[:10], "it streams"
    terminal.interrupt()
    terminal.until("\r\n> ")
    terminal.type("x<|im_end|>\n")
    assert "a message cannot contain" in terminal.until("\r\n> ")
    terminal.type("/reset\n")
    terminal.until("\r\n> ")
    terminal.type("half a li")
    terminal.until("half a li")
    for _ in range(6):  # Python's readline does not see a signal in the moment before it waits for the next key
        time.sleep(0.3)
        terminal.interrupt()
        if select.select([terminal.fd], [], [], 10)[0]:  # it has, and a second one would kill what is on its way out
            break
    assert terminal.process.wait(60) == 0


@pytest.mark.slow
def test_a_real_model_answers(smollm2: Path, say) -> None:  # type: ignore[no-untyped-def]
    questions = "What is the capital of France?\nAnd of Italy?\n"
    spoken = say("chat", "smollm2-135m-instruct", "--max-tokens", "30", stdin=questions)
    france, italy = spoken.out.splitlines()
    assert "Paris" in france
    assert "Rome" in italy
    assert spoken.err == []
    assert "Paris" in say("generate", str(smollm2), "The capital of France is", "--temperature", "0").out


def test_help_imports_neither_torch_nor_a_method() -> None:
    code = (
        "import sys\nfrom fallline.cli.main import main\n"
        "for command in ('chat', 'generate', 'eval', 'export'):\n"
        "    try:\n        main([command, '--help'])\n    except SystemExit as e:\n        assert e.code == 0\n"
        "assert not {'torch', 'transformers', 'lm_eval', 'fallline.recipe'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
