"""Tests what the processor makes of text and images, and what it rejects."""

import base64
from io import BytesIO

import pytest
import torch
import transformers
from packaging import version
from PIL import Image
from tokenizers import processors
from transformers import AutoProcessor, AutoTokenizer

from tests.helpers.generation import chat_inputs
from theworld import TheWorldProcessor


QUESTION = "what is it?"


@pytest.fixture(scope="module")
def folder(convert):
    return convert("gemma2")


@pytest.fixture
def processor(folder):
    return TheWorldProcessor.from_pretrained(folder)


def places(processor, input_ids) -> list[int]:
    """The number of `<world>` placeholders in each row."""
    return (torch.as_tensor(input_ids) == processor.image_token_id).sum(-1).tolist()


def test_one_world_becomes_placeholders_between_start_and_end(processor, photo):
    inputs = processor(text=f"a<world>{QUESTION}", images=photo, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 64, 64)
    expected = f"<bos>a<start_of_world>{'<world>' * 64}<end_of_world>{QUESTION}"
    assert processor.decode(inputs["input_ids"][0]) == expected
    assert inputs["input_ids"][0, 2] == 8 and inputs["input_ids"][0, 3] == 7 and inputs["input_ids"][0, 67] == 9


def test_pixels_are_resized_and_in_minus_one_to_one(processor):
    for value, expected in ((0, -1.0), (255, 1.0)):
        image = Image.new("RGB", (50, 30), (value,) * 3)
        pixel_values = processor(text="<world>", images=image, return_tensors="pt")["pixel_values"]
        assert pixel_values.dtype == torch.float32
        assert torch.equal(pixel_values, torch.full((1, 3, 64, 64), expected))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 128), (8, 8), (88, 40)])
