# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Checks library versions on import, and hides the differences between versions of transformers.

All other files are written for the newest version.
"""

import inspect
import warnings
from collections.abc import Callable
from functools import wraps
from importlib.metadata import version

from packaging.version import Version


# The oldest and the newest version that the tests run with.
TESTED = {"transformers": ("5.17", "5.24"), "diffusers": ("0.36", "0.42")}
# transformers 5.24 renamed the argument and output `past_key_values`; it accepts the old name until 5.40.
OLD_CACHE_NAME = "past_key_values"
CACHE_NAME = "cache" if Version(version("transformers")) >= Version("5.24.0.dev0") else OLD_CACHE_NAME


def check_versions() -> None:
    """
    Compares the installed versions with `TESTED`.

    Warns about newer versions, which usually work. Raises an ImportError for older ones: they lack what TheWorld
    imports, or give different numbers (transformers before 5.16 scales embeddings twice).
    """
    for package, (oldest, newest) in TESTED.items():
        installed = Version(version(package))
        tested = f"TheWorld was tested with {package} {oldest} to {newest}, and {installed} is installed"
        if installed < Version(oldest):
            raise ImportError(f"{tested}. Run `pip install --upgrade '{package}>={oldest}'`.")
        if installed.release[:2] > Version(newest).release:
            warnings.warn(f"{tested}. If something fails, try `pip install '{package}=={newest}.*'`.", stacklevel=2)


check_versions()

from transformers import masking_utils  # noqa: E402
from transformers.utils.deprecation import deprecate_kwarg  # noqa: E402


def takes_cache(function: Callable) -> Callable:
    """Lets a function of transformers take `cache` on older versions too, where it has the old name."""
    if CACHE_NAME == "cache":
        return function

    @wraps(function)
    def renamed(*args, cache, **kwargs):
        return function(*args, **{CACHE_NAME: cache}, **kwargs)

    return renamed


def accepts_past_key_values(method: Callable) -> Callable:
    """
    Lets a method with an argument `cache` also accept it as `past_key_values`.

    On older versions `generate` passes `past_key_values` and looks for it in the signature.
    """
    if CACHE_NAME == "cache":
        return deprecate_kwarg(OLD_CACHE_NAME, version="5.40.0", new_name="cache")(method)
    signature = inspect.signature(method)

    @wraps(method)
    def renamed(*args, **kwargs):
        if OLD_CACHE_NAME in kwargs:
            if kwargs.get("cache") is not None:
                raise ValueError("Give the cache once: as `cache` or as `past_key_values`.")
            kwargs["cache"] = kwargs.pop(OLD_CACHE_NAME)
        return method(*args, **kwargs)

    parameters = signature.parameters.values()
    renamed.__signature__ = signature.replace(  # type: ignore[attr-defined] # `inspect.signature` reads it
        parameters=[each.replace(name=OLD_CACHE_NAME) if each.name == "cache" else each for each in parameters]
    )
    return renamed


create_causal_mask = takes_cache(masking_utils.create_causal_mask)
create_sliding_window_causal_mask = takes_cache(masking_utils.create_sliding_window_causal_mask)
create_masks_for_generate = takes_cache(masking_utils.create_masks_for_generate)
