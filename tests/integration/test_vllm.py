"""Tests vLLM (`make test-vllm`): `vllm serve .` answers over its OpenAI API with the tokens of transformers."""

import base64
import io
import json
import os
import re
import shlex
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from tests.helpers import ROOT
from tests.helpers import load_test as load
from tests.helpers.docs import command, snippet
from tests.helpers.generation import chat_inputs
from tests.helpers.servers import MAX_TOKENS, Message, content_of, data_url, serve_vllm
from theworld.checkpoints import merge
from theworld.evaluation.scenes import SPLITS, draw_scene


pytestmark = pytest.mark.vllm

# As in training/train.py.
LORA_TARGET_MODULES = r".*\.language_model\.layers\..*_proj"
PLACEHOLDERS = ["<world>", "<start_of_world>", "<end_of_world>", "<world_video>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of the server's log."""
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def server(folder):
    with serve_vllm(ROOT, folder, "--dtype", "float32", "--trust-request-mm-kwargs") as server:
        yield server


@pytest.fixture(scope="module")
def address(server):
    return server[0]


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(seed) for seed in SPLITS["test"][:40]]


def greedy(folder: Path, adapter: Path | None = None) -> Callable[[Message], list[int]]:
    """A function from a message to the greedy tokens of transformers, with or without an adapter."""
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
        inputs = chat_inputs(processor, [{"role": "user", "content": content}])
        output = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_TOKENS)
        return output[0, inputs["input_ids"].shape[1] :].tolist()

    return answer


@pytest.fixture(scope="module")
def theirs():
    return greedy(ROOT)


def ours(address: str, message: Message | list[dict], model: str = ".", **fields: Any) -> list[int]:
    """Greedy tokens of the server for a message, or for its content in OpenAI's format."""
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


def rejection(address: str, route: str, **fields: Any) -> str:
    """The server's message for a request that it rejects with status 400."""
    body = json.dumps({"model": ".", **fields}).encode()
    request = urllib.request.Request(f"{address}{route}", body, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(request, timeout=60)
    assert raised.value.code == 400
    return json.loads(raised.value.read())["error"]["message"]


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
    """Prompts of the same text have the same token ids; a cached prefix must not be used for other images."""
    before = metric(address, "prefix_cache_hits_total")
    first, second, third = (scene.image for scene in scenes[32:35])
    questions = ["What shape is the red object?", "How many circles are there?"]
    for images in ([first, second], [first, third], [second, first], [first, second]):
        for question in questions:
            message = [*images, question]
            assert ours(address, message) == theirs(message)
    assert metric(address, "prefix_cache_hits_total") > before


def test_the_docs_client_gets_the_right_answer(address, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    client = snippet("docs/serving.md", "openai")
    assert "http://localhost:8000" in client.code
    exec(client.code.replace("http://localhost:8000", address), {})
    assert capsys.readouterr().out.strip() == client.promised[0]


def test_a_bad_image_is_an_error_of_its_request(address, theirs, scenes):
    import openai

    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    content = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,bm90IGFuIGltYWdl"}}]
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=".", messages=[{"role": "user", "content": content}])
    message = [scenes[0].image, scenes[0].questions[0].text]
    assert ours(address, message) == theirs(message)


def test_a_video_is_an_error_of_its_request(address, theirs, scenes):
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
def test_split_placeholders_are_rejected_on_every_route(address, scenes, texts):
    question, url = scenes[0].questions[0].text, data_url(scenes[0].image)
    typed = "A message's text holds <"
    chat = [{"role": "user", "content": content_of([scenes[0].image, *texts, question])}]
    assert typed in rejection(address, "/v1/chat/completions", messages=chat)
    assert typed in rejection(address, "/tokenize", messages=chat)
    earlier = [{"role": "user", "content": "a"}, {"role": "assistant", "content": content_of(texts)}]
    assert typed in rejection(address, "/v1/chat/completions", messages=[*earlier, {"role": "user", "content": "b"}])

    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": url.split(",")[1]}}
    fields = {"messages": [{"role": "user", "content": [image, *content_of(texts)]}], "max_tokens": 5}
    assert typed in rejection(address, "/v1/messages", **fields)

    parts = [{"type": "input_text", "text": text} for text in texts] + [{"type": "input_image", "image_url": url}]
    assert typed in rejection(address, "/v1/responses", input=[{"role": "user", "content": parts}])


def test_an_offline_engine_rejects_split_placeholders(scenes, tmp_path):
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
        rejection(address, "/v1/chat/completions", **typed, chat_template_kwargs={name: "a"})


@pytest.mark.parametrize("options", [*load.SPOILING_OPTIONS, {"image_mean": float("nan")}], ids=str)
def test_options_that_spoil_an_image_are_rejected(address, theirs, scenes, options):
    message = [scenes[0].image, scenes[0].questions[0].text]
    asked = {"messages": [{"role": "user", "content": content_of(message)}], "mm_processor_kwargs": options}
    assert "Failed to apply TheWorldProcessor" in rejection(address, "/v1/chat/completions", **asked)
    assert ours(address, message) == theirs(message)


def test_bad_words_prevent_generated_placeholders(address, theirs, scenes):
    """vLLM ignores `suppress_tokens`, with which transformers never generates them."""
    message = [scenes[0].image, scenes[0].questions[0].text]
    tokenizer = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True).tokenizer
    video = tokenizer.convert_tokens_to_ids("<world_video>")
    wanted = {"logit_bias": {str(video): 100}}
    assert ours(address, message, **wanted) == [video] * MAX_TOKENS
    assert ours(address, message, **wanted, bad_words=PLACEHOLDERS) == theirs(message)


