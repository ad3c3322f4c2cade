"""
Sends many requests at once to a server, cancels some, and checks the answers and the memory in use.

    python -m tests.helpers.load_test web 1000
    python -m tests.helpers.load_test vllm 1000

each in the environment of its server (`make reliability` starts both).
"""

import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from tests.helpers import ROOT
from tests.helpers.servers import MAX_TOKENS, content_of, serve_vllm, serve_web
from theworld.evaluation.scenes import SPLITS, draw_scene


AT_ONCE = 16
SCENES = 12
BROKEN_OFF = "broken off"
REFUSED = "refused"

# Texts of one message that make a placeholder when joined.
SPLIT_TEXTS = (
    ["<wor", "ld>"],
    ["<wor ", " ld>"],
    ["<wor", " ", "ld>"],
    ["<world_", "video>"],
    ["<start_of_", "world>"],
)
# What a client that is let (`--trust-request-mm-kwargs`) may ask of the processor, and must not get.
SPOILING_OPTIONS = (
    {"do_rescale": False},
    {"do_rescale": False, "do_normalize": False},
    {"rescale_factor": 1e9},
    {"image_mean": [9.0, 9.0, 9.0]},
    {"image_std": [1e-30, 1e-30, 1e-30]},
    {"image_std": [0.0, 0.0, 0.0]},
    {"images_kwargs": {"do_rescale": False}},
    {"world": False},
    {"encoded": True},
    {"size": {"height": 60, "width": 64}},
    {"size": {"height": 80_000, "width": 80_000}},
    {"size": {"shortest_edge": 80_000}},
    {"do_pad": True, "pad_size": {"height": 80_000, "width": 80_000}},
    {"resample": 99},
    {"videos": ["/etc/hostname"]},
)


class Request(NamedTuple):
    """
    A question to a server, and the expected result.

    `send` takes the seconds after which to cancel, or None, and returns the answer, `REFUSED` or `BROKEN_OFF`.
    """

    send: Callable[[float | None], Any]
    expected: Any


