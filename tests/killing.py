"""
Kills a command at chosen and at random moments, again and again, and looks at what it left.

Processes are forked, so that what takes long, importing, is done once. A moment is the start of one of the operations
on files that Python reports to audit hooks, or a time.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from theworld.folders import SUMS, check_sums


WATCHED = (
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "shutil.rmtree",
    "shutil.copyfile",
    "ctypes.dlsym",
)


def run_forked(run: Callable[[], object], event: int | None = None, seconds: float | None = None) -> tuple[bool, int]:
    """Whether `run` ended before it was killed, and how many operations on files it began."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code, count = 1, 0

        def watch(name: str, args: tuple) -> None:
            nonlocal count
            if name in WATCHED:
                count += 1
                if count == event:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            sys.addaudithook(watch)
            code = run() or 0
        finally:
            os.write(writing, str(count).encode())
            os._exit(code)
    os.close(writing)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as pipe:
        counted = pipe.read()
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise RuntimeError(f"It failed by itself, with exit code {os.WEXITSTATUS(status)}.")
    return os.WIFEXITED(status), int(counted or 0)


def moments(run: Callable[[], object], number: int) -> Iterator[dict]:
    """`number` moments of a run: its last operations on files, others spread over it, and random times."""
    started = time.monotonic()
    _, operations = run_forked(run)
    seconds = time.monotonic() - started
    chance = random.Random(0)
    last = range(operations, max(operations - number // 3, 0), -1)
    spread = [chance.randint(1, operations) for _ in range(number // 3)]
    yield from ({"event": event} for event in (*last, *spread))
    yield from ({"seconds": chance.uniform(0, seconds)} for _ in range(number - len(last) - len(spread)))


def state(output: Path) -> str | None:
    """What a folder holds, in a word, after all of its files were compared with their sums; None if there is none."""
    if not output.exists():
        return None
    check_sums(output)
    return (output / SUMS).read_text()


def kill_conversions(vae: str, gemma: str, output: Path, number: int) -> dict[str, int]:
    """Converts in turns to two dtypes; each time there must be one of the two, complete."""
    import convert_weights

    def convert(dtype: str) -> int:
        arguments = ["--vae", vae, "--gemma", gemma, "--output", str(output), "--image-size", "64", "--dtype", dtype]
        return convert_weights.main([*arguments, "--overwrite"])

    both = set()
    for dtype in ("bfloat16", "float32"):
        run_forked(lambda dtype=dtype: convert(dtype))
        both.add(state(output))
    tried = survived = finished = 0
    for turn, moment in enumerate(moments(lambda: convert("float32"), number)):
        dtype = ("bfloat16", "float32")[turn % 2]
        done, _ = run_forked(lambda dtype=dtype: convert(dtype), **moment)
        tried, finished = tried + 1, finished + done
        survived += state(output) in both
    run_forked(lambda: convert("float32"))
    left = len(list(output.parent.iterdir())) - 1
    return {"tried": tried, "survived": survived, "ended before": finished, "left beside": left}


def kill_trainings(model: str, dataset: str, output: Path, number: int) -> dict[str, int]:
    """Trains and saves at each step; every checkpoint that is there must be complete, and the first must stay."""
    from training import options_of

    import train

    options = {"model": model, "dataset": dataset, "output_dir": output, "save_strategy": "steps", "save_steps": 1}

    def run() -> None:
        train.main(options_of(**options, max_steps=2, train="projection"))

    tried = survived = finished = 0
    for moment in moments(run, number):
        done, _ = run_forked(run, **moment)
        tried, finished = tried + 1, finished + done
        kept = [state(folder) for folder in output.glob("checkpoint-*")]
        unfinished = not (output / SUMS).is_file()
        survived += len(kept) == 2 and (not done if unfinished else state(output) is not None)
    run_forked(run)
    left = len(list(output.parent.iterdir())) - 1
    return {"tried": tried, "survived": survived, "ended before": finished, "left beside": left}


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, first, second, output, number = sys.argv[1:]
    kill = {"conversions": kill_conversions, "trainings": kill_trainings}[kind]
    print(json.dumps(kill(first, second, Path(output), int(number))))
