"""Tests Gemma 3's vision tower with and without world tokens: results equal transformers' classes bit for bit."""

import json
import re
import shutil

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from packaging import version
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    DynamicCache,
    Gemma3Config,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tests.helpers import ROOT, modeling
from tests.helpers.checkpoints import TEXT_CONFIGS, VISION_FIELDS
from tests.helpers.commands import run_theworld
from tests.helpers.docs import sentences, snippets
from tests.helpers.fresh import load_fresh
from theworld import TheWorldConfig
from theworld.checkpoints.tensors import map_gemma_key
from theworld.convert_weights import main
from theworld.versions_theworld import CACHE_NAME


FIGURE = snippets("README.md", "text")[0].code

MODALITIES_OFF = {"neither": {}, "world": {"world": False}, "vision": {"vision": False}}
# Two images in one prompt, none, one.
TEXTS = [f"<world>and<world>{modeling.QUESTION}", modeling.QUESTION, f"<world>{modeling.QUESTION}"]


@pytest.fixture
def checkpoint(convert_whole):
    return convert_whole()


def photos(count: int) -> list[Image.Image]:
    """Random modeling.pictures, each three times as wide as high."""
    return [Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((768, 256)) for pixels in modeling.pictures(count)]


def batch(processor, **options):
    """A left-padded batch of `TEXTS`."""
    first, second, third = photos(3)
    return processor(text=TEXTS, images=[[first, second], [], [third]], padding=True, return_tensors="pt", **options)


def gemmas_batch(gemma_processor, **options):
    """The same batch, from Gemma 3's own processor."""
    first, second, third = photos(3)
    texts = [text.replace("<world>", "<start_of_image>") for text in TEXTS]
    return gemma_processor(
        text=texts, images=[[first, second], [], [third]], padding=True, return_tensors="pt", **options
    )


@pytest.mark.parametrize("pan_and_scan", [{}, {"do_pan_and_scan": True}], ids=["whole", "crops"])
@pytest.mark.parametrize(
    "how",
    [{"attn_implementation": "eager"}, {"attn_implementation": "sdpa"}, {"dtype": torch.bfloat16}],
    ids=["eager", "sdpa", "bfloat16"],
)
def test_without_the_world_it_equals_gemma_3(gemma_folder, gemma_processor, checkpoint, processor, how, pan_and_scan):
    gemma, model = (
        auto_class.from_pretrained(folder, **how, **options).eval()
        for auto_class, folder, options in (
            (AutoModelForImageTextToText, gemma_folder, {}),
            (AutoModel, checkpoint, {"trust_remote_code": True}),
        )
    )
    expected = gemmas_batch(gemma_processor, **pan_and_scan)
    inputs = batch(processor, world=False, **pan_and_scan)
    assert len(expected["pixel_values"]) == (12 if pan_and_scan else 3)
    expected["vision_pixel_values"] = expected["pixel_values"]
    for name in ("input_ids", "attention_mask", "token_type_ids", "vision_pixel_values"):
        assert torch.equal(inputs[name], expected[name]), name
    assert set(inputs) == set(expected) - {"pixel_values"}
    del expected["vision_pixel_values"]
    assert torch.equal(modeling.logits_of(model, inputs), modeling.logits_of(gemma, expected))
    suppressed = model.generation_config.suppress_tokens
    assert torch.equal(
        modeling.generate(model, inputs), modeling.generate(gemma, expected, suppress_tokens=suppressed)
    )


