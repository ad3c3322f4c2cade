"""Tests images of any shape and videos of any length: resizing, padding, and each item of a batch as alone."""

import math

import numpy as np
import pytest
import torch
import transformers
from diffusers import AutoencoderKLWan
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from packaging import version
from PIL import Image
from transformers import AutoProcessor, pipeline

from tests.helpers.modeling import gemmas_inputs, generate, logits_of
from theworld import TheWorldForConditionalGeneration, TheWorldProcessor
from theworld.images_theworld import fit_size
from theworld.padding_theworld import pad_together, unpad


LIMITS = {"shortest_edge": 64, "longest_edge": 512 * 512}
LATENTS = {"atol": 1e-5, "rtol": 0}
LOGITS = {"atol": 1e-4, "rtol": 0}
# Wide, tall, square: width x height as PIL says it.
SHAPES = ((400, 160), (152, 440), (256, 256))
LENGTHS = (3, 9, 24)


def draw(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def draw_clip(length: int, width: int, height: int) -> list[Image.Image]:
    return [draw(width, height, seed) for seed in range(length)]


def load(folder, **size) -> tuple[TheWorldForConditionalGeneration, TheWorldProcessor]:
    processor = TheWorldProcessor.from_pretrained(folder)
    processor.image_processor.size = {**LIMITS, **size}
    return TheWorldForConditionalGeneration.from_pretrained(folder).eval(), processor


@pytest.fixture(scope="module")
def loaded(convert):
    return load(convert("gemma2"))


@pytest.fixture(scope="module")
def vae(sources):
    return AutoencoderKLWan.from_pretrained(sources / "pipeline", subfolder="vae").eval()


# The size that an image is resized to.


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 4000),
    width=st.integers(1, 4000),
    patch=st.sampled_from([8, 16]),
    least=st.integers(1, 2**18),
    most=st.integers(2**10, 2**20),
)
def test_sides_fit_patch_budget_and_shape(height, width, patch, least, most):
    assume(least <= most and patch**2 * max(height, width) / min(height, width) <= most)
    fitted = fit_size(height, width, patch, least, most)
    assert all(side > 0 and side % patch == 0 for side in fitted) and math.prod(fitted) <= most
    # Neither side is more than a patch from its exact length.
    scale = max(math.sqrt(min(max(height * width, least), most) / (height * width)), patch / min(height, width))
    assert all(abs(side - scale * given) < patch + 1e-6 for side, given in zip(fitted, (height, width), strict=True))


@pytest.mark.parametrize(
    ("shape", "fitted"),
    [
        ((160, 400), (160, 400)),
        ((1200, 1600), (440, 584)),
        ((1, 2000), (8, 16000)),  # enlarged, so that its shape is kept
        ((3, 3), (64, 64)),
        ((20, 30), (56, 80)),
    ],
)
def test_examples_of_fitted_sizes(shape, fitted):
    assert fit_size(*shape, patch_size=8, least=4096, most=2**18) == fitted


def test_images_too_narrow_to_keep_their_shape_are_refused(loaded):
    _, processor = loaded
    with pytest.raises(ValueError, match=r"1x5000 pixels .* cannot keep its shape with at most 262,144 .* Crop it"):
        processor(text="<world>", images=Image.new("RGB", (5000, 1)))
    assert processor._get_num_multimodal_tokens([(1, 2000)])["num_image_tokens"] == [2000]


def test_images_within_the_limits_keep_their_pixels(loaded):
    _, processor = loaded
    inputs = processor(images=[draw(*shape) for shape in SHAPES], return_tensors="pt")
    assert inputs["image_sizes"].tolist() == [[height, width] for width, height in SHAPES]
    for pixels, (width, height) in zip(inputs["pixel_values"], SHAPES, strict=True):
        alone = processor(images=draw(width, height), size={"height": height, "width": width}, return_tensors="pt")
        assert torch.equal(pixels[:, :height, :width], alone["pixel_values"][0]) and "image_sizes" not in alone
        assert not pixels[:, height:].any() and not pixels[:, :, width:].any()


def test_longer_videos_have_smaller_frames(loaded):
    _, processor = loaded
    clip = draw_clip(24, 400, 160)
    inputs = processor(videos=[clip[:1], clip], max_video_pixels=2**18, return_tensors="pt")
    (one, *small), (many, *smaller) = inputs["video_sizes"].tolist()
    assert (one, many) == (1, 25) and small == [160, 400]
    assert 0.8 * 2**18 < math.prod(smaller) * many <= 2**18
    assert processor.max_video_pixels == 8 * 512 * 512


