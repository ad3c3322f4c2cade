# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""TheWorld as an installed package. Importing it registers the Auto classes, so `trust_remote_code` is not needed."""

# Must be the first import: fails clearly if transformers is too old.
from .versions_theworld import TESTED  # noqa: F401 # isort: skip

from importlib.metadata import version

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from .configuration_theworld import TheWorldConfig, TheWorldEncoderConfig
from .encoder_theworld import VideoCache
from .modeling_theworld import TheWorldForConditionalGeneration, TheWorldModel, TheWorldPreTrainedModel
from .processing_theworld import TheWorldProcessor


__version__ = version("theworld")

AutoConfig.register(TheWorldConfig.model_type, TheWorldConfig)
for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto_class.register(TheWorldConfig, TheWorldForConditionalGeneration)
AutoProcessor.register(TheWorldConfig, TheWorldProcessor)

__all__ = [
    "TheWorldConfig",
    "TheWorldEncoderConfig",
    "TheWorldForConditionalGeneration",
    "TheWorldModel",
    "TheWorldPreTrainedModel",
    "TheWorldProcessor",
    "VideoCache",
]
