"""Small video files like those of phones, browsers and screen recorders, written by PyAV."""

from collections.abc import Iterable
from fractions import Fraction
from io import BytesIO
from typing import Any

import av
import numpy as np


TICK = Fraction(1, 1000)


def write_film(
    frames: Iterable[np.ndarray],
    times: list[float],
    form: str = "mp4",
    codec: str = "libx264",
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    turned: dict[str, Any] | None = None,
    colors: int | None = None,
) -> bytes:
    """
    The content of a file.

    Args:
        frames: uint8 [H, W, 3], or [H, W, 4] with transparency.
        times: When each is shown, in seconds.
        form: FFmpeg's name of the container.
        codec: FFmpeg's name of the encoder; `pixels` that of its pixel format.
        options: The container's.
        turned: The rotation for players, as PyAV's `set_display_rotation` takes it.
        colors: FFmpeg's number of the standard by which it makes YUV of RGB, and says so: 1 BT.709, 5 BT.601.
    """
    file = BytesIO()
    with av.open(file, "w", format=form, options=options or {}) as container:
        stream = container.add_stream(codec, rate=30)
        stream.pix_fmt = pixels
        stream.codec_context.time_base = TICK
        if colors is not None:
            stream.codec_context.colorspace = colors
        if turned is not None:
            stream.set_display_rotation(**turned)
        for frame, time in zip(frames, times, strict=True):
            if not stream.codec_context.is_open:
                stream.height, stream.width = frame.shape[:2]
            picture = av.VideoFrame.from_ndarray(frame, "rgb24" if frame.shape[2] == 3 else "rgba")
            if colors is not None:
                picture = picture.reformat(format=pixels, dst_colorspace={1: "itu709", 5: "itu601"}[colors])
            picture.pts, picture.time_base = round(time / TICK), TICK
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return file.getvalue()