def test_unresized_images_of_several_sizes(loaded):
    _, processor = loaded
    inputs = processor(images=[draw(*shape) for shape in SHAPES], do_resize=False, return_tensors="pt")
    assert inputs["image_sizes"].tolist() == [[height, width] for width, height in SHAPES]


@pytest.mark.parametrize("size", [LIMITS, {"height": 64, "width": 32}], ids=["limits", "fixed"])
def test_counts_equal_the_placeholders(loaded, size):
    _, processor = loaded
    shapes, clips = [*SHAPES, (1, 2000), (700, 900)], [draw_clip(length, 200, 88) for length in LENGTHS]
    images = [draw(*shape) for shape in shapes]
    input_ids = processor(text=["<world>"] * len(images), images=images, size=size)["input_ids"]
    counted = processor._get_num_multimodal_tokens([(height, width) for width, height in shapes], size=size)
    assert counted["num_image_tokens"] == [ids.count(processor.image_token_id) for ids in input_ids]
    for options in ({}, {"num_frames": 6}, {"max_frames": 8}, {"do_sample_frames": False}):
        options = {**options, "size": size}
        input_ids = processor(text=["<world_video>"] * len(clips), videos=clips, **options)["input_ids"]
        counted = processor._get_num_multimodal_tokens(video_sizes=[(n, 88, 200) for n in LENGTHS], **options)
        assert counted["num_video_tokens"] == [ids.count(processor.video_token_id) for ids in input_ids]


def test_saved_limits_are_loaded_again(loaded, tmp_path):
    _, processor = loaded
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert dict(again.image_processor.size) == LIMITS and again.max_video_pixels == processor.max_video_pixels
    inputs, expected = (each(images=draw(*SHAPES[0]), return_tensors="pt") for each in (again, processor))
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


# What the model makes of them.


@torch.no_grad()
def test_latents_are_diffusers_of_each_alone(loaded, vae):
    model, processor = loaded
    pictures = processor(images=[draw(*shape) for shape in SHAPES], return_tensors="pt")
    clips = [draw_clip(length, *shape) for length, shape in zip(LENGTHS, ((80, 64), (40, 96), (64, 64)), strict=True)]
    videos = processor(videos=clips, return_tensors="pt")
    assert videos["video_sizes"].tolist() == [[5, 64, 80], [9, 96, 40], [25, 64, 64]]
    for encoded, pixels, sizes in (
        (model.get_world_latents(*pictures.values()), *pictures.values()),
        (model.get_world_latents(*videos.values()), *videos.values()),
    ):
        cells = (1,) * sizes.shape[1]
        for latents, item in zip(encoded, unpad(pixels, sizes, "sizes", cells), strict=True):
            frames = item if item.ndim == 4 else item.unsqueeze(0)
            expected = vae.encode(frames.transpose(0, 1).unsqueeze(0)).latent_dist.mode()[0].transpose(0, 1)
            torch.testing.assert_close(latents, expected.view(latents.shape), **LATENTS)


TEXTS = ["<world>what is it?", "<world>a longer question: is it red?", "<world><world>?", "only text"]
PICTURES = [[draw(96, 40)], [draw(40, 112)], [draw(64, 64), draw(64, 24)], []]


def make_inputs(processor, rows: slice = slice(None), pictures: list = PICTURES, **options):
    images = pictures[rows] if any(pictures[rows]) else None
    return processor(text=TEXTS[rows], images=images, padding=True, return_tensors="pt", **options)


def make_alone(processor, **options) -> list:
    """The inputs of each prompt alone."""
    return [make_inputs(processor, slice(row, row + 1), **options) for row in range(len(TEXTS))]


def check_as_alone(model, processor, **options) -> None:
    """Each prompt of a batch has the logits that it has alone."""
    logits = logits_of(model, make_inputs(processor, **options))
    for row, inputs in zip(logits, make_alone(processor, **options), strict=True):
        torch.testing.assert_close(row[-inputs["input_ids"].shape[1] :], logits_of(model, inputs)[0], **LOGITS)


