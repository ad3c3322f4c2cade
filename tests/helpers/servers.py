"""The servers that the docs start, vLLM and the web page, and what a client sends them."""

import base64
import io
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers import ROOT
from tests.helpers.docs import command


MAX_TOKENS = 20
SECONDS_TO_START = 300

# A user's message: texts and images in their order.
Message = list[str | Image.Image]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition: Callable, what: str, seconds: float = 60, ignored: tuple[type[Exception], ...] = ()):
    """The first true value of `condition()`; `ignored` errors count as false."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if value := condition():
                return value
        except ignored:
            pass
        time.sleep(0.1)
    pytest.fail(f"waited {seconds} s for {what}")


@contextmanager
def running(words: list, folder: Path, log: Path, seconds: int, **variables: str) -> Iterator[subprocess.Popen]:
    """Runs a program of this environment in a folder until the block ends, `seconds` at most after it."""
    program, *arguments = words
    with log.open("w") as stream:
        server = subprocess.Popen(
            [Path(sys.executable).parent / program, *arguments],
            cwd=folder,
            env=os.environ | variables,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    try:
        yield server
    finally:
        server.terminate()
        server.wait(timeout=seconds)


@contextmanager
def serve_vllm(model: Path, folder: Path, *options: str) -> Iterator[tuple[str, int]]:
    """Runs the docs' command in a model's folder; yields the server's address, once it is ready, and process."""
    port, log = free_port(), folder / "log.txt"
    words = [*command("docs/serving.md", "vllm serve").split(), "--host", "127.0.0.1", "--port", str(port), *options]
    variables = {
        "VLLM_CACHE_ROOT": str(folder),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with running(words, model, log, seconds=60, **variables) as server:
        address = f"http://127.0.0.1:{port}"

        def is_healthy() -> bool:
            if server.poll() is not None:
                pytest.fail(f"vLLM ended with {server.returncode}:\n{log.read_text()[-5000:]}")
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return True

        wait_for(is_healthy, f"vLLM, see {log}", SECONDS_TO_START, ignored=(urllib.error.URLError, TimeoutError))
        yield address, server.pid


@contextmanager
def serve_web(folder: Path) -> Iterator[tuple[str, int]]:
    """Runs the docs' command for the web page; yields its address, once it is ready, and its process."""
    port, log = free_port(), folder / "log.txt"
    variables = {
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "MALLOC_MMAP_THRESHOLD_": "65536",  # what is freed goes back, so that memory can be compared
    }
    words = command("docs/serving.md", "theworld app").split()
    with running(words, ROOT, log, seconds=30, **variables) as server:
        wait_for(lambda: server.poll() is not None or "Running on" in log.read_text(), "the web page to start")
        assert server.poll() is None, log.read_text()
        assert f"http://127.0.0.1:{port}" in log.read_text()  # not on every address of the machine
        yield f"http://127.0.0.1:{port}", server.pid


def content_of(message: Message | list[dict]) -> list[dict]:
    """A message in OpenAI's format; parts that have it already are unchanged."""

    def part_of(part: str | Image.Image | dict) -> dict:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        return part if isinstance(part, dict) else {"type": "image_url", "image_url": {"url": data_url(part)}}

    return [part_of(part) for part in message]


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
