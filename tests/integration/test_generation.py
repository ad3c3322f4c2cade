"""Tests that the bundled model runs where people run models: pipelines, ways to load, ways to generate."""

import ast
import re
import sys
from importlib.metadata import requires

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from packaging import version
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    TextIteratorStreamer,
    pipeline,
    set_seed,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.helpers import ROOT
from tests.helpers.fresh import run_fresh
from tests.helpers.generation import as_prompt, chat, chat_inputs
from theworld.convert_weights import MODEL_FILES
from theworld.evaluation.scenes import SPLITS, draw_scene
from theworld.versions_theworld import CACHE_NAME


@pytest.fixture(scope="module")
def pipe():
    return pipeline("image-text-to-text", model=str(ROOT), trust_remote_code=True)


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(seed) for seed in SPLITS["test"][:8]]


def new_text(processor, inputs, output) -> list[str]:
    return [
        text.strip()
        for text in processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ]


def as_chat(image: Image.Image | None, question: str) -> list[dict]:
    content = [{"type": "image", "image": image}] if image else []
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_pipeline_reads_chats_alone_and_in_batches(pipe, scenes, batch_size):
    asked = [(scene.image, scene.questions[0]) for scene in scenes]
    chats = [as_chat(image, question.text) for image, question in asked]
    answers = pipe(text=chats, return_full_text=False, batch_size=batch_size)
    assert [answer[0]["generated_text"] for answer in answers] == [question.answer for _, question in asked]


def test_a_pipeline_reads_images_and_text(pipe, scenes, tmp_path):
    asked = [(scene.image, as_prompt(scene.questions[0].text), scene.questions[0].answer) for scene in scenes]
    images, prompts, right = map(list, zip(*asked, strict=True))
    assert [each["generated_text"] for each in pipe(images=images, text=prompts, return_full_text=False)] == right
    images[0].save(tmp_path / "scene.png")
    (from_file,) = pipe(images=str(tmp_path / "scene.png"), text=prompts[0], return_full_text=False)
    assert from_file["generated_text"] == right[0]


def test_a_pipeline_answers_text_and_continues_its_chat(pipe, bundled_model, bundled_processor, scenes):
    scene = scenes[0]
    first, second = (question.text for question in scene.questions[:2])
    (answered,) = pipe(text=as_chat(None, first))
    assert answered["generated_text"][-1]["role"] == "assistant" and answered["generated_text"][-1]["content"]

    (answered,) = pipe(text=as_chat(scene.image, first))
    (going_on,) = pipe(text=[*answered["generated_text"], *as_chat(None, second)], return_full_text=False)
    inputs = chat(bundled_processor, scene.image, first, answered["generated_text"][-1]["content"], second)
    assert going_on["generated_text"] == new_text(bundled_processor, inputs, bundled_model.generate(**inputs))[0]


def test_a_streamer_gets_the_answer_in_pieces(bundled_model, bundled_processor, scenes):
    question = next(question for scene in scenes for question in scene.questions if question.kind == "relation")
    scene = next(scene for scene in scenes if question in scene.questions)
    inputs = chat(bundled_processor, scene.image, question.text)
    streamer = TextIteratorStreamer(
        bundled_processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60
    )
    bundled_model.generate(**inputs, streamer=streamer)
    pieces = [piece for piece in streamer if piece]
    assert len(pieces) > 1 and "".join(pieces).strip() == question.answer


def test_the_cards_widget_shows_a_right_answer(pipe):
    for example in ModelCard.load(ROOT / "README.md").data.widget:
        with Image.open(ROOT / example["src"]) as image:
            (answered,) = pipe(text=as_chat(image, example["text"]), return_full_text=False)
        assert answered["generated_text"] == example["output"]["text"]


def test_samples_come_from_the_image(bundled_model, bundled_processor, scenes):
    set_seed(0)
    right = total = 0
    for scene in scenes:
        inputs = chat(bundled_processor, scene.image, scene.questions[0].text)
        output = bundled_model.generate(**inputs, do_sample=True, num_return_sequences=4)
        right += new_text(bundled_processor, inputs, output).count(scene.questions[0].answer)
        total += len(output)
    assert right / total > 0.9


def test_gemma_assists_or_is_rejected(bundled_model, bundled_processor, scenes):
    """The draft is made without the image and is often wrong; the answer is the same."""
    gemma = AutoModelForCausalLM.from_config(bundled_model.config.text_config).eval()
    gemma.model.load_state_dict(bundled_model.model.language_model.state_dict())
    for scene in scenes[:4]:
        inputs = chat(bundled_processor, scene.image, scene.questions[0].text)
        if version.parse(transformers.__version__) >= version.parse("5.19"):
            assert torch.equal(
                bundled_model.generate(**inputs, assistant_model=gemma), bundled_model.generate(**inputs)
            )
        else:
            with pytest.raises(ValueError, match="mm_encoder_outputs"):
                bundled_model.generate(**inputs, assistant_model=gemma)


def test_theworld_is_rejected_as_an_assistant(bundled_model, bundled_processor, scenes):
    """`generate` passes no images to an assistant."""
    inputs = chat(bundled_processor, scenes[0].image, scenes[0].questions[0].text)
    with pytest.raises(ValueError, match="`<world>` placeholders but no image is given"):
        bundled_model.generate(**inputs, assistant_model=bundled_model)


