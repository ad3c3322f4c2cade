"""Pins that the bundled model runs where people run models: snippets, pipelines, ways to load and to generate."""

import ast
import re
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch
import transformers
from conftest import chat
from huggingface_hub import ModelCard
from packaging import version
from PIL import Image
from test_user_route import MODEL_FILES
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    DynamicCache,
    TextIteratorStreamer,
    pipeline,
    set_seed,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.helpers.fresh import run_fresh
from theworld.evaluation.scenes import SPLITS, draw_scene
from theworld.versions_theworld import CACHE_NAME


ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
RUN_IT = README.split("\n## Run it\n")[1].split("\n## ")[0]
TRY_IT = README.split("\n## Try it\n")[1].split("\n## ")[0]


def snippet(word: str, section: str = RUN_IT) -> str:
    """The one Python snippet of the README's section that has this word."""
    blocks = re.findall(r"^```python\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE)
    (found,) = (block for block in blocks if word in block)
    return found


def promised(code: str) -> str:
    """What the comment at the end of a snippet says that it prints."""
    return re.search(r"# (.*)\n$", code).group(1)


@pytest.fixture(scope="module")
def model():
    return AutoModel.from_pretrained(ROOT, trust_remote_code=True).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)


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


def as_prompt(question: str) -> str:
    """What the chat template makes of an image and a question."""
    return f"<start_of_turn>user\n<world>{question}<end_of_turn>\n<start_of_turn>model\n"


