# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""What `generate` needs besides `forward`: images are encoded once, and their features repeated for beams."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_theworld import TheWorldConfig
from .modalities_theworld import MODALITIES, check_placeholders_contiguous, create_block_masks, lengths_of
from .validation_theworld import check_context, check_generation_inputs
from .versions_theworld import CACHE_NAME, accepts_past_key_values, create_masks_for_generate


class TheWorldGenerationMixin(GenerationMixin):
    """`GenerationMixin` for prompts with images and videos."""

    config: TheWorldConfig
    model: Any  # TheWorldModel, whose file imports this one

    def _prepare_generated_length(  # type: ignore[override] # called with keywords only
        self, generation_config: GenerationConfig, *, input_ids_length: int, inputs_tensor: torch.Tensor, **kwargs
    ) -> GenerationConfig:
        """As in transformers, but an answer ends at the end of Gemma's context, beyond which it is meaningless."""
        context, length = self.config.text_config.max_position_embeddings, inputs_tensor.shape[1]
        check_context(length, context)
        generation_config = super()._prepare_generated_length(  # type: ignore[misc] # `self` is a model
            generation_config, input_ids_length=input_ids_length, inputs_tensor=inputs_tensor, **kwargs
        )
        # `max_length` does not count prompts that are given as embeddings.
        generation_config.max_length = min(generation_config.max_length, context - length + input_ids_length)
        return generation_config

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs,
    ) -> dict:
        """As in transformers, which leaves it to models to pass encoded images and token types at prefill only."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs.pop("mm_encoder_outputs", None)
            inputs.pop("token_type_ids", None)
        return inputs

    @staticmethod
    @accepts_past_key_values
    def create_masks_for_generate(
        config: TheWorldConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        position_ids: torch.LongTensor | None,
        token_type_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> torch.Tensor | dict | None:
        """As in transformers, which creates the masks of a static cache in advance; with bidirectional blocks."""
        masks = create_block_masks(config, inputs_embeds, attention_mask, cache, position_ids, token_type_ids)
        if masks is not attention_mask:
            return masks
        return create_masks_for_generate(config, inputs_embeds, attention_mask, cache=cache, position_ids=position_ids)

    def _prepare_multimodal_encoder_kwargs_for_generation(  # type: ignore[override] # transformers returns a dict too
        self, model_kwargs: dict
    ) -> dict:
        """Encodes nothing yet: `_expand_inputs_for_generation` does, because latents have sizes as pixels have."""
        return model_kwargs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs,
    ) -> tuple[torch.LongTensor, dict]:
        """
        As in transformers, but encodes images and videos, once, before prompts are repeated for beams.

        The images of a prompt stay together. Images of the part of a prompt that is already in a cache are not given
        again: those in `model_kwargs` belong to the rest of the prompt.
        """
        # Without ids, because prompts are embeddings, `generate` passes [batch, 0].
        ids = cast(torch.LongTensor, input_ids)
        check_generation_inputs(ids, model_kwargs.get("attention_mask"), self.config.text_config.vocab_size)
        names = ["mm_encoder_outputs", *(name for modality in MODALITIES for name in modality.inputs)]
        names += [modality.sizes for modality in MODALITIES if modality.sizes is not None]
        tokens = self.model.encode_modalities(**{name: model_kwargs.pop(name, None) for name in names})
        if tokens:
            cache, embeds = model_kwargs.get(CACHE_NAME), model_kwargs.get("inputs_embeds")
            prompts = ids[:, cache.get_seq_length() if cache is not None else 0 :] if ids.numel() else None
            if self.config.has_bidirectional_blocks and model_kwargs.get("token_type_ids") is None:
                model_kwargs["token_type_ids"] = self.model.get_token_types(prompts, embeds)
            encoded = self._repeat_by_prompt(prompts, embeds, tokens, expand_size)
        expanded_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc] # `self` is a model
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if tokens:
            model_kwargs["mm_encoder_outputs"] = encoded
        return expanded_ids, model_kwargs

    def _repeat_by_prompt(
        self,
        prompts: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        tokens: dict[str, torch.Tensor | list[torch.Tensor]],
        times: int,
    ) -> dict[str, BaseModelOutputWithPooling]:
        """The modalities' tokens for `times` beams per prompt: images [A, B] of a prompt become [A, B, A, B]."""
        outputs = {}
        for modality in (modality for modality in MODALITIES if modality.name in tokens):
            features = tokens[modality.name]
            mask = self.model.get_placeholder_mask(prompts, inputs_embeds, features, modality)
            check_placeholders_contiguous(mask[..., 0], lengths_of(features), modality)
            by_prompt = split_by_prompt(features, mask.sum((1, 2)).tolist())
            repeated: Any = [item for items in by_prompt for item in items * times]
            repeated = torch.stack(repeated) if isinstance(features, torch.Tensor) else repeated
            outputs[modality.name] = BaseModelOutputWithPooling(pooler_output=repeated)
        return outputs


def split_by_prompt(features: Iterable[torch.Tensor], counts: list[int]) -> list[list[torch.Tensor]]:
    """The items [N_i, D] of each prompt, whose number of placeholders is given by `counts`."""
    waiting = iter(features)
    prompts: list[list[torch.Tensor]] = []
    for count in counts:
        prompts.append([])
        while count > 0:
            prompts[-1].append(next(waiting))
            count -= len(prompts[-1][-1])
    return prompts
