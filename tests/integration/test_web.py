"""Tests the web page of docs/serving.md in a browser (`make test-web`): answers about scenes and uploads."""

import http.client
import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import ROOT, servers
from tests.helpers import load_test as load
from theworld.evaluation.scenes import SPLITS, draw_scene
from theworld.images_theworld import read_image


SCREENSHOT = ROOT / "build" / "web.png"
QUESTION = "Where is the yellow star from the blue star?"

httpx = pytest.importorskip("httpx")  # comes with gradio

pytestmark = pytest.mark.web


def wait_for(condition: Callable, what: str):
    """The first true value of `condition()`; elements that are not there, or no more, count as false."""
    from selenium.common.exceptions import WebDriverException

    return servers.wait_for(condition, what, ignored=(WebDriverException, AttributeError))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with servers.serve_web(tmp_path_factory.mktemp("web")) as server:
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
        wait_for(lambda: self.find("#question textarea"), "the page")
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
        box = wait_for(lambda: self.find("#question textarea"), "the box")
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


def test_answers_need_world_tokens(page):
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


def test_another_scene_starts_a_new_conversation(page):
    page.ask(QUESTION)
    before = page.own_questions()
    page.click("Draw another scene")
    wait_for(lambda: page.own_questions() not in ([], before) and not page.answers("#with"), "another scene")
    asked = page.own_questions()[:3]
    page.click(asked[0])
    wait_for(lambda: page.find("#question textarea").get_attribute("value") == asked[0], "its text")
    right = 0
    for question in ("", *asked[1:]):
        answer, _ = page.ask(question)
        right += f"The scene's own answer: {answer}\n" in page.text("#note") + "\n"
    assert right >= 2  # the scene is drawn at random, and of 100 questions the model misses one or two


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


def test_rejected_questions_can_be_corrected(page):
    page.ask(QUESTION)
    box = page.find("#question textarea")
    box.send_keys("<world>How many circles are there?")
    page.click("Ask")
    said = wait_for(lambda: page.find("[role=alert]").text, "a message")
    assert "text holds <world>, which stands for an image or a video. Give those as parts" in said
    assert page.answers("#with") == ["right of"] and "Error" not in page.text("body")
    assert box.get_attribute("value") == "<world>How many circles are there?"
    box.clear()
    assert page.ask("How many circles are there?")[0] == "2"
    assert not page.find("[role=alert]") and len(page.answers("#with")) == 2


def test_unreadable_files_are_named_at_once(page, tmp_path):
    (tmp_path / "none.png").write_bytes(b"not an image")
    page.find("#picture input[type=file]").send_keys(str(tmp_path / "none.png"))
    for _ in ("when it is given", "when it is asked about"):
        said = wait_for(lambda: page.find("[role=alert]").text, "a message")
        assert said.startswith("'none.png' is no image that can be read")
        assert "Error" not in page.text("body") and not page.find(".toast-body")
        page.find("#question textarea").send_keys("What is it?")
        page.click("Ask")
        time.sleep(1)


def test_questions_are_shown_as_the_text_they_are(page):
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as elsewhere:
        threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{elsewhere.server_port}"
        question = f"![]({url}/a.png) <img src={url}/b.png> <iframe src={url}/c></iframe> **is** 5 < 6 & &lt; $$x$$?"
        page.ask(question)
        for chat in ("#with", "#without"):
            assert page.text(f"{chat} .user.message") == question
            assert page.find(f"{chat} .user.message [aria-label], {chat} [aria-label^=user]")
            label = page.find(f"{chat} [aria-label^=user]").get_attribute("aria-label")
            assert label == f"user's message: {question}"
            assert not page.find_all(f"{chat} iframe, {chat} .message img")
        elsewhere.shutdown()
    assert not asked


