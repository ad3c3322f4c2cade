# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""Folders that appear complete or not at all, whenever their writer dies; and the sums of their files."""

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
except ImportError:  # Windows, where what a killed run left stays
    fcntl = None

CHECKSUMS = "SHA256SUMS"
# The card is for people to go on writing, and sums of it would soon be wrong.
WITHOUT_CHECKSUM = (CHECKSUMS, "README.md")
# Of renameat2(2): paths are relative to the working folder; swap the two.
AT_FDCWD, RENAME_EXCHANGE = -100, 2


@contextmanager
def atomic_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """
    Gives a folder beside `output` to fill, which becomes `output` at the end; until then nothing has changed.

    That holds if the process is killed, too, at any moment: the next run removes what the killed one left beside.

    Raises:
        OSError: If no folder beside `output` can be made, or become it.
        FileExistsError: If `output` holds something and may not be replaced, or is no folder. Of two runs that write
            the same, that is the one that ends second.
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
    remedy = "Choose another --output, or pass --overwrite." if output.is_dir() else "It is not a folder."
    return FileExistsError(f"{output} exists and holds something. {remedy}")


def check_replaceable(output: Path) -> None:
    """Raises an `OSError`, before work is done in vain, if no folder beside `output` could become `output`."""
    if output.is_mount():
        raise OSError(f"{output} is a disk's root, which cannot be replaced as a whole. Name a folder in it.")
    output.parent.mkdir(parents=True, exist_ok=True)
    attempt = sibling(output, "partial")
    attempt.mkdir()
    attempt.rmdir()


def sibling(output: Path, kind: str) -> Path:
    return output.with_name(f".{output.name}.{uuid4().hex}.{kind}")


def try_lock(folder: Path) -> int | None:
    """A lock on a folder, which ends with the process; None where there are no locks."""
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
    """`partial` becomes `output`, in one step where the system has one that swaps two folders (Linux)."""
    try:
        partial.rename(output)  # to where nothing is, or an empty folder
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
    """Swaps two folders in one step; False where there is no such step."""
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "renameat2"):
        return False
    return libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def restore_or_remove_abandoned(output: Path) -> None:
    """Removes what killed runs left beside `output`; puts back what one had only just moved away."""
    pattern = re.compile(rf"\.{re.escape(output.name)}\.[0-9a-f]{{32}}\.(partial|previous)")
    for path in output.parent.iterdir():
        match pattern.fullmatch(path.name):
            case None:
                continue
            case found if found[1] == "previous" and not output.exists():
                path.rename(output)
            case _ if fcntl is not None and (lock := try_lock(path)) is not None:  # nobody is at work on it
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def carry_over(output: Path, partial: Path) -> None:
    """
    Gives `partial`, which is to replace `output`, what that holds beside the files of its sums: checkpoints, logs.

    They are the same files under two names, where the file system can do that, so that it costs neither time nor room.
    """
    written = set(read_checksums(output)) if (output / CHECKSUMS).is_file() else set()

    def replaced(folder: str, names: list[str]) -> list[str]:
        paths = {name: (Path(folder) / name).relative_to(output) for name in names}
        return [name for name, path in paths.items() if path.as_posix() in written or (partial / path).is_file()]

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:  # between disks, or where there are no links
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
    """Writes the sums of a folder's files but its card's, in the form that `sha256sum --check` reads."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in WITHOUT_CHECKSUM)
    files = sorted(path.relative_to(folder) for path in paths)
    (folder / CHECKSUMS).write_text("".join(f"{sha256(folder / file)}  {file.as_posix()}\n" for file in files))


def verify_checksums(folder: Path) -> list[str]:
    """
    Compares a folder's files with its sums; gives their names.

    Raises:
        ValueError: If there are no sums, or a file is missing or another.
    """
    sums = read_checksums(folder)
    for name, expected in sums.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder} lacks {name}, which its {CHECKSUMS} lists. Get it again.")
        if sha256(folder / name) != expected:
            raise ValueError(f"{folder / name} is not the file that was written: its sha256 differs. Get it again.")
    return list(sums)


def read_checksums(folder: Path) -> dict[str, str]:
    """The sum of each of a folder's files, by its name."""
    if not (folder / CHECKSUMS).is_file():
        raise ValueError(
            f"{folder} has no {CHECKSUMS}, which convert_weights.py and train.py write. Write or get it again."
        )
    lines = (line.partition("  ") for line in (folder / CHECKSUMS).read_text().splitlines())
    return {name: expected for expected, _, name in lines}
