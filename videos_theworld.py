# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Videos to frames: which frames are read, and when each of them was.

A file is decoded a frame at a time, by PIL if it is an animation, else by PyAV. Only frames that are read are kept.
"""

import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence
from transformers.utils import logging
from transformers.video_utils import VideoMetadataType

from .images_theworld import check_pixels, find_file, read_image, shown


logger = logging.get_logger(__name__)

VIDEO_FORMS = (
    "a list of PIL images or arrays [H, W, 3], or of the paths of pictures, an array [T, H, W, 3], an animated PIL "
    "image, or the path or URL of a file"
)
# PIL's formats whose frames have times. The frames of others are pages, or one picture in several sizes.
ANIMATIONS = ("AVIF", "FLI", "GIF", "PNG", "WEBP")
# Browsers show a frame for 100 ms if its delay is 10 ms or less.
LEAST_DELAY, DEFAULT_DELAY = 0.010, 0.100
# Seconds by which a frame of a film may begin late: containers such as WebM round times to a millisecond.
ROUNDING = 0.00051
# By a, b, c and d of a display matrix, which moves the pixel (x, y) to (ax + cy, bx + dy).
TURNS = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


@dataclass(frozen=True)
class MediaFile:
    """
    A file that is not decoded yet.

    Args:
        content: Its path, or its bytes.
        name: What error messages call it.
        form: PIL's name of its format; None if PyAV is to read it.
        moves: Whether it has several frames that follow each other in time.
    """

    content: str | bytes
    name: str
    form: str | None = None
    moves: bool = True

    def open(self) -> BytesIO | Any:
        return BytesIO(self.content) if isinstance(self.content, bytes) else open(self.content, "rb")


@dataclass(frozen=True)
class Clip:
    """
    A video whose frames are not decoded yet.

    Args:
        begins: When each frame begins, in seconds, ascending, float64 [T].
        open: Gives the frames one by one, each in whatever form with the second at which it begins.
        read: Makes RGB of such a frame, while they are open.
        rounding: Seconds by which a frame may begin late.
    """

    begins: torch.Tensor
    open: Callable[[], AbstractContextManager[Iterable[tuple[float, Any]]]]
    read: Callable[[Any], Image.Image]
    rounding: float = 1e-6

    def frames_at(self, times: torch.Tensor) -> Iterator[tuple[Image.Image, int]]:
        """The frames on screen at ascending `times`, in seconds; each with the number of times at which it is."""
        waiting, current = times.tolist(), None
        with self.open() as frames:
            for begin, frame in frames:
                over = bisect_left(waiting, begin - self.rounding)
                if current is not None and over:
                    yield self.read(current), over
                    waiting = waiting[over:]
                if not waiting:
                    return
                current = frame
            if current is None:
                raise ValueError("No frame of the video can be decoded. The file is damaged or cut off; get it again.")
            yield self.read(current), len(waiting)


def is_animation(item: Any) -> bool:
    """Whether `item` is an image of PIL's with several frames that follow each other in time."""
    try:
        return getattr(item, "format", None) in ANIMATIONS and item.n_frames > 1
    except Exception:  # a damaged file: Pillow fails while it counts frames; `begins_of_animation` reports after which
        return True


def is_frame(item: Any) -> bool:
    """Whether `item` is one picture: a file, PIL's, or an array of three dimensions."""
    if isinstance(item, MediaFile):
        return not item.moves
    if isinstance(item, Image.Image):
        return not is_animation(item)
    return getattr(item, "ndim", 0) == 3


def is_video(item: Any) -> bool:
    """Whether `item` is one video: a file, an animation, an array [T, ..], or a list of frames."""
    if isinstance(item, list | tuple):
        return len(item) > 0 and all(is_frame(frame) for frame in item)
    if isinstance(item, MediaFile):
        return item.moves or item.form == "GIF"
    return is_animation(item) or getattr(item, "ndim", 0) == 4


