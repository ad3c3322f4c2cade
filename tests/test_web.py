"""Pins app.py (`make test-web`): in a browser, it answers about scenes and uploads, with world tokens and without."""

import http.client
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import httpx
import load
import pytest
from PIL import Image
from test_vllm import free_port

from recipe.scenes import SPLITS, draw_scene


ROOT = Path(__file__).parent.parent
SCREENSHOT = ROOT / "build" / "web.png"
QUESTION = "Where is the yellow star from the blue star?"

pytestmark = pytest.mark.web


def wait_for(condition: Callable, what: str, seconds: float = 60):
    """The first true value of `condition()`; elements that are not there, or no more, count as false."""
    from selenium.common.exceptions import WebDriverException

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if value := condition():
                return value
        except (WebDriverException, AttributeError):
            pass
        time.sleep(0.1)
    pytest.fail(f"waited {seconds} s for {what}")


@contextmanager
def serve(folder: Path):
    """Runs app.py as a user starts it; yields its address, once it is ready, and its process."""
    port, log = free_port(), folder / "log.txt"
    environment = os.environ | {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back, so that memory can be compared
    with log.open("w") as stream:
        server = subprocess.Popen(
            [sys.executable, "app.py"], cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT
        )
    try:
        wait_for(lambda: server.poll() is not None or "Running on" in log.read_text(), "app.py to start")
        assert server.poll() is None, log.read_text()
        assert f"http://127.0.0.1:{port}" in log.read_text()  # not on every address of the machine
        yield f"http://127.0.0.1:{port}", server.pid
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("web")) as server:
        yield server


@pytest.fixture(scope="module")
def address(server):
    return server[0]


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1180,1010"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
    yield browser
    browser.quit()


class Page:
    """What a person does on the page."""

    def __init__(self, browser, address: str):
        self.browser = browser
        browser.get(address)
        wait_for(lambda: self.find("#question textarea, #question input"), "the page")
        wait_for(lambda: self.find("#picture img"), "the first scene")

    def find_all(self, selector: str) -> list:
        return self.browser.find_elements("css selector", selector)

    def find(self, selector: str):
        return next(iter(self.find_all(selector)), None)

    def text(self, selector: str) -> str:
        return self.browser.find_element("css selector", selector).text

    def click(self, text: str) -> None:
        wait_for(lambda: self.browser.find_element("xpath", f"//button[contains(., '{text}')]").click() or True, text)

    def answers(self, selector: str) -> list[str]:
        """Everything said by the model in one of the chats."""
        return [element.text.strip() for element in self.find_all(f"{selector} .bot.message")]

    def ask(self, question: str, *, with_blind: bool = True) -> tuple[str, str | None]:
        """The finished answers, with world tokens and without."""
        before = len(self.answers("#with"))
        box = wait_for(lambda: self.find("#question textarea, #question input"), "the box")
        box.send_keys(question)
        self.click("Ask")
        wait_for(lambda: len(self.answers("#with")) == before + 1 and self.find("#look img"), "the answer")
        if with_blind:
            wait_for(lambda: len(self.answers("#without")) == before + 1, "the answer without world tokens")
        wait_for(lambda: not self.find(".pending, .generating, .progress-text"), "the end of the answer")
        return self.answers("#with")[-1], self.answers("#without")[-1] if with_blind else None

    def own_questions(self) -> list[str]:
        return [button.text for button in self.find_all(".gallery-item") if button.text]


@pytest.fixture
def page(browser, address):
    return Page(browser, address)


def test_it_answers_from_the_picture_and_shows_that_it_cannot_without(page):
    right = {question.text: question.answer for question in draw_scene(SPLITS["test"][0]).questions}
    assert page.own_questions() == list(right)
    first, blind = page.ask(QUESTION)
    assert first == right[QUESTION] != blind
    second, _ = page.ask("How many circles are there?")
    assert second == right["How many circles are there?"]

    note = page.text("#note")
    assert re.search(r"\d+ tokens in the prompt, 64 of them world tokens; the picture's latents kept, \d+ ms", note)
    assert f"The scene's own answer: {second}" in note
    SCREENSHOT.parent.mkdir(exist_ok=True)
    page.browser.save_screenshot(str(SCREENSHOT))
    with Image.open(SCREENSHOT) as taken, Image.open(ROOT / "assets" / "web.png") as shown:
        assert taken.size == shown.size
    assert (ROOT / "assets" / "web.png").stat().st_size < 200_000


def test_another_scene_brings_its_own_questions_and_a_new_conversation(page):
    page.ask(QUESTION)
    before = page.own_questions()
    page.click("Draw another scene")
    wait_for(lambda: page.own_questions() not in ([], before) and not page.answers("#with"), "another scene")
    question = page.own_questions()[0]
    page.click(question)
    wait_for(lambda: page.find("#question textarea, #question input").get_attribute("value") == question, "its text")
    answer, _ = page.ask("")
    assert f"The scene's own answer: {answer}" in page.text("#note")


def test_clearing_a_chat_starts_again(page):
    page.ask(QUESTION)
    page.find("#with button[aria-label='Clear']").click()
    wait_for(
        lambda: not page.answers("#with") + page.answers("#without") and not page.find("#look img"), "empty chats"
    )
    page.ask(QUESTION)
    assert "ms to encode the picture" in page.text("#note")


def test_without_comparing_there_is_one_chat(page):
    page.find("input[type=checkbox]").click()
    wait_for(lambda: not any(chat.is_displayed() for chat in page.find_all("#without")), "one chat")
    assert page.ask(QUESTION, with_blind=False)[0] == "right of"


