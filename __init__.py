# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""TheWorld as an installed package: importing it registers the classes, so that no remote code is needed."""

# First: it names a transformers that lacks what follows.
from .versions_theworld import TESTED  # noqa: F401 # isort: skip

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from .configuration_theworld import TheWorldConfig, TheWorldEncoderConfig
from .modeling_theworld import TheWorldForConditionalGeneration, TheWorldModel, TheWorldPreTrainedModel
from .processing_theworld import TheWorldProcessor


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
]