def test_vllms_own_loader_reads_some_images_differently(address, theirs, scenes):
    """As docs/serving.md says; and `read_image` reads them right."""
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
    with serve_vllm(ROOT, tmp_path, *options) as (address, _), ThreadPoolExecutor(8) as pool:
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
    with serve_vllm(folder, tmp_path, "--dtype", "float32", "--enforce-eager") as (address, _):
        for message in mixed_messages(scenes)[:8]:
            assert ours(address, message) == theirs(message)


def write_film(path: Path, count: int, width: int, height: int) -> Path:
    """An MP4 of moving noise at 12 frames per second; vLLM's environment has no PyAV."""
    import cv2

    film = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 12, (width, height))
    generator = np.random.default_rng(0)
    for _ in range(count):
        film.write(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
    film.release()
    return path


def greedy_about_films(folder: Path, question: str, films: list[Path]) -> list[int]:
    """The greedy tokens of transformers for the frames that vLLM reads of each film."""
    from vllm.multimodal.media.image import ImageMediaIO
    from vllm.multimodal.media.video import VideoMediaIO

    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    loader = VideoMediaIO(ImageMediaIO())
    frames, metadata = zip(*(loader.load_bytes(film.read_bytes()).media for film in films), strict=True)
    content = [*({"type": "video"} for _ in films), {"type": "text", "text": question}]
    inputs = processor(
        text=processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True),
        videos=list(frames),
        video_metadata=list(metadata),
        do_sample_frames=metadata[0]["do_sample_frames"],
        return_tensors="pt",
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_TOKENS)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def test_images_and_videos_of_any_shape_are_served_to_the_token(convert, scenes, tmp_path):
    folder, question = convert("gemma2", "--max-pixels", "8192"), "what is it?"
    theirs, (wide, tall) = greedy(folder), (scenes[0].image.resize((200, 80)), scenes[1].image.resize((40, 110)))
    films = [write_film(tmp_path / f"{count}.mp4", count, *size) for count, size in ((20, (96, 40)), (9, (40, 104)))]
    urls = ["data:video/mp4;base64," + base64.b64encode(film.read_bytes()).decode() for film in films]
    of_videos = [{"type": "video_url", "video_url": {"url": url}} for url in urls]
    with serve_vllm(folder, tmp_path, "--dtype", "float32", "--enforce-eager") as (address, _):
        for message in ([wide, question], [tall, "and", wide, "which?"], [scenes[2].image, question]):
            assert ours(address, message) == theirs(message)
        for some in (slice(1), slice(2)):
            expected = greedy_about_films(folder, question, films[some])
            assert ours(address, [*of_videos[some], {"type": "text", "text": question}]) == expected


def test_a_bidirectional_checkpoint_is_not_served(convert, tmp_path):
    folder = convert("gemma2", "--world-attention", "bidirectional")
    with (
        pytest.raises(pytest.fail.Exception, match="vLLM ended with 1"),
        serve_vllm(folder, tmp_path, "--dtype", "float32", "--enforce-eager"),
    ):
        pass
    log = (tmp_path / "log.txt").read_text()
    assert "A serving engine masks causally, but this model has `world_attention='bidirectional'`" in log


def save_adapter(folder: Path, **fields: Any) -> Path:
    """An adapter of the bundled model, as `theworld train` makes them, with random weights."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = AutoModel.from_pretrained(ROOT, trust_remote_code=True)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=LORA_TARGET_MODULES, **fields))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder


def test_an_adapter_of_gemmas_matrices_is_served_unmerged(theirs, scenes, tmp_path):
    adapter = save_adapter(tmp_path / "adapter")
    adapted = greedy(ROOT, adapter)
    options = ("--enable-lora", "--lora-modules", f"tuned={adapter}", "--dtype", "float32", "--enforce-eager")
    messages = mixed_messages(scenes)[:8]
    with serve_vllm(ROOT, tmp_path, *options) as (address, _):
        assert [ours(address, message, "tuned") for message in messages] == [adapted(message) for message in messages]
        assert [ours(address, message) for message in messages] == [theirs(message) for message in messages]
    assert [adapted(message) for message in messages] != [theirs(message) for message in messages]


def test_an_adapter_of_the_projection_is_merged_first(theirs, scenes, tmp_path, monkeypatch):
    """An adapter of `theworld train`, with the projection and two tokens, merged by the docs' snippet."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-theworld").symlink_to(ROOT)
    tokens = {"embed_tokens": [6, 7]}
    save_adapter(tmp_path / "tuned", modules_to_save=["world_projection"], trainable_token_indices=tokens)
    with pytest.raises(ValueError, match="Unsupported modules_to_save"):
        PEFTHelper.from_local_dir("tuned", 4096).validate_legal(LoRAConfig(max_lora_rank=8))

    assert merge.main(shlex.split(command("docs/serving.md", "theworld merge"))[2:]) == 0
    messages = mixed_messages(scenes)[:8]
    adapted = list(map(greedy(ROOT, tmp_path / "tuned"), messages))
    assert list(map(greedy(tmp_path / "merged"), messages)) == adapted != list(map(theirs, messages))
    with serve_vllm(tmp_path / "merged", tmp_path, "--dtype", "float32", "--enforce-eager") as (address, _):
        # Such weights would say `<world_video>`.
        assert [ours(address, message, bad_words=PLACEHOLDERS) for message in messages] == adapted