@pytest.mark.parametrize("others", [0, 6])
def test_another_picture_ends_an_answer_running_or_waiting(page, address, tmp_path, others):
    from gradio_client import Client, handle_file

    large = tmp_path / "large.png"
    Image.linear_gradient("L").resize((4000, 4000)).convert("RGB").save(large)
    page.find("#picture input[type=file]").send_keys(str(large))
    wait_for(lambda: not page.own_questions(), "the picture")
    clients = [Client(address, verbose=False) for _ in range(others)]
    before = [each.submit(handle_file(str(large)), "What is it?", False, api_name="/ask") for each in clients]
    page.find("#question textarea").send_keys("What is it?")
    page.click("Ask")
    time.sleep(0.5)
    page.click("Draw another scene")
    wait_for(page.own_questions, "another scene")
    for each in before:
        each.result(timeout=60)
    time.sleep(5)
    assert not page.answers("#with") + page.answers("#without") and not page.find("#look img")
    assert "Error" not in page.text("body")
    assert page.ask(page.own_questions()[0])[0] and len(page.answers("#with")) == 1


def test_ctrl_v_gives_a_picture_wherever_the_cursor_is(page):
    from selenium.webdriver.common.keys import Keys

    page.browser.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite"]})
    copy = """
        const done = arguments[arguments.length - 1], source = document.querySelector("#picture img").src;
        fetch(source).then((file) => file.blob()).then((file) => createImageBitmap(file)).then((picture) => {
            const canvas = new OffscreenCanvas(picture.width, picture.height);
            canvas.getContext("2d").drawImage(picture, 0, 0);
            return canvas.convertToBlob({type: "image/png"});
        }).then((png) => navigator.clipboard.write([new ClipboardItem({"image/png": png})])).then(done, done);
    """
    assert page.browser.execute_async_script(copy) is None
    page.click("Draw another scene")
    before = wait_for(
        lambda: page.own_questions()[0] != QUESTION and page.find("#picture img").get_attribute("src"), "it"
    )
    box = page.find("#question textarea")
    box.send_keys("How many")
    box.send_keys(Keys.CONTROL, "v")
    wait_for(lambda: page.find("#picture img").get_attribute("src") != before, "the pasted picture")
    wait_for(lambda: not page.own_questions(), "the pasted picture")
    assert page.ask(QUESTION)[0] == "right of"


