# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
A web page that answers questions about pictures with the bundled model: the command `theworld app` (extra `web`).

It listens on the loopback address only, unless `GRADIO_SERVER_NAME` is set, as it is on Spaces.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator
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

from theworld.cli import ArgumentParser, run_command
from theworld.demo.ask import BUNDLED
from theworld.demo.attention import attention_to_world, overlay_attention
from theworld.evaluation.scenes import SPLITS, draw_scene
from theworld.images_theworld import read_image


# Limits of one request: its bytes with all files, a question's characters, an answer's seconds, and below, pixels.
# Limits of all requests together: how many wait, how many conversations are kept, and how long, with their files.
MAX_BYTES = 5_000_000
MAX_CHARACTERS = 1000
MAX_SECONDS = 60
MAX_WAITING = 64
MAX_KEPT = 100
KEPT_SECONDS = 3600
Image.MAX_IMAGE_PIXELS = 2**24
# The page's folder for uploaded and drawn files. Gradio gives each file a name that nobody else can guess.
uploads = TemporaryDirectory(prefix="theworld-", dir=os.environ.get("GRADIO_TEMP_DIR"))
UPLOADS = os.environ["GRADIO_TEMP_DIR"] = os.path.realpath(uploads.name)
# The only endpoints of Gradio that accept input from the page or from a client.
ENDPOINTS = ("upload", "queue/join", "call/ask", "call/v2/ask", "cancel", "reset")
CSS = """
.gradio-container {max-width: 1180px !important; margin: auto !important}
#picture img {width: 100%; height: 100%; object-fit: contain}
#refusal [role=alert] {
    color: var(--error-text-color); font-weight: 600; overflow-wrap: anywhere;
    border-left: 4px solid var(--error-border-color); padding-left: 8px
}
.dark {color-scheme: dark}
#refusal:not(:has([role=alert])) {display: none}
footer, footer * {color: var(--body-text-color) !important; opacity: 1 !important}
@media (max-width: 700px) {
    #left {display: contents}
    #look {order: 1}
}
"""
THEME = gr.themes.Default().set(
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_hover_dark="*primary_800",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
)
# Gradio gives both chats the same name, reads HTML entities aloud, and pastes pictures only with its button.
SCRIPT = """
() => {
    const names = {"#with": "Answers with world tokens", "#without": "Answers without world tokens"};
    const label = () => {
        for (const [chat, name] of Object.entries(names))
            document.querySelector(`${chat} [role=log]`)?.setAttribute("aria-label", name);
        for (const bubble of document.querySelectorAll("[role=log] [aria-label*='&']"))
            if (bubble.innerText) bubble.ariaLabel = bubble.ariaLabel.split(":", 1) + ": " + bubble.innerText;
    };
    new MutationObserver(label).observe(document.body, {childList: true, subtree: true});
    label();
    document.addEventListener("paste", (event) => {
        const picture = [...event.clipboardData.files].find((file) => file.type.startsWith("image/"));
        if (!picture) return;
        event.preventDefault();
        const files = new DataTransfer();
        files.items.add(picture);
        const upload = document.querySelector("#picture input[type=file]");
        upload.files = files.files;
        upload.dispatchEvent(new Event("change", {bubbles: true}));
    });
}
"""

# Eager attention returns the weights that the overlay needs. It is set once, because all requests share the model.
model = AutoModel.from_pretrained(BUNDLED, trust_remote_code=True, attn_implementation="eager").eval()
processor = AutoProcessor.from_pretrained(BUNDLED, trust_remote_code=True)


@dataclass
class Turn:
    """A question, its answer with world tokens, and its answer without them: None if that was not asked for."""

    question: str
    answer: str = ""
    blind_answer: str | None = None


@dataclass
class Conversation:
    """The finished turns about the picture with this hash, whose `latents` [1, z, h, w] serve all of them."""

    picture: str | None = None
    latents: torch.Tensor | None = None
    turns: list[Turn] = field(default_factory=list)

    def messages(self, blind: bool = False) -> list[dict]:
        """All turns, with the answers with world tokens, or those without if `blind`."""
        messages = []
        for turn in self.turns:
            if (answer := turn.blind_answer if blind else turn.answer) is not None:
                messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": answer}]
        return messages


def is_uploaded(path: Any) -> bool:
    """Whether `path` is a file in `UPLOADS`, written exactly as Gradio gives it to clients."""
    return (
        isinstance(path, str)
        and "\0" not in path
        and path.startswith(UPLOADS + os.sep)
        and os.path.realpath(path) == path
    )


