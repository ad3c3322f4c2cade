# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Joins a Wan VAE (a diffusers folder) and a Gemma (a transformers folder) into a TheWorld checkpoint.

    python convert_weights.py --vae nvidia/Cosmos-Predict2-2B-Video2World --gemma google/gemma-2-2b-it \
        --output my-theworld

    python convert_weights.py --verify my-theworld

Tensors go from file to file, a shard at a time. The output folder appears when it is complete, or not at all.
"""

import argparse
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import AutoencoderKLWan
from huggingface_hub import (
    HfApi,
    ModelCard,
    ModelCardData,
    snapshot_download,
    split_state_dict_into_shards_factory,
)
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Gemma3ImageProcessorPil,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    SiglipImageProcessorPil,
)

from theworld import TheWorldConfig, TheWorldEncoderConfig, TheWorldForConditionalGeneration, TheWorldProcessor
from theworld.checkpoints.atomic import atomic_folder, write_checksums
from theworld.checkpoints.verify import (
    Checkpoint,
    CheckpointError,
    Verification,
    check_finite,
    processor_fields,
    stored_shapes,
    verify,
)
from theworld.configuration_theworld import UNSUPPORTED_VAE_FIELDS
from theworld.encoder_theworld import TheWorldEncoder


VAE_CLASS = "AutoencoderKLWan"
MULTIMODAL_GEMMA = "Gemma3ForConditionalGeneration"
GEMMA_ARCHITECTURES = (
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    MULTIMODAL_GEMMA,
)
# Gemma3Processor's own, which its preprocessor_config.json leaves open (tests/test_vision.py compares with it);
# written out, because the versions of transformers keep them in different places.
PAN_AND_SCAN = {
    "do_convert_rgb": True,
    "do_pan_and_scan": False,
    "pan_and_scan_min_crop_size": 256,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# A shard is held in memory while it is written; Gemma 2 2B's embedding alone is 1.2 GB.
MAX_SHARD_SIZE = "1GB"
MODEL_FILES = (
    "validation_theworld.py",
    "configuration_theworld.py",
    "encoder_theworld.py",
    "wan_blocks_theworld.py",
    "images_theworld.py",
    "modeling_theworld.py",
    "padding_theworld.py",
    "processing_theworld.py",
    "modalities_theworld.py",
    "versions_theworld.py",
    "videos_theworld.py",
)
KEPT_VISION = "Gemma 3's own vision is kept: images also pass through its SigLIP tower, {} tokens each."
HERE = Path(__file__).parent


def map_vae_key(key: str) -> str | None:
    """TheWorld's name of a diffusers `AutoencoderKLWan` tensor; None if TheWorld has no use for it."""
    if key.startswith(("encoder.", "quant_conv.")):
        return f"model.world_encoder.{key}"
    if key.startswith(("decoder.", "post_quant_conv.")):
        return None
    raise CheckpointError(f"The VAE's checkpoint has a tensor {key!r}, which no {VAE_CLASS} has.")


def map_gemma_key(key: str, vision: bool = False) -> str | None:
    """
    TheWorld's name of a Gemma tensor, in any layout transformers has saved; None if TheWorld has no use for it.

    `vision` keeps the tower and projector of a multimodal Gemma 3.
    """
    if match := re.match(r"(?:model\.)?(vision_tower|multi_modal_projector)\.(?:vision_model\.)?", key):
        return f"model.{match[1]}.{key[match.end() :]}" if vision else None
    if key.endswith("rotary_emb.inv_freq"):
        return None
    if key in ("lm_head.weight", "language_model.lm_head.weight"):
        return "lm_head.weight"
    # Gemma 3's multimodal checkpoints: as on the Hub, and as transformers has kept them in memory since 4.52.
    for prefix in ("language_model.model.", "model.language_model.", "model."):
        if key.startswith(prefix):
            return f"model.language_model.{key.removeprefix(prefix)}"
    raise CheckpointError(f"Gemma's checkpoint has a tensor {key!r}, which no Gemma text model has.")


