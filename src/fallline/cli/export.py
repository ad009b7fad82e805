"""`fallline export`: take what was trained anywhere."""

from __future__ import annotations

from ..drivers.export import export as run


def export(name: str, out: str, merge: bool) -> int:
    """Write the folder, and say how what it computes compares with the trained model."""
    made = run(name, out, merge=merge)
    print(f"{out}: the {made.kind} of {name}")
    if made.quantised:
        print(
            f"trained beside weights in {made.quantised}, written for the weights in full precision: a logit differs "
            f"from the trained model's by {made.rounding:.2g} at most"
        )
    if made.gated:
        print("PEFT loads the adapter without its gate: there it counts for every input; Fallline loads both")
    if made.allowed:
        print(
            f"loaded again with {made.loader}: a logit differs by {made.difference:.2g} at most; rounding may make "
            f"{made.allowed:.2g}, the largest logit is {made.largest:.3g}"
        )
    else:
        print(f"loaded again with {made.loader}: every logit is equal, bit for bit")
    return 0