@torch.no_grad()
@pytest.mark.parametrize("world_attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("off", MODALITIES_OFF)
def test_each_modality_equals_gemma_3_on_the_same_embeddings(gemma, convert_whole, processor, off, world_attention):
    """World tokens are merged by hand; the rest is Gemma 3's own class."""
    folder = convert_whole("--world-attention", world_attention)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    inputs = batch(processor, **MODALITIES_OFF[off])
    assert ("pixel_values" in inputs, "vision_pixel_values" in inputs) == (off != "world", off != "vision")
    embeds = gemma.get_input_embeddings()(inputs["input_ids"])
    if off != "world":
        tokens = model.get_image_features(inputs["pixel_values"]).pooler_output
        places = (inputs["input_ids"] == model.config.image_token_id).unsqueeze(-1)
        embeds = embeds.masked_scatter(places, tokens)
    types = inputs["token_type_ids"]
    bidirectional_world = (types == 2) & (world_attention == "bidirectional")
    expected = gemma(
        inputs_embeds=embeds,
        pixel_values=inputs.get("vision_pixel_values"),
        attention_mask=inputs["attention_mask"],
        token_type_ids=((types == 1) | bidirectional_world).long(),
    )
    assert torch.equal(model(**inputs).logits, expected.logits)


def test_with_both_off_the_image_leaves_no_trace(gemma, gemma_processor, model, processor):
    text = [text.replace("<world>", "") for text in TEXTS]
    inputs = batch(processor, world=False, vision=False)
    expected = gemma_processor(text=text, padding=True, return_tensors="pt")
    assert set(inputs) == set(expected)
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert torch.equal(modeling.logits_of(model, inputs), modeling.logits_of(gemma, expected))


@pytest.mark.parametrize("options", [(), ("--vision-first",)])
def test_the_config_orders_the_blocks_of_an_image(convert_whole, options):
    processor = AutoProcessor.from_pretrained(convert_whole(*options), trust_remote_code=True)
    prompt = processor.decode(processor(text="a<world>b", images=photos(1))["input_ids"][0])
    world = "<start_of_world>" + 64 * "<world>" + "<end_of_world>"
    vision = "\n\n<start_of_image>" + 64 * "<image_soft_token>" + "<end_of_image>\n\n"
    assert prompt == "<bos>a" + (vision + world if options else world + vision) + "b"
    config = AutoConfig.from_pretrained(convert_whole(*options), trust_remote_code=True)
    assert config.world_first == (not options)


@pytest.mark.parametrize("off", MODALITIES_OFF)
def test_a_chat_can_leave_a_modality_out(processor, off):
    content = [{"type": "image", "image": photos(1)[0]}, {"type": "text", "text": modeling.QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=MODALITIES_OFF[off],
    )
    types = inputs["token_type_ids"]
    assert (types == 1).sum() == (0 if off == "vision" else 64)
    assert (types == 2).sum() == (0 if off == "world" else 64)


def test_size_changes_the_world_and_not_the_tower(processor):
    inputs = processor(text="<world>", images=photos(1), size={"height": 16, "width": 32}, return_tensors="np")
    assert inputs["pixel_values"].shape == (1, 3, 16, 32)
    assert inputs["vision_pixel_values"].shape == (1, 3, 32, 32)
    assert (inputs["token_type_ids"] == 2).sum() == 8


@pytest.mark.parametrize("options", [(), ("--vision-first",), ("--world-attention", "bidirectional")])
@pytest.mark.parametrize(
    "how",
    [
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"prompt_lookup_num_tokens": 4},
    ],
    ids=lambda how: next(iter(how)),
)
def test_every_way_to_generate_gives_one_answer(convert_whole, options, how):
    model = AutoModel.from_pretrained(convert_whole(*options), trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(convert_whole(*options), trust_remote_code=True)
    inputs = batch(processor)
    if "prompt_lookup_num_tokens" in how:  # one prompt, and the first draft would be an image's block
        inputs = processor(text=f"a?<world>{modeling.QUESTION}a?", images=photos(1), return_tensors="pt")
    answer = modeling.generate(model, inputs)
    assert torch.equal(modeling.generate(model, inputs, **how), answer)
    # Without token types, the blocks are found in the prompt.
    untyped = {name: tensor for name, tensor in inputs.items() if name != "token_type_ids"}
    assert torch.equal(modeling.generate(model, untyped, **how), answer)


def test_beams_keep_a_prompts_images_together(model, processor):
    """Every beam's prompt has the same tokens as without beams, including the crops of two images in order."""
    inputs = batch(processor, do_pan_and_scan=True)
    with modeling.gemmas_inputs(model) as seen:
        modeling.generate(model, inputs)
        prompts = seen[0]
        seen.clear()
        modeling.generate(model, inputs, num_beams=3)
    torch.testing.assert_close(seen[0], prompts.repeat_interleave(3, dim=0), **modeling.FLOAT32_TOLERANCE)


def test_both_encoders_run_once_per_generate(model, processor):
    runs = []
    for part in (model.model.vision_tower, model.model.world_encoder):
        part.register_forward_hook(lambda module, args, output: runs.append(type(module).__name__))
    modeling.generate(model, batch(processor))
    assert sorted(runs) == ["SiglipVisionModel", "TheWorldEncoder"]


def test_chunked_prefill_rejects_splitting_a_block(model, processor):
    inputs = processor(text=f"<world>{modeling.QUESTION}", images=photos(1), return_tensors="pt")
    last = int((inputs["token_type_ids"] == 1).nonzero()[-1, 1])
    chunks = version.parse(transformers.__version__) >= version.parse("5.23")
    if chunks:
        assert torch.equal(
            modeling.generate(model, inputs, prefill_chunk_size=last + 2), modeling.generate(model, inputs)
        )
    with pytest.raises(ValueError, match="ends inside a bidirectional image block" if chunks else "placeholders"):
        modeling.generate(model, inputs, prefill_chunk_size=last - 3)


def test_flash_attention_is_rejected_for_bidirectional_blocks(model, processor):
    """FlashAttention receives only the padding of a mask."""
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="FlashAttention does not support the bidirectional image blocks"):
        model(**batch(processor))
    for allowed in (batch(processor, vision=False), batch(processor, world=False, vision=False)):
        embeds = model.get_input_embeddings()(allowed["input_ids"])
        masks = (allowed["attention_mask"], None, None, allowed["token_type_ids"])
        model.create_masks_for_generate(model.config, embeds, *masks)


def test_a_second_image_continues_from_the_cache(model, processor):
    """Not bit for bit: the matrix products with the cached keys have other sizes."""
    images = photos(2)
    whole = processor(text=f"<world>{modeling.QUESTION}<world>{modeling.QUESTION}", images=images, return_tensors="pt")
    first = processor(text=f"<world>{modeling.QUESTION}", images=images[0], return_tensors="pt")
    length = first["input_ids"].shape[1]
    assert torch.equal(whole["input_ids"][:, :length], first["input_ids"])
    cache = DynamicCache(config=model.config.text_config)
    modeling.logits_of(model, first, **{CACHE_NAME: cache})
    rest = {
        "input_ids": whole["input_ids"][:, length:],
        "pixel_values": whole["pixel_values"][1:],
        "vision_pixel_values": whole["vision_pixel_values"][1:],
    }
    continued = modeling.logits_of(model, rest, **{CACHE_NAME: cache})
    torch.testing.assert_close(continued, modeling.logits_of(model, whole)[:, length:], **modeling.FLOAT32_TOLERANCE)


def hand_made_masks(config, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Masks [batch, 1, S, S] by layer type, written by hand from the docs: added to the attention scores."""
    batch_size, length = input_ids.shape
    allowed = torch.zeros(2, batch_size, length, length, dtype=torch.bool)
    for row, prompt in enumerate(input_ids.tolist()):
        is_world = [token == config.image_token_id for token in prompt]
        # The number of an image for each of its world tokens: how many blocks have started so far.
        starts = [now and not before for before, now in zip([False, *is_world[:-1]], is_world, strict=True)]
        blocks = [sum(starts[: n + 1]) if world else None for n, world in enumerate(is_world)]
        for query in range(length):
            for key in range(length):
                together = blocks[query] is not None and blocks[query] == blocks[key]
                seen = bool(attention_mask[row, key]) and (key <= query or together)
                allowed[0, row, query, key] = seen
                allowed[1, row, query, key] = seen and query - key < getattr(config.text_config, "sliding_window", 0)
    full, sliding = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min).unsqueeze(2)
    return {"full_attention": full, "sliding_attention": sliding}


@pytest.mark.parametrize("family", TEXT_CONFIGS)
def test_world_blocks_are_bidirectional_if_configured(convert, family):
    """A sliding layer's window of 32 positions also applies inside a block of 64."""
    folder = convert(family, "--world-attention", "bidirectional")
    options = {"trust_remote_code": True, "attn_implementation": "eager"}
    model = AutoModel.from_pretrained(folder, **options).eval()
    inputs = batch(AutoProcessor.from_pretrained(folder, trust_remote_code=True))
    assert "token_type_ids" not in inputs
    masks = hand_made_masks(model.config, inputs["input_ids"], inputs["attention_mask"])
    real = inputs["attention_mask"].bool()
    logits = modeling.logits_of(model, inputs)[real]
    by_hand = inputs | {"attention_mask": masks if family != "gemma" else masks["full_attention"]}
    torch.testing.assert_close(logits, modeling.logits_of(model, by_hand)[real], **modeling.FLOAT32_TOLERANCE)
    causal = AutoModel.from_pretrained(convert(family), **options).eval()
    assert (logits - modeling.logits_of(causal, inputs)[real]).abs().max() > 1e-3
    assert torch.equal(modeling.generate(model, inputs), modeling.generate(model, inputs, use_cache=False))


def test_an_unfrozen_tower_gets_gradients(model, processor):
    inputs = processor(text=f"<world>{modeling.QUESTION}", images=photos(1), return_tensors="pt")
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for part in (model.model.vision_tower, model.model.multi_modal_projector, model.model.world_projection):
        assert all(parameter.grad.abs().sum() > 0 for parameter in part.parameters() if parameter.grad is not None)
        assert any(parameter.grad is not None for parameter in part.parameters())


def test_weights_arrive_bit_for_bit_and_survive_a_save(gemma, model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, trust_remote_code=True).eval()
    for name, tensor in gemma.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    inputs = batch(AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True), do_pan_and_scan=True)
    expected = batch(processor, do_pan_and_scan=True)
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert torch.equal(modeling.logits_of(again, inputs), modeling.logits_of(model, expected))
    assert torch.equal(load_fresh(inputs, tmp_path)[0], modeling.logits_of(model, expected))


def test_a_new_projector_is_initialized_as_in_gemma_3(model):
    fresh = AutoModel.from_config(model.config, trust_remote_code=True).model.multi_modal_projector
    assert not any(parameter.any() for parameter in fresh.parameters())


@torch.no_grad()
def test_encoded_images_replace_pixels(model, processor):
    inputs = batch(processor)
    features = {
        "image": model.get_image_features(inputs["pixel_values"]),
        "vision": model.get_vision_features(inputs["vision_pixel_values"]),
    }
    bare = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(modeling.logits_of(model, bare, mm_encoder_outputs=features), modeling.logits_of(model, inputs))
    with pytest.raises(ValueError, match="as `vision_pixel_values` or as `mm_encoder_outputs`"):
        vision = {"vision": features["vision"]}
        model(**inputs, mm_encoder_outputs=vision)


def test_embeddings_in_place_of_ids_give_the_same(model, processor):
    inputs = batch(processor)
    embedded = {name: tensor for name, tensor in inputs.items() if name not in ("input_ids", "token_type_ids")}
    embedded["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"])
    assert torch.equal(modeling.logits_of(model, embedded), modeling.logits_of(model, inputs))