def paths_in(value: Any) -> Iterator[Any]:
    """All values of `path` in a request's JSON, at any depth."""
    if isinstance(value, dict) and value.get("path") is not None:
        yield value["path"]
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from paths_in(each)


class Gate:
    """
    Rejects requests before Gradio reads them: to endpoints that the page does not need; larger than `MAX_BYTES`,
    with any number of files, or of unknown size; and those that name a file which was not uploaded. Gradio itself
    checks paths only in payloads with its own mark, and downloads URLs that are given as paths.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request, endpoint = Request(scope, receive), scope["path"].rstrip("/").partition("/gradio_api/")[2]
        if request.method != "POST":
            refused = refuse_download(endpoint)
        elif not (refused := refuse_post(request, endpoint)) and endpoint != "upload":
            try:
                body = await request.body()
            except ClientDisconnect:
                return
            refused, receive = refuse_paths(body), replay(body, receive)
        await (refused or self.app)(scope, receive, send)


def refuse_post(request: Request, endpoint: str) -> Response | None:
    length = request.headers.get("content-length", "")
    if endpoint not in ENDPOINTS:
        return PlainTextResponse("This page has no such endpoint.", status_code=404)
    if not length.isdigit() or int(length) > MAX_BYTES:
        return PlainTextResponse(f"A request may have {MAX_BYTES:,} bytes.", status_code=413)
    return None


def refuse_download(endpoint: str) -> Response | None:
    if endpoint.startswith("file=") and not is_uploaded(endpoint.removeprefix("file=")):
        return PlainTextResponse("Only files that were uploaded here are served.", status_code=403)
    return None


def refuse_paths(body: bytes) -> Response | None:
    try:
        paths = list(paths_in(json.loads(body or "{}")))
    except (ValueError, RecursionError):
        return PlainTextResponse("A request must be JSON.", status_code=400)
    if not all(map(is_uploaded, paths)):
        return PlainTextResponse(
            "A file's path must be one that `/gradio_api/upload` answered. Upload the file first.", status_code=403
        )
    return None


def replay(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was already read, and then all later messages."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again


@dataclass
class Scene:
    """The hash of a drawn picture, and the right answers to its own questions."""

    picture: str
    answers: dict[str, str]


class Visit:
    """How many questions a page has asked, which of them awaits its answer (0: none), and the end of the last one."""

    asked: int = 0
    awaited: int = 0
    ended: Event | None = None


class TimedStreamer(TextIteratorStreamer):
    """The answer's text in pieces, and the time of each token."""

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
    """The conversation as input tensors; the picture, if there is one, is before the first question."""
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
    """Yields the answer so far, and its times, at each piece and at the end; raises the errors of `generate`."""
    streamer, gone, answer = TimedStreamer(), Event(), ""
    options = {"streamer": streamer, "max_time": MAX_SECONDS, "stopping_criteria": [lambda *_: gone.is_set()]}
    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(model.generate, **inputs, **options)
        answering.add_done_callback(lambda _: streamer.end())
        try:
            for piece in filter(None, streamer):
                answer += piece
                yield answer.strip(), streamer
        finally:  # also when the client has left
            gone.set()
    answering.result()
    yield answer.strip(), streamer


def read_picture(upload: dict) -> Image.Image:
    """`read_image` of the file in `path`, as Gradio describes an upload; errors use the name that the user gave."""
    file, name = upload["path"], Path(upload["path"]).name
    if not Path(file).is_file():
        raise ValueError(f"{name!r} is no longer kept here. Give the picture again.")
    try:
        return read_image(file)
    except ValueError as error:
        raise ValueError(str(error).replace(file, name).replace(f"{file[:50]}...", name)) from None


def picture_hash(picture: Image.Image) -> str:
    """A SHA-256 hash of a picture's pixels, mode and shape."""
    return sha256(f"{picture.mode} {picture.size} ".encode() + picture.tobytes()).hexdigest()


def ask(picture: dict | None, question: str, compare: bool, talk: Conversation, scene: Scene) -> Iterator[tuple]:
    """
    Answers about an uploaded picture with world tokens, then, if `compare`, without.

    Args:
        picture: The uploaded file, as Gradio describes it. It is read here, because Gradio's reader turns transparent
            pixels black, and 16-bit values above 255 white.
        question: The question about it.
        compare: Whether to answer without world tokens, too.
        talk: The session's conversation. It continues if the picture is the same, and starts again if not.
        scene: The scene that the page drew last.

    Yields:
        What `shown` returns, for each piece of the answer.

    Raises:
        gr.Error: If there is no picture or question, or one that the reader, the processor or the model rejects. The
            conversation is unchanged then.
    """
    try:
        if not (picture and picture["path"] and isinstance(question, str) and question.strip()):
            raise ValueError("Give a picture and a question.")
        if len(question) > MAX_CHARACTERS:
            raise ValueError(f"Ask in {MAX_CHARACTERS} characters; this has {len(question)}.")
        yield from answer(read_picture(picture), question.strip(), compare, talk, scene)
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error


