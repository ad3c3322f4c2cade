# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""The training loop of every stage. A batch depends only on its step, so that a run resumes exactly."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.optim import AdamW, Muon
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import get_wsd_schedule


LOG_EVERY = 50
SAVE_EVERY = 500


class Batches(Dataset):
    """The batch of each step, which depends only on the step."""

    def __init__(self, make_batch: Callable[[int], dict]):
        self.make_batch = make_batch

    def __getitem__(self, step: int) -> dict:
        return self.make_batch(step)


def make_optimizers(model: nn.Module, matrices: Sequence[nn.Parameter], learning_rate: float) -> list:
    """Muon for the given matrices, with updates scaled to the size of AdamW's, and AdamW for the other parameters."""
    by_muon = {id(matrix) for matrix in matrices}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in by_muon]
    optimizers = [AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)]
    if matrices:
        optimizers.append(Muon(matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def train(
    model: nn.Module,
    make_batch: Callable[[int], dict],
    steps: int,
    learning_rate: float,
    folder: Path,
    matrices: Sequence[nn.Parameter] = (),
) -> None:
    """
    Trains a model in place, from the last checkpoint in `folder` if there is one.

    Args:
        model: Takes a batch's entries and returns a dict of scalars; `loss` is minimized, all are logged.
        make_batch: Returns the batch of a step; called in worker processes.
        steps: Optimizer steps of the whole run.
        learning_rate: The peak, after a short warm-up; decays to zero in the last 40 % of the steps.
        folder: For the last checkpoint and `history.jsonl`, the logged means of every 50 steps.
        matrices: Parameters for Muon; AdamW trains the others.
    """
    set_seed(0)
    accelerator = Accelerator()
    optimizers = make_optimizers(model, matrices, learning_rate)
    schedules = [
        get_wsd_schedule(optimizer, num_warmup_steps=100, num_decay_steps=int(0.4 * steps), num_training_steps=steps)
        for optimizer in optimizers
    ]
    model, *prepared = accelerator.prepare(model, *optimizers, *schedules)
    optimizers, schedules = prepared[: len(optimizers)], prepared[len(optimizers) :]

    history_file = folder / "history.jsonl"
    first_step, history = 0, []
    if checkpoints := sorted(folder.glob("checkpoint-*")):
        accelerator.load_state(checkpoints[-1])
        first_step = int(checkpoints[-1].name.removeprefix("checkpoint-"))
        history = history_file.read_text().splitlines()[: first_step // LOG_EVERY]

    def save(step: int) -> None:
        """Writes a complete checkpoint, then removes the previous one."""
        accelerator.save_state(unfinished := folder / "unfinished", safe_serialization=False)
        history_file.write_text("".join(line + "\n" for line in history))
        previous = list(folder.glob("checkpoint-*"))
        unfinished.rename(folder / f"checkpoint-{step:08}")
        for checkpoint in previous:
            shutil.rmtree(checkpoint)

    batches = DataLoader(
        Batches(make_batch),
        batch_size=None,
        sampler=range(first_step, steps),
        # With a GPU, the CPU cores are free to make batches.
        num_workers=os.cpu_count() - 1 if accelerator.device.type == "cuda" else 0,
        # A separate generator: a loader draws a number when it starts, which would change the noise of a resumed run.
        generator=torch.Generator(),
    )
    model.train()
    sums: dict[str, float] = {}
    progress = tqdm(batches, desc=folder.name, initial=first_step, total=steps, unit="step", mininterval=5)
    for step, batch in enumerate(progress, start=first_step + 1):
        numbers = model(**{name: tensor.to(accelerator.device) for name, tensor in batch.items()})
        accelerator.backward(numbers["loss"])
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        for each in (*optimizers, *schedules):
            each.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        for name, number in numbers.items():
            sums[name] = sums.get(name, 0.0) + number.detach().item() / LOG_EVERY
        if step % LOG_EVERY == 0:
            history.append(json.dumps({"step": step, **{name: round(total, 5) for name, total in sums.items()}}))
            progress.set_postfix({name: f"{total:.3f}" for name, total in sums.items()})
            sums.clear()
        if step % SAVE_EVERY == 0 or step == steps:
            save(step)
    accelerator.unwrap_model(model).eval()
