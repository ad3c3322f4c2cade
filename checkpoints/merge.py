# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""Merges an adapter into the checkpoint that it was trained on: the command `theworld merge`."""

import argparse
import sys
from pathlib import Path

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.utils import PROCESSOR_NAME, cached_file

from theworld.checkpoints.atomic import atomic_folder, write_checksums
from theworld.checkpoints.verify import verify
from theworld.cli import ArgumentParser, run_command


def read_base(adapter: str, model: str | None) -> str:
    """
    The checkpoint that an adapter was trained on: `model`, or the one that the adapter names.

    Raises:
        ValueError: If there is no adapter or no checkpoint, or the checkpoint is not a TheWorld.
    """
    try:
        base = model or PeftConfig.from_pretrained(adapter).base_model_name_or_path
    except ValueError as error:
        raise ValueError(
            f"{adapter} is not an adapter: it has no adapter_config.json. Give the folder or Hub repo that `theworld "
            "train --train projection` or `--train lora` wrote."
        ) from error
    try:
        model_type = AutoConfig.from_pretrained(base, trust_remote_code=True).model_type
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{adapter} was trained on {base}, which cannot be loaded. Run the command where it is found, or name it "
            "with --model."
        ) from error
    if model_type != "theworld":
        raise ValueError(f"{base} is a {model_type} model, but the adapter needs a TheWorld. Name it with --model.")
    return base


def processor_source(adapter: str, base: str) -> str:
    """Where the processor is: in the adapter, whose training may have set its switches, or else in the base."""
    found = cached_file(adapter, PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False)
    return base if found is None else adapter


def load_adapted(base: str, adapter: str) -> PeftModel:
    """
    An adapter on its base.

    Raises:
        ValueError: If the base has other tensors than the adapter was trained on. PEFT would leave some out.
    """
    try:
        adapted = PeftModel.from_pretrained(AutoModel.from_pretrained(base, trust_remote_code=True), adapter)
        fits = (
            get_peft_model_state_dict(adapted, save_embedding_layers=False).keys() == load_peft_weights(adapter).keys()
        )
    except (KeyError, RuntimeError):
        fits = False
    if not fits:
        raise ValueError(f"{adapter} does not fit {base}. Name the checkpoint that it was trained on with --model.")
    return adapted


def merge(adapter: str, output: Path, model: str | None = None, overwrite: bool = False) -> None:
    """
    Writes the checkpoint that an adapter and its base make together, in the dtype of the base, with checksums.

    Args:
        adapter: Folder or Hub repo of an adapter.
        output: A folder that is absent or empty, unless `overwrite`.
        model: The base checkpoint, if it is not where the adapter says.
        overwrite: Whether to replace the contents of `output`.

    Raises:
        ValueError: If the adapter or its base cannot be loaded, or they do not fit, or `output` is one of them.
        FileExistsError: If `output` is not empty, and `overwrite` is False.
    """
    base = read_base(adapter, model)
    if output.resolve() in (Path(adapter).resolve(), Path(base).resolve()):
        raise ValueError(f"--output-dir is {output}, which the merge reads. Choose another folder.")
    with atomic_folder(output.absolute(), overwrite) as folder:
        adapted = load_adapted(base, adapter)
        dtype = adapted.config.dtype  # what an adapter trains is float32
        adapted.merge_and_unload(safe_merge=True).to(dtype).save_pretrained(folder)
        AutoProcessor.from_pretrained(processor_source(adapter, base), trust_remote_code=True).save_pretrained(folder)
        write_checksums(folder)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="theworld merge", description="Merge an adapter into the checkpoint it was trained on."
    )
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", help="folder or Hub repo of an adapter that `theworld train` wrote")
    add("--output-dir", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--model", metavar="PATH_OR_REPO", help="the checkpoint it was trained on (the one that the adapter names)")
    add("--overwrite", action="store_true", help="replace the contents of --output-dir")
    return parser.parse_args(arguments)


def run(arguments: list[str]) -> None:
    """Runs the command with the given command-line arguments."""
    args = parse_arguments(arguments)
    merge(args.adapter, args.output_dir, args.model, args.overwrite)
    print(verify(args.output_dir))


def main(arguments: list[str] | None = None) -> int:
    return run_command("theworld merge", run, arguments)


if __name__ == "__main__":
    sys.exit(main())