@dataclass(frozen=True)
class Source:
    """A folder to convert from; `name` and `commit` say where on the Hub it came from, if it did."""

    folder: Path
    name: str
    commit: str | None = None

    def read_config(self) -> dict:
        path = self.folder / "config.json"
        if not path.is_file():
            raise CheckpointError(f"{self.folder} has no config.json. Give a folder that `save_pretrained` wrote.")
        return json.loads(path.read_text())


def fetch(name: str, revision: str | None, patterns: list[str]) -> Source:
    """A local folder as it is, or the files of a Hub repo that match `patterns`."""
    if Path(name).is_dir():
        return Source(Path(name), name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise CheckpointError(f"{name} is neither a folder nor a Hub id (ORG/NAME).")
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except OSError as error:
        raise CheckpointError(f"{name} is no folder here, and could not be had from the Hub: {error}") from error
    return Source(folder, name, commit=folder.name)


def fetch_vae(name: str, revision: str | None, subfolder: str) -> Source:
    """A VAE folder, or the `subfolder` of a pipeline, of which nothing else is fetched."""
    prefix = f"{subfolder}/" if subfolder else ""
    files = ("config.json", "*.safetensors", "*.safetensors.index.json")
    source = fetch(name, revision, [prefix + file for file in files])
    nested = source.folder / subfolder
    return Source(nested, source.name, source.commit) if (nested / "config.json").is_file() else source


def fetch_gemma(name: str, revision: str | None) -> Source:
    return fetch(name, revision, ["*.json", "*.safetensors", "tokenizer.model"])


def read_world_config(vae: Source) -> TheWorldEncoderConfig:
    """The encoder's fields of the VAE's config.json; refuses other VAEs."""
    fields = vae.read_config()
    if fields.get("_class_name") != VAE_CLASS:
        raise CheckpointError(
            f"{vae.name}: expected the config.json of a diffusers {VAE_CLASS}, got {fields.get('_class_name')!r}. "
            "Name the pipeline's VAE with --vae-subfolder."
        )
    known = {*TheWorldEncoderConfig().to_dict(), *UNSUPPORTED_VAE_FIELDS}
    return TheWorldEncoderConfig(**{key: value for key, value in fields.items() if key in known})


def read_text_config(gemma: Source) -> PreTrainedConfig:
    """Gemma's text config; refuses other architectures."""
    architectures = gemma.read_config().get("architectures") or [None]
    if architectures[0] not in GEMMA_ARCHITECTURES:
        raise CheckpointError(
            f"{gemma.name}: expected one of {', '.join(GEMMA_ARCHITECTURES)}, got {architectures[0]}."
        )
    return AutoConfig.from_pretrained(gemma.folder).get_text_config()


def read_vision_fields(gemma: Source, dtype: str) -> dict:
    """The fields of [`TheWorldConfig`] that keep a multimodal Gemma 3's own vision; refuses other Gemmas."""
    architecture = (gemma.read_config().get("architectures") or [None])[0]
    if architecture != MULTIMODAL_GEMMA:
        raise CheckpointError(
            f"{gemma.name}: --vision keeps the tower of a {MULTIMODAL_GEMMA}, got {architecture}. Leave it out."
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


def add_world_tokens(gemma: Source) -> PreTrainedTokenizerBase:
    """
    Gemma's tokenizer with TheWorld's four tokens.

    They take over the first four `<unusedN>` entries, so that the vocabulary and the embedding stay as they are, or
    follow the last entry where there are none. The entries are renamed in the text of copies: it is tens of megabytes,
    and to load it takes seconds.
    """
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if (gemma.folder / "tokenizer.json").is_file():
            for file in gemma.folder.glob("*.json"):
                shutil.copyfile(file, folder / file.name)
        else:
            AutoTokenizer.from_pretrained(gemma.folder).save_pretrained(folder)
        text = (folder / "tokenizer.json").read_text()
        ids = {token: int(index) for token, index in re.findall(r'"(<unused\d+>)"\s*:\s*(\d+)', text)}
        unused = sorted(ids, key=ids.get)
        if len(unused) >= len(TheWorldProcessor.world_tokens):
            for name in ("tokenizer.json", "tokenizer_config.json"):
                content = (folder / name).read_text()
                for old, new in zip(unused, TheWorldProcessor.world_tokens, strict=False):
                    content = content.replace(json.dumps(old), json.dumps(new))
                (folder / name).write_text(content)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(TheWorldProcessor.world_tokens), special_tokens=True)
    return tokenizer


def build_config(
    vae: Source,
    gemma: Source,
    tokenizer: PreTrainedTokenizerBase,
    image_size: int,
    dtype: str,
    **layout,
) -> TheWorldConfig:
    """The checkpoint's config; `layout` holds the fields that say how the latent becomes tokens."""
    text_config = read_text_config(gemma)
    token_ids = tokenizer.convert_tokens_to_ids(list(TheWorldProcessor.world_tokens))
    image_token_id, start_id, end_id, video_token_id = token_ids
    # Gemma 3 1B's tokenizer has an entry more than its table has rows; only TheWorld's tokens need rows.
    if max(token_ids) >= text_config.vocab_size:
        text_config.vocab_size = 64 * math.ceil((max(token_ids) + 1) / 64)
    text_config.dtype = dtype
    text_config.name_or_path = ""
    config = TheWorldConfig(
        world_config=read_world_config(vae),
        text_config=text_config,
        image_size=image_size if layout.get("token_layout") == "channel" else None,
        image_token_id=image_token_id,
        start_of_world_token_id=start_id,
        end_of_world_token_id=end_id,
        video_token_id=video_token_id,
        dtype=dtype,
        architectures=[TheWorldForConditionalGeneration.__name__],
        **layout,
    )
    if image_size < 1 or image_size % config.patch_size:
        raise CheckpointError(f"--image-size must be a positive multiple of {config.patch_size}, got {image_size}.")
    return config


def build_processor(
    config: TheWorldConfig, tokenizer: PreTrainedTokenizerBase, image_size: int, gemma: Source
) -> TheWorldProcessor:
    vision_settings = None
    if config.vision_config is not None:
        vision_settings = Gemma3ImageProcessorPil.from_pretrained(gemma.folder).to_dict() | PAN_AND_SCAN
    return TheWorldProcessor(
        SiglipImageProcessorPil(
            size={"height": image_size, "width": image_size}, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        tokenizer,
        chat_template=(HERE / "chat_template.jinja").read_text(),
        vision_settings=vision_settings,
        **processor_fields(config),
    )


def append_mean_rows(table: torch.Tensor, rows: int) -> torch.Tensor:
    """`table` [V, D] with `rows` more rows, each the mean of those there."""
    mean = table.mean(0, dtype=torch.float32).to(table.dtype)
    return torch.cat([table, mean.expand(rows, -1)])


@dataclass(frozen=True)
class Plan:
    """Where each tensor of the model comes from, and which source tensors it has no use for."""

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


def initialize_projection(model: TheWorldForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The tensors of a freshly initialised projection, the same at every run, for a `model` on the meta device."""
    projection = model.model.world_projection.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in projection.modules():
            model._init_weights(module)
    return projection.state_dict(prefix="model.world_projection.")


def plan_tensors(
    model: TheWorldForConditionalGeneration,
    vocab_size: int,
    mapped_checkpoints: list[tuple[Checkpoint, Callable[[str], str | None]]],
) -> Plan:
    """
    Finds a source for every tensor of `model`, a model on the meta device, but the projection's.

    Refuses checkpoints that are not exactly what their configs describe; `vocab_size` is the source Gemma's.
    """
    tied, shapes = model.all_tied_weights_keys, stored_shapes(model)
    fresh = initialize_projection(model)
    sources, dropped, copies = {}, [], {}
    for checkpoint, map_key in mapped_checkpoints:
        for key in checkpoint.files:
            name = map_key(key)
            if name is None:
                dropped.append(key)
            elif name in tied:
                copies[tied[name]] = (checkpoint, key)
                dropped.append(key)
            elif name not in shapes:
                raise CheckpointError(f"Tensor {key!r} has no place in the model that its config.json describes.")
            elif name in sources:
                raise CheckpointError(f"Tensors {sources[name][1]!r} and {key!r} both stand for {name!r}.")
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
                f"Tensor {key!r} is {found}, but its config.json describes {expected}. Weights and config are not of "
                "the same model."
            )
    return Plan(shapes, sources, fresh, dropped)


def open_vae(vae: Source) -> Checkpoint:
    return Checkpoint.open(vae.folder, "diffusion_pytorch_model")


def plan_conversion(vae: Source, gemma: Source, config: TheWorldConfig) -> Plan:
    """Where each tensor of the model that `config` describes comes from."""
    with torch.device("meta"):
        model = TheWorldForConditionalGeneration(config)
    map_key = partial(map_gemma_key, vision=config.vision_config is not None)
    mapped = [(open_vae(vae), map_vae_key), (Checkpoint.open(gemma.folder, "model"), map_key)]
    return plan_tensors(model, read_text_config(gemma).vocab_size, mapped)


def verify_conversion(folder: Path, vae: Source | None, gemma: Source | None) -> Verification:
    """`verify`, and, given both sources, that what came from them is theirs still."""
    if vae is None or gemma is None:
        return verify(folder)
    plan = plan_conversion(vae, gemma, TheWorldConfig.from_pretrained(folder))
    return verify(folder, {name: partial(plan.load, name) for name in plan.sources})


def write_shards(folder: Path, plan: Plan, dtype: torch.dtype) -> None:
    """Writes the model's tensors, a shard at a time, in the form that `from_pretrained` reads."""
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


def largest_latent_difference(vae: Source, folder: Path, config: TheWorldConfig) -> float:
    """
    The largest difference between the source VAE's mode, by diffusers in float32, and the written encoder's.

    Both see a 64 x 64 picture of two ramps and their product. The VAE's decoder stays on the meta device.
    """
    ramp = torch.linspace(-1, 1, 64)
    y, x = torch.meshgrid(ramp, ramp, indexing="ij")
    picture = torch.stack([x, y, x * y]).unsqueeze(0)

    with torch.device("meta"):
        reference = AutoencoderKLWan.from_config(vae.read_config()).eval()
        encoder = TheWorldEncoder(config.world_config).eval()
    written, source = Checkpoint.open(folder, "model"), open_vae(vae)
    prefix = "model.world_encoder."
    keys = [name.removeprefix(prefix) for name in written.files if name.startswith(prefix)]
    reference.load_state_dict({key: source.load(key).float() for key in keys}, strict=False, assign=True)
    encoder.load_state_dict({key: written.load(prefix + key) for key in keys}, assign=True)
    with torch.no_grad():
        expected = reference.encode(picture.unsqueeze(2)).latent_dist.mode().squeeze(2)
        return (encoder(picture).float() - expected).abs().max().item()


def write_generation_config(gemma: Source, config: TheWorldConfig, folder: Path) -> None:
    """
    Gemma's own generation config, but neither the tokens of images and videos nor appended rows are ever generated.

    Most appended rows belong to no token: a table is lengthened to a multiple of 64.
    """
    if (gemma.folder / "generation_config.json").is_file():
        generation_config = GenerationConfig.from_pretrained(gemma.folder)
    else:
        generation_config = GenerationConfig.from_model_config(config.text_config)
    world_token_ids = [config.image_token_id, config.start_of_world_token_id, config.end_of_world_token_id]
    world_token_ids += [config.video_token_id]
    vision_token_ids = [config.vision_token_id, config.boi_token_id, config.eoi_token_id]
    appended = range(read_text_config(gemma).vocab_size, config.text_config.vocab_size)
    suppressed = world_token_ids + (vision_token_ids if config.vision_config else [])
    generation_config.suppress_tokens = suppressed + [row for row in appended if row not in suppressed]
    generation_config.save_pretrained(folder)


def write_card(folder: Path, vae: Source, gemma: Source, config: TheWorldConfig, title: str) -> None:
    """The model card: where the weights come from, their terms, and the shortest use."""
    sources = {"Wan VAE": vae, "Gemma": gemma}
    data = ModelCardData(
        language="en",
        license="other",
        license_name="gemma-and-nvidia-open-model-license",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=[source.name for source in sources.values() if source.commit] or None,
        tags=["theworld", "custom_code"],
    )
    origins = "\n".join(
        f"- {part}: `{source.name}`" + (f" at commit `{source.commit}`" if source.commit else "")
        for part, source in sources.items()
    )
    square = f"{config.patch_size}x{config.patch_size} pixels"
    unit = "channel of the latent" if config.token_layout == "channel" else square
    beside = f"{KEPT_VISION.format(config.mm_tokens_per_image)}\n" if config.vision_config is not None else ""
    content = f"""---
{data.to_yaml()}
---

# {title}

TheWorld: the latent of an image, one token for each {unit}, read by Gemma.
{beside}Converted with `convert_weights.py` from

{origins}

The projection between the two (`model.world_projection`) is freshly initialised: **train it before you trust an
answer.**

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{title}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{title}", trust_remote_code=True)
```

The code is Apache-2.0. The weights stay under their makers' terms: Google's Gemma terms of use for the text model,
NVIDIA's or the Wan team's licence for the VAE.
"""
    ModelCard(content).save(folder / "README.md")


PARTS = {
    "world encoder": "model.world_encoder.",
    "projection": "model.world_projection.",
    "Gemma's own vision": ("model.vision_tower.", "model.multi_modal_projector."),
    "Gemma": ("model.language_model.", "lm_head."),
}


@dataclass(frozen=True)
class Report:
    """What a conversion did; its `str` is the table that the command prints."""

    parameters: dict[str, int]
    dtype: torch.dtype
    dropped: list[str]
    latent_difference: float

    def __str__(self) -> str:
        rows = [*self.parameters.items(), ("total", sum(self.parameters.values()))]
        groups = sorted({key.split(".")[0] for key in self.dropped})
        return "\n".join(
            [
                f"{'part':<20}{'parameters':>16}{'bytes':>18}",
                *(f"{part:<20}{count:>16,}{count * self.dtype.itemsize:>18,}" for part, count in rows),
                f"{'dropped keys':<20}{len(self.dropped):>16,}  under {', '.join(groups) or 'none'}",
                f"{'latent difference':<20}{self.latent_difference:>16.2e}  largest, to the source VAE's mode",
            ]
        )


def convert(
    vae: Source,
    gemma: Source,
    output: Path,
    image_size: int = 512,
    dtype: str = "bfloat16",
    overwrite: bool = False,
    title: str | None = None,
    vision: bool = False,
    **layout,
) -> Report:
    """
    Writes a TheWorld checkpoint into the folder `output`.

    Args:
        vae, gemma: The folders to convert from.
        output: A folder that is absent or empty, unless `overwrite`.
        image_size: Pixels a side that the processor resizes images to.
        dtype: Of the written weights, a key of `DTYPES`.
        overwrite: Whether what `output` holds may be replaced.
        title: What the card calls the model; the folder's name by default.
        vision: Whether to keep the vision of a multimodal Gemma 3, beside the world tokens.
        layout: `projector_type`, `token_layout`, `latent_merge_size`, `normalize_latents`, `world_attention`,
            `world_first` of [`TheWorldConfig`].

    Raises:
        CheckpointError: If a source is not what it should be, or `output` may not be written.
        StrictDataclassError: If the fields contradict each other; see [`TheWorldConfig`].
    """
    for source in (vae.folder.resolve(), gemma.folder.resolve()):
        if output.resolve() in (source, *source.parents):
            raise CheckpointError(f"--output {output} would replace the source {source}. Choose another.")

    with atomic_folder(output.absolute(), overwrite) as folder:
        tokenizer = add_world_tokens(gemma)
        layout |= read_vision_fields(gemma, dtype) if vision else {}
        config = build_config(vae, gemma, tokenizer, image_size, dtype, **layout)
        plan = plan_conversion(vae, gemma, config)
        write_shards(folder, plan, DTYPES[dtype])
        config.save_pretrained(folder)
        build_processor(config, tokenizer, image_size, gemma).save_pretrained(folder)
        write_generation_config(gemma, config, folder)
        for file in MODEL_FILES:
            shutil.copyfile(HERE / file, folder / file)
        write_card(folder, vae, gemma, config, title or output.name)
        report = Report(
            parameters={
                part: count
                for part, prefix in PARTS.items()
                if (count := sum(shape.numel() for name, shape in plan.shapes.items() if name.startswith(prefix)))
            },
            dtype=DTYPES[dtype],
            dropped=plan.dropped,
            latent_difference=largest_latent_difference(vae, folder, config),
        )
        write_checksums(folder)
        return report


def check_not_public(repo: str) -> None:
    """Raises a `CheckpointError` if `repo` is there already and public: the Hub would leave it so."""
    api = HfApi()
    if api.repo_exists(repo) and not api.model_info(repo).private:
        raise CheckpointError(f"{repo} is a public repo already. Make it private on the Hub, or leave --private out.")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Join a Wan VAE and a Gemma into a TheWorld checkpoint.")
    add = parser.add_argument
    add("--vae", metavar="DIR_OR_REPO", help="a diffusers AutoencoderKLWan, or a pipeline that has one")
    add("--vae-subfolder", default="vae", metavar="NAME", help="the pipeline's VAE (%(default)s); '' if there is none")
    add("--vae-revision", metavar="REVISION", help="branch, tag or commit on the Hub")
    add("--gemma", metavar="DIR_OR_REPO", help="a Gemma, Gemma 2 or Gemma 3 in transformers' format")
    add("--gemma-revision", metavar="REVISION", help="branch, tag or commit on the Hub")
    add("--output", type=Path, metavar="DIR", help="the folder to write")
    add("--image-size", type=int, default=512, metavar="PIXELS", help="side that images are resized to (%(default)s)")
    add("--projector-type", choices=["linear", "mlp"], default="linear", help="latents to Gemma's width (%(default)s)")
    add(
        "--token-layout",
        choices=["spatial", "channel"],
        default="spatial",
        help="whether a token stands for a latent position or for a channel (%(default)s)",
    )
    add("--latent-merge-size", type=int, default=1, metavar="N", help="pack NxN positions into a token (%(default)s)")
    add("--normalize-latents", action="store_true", help="apply (z - mean) / std before the projection")
    add("--vision", action="store_true", help="keep the vision tower of a Gemma 3 that has one, beside the world")
    add("--vision-first", action="store_true", help="put Gemma's own tokens of an image before its world tokens")
    add(
        "--world-attention",
        choices=["causal", "bidirectional"],
        default="causal",
        help="how the world tokens of an image see each other (%(default)s)",
    )
    add("--dtype", choices=list(DTYPES), default="bfloat16", help="of the written weights (%(default)s)")
    add("--push-to-hub", metavar="ORG/NAME", help="upload the finished folder to this Hub repo")
    add("--private", action="store_true", help="with --push-to-hub: create the repo as a private one")
    add("--overwrite", action="store_true", help="replace what --output holds")
    add(
        "--verify",
        type=Path,
        metavar="DIR",
        help="write nothing; check this checkpoint, against --vae and --gemma if given",
    )
    args = parser.parse_args(arguments)
    if args.verify is None and None in (args.vae, args.gemma, args.output):
        parser.error("--vae, --gemma and --output are required, but for --verify")
    if args.verify is not None and (args.vae is None) != (args.gemma is None):
        parser.error("--verify compares with both --vae and --gemma, or with neither")
    if args.private and args.push_to_hub is None:
        parser.error("--private is for the repo that --push-to-hub names")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    try:
        vae = args.vae and fetch_vae(args.vae, args.vae_revision, args.vae_subfolder)
        gemma = args.gemma and fetch_gemma(args.gemma, args.gemma_revision)
        if args.verify is not None:
            print(verify_conversion(args.verify, vae, gemma))
            return 0
        if args.private:
            check_not_public(args.push_to_hub)
        report = convert(
            vae,
            gemma,
            args.output,
            image_size=args.image_size,
            dtype=args.dtype,
            overwrite=args.overwrite,
            title=args.push_to_hub,
            projector_type=args.projector_type,
            token_layout=args.token_layout,
            latent_merge_size=args.latent_merge_size,
            normalize_latents=args.normalize_latents,
            vision=args.vision,
            world_attention=args.world_attention,
            world_first=not args.vision_first,
        )
        print(report)
        if args.push_to_hub:
            api = HfApi()
            api.create_repo(args.push_to_hub, private=args.private or None, exist_ok=True)
            api.upload_folder(repo_id=args.push_to_hub, folder_path=args.output)
    except (ValueError, OSError, SafetensorError, StrictDataclassError) as error:
        print("convert_weights.py: error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
