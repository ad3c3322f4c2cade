# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Teaches the bundled model a new kind of question with LoRA on Gemma; everything else is frozen.

    python -m recipe.lora_new_question

trains on questions about the smallest object, mixed with questions of known kinds, and evaluates on held-out scenes.
It writes `results/new_kind.json`, and the adapter to `build/new-kind`.
"""

import json
import shutil
from pathlib import Path
from random import Random

from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from theworld import TheWorldForConditionalGeneration, TheWorldProcessor
from theworld.evaluation.held_out import Case, held_out_cases
from theworld.evaluation.scenes import COLOURS, MARGIN, SPLITS, Question, Scene, draw_scene
from theworld.evaluation.table import wilson_interval
from theworld.training.data import ConversationCollator
from theworld.training.latents import load_latents
from theworld.training.precompute_latents import precompute
from theworld.training.train import LORA_TARGET_MODULES

from .evaluate import CONDITIONS, answer
from .pipeline import RESULTS, ROOT


FOLDER = ROOT / "build" / "new-kind"
KIND = "smallest"
CHANCE = 1 / len(COLOURS)
OLD_QUESTIONS = 3  # of known kinds, in each conversation


def ask_smallest(scene: Scene) -> Question | None:
    """The new kind of question; None if no object is clearly the smallest."""
    if len(scene.things) < 2:
        return None
    smallest, second, *_ = sorted(scene.things, key=lambda thing: thing.radius)
    if second.radius < MARGIN * smallest.radius:
        return None
    return Question(KIND, "What colour is the smallest object?", smallest.colour)


def scenes_with_a_smallest(split: str, number: int) -> list[tuple[int, Scene, Question]]:
    """The first scenes of a split that have the new kind of question, with their seeds and questions."""
    found, seeds = [], iter(SPLITS[split])
    while len(found) < number:
        seed = next(seeds)
        scene = draw_scene(seed)
        if question := ask_smallest(scene):
            found.append((seed, scene, question))
    return found


def write_conversations(folder: Path, number: int) -> None:
    """Writes a dataset for `theworld train`: a conversation per scene, the new question among known ones."""
    (folder / "images").mkdir(parents=True)
    with (folder / "train.jsonl").open("w") as file:
        for seed, scene, question in scenes_with_a_smallest("train", number):
            scene.image.save(folder / "images" / f"{seed}.png")
            random = Random(seed)
            questions = [question, *random.sample(scene.questions, min(OLD_QUESTIONS, len(scene.questions)))]
            messages = []
            for each in random.sample(questions, len(questions)):
                messages += [{"role": "user", "content": each.text}, {"role": "assistant", "content": each.answer}]
            file.write(json.dumps({"messages": messages, "images": [f"images/{seed}.png"]}) + "\n")


def train_adapter(dataset: Dataset, folder: Path, callbacks: list[TrainerCallback], **options) -> PeftModel:
    """
    Trains LoRA on Gemma's matrices; `options` are SFTConfig's.

    `theworld train --train lora` also trains the projection, which is frozen here.
    """
    processor = TheWorldProcessor.from_pretrained(ROOT)
    model = TheWorldForConditionalGeneration.from_pretrained(ROOT)
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules=LORA_TARGET_MODULES)
    config = SFTConfig(
        folder / "run",
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        **options,
    )
    trainer = SFTTrainer(
        get_peft_model(model, adapter),
        args=config,
        train_dataset=dataset,
        data_collator=ConversationCollator(processor),
        processing_class=processor,
        callbacks=callbacks,
    )
    trainer.train()
    trainer.save_model(folder / "adapter")
    return trainer.model.eval()


def share(model: PeftModel, cases: list[Case]) -> dict:
    """The share of cases that the model answers correctly."""
    processor = TheWorldProcessor.from_pretrained(ROOT)
    answers = answer(model, processor, cases, CONDITIONS["world tokens"])
    right = sum(given == case.question.answer for case, given in zip(cases, answers, strict=True))
    return {
        "right": right,
        "total": len(cases),
        "share": right / len(cases),
        "interval": wilson_interval(right, len(cases)),
    }


def main(
    folder: Path = FOLDER, scenes: int = 4000, epochs: int = 2, tested: int = 500, per_old_kind: int = 100
) -> dict:
    """Makes the data, trains and evaluates; returns the content of `results/new_kind.json`."""
    shutil.rmtree(folder, ignore_errors=True)
    write_conversations(folder / "data", scenes)
    precompute(str(ROOT), str(folder / "data" / "train.jsonl"), "train", folder / "latents", 1000, "float32")
    collator = ConversationCollator(TheWorldProcessor.from_pretrained(ROOT))
    latents = load_latents(folder / "latents", str(ROOT), collator)
    model = train_adapter(latents, folder, [], num_train_epochs=epochs)
    new = [Case(scene.image, question) for _, scene, question in scenes_with_a_smallest("test", tested)]
    old = held_out_cases(per_old_kind)
    with model.disable_adapter():
        before = {"new": share(model, new), "old": share(model, old)}
    return {
        "question": new[0].question.text,
        "chance": CHANCE,
        "before": before,
        "after": {"new": share(model, new), "old": share(model, old)},
        "adapter bytes": (folder / "adapter" / "adapter_model.safetensors").stat().st_size,
        "scenes": scenes,
        "epochs": epochs,
    }


if __name__ == "__main__":
    report = main()
    (RESULTS / "new_kind.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
