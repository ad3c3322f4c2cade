"""Pins that the bundled model runs where people run models: snippets, pipelines, ways to load and to generate."""

import re
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


ROOT = Path(__file__).parent.parent
RUN_IT = (ROOT / "README.md").read_text().split("\n## Run it\n")[1].split("\n## ")[0]


def snippet(word: str) -> str:
    """The one Python snippet of the README's section that has this word."""
    blocks = re.findall(r"^```python\n(.*?)^```", RUN_IT, flags=re.DOTALL | re.MULTILINE)
    (found,) = (block for block in blocks if word in block)
    return found


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_engine_gets_the_model_without_a_head_and_users_the_one_that_generates(engine, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, engine, sdpa_attention_forward)
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    users = AutoModel.from_config(config, trust_remote_code=True)
    assert type(users).__name__ == "TheWorldForConditionalGeneration"
    # SGLang names its attention in the call, vLLM in the config before it.
    by_call = AutoModel.from_config(config, trust_remote_code=True, attn_implementation=engine)
    config.text_config._attn_implementation = engine
    by_config = AutoModel.from_config(config, trust_remote_code=True)
    for engines in (by_call, by_config):
        assert type(engines).__name__ == "TheWorldModel"
        assert engines.language_model.config._attn_implementation == engine
        assert not any("lm_head" in name for name, _ in engines.named_parameters())