def answer(picture: Image.Image, question: str, compare: bool, talk: Conversation, scene: Scene) -> Iterator[tuple]:
    """As `ask`; raises a `ValueError` for input that the processor or the model cannot read."""
    encoding, before = "the picture's latents kept", talk
    if talk.picture != (asked := picture_hash(picture)):
        started = perf_counter()
        before = talk = Conversation(asked, encode(picture))
        encoding = f"{(perf_counter() - started) * 1000:.0f} ms to encode the picture"
    inputs = make_inputs(talk.messages(), question, talk.latents)
    blind_inputs = make_inputs(talk.messages(blind=True), question, None)
    turn = Turn(question)
    talk = replace(talk, turns=[*talk.turns, turn])

    world_tokens = (inputs["input_ids"] == model.config.image_token_id).sum()
    note = f"{inputs['input_ids'].shape[1]} tokens in the prompt, {world_tokens} of them world tokens; {encoding}, "
    right = scene.answers.get(question) if asked == scene.picture else None
    expected = f"<br>The scene's own answer: **{right}**" if right else ""
    for turn.answer, times in stream(inputs):
        yield shown(talk, None, f"{note}{times}{expected}", kept=before)
    with TemporaryDirectory() as folder:
        # A file, which Gradio copies. It writes a picture over an equal one, even while that is being served.
        overlay = Path(folder) / "look.png"
        overlay_attention(picture, attention_to_world(model, inputs)).save(overlay)
        yield shown(talk, overlay, f"{note}{times}{expected}", kept=before if compare else talk)
        if compare:
            for turn.blind_answer, _ in stream(blind_inputs):
                yield shown(talk, overlay, f"{note}{times}{expected}", kept=before)
            yield shown(talk, overlay, f"{note}{times}{expected}", kept=talk)


def shown(talk: Conversation, overlay: Path | None, note: str, kept: Conversation) -> tuple:
    """The outputs of `ask`: the conversation with its finished turns only, and what is displayed of it."""
    return kept, talk.messages(), talk.messages(blind=True), overlay, note


def number_question(visit: Visit) -> int:
    """The number of the question that the page asks now; 0 while it still awaits another answer."""
    if visit.awaited:
        return 0
    visit.asked += 1
    visit.awaited = visit.asked
    return visit.asked


def ask_here(
    picture: dict | None, question: str, compare: bool, talk: Conversation, scene: Scene, visit: Visit, number: int
) -> Iterator[tuple]:
    """
    `ask` for the page. Errors are shown as text, and leave the question in its box. It ends silently once the page no
    longer awaits the answer to the question with this number.
    """
    visit.ended = ended = Event()
    try:
        if not number or number != visit.awaited:
            return
        for kept, messages, blind_messages, *others in ask(picture, question, compare, talk, scene):
            if number != visit.awaited:
                return
            yield kept, as_text(messages), as_text(blind_messages), *others, "", ""
    except gr.Error as error:
        chats = as_text(talk.messages()), as_text(talk.messages(blind=True))
        hint = " Clearing a chat starts a new conversation." if talk.turns else ""
        yield talk, *chats, gr.skip(), gr.skip(), refusal(error.message + hint), question
    finally:
        if number == visit.awaited:
            visit.awaited = 0
        ended.set()


def start_again(picture: dict | None, visit: Visit) -> tuple:
    """A new conversation for the page, and the reader's error if it cannot read the picture."""
    visit.awaited = 0
    if visit.ended:
        visit.ended.wait(MAX_SECONDS)  # or the answer's last piece would appear after this
    said = ""
    try:
        if picture and picture["path"]:
            read_picture(picture)
    except ValueError as error:
        said = refusal(str(error))
    return *shown(Conversation(), None, "", Conversation()), said, ""


def as_text(messages: list[dict]) -> list[dict]:
    """Messages for a chat on the page, which reads text as HTML even where it does not read it as Markdown."""
    return [{**each, "content": escape(each["content"] or "(no words)", quote=False)} for each in messages]


def refusal(text: str) -> str:
    return f'<div role="alert">{escape(text)}</div>'


def draw(seed: int) -> tuple[Image.Image, Scene]:
    scene = draw_scene(seed)
    return scene.image, Scene(picture_hash(scene.image), {each.text: each.answer for each in scene.questions})


