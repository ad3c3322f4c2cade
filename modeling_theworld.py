# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
TheWorld: the latent of an image, one token a position, read by Gemma.

    B images, H x W pixels, z latent channels, h x w latent positions, N world tokens an image, D Gemma's width,
    S tokens in a prompt

    pixel_values [B, 3, H, W] -> TheWorldEncoder -> latents [B, z, h, w] -> TheWorldProjector -> world tokens [B, N, D]
    input_ids [.., S] -> embeddings [.., S, D], with world tokens in the places of `<world>` -> Gemma -> logits

Where Gemma 3 keeps its own eyes, an image also goes the way that Gemma made for it, M tokens an image or crop:

    vision_pixel_values [C, 3, s, s] -> SigLIP -> Gemma's projector -> [C, M, D], in the places of `<image_soft_token>`
"""

from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanEncoder3d, WanRMS_norm
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask, create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3MultiModalProjector,
    create_masks_for_vision_model,
    get_block_sequence_ids_for_mask,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check

from .configuration_theworld import TheWorldConfig, TheWorldEncoderConfig
from .frames_theworld import use_frame_modules


# Images are encoded together up to so many pixels, which bounds memory: one of 256 x 256 on a CPU, where more at once
# are slower, and eight of 512 x 512 elsewhere.
PIXELS_AT_ONCE = {"cpu": 2**16, "accelerator": 2**21}

# Attention of the engines that build a model with `AutoModel.from_config` and put their own head on it.
ENGINE_ATTENTION = ("vllm", "sglang")

# What may come beside text: for messages, the tokens' name, the token of their places, the inputs that bring them. The
# keys are those of `mm_encoder_outputs`, and `{key}_token_id` of the config.
STREAMS = {
    "image": ("world", "<world>", "`pixel_values` or `world_latents`"),
    "vision": ("Gemma's own", "<image_soft_token>", "`vision_pixel_values`"),
}

# `token_type_ids`, beside 0 for text. Gemma 3 has the first, too.
VISION_TYPE, WORLD_TYPE = 1, 2


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
        if not pixel_values.is_floating_point():
            raise TypeError(
                f"`pixel_values` must be floating point in [-1, 1], got {pixel_values.dtype}. "
                "TheWorldProcessor converts images; by hand it is `image / 127.5 - 1`."
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


def create_block_masks(
    config: TheWorldConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | dict | None,
    past_key_values: Cache | None,
    position_ids: torch.LongTensor | None,
    token_type_ids: torch.LongTensor | None,
) -> torch.Tensor | dict | None:
    """
    Gemma's attention masks, causal but inside an image's block, as Gemma 3's own classes make them.

    Args:
        inputs_embeds: [batch, S, ..]; only its shape, dtype and device count.
        token_type_ids: [batch, S or more], 1 in blocks of Gemma's own image tokens, 2 in blocks of world tokens, 0
            elsewhere; the last S count.

    Returns:
        What Gemma takes as `attention_mask`: masks by kind of layer, or one for all; or `attention_mask` as it came,
        if no block is read both ways.

    Raises:
        ValueError: If the last token is inside a block that is read both ways.
    """
    if token_type_ids is None or not config.has_two_way_blocks or isinstance(attention_mask, dict):
        return attention_mask
    two_way = token_type_ids == VISION_TYPE
    if config.world_attention == "bidirectional":
        two_way |= token_type_ids == WORLD_TYPE
    torch_compilable_check(
        ~two_way[:, -1].any(),  # a block's end token follows it
        "The prompt, or the chunk of it, ends inside an image's block, whose tokens see each other both ways. Give "
        "the whole block at once: with a greater `prefill_chunk_size`, or none.",
    )
    # Before these positions all is in the past, which each sees anyhow.
    past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
    two_way = F.pad(two_way[:, -inputs_embeds.shape[1] :].long(), (past, 0))
    arguments = {
        "config": config.text_config,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "past_key_values": past_key_values,
        "position_ids": position_ids,
        "block_sequence_ids": get_block_sequence_ids_for_mask(two_way, device=inputs_embeds.device),
    }
    has_kinds = hasattr(config.text_config, "layer_types")
    return create_masks_for_vision_model(**arguments) if has_kinds else create_causal_mask(**arguments)


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

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, WanRMS_norm):
            init.ones_(module.gamma)
        elif isinstance(module, Gemma3MultiModalProjector):  # as Gemma 3's; its norm multiplies by 1 + weight
            init.zeros_(module.mm_input_projection_weight)
            init.zeros_(module.mm_soft_emb_norm.weight)


class TheWorldModel(TheWorldPreTrainedModel):
    """The Wan encoder, the projection and Gemma, with its own eyes or not, without the language-model head."""

    # What FSDP gathers and frees together; the rest is gathered once a step. (For tensors, Gemma brings its own plan.)
    _fsdp_plan = {"world_encoder": "free_full_weight", "language_model.layers.*": "free_full_weight"}

    def __init__(self, config: TheWorldConfig):
        super().__init__(config)
        self.world_encoder = TheWorldEncoder(config.world_config)
        self.world_projection = TheWorldProjector(config)
        if config.vision_config is not None:
            self.vision_tower = AutoModel.from_config(config.vision_config)
            self.multi_modal_projector = Gemma3MultiModalProjector(config)
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
            return self.world_projection(world_latents)
        return encoded.pooler_output if encoded is not None else None

    @can_return_tuple
    def get_vision_features(
        self, vision_pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        """
        Images as Gemma 3 sees them without TheWorld.

        Args:
            vision_pixel_values: [C, 3, s, s], floating point, with s the tower's `image_size`.

        Returns:
            `last_hidden_state`: the tower's [C, patches, its width]. `pooler_output`: Gemma's image tokens [C, M, D].

        Raises:
            TypeError: If `vision_pixel_values` is not floating point.
            ValueError: If its shape is another, or the model has no `vision_config`.
        """
        self._check_vision_pixel_values(vision_pixel_values)
        outputs = self.vision_tower(pixel_values=vision_pixel_values, return_dict=True, **kwargs)
        outputs.pooler_output = self.multi_modal_projector(outputs.last_hidden_state)
        return outputs

    def _check_vision_pixel_values(self, vision_pixel_values: torch.Tensor):
        vision, shape = self.config.vision_config, list(vision_pixel_values.shape)
        if vision is None:
            raise ValueError(
                "`vision_pixel_values` came, but this model has no `vision_config`. Convert a Gemma 3 with `--vision`."
            )
        if not vision_pixel_values.is_floating_point():
            raise TypeError(
                f"`vision_pixel_values` must be floating point, got {vision_pixel_values.dtype}. TheWorldProcessor "
                "makes them."
            )
        expected = [vision.num_channels, vision.image_size, vision.image_size]
        if len(shape) != 4 or shape[0] == 0 or shape[1:] != expected:
            raise ValueError(
                f"`vision_pixel_values` must be [C, {', '.join(map(str, expected))}] with one image or more, got "
                f"{shape}. TheWorldProcessor makes them."
            )

    def get_vision_tokens(
        self,
        vision_pixel_values: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
    ) -> torch.Tensor | None:
        """
        Gemma's own image tokens [C, M, D] from images in whichever form they came; None if none came.

        Raises:
            ValueError: If images came in both forms.
        """
        encoded = (mm_encoder_outputs or {}).get("vision")
        if vision_pixel_values is None:
            return encoded.pooler_output if encoded is not None else None
        if encoded is not None:
            raise ValueError("Give the images once: as `vision_pixel_values` or as `mm_encoder_outputs`.")
        return self.get_vision_features(vision_pixel_values, return_dict=True).pooler_output

    def find_places(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None, stream: str
    ) -> torch.Tensor:
        """Boolean mask [batch, S] of a stream's places, found by id, or by embedding where there are no ids."""
        token_id = getattr(self.config, f"{stream}_token_id")
        if input_ids is not None:
            return input_ids == token_id
        token_id = torch.tensor(token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token_id)).all(-1)

    def get_placeholder_mask(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor | None,
        image_features: torch.Tensor,
        stream: str = "image",
    ) -> torch.Tensor:
        """
        Finds the places of a stream's tokens, and checks that there are as many places as tokens.

        Args:
            input_ids: [batch, S], or None to compare `inputs_embeds` with the embedding of `<world>`.
            inputs_embeds: [batch, S, D]; needed only without `input_ids`.
            image_features: World tokens [B, N, D], or Gemma's own [C, M, D].
            stream: A key of `STREAMS`.

        Returns:
            Boolean mask [batch, S, 1].

        Raises:
            ValueError: If the numbers differ.
        """
        mask = self.find_places(input_ids, inputs_embeds, stream)
        num_images, num_tokens = image_features.shape[:2]
        name, token, _ = STREAMS[stream]
        torch_compilable_check(
            mask.sum() == num_images * num_tokens,
            lambda: (
                f"{num_images} image(s) of {num_tokens} {name} tokens need {num_images * num_tokens} `{token}` "
                f"places, but the prompts have {mask.sum(-1).tolist()}. TheWorldProcessor expands one `<world>` an "
                "image."
            ),
        )
        return mask.unsqueeze(-1)

    def put_in_place(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor,
        tokens: torch.Tensor | None,
        stream: str,
    ) -> torch.Tensor:
        """
        `inputs_embeds` [batch, S, D] with a stream's tokens in their places.

        Raises:
            ValueError: If tokens and places differ in number, or places came without tokens.
        """
        if tokens is not None:
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, tokens, stream)
            return inputs_embeds.masked_scatter(mask, tokens.to(inputs_embeds.device, inputs_embeds.dtype))
        if input_ids is not None and input_ids.shape[1] > 1:  # a prompt: decoding goes on one token at a time
            _, token, inputs = STREAMS[stream]
            torch_compilable_check(
                ~self.find_places(input_ids, inputs_embeds, stream).any(),
                f"The prompt has `{token}` places but no image came with it. Give {inputs}, or leave `{token}` out of "
                "the prompt.",
            )
        return inputs_embeds

    def get_token_types(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.LongTensor:
        """What each token of a prompt stands for, [batch, S]: 0 text, 1 one of Gemma's own, 2 a world token."""
        types = WORLD_TYPE * self.find_places(input_ids, inputs_embeds, "image").long()
        if self.config.vision_config is not None:
            types += VISION_TYPE * self.find_places(input_ids, inputs_embeds, "vision").long()
        return types

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
        vision_pixel_values: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | TheWorldModelOutputWithPast:
        """
        Reads prompts with images in them; see [`TheWorldForConditionalGeneration.forward`] for the arguments.

        Returns:
            `last_hidden_state` [batch, S, D], and Gemma's other outputs.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        world_tokens = self.get_world_tokens(pixel_values, world_latents, mm_encoder_outputs)
        vision_tokens = self.get_vision_tokens(vision_pixel_values, mm_encoder_outputs)
        images_came = world_tokens is not None or vision_tokens is not None
        if images_came and token_type_ids is None and self.config.has_two_way_blocks:
            token_type_ids = self.get_token_types(input_ids, inputs_embeds)
        inputs_embeds = self.put_in_place(input_ids, inputs_embeds, world_tokens, "image")
        if self.config.vision_config is not None:
            inputs_embeds = self.put_in_place(input_ids, inputs_embeds, vision_tokens, "vision")

        attention_mask = create_block_masks(
            self.config, inputs_embeds, attention_mask, past_key_values, position_ids, token_type_ids
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
            if config.vision_config is not None:
                raise ValueError(
                    "A serving engine reads world tokens only, and this model has a `vision_config`. Convert Gemma 3 "
                    "without `--vision` for it."
                )
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

    def get_vision_features(
        self, vision_pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        """As [`TheWorldModel.get_vision_features`]."""
        return self.model.get_vision_features(vision_pixel_values, **kwargs)

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
        vision_pixel_values: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
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
            vision_pixel_values: [C, 3, s, s], floating point, with s the size of `config.vision_config`; the images of
                all prompts and their crops, in their order.
            token_type_ids: [batch, S], 1 in the places of Gemma's own image tokens, 2 in those of world tokens: the
                blocks that attention may read both ways. Found in the prompt where images come without them.
            mm_encoder_outputs: `{"image": get_image_features(...)}` in place of `pixel_values`, as `generate` does,
                and `"vision": get_vision_features(...)` in place of `vision_pixel_values`.

        Returns:
            `loss` if labels came, `logits` [batch, S, vocabulary], and Gemma's other outputs.

        Raises:
            TypeError: If `pixel_values` or `vision_pixel_values` is not floating point.
            ValueError: If images and their places differ in number, images come twice, or their shape or range is
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
            vision_pixel_values=vision_pixel_values,
            token_type_ids=token_type_ids,
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
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)

        return TheWorldCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs,
    ) -> dict:
        """As transformers' own; encoded images and their blocks go with the prompt only, which it leaves to models."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs.pop("mm_encoder_outputs", None)
            inputs.pop("token_type_ids", None)
        return inputs

    @staticmethod
    def create_masks_for_generate(
        config: TheWorldConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.LongTensor | None,
        token_type_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> torch.Tensor | dict:
        """As transformers' own, which makes the masks ahead for a static cache, with the images' blocks."""
        arguments = (inputs_embeds, attention_mask, past_key_values, position_ids)
        masks = create_block_masks(config, *arguments, token_type_ids)
        return create_masks_for_generate(config, *arguments) if masks is attention_mask else masks

    def _repeat_by_prompt(
        self,
        prompts: torch.LongTensor | None,
        inputs_embeds: torch.Tensor | None,
        tokens: torch.Tensor,
        stream: str,
        times: int,
    ) -> torch.Tensor:
        """A stream's tokens for `times` beams a prompt: [A, B] of one prompt becomes [A, B, A, B]."""
        mask = self.model.get_placeholder_mask(prompts, inputs_embeds, tokens, stream)
        places, places_per_image = mask.sum((1, 2)), tokens.shape[1]
        if (places % places_per_image).any():
            raise ValueError(
                f"An image's {places_per_image} `{STREAMS[stream][1]}` places must be in one prompt, but the prompts "
                f"have {places.tolist()}."
            )
        images_by_prompt = tokens.split((places // places_per_image).tolist())
        return torch.cat([images.repeat(times, 1, 1) for images in images_by_prompt])

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs,
    ) -> tuple[torch.LongTensor, dict]:
        """
        As transformers' own, and encodes the images, once, before beams multiply the prompts.

        A prompt's images stay together. What a cache holds was read with its images: those that come now are for the
        rest of the prompt.
        """
        taken = ("pixel_values", "world_latents", "vision_pixel_values", "mm_encoder_outputs")
        pixels, latents, vision_pixels, encoded = (model_kwargs.pop(name, None) for name in taken)
        streams = {
            "image": self.model.get_world_tokens(pixels, latents, encoded),
            "vision": self.model.get_vision_tokens(vision_pixels, encoded),
        }
        streams = {stream: tokens for stream, tokens in streams.items() if tokens is not None}
        if streams:
            cache, embeds = model_kwargs.get("past_key_values"), model_kwargs.get("inputs_embeds")
            prompts = input_ids[:, cache.get_seq_length() if cache is not None else 0 :] if input_ids.numel() else None
            if self.config.has_two_way_blocks and model_kwargs.get("token_type_ids") is None:
                model_kwargs["token_type_ids"] = self.model.get_token_types(prompts, embeds)
            streams = {
                stream: self._repeat_by_prompt(prompts, embeds, tokens, stream, expand_size)
                for stream, tokens in streams.items()
            }
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if streams:
            model_kwargs["mm_encoder_outputs"] = {
                stream: BaseModelOutputWithPooling(pooler_output=tokens) for stream, tokens in streams.items()
            }
        return input_ids, model_kwargs


TheWorldForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = ["TheWorldForConditionalGeneration", "TheWorldModel", "TheWorldPreTrainedModel"]