def check_answers_as_alone(model, inputs, alone: list, **options) -> None:
    """Each prompt of a batch has the answer that it has alone."""
    for answer, each in zip(generate(model, inputs, **options), alone, strict=True):
        expected = generate(model, each, **options)[0]
        length = min(len(answer), len(expected))  # a row that ends earlier is padded
        assert torch.equal(answer[:length], expected[:length])


def test_wide_tall_and_square_pictures_of_a_batch_as_alone(loaded):
    model, processor = loaded
    pictures = [*([draw(*shape)] for shape in SHAPES), []]
    texts = [text.replace("<world><world>", "<world>") for text in TEXTS]
    inputs = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    alone = [
        processor(text=text, images=images or None, return_tensors="pt")
        for text, images in zip(texts, pictures, strict=True)
    ]
    for row, each in zip(logits_of(model, inputs), alone, strict=True):
        torch.testing.assert_close(row[-each["input_ids"].shape[1] :], logits_of(model, each)[0], **LOGITS)
    check_answers_as_alone(model, inputs, alone)


def test_clips_of_three_lengths_as_alone(loaded):
    model, processor = loaded
    clips = [draw_clip(length, *shape) for length, shape in zip(LENGTHS, ((40, 24), (24, 48), (32, 32)), strict=True)]
    texts = [f"<world_video>{text.replace('<world>', '')}" for text in TEXTS[:3]]
    inputs = processor(text=texts, videos=[[clip] for clip in clips], padding=True, return_tensors="pt")
    alone = [processor(text=text, videos=[clip], return_tensors="pt") for text, clip in zip(texts, clips, strict=True)]
    for row, each in zip(logits_of(model, inputs), alone, strict=True):
        torch.testing.assert_close(row[-each["input_ids"].shape[1] :], logits_of(model, each)[0], **LOGITS)
    check_answers_as_alone(model, inputs, alone, num_beams=2)


