"""Measuring the choices: memory, and the time of a step beside that of the first choice.

Every choice is built in a process of its own. The first one's stays; each of the others takes turns with it, a few
steps each, so that whatever slows the machine slows both. A ratio is the median over rounds, a spread the interquartile
range by the median, and a time whose spread is above `VOID_ABOVE` says nothing.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Self

from ...recipe import Recipe

VOID_ABOVE = 0.20
ROUNDS = 9
"""Of a pair, after one that does not count; at least seven, as in `benchmarks/`."""
SECONDS = 0.4
"""That a choice's turn should take, if more than one step fits."""


class MeterError(Exception):
    """A choice could not be measured; the message says why."""


class Meter:
    """A process that holds one choice, ready to take steps; see `fallline.drivers.compare.meter`.

    Attributes:
        found: what it said when it was ready.

    Args:
        recipe: the choice. force: build it even if memory will not suffice.

    Raises:
        MeterError: it did not get ready.
    """

    def __init__(self, recipe: Recipe, force: bool = False) -> None:
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 closed by close; a pipe would fill up
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fallline.drivers.compare.meter"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            start_new_session=True,  # Ctrl-C is for the comparison, which ends this one
        )
        try:
            self.found = self._ask(json.dumps({"recipe": recipe.to_yaml(), "force": force}))
        except BaseException:
            self.close()
            raise

    def steps(self, number: int) -> tuple[float, dict[str, float]]:
        """Take steps: their seconds, and those of each phase."""
        found = self._ask(str(number))
        return found["seconds"], found["phases"]

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            code = self._process.wait()
            self._said.seek(0)
            last = (self._said.read().strip().splitlines() or [""])[-1]
            raise MeterError(died(code) if code < 0 else f"the process ended with code {code}: {last}")
        found: dict[str, Any] = json.loads(answer)
        if "error" in found:
            raise MeterError(found["error"])
        return found

    def ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.poll() is not None

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def died(code: int) -> str:
    """A negative exit code in words."""
    why = ", perhaps for lack of memory" if code == -9 else ""
    return f"the process was ended by signal {-code}{why}"


def measure(
    recipes: Mapping[str, Recipe],
    known: Mapping[str, Mapping[str, Any]],
    keep: Callable[[str, dict[str, Any]], None],
    stop: Callable[[], bool],
    force: bool = False,
) -> None:
    """Measure every choice that is not known yet, and hand over what was found as soon as it is.

    A choice that cannot be built and stepped twice is handed over as an error. One that only fails later, while it is
    timed, has no time. One that does not fit beside the first is timed alone.

    Args:
        recipes: by label; times are taken in turns with those of the first that can be measured.
        known: by label, what was found earlier.
        keep: takes label and ``{tokens, memory, record, threads}``, with ``time`` if there is one; or ``{error}``.
        stop: whether to leave off between two choices.
        force: measure what memory will not suffice for, too.
    """
    first: str | None = None
    held: Meter | None = None
    try:
        for label, recipe in recipes.items():
            if stop():
                return
            if label in known:
                first = first or label
                continue
            if first is not None and (held is None or held.ended()):
                held = opened(recipes[first], force)
            try:
                meter = Meter(recipe, force)
            except MeterError as error:
                if held is None:
                    keep(label, {"error": str(error)})
                    continue
                held.close()  # perhaps for want of room beside it
                held = None
                try:
                    meter = Meter(recipe, force)
                except MeterError as again:
                    keep(label, {"error": str(again)})
                    continue
            if first is None:
                first, held = label, meter
                keep(label, meter.found | timed(label, alone, meter))
                continue
            with meter:
                if held is None:
                    keep(label, meter.found | timed(None, alone, meter))
                else:
                    keep(label, meter.found | timed(first, beside, meter, held))
    finally:
        if held is not None:
            held.close()


def opened(recipe: Recipe, force: bool) -> Meter | None:
    try:
        return Meter(recipe, force)
    except MeterError:
        return None


def timed(to: str | None, take: Callable[..., dict[str, Any]], *meters: Meter) -> dict[str, Any]:
    """A time, ``to`` being the choice whose turns it was taken in, or nothing when one of the processes failed."""
    try:
        return {"time": take(*meters) | {"to": to, "interleaved": to is not None}}
    except MeterError:
        return {}


def turn(meter: Meter) -> int:
    """How many steps make up a turn."""
    seconds, _ = meter.steps(1)
    return max(1, min(20, math.ceil(SECONDS / max(seconds, 1e-4))))


def alone(meter: Meter) -> dict[str, Any]:
    """The time of a step of the baseline."""
    number = turn(meter)
    turns = [meter.steps(number) for _ in range(-1, ROUNDS)][1:]
    return summary(turns, turns, number)


def beside(meter: Meter, first: Meter) -> dict[str, Any]:
    """The time of a step, in turns with the baseline's."""
    number = turn(meter)
    rounds = []
    for i in range(-1, ROUNDS):
        pair = (meter, first) if i % 2 else (first, meter)
        found = {id(one): one.steps(number) for one in pair}
        rounds.append((found[id(meter)], found[id(first)]))
    mine, theirs = zip(*rounds[1:], strict=True)
    return summary(mine, theirs, number)


def summary(
    mine: Sequence[tuple[float, Mapping[str, float]]], theirs: Sequence[tuple[float, Mapping[str, float]]], number: int
) -> dict[str, Any]:
    """Medians and spreads of turns of `number` steps."""
    seconds = [s / number for s, _ in mine]
    ratios = [a / b for (a, _), (b, _) in zip(mine, theirs, strict=True)]
    phases = {name: statistics.median(p.get(name, 0.0) / number for _, p in mine) for name in mine[0][1]}
    return {
        "step": statistics.median(seconds),
        "spread": spread(seconds),
        "ratio": statistics.median(ratios),
        "ratio_spread": spread(ratios),
        "rounds": len(ratios),
        "steps_per_round": number,
        "void": (spread(ratios) if mine is not theirs else spread(seconds)) > VOID_ABOVE,
        "load": os.getloadavg()[0],
        "phases": phases,
    }


def spread(values: Sequence[float]) -> float:
    """Interquartile range by the median."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle
