"""Tests how video files are read: by which library, which frames, timestamps, rotation and memory."""

import base64
import json
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from PIL import Image
from transformers import AutoModel, pipeline
from transformers.video_utils import load_video

from tests.helpers.films import write_film
from tests.helpers.generation import chat_inputs
from theworld import TheWorldProcessor


# Frames whose numbers can be read off them: each is a shade lighter than the one before.
DARKEST, SHADE = 20, 8
TIMES = [0, 0.125, 0.25, 0.75, 1.0]
# At 8 a second.
ON_SCREEN = [0, 1, 2, 2, 2, 2, 3, 3, 4]
QUESTION = "what is it?"
CONTAINERS = {
    "MP4": {},
    "MOV": {"form": "mov"},
    "fragmented MP4": {"options": {"movflags": "frag_keyframe+empty_moov"}},
    "WebM": {"form": "webm", "codec": "libvpx-vp9"},
    "WebM of VP8": {"form": "webm", "codec": "libvpx"},
    "MKV": {"form": "matroska"},
    "TS": {"form": "mpegts"},
    "AVI": {"form": "avi", "codec": "mpeg4"},
}
FORMATS = {"GIF": ".gif", "WEBP": ".webp", "PNG": ".png"}


def shades(count: int, size: tuple[int, int] = (64, 64)) -> list[np.ndarray]:
    return [np.full((*size, 3), DARKEST + SHADE * number, np.uint8) for number in range(count)]


def numbers(pixels: torch.Tensor) -> list[int]:
    """The numbers of the frames of a video [1, T, 3, H, W] of shades."""
    levels = pixels[0].mean(dim=(1, 2, 3)) * 127.5 + 127.5
    return ((levels - DARKEST) / SHADE).round().long().tolist()


def stamps(processor, inputs) -> list[str]:
    return re.findall(r"\d+\.\d{3}s", processor.decode(inputs["input_ids"][0]))


def ask(processor, video, **options):
    return processor(text=f"<world_video>{QUESTION}", videos=video, return_tensors="pt", **options)


def chat(processor, options=None, **part):
    content = [{"type": "video", **part}, {"type": "text", "text": QUESTION}]
    return chat_inputs(processor, [{"role": "user", "content": content}], options)


@pytest.fixture(scope="module")
def folder(convert) -> Path:
    return convert("gemma2")


@pytest.fixture
def processor(folder):
    return TheWorldProcessor.from_pretrained(folder)


@pytest.fixture
def write(tmp_path):
    """Writes a film of shades; returns its path."""

    def run(times: list[float], name: str = "clip.mp4", **options) -> Path:
        path = tmp_path / name
        path.write_bytes(write_film(shades(len(times)), times, **options))
        return path

    return run


@pytest.fixture
def site(tmp_path):
    """The address at which the test's folder is served."""
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    handler.log_message = lambda *_: None
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


# By what route


def test_a_film_is_read_from_wherever_it_is(processor, write, site):
    path = write(TIMES, name="a clip.mp4")
    inline = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
    for source in (str(path), path, path.as_uri(), f"{site}/a%20clip.mp4", inline, [path], [[str(path)]]):
        assert numbers(ask(processor, source)["pixel_values_videos"]) == ON_SCREEN, source
    for key, value in {"video": path, "path": str(path), "url": f"{site}/a%20clip.mp4"}.items():
        assert numbers(chat(processor, **{key: value})["pixel_values_videos"]) == ON_SCREEN, key


def test_pictures_are_read_from_file_urls(processor, tmp_path):
    path = tmp_path / "a picture.png"
    Image.fromarray(shades(9)[8]).save(path)
    by_url, by_path = (
        processor(images=source, return_tensors="pt")["pixel_values"] for source in (path.as_uri(), path)
    )
    assert torch.equal(by_url, by_path)


def test_the_pipeline_answers_about_a_film(folder, processor, write):
    path = str(write(TIMES))
    content = [{"type": "video", "path": path}, {"type": "text", "text": QUESTION}]
    pipe = pipeline("image-text-to-text", model=str(folder), trust_remote_code=True)
    said = pipe(text=[{"role": "user", "content": content}], max_new_tokens=6, do_sample=False, return_full_text=False)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    inputs = chat(processor, path=path)
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said[0]["generated_text"] == answer


