"""The command `theworld`, in a new process."""

import subprocess
import sys
from pathlib import Path


def run_theworld(*words: str | Path, folder: Path | None = None) -> subprocess.CompletedProcess:
    """Runs the command with these words in a folder."""
    command = [sys.executable, "-W", "ignore", "-m", "theworld.cli", *map(str, words)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
