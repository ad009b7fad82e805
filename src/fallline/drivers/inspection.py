"""Ask a question of a model that is done training, beside the model it was made from."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import __version__, adapters
from ..adapters.layers import KINDS, adapted, wide
from ..catalog import find
from ..data.conversation import (
    Marked,
    hash_of,
    kind_of,
    messages_field,
    read_fields,
    special_tokens,
    start_tokens,
    tokenized,
)
from ..data.files import find_files, read_lines
from ..data.lines import located
from ..errors import InputError, StorageError
from ..generate import positions
from ..models.identity import fingerprint
from ..models.loading import quietly
from ..probes.inspection import Changed, Prompt
from ..report.inspection import page
from .audit import writable
from .folder import write_text
from .setting import VERSIONS, processor
from .trained import Trained, base_of_run, open_trained


@dataclass(frozen=True)
class Inspected:
    """What was found.

    Attributes:
        record: what is in `json`. json, html: the files.
    """

    record: dict[str, Any]
    json: Path
    html: Path


def inspect(
    name: str,
    method: str,
    options: Mapping[str, Any],
    *,
    base: str | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    command: str = "",
) -> Inspected:
    """Inspect a model, and write what came of it.

    Args:
        name: the folder of a run, of a PEFT adapter, or with `base` a model.
        method: of kind ``inspection``.
        options: the method's.
        base: the model that `name` was made from, where it does not say so itself.
        out: folder for `METHOD.json` and `METHOD.html`, replaced when they are there; None: ``NAME/audit``.
        device: as in a recipe.
        command: what was typed, for the record.

    Raises:
        InputError: something that cannot be used, in one line; nothing was written.
        NonFiniteError: the model's weights or answers are not finite; nothing was written.
        StorageError: the disk refuses.
    """
    module = find("inspection", method).load()
    config = module.Config.from_mapping(options, f"inspection {method!r}")
    if out is None and not Path(name).is_dir():
        raise InputError(f"{name!r} is no folder here to write into; say where the report goes: --out FOLDER")
    folder = writable(Path(name) / "audit" if out is None else Path(out))
    subject = Opened(name, base, device)
    found = module.build(config).look(subject)
    record = {
        "format": 1,
        "fallline": __version__,
        "command": command or None,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "inspection": {"name": method} | config.to_mapping(),
        "model": {"name": name, "sha256": fingerprint(subject.model), "adapter": subject.trained.adapter, "base": base},
        "versions": {name: version(name) for name in VERSIONS},
        "machine": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "processor": processor(),
            "device": str(subject.model.device),
            "threads": torch.get_num_threads(),
        },
    } | asdict(found)
    for key, parts in (("tables", found.tables), ("charts", found.charts)):
        record[key] = [part._asdict() for part in cast(list[Any], parts)]
    made = Inspected(record, folder / f"{method}.json", folder / f"{method}.html")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(made.json, json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
        write_text(made.html, page(record))
    except OSError as error:
        raise StorageError(f"cannot write the inspection into {folder}: {error.strerror or error}") from error
    return made


class Opened:
    """A `Subject`: a run, an adapter on its base, or a model with the one it was made from.

    Args:
        name, base, device: see `inspect`.

    Raises:
        InputError: `name` or `base` cannot be opened, or there is no base, or two.
    """

    def __init__(self, name: str, base: str | None, device: str) -> None:
        says = any((Path(name) / file).is_file() for file in ("run.json", "adapter_config.json"))
        if says and base is not None:
            raise InputError(f"{name} says itself which model it was made from; leave out --base")
        if not says and base is None:
            raise InputError(f"{name} does not say which model it was made from; name that: --base MODEL")
        self.trained = open_trained(name, device)
        self.name, self.model, self.tokenizer = name, cast(Any, self.trained.model), self.trained.tokenizer
        self._base, self._device = base, device

    @cached_property
    def base(self) -> Any:
        """The model it was made from, in memory of its own: for one without an adapter."""
        if self._base is not None:
            opened: Trained = open_trained(self._base, self._device)
            if opened.adapter:
                adapters.merge(opened.model)
                adapters.remove(opened.model)
            return opened.model
        assert self.trained.folder is not None
        with quietly():
            return base_of_run(Path(self.name), self.trained.folder, self.model.device)[0].eval()

    @torch.no_grad()
    def changed(self) -> Iterator[Changed]:
        if self.trained.adapter:
            for path, layer in adapted(self.model).items():
                W0 = layer.matrix().to(wide(layer.matrix()))
                delta = sum(layer.methods[n].delta(layer.adapters[n], layer.matrix) for n in layer.active)
                if isinstance(delta, Tensor) and bool(delta.any()):
                    yield Changed(path, W0, W0 + delta)
            return
        head = self.model.get_output_embeddings()
        theirs = dict(self.base.named_modules())
        for path, module in self.model.named_modules():
            if type(module) not in KINDS or module is head:
                continue
            before: Any = getattr(theirs.get(path), "weight", None)
            after = cast(Tensor, module.weight)
            self._alike(f"{path}.weight", before, after)
            if not torch.equal(before, after):
                both = [t.to(wide(t)) for t in (before, after)]
                yield Changed(path, *(t if type(module) is nn.Linear else t.t() for t in both))

    @contextmanager
    def scaled(self, factor: float) -> Iterator[None]:
        within = adapters.scaled(self.model, factor) if self.trained.adapter else self._between(factor)
        with within:
            yield

    def prompts(self, paths: str | Sequence[str], what: str) -> list[Prompt]:
        listed = [paths] if isinstance(paths, str) else list(paths)
        asked = Asked(self.tokenizer)
        most = positions(self.model)
        found = []
        for file in find_files(listed, ("jsonl",), what):
            for number, line in read_lines(file.path, what):
                if line.strip():
                    with located(what, f"{file.path}:{number}"):
                        prompt = asked(f"{file.path}:{number}", line)
                        if most is not None and len(prompt.ids) >= most:
                            raise InputError(
                                f"the prompt makes {len(prompt.ids)} tokens, the model has room for {most - 1} before "
                                "its own"
                            )
                        found.append(prompt)
        if not found:
            raise InputError(f"{what}: there is no prompt in {', '.join(listed)}")
        return found

    def openings(self, prompt: Prompt, answers: Sequence[str]) -> set[int]:
        text = prompt.text
        parts = tokenized([Marked(text + a, (len(text), len(text) + len(a))) for a in answers], self.tokenizer)
        return {answer[0] for _, answer in parts}

    def _between(self, factor: float) -> AbstractContextManager[None]:
        theirs = dict(self.base.named_parameters())
        ours = dict(self.model.named_parameters())
        for name, p in ours.items():
            self._alike(name, theirs.get(name), p)
        return interpolated(ours, theirs, factor)

    def _alike(self, name: str, before: Any, after: Tensor) -> None:
        if before is None or before.shape != after.shape:
            there = "none of that name" if before is None else f"one of {list(before.shape)}"
            raise InputError(
                f"{self.name} has a weight {name} {list(after.shape)} and its base {there}; they are not of one "
                "architecture"
            )


@contextmanager
def interpolated(ours: Mapping[str, nn.Parameter], theirs: Mapping[str, Tensor], factor: float) -> Iterator[None]:
    """Inside, each parameter is b + λ (p − b), b its namesake in `theirs`: as much memory once more."""
    kept = {name: p.data for name, p in ours.items()}
    try:
        for name, p in ours.items() if factor != 1 else ():
            b, now = theirs[name].detach(), p.data
            mixed = b.to(wide(b)) + factor * (now.to(wide(b)) - b.to(wide(b)))
            p.data = b.to(now.dtype) if factor == 0 else mixed.to(now.dtype)
        yield
    finally:
        for name, p in ours.items():
            p.data = kept[name]


class Asked:
    """Lines of prompts as a model is asked them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.templated = bool(tokenizer.chat_template)
        self.specials = special_tokens(tokenizer)
        self.start = [] if self.templated else start_tokens(tokenizer)

    def __call__(self, where: str, line: str) -> Prompt:
        """
        Raises:
            InputError: no JSON object with a prompt, or the template refuses it; without saying where.
        """
        fields = read_fields(line, '{"prompt": …} or {"prompt": …, "completion": …}')
        hash_of(fields)  # refuses texts that are none
        prompt, completion = fields.get("prompt"), fields.get("completion")
        if completion is not None and not isinstance(completion, str):
            raise InputError(f"'completion' must be a text, got {kind_of(completion)}")
        if isinstance(prompt, list) and self.templated:
            messages = messages_field(fields, "prompt")
        elif isinstance(prompt, str) and prompt.strip():
            messages = [{"role": "user", "content": prompt}]
        else:
            kinds = "a text or, for a model with a chat template, messages"
            got = "nothing" if prompt is None or prompt == "" else kind_of(prompt)
            raise InputError(f"'prompt' must be {kinds}, got {got}")
        if spelled := self.specials.search(json.dumps(messages, ensure_ascii=False)):
            raise InputError(
                f"the prompt spells out {spelled[0]!r}, a special token, which only the template may write"
            )
        text = self.rendered(messages) if self.templated else str(prompt)
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return Prompt(where, text, [*self.start, *ids], completion)

    def rendered(self, messages: list[dict[str, Any]]) -> str:
        """
        Raises:
            InputError: the template refuses the messages.
        """
        try:
            return str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        except Exception as error:  # a template is a program of strangers and raises anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"the model's chat template refuses the prompt: {reason}") from None
