"""Questions to a model: one conversation, or a batch of pictures with a question each."""

import torch
from PIL import Image


THREADS = 16


def chat_inputs(processor, messages: list, options: dict | None = None):
    """The tensors of a conversation, or a batch of them, for the model to answer; `options` are the processor's."""
    return processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=options,
    )


def chat(processor, image: Image.Image, *turns: str):
    """The prompt of a conversation about an image: the user's turn, the answer, the user's next turn, ..."""
    messages = [
        {"role": "assistant" if number % 2 else "user", "content": [{"type": "text", "text": turn}]}
        for number, turn in enumerate(turns)
    ]
    messages[0]["content"].insert(0, {"type": "image", "image": image})
    return chat_inputs(processor, messages)


def as_prompt(question: str) -> str:
    """What the chat template makes of an image and a question."""
    return f"<start_of_turn>user\n<world>{question}<end_of_turn>\n<start_of_turn>model\n"


def answer(model, processor, *asked: tuple[Image.Image, str], **options) -> list[str]:
    """The greedy answers to a batch of pictures and questions, or with other `options` of `generate`."""
    prompts = [as_prompt(text) for _, text in asked]
    images = [[image] for image, _ in asked]
    inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, **{"max_new_tokens": 8, "do_sample": False, **options})
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