def test_generate_returns_attentions_and_hidden_states(bundled_processor, scenes):
    model = AutoModel.from_pretrained(ROOT, trust_remote_code=True, attn_implementation={"text_config": "eager"})
    inputs = chat(bundled_processor, scenes[0].image, scenes[0].questions[0].text)
    output = model.generate(
        **inputs, return_dict_in_generate=True, output_attentions=True, output_hidden_states=True, max_new_tokens=2
    )
    text, length = model.config.text_config, inputs["input_ids"].shape[1]
    prompt, first = output.attentions
    assert len(prompt) == text.num_hidden_layers and prompt[0].shape == (1, text.num_attention_heads, length, length)
    assert first[0].shape == (1, text.num_attention_heads, 1, length + 1)
    assert output.hidden_states[0][-1].shape == (1, length, text.hidden_size)


def test_float16_answers_right(bundled_processor, scenes):
    model = AutoModel.from_pretrained(ROOT, trust_remote_code=True, dtype=torch.float16)
    for scene in scenes:
        inputs = chat(bundled_processor, scene.image, scene.questions[0].text)
        assert new_text(bundled_processor, inputs, model.generate(**inputs)) == [scene.questions[0].answer]


@pytest.mark.parametrize(
    "memory, devices",
    [("1GB", {"cpu"}), ("5MB", {"cpu", "meta"}), ("3MB", {"meta"})],
    ids=["memory", "memory and disk", "disk"],
)
def test_device_map_auto_offloads_to_disk_with_equal_answers(
    memory, devices, bundled_model, bundled_processor, scenes, tmp_path
):
    spread = AutoModel.from_pretrained(
        ROOT, trust_remote_code=True, device_map="auto", max_memory={"cpu": memory}, offload_folder=tmp_path
    )
    assert {parameter.device.type for parameter in spread.parameters()} == devices
    for scene in scenes[:2]:
        inputs = chat(bundled_processor, scene.image, scene.questions[0].text)
        assert torch.equal(spread.generate(**inputs), bundled_model.generate(**inputs))


def test_a_conversation_encodes_each_image_once(bundled_model, bundled_processor, scenes):
    """With a cache, a turn passes only its new images."""
    images_encoded = []
    handle = bundled_model.model.world_encoder.register_forward_hook(
        lambda _module, arguments, _latents: images_encoded.append(len(arguments[0]))
    )
    turns = [
        (scenes[0].image, scenes[0].questions[0].text),
        (None, scenes[0].questions[1].text),
        (scenes[1].image, scenes[1].questions[0].text),
        (None, scenes[1].questions[1].text),
    ]
    cache, messages, length = DynamicCache(config=bundled_model.config.text_config), [], 0
    for image, question in turns:
        messages += as_chat(image, question)
        inputs = chat_inputs(bundled_processor, messages)
        pixel_values = inputs.pop("pixel_values")
        new = {"pixel_values": pixel_values[-1:]} if image else {}
        output = bundled_model.generate(**inputs, **new, **{CACHE_NAME: cache})
        cached = images_encoded.copy()
        assert torch.equal(output, bundled_model.generate(**inputs, pixel_values=pixel_values))  # all read anew
        images_encoded[:] = cached
        length = inputs["input_ids"].shape[1]
        answer = bundled_processor.decode(output[0, length:], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    handle.remove()
    assert images_encoded == [1, 1]


def test_remote_code_imports_required_libraries_only():
    allowed = {"torch", "transformers", "diffusers", "PIL", "huggingface_hub"} | set(sys.stdlib_module_names)
    for name, by in {
        "numpy": "transformers",
        "packaging": "transformers",
        "safetensors": "transformers",
        "jinja2": "torch",
    }.items():
        assert any(re.match(rf"{name}\b(?!.*extra)", requirement, re.IGNORECASE) for requirement in requires(by))
        allowed.add(name)
    for name in MODEL_FILES:
        code = ast.parse((ROOT / name).read_text())
        tried = [each for node in ast.walk(code) if isinstance(node, ast.Try) for each in node.body]
        for node in ast.walk(code):
            if isinstance(node, ast.Import):
                imported = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported = {node.module.split(".")[0]}
            else:
                continue
            # PyAV is imported where it is used, in a `try` that says how to install it.
            assert imported <= (allowed | {"av"} if node in tried else allowed), (name, imported)


def test_loading_imports_no_training_plotting_or_web_library(tmp_path):
    code = """
import sys
from transformers import AutoModel, AutoProcessor
AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
print(*sorted({"gradio", "matplotlib", "trl", "datasets", "torchvision", "tqdm.notebook"} & set(sys.modules)))
"""
    assert run_fresh("-c", code, ROOT, cache=tmp_path).strip() == ""


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_engines_get_the_model_without_a_head(engine, monkeypatch):
    """Users get the model that generates."""
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


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"world_attention": "bidirectional"}, "`world_attention='bidirectional'`"),
        ({"text_config": {"use_bidirectional_attention": True}}, "`use_bidirectional_attention`"),
    ],
)
def test_engines_reject_bidirectional_checkpoints(engine, fields, named):
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True, **fields)
    assert type(AutoModel.from_config(config, trust_remote_code=True)).__name__ == "TheWorldForConditionalGeneration"
    with pytest.raises(ValueError, match=f"A serving engine masks causally, but this model.*{named}"):
        AutoModel.from_config(config, trust_remote_code=True, attn_implementation=engine)