def draw_another() -> tuple[Image.Image, Scene, gr.Dataset]:
    """A scene that the model was not trained on, for the page."""
    picture, scene = draw(randrange(SPLITS["test"].start, SPLITS["test"].stop))
    return picture, scene, samples(scene.answers)


def samples(questions: Iterable[str]) -> gr.Dataset:
    rows = [[question] for question in questions]
    return gr.Dataset(samples=rows, visible=bool(rows))


first_picture, first_scene = draw(SPLITS["test"][0])  # the scene of assets/scene.png
with gr.Blocks(title="TheWorld", delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as page:
    gr.Markdown(
        "# TheWorld\nGemma reads pictures through the VAE encoder of the Cosmos world models. This small model was "
        "trained on synthetic scenes and nine kinds of questions about them, and knows nothing else. `theworld ask` "
        "also reads clips; of an animation, this page takes the first frame."
    )
    talk = gr.State(Conversation(), time_to_live=KEPT_SECONDS)
    scene = gr.State(first_scene, time_to_live=KEPT_SECONDS)
    visit = gr.State(Visit(), time_to_live=KEPT_SECONDS)
    with gr.Row():
        with gr.Column(scale=2, min_width=260, elem_id="left"):
            picture = gr.Image(
                first_picture,
                format="png",
                label="Picture",
                height=270,
                sources=["upload", "clipboard"],
                alt_text="The picture that is asked about",
                buttons=["fullscreen"],
                elem_id="picture",
            )
            new_scene = gr.Button("Draw another scene")
            overlay = gr.Image(
                label="What it looked at",
                height=270,
                interactive=False,
                alt_text="The picture in gray, red where the answer's first word looked",
                buttons=["fullscreen", "download"],
                elem_id="look",
            )
        with gr.Column(scale=5):
            with gr.Row(equal_height=True):
                question = gr.Textbox(
                    label="Question",
                    show_label=False,
                    placeholder="Ask about the picture",
                    scale=5,
                    max_lines=3,
                    elem_id="question",
                )
                send = gr.Button("Ask", variant="primary", scale=1)
            refused = gr.HTML(elem_id="refusal")
            with gr.Row():
                chat, blind_chat = (
                    gr.Chatbot(
                        label=label,
                        height=330,
                        min_width=300,
                        buttons=[],
                        feedback_options=None,
                        render_markdown=False,
                        latex_delimiters=[],
                        elem_id=elem_id,
                    )
                    for label, elem_id in (("With world tokens", "with"), ("Without world tokens", "without"))
                )
            questions = gr.Dataset(
                components=[question],
                samples=[[text] for text in first_scene.answers],
                label="The scene's own questions",
            )
            compare = gr.Checkbox(True, label="Ask without world tokens too, to see what they are worth")
            note = gr.Markdown(elem_id="note")

    given, answered = [picture, question, compare, talk, scene], [talk, chat, blind_chat, overlay, note]
    on_page = [*answered, refused, question]
    gr.on([], ask, given, answered, api_name="ask", concurrency_id="model", preprocess=False)
    number = gr.Number(0, visible=False)
    gr.on(
        [send.click, question.submit],
        number_question,
        visit,
        number,
        api_visibility="private",
        concurrency_id="visit",
        concurrency_limit=8,
    ).then(
        ask_here,
        [*given, visit, number],
        on_page,
        api_visibility="private",
        concurrency_id="model",
        preprocess=False,
        trigger_mode="multiple",
    )
    compare.change(None, compare, blind_chat, js="(on) => ({__type__: 'update', visible: on})")
    questions.click(lambda sample: sample[0], questions, question, api_visibility="private")
    new_scene.click(draw_another, None, [picture, scene, questions], api_visibility="private")
    picture.input(lambda: samples({}), None, questions, api_visibility="private")
    for start in (picture.change, chat.clear, blind_chat.clear):
        start(
            start_again,
            [picture, visit],
            on_page,
            api_visibility="private",
            concurrency_id="visit",
            preprocess=False,
        )


def serve(arguments: list[str]) -> None:
    """The command, with the words of its command line; returns when it is interrupted."""
    ArgumentParser(prog="theworld app", description="Serve a web page to ask the bundled model.").parse_args(arguments)
    page.queue(max_size=MAX_WAITING).launch(
        max_file_size=MAX_BYTES,
        state_session_capacity=MAX_KEPT,
        run_history=False,
        enable_monitoring=False,
        footer_links=["api", "gradio"],
        theme=THEME,
        css=CSS,
        js=SCRIPT,
        app_kwargs={"middleware": [Middleware(Gate)]},
    )


def main(arguments: list[str] | None = None) -> int:
    return run_command("theworld app", serve, arguments)


if __name__ == "__main__":
    sys.exit(main())
