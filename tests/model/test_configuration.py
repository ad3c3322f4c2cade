"""Tests the configuration's defaults, what it derives, and what it rejects."""

import doctest
import importlib
import inspect

import pytest
from diffusers import AutoencoderKLWan
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, Gemma2Config, Gemma3Config

from tests.helpers.checkpoints import TEXT_CONFIGS, TEXT_FIELDS
from theworld import TheWorldConfig, TheWorldEncoderConfig


def test_world_config_defaults_are_those_of_diffusers():
    defaults = {name: field.default for name, field in inspect.signature(AutoencoderKLWan).parameters.items()}
    ours = TheWorldEncoderConfig()
    for name in (
        "base_dim",
        "z_dim",
        "dim_mult",
        "num_res_blocks",
        "temperal_downsample",
        "dropout",
        "latents_mean",
        "latents_std",
    ):
        value = getattr(ours, name)
        assert (list(value) if isinstance(value, tuple) else value) == defaults[name], name
    assert ours.spatial_compression_ratio == defaults["scale_factor_spatial"]


def test_the_docstrings_example():
    result = doctest.testmod(importlib.import_module("theworld.configuration_theworld"))
    assert result.attempted and not result.failed


def test_text_config_defaults_to_gemma_2_2b():
    config = TheWorldConfig()
    assert isinstance(config.text_config, Gemma2Config)
    assert config.text_config.hidden_size == 2304 and config.text_config.num_hidden_layers == 26
    assert config.get_text_config() is config.text_config


@pytest.mark.parametrize(
    ("fields", "patch_size", "world_token_size"),
    [
        ({}, 8, 16),
        ({"latent_merge_size": 2}, 16, 64),
        ({"token_layout": "channel", "image_size": 512}, 8, 4096),
    ],
)
def test_derived_sizes(fields, patch_size, world_token_size):
    config = TheWorldConfig(**fields)
    assert (config.patch_size, config.world_token_size) == (patch_size, world_token_size)


@pytest.mark.parametrize("family", TEXT_CONFIGS)
def test_round_trip_through_json(family, tmp_path):
    config = TheWorldConfig(
        world_config={"base_dim": 8}, text_config=TEXT_CONFIGS[family].to_dict(), normalize_latents=True
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert loaded.world_config.base_dim == 8 and loaded.text_config.model_type == family


def test_gemma_families_keep_their_own_tying():
    untied = {**TEXT_FIELDS, "model_type": "gemma2", "tie_word_embeddings": False}
    assert not TheWorldConfig(text_config=untied).tie_word_embeddings
    assert TheWorldConfig().tie_word_embeddings


CONTRADICTIONS = {
    "another text model": ({"text_config": {"model_type": "llama"}}, "must be a Gemma text model.*got 'llama'"),
    "the multimodal Gemma 3": ({"text_config": Gemma3Config()}, "got 'gemma3'. Pass its `text_config`"),
    "no merge": ({"latent_merge_size": 0}, "`latent_merge_size` must be 1 or more, got 0"),
    "merged channels": (
        {"token_layout": "channel", "image_size": 64, "latent_merge_size": 2},
        "`latent_merge_size=2` merges positions",
    ),
    "channels without a size": (
        {"token_layout": "channel"},
        "`image_size` must be a positive multiple of 8.*got None",
    ),
    "channels of an odd size": (
        {"token_layout": "channel", "image_size": 60},
        "positive multiple of 8 pixels, got 60",
    ),
    "positions with a size": ({"image_size": 64}, "`image_size=64` is for `token_layout='channel'`"),
    "an unknown layout": ({"token_layout": "rows"}, "token_layout"),
    "an unknown projector": ({"projector_type": "conv"}, "projector_type"),
    "equal token ids": (
        {"image_token_id": 8},
        r"different and below the vocabulary size 256000, got \{'image_token_id': 8, 'start_of_world_token_id': 8",
    ),
    "a token id outside": ({"image_token_id": 256_000}, "different and below the vocabulary size"),
    "a video token id that is an image's": ({"video_token_id": 7}, "different and below .* 'video_token_id': 7"),
    "statistics of another width": ({"world_config": {"z_dim": 4}}, "each of the latent channels, z_dim=4, got 16"),
    "halvings of another depth": (
        {"world_config": {"dim_mult": [1, 2]}},
        "one entry for each of the 1 halvings between the 2 stages",
    ),
    "Wan 2.2's blocks": ({"world_config": {"is_residual": True}}, "Wan 2.2 sets `is_residual` and `patch_size`"),
    "Wan 2.2's patches": ({"world_config": {"patch_size": 2}}, "but this one has {'patch_size': 2}"),
    "attention in the stages": ({"world_config": {"attn_scales": [0.5]}}, "attn_scales"),
}


@pytest.mark.parametrize(("fields", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictions_are_rejected(fields, message):
    with pytest.raises((StrictDataclassError, ValueError), match=message):
        TheWorldConfig(**fields)
