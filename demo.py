# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Asks a TheWorld checkpoint about a picture, and shows what went in, what came out and where the time went.

    python demo.py PICTURE "question" --model FOLDER_OR_REPO
"""

import argparse
import re
import sys
from contextlib import contextmanager
from time import perf_counter

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
from transformers.generation import BaseStreamer


class TokenClock(BaseStreamer):
    """Notes when `generate` hands over the prompt and then each token."""

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


def ask(image: Image.Image, question: str, folder_or_repo: str, max_new_tokens: int) -> None:
    """Answers a question about an image, and prints the prompt, the counts, the answer and the times."""
    times = StageTimes()
    with times.stage("load the model"):
        model = AutoModel.from_pretrained(folder_or_repo, trust_remote_code=True).eval()
        processor = AutoProcessor.from_pretrained(folder_or_repo, trust_remote_code=True)

    with times.stage("process the picture and the question"):
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    pixel_values, prompt = inputs.pop("pixel_values"), inputs["input_ids"][0]

    with times.stage("encode the picture"), torch.no_grad():
        latents = model.get_world_latents(pixel_values)

    clock = TokenClock()
    with times.stage("read the prompt and answer"):
        output = model.generate(
            **inputs, world_latents=latents, max_new_tokens=max_new_tokens, do_sample=False, streamer=clock
        )
    answer = output[0, len(prompt) :]
    prompt_time, first, last = clock.times[0], clock.times[1], clock.times[-1]
    times["  the prompt and the first token"] = first - prompt_time
    times["  each further token"] = (last - first) / max(len(answer) - 1, 1)

    world_tokens = (prompt == model.config.image_token_id).sum().item()
    shown = re.sub(f"({processor.image_token})+", rf"\1 x {world_tokens}", processor.decode(prompt))
    print(f"Picture   {image.width}x{image.height} pixels, read at {pixel_values.shape[3]}x{pixel_values.shape[2]}")
    print(f"Latents   {list(latents.shape)}, {model.dtype}")
    print(f"Prompt    {shown!r}")
    print(f"Tokens    {len(prompt)} in the prompt, {world_tokens} of them world tokens; {len(answer)} in the answer")
    print(f"Answer    {processor.decode(answer, skip_special_tokens=True)!r}")
    print("Time")
    for name, seconds in times.items():
        print(f"  {name:<40}{seconds * 1000:>9.1f} ms")


def main() -> int:
    parser = argparse.ArgumentParser(description="Ask a TheWorld checkpoint about a picture.")
    parser.add_argument("picture", help="an image file")
    parser.add_argument("question")
    parser.add_argument("--model", required=True, metavar="FOLDER_OR_REPO", help="what convert_weights.py wrote")
    parser.add_argument("--max-new-tokens", type=int, default=20, metavar="N", help="%(default)s")
    args = parser.parse_args()
    try:
        image = Image.open(args.picture).convert("RGB")
    except OSError as error:
        print(f"demo.py: error: {args.picture} cannot be read as a picture: {error}", file=sys.stderr)
        return 1
    ask(image, args.question, args.model, args.max_new_tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())
