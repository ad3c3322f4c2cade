"""Tests what the model computes: Gemma unchanged without an image, and answers that depend on the image with one."""

import inspect
import warnings
from copy import deepcopy
from unittest import mock

import pytest
import torch
import transformers
from packaging import version
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, set_seed

from tests.helpers.checkpoints import TEXT_CONFIGS, VAE_FIELDS
from tests.helpers.modeling import (
    FLOAT32_TOLERANCE,
    QUESTION,
    check_compiled_decoding,
    check_compiled_model,
    gemmas_inputs,
    generate,
    logits_of,
    pictures,
    without_images,
)
from theworld import TheWorldConfig, TheWorldForConditionalGeneration
from theworld.versions_theworld import CACHE_NAME


@pytest.fixture
def inputs(processor):
    """A left-padded batch: two images, text alone, one image."""
    images = pictures(3)
    return processor(
        text=[f"<world>and<world>{QUESTION}", QUESTION, f"<world>{QUESTION}"],
        images=[[images[0], images[1]], [], [images[2]]],
        padding=True,
        return_tensors="pt",
    )


def without_masks(inputs) -> dict:
    """Inputs of one prompt, whose mask and token types follow from its ids."""
    return {name: tensor for name, tensor in inputs.items() if name not in ("attention_mask", "token_type_ids")}