CONTRAST = """
const parse = (color) => { const parts = color.match(/[\\d.]+/g).map(Number); return [...parts, 1].slice(0, 4); };
const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
const light = (color) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
    const part = color[i] / 255;
    return sum + weight * (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
}, 0);
const contrast = (element, color) => {
    let ground = [255, 255, 255], opacity = 1;
    const around = [];
    for (let each = element; each; each = each.parentElement) around.unshift(getComputedStyle(each));
    for (const style of around) { ground = over(parse(style.backgroundColor), ground); opacity *= style.opacity; }
    const [r, g, b, alpha] = parse(color);
    const [darker, lighter] = [light(over([r, g, b, alpha * opacity], ground)), light(ground)].sort((a, b) => a - b);
    return (lighter + 0.05) / (darker + 0.05);
};
const found = [], texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (texts.nextNode()) {
    const text = texts.currentNode.textContent.trim(), element = texts.currentNode.parentElement;
    const seen = element.checkVisibility({opacityProperty: true, visibilityProperty: true});
    if (text && seen && element.offsetWidth > 1 && !["STYLE", "SCRIPT"].includes(element.tagName))
        found.push([text, contrast(element, getComputedStyle(element).color)]);
}
for (const box of document.querySelectorAll("[placeholder]"))
    found.push([box.placeholder, contrast(box, getComputedStyle(box, "::placeholder").color)]);
return found;
"""
NAMELESS = """
const name = (each) => each.ariaLabel || each.alt || each.innerText?.trim() || each.labels?.[0]?.innerText.trim()
    || each.labels?.[0]?.textContent.trim() || each.querySelector("img")?.alt;
return [...document.querySelectorAll("button, textarea, input, img, [role=log]")].filter((each) => !name(each))
    .map((each) => each.outerHTML.slice(0, 200));
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_everything_has_a_name_and_is_readable(browser, address, theme):
    page = Page(browser, f"{address}?__theme={theme}")
    page.ask(QUESTION)
    page.find("#question textarea").send_keys("<world>")
    page.click("Ask")
    wait_for(lambda: page.find("[role=alert]"), "a message")
    page.find("#question textarea").clear()
    contrasts = page.browser.execute_script(CONTRAST)
    shown = {text for text, _ in contrasts}
    assert {"Picture", "What it looked at", "Ask", "Ask about the picture", QUESTION, "right of"} <= shown
    assert not [each for each in contrasts if each[1] < 4.5]
    assert not page.browser.execute_script(NAMELESS)
    names = [log.get_attribute("aria-label") for log in page.find_all("[role=log]")]
    assert names == ["Answers with world tokens", "Answers without world tokens"]
    assert [image.get_attribute("alt") for image in page.find_all("#picture img, #look img")] == [
        "The picture that is asked about",
        "The picture in gray, red where the answer's first word looked",
    ]


def test_phone_shows_the_question_on_the_first_screen(browser, address):
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        page = Page(browser, address)
        picture, question, chat, blind_chat, look = (
            page.find(selector).rect for selector in ("#picture", "#question", "#with", "#without", "#look")
        )
        assert picture["y"] + picture["height"] < question["y"] and question["y"] + question["height"] < 844
        assert question["y"] < chat["y"] < blind_chat["y"] < look["y"] and chat["width"] > 300
        assert page.browser.execute_script("return document.documentElement.scrollWidth") == 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_clips_are_read_as_their_first_frame(page):
    assert "of an animation, this page takes the first frame" in page.find("body").text
    page.find("#picture button[aria-label*='emove']").click()
    upload = wait_for(lambda: page.find("#picture input[type=file]"), "the upload")
    upload.send_keys(str(ROOT / "assets" / "clip.png"))
    wait_for(lambda: not page.own_questions(), "the picture")
    wait_for(lambda: page.find("#picture img"), "the picture")
    assert page.ask("What shape is the yellow object?")[0] == "triangle"


@pytest.mark.parametrize("header", [("Content-Length", "6000000"), ("Transfer-Encoding", "chunked")])
def test_large_uploads_are_rejected_unread(address, header):
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    connection.putrequest("POST", "/gradio_api/upload")
    connection.putheader(*header)
    connection.endheaders()
    refused = connection.getresponse()
    assert refused.status == 413 and refused.read() == b"A request may have 5,000,000 bytes."


class Talk:
    """A conversation through the API."""

    def __init__(self, address: str):
        from gradio_client import Client

        self.client = Client(address, verbose=False)

    def ask(self, picture: Path, question: str) -> tuple[list[str], str]:
        """What was said since the conversation began, and the note about it."""
        from gradio_client import handle_file

        chat, _, _, note, *_ = self.client.predict(handle_file(str(picture)), question, False, api_name="/ask")
        return [turn["content"][0]["text"] for turn in chat], note

    def refused(self, picture: Path, question: str) -> str:
        from gradio_client.exceptions import AppError

        with pytest.raises(AppError) as refused:
            self.ask(picture, question)
        return str(refused.value)


SCENE = ROOT / "assets" / "scene.png"


def test_a_question_a_conversation_and_a_picture_have_limits(address, tmp_path):
    Image.new("1", (5000, 5000)).save(tmp_path / "large.png")
    talk = Talk(address)
    assert talk.refused(SCENE, "a" * 1001) == "Ask in 1000 characters; this has 1001."
    assert "must have 1 to 16,777,216 pixels, got 5000x5000" in talk.refused(tmp_path / "large.png", "What is it?")


def test_a_question_refused_for_its_length_is_not_kept(address):
    talk = Talk(address)
    assert talk.ask(SCENE, QUESTION)[0] == [QUESTION, "right of"]
    longest = "\N{GRINNING FACE}" * 1000  # four tokens each
    assert re.match(
        r"The prompt has 4\d\d\d tokens, and with an answer the model reads 4096", talk.refused(SCENE, longest)
    )
    said, _ = talk.ask(SCENE, "How many circles are there?")
    assert said == [QUESTION, "right of", "How many circles are there?", "2"]


def test_what_is_refused_is_told_as_plain_text(address, tmp_path):
    assert "text holds <world>, which" in Talk(address).refused(SCENE, "<world>What's this?")
    (tmp_path / "none & none.png").write_bytes(b"not an image")
    said = Talk(address).refused(tmp_path / "none & none.png", "What is it?")
    assert (
        re.match(r"'none.*none\.png' is no image that can be read", said) and "/" not in said and "&amp;" not in said
    )


def pictures(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Pictures of kinds that Gradio would convert, each beside the RGB that `read_image` makes of it."""
    scene = Image.open(SCENE).convert("RGB")
    clear = scene.copy()
    clear.putalpha(Image.linear_gradient("L").resize(scene.size))
    deep = Image.fromarray(np.asarray(scene.convert("L")).astype(np.uint16) * 257)
    kinds = {"clear.png": clear, "clear.webp": clear, "deep.png": deep, "deep.tiff": deep}
    for name, picture in kinds.items():
        picture.save(folder / name, **({"lossless": True} if name.endswith("webp") else {}))
        read_image(folder / name).save(folder / f"{name}.rgb.png")
    return {name: (folder / name, folder / f"{name}.rgb.png") for name in kinds}