@pytest.mark.parametrize(
    "options", [{"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str
)
def test_each_prompt_of_a_batch_has_the_answer_it_has_alone(loaded, options):
    model, processor = loaded
    check_answers_as_alone(model, make_inputs(processor), make_alone(processor), **options)


def test_embeddings_in_place_of_ids_answer_the_same(loaded):
    model, processor = loaded
    inputs = make_inputs(processor)
    expected, ids = generate(model, inputs), inputs["input_ids"]
    embedded = {**inputs, "inputs_embeds": model.get_input_embeddings()(ids), "input_ids": ids.new_zeros(len(ids), 0)}
    assert torch.equal(generate(model, embedded), expected)


@pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.23"), reason="transformers passes chunks no images"
)
def test_chunked_prefill_answers_the_same(loaded):
    model, processor = loaded
    inputs = make_inputs(processor)
    assert torch.equal(generate(model, inputs, prefill_chunk_size=32), generate(model, inputs))


@torch.no_grad()
@pytest.mark.parametrize("form", ["list", "padded", "features"])
def test_encoded_images_replace_their_pixels(loaded, form):
    model, processor = loaded
    inputs = make_inputs(processor)
    expected, answer = logits_of(model, inputs), generate(model, inputs, num_beams=2)
    pixels, sizes = inputs.pop("pixel_values"), inputs.pop("image_sizes")
    latents = model.get_world_latents(pixels, sizes)
    if form == "list":
        inputs["world_latents"] = latents
    elif form == "padded":
        inputs["world_latents"], inputs["image_sizes"] = pad_together(latents)[0], sizes
    else:
        inputs["mm_encoder_outputs"] = {"image": model.get_image_features(pixels, sizes)}
    assert torch.equal(logits_of(model, inputs), expected)
    assert torch.equal(generate(model, inputs, num_beams=2), answer)


def test_latents_of_several_sizes_make_the_prompts_of_their_images(loaded):
    model, processor = loaded
    inputs = make_inputs(processor)
    with torch.no_grad():
        latents = iter(model.get_world_latents(inputs["pixel_values"], inputs["image_sizes"]))
    by_prompt = [[next(latents) for _ in images] for images in PICTURES]
    encoded = processor(text=TEXTS, world_latents=by_prompt, padding=True, return_tensors="pt")
    for name in ("input_ids", "attention_mask", "image_sizes"):
        assert torch.equal(encoded[name], inputs[name])
    assert torch.equal(logits_of(model, encoded), logits_of(model, inputs))


def test_padding_is_never_encoded(loaded):
    model, processor = loaded
    inputs = make_inputs(processor)
    clips = [draw_clip(3, 40, 24), draw_clip(9, 16, 64)]
    videos = processor(text=["<world_video>?"] * 2, videos=clips, padding=True, return_tensors="pt")
    for batch, name, sizes in (
        (inputs, "pixel_values", "image_sizes"),
        (videos, "pixel_values_videos", "video_sizes"),
    ):
        expected, spoiled = logits_of(model, batch), torch.full_like(batch[name], torch.nan)
        for row, item in zip(
            spoiled, unpad(batch[name], batch[sizes], sizes, (1,) * batch[sizes].shape[1]), strict=True
        ):
            row[tuple(slice(length) for length in item.shape)] = item
        batch[name] = spoiled
        assert torch.equal(logits_of(model, batch), expected)


def test_items_of_one_size_are_encoded_together(loaded):
    model, processor = loaded
    images = [draw(64, 24), draw(24, 64), draw(64, 24, seed=1), draw(24, 64, seed=1), draw(64, 24, seed=2)]
    inputs, batches = processor(images=images, return_tensors="pt"), []
    encoder = model.model.world_encoder
    hook = encoder.quant_conv.register_forward_hook(lambda module, args, out: batches.append(len(out)))
    with torch.no_grad():
        model.get_image_features(**inputs)
    hook.remove()
    assert batches == [3, 2]


def test_gradients_reach_all_parts_from_several_sizes(loaded, convert):
    _, processor = loaded
    model = TheWorldForConditionalGeneration.from_pretrained(convert("gemma2")).train()
    inputs = make_inputs(processor)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    unused = {name for name, each in model.named_parameters() if each.grad is None}
    assert all("time_conv" in name for name in unused)


# Any batch: shapes, counts, order and lengths.

SIDES = st.integers(3, 40)
COLORS = st.tuples(*[st.integers(0, 255)] * 3)
IMAGES = st.builds(lambda width, height, color: Image.new("RGB", (width, height), color), SIDES, SIDES, COLORS)
VIDEOS = st.builds(lambda image, length: [image] * length, IMAGES, st.sampled_from([1, 2, 6]))
PROMPTS = st.lists(st.lists(IMAGES | VIDEOS, max_size=2), min_size=1, max_size=3)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(prompts=PROMPTS, side=st.sampled_from(["left", "right"]))
@torch.no_grad()
def test_each_items_tokens_are_those_it_gets_alone(loaded, prompts, side):
    model, processor = loaded
    size = {"shortest_edge": 64, "longest_edge": 1024}
    videos = [[item for item in of_prompt if isinstance(item, list)] for of_prompt in prompts]
    images = [[item for item in of_prompt if not isinstance(item, list)] for of_prompt in prompts]
    texts = ["a".join("<world_video>" if isinstance(i, list) else "<world>" for i in of) + "b" for of in prompts]
    inputs = processor(
        text=texts,
        images=images if any(images) else None,
        videos=videos if any(videos) else None,
        size=size,
        padding=True,
        padding_side=side,
        return_tensors="pt",
    )
    with gemmas_inputs(model) as seen:
        model(**inputs)
    for row, (of_images, of_videos) in enumerate(zip(images, videos, strict=True)):
        expected = {processor.image_token_id: [], processor.video_token_id: []}
        for image in of_images:
            alone = processor(images=image, size=size, return_tensors="pt")
            expected[processor.image_token_id] += model.get_image_features(**alone).pooler_output
        for video in of_videos:
            alone = processor(videos=[video], size=size, return_tensors="pt")
            expected[processor.video_token_id] += model.get_video_features(**alone).pooler_output
        for token_id, tokens in expected.items():
            read = seen[0][row][inputs["input_ids"][row] == token_id]
            torch.testing.assert_close(read, torch.cat([read[:0], *tokens]), rtol=1e-4, atol=1e-5)


# Beside the rest.


@pytest.mark.parametrize("off", [{}, {"world": False}, {"vision": False}], ids=str)
def test_gemmas_vision_stays_square_beside_any_shape(convert_whole, off):
    model, processor = load(convert_whole())
    inputs = make_inputs(processor, **off)
    square = make_inputs(processor, size={"height": 64, "width": 64}, **off)
    assert ("image_sizes" in inputs) == ("pixel_values" in inputs) == ("world" not in off)
    assert ("vision_pixel_values" in inputs) == ("vision" not in off)
    if "vision" not in off:
        assert torch.equal(inputs["vision_pixel_values"], square["vision_pixel_values"])
    check_as_alone(model, processor, **off)


@pytest.mark.parametrize("options", [("--world-attention", "bidirectional"), ("--latent-merge-size", "2")], ids=str)
def test_blocks_of_several_lengths_in_other_layouts(convert, options):
    model, processor = load(convert("gemma3_text", *options))
    check_as_alone(model, processor)


def test_the_pipeline_reads_images_of_several_shapes(loaded, convert, tmp_path):
    model, processor = loaded
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pipe = pipeline("image-text-to-text", model=str(tmp_path), trust_remote_code=True)
    parts = [{"type": "image", "image": draw(*shape)} for shape in SHAPES[:2]]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "which?"}]}]
    answer = pipe(text=messages, max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(messages, **options)
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer == processor.decode(expected, skip_special_tokens=True)


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": {"shortest_edge": 100, "longest_edge": 64}}, "0 < shortest_edge <= longest_edge, got"),
        ({"size": {"shortest_edge": 1, "longest_edge": 10**9}}, "at most 89,478,485 pixels"),
        ({"size": {"shortest_edge": 1, "longest_edge": 63}}, "cannot keep its shape with at most 63 pixels"),
    ],
    ids=str,
)
def test_limits_that_make_no_sense_are_refused(loaded, options, message):
    _, processor = loaded
    with pytest.raises(ValueError, match=message):
        processor(text="<world>", images=draw(64, 64), **options)


