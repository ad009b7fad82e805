"""`fallline audit`: membership inference on a trained model, or an inspection of it."""

from __future__ import annotations

import shlex
from argparse import Namespace
from collections.abc import Sequence

from ..drivers.audit import audit as attack
from ..drivers.inspection import inspect
from ..errors import InputError
from ..report import inspection
from ..report.audit import table
from ..written import settings_of


def audit(args: Namespace, options: Sequence[str], argv: Sequence[str]) -> int:
    """Attack or inspect the model, and print the table.

    Raises:
        InputError: options of the one with the other, or neither.
    """
    command = f"fallline {shlex.join(argv)}"
    attacking = {f"--{k.replace('_', '-')}": getattr(args, k) for k in ("members", "non_members", "methods", "batch")}
    given = [flag for flag, value in attacking.items() if value is not None]
    if args.inspect is not None:
        if given:
            raise InputError(f"{given[0]} is of membership inference and has no effect with --inspect; remove it")
        made = inspect(
            args.run,
            args.inspect,
            settings_of(options),
            base=args.base,
            out=args.out,
            device=args.device,
            command=command,
        )
        print(inspection.text(made.record))
        print(f"\nreport: {made.html}  (all figures: {made.json.name})")
        return 0
    if args.members is None or args.non_members is None:
        raise InputError("give --members FILE and --non-members FILE, or --inspect ID")
    if args.base is not None or options:
        word = "--base" if args.base is not None else options[0]
        raise InputError(f"{word} has no effect without --inspect; remove it")
    methods = None if args.methods is None else [name for word in args.methods.split(",") if (name := word.strip())]
    found = attack(
        args.run,
        args.members,
        args.non_members,
        methods=methods,
        out=args.out,
        device=args.device,
        batch=8 if args.batch is None else args.batch,
        command=command,
    )
    print(table(found.record))
    print(f"\nreport: {found.out / 'audit.html'}  (each example's scores: audit.json)")
    return 0
