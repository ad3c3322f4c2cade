"""Tests that an answer depends on the question and the picture alone: not on threads, batches, padding or kernels."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModel, AutoProcessor, set_seed

from tests.helpers.fresh import load_fresh
from tests.helpers.generation import THREADS, answer, chat
from theworld.evaluation.scenes import SPLITS, draw_scene


@pytest.fixture(scope="module")
def bundled(bundled_model, bundled_processor):
    return bundled_model, bundled_processor


@pytest.fixture(scope="module")
def asked() -> list[tuple]:
    """All questions of four scenes, with their pictures."""
    scenes = [draw_scene(seed) for seed in SPLITS["test"][:4]]
    return [(scene.image, question.text) for scene in scenes for question in scene.questions]


@pytest.fixture(scope="module")
def alone(bundled, asked) -> list[str]:
    return [answer(*bundled, each)[0] for each in asked]


def test_the_answers_differ_from_each_other(alone):
    assert len(alone) > 20 and len(set(alone)) > 8


def test_threads_sharing_a_model_get_equal_answers(bundled, asked, alone):
    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(lambda each: answer(*bundled, each)[0], asked)) == alone


# Some ask for padding, some for truncation, some for neither; in one object of Rust these are settings that all share.
CALLS = (
    {},
    {"padding": True, "return_tensors": "pt"},
    {"padding": "max_length", "max_length": 300, "padding_side": "right"},
    {"text_kwargs": {"padding": True, "pad_to_multiple_of": 64}},
    {"truncation": True, "max_length": 4},
    {"truncation": True, "max_length": 4, "padding": True, "return_offsets_mapping": True, "return_tensors": "pt"},
)


def process(processor, picture, question: str, options: dict) -> dict[str, torch.Tensor]:
    """What a processor makes of a short and a longer prompt, about a picture where nothing is truncated."""
    texts = [f"<world>{question}", f"<world>{question} Or is it not?"]
    if options.get("truncation"):
        return processor(text=[text.removeprefix("<world>") for text in texts], **options)
    return processor(text=texts, images=[[picture], [picture]], **options)


def test_threads_sharing_a_processor_get_equal_inputs(bundled, asked):
    _, processor = bundled
    work = [(*each, CALLS[number % len(CALLS)]) for number, each in enumerate(asked * 20)]
    alone = [process(processor, *each) for each in work]
    with ThreadPoolExecutor(THREADS) as pool:
        streamed = [pool.submit(processor.batch_decode, [[5] * 4096] * 8) for _ in range(50)]
        together = list(pool.map(lambda each: process(processor, *each), work))
    assert all(future.result() for future in streamed)
    assert [str(inputs) for inputs in together] == [str(inputs) for inputs in alone]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", CALLS)
def test_truncation_and_padding_equal_the_tokenizers(bundled, side, options):
    _, processor = bundled
    tokenizer = copy.deepcopy(processor.tokenizer)
    texts = ["What is it?", "Where is the blue circle from the star?"]
    tokenizer.truncation_side = side
    ours = copy.copy(processor)
    ours.tokenizer = copy.deepcopy(tokenizer)
    expected, got = tokenizer(texts, **options.get("text_kwargs", options)), ours(text=texts, **options)
    assert expected.keys() == got.keys() and str(dict(expected)) == str(dict(got))


@pytest.mark.parametrize("size", [2, 5, 16])
def test_a_batch_has_the_answers_of_single_prompts(bundled, asked, alone, size):
    batches = [asked[start : start + size] for start in range(0, len(asked), size)]
    assert [text for batch in batches for text in answer(*bundled, *batch)] == alone


@torch.no_grad()
def test_padding_on_either_side_leaves_the_last_logits(bundled, asked):
    model, processor = bundled
    texts = [f"<world>{text}" for _, text in asked[:6]]
    last = {}
    for side in ("left", "right"):
        images = [[image] for image, _ in asked[:6]]
        inputs = processor(text=texts, images=images, padding=True, padding_side=side, return_tensors="pt")
        ends = inputs["attention_mask"].shape[1] - 1 - inputs["attention_mask"].flip(1).argmax(1)
        last[side] = model(**inputs).logits[torch.arange(6), ends]
    assert not (inputs["attention_mask"].all())
    torch.testing.assert_close(last["left"], last["right"], atol=1e-4, rtol=1e-4)
    assert torch.equal(last["left"].argmax(-1), last["right"].argmax(-1))


# Gemma 2 has eager attention alone. Of Gemma 3's sliding window torch 2.13 makes C++ that no compiler takes, on CPUs.
@pytest.mark.parametrize(
    ("family", "attention"), [("gemma", "sdpa"), ("gemma", "flex_attention"), ("gemma3_text", "sdpa")]
)
def test_kernels_of_attention_give_the_same_answers(convert, family, attention, shown_scene):
    tokens = []
    for implementation in ("eager", attention):
        options = {"trust_remote_code": True, "attn_implementation": implementation}
        model = AutoModel.from_pretrained(convert(family), **options).eval()
        assert model.config.text_config._attn_implementation == implementation
        processor = AutoProcessor.from_pretrained(convert(family), trust_remote_code=True)
        inputs = chat(processor, shown_scene.image, "what is it?")
        with torch.no_grad():
            tokens.append(model.generate(**inputs, max_new_tokens=8, do_sample=False))
    assert torch.equal(*tokens)


def test_a_saved_model_has_the_same_answers(bundled, asked, alone, tmp_path):
    model, processor = bundled
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    saved = AutoModel.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert answer(saved, processor, *asked) == alone
    inputs = chat(processor, *asked[0])
    with torch.no_grad():
        assert torch.equal(load_fresh(inputs, tmp_path)[0], model(**inputs).logits)


def test_a_seed_fixes_what_is_sampled(bundled, asked):
    sampled = []
    for seed in (0, 0, 1):
        set_seed(seed)
        sampled.append(answer(*bundled, *asked, do_sample=True, temperature=5.0, top_k=0))
    assert sampled[0] == sampled[1] != sampled[2]