def test_uploads_are_read_by_the_processors_reader_alone(address, tmp_path):
    for given, read in pictures(tmp_path).values():
        talk = Talk(address)
        assert "to encode the picture" in talk.ask(given, QUESTION)[1]
        assert "the picture's latents kept" in talk.ask(read, QUESTION)[1], given.name
    Image.new("F", (64, 64)).save(tmp_path / "float.tiff")
    assert "32 bits a channel" in talk.refused(tmp_path / "float.tiff", QUESTION)


def test_pictures_of_the_same_bytes_but_another_shape_differ(address, tmp_path):
    wide = Image.frombytes("RGB", (64, 32), bytes(range(256)) * 24)
    wide.save(tmp_path / "wide.png")
    Image.frombytes("RGB", (32, 64), wide.tobytes()).save(tmp_path / "tall.png")
    talk = Talk(address)
    talk.ask(tmp_path / "wide.png", QUESTION)
    said, note = talk.ask(tmp_path / "tall.png", QUESTION)
    assert "to encode the picture" in note and len(said) == 2


def call(address: str, *data) -> list:
    """What an answer through the API gives at last, from data that the client need not have checked."""
    event = post(address, "call/ask", json={"data": data}).json()["event_id"]
    told = httpx.get(f"{address}/gradio_api/call/ask/{event}", timeout=60).text
    return json.loads(told.rpartition("event: complete\ndata: ")[2])


def test_clients_set_only_picture_and_question(address, tmp_path):
    other = draw_scene(SPLITS["test"][1])
    other.image.save(tmp_path / "other.png")
    file = {"path": upload(address, tmp_path / "other.png"), "url": "http://127.0.0.1:9/x.png"}
    talk, scene = {"picture": None, "turns": [{"question": "a", "answer": "b"}]}, {"answers": {QUESTION: "nowhere"}}
    _, chat, blind_chat, _, note, *_ = call(address, file, QUESTION, False, talk, scene)
    assert [turn["role"] for turn in chat] == ["user", "assistant"] and not blind_chat
    assert "own answer" not in note  # that of the scene which the page shows first
    file = {"path": upload(address, SCENE)}
    assert "The scene's own answer: **right of**" in call(address, file, QUESTION, False)[4]


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


@pytest.mark.parametrize("route", ["call/ask", "call/v2/ask", "queue/join"])
def test_no_route_reads_a_file_that_was_not_uploaded(address, tmp_path, route):
    secret = tmp_path / "secret.png"
    draw_scene(SPLITS["test"][2]).image.save(secret)
    uploaded = upload(address, SCENE)
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


def test_the_api_has_one_endpoint(address):
    information = httpx.get(f"{address}/gradio_api/info?all_endpoints=True").json()
    assert list(information["named_endpoints"]) == ["/ask"] and not information["unnamed_endpoints"]
    others = ("run/ask", "api/ask", "run/predict", "call/draw_another", "call/start_again", "call/v2/ask_here")
    for other in (*others, "component_server", "process_recording", "vibe-edit", "run-history/connect"):
        refused = post(address, other, json={"data": [], "fn_index": 0})
        assert (refused.status_code, refused.text) == (404, "This page has no such endpoint.")


@pytest.mark.parametrize(
    "path", ["/etc/hostname", str(ROOT / "demo" / "app.py"), "demo/app.py", "../../../etc/hostname"]
)
def test_no_file_but_its_own_is_served(address, path):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{address}/gradio_api/file={path}", timeout=60)
    assert refused.value.code in (403, 404)
