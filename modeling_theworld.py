# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
TheWorld: Gemma reads the latents of images and videos, one token per latent position.

    B images, H x W pixels, z latent channels, h x w latent positions, N world tokens per image, D Gemma's width,
    S tokens in a prompt

    pixel_values [B, 3, H, W] -> TheWorldEncoder -> latents [B, z, h, w] -> TheWorldProjector -> world tokens [B, N, D]
    input_ids [.., S] -> embeddings [.., S, D], with world tokens at the `<world>` placeholders -> Gemma -> logits

Each of V videos has T = 1 + 4k frames. The first gives one latent frame. Each later latent frame encodes four frames
and depends on all earlier ones:

    pixel_values_videos [V, T, 3, H, W] -> latents [V, 1 + k, z, h, w] -> world tokens [V, (1 + k) N, D]

Items of several sizes come padded, with `image_sizes` [B, 2] or `video_sizes` [V, 3]. Their padding is cut off before
the encoder, and their latents and world tokens are lists of one tensor for each item.

With `vision_config`, images also pass through Gemma 3's SigLIP tower, M tokens per image or crop:

    vision_pixel_values [C, 3, s, s] -> SigLIP -> Gemma's projector -> [C, M, D], at `<image_soft_token>` placeholders
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, Cache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector
from transformers.processing_utils import Unpack
from transformers.utils import (
    PROCESSOR_NAME,
    TransformersKwargs,
    cached_file,
    can_return_tuple,
    torch_compilable_check,
)

from .configuration_theworld import TheWorldConfig
from .encoder_theworld import TheWorldEncoder
from .generation_theworld import TheWorldGenerationMixin
from .modalities_theworld import (
    EXPANDED_BY_PROCESSOR,
    MODALITIES,
    VISION_TYPE,
    Modality,
    check_modality_inputs,
    check_placeholders_contiguous,
    create_block_masks,
    lengths_of,
    shown_lengths,
)
from .padding_theworld import map_by_shape, unpad
from .validation_theworld import check_floating, check_labels, check_latents, check_prompts
from .versions_theworld import CACHE_NAME, accepts_past_key_values, takes_cache


# Attention implementations of engines that build a model with `AutoModel.from_config` and add their own head.
ENGINE_ATTENTION = ("vllm", "sglang")
# Modules that are not quantized, besides embeddings and head: all but Gemma's layers.
NOT_QUANTIZED = ("world_encoder", "world_projection", "vision_tower", "multi_modal_projector")


def check_served(config: TheWorldConfig) -> None:
    """Raises a `ValueError` if a serving engine, which masks causally only, would compute something else."""
    if config.vision_config is not None:
        raise ValueError(
            "A serving engine reads world tokens only, and this model has a `vision_config`. To serve it, convert "
            "Gemma 3 without `--vision`."
        )
    if config.world_attention == "bidirectional":
        raise ValueError(
            "A serving engine masks causally, but this model has `world_attention='bidirectional'`. Use transformers, "
            "or a checkpoint with `world_attention='causal'`."
        )
    if getattr(config.text_config, "use_bidirectional_attention", None):
        raise ValueError(
            "A serving engine masks causally, but this model's `text_config` has `use_bidirectional_attention`. Use "
            "transformers."
        )


@dataclass
class TheWorldModelOutputWithPast(BaseModelOutputWithPast):
    """
    `BaseModelOutputWithPast` with the world tokens of images [B, N, D] and of videos [V, (1 + k) N, D]; with sizes, a
    list of one tensor [N_i, D] for each.
    """

    image_hidden_states: torch.Tensor | list[torch.Tensor] | None = None
    video_hidden_states: torch.Tensor | list[torch.Tensor] | None = None


