# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""Folders of safetensors: read a tensor at a time, and checked, down to the last number, by `verify`."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from theworld import TheWorldConfig, TheWorldForConditionalGeneration, TheWorldProcessor
from theworld.checkpoints.atomic import verify_checksums


# What Python unpickles, which can run anything.
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


class CheckpointError(ValueError):
    """A checkpoint is not what it should be; the message says where and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors: which file holds each tensor, and its shape. Tensors are read one at a time."""

    files: dict[str, Path]
    shapes: dict[str, list[int]]

    @classmethod
    def open(cls, folder: Path, name: str) -> "Checkpoint":
        """Reads the headers of `{name}.safetensors`, or of the shards in `{name}.safetensors.index.json`."""
        index, single = folder / f"{name}.safetensors.index.json", folder / f"{name}.safetensors"
        listed = None
        if index.is_file():
            listed = read_index(index)
            paths = [folder / file for file in sorted(set(listed.values()))]
        elif single.is_file():
            paths = [single]
        else:
            raise CheckpointError(
                f"{folder} holds neither {single.name} nor {index.name}. Only safetensors checkpoints are read; save "
                "a pickled one (.bin, .pt, .pth) with `save_pretrained` first."
            )
        files, shapes = {}, {}
        for path in paths:
            if not path.is_file():
                raise CheckpointError(f"{index} names {path.name}, which is missing. Complete the download.")
            for key, shape in read_shapes(path).items():
                if key in files:
                    raise CheckpointError(f"{files[key].name} and {path.name} both hold {key!r}. Get {folder} again.")
                files[key], shapes[key] = path, shape
        if listed is not None and (unlike := sorted(set(listed) ^ set(files))):
            raise CheckpointError(
                f"{index} and its shards differ on {len(unlike)} tensor(s), such as {unlike[0]!r}. Get both again."
            )
        return cls(files, shapes)

    def load(self, key: str) -> torch.Tensor:
        with safe_open(self.files[key], framework="pt") as file:
            return file.get_tensor(key)


def read_index(index: Path) -> dict[str, str]:
    """Which shard, a file beside the index, holds each tensor."""
    try:
        content = json.loads(index.read_text())
        _, weight_map = content["metadata"], content["weight_map"]  # transformers needs both
        outside = [file for file in weight_map.values() if Path(file).name != file]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index} is no index of safetensors. Get it again.") from None
    if outside:
        raise CheckpointError(f"{index} names {outside[0]!r}, which is not a file beside it. Get it again.")
    return weight_map


def read_shapes(path: Path) -> dict[str, list[int]]:
    """The shape of each tensor in a complete safetensors file."""

    def refuse_duplicates(pairs: list[tuple]) -> dict:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise CheckpointError(f"{path} lists {twice!r} twice. Get it again, from elsewhere.")
        return dict(pairs)

    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no complete safetensors file ({error}). Get it again.") from None
    with path.open("rb") as file:  # of two with one name safetensors takes the last, in silence
        json.loads(file.read(int.from_bytes(file.read(8), "little")), object_pairs_hook=refuse_duplicates)
    return shapes


@dataclass(frozen=True)
class Verification:
    """What `verify` found right; its `str` is what the command prints."""

    files: int
    parameters: int
    dtype: str
    compared: int

    def __str__(self) -> str:
        compared = f", {self.compared} equal to the sources'" if self.compared else ""
        return (
            f"{self.files} files with their sums; {self.parameters:,} parameters in {self.dtype}, finite, of the "
            f"shapes that the config describes{compared}."
        )


