# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""The model card of a converted checkpoint."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from theworld import TheWorldConfig
from theworld.checkpoints.sources import Source


TEMPLATE = Path(__file__).with_name("model_card_template.md")


def write_card(folder: Path, vae: Source, gemma: Source, config: TheWorldConfig, title: str) -> None:
    """Writes README.md: the sources of the weights, their terms, and a snippet that loads the model."""
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
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=title,
        unit=unit,
        origins=origins,
        vision_tokens=config.mm_tokens_per_image if config.vision_config is not None else None,
    )
    card.save(folder / "README.md")