def test_a_list_of_paths_of_pictures_is_a_video(processor, tmp_path, site):
    pictures = [Image.fromarray(shade) for shade in shades(5)]
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    expected = ask(processor, pictures)
    urls = [f"{site}/{path.name}" for path in paths]
    for frames in (paths, [str(path) for path in paths], [paths], [[paths]], urls, [*paths[:3], *pictures[3:]]):
        assert torch.equal(ask(processor, frames)["pixel_values_videos"], expected["pixel_values_videos"])
    assert numbers(chat(processor, video=[str(path) for path in paths])["pixel_values_videos"]) == [0, 1, 2, 3, 4]


def test_a_list_of_films_is_several_videos(processor, write):
    paths = [write(TIMES), write(TIMES, "clip.webm", form="webm", codec="libvpx-vp9")]
    inputs = processor(text=["<world_video>"] * 2, videos=paths, return_tensors="pt")
    assert [numbers(video[None]) for video in inputs["pixel_values_videos"]] == [ON_SCREEN] * 2


def test_without_pyav_one_sentence_says_what_to_install(folder, write, tmp_path):
    """In a fresh process, by the checkpoint's own code; what needs no PyAV is read."""
    Image.fromarray(shades(1)[0]).save(
        tmp_path / "clip.gif", save_all=True, append_images=[Image.fromarray(shade) for shade in shades(5)[1:]]
    )
    code = """
import sys
sys.modules["av"] = sys.modules["theworld"] = None
from transformers import AutoModel, AutoProcessor
AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
processor(text="<world_video>", videos=sys.argv[2])
try:
    processor(text="<world_video>", videos=sys.argv[3])
except ImportError as error:
    print(error)
"""
    command = [sys.executable, "-W", "ignore", "-c", code, folder, tmp_path / "clip.gif", write(TIMES)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    assert printed.strip() == f"PyAV reads '{tmp_path}/clip.mp4', and is not installed: pip install av"


def test_no_other_decoder_is_asked(processor, write, monkeypatch):
    for module in ("torchcodec", "cv2", "decord", "torchvision"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("transformers.video_utils.load_video", None)
    assert numbers(ask(processor, write(TIMES))["pixel_values_videos"]) == ON_SCREEN


# Which frames, and when each was


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_gives_the_same_frames_and_times(container, processor, write):
    inputs = ask(processor, write(TIMES, "clip", **CONTAINERS[container]))
    assert numbers(inputs["pixel_values_videos"]) == ON_SCREEN
    assert stamps(processor, inputs) == ["0.000s", "0.500s", "1.000s"]


def test_a_films_frame_gives_the_numbers_of_its_image(processor, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (5, 50, 30, 3), dtype=np.uint8)
    path = tmp_path / "clip.mkv"
    path.write_bytes(write_film(list(frames), [n / 8 for n in range(5)], "matroska", "ffv1", pixels="bgr0"))
    images = processor(images=list(frames), return_tensors="pt")["pixel_values"]
    assert torch.equal(ask(processor, path)["pixel_values_videos"][0], images)


def test_a_slower_films_frames_stay_until_its_end(processor, write):
    inputs = ask(processor, write([0, 0.25, 0.5, 0.75, 1.0]))
    assert numbers(inputs["pixel_values_videos"]) == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert stamps(processor, inputs)[-1] == "1.000s"


def test_a_faster_films_frames_are_read_to_its_last(processor, write):
    inputs = ask(processor, write([number / 24 for number in range(25)]))
    assert numbers(inputs["pixel_values_videos"]) == [*range(0, 25, 3)]
    assert stamps(processor, inputs)[-1] == "1.000s"


def test_times_that_a_container_rounds_lose_no_frame(processor, write):
    path = write([number / 24 for number in range(25)], "clip.webm", form="webm", codec="libvpx-vp9")
    assert numbers(ask(processor, path, fps=24)["pixel_values_videos"]) == [*range(25)]


def test_so_many_frames_are_read_evenly(processor, write):
    path = write([number / 24 for number in range(25)])
    inputs = ask(processor, path, num_frames=5)
    assert numbers(inputs["pixel_values_videos"]) == [0, 6, 12, 18, 24]
    assert stamps(processor, inputs) == ["0.000s", "1.000s"]
    assert numbers(ask(processor, path, num_frames=1)["pixel_values_videos"]) == [0]
    assert numbers(ask(processor, list(shades(25)), num_frames=5)["pixel_values_videos"]) == [0, 6, 12, 18, 24]
    for options in ({"num_frames": 5}, {"fps": 4}, {"max_frames": 5}):
        in_chat = chat(processor, options, path=str(path))["pixel_values_videos"]
        assert numbers(in_chat) == [0, 6, 12, 18, 24], options


def test_longer_videos_are_read_evenly_up_to_a_limit(processor, write, tmp_path):
    processor.max_frames = 5
    processor.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "processor_config.json").read_text())["max_frames"] == 5
    limited = TheWorldProcessor.from_pretrained(tmp_path / "saved")
    path = write([number / 24 for number in range(25)])
    inputs = ask(limited, path)
    assert numbers(inputs["pixel_values_videos"]) == [0, 6, 12, 18, 24]
    assert stamps(limited, inputs) == ["0.000s", "1.000s"]
    assert len(numbers(ask(limited, path, max_frames=9)["pixel_values_videos"])) == 9
    assert len(numbers(ask(limited, path, num_frames=9)["pixel_values_videos"])) == 9


