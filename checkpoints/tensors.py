# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""Plans the source of each tensor of a converted checkpoint, and writes the shards."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from tqdm import tqdm

from theworld import TheWorldConfig, TheWorldForConditionalGeneration
from theworld.checkpoints.reader import Checkpoint, CheckpointError, check_finite
from theworld.checkpoints.sources import VAE_CLASS, Source, open_vae, read_text_config


# A shard is in memory while it is written. Gemma 2 2B's embedding alone has 1.2 GB.
MAX_SHARD_SIZE = "1GB"
# From a source's key to the name in the model, or None.
KeyMap = Callable[[str], str | None]


def map_vae_key(key: str) -> str | None:
    """TheWorld's name of a diffusers `AutoencoderKLWan` tensor; None if TheWorld does not use it."""
    if key.startswith(("encoder.", "quant_conv.")):
        return f"model.world_encoder.{key}"
    if key.startswith(("decoder.", "post_quant_conv.")):
        return None
    raise CheckpointError(f"The VAE's checkpoint has a tensor {key!r}, which no {VAE_CLASS} has.")


def map_gemma_key(key: str, vision: bool = False) -> str | None:
    """
    TheWorld's name of a Gemma tensor, in any layout that transformers has used; None if TheWorld does not use it.

    `vision` keeps the vision tower and the projector of a multimodal Gemma 3.
    """
    if match := re.match(r"(?:model\.)?(vision_tower|multi_modal_projector)\.(?:vision_model\.)?", key):
        return f"model.{match[1]}.{key[match.end() :]}" if vision else None
    if key.endswith("rotary_emb.inv_freq"):
        return None
    if key in ("lm_head.weight", "language_model.lm_head.weight"):
        return "lm_head.weight"
    # Multimodal Gemma 3: the names on the Hub, and those in memory since transformers 4.52.
    for prefix in ("language_model.model.", "model.language_model.", "model."):
        if key.startswith(prefix):
            return f"model.language_model.{key.removeprefix(prefix)}"
    raise CheckpointError(f"Gemma's checkpoint has a tensor {key!r}, which no Gemma text model has.")


@dataclass(frozen=True)
class Plan:
    """
    The source of each tensor of the model.

    Args:
        shapes: Shape of each tensor that the checkpoint will contain.
        sources: Checkpoint and key of each copied tensor.
        fresh: Tensors that are freshly initialized: those of the projection.
        dropped: Keys of source tensors that are not used.
    """

    shapes: dict[str, torch.Size]
    sources: dict[str, tuple[Checkpoint, str]]
    fresh: dict[str, torch.Tensor]
    dropped: list[str]

    def load(self, name: str) -> torch.Tensor:
        """The model's tensor `name`, in the dtype of its source."""
        if name in self.fresh:
            return self.fresh[name]
        checkpoint, key = self.sources[name]
        tensor = checkpoint.load(key)
        new_rows = self.shapes[name][0] - len(tensor)
        return append_mean_rows(tensor, new_rows) if new_rows else tensor


def append_mean_rows(table: torch.Tensor, rows: int) -> torch.Tensor:
    """`table` [V, D] with `rows` appended rows, each the mean of the existing rows."""
    mean = table.mean(0, dtype=torch.float32).to(table.dtype)
    return torch.cat([table, mean.expand(rows, -1)])


def initialize_projection(model: TheWorldForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Tensors of a freshly initialized projection, equal in every run, for a `model` on the meta device."""
    projection = model.model.world_projection.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in projection.modules():
            model._init_weights(module)
    return projection.state_dict(prefix="model.world_projection.")


def plan_tensors(
    model: TheWorldForConditionalGeneration,
    vocab_size: int,
    mapped_checkpoints: list[tuple[Checkpoint, KeyMap]],
) -> Plan:
    """
    Finds a source for every tensor of `model` except the projection's.

    Args:
        model: A model on the meta device.
        vocab_size: Vocabulary size of the source Gemma.
        mapped_checkpoints: Checkpoints, each with the function that maps its keys to names in `model`.

    Raises:
        CheckpointError: If a checkpoint is not exactly what its config describes.
    """
    tied, shapes = model.all_tied_weights_keys, stored_shapes(model)
    fresh = initialize_projection(model)
    sources: dict[str, tuple[Checkpoint, str]] = {}
    copies: dict[str, tuple[Checkpoint, str]] = {}
    dropped = []
    for checkpoint, map_key in mapped_checkpoints:
        for key in checkpoint.files:
            name = map_key(key)
            if name is None:
                dropped.append(key)
            elif name in tied:
                copies[tied[name]] = (checkpoint, key)
                dropped.append(key)
            elif name not in shapes:
                raise CheckpointError(f"Tensor {key!r} is not in the model that its config.json describes.")
            elif name in sources:
                raise CheckpointError(f"Tensors {sources[name][1]!r} and {key!r} both map to {name!r}.")
            else:
                sources[name] = (checkpoint, key)
    missing = sorted(set(shapes) - set(sources) - set(fresh))
    if missing:
        raise CheckpointError(f"{len(missing)} tensor(s) are missing from the checkpoints, such as {missing[0]!r}.")

    for name, (checkpoint, key) in copies.items():
        source, source_key = sources[name]
        if not torch.equal(checkpoint.load(key), source.load(source_key)):
            raise CheckpointError(
                f"Tensors {key!r} and {source_key!r} differ, but config.json ties them. Set `tie_word_embeddings` to "
                "false there if both were trained."
            )

    vocabulary_tables = ("model.language_model.embed_tokens.weight", "lm_head.weight")
    for name, (checkpoint, key) in sources.items():
        found, expected = checkpoint.shapes[key], list(shapes[name])
        if name in vocabulary_tables:
            expected[0] = vocab_size
        if found != expected:
            raise CheckpointError(
                f"Tensor {key!r} is {found}, but its config.json describes {expected}. Weights and config belong to "
                "different models."
            )
    return Plan(shapes, sources, fresh, dropped)


def plan_conversion(vae: Source, gemma: Source, config: TheWorldConfig) -> Plan:
    """The source of each tensor of the model that `config` describes."""
    with torch.device("meta"):
        model = TheWorldForConditionalGeneration(config)
    mapped: list[tuple[Checkpoint, KeyMap]] = [
        (open_vae(vae), map_vae_key),
        (Checkpoint.open(gemma.folder, "model"), partial(map_gemma_key, vision=config.vision_config is not None)),
    ]
    return plan_tensors(model, read_text_config(gemma).vocab_size, mapped)


def write_shards(folder: Path, plan: Plan, dtype: torch.dtype) -> None:
    """Writes the model's tensors, one shard at a time, in the format of `from_pretrained`."""
    sizes = {name: shape.numel() * dtype.itemsize for name, shape in plan.shapes.items()}
    split = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=int,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=MAX_SHARD_SIZE,
    )
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="Writing weights") as progress:
        for file, names in split.filename_to_tensors.items():
            shard = {}
            for name in names:
                shard[name] = plan.load(name).to(dtype).contiguous()
                check_finite(name, shard[name])
                progress.update(sizes[name])
            save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def stored_shapes(model: TheWorldForConditionalGeneration) -> dict[str, torch.Size]:
    """Shapes of the tensors in a checkpoint of `model`: all except tied ones."""
    tied = model.all_tied_weights_keys
    return {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}