def open_videos(videos: Any) -> Any:
    """`open_file` of each path and URL, in the same nesting; other videos are returned unchanged."""
    if isinstance(videos, list | tuple):
        return [open_videos(video) for video in videos]
    return open_file(os.fspath(videos)) if isinstance(videos, str | os.PathLike) else videos


def open_file(source: str) -> MediaFile:
    """
    The video or picture behind a path, a URL or base64 text; its content, not its name, decides who reads it.

    Raises:
        ValueError: If there is none, or it has far more pixels than `Image.MAX_IMAGE_PIXELS`.
    """
    try:
        content = find_file(source)
    except OSError as error:
        raise ValueError(f"{shown(source)} cannot be read as a video: {error}. Expected {VIDEO_FORMS}.") from None
    film = MediaFile(content, shown(source))
    try:
        with film.open() as file, Image.open(file) as image:
            if image.format == "MPEG":  # which PIL knows, and cannot decode
                return film
            return MediaFile(content, shown(source), image.format, is_animation(image))
    except Image.DecompressionBombError as error:
        raise ValueError(f"{shown(source)} is refused: {error} Make it smaller.") from None
    except Exception:  # each of Pillow's decoders has errors of its own
        return film


def flatten_videos(videos: Any) -> list:
    """
    The videos of all prompts in their order.

    Raises:
        TypeError: If something in `videos` is no video.
    """
    if videos is None:
        return []
    if is_video(videos):
        return [videos]
    if not isinstance(videos, list | tuple) and getattr(videos, "ndim", 0) != 5:
        got = f"the picture {videos.name}" if isinstance(videos, MediaFile) else type(videos).__name__
        raise TypeError(f"A video is {VIDEO_FORMS}, got {got}. A single picture is an image: give it as `images`.")
    return [video for entry in videos for video in flatten_videos(entry)]


def count_videos_by_prompt(videos: Any) -> list[int] | None:
    """How many videos each prompt has, if `videos` is a list of (maybe empty) lists of videos; else None."""
    entries = videos if isinstance(videos, list | tuple) else []
    if not entries or not all(isinstance(entry, list | tuple) and not is_video(entry) for entry in entries):
        return None
    return [len(flatten_videos(entry)) for entry in entries]


def flatten_metadata(metadata: VideoMetadataType | None, num_videos: int) -> Sequence[Mapping]:
    """
    What is known of each video: the same of all if `metadata` is not a list.

    Raises:
        ValueError: If it is a list for another number of videos.
    """
    if metadata is None or isinstance(metadata, Mapping):
        return [metadata or {}] * num_videos
    flat = [known or {} for entry in metadata for known in (entry if isinstance(entry, list | tuple) else [entry])]
    if len(flat) != num_videos:
        raise ValueError(f"`video_metadata` must have an entry for each of {num_videos} video(s), got {len(flat)}.")
    return flat


@dataclass(frozen=True)
class Sampling:
    """
    Which frames of a video are read, from its first to its last.

    Args:
        fps: Frames a second.
        num_frames: As many frames as that instead, evenly.
        max_frames: Where there are more at `fps`, as many as that instead, evenly.
        every_frame: Whether all frames are read as they are, in place of all this.

    Raises:
        ValueError: If a number is not positive.
    """

    fps: float
    num_frames: int | None
    max_frames: int
    every_frame: bool = False

    def __post_init__(self):
        for name in ("fps", "num_frames", "max_frames"):
            number = getattr(self, name)
            if number is not None and not number > 0:
                raise ValueError(f"`{name}` must be positive, got {number}.")

    def times(self, clip: Clip) -> torch.Tensor:
        """When a video is looked at, in seconds, float64 [T]."""
        if self.every_frame:
            return clip.begins
        first, last = float(clip.begins[0]), float(clip.begins[-1])
        steady = int((last - first + clip.rounding) * self.fps) + 1
        if self.num_frames is None and steady <= self.max_frames:
            return first + steady_times(steady, self.fps)
        if self.num_frames is None:
            logger.warning_once(
                f"At {self.fps} frames a second a video has {steady} frames, more than `max_frames`: "
                f"{self.max_frames} are read, evenly from its first to its last."
            )
        return torch.linspace(first, last, self.num_frames or self.max_frames, dtype=torch.float64)


def steady_times(count: int, fps: float) -> torch.Tensor:
    """`count` times, of which `fps` are in a second, from 0 on."""
    return torch.arange(count, dtype=torch.float64) / fps


def pad_frames(times: torch.Tensor, ratio: int) -> torch.Tensor:
    """Times with the last repeated until there are 1 + `ratio` k of them, so that no frame is dropped."""
    return torch.cat([times, times[-1:].expand(-(len(times) - 1) % ratio)])


def open_clip(video: Any, fps: float, metadata: Mapping, input_data_format: str | None = None) -> Clip:
    """
    A video, to be read frame by frame.

    Args:
        video: As `is_video` says, with paths and URLs opened by `open_videos`.
        fps: Frames a second of an array or a list of which `metadata` does not say it.
        metadata: Of an array or a list: `fps` of the video that it is from, and `frames_indices`, the numbers that its
            frames had there.
        input_data_format: As `read_image` takes it, for frames that are arrays.

    Raises:
        ImportError: If the file needs PyAV, which is not installed.
        ValueError: If there is no frame, or the file cannot be read, or the metadata do not fit.
    """
    if isinstance(video, MediaFile) and video.form is None:
        return clip_of_film(video)
    if isinstance(video, MediaFile | Image.Image):
        return clip_of_animation(video)
    begins = begins_of_frames(len(video), fps, metadata)
    return Clip(
        begins,
        lambda: nullcontext(zip(begins.tolist(), video, strict=True)),
        lambda frame: read_frame(frame, input_data_format),
    )


def begins_of_frames(num_frames: int, fps: float, metadata: Mapping) -> torch.Tensor:
    """When each frame of an array or a list begins, in seconds; see `open_clip`."""
    if num_frames == 0:
        raise ValueError("A video must have one frame or more, got none.")
    own_fps, indices = metadata.get("fps"), metadata.get("frames_indices")
    if own_fps is not None and not own_fps > 0:
        raise ValueError(f"`fps` must be positive, got {own_fps} in `video_metadata`.")
    if indices is None:
        return steady_times(num_frames, own_fps or fps)
    indices = torch.as_tensor(np.asarray(indices), dtype=torch.float64)
    if own_fps is None or len(indices) != num_frames or (indices.diff() < 0).any():
        raise ValueError(
            f"`video_metadata` with `frames_indices` must have an ascending index for each of {num_frames} frame(s), "
            f"and `fps`, got {len(indices)} indices {indices.long().tolist()[:20]} and fps={own_fps}."
        )
    return indices / own_fps


def read_frame(frame: Any, input_data_format: str | None) -> Image.Image:
    """A picture of a list, as RGB."""
    if not isinstance(frame, MediaFile):
        return read_image(frame, input_data_format)
    with frame.open() as file, Image.open(file) as image:
        return read_image(image)


def clip_of_animation(source: MediaFile | Image.Image) -> Clip:
    """An animation's frames with their own times, read by PIL."""

    @contextmanager
    def opened() -> Iterator[Image.Image]:
        if isinstance(source, Image.Image):
            yield source
        else:
            with source.open() as file, Image.open(file) as animation:
                yield animation

    @contextmanager
    def frames() -> Iterator[Iterator]:
        with opened() as animation:
            skipped = first_frame(animation)
            yield ((begin, (animation, skipped + number)) for number, begin in enumerate(begins.tolist()))

    def read(frame: tuple[Image.Image, int]) -> Image.Image:
        animation, number = frame
        animation.seek(number)
        return read_image(animation)

    with opened() as animation:
        begins = begins_of_animation(animation)
    return Clip(begins, frames, read)


