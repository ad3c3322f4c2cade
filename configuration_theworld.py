# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Configuration of TheWorld: the Wan VAE's encoder (`world_config`), Gemma (`text_config`), optionally Gemma 3's vision
tower (`vision_config`), and how they are connected.
"""

import math
from typing import TYPE_CHECKING, Literal


# Must be the first import: fails clearly if transformers is too old.
from .versions_theworld import TESTED  # noqa: F401 # isort: skip

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig


# The class that each Auto class loads from a saved folder.
AUTO_MAP = {
    "AutoConfig": "configuration_theworld.TheWorldConfig",
    "AutoModel": "modeling_theworld.TheWorldForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_theworld.TheWorldForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_theworld.TheWorldForConditionalGeneration",
}

TEXT_MODEL_TYPES = ("gemma", "gemma2", "gemma3_text")
VISION_MODEL_TYPE = "siglip_vision_model"

# Fields of diffusers' `AutoencoderKLWan` that, if set, change the encoder in ways that TheWorld does not support.
UNSUPPORTED_VAE_FIELDS = ("is_residual", "patch_size", "attn_scales")


@strict
class TheWorldEncoderConfig(PreTrainedConfig):
    """
    The encoder half of a diffusers `AutoencoderKLWan`, under diffusers' own field names (misspelling included).

    The defaults are those of `AutoencoderKLWan` in diffusers 0.36 to 0.42, which Cosmos-Predict2's `vae/` uses:
    53,595,872 encoder parameters.

    Args:
        base_dim: Channels of the first layer.
        z_dim: Channels of the latent.
        dim_mult: Channels of each stage, in units of `base_dim`. Each stage except the last halves height and width.
        num_res_blocks: Residual blocks of each stage.
        temperal_downsample: For each halving, whether it also halves time (video only).
        dropout: Dropout probability inside the residual blocks during training.
        in_channels: Color channels of a frame.
        latents_mean, latents_std: The latent's statistics, one number per channel, used by `normalize_latents`.

    Raises:
        ValueError: For a variant of the VAE that TheWorld does not support: Wan 2.2's residual blocks or patches, or
            attention inside the stages.
    """

    model_type = "theworld_encoder"
    base_config_key = "world_config"

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: list[int] | tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: list[bool] | tuple[bool, ...] = (False, True, True)
    dropout: float | int = 0.0
    in_channels: int = 3
    # fmt: off
    latents_mean: list[float | int] | tuple[float | int, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )
    latents_std: list[float | int] | tuple[float | int, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )
    # fmt: on

    def __post_init__(self, **kwargs):
        unsupported = {key: kwargs[key] for key in UNSUPPORTED_VAE_FIELDS if kwargs.get(key)}
        if unsupported:
            raise ValueError(
                f"TheWorld supports the VAE of Wan 2.1 and Cosmos-Predict2, but this one has {unsupported} "
                "(Wan 2.2 sets `is_residual` and `patch_size`). Use a VAE without them."
            )
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Called by `@strict`: checks that the fields are consistent."""
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"`temperal_downsample` needs one entry for each of the {len(self.dim_mult) - 1} halvings between the "
                f"{len(self.dim_mult)} stages of `dim_mult`, got {len(self.temperal_downsample)}."
            )
        if not len(self.latents_mean) == len(self.latents_std) == self.z_dim:
            raise ValueError(
                "`latents_mean` and `latents_std` need one number for each of the latent channels, "
                f"z_dim={self.z_dim}, got {len(self.latents_mean)} and {len(self.latents_std)}."
            )

    @property
    def spatial_compression_ratio(self) -> int:
        """Side, in pixels, of the square that one latent position covers; 8 with the default stages."""
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal_compression_ratio(self) -> int:
        """Frames that each latent frame after the first encodes; 4 with the default stages."""
        return 2 ** sum(self.temperal_downsample)


