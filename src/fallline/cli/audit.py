"""`fallline audit`: membership inference on a trained model."""

from __future__ import annotations

import shlex
from argparse import Namespace
from collections.abc import Sequence

from ..drivers.audit import audit as run
from ..report.audit import table


def audit(args: Namespace, argv: Sequence[str]) -> int:
    """Attack the model, and print the table."""
    methods = None if args.methods is None else [name for word in args.methods.split(",") if (name := word.strip())]
    found = run(
        args.run,
        args.members,
        args.non_members,
        methods=methods,
        out=args.out,
        device=args.device,
        batch=args.batch,
        command=f"fallline {shlex.join(argv)}",
    )
    print(table(found.record))
    print(f"\nreport: {found.out / 'audit.html'}  (each example's scores: audit.json)")
    return 0
