# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Scores the bundled model with Gemma's matrices quantized.

    python -m recipe.quantized

needs torchao and bitsandbytes, and writes `results/quantized.json` and `.md`. Only Gemma's layers are quantized.
"""

import json
from collections.abc import Callable

import torch
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
from transformers import AutoModel, AutoProcessor, BitsAndBytesConfig, TorchAoConfig

from theworld.evaluation.held_out import QUESTIONS_PER_KIND, Case, held_out_cases

from .evaluate import CONDITIONS, answer, score
from .pipeline import RESULTS, ROOT


# Quantization of Gemma's matrices; None for the saved dtype.
SETTINGS: dict[str, Callable] = {
    "float32": lambda: None,
    "torchao int8": lambda: TorchAoConfig(Int8WeightOnlyConfig(version=2)),
    "torchao int4, groups of 32": lambda: TorchAoConfig(
        IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    ),
    "bitsandbytes int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}


def load(setting: str):
    """The bundled model with a quantization of `SETTINGS`."""
    return AutoModel.from_pretrained(ROOT, trust_remote_code=True, quantization_config=SETTINGS[setting]()).eval()


def share_right(setting: str, cases: list[Case]) -> dict:
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    return score(cases, answer(load(setting), processor, cases, CONDITIONS["world tokens"]))["overall"]


def table(scores: dict[str, dict]) -> str:
    rows = [
        f"| {setting} | {100 * s['share']:.1f} ({100 * s['interval'][0]:.1f} to {100 * s['interval'][1]:.1f}) |"
        for setting, s in scores.items()
    ]
    return "\n".join(["| Gemma's matrices | right, % |", "|---|---|", *rows])


def main() -> None:
    cases = held_out_cases(QUESTIONS_PER_KIND)
    scores = {setting: share_right(setting, cases) for setting in SETTINGS}
    (RESULTS / "quantized.json").write_text(json.dumps({"questions": len(cases), "scores": scores}, indent=1) + "\n")
    (RESULTS / "quantized.md").write_text(table(scores) + "\n")
    print(table(scores))


if __name__ == "__main__":
    main()
