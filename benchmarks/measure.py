# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""Measures two calls alternately, and reports ratios."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter


REPEATS = 5


@dataclass(frozen=True)
class Row:
    """
    A row of the table: measurements of TheWorld and of a baseline, taken in pairs.

    Args:
        what, peer: Names of the measured task and of the baseline.
        ours, theirs: The measurements, in `unit`.
        goal: The required ratio, a minimum if `faster`, else a maximum; None for no goal.
        faster: Whether the ratio is the speed-up over the baseline, or the cost relative to it.
        note: A remark, such as a limit.
    """

    what: str
    peer: str
    ours: Sequence[float]
    theirs: Sequence[float]
    unit: str = "s"
    goal: float | None = None
    faster: bool = False
    note: str = ""

    @property
    def ratio(self) -> float:
        ours, theirs = median(self.ours), median(self.theirs)
        return theirs / ours if self.faster else ours / theirs

    @property
    def spread(self) -> tuple[float, float]:
        """The smallest and the largest ratio of a pair."""
        ratios = [t / o if self.faster else o / t for o, t in zip(self.ours, self.theirs, strict=True)]
        return min(ratios), max(ratios)

    @property
    def verdict(self) -> str:
        if self.goal is None:
            return ""
        sign, met = ("≥", self.ratio >= self.goal) if self.faster else ("≤", self.ratio <= self.goal)
        missed = abs(self.ratio / self.goal - 1)
        return f"{sign} {self.goal:g}: " + ("met" if met else f"missed by {missed:.0%}")


def in_turns(ours: Callable, theirs: Callable, repeats: int = REPEATS) -> tuple[list[float], list[float]]:
    """Seconds of two calls, measured alternately."""
    seconds = [(timed(ours), timed(theirs)) for _ in range(repeats)]
    return [pair[0] for pair in seconds], [pair[1] for pair in seconds]


def timed(call: Callable) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


# For code in a new process: bytes in a line of /proc/self/status, such as VmHWM, the peak resident memory.
MEMORY = """
def memory(line):
    return int(next(entry for entry in open("/proc/self/status") if entry.startswith(line)).split()[1]) * 1024
"""


def run_fresh(code: str) -> str:
    """The output of code in a new Python process."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