@dataclass
class TheWorldCausalLMOutputWithPast(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` with world tokens, as [`TheWorldModelOutputWithPast`] has them."""

    image_hidden_states: torch.Tensor | list[torch.Tensor] | None = None
    video_hidden_states: torch.Tensor | list[torch.Tensor] | None = None


class TheWorldProjector(nn.Module):
    """Latents to world tokens: gathers the numbers of each token, then projects them to Gemma's width."""

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
            World tokens [B, N, D]: one per position, row by row (`token_layout="spatial"`), or one per channel.

        Raises:
            ValueError: If the shape of the latents does not fit `token_layout`.
        """
        shape, merge = list(latents.shape), self.config.latent_merge_size
        z_dim = self.config.world_config.z_dim
        if len(shape) != 4 or shape[1] != z_dim or 0 in shape or shape[2] % merge or shape[3] % merge:
            raise ValueError(
                f"Expected latents [B, {z_dim}, h, w] with h and w multiples of latent_merge_size={merge}, got "
                f"{shape}. Image sides must be multiples of {self.config.patch_size} pixels."
            )
        if self.config.token_layout == "channel":
            side = self.config.channel_latent_side
            if shape[2:] != [side, side]:
                raise ValueError(
                    f"With `token_layout='channel'` this model reads images of {self.config.image_size} x "
                    f"{self.config.image_size} pixels, whose latents are {side} x {side}, got {shape[2]} x {shape[3]}."
                )
            tokens = latents.flatten(2)
        else:
            tokens = F.pixel_unshuffle(latents, merge).flatten(2).transpose(1, 2)
        # Not the weight's dtype: a quantized weight is stored as integers.
        hidden_states = self.linear_1(tokens.to(self.linear_1.bias.dtype).contiguous())
        if self.config.projector_type == "mlp":
            hidden_states = self.linear_2(F.gelu(hidden_states))
        return hidden_states


def read_processor_config(checkpoint: str | os.PathLike | None, options: dict) -> str | None:
    """The text of a checkpoint's processor_config.json, or None; `options` are those of `from_pretrained`."""
    if checkpoint is None:
        return None
    names = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
    errors = ("gated_repo", "missing_entries", "connection_errors")
    path = cached_file(
        checkpoint,
        PROCESSOR_NAME,
        **{name: options[name] for name in names if name in options},
        **{f"_raise_exceptions_for_{error}": False for error in errors},
    )
    return None if path is None else Path(path).read_text()


class TheWorldPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialization of TheWorld's models."""

    config: TheWorldConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")  # type: ignore[assignment] # as transformers' own models
    supports_gradient_checkpointing = True
    _no_split_modules = ["TheWorldEncoder"]
    _skip_keys_device_placement = [CACHE_NAME]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    # The text of processor_config.json in the checkpoint that the model was loaded from.
    _processor_config: str | None = None
    # Quantizers always skip these. They match full names, so both with the head's prefix and without.
    _keep_in_fp32_modules = [*NOT_QUANTIZED, *(f"model.{name}" for name in NOT_QUANTIZED)]

    def post_init(self):
        """As transformers' own, and `_keep_in_fp32_modules` names only modules that this model has."""
        super().post_init()
        self._keep_in_fp32_modules &= {name for name, _ in self.named_modules()}

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict:
        """As in transformers, but modules that quantizers skip stay float16 if the model is loaded as float16."""
        plan = super()._get_dtype_plan(dtype)
        return {name: kept for name, kept in plan.items() if name not in TheWorldPreTrainedModel._keep_in_fp32_modules}

    def __init_subclass__(cls, **kwargs):
        """
        As in transformers, but a subclass that torch creates takes the name of its parent.

        FSDP creates a subclass, in a module of torch, for each class that it shards. A save would name it in
        `auto_map` and copy torch's files instead of this one.
        """
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("torch."):
            parent = cls.__bases__[-1]
            cls.__name__, cls.__module__ = parent.__name__, parent.__module__

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        use_safetensors: bool | None = None,
        output_loading_info: bool = False,
        **kwargs,
    ):
        """
        As in transformers, but loads safetensors only (pickle can execute code) and raises if a tensor is missing.

        Raises:
            OSError: If a safetensors file is damaged.
            ValueError: If the checkpoint lacks tensors of the model and `output_loading_info` is False; or if
                `use_safetensors` is False.
        """
        if use_safetensors is False:
            raise ValueError("TheWorld reads safetensors only, got use_safetensors=False. Remove this argument.")
        options = {"use_safetensors": True, "output_loading_info": True, **kwargs}
        checkpoint = pretrained_model_name_or_path
        processor_config = read_processor_config(checkpoint, options)
        try:
            loaded: Any = super().from_pretrained(checkpoint, *args, **options)
            model, info = loaded  # because of `output_loading_info`
        except SafetensorError as error:
            raise OSError(
                f"A safetensors file of {checkpoint} is damaged or incomplete ({error}). Download it again."
            ) from error
        model._processor_config = processor_config
        if output_loading_info:
            return model, info
        missing = sorted(info["missing_keys"])
        # Without a checkpoint every tensor is missing; for an adapter, transformers lists tensors that PEFT ties.
        if missing and checkpoint is not None and not model._hf_peft_config_loaded:
            raise ValueError(
                f"{checkpoint} lacks {len(missing)} of the model's tensors, such as {missing[0]!r}. Download it "
                "again, or, to train the missing tensors, load it with `output_loading_info=True`."
            )
        return model

    def gather_sharded_state_dict_for_save(self, model_to_save, state_dict: dict, *args, **kwargs) -> dict:
        """
        As in transformers, but it stores tied weights once and keeps tensors that are only in `state_dict`.

        Each tensor is gathered into separate memory, so transformers can no longer see that two are tied. A
        `state_dict` may have tensors that the model lacks: training on latents removes the encoder from the model.
        """
        gathered = super().gather_sharded_state_dict_for_save(model_to_save, state_dict, *args, **kwargs)
        if gathered is state_dict:
            return state_dict
        others = {name: tensor for name, tensor in state_dict.items() if type(tensor) is torch.Tensor}
        whole = {**others, **gathered}
        for name, source in self.all_tied_weights_keys.items():
            if name in whole and source in whole and torch.equal(whole[name], whole[source]):
                del whole[name]
        return whole

    def save_pretrained(  # type: ignore[override] # its other arguments are passed on
        self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs
    ) -> None:
        """
        As in transformers, and copies the processor_config.json of the checkpoint that the model was loaded from.

        Pipelines, and callers that save model and tokenizer, do not save the processor. An existing file is kept.
        """
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process and self._processor_config is not None:
            from .processing_theworld import complete_folder  # the model itself does not need it

            complete_folder(save_directory, self._processor_config)

    def push_to_hub(self, *args, **kwargs) -> str:  # type: ignore[override] # its arguments are passed on
        """As in transformers, without `processor_config.json`, because the repo may have a newer one."""
        processor_config, self._processor_config = self._processor_config, None
        try:
            return super().push_to_hub(*args, **kwargs)
        finally:
            self._processor_config = processor_config

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, WanRMS_norm):
            init.ones_(module.gamma)
        elif isinstance(module, Gemma3MultiModalProjector):  # as Gemma 3's; its norm multiplies by 1 + weight
            init.zeros_(module.mm_input_projection_weight)
            init.zeros_(module.mm_soft_emb_norm.weight)


class TheWorldModel(TheWorldPreTrainedModel):
    """The Wan encoder, the projection and Gemma, optionally with Gemma's vision tower, without the LM head."""

    # Modules that FSDP gathers and frees one by one; the rest is gathered once a step. Gemma has its own tensor plan.
    _fsdp_plan = {"world_encoder": "free_full_weight", "language_model.layers.*": "free_full_weight"}

    def __init__(self, config: TheWorldConfig):
        super().__init__(config)
        self.world_encoder = TheWorldEncoder(config.world_config)
        self.world_projection = TheWorldProjector(config)
        if config.vision_config is not None:
            self.vision_tower = AutoModel.from_config(config.vision_config)
            projector_config: Any = config  # it has the fields that the projector reads
            self.multi_modal_projector = Gemma3MultiModalProjector(projector_config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_world_latents(
        self, pixel_values: torch.Tensor, sizes: torch.Tensor | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """
        Encodes images or videos to the latents that the projection reads.

        `forward` takes them back as `world_latents`, those of videos as `world_latents_videos`.

        Args:
            pixel_values: Images [B, 3, H, W] or videos [V, T, 3, H, W], floating point, in [-1, 1], H and W multiples
                of 8, T = 1 + 4k.
            sizes: If they are padded: `image_sizes` [B, 2] or `video_sizes` [V, 3], as TheWorldProcessor returns them.
                Padding is cut off before the encoder, and items of one size are encoded together.

        Returns:
            Latents [B, z, H / 8, W / 8] or [V, 1 + k, z, H / 8, W / 8] in the encoder's dtype; normalized if
            `config.normalize_latents`. With `sizes`, a list of the latents of each item.

        Raises:
            TypeError, ValueError: As [`TheWorldEncoder.forward`]; and a ValueError if `sizes` do not fit.
        """
        if sizes is not None:
            return [self._normalize(each) for each in self.world_encoder(self._unpad(pixel_values, sizes))]
        return self._normalize(self.world_encoder(pixel_values))

    def _normalize(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [.., z, h, w] as the projection reads them: normalized if `config.normalize_latents`."""
        if self.config.normalize_latents:
            # Read from the config at each call: `from_pretrained` leaves buffers that are not in the checkpoint
            # uninitialized (transformers#48892).
            mean = latents.new_tensor(self.config.world_config.latents_mean).view(-1, 1, 1)
            std = latents.new_tensor(self.config.world_config.latents_std).view(-1, 1, 1)
            latents = (latents - mean) / std
        return latents

    def _unpad(
        self, padded: torch.Tensor | list[torch.Tensor], sizes: torch.Tensor, latents: bool = False
    ) -> list[torch.Tensor]:
        """The images or videos, or their `latents`, that were padded; `sizes` are in pixels."""
        items = list(padded)
        ndim = getattr(items[0], "ndim", None) if items else None
        if ndim not in (3, 4):  # for the encoder or the projection to refuse
            return items
        world = self.config.world_config
        side = world.spatial_compression_ratio if latents else 1
        if ndim == 3:
            return unpad(padded, sizes, "image_sizes", (side, side))
        return unpad(padded, sizes, "video_sizes", (world.temporal_compression_ratio if latents else 1, side, side))

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """
        Encodes and projects images.

        Args:
            pixel_values: [B, 3, H, W], floating point, in [-1, 1], H and W multiples of `config.patch_size`.
            image_sizes: [B, 2], the height and width of each image in pixels, if they are padded.

        Returns:
            `last_hidden_state`: the latents [B, z, h, w]. `pooler_output`: the world tokens [B, N, D]. With
            `image_sizes`, lists of one [z, h, w] and one [N_i, D] for each image.

        Raises:
            TypeError, ValueError: As `get_world_latents` and [`TheWorldProjector.forward`].
        """
        return self.get_latent_features(self.get_world_latents(pixel_values, image_sizes), **kwargs)

    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        video_sizes: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """
        Encodes and projects videos.

        Args:
            pixel_values_videos: [V, T, 3, H, W], floating point, in [-1, 1], T = 1 + 4k, H and W multiples of
                `config.patch_size`.
            video_sizes: [V, 3], the frames, height and width of each video in pixels, if they are padded.

        Returns:
            `last_hidden_state`: the latents [V, 1 + k, z, h, w]. `pooler_output`: the world tokens [V, (1 + k) N, D],
            latent frame by latent frame. With `video_sizes`, lists of one tensor for each video.

        Raises:
            TypeError, ValueError: As `get_world_latents` and [`TheWorldProjector.forward`].
        """
        return self.get_latent_features(self.get_world_latents(pixel_values_videos, video_sizes), **kwargs)

    @can_return_tuple
    def get_latent_features(
        self,
        world_latents: torch.Tensor | list[torch.Tensor],
        sizes: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """
        As `get_image_features` or `get_video_features`, from latents that `get_world_latents` returned.

        Args:
            world_latents: [B, z, h, w] or [V, 1 + k, z, h, w]; or a list of the latents of each image or video.
            sizes: If they are padded: `image_sizes` [B, 2] or `video_sizes` [V, 3], in pixels.

        Raises:
            TypeError: If the latents are not floating point.
            ValueError: If they are not finite, or their shape is wrong; see [`TheWorldProjector.forward`].
        """
        check_latents(world_latents)
        if sizes is not None:
            world_latents = self._unpad(world_latents, sizes, latents=True)
        tokens: Any  # both outputs are lists if `world_latents` is
        if isinstance(world_latents, list | tuple):
            tokens = map_by_shape(self._project, world_latents)
        else:
            tokens = self._project(world_latents)
        return BaseModelOutputWithPooling(last_hidden_state=cast(Any, world_latents), pooler_output=tokens)

    def _project(self, world_latents: torch.Tensor) -> torch.Tensor:
        """World tokens [items, N, D] of images or videos of one size."""
        frames = world_latents.flatten(0, 1) if world_latents.ndim == 5 else world_latents  # of all videos
        tokens = self.world_projection(frames)
        return tokens.reshape(len(world_latents), -1, tokens.shape[-1])

    @can_return_tuple
    def get_vision_features(
        self, vision_pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        """
        Encodes and projects images with Gemma 3's own vision tower, as Gemma 3 does without TheWorld.

        Args:
            vision_pixel_values: [C, 3, s, s], floating point, with s the tower's `image_size`.

        Returns:
            `last_hidden_state`: the tower's [C, patches, its width]. `pooler_output`: Gemma's image tokens [C, M, D].

        Raises:
            TypeError: If `vision_pixel_values` is not floating point.
            ValueError: If its shape is wrong, values are not finite, or the model has no `vision_config`.
        """
        self._check_vision_pixel_values(vision_pixel_values)
        outputs = self.vision_tower(pixel_values=vision_pixel_values, return_dict=True, **kwargs)
        outputs.pooler_output = self.multi_modal_projector(outputs.last_hidden_state)
        return outputs

    def _check_vision_pixel_values(self, vision_pixel_values: torch.Tensor):
        vision = self.config.vision_config
        if vision is None:
            raise ValueError(
                "Got `vision_pixel_values`, but this model has no `vision_config`. Convert a Gemma 3 with `--vision`."
            )
        check_floating(
            vision_pixel_values, "`vision_pixel_values` must be floating point", "TheWorldProcessor returns them so."
        )
        shape = list(vision_pixel_values.shape)
        expected = [vision.num_channels, vision.image_size, vision.image_size]
        if len(shape) != 4 or shape[0] == 0 or shape[1:] != expected:
            raise ValueError(
                f"`vision_pixel_values` must be [C, {', '.join(map(str, expected))}] with at least one image, "
                f"got {shape}. TheWorldProcessor returns them so."
            )
        torch_compilable_check(
            vision_pixel_values.isfinite().all(),
            "`vision_pixel_values` must be finite, but some are NaN or infinite. TheWorldProcessor returns them so.",
        )

    def encode_modalities(
        self,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        *,
        pixel_values: torch.Tensor | None = None,
        world_latents: torch.Tensor | list[torch.Tensor] | None = None,
        vision_pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        world_latents_videos: torch.Tensor | list[torch.Tensor] | None = None,
        image_sizes: torch.Tensor | None = None,
        video_sizes: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor | list[torch.Tensor]]:
        """
        Encodes the modalities that are given; see [`TheWorldForConditionalGeneration.forward`] for the arguments.

        Returns:
            Their tokens [items, N, D], or a list of one [N_i, D] for each item, by the modality's name.

        Raises:
            ValueError: If a modality is given in more than one form, or this model has no placeholder for it.
        """
        given = mm_encoder_outputs or {}
        encoded: dict[str, Any] = {
            each.name: given[each.name] for each in MODALITIES if given.get(each.name) is not None
        }
        check_modality_inputs(
            encoded,
            pixel_values=pixel_values,
            world_latents=world_latents,
            vision_pixel_values=vision_pixel_values,
            pixel_values_videos=pixel_values_videos,
            world_latents_videos=world_latents_videos,
            image_sizes=image_sizes,
            video_sizes=video_sizes,
        )
        if pixel_values is not None:
            encoded["image"] = self.get_image_features(pixel_values, image_sizes, return_dict=True)
        if world_latents is not None:
            encoded["image"] = self.get_latent_features(world_latents, image_sizes, return_dict=True)
        if vision_pixel_values is not None:
            encoded["vision"] = self.get_vision_features(vision_pixel_values, return_dict=True)
        if pixel_values_videos is not None:
            encoded["video"] = self.get_video_features(pixel_values_videos, video_sizes, return_dict=True)
        if world_latents_videos is not None:
            encoded["video"] = self.get_latent_features(world_latents_videos, video_sizes, return_dict=True)
        self._check_placeholders_exist(encoded)
        return {name: output.pooler_output for name, output in encoded.items()}

    def _check_placeholders_exist(self, encoded: dict[str, BaseModelOutputWithPooling]) -> None:
        for modality in MODALITIES:
            if modality.name in encoded and modality not in self.modalities:
                raise ValueError(
                    f"Got {modality.kind} tokens of {modality.item}s, but this model has no `{modality.name}_token_id`"
                    ". Convert its sources again with convert_weights.py."
                )

    @property
    def modalities(self) -> list[Modality]:
        """The modalities for which this model has a placeholder."""
        return [modality for modality in MODALITIES if modality.token_id(self.config) is not None]

    def find_placeholders(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, modality: Modality
    ) -> torch.Tensor:
        """Boolean mask [batch, S] of a modality's placeholders, found by id, or by embedding if there are no ids."""
        token_id = cast(int, modality.token_id(self.config))
        if input_ids is not None:
            return input_ids == token_id
        embeds = cast(torch.Tensor, inputs_embeds)
        return (embeds == self.get_input_embeddings()(torch.tensor(token_id, device=embeds.device))).all(-1)

    def get_placeholder_mask(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        features: torch.Tensor | list[torch.Tensor],
        modality: Modality,
    ) -> torch.Tensor:
        """
        Finds the placeholders of a modality, and checks that there is one for each of its tokens.

        Args:
            input_ids: [batch, S], or None to compare `inputs_embeds` with the placeholder's embedding.
            inputs_embeds: [batch, S, D]; needed only without `input_ids`.
            features: The modality's tokens [images or videos, N, D], or a list of one [N_i, D] for each.

        Returns:
            Boolean mask [batch, S, 1].

        Raises:
            ValueError: If the numbers differ.
        """
        mask = self.find_placeholders(input_ids, inputs_embeds, modality)
        lengths = lengths_of(features)
        torch_compilable_check(
            mask.sum() == sum(lengths),
            lambda: (
                f"{len(lengths)} {modality.item}(s) of {shown_lengths(lengths)} {modality.kind} tokens need "
                f"{sum(lengths)} `{modality.token}` placeholders, but the prompts have {mask.sum(-1).tolist()}. "
                f"{EXPANDED_BY_PROCESSOR}"
            ),
        )
        return mask.unsqueeze(-1)

    def merge_multimodal_embeddings(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        tokens: dict[str, torch.Tensor | list[torch.Tensor]],
        whole: bool,
    ) -> torch.Tensor:
        """
        Returns `inputs_embeds` [batch, S, D] with the placeholders replaced by the modalities' `tokens`.

        Raises:
            ValueError: If the numbers of tokens and placeholders differ, or placeholders have no tokens; or if `whole`
                and the placeholders of an item span two prompts or are not contiguous.
        """
        for modality in self.modalities:
            if modality.name in tokens:
                features = tokens[modality.name]
                mask = self.get_placeholder_mask(input_ids, inputs_embeds, features, modality)
                if whole:
                    check_placeholders_contiguous(mask[..., 0], lengths_of(features), modality)
                flat = features if isinstance(features, torch.Tensor) else torch.cat(list(features))
                inputs_embeds = inputs_embeds.masked_scatter(mask, flat.to(inputs_embeds.device, inputs_embeds.dtype))
            elif input_ids is not None and input_ids.shape[1] > 1:  # a prompt, not a decoding step
                torch_compilable_check(
                    ~self.find_placeholders(input_ids, inputs_embeds, modality).any(),
                    f"The prompt has `{modality.token}` placeholders but no {modality.item} is given. Pass "
                    f"{' or '.join(f'`{name}`' for name in modality.inputs)}, or remove `{modality.token}` from the "
                    "prompt.",
                )
        return inputs_embeds

    def get_token_types(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """The type of each token of a prompt, [batch, S]: 0 text, 1 Gemma's own image tokens, 2 world tokens."""
        types = [
            modality.type_id * self.find_placeholders(input_ids, inputs_embeds, modality)
            for modality in self.modalities
        ]
        return torch.stack(types).sum(0)

    @property
    def is_in_step(self) -> bool:
        """
        Whether other processes wait for this one in every module.

        They do if FSDP gathers the encoder's weights, and in training, to average gradients.
        """
        if hasattr(self.world_encoder, "unshard"):  # FSDP's
            return True
        if not (self.training and torch.is_grad_enabled() and torch.distributed.is_available()):
            return False
        return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1

    def add_absent_modalities(
        self, inputs_embeds: torch.Tensor, tokens: dict[str, torch.Tensor | list[torch.Tensor]]
    ) -> torch.Tensor:
        """
        Adds the modules of absent modalities to the graph of `inputs_embeds`; the values stay the same.

        Without images, this process would use fewer modules than the other processes, which would wait forever.
        """
        for modality in self.modalities:
            if modality.name not in tokens:
                [blank] = self.encode_modalities(None, **self.make_blank(modality, inputs_embeds))[modality.name]
                inputs_embeds = inputs_embeds + blank.flatten()[:0].sum()  # zero, and so is its gradient
        return inputs_embeds

    def make_blank(self, modality: Modality, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """The smallest input of a modality, all zeros; latents if the encoder has been removed."""
        name, *others = modality.inputs
        world, vision = self.config.world_config, self.config.vision_config
        if vision is not None and modality.type_id == VISION_TYPE:
            return {name: like.new_zeros(1, vision.num_channels, vision.image_size, vision.image_size)}
        side = self.config.image_size or self.config.patch_size
        frames, channels = 1 + world.temporal_compression_ratio, world.in_channels
        if next(self.world_encoder.parameters(), None) is None:
            (name,) = others
            frames, channels, side = 2, world.z_dim, side // world.spatial_compression_ratio
        shape = (1, frames, channels, side, side) if modality.ndim == 5 else (1, channels, side, side)
        return {name: like.new_zeros(shape)}

    @accepts_past_key_values
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        world_latents: torch.Tensor | list[torch.Tensor] | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        world_latents_videos: torch.Tensor | list[torch.Tensor] | None = None,
        vision_pixel_values: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_sizes: torch.Tensor | None = None,
        video_sizes: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | TheWorldModelOutputWithPast:
        """
        Reads prompts with images and videos; see [`TheWorldForConditionalGeneration.forward`] for the arguments.

        Returns:
            `last_hidden_state` [batch, S, D], and Gemma's other outputs.
        """
        vocab_size = self.config.text_config.vocab_size
        check_prompts(input_ids, inputs_embeds, attention_mask, cache, vocab_size)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        tokens = self.encode_modalities(
            mm_encoder_outputs,
            pixel_values=pixel_values,
            world_latents=world_latents,
            vision_pixel_values=vision_pixel_values,
            pixel_values_videos=pixel_values_videos,
            world_latents_videos=world_latents_videos,
            image_sizes=image_sizes,
            video_sizes=video_sizes,
        )
        if tokens and token_type_ids is None and self.config.has_bidirectional_blocks:
            token_type_ids = self.get_token_types(input_ids, inputs_embeds)
        # `generate` has already checked the placeholders of what it encoded, and may pass the prompt in chunks.
        inputs_embeds = self.merge_multimodal_embeddings(
            input_ids, inputs_embeds, tokens, whole=mm_encoder_outputs is None
        )
        if cache is None and self.is_in_step:
            inputs_embeds = self.add_absent_modalities(inputs_embeds, tokens)
        masks = create_block_masks(self.config, inputs_embeds, attention_mask, cache, position_ids, token_type_ids)
        outputs = takes_cache(self.language_model)(
            attention_mask=masks,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return TheWorldModelOutputWithPast(
            **outputs, image_hidden_states=tokens.get("image"), video_hidden_states=tokens.get("video")
        )


class TheWorldForConditionalGeneration(TheWorldPreTrainedModel, TheWorldGenerationMixin):
    """TheWorld with the LM head, for training and `generate`; what `AutoModel.from_pretrained` returns."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: TheWorldConfig):
        super().__init__(config)
        self.model = TheWorldModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        if config.video_token_id is None:
            # Images never use these, so DistributedDataParallel would wait for their gradients.
            time_convs = [name for name, _ in self.named_parameters() if ".time_conv." in name]
            self._ddp_params_and_buffers_to_ignore = time_convs
        self.post_init()

    @classmethod
    def _from_config(cls, config: TheWorldConfig, **kwargs) -> PreTrainedModel:
        """
        As in transformers; but for a serving engine it returns `TheWorldModel`, without the LM head.

        An engine has its own attention, head and sampling, and needs the hidden states. It is recognized by the
        attention implementation that it asks for.
        """
        if kwargs.get("attn_implementation", config.text_config._attn_implementation) in ENGINE_ATTENTION:
            check_served(config)
            return TheWorldModel._from_config(config, **kwargs)
        return super()._from_config(config, **kwargs)

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config, *args, **kwargs) -> Any:
        """As in transformers, but ties the head before FSDP, which would otherwise shard the shared weight twice."""
        if distributed_config is not None and distributed_config.fsdp_size > 1:
            model.tie_weights()
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_world_latents(
        self, pixel_values: torch.Tensor, sizes: torch.Tensor | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """As [`TheWorldModel.get_world_latents`]."""
        return self.model.get_world_latents(pixel_values, sizes)

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """As [`TheWorldModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, image_sizes, **kwargs)

    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        video_sizes: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """As [`TheWorldModel.get_video_features`]."""
        return self.model.get_video_features(pixel_values_videos, video_sizes, **kwargs)

    def get_vision_features(
        self, vision_pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        """As [`TheWorldModel.get_vision_features`]."""
        return self.model.get_vision_features(vision_pixel_values, **kwargs)

    @accepts_past_key_values
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        world_latents: torch.Tensor | list[torch.Tensor] | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        world_latents_videos: torch.Tensor | list[torch.Tensor] | None = None,
        vision_pixel_values: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_sizes: torch.Tensor | None = None,
        video_sizes: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | TheWorldCausalLMOutputWithPast:
        """
        Computes next-token logits, and the loss if `labels` are given, for prompts with images and videos.

        Args:
            input_ids: [batch, S]; `<world>` N times for each image, as TheWorldProcessor expands it.
            pixel_values: [B, 3, H, W], floating point, in [-1, 1]; the images of all prompts in their order. H and W
                are multiples of `config.patch_size`.
            attention_mask: [batch, S], 0 at padding.
            position_ids, cache: As in Gemma. (Before transformers 5.24 the cache is named `past_key_values`.)
            inputs_embeds: [batch, S, D], instead of `input_ids`.
            labels: [batch, S] token ids, -100 where the loss ignores a token; shifted inside.
            logits_to_keep: How many of the last positions, or which positions, get logits; 0 for all.
            world_latents: [B, z, h, w], or a list of [z, h, w], as `get_world_latents` returns them, instead of
                `pixel_values`.
            pixel_values_videos: [V, T, 3, H, W], as `pixel_values` but videos of T = 1 + 4k frames, for
                `<world_video>` placeholders.
            world_latents_videos: [V, 1 + k, z, h, w], or a list of [1 + k, z, h, w], instead of
                `pixel_values_videos`.
            vision_pixel_values: [C, 3, s, s], floating point, with s the size of `config.vision_config`; the images,
                their crops and the frames of videos, in the order of the prompts.
            token_type_ids: [batch, S], 1 at the placeholders of Gemma's own image tokens, 2 at those of world tokens:
                the blocks that may have bidirectional attention. If None, they are found in the prompt.
            mm_encoder_outputs: `{"image": get_image_features(...)}` instead of `pixel_values`, as `generate` does,
                `"video": get_video_features(...)` instead of `pixel_values_videos`, and `"vision":
                get_vision_features(...)` instead of `vision_pixel_values`.
            image_sizes: [B, 2], the height and width of each image in pixels, if `pixel_values` or `world_latents` are
                padded at the end of their axes. Padding is cut off and never encoded.
            video_sizes: [V, 3], the frames, height and width of each video, if they are padded.

        Returns:
            `loss` if there are labels, `logits` [batch, S, vocabulary], and Gemma's other outputs.

        Raises:
            TypeError: If images, videos or their latents are not floating point, or ids or labels are not integers.
            ValueError: If the numbers of images or videos and of their placeholders differ; if one is given in two
                forms, or has a wrong shape or range; if ids or labels are outside the vocabulary; if the mask does not
                cover the prompts.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            world_latents=world_latents,
            pixel_values_videos=pixel_values_videos,
            world_latents_videos=world_latents_videos,
            vision_pixel_values=vision_pixel_values,
            token_type_ids=token_type_ids,
            mm_encoder_outputs=mm_encoder_outputs,
            image_sizes=image_sizes,
            video_sizes=video_sizes,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        # Gemma 2 caps its logits. These are the same three operations as in its class, so the bits are equal.
        if (cap := getattr(self.config.text_config, "final_logit_softcapping", None)) is not None:
            logits = logits / cap
            logits = torch.tanh(logits)
            logits = logits * cap

        loss = None
        if labels is not None:
            check_labels(labels, logits)
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)

        others = {name: output for name, output in outputs.items() if name != "last_hidden_state"}
        return TheWorldCausalLMOutputWithPast(loss=loss, logits=logits, **others)


TheWorldForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = ["TheWorldForConditionalGeneration", "TheWorldModel", "TheWorldPreTrainedModel"]
