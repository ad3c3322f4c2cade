# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""Reads a folder of precomputed latents, and checks that it belongs to a model and a dataset."""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Image, List, concatenate_datasets, load_from_disk
from huggingface_hub import snapshot_download
from safetensors import safe_open

from theworld.training.data import ConversationCollator, row_errors


MANIFEST = "manifest.json"
ENCODER = "model.world_encoder."
# Fields of the image processor that change an image's pixel values.
PIXEL_FIELDS = ("size", "resample", "rescale_factor", "image_mean", "image_std", "do_rescale", "do_normalize")


@dataclass(frozen=True)
class Manifest:
    """
    Description of a folder of latents.

    Args:
        encoder: Fingerprint of the encoder's weights, the normalization and the image processor.
        dataset, split, rows: Name, split and number of rows of the encoded dataset.
        content: SHA-256 of the rows' messages and image files.
        rows_per_shard: Rows in each shard; the last may have fewer.
        channels: z of every latent [z, h, w]; h and w follow from the `image_sizes` of a row.
        dtype: Stored dtype, "float32" or "float16".
    """

    encoder: str
    dataset: str
    split: str
    rows: int
    rows_per_shard: int
    channels: int
    dtype: str
    content: str

    @property
    def shards(self) -> list[str]:
        return [f"shard-{number:05}" for number in range(-(-self.rows // self.rows_per_shard))]


def checkpoint_folder(model: str) -> Path:
    """The folder of a checkpoint's files; a Hub repo is downloaded."""
    return Path(model) if Path(model).is_dir() else Path(snapshot_download(model))


def encoder_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The encoder's tensors in a checkpoint, with their names in the model, one at a time."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                if name.startswith(ENCODER):
                    yield name, tensors.get_tensor(name)


def encoder_fingerprint(folder: Path) -> str:
    """
    A hash that is equal for two checkpoints that encode images to the same latents.

    It is computed from the files, without loading the encoder.
    """
    config = json.loads((folder / "config.json").read_text())
    encoder = config["world_config"]
    processor = json.loads((folder / "processor_config.json").read_text())
    image_processor = processor["image_processor"]
    fields = {
        "normalize_latents": config["normalize_latents"],
        **{name: encoder[name] for name in ("latents_mean", "latents_std")},
        **{name: image_processor[name] for name in PIXEL_FIELDS},
    }
    if not image_processor["do_resize"]:
        fields["do_resize"] = False
    elif "height" not in image_processor["size"]:  # sides become multiples of the patch
        fields["patch_size"] = processor["patch_size"]
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, tensor in sorted(encoder_tensors(folder)):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_latents(name: str) -> bool:
    return (Path(name) / MANIFEST).is_file()


def content_of(rows: Dataset) -> str:
    """The SHA-256 of rows: their messages and image files."""
    digest = hashlib.sha256()
    for row in rows.cast_column("images", List(Image(decode=False))):
        digest.update(json.dumps(row["messages"], sort_keys=True).encode())
        for image in row["images"]:
            content = Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
            digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def load_latents(folder: Path, model: str, collator: ConversationCollator, split: str = "train") -> Dataset:
    """
    The conversations of a folder of latents; each row has `world_latents`, a list of one [z, h, w] for each image.

    Args:
        folder: The output of `theworld precompute-latents`.
        model: Folder or Hub repo of the checkpoint to train.
        collator: The collator that will make batches of the rows.
        split: The expected split.

    Raises:
        ValueError: If encoder, image size, normalization or split differ, shards are missing, or a row cannot be
            trained on.
    """
    try:
        manifest = Manifest(**json.loads((folder / MANIFEST).read_text()))
    except TypeError as error:
        raise ValueError(
            f"{folder} was written by another version of `theworld precompute-latents`. Write a new folder."
        ) from error
    if manifest.split != split:
        raise ValueError(
            f"{folder} contains the latents of split {manifest.split!r}, got --split {split}. Give that split, or the "
            "folder of another."
        )
    if manifest.encoder != encoder_fingerprint(checkpoint_folder(model)):
        raise ValueError(
            f"The latents in {folder} were made with another encoder, image size or normalization than {model} has. "
            "Run `theworld precompute-latents` with this model and a new folder."
        )
    missing = [shard for shard in manifest.shards if not (folder / shard).is_dir()]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {len(manifest.shards)} shards: `theworld precompute-latents` was "
            "interrupted. Run it again with the same options to continue."
        )
    dataset = concatenate_datasets([load_from_disk(folder / shard) for shard in manifest.shards])
    for number, (messages, sizes) in enumerate(zip(dataset["messages"], dataset["image_sizes"], strict=True)):
        with row_errors(number):
            collator.check(messages, sizes, do_resize=False)
    ratio = collator.processor.compression_ratio

    def shaped(rows: dict[str, list]) -> dict[str, list]:
        latents = [
            split_latents(np.asarray(flat, dtype=manifest.dtype), manifest.channels, ratio, sizes)
            for flat, sizes in zip(rows["world_latents"], rows["image_sizes"], strict=True)
        ]
        return {"messages": rows["messages"], "world_latents": latents}

    return dataset.with_transform(shaped)


def split_latents(flat: np.ndarray, channels: int, ratio: int, sizes: list[list[int]]) -> list[torch.Tensor]:
    """The latents [z, h, w] of a row's images, whose sizes are in pixels, from all their numbers in a row."""
    shapes = [(channels, height // ratio, width // ratio) for height, width in sizes]
    parts = torch.from_numpy(flat).split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