def test_a_picture_of_ones_own(page, tmp_path):
    scene = draw_scene(SPLITS["test"][1])
    scene.image.resize((320, 320)).save(tmp_path / "mine.png")
    wait_for(
        lambda: page.find("#picture button[aria-label*='emove']").click() or True, "the button that takes it away"
    )
    upload = wait_for(lambda: page.find("#picture input[type=file]"), "the upload")
    upload.send_keys(str(tmp_path / "mine.png"))
    wait_for(lambda: not page.own_questions(), "the picture")
    wait_for(lambda: page.find("#picture img"), "the picture")
    assert page.ask(scene.questions[0].text)[0] == scene.questions[0].answer
    assert "own answer" not in page.text("#note")


def test_what_it_cannot_read_is_said(page):
    box = page.find("#question textarea, #question input")
    box.send_keys("<world>What is this?")
    page.click("Ask")
    said = wait_for(lambda: page.find(".toast-body").text, "a message")
    assert "text holds <world>, which stands for an image or a video. Give those as parts" in said
    assert not page.answers("#with")


def test_of_a_clip_it_takes_the_first_frame_and_says_so(page):
    assert "of an animation, this page takes the first frame" in page.find("body").text
    page.find("#picture button[aria-label*='emove']").click()
    upload = wait_for(lambda: page.find("#picture input[type=file]"), "the upload")
    upload.send_keys(str(ROOT / "assets" / "clip.png"))
    wait_for(lambda: not page.own_questions(), "the picture")
    wait_for(lambda: page.find("#picture img"), "the picture")
    assert page.ask("What shape is the yellow object?")[0] == "triangle"


@pytest.mark.parametrize("header", [("Content-Length", "6000000"), ("Transfer-Encoding", "chunked")])
def test_large_uploads_and_those_of_unknown_size_are_refused_before_they_are_read(address, header):
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    connection.putrequest("POST", "/gradio_api/upload")
    connection.putheader(*header)
    connection.endheaders()
    refused = connection.getresponse()
    assert refused.status == 413 and refused.read() == b"A request may have 5,000,000 bytes."


def ask(address: str, picture: Path, *questions: str) -> str:
    """What the page says instead of answering one of the questions of a conversation."""
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    client = Client(address, verbose=False)
    with pytest.raises(AppError) as refused:
        for question in questions:
            client.predict(handle_file(str(picture)), question, False, api_name="/ask")
    return str(refused.value)


def test_a_question_a_conversation_and_a_picture_have_limits(address, tmp_path):
    small = ROOT / "assets" / "scene.png"
    Image.new("1", (5000, 5000)).save(tmp_path / "large.png")
    assert ask(address, small, "a" * 1001) == "Ask in 1000 characters; this has 1001."
    longest = "\N{GRINNING FACE}" * 1000  # four tokens each
    said = ask(address, small, "What shape is the blue object? " * 5, longest)
    assert re.match(r"The prompt has 4\d\d\d tokens, and with an answer the model reads 4096", said)
    assert "must have 1 to 16,777,216 pixels, got 5000x5000" in ask(address, tmp_path / "large.png", "What is it?")


def test_many_mixed_requests_some_broken_off(server, tmp_path):
    report = load.web(*server, 60, tmp_path)
    assert report["tried"] == report["held"], report["wrong"]
    assert min(report["answered"], report[load.REFUSED], report[load.BROKEN_OFF]) > 0
    assert report["growth"] < 1.1  # so early; `make reliability` holds it to 1.05


def post(address: str, route: str, **options) -> httpx.Response:
    return httpx.post(f"{address}/gradio_api/{route}", timeout=60, **options)


def upload(address: str, file: Path) -> str:
    """The path that the server gives a file."""
    return post(address, "upload", files={"files": (file.name, file.read_bytes())}).json()[0]


@pytest.mark.parametrize("route", ["call/ask", "call/v2/ask", "run/ask", "queue/join"])
def test_no_route_reads_a_file_that_was_not_uploaded(address, tmp_path, route):
    secret = tmp_path / "secret.png"
    draw_scene(SPLITS["test"][2]).image.save(secret)
    uploaded = upload(address, ROOT / "assets" / "scene.png")
    paths = [str(secret), f"{Path(uploaded).parent}/../..{secret}", f"http://127.0.0.1/../../{uploaded}", [uploaded]]
    files = [{"path": path} for path in paths] + [{"value": {"path": str(secret)}}]
    files += [{"path": str(secret), "meta": {"_type": kind}} for kind in ("gradio.FileData", "other")]
    for file in files:
        for data in ([file, "What is it?", False], [None, file, False], [None, "What is it?", [file]]):
            bodies = [{"data": data}]
            if route == "call/v2/ask":
                bodies = [dict(zip(("picture", "question", "compare"), data, strict=True))]
            elif route == "queue/join":
                bodies = [{"data": data, "fn_index": index, "session_hash": "mine"} for index in range(8)]
            for body in bodies:
                refused = post(address, route, json=body)
                assert refused.status_code == 403, (body, refused.text)
                assert refused.text.startswith("A file's path must be one that `/gradio_api/upload` answered")
    disguised = {"content": json.dumps({"data": data}), "headers": {"Content-Type": "application/json; form-data"}}
    assert post(address, route, **disguised).status_code == 403


@pytest.mark.parametrize("path", ["/etc/hostname", str(ROOT / "app.py"), "app.py", "../../../etc/hostname"])
def test_no_file_but_its_own_is_served(address, path):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{address}/gradio_api/file={path}", timeout=60)
    assert refused.value.code in (403, 404)
