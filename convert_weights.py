# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Joins a Wan VAE (a diffusers folder) and a Gemma (a transformers folder) into a TheWorld checkpoint.

    theworld convert --vae nvidia/Cosmos-Predict2-2B-Video2World --gemma google/gemma-2-2b-it --output-dir my-theworld

`python convert_weights.py` takes the same options. Tensors are copied one shard at a time. The output folder is
written atomically: it is either complete or absent.
"""

import argparse
import json
import math
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import AutoencoderKLWan
from huggingface_hub import HfApi
from transformers import (
    AutoTokenizer,
    Gemma3ImageProcessorPil,
    GenerationConfig,
    PreTrainedTokenizerBase,
    SiglipImageProcessorPil,
)

from theworld import TheWorldConfig, TheWorldForConditionalGeneration, TheWorldProcessor
from theworld.checkpoints.atomic import atomic_folder, write_checksums
from theworld.checkpoints.card import write_card
from theworld.checkpoints.reader import Checkpoint, CheckpointError
from theworld.checkpoints.sources import (
    Source,
    add_source_arguments,
    fetch_gemma,
    fetch_vae,
    open_vae,
    read_text_config,
    read_vision_fields,
    read_world_config,
)
from theworld.checkpoints.tensors import plan_conversion, write_shards
from theworld.checkpoints.verify import processor_fields
from theworld.cli import ArgumentParser, run_command
from theworld.encoder_theworld import TheWorldEncoder


# Gemma3Processor's own, which its preprocessor_config.json leaves open (tests/model/test_vision.py compares);
# written out, because the versions of transformers keep them in different places.
PAN_AND_SCAN = {
    "do_convert_rgb": True,
    "do_pan_and_scan": False,
    "pan_and_scan_min_crop_size": 256,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}
# Without an option, images keep their shape, with at most as many pixels as a square of this side; and very small ones
# are enlarged, because the VAE makes one position of 8 x 8 pixels.
DEFAULT_SIDE, MIN_PIXELS = 512, 64 * 64
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HERE = Path(__file__).parent
# The remote code: every checkpoint contains all of it.
MODEL_FILES = tuple(sorted(path.name for path in HERE.glob("*_theworld.py")))


def add_world_tokens(gemma: Source) -> PreTrainedTokenizerBase:
    """
    Gemma's tokenizer with TheWorld's four tokens.

    They replace the first four `<unusedN>` entries, so that the sizes of vocabulary and embedding do not change. If
    there are too few of those, they are appended. The entries are renamed in the text of a copy, because parsing tens
    of megabytes of JSON takes seconds.
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
        unused = sorted(ids, key=ids.__getitem__)
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
    image_size: int | None,
    dtype: str,
    **layout,
) -> TheWorldConfig:
    """The checkpoint's config; `layout` holds the fields that define how a latent becomes tokens."""
    text_config = read_text_config(gemma)
    token_ids = [tokenizer.get_vocab()[token] for token in TheWorldProcessor.world_tokens]
    image_token_id, start_id, end_id, video_token_id = token_ids
    # Gemma 3 1B's tokenizer has one entry more than its embedding has rows; only TheWorld's tokens need rows.
    if max(token_ids) >= text_config.vocab_size:
        text_config.vocab_size = 64 * math.ceil((max(token_ids) + 1) / 64)
    text_config.dtype = dtype
    text_config.name_or_path = ""
    return TheWorldConfig(
        world_config=read_world_config(vae),
        text_config=text_config,
        image_size=(image_size or DEFAULT_SIDE) if layout.get("token_layout") == "channel" else None,
        image_token_id=image_token_id,
        start_of_world_token_id=start_id,
        end_of_world_token_id=end_id,
        video_token_id=video_token_id,
        dtype=dtype,
        architectures=[TheWorldForConditionalGeneration.__name__],
        **layout,
    )