def test_videos_that_cannot_be_resized_are_refused(loaded):
    _, processor = loaded
    with pytest.raises(ValueError, match=r"frames of a video must have one size, .* \[64, 16\] and \[16, 64\]"):
        processor(videos=[[draw(16, 64), draw(64, 16)]])
    with pytest.raises(ValueError, match="must leave each frame 64 pixels or more, but 9 frames get 11 each"):
        processor(videos=[draw_clip(9, 16, 16)], max_video_pixels=100)
    with pytest.raises(ValueError, match="`max_video_pixels` needs `size="):
        processor(videos=[draw_clip(9, 16, 16)], max_video_pixels=10**6, size={"height": 16, "width": 16})


def test_channel_tokens_need_one_size(convert, photo):
    folder = convert("gemma2", "--token-layout", "channel")
    processor = TheWorldProcessor.from_pretrained(folder)
    with pytest.raises(ValueError, match="reads images of one size, .* Give a height and a width"):
        processor(text="<world>", images=photo, size=LIMITS)
    processor.image_processor.size = LIMITS
    with pytest.raises(ValueError, match="reads images of one size"):
        TheWorldProcessor(processor.image_processor, processor.tokenizer, image_seq_length=16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda inputs: {"pixel_values": None}, "`image_sizes` belongs to `pixel_values` or `world_latents`"),
        (
            lambda inputs: {"image_sizes": inputs["image_sizes"][:3]},
            r"must be \[4, 2\], one \(h, w\) in pixels .* got \[3, 2\]",
        ),
        (lambda inputs: {"image_sizes": inputs["image_sizes"][:, :1]}, r"got \[4, 1\]"),
        (
            lambda inputs: {"image_sizes": inputs["image_sizes"] * 2},
            r"\(h, w\) = \(80, 192\), which an item of shape",
        ),
        (lambda inputs: {"image_sizes": inputs["image_sizes"] * 0}, r"\(h, w\) = \(0, 0\), which an item"),
        (lambda inputs: {"image_sizes": inputs["image_sizes"].flip(1)}, "does not hold"),
        (lambda inputs: {"image_sizes": inputs["image_sizes"].flip(0)}, "placeholders must be in one prompt"),
        (lambda inputs: {"image_sizes": inputs["image_sizes"] - 4}, "H and W multiples of 8"),
        (lambda inputs: {"image_sizes": None}, "placeholders, but the prompts have"),
        (lambda inputs: {"pixel_values": None, "image_sizes": None, "world_latents": []}, "is an empty list"),
        (
            lambda inputs: {"pixel_values": None, "world_latents": [torch.zeros(16, 8, 8)] * 4},
            r"\(40, 96\), which an item of shape \[16, 8, 8\] does not hold",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sizes_that_do_not_fit_are_refused(loaded, change, message):
    model, processor = loaded
    inputs = make_inputs(processor)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=message), torch.no_grad():
            changed = {**inputs, **change(inputs)}
            call(**{name: value for name, value in changed.items() if value is not None})
