# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
A web page to ask the model in this folder about pictures; Spaces looks for a file of this name.

    pip install -e ".[web]"
    python app.py

It answers on the loopback only, unless `GRADIO_SERVER_NAME` says otherwise, as it does on Spaces.
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from hashlib import sha256
from html import escape
from pathlib import Path
from random import randrange
from tempfile import TemporaryDirectory
from threading import Event
from time import perf_counter
from typing import Any

import gradio as gr
import torch
from PIL import Image
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import AutoModel, AutoProcessor, BatchFeature, TextIteratorStreamer

from demo import BUNDLED
from look import attention_to_world, heat
from recipe.scenes import SPLITS, draw_scene


# What one who asks may use of the machine: a request with the files in it, a picture, a question, an answer's time;
# and all together: how many wait, how many conversations are kept, and how long, with their files.
MAX_BYTES = 5_000_000
MAX_CHARACTERS = 1000
MAX_SECONDS = 60
MAX_WAITING = 64
MAX_KEPT = 100
KEPT_SECONDS = 3600
Image.MAX_IMAGE_PIXELS = 2**24
# The page's own folder for what is uploaded or drawn here. Gradio gives each file a name that nobody else can guess.
uploads = TemporaryDirectory(prefix="theworld-", dir=os.environ.get("GRADIO_TEMP_DIR"))
UPLOADS = os.environ["GRADIO_TEMP_DIR"] = os.path.realpath(uploads.name)
CSS = ".gradio-container {max-width: 1180px !important} #picture img {width: 100%; height: 100%; object-fit: contain}"

# Eager attention gives the weights for the overlay; set here, because all who ask share the model.
model = AutoModel.from_pretrained(BUNDLED, trust_remote_code=True, attn_implementation="eager").eval()
processor = AutoProcessor.from_pretrained(BUNDLED, trust_remote_code=True)


@dataclass
class Turn:
    """A question, its answer from the world tokens, and without them; the latter is None where nobody asked for it."""

    question: str
    answer: str = ""
    blind_answer: str | None = None


@dataclass
class Conversation:
    """The turns about a picture of this sum. Its `latents` [1, z, h, w] come with the first, and serve all of them."""

    picture: str | None = None
    latents: torch.Tensor | None = None
    turns: list[Turn] = field(default_factory=list)

    def messages(self, blind: bool = False) -> list[dict]:
        """All turns, with the answers from the world tokens or those without."""
        messages = []
        for turn in self.turns:
            if (answer := turn.blind_answer if blind else turn.answer) is not None:
                messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": answer}]
        return messages


def is_uploaded(path: Any) -> bool:
    """Whether a client names a file of `UPLOADS`, in the one way in which Gradio names it to clients."""
    return (
        isinstance(path, str)
        and "\0" not in path
        and path.startswith(UPLOADS + os.sep)
        and os.path.realpath(path) == path
    )


def paths_in(value: Any) -> Iterator[Any]:
    """What a request's JSON gives as the path of a file, however deep in it."""
    if isinstance(value, dict) and value.get("path") is not None:
        yield value["path"]
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from paths_in(each)


