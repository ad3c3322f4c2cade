# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
TheWorld: the latent of an image, one token a position, read by Gemma.

    B images, H x W pixels, z latent channels, h x w latent positions, N world tokens an image, D Gemma's width,
    S tokens in a prompt

    pixel_values [B, 3, H, W] -> TheWorldEncoder -> latents [B, z, h, w] -> TheWorldProjector -> world tokens [B, N, D]
    input_ids [.., S] -> embeddings [.., S, D], with world tokens in the places of `<world>` -> Gemma -> logits
"""

from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanEncoder3d, WanRMS_norm
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, Cache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check

from .checks_theworld import (
    check_asked,
    check_context,
    check_floating,
    check_labels,
    check_latents,
    check_prompts,
    check_whole_images,
)
from .configuration_theworld import TheWorldConfig, TheWorldEncoderConfig
from .frames_theworld import use_frame_modules


# Images are encoded together up to so many pixels, which bounds memory: one of 256 x 256 on a CPU, where more at once
# are slower, and eight of 512 x 512 elsewhere.
PIXELS_AT_ONCE = {"cpu": 2**16, "accelerator": 2**21}

# Attention of the engines that build a model with `AutoModel.from_config` and put their own head on it.
ENGINE_ATTENTION = ("vllm", "sglang")


@dataclass
class TheWorldModelOutputWithPast(BaseModelOutputWithPast):
    """`BaseModelOutputWithPast`, and in `image_hidden_states` the world tokens [B, N, D] that went in."""

    image_hidden_states: torch.Tensor | None = None


@dataclass
class TheWorldCausalLMOutputWithPast(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast`, and in `image_hidden_states` the world tokens [B, N, D] that went in."""

    image_hidden_states: torch.Tensor | None = None


class TheWorldEncoder(nn.Module):
    """
    The encoder of a Wan VAE, built from diffusers' own modules, for images.

    It holds the parameters of `AutoencoderKLWan.encoder` and `.quant_conv` under their diffusers names, and keeps
    nothing between calls, so threads may share it.
    """

    def __init__(self, config: TheWorldEncoderConfig):
        super().__init__()
        self.config = config
        self.encoder = WanEncoder3d(
            in_channels=config.in_channels,
            dim=config.base_dim,
            z_dim=config.z_dim * 2,
            dim_mult=list(config.dim_mult),
            num_res_blocks=config.num_res_blocks,
            temperal_downsample=list(config.temperal_downsample),
            dropout=config.dropout,
        )
        self.quant_conv = WanCausalConv3d(config.z_dim * 2, config.z_dim * 2, 1)
        use_frame_modules(self)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Encodes images to the mode of their latent distribution: deterministic and differentiable.

        Args:
            pixel_values: [B, 3, H, W], floating point, in [-1, 1], H and W multiples of 8.

        Returns:
            Latents [B, z, H / 8, W / 8] in the encoder's dtype, not normalised; what
            `AutoencoderKLWan.encode(pixel_values[:, :, None]).latent_dist.mode()[:, :, 0]` returns.

        Raises:
            TypeError: If `pixel_values` is not floating point.
            ValueError: If its shape or its range is another.
        """
        channels, ratio = self.config.in_channels, self.config.spatial_compression_ratio
        check_floating(
            pixel_values,
            "`pixel_values` must be floating point in [-1, 1]",
            "TheWorldProcessor converts images; by hand it is `image / 127.5 - 1`.",
        )
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != channels or 0 in shape or shape[2] % ratio or shape[3] % ratio:
            raise ValueError(
                f"`pixel_values` must be [B, {channels}, H, W] with one image or more and H and W multiples of "
                f"{ratio}, got {list(shape)}. TheWorldProcessor resizes images to such a size."
            )
        # The slack is for rounding; NaN fails the comparison too.
        torch_compilable_check(
            pixel_values.abs().amax() <= 1.001,
            "`pixel_values` must be in [-1, 1] (0..255 maps there by `image / 127.5 - 1`), but values lie outside, or "
            "are NaN. TheWorldProcessor scales images to that range.",
        )
        images = pixel_values.to(self.quant_conv.weight.dtype)
        if torch.compiler.is_compiling():  # the compiler chooses the layout, and one graph serves all sizes
            return self.mode(images)
        images = images.contiguous(memory_format=torch.channels_last)
        limit = PIXELS_AT_ONCE["cpu" if images.device.type == "cpu" else "accelerator"]
        at_once = max(1, limit // (shape[2] * shape[3]))
        return torch.cat([self.mode(some) for some in images.split(at_once)])

    def mode(self, images: torch.Tensor) -> torch.Tensor:
        """Latents [B, z, h, w] of checked images [B, 3, H, W], all at once."""
        mean, _logvar = self.quant_conv(self.encoder(images.unsqueeze(2))).chunk(2, dim=1)
        return mean.squeeze(2)


class TheWorldProjector(nn.Module):
    """Latents to world tokens: arranges a token's numbers side by side, then projects them to Gemma's width."""

    def __init__(self, config: TheWorldConfig):
        super().__init__()
        self.config = config
        text_width = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.world_token_size, text_width)
        if config.projector_type == "mlp":
            self.linear_2 = nn.Linear(text_width, text_width)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Args:
            latents: [B, z, h, w], as `get_world_latents` returns them.

        Returns:
            World tokens [B, N, D]: row by row over the positions (`token_layout="spatial"`), or one a channel.

        Raises:
            ValueError: If the latents are not of the shape that the config's layout reads.
        """
        shape, merge = list(latents.shape), self.config.latent_merge_size
        z_dim = self.config.world_config.z_dim
        if len(shape) != 4 or shape[1] != z_dim or 0 in shape or shape[2] % merge or shape[3] % merge:
            raise ValueError(
                f"Expected latents [B, {z_dim}, h, w] with h and w multiples of latent_merge_size={merge}, got "
                f"{shape}. Image sides must be multiples of {self.config.patch_size} pixels."
            )
        if self.config.token_layout == "channel":
            side = self.config.image_size // self.config.patch_size
            if shape[2:] != [side, side]:
                raise ValueError(
                    f"`token_layout='channel'` was built for images of {self.config.image_size} pixels a side, whose "
                    f"latents are {side} x {side}, got {shape[2]} x {shape[3]}."
                )
            tokens = latents.flatten(2)
        else:
            tokens = F.pixel_unshuffle(latents, merge).flatten(2).transpose(1, 2)
        hidden_states = self.linear_1(tokens.to(self.linear_1.weight.dtype).contiguous())
        if self.config.projector_type == "mlp":
            hidden_states = self.linear_2(F.gelu(hidden_states))
        return hidden_states


