"""`fallline compare` and `fallline report`."""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ..drivers.compare import Comparison, compare, rebuild
from ..report import table


def run(args: Namespace, overrides: Sequence[str], argv: Sequence[str]) -> int:
    """Compare, and print the table."""
    found = compare(
        args.recipe,
        *overrides,
        over=args.over,
        seeds=args.seeds,
        tune=args.tune,
        equal=args.equal,
        out=args.out,
        parallel=args.parallel,
        resume=args.resume,
        force=args.force,
        command=quoted(argv),
        progress=None if args.quiet else sys.stderr,
    )
    print(table(found.report))
    if found.signal is not None:
        print(f"\ninterrupted and saved; continue with: fallline compare {shlex.quote(str(found.out))} --resume")
        return 128 + found.signal
    return told(found)


def report(runs: Sequence[str], out: str | None) -> int:
    """Make the report anew."""
    found = rebuild([Path(run) for run in runs], None if out is None else Path(out))
    print(table(found.report))
    return told(found)


def told(found: Comparison) -> int:
    """Say where the report is; the exit code."""
    print(f"\nreport: {found.out / 'report.html'}  (the numbers: report.json, report.csv)")
    return 0 if any(choice["status"] != "failed" for choice in found.report["choices"]) else 2


def quoted(argv: Sequence[str]) -> str:
    """The command to get the same again: without where it went and whether it was resumed."""
    kept: list[str] = []
    skip = False
    for word in argv:
        if not skip and word not in ("--out", "--resume", "--quiet") and not word.startswith("--out="):
            kept.append(word)
        skip = word == "--out"
    return "fallline " + shlex.join(kept)
