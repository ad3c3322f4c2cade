# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
TheWorld: the latent of an image or a video, one token a position, read by Gemma.

    B images, H x W pixels, z latent channels, h x w latent positions, N world tokens an image, D Gemma's width,
    S tokens in a prompt

    pixel_values [B, 3, H, W] -> TheWorldEncoder -> latents [B, z, h, w] -> TheWorldProjector -> world tokens [B, N, D]
    input_ids [.., S] -> embeddings [.., S, D], with world tokens in the places of `<world>` -> Gemma -> logits

A video is V times T = 1 + 4k frames, and each latent frame after the first is made of four and knows all before it:

    pixel_values_videos [V, T, 3, H, W] -> latents [V, 1 + k, z, h, w] -> world tokens [V, (1 + k) N, D]

Where Gemma 3 keeps its own eyes, an image also goes the way that Gemma made for it, M tokens an image or crop:

    vision_pixel_values [C, 3, s, s] -> SigLIP -> Gemma's projector -> [C, M, D], in the places of `<image_soft_token>`
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, Cache, GenerationConfig, GenerationMixin, PreTrainedModel
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
from .modalities_theworld import MODALITIES, VISION_TYPE, Modality, check_placeholders_contiguous, create_block_masks
from .validation_theworld import (
    check_context,
    check_floating,
    check_generation_inputs,
    check_labels,
    check_latents,
    check_prompts,
)
from .versions_theworld import CACHE_NAME, accepts_past_key_values, create_masks_for_generate, takes_cache


# Attention of the engines that build a model with `AutoModel.from_config` and put their own head on it.
ENGINE_ATTENTION = ("vllm", "sglang")
# What quantizers leave whole, beside embeddings and head: all but Gemma's layers.
WHOLE = ("world_encoder", "world_projection", "vision_tower", "multi_modal_projector")