@pytest.mark.parametrize("family", TEXT_CONFIGS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_without_images_equal_gemmas_bit_for_bit(sources, convert, family, attention):
    if (family, attention) == ("gemma2", "sdpa"):
        pytest.skip("Gemma 2 has no sdpa attention in transformers 5.20 and later.")
    gemma = AutoModelForCausalLM.from_pretrained(sources / family, attn_implementation=attention).eval()
    model = AutoModel.from_pretrained(convert(family), trust_remote_code=True, attn_implementation=attention).eval()
    input_ids = torch.randint(20, 340, (2, 50), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :9] = 0
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    assert torch.equal(logits_of(model, batch), logits_of(gemma, batch))
    # The same tokens as embeddings: nothing is scaled twice.
    embedded = {"inputs_embeds": gemma.get_input_embeddings()(input_ids), "attention_mask": attention_mask}
    assert torch.equal(logits_of(model, embedded), logits_of(gemma, embedded))
    assert torch.equal(logits_of(model, batch), logits_of(model, embedded))


def test_embeddings_are_scaled_once_and_world_tokens_never(model, processor):
    embed = model.get_input_embeddings()
    scale = model.config.text_config.hidden_size**0.5
    torch.testing.assert_close(embed(torch.tensor([30])), embed.weight[30:31] * scale)
    inputs = processor(text=f"<world>{QUESTION}", images=pictures(1)[0], return_tensors="pt")
    with gemmas_inputs(model) as seen:
        output = model(**inputs)
    places = inputs["input_ids"] == model.config.image_token_id
    assert torch.equal(seen[0][places], output.image_hidden_states.flatten(0, 1))


@torch.no_grad()
def test_logits_equal_gemmas_on_the_same_embeddings(sources, model, checkpoint, inputs):
    """The whole path by hand: encode, project, merge, run Gemma's own class."""
    family = model.config.text_config.model_type
    gemma = AutoModelForCausalLM.from_pretrained(sources / family).eval()
    embeds = gemma.get_input_embeddings()(inputs["input_ids"])
    tokens = model.model.world_encoder(inputs["pixel_values"]).flatten(2).transpose(1, 2)
    places = (inputs["input_ids"] == model.config.image_token_id).unsqueeze(-1)
    embeds = embeds.masked_scatter(places, model.model.world_projection.linear_1(tokens))
    expected = gemma(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(model(**inputs).logits, expected, **FLOAT32_TOLERANCE)


def test_black_and_white_frames_give_different_logits(model, processor):
    black, white = (
        processor(
            text=f"<world>{QUESTION}", images=torch.full((3, 64, 64), value, dtype=torch.uint8), return_tensors="pt"
        )
        for value in (0, 255)
    )
    assert (logits_of(model, black) - logits_of(model, white)).abs().max() > 1e-3


def test_removing_the_image_changes_the_answers_logits(model, processor):
    with_image = processor(text=f"<world>{QUESTION}", images=pictures(1)[0], return_tensors="pt")
    without = processor(text=QUESTION, return_tensors="pt")
    last = [logits_of(model, batch, logits_to_keep=1) for batch in (with_image, without)]
    assert (last[0] - last[1]).abs().max() > 1e-3


def test_every_image_reaches_only_its_own_prompt(model, inputs):
    """The predecessor used a batch's first match only. Images 0 and 1 are prompt 0's, image 2 is prompt 2's."""
    before = logits_of(model, inputs, logits_to_keep=1)
    for image, owner in enumerate([0, 0, 2]):
        changed = deepcopy(dict(inputs))
        changed["pixel_values"][image].neg_()
        difference = (logits_of(model, changed, logits_to_keep=1) - before).abs().amax((1, 2))
        for prompt in range(3):
            assert (difference[prompt] > 1e-4) == (prompt == owner), (image, prompt)


def test_a_batch_equals_its_prompts_alone(model, processor, inputs):
    images = pictures(3)
    alone = [
        processor(text=f"<world>and<world>{QUESTION}", images=[images[0], images[1]], return_tensors="pt"),
        processor(text=QUESTION, return_tensors="pt"),
        processor(text=f"<world>{QUESTION}", images=images[2], return_tensors="pt"),
    ]
    together = logits_of(model, inputs, logits_to_keep=1)
    for row, single in enumerate(alone):
        torch.testing.assert_close(together[row], logits_of(model, single, logits_to_keep=1)[0], **FLOAT32_TOLERANCE)
        answer, answer_together = generate(model, single)[0], generate(model, inputs)[row]
        assert torch.equal(answer, answer_together[: len(answer)])


def test_cached_and_uncached_generation_agree(model, inputs):
    assert torch.equal(generate(model, inputs), generate(model, inputs, use_cache=False))


def test_a_static_cache_gives_the_same_answer(model, inputs):
    static = generate(model, inputs, cache_implementation="static", disable_compile=True)
    assert torch.equal(generate(model, inputs), static)


def test_compiled_decoding_gives_the_same_answer(model, inputs):
    check_compiled_decoding(model, inputs)


@pytest.mark.parametrize("checkpoint", ["gemma2", "gemma3_text"], indirect=True)
def test_sliding_layers_keep_no_more_than_their_window(model, inputs):
    cache = DynamicCache(config=model.config.text_config)
    generate(model, inputs, **{CACHE_NAME: cache})
    window = model.config.text_config.sliding_window
    kinds = model.config.text_config.layer_types
    assert "sliding_attention" in kinds and inputs["input_ids"].shape[1] > 2 * window
    for kind, layer in zip(kinds, cache.layers, strict=True):
        kept = layer.keys.shape[2]
        assert kept < window if kind == "sliding_attention" else kept > 2 * window


def test_generation_computes_logits_at_one_position(model, inputs):
    positions = []
    hook = model.lm_head.register_forward_hook(lambda module, args, logits: positions.append(logits.shape[1]))
    generate(model, inputs)
    hook.remove()
    assert set(positions) == {1}


def test_a_second_question_reuses_the_cache(model, processor):
    """Images in the cache are neither encoded nor passed again."""
    first = processor(text=f"<world>{QUESTION}", images=pictures(1)[0], return_tensors="pt")
    cache = DynamicCache(config=model.config.text_config)
    answered = torch.cat([first["input_ids"], generate(model, first, **{CACHE_NAME: cache})], dim=1)
    second = processor(text="and?", return_tensors="pt")["input_ids"][:, 1:]
    whole = {"input_ids": torch.cat([answered, second], dim=1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    with mock.patch.object(model.model.world_encoder, "forward", side_effect=AssertionError("encoded again")):
        answer = generate(model, whole, **{CACHE_NAME: cache})
    assert torch.equal(answer, generate(model, whole | {"pixel_values": first["pixel_values"]}))


def test_the_cache_is_accepted_by_its_old_name_too(model, processor):
    """`past_key_values` until transformers 5.23, `cache` from 5.24 on."""
    prompt = processor(text=f"<world>{QUESTION}", images=pictures(1)[0], return_tensors="pt")
    with torch.no_grad():
        first = model(**prompt, use_cache=True)
    next_token = {"input_ids": first.logits[:, -1:].argmax(-1)}
    whole = prompt | {"input_ids": torch.cat([prompt["input_ids"], next_token["input_ids"]], dim=1)}
    expected = logits_of(model, without_masks(whole))[:, -1:]
    for name in ("cache", "past_key_values"):
        continued = logits_of(model, next_token, **{name: deepcopy(first[CACHE_NAME])})
        torch.testing.assert_close(continued, expected, **FLOAT32_TOLERANCE)
    assert CACHE_NAME in inspect.signature(model.forward).parameters


@pytest.mark.skipif(CACHE_NAME != "cache", reason="transformers renamed the cache in 5.24")
def test_only_the_old_name_of_the_cache_is_deprecated(model, processor):
    prompt = processor(text=QUESTION, return_tensors="pt")
    cache = DynamicCache(config=model.config.text_config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        logits_of(model, prompt, cache=cache)
        generate(model, prompt, cache=DynamicCache(config=model.config.text_config))
        assert model(**prompt, use_cache=True).cache is not None
    with pytest.warns(FutureWarning, match="past_key_values"):
        logits_of(model, prompt, past_key_values=DynamicCache(config=model.config.text_config))


def test_prompt_lookup_gives_the_same_answer(model, processor):
    """Its drafts are copied from the prompt, in which most tokens are `<world>`."""
    batch = processor(text=f"a?<world>{QUESTION}a?", images=pictures(1)[0], return_tensors="pt")
    drafted = generate(model, batch, prompt_lookup_num_tokens=4)
    assert torch.equal(drafted, generate(model, batch))


def test_chunked_prefill_gives_the_same_answer_or_fails(model, inputs):
    if version.parse(transformers.__version__) >= version.parse("5.23"):
        assert torch.equal(generate(model, inputs, prefill_chunk_size=50), generate(model, inputs))
    else:
        with pytest.raises(ValueError, match="`<world>` placeholders"):
            generate(model, inputs, prefill_chunk_size=50)


def test_eager_and_sdpa_agree_on_images(checkpoint, inputs):
    eager, default = (
        AutoModel.from_pretrained(checkpoint, trust_remote_code=True, **options).eval()
        for options in ({"attn_implementation": "eager"}, {})
    )
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits_of(eager, inputs)[real], logits_of(default, inputs)[real], **FLOAT32_TOLERANCE)


def test_precomputed_latents_replace_pixels(model, inputs):
    latents = model.get_world_latents(inputs["pixel_values"])
    assert latents.shape == (3, 16, 8, 8)
    prompts = without_images(inputs)
    assert torch.equal(logits_of(model, prompts, world_latents=latents), logits_of(model, inputs))
    for options in ({}, {"use_cache": False}, {"num_beams": 2}):
        assert torch.equal(
            generate(model, prompts, world_latents=latents, **options), generate(model, inputs, **options)
        )


def test_beams_keep_a_prompts_images_together(model, inputs):
    """Every beam's prompt has the same tokens as without beams; prompt 0 has two images, in this order."""
    with gemmas_inputs(model) as seen:
        generate(model, inputs)
        prompts = seen[0]
        for images in ({}, {"world_latents": model.get_world_latents(inputs["pixel_values"])}):
            seen.clear()
            generate(model, {**without_images(inputs), **images} if images else inputs, num_beams=3)
            torch.testing.assert_close(seen[0], prompts.repeat_interleave(3, dim=0), **FLOAT32_TOLERANCE)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_the_encoder_runs_once_per_generate(model, inputs, options):
    batches = []
    hook = model.model.world_encoder.register_forward_hook(lambda module, args, latents: batches.append(len(latents)))
    generate(model, inputs, **options)
    hook.remove()
    assert batches == [3]


def test_embeddings_in_place_of_ids_generate_the_same(model, inputs):
    embedded = {
        "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]),
        "attention_mask": inputs["attention_mask"],
        "pixel_values": inputs["pixel_values"],
    }
    for options in ({}, {"num_beams": 2}):
        with torch.no_grad():
            new_tokens = model.generate(**embedded, max_new_tokens=8, do_sample=False, **options)
        assert torch.equal(new_tokens, generate(model, inputs, **options))


def test_loss_ignores_minus_100_and_follows_changed_labels(model, processor):
    batch = processor(text=f"<world>{QUESTION}", images=pictures(1)[0], return_tensors="pt")
    labels = torch.full_like(batch["input_ids"], -100)
    answer = slice(-4, None)
    labels[:, answer] = batch["input_ids"][:, answer]
    with torch.no_grad():
        output = model(**batch, labels=labels)
        # By hand: the last four tokens, each predicted from the position before it.
        scores = output.logits[:, -5:-1].log_softmax(-1).gather(2, labels[:, answer, None])
        torch.testing.assert_close(output.loss, -scores.mean())
        changed = labels.clone()
        changed[:, -1] += 1
        assert model(**batch, labels=changed).loss != output.loss
        nothing = model(**batch, labels=torch.full_like(labels, -100), num_items_in_batch=4).loss
        assert nothing == 0


def test_world_tokens_without_labels_do_not_count(model, processor):
    batch = processor(text=f"<world>{QUESTION}", images=pictures(1)[0], return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, -100)
    loss = model(**batch, labels=labels).loss
    per_token = loss * ((labels[:, 1:] != -100).sum())
    summed = model(**batch, labels=labels, num_items_in_batch=1).loss
    torch.testing.assert_close(summed, per_token)


def test_gradients_reach_every_part_but_a_frozen_encoder(model, processor):
    batch = processor(text=f"<world>{QUESTION}", images=pictures(1)[0], return_tensors="pt")
    model.train()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {name for name, _ in model.named_parameters() if "time_conv" in name}
    assert model.model.world_encoder.encoder.conv_in.weight.grad.abs().sum() > 0

    model.zero_grad()
    model.model.world_encoder.requires_grad_(False)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(parameter.grad is None for parameter in model.model.world_encoder.parameters())
    assert model.model.world_projection.linear_1.weight.grad.abs().sum() > 0


def test_logits_to_keep(model, inputs):
    full = logits_of(model, inputs)
    torch.testing.assert_close(logits_of(model, inputs, logits_to_keep=2), full[:, -2:], **FLOAT32_TOLERANCE)
    positions = torch.tensor([3, 5])
    torch.testing.assert_close(
        logits_of(model, inputs, logits_to_keep=positions), full[:, positions], **FLOAT32_TOLERANCE
    )


def test_hidden_states_and_attentions_are_returned_on_request(checkpoint, inputs):
    model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True, attn_implementation="eager").eval()
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3 and len(output.attentions) == 2
    assert output.image_hidden_states.shape == (3, 64, 64)


def make_model(**fields) -> TheWorldForConditionalGeneration:
    set_seed(0)
    config = TheWorldConfig(world_config=VAE_FIELDS, text_config=TEXT_CONFIGS["gemma2"], **fields)
    return TheWorldForConditionalGeneration(config).eval()


@torch.no_grad()
def test_merged_tokens_hold_the_numbers_of_their_square():
    model = make_model(latent_merge_size=2)
    latents = torch.randn(1, 16, 4, 6)
    projection = model.model.world_projection
    tokens = projection(latents)
    assert tokens.shape == (1, 6, 64)
    square = latents[0, :, 2:4, 0:2]  # second row of squares, first column: token 3
    torch.testing.assert_close(tokens[0, 3], projection.linear_1(square.flatten()), **FLOAT32_TOLERANCE)


@torch.no_grad()
def test_channel_tokens_hold_a_channel_each():
    model = make_model(token_layout="channel", image_size=32)
    latents = torch.randn(2, 16, 4, 4)
    projection = model.model.world_projection
    tokens = projection(latents)
    assert tokens.shape == (2, 16, 64)
    torch.testing.assert_close(tokens[1, 5], projection.linear_1(latents[1, 5].flatten()), **FLOAT32_TOLERANCE)
    with pytest.raises(ValueError, match="reads images of 32 x 32 pixels, whose latents are 4 x 4, got 2 x 8"):
        projection(torch.randn(1, 16, 2, 8))


@torch.no_grad()
def test_spatial_tokens_run_row_by_row():
    model = make_model()
    latents = torch.randn(1, 16, 2, 3)
    projection = model.model.world_projection
    torch.testing.assert_close(
        projection(latents)[0, 4], projection.linear_1(latents[0, :, 1, 1]), **FLOAT32_TOLERANCE
    )


@torch.no_grad()
def test_normalized_latents_are_those_of_the_cosmos_pipelines():
    plain, normalized = make_model(), make_model(normalize_latents=True)
    images = torch.rand(1, 3, 16, 16)
    mean, std = (
        torch.tensor(getattr(plain.config.world_config, name)).view(1, 16, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    expected = (plain.get_world_latents(images) - mean) / std
    torch.testing.assert_close(normalized.get_world_latents(images), expected, **FLOAT32_TOLERANCE)


@torch.no_grad()
def test_the_mlp_projector_is_linear_gelu_linear():
    projection = make_model(projector_type="mlp").model.world_projection
    latents = torch.randn(1, 16, 2, 2)
    hidden = torch.nn.functional.gelu(projection.linear_1(latents.flatten(2).transpose(1, 2)))
    torch.testing.assert_close(projection(latents), projection.linear_2(hidden), **FLOAT32_TOLERANCE)


@torch.no_grad()
def test_image_features_hold_latents_and_projected_tokens(model, inputs):
    features = model.get_image_features(inputs["pixel_values"])
    assert torch.equal(features.last_hidden_state, model.get_world_latents(inputs["pixel_values"]))
    assert torch.equal(features.pooler_output, model(**inputs).image_hidden_states)
    assert torch.equal(
        logits_of(model, without_images(inputs), mm_encoder_outputs={"image": features}), logits_of(model, inputs)
    )


def test_an_image_without_placeholder_is_rejected(model, processor, inputs):
    text = processor(text=QUESTION, return_tensors="pt")
    with pytest.raises(
        ValueError, match=r"1 image\(s\) of 64 world tokens need 64 `<world>` placeholders, but the prompts have \[0\]"
    ):
        model(**text, pixel_values=inputs["pixel_values"][:1])
    for options in ({}, {"num_beams": 2}):
        with pytest.raises(ValueError, match="need 64 `<world>` placeholders"):
            generate(model, {**text, "pixel_values": inputs["pixel_values"][:1]}, **options)


def test_an_image_too_many_or_too_few_is_rejected(model, inputs):
    prompts = without_images(inputs)
    for count in (1, 2):
        with pytest.raises(ValueError, match=rf"{count} image\(s\) .* need {64 * count} .* have \[128, 0, 64\]"):
            model(**prompts, pixel_values=inputs["pixel_values"][:count])


def test_an_image_split_over_two_prompts_is_rejected(model):
    input_ids = torch.full((2, 34), model.config.image_token_id)
    input_ids[0, :3] = input_ids[1, :1] = 30
    with pytest.raises(
        ValueError,
        match=r"64 `<world>` placeholders must be in one prompt and contiguous, but the prompts have \[31, 33\]",
    ):
        model.generate(input_ids, pixel_values=torch.zeros(1, 3, 64, 64), max_new_tokens=1)


def test_a_prompt_whose_image_is_missing_is_rejected(model, inputs):
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="The prompt has `<world>` placeholders but no image is given"):
            call(**without_images(inputs))


def test_images_given_twice_are_rejected(model, inputs):
    latents = model.get_world_latents(inputs["pixel_values"])
    with pytest.raises(ValueError, match="Give the images once"):
        model(**inputs, world_latents=latents)
    with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
        model(pixel_values=inputs["pixel_values"])


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (16, 8, 8), (1, 16, 0, 8)])
def test_latents_of_another_shape_are_rejected(model, shape):
    with pytest.raises(ValueError, match=r"Expected latents \[B, 16, h, w\]"):
        model(input_ids=torch.tensor([[2, 7, 30]]), world_latents=torch.zeros(shape))


def test_a_missing_norm_is_initialized(tmp_path):
    model = make_model()
    state = {name: tensor for name, tensor in model.state_dict().items() if "norm" not in name or "world" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded, _ = TheWorldForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    for name, parameter in loaded.model.world_encoder.named_parameters():
        if name.endswith("gamma"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name


def test_a_compiled_encoder_gives_the_same_latents():
    model = make_model()
    images = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        compiled = torch.compile(model.model.world_encoder, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), model.model.world_encoder(images), **FLOAT32_TOLERANCE)


def test_a_compiled_model_gives_the_same_logits(model, inputs):
    check_compiled_model(model, inputs)
