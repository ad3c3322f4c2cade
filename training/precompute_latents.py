# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Encodes the images of a dataset once, to train with a frozen encoder: the command `theworld precompute-latents`.

    theworld precompute-latents --model MODEL --dataset DATASET --output-dir LATENTS
    theworld train --model MODEL --dataset LATENTS ...

A folder of latents contains a manifest and Arrow shards with conversations and the latents of their images. An
interrupted run continues after its last complete shard.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from datasets import List, Value
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoProcessor

from theworld import TheWorldForConditionalGeneration, TheWorldProcessor
from theworld.checkpoints.atomic import atomic_folder
from theworld.cli import ArgumentParser, run_command
from theworld.training.data import ConversationCollator, load_conversations
from theworld.training.latents import MANIFEST, Manifest, checkpoint_folder, content_of, encoder_fingerprint


IMAGES_PER_BATCH = 16


def encode(model: TheWorldForConditionalGeneration, processor: TheWorldProcessor, images: list) -> torch.Tensor:
    """Float32 latents [B, z, h, w] of images."""
    batches = []
    for start in range(0, len(images), IMAGES_PER_BATCH):
        pixel_values = processor(images=images[start : start + IMAGES_PER_BATCH], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            batches.append(model.get_world_latents(pixel_values.to(model.device)).float().cpu())
    return torch.cat(batches) if batches else torch.empty(0)


def precompute(model: str, dataset: str, split: str, output_dir: Path, rows_per_shard: int, dtype: str) -> None:
    """
    Writes the shards that are missing in `output_dir`.

    Args:
        model: Folder or Hub repo of a TheWorld checkpoint.
        dataset, split: See [`load_conversations`].
        output_dir: A new folder, or the folder of an interrupted run with the same options.
        rows_per_shard: Rows in each shard; the last may have fewer.
        dtype: Stored dtype, "float32" or "float16".

    Raises:
        ValueError: If `rows_per_shard` is less than 1, the model does not resize images, a row cannot be trained on,
            or `output_dir` contains latents of another encoder, dataset or format.
    """
    if rows_per_shard < 1:
        raise ValueError(f"--rows-per-shard must be at least 1, got {rows_per_shard}.")
    processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
    if not processor.image_processor.do_resize:
        raise ValueError(f"{model} does not resize images, but all latents need one size. Set `do_resize`.")
    context = AutoConfig.from_pretrained(model, trust_remote_code=True).text_config.max_position_embeddings
    rows = load_conversations(dataset, split, ConversationCollator(processor, context))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = AutoModel.from_pretrained(model, trust_remote_code=True, dtype=torch.float32).eval().to(device)
    size = processor.image_processor.size
    ratio = encoder.config.world_config.spatial_compression_ratio
    manifest = Manifest(
        encoder=encoder_fingerprint(checkpoint_folder(model)),
        dataset=dataset,
        split=split,
        rows=len(rows),
        rows_per_shard=rows_per_shard,
        shape=[encoder.config.world_config.z_dim, size["height"] // ratio, size["width"] // ratio],
        dtype=dtype,
        content=content_of(rows),
    )
    file = output_dir / MANIFEST
    if file.exists() and json.loads(file.read_text()) != asdict(manifest):
        raise ValueError(
            f"{output_dir} contains latents of another encoder, dataset or format. Choose another --output-dir."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(manifest), indent=2) + "\n")

    with tqdm(total=len(rows), desc="latents", unit="row") as progress:
        for number, shard in enumerate(manifest.shards):
            some = rows.select(range(number * rows_per_shard, min((number + 1) * rows_per_shard, len(rows))))
            if not (output_dir / shard).exists():
                counts = [len(images) for images in some["images"]]
                latents = encode(encoder, processor, [image for images in some["images"] for image in images])
                flat = [of_row.flatten().numpy().astype(dtype) for of_row in latents.split(counts)]
                encoded = some.remove_columns("images").add_column("world_latents", flat)
                with atomic_folder(output_dir / shard, overwrite=False) as unfinished:
                    encoded.cast_column("world_latents", List(Value(dtype))).save_to_disk(unfinished)
            progress.update(len(some))


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="theworld precompute-latents", description="Encode the images of a dataset once, for theworld train."
    )
    add = parser.add_argument
    add("--model", required=True, metavar="PATH_OR_REPO", help="model whose encoder to use")
    add("--dataset", required=True, metavar="PATH_OR_REPO", help="dataset of conversations (see theworld train)")
    add("--output-dir", required=True, type=Path, metavar="DIR", help="folder of latents to write, or to complete")
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
