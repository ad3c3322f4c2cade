# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
What the trained models answer about scenes they never saw, and what is left of it without their world tokens.

    python -m recipe.evaluate

reads the bundled model in the repo's root and the others that `python -m recipe.train` left in `build/recipe`, and
writes `results/evaluation.json`, `.md` and `.png`.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from theworld import TheWorldForConditionalGeneration, TheWorldProcessor

from .scenes import KINDS, SPLITS, Question, draw_scene
from .train import RECIPE, RESULTS, ROOT, Length


QUESTIONS_PER_KIND = 300
NUM_TEST_SCENES = 4000  # holds so many questions of each kind
BATCH_SIZE = 100  # divides the above, so that "another image" is one of which the same kind of question was asked

# What becomes of a batch's world tokens [B, N, D]; None is a prompt without an image.
CONDITIONS: dict[str, Callable[[torch.Tensor], torch.Tensor] | None] = {
    "world tokens": lambda tokens: tokens,
    "zeroed": torch.zeros_like,
    "of another image": lambda tokens: tokens.roll(1, dims=0),
    "no image": None,
}
# Other models, as far as they have been trained.
COMPARED = {"encoder frozen": "theworld-frozen", "frozen, merged 2x2": "theworld-merged"}


@dataclass(frozen=True)
class Case:
    """A question about an image, with its answer."""

    image: Image.Image
    question: Question


def held_out_cases(per_kind: int) -> list[Case]:
    """The first questions of each kind about the test scenes, one of a kind from a scene, sorted by kind."""
    cases = {kind: [] for kind in KINDS}
    for seed in SPLITS["test"][:NUM_TEST_SCENES]:
        scene = draw_scene(seed)
        for question in {question.kind: question for question in scene.questions}.values():
            cases[question.kind].append(Case(scene.image, question))
        if all(len(of_kind) >= per_kind for of_kind in cases.values()):
            break
    return [case for of_kind in cases.values() for case in of_kind[:per_kind]]


def answer(
    model: PreTrainedModel,
    processor: TheWorldProcessor,
    cases: list[Case],
    change: Callable[[torch.Tensor], torch.Tensor] | None,
) -> list[str]:
    """What the model answers, greedily; `change` is one of `CONDITIONS`."""
    answers = []
    for start in range(0, len(cases), BATCH_SIZE):
        batch = cases[start : start + BATCH_SIZE]
        contents = [[{"type": "text", "text": case.question.text}] for case in batch]
        if change is not None:
            for case, content in zip(batch, contents, strict=True):
                content.insert(0, {"type": "image", "image": case.image})
        inputs = processor.apply_chat_template(
            [[{"role": "user", "content": content}] for content in contents],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        if change is not None:
            with torch.no_grad():
                tokens = model.get_image_features(inputs.pop("pixel_values")).pooler_output
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=change(tokens))}
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answers += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in answers]


