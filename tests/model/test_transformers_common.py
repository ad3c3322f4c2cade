"""
Tests that TheWorld passes the tests that transformers has for each of its own models.

They come from transformers' source distribution, which `make build/suite/transformers_tests` fetches.
"""

import sys
import types
import unittest
from copy import deepcopy

import torch
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from tests.helpers.checkpoints import TEXT_FIELDS, VAE_FIELDS
from theworld import TheWorldConfig, TheWorldForConditionalGeneration, TheWorldModel


# The distribution leaves out two packages that `test_modeling_common` takes mixins from (generation, export). These
# are empty here; generation has its own tests.
for name, mixin in (
    ("transformers_tests.exporters.test_export", "ExportTesterMixin"),
    ("transformers_tests.generation.test_utils", "GenerationTesterMixin"),
):
    sys.modules[name] = types.ModuleType(name)
    setattr(sys.modules[name], mixin, type(mixin, (), {}))

from transformers_tests import test_modeling_common as suite  # noqa: E402


# The suite looks up by class name which tests a model takes part in.
MODEL_MAPPING_NAMES["theworld"] = TheWorldModel.__name__
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["theworld"] = TheWorldForConditionalGeneration.__name__


class TheWorldModelTester:
    """A tiny TheWorld and a batch for it: each prompt is an image's world tokens, then text."""

    def __init__(self, text_config: dict, world_config: dict, with_images: bool):
        self.world_config = world_config
        self.with_images = with_images
        self.text_config = {**TEXT_FIELDS, "max_position_embeddings": 512, **text_config}
        self.batch_size = 3
        self.image_size = 32
        self.num_image_tokens = 16
        self.seq_length = self.num_image_tokens + 7
        self.hidden_size = TEXT_FIELDS["hidden_size"]
        self.num_hidden_layers = TEXT_FIELDS["num_hidden_layers"]
        self.num_attention_heads = TEXT_FIELDS["num_attention_heads"]
        self.vocab_size = TEXT_FIELDS["vocab_size"]
        self.is_training = True

    def get_config(self) -> TheWorldConfig:
        return TheWorldConfig(world_config=self.world_config, text_config=self.text_config)

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        generator = torch.Generator().manual_seed(0)
        pixel_values = torch.rand(self.batch_size, 3, self.image_size, self.image_size, generator=generator) * 2 - 1
        input_ids = torch.randint(20, self.vocab_size, (self.batch_size, self.seq_length), generator=generator)
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if self.with_images:
            input_ids[:, 1 : 1 + self.num_image_tokens] = config.image_token_id
            inputs["pixel_values"] = pixel_values
        return config, inputs


def zero_init_but_latents_std(config, zero_init=suite._config_zero_init):
    """The suite sets every field named `*_std` to 1e-10; `latents_std` is a list of statistics, no initialisation."""
    config = deepcopy(config)
    world_config = getattr(config, "world_config", None)
    if world_config is None:
        return zero_init(config)
    config.world_config = None
    config = zero_init(config)
    config.world_config = world_config
    return config


def random_text_ids(*args, ids_tensor=suite.ids_tensor, **kwargs):
    """The suite's random ids without the special ones, since a `<world>` by chance has no image."""
    return ids_tensor(*args, **kwargs).clamp(min=20)


suite._config_zero_init = zero_init_but_latents_std
suite.ids_tensor = random_text_ids


class CommonTests(suite.ModelTesterMixin, suite.GenerationTesterMixin):
    all_model_classes = (TheWorldModel, TheWorldForConditionalGeneration)
    _is_composite = True
    # `last_hidden_state` holds latents [B, z, h, w], whose last axis is no hidden size.
    skip_test_image_features_output_shape = True
    skip_test_video_features_output_shape = True
    text_config: dict
    world_config = VAE_FIELDS

    def setUp(self):
        # The eager-sdpa comparison calls the model with `input_ids` alone; with images it is in test_modeling.py.
        with_images = "eager_matches_sdpa" not in self._testMethodName
        self.model_tester = TheWorldModelTester(self.text_config, self.world_config, with_images)

    def _video_features_prepare_config_and_inputs(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        return config, {"pixel_values_videos": inputs["pixel_values"].unsqueeze(1).repeat(1, 5, 1, 1, 1)}

    @unittest.skip("The world encoder is convolutional: it has no layers of hidden states to return.")
    def test_get_image_features_hidden_states(self):
        pass

    @unittest.skip("The world encoder is convolutional: it has no attentions to return.")
    def test_get_image_features_attentions(self):
        pass

    @unittest.skip("The world encoder is convolutional: it has no layers of hidden states to return.")
    def test_get_video_features_hidden_states(self):
        pass

    @unittest.skip("The world encoder is convolutional: it has no attentions to return.")
    def test_get_video_features_attentions(self):
        pass

    @unittest.skip("`_keep_in_fp32_modules` names what quantizers skip; float16 is float16 (test_quantized.py).")
    def test_keep_in_fp32_modules(self):
        pass


class Gemma2CommonTest(CommonTests, unittest.TestCase):
    text_config = {"model_type": "gemma2", "sliding_window": 16}
    # One frame never reaches the convolutions over time.
    test_all_params_have_gradient = False


class Gemma3CommonTest(CommonTests, unittest.TestCase):
    text_config = {
        "model_type": "gemma3_text",
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    # A VAE without convolutions over time: all parameters get a gradient.
    world_config = {**VAE_FIELDS, "temperal_downsample": [False, False, False]}
