# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""Draws the attention to world tokens as an overlay on the image, and the channels of the latent."""

import textwrap
from collections.abc import Mapping

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn import functional as F
from transformers import PreTrainedModel

from theworld.versions_theworld import CACHE_NAME


SIDE = 256  # pixels of a panel
MARGIN = 16
LINE = 20
FONT = ImageFont.load_default(15)
INK, PAPER, HEAT = (30, 30, 30), (255, 255, 255), (255, 40, 0)


@torch.no_grad()
def attention_to_world(model: PreTrainedModel, inputs: Mapping) -> torch.Tensor:
    """
    The attention of the last prompt token, which predicts the first token of the answer, to each world token.

    Args:
        model: A TheWorld checkpoint. Sets Gemma's attention to "eager", the only implementation that returns weights.
        inputs: Model inputs of one prompt, with `world_latents` [1, z, h, w] of its image or `world_latents_videos`
            [1, 1 + k, z, h, w] of its video.

    Returns:
        Float32 [h / merge, w / merge]: the mean over all heads of the layers that attend to the whole prompt. For a
        video, the sum over its latent frames.
    """
    inputs = dict(inputs)
    input_ids, _ = inputs.pop("input_ids"), inputs.pop("attention_mask", None)
    if "token_type_ids" in inputs:
        inputs["token_type_ids"] = inputs["token_type_ids"][:, :-1]
    read = model(input_ids=input_ids[:, :-1], **inputs, use_cache=True, logits_to_keep=1)
    model.set_attn_implementation({"text_config": "eager"})
    last = model(input_ids=input_ids[:, -1:], cache=read[CACHE_NAME], output_attentions=True)
    whole = [layer for layer in last.attentions if layer.shape[-1] == input_ids.shape[1]]
    weights = torch.stack(whole).mean(dim=(0, 2, 3))[0]
    of_world = (input_ids[0] == model.config.image_token_id) | (input_ids[0] == model.config.video_token_id)
    latents = inputs["world_latents" if "world_latents" in inputs else "world_latents_videos"]
    height, width = latents.shape[-2:]
    merge = model.config.latent_merge_size
    return weights[of_world].view(-1, height // merge, width // merge).sum(0).float()


def overlay_attention(image: Image.Image, attention: torch.Tensor) -> Image.Image:
    """The image in gray, with the attention [h, w] in red."""
    panel = ImageOps.contain(image.convert("L").convert("RGB"), (SIDE, SIDE))
    strength = (attention - attention.min()) / (attention.max() - attention.min())
    strength = F.interpolate(strength[None, None], size=(panel.height, panel.width), mode="bilinear")[0, 0]
    mask = Image.fromarray((strength * 200).byte().numpy())
    panel.paste(HEAT, mask=mask)
    return panel


def contact_sheet(latents: torch.Tensor) -> Image.Image:
    """The channels of latents [1, z, h, w], eight in a row, each scaled from its minimum to its maximum."""
    side = SIDE // 4
    sheet = Image.new("RGB", (8 * (side + 4), -(-latents.shape[1] // 8) * (side + 4)), PAPER)
    for number, channel in enumerate(latents[0].float()):
        scaled = (channel - channel.min()) / (channel.max() - channel.min()).clamp(min=1e-6)
        tile = ImageOps.contain(Image.fromarray((scaled * 255).byte().numpy()), (side, side), Image.Resampling.NEAREST)
        sheet.paste(tile, (number % 8 * (side + 4), number // 8 * (side + 4)))
    return sheet


def draw_report(
    image: Image.Image, answers: list[tuple[str, str, torch.Tensor]], latents: torch.Tensor
) -> Image.Image:
    """
    One page with the image, the attention of each answer next to it, and the latent below.

    Args:
        image: The image in the prompt.
        answers: For each question its text, the text of the answer, and the answer's attention [h, w].
        latents: [1, z, h, w].
    """
    panels = [
        (ImageOps.contain(image.convert("RGB"), (SIDE, SIDE)), "the picture", f"{image.width} x {image.height} pixels")
    ]
    panels += [(overlay_attention(image, attention), question, answer) for question, answer, attention in answers]
    sheet = contact_sheet(latents)
    questions = [textwrap.wrap(question, SIDE // 8) for _, question, _ in panels]
    text_height = LINE * (1 + max(len(lines) for lines in questions))
    width = MARGIN + max(len(panels) * (SIDE + MARGIN), sheet.width + MARGIN)
    top_of_sheet = MARGIN + SIDE + text_height + 2 * MARGIN
    page = Image.new("RGB", (width, top_of_sheet + LINE + sheet.height + MARGIN), PAPER)
    pen = ImageDraw.Draw(page)
    for number, ((panel, _, answer), lines) in enumerate(zip(panels, questions, strict=True)):
        left, top = MARGIN + number * (SIDE + MARGIN), MARGIN
        page.paste(panel, (left, top))
        pen.multiline_text((left, top + SIDE + 6), "\n".join([*lines, answer]), INK, FONT)
    caption = f"the latent: {latents.shape[1]} channels of {latents.shape[2]} x {latents.shape[3]}"
    pen.text((MARGIN, top_of_sheet), caption, INK, FONT)
    page.paste(sheet, (MARGIN, top_of_sheet + LINE + 4))
    return page