def test_latents_are_for_the_world_only(model, processor):
    inputs = batch(processor, vision=False)
    latents = model.get_world_latents(inputs["pixel_values"])
    from_latents = processor(
        text=TEXTS, world_latents=[[*latents[:2]], [], [latents[2]]], vision=False, padding=True, return_tensors="pt"
    )
    assert torch.equal(modeling.logits_of(model, from_latents), modeling.logits_of(model, inputs))
    with pytest.raises(ValueError, match="tower does not read latents"):
        processor(text="<world>", world_latents=latents[:1])


def test_a_modality_without_its_images_is_rejected(model, processor):
    inputs = batch(processor)
    with pytest.raises(ValueError, match="has `<image_soft_token>` placeholders .* Pass `vision_pixel_values`"):
        model(**{name: tensor for name, tensor in inputs.items() if name != "vision_pixel_values"})
    with pytest.raises(ValueError, match="has `<world>` placeholders .* Pass `pixel_values` or `world_latents`"):
        model(**modeling.without_images(inputs))
    with pytest.raises(
        ValueError,
        match=r"2 image\(s\) of 64 Gemma's own tokens need 128 `<image_soft_token>` .* \[128, 0, 64",
    ):
        model(**{**inputs, "vision_pixel_values": inputs["vision_pixel_values"][:2]})


