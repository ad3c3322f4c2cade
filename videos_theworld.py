# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Videos to frames at a steady rate: which are taken, when each of them was, and what becomes of a remainder.

What a frame looks like is the image processor's to say.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageSequence
from transformers.video_utils import VideoMetadataType, load_video

from .images_theworld import open_image, read_image


# What PIL reads; other files need a decoder of videos.
ANIMATIONS = (".gif", ".png", ".webp")


def is_animation(item: Any) -> bool:
    """Whether `item` is an image of PIL's with several frames."""
    try:
        return getattr(item, "n_frames", 1) > 1
    except Exception:  # damaged, where Pillow counts them; `read_animation` says after which
        return True


def is_frame(item: Any) -> bool:
    """Whether `item` is one picture: of PIL's and not an animation, or an array of three dimensions."""
    if isinstance(item, Image.Image):
        return not is_animation(item)
    return getattr(item, "ndim", 0) == 3


def is_video(item: Any) -> bool:
    """Whether `item` is one video: a file's name, an animation, an array [T, ..], or a list of frames."""
    if isinstance(item, list | tuple):
        return len(item) > 0 and all(is_frame(frame) for frame in item)
    return isinstance(item, str | Path) or is_animation(item) or getattr(item, "ndim", 0) == 4


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
        raise TypeError(
            "A video is a list of PIL images or arrays [H, W, 3], an array [T, H, W, 3], an animated PIL image or the "
            f"name of a file, got {type(videos).__name__}. A single picture is an image: give it as `images`."
        )
    return [video for entry in videos for video in flatten_videos(entry)]


def count_videos_by_prompt(videos: Any) -> list[int] | None:
    """How many videos each prompt has, if `videos` is a list of (maybe empty) lists of videos; else None."""
    entries = videos if isinstance(videos, list | tuple) else []
    if not entries or not all(isinstance(entry, list | tuple) and not is_video(entry) for entry in entries):
        return None
    return [len(flatten_videos(entry)) for entry in entries]


def flatten_metadata(metadata: VideoMetadataType | None, num_videos: int) -> list[Mapping | None]:
    """
    What is known of each video: the same of all if `metadata` is not a list.

    Raises:
        ValueError: If it is a list for another number of videos.
    """
    if metadata is None or isinstance(metadata, Mapping):
        return [metadata] * num_videos
    flat = [known for entry in metadata for known in (entry if isinstance(entry, list | tuple) else [entry])]
    if len(flat) != num_videos:
        raise ValueError(f"`video_metadata` must have an entry for each of {num_videos} video(s), got {len(flat)}.")
    return flat


def times_of(num_frames: int, fps: float) -> torch.Tensor:
    """When each of `num_frames` frames begins, in seconds."""
    return torch.arange(num_frames, dtype=torch.float64) / fps


def sample_frames(times: torch.Tensor, fps: float) -> torch.Tensor:
    """
    Which frames stand at every 1 / `fps` seconds from the first to the last, where they begin at `times` in seconds.

    Of a slower video some stand more than once.
    """
    steady = times_of(int((times[-1] - times[0]) * fps + 1e-6) + 1, fps)
    return torch.searchsorted(times - times[0], steady + 1e-6, right=True) - 1


def read_video(
    video: Any, fps: float, metadata: Mapping | None = None, input_data_format: str | None = None
) -> tuple[list[Image.Image], torch.Tensor]:
    """
    The frames of a video at a steady rate.

    Args:
        video: As `is_video` says. A file is read by `transformers.video_utils.load_video`, which needs PyAV, but for
            a GIF, PNG or WebP, which PIL reads.
        fps: Frames a second that are wanted.
        metadata: Says in `fps` how many frames a second an array or a list has; without it they are taken to be at the
            wanted rate already, and none is left out.
        input_data_format: As `read_image` takes it, for frames that are arrays.

    Returns:
        The frames, each as `read_image` reads it, and when each was, in seconds.

    Raises:
        TypeError: If a frame is an array of another dtype than uint8.
        ValueError: If a rate is not positive, there is no frame, or one cannot be read; see `read_image`.
    """
    own_fps = (metadata or {}).get("fps") or fps
    if not (fps > 0 and own_fps > 0):
        raise ValueError(f"`fps` must be positive, got {fps}, and {own_fps} in `video_metadata`.")
    if isinstance(video, str | Path) and Path(video).suffix.lower() in ANIMATIONS:
        with open_image(str(video)) as animation:
            return read_video(animation, fps)
    if isinstance(video, str | Path):
        frames, _ = load_video(
            str(video), sample_indices_fn=lambda of, **_: sample_frames(times_of(of.total_num_frames, of.fps), fps)
        )
        return [read_image(frame, "channels_last") for frame in frames], times_of(len(frames), fps)
    if isinstance(video, Image.Image):
        frames, begins = read_animation(video)
    else:
        frames, begins = video, times_of(len(video), own_fps)
    if len(frames) == 0:
        raise ValueError("A video must have one frame or more, got none.")
    chosen = sample_frames(begins, fps)
    return [read_image(frames[index], input_data_format) for index in chosen], times_of(len(chosen), fps)


def read_animation(animation: Image.Image) -> tuple[list[Image.Image], torch.Tensor]:
    """All frames of an animation, and when each begins, in seconds."""
    frames, lasts = [], []
    try:
        for frame in ImageSequence.Iterator(animation):  # the same object each time
            frames.append(read_image(frame).copy())
            lasts.append(frame.info.get("duration", 100) / 1000)
    except ValueError:
        raise
    except Exception as error:  # on the way to the next frame; each of Pillow's decoders has errors of its own
        raise ValueError(f"The animation breaks off after {len(frames)} frame(s): {error}. Get it again.") from None
    return frames, torch.tensor([0.0, *lasts[:-1]], dtype=torch.float64).cumsum(0)


def fill_up(frames: Sequence, times: torch.Tensor, ratio: int) -> tuple[list, torch.Tensor]:
    """Frames and their times with the last repeated until there are 1 + `ratio` k of them: none is dropped."""
    missing = -(len(frames) - 1) % ratio
    return [*frames, *[frames[-1]] * missing], torch.cat([times, times[-1:].expand(missing)])
