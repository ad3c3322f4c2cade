# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Scores the trained models on held-out scenes and clips, with and without world tokens.

    python -m recipe.evaluate

reads the bundled model in the repo's root and the other models that `python -m recipe.pipeline` wrote to
`build/recipe`, and writes `results/evaluation.json`, `.md` and `.png`. Scores of missing models are kept from the
previous report, with the SHA-256 of their weights.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
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
from theworld.evaluation.clips import CLIP_KINDS, Clip, make_clip
from theworld.evaluation.held_out import NUM_TEST_SCENES, QUESTIONS_PER_KIND, Case, held_out_cases, held_out_clips
from theworld.evaluation.scenes import KINDS, SPLITS, Scene, draw_scene
from theworld.evaluation.table import wilson_interval

from .pipeline import RECIPE, RESULTS, ROOT, Length


BATCH_SIZE = 100  # divides QUESTIONS_PER_KIND, so that "of another image" has the same kind of question
ALL_KINDS = KINDS | CLIP_KINDS
TOTALS = {"overall": "scenes, all", "clips": "clips, all"}

# How a condition changes a batch's world tokens [B, N, D]; None is a prompt without image or clip.
CONDITIONS: dict[str, Callable[[torch.Tensor], torch.Tensor] | None] = {
    "world tokens": lambda tokens: tokens,
    "zeroed": torch.zeros_like,
    "of another image": lambda tokens: tokens.roll(1, dims=0),
    "no image": None,
}
LAST_FRAME = "last frame alone"
BLIND = "blind Gemma"
# Other models, if they have been trained; on scenes only.
COMPARED = {BLIND: "gemma", "encoder frozen": "theworld-frozen", "frozen, merged 2x2": "theworld-merged"}


def answer(
    model: PreTrainedModel,
    processor: TheWorldProcessor,
    cases: list[Case],
    change: Callable[[torch.Tensor], torch.Tensor] | None,
) -> list[str]:
    """The model's greedy answers; `change` is one of `CONDITIONS`. The cases of a batch have one modality."""
    answers = []
    for start in range(0, len(cases), BATCH_SIZE):
        batch = cases[start : start + BATCH_SIZE]
        modality = batch[0].modality
        contents = [[{"type": "text", "text": case.question.text}] for case in batch]
        if change is not None:
            for case, content in zip(batch, contents, strict=True):
                content.insert(0, {"type": modality, modality: case.seen})
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
                if modality == "image":
                    encoded = model.get_image_features(inputs.pop("pixel_values"))
                else:
                    encoded = model.get_video_features(inputs.pop("pixel_values_videos"))
            changed = BaseModelOutputWithPooling(pooler_output=change(encoded.pooler_output))
            inputs["mm_encoder_outputs"] = {modality: changed}
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answers += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in answers]


def score(cases: list[Case], answers: list[str]) -> dict[str, dict]:
    """Shares of right answers with their intervals: for each kind, `overall` for scenes, and `clips` for clips."""
    groups: dict[str, list[bool]] = {}
    for case, given in zip(cases, answers, strict=True):
        kind = case.question.kind
        for name in (kind, "overall" if kind in KINDS else "clips"):
            groups.setdefault(name, []).append(given == case.question.answer)
    return {
        name: {
            "right": sum(group),
            "total": len(group),
            "share": sum(group) / len(group),
            "interval": wilson_interval(sum(group), len(group)),
        }
        for name, group in groups.items()
    }


