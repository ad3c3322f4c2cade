# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Trains a model like the bundled one from scratch, and the models that it is compared with.

    python -m recipe.pipeline

Finished stages are kept in `build/recipe`, one folder per model. An interrupted stage resumes from its last
checkpoint. At the end the model's files are copied to the repo's root, and the curves to `results`.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from theworld.checkpoints.atomic import atomic_folder
from theworld.checkpoints.sources import Source
from theworld.convert_weights import convert
from theworld.evaluation.scenes import SIZE

from . import align, gemma, vae, video
from .figures import draw_curves


ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "build" / "recipe"
RESULTS = ROOT / "results"
# Files of `save_pretrained`, except the code and the chat template, which are in the repo already.
BUNDLED_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


@dataclass(frozen=True)
class Length:
    """Steps of each stage, and the numbers of scenes and clips with cached latents."""

    vae: int = 4000
    gemma: int = 800
    scenes: int = 30_000
    align: int = 6000
    fine_tune: int = 2000
    motion: int = 500
    clips: int = 6000
    watch: int = 9800

    @property
    def all_scenes(self) -> int:
        """The number of training scenes that any stage uses: the first ones of the split."""
        return max(
            self.vae * vae.BATCH_SIZE,
            self.gemma * gemma.BATCH_SIZE,
            self.scenes + self.fine_tune * align.BATCH_SIZE,
        )

    @property
    def all_clips(self) -> int:
        """The number of training clips that any stage uses."""
        return max(self.motion * video.BATCH_SIZE, self.clips)


def train_all(folder: Path, length: Length) -> None:
    """Runs every stage without a result in `folder`."""

    def cached(name: str, make: Callable[[Path], None]) -> Path:
        """The file of cached latents."""
        if not (file := folder / f"{name}.safetensors").exists():
            make(file)
        return file

    def result(name: str, make: Callable[[Path], tuple]) -> Path:
        """The folder of a stage's result; `make` takes a folder for checkpoints and returns the parts to save."""
        if not (folder / name).exists():
            parts = make(folder / "runs" / name)
            with atomic_folder(folder / name, overwrite=False) as unfinished:
                for part in parts:
                    part.save_pretrained(unfinished)
            draw_curves(folder / "runs", folder / "curves.png")
        return folder / name

    def joined(latent_merge_size: int) -> Path:
        output = folder / f"joined-{latent_merge_size}"
        if not output.exists():
            options = {"projector_type": "mlp", "normalize_latents": True, "latent_merge_size": latent_merge_size}
            sources = Source(vae_folder, "vae"), Source(gemma_folder, "gemma")
            convert(*sources, output, image_size=SIZE, dtype="float32", **options)
        return output

    vae_folder = result("vae", lambda run: vae.train_vae(run, length.vae))
    gemma_folder = result("gemma", lambda run: gemma.train_gemma(run, length.gemma))
    cache = cached("latents", lambda file: align.cache_latents(joined(1), vae.pixels_of, length.scenes, file))
    frozen = result("theworld-frozen", lambda run: align.align(joined(1), cache, run, length.align))
    tuned = result("theworld-images", lambda run: align.fine_tune(frozen, length.scenes, run, length.fine_tune))
    result("theworld-merged", lambda run: align.align(joined(2), cache, run, length.align))

    motion = result("motion", lambda run: video.see_motion(tuned, run, length.motion))
    # The encoder has changed, so latents are cached again.
    scenes = cached("latents-scenes", lambda file: align.cache_latents(motion, vae.pixels_of, 2 * length.clips, file))
    clips = cached("latents-clips", lambda file: align.cache_latents(motion, video.frames_of, length.clips, file))
    result("theworld", lambda run: video.watch(motion, scenes, clips, run, length.watch))


def install(recipe: Path) -> None:
    """Copies the model and the curves to their places in the repo."""
    for file in BUNDLED_FILES:
        shutil.copyfile(recipe / "theworld" / file, ROOT / file)
    RESULTS.mkdir(exist_ok=True)
    shutil.copyfile(recipe / "curves.png", RESULTS / "curves.png")


if __name__ == "__main__":
    train_all(RECIPE, Length())
    install(RECIPE)
