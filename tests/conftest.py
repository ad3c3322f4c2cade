"""Fixtures: small sources in real formats, the checkpoints converted from them, and no network."""

import functools
import os
import tempfile


# Before transformers is imported: an empty cache, so that no test depends on a developer's downloads.
CACHE = tempfile.TemporaryDirectory(prefix="theworld-tests-")
os.environ |= {
    "HF_HOME": CACHE.name,
    "HF_MODULES_CACHE": f"{CACHE.name}/modules",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Also for the processes that tests start; 1 if other work runs at the same time.
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
}

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, Gemma3Processor  # noqa: E402


pytest.register_assert_rewrite("tests.helpers")
from tests.helpers import ROOT  # noqa: E402
from tests.helpers.checkpoints import TEXT_CONFIGS, make_gemma, make_multimodal_gemma, make_pipeline  # noqa: E402
from theworld import convert_weights  # noqa: E402
from theworld.evaluation.scenes import SPLITS, draw_scene  # noqa: E402


@pytest.fixture(autouse=True)
def compiler_that_remembers_nothing(request):
    """Resets dynamo: code that earlier tests compiled counts towards its limit, after which it stops compiling."""
    if "compil" in request.node.name:  # compiles, compilation
        torch.compiler.reset()


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> Path:
    """A folder with `pipeline` (a diffusers pipeline that has a `vae`) and a Gemma of each family."""
    folder = tmp_path_factory.mktemp("sources")
    make_pipeline(folder / "pipeline")
    for family, config in TEXT_CONFIGS.items():
        make_gemma(folder / family, config)
    return folder


@pytest.fixture(scope="session")
def convert(sources, tmp_path_factory):
    """Runs `theworld convert` on the sources; the same options give the same folder."""
    folders = {}

    def run(family: str = "gemma2", *options: str) -> Path:
        key = (family, *options)
        if key not in folders:
            folder = tmp_path_factory.mktemp("converted") / "theworld"
            arguments = ["--vae", str(sources / "pipeline"), "--gemma", str(sources / family)]
            defaults = ["--output-dir", str(folder), "--dtype", "float32"]
            defaults += [] if "--max-pixels" in options else ["--image-size", "64"]
            assert convert_weights.main([*arguments, *defaults, *options]) == 0
            folders[key] = folder
        return folders[key]

    return run


@pytest.fixture(scope="session")
def gemma_folder(tmp_path_factory) -> Path:
    """A Gemma 3 with its vision tower."""
    return make_multimodal_gemma(tmp_path_factory.mktemp("multimodal") / "gemma3")


@pytest.fixture
def gemma(gemma_folder):
    """Gemma 3's own class, for the expected numbers."""
    return AutoModelForImageTextToText.from_pretrained(gemma_folder).eval()


@pytest.fixture
def gemma_processor(gemma_folder):
    return Gemma3Processor.from_pretrained(gemma_folder)


@pytest.fixture(scope="session")
def convert_whole(sources, gemma_folder, tmp_path_factory):
    """Converts the Gemma 3 with its vision tower; the same options give the same folder."""

    @functools.cache
    def run(*options: str) -> Path:
        folder = tmp_path_factory.mktemp("whole") / "theworld"
        arguments = ["--vae", str(sources / "pipeline"), "--gemma", str(gemma_folder), "--output-dir", str(folder)]
        defaults = ["--image-size", "64", "--dtype", "float32", "--vision"]
        assert convert_weights.main([*arguments, *defaults, *options]) == 0
        return folder

    return run


@pytest.fixture(scope="session", params=list(TEXT_CONFIGS))
def checkpoint(request, convert) -> Path:
    """A converted folder, for each Gemma family."""
    return convert(request.param)


@pytest.fixture
def model(checkpoint):
    return AutoModel.from_pretrained(checkpoint, trust_remote_code=True).eval()


@pytest.fixture
def processor(checkpoint):
    return AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)


@pytest.fixture(scope="session")
def bundled_model():
    """The model in the repo's root. It is shared: a test that changes it loads its own."""
    return AutoModel.from_pretrained(ROOT, trust_remote_code=True).eval()


@pytest.fixture(scope="session")
def bundled_processor():
    """The processor in the repo's root. It is shared: a test that changes it loads its own."""
    return AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    return Image.open(ROOT / "assets" / "grace_hopper.jpg")


@pytest.fixture(scope="session")
def shown_scene():
    """The scene of `assets/scene.png`."""
    return draw_scene(SPLITS["test"][0])
