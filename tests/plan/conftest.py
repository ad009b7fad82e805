"""Every pass is traced once for all tests here: what it holds depends on nothing but what is asked."""

from __future__ import annotations

import pytest

from fallline.drivers.plan import activations
from fallline.drivers.plan.activations import Pass, Traced

really = activations._trace
found: dict[str, Traced] = {}


@pytest.fixture(autouse=True)
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def trace(asked: Pass, layers: int | None) -> Traced:
        key = f"{asked} {layers}"
        if key not in found:
            found[key] = really(asked, layers)
        return found[key]

    monkeypatch.setattr(activations, "_trace", trace)