def test_size_accepts_any_multiple_of_the_patch_size(processor, photo, height, width):
    size = {"height": height, "width": width}
    inputs = processor(text="<world>", images=photo, size=size, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, height, width)
    assert places(processor, inputs["input_ids"]) == [height * width // 64]
    assert processor._get_num_multimodal_tokens([(600, 512)], size=size)["num_image_tokens"] == [height * width // 64]


@pytest.mark.parametrize(
    ("options", "fitted", "count"),
    [
        ([], (440, 584), 4015),
        (["--max-pixels", "65536"], (216, 288), 972),
        (["--max-pixels", "65536", "--latent-merge-size", "2"], (224, 288), 252),
        (["--image-size", "512"], (512, 512), 4096),
        (["--token-layout", "channel"], (512, 512), 16),
    ],
    ids=str,
)
def test_the_size_of_a_conversion(sources, tmp_path, options, fitted, count):
    from theworld import convert_weights

    arguments = ["--vae", sources / "pipeline", "--gemma", sources / "gemma2", "--output-dir", tmp_path / "out"]
    assert convert_weights.main([*map(str, arguments), *options]) == 0
    processor = TheWorldProcessor.from_pretrained(tmp_path / "out")
    inputs = processor(text="<world>", images=Image.new("RGB", (1600, 1200)), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, *fitted)
    assert places(processor, inputs["input_ids"]) == [count]


def test_unresized_images_keep_their_size(processor):
    image = Image.new("RGB", (48, 16))
    inputs = processor(text="<world>", images=image, do_resize=False, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 16, 48)
    assert places(processor, inputs["input_ids"]) == [12]
    assert processor._get_num_multimodal_tokens([(16, 48)], do_resize=False)["num_image_tokens"] == [12]


def test_a_mixed_batch_is_padded_on_the_left(processor, photo):
    prompts = [f"<world>{QUESTION}<world>", QUESTION, f"{QUESTION}<world>"]
    nested = processor(text=prompts, images=[[photo, photo], [], [photo]], padding=True, return_tensors="pt")
    flat = processor(text=prompts, images=[photo] * 3, padding=True, return_tensors="pt")
    assert places(processor, nested["input_ids"]) == [128, 0, 64]
    assert nested["pixel_values"].shape[0] == 3
    assert nested["attention_mask"][1, 0] == 0 and nested["attention_mask"][:, -1].all()
    for name in nested:
        assert torch.equal(nested[name], flat[name])


def test_prompts_without_images(processor):
    for options in ({}, {"images": []}, {"images": [[], []]}):
        inputs = processor(text=[QUESTION, QUESTION], return_tensors="pt", **options)
        assert set(inputs) == {"input_ids", "attention_mask"}


def test_images_alone(processor, photo):
    assert set(processor(images=[photo, photo], return_tensors="pt")) == {"pixel_values"}


def test_names_of_the_models_inputs(processor, photo):
    assert processor.model_input_names == ["pixel_values", "input_ids", "attention_mask"]
    inputs = processor(text="<world>", images=photo, return_mm_token_type_ids=True)
    expected = [int(token == processor.image_token_id) for token in inputs["input_ids"][0]]
    assert list(inputs["mm_token_type_ids"][0]) == expected and sum(expected) == 64


def test_number_of_tokens_without_images(processor):
    assert "num_image_tokens" not in processor._get_num_multimodal_tokens()
    data = processor._get_num_multimodal_tokens([(10, 20), (500, 400)])
    assert data["num_image_tokens"] == [64, 64] and data["num_image_patches"] == [1, 1]


def conversation(image: dict) -> list[dict]:
    return [
        {"role": "system", "content": "look well"},
        {"role": "user", "content": [{"type": "image", **image}, {"type": "text", "text": "what is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "an officer"}]},
        {"role": "user", "content": "sure?"},
    ]


CHAT = (
    "<bos><start_of_turn>user\nlook well\n\n{image}what is it?<end_of_turn>\n<start_of_turn>model\nan officer"
    "<end_of_turn>\n<start_of_turn>user\nsure?<end_of_turn>\n<start_of_turn>model\n"
)


def test_chat_template_text(processor):
    assert processor.apply_chat_template(conversation({}), add_generation_prompt=True) == CHAT.format(image="<world>")


def bos_of(processor, input_ids) -> list[int]:
    """The number of `<bos>` in each row."""
    return (torch.as_tensor(input_ids) == processor.tokenizer.bos_token_id).sum(-1).tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_special_tokens": True},
        {"add_special_tokens": False},
        {"text_kwargs": {"add_special_tokens": True}},
        {"text_kwargs": {"padding": "longest"}, "return_offsets_mapping": True},
    ],
    ids=repr,
)
def test_a_chat_as_text_gets_no_second_bos(processor, photo, options):
    messages = conversation({"image": photo})
    expected = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    text = processor.apply_chat_template(messages)
    for prompt in (text, [text], [text, text]):
        images = [[photo]] * len(prompt) if isinstance(prompt, list) else photo
        inputs = processor(text=prompt, images=images, **options)
        assert all(row == expected["input_ids"][0] for row in inputs["input_ids"])
        assert inputs["attention_mask"][0] == expected["attention_mask"][0]


def test_prompts_with_and_without_bos_mix(processor):
    alone = [processor(text=prompt)["input_ids"][0] for prompt in ("what", f"<bos>{QUESTION}", f"{QUESTION}<bos>")]
    inputs = processor(text=["what", f"<bos>{QUESTION}", f"{QUESTION}<bos>"], padding=True, return_tensors="pt")
    assert bos_of(processor, inputs["input_ids"]) == [1, 1, 2]  # the last has one in its middle
    for row, mask, expected in zip(inputs["input_ids"], inputs["attention_mask"], alone, strict=True):
        assert row[mask.bool()].tolist() == expected
    plain = processor(text=["what", f"<bos>{QUESTION}"], add_special_tokens=False)
    assert [bos_of(processor, row) for row in plain["input_ids"]] == [0, 1]


def test_a_tokenizer_that_adds_no_bos_is_given_none(processor):
    processor.tokenizer._tokenizer.post_processor = processors.Sequence([])
    inputs = processor(text=["what", f"<bos>{QUESTION}"])
    assert [bos_of(processor, row) for row in inputs["input_ids"]] == [0, 1]


def test_a_bare_tokenizer_doubles_bos_unless_told(processor):
    """As docs/usage.md says; vLLM's completions do this."""
    assert bos_of(processor, processor.tokenizer(CHAT.format(image=""))["input_ids"]) == 2
    assert bos_of(processor, processor.tokenizer(CHAT.format(image=""), add_special_tokens=False)["input_ids"]) == 1


@pytest.mark.parametrize("form", ["image", "path", "url", "base64"])
def test_chat_contents_bring_their_images(processor, photo, tmp_path, form):
    photo.save(tmp_path / "photo.png")
    encoded = BytesIO()
    photo.save(encoded, format="PNG")
    image = {
        "image": photo,
        "path": str(tmp_path / "photo.png"),
        "url": str(tmp_path / "photo.png"),
        "base64": base64.b64encode(encoded.getvalue()).decode(),
    }[form]
    inputs = chat_inputs(processor, conversation({form: image}))
    block = f"<start_of_world>{'<world>' * 64}<end_of_world>"
    assert processor.decode(inputs["input_ids"][0]) == CHAT.format(image=block)
    assert (inputs["input_ids"] == 2).sum() == 1  # one <bos>
    direct = processor(images=photo, return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], direct["pixel_values"])


def test_a_batch_of_conversations_with_and_without_images(processor, photo):
    plain = [{"role": "user", "content": "sure?"}]
    inputs = processor.apply_chat_template(
        [conversation({"image": photo}), plain],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    assert places(processor, inputs["input_ids"]) == [64, 0]


@pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.18"),
    reason="transformers 5.17 does not count the placeholders that an image's token expands to",
)
def test_the_chat_template_marks_what_the_assistant_says(processor, photo):
    inputs = processor.apply_chat_template(
        conversation({"image": photo}), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    mask = torch.tensor(inputs["assistant_masks"][0]).bool()
    assert processor.decode(torch.tensor(inputs["input_ids"][0])[mask]) == "an officer<end_of_turn>"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "assistant", "content": "hi"}], "Turns must alternate .* got 'assistant' as turn 1"),
        ([{"role": "user", "content": "hi"}] * 2, "got 'user' as turn 2"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "'text', 'image' and 'video', got 'audio'"),
        ([{"role": "system", "content": "hi"}], "A system message needs a user message after it"),
    ],
)
def test_conversations_that_gemma_cannot_read_are_rejected(processor, messages, message):
    with pytest.raises(Exception, match=message):
        processor.apply_chat_template(messages)


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("<world>", 2, r"The prompts have 1 `<world>`, but 2 image\(s\) are given"),
        ("<world><world>", 1, r"The prompts have 2 `<world>`, but 1 image\(s\) are given"),
        (QUESTION, 1, r"The prompts have 0 `<world>`, but 1 image\(s\) are given. Write one `<world>`"),
        ("<world>", 0, r"The prompts have 1 `<world>`, but 0 image\(s\) are given"),
    ],
)
def test_images_and_places_must_agree(processor, photo, text, count, message):
    with pytest.raises(ValueError, match=message):
        processor(text=text, images=[photo] * count or None)


