# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""Checks the files, the processor and every tensor of a checkpoint: the command `theworld verify`."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from theworld import TheWorldConfig, TheWorldForConditionalGeneration, TheWorldProcessor
from theworld.checkpoints.atomic import verify_checksums
from theworld.checkpoints.reader import PICKLED, Checkpoint, CheckpointError, check_finite
from theworld.checkpoints.sources import Source, add_source_arguments, fetch_gemma, fetch_vae
from theworld.checkpoints.tensors import plan_conversion, stored_shapes
from theworld.cli import ArgumentParser, run_command


@dataclass(frozen=True)
class Verification:
    """
    Result of a successful `verify`; its `str` is the output of the command.

    Args:
        files: Number of files with a checksum.
        parameters: Number of parameters.
        dtype: Their dtype.
        compared: Number of tensors that were compared with the sources.
    """

    files: int
    parameters: int
    dtype: str
    compared: int

    def __str__(self) -> str:
        compared = f"; {self.compared} tensors equal to their sources" if self.compared else ""
        return (
            f"{self.files} files match their checksums; {self.parameters:,} parameters in {self.dtype} are finite and "
            f"have the shapes that the config describes{compared}."
        )


def verify(folder: Path, sources: dict[str, Callable[[], torch.Tensor]] | None = None) -> Verification:
    """
    Checks a TheWorld checkpoint: checksums, config, processor, and every tensor's name, shape, dtype and values.

    Args:
        folder: A checkpoint that `theworld convert` or `theworld train` wrote.
        sources: For tensors to compare, by name: a function that loads the source tensor. It is cast to the
            checkpoint's dtype.

    Raises:
        ValueError: For the first problem found.
    """
    files = verify_checksums(folder)
    weights = (path.name for path in folder.iterdir() if path.suffix in (".safetensors", *PICKLED))
    unexpected = sorted(name for name in weights if name not in files)
    if unexpected:
        raise CheckpointError(f"{folder} contains unexpected file {unexpected[0]}. Remove it.")
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json. If it is an adapter, merge it into its model and verify that."
        )
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
            raise CheckpointError(f"Tensor {name!r} is {tensor.dtype}, but config.json says {config.dtype}.")
        check_finite(name, tensor)
        if sources and name in sources and not torch.equal(tensor, sources[name]().to(tensor.dtype)):
            raise CheckpointError(
                f"Tensor {name!r} differs from its source. It was trained, or the source is another model."
            )
    return Verification(
        files=len(files),
        parameters=sum(torch.Size(shape).numel() for shape in checkpoint.shapes.values()),
        dtype=str(config.dtype).removeprefix("torch."),
        compared=len(sources or ()),
    )


def processor_fields(config: TheWorldConfig) -> dict[str, Any]:
    """Arguments of a processor that follow from its model's config."""
    return {
        "patch_size": config.patch_size,
        "image_seq_length": config.world_config.z_dim if config.token_layout == "channel" else None,
        "compression_ratio": config.world_config.spatial_compression_ratio,
        "temporal_compression_ratio": config.world_config.temporal_compression_ratio,
        "vision_seq_length": config.mm_tokens_per_image,
        "world_first": config.world_first,
    }


def check_processor(processor: TheWorldProcessor, config: TheWorldConfig) -> None:
    """Raises a `CheckpointError` unless processor and config agree on token ids and on the sizes of inputs."""
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
                    f"{name} is {found[name]} in the processor, but {expected[name]} in config.json. Processor and "
                    "model must belong to the same checkpoint."
                )


def check_shapes(checkpoint: Checkpoint, expected: dict[str, torch.Size]) -> None:
    """Raises a `CheckpointError` unless a checkpoint has exactly these tensors, with these shapes."""
    missing, extra = sorted(set(expected) - set(checkpoint.shapes)), sorted(set(checkpoint.shapes) - set(expected))
    for names, problem in ((missing, "missing from the checkpoint"), (extra, "not part of the model")):
        if names:
            raise CheckpointError(f"{len(names)} tensor(s) are {problem}, such as {names[0]!r}.")
    for name, shape in expected.items():
        if checkpoint.shapes[name] != list(shape):
            raise CheckpointError(
                f"Tensor {name!r} is {checkpoint.shapes[name]}, but its config.json describes {list(shape)}."
            )


def verify_conversion(folder: Path, vae: Source | None, gemma: Source | None) -> Verification:
    """`verify`; with both sources, also checks that the copied tensors still equal their sources."""
    if vae is None or gemma is None:
        return verify(folder)
    plan = plan_conversion(vae, gemma, TheWorldConfig.from_pretrained(folder))
    return verify(folder, {name: partial(plan.load, name) for name in plan.sources})


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="theworld verify", description="Check a TheWorld checkpoint; write nothing.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the checkpoint")
    add_source_arguments(parser, required=False)
    args = parser.parse_args(arguments)
    if (args.vae is None) != (args.gemma is None):
        parser.error("--vae and --gemma are compared together: give both or neither")
    return args


def run(arguments: list[str]) -> None:
    """Runs the command with the given command-line arguments."""
    args = parse_arguments(arguments)
    vae = args.vae and fetch_vae(args.vae, args.vae_revision, args.vae_subfolder)
    gemma = args.gemma and fetch_gemma(args.gemma, args.gemma_revision)
    print(verify_conversion(args.folder, vae, gemma))


def main(arguments: list[str] | None = None) -> int:
    return run_command("theworld verify", run, arguments)


if __name__ == "__main__":
    sys.exit(main())
