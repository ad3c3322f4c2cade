# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""Images and videos of several sizes: the size that each is resized to, and padded tensors that hold them together."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from transformers.image_processing_utils import get_size_dict


def read_pixel_limits(size: Mapping | int | Sequence[int]) -> tuple[int, int] | None:
    """
    The least and the most pixels of `size={"shortest_edge": least, "longest_edge": most}`; None for any other `size`.

    Both are areas, as in Qwen's image processors.

    Raises:
        ValueError: If the two are not positive or not in ascending order.
    """
    given = get_size_dict(size, default_to_square=False, param_name="size")
    if not {"shortest_edge", "longest_edge"} <= {name for name, value in given.items() if value is not None}:
        return None
    least, most = given["shortest_edge"], given["longest_edge"]
    if not 0 < least <= most:
        raise ValueError(
            "`size` must give the least and the most pixels of an image as `shortest_edge` and `longest_edge`, with "
            f"0 < shortest_edge <= longest_edge, got {dict(given)}."
        )
    return least, most


def fit_size(height: int, width: int, patch_size: int, least: int, most: int) -> tuple[int, int]:
    """
    The size to resize an image of `height` x `width` to, so that its shape is kept.

    Both sides are multiples of `patch_size`, and among the multiples around the exact size, those with the nearest
    aspect ratio are taken. An image of `least` to `most` pixels changes no more than this needs. A narrow image is
    enlarged until its shorter side is one patch.

    Raises:
        ValueError: If the image is too narrow for `most` pixels.
    """
    area = height * width
    scale = math.sqrt(min(max(area, least), most) / area)
    scale = max(scale, patch_size / min(height, width))
    rows, columns = height * scale / patch_size, width * scale / patch_size
    allowed = [(r, c) for r in neighbors(rows) for c in neighbors(columns) if r * c * patch_size**2 <= most]
    if not allowed:
        raise ValueError(
            f"An image of {height}x{width} pixels (height x width) cannot keep its shape with at most {most:,} pixels "
            f"and sides that are multiples of {patch_size}. Crop it, or allow more pixels by `size['longest_edge']`; "
            "for a video, also by `max_video_pixels` or fewer frames."
        )

    def misfit(size: tuple[int, int]) -> tuple[bool, float, float]:
        pixels, ratio = size[0] * size[1] * patch_size**2, size[0] / size[1]
        wanted = rows * columns * patch_size**2
        return pixels < least, abs(math.log(ratio * width / height)), abs(math.log(pixels / wanted))

    rows, columns = min(allowed, key=misfit)
    return rows * patch_size, columns * patch_size


def neighbors(number: float) -> list[int]:
    """The integers around a number, at least 1."""
    return sorted({max(1, math.floor(number)), max(1, math.ceil(number))})


def pad_together(items: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Tensors of several shapes as one, with zeros after the end of each axis.

    Args:
        items: Images or latents [C, h, w], or videos [T, C, h, w], which differ in any axis but C.

    Returns:
        [items, C, Hmax, Wmax] or [items, Tmax, C, Hmax, Wmax]; and the sizes, int64 [items, 2] (h, w) or
        [items, 3] (T, h, w).
    """
    shapes = torch.tensor([item.shape for item in items])
    axes = [axis for axis in range(shapes.shape[1]) if axis != shapes.shape[1] - 3]
    if (shapes == shapes[0]).all():
        return torch.stack(list(items)) if len(items) > 1 else items[0].unsqueeze(0), shapes[:, axes]
    padded = items[0].new_zeros(len(items), *shapes.amax(0).tolist())
    for row, item in zip(padded, items, strict=True):
        row[tuple(slice(length) for length in item.shape)] = item
    return padded, shapes[:, axes]


def unpad(
    padded: torch.Tensor | Sequence[torch.Tensor], sizes: torch.Tensor | Sequence, name: str, cell: Sequence[int]
) -> list[torch.Tensor]:
    """
    The items that `pad_together` padded, as views.

    Args:
        padded: [items, .., Hmax, Wmax]; or a list of items, already without padding.
        sizes: In pixels, [items, 2] (h, w), or [items, 3] (T, h, w).
        name: What the sizes are called in error messages.
        cell: Frames (of videos), rows and columns of pixels for each entry of `padded`; 1 for pixels themselves.

    Raises:
        ValueError: If there is not one size for each item, or one does not fit into `padded`.
    """
    rows = torch.as_tensor(sizes).tolist()
    axes = "(T, h, w)" if len(cell) == 3 else "(h, w)"
    if len(rows) != len(padded) or any(not isinstance(row, list) or len(row) != len(cell) for row in rows):
        raise ValueError(
            f"`{name}` must be [{len(padded)}, {len(cell)}], one {axes} in pixels for each item, got "
            f"{list(torch.as_tensor(sizes).shape)}. TheWorldProcessor returns it."
        )
    first = (1, 0, 0)[-len(cell) :]  # the first frame of a video has a latent of its own
    items = []
    for item, row in zip(padded, rows, strict=True):
        lengths = [start + (length - start) // step for length, start, step in zip(row, first, cell, strict=True)]
        whole = all((length - start) % step == 0 for length, start, step in zip(row, first, cell, strict=True))
        held = [item.shape[axis] for axis in (0, -2, -1)[-len(cell) :]]
        fits = all(0 < length <= most for length, most in zip(lengths, held, strict=True))
        if not (whole and fits and (isinstance(padded, torch.Tensor) or held == lengths)):
            raise ValueError(
                f"`{name}` has {axes} = {tuple(row)}, which an item of shape {list(item.shape)} does not hold. Give "
                "the sizes that TheWorldProcessor returned with it."
            )
        frames = item[: lengths[0]] if len(cell) == 3 else item
        items.append(frames[..., : lengths[-2], : lengths[-1]])
    return items


def map_by_shape(
    function: Callable[[torch.Tensor], torch.Tensor], items: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """`function` of each item, in order; it is called once for all items of one shape, stacked."""
    numbers: dict[torch.Size, list[int]] = defaultdict(list)
    for number, item in enumerate(items):
        numbers[item.shape].append(number)
    results: dict[int, torch.Tensor] = {}
    for group in numbers.values():
        results |= zip(group, function(torch.stack([items[number] for number in group])), strict=True)
    return [results[number] for number in range(len(items))]
