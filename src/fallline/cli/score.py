"""`fallline score`: which training examples short runs found hard."""

from __future__ import annotations

import shlex
from argparse import Namespace
from pathlib import Path

from ..drivers.score import check_new, write
from ..drivers.score import score as run
from .evaluate import writable


def score(args: Namespace) -> int:
    """Score, write, and say what the file is good for."""
    out = writable(Path(args.out))
    check_new(out)  # before the work
    found = run(args.runs, args.by, rows=args.batch, device=args.device)
    write(found, out)
    scored, told = int(found.values.isfinite().sum()), found.metadata
    left = len(found.values) - scored
    print(
        f"{out}: {args.by} of {scored} examples, mean {float(told['mean']):.4g}, sd {float(told['sd']):.4g}"
        + (f"; {left} without a label have none" if left else "")
    )
    print(f"train on the hardest half: fallline train RECIPE sampler=data-diet {shlex.quote(f'sampler.scores={out}')}")
    return 0