def verify(folder: Path, sources: dict[str, Callable[[], torch.Tensor]] | None = None) -> Verification:
    """
    Checks a TheWorld checkpoint: sums, config, processor, and every tensor's name, shape, dtype and numbers.

    Args:
        folder: A checkpoint that convert_weights.py or train.py wrote.
        sources: What gives the tensors that some of the checkpoint's should be equal to, in its dtype.

    Raises:
        ValueError: For the first thing that is not right.
    """
    files = verify_checksums(folder)
    weights = (path.name for path in folder.iterdir() if path.suffix in (".safetensors", *PICKLED))
    foreign = sorted(name for name in weights if name not in files)
    if foreign:
        raise CheckpointError(f"{folder} holds {foreign[0]}, which nothing here wrote. Take it away.")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json. Of an adapter, merge it into its model, and verify that.")
    try:
        config = TheWorldConfig.from_pretrained(folder)
    except StrictDataclassError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    check_processor(TheWorldProcessor.from_pretrained(folder), config)

    with torch.device("meta"):
        expected = stored_shapes(TheWorldForConditionalGeneration(config))
    checkpoint = Checkpoint.open(folder, "model")
    check_shapes(checkpoint, expected)
    for name in checkpoint.files:
        tensor = checkpoint.load(name)
        if tensor.dtype != config.dtype:
            raise CheckpointError(f"Tensor {name!r} is {tensor.dtype}, and config.json says {config.dtype}.")
        check_finite(name, tensor)
        if sources and name in sources and not torch.equal(tensor, sources[name]().to(tensor.dtype)):
            raise CheckpointError(
                f"Tensor {name!r} differs from its source's. It was trained, or is of another model."
            )
    return Verification(
        files=len(files),
        parameters=sum(torch.Size(shape).numel() for shape in checkpoint.shapes.values()),
        dtype=str(config.dtype).removeprefix("torch."),
        compared=len(sources or ()),
    )


def stored_shapes(model: TheWorldForConditionalGeneration) -> dict[str, torch.Size]:
    """The shapes of the tensors that a checkpoint of `model` holds: all but those tied to others."""
    tied = model.all_tied_weights_keys
    return {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}


def processor_fields(config: TheWorldConfig) -> dict[str, Any]:
    """What a processor has of its model's config."""
    return {
        "patch_size": config.patch_size,
        "image_seq_length": config.world_config.z_dim if config.token_layout == "channel" else None,
        "compression_ratio": config.world_config.spatial_compression_ratio,
        "temporal_compression_ratio": config.world_config.temporal_compression_ratio,
        "vision_seq_length": config.mm_tokens_per_image,
        "world_first": config.world_first,
    }


def check_processor(processor: TheWorldProcessor, config: TheWorldConfig) -> None:
    """Raises a `CheckpointError` unless a processor makes the tokens that the config's model reads."""
    expected_ids = {
        processor.image_token: config.image_token_id,
        processor.start_of_world_token: config.start_of_world_token_id,
        processor.end_of_world_token: config.end_of_world_token_id,
        processor.video_token: config.video_token_id,
    }
    tokenizer = processor.tokenizer
    if config.vision_config is not None:
        expected_ids |= {
            tokenizer.image_token: config.vision_token_id,
            tokenizer.boi_token: config.boi_token_id,
            tokenizer.eoi_token: config.eoi_token_id,
        }
    ids = {token: tokenizer.get_vocab().get(token) for token in expected_ids}
    expected_fields = processor_fields(config)
    fields = {name: getattr(processor, name) for name in expected_fields}
    for found, expected in ((ids, expected_ids), (fields, expected_fields)):
        for name in expected:
            if found[name] != expected[name]:
                raise CheckpointError(
                    f"{name} is {found[name]} to the processor, and {expected[name]} by config.json. Processor and "
                    "model must be of the same checkpoint."
                )


def check_shapes(checkpoint: Checkpoint, expected: dict[str, torch.Size]) -> None:
    """Raises a `CheckpointError` unless a checkpoint has exactly these tensors, of these shapes."""
    missing, extra = sorted(set(expected) - set(checkpoint.shapes)), sorted(set(checkpoint.shapes) - set(expected))
    for names, problem in ((missing, "missing from the checkpoint"), (extra, "none of the model's")):
        if names:
            raise CheckpointError(f"{len(names)} tensor(s) are {problem}, such as {names[0]!r}.")
    for name, shape in expected.items():
        if checkpoint.shapes[name] != list(shape):
            raise CheckpointError(
                f"Tensor {name!r} is {checkpoint.shapes[name]}, but its config.json describes {list(shape)}."
            )


def check_finite(name: str, tensor: torch.Tensor) -> None:
    if not all(extreme.isfinite() for extreme in tensor.aminmax()):
        raise CheckpointError(f"Tensor {name!r} holds NaN or infinity as {tensor.dtype}.")
