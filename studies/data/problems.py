"""The problems of reasoning-gym that this folder holds: pip install reasoning-gym==0.1.25

    python studies/data/problems.py

Questions come as they are; letter counting has the wish for a bare answer added, since exact match asks for that. A
problem to be held out that is also among those to learn is left out.
"""

from __future__ import annotations

import json
from pathlib import Path

import reasoning_gym

FAMILIES = {  # family: (what is added to each question, {file: the problems it holds})
    "letter_counting": (
        " Answer with the number alone.",
        {"letter-counting-few": (0, 72), "letter-counting-held-out": (300, 360)},
    ),
    "family_relationships": ("", {"family-relationships": (0, 400), "family-relationships-held-out": (400, 460)}),
}

for family, (asked, parts) in FAMILIES.items():
    problems = list(reasoning_gym.create_dataset(family, size=max(end for _, end in parts.values()), seed=1))
    taken: set[str] = set()
    for name, (begin, end) in parts.items():
        part = [p for p in problems[begin:end] if p["question"] not in taken]
        taken.update(p["question"] for p in part)
        lines = [json.dumps({"prompt": p["question"] + asked, "completion": p["answer"]}) + "\n" for p in part]
        Path(__file__).with_name(f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
