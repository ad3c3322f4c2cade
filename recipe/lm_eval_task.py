# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Writes held-out scenes as a dataset for lm-eval: `build/harness/test.parquet`, the data of `lm_eval_task.yaml`.

    python -m recipe.lm_eval_task
"""

from pathlib import Path

from datasets import Dataset

from .evaluate import held_out_cases
from .pipeline import ROOT


def write_scenes(file: Path, per_kind: int = 20) -> None:
    """Writes a row per question: `image`, `question`, `answer` and `kind`."""
    cases = held_out_cases(per_kind)
    columns = {
        "image": [case.seen for case in cases],
        "question": [case.question.text for case in cases],
        "answer": [case.question.answer for case in cases],
        "kind": [case.question.kind for case in cases],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(columns).to_parquet(file)


if __name__ == "__main__":
    write_scenes(ROOT / "build" / "harness" / "test.parquet")
