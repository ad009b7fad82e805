"""Problems of reasoning-gym's letter_counting, as this folder holds them: pip install reasoning-gym==0.1.25

    python studies/data/letter_counting.py

The question as it comes, with the wish for a bare answer, since exact match asks for that.
"""

from __future__ import annotations

import json
from pathlib import Path

import reasoning_gym

ASKED = "Answer with the number alone."
PARTS = {"letter-counting-few": (0, 72), "letter-counting-held-out": (300, 360)}

problems = reasoning_gym.create_dataset("letter_counting", size=360, seed=1)
lines = [json.dumps({"prompt": f"{p['question']} {ASKED}", "completion": p["answer"]}) + "\n" for p in problems]
for name, (begin, end) in PARTS.items():
    Path(__file__).with_name(f"{name}.jsonl").write_text("".join(lines[begin:end]), encoding="utf-8")
