"""What the tests of the model have in common, with and without Gemma 3's own vision."""

import functools
from contextlib import contextmanager
from unittest import mock

import torch


FLOAT32_TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}

QUESTION = "what is in the picture?"


def pictures(count: int, size: int = 64, seed: int = 0) -> torch.Tensor:
    """Random pictures [count, 3, size, size] of bytes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def without_images(inputs) -> dict:
    return {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}


def generate(model, inputs, **options) -> torch.Tensor:
    """The new tokens of a greedy answer, up to 8 a prompt."""
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False, **options)
    return output[:, inputs["input_ids"].shape[1] :]


def logits_of(model, inputs, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, **options).logits


@contextmanager
def gemmas_inputs(model):
    """Collects the `inputs_embeds` of each call of Gemma."""
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    yield seen
    hook.remove()


def check_compiled_decoding(model, inputs) -> None:
    """Each further token compiles without a graph break, and the answer stays the same."""
    expected = generate(model, inputs)
    decode = torch.compile(model.forward, fullgraph=True, backend="eager")
    forward, compiled = model.forward, []

    def compile_single_tokens(*args, **kwargs):
        if kwargs["input_ids"].shape[1] > 1:
            return forward(*args, **kwargs)
        compiled.append(True)
        return decode(*args, **kwargs)

    with mock.patch.object(model, "forward", functools.wraps(forward)(compile_single_tokens)):
        answer = generate(model, inputs, cache_implementation="static", disable_compile=True)
    assert torch.equal(answer, expected) and len(compiled) == expected.shape[1] - 1


def check_compiled_model(model, inputs) -> None:
    """The model compiles without a graph break, and its logits stay the same."""
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**inputs).logits, logits_of(model, inputs), **FLOAT32_TOLERANCE)