class SceneEvaluation(TrainerCallback):
    """
    Scores a Trainer's model on held-out scenes at each evaluation: `eval_scenes`, the share of right answers.

    It can be the `metric_for_best_model`.

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


def pixel_hash(made: Scene | Clip) -> bytes:
    """The SHA-256 of the pixels of a scene or clip."""
    pictures = [made.image] if isinstance(made, Scene) else made.frames
    return hashlib.sha256(b"".join(picture.tobytes() for picture in pictures)).digest()


def count_shared(make: Callable[[int], Scene | Clip], num_training: int, num_test: int) -> int:
    """The number of test scenes or clips with the pixels of one for training."""
    hashes = {
        split: {pixel_hash(make(seed)) for seed in tqdm(SPLITS[split][:number])}
        for split, number in {"train": num_training, "test": num_test}.items()
    }
    return len(hashes["train"] & hashes["test"])


def sha256_of(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def evaluate(recipe: Path) -> tuple[dict[str, dict[str, dict]], dict[str, str]]:
    """
    The scores of every available model, under the conditions that apply to it.

    Returns:
        Scores by run and kind, and the SHA-256 of the model's weights by run.
    """
    scenes, clips = held_out_cases(QUESTIONS_PER_KIND), held_out_clips(QUESTIONS_PER_KIND)
    processor = TheWorldProcessor.from_pretrained(ROOT)
    bundled = TheWorldForConditionalGeneration.from_pretrained(ROOT)
    runs = {name: (ROOT, bundled, processor, change, scenes + clips) for name, change in CONDITIONS.items()}
    last_frames = [clip.last_frame for clip in clips]
    runs[LAST_FRAME] = ROOT, bundled, processor, CONDITIONS["world tokens"], last_frames
    for name, folder in COMPARED.items():
        if not (recipe / folder).exists():
            continue
        if name == BLIND:  # its tokenizer has the same ids
            model, reader, change = AutoModelForCausalLM.from_pretrained(recipe / folder), processor, None
        else:
            model = TheWorldForConditionalGeneration.from_pretrained(recipe / folder)
            reader, change = TheWorldProcessor.from_pretrained(recipe / folder), CONDITIONS["world tokens"]
        runs[name] = recipe / folder, model, reader, change, scenes
    scores = {
        name: score(cases, answer(model.eval(), reader, cases, change))
        for name, (_, model, reader, change, cases) in tqdm(runs.items(), desc="runs")
    }
    return scores, {name: sha256_of(folder) for name, (folder, *_) in runs.items()}


def table(scores: dict[str, dict[str, dict]]) -> str:
    """Percentages of right answers and their intervals: a row per kind, a column per run."""
    lines = [f"| | {' | '.join(scores)} |", f"|---|{'---|' * len(scores)}"]
    for kind in (*KINDS, "overall", *CLIP_KINDS, "clips"):
        cells = []
        for of_run in scores.values():
            if kind in of_run:
                low, high = of_run[kind]["interval"]
                cells.append(f"{of_run[kind]['share']:.1%} ({low:.0%} to {high:.0%})".replace("%", ""))
            else:
                cells.append("")
        lines.append(f"| {TOTALS.get(kind, kind)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_bars(scores: dict[str, dict[str, dict]], file: Path) -> None:
    figure, axis = plt.subplots(figsize=(17, 4.5), layout="constrained")
    kinds, width = (*KINDS, "overall", *CLIP_KINDS, "clips"), 0.9 / len(scores)
    for number, (run, of_run) in enumerate(scores.items()):
        asked = [place for place, kind in enumerate(kinds) if kind in of_run]
        shares = [of_run[kinds[place]]["share"] for place in asked]
        ends = [of_run[kinds[place]]["interval"] for place in asked]
        errors = [[abs(end[side] - share) for end, share in zip(ends, shares, strict=True)] for side in (0, 1)]
        places = [place + (number - (len(scores) - 1) / 2) * width for place in asked]
        axis.bar(places, shares, width, yerr=errors, label=run, error_kw={"linewidth": 0.8})
    for kind, answers in ALL_KINDS.items():
        place = kinds.index(kind)
        axis.hlines(1 / len(answers), place - 0.47, place + 0.47, "black", ":")
    axis.set_xticks(range(len(kinds)), [TOTALS.get(kind, kind) for kind in kinds])
    axis.set(
        ylabel="right answers", ylim=(0, 1.02), title="Held-out questions; bars end in 95 % intervals, dots: chance"
    )
    axis.legend(ncols=len(scores), loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
    figure.savefig(file, dpi=100)


def main() -> None:
    file = RESULTS / "evaluation.json"
    before = json.loads(file.read_text()) if file.exists() else {"scores": {}}
    scores, weights = evaluate(RECIPE)
    for name in COMPARED:
        if name not in scores and name in before["scores"]:
            scores[name], weights[name] = before["scores"][name], before.get("weights", {}).get(name)
    length = Length()
    report = {
        "weights": weights,
        "questions": {
            "scenes": scores["world tokens"]["overall"]["total"],
            "clips": scores[LAST_FRAME]["clips"]["total"],
        },
        "training scenes": length.all_scenes,
        "test scenes seen in training": count_shared(draw_scene, length.all_scenes, NUM_TEST_SCENES),
        "training clips": length.all_clips,
        "test clips seen in training": count_shared(make_clip, length.all_clips, NUM_TEST_SCENES),
        "scores": scores,
    }
    RESULTS.mkdir(exist_ok=True)
    file.write_text(json.dumps(report, indent=2) + "\n")
    (RESULTS / "evaluation.md").write_text(table(scores) + "\n")
    draw_bars(scores, RESULTS / "evaluation.png")
    print(table(scores))


if __name__ == "__main__":
    main()