def resident(process: int) -> int:
    """Bytes of memory that a process and those that it started have in use."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return pages * 4096 + sum(resident(int(child)) for child in children)


def load(requests: list[Request], number: int, process: int) -> dict[str, Any]:
    """
    Sends `number` requests from `AT_ONCE` threads, and cancels 20 % of them within a second.

    Args:
        requests: The requests to choose from at random; each is sent at least once.
        number: Number of requests.
        process: Process id of the server.

    Returns:
        `tried`; `held`: requests with the expected answer, or cancelled; the first errors; `growth`: the memory in
        use at the end, divided by that after the first tenth.
    """
    chance = random.Random(0)
    chosen = [requests[turn] if turn < len(requests) else chance.choice(requests) for turn in range(number)]
    patience = [chance.uniform(0, 1) if chance.random() < 0.2 else None for _ in chosen]

    def send(turn: int) -> str | None:
        """The error of a request, or None."""
        request = chosen[turn]
        try:
            answer = request.send(patience[turn])
        except Exception as error:  # whatever a client raises is what this counts
            return f"{type(error).__name__}: {error}"
        if answer == request.expected or (answer == BROKEN_OFF and patience[turn] is not None):
            counts[answer if answer in (REFUSED, BROKEN_OFF) else "answered"] += 1
            return None
        return f"expected {request.expected!r}, got {answer!r}"

    counts = {"answered": 0, REFUSED: 0, BROKEN_OFF: 0}
    first = max(number // 10, len(requests))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        wrong = list(tqdm(pool.map(send, range(first)), "the first requests", first))
        before = settled(process)
        wrong += tqdm(pool.map(send, range(first, number)), "all others", number - first)
    wrong = [each for each in wrong if each is not None]
    growth = settled(process) / before
    held = number - len(wrong)
    return {"tried": number, "held": held, **counts, "wrong": wrong[:5], "first": first, "growth": round(growth, 3)}


def settled(process: int) -> int:
    """The memory of a server, after a few seconds in which it ends cancelled requests."""
    time.sleep(3)
    return resident(process)


def pictures_and_questions() -> list[tuple[Image.Image, str]]:
    scenes = [draw_scene(seed) for seed in SPLITS["test"][:SCENES]]
    return [(scene.image, question.text) for scene in scenes for question in scene.questions[:2]]


def web(address: str, process: int, number: int, folder: Path) -> dict[str, Any]:
    """
    Loads the web page: conversations of one and two turns, with and without comparing; and rejected inputs:
    placeholders, files that are not pictures, paths of files that were not uploaded, and questions that are too long.
    A rejected question must leave the conversation unchanged.

    Uploaded and downloaded pictures are written to `folder`.
    """
    import httpx
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    own = threading.local()

    def conversation(
        picture: str, questions: list[str], compare: bool = False, refusal: str | None = None
    ) -> Callable:
        """Asks all questions; an error that contains `refusal` is allowed. Returns the result of the last one."""

        def send(seconds: float | None) -> Any:
            if not hasattr(own, "client"):
                own.client = Client(address, verbose=False, download_files=str(folder))
            client = own.client
            client.reset_session()
            for question in questions:
                job = client.submit(handle_file(str(folder / picture)), question, compare, api_name="/ask")
                try:
                    chat, blind_chat, *_ = job.result(timeout=seconds)
                    said = [[turn["content"][0]["text"] for turn in each] for each in (chat, blind_chat)]
                except TimeoutError:
                    job.cancel()
                    del own.client  # which would mix up what is left with the next answer
                    return BROKEN_OFF
                except AppError as error:
                    said = REFUSED
                    if refusal is None or refusal not in str(error):
                        raise
            return said

        return send

    def bare_path(picture: Path, meta: dict) -> Callable:
        def send(_: float | None) -> Any:
            data = [{"path": str(picture), **meta}, "How many circles are there?", False]
            answer = httpx.post(f"{address}/gradio_api/call/ask", json={"data": data}, timeout=60)
            return REFUSED if answer.status_code == 403 and "Upload the file first." in answer.text else answer.text

        return send

    requests = []
    for turn, (picture, question) in enumerate(pictures_and_questions()):
        picture.save(folder / f"{turn}.png")
        questions = [question, "How many circles are there?"][: 1 + (turn % 4 == 3)]
        send = conversation(f"{turn}.png", questions, compare=turn % 3 == 0)
        requests.append(Request(send, send(None)))
    clear = Image.open(folder / "0.png").convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(folder / "clear.png")
    page = Image.new("RGBA", clear.size, "white")
    page.alpha_composite(clear)
    page.convert("RGB").save(folder / "page.png")
    (folder / "none.png").write_bytes(b"not an image")
    good, long = ["What shape is the blue object? " * 5, "How many circles are there?"], "a" * 2000
    tokens = "\N{GRINNING FACE}" * 1000  # four each, which is too much after the first question
    requests += [
        Request(conversation("clear.png", good), conversation("page.png", good)(None)),
        Request(
            conversation("0.png", [good[0], long, good[1]], refusal="Ask in 1000"), conversation("0.png", good)(None)
        ),
        Request(
            conversation("1.png", [good[0], tokens, good[1]], refusal="The prompt"), conversation("1.png", good)(None)
        ),
        Request(conversation("0.png", ["what is <world>?"], refusal="text holds <world>"), REFUSED),
        Request(conversation("none.png", ["What is it?"], refusal="'none.png' is no image that can be read"), REFUSED),
        Request(conversation("0.png", [long], refusal="this has 2000"), REFUSED),
        Request(bare_path(folder / "0.png", {}), REFUSED),
        Request(bare_path(folder / "0.png", {"meta": {"_type": "other"}}), REFUSED),
    ]
    return load(requests, number, process)


def vllm(address: str, process: int, number: int) -> dict[str, Any]:
    """
    Loads vLLM's server: no picture, one and two; and rejected inputs: a file that is not a picture, placeholders split
    over texts or in the template's arguments, and options that spoil a picture.
    """
    import openai

    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

    def completion(content: list[dict], **fields: Any) -> Callable:
        def send(seconds: float | None) -> Any:
            asking = client if seconds is None else client.with_options(timeout=seconds / 10)
            try:
                answer = asking.chat.completions.create(
                    model=".",
                    messages=[{"role": "user", "content": content}],
                    temperature=0,
                    max_completion_tokens=MAX_TOKENS,
                    extra_body=fields,
                )
            except openai.APITimeoutError:
                return BROKEN_OFF
            except openai.BadRequestError:
                return REFUSED
            return answer.choices[0].message.content

        return send

    asked = pictures_and_questions()
    contents = []
    for turn, (picture, question) in enumerate(asked):
        other = asked[turn - 1][0]
        contents.append(content_of([[picture, question], [picture, "and", other, question], [question]][turn % 3]))
    requests = [Request(send, send(None)) for send in map(completion, contents)]
    placeholder = {"chat_template_kwargs": {"bos_token": "<world>"}}
    requests += [Request(completion(contents[0], **placeholder), requests[0].expected)]

    bad = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,bm90IGFuIGltYWdl"}}]
    sends = [completion(bad)]
    sends += [completion(content_of([asked[0][0], *texts, asked[0][1]])) for texts in SPLIT_TEXTS]
    sends += [completion(contents[0], mm_processor_kwargs=options) for options in SPOILING_OPTIONS]
    return load(requests + [Request(send, REFUSED) for send in sends], number, process)


def main(server: str, number: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if server == "web":
            with serve_web(folder) as (address, process):
                report = {**web(address, process, number, folder), "version": f"gradio {version('gradio')}"}
        else:
            with serve_vllm(ROOT, folder, "--dtype", "float32", "--trust-request-mm-kwargs") as (address, process):
                report = {**vllm(address, process, number), "version": f"vLLM {version('vllm')}"}
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