class Gate:
    """
    Refuses requests before Gradio reads them: those larger than `MAX_BYTES`, however many files they have, or of
    unknown size, and those that name a file which was not uploaded here. Gradio itself checks the paths only in
    payloads that carry its own mark, and fetches URLs that are given as paths.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request = Request(scope, receive)
        refused = refuse_size(request) if request.method == "POST" else refuse_download(scope["path"])
        if not refused and request.method == "POST" and not scope["path"].rstrip("/").endswith("/gradio_api/upload"):
            try:
                body = await request.body()
            except ClientDisconnect:
                return
            refused, receive = refuse_paths(body), replay(body, receive)
        await (refused or self.app)(scope, receive, send)


def refuse_size(request: Request) -> Response | None:
    length = request.headers.get("content-length", "")
    if not length.isdigit() or int(length) > MAX_BYTES:
        return PlainTextResponse(f"A request may have {MAX_BYTES:,} bytes.", status_code=413)


def refuse_download(path: str) -> Response | None:
    _, asked, file = path.partition("/gradio_api/file=")
    if asked and not is_uploaded(file):
        return PlainTextResponse("Only files that were uploaded here are served.", status_code=403)


def refuse_paths(body: bytes) -> Response | None:
    try:
        paths = list(paths_in(json.loads(body or "{}")))
    except (ValueError, RecursionError):
        return PlainTextResponse("A request must be JSON.", status_code=400)
    if not all(map(is_uploaded, paths)):
        return PlainTextResponse(
            "A file's path must be one that `/gradio_api/upload` answered. Upload the file first.", status_code=403
        )


def replay(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read already, and then what else comes."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again


class TimedStreamer(TextIteratorStreamer):
    """The answer's text in pieces, and when each of its tokens came."""

    def __init__(self):
        super().__init__(processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=MAX_SECONDS)
        self.times = []

    def put(self, value):
        self.times.append(perf_counter())
        super().put(value)

    def __str__(self) -> str:
        if len(self.times) < 2:
            return ""
        prompt, first, *further = self.times
        each = (
            f", {(further[-1] - first) / len(further) * 1000:.0f} ms for each of {len(further)} more"
            if further
            else ""
        )
        return f"{(first - prompt) * 1000:.0f} ms to the first token{each}"


def encode(picture: Image.Image) -> torch.Tensor:
    """The picture's latents [1, z, h, w]."""
    pixel_values = processor(images=picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return model.get_world_latents(pixel_values)


def make_inputs(messages: list[dict], question: str, latents: torch.Tensor | None) -> BatchFeature:
    """The conversation as the model reads it, the picture, if there is one, before the first question."""
    messages = [*messages, {"role": "user", "content": question}]
    turns = [{"role": each["role"], "content": [{"type": "text", "text": each["content"]}]} for each in messages]
    if latents is not None:
        turns[0]["content"].insert(0, {"type": "image"})
    return processor.apply_chat_template(
        turns,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"world_latents": None if latents is None else [list(latents)]},
    )


def stream(inputs: BatchFeature) -> Iterator[tuple[str, TimedStreamer]]:
    """Yields the answer so far, and its times, at each piece; raises what `generate` does."""
    streamer, gone, answer = TimedStreamer(), Event(), ""
    options = {"streamer": streamer, "max_time": MAX_SECONDS, "stopping_criteria": [lambda *_: gone.is_set()]}
    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(model.generate, **inputs, **options)
        answering.add_done_callback(lambda _: streamer.end())
        try:
            for piece in streamer:
                answer += piece
                yield answer.strip(), streamer
        finally:  # also when who asked has left
            gone.set()
    answering.result()


def ask(picture: Image.Image | None, question: str, compare: bool, talk: Conversation, right: dict[str, str]):
    """Answers with world tokens, then, to compare, without; yields what the page shows as it comes."""
    if picture is None or not question.strip():
        raise gr.Error("Give a picture and a question.", print_exception=False)
    if len(question) > MAX_CHARACTERS:
        raise gr.Error(f"Ask in {MAX_CHARACTERS} characters; this has {len(question)}.", print_exception=False)
    try:
        yield from answer(picture, question.strip(), compare, talk, right)
    except ValueError as error:
        raise gr.Error(escape(str(error)), print_exception=False) from error


def answer(picture: Image.Image, question: str, compare: bool, talk: Conversation, right: dict[str, str]):
    """As `ask`; raises a `ValueError` for what the processor or the model cannot read."""
    encoding = "the picture's latents kept"
    if talk.picture != (sum_of_picture := sha256(picture.tobytes()).hexdigest()):
        started = perf_counter()
        talk = Conversation(sum_of_picture, encode(picture))
        encoding = f"{(perf_counter() - started) * 1000:.0f} ms to encode the picture"
    inputs = make_inputs(talk.messages(), question, talk.latents)
    blind_inputs = make_inputs(talk.messages(blind=True), question, None)
    turn = Turn(question)
    talk = replace(talk, turns=[*talk.turns, turn])

    world_tokens = (inputs["input_ids"] == model.config.image_token_id).sum()
    note = f"{inputs['input_ids'].shape[1]} tokens in the prompt, {world_tokens} of them world tokens; {encoding}, "
    expected = f"<br>The scene's own answer: **{right[question]}**" if question in right else ""
    times = None
    for turn.answer, times in stream(inputs):
        yield shown(talk, None, f"{note}{times}{expected}")
    with TemporaryDirectory() as folder:
        # A file, which Gradio copies. A picture it would write over the same one, even while that is being served.
        overlay = Path(folder) / "look.png"
        heat(picture, attention_to_world(model, inputs)).save(overlay)
        yield shown(talk, overlay, f"{note}{times}{expected}")
        if compare:
            for turn.blind_answer, _ in stream(blind_inputs):
                yield shown(talk, overlay, f"{note}{times}{expected}")


