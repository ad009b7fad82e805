"""The recipe: one YAML file that says what a run is, checked to the last key before anything is loaded.

    model: {name: llama, preset: tiny}
    data: {name: python-docs, length: 256}
    optimizer: {name: scale, lr: 1e-3}
    steps: 300

A key that names a kind of method (`model`, `data`, `optimizer`, …) holds the method's `name` and its options; a bare
name is enough when the defaults will do. `probes` is a list of such. All other keys are `Settings`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, TypeVar

from .catalog import entries, find
from .errors import InputError, nearest
from .options import Options, option
from .written import Node, dump, flat, plain, read, relocate

T = TypeVar("T", bound=Options)


@dataclass(frozen=True)
class CheckpointOptions(Options):
    """When to save, and what to keep."""

    every: int = option(0, "steps between checkpoints; 0 saves at the end and on interruption only", ge=0)
    keep: int = option(2, "how many of the newest to keep", ge=1, used_if=("every > 0", lambda c: c.every > 0))
    best: bool = option(
        True, "also keep the one with the lowest validation loss", used_if=("every > 0", lambda c: c.every > 0)
    )


Measure = Literal["nll", "exact", "rejected", "pass@1", "pass@8", "pass@64"]


@dataclass(frozen=True)
class EvalOptions(Options):
    """When to measure the validation loss, on how much, and what else to measure."""

    every: int = option(50, "steps between evaluations; the start and the end are always evaluated", gt=0)
    rows: int | None = option(64, "rows of validation data; null takes all", gt=0)
    measures: tuple[Measure, ...] = option(
        (),
        "beside the loss: nll, nats a token whatever the objective; exact, the part of the examples that greedy "
        "decoding answers to the letter; pass@N, the chance that one of N sampled answers is the example's to the "
        "letter; rejected, nll of the second answers of pairs",
    )

    def check(self) -> None:
        if len(set(self.measures)) < len(self.measures):
            raise InputError(f"'measures' names one twice: {', '.join(self.measures)}")

    def to_mapping(self) -> dict[str, Any]:
        found = super().to_mapping()
        return found if self.measures else {k: v for k, v in found.items() if k != "measures"}


@dataclass(frozen=True)
class Settings(Options):
    """What is not a method."""

    steps: int = option(help="optimizer steps", gt=0)
    batch: int = option(8, "rows in a step, over all ranks", gt=0)
    micro: int | None = option(None, "rows in a forward pass; null: all of a rank's at once", gt=0)
    seed: int = option(0, "of everything random", ge=0)
    clip: float | None = option(None, "largest global gradient norm; null does not clip", gt=0)
    precision: Literal["auto", "float32", "bfloat16", "bfloat16-stochastic"] = option(
        "auto",
        "bfloat16 keeps float32 masters, bfloat16-stochastic rounds stochastically; auto: float32, bfloat16 on a GPU",
    )
    device: str = option("auto", "cpu, cuda, cuda:1, …; auto takes a GPU when there is one")
    threads: int | None = option(None, "CPU threads; null leaves torch's choice", gt=0)
    sample: int = option(64, "tokens of text to generate when done; 0 for none", ge=0)
    tracker: str | None = option(None, "also log to a tracker that 🤗 Accelerate knows: tensorboard, wandb, …")
    out: str | None = option(None, "run folder; null: the next free runs/RECIPE-OPTIMIZER-NUMBER")

    def check(self) -> None:
        if self.micro is not None and self.micro > self.batch:
            raise InputError(f"'micro' must be at most batch ({self.batch}), got {self.micro}")


#: Kinds of method that a recipe picks one of, and which one when it does not say.
WORDS: dict[str, str | None] = {
    "model": None,
    "adapter": "none",
    "data": None,
    "sampler": "uniform",
    "objective": "causal",
    "estimator": "backprop",
    "optimizer": "adamw",
    "schedule": "linear",
}
SECTIONS: dict[str, type[Options]] = {"checkpoint": CheckpointOptions, "eval": EvalOptions}

#: Keys that may differ when a run is resumed: they change what is kept or shown, not what is computed.
FREE = ("out", "checkpoint", "tracker", "sample", "threads", "device")


@dataclass(frozen=True)
class Choice:
    """A method and its options."""

    kind: str
    id: str
    options: Any

    @property
    def module(self) -> ModuleType:
        """The method's module, which has `build`."""
        return find(self.kind, self.id).load()

    def to_mapping(self) -> dict[str, Any]:
        return {"name": self.id} | self.options.to_mapping()


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. Make one with `load` or `parse`."""

    model: Choice
    adapter: Choice
    data: Choice
    sampler: Choice
    objective: Choice
    estimator: Choice
    optimizer: Choice
    schedule: Choice
    settings: Settings
    checkpoint: CheckpointOptions
    eval: EvalOptions
    probes: tuple[Choice, ...] = ()
    also: Mapping[str, Choice] = field(default_factory=dict)
    name: str = field(default="run", compare=False)

    KEYS: ClassVar[tuple[str, ...]] = (*WORDS, "probes", *SECTIONS, *(Settings.__dataclass_fields__))

    @classmethod
    def load(cls, path: str | Path, *overrides: str) -> Recipe:
        """Read a recipe file and apply ``key=value`` overrides.

        Args:
            path: a YAML file, or the folder of a run, which is then also where the run goes.
            overrides: such as ``optimizer=scale`` (another method, with its own defaults) or ``optimizer.lr=2e-3``.

        Raises:
            InputError: unreadable file, not a mapping, duplicate, unknown or idle key, wrong type or value.
        """
        path = Path(path)
        if (path / "recipe.yaml").is_file():
            path = path.parent / path.readlink() if path.is_symlink() else path  # runs/latest
            overrides = (f"out={json.dumps(str(path))}", *overrides)
            path = path / "recipe.yaml"
        if path.is_dir():
            raise InputError(f"{path} is a folder without a recipe.yaml: give a recipe file or the folder of a run")
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            near = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
            raise InputError(f"no recipe file {path}" + (f"; {nearest(str(path), near)}" if near else "")) from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the recipe {path}: {error}") from None
        name = path.parent.name if path.name == "recipe.yaml" else path.stem
        return cls.parse(text, *overrides, origin=str(path), name=name)

    @classmethod
    def parse(cls, text: str, *overrides: str, origin: str = "recipe", name: str = "run") -> Recipe:
        """A recipe from YAML text; see `load`."""
        root = read(text, origin)
        if not isinstance(root.value, dict):
            got = "nothing" if root.value is None else "a list" if isinstance(root.value, list) else repr(root.value)
            raise InputError(f"{origin}: a recipe is a mapping of keys to values, this is {got}")
        tree: dict[str, Node] = dict(root.value)
        for override in overrides:
            _override(tree, override)
        for key, node in tree.items():
            if key not in cls.KEYS:
                raise InputError(f"unknown key {key!r}; {nearest(key, cls.KEYS)}{node.where}")

        words = {}
        for kind, default in WORDS.items():
            if kind not in tree and default is None:
                raise InputError(f"{origin}: the recipe needs {kind!r}, such as {_EXAMPLES[kind]}")
            words[kind] = _choice(kind, tree.get(kind, Node(default)))
        tree["eval"], also = _also(tree.get("eval", Node({})))
        sections = {key: _section(key, kind, tree.get(key, Node({}))) for key, kind in SECTIONS.items()}
        listed = tree.get("probes", Node([]))
        if not isinstance(listed.value, list):
            raise InputError(f"'probes' must be a list of names, got {plain(listed)!r}{listed.where}")
        probes = tuple(_choice("probe", node) for node in listed.value)
        twice = {p.id for p in probes if [q.id for q in probes].count(p.id) > 1}
        if twice:
            raise InputError(f"'probes' names {', '.join(sorted(twice))} twice{listed.where}")
        given = {k: v for k, v in tree.items() if k in Settings.__dataclass_fields__}
        settings = Settings.from_mapping(
            {k: plain(v) for k, v in given.items()},
            "the recipe",
            lambda k: given[k].where if k in given else f" ({origin})",
        )
        try:
            words["schedule"].options.check_run(settings.steps)
        except InputError as error:
            raise InputError(f"schedule {words['schedule'].id!r}: {error}{tree.get('schedule', root).where}") from None
        recipe = cls(**words, settings=settings, probes=probes, also=also, name=name, **sections)  # type: ignore[arg-type]
        data = tree.get("data", Node({})).value
        if isinstance(data, dict) and "vocab" in data and recipe.model.module.Config.brings_tokenizer:
            raise InputError(f"data: 'vocab' has no effect, the model has a tokenizer; remove it{data['vocab'].where}")
        if getattr(recipe.model.options, "quantise", None) and recipe.adapter.id == "none":
            where = _as_mapping("model", tree["model"])["quantise"].where
            raise InputError(
                f"model: 'quantise' holds weights that cannot be trained; add an adapter, such as adapter: lora{where}"
            )
        return recipe

    def to_mapping(self) -> dict[str, Any]:
        """The resolved recipe, every option written out; `parse` reads its YAML back to an equal recipe."""
        out: dict[str, Any] = {kind: getattr(self, kind).to_mapping() for kind in WORDS}
        if self.model.module.Config.brings_tokenizer:
            out["data"].pop("vocab", None)  # of the tokenizer that would be learned
        out |= {"probes": [p.to_mapping() for p in self.probes]} if self.probes else {}
        out |= self.settings.to_mapping() | {key: getattr(self, key).to_mapping() for key in SECTIONS}
        if self.also:
            out["eval"]["also"] = {name: data.to_mapping() for name, data in self.also.items()}
        return out

    def to_yaml(self) -> str:
        return dump(self.to_mapping())

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What in `other`, the stored mapping of an earlier recipe, would make this run another run, one line each."""
        mine = flat(self.to_mapping())
        theirs = {f"{kind}.name": default for kind, default in WORDS.items() if default and kind not in other}
        theirs |= {k: v for k, v in flat(other).items() if k != "data.vocab" or k in mine}  # earlier versions wrote it
        keys = [k for k in mine | theirs if k.split(".")[0] not in FREE and mine.get(k) != theirs.get(k)]
        return [f"{k} was {theirs.get(k, 'unset')!r}, is {mine.get(k, 'unset')!r}" for k in keys]