def choose_size(config: TheWorldConfig, image_size: int | None, max_pixels: int | None) -> dict[str, int]:
    """The `size` of the checkpoint's processor; see `convert` for the arguments."""
    if max_pixels is not None and (image_size is not None or config.token_layout == "channel"):
        other = "--token-layout channel" if image_size is None else "--image-size"
        raise CheckpointError(
            f"--max-pixels keeps the shape of each image, and {other} makes all images squares of one size. Give one "
            "of the two."
        )
    if image_size is not None or config.token_layout == "channel":
        side = DEFAULT_SIDE if image_size is None else image_size
        if side < 1 or side % config.patch_size:
            raise CheckpointError(f"--image-size must be a positive multiple of {config.patch_size}, got {side}.")
        return {"height": side, "width": side}
    most = DEFAULT_SIDE**2 if max_pixels is None else max_pixels
    if most < config.patch_size**2:
        raise CheckpointError(f"--max-pixels must be {config.patch_size**2} or more, one world token, got {most}.")
    return {"shortest_edge": min(MIN_PIXELS, most), "longest_edge": most}


def build_processor(
    config: TheWorldConfig, tokenizer: PreTrainedTokenizerBase, size: dict[str, int], gemma: Source
) -> TheWorldProcessor:
    vision_settings = None
    if config.vision_config is not None:
        vision_settings = Gemma3ImageProcessorPil.from_pretrained(gemma.folder).to_dict() | PAN_AND_SCAN
    return TheWorldProcessor(
        SiglipImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        tokenizer,
        chat_template=(HERE / "chat_template.jinja").read_text(),
        vision_settings=vision_settings,
        **processor_fields(config),
    )


def largest_latent_difference(vae: Source, folder: Path, config: TheWorldConfig) -> float:
    """
    The largest difference between the latent mode of the source VAE (diffusers, float32) and of the written encoder.

    Both encode a 64 x 64 picture of two ramps and their product. The VAE's decoder stays on the meta device.
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
    Writes Gemma's generation config, which also suppresses the tokens of images and videos and all appended rows.

    Most appended rows have no token: the embedding is padded to a multiple of 64 rows.
    """
    if (gemma.folder / "generation_config.json").is_file():
        generation_config = GenerationConfig.from_pretrained(gemma.folder)
    else:
        generation_config = GenerationConfig.from_model_config(config.text_config)
    names = ["image_token_id", "start_of_world_token_id", "end_of_world_token_id", "video_token_id"]
    if config.vision_config:
        names += ["vision_token_id", "boi_token_id", "eoi_token_id"]
    suppressed: list[int] = [getattr(config, name) for name in names]
    appended = range(read_text_config(gemma).vocab_size, config.text_config.vocab_size)
    generation_config.suppress_tokens = suppressed + [row for row in appended if row not in suppressed]
    generation_config.save_pretrained(folder)


# Parts of the report, and the prefixes of their tensors.
PARTS: dict[str, tuple[str, ...]] = {
    "world encoder": ("model.world_encoder.",),
    "projection": ("model.world_projection.",),
    "Gemma's vision tower": ("model.vision_tower.", "model.multi_modal_projector."),
    "Gemma": ("model.language_model.", "lm_head."),
}


