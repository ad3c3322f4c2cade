# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""Atomic folders and checksums."""

import ctypes
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


try:
    import fcntl
except ImportError:  # Windows, where leftovers of a killed run are not removed
    fcntl = None  # type: ignore[assignment]

CHECKSUMS = "SHA256SUMS"
# The model card is meant to be edited, so it has no checksum.
WITHOUT_CHECKSUM = (CHECKSUMS, "README.md")
# Flags of renameat2(2): paths are relative to the working folder; swap the two paths.
AT_FDCWD, RENAME_EXCHANGE = -100, 2


@contextmanager
def atomic_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """
    Yields a temporary folder next to `output`, which replaces `output` at the end. Until then `output` is unchanged.

    This also holds if the process is killed at any moment. The next run removes the temporary folder of a killed one.

    Raises:
        OSError: If a folder next to `output` cannot be created, or cannot replace it.
        FileExistsError: If `output` is not empty and may not be replaced, or is not a folder. If two runs write the
            same folder, the later one fails.
    """
    if output.exists() and not (output.is_dir() and (overwrite or not any(output.iterdir()))):
        raise already_there(output)
    check_replaceable(output)
    restore_or_remove_abandoned(output)
    partial = sibling(output, "partial")
    partial.mkdir()
    lock = try_lock(partial)
    try:
        yield partial
        replace_folder(partial, output, overwrite)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def already_there(output: Path) -> FileExistsError:
    remedy = "Choose another --output-dir, or pass --overwrite." if output.is_dir() else "It is not a folder."
    return FileExistsError(f"{output} exists and holds something. {remedy}")


def check_replaceable(output: Path) -> None:
    """Raises an `OSError`, before any work is done, if a folder next to `output` could not replace `output`."""
    if output.is_mount():
        raise OSError(f"{output} is the root of a disk, which cannot be replaced as a whole. Name a folder in it.")
    output.parent.mkdir(parents=True, exist_ok=True)
    attempt = sibling(output, "partial")
    attempt.mkdir()
    attempt.rmdir()


def sibling(output: Path, kind: str) -> Path:
    return output.with_name(f".{output.name}.{uuid4().hex}.{kind}")


def try_lock(folder: Path) -> int | None:
    """A lock on a folder, released when the process ends; None if it is not available."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def replace_folder(partial: Path, output: Path, overwrite: bool) -> None:
    """Renames `partial` to `output`; on Linux, which can swap two folders, in one step."""
    try:
        partial.rename(output)  # works if `output` is absent or an empty folder
        return
    except OSError:
        if not output.exists():
            raise
    if not overwrite:
        raise already_there(output)
    if exchange(partial, output):
        shutil.rmtree(partial, ignore_errors=True)
        return
    previous = sibling(output, "previous")
    output.rename(previous)
    partial.rename(output)
    shutil.rmtree(previous, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step; returns False if the system cannot."""
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "renameat2"):
        return False
    return libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def restore_or_remove_abandoned(output: Path) -> None:
    """Removes leftovers of killed runs next to `output`; restores `output` if one had just moved it away."""
    pattern = re.compile(rf"\.{re.escape(output.name)}\.[0-9a-f]{{32}}\.(partial|previous)")
    for path in output.parent.iterdir():
        match pattern.fullmatch(path.name):
            case None:
                continue
            case found if found[1] == "previous" and not output.exists():
                path.rename(output)
            case _ if fcntl is not None and (lock := try_lock(path)) is not None:  # no running process writes it
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def carry_over(output: Path, partial: Path) -> None:
    """
    Copies files of `output` without a checksum (checkpoints, logs) into `partial`, which will replace `output`.

    Files are hard-linked if possible, which takes neither time nor disk space.
    """
    written = set(read_checksums(output)) if (output / CHECKSUMS).is_file() else set()

    def replaced(folder: str, names: list[str]) -> list[str]:
        paths = {name: (Path(folder) / name).relative_to(output) for name in names}
        return [name for name, path in paths.items() if path.as_posix() in written or (partial / path).is_file()]

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:  # across disks, or on file systems without hard links
            shutil.copy2(source, target)

    if output.is_dir():
        shutil.copytree(output, partial, symlinks=True, ignore=replaced, copy_function=link, dirs_exist_ok=True)


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_checksums(folder: Path) -> None:
    """Writes the checksums of all files except the model card, in the format of `sha256sum --check`."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in WITHOUT_CHECKSUM)
    files = sorted(path.relative_to(folder) for path in paths)
    (folder / CHECKSUMS).write_text("".join(f"{sha256(folder / file)}  {file.as_posix()}\n" for file in files))


def verify_checksums(folder: Path) -> list[str]:
    """
    Compares a folder's files with its checksums; returns their names.

    Raises:
        ValueError: If there are no checksums, or a file is missing or differs.
    """
    checksums = read_checksums(folder)
    for name, expected in checksums.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder} lacks {name}, which its {CHECKSUMS} lists. Download it again.")
        if sha256(folder / name) != expected:
            raise ValueError(f"{folder / name} is not the original file: its SHA-256 differs. Download it again.")
    return list(checksums)


def read_checksums(folder: Path) -> dict[str, str]:
    """The checksums that a folder lists, by file name."""
    if not (folder / CHECKSUMS).is_file():
        raise ValueError(
            f"{folder} has no {CHECKSUMS}, which `theworld convert` and `theworld train` write. Only "
            "folders that one of them wrote can be verified. Download it again if it lost the file."
        )
    lines = (line.partition("  ") for line in (folder / CHECKSUMS).read_text().splitlines())
    return {name: expected for expected, _, name in lines}
