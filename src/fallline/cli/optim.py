"""`fallline optim roles`: what each parameter of a model is for, as every optimizer here sees it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from ..drivers.skeleton import skeleton
from ..optim.roles import ROLES, classify


def roles(name: str, *, as_json: bool) -> int:
    """Print the role of every parameter of a model, alike ones of all layers in one line.

    Raises:
        InputError: no such model.
    """
    model = skeleton(name)
    found = classify(model)
    shapes = {name: [*p.shape] for name, p in model.named_parameters()}
    if as_json:
        table = {name: {"role": role, "shape": shapes[name]} for name, role in found.items()}
        print(json.dumps(table, indent=2))
        return 0
    total = sum(p.numel() for p in model.parameters())
    print(f"{name}: {total:,} parameters in {len(shapes)} tensors")
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    for role in ROLES:
        names = [name for name, r in found.items() if r == role]
        if not names:
            continue
        print(f"\n{role}: {sum(sizes[name] for name in names):,} parameters")
        for pattern, alike in folded(names).items():
            dims = {" × ".join(map(str, shapes[name])) for name in alike}
            times = f" in {len(alike)} layers" if len(alike) > 1 else ""
            print(f"  {pattern}  [{' or '.join(sorted(dims))}]{times}")
    shared = [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in shapes]
    if shared:
        print(f"\ntied, trained under the name above: {', '.join(shared)}")
    return 0


def folded(names: Sequence[str]) -> dict[str, list[str]]:
    """Names by what they have in common when the numbers of layers are left out."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(name)
    return found