class TheWorldPreTrainedModel(PreTrainedModel):
    config: TheWorldConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["TheWorldEncoder"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, *args, use_safetensors: bool | None = None, **kwargs) -> PreTrainedModel:
        """As transformers' own, but where there are no safetensors it reads no pickle, which could run anything."""
        if use_safetensors is False:
            raise ValueError("TheWorld reads safetensors only, got use_safetensors=False. Leave it out.")
        return super().from_pretrained(*args, use_safetensors=True, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, WanRMS_norm):
            init.ones_(module.gamma)


class TheWorldModel(TheWorldPreTrainedModel):
    """The Wan encoder, the projection and Gemma, without the language-model head."""

    # What FSDP gathers and frees together; the rest is gathered once a step. (For tensors, Gemma brings its own plan.)
    _fsdp_plan = {"world_encoder": "free_full_weight", "language_model.layers.*": "free_full_weight"}

    def __init__(self, config: TheWorldConfig):
        super().__init__(config)
        self.world_encoder = TheWorldEncoder(config.world_config)
        self.world_projection = TheWorldProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_world_latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Encodes images to the latents that the projection reads; `forward` takes them back as `world_latents`.

        Args:
            pixel_values: [B, 3, H, W], floating point, in [-1, 1], H and W multiples of 8.

        Returns:
            Latents [B, z, H / 8, W / 8] in the encoder's dtype; normalised if `config.normalize_latents`.

        Raises:
            TypeError, ValueError: As [`TheWorldEncoder.forward`].
        """
        latents = self.world_encoder(pixel_values)
        if self.config.normalize_latents:
            # Read from the config at each call: `from_pretrained` fills buffers that no checkpoint holds with garbage
            # (transformers#48892).
            mean = latents.new_tensor(self.config.world_config.latents_mean).view(-1, 1, 1)
            std = latents.new_tensor(self.config.world_config.latents_std).view(-1, 1, 1)
            latents = (latents - mean) / std
        return latents

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        """
        Encodes and projects images.

        Args:
            pixel_values: [B, 3, H, W], floating point, in [-1, 1], H and W multiples of `config.patch_size`.

        Returns:
            `last_hidden_state`: the latents [B, z, h, w]. `pooler_output`: the world tokens [B, N, D].

        Raises:
            TypeError, ValueError: As [`TheWorldEncoder.forward`] and [`TheWorldProjector.forward`].
        """
        latents = self.get_world_latents(pixel_values)
        return BaseModelOutputWithPooling(last_hidden_state=latents, pooler_output=self.world_projection(latents))

    def get_world_tokens(
        self,
        pixel_values: torch.Tensor | None = None,
        world_latents: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
    ) -> torch.Tensor | None:
        """
        World tokens [B, N, D] from images in whichever form they came; None if none came.

        Raises:
            ValueError: If images came in more than one form.
        """
        encoded = (mm_encoder_outputs or {}).get("image")
        if sum(form is not None for form in (pixel_values, world_latents, encoded)) > 1:
            raise ValueError("Give the images once: as `pixel_values`, as `world_latents` or as `mm_encoder_outputs`.")
        if pixel_values is not None:
            return self.get_image_features(pixel_values, return_dict=True).pooler_output
        if world_latents is not None:
            check_latents(world_latents)
            return self.world_projection(world_latents)
        return encoded.pooler_output if encoded is not None else None

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None, image_features: torch.Tensor
    ) -> torch.Tensor:
        """
        Finds the places of world tokens, and checks that there are as many places as tokens.

        Args:
            input_ids: [batch, S], or None to compare `inputs_embeds` with the embedding of `<world>`.
            inputs_embeds: [batch, S, D]; needed only without `input_ids`.
            image_features: World tokens [B, N, D].

        Returns:
            Boolean mask [batch, S, 1].

        Raises:
            ValueError: If the numbers differ.
        """
        if input_ids is None:
            token_id = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(token_id)).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        num_images, num_tokens = image_features.shape[:2]
        torch_compilable_check(
            mask.sum() == num_images * num_tokens,
            lambda: (
                f"{num_images} image(s) of {num_tokens} world tokens need {num_images * num_tokens} `<world>` places, "
                f"but the prompts have {mask.sum(-1).tolist()}. TheWorldProcessor expands one `<world>` an image."
            ),
        )
        return mask.unsqueeze(-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        world_latents: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | TheWorldModelOutputWithPast:
        """
        Reads prompts with images in them; see [`TheWorldForConditionalGeneration.forward`] for the arguments.

        Returns:
            `last_hidden_state` [batch, S, D], and Gemma's other outputs.
        """
        vocab_size = self.config.text_config.vocab_size
        check_prompts(input_ids, inputs_embeds, attention_mask, past_key_values, vocab_size)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        world_tokens = self.get_world_tokens(pixel_values, world_latents, mm_encoder_outputs)
        if world_tokens is not None:
            world_tokens = world_tokens.to(inputs_embeds.device, inputs_embeds.dtype)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, world_tokens)
            if mm_encoder_outputs is None:  # which `generate` has checked, and may bring in pieces
                check_whole_images(mask[..., 0], world_tokens.shape[1])
            inputs_embeds = inputs_embeds.masked_scatter(mask, world_tokens)
        elif input_ids is not None and input_ids.shape[1] > 1:  # a prompt: decoding goes on one token at a time
            torch_compilable_check(
                (input_ids != self.config.image_token_id).all(),
                "The prompt has `<world>` places but no image came with it. Give `pixel_values` or `world_latents`, "
                "or leave `<world>` out of the prompt.",
            )

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return TheWorldModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=world_tokens,
        )


class TheWorldForConditionalGeneration(TheWorldPreTrainedModel, GenerationMixin):
    """TheWorld with the language-model head: what `AutoModel.from_pretrained` gives, and what generates."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: TheWorldConfig):
        super().__init__(config)
        self.model = TheWorldModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        # One frame never reaches these. DistributedDataParallel would wait for their gradients.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_parameters() if ".time_conv." in name]
        self.post_init()

    @classmethod
    def _from_config(cls, config: TheWorldConfig, **kwargs) -> PreTrainedModel:
        """
        As transformers' own, for users; for a serving engine, the model without a head.

        An engine brings its own attention, head and sampling. It names its attention when it asks `AutoModel` for the
        model, and wants the hidden states.
        """
        if kwargs.get("attn_implementation", config.text_config._attn_implementation) in ENGINE_ATTENTION:
            return TheWorldModel._from_config(config, **kwargs)
        return super()._from_config(config, **kwargs)

    @classmethod
    def maybe_distribute_model(cls, model: PreTrainedModel, distributed_config, *args) -> PreTrainedModel:
        """As transformers' own, with the head tied before FSDP, which would shard the one weight twice otherwise."""
        if distributed_config is not None and distributed_config.fsdp_size > 1:
            model.tie_weights()
        return super().maybe_distribute_model(model, distributed_config, *args)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_world_latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """As [`TheWorldModel.get_world_latents`]."""
        return self.model.get_world_latents(pixel_values)

    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        """As [`TheWorldModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        world_latents: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | TheWorldCausalLMOutputWithPast:
        """
        Scores the next tokens of prompts with images in them.

        Args:
            input_ids: [batch, S]; `<world>` N times for each image, as TheWorldProcessor expands it.
            pixel_values: [B, 3, H, W], floating point, in [-1, 1]; the images of all prompts in their order. H and W
                are multiples of `config.patch_size`.
            attention_mask: [batch, S], 0 at padding.
            position_ids, past_key_values: As Gemma's.
            inputs_embeds: [batch, S, D], in place of `input_ids`.
            labels: [batch, S] token ids, -100 where none counts; shifted inside.
            logits_to_keep: How many of the last positions, or which, get logits; 0 for all.
            world_latents: [B, z, h, w] as `get_world_latents` returns them, in place of `pixel_values`.
            mm_encoder_outputs: `{"image": get_image_features(...)}` in place of `pixel_values`, as `generate` does.

        Returns:
            `loss` if labels came, `logits` [batch, S, vocabulary], and Gemma's other outputs.

        Raises:
            TypeError: If `pixel_values` is not floating point.
            ValueError: If images and `<world>` places differ in number, images come twice, or their shape or range is
                wrong.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            world_latents=world_latents,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        # Gemma 2 caps its logits; the same three operations as its own class, so that the bits agree.
        if (cap := getattr(self.config.text_config, "final_logit_softcapping", None)) is not None:
            logits = logits / cap
            logits = torch.tanh(logits)
            logits = logits * cap

        loss = None
        if labels is not None:
            check_labels(labels, logits)
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)

        return TheWorldCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def _prepare_generated_length(
        self, generation_config: GenerationConfig, *, input_ids_length: int, inputs_tensor: torch.Tensor, **kwargs
    ) -> GenerationConfig:
        """As transformers' own; an answer ends where Gemma's context does, beyond which it would make no sense."""
        context, length = self.config.text_config.max_position_embeddings, inputs_tensor.shape[1]
        check_context(length, context)
        generation_config = super()._prepare_generated_length(
            generation_config, input_ids_length=input_ids_length, inputs_tensor=inputs_tensor, **kwargs
        )
        # `max_length` does not count prompts that came as embeddings.
        generation_config.max_length = min(generation_config.max_length, context - length + input_ids_length)
        return generation_config

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs,
    ) -> dict:
        """As transformers' own; encoded images go with the prompt only, which 5.17 leaves to the model."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs.pop("mm_encoder_outputs", None)
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs,
    ) -> tuple[torch.LongTensor, dict]:
        """
        As transformers' own, and encodes the images, once, before beams multiply the prompts.

        A prompt's images stay together: for two beams, [A, B] becomes [A, B, A, B] and not [A, A, B, B]. What a cache
        holds was read with its images: those that come now are for the rest of the prompt.
        """
        check_asked(input_ids, model_kwargs.get("attention_mask"), self.config.text_config.vocab_size)
        image_forms = ("pixel_values", "world_latents", "mm_encoder_outputs")
        world_tokens = self.model.get_world_tokens(**{form: model_kwargs.pop(form, None) for form in image_forms})
        if world_tokens is not None:
            cache = model_kwargs.get("past_key_values")
            prompts = input_ids[:, cache.get_seq_length() if cache is not None else 0 :] if input_ids.numel() else None
            mask = self.model.get_placeholder_mask(prompts, model_kwargs.get("inputs_embeds"), world_tokens)
            check_whole_images(mask[..., 0], world_tokens.shape[1])
            images_by_prompt = world_tokens.split((mask.sum((1, 2)) // world_tokens.shape[1]).tolist())
            world_tokens = torch.cat([images.repeat(expand_size, 1, 1) for images in images_by_prompt])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if world_tokens is not None:
            model_kwargs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=world_tokens)}
        return input_ids, model_kwargs


TheWorldForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = ["TheWorldForConditionalGeneration", "TheWorldModel", "TheWorldPreTrainedModel"]
