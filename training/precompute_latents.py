# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Encodes the images of a dataset once, to train with a frozen encoder: the command `theworld precompute-latents`.

    theworld precompute-latents --model MODEL --dataset DATASET --output-dir LATENTS
    torchrun --nproc-per-node 8 -m theworld.cli precompute-latents ...     each process encodes shards of its own
    theworld train --model MODEL --dataset LATENTS ...

A folder of latents contains a manifest and Arrow shards with conversations and the latents of their images. An
interrupted run continues with the shards that are missing, on any number of processes.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from datasets import List, Value
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoProcessor

from theworld import TheWorldForConditionalGeneration, TheWorldProcessor
from theworld.checkpoints.atomic import atomic_folder
from theworld.cli import ArgumentParser, run_command
from theworld.training.data import ConversationCollator, load_conversations
from theworld.training.latents import (
    ENCODER,
    MANIFEST,
    Manifest,
    checkpoint_folder,
    content_of,
    encoder_fingerprint,
    encoder_tensors,
)


IMAGES_PER_BATCH = 16
# What torchrun tells a process, and the values without it.
LAUNCHED = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}


def load_encoder(model: str) -> TheWorldForConditionalGeneration:
    """A checkpoint with its encoder in float32; the rest of it is not loaded, and takes no memory."""
    config = AutoConfig.from_pretrained(model, trust_remote_code=True)
    with torch.device("meta"):
        loaded = AutoModel.from_config(config, trust_remote_code=True).eval()
    tensors = encoder_tensors(checkpoint_folder(model))
    state = {name.removeprefix(ENCODER): tensor.float() for name, tensor in tensors}
    loaded.model.world_encoder.load_state_dict(state, assign=True)
    return loaded


def encode(model: TheWorldForConditionalGeneration, processor: TheWorldProcessor, images: list) -> list[torch.Tensor]:
    """Float32 latents of images, one [z, h, w] for each."""
    device = next(model.model.world_encoder.parameters()).device
    latents: list[torch.Tensor] = []
    for start in range(0, len(images), IMAGES_PER_BATCH):
        inputs = processor(images=images[start : start + IMAGES_PER_BATCH], return_tensors="pt").to(device)
        with torch.no_grad():
            encoded = model.get_world_latents(inputs["pixel_values"], inputs.get("image_sizes"))
        latents += [each.float().cpu() for each in encoded]
    return latents


def precompute(
    model: str,
    dataset: str,
    split: str,
    output_dir: Path,
    rows_per_shard: int,
    dtype: str,
    image_root: Path | None = None,
) -> None:
    """
    Writes the shards that are missing in `output_dir`; of several processes, each writes its share of all shards.

    Args:
        model: Folder or Hub repo of a TheWorld checkpoint.
        dataset, split, image_root: See [`load_conversations`].
        output_dir: A new folder, or the folder of an interrupted run with the same options.
        rows_per_shard: Rows in each shard; the last may have fewer.
        dtype: Stored dtype, "float32" or "float16".

    Raises:
        ValueError: If `rows_per_shard` is less than 1, a row cannot be trained on, or `output_dir` contains latents of
            another encoder, dataset or format.
    """
    if rows_per_shard < 1:
        raise ValueError(f"--rows-per-shard must be at least 1, got {rows_per_shard}.")
    processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
    processor.world, processor.vision = True, False
    context = AutoConfig.from_pretrained(model, trust_remote_code=True).text_config.max_position_embeddings
    rows = load_conversations(dataset, split, ConversationCollator(processor, context), image_root)
    rank, processes, local_rank = (int(os.environ.get(n, d)) for n, d in LAUNCHED.items())
    encoder = load_encoder(model)
    encoder.model.world_encoder.to(f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu")
    ratio = encoder.config.world_config.spatial_compression_ratio
    manifest = Manifest(
        encoder=encoder_fingerprint(checkpoint_folder(model)),
        dataset=dataset,
        split=split,
        rows=len(rows),
        rows_per_shard=rows_per_shard,
        channels=encoder.config.world_config.z_dim,
        dtype=dtype,
        content=content_of(rows),
    )
    file = output_dir / MANIFEST
    if file.exists() and json.loads(file.read_text()) != asdict(manifest):
        raise ValueError(
            f"{output_dir} contains latents of another encoder, dataset or format. Choose another --output-dir."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    unfinished = output_dir / f".{MANIFEST}-{rank}"
    unfinished.write_text(json.dumps(asdict(manifest), indent=2) + "\n")
    unfinished.replace(file)  # in one step, because other processes read it

    shards = list(enumerate(manifest.shards))[rank::processes]
    with tqdm(shards, desc="latents", unit="shard", disable=rank > 0) as progress:
        for number, shard in progress:
            some = rows.select(range(number * rows_per_shard, min((number + 1) * rows_per_shard, len(rows))))
            if not (output_dir / shard).exists():
                latents = iter(encode(encoder, processor, [image for images in some["images"] for image in images]))
                of_rows = [[next(latents) for _ in images] for images in some["images"]]
                flat = [np.concatenate([[], *map(np.ravel, of_row)]).astype(dtype) for of_row in of_rows]
                sizes = [[[ratio * side for side in latent.shape[1:]] for latent in of_row] for of_row in of_rows]
                encoded = some.remove_columns("images")
                encoded = encoded.add_column("world_latents", flat, feature=List(Value(dtype)))
                encoded = encoded.add_column("image_sizes", sizes, feature=List(List(Value("int32"))))
                with atomic_folder(output_dir / shard, overwrite=False) as partial:
                    encoded.save_to_disk(partial)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="theworld precompute-latents", description="Encode the images of a dataset once, for theworld train."
    )
    add = parser.add_argument
    add("--model", required=True, metavar="PATH_OR_REPO", help="model whose encoder to use")
    add("--dataset", required=True, metavar="PATH_OR_REPO", help="dataset of conversations (see theworld train)")
    add("--output-dir", required=True, type=Path, metavar="DIR", help="folder of latents to write, or to complete")
    add("--image-root", type=Path, metavar="DIR", help="folder of the dataset's image paths (that of the dataset)")
    add("--split", default="train", metavar="NAME", help="split to encode (%(default)s)")
    add("--dtype", default="float16", choices=("float16", "float32"), help="dtype of the stored latents (%(default)s)")
    add("--rows-per-shard", type=int, default=500, metavar="N", help="rows in a shard (%(default)s)")
    return parser.parse_args(arguments)


def run(arguments: list[str]) -> None:
    """Runs the command with the given command-line arguments."""
    precompute(**vars(parse_arguments(arguments)))


def main(arguments: list[str] | None = None) -> int:
    return run_command("theworld precompute-latents", run, arguments)


if __name__ == "__main__":
    sys.exit(main())
