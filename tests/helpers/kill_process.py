"""
Kills a command repeatedly, at chosen and at random moments, and checks the files that it left.

Processes are forked, so that the slow imports run once. A moment is a time, or the start of a file operation that
Python reports to audit hooks.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from tests.helpers import ROOT
from theworld.checkpoints.atomic import CHECKSUMS, verify_checksums


# Operations that move folders: each is a moment. There are too many of the others.
TURNING = ("os.rename", "ctypes.dlsym")
WATCHED = (*TURNING, "open", "os.mkdir", "os.remove", "os.rmdir", "shutil.copyfile", "shutil.rmtree")


def run_forked(
    run: Callable[[], object], operation: tuple[str | None, int] | None = None, seconds: float | None = None
) -> tuple[bool, Counter]:
    """
    Runs a function in a forked process, and kills the process.

    Args:
        run: The function; an exit code other than 0 is an error.
        operation: The operation at which to kill: its name, or None for any, and its number, counted from 1.
        seconds: The time after which to kill, instead.

    Returns:
        Whether the process ended before it was killed, and the number of operations of each name that it began.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code, counts = 1, Counter()

        def watch(name: str, args: tuple) -> None:
            if name in WATCHED:
                counts.update((name, None))
                if operation is not None and name == (operation[0] or name) and counts[operation[0]] == operation[1]:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            sys.addaudithook(watch)
            code = run() or 0
        finally:
            os.write(writing, json.dumps(list(counts.items())).encode())
            os._exit(code)
    os.close(writing)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as pipe:
        counted = pipe.read()
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise RuntimeError(f"The process failed before it was killed, with exit code {os.WEXITSTATUS(status)}.")
    return os.WIFEXITED(status), Counter(dict(json.loads(counted or "[]")))


def moments(run: Callable[[], object], number: int) -> list[dict]:
    """`number` moments of a run: up to half are operations in `TURNING`, the others random operations and times."""
    started = time.monotonic()
    _, counts = run_forked(run)
    seconds = time.monotonic() - started
    chance = random.Random(0)
    turning = [{"operation": (name, count)} for name in TURNING for count in range(1, counts[name] + 1)]
    chosen = chance.sample(turning, min(number // 2, len(turning)))
    for each in range(number - len(chosen)):
        if each % 2:
            chosen.append({"operation": (None, chance.randint(1, counts[None]))})
        else:
            chosen.append({"seconds": chance.uniform(0, seconds)})
    return chosen


def state(output: Path) -> str | None:
    """The checksums of a folder, after they were compared with its files; None if there is no folder."""
    if not output.exists():
        return None
    verify_checksums(output)
    return (output / CHECKSUMS).read_text()


def kill_conversions(vae: str, gemma: str, output: Path, number: int) -> dict[str, int]:
    """Converts alternately to two dtypes; after each kill the folder must be a complete conversion to one of them."""
    from theworld import convert_weights

    def convert(dtype: str) -> int:
        arguments = ["--vae", vae, "--gemma", gemma, "--output-dir", str(output), "--overwrite"]
        return convert_weights.main([*arguments, "--image-size", "64", "--dtype", dtype])

    both = set()
    for dtype in ("bfloat16", "float32"):
        run_forked(lambda dtype=dtype: convert(dtype))
        both.add(state(output))
    killed = survived = 0
    for turn, moment in enumerate(moments(lambda: convert("float32"), number)):
        dtype = ("bfloat16", "float32")[turn % 2]
        done, _ = run_forked(lambda dtype=dtype: convert(dtype), **moment)
        killed += not done
        survived += not done and state(output) in both
    run_forked(lambda: convert("float32"))
    left = len(list(output.parent.iterdir())) - 1
    return {"killed": killed, "survived": survived, "left beside": left}


def kill_trainings(model: str, dataset: str, output: Path, number: int) -> dict[str, int]:
    """Trains and saves at each step; after each kill there must be two complete checkpoints and a complete model."""
    from tests.helpers.training_runs import options_of
    from theworld.training import train

    options = {"model": model, "dataset": dataset, "output_dir": output, "save_strategy": "steps", "save_steps": 1}

    def run() -> None:
        train.train_and_save(train.prepare(options_of(**options, max_steps=2, train="projection", overwrite=True)))

    killed = survived = 0
    for moment in moments(run, number):
        done, _ = run_forked(run, **moment)
        killed += not done
        whole = [state(folder) is not None for folder in (output, *output.glob("checkpoint-*"))]
        survived += not done and whole == [True] * 3
    run_forked(run)
    left = len(list(output.parent.iterdir())) - 1
    return {"killed": killed, "survived": survived, "left beside": left}


def kill(kind: str, first: Path, second: Path, output: Path, number: int) -> dict[str, int]:
    """Kills `number` conversions or trainings in a new process, which has one thread when it forks."""
    command = [sys.executable, "-W", "ignore", "-m", __name__, kind, first, second, output, number]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def main(kind: str, first: str, second: str, output: str, number: str) -> None:
    torch.set_num_threads(1)
    run = {"conversions": kill_conversions, "trainings": kill_trainings}[kind]
    print(json.dumps(run(first, second, Path(output), int(number))))


if __name__ == "__main__":
    main(*sys.argv[1:])