def test_all_frames_are_read_without_sampling(processor, write):
    path = write(TIMES)
    inputs = ask(processor, path, do_sample_frames=False)
    assert numbers(inputs["pixel_values_videos"]) == [0, 1, 2, 3, 4] and stamps(processor, inputs)[-1] == "1.000s"


def test_frames_of_load_video_keep_their_times(processor, write):
    frames, metadata = load_video(str(write([number / 8 for number in range(25)])), num_frames=5)
    inputs = ask(processor, frames, video_metadata=metadata, do_sample_frames=False)
    assert numbers(inputs["pixel_values_videos"]) == list(metadata.frames_indices) == [0, 5, 10, 15, 20]
    assert stamps(processor, inputs) == [f"{metadata.timestamps[number]:.3f}s" for number in (0, 4)]


def test_frames_are_at_their_indices_times(processor):
    known = {"fps": 8, "frames_indices": [4, 6, 7, 12, 12]}
    inputs = ask(processor, shades(5), video_metadata=known)
    assert numbers(inputs["pixel_values_videos"]) == [0, 0, 1, 2, 2, 2, 2, 2, 4]
    assert stamps(processor, inputs) == ["0.500s", "1.000s", "1.500s"]


@pytest.mark.parametrize("form", FORMATS)
def test_delays_that_browsers_do_not_keep_are_100_ms(form, processor, tmp_path):
    path = tmp_path / f"clip{FORMATS[form]}"
    pictures = [Image.fromarray(shade) for shade in shades(5)]
    options = {"save_all": True, "append_images": pictures[1:], "lossless": True}
    for delays in ([0] * 5, [10] * 5, [100, 0, 10, 100, 500]):
        pictures[0].save(path, form, duration=delays, **options)
        inputs = ask(processor, path, fps=10)
        assert numbers(inputs["pixel_values_videos"]) == [0, 1, 2, 3, 4] and stamps(processor, inputs)[-1] == "0.400s"
    pictures[0].save(path, form, duration=[20, 100, 300, 20, 500], **options)
    assert numbers(ask(processor, path, fps=50)["pixel_values_videos"]) == [0] + [1] * 5 + [2] * 15 + [3, 4, 4, 4]


def test_a_png_moves_without_its_still_picture(processor, tmp_path):
    still, *pictures = [Image.fromarray(shade) for shade in shades(6)]
    options = {"save_all": True, "default_image": True, "append_images": pictures, "duration": 125}
    still.save(tmp_path / "clip.png", **options)
    assert numbers(ask(processor, tmp_path / "clip.png")["pixel_values_videos"]) == [1, 2, 3, 4, 5]


