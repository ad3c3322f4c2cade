# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
The command `theworld`: finds a command by its name, and reports bad input in one line.

`python -m theworld.cli` is the same, for launchers: `torchrun -m theworld.cli train ...`.
"""

import argparse
import importlib
import sys
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from theworld import __version__


# Raised for bad input. Any other error is a bug, and keeps its traceback.
USER_ERRORS = (OSError, SafetensorError, StrictDataclassError, TypeError, ValueError)


class Command(NamedTuple):
    """
    Args:
        help: What the command does.
        module: Module of its `main`, which takes the command-line arguments and returns the exit code.
        extra: Extra in pyproject.toml that installs the libraries it needs, if any.
    """

    help: str
    module: str
    extra: str | None = None


COMMANDS = {
    "convert": Command("join a Wan VAE and a Gemma into a checkpoint", "theworld.convert_weights"),
    "verify": Command("check a checkpoint's files, processor and tensors", "theworld.checkpoints.verify"),
    "train": Command("fine-tune a checkpoint on conversations", "theworld.training.train", extra="train"),
    "precompute-latents": Command(
        "encode a dataset's images once, for train", "theworld.training.precompute_latents", extra="train"
    ),
    "merge": Command(
        "merge an adapter into the checkpoint it was trained on", "theworld.checkpoints.merge", extra="train"
    ),
    "evaluate": Command(
        "score a checkpoint on benchmarks, with and without world tokens",
        "theworld.evaluation.evaluate",
        extra="harness",
    ),
    "ask": Command("ask about an image or a video", "theworld.demo.ask"),
    "app": Command("serve a web page to ask about images", "theworld.demo.app", extra="web"),
}


class OneLineErrors:
    """A mixin for argument parsers: wrong arguments raise a ValueError, and the usage is not printed."""

    prog: str

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


class ArgumentParser(OneLineErrors, argparse.ArgumentParser):
    """argparse's parser, with errors in one line."""


def run_command(name: str, command: Callable[[list[str]], object], arguments: list[str] | None) -> int:
    """
    Runs a command with the given command-line arguments (None: those of this process).

    Returns:
        The exit code: 0, or 1 after bad input, which is reported in one line on stderr.
    """
    try:
        command(sys.argv[1:] if arguments is None else arguments)
    except USER_ERRORS as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def make_parser() -> ArgumentParser:
    """The parser of the first argument, which names the command."""
    listed = "\n".join(f"  {name:<20}{command.help}" for name, command in COMMANDS.items())
    parser = ArgumentParser(
        prog="theworld",
        usage="theworld COMMAND [options]",
        description=f"commands:\n{listed}",
        epilog="`theworld COMMAND --help` lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command that the first argument names; returns its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] not in COMMANDS:
        return run_command("theworld", make_parser().parse_args, words[:1])
    name, command = words[0], COMMANDS[words[0]]
    try:
        module = importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        if command.extra is None:
            raise
        remedy = f"In a clone, run `pip install -e '.[{command.extra}]'`."
        print(f"theworld {name}: error: {error.name} is not installed. {remedy}", file=sys.stderr)
        return 1
    return module.main(words[1:])


if __name__ == "__main__":
    sys.exit(main())
