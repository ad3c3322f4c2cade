# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Asks a TheWorld checkpoint about a picture, and shows what went in, what came out and where the time went.

    python demo.py PICTURE "question" --model FOLDER_OR_REPO
"""

import argparse
import sys
from contextlib import contextmanager
from time import perf_counter

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
from transformers.generation import BaseStreamer


class TokenClock(BaseStreamer):
    """Notes when `generate` hands over each token."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(perf_counter())

    def end(self):
        pass


class StageTimes(dict):
    """Seconds by stage, in the order they ran."""

    @contextmanager
    def stage(self, name: str):
        start = perf_counter()
        yield
        self[name] = perf_counter() - start


def shorten(prompt: str, token: str) -> str:
    """`prompt` with each run of `token` written once, with its length."""
    head, *runs = prompt.split(token)
    text, length = head, 0
    for piece in runs:
        length += 1
        if piece:
            text, length = f"{text}{token} x {length}{piece}", 0
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description="Ask a TheWorld checkpoint about a picture.")
    parser.add_argument("picture")
    parser.add_argument("question")
    parser.add_argument("--model", required=True, metavar="FOLDER_OR_REPO", help="what convert_weights.py wrote")
    parser.add_argument("--max-new-tokens", type=int, default=20, metavar="N")
    args = parser.parse_args()
    try:
        image = Image.open(args.picture).convert("RGB")
    except OSError as error:
        print(f"demo.py: error: {args.picture} cannot be read as a picture: {error}", file=sys.stderr)
        return 1

    times = StageTimes()
    with times.stage("load the model"):
        model = AutoModel.from_pretrained(args.model, trust_remote_code=True).eval()
        processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    with times.stage("process the picture and the question"):
        content = [{"type": "image", "image": image}, {"type": "text", "text": args.question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    pixel_values = inputs.pop("pixel_values")
    with times.stage("encode the picture"), torch.no_grad():
        latents = model.get_world_latents(pixel_values)
    clock = TokenClock()
    with times.stage("generate"):
        start = perf_counter()
        output = model.generate(
            **inputs, world_latents=latents, max_new_tokens=args.max_new_tokens, do_sample=False, streamer=clock
        )
    first, last = clock.times[1], clock.times[-1]  # the streamer gets the prompt before the tokens
    prompt_length = inputs["input_ids"].shape[1]
    answer = output[0, prompt_length:]
    world_tokens = (inputs["input_ids"] == model.config.image_token_id).sum().item()

    print(f"Picture   {args.picture}, {image.width}x{image.height} pixels")
    print(f"Latents   {list(latents.shape)} from pixel_values {list(pixel_values.shape)}")
    print("Prompt    " + shorten(processor.decode(inputs["input_ids"][0]), processor.image_token).replace("\n", "\\n"))
    print(f"Tokens    {prompt_length} in the prompt, {world_tokens} of them world tokens; {len(answer)} in the answer")
    print(f"Answer    {processor.decode(answer, skip_special_tokens=True)!r}")
    times["  of it, the prompt and the first token"] = first - start
    if len(answer) > 1:
        times["  of it, each further token"] = (last - first) / (len(answer) - 1)
    print("Time")
    for name, seconds in times.items():
        print(f"  {name:<42}{seconds * 1000:>9.1f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
