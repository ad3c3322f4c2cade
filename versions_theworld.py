# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""Says in one line, when it is imported, that a library is too old, or newer than what TheWorld is tested with."""

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
        remedy = f"`pip install '{package}>={oldest},<{untested}'` gives one that is."
        if installed < Version(oldest):
            raise ImportError(f"TheWorld needs {package} {oldest} or later, got {installed}. {remedy}")
        if installed.release >= Version(untested).release:
            warnings.warn(f"TheWorld was not tested with {package} {installed}. {remedy}", stacklevel=2)


check_versions()
