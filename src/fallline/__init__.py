"""Fallline: recent gradient methods for language models, small, composable, verified and compared honestly.

    import fallline

    recipe = fallline.Recipe.load("recipes/tiny.yaml", "optimizer=scale", "optimizer.lr=2e-3")
    result = fallline.train(recipe)
    print(result.validation_loss, result.out)

Importing this package imports neither torch nor a method.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .drivers.compare import Comparison, compare
    from .drivers.train import Result, train
    from .recipe import Recipe

__version__ = "0.1.0"
__all__ = ["Comparison", "Recipe", "Result", "__version__", "compare", "train"]

_HOMES = {
    "Recipe": ".recipe",
    "train": ".drivers.train",
    "Result": ".drivers.train",
    "compare": ".drivers.compare",
    "Comparison": ".drivers.compare",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