def test_the_snippets_print_what_they_say(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    namespace = {}
    exec(snippet("AutoModel", TRY_IT), namespace)
    for word in ("pipeline", "TextIteratorStreamer", "conversations"):
        capsys.readouterr()
        exec(snippet(word), namespace)
        assert capsys.readouterr().out.strip() == promised(snippet(word)), word


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_pipeline_reads_chats_one_by_one_and_in_batches(pipe, scenes, batch_size):
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


def test_a_pipeline_answers_text_alone_and_goes_on_with_its_own_chat(pipe, model, processor, scenes):
    scene = scenes[0]
    first, second = (question.text for question in scene.questions[:2])
    (answered,) = pipe(text=as_chat(None, first))
    assert answered["generated_text"][-1]["role"] == "assistant" and answered["generated_text"][-1]["content"]

    (answered,) = pipe(text=as_chat(scene.image, first))
    (going_on,) = pipe(text=[*answered["generated_text"], *as_chat(None, second)], return_full_text=False)
    inputs = chat(processor, scene.image, first, answered["generated_text"][-1]["content"], second)
    assert going_on["generated_text"] == new_text(processor, inputs, model.generate(**inputs))[0]


def test_a_streamer_gets_the_answer_in_pieces(model, processor, scenes):
    question = next(question for scene in scenes for question in scene.questions if question.kind == "relation")
    scene = next(scene for scene in scenes if question in scene.questions)
    inputs = chat(processor, scene.image, question.text)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    model.generate(**inputs, streamer=streamer)
    pieces = [piece for piece in streamer if piece]
    assert len(pieces) > 1 and "".join(pieces).strip() == question.answer


def test_the_cards_widget_shows_a_right_answer(pipe):
    for example in ModelCard.load(ROOT / "README.md").data.widget:
        with Image.open(ROOT / example["src"]) as image:
            (answered,) = pipe(text=as_chat(image, example["text"]), return_full_text=False)
        assert answered["generated_text"] == example["output"]["text"]


def test_samples_come_from_the_image(model, processor, scenes):
    set_seed(0)
    right = total = 0
    for scene in scenes:
        inputs = chat(processor, scene.image, scene.questions[0].text)
        output = model.generate(**inputs, do_sample=True, num_return_sequences=4)
        right += new_text(processor, inputs, output).count(scene.questions[0].answer)
        total += len(output)
    assert right / total > 0.9


def test_its_own_gemma_assists_or_is_refused(model, processor, scenes):
    """The draft is made blind, so it is often wrong; the answer is the same all the same."""
    gemma = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    gemma.model.load_state_dict(model.model.language_model.state_dict())
    for scene in scenes[:4]:
        inputs = chat(processor, scene.image, scene.questions[0].text)
        if version.parse(transformers.__version__) >= version.parse("5.19"):
            assert torch.equal(model.generate(**inputs, assistant_model=gemma), model.generate(**inputs))
        else:
            with pytest.raises(ValueError, match="mm_encoder_outputs"):
                model.generate(**inputs, assistant_model=gemma)


def test_a_theworld_does_not_assist(model, processor, scenes):
    """`generate` hands an assistant no images."""
    inputs = chat(processor, scenes[0].image, scenes[0].questions[0].text)
    with pytest.raises(ValueError, match="`<world>` places but no image came"):
        model.generate(**inputs, assistant_model=model)


def test_generate_returns_attentions_and_hidden_states(processor, scenes):
    model = AutoModel.from_pretrained(ROOT, trust_remote_code=True, attn_implementation={"text_config": "eager"})
    inputs = chat(processor, scenes[0].image, scenes[0].questions[0].text)
    output = model.generate(
        **inputs, return_dict_in_generate=True, output_attentions=True, output_hidden_states=True, max_new_tokens=2
    )
    text, length = model.config.text_config, inputs["input_ids"].shape[1]
    prompt, first = output.attentions
    assert len(prompt) == text.num_hidden_layers and prompt[0].shape == (1, text.num_attention_heads, length, length)
    assert first[0].shape == (1, text.num_attention_heads, 1, length + 1)
    assert output.hidden_states[0][-1].shape == (1, length, text.hidden_size)


def test_in_float16_it_answers_right(processor, scenes):
    model = AutoModel.from_pretrained(ROOT, trust_remote_code=True, dtype=torch.float16)
    for scene in scenes:
        inputs = chat(processor, scene.image, scene.questions[0].text)
        assert new_text(processor, inputs, model.generate(**inputs)) == [scene.questions[0].answer]


@pytest.mark.parametrize(
    "memory, devices",
    [("1GB", {"cpu"}), ("5MB", {"cpu", "meta"}), ("3MB", {"meta"})],
    ids=["memory", "memory and disk", "disk"],
)
def test_device_map_auto_puts_on_the_disk_what_memory_does_not_hold(
    memory, devices, model, processor, scenes, tmp_path
):
    spread = AutoModel.from_pretrained(
        ROOT, trust_remote_code=True, device_map="auto", max_memory={"cpu": memory}, offload_folder=tmp_path
    )
    assert {parameter.device.type for parameter in spread.parameters()} == devices
    for scene in scenes[:2]:
        inputs = chat(processor, scene.image, scene.questions[0].text)
        assert torch.equal(spread.generate(**inputs), model.generate(**inputs))


def test_a_conversation_encodes_each_image_once(model, processor, scenes):
    """With a cache, a turn brings the images that are new in it, and only those."""
    images_encoded = []
    handle = model.model.world_encoder.register_forward_hook(
        lambda _module, arguments, _latents: images_encoded.append(len(arguments[0]))
    )
    turns = [
        (scenes[0].image, scenes[0].questions[0].text),
        (None, scenes[0].questions[1].text),
        (scenes[1].image, scenes[1].questions[0].text),
        (None, scenes[1].questions[1].text),
    ]
    cache, messages, length = DynamicCache(config=model.config.text_config), [], 0
    for image, question in turns:
        messages += as_chat(image, question)
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        pixel_values = inputs.pop("pixel_values")
        new = {"pixel_values": pixel_values[-1:]} if image else {}
        output = model.generate(**inputs, **new, **{CACHE_NAME: cache})
        cached = images_encoded.copy()
        assert torch.equal(output, model.generate(**inputs, pixel_values=pixel_values))  # all read anew
        images_encoded[:] = cached
        length = inputs["input_ids"].shape[1]
        answer = processor.decode(output[0, length:], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    handle.remove()
    assert images_encoded == [1, 1]


def test_the_remote_files_import_only_what_they_need():
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


def test_loading_the_model_imports_nothing_for_pictures_training_or_the_web(tmp_path):
    code = """
import sys
from transformers import AutoModel, AutoProcessor
AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
print(*sorted({"gradio", "matplotlib", "trl", "datasets", "torchvision", "tqdm.notebook"} & set(sys.modules)))
"""
    assert run_fresh("-c", code, ROOT, cache=tmp_path).strip() == ""


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


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"world_attention": "bidirectional"}, "`world_attention='bidirectional'`"),
        ({"text_config": {"use_bidirectional_attention": True}}, "`use_bidirectional_attention`"),
    ],
)
def test_an_engine_is_refused_what_it_would_mask_causally(engine, fields, named):
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True, **fields)
    assert type(AutoModel.from_config(config, trust_remote_code=True)).__name__ == "TheWorldForConditionalGeneration"
    with pytest.raises(ValueError, match=f"A serving engine masks causally, but this model.*{named}"):
        AutoModel.from_config(config, trust_remote_code=True, attn_implementation=engine)