_EXAMPLES = {"model": "{name: llama, preset: tiny}", "data": "{name: python-docs}"}


def _override(tree: dict[str, Node], text: str) -> None:
    """Apply one ``key=value``, ``key.option=value`` or, where an option is a mapping, ``key.option.key=value``."""
    path, equals, value = text.partition("=")
    where = f" (in {text!r})"
    keys = path.split(".")
    if not equals or not all(keys):
        raise InputError(f"an override is key=value or key.option=value, got {text!r}")
    given = read(value, text).value
    head = keys[0]
    if head not in Recipe.KEYS:
        raise InputError(f"unknown key {head!r}; {nearest(head, Recipe.KEYS)}{where}")
    old = tree.get(head)
    if len(keys) > 1:
        if head not in WORDS and head not in SECTIONS:
            raise InputError(f"{head!r} has no options{where}")
        inner = dict(_as_mapping(head, old)) if old is not None else {}
        tree[head] = Node(inner, old.where if old is not None else where)
        for depth, key in enumerate(keys[1:-1], 2):
            found = inner.get(key, Node(None))
            if found.value is not None and not isinstance(found.value, dict):
                raise InputError(f"{'.'.join(keys[:depth])!r} is no mapping, it is {plain(found)!r}{where}")
            inner[key] = Node(dict(found.value or {}), found.where or where)
            inner = inner[key].value
        inner[keys[-1]] = Node(relocate(given, where), where)
    elif head in WORDS and old is not None and _as_mapping(head, old).get("name", Node(None)).value == given:
        pass  # the method the recipe already has: its options stay
    else:
        tree[head] = Node(relocate(given, where), where)