def interval(right: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a share."""
    z = 1.96
    share = right / total
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2)) / (1 + z**2 / total)
    return centre - half, centre + half


def score(cases: list[Case], answers: list[str]) -> dict[str, dict]:
    """Shares of right answers with their intervals, of each kind and `overall`."""
    groups = {kind: [] for kind in (*KINDS, "overall")}
    for case, given in zip(cases, answers, strict=True):
        for name in (case.question.kind, "overall"):
            groups[name].append(given == case.question.answer)
    return {
        name: {
            "right": sum(group),
            "total": len(group),
            "share": sum(group) / len(group),
            "interval": interval(sum(group), len(group)),
        }
        for name, group in groups.items()
    }


class SceneEvaluation(TrainerCallback):
    """
    Whenever a Trainer evaluates, scores its model on held-out scenes: `eval_scenes`, the share of right answers.

    It may be the `metric_for_best_model`.

    Args:
        per_kind: Questions of each kind.
    """

    def __init__(self, per_kind: int = 20):
        self.cases = held_out_cases(per_kind)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        model: PreTrainedModel,
        processing_class: TheWorldProcessor,
        **kwargs,
    ) -> None:
        training = model.training
        answers = answer(model.eval(), processing_class, self.cases, CONDITIONS["world tokens"])
        model.train(training)
        metrics["eval_scenes"] = score(self.cases, answers)["overall"]["share"]
        state.log_history.append({"step": state.global_step, "eval_scenes": metrics["eval_scenes"]})


def shared_fingerprints(num_training_scenes: int, num_test_scenes: int) -> int:
    """How many of the first test scenes have the pixels of one of the first training scenes."""
    fingerprints = {
        split: {hashlib.sha256(draw_scene(seed).image.tobytes()).digest() for seed in tqdm(SPLITS[split][:number])}
        for split, number in {"train": num_training_scenes, "test": num_test_scenes}.items()
    }
    return len(fingerprints["train"] & fingerprints["test"])


def evaluate(recipe: Path) -> dict[str, dict[str, dict]]:
    """The scores of every model under the conditions that say something about it: run -> kind -> score."""
    cases = held_out_cases(QUESTIONS_PER_KIND)
    processor = TheWorldProcessor.from_pretrained(ROOT)
    bundled = TheWorldForConditionalGeneration.from_pretrained(ROOT)
    runs = {name: (bundled, processor, change) for name, change in CONDITIONS.items()}
    # The tokenizer that Gemma learnt its text with has the same ids.
    runs["blind Gemma"] = AutoModelForCausalLM.from_pretrained(recipe / "gemma"), processor, None
    for name, folder in COMPARED.items():
        if (recipe / folder).exists():
            model = TheWorldForConditionalGeneration.from_pretrained(recipe / folder)
            runs[name] = model, TheWorldProcessor.from_pretrained(recipe / folder), CONDITIONS["world tokens"]
    return {
        name: score(cases, answer(model.eval(), reader, cases, change))
        for name, (model, reader, change) in tqdm(runs.items(), desc="runs")
    }


def table(scores: dict[str, dict[str, dict]]) -> str:
    """Per cent of right answers and their intervals: a row a kind, a column a run."""
    lines = [f"| | {' | '.join(scores)} |", f"|---|{'---|' * len(scores)}"]
    for kind in (*KINDS, "overall"):
        cells = []
        for of_run in scores.values():
            low, high = of_run[kind]["interval"]
            cells.append(f"{of_run[kind]['share']:.1%} ({low:.0%} to {high:.0%})".replace("%", ""))
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_bars(scores: dict[str, dict[str, dict]], file: Path) -> None:
    figure, axis = plt.subplots(figsize=(13, 4.5), layout="constrained")
    kinds, width = (*KINDS, "overall"), 0.9 / len(scores)
    for number, (run, of_run) in enumerate(scores.items()):
        shares = [of_run[kind]["share"] for kind in kinds]
        ends = [of_run[kind]["interval"] for kind in kinds]
        errors = [[abs(end[side] - share) for end, share in zip(ends, shares, strict=True)] for side in (0, 1)]
        places = [place + (number - (len(scores) - 1) / 2) * width for place in range(len(kinds))]
        axis.bar(places, shares, width, yerr=errors, label=run, error_kw={"linewidth": 0.8})
    chance = [1 / len(KINDS[kind]) for kind in KINDS]
    axis.hlines(chance, [k - 0.47 for k in range(len(chance))], [k + 0.47 for k in range(len(chance))], "black", ":")
    axis.set_xticks(range(len(kinds)), kinds)
    axis.set(
        ylabel="right answers", ylim=(0, 1.02), title="Held-out questions; bars end in 95 % intervals, dots: chance"
    )
    axis.legend(ncols=len(scores), loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
    figure.savefig(file, dpi=100)


def main() -> None:
    scores = evaluate(RECIPE)
    report = {
        "model.safetensors": hashlib.sha256((ROOT / "model.safetensors").read_bytes()).hexdigest(),
        "questions": scores["world tokens"]["overall"]["total"],
        "training scenes": Length().all_scenes,
        "test scenes seen in training": shared_fingerprints(Length().all_scenes, NUM_TEST_SCENES),
        "scores": scores,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    (RESULTS / "evaluation.md").write_text(table(scores) + "\n")
    draw_bars(scores, RESULTS / "evaluation.png")
    print(table(scores))


if __name__ == "__main__":
    main()