def shown(talk: Conversation, overlay: Path | None, note: str) -> tuple:
    """The page's outputs, in the order of `outputs` below; the question's box is emptied."""
    return talk, talk.messages(), talk.messages(blind=True), overlay, note, ""


def draw(seed: int) -> tuple[Image.Image, dict[str, str]]:
    """A scene, and the right answers to its own questions."""
    scene = draw_scene(seed)
    return scene.image, {question.text: question.answer for question in scene.questions}


def draw_another() -> tuple:
    """A scene that the model was not trained on, for the page."""
    picture, right = draw(randrange(SPLITS["test"].start, SPLITS["test"].stop))
    return picture, right, samples(right)


def samples(right: dict[str, str]) -> gr.Dataset:
    return gr.Dataset(samples=[[question] for question in right], visible=bool(right))


first_picture, first_right = draw(SPLITS["test"][0])  # the scene of assets/scene.png
with gr.Blocks(title="TheWorld", delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as page:
    gr.Markdown(
        "# TheWorld\nGemma reads pictures through the VAE encoder of the Cosmos world models. This small model was "
        "trained on drawn scenes and nine kinds of questions about them, and knows nothing else. Clips it reads in "
        "`demo.py` alone: of an animation, this page takes the first frame."
    )
    talk = gr.State(Conversation(), time_to_live=KEPT_SECONDS)
    right = gr.State(first_right, time_to_live=KEPT_SECONDS)
    with gr.Row():
        with gr.Column(scale=2, min_width=260):
            picture = gr.Image(
                first_picture,
                type="pil",
                format="png",
                label="Picture",
                height=270,
                sources=["upload", "clipboard"],
                elem_id="picture",
            )
            new_scene = gr.Button("Draw another scene")
            overlay = gr.Image(label="What it looked at", height=270, interactive=False, elem_id="look")
        with gr.Column(scale=5):
            with gr.Row():
                chat = gr.Chatbot(
                    label="With world tokens", height=330, elem_id="with", buttons=[], feedback_options=None
                )
                blind_chat = gr.Chatbot(
                    label="Without", height=330, elem_id="without", buttons=[], feedback_options=None
                )
            compare = gr.Checkbox(True, label="Ask without world tokens too, to see what they are worth")
            with gr.Row():
                question = gr.Textbox(
                    show_label=False, placeholder="Ask about the picture", scale=5, elem_id="question"
                )
                send = gr.Button("Ask", variant="primary", scale=1)
            questions = gr.Dataset(
                components=[question], samples=[[text] for text in first_right], label="The scene's own questions"
            )
            note = gr.Markdown(elem_id="note")

    compare.change(lambda on: gr.Chatbot(visible=on), compare, blind_chat)
    questions.click(lambda sample: sample[0], questions, question)
    new_scene.click(draw_another, None, [picture, right, questions])
    picture.input(lambda: ({}, samples({})), None, [right, questions])
    outputs = [talk, chat, blind_chat, overlay, note, question]
    for start_again in (picture.change, chat.clear, blind_chat.clear):
        start_again(lambda: shown(Conversation(), None, ""), None, outputs)
    gr.on([send.click, question.submit], ask, [picture, question, compare, talk, right], outputs)


if __name__ == "__main__":
    page.queue(max_size=MAX_WAITING).launch(
        max_file_size=MAX_BYTES,
        state_session_capacity=MAX_KEPT,
        css=CSS,
        app_kwargs={"middleware": [Middleware(Gate)]},
    )
