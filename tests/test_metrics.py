"""The metrics file, the clock and peak memory."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import time
from mmap import PAGESIZE, mmap
from pathlib import Path
from typing import Any

import pytest
import torch

from fallline.errors import InputError, StorageError
from fallline.metrics import Clock, Metrics, peak_memory, product_rate, read, resident_memory, token_flops


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read(path)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    with Metrics(path) as metrics:
        for step in range(5):
            metrics.append({"step": step, "loss": 1 / (step + 1), "time": {"forward": 0.1}})
    return path


def test_records_come_back_exactly(tmp_path: Path) -> None:
    record: dict[str, Any] = {
        "step": 3,
        "loss": 0.1 + 0.2,
        "small": 5e-324,
        "minus": -0.0,
        "tokens": 2**60,
        "layers": {"a": [1.5, {"b": 2}]},
        "note": "ein Satz\nmit Umbruch \u2028 é",
        "none": None,
    }
    with Metrics(tmp_path / "m") as metrics:
        metrics.append(record)
        assert metrics.read() == [record]
    assert repr(read(tmp_path / "m")) == repr([record])
    assert (tmp_path / "m").read_bytes().count(b"\n") == 1


def test_numbers_that_are_not_finite_are_strict_json_and_shown(tmp_path: Path) -> None:
    with Metrics(tmp_path / "m") as metrics:
        metrics.append({"step": 0, "loss": math.nan, "norms": [math.inf, -math.inf, 1.0], "time": {"x": math.nan}})

    def strict(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    line = json.loads((tmp_path / "m").read_text(), parse_constant=strict)
    assert line == {"step": 0, "loss": "NaN", "norms": ["Infinity", "-Infinity", 1.0], "time": {"x": "NaN"}}
    (found,) = read(tmp_path / "m")
    assert math.isnan(found["loss"])
    assert math.isnan(found["time"]["x"])
    assert found["norms"] == [math.inf, -math.inf, 1.0]


def test_a_step_is_neither_repeated_nor_taken_back(path: Path) -> None:
    with Metrics(path) as metrics:
        assert metrics.step == 4
        for step in (4, 3, -1):
            with pytest.raises(ValueError, match="after step 4"):
                metrics.append({"step": step})
        metrics.append({"step": 9})
    assert steps(path) == [0, 1, 2, 3, 4, 9]


@pytest.mark.parametrize(("step", "left"), [(2, 3), (4, 5), (100, 5), (0, 1), (-1, 0)])
def test_truncate_drops_the_later_records(path: Path, step: int, left: int) -> None:
    before = path.read_bytes().splitlines(keepends=True)
    with Metrics(path) as metrics:
        metrics.truncate(step)
        assert metrics.step == left - 1
        assert path.read_bytes() == b"".join(before[:left])
        metrics.append({"step": left})
    assert steps(path) == [*range(left), left]


@pytest.mark.parametrize("cut", range(1, 40, 7))
def test_a_torn_last_line_is_passed_over_and_removed(path: Path, cut: int) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert steps(path) == [0, 1, 2, 3]
    with Metrics(path) as metrics:
        assert metrics.step == 3
        metrics.append({"step": 4, "loss": 1 / 5, "time": {"forward": 0.1}})
    assert path.read_bytes() == whole


@pytest.mark.parametrize("line", [b"{\n", b"\n", b"[1]\n", b'{"loss": 1}\n', b'{"step": "x"}\n', b"\xff\n"])
def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(path: Path, line: bytes) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(InputError, match=r"metrics\.jsonl:3: not a record"):
        read(path)
    with pytest.raises(InputError, match=r"metrics\.jsonl:3: not a record"):
        Metrics(path)


def test_a_repeated_step_in_the_file_is_an_error(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b'{"step": 4}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:6: step 4 comes after step 4"):
        read(path)


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        Metrics(tmp_path / "gone" / "metrics.jsonl")
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path / "metrics.jsonl")


def test_a_full_disk_names_the_step_and_spoils_nothing(path: Path) -> None:
    """The file may grow by ten bytes: the line is cut short, as on a disk that fills up."""
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Metrics(path) as metrics:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
        try:
            with pytest.raises(StorageError, match="step 5 was not recorded: ") as caught:
                metrics.append({"step": 5, "loss": 0.5})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(caught.value)
        assert steps(path) == [0, 1, 2, 3, 4]
    with Metrics(path):
        pass
    assert path.read_bytes() == before


def test_sync_of_a_file_is_harmless(path: Path) -> None:
    with Metrics(path) as metrics:
        metrics.append({"step": 5})
        metrics.sync()
    assert steps(path)[-1] == 5


def test_the_clock_books_each_moment_once() -> None:
    clock = Clock()
    begin = time.perf_counter()
    with clock("forward"):
        time.sleep(0.02)
        with clock("backward"):
            time.sleep(0.03)
            with clock("forward"):
                time.sleep(0.01)
    with clock("eval"):
        pass
    passed = time.perf_counter() - begin
    found = clock.read()
    assert set(found) == {"forward", "backward", "eval"}
    assert found["forward"] >= 0.03
    assert found["backward"] >= 0.03
    assert found["eval"] >= 0
    assert sum(found.values()) <= passed
    assert clock.read() == {}


def test_the_clock_is_read_inside_a_phase_and_left_by_an_exception() -> None:
    clock = Clock()
    with pytest.raises(KeyError), clock("save"), clock("data"):
        raise KeyError
    with clock("update"):
        time.sleep(0.01)
        first = clock.read()
        time.sleep(0.02)
    assert set(first) == {"save", "data", "update"}
    assert first["update"] >= 0.01
    assert clock.read()["update"] >= 0.02


@pytest.mark.skipif(not torch.cuda.is_available(), reason="books time by CUDA events")
def test_the_clock_on_cuda_times_the_device() -> None:
    clock = Clock("cuda")
    x = torch.randn(4096, 4096, device="cuda")
    begin = time.perf_counter()
    with clock("forward"):
        for _ in range(50):
            x = x @ x
            x /= x.norm()
        queued = time.perf_counter() - begin
        with clock("backward"):
            pass
    found = clock.read()
    passed = time.perf_counter() - begin
    assert found["forward"] > queued, "the device was still at it when everything was queued"
    assert sum(found.values()) <= passed
    assert peak_memory("cuda") >= 3 * 4096 * 4096 * 4


def test_the_operations_of_a_token_are_those_that_are_counted() -> None:
    """Against torch's counter on a real forward and backward; it counts attention's products whole, as PaLM does."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, vocab_size=300
    )
    model = LlamaForCausalLM._from_config(shape, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        model(torch.ones(2, 32, dtype=torch.int64)).logits.sum().backward()
    assert token_flops(model, 32) == pytest.approx(counter.get_total_flops() / 64, rel=0.02)
    whole = token_flops(model, 32)
    model.model.layers.requires_grad_(False)
    assert 0.6 * whole < token_flops(model, 32) < whole, "weights that are frozen need no gradient"


def test_the_rate_of_products_is_tried_once() -> None:
    rate = product_rate(torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e14
    assert product_rate(torch.device("cpu"), torch.float32) == rate


def test_resident_memory_goes_up_and_down() -> None:
    before = resident_memory()
    with mmap(-1, 2**26) as pages:  # from the system itself: the heap may have as much to hand out that is resident
        for start in range(0, len(pages), PAGESIZE):
            pages[start] = 1
        assert resident_memory() >= before + 2**25
    assert resident_memory() < before + 2**25
    assert resident_memory() <= peak_memory()


def test_peak_memory_sees_what_was_touched() -> None:
    before = peak_memory()
    assert 2**22 < before < 2**40
    block = torch.ones(before // 4 + 2**24)  # as large as all there was, and 64 MB
    assert peak_memory() >= before + 2**26
    if sys.platform == "linux":
        code = "from fallline.metrics import peak_memory; print(peak_memory())"
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert int(child.stdout) < before + 2**25, "a child's peak is its own, not that of its parent"
    del block
    assert peak_memory() >= before + 2**26, "a peak does not go down"
