"""Records as the driver makes them: small, and like real ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MIB = 2**20
STEPS = 500
TOKENS = 1024
EVALUATIONS = 25
XSS = "</script><img src=x onerror=document.title='owned'>"


def curve(final: float, start: float = 7.6, speed: float = 5.0, until: int = STEPS) -> dict[str, Any]:
    """A curve that ends at `final`; stopped early it ends in a loss that is not finite."""
    steps = [round(i * STEPS / EVALUATIONS) for i in range(EVALUATIONS + 1)]
    steps = [s for s in steps if s <= until]
    end = math.exp(-speed)
    loss: list[float | None] = [
        round(final + (start - final) * (math.exp(-speed * s / STEPS) - end) / (1 - end), 6) for s in steps
    ]
    if until < STEPS:
        loss[-1] = None
    return {"step": steps, "tokens": [s * TOKENS for s in steps], "val_loss": loss}


def run(
    loss: float | None, seed: int = 1, kind: str = "final", value: float | None = None, **more: Any
) -> dict[str, Any]:
    made = {
        "kind": kind,
        "seed": seed,
        "value": value,
        "status": "done" if loss is not None else "lost",
        "error": None,
        "folder": f"runs/{kind}-{seed}" if value is None else f"runs/{kind}-{seed}-{value:g}",
        "loss": loss,
        "seconds": 38.4,
        "curve": curve(loss) if loss is not None else curve(5.0, until=120),
    }
    return {**made, **more}


def choice(
    label: str, losses: list[float | None], *, state: float = 10.2, step: float = 0.0712, **more: Any
) -> dict[str, Any]:
    made: dict[str, Any] = {
        "label": label,
        "changes": {"optimizer": label},
        "recipe": {**RECIPE, "optimizer": {"name": label, "lr": 1e-3}},
        "status": "done",
        "error": None,
        "comparable": "python-docs/2048/64",
        "steps": STEPS,
        "parameters": 1_331_328,
        "tuned": None,
        "time": time(step),
        "memory": memory(state),
        "runs": [run(loss, seed) for seed, loss in enumerate(losses, 1)],
    }
    return {**made, **more}


def time(step: float, **more: Any) -> dict[str, Any]:
    made = {
        "step": step,
        "spread": 0.03,
        "ratio": step / 0.0712,
        "ratio_spread": 0.04,
        "rounds": 9,
        "void": False,
        "interleaved": True,
        "load": 0.1,
        "tokens": TOKENS,
        "phases": {
            "data": 0.0006,
            "forward": 0.0221,
            "backward": 0.0402,
            "update": max(0.0, step - 0.0645),
        },
    }
    return {**made, **more}


def memory(state: float, **more: Any) -> dict[str, Any]:
    made = {
        "kind": "resident",
        "peak": int((41.3 + state) * MIB),
        "weights": int(5.1 * MIB),
        "gradients": int(5.1 * MIB),
        "optimizer": int(state * MIB),
        "rest": int(31.1 * MIB),
    }
    return {**made, **more}


def tuned(
    made: dict[str, Any], value: float, losses: Mapping[float, float | None], edge: bool = False
) -> dict[str, Any]:
    """A choice with its trials."""
    trials = [run(loss, 0, "trial", lr, seconds=20.0) for lr, loss in losses.items()]
    runs = [{**r, "value": value} for r in made["runs"]]
    return {**made, "tuned": {"value": value, "edge": edge, "trials": len(trials)}, "runs": trials + runs}


RECIPE: dict[str, Any] = {
    "model": {"name": "llama", "preset": "tiny"},
    "data": {"name": "python-docs", "length": 128, "vocab": 2048},
    "objective": {"name": "causal"},
    "optimizer": {"name": "adamw", "lr": 3e-3},
    "schedule": {"name": "linear", "warmup": 0.05},
    "steps": STEPS,
    "batch": 8,
    "clip": 1.0,
}


def record(choices: list[dict[str, Any]], seeds: list[int], **more: Any) -> dict[str, Any]:
    made = {
        "format": 1,
        "fallline": "0.1.0",
        "name": "tiny",
        "command": f"fallline compare recipes/tiny.yaml --over optimizer=adamw,scale --seeds {len(seeds)}",
        "created": "2026-11-21T14:00:00Z",
        "equal": "tokens",
        "baseline": "adamw",
        "seeds": seeds,
        "tune": None,
        "machine": {
            "platform": "Linux-6.1-x86_64",
            "processor": "x86_64",
            "device": "cpu",
            "threads": 2,
            "python": "3.11.2",
            "versions": {"torch": "2.9.0", "transformers": "5.10.0"},
        },
        "data": {"name": "python-docs", "sha256": "5f" * 32, "characters": 1_912_331, "train_rows": 4100},
        "model": {"sha256": "a7" * 32, "parameters": 1_331_328, "architecture": "LlamaForCausalLM"},
        "recipe": RECIPE,
        "sources": {"src/fallline/optim/scale.py": "3c" * 32},
        "notes": [],
        "choices": choices,
    }
    return {**made, **more}


def study() -> dict[str, Any]:
    """Five optimizers, tuned, three seeds: one lower, one higher on an edge, one unclear, one that fails."""
    grid = [1e-4, 3.2e-4, 1e-3, 3.2e-3, 1e-2, 3.2e-2, 1e-1]
    return record(
        [
            tuned(
                choice("adamw", [4.8659, 4.8741, 4.8583]),
                1.8e-3,
                dict(zip([*grid, 1.8e-3], [6.41, 5.52, 4.93, 4.91, 5.60, None, None, 4.87], strict=True)),
            ),
            tuned(
                choice("sgd", [5.5397, 5.5202, 5.5689], state=0.0, step=0.0688),
                1.8,
                dict(zip([*grid, 0.32, 1.0, 1.8], [7.5, 7.4, 7.2, 7.0, 6.8, 6.4, 6.0, 5.8, 5.6, 5.54], strict=True)),
                edge=True,
            ),
            tuned(
                choice("scale", [4.6527, 4.6611, 4.6398], state=1.0, step=0.0731),
                1e-3,
                dict(zip(grid, [5.6, 4.95, 4.66, 4.81, 5.3, None, None], strict=True)),
            ),
            tuned(
                choice(
                    "muon",
                    [4.8511, 4.8912, 4.8320],
                    state=5.2,
                    step=0.0933,
                    runs=[run(4.8511, 1), run(4.8912, 2), run(4.8320, 3)],
                ),
                3.2e-3,
                dict(zip(grid, [6.0, 5.4, 5.0, 4.86, 4.88, 5.2, None], strict=True)),
            ),
            choice(
                "second-order-with-a-long-name",
                [],
                status="failed",
                error="optimizer.rank: 512 is more than the smallest side of a matrix, 128",
                time=None,
                memory=None,
                runs=[],
            ),
        ],
        [1, 2, 3],
        tune={
            "key": "optimizer.lr",
            "low": 1e-4,
            "high": 1e-1,
            "trials": 7,
            "seed": 0,
            "rule": "A trial was given up when it lagged far behind after a third of its steps; a best value on the "
            "edge was followed outward.",
        },
    )


def plain() -> dict[str, Any]:
    """Two choices, untuned, one seed, and nothing measured of the second's time and memory."""
    return record([choice("adamw", [4.8659]), choice("scale", [4.6527], time=None, memory=None)], [1])


