# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""Reads safetensors folders: checks the headers, and loads one tensor at a time."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open


# Pickle formats, which can execute code.
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


class CheckpointError(ValueError):
    """An invalid checkpoint; the message says what is wrong, where, and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A safetensors folder: the file and the shape of each tensor."""

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
                f"{folder} has neither {single.name} nor {index.name}. Only safetensors checkpoints are read; convert "
                "a pickled one (.bin, .pt, .pth) with `save_pretrained` first."
            )
        files: dict[str, Path] = {}
        shapes: dict[str, list[int]] = {}
        for path in paths:
            if not path.is_file():
                raise CheckpointError(f"{index} names {path.name}, which is missing. Complete the download.")
            for key, shape in read_shapes(path).items():
                if key in files:
                    both = f"{files[key].name} and {path.name}"
                    raise CheckpointError(f"{both} contain {key!r}. Download {folder} again.")
                files[key], shapes[key] = path, shape
        if listed is not None and (unlike := sorted(set(listed) ^ set(files))):
            raise CheckpointError(
                f"{index} and its shards differ on {len(unlike)} tensor(s), such as {unlike[0]!r}. Download "
                "both again."
            )
        return cls(files, shapes)

    def load(self, key: str) -> torch.Tensor:
        with safe_open(self.files[key], framework="pt") as file:
            return file.get_tensor(key)


def read_index(index: Path) -> dict[str, str]:
    """The shard of each tensor, a file in the folder of the index."""
    try:
        content = json.loads(index.read_text())
        _, weight_map = content["metadata"], content["weight_map"]  # transformers needs both
        outside = [file for file in weight_map.values() if Path(file).name != file]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index} is not a safetensors index. Download it again.") from None
    if outside:
        raise CheckpointError(f"{index} names {outside[0]!r}, which is not a file in its folder. Download it again.")
    return weight_map


def read_shapes(path: Path) -> dict[str, list[int]]:
    """The shape of each tensor in a complete safetensors file."""

    def refuse_duplicates(pairs: list[tuple]) -> dict:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise CheckpointError(f"{path} lists {twice!r} twice. Download it again from a trusted source.")
        return dict(pairs)

    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a complete safetensors file ({error}). Download it again.") from None
    with path.open("rb") as file:  # safetensors silently takes the last of two tensors with one name
        json.loads(file.read(int.from_bytes(file.read(8), "little")), object_pairs_hook=refuse_duplicates)
    return shapes


def check_finite(name: str, tensor: torch.Tensor) -> None:
    if not all(extreme.isfinite() for extreme in tensor.aminmax()):
        raise CheckpointError(f"Tensor {name!r} contains NaN or infinity in {tensor.dtype}.")