@dataclass(frozen=True)
class Report:
    """Result of a conversion; its `str` is the table that the command prints."""

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
    image_size: int | None = None,
    max_pixels: int | None = None,
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
        image_size: Height and width, in pixels, that the processor resizes all images to.
        max_pixels: Instead, the most pixels of an image, whose shape is kept. Without either, 512 x 512; with
            `token_layout="channel"`, which reads one size, squares of 512 x 512.
        dtype: Dtype of the written weights, a key of `DTYPES`.
        overwrite: Whether to replace the contents of `output`.
        title: The model's name in its card; by default the folder's name.
        vision: Whether to keep the vision tower of a multimodal Gemma 3, in addition to world tokens.
        layout: `projector_type`, `token_layout`, `latent_merge_size`, `normalize_latents`, `world_attention`,
            `world_first` of [`TheWorldConfig`].

    Raises:
        CheckpointError: If a source is invalid, or `output` is one of the sources.
        FileExistsError: If `output` is not empty, and `overwrite` is False.
        StrictDataclassError: If the fields contradict each other; see [`TheWorldConfig`].
    """
    for source in (vae.folder.resolve(), gemma.folder.resolve()):
        if output.resolve() in (source, *source.parents):
            raise CheckpointError(f"--output-dir {output} would replace the source {source}. Choose another.")

    with atomic_folder(output.absolute(), overwrite) as folder:
        tokenizer = add_world_tokens(gemma)
        layout |= read_vision_fields(gemma, dtype) if vision else {}
        config = build_config(vae, gemma, tokenizer, image_size, dtype, **layout)
        size = choose_size(config, image_size, max_pixels)
        plan = plan_conversion(vae, gemma, config)
        write_shards(folder, plan, DTYPES[dtype])
        config.save_pretrained(folder)
        build_processor(config, tokenizer, size, gemma).save_pretrained(folder)
        write_generation_config(gemma, config, folder)
        for file in MODEL_FILES:
            shutil.copyfile(HERE / file, folder / file)
        write_card(folder, vae, gemma, config, title or output.name)
        report = Report(
            parameters={
                part: count
                for part, prefixes in PARTS.items()
                if (count := sum(shape.numel() for name, shape in plan.shapes.items() if name.startswith(prefixes)))
            },
            dtype=DTYPES[dtype],
            dropped=plan.dropped,
            latent_difference=largest_latent_difference(vae, folder, config),
        )
        write_checksums(folder)
        return report


def check_not_public(repo: str) -> None:
    """Raises a `CheckpointError` if `repo` already exists and is public: the Hub would keep it public."""
    api = HfApi()
    if api.repo_exists(repo) and not api.model_info(repo).private:
        raise CheckpointError(f"{repo} is a public repo already. Make it private on the Hub, or omit --private.")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    description = "Join a Wan VAE and a Gemma into a TheWorld checkpoint."
    parser = ArgumentParser(prog="theworld convert", description=description)
    add = parser.add_argument
    add_source_arguments(parser, required=True)
    add("--output-dir", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--max-pixels", type=int, metavar="PIXELS", help="most pixels of an image, whose shape is kept (512 x 512)")
    add("--image-size", type=int, metavar="PIXELS", help="instead, side of the square that all images become")
    add("--projector-type", choices=["linear", "mlp"], default="linear", help="from latents to Gemma (%(default)s)")
    add(
        "--token-layout",
        choices=["spatial", "channel"],
        default="spatial",
        help="one token per latent position, or per latent channel (%(default)s)",
    )
    add("--latent-merge-size", type=int, default=1, metavar="N", help="merge NxN positions per token (%(default)s)")
    add("--normalize-latents", action="store_true", help="apply (z - mean) / std before the projection")
    add("--vision", action="store_true", help="also keep the vision tower of a multimodal Gemma 3")
    add("--vision-first", action="store_true", help="put an image's vision tokens before its world tokens")
    add(
        "--world-attention",
        choices=["causal", "bidirectional"],
        default="causal",
        help="attention among the world tokens of an image (%(default)s)",
    )
    add("--dtype", choices=list(DTYPES), default="bfloat16", help="dtype of the written weights (%(default)s)")
    add("--push-to-hub", metavar="ORG/NAME", help="upload the finished folder to this Hub repo")
    add("--private", action="store_true", help="with --push-to-hub: create a private repo")
    add("--overwrite", action="store_true", help="replace the contents of --output-dir")
    args = parser.parse_args(arguments)
    if args.private and args.push_to_hub is None:
        parser.error("--private is for the repo that --push-to-hub names")
    return args


def run(arguments: list[str]) -> None:
    """Runs the command with the given command-line arguments."""
    args = parse_arguments(arguments)
    vae = fetch_vae(args.vae, args.vae_revision, args.vae_subfolder)
    gemma = fetch_gemma(args.gemma, args.gemma_revision)
    if args.private:
        check_not_public(args.push_to_hub)
    report = convert(
        vae,
        gemma,
        args.output_dir,
        image_size=args.image_size,
        max_pixels=args.max_pixels,
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
        api.upload_folder(repo_id=args.push_to_hub, folder_path=args.output_dir)


def main(arguments: list[str] | None = None) -> int:
    return run_command("theworld convert", run, arguments)


if __name__ == "__main__":
    sys.exit(main())
