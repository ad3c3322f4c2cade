# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Asks a TheWorld checkpoint about a picture, and shows what went in, what came out and where the time went.

    python demo.py PICTURE "question" ["question" ...]
    python demo.py --scene SEED     draws a scene and asks its own questions
"""

import argparse
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, BatchFeature, PreTrainedModel, ProcessorMixin
from transformers.generation import BaseStreamer

from look import attention_to_world, draw
from recipe.scenes import Question, draw_scene


# The bundled model is the repo itself.
BUNDLED = Path(__file__).resolve().parent
# Of a scene's own questions, so many are asked.
QUESTIONS_PER_SCENE = 3


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

    def __str__(self) -> str:
        return "\n".join(f"  {name:<40}{seconds * 1000:>9.1f} ms" for name, seconds in self.items())


def encode(model: PreTrainedModel, processor: ProcessorMixin, image: Image.Image) -> torch.Tensor:
    """The image's latents, which all questions about it share."""
    times = StageTimes()
    with times.stage("process the picture"):
        pixel_values = processor.image_processor(image, return_tensors="pt").pixel_values
    with times.stage("encode the picture"), torch.no_grad():
        latents = model.get_world_latents(pixel_values)
    print(f"Picture   {image.width}x{image.height} pixels, read at {pixel_values.shape[3]}x{pixel_values.shape[2]}")
    print(f"Latents   {list(latents.shape)}, {latents.dtype}")
    print(times)
    return latents


def ask(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    latents: torch.Tensor,
    question: str,
    max_new_tokens: int,
) -> tuple[str, BatchFeature]:
    """Answers a question about an image by its latents; prints the prompt, the counts, the answer and the times."""
    times = StageTimes()
    with times.stage("process the question"):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"world_latents": latents},
        )
    prompt = inputs["input_ids"][0]

    clock = TokenClock()
    with times.stage("read the prompt and answer"):
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=clock)
    tokens = output[0, len(prompt) :]
    prompt_time, first, last = clock.times[0], clock.times[1], clock.times[-1]
    times["  the prompt and the first token"] = first - prompt_time
    times["  each further token"] = (last - first) / max(len(tokens) - 1, 1)

    world_tokens = (prompt == model.config.image_token_id).sum().item()
    shown = re.sub(f"({processor.image_token})+", rf"\1 x {world_tokens}", processor.decode(prompt))
    answer = processor.decode(tokens, skip_special_tokens=True).strip()
    print(f"Question  {question}")
    print(f"Answer    {answer}")
    print(f"Prompt    {shown!r}")
    print(f"Tokens    {len(prompt)} in the prompt, {world_tokens} of them world tokens; {len(tokens)} in the answer")
    print(times)
    return answer, inputs


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Ask a TheWorld checkpoint about a picture.",
        usage="%(prog)s [options] PICTURE QUESTION [QUESTION ...]\n       %(prog)s [options] --scene SEED",
    )
    parser.add_argument("picture", nargs="?", help="an image file")
    parser.add_argument("questions", nargs="*", metavar="question")
    parser.add_argument("--scene", type=int, metavar="SEED", help="draw this scene, and ask its own questions")
    parser.add_argument("--model", default=BUNDLED, metavar="FOLDER_OR_REPO", help="instead of the bundled model")
    parser.add_argument("--save", type=Path, metavar="FILE.png", help="draw the answers and what the model looked at")
    parser.add_argument("--max-new-tokens", type=int, default=20, metavar="N", help="%(default)s")
    args = parser.parse_args()
    if args.scene is not None and args.picture:
        parser.error("a scene comes with its own picture and questions: give --scene alone, or PICTURE and QUESTION")
    if args.scene is None and not args.questions:
        parser.error("give a PICTURE and a QUESTION about it, or --scene SEED")
    if args.scene is not None and args.save is None:
        args.save = Path(f"scene-{args.scene}.png")
    return args


def read_input(args: argparse.Namespace) -> tuple[Image.Image, list[Question]]:
    """The picture and the questions; those of `--scene` come with their answers."""
    if args.scene is not None:
        scene = draw_scene(args.scene)
        return scene.image, scene.questions[:QUESTIONS_PER_SCENE]
    return Image.open(args.picture).convert("RGB"), [Question("given", text, "") for text in args.questions]


def main() -> int:
    args = parse_arguments()
    try:
        image, questions = read_input(args)
    except OSError as error:
        print(f"demo.py: error: {args.picture} cannot be read as a picture: {error}", file=sys.stderr)
        return 1

    times = StageTimes()
    with times.stage("load the model"):
        model = AutoModel.from_pretrained(args.model, trust_remote_code=True).eval()
        processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    print(f"Model     {args.model}, {model.num_parameters():,} parameters, {model.dtype}")
    print(times)

    latents = encode(model, processor, image)
    answers = []
    for question in questions:
        print()
        answer, inputs = ask(model, processor, latents, question.text, args.max_new_tokens)
        if question.answer:
            print(f"Expected  {question.answer}")
            answer += "  (right)" if answer == question.answer else f"  (wrong: it is {question.answer})"
        answers.append((question.text, answer, inputs))

    if args.save:
        looks = [(text, answer, attention_to_world(model, inputs, latents)) for text, answer, inputs in answers]
        draw(image, looks, latents).save(args.save)
        print(f"\nDrawn in  {args.save}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