def _as_mapping(kind: str, node: Node) -> dict[str, Node]:
    """A method section as a mapping: a bare name is `{name: …}`; a model may be a hub id or a folder."""
    value = node.value
    if isinstance(value, str):
        if kind == "model" and ("model", value) not in entries() and ("/" in value or Path(value).is_dir()):
            return {"name": Node("pretrained"), "path": Node(value, node.where)}
        return {"name": Node(value)}
    if not isinstance(value, dict):
        raise InputError(f"{kind!r} must be a method's name or a mapping with its name, got {value!r}{node.where}")
    return value


def _choice(kind: str, node: Node) -> Choice:
    section = _as_mapping(kind, node)
    default = WORDS.get(kind)
    if "name" not in section and default is None:
        ids = sorted(i for k, i in entries() if k == kind)
        raise InputError(f"{kind!r} needs a 'name': {', '.join(ids)}{node.where}")
    named = section.get("name", Node(default))
    if not isinstance(named.value, str):
        raise InputError(f"'{kind}.name' must be text, got {named.value!r}{named.where or node.where}")
    try:
        entry = find(kind, named.value)
    except InputError as error:
        raise InputError(f"{error}{named.where or node.where}") from None
    given = {k: v for k, v in section.items() if k != "name"}
    options = _options(entry.load().Config, given, f"{kind} {entry.card.id!r}", named.where or node.where)
    return Choice(kind, entry.card.id, options)


def _section(key: str, kind: type[Options], node: Node) -> Options:
    if not isinstance(node.value, dict):
        raise InputError(f"{key!r} must be a mapping of {', '.join(kind.__dataclass_fields__)}{node.where}")
    return _options(kind, node.value, key, node.where)


def _also(node: Node) -> tuple[Node, dict[str, Choice]]:
    """The section `eval` without its `also`, and that: name → data to take measures of as well."""
    if not isinstance(node.value, dict) or "also" not in node.value:
        return node, {}
    rest = dict(node.value)
    also = rest.pop("also")
    if not isinstance(also.value, dict):
        raise InputError(
            f"'eval.also' must be a mapping of names to data, such as {{docs: {{name: python-docs}}}}, got "
            f"{plain(also)!r}{also.where}"
        )
    return Node(rest, node.where), {name: _choice("data", data) for name, data in also.value.items()}


def _options(kind: type[T], given: Mapping[str, Node], what: str, where: str) -> T:
    """Options from nodes; an error names the key's own line where it has one."""
    values = {k: plain(v) for k, v in given.items()}
    return kind.from_mapping(values, what, lambda k: given[k].where if k in given else where)
