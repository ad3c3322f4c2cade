# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Encodes a dataset's images once, for training whose encoder stays as it is.

    python precompute_latents.py --model MODEL --dataset DATASET --output FOLDER
    python train.py --model MODEL --dataset FOLDER ...

A folder of latents holds a manifest, and Arrow shards with the conversations of some rows and their images' latents. A
run that was interrupted goes on after its last shard.
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, Image, List, Value, concatenate_datasets, load_from_disk
from huggingface_hub import snapshot_download
from safetensors import safe_open
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedModel, ProcessorMixin

from theworld.checkpoints.atomic import atomic_folder
from theworld.training.data import ConversationCollator, load_conversations, named


MANIFEST = "manifest.json"
ENCODER = "model.world_encoder."
IMAGES_PER_BATCH = 16
# Fields of the image processor that decide which pixels an image becomes.
READING = ("size", "resample", "rescale_factor", "image_mean", "image_std", "do_rescale", "do_normalize")


@dataclass(frozen=True)
class Manifest:
    """
    What a folder of latents is made of.

    Args:
        encoder: Fingerprint of the encoder's weights, of the normalization and of how images become pixels.
        dataset, split, rows: What was encoded.
        content: SHA-256 of the rows' messages and image files.
        rows_a_shard: Rows that each shard but the last holds.
        shape: [z, h, w] of every latent.
        dtype: "float32" or "float16", as stored.
    """

    encoder: str
    dataset: str
    split: str
    rows: int
    rows_a_shard: int
    shape: list[int]
    dtype: str
    content: str

    @property
    def shards(self) -> list[str]:
        return [f"shard-{number:05}" for number in range(-(-self.rows // self.rows_a_shard))]


def checkpoint_folder(model: str) -> Path:
    """The folder of a checkpoint's files, which a repo of the Hub is downloaded to."""
    return Path(model) if Path(model).is_dir() else Path(snapshot_download(model))


def encoder_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The encoder's tensors in a checkpoint, under their names in the model, read one at a time."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                if name.startswith(ENCODER):
                    yield name, tensors.get_tensor(name)


def fingerprint(folder: Path) -> str:
    """
    Two checkpoints have the same fingerprint if they make the same latents of an image.

    It is made of the files alone, so that the encoder need not be loaded for it.
    """
    config = json.loads((folder / "config.json").read_text())
    encoder = config["world_config"]
    image_processor = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    reading = {
        "normalize_latents": config["normalize_latents"],
        **{name: encoder[name] for name in ("latents_mean", "latents_std")},
        **{name: image_processor[name] for name in READING},
    }
    digest = hashlib.sha256(json.dumps(reading, sort_keys=True).encode())
    for name, tensor in sorted(encoder_tensors(folder)):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def is_latents(name: str) -> bool:
    return (Path(name) / MANIFEST).is_file()


def content_of(rows: Dataset) -> str:
    """The SHA-256 of what rows hold: their messages, and the files of their images."""
    digest = hashlib.sha256()
    for row in rows.cast_column("images", List(Image(decode=False))):
        digest.update(json.dumps(row["messages"], sort_keys=True).encode())
        for image in row["images"]:
            content = Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
            digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def load_latents(folder: Path, model: str, collator: ConversationCollator, split: str = "train") -> Dataset:
    """
    The conversations of a folder that this script wrote, with `world_latents` [images, z, h, w] in each row.

    Args:
        folder: What this script wrote.
        model: Folder or Hub repo of the checkpoint that will train on them.
        collator: What will make batches of the rows.
        split: Which split they must be of.

    Raises:
        ValueError: If the latents are of another encoder, image size or normalization than the model's, or of another
            split; if some are missing; or if a row cannot be trained on.
    """
    manifest = Manifest(**{"content": "", **json.loads((folder / MANIFEST).read_text())})
    if manifest.split != split:
        raise ValueError(f"{folder} holds the latents of split {manifest.split!r}, got --split {split}.")
    if manifest.encoder != fingerprint(checkpoint_folder(model)):
        raise ValueError(
            f"The latents in {folder} were made with another encoder, image size or normalization than those of "
            f"{model}. Run precompute_latents.py with this model, into a new folder."
        )
    missing = [shard for shard in manifest.shards if not (folder / shard).is_dir()]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {len(manifest.shards)} shards: precompute_latents.py was interrupted. "
            "Run it again with the same options; it goes on where it stopped."
        )
    dataset = concatenate_datasets([load_from_disk(folder / shard) for shard in manifest.shards])
    ratio = collator.processor.compression_ratio
    size = [ratio * side for side in manifest.shape[1:]]
    numbers = pc.list_value_length(dataset.select_columns(["world_latents"]).with_format("arrow")[:]["world_latents"])
    for number, (messages, flat) in enumerate(zip(dataset["messages"], numbers.to_pylist(), strict=True)):
        with named(number):
            collator.check(messages, [size] * (flat // math.prod(manifest.shape)))

    def shaped(rows: dict[str, list]) -> dict[str, list]:
        latents = [
            np.asarray(flat, dtype=manifest.dtype).reshape(-1, *manifest.shape) for flat in rows["world_latents"]
        ]
        return {"messages": rows["messages"], "world_latents": [torch.from_numpy(of_row) for of_row in latents]}

    return dataset.with_transform(shaped)


def encode(model: PreTrainedModel, processor: ProcessorMixin, images: list) -> torch.Tensor:
    """Latents [B, z, h, w] of images, in float32."""
    batches = []
    for start in range(0, len(images), IMAGES_PER_BATCH):
        pixel_values = processor(images=images[start : start + IMAGES_PER_BATCH], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            batches.append(model.get_world_latents(pixel_values.to(model.device)).float().cpu())
    return torch.cat(batches) if batches else torch.empty(0)


def precompute(model: str, dataset: str, split: str, output: Path, rows_a_shard: int, dtype: str) -> None:
    """Writes the shards that `output` does not hold; see the top of this file."""
    processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
    if not processor.image_processor.do_resize:
        raise ValueError(f"{model} keeps images at their own sizes, but latents must have one. Set `do_resize`.")
    context = AutoConfig.from_pretrained(model, trust_remote_code=True).text_config.max_position_embeddings
    rows = load_conversations(dataset, split, ConversationCollator(processor, context))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = AutoModel.from_pretrained(model, trust_remote_code=True, dtype=torch.float32).eval().to(device)
    size = processor.image_processor.size
    ratio = encoder.config.world_config.spatial_compression_ratio
    manifest = Manifest(
        encoder=fingerprint(checkpoint_folder(model)),
        dataset=dataset,
        split=split,
        rows=len(rows),
        rows_a_shard=rows_a_shard,
        shape=[encoder.config.world_config.z_dim, size["height"] // ratio, size["width"] // ratio],
        dtype=dtype,
        content=content_of(rows),
    )
    file = output / MANIFEST
    if file.exists() and json.loads(file.read_text()) != asdict(manifest):
        raise ValueError(f"{output} holds latents of another encoder, dataset or form. Choose another --output.")
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(manifest), indent=2) + "\n")

    with tqdm(total=len(rows), desc="latents", unit="row") as progress:
        for number, shard in enumerate(manifest.shards):
            some = rows.select(range(number * rows_a_shard, min((number + 1) * rows_a_shard, len(rows))))
            if not (output / shard).exists():
                counts = [len(images) for images in some["images"]]
                latents = encode(encoder, processor, [image for images in some["images"] for image in images])
                flat = [of_row.flatten().numpy().astype(dtype) for of_row in latents.split(counts)]
                encoded = some.remove_columns("images").add_column("world_latents", flat)
                with atomic_folder(output / shard, overwrite=False) as unfinished:
                    encoded.cast_column("world_latents", List(Value(dtype))).save_to_disk(unfinished)
            progress.update(len(some))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Encode a dataset's images once, for train.py.")
    parser.add_argument("--model", required=True, metavar="FOLDER_OR_REPO", help="whose encoder it is")
    parser.add_argument("--dataset", required=True, metavar="FILE_FOLDER_OR_REPO", help="as train.py takes it")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--split", default="train", help="%(default)s")
    parser.add_argument("--dtype", default="float16", choices=("float16", "float32"), help="%(default)s")
    parser.add_argument("--rows-a-shard", type=int, default=500, metavar="N", help="%(default)s")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    try:
        precompute(**vars(parse_arguments(arguments)))
    except (ValueError, OSError) as error:
        print(f"precompute_latents.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
