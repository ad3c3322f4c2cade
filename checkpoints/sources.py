# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""The sources of a conversion: a Wan VAE and a Gemma, as local folders or from the Hub, and their configs."""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import AutoConfig, PreTrainedConfig

from theworld import TheWorldEncoderConfig
from theworld.checkpoints.reader import Checkpoint, CheckpointError
from theworld.configuration_theworld import UNSUPPORTED_VAE_FIELDS


VAE_CLASS = "AutoencoderKLWan"
MULTIMODAL_GEMMA = "Gemma3ForConditionalGeneration"
GEMMA_ARCHITECTURES = (
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    MULTIMODAL_GEMMA,
)


@dataclass(frozen=True)
class Source:
    """A folder to convert from; `name` and `commit` are its Hub repo and commit if it was downloaded."""

    folder: Path
    name: str
    commit: str | None = None

    def read_config(self) -> dict:
        path = self.folder / "config.json"
        if not path.is_file():
            raise CheckpointError(f"{self.folder} has no config.json. Give a folder that `save_pretrained` wrote.")
        return json.loads(path.read_text())


def download_source(name: str, revision: str | None, patterns: list[str]) -> Source:
    """A local folder unchanged, or the files of a Hub repo that match `patterns`."""
    if Path(name).is_dir():
        return Source(Path(name), name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise CheckpointError(f"{name} is neither a folder nor a Hub id (ORG/NAME). Check the path.")
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except OSError as error:
        raise CheckpointError(f"{name} is not a local folder, and the download failed: {error}") from error
    return Source(folder, name, commit=folder.name)


def fetch_vae(name: str, revision: str | None, subfolder: str) -> Source:
    """A VAE folder, or the `subfolder` of a pipeline; the rest of the pipeline is not downloaded."""
    prefix = f"{subfolder}/" if subfolder else ""
    files = ("config.json", "*.safetensors", "*.safetensors.index.json")
    source = download_source(name, revision, [prefix + file for file in files])
    nested = source.folder / subfolder
    return Source(nested, source.name, source.commit) if (nested / "config.json").is_file() else source


def fetch_gemma(name: str, revision: str | None) -> Source:
    return download_source(name, revision, ["*.json", "*.safetensors", "tokenizer.model"])


def open_vae(vae: Source) -> Checkpoint:
    return Checkpoint.open(vae.folder, "diffusion_pytorch_model")


def read_world_config(vae: Source) -> TheWorldEncoderConfig:
    """The encoder's fields of the VAE's config.json; raises a `CheckpointError` for another kind of VAE."""
    fields = vae.read_config()
    if fields.get("_class_name") != VAE_CLASS:
        raise CheckpointError(
            f"{vae.name}: expected the config.json of a diffusers {VAE_CLASS}, got {fields.get('_class_name')!r}. "
            "Name the pipeline's VAE with --vae-subfolder."
        )
    known = {*TheWorldEncoderConfig().to_dict(), *UNSUPPORTED_VAE_FIELDS}
    return TheWorldEncoderConfig(**{key: value for key, value in fields.items() if key in known})


def read_text_config(gemma: Source) -> PreTrainedConfig:
    """Gemma's text config; raises a `CheckpointError` for another architecture."""
    architectures = gemma.read_config().get("architectures") or [None]
    if architectures[0] not in GEMMA_ARCHITECTURES:
        raise CheckpointError(
            f"{gemma.name}: expected one of {', '.join(GEMMA_ARCHITECTURES)}, got {architectures[0]}."
        )
    return AutoConfig.from_pretrained(gemma.folder).get_text_config()


def read_vision_fields(gemma: Source, dtype: str) -> dict:
    """The vision fields of [`TheWorldConfig`]; raises a `CheckpointError` unless Gemma is a multimodal Gemma 3."""
    architecture = (gemma.read_config().get("architectures") or [None])[0]
    if architecture != MULTIMODAL_GEMMA:
        raise CheckpointError(
            f"{gemma.name}: --vision keeps the tower of a {MULTIMODAL_GEMMA}, got {architecture}. Omit it."
        )
    config = AutoConfig.from_pretrained(gemma.folder)
    config.vision_config.dtype = dtype
    config.vision_config.name_or_path = ""
    return {
        "vision_config": config.vision_config,
        "mm_tokens_per_image": config.mm_tokens_per_image,
        "vision_token_id": config.image_token_id,
        "boi_token_id": config.boi_token_id,
        "eoi_token_id": config.eoi_token_id,
    }


def add_source_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    """Adds the options that name a VAE and a Gemma."""
    add = parser.add_argument
    add("--vae", required=required, metavar="PATH_OR_REPO", help="a diffusers AutoencoderKLWan, or its pipeline")
    add("--vae-subfolder", default="vae", metavar="NAME", help="folder of a pipeline's VAE (%(default)s); '' for none")
    add("--vae-revision", metavar="REVISION", help="branch, tag or commit on the Hub")
    add(
        "--gemma",
        required=required,
        metavar="PATH_OR_REPO",
        help="a Gemma, Gemma 2 or Gemma 3 in transformers' format",
    )
    add("--gemma-revision", metavar="REVISION", help="branch, tag or commit on the Hub")