@strict
class TheWorldConfig(PreTrainedConfig):
    """
    Configuration of [`TheWorldForConditionalGeneration`].

    Args:
        world_config: The Wan VAE's encoder; a [`TheWorldEncoderConfig`] or a dict of its fields.
        text_config: The config of a Gemma, Gemma 2 or Gemma 3 text model, or a dict with its `model_type`. Default:
            Gemma 2 2B.
        projector_type: `"linear"`, or `"mlp"`: linear, GELU, linear.
        token_layout: `"spatial"`: one world token per latent position, at any image size. `"channel"`: one per latent
            channel, at one image size.
        latent_merge_size: Side of the square of latent positions that share a token: 2 packs 2x2 positions of 16
            numbers into one token of 64, so 512x512 pixels give 1024 tokens instead of 4096.
        normalize_latents: Whether latents become `(z - latents_mean) / latents_std` before the projection, as in
            diffusers' Cosmos pipelines.
        image_size: Side of the square images in pixels. Required by `token_layout="channel"`, else None.
        image_token_id: Id of `<world>`, the placeholder replaced by an image's world tokens. Default: Gemma 2's
            `<unused0>`.
        start_of_world_token_id: Id of `<start_of_world>`, just before an image's world tokens.
        end_of_world_token_id: Id of `<end_of_world>`, just after them.
        video_token_id: Id of `<world_video>`, the placeholder replaced by a video's world tokens. None: the model does
            not read videos.
        world_attention: `"causal"`, or `"bidirectional"` between the world tokens of an image.
        vision_config: The config of Gemma 3's SigLIP vision tower, or a dict of its fields. None: no vision tower.
        mm_tokens_per_image: Tokens that Gemma's projector makes of one image of the tower, a square number.
        vision_token_id: Id of `<image_soft_token>`, the placeholder replaced by Gemma's own image tokens.
        boi_token_id, eoi_token_id: Ids of `<start_of_image>` and `<end_of_image>`, around them.
        world_first: Whether the world tokens of an image come before Gemma's own.

    Example:

    ```python
    >>> from theworld import TheWorldConfig
    >>> TheWorldConfig(latent_merge_size=2).world_token_size
    64

    ```
    """

    model_type = "theworld"
    sub_configs = {"world_config": TheWorldEncoderConfig, "text_config": AutoConfig, "vision_config": AutoConfig}
    # Outputs that `Trainer.evaluate` must not collect as predictions: only batches with images or videos have them.
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_hidden_states", "video_hidden_states"]

    if TYPE_CHECKING:  # the types after `__post_init__`; `@strict` checks those that callers may pass
        world_config: TheWorldEncoderConfig = None  # type: ignore[assignment]
        text_config: PreTrainedConfig = None  # type: ignore[assignment]
        vision_config: PreTrainedConfig | None = None
    else:
        world_config: dict | PreTrainedConfig | None = None
        text_config: dict | PreTrainedConfig | None = None
        vision_config: dict | PreTrainedConfig | None = None
    projector_type: Literal["linear", "mlp"] = "linear"
    token_layout: Literal["spatial", "channel"] = "spatial"
    latent_merge_size: int = 1
    normalize_latents: bool = False
    image_size: int | None = None
    image_token_id: int = 7
    start_of_world_token_id: int = 8
    end_of_world_token_id: int = 9
    video_token_id: int | None = None
    world_attention: Literal["causal", "bidirectional"] = "causal"
    mm_tokens_per_image: int = 256
    vision_token_id: int | None = None
    boi_token_id: int | None = None
    eoi_token_id: int | None = None
    world_first: bool = True
    tie_word_embeddings: bool = True
    auto_map: dict | None = None

    def __post_init__(self, **kwargs):
        if not isinstance(self.world_config, PreTrainedConfig):
            self.world_config = TheWorldEncoderConfig(**(self.world_config or {}))
        if not isinstance(self.text_config, PreTrainedConfig):
            text_config = {"model_type": "gemma2", **(self.text_config or {})}
            self.text_config = AutoConfig.for_model(**text_config)
        if isinstance(self.vision_config, dict):
            self.vision_config = AutoConfig.for_model(**{"model_type": VISION_MODEL_TYPE, **self.vision_config})
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        # Set here, because `save_pretrained` records only the one Auto class that the model was loaded with.
        self.auto_map = dict(AUTO_MAP)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Called by `@strict`: checks that the fields are consistent."""
        if self.text_config.model_type not in TEXT_MODEL_TYPES:
            hint = " Pass its `text_config`." if hasattr(self.text_config, "text_config") else ""
            raise ValueError(
                f"`text_config` must be a Gemma text model, one of {', '.join(TEXT_MODEL_TYPES)}, "
                f"got {self.text_config.model_type!r}.{hint}"
            )
        if self.latent_merge_size < 1:
            raise ValueError(f"`latent_merge_size` must be 1 or more, got {self.latent_merge_size}.")

        if self.token_layout == "channel":
            if self.latent_merge_size != 1:
                raise ValueError(
                    f"`latent_merge_size={self.latent_merge_size}` merges positions, but `token_layout='channel'` has "
                    "one token per channel, not per position. Use one or the other."
                )
            if not self.image_size or self.image_size % self.patch_size:
                raise ValueError(
                    "`token_layout='channel'` reads one image size: `image_size` must be a positive multiple of "
                    f"{self.patch_size} pixels, got {self.image_size}."
                )
        elif self.image_size is not None:
            raise ValueError(
                f"`image_size={self.image_size}` is for `token_layout='channel'`; `'spatial'` reads any image size, "
                "which the processor chooses. Remove it."
            )

        if self.vision_config is not None:
            self._validate_vision()
        self._validate_token_ids()

    def _validate_token_ids(self):
        """All special tokens need ids, and different ones."""
        needed = ["image_token_id", "start_of_world_token_id", "end_of_world_token_id"]
        needed += ["video_token_id"] if self.video_token_id is not None else []
        needed += ["vision_token_id", "boi_token_id", "eoi_token_id"] if self.vision_config is not None else []
        token_ids = {name: getattr(self, name) for name in needed}
        known = {token_id for token_id in token_ids.values() if token_id is not None}
        if len(known) != len(needed) or not all(0 <= token_id < self.text_config.vocab_size for token_id in known):
            raise ValueError(
                f"The ids of special tokens must be different and below the vocabulary size "
                f"{self.text_config.vocab_size}, got {token_ids}."
            )

    def _validate_vision(self):
        """The fields of Gemma 3's vision tower must be consistent with each other and the rest."""
        vision = self.vision_config
        if vision.model_type != VISION_MODEL_TYPE or self.text_config.model_type != "gemma3_text":
            raise ValueError(
                f"`vision_config` is Gemma 3's own tower: it must be a {VISION_MODEL_TYPE!r} with a 'gemma3_text', "
                f"got {vision.model_type!r} with {self.text_config.model_type!r}."
            )
        patches, tokens = vision.image_size // vision.patch_size, math.isqrt(max(self.mm_tokens_per_image, 0))
        if tokens**2 != self.mm_tokens_per_image or not tokens or patches % tokens:
            raise ValueError(
                f"`mm_tokens_per_image` must be the square of a divisor of the tower's {patches} patches a side, got "
                f"{self.mm_tokens_per_image}."
            )

    @property
    def has_bidirectional_blocks(self) -> bool:
        """Whether tokens of some images also attend to later tokens of the same image."""
        return self.vision_config is not None or self.world_attention == "bidirectional"

    @property
    def patch_size(self) -> int:
        """Side, in pixels, of the square that one world token covers; image sides are multiples of it."""
        return self.world_config.spatial_compression_ratio * self.latent_merge_size

    @property
    def channel_latent_side(self) -> int:
        """Height and width of the latents that `token_layout="channel"` reads."""
        return (self.image_size or 0) // self.patch_size

    @property
    def world_token_size(self) -> int:
        """Latent numbers in one world token, the input width of the projection."""
        if self.token_layout == "channel":
            return self.channel_latent_side**2
        return self.world_config.z_dim * self.latent_merge_size**2


TheWorldConfig.register_for_auto_class()

__all__ = ["TheWorldConfig", "TheWorldEncoderConfig"]
