"""The report's files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import StorageError
from .page import page
from .tables import runs_csv


def write(folder: Path, analysed: Mapping[str, Any]) -> Path:
    """Write ``report.json``, ``report.csv`` and ``report.html``; each is replaced as a whole.

    Args:
        folder: made when missing.
        analysed: what `analyse` returns.

    Returns:
        The page's path.

    Raises:
        StorageError: the disk refused.
    """
    texts = {
        "report.json": json.dumps(analysed, indent=2, allow_nan=False) + "\n",
        "report.csv": runs_csv(analysed),
        "report.html": page(analysed),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            temporary = folder / f".{name}.tmp"
            temporary.write_bytes(text.encode(errors="backslashreplace"))
            os.replace(temporary, folder / name)
    except OSError as error:
        raise StorageError(f"cannot write the report into {folder}: {error.strerror or error}") from error
    return folder / "report.html"
