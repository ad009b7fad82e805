"""What a user sees of a run, and what trackers are told."""

from __future__ import annotations

import io
import json
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from fallline.errors import InputError
from fallline.metrics import Progress, sparkline, trackers


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """What is left to see."""
        return [re.split(r"\r\x1b\[K", line)[-1] for line in self.getvalue().split("\n")]


def record(step: int, loss: float = 2.5) -> dict[str, Any]:
    return {"step": step, "loss": loss, "lr": 1e-3, "time": {"tokens_per_second": 12345.6, "forward": 0.1}}


def test_a_line_says_all_of_it() -> None:
    out = io.StringIO()
    show = Progress(10, out)
    show(record(5))
    assert re.fullmatch(r"step 5/10  loss 2\.5000  lr 1\.00e-03  12,346 tokens/s  0:0\d left\n", out.getvalue()), (
        out.getvalue()
    )


def test_elsewhere_than_on_a_terminal_lines_are_few_and_none_is_rewritten() -> None:
    out = io.StringIO()
    show = Progress(1000, out)
    for step in range(1, 1000):
        show(record(step) | ({"val_loss": 3.25} if step == 500 else {}))
    show(record(1000))
    show.close()
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/1000", "500/1000", "1000/1000"]
    assert "validation loss 3.2500" in lines[1]
    assert "\r" not in out.getvalue()


def test_on_a_terminal_one_line_is_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "41")
    out = Terminal()
    show = Progress(1000, out)
    show._pause = 0.0
    for step in range(1, 5):
        show(record(step))
    assert out.screen() == ["step 4/1000  loss 2.5000  lr 1.00e-03  1"], "cut to the terminal"
    show.say("saved")
    show(record(5))
    show.close()
    assert [line[:11] for line in out.screen()] == ["saved", "step 5/1000", ""]


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_never_passed_over(stream: type[io.StringIO], loss: float) -> None:
    out = stream()
    show = Progress(1000, out)
    for step in range(1, 9):
        show(record(step, loss if step == 4 else 2.0))
    show.close()
    (line,) = [line for line in re.split(r"[\r\n]", out.getvalue()) if "step 4/" in line]
    assert f"loss {loss}" in line
    assert "step 4/" in "\n".join(out.screen() if isinstance(out, Terminal) else [line]), "and it stays"


def test_nothing_is_shown_without_a_stream() -> None:
    show = Progress(3, None)
    show(record(3))
    show.say("x")
    show.close()


def test_time_left_is_judged_from_where_the_process_began() -> None:
    out = io.StringIO()
    show = Progress(1000, out, start=900)
    show._begun -= 50.0  # fifty seconds for fifty steps
    show(record(950))
    assert "0:50 left" in out.getvalue()


def test_sparkline() -> None:
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8]) == "▁▂▃▄▅▆▇█"
    assert sparkline([8, 1]) == "█▁"
    assert sparkline([3, 3]) == "▁▁"
    assert sparkline([]) == ""
    assert sparkline([1.0, math.nan, 2.0, math.inf, -math.inf]) == "▁×█××"
    assert sparkline([math.nan]) == "×"
    assert sparkline(v for v in (-1e308, 1e308)) == "▁█", "the range is beyond floats"


class Written(GeneralTracker):
    """A tracker as a user registers one with Accelerate: it writes lines of JSON."""

    name: ClassVar[str] = "written"
    requires_logging_directory: ClassVar[bool] = True

    def __init__(self, run_name: str, logging_dir: str) -> None:
        super().__init__()
        self.path = Path(logging_dir) / f"{run_name}.jsonl"

    @property
    def tracker(self) -> Path:
        return self.path

    def start(self) -> None:
        self.path.parent.mkdir(exist_ok=True)
        self.path.touch()

    def _line(self, value: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(value) + "\n")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._line(values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self._line([step, values])

    def finish(self) -> None:
        self._line("finished")


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Path]:
    LOGGER_TYPE_TO_CLASS["written"] = Written
    yield tmp_path / "trackers" / "fallline.jsonl"
    del LOGGER_TYPE_TO_CLASS["written"]


def test_a_tracker_is_told_the_recipe_and_every_number(written: Path, tmp_path: Path) -> None:
    follow = trackers(["written", "written"], tmp_path, {"optimizer": {"lr": 1e-3, "betas": [0.9, 0.95]}, "clip": None})
    follow(record(1) | {"note": "text", "norms": {"a": 1.0}})
    follow(record(2, math.nan))
    follow.finish()
    config, first, second, end = map(json.loads, written.read_text().splitlines())
    assert config == {"optimizer.lr": 1e-3, "optimizer.betas": "[0.9, 0.95]", "clip": "None"}
    values = {"loss": 2.5, "lr": 1e-3, "time/tokens_per_second": 12345.6, "time/forward": 0.1, "norms/a": 1.0}
    assert first == [1, values]
    assert second[0] == 2
    assert math.isnan(second[1]["loss"])
    assert end == "finished"


def test_a_tracker_that_fails_later_is_left_out_and_named(
    written: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    follow = trackers(["written"], tmp_path, {})
    written.unlink()
    written.parent.rmdir()
    with caplog.at_level(logging.WARNING, "fallline"):
        follow(record(1))
        follow(record(2))
        follow.finish()
    assert len(caplog.records) == 1
    assert "tracker 'written' failed" in caplog.text


def test_a_tracker_that_does_not_start_is_an_error(written: Path, tmp_path: Path) -> None:
    (tmp_path / "trackers").write_text("in the way")
    with pytest.raises(InputError, match=r"tracker 'written' did not start: .*File exists"):
        trackers(["written"], tmp_path, {})


def test_names_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown tracker 'tensorbord'; did you mean 'tensorboard'"):
        trackers(["tensorbord"], tmp_path, {})
    missing = next(name for name in ("clearml", "aim", "dvclive") if name not in map(str, get_available_trackers()))
    with pytest.raises(InputError, match=f"tracker '{missing}' needs its package: pip install {missing}"):
        trackers([missing], tmp_path, {})


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    follow = trackers(["tensorboard"], tmp_path, {"optimizer": {"lr": 1e-3}, "clip": None})
    for step in (1, 2):
        follow(record(step, 1 / step))
    follow.finish()
    events = EventAccumulator(str(tmp_path / "trackers" / "fallline"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 0.5)]
    assert [e.step for e in events.Scalars("time/forward")] == [1, 2]


def test_curves_are_drawn_alike_between_given_bounds() -> None:
    assert sparkline([2.0, 1.0], 0.0, 2.0) == "█▅"
    assert sparkline([2.0, 0.0], 1.0, 1.5) == "█▁", "beyond the bounds is at the bound"