def check_served(config: TheWorldConfig) -> None:
    """Raises a `ValueError` if a serving engine, whose masks are all causal, would answer as another model."""
    if config.vision_config is not None:
        raise ValueError(
            "A serving engine reads world tokens only, and this model has a `vision_config`. Convert Gemma 3 "
            "without `--vision` for it."
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
    """`BaseModelOutputWithPast`, and the world tokens [.., D] that went in, by images and by videos."""

    image_hidden_states: torch.Tensor | None = None
    video_hidden_states: torch.Tensor | None = None


@dataclass
class TheWorldCausalLMOutputWithPast(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast`, and the world tokens [.., D] that went in, by images and by videos."""

    image_hidden_states: torch.Tensor | None = None
    video_hidden_states: torch.Tensor | None = None


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
        # A quantized weight is stored as integers; a bias has the dtype that the layer computes in.
        hidden_states = self.linear_1(tokens.to(self.linear_1.bias.dtype).contiguous())
        if self.config.projector_type == "mlp":
            hidden_states = self.linear_2(F.gelu(hidden_states))
        return hidden_states


def read_processor_config(checkpoint: str | os.PathLike | None, options: dict) -> str | None:
    """The text of a checkpoint's processor_config.json, if it has one; `options` are those of `from_pretrained`."""
    if checkpoint is None:
        return None
    names = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
    kinds = ("gated_repo", "missing_entries", "connection_errors")
    path = cached_file(
        checkpoint,
        PROCESSOR_NAME,
        **{name: options[name] for name in names if name in options},
        **{f"_raise_exceptions_for_{kind}": False for kind in kinds},
    )
    return path and Path(path).read_text()


class TheWorldPreTrainedModel(PreTrainedModel):
    config: TheWorldConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["TheWorldEncoder"]
    _skip_keys_device_placement = [CACHE_NAME]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    # The text of the processor_config.json beside the weights that the model was loaded from.
    _processor_config: str | None = None
    # Quantizers skip these, whatever else they are told to skip. By full names, with a head and without.
    _keep_in_fp32_modules = [*WHOLE, *(f"model.{name}" for name in WHOLE)]

    def post_init(self):
        """As transformers' own, and `_keep_in_fp32_modules` names only modules that this model has."""
        super().post_init()
        self._keep_in_fp32_modules &= {name for name, _ in self.named_modules()}

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict:
        """As transformers' own, but float16 means float16 for what quantizers skip, too."""
        plan = super()._get_dtype_plan(dtype)
        return {name: kept for name, kept in plan.items() if name not in TheWorldPreTrainedModel._keep_in_fp32_modules}

    def __init_subclass__(cls, **kwargs):
        """
        As transformers' own, but a subclass that torch makes goes by the name of its parent.

        FSDP makes one, in a module of torch, for each class that it shards. A save would name it in `auto_map`, and
        copy torch's files instead of these.
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
        As transformers' own, but it reads no pickle, which could run anything, and makes up no tensor in silence.

        Raises:
            OSError: If a safetensors file is damaged.
            ValueError: If the checkpoint lacks tensors of the model, and `output_loading_info` does not ask which; or
                if `use_safetensors` is False.
        """
        if use_safetensors is False:
            raise ValueError("TheWorld reads safetensors only, got use_safetensors=False. Leave it out.")
        options = {"use_safetensors": True, "output_loading_info": True, **kwargs}
        checkpoint = pretrained_model_name_or_path
        processor_config = read_processor_config(checkpoint, options)
        try:
            model, info = super().from_pretrained(checkpoint, *args, **options)
        except SafetensorError as error:
            raise OSError(
                f"A safetensors file of {checkpoint} is damaged or cut off ({error}). Get it again."
            ) from error
        model._processor_config = processor_config
        if output_loading_info:
            return model, info
        missing = sorted(info["missing_keys"])
        # With no checkpoint all is made up; of an adapter, transformers lists what PEFT ties.
        if missing and checkpoint is not None and not model._hf_peft_config_loaded:
            raise ValueError(
                f"{checkpoint} lacks {len(missing)} of the model's tensors, such as {missing[0]!r}. Get it again; or, "
                "to train what is missing, load it with `output_loading_info=True`."
            )
        return model

    def gather_sharded_state_dict_for_save(self, model_to_save, state_dict: dict, *args, **kwargs) -> dict:
        """
        As transformers' own, but it stores tied weights once, and keeps what is in `state_dict` alone.

        Each tensor is gathered into memory of its own, by which transformers no longer sees that two are tied. A
        `state_dict` may have tensors that the model lacks: those of an encoder that training on latents left out.
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

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs) -> None:
        """
        As transformers' own, and the folder says how its processor is made, as the one that the model came from.

        A pipeline, or who saves model and tokenizer, saves no processor. One that is there already is kept.
        """
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process and self._processor_config is not None:
            from .processing_theworld import complete_folder  # a model's own code has no need of it

            complete_folder(save_directory, self._processor_config)

    def push_to_hub(self, *args, **kwargs) -> str:
        """As transformers' own. The model's processor is left out, because the repo may have a newer one."""
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
        Encodes images or videos to the latents that the projection reads.

        `forward` takes them back as `world_latents`, those of videos as `world_latents_videos`.

        Args:
            pixel_values: Images [B, 3, H, W] or videos [V, T, 3, H, W], floating point, in [-1, 1], H and W multiples
                of 8, T = 1 + 4k.

        Returns:
            Latents [B, z, H / 8, W / 8] or [V, 1 + k, z, H / 8, W / 8] in the encoder's dtype; normalised if
            `config.normalize_latents`.

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
        return self.get_latent_features(self.get_world_latents(pixel_values), **kwargs)

    def get_video_features(
        self, pixel_values_videos: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        """
        Encodes and projects videos.

        Args:
            pixel_values_videos: [V, T, 3, H, W], floating point, in [-1, 1], T = 1 + 4k, H and W multiples of
                `config.patch_size`.

        Returns:
            `last_hidden_state`: the latents [V, 1 + k, z, h, w]. `pooler_output`: the world tokens [V, (1 + k) N, D],
            latent frame by latent frame.

        Raises:
            TypeError, ValueError: As [`TheWorldEncoder.forward`] and [`TheWorldProjector.forward`].
        """
        return self.get_latent_features(self.get_world_latents(pixel_values_videos), **kwargs)

    @can_return_tuple
    def get_latent_features(
        self, world_latents: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        """
        As `get_image_features` or `get_video_features`, from latents that `get_world_latents` returned.

        Raises:
            TypeError: If the latents are not floating point.
            ValueError: If they are not finite, or of another shape; see [`TheWorldProjector.forward`].
        """
        check_latents(world_latents)
        frames = world_latents.flatten(0, 1) if world_latents.ndim == 5 else world_latents  # those of all videos
        tokens = self.world_projection(frames)
        return BaseModelOutputWithPooling(
            last_hidden_state=world_latents, pooler_output=tokens.reshape(len(world_latents), -1, tokens.shape[-1])
        )

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
        vision = self.config.vision_config
        if vision is None:
            raise ValueError(
                "`vision_pixel_values` came, but this model has no `vision_config`. Convert a Gemma 3 with `--vision`."
            )
        check_floating(
            vision_pixel_values, "`vision_pixel_values` must be floating point", "TheWorldProcessor makes them."
        )
        shape = list(vision_pixel_values.shape)
        expected = [vision.num_channels, vision.image_size, vision.image_size]
        if len(shape) != 4 or shape[0] == 0 or shape[1:] != expected:
            raise ValueError(
                f"`vision_pixel_values` must be [C, {', '.join(map(str, expected))}] with one image or more, got "
                f"{shape}. TheWorldProcessor makes them."
            )
        torch_compilable_check(
            vision_pixel_values.isfinite().all(),
            "`vision_pixel_values` must be finite, but some are NaN or infinite. TheWorldProcessor makes them.",
        )

    def encode_modalities(
        self, mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None, **inputs: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """
        The tokens of each modality that came, in whichever form; by the modality's name, [images, N, D].

        Args:
            mm_encoder_outputs: As `forward` takes them.
            inputs: `forward`'s arguments by the names that `MODALITIES` lists.

        Raises:
            ValueError: If a modality came in more than one form, or this model has no places for it.
        """
        tokens = {}
        for modality in MODALITIES:
            encoded = (mm_encoder_outputs or {}).get(modality.name)
            came = [name for name in modality.inputs if inputs.get(name) is not None]
            if len(came) + (encoded is not None) > 1:
                forms = " or as ".join(f"`{form}`" for form in (*modality.inputs, "mm_encoder_outputs"))
                raise ValueError(f"Give the {modality.item}s once: as {forms}.")
            for name in came:
                # An image for a video, or the reverse; what else may be wrong is for the method to say.
                if getattr(inputs[name], "ndim", None) in {other.ndim for other in MODALITIES} - {modality.ndim}:
                    raise ValueError(
                        f"`{name}` must have {modality.ndim} dimensions, got {list(inputs[name].shape)}. "
                        "TheWorldProcessor makes it: of `images` with 4, of `videos` with 5."
                    )
                encoded = getattr(self, modality.inputs[name])(inputs[name], return_dict=True)
            if encoded is not None:
                if modality not in self.modalities:
                    raise ValueError(
                        f"{modality.kind} tokens of {modality.item}s came, but this model has no places for them: no "
                        f"`{modality.name}_token_id`. Convert its sources again with convert_weights.py."
                    )
                tokens[modality.name] = encoded.pooler_output
        return tokens

    @property
    def modalities(self) -> list[Modality]:
        """Those that have places in this model's prompts."""
        return [modality for modality in MODALITIES if modality.token_id(self.config) is not None]

    def find_placeholders(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None, modality: Modality
    ) -> torch.Tensor:
        """Boolean mask [batch, S] of a modality's places, found by id, or by embedding where there are no ids."""
        token_id = modality.token_id(self.config)
        if input_ids is not None:
            return input_ids == token_id
        token_id = torch.tensor(token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token_id)).all(-1)

    def get_placeholder_mask(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor | None,
        features: torch.Tensor,
        modality: Modality,
    ) -> torch.Tensor:
        """
        Finds the places of a modality's tokens, and checks that there are as many places as tokens.

        Args:
            input_ids: [batch, S], or None to compare `inputs_embeds` with the embedding of a place.
            inputs_embeds: [batch, S, D]; needed only without `input_ids`.
            features: The modality's tokens [images or videos, N, D].

        Returns:
            Boolean mask [batch, S, 1].

        Raises:
            ValueError: If the numbers differ.
        """
        mask = self.find_placeholders(input_ids, inputs_embeds, modality)
        num_items, num_tokens = features.shape[:2]
        torch_compilable_check(
            mask.sum() == num_items * num_tokens,
            lambda: (
                f"{num_items} {modality.item}(s) of {num_tokens} {modality.kind} tokens need {num_items * num_tokens} "
                f"`{modality.token}` places, but the prompts have {mask.sum(-1).tolist()}. TheWorldProcessor makes them "
                "of one `<world>` an image and one `<world_video>` a video."
            ),
        )
        return mask.unsqueeze(-1)

    def merge_multimodal_embeddings(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor,
        tokens: dict[str, torch.Tensor],
        whole: bool,
    ) -> torch.Tensor:
        """
        `inputs_embeds` [batch, S, D] with the modalities' tokens in their places.

        Raises:
            ValueError: If tokens and places differ in number, or places came without tokens; or if the images are to
                be `whole`, and the places of one are apart.
        """
        for modality in self.modalities:
            if modality.name in tokens:
                features = tokens[modality.name].to(inputs_embeds.device, inputs_embeds.dtype)
                mask = self.get_placeholder_mask(input_ids, inputs_embeds, features, modality)
                if whole:
                    check_placeholders_contiguous(mask[..., 0], features.shape[1], modality)
                inputs_embeds = inputs_embeds.masked_scatter(mask, features)
            elif input_ids is not None and input_ids.shape[1] > 1:  # a prompt: decoding goes one token at a time
                torch_compilable_check(
                    ~self.find_placeholders(input_ids, inputs_embeds, modality).any(),
                    f"The prompt has `{modality.token}` places but no {modality.item} came with it. Give "
                    f"{' or '.join(f'`{name}`' for name in modality.inputs)}, or leave `{modality.token}` out of the "
                    "prompt.",
                )
        return inputs_embeds

    def get_token_types(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.LongTensor:
        """What each token of a prompt stands for, [batch, S]: 0 text, 1 one of Gemma's own, 2 a world token."""
        return sum(
            modality.type_id * self.find_placeholders(input_ids, inputs_embeds, modality)
            for modality in self.modalities
        )

    @property
    def is_in_step(self) -> bool:
        """
        Whether other processes wait for this one in every module.

        They do where FSDP gathers the encoder's weights, and in training, where gradients are averaged.
        """
        if hasattr(self.world_encoder, "unshard"):  # FSDP's
            return True
        if not (self.training and torch.is_grad_enabled() and torch.distributed.is_available()):
            return False
        return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1

    def add_absent_modalities(self, inputs_embeds: torch.Tensor, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        `inputs_embeds`, with every modality's modules in their graph; the numbers stay.

        A batch without images would use fewer modules than those of the other processes, which would wait forever.
        """
        for modality in self.modalities:
            if modality.name not in tokens:
                blank = self.encode_modalities(**self.make_blank(modality, inputs_embeds))[modality.name]
                inputs_embeds = inputs_embeds + blank.flatten()[:0].sum()  # zero, and so is its gradient
        return inputs_embeds

    def make_blank(self, modality: Modality, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """The smallest input of a modality, of zeros; latents where the encoder is not in memory."""
        name, *others = modality.inputs
        world, vision = self.config.world_config, self.config.vision_config
        if modality.type_id == VISION_TYPE:
            return {name: like.new_zeros(1, vision.num_channels, vision.image_size, vision.image_size)}
        side = self.config.image_size if self.config.token_layout == "channel" else self.config.patch_size
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
        world_latents: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        world_latents_videos: torch.Tensor | None = None,
        vision_pixel_values: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
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
            pixel_values_videos=pixel_values_videos,
            world_latents_videos=world_latents_videos,
            vision_pixel_values=vision_pixel_values,
        )
        if tokens and token_type_ids is None and self.config.has_bidirectional_blocks:
            token_type_ids = self.get_token_types(input_ids, inputs_embeds)
        # What `generate` has encoded it has checked too, and may bring in pieces.
        inputs_embeds = self.merge_multimodal_embeddings(
            input_ids, inputs_embeds, tokens, whole=mm_encoder_outputs is None
        )
        if cache is None and self.is_in_step:
            inputs_embeds = self.add_absent_modalities(inputs_embeds, tokens)
        attention_mask = create_block_masks(
            self.config, inputs_embeds, attention_mask, cache, position_ids, token_type_ids
        )
        outputs = takes_cache(self.language_model)(
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return TheWorldModelOutputWithPast(
            **outputs, image_hidden_states=tokens.get("image"), video_hidden_states=tokens.get("video")
        )


class TheWorldForConditionalGeneration(TheWorldPreTrainedModel, GenerationMixin):
    """TheWorld with the language-model head: what `AutoModel.from_pretrained` gives, and what generates."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: TheWorldConfig):
        super().__init__(config)
        self.model = TheWorldModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        if config.video_token_id is None:
            # Images never reach these. DistributedDataParallel would wait for their gradients.
            time_convs = [name for name, _ in self.named_parameters() if ".time_conv." in name]
            self._ddp_params_and_buffers_to_ignore = time_convs
        self.post_init()

    @classmethod
    def _from_config(cls, config: TheWorldConfig, **kwargs) -> PreTrainedModel:
        """
        As transformers' own, for users; for a serving engine, the model without a head.

        An engine brings its own attention, head and sampling. It names its attention when it asks `AutoModel` for the
        model, and wants the hidden states.
        """
        if kwargs.get("attn_implementation", config.text_config._attn_implementation) in ENGINE_ATTENTION:
            check_served(config)
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

    def get_video_features(
        self, pixel_values_videos: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        """As [`TheWorldModel.get_video_features`]."""
        return self.model.get_video_features(pixel_values_videos, **kwargs)

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
        world_latents: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        world_latents_videos: torch.Tensor | None = None,
        vision_pixel_values: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | TheWorldCausalLMOutputWithPast:
        """
        Scores the next tokens of prompts with images and videos in them.

        Args:
            input_ids: [batch, S]; `<world>` N times for each image, as TheWorldProcessor expands it.
            pixel_values: [B, 3, H, W], floating point, in [-1, 1]; the images of all prompts in their order. H and W
                are multiples of `config.patch_size`.
            attention_mask: [batch, S], 0 at padding.
            position_ids, cache: As Gemma's. (`past_key_values` is the cache's name before transformers 5.24.)
            inputs_embeds: [batch, S, D], in place of `input_ids`.
            labels: [batch, S] token ids, -100 where none counts; shifted inside.
            logits_to_keep: How many of the last positions, or which, get logits; 0 for all.
            world_latents: [B, z, h, w] as `get_world_latents` returns them, in place of `pixel_values`.
            pixel_values_videos: [V, T, 3, H, W], as `pixel_values` but of videos of T = 1 + 4k frames, for
                `<world_video>` places.
            world_latents_videos: [V, 1 + k, z, h, w], in place of `pixel_values_videos`.
            vision_pixel_values: [C, 3, s, s], floating point, with s the size of `config.vision_config`; the images of
                all prompts and their crops, in their order.
            token_type_ids: [batch, S], 1 in the places of Gemma's own image tokens, 2 in those of world tokens: the
                blocks that attention may read both ways. Found in the prompt where images come without them.
            mm_encoder_outputs: `{"image": get_image_features(...)}` in place of `pixel_values`, as `generate` does,
                `"video": get_video_features(...)` in place of `pixel_values_videos`, and `"vision":
                get_vision_features(...)` in place of `vision_pixel_values`.

        Returns:
            `loss` if labels came, `logits` [batch, S, vocabulary], and Gemma's other outputs.

        Raises:
            TypeError: If images, videos or their latents are not floating point, or ids or labels not integers.
            ValueError: If images or videos and their places differ in number, come twice, or have another shape or
                range; if ids or labels are outside the vocabulary; if the mask does not cover the prompts.
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

        others = {name: output for name, output in outputs.items() if name != "last_hidden_state"}
        return TheWorldCausalLMOutputWithPast(loss=loss, logits=logits, **others)

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
        """As transformers' own; encoded images and their blocks go with the prompt only, which it leaves to models."""
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
    ) -> torch.Tensor | dict:
        """As transformers' own, which makes the masks ahead for a static cache, with the images' blocks."""
        masks = create_block_masks(config, inputs_embeds, attention_mask, cache, position_ids, token_type_ids)
        if masks is not attention_mask:
            return masks
        return create_masks_for_generate(config, inputs_embeds, attention_mask, cache=cache, position_ids=position_ids)

    def _repeat_by_prompt(
        self,
        prompts: torch.LongTensor | None,
        inputs_embeds: torch.Tensor | None,
        tokens: dict[str, torch.Tensor],
        times: int,
    ) -> dict[str, BaseModelOutputWithPooling]:
        """The modalities' tokens for `times` beams a prompt: images [A, B] of one prompt become [A, B, A, B]."""
        outputs = {}
        for modality in (modality for modality in MODALITIES if modality.name in tokens):
            features = tokens[modality.name]
            mask = self.model.get_placeholder_mask(prompts, inputs_embeds, features, modality)
            check_placeholders_contiguous(mask[..., 0], features.shape[1], modality)
            by_prompt = features.split((mask.sum((1, 2)) // features.shape[1]).tolist())
            repeated = torch.cat([images.repeat(times, 1, 1) for images in by_prompt])
            outputs[modality.name] = BaseModelOutputWithPooling(pooler_output=repeated)
        return outputs

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
        check_generation_inputs(input_ids, model_kwargs.get("attention_mask"), self.config.text_config.vocab_size)
        names = ["mm_encoder_outputs", *(name for modality in MODALITIES for name in modality.inputs)]
        tokens = self.model.encode_modalities(**{name: model_kwargs.pop(name, None) for name in names})
        if tokens:
            cache, embeds = model_kwargs.get(CACHE_NAME), model_kwargs.get("inputs_embeds")
            prompts = input_ids[:, cache.get_seq_length() if cache is not None else 0 :] if input_ids.numel() else None
            if self.config.has_bidirectional_blocks and model_kwargs.get("token_type_ids") is None:
                model_kwargs["token_type_ids"] = self.model.get_token_types(prompts, embeds)
            encoded = self._repeat_by_prompt(prompts, embeds, tokens, expand_size)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if tokens:
            model_kwargs["mm_encoder_outputs"] = encoded
        return input_ids, model_kwargs


TheWorldForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = ["TheWorldForConditionalGeneration", "TheWorldModel", "TheWorldPreTrainedModel"]