@pytest.mark.parametrize(
    ("pixels", "error", "message"),
    [
        (
            torch.zeros(1, 3, 32, 30),
            ValueError,
            r"must be \[C, 3, 32, 32\] with at least one image, got \[1, 3, 32, 30\]",
        ),
        (torch.zeros(0, 3, 32, 32), ValueError, "at least one image"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "must be floating point, got torch.uint8"),
    ],
)
def test_images_that_the_tower_cannot_read_are_rejected(model, pixels, error, message):
    with pytest.raises(error, match=message):
        model.get_vision_features(pixels)


def test_a_model_without_vision_says_so(convert):
    model = AutoModel.from_pretrained(convert("gemma3_text"), trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(convert("gemma3_text"), trust_remote_code=True)
    with pytest.raises(ValueError, match="no `vision_config`. Convert a Gemma 3 with `--vision`"):
        model.get_vision_features(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="`vision=True` needs a model with `vision_config`"):
        processor(text="<world>", images=photos(1), vision=True)
    with pytest.raises(ValueError, match="`do_pan_and_scan` needs a model with `vision_config`"):
        processor(text="<world>", images=photos(1), do_pan_and_scan=True)
    inputs = processor(text=f"<world>{modeling.QUESTION}", images=photos(1), return_tensors="pt")
    encoded = {"vision": BaseModelOutputWithPooling(pooler_output=torch.zeros(1, 64, 64))}
    with pytest.raises(ValueError, match="Got Gemma's own tokens of images, but this model has no `vision_token_id`"):
        model(**inputs, mm_encoder_outputs=encoded)


def test_a_tokenizer_other_than_gemma_3s_is_rejected(convert, processor):
    other = AutoProcessor.from_pretrained(convert("gemma2"), trust_remote_code=True)
    with pytest.raises(ValueError, match="`vision_settings` need Gemma 3's tokenizer"):
        type(other)(other.image_processor, other.tokenizer, vision_settings=processor.vision_settings)


def test_serving_engines_reject_a_vision_tower(model):
    with pytest.raises(ValueError, match="A serving engine reads world tokens only"):
        AutoModel.from_config(model.config, trust_remote_code=True, attn_implementation="vllm")


def test_ask_shows_both_modalities(checkpoint, tmp_path):
    options = ("--model", checkpoint, "--save", tmp_path / "demo.png")
    output = run_theworld("ask", "assets/scene.png", "what is it?", *options, folder=ROOT)
    assert output.returncode == 0, output.stderr
    assert "<end_of_world>\\n\\n<start_of_image>" in output.stdout and (tmp_path / "demo.png").is_file()


@torch.no_grad()
def test_the_cards_figure_has_the_right_shapes(model, processor):
    inputs = processor(
        text=f"<world>{modeling.QUESTION}", images=photos(1), size={"height": 32, "width": 48}, return_tensors="pt"
    )
    world = model.get_image_features(inputs["pixel_values"])
    vision = model.get_vision_features(inputs["vision_pixel_values"])
    shapes = {
        "pixel_values": inputs["pixel_values"].shape,
        "vision_pixel_values": inputs["vision_pixel_values"].shape,
        "latents": world.last_hidden_state.shape,
        "world tokens": world.pooler_output.shape,
        "image tokens": vision.pooler_output.shape,
        "input_ids": inputs["input_ids"].shape,
        "embeddings": model.get_input_embeddings()(inputs["input_ids"]).shape,
    }
    text = model.config.text_config.hidden_size
    letters = {"batch": 1, "B": 1, "C": 1, "H": 32, "W": 48, "s": 32, "N": 24, "M": 64, "D": text}
    letters["S"] = inputs["input_ids"].shape[1]
    drawn = dict(re.findall(r"(\w+_\w+|latents|world tokens|image tokens|embeddings) (\([^)]+\))", FIGURE))
    assert {name: eval(shape, {}, letters) for name, shape in drawn.items()} == shapes
    assert f"M = {Gemma3Config().mm_tokens_per_image} tokens" in sentences("README.md")
    for token, count in (("<world>", "N"), ("<image_soft_token>", "M")):
        assert f"{count} x {token}" in FIGURE
        places = inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids(token)
        assert places.sum() == letters[count]


def test_vision_needs_a_multimodal_gemma_3(sources, tmp_path, capsys):
    arguments = ["--vae", str(sources / "pipeline"), "--gemma", str(sources / "gemma2"), "--vision"]
    assert main([*arguments, "--output-dir", str(tmp_path / "out")]) == 1
    assert (
        "--vision keeps the tower of a Gemma3ForConditionalGeneration, got Gemma2ForCausalLM"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("key", "name"),
    [
        # As on the Hub, as transformers saves it today, and as it is in memory.
        ("vision_tower.vision_model.post_layernorm.bias", "model.vision_tower.post_layernorm.bias"),
        ("vision_tower.post_layernorm.bias", "model.vision_tower.post_layernorm.bias"),
        ("model.vision_tower.encoder.layers.0.mlp.fc1.bias", "model.vision_tower.encoder.layers.0.mlp.fc1.bias"),
        ("multi_modal_projector.mm_soft_emb_norm.weight", "model.multi_modal_projector.mm_soft_emb_norm.weight"),
        ("language_model.model.norm.weight", "model.language_model.norm.weight"),
    ],
)
def test_keys_of_a_gemma_kept_whole(key, name):
    assert map_gemma_key(key, vision=True) == name


def test_the_report_counts_the_vision_that_was_kept(sources, gemma_folder, gemma, tmp_path, capsys):
    arguments = ["--vae", str(sources / "pipeline"), "--gemma", str(gemma_folder), "--image-size", "64"]
    assert main([*arguments, "--vision", "--output-dir", str(tmp_path / "whole")]) == 0
    parts = (gemma.model.vision_tower, gemma.model.multi_modal_projector)
    count = sum(parameter.numel() for part in parts for parameter in part.parameters())
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("Gemma's vision tower"))
    assert row.split()[-2:] == [f"{count:,}", f"{2 * count:,}"]
    whole = AutoModel.from_pretrained(tmp_path / "whole", trust_remote_code=True)
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.bfloat16}

    assert main([*arguments, "--output-dir", str(tmp_path / "blind")]) == 0
    assert "Gemma's vision tower" not in capsys.readouterr().out
    blind = AutoModel.from_pretrained(tmp_path / "blind", trust_remote_code=True)
    assert blind.config.vision_config is None
    kept = {name for name, _ in whole.named_parameters() if "vision_tower" not in name and "multi_modal" not in name}
    assert kept == {name for name, _ in blind.named_parameters()}