def first_frame(animation: Image.Image) -> int:
    """The number of an animation's first frame: 1 in a PNG whose first picture is for viewers that show no more."""
    return int(getattr(animation, "default_image", False))


def begins_of_animation(animation: Image.Image) -> torch.Tensor:
    """When each frame of an animation begins, in seconds."""
    delays = []
    try:
        for frame in ImageSequence.Iterator(animation):
            read_image(frame)  # some of Pillow's decoders say the delay of a frame when they have read it
            delay = frame.info.get("duration", 0) / 1000
            delays.append(delay if delay > LEAST_DELAY else DEFAULT_DELAY)
    except ValueError:
        raise
    except Exception as error:  # on the way to the next frame; each of Pillow's decoders has errors of its own
        raise ValueError(f"The animation breaks off after {len(delays)} frame(s): {error}. Get it again.") from None
    delays = delays[first_frame(animation) :]
    return torch.tensor([0.0, *delays[:-1]], dtype=torch.float64).cumsum(0)


def clip_of_film(film: MediaFile) -> Clip:
    """The frames of a file with their own presentation times, read by PyAV."""
    with open_film(film) as (container, stream):
        packets = container.demux(stream)
        ticks = sorted({packet.pts for packet in packets if packet.pts is not None and not packet.is_discard})
        tick = stream.time_base
    if not ticks:
        raise ValueError(
            f"{film.name} cannot be read as a video: no frame in it has a time. It is damaged or cut off, or a bare "
            "stream; put that into a container such as MP4."
        )

    @contextmanager
    def frames() -> Iterator[Iterator]:
        with open_film(film) as (container, stream):
            yield decoded(container.decode(stream), float(ticks[0] * tick))

    begins = torch.tensor([float((number - ticks[0]) * tick) for number in ticks], dtype=torch.float64)
    return Clip(begins, frames, read_film_frame, ROUNDING)


def decoded(frames: Iterator[Any], first: float) -> Iterator[tuple[float, tuple[Any, Image.Transpose | None]]]:
    """PyAV's frames with the seconds after `first` at which they begin, and how they are to be turned."""
    turn = None
    for number, frame in enumerate(frames):
        if number == 0:  # alone: a frame whose side data were read is kept until the next collection of garbage
            turn = turn_of(frame)
        if frame.time is not None:
            yield frame.time - first, (frame, turn)


@contextmanager
def open_film(film: MediaFile) -> Iterator[tuple[Any, Any]]:
    """
    PyAV's container of a file, and its stream of pictures.

    Nothing but the file is read: a playlist in it, which names others, is refused.
    """
    try:
        import av
    except ImportError:
        raise ImportError(f"PyAV reads {film.name}, and is not installed: pip install av") from None
    try:
        with film.open() as file, av.open(file, options={"protocol_whitelist": "none"}) as container:
            stream = container.streams.best("video")
            decodable = stream is not None and stream.codec_context is not None
            if not decodable or stream.disposition & av.stream.Disposition.attached_pic:
                raise ValueError(f"{film.name} has no video in it that PyAV decodes.")
            check_pixels(stream.width, stream.height)
            yield container, stream
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(
            f"{film.name} cannot be read as a video: {error.strerror}. It is damaged, cut off, or no video."
        ) from None


def turn_of(frame: Any) -> Image.Transpose | None:
    """How the file says that a frame is to be turned and mirrored."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return None
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5] / 2**16
    return TURNS.get((round(a), round(b), round(c), round(d)))


def read_film_frame(decoded: tuple[Any, Image.Transpose | None]) -> Image.Image:
    """A frame of PyAV's as RGB."""
    frame, turn = decoded
    transparent = any(component.is_alpha for component in frame.format.components)
    image = Image.fromarray(frame.to_ndarray(format="rgba" if transparent else "rgb24"))
    return read_image(image if turn is None else image.transpose(turn))