def apart() -> dict[str, Any]:
    """A choice with another tokenizer; one with a void timing; one with a diverged seed; a label that attacks."""
    return record(
        [
            choice("adamw", [4.86, 4.87, 4.85]),
            choice("vocab=4096", [5.2, 5.21, 5.22], comparable="python-docs/4096/64"),
            choice(XSS, [4.5, 4.52, None], time=time(0.09, void=True)),
            choice("scale", [4.65, 4.668, 4.643], time=time(0.075, interleaved=False)),
        ],
        [1, 2, 3],
        notes=["Two records were merged: the runs of scale were made later."],
    )


def nothing() -> dict[str, Any]:
    """Everything failed, and little is known."""
    return record(
        [
            choice(
                "adamw", [None, None], time=None, memory=None, status="failed", error="loss is not finite at step 7"
            ),
            choice("scale", [], time=None, memory=None, status="failed", error="out of memory", steps=None),
        ],
        [1, 2],
        command=None,
        machine=None,
        data=None,
        model=None,
        recipe=None,
        sources=None,
    )


def many() -> dict[str, Any]:
    """Twenty-five choices with long labels."""
    others = [
        choice(f"optimizer=rule-{i},rank={2**i}", [4.7 + 0.03 * i + 0.004 * ((i * s) % 5 - 2) for s in (1, 2, 3)])
        for i in range(1, 25)
    ]
    return record([choice("adamw", [4.86, 4.87, 4.85]), *others], [1, 2, 3])


def measured() -> dict[str, Any]:
    """Three objectives with the same measures, whose losses cannot be compared, and one measured on other rows."""

    def of(label: str, exact: list[float], docs: list[float], **more: Any) -> dict[str, Any]:
        runs = []
        for seed, (e, d) in enumerate(zip(exact, docs, strict=True), 1):
            one = run(4.0, seed, measures={"exact": e, "docs/nll": d})
            steps = len(one["curve"]["step"])
            path = {"exact": [e * k / (steps - 1) for k in range(steps)], "docs/nll": [d] * steps}
            runs.append({**one, "curve": {**one["curve"], "measures": path}})
        made = {"measured_on": "facts/8", "comparable": label, "trained": 4_884_480, "runs": runs}
        return choice(label, [], **{**made, **more})

    return record(
        [
            of("adamw", [0.50, 0.52, 0.51], [3.40, 3.41, 3.40]),
            of("dco", [0.61, 0.62, 0.63], [3.42, 3.39, 3.41], trade_off=["docs/nll", "exact"], trained=2_359_296),
            of("ldr", [0.50, 0.53, 0.50], [3.60, 3.61, 3.62]),
            of("elsewhere", [0.9, 0.9, 0.8], [3.0, 3.1, 3.2], measured_on="facts/16"),
        ],
        [1, 2, 3],
    )


ALL = {f.__name__: f for f in (study, plain, apart, nothing, many, measured)}
