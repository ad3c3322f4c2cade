"""Pins vLLM (`make test-vllm`): `vllm serve .` answers over its OpenAI API with exactly the tokens of transformers."""

import base64
import io
import json
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
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_run_it import snippet
from transformers import AutoModel, AutoProcessor

from tests.helpers import load_test as load
from theworld.evaluation.scenes import SPLITS, draw_scene


ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMAND = re.search(r"^vllm serve .*$", README, flags=re.MULTILINE).group()

pytestmark = pytest.mark.vllm

MAX_TOKENS = 20

# A user's message: texts and images in their order.
Message = list[str | Image.Image]

# As train.py's.
GEMMA_MATRICES = r".*\.language_model\.layers\..*_proj"
PLACEHOLDERS = ["<world>", "<start_of_world>", "<end_of_world>", "<world_video>"]


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
def folder(tmp_path_factory):
    """Where the server keeps its log."""
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def server(folder):
    with serve(ROOT, folder, "--dtype", "float32", "--trust-request-mm-kwargs") as server:
        yield server


@pytest.fixture(scope="module")
def address(server):
    return server[0]


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(seed) for seed in SPLITS["test"][:40]]


def greedy(folder: Path, adapter: Path | None = None) -> Callable[[Message], list[int]]:
    """What gives the greedy tokens of transformers for a message, with an adapter or without."""
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
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


def ours(address: str, message: Message | list[dict], model: str = ".", **fields: Any) -> list[int]:
    """Greedy tokens of the server for a message, or for its content as OpenAI's API takes it."""
    import openai  # only vLLM's environment has it

    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    completion = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content_of(message)}],
        temperature=0,
        max_completion_tokens=MAX_TOKENS,
        extra_body={"return_token_ids": True, **fields},
    )
    return completion.choices[0].token_ids


def refusal(address: str, route: str, **fields: Any) -> str:
    """The message with which the server refuses a request as its sender's error."""
    body = json.dumps({"model": ".", **fields}).encode()
    request = urllib.request.Request(f"{address}{route}", body, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(request, timeout=60)
    assert raised.value.code == 400
    return json.loads(raised.value.read())["error"]["message"]


def content_of(message: Message | list[dict]) -> list[dict]:
    """A message as OpenAI's API takes it; parts that are so already stay as they are."""

    def part_of(part: str | Image.Image | dict) -> dict:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        return part if isinstance(part, dict) else {"type": "image_url", "image_url": {"url": data_url(part)}}

    return [part_of(part) for part in message]


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


def test_a_start_logs_no_error(server, folder):
    log = (folder / "log.txt").read_text().split("Application startup complete")[0]
    assert "ERROR" not in log and "Traceback" not in log


@pytest.mark.parametrize("texts", load.SPLIT_TEXTS, ids=repr)
def test_split_placeholders_are_refused_on_every_route(address, scenes, texts):
    question, url = scenes[0].questions[0].text, data_url(scenes[0].image)
    typed = "A message's text holds <"
    chat = [{"role": "user", "content": content_of([scenes[0].image, *texts, question])}]
    assert typed in refusal(address, "/v1/chat/completions", messages=chat)
    assert typed in refusal(address, "/tokenize", messages=chat)
    earlier = [{"role": "user", "content": "a"}, {"role": "assistant", "content": content_of(texts)}]
    assert typed in refusal(address, "/v1/chat/completions", messages=[*earlier, {"role": "user", "content": "b"}])

    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": url.split(",")[1]}}
    fields = {"messages": [{"role": "user", "content": [image, *content_of(texts)]}], "max_tokens": 5}
    assert typed in refusal(address, "/v1/messages", **fields)

    parts = [{"type": "input_text", "text": text} for text in texts] + [{"type": "input_image", "image_url": url}]
    assert typed in refusal(address, "/v1/responses", input=[{"role": "user", "content": parts}])


def test_an_offline_engine_refuses_split_placeholders(scenes, tmp_path):
    """In a fresh process, as its users run it."""
    code = """
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

if __name__ == "__main__":
    engine = LLM(".", trust_remote_code=True, dtype="float32", enforce_eager=True)
    image = {"type": "image_url", "image_url": {"url": "URL"}}
    for texts in TEXTS:
        content = [image, *({"type": "text", "text": text} for text in texts)]
        try:
            answered = engine.chat([{"role": "user", "content": content}], SamplingParams(temperature=0))
            print("ANSWER", answered[0].outputs[0].text)
        except VLLMValidationError as error:
            print("REFUSED", error)
"""
    question = scenes[0].questions[0]
    texts = [[question.text], *(list(each) for each in load.SPLIT_TEXTS)]
    script = tmp_path / "offline.py"
    script.write_text(code.replace("URL", data_url(scenes[0].image)).replace("TEXTS", repr(texts)))
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    finished = subprocess.run([sys.executable, script], cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = [line for line in finished.stdout.splitlines() if line.startswith(("ANSWER", "REFUSED"))]
    assert lines[0] == f"ANSWER {question.answer}", finished.stderr[-3000:]
    assert len(lines) == len(texts), finished.stderr[-3000:]
    assert all("A message's text holds <" in line for line in lines[1:])


def test_chat_template_kwargs_write_no_placeholder(address, theirs, scenes):
    message = [scenes[0].image, scenes[0].questions[0].text]
    for name in ("bos_token", "eos_token", "typed", "opening", "raise_exception", "namespace"):
        assert ours(address, message, chat_template_kwargs={name: "<world>"}) == theirs(message), name
    typed = {"messages": [{"role": "user", "content": "what is <world>?"}]}
    for name in ("raise_exception", "namespace"):
        refusal(address, "/v1/chat/completions", **typed, chat_template_kwargs={name: "a"})


@pytest.mark.parametrize("options", [*load.SPOILING_OPTIONS, {"image_mean": float("nan")}], ids=str)
def test_options_that_spoil_an_image_are_refused(address, theirs, scenes, options):
    message = [scenes[0].image, scenes[0].questions[0].text]
    asked = {"messages": [{"role": "user", "content": content_of(message)}], "mm_processor_kwargs": options}
    assert "Failed to apply TheWorldProcessor" in refusal(address, "/v1/chat/completions", **asked)
    assert ours(address, message) == theirs(message)


def test_placeholders_come_out_unless_they_are_bad_words(address, theirs, scenes):
    """vLLM reads no `suppress_tokens`, by which transformers never generates them."""
    message = [scenes[0].image, scenes[0].questions[0].text]
    tokenizer = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True).tokenizer
    video = tokenizer.convert_tokens_to_ids("<world_video>")
    wanted = {"logit_bias": {str(video): 100}}
    assert ours(address, message, **wanted) == [video] * MAX_TOKENS
    assert ours(address, message, **wanted, bad_words=PLACEHOLDERS) == theirs(message)


def test_vllms_own_loading_reads_some_pictures_otherwise(address, theirs, scenes):
    """What the README says of it, and that `read_image` mends it."""
    from vllm.multimodal.media.image import ImageMediaIO

    from theworld.images_theworld import read_image

    grey = Image.fromarray(np.asarray(scenes[0].image.convert("L")).astype(np.uint16) * 257)
    file = io.BytesIO()
    grey.save(file, "PNG")
    deep = file.getvalue()
    assert np.asarray(ImageMediaIO().load_bytes(deep).media).min() == 255
    assert np.array_equal(read_image(grey), scenes[0].image.convert("L").convert("RGB"))

    file = io.BytesIO()
    scenes[0].image.save(file, "PNG")
    damaged = file.getvalue()[:60] + bytes(200) + file.getvalue()[260:]
    assert not np.asarray(ImageMediaIO().load_bytes(damaged).media).any()
    with pytest.raises(ValueError, match="damaged or cut off"):
        read_image(base64.b64encode(damaged).decode())

    question = "How many circles are there?"
    first, *others = ([scene.image, question] for scene in scenes)
    second = next(message for message in others if theirs(message) != theirs(first))
    for message in (first, second):
        image, text = content_of(message)
        assert ours(address, [{**image, "uuid": "the same"}, text]) == theirs(first)


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


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gemma2", ()),  # with windows and capped logits
        ("gemma3_text", ("--projector-type", "mlp", "--latent-merge-size", "2", "--normalize-latents")),
        ("gemma", ("--token-layout", "channel")),
    ],
)
def test_converted_checkpoints_are_served_to_the_token(convert, scenes, tmp_path, family, options):
    folder = convert(family, *options)
    theirs = greedy(folder)
    with serve(folder, tmp_path, "--dtype", "float32", "--enforce-eager") as (address, _):
        for message in mixed_messages(scenes)[:8]:
            assert ours(address, message) == theirs(message)


