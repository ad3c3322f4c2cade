"""
Kills a command at chosen and at random moments, again and again, and looks at what it left.

Processes are forked, so that what takes long, importing, is done once. A moment is the start of an operation on files,
of those that Python reports to audit hooks, or a time.
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from theworld.checkpoints.atomic import CHECKSUMS, verify_checksums


# Operations that change which folder is where: each is a moment. Of the others there are too many.
TURNING = ("os.rename", "ctypes.dlsym")
WATCHED = (*TURNING, "open", "os.mkdir", "os.remove", "os.rmdir", "shutil.copyfile", "shutil.rmtree")


def run_forked(
    run: Callable[[], object], operation: tuple[str | None, int] | None = None, seconds: float | None = None
) -> tuple[bool, Counter]:
    """
    Runs, and kills.

    Args:
        run: What is done; an exit code that is not 0 is an error.
        operation: At which operation to kill: the name, or None for any, and a number, which counts from 1.
        seconds: After which time to kill, instead.

    Returns:
        Whether it ended before it was killed, and how many operations of each name it began.
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
        raise RuntimeError(f"It failed by itself, with exit code {os.WEXITSTATUS(status)}.")
    return os.WIFEXITED(status), Counter(dict(json.loads(counted or "[]")))


def moments(run: Callable[[], object], number: int) -> list[dict]:
    """`number` moments of a run: up to half of them of `TURNING`, the others and times by chance."""
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
    """What a folder holds, in a word, after all of its files were compared with their sums; None if there is none."""
    if not output.exists():
        return None
    verify_checksums(output)
    return (output / CHECKSUMS).read_text()


def kill_conversions(vae: str, gemma: str, output: Path, number: int) -> dict[str, int]:
    """Converts in turns to two dtypes; each time there must be one of the two, complete."""
    from theworld import convert_weights

    def convert(dtype: str) -> int:
        arguments = ["--vae", vae, "--gemma", gemma, "--output", str(output), "--image-size", "64", "--dtype", dtype]
        return convert_weights.main([*arguments, "--overwrite"])

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
    """Trains and saves at each step; the two checkpoints and the model of the first run must stay, or new ones be."""
    from tests.helpers.training_runs import options_of
    from theworld.training import train

    options = {"model": model, "dataset": dataset, "output_dir": output, "save_strategy": "steps", "save_steps": 1}

    def run() -> None:
        train.main(options_of(**options, max_steps=2, train="projection", overwrite=True))

    killed = survived = 0
    for moment in moments(run, number):
        done, _ = run_forked(run, **moment)
        killed += not done
        whole = [state(folder) is not None for folder in (output, *output.glob("checkpoint-*"))]
        survived += not done and whole == [True] * 3
    run_forked(run)
    left = len(list(output.parent.iterdir())) - 1
    return {"killed": killed, "survived": survived, "left beside": left}


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, first, second, output, number = sys.argv[1:]
    kill = {"conversions": kill_conversions, "trainings": kill_trainings}[kind]
    print(json.dumps(kill(first, second, Path(output), int(number))))
