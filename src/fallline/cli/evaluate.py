"""`fallline eval`: benchmarks of lm-evaluation-harness on a trained model."""

from __future__ import annotations

import json
import logging
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from ..adapters.gated import gated
from ..drivers.folder import write_text
from ..drivers.trained import open_trained
from ..errors import InputError, StorageError, nearest


def evaluate(args: Namespace) -> int:
    """Hand the model to the harness, and print its table."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.utils import handle_non_serializable, make_table
    except ModuleNotFoundError as error:
        raise InputError(f"the package {error.name} is missing; pip install 'fallline[eval]'") from None
    if args.batch < 1 or (args.limit is not None and args.limit < 1):
        raise InputError(f"--batch and --limit must be at least 1, got {args.batch} and {args.limit}")
    out = None if args.out is None else writable(Path(args.out))
    names, manager = find_tasks(args.tasks, args.include)
    trained = open_trained(args.model, args.device)
    if args.batch > 1 and gated(trained.model):
        raise InputError(
            "--batch must be 1 for an adapter 'o3': the harness pads, and its gate would count the padding"
        )
    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)  # it warns of being given a loaded model
    try:
        lm = HFLM(pretrained=trained.model, tokenizer=trained.tokenizer, batch_size=args.batch)
        found: Any = simple_evaluate(
            lm, tasks=names, task_manager=manager, limit=args.limit, batch_size=args.batch, log_samples=False
        )
    except Exception as error:  # tasks are programs of strangers, and fetch their data from anywhere
        reason = " ".join(str(error).split())
        raise InputError(f"the harness stopped in {','.join(names)}: {type(error).__name__}: {reason}") from error
    found["config"]["model"] = args.model
    print(make_table(found))
    if found.get("groups"):
        print(make_table(found, "groups"))
    if out is not None:
        try:
            write_text(out, json.dumps(found, indent=2, default=handle_non_serializable) + "\n")
        except OSError as error:
            raise StorageError(f"cannot write {out}: {error.strerror or error}") from error
    return 0


def find_tasks(tasks: str, include: str | None) -> tuple[list[str], Any]:
    """The names in ``a,b``, patterns written out, and the harness's manager that knows them.

    Raises:
        InputError: no such task or folder.
    """
    from lm_eval.tasks import TaskManager

    if include is not None and not Path(include).is_dir():
        raise InputError(f"--include: there is no folder {include}")
    names = [word.strip() for word in tasks.split(",") if word.strip()]
    if not names:
        raise InputError("--tasks names no task; such as --tasks arc_easy,hellaswag")
    manager: Any = TaskManager(include_path=include)  # reads thousands of files
    found: list[str] = []
    for name in names:
        matching = manager.match_tasks([name])
        if not matching:
            raise InputError(f"the harness has no task {name!r}; {close(name, manager.all_tasks)}")
        found += matching
    return list(dict.fromkeys(found)), manager


def close(name: str, known: list[str]) -> str:
    """The end of the message: the nearest name, but not thousands when none is near."""
    said = nearest(name, known)
    return said if said.startswith("did you mean") else "lm-eval ls tasks lists them; --include FOLDER adds your own"


def writable(path: Path) -> Path:
    """A file that can be written, as far as can be told before.

    Raises:
        InputError: it cannot.
    """
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f"--out: cannot write a file {path}")
    return path