def test_images_of_another_prompt_are_rejected(processor, photo):
    with pytest.raises(ValueError, match=r"the prompts have \[1, 0\], the images are \[0, 1\]"):
        processor(text=["<world>", QUESTION], images=[[], [photo]])
    with pytest.raises(ValueError, match="a list of images for each prompt, got a mixture"):
        processor(text=["<world>", "<world>"], images=[photo, [photo]])


@pytest.mark.parametrize(("height", "width"), [(60, 64), (64, 4), (227, 227)])
def test_sizes_that_would_be_cropped_are_rejected(processor, photo, height, width):
    size = {"height": height, "width": width}
    with pytest.raises(ValueError, match=f"Image sides must be positive multiples of 8 pixels, got {height}x{width}"):
        processor(text="<world>", images=photo, size=size)


NAN = float("nan")


@pytest.mark.parametrize(
    "options",
    [
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1e9},
        {"rescale_factor": NAN},
        {"image_mean": [NAN, NAN, NAN]},
        {"image_std": NAN},
        {"image_std": [1e-30] * 3},
        {"images_kwargs": {"do_rescale": False}},
    ],
    ids=str,
)
def test_options_that_spoil_the_range_are_rejected(processor, photo, options):
    message = r"Images must be scaled to \[-1, 1\], but these options give .* Do not change `do_r"
    with pytest.raises(ValueError, match=message):
        processor(text="<world>", images=photo, return_tensors="pt", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"size": {"height": 80_000, "width": 80_000}},
        {"size": {"shortest_edge": 80_000}},
        {"size": {"shortest_edge": 8_000}},
        {"size": 80_000},
        {"do_pad": True, "pad_size": {"height": 80_000, "width": 80_000}},
        {"do_center_crop": True, "crop_size": {"height": 80_000, "width": 80_000}},
    ],
    ids=str,
)
def test_sizes_beyond_pillows_limit_are_rejected(processor, options):
    name = next(name for name in options if "size" in name)
    with pytest.raises(ValueError, match=f"`{name}` must give images of at most 89,478,485 pixels, got .* Make it"):
        processor(text="<world>", images=Image.new("RGB", (32, 8)), **options)