# What a frame looks like


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_a_film_is_turned_as_a_phone_says(degrees, mirrored, processor, tmp_path):
    frame = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    turned = np.rot90(frame, degrees // 90)
    expected = processor(images=np.fliplr(turned) if mirrored else turned, return_tensors="pt")["pixel_values"]
    film = write_film(
        [frame] * 2, [0, 0.125], "mov", "png", pixels="rgb24", turned={"degrees": degrees, "hflip": mirrored}
    )
    (tmp_path / "clip.mov").write_bytes(film)
    assert torch.equal(ask(processor, tmp_path / "clip.mov")["pixel_values_videos"][0, :1], expected)


def test_a_transparent_film_is_on_a_white_page(processor, tmp_path):
    clear = np.zeros((64, 64, 4), np.uint8)
    (tmp_path / "clip.mov").write_bytes(write_film([clear] * 2, [0, 0.125], "mov", "png", pixels="rgba"))
    assert (ask(processor, tmp_path / "clip.mov")["pixel_values_videos"] == 1).all()


# Rejected inputs, and memory


def test_a_damaged_video_file_is_read_or_rejected(processor, tmp_path):
    chance = np.random.default_rng(0)
    read = 0
    for container in ("MP4", "WebM", "TS"):
        whole = write_film(shades(5), TIMES, **CONTAINERS[container])
        for _ in range(30):
            content = bytearray(whole[: len(whole) if chance.random() < 0.6 else chance.integers(len(whole))])
            for place in chance.integers(len(content) or 1, size=5 if content else 0):
                content[place] = chance.integers(256)
            (tmp_path / "clip").write_bytes(content)
            try:
                read += ask(processor, tmp_path / "clip")["pixel_values_videos"].abs().max().item() <= 1
            except (ValueError, TypeError) as error:
                assert "object at 0x" not in str(error)
    assert 10 < read < 80


def test_a_song_with_a_cover_is_no_video(processor, tmp_path):
    with av.open(str(tmp_path / "song.m4a"), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=8000, layout="mono")
        cover = container.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "rgb24"
        cover.disposition = Disposition.attached_pic
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        silence.sample_rate = 8000
        picture = av.VideoFrame.from_ndarray(shades(1)[0], "rgb24")
        container.mux([*sound.encode(silence), *sound.encode(), *cover.encode(picture), *cover.encode()])
    with pytest.raises(ValueError, match=r"song.m4a' has no video in it"):
        ask(processor, tmp_path / "song.m4a")


def test_more_tokens_than_the_tokenizer_admits_are_rejected(processor, write):
    processor.tokenizer.model_max_length = 150
    with pytest.raises(
        ValueError, match="of 9 frames has 192 world tokens, but .*`model_max_length` is 150. Read fewer"
    ):
        ask(processor, write(TIMES))
    assert ask(processor, write(TIMES), num_frames=5)["input_ids"].shape[1] < 150 + 20


def test_a_long_film_takes_little_memory(folder, tmp_path):
    """40 seconds of 1280 x 720 pixels, read at 8 frames a second: 890 MB as RGB."""
    frames = (np.full((720, 1280, 3), number % 200, np.uint8) for number in range(321))
    path = tmp_path / "long.mp4"
    path.write_bytes(write_film(frames, [n / 8 for n in range(321)], codec="mpeg4"))
    code = """
import resource, sys
from theworld import TheWorldProcessor
from PIL import Image
processor = TheWorldProcessor.from_pretrained(sys.argv[1])
processor(text="<world_video>", videos=[Image.new("RGB", (64, 64))] * 5, return_tensors="pt")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
inputs = processor(text="<world_video>", videos=sys.argv[2], return_tensors="pt")
print(inputs["pixel_values_videos"].shape[1], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    command = [sys.executable, "-W", "ignore", "-c", code, folder, path]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    num_frames, kilobytes = map(int, printed.split())
    assert num_frames == 321 and kilobytes < 300_000
