"""Pins vLLM (`make test-vllm`): `vllm serve .` answers over its OpenAI API with exactly the tokens of transformers."""

import base64
import io
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import load
import pytest
from PIL import Image
from test_run_it import snippet
from transformers import AutoModel, AutoProcessor

from recipe.scenes import SPLITS, draw_scene


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMAND = re.search(r"^vllm serve .*$", README, flags=re.MULTILINE).group()

pytestmark = pytest.mark.vllm

MAX_TOKENS = 20

# A user's message: texts and images in their order.
Message = list[str | Image.Image]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serve(model: Path, folder: Path, *options: str):
    """Runs the README's command in a model's folder; yields the server's address, once it is ready, and process."""
    port = free_port()
    program, *arguments = COMMAND.split()
    command = [Path(sys.executable).parent / program, *arguments, "--host", "127.0.0.1", "--port", str(port), *options]
    environment = os.environ | {
        "VLLM_CACHE_ROOT": str(folder),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    log = folder / "log.txt"
    with log.open("w") as stream:
        server = subprocess.Popen(command, cwd=model, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        await_health(server, address, log)
        yield address, server.pid
    finally:
        server.terminate()
        server.wait(timeout=60)


def await_health(server: subprocess.Popen, address: str, log: Path, seconds: int = 300) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            pytest.fail(f"vLLM ended with {server.returncode}:\n{log.read_text()[-5000:]}")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(1)
    pytest.fail(f"vLLM was not ready after {seconds} s:\n{log.read_text()[-5000:]}")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serve(ROOT, tmp_path_factory.mktemp("vllm"), "--dtype", "float32") as server:
        yield server


@pytest.fixture(scope="module")
def address(server):
    return server[0]


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(seed) for seed in SPLITS["test"][:40]]


def greedy(folder: Path) -> Callable[[Message], list[int]]:
    """What gives the greedy tokens of transformers for a message."""
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)

    def answer(message: Message) -> list[int]:
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
            for part in message
        ]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_TOKENS)
        return output[0, inputs["input_ids"].shape[1] :].tolist()

    return answer


@pytest.fixture(scope="module")
def theirs():
    return greedy(ROOT)


def ours(address: str, message: Message) -> list[int]:
    """Greedy tokens of the server for a message."""
    import openai  # only vLLM's environment has it

    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    completion = client.chat.completions.create(
        model=".",
        messages=[{"role": "user", "content": content_of(message)}],
        temperature=0,
        max_completion_tokens=MAX_TOKENS,
        extra_body={"return_token_ids": True},
    )
    return completion.choices[0].token_ids


def content_of(message: Message) -> list[dict]:
    """A message as OpenAI's API takes it."""
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_url(part)}}
        for part in message
    ]


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def metric(address: str, name: str) -> float:
    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as response:
        return float(re.search(rf"^vllm:{name}{{.*}} (.*)$", response.read().decode(), flags=re.MULTILINE).group(1))


def mixed_messages(scenes) -> list[Message]:
    """32 messages: no image, one, two the same way round and the other."""
    messages = []
    for first, second in zip(scenes[:8], scenes[8:16], strict=True):
        question = first.questions[0].text
        messages += [
            [question],
            [first.image, question],
            [first.image, second.image, question],
            [second.image, "and", first.image, question],
        ]
    return messages


def test_text_alone(address, theirs, scenes):
    message = [scenes[0].questions[0].text]
    assert ours(address, message) == theirs(message)


def test_one_image_is_answered_right(address, theirs, scenes):
    for scene in scenes[:8]:
        message = [scene.image, scene.questions[0].text]
        assert ours(address, message) == theirs(message)


def test_two_images(address, theirs, scenes):
    for first, second in zip(scenes[:8], scenes[8:16], strict=True):
        message = [first.image, second.image, first.questions[0].text]
        assert ours(address, message) == theirs(message)


def test_32_requests_at_once(address, theirs, scenes):
    messages = mixed_messages(scenes[16:32])
    with ThreadPoolExecutor(len(messages)) as pool:
        answers = list(pool.map(lambda message: ours(address, message), messages))
    assert answers == [theirs(message) for message in messages]
    assert len(messages) == 32 and len(set(map(tuple, answers))) > 4


def test_a_cached_prefix_serves_its_own_images_only(address, theirs, scenes):
    """Prompts of the same text have the same token ids; what is kept of one must not answer for other images."""
    before = metric(address, "prefix_cache_hits_total")
    first, second, third = (scene.image for scene in scenes[32:35])
    questions = ["What shape is the red object?", "How many circles are there?"]
    for images in ([first, second], [first, third], [second, first], [first, second]):
        for question in questions:
            message = [*images, question]
            assert ours(address, message) == theirs(message)
    assert metric(address, "prefix_cache_hits_total") > before


def test_the_readmes_client_gets_the_right_answer(address, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    code = snippet("openai")
    assert "http://localhost:8000" in code
    exec(code.replace("http://localhost:8000", address), {})
    assert capsys.readouterr().out.strip() == re.search(r"# (.*)\n$", code).group(1)


def test_a_bad_image_is_the_callers_error_and_the_server_goes_on(address, theirs, scenes):
    import openai

    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    content = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,bm90IGFuIGltYWdl"}}]
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=".", messages=[{"role": "user", "content": content}])
    message = [scenes[0].image, scenes[0].questions[0].text]
    assert ours(address, message) == theirs(message)


def test_a_video_is_the_callers_error(address, theirs, scenes):
    import openai

    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    url = "data:video/mp4;base64,bm90IGEgdmlkZW8="
    content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    with pytest.raises(openai.BadRequestError, match="video"):
        client.chat.completions.create(model=".", messages=[{"role": "user", "content": content}])
    message = [scenes[0].image, scenes[0].questions[0].text]
    assert ours(address, message) == theirs(message)


def test_many_mixed_requests_some_broken_off(server):
    report = load.vllm(*server, number=150)
    assert report["tried"] == report["held"], report["wrong"]
    assert min(report["answered"], report[load.REFUSED], report[load.BROKEN_OFF]) > 0
    assert report["growth"] < 1.05


def test_two_processes_share_the_model(theirs, scenes, tmp_path):
    """Tensor parallel; without compiling, which the other tests cover."""
    messages = mixed_messages(scenes[:16])
    options = ("--dtype", "float32", "--tensor-parallel-size", "2", "--enforce-eager")
    with serve(ROOT, tmp_path, *options) as (address, _), ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda message: ours(address, message), messages))
    assert answers == [theirs(message) for message in messages]


def test_a_converted_gemma_2_with_its_windows_and_capped_logits(convert, scenes, tmp_path):
    folder = convert("gemma2")
    theirs = greedy(folder)
    with serve(folder, tmp_path, "--dtype", "float32", "--enforce-eager") as (address, _):
        for message in mixed_messages(scenes)[:8]:
            assert ours(address, message) == theirs(message)
