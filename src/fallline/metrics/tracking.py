"""The trackers of 🤗 Accelerate (tensorboard, wandb, mlflow, …) behind one recipe key."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, nearest
from ..ranks import rank

log = logging.getLogger("fallline")


class Trackers:
    """Trackers that have been started, by name. The metrics file remains the run's record: a tracker that fails later
    is reported once and left out from then on."""

    def __init__(self, started: Mapping[str, Any]) -> None:
        self._started = dict(started)

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Send one record of the metrics file; nested keys are joined, `time/forward`."""
        values = {k: v for k, v in _flat(record, "/") if k != "step" and isinstance(v, int | float)}
        self._each("log", values, step=record["step"])

    def finish(self) -> None:
        """Let every tracker write what it holds back."""
        self._each("finish")

    def _each(self, method: str, *args: Any, **kwargs: Any) -> None:
        for name, tracker in list(self._started.items()):
            try:
                getattr(tracker, method)(*args, **kwargs)
            except Exception as error:  # whatever its package raises must not end the run
                del self._started[name]
                log.warning("tracker %r failed and is left out from now on: %s", name, error)


def trackers(names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> Trackers:
    """Start trackers; without names, or on another rank than 0, there are none.

    Args:
        names: what Accelerate calls them, its own and those registered with it.
        folder: of the run; those that write files do it in ``folder/trackers``.
        config: the recipe, shown by the tracker as the run's hyper-parameters.

    Raises:
        InputError: the tracker's package is missing, the name is unknown, or the tracker does not start.
    """
    if not names or rank() != 0:
        return Trackers({})
    classes = check_trackers(names)
    settings = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in _flat(config, ".")}
    started: dict[str, Any] = {}
    for name, make in classes.items():
        where = (str(folder / "trackers"),) if make.requires_logging_directory else ()
        try:
            started[name] = make("fallline", *where)
            started[name].start()
            started[name].store_init_configuration(settings)
        except Exception as error:
            raise InputError(f"tracker {name!r} did not start: {' '.join(str(error).split())}") from error
    return Trackers(started)


def check_trackers(names: Sequence[str]) -> dict[str, Any]:
    """Name → Accelerate's class of each tracker; nothing is started.

    Raises:
        InputError: the tracker's package is missing, or the name is unknown.
    """
    if not names:
        return {}
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    PartialState()  # its trackers ask this whether to log
    installed = {str(t) for t in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise InputError(f"unknown tracker {name!r}; {nearest(name, LOGGER_TYPE_TO_CLASS)}")
        if name in LoggerType.list() and name not in installed:
            raise InputError(f"tracker {name!r} needs its package: pip install {name}")
    return {name: LOGGER_TYPE_TO_CLASS[name] for name in names}


def _flat(table: Mapping[str, Any], join: str, head: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, join, f"{head}{key}{join}")
        else:
            yield f"{head}{key}", value