GOOD_FIELDS = {
    "text_config": TEXT_CONFIGS["gemma3_text"],
    "vision_config": VISION_FIELDS,
    "mm_tokens_per_image": 64,
    "vision_token_id": 10,
    "boi_token_id": 11,
    "eoi_token_id": 12,
}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_config": {"model_type": "clip_vision_model"}}, "must be a 'siglip_vision_model' with"),
        ({"text_config": TEXT_CONFIGS["gemma2"]}, "got 'siglip_vision_model' with 'gemma2'"),
        ({"mm_tokens_per_image": 60}, "square of a divisor of the tower's 16 patches a side, got 60"),
        ({"mm_tokens_per_image": 9}, "square of a divisor of the tower's 16 patches a side, got 9"),
        ({"mm_tokens_per_image": 0}, "square of a divisor"),
        ({"boi_token_id": None}, r"must be different and below the vocabulary size 512, got .* 'boi_token_id': None"),
        ({"vision_token_id": 7}, r"different and below .* 'vision_token_id': 7"),
        ({"eoi_token_id": 512}, "different and below the vocabulary size"),
        ({"world_attention": "both"}, "world_attention"),
    ],
)
def test_fields_that_do_not_fit_are_rejected(fields, message):
    config = TheWorldConfig(**GOOD_FIELDS)
    assert config.vision_config.model_type == "siglip_vision_model" and config.has_bidirectional_blocks
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        TheWorldConfig(**{**GOOD_FIELDS, **fields})


