"""Will it fit, and what else would: the memory of training runs, forecast from shapes."""

from __future__ import annotations

from .forecast import Forecast, Setup, forecast, setup_of

__all__ = ["Forecast", "Setup", "forecast", "setup_of"]
