"""The folder of a comparison: what was asked, and what has been found so far.

study.json                 the question: choices with their resolved recipes, seeds, tuning, what is held equal
measured/LABEL.json        memory and interleaved step time of a choice
runs/LABEL/NAME/           an ordinary run folder; a trial's is emptied of its checkpoints when it is through
runs/LABEL/NAME.json       its outcome; NAME.log what it printed
report.html, .json, .csv   the answer
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ...errors import InputError
from ...recipe import Recipe
from ..folder import write_text
from .choices import Choice
from .tuning import Tune

FORMAT = 1
Equal = Literal["tokens", "time", "memory"]


@dataclass(frozen=True)
class Study:
    """The question.

    Attributes:
        name: of the recipe. command: that asked it.
        choices: the first is the baseline.
        seeds: of the runs that count. trial_seed: of the trials, not among them.
        tune: what is tuned, or None.
        equal: what is held equal.
        threads: CPU threads of a run whose recipe does not say; None leaves torch's choice.
        notes: sentences for the report.
    """

    name: str
    command: str
    choices: tuple[Choice, ...]
    seeds: tuple[int, ...]
    trial_seed: int = 0
    tune: Tune | None = None
    equal: Equal = "tokens"
    threads: int | None = None
    notes: tuple[str, ...] = ()

    def to_mapping(self) -> dict[str, Any]:
        """JSON-able; `from_mapping` reads it back."""
        choices = [
            {
                "label": c.label,
                "changes": dict(c.changes),
                "recipe": None if c.recipe is None else c.recipe.to_mapping(),
                "error": c.error,
            }
            for c in self.choices
        ]
        plain = {k: getattr(self, k) for k in ("name", "command", "trial_seed", "equal", "threads")}
        tune = None if self.tune is None else asdict(self.tune)
        lists = {"seeds": [*self.seeds], "notes": [*self.notes], "choices": choices}
        return {"format": FORMAT, "tune": tune} | plain | lists

    @classmethod
    def from_mapping(cls, stored: Mapping[str, Any]) -> Study:
        """What `to_mapping` gave.

        Raises:
            InputError: a method of it is not there any more, or has other options.
        """
        if stored.get("format") != FORMAT:
            raise InputError(f"this comparison has the format {stored.get('format')!r}, this version reads {FORMAT}")
        choices = []
        for c in stored["choices"]:
            recipe = (
                None
                if c["recipe"] is None
                else Recipe.parse(json.dumps(c["recipe"], ensure_ascii=False), name=stored["name"])
            )
            choices.append(Choice(c["label"], c["changes"], recipe, c["error"]))
        return cls(
            name=stored["name"],
            command=stored["command"],
            choices=tuple(choices),
            seeds=tuple(stored["seeds"]),
            trial_seed=stored["trial_seed"],
            tune=None if stored["tune"] is None else Tune(**stored["tune"]),
            equal=stored["equal"],
            threads=stored["threads"],
            notes=tuple(stored["notes"]),
        )


def read_study(folder: Path) -> Study:
    """The question a folder holds.

    Raises:
        InputError: it holds none, or a damaged one.
    """
    path = folder / "study.json"
    try:
        return Study.from_mapping(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise InputError(f"no comparison in {folder}: {path.name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged ({error!r})") from None


def write_study(folder: Path, study: Study) -> None:
    """Write the question, all of it or nothing."""
    write_text(folder / "study.json", json.dumps(study.to_mapping(), indent=1) + "\n")


def grown(old: Study, new: Study) -> Study:
    """The question to go on with: choices and seeds may be added to it, nothing else may change.

    Raises:
        InputError: it is another question.
    """
    labels = [c.label for c in new.choices]
    if old.choices[0].label != labels[0]:
        raise InputError(f"the comparison to resume has the baseline {old.choices[0].label!r}, this one {labels[0]!r}")
    if old.equal == "memory" and len(labels) > len(old.choices):
        raise InputError("choices cannot be added to a comparison in equal memory: they would change what is equal")
    for c in old.choices:
        if c.label not in labels:
            raise InputError(f"the comparison to resume has the choice {c.label!r}, this one has not")
        other = new.choices[labels.index(c.label)]
        if c.recipe is not None and other.recipe is not None:
            changed = other.recipe.differences(c.recipe.to_mapping())
            if changed:
                raise InputError(f"cannot resume with another recipe for {c.label!r}: {'; '.join(changed)}")
    for key in ("trial_seed", "tune", "equal", "threads"):
        if getattr(old, key) != getattr(new, key):
            raise InputError(f"cannot resume: {key} was {getattr(old, key)!r}, is {getattr(new, key)!r}")
    if old.seeds != new.seeds[: len(old.seeds)]:
        raise InputError(f"cannot resume with other seeds: they were {[*old.seeds]}, are {[*new.seeds]}")
    known = {c.label: c for c in old.choices if c.recipe is not None}
    notes = [*old.notes]
    if len(new.seeds) > len(old.seeds) and new.seeds[: len(old.seeds)] == old.seeds:
        notes.append(
            f"Seeds were added after a first look, from {len(old.seeds)} to {len(new.seeds)}; if that was because of "
            "what was seen, the intervals are too narrow."
        )
    choices = tuple(known.get(c.label, c) for c in new.choices)
    return replace(new, choices=choices, notes=tuple(dict.fromkeys([*notes, *new.notes])))


@dataclass(frozen=True)
class RunPlace:
    """Where one run of a choice lives.

    Attributes:
        kind: a trial of tuning, or a run that counts.
        seed: of the run. value: of what is tuned, or None.
    """

    root: Path
    choice: Choice
    kind: Literal["trial", "final"]
    seed: int
    value: float | None

    @property
    def out(self) -> Path:
        """The run folder."""
        name = f"trial-{self.value:g}-seed-{self.seed}" if self.kind == "trial" else f"seed-{self.seed}"
        return self.root / "runs" / self.choice.folder / name

    @property
    def outcome(self) -> Path:
        return self.out.with_name(self.out.name + ".json")

    @property
    def log(self) -> Path:
        return self.out.with_name(self.out.name + ".log")

    def read(self) -> dict[str, Any] | None:
        """What came of it, None when it has not ended."""
        try:
            found: dict[str, Any] = json.loads(self.outcome.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found


def trials_of(root: Path, choice: Choice, tune: Tune, seed: int) -> dict[float, RunPlace]:
    """The trials that there are, by value."""
    found = {}
    for path in sorted((root / "runs" / choice.folder).glob(f"trial-*-seed-{seed}.json")):
        value = float(path.name.removeprefix("trial-").removesuffix(f"-seed-{seed}.json"))
        found[value] = RunPlace(root, choice, "trial", seed, value)
    return found


def finals_of(root: Path, choice: Choice, seeds: Sequence[int]) -> list[RunPlace]:
    """The runs that count, whether they have begun or not."""
    return [RunPlace(root, choice, "final", seed, None) for seed in seeds]
