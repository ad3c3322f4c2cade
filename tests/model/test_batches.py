"""Tests that each image's tokens land in its own prompt, for any number, order and size of images in a batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from theworld import TheWorldForConditionalGeneration, TheWorldProcessor


# The words around the images of a prompt, one more than it has images. Each image has one color.
WORDS = st.text("abc ", max_size=4)
COLOURS = st.tuples(*[st.integers(0, 255)] * 3)
PROMPTS = st.lists(
    st.tuples(st.lists(COLOURS, max_size=3), st.lists(WORDS, min_size=4, max_size=4)), min_size=1, max_size=4
)
SIDES = st.sampled_from([8, 16, 24])


@pytest.fixture(scope="module")
def loaded(convert) -> tuple[TheWorldForConditionalGeneration, TheWorldProcessor]:
    folder = convert("gemma2")
    return (
        TheWorldForConditionalGeneration.from_pretrained(folder).eval(),
        TheWorldProcessor.from_pretrained(folder),
    )


def make_batch(processor: TheWorldProcessor, prompts: list, grouped: bool, **options):
    """The inputs of prompts that are (colours, words), and the images of each."""
    texts = ["<world>".join(words[: len(colours) + 1]) for colours, words in prompts]
    images = [[Image.new("RGB", (9, 7), colour) for colour in colours] for colours, _ in prompts]
    flat = [image for of_prompt in images for image in of_prompt]
    return processor(
        text=texts, images=images if grouped else flat or None, padding=True, return_tensors="pt", **options
    ), images


@settings(max_examples=60, deadline=None, derandomize=True)
@given(prompts=PROMPTS, height=SIDES, width=SIDES, grouped=st.booleans(), side=st.sampled_from(["left", "right"]))
@torch.no_grad()
def test_each_images_tokens_land_in_its_own_prompt(loaded, prompts, height, width, grouped, side):
    model, processor = loaded
    size = {"height": height, "width": width}
    inputs, images = make_batch(processor, prompts, grouped, size=size, padding_side=side)
    embeddings = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: embeddings.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**inputs)
    hook.remove()
    for row, of_prompt in enumerate(images):
        read = embeddings[0][row][inputs["input_ids"][row] == processor.image_token_id]
        for image, tokens in zip(of_prompt, read.view(-1, height * width // 64, read.shape[-1]), strict=True):
            alone = processor(images=image, size=size, return_tensors="pt")
            expected = model.get_image_features(**alone).pooler_output[0]
            torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(prompts=PROMPTS, data=st.data())
@torch.no_grad()
def test_a_moved_placeholder_is_rejected(loaded, prompts, data):
    """The number of placeholders stays right, so only their positions reveal the error."""
    model, processor = loaded
    inputs, images = make_batch(processor, prompts, grouped=True, size={"height": 16, "width": 16})
    places = inputs["input_ids"] == processor.image_token_id
    # From inside an image, so that what is left of it is in two pieces or one too short.
    inside = places & places.roll(1, 1) & places.roll(-1, 1)
    if not inside.any() or places.all():
        return
    one = data.draw(st.sampled_from(inside.nonzero().tolist()))
    other = data.draw(st.sampled_from((~places).nonzero().tolist()))
    ids = inputs["input_ids"]
    ids[tuple(one)], ids[tuple(other)] = ids[tuple(other)].clone(), ids[tuple(one)].clone()
    with pytest.raises(ValueError, match="4 `<world>` placeholders must be in one prompt"):
        model(**inputs)