def test_a_checkpoint_that_reads_both_ways_is_not_served(convert, tmp_path):
    folder = convert("gemma2", "--world-attention", "bidirectional")
    with (
        pytest.raises(pytest.fail.Exception, match="vLLM ended with 1"),
        serve(folder, tmp_path, "--dtype", "float32", "--enforce-eager"),
    ):
        pass
    log = (tmp_path / "log.txt").read_text()
    assert "A serving engine masks causally, but this model has `world_attention='bidirectional'`" in log


def save_adapter(folder: Path, **fields: Any) -> Path:
    """An adapter of the bundled model, as train.py makes them, with random weights."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = AutoModel.from_pretrained(ROOT, trust_remote_code=True)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=GEMMA_MATRICES, **fields))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder


def test_an_adapter_of_gemmas_matrices_is_served_as_it_is(theirs, scenes, tmp_path):
    adapter = save_adapter(tmp_path / "adapter")
    adapted = greedy(ROOT, adapter)
    options = ("--enable-lora", "--lora-modules", f"tuned={adapter}", "--dtype", "float32", "--enforce-eager")
    messages = mixed_messages(scenes)[:8]
    with serve(ROOT, tmp_path, *options) as (address, _):
        assert [ours(address, message, "tuned") for message in messages] == [adapted(message) for message in messages]
        assert [ours(address, message) for message in messages] == [theirs(message) for message in messages]
    assert [adapted(message) for message in messages] != [theirs(message) for message in messages]


def test_an_adapter_of_the_projection_is_merged_first(theirs, scenes, tmp_path, monkeypatch):
    """As train.py saves them, with the projection and two tokens; by the README's snippet."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-theworld").symlink_to(ROOT)
    tokens = {"embed_tokens": [6, 7]}
    save_adapter(tmp_path / "tuned", modules_to_save=["world_projection"], trainable_token_indices=tokens)
    with pytest.raises(ValueError, match="Unsupported modules_to_save"):
        PEFTHelper.from_local_dir("tuned", 4096).validate_legal(LoRAConfig(max_lora_rank=8))

    exec(snippet("merge_and_unload"), {})
    messages = mixed_messages(scenes)[:8]
    adapted = list(map(greedy(ROOT, tmp_path / "tuned"), messages))
    assert list(map(greedy(tmp_path / "merged"), messages)) == adapted != list(map(theirs, messages))
    with serve(tmp_path / "merged", tmp_path, "--dtype", "float32", "--enforce-eager") as (address, _):
        # Such weights would say `<world_video>`.
        assert [ours(address, message, bad_words=PLACEHOLDERS) for message in messages] == adapted