def test_a_gemma_in_the_hubs_layout_converts_the_same(sources, gemma_folder, checkpoint, processor, tmp_path):
    """Google's repos have the image processor's settings in a separate file, without those of crops."""
    shutil.copytree(gemma_folder, tmp_path / "hub")
    settings = json.loads((tmp_path / "hub" / "processor_config.json").read_text())["image_processor"]
    open_ones = {name: None for name in settings if "pan_and_scan" in name or name == "do_convert_rgb"}
    (tmp_path / "hub" / "preprocessor_config.json").write_text(json.dumps({**settings, **open_ones}))
    (tmp_path / "hub" / "processor_config.json").write_text(json.dumps({"image_seq_length": 64}))
    arguments = ["--vae", str(sources / "pipeline"), "--gemma", str(tmp_path / "hub"), "--image-size", "64"]
    assert main([*arguments, "--vision", "--output-dir", str(tmp_path / "out")]) == 0
    inputs = batch(AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True), do_pan_and_scan=True)
    expected = batch(processor, do_pan_and_scan=True)
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)


def test_compiled_decoding_gives_the_same_answer(model, processor):
    modeling.check_compiled_decoding(model, batch(processor))


def test_a_compiled_model_gives_the_same_logits(model, processor):
    modeling.check_compiled_model(model, batch(processor))