def test_truncation_through_world_tokens_is_rejected(processor, photo):
    with pytest.raises(ValueError, match="Mismatch in `image` token count"):
        processor(text="<world>", images=photo, truncation=True, max_length=20)


def test_a_tokenizer_without_the_world_tokens_is_rejected(processor, sources):
    tokenizer = AutoTokenizer.from_pretrained(sources / "gemma2")
    with pytest.raises(ValueError, match="has no <world>, <start_of_world>, <end_of_world>. Use the one that"):
        TheWorldProcessor(processor.image_processor, tokenizer)


def test_channel_tokens_are_16_at_one_size(convert, photo):
    processor = TheWorldProcessor.from_pretrained(convert("gemma2", "--token-layout", "channel"))
    inputs = processor(text="<world>", images=photo, return_tensors="pt")
    assert places(processor, inputs["input_ids"]) == [16]
    assert processor._get_num_multimodal_tokens([(600, 512)])["num_image_tokens"] == [16]
    with pytest.raises(ValueError, match="reads images of 64x64 pixels, got 32x32"):
        processor(text="<world>", images=photo, size={"height": 32, "width": 32})


def test_merged_tokens_are_a_quarter_as_many(convert, photo):
    processor = TheWorldProcessor.from_pretrained(convert("gemma2", "--latent-merge-size", "2"))
    inputs = processor(text="<world>", images=photo, return_tensors="pt")
    assert places(processor, inputs["input_ids"]) == [16]
    with pytest.raises(ValueError, match="multiples of 16 pixels, got 64x72"):
        processor(text="<world>", images=photo, size={"height": 64, "width": 72})


class TorchvisionImageProcessor:
    """A stand-in for the class that `AutoImageProcessor` returns if torchvision is installed."""

    backend = "torchvision"

    def __init__(self, fields: dict):
        self.fields = fields

    def to_dict(self) -> dict:
        return self.fields


def test_images_are_processed_by_pil_despite_torchvision(processor):
    fields = processor.image_processor.to_dict()
    pinned = TheWorldProcessor(TorchvisionImageProcessor(fields), processor.tokenizer).image_processor
    assert pinned.backend == "pil" and pinned.to_dict() == fields


def test_save_and_reload(processor, folder, photo, tmp_path):
    processor.save_pretrained(tmp_path)
    reloaded = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    original, again = (each(text=f"<world>{QUESTION}", images=photo) for each in (processor, reloaded))
    assert original["input_ids"] == again["input_ids"]
    assert reloaded.chat_template == processor.chat_template
    assert (tmp_path / "chat_template.jinja").is_file() and (tmp_path / "processing_theworld.py").is_file()
