# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""Names, when it is imported, a transformers or diffusers that TheWorld was not tested with."""

import warnings
from importlib.metadata import version

from packaging.version import Version


# The oldest that works, and the first that was not tested; as in pyproject.toml.
TESTED = {"transformers": ("5.17", "5.24"), "diffusers": ("0.36", "0.43")}


def check_versions() -> None:
    """
    Compares what is installed with `TESTED`.

    Warns of a newer one, which often works. Raises an ImportError for an older one, which lacks what TheWorld imports,
    or computes other numbers (transformers before 5.16 scales embeddings twice).
    """
    for package, (oldest, untested) in TESTED.items():
        installed = Version(version(package))
        remedy = f"`pip install '{package}>={oldest},<{untested}'` gets one that was."
        if installed < Version(oldest):
            raise ImportError(f"TheWorld was not tested with {package} {installed}, and needs a later one. {remedy}")
        if installed.release >= Version(untested).release:
            warnings.warn(f"TheWorld was not tested with {package} {installed}. {remedy}", stacklevel=2)


check_versions()
