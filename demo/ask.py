# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Asks a TheWorld checkpoint about a picture or a clip, and prints the inputs, the answers and the time of each stage.

    theworld ask PICTURE "question" ["question" ...]
    theworld ask CLIP "question" ["question" ...]    an MP4, WebM or other video, or an animated GIF, WebP or PNG
    theworld ask --scene SEED     draws a scene and asks its own questions
"""

import argparse
import re
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import cast

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, BatchFeature
from transformers.generation import BaseStreamer

from theworld import TheWorldForConditionalGeneration, TheWorldProcessor
from theworld.cli import ArgumentParser, run_command
from theworld.demo.attention import attention_to_world, draw_report
from theworld.evaluation.scenes import Question, draw_scene
from theworld.images_theworld import read_image
from theworld.modalities_theworld import MODALITIES, Modality
from theworld.videos_theworld import is_video, open_clip, open_file


# The bundled model is the repo itself.
BUNDLED = Path(__file__).resolve().parents[1]
# How many of a scene's own questions are asked.
QUESTIONS_PER_SCENE = 3
IMAGE, VIDEO = (modality for modality in MODALITIES if modality.kind == "world")


class TokenClock(BaseStreamer):
    """Records the times at which `generate` passes the prompt and then each token."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(perf_counter())

    def end(self):
        pass


@dataclass(frozen=True)
class Seen:
    """
    An image or a video to ask about.

    Args:
        modality: `IMAGE` or `VIDEO`.
        given: The processor's input: a picture, or the path of a clip.
        picture: The picture, or the clip's last frame, for the drawing.
        num_frames: The clip's frames.
    """

    modality: Modality
    given: Image.Image | str
    picture: Image.Image
    num_frames: int = 1

    @classmethod
    def read(cls, path: str) -> "Seen":
        file = open_file(path)
        if not is_video(file):
            picture = read_image(path)
            return cls(IMAGE, picture, picture)
        clip = open_clip(file, fps=1, metadata={})
        last = clip.begins[-1:]
        [(picture, _)] = clip.frames_at(last)
        return cls(VIDEO, path, picture, len(clip.begins))


class StageTimes(dict):
    """Seconds by stage, in the order they ran."""

    @contextmanager
    def stage(self, name: str):
        start = perf_counter()
        yield
        self[name] = perf_counter() - start

    def __str__(self) -> str:
        return "\n".join(f"  {name:<40}{seconds * 1000:>9.1f} ms" for name, seconds in self.items())


def make_inputs(processor: TheWorldProcessor, seen: Seen, question: str) -> BatchFeature:
    """The input tensors of a question about a picture or a clip."""
    modality = seen.modality.item
    content = [{"type": modality, modality: seen.given}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def encode(model: TheWorldForConditionalGeneration, processor: TheWorldProcessor, seen: Seen) -> torch.Tensor:
    """The latents, which all questions share."""
    times = StageTimes()
    pixel_values, _ = seen.modality.inputs
    with times.stage("process the picture"):
        pixels = make_inputs(processor, seen, "")[pixel_values]
    with times.stage("encode the picture"), torch.no_grad():
        latents = cast(torch.Tensor, model.get_world_latents(pixels))  # no list, because all have one size
    frames = f"{seen.num_frames} frames of " if seen.modality is VIDEO else ""
    print(f"Picture   {frames}{seen.picture.width}x{seen.picture.height} pixels, read as {list(pixels.shape)}")
    print(f"Latents   {list(latents.shape)}, {latents.dtype}")
    print(times)
    return latents


def ask(
    model: TheWorldForConditionalGeneration,
    processor: TheWorldProcessor,
    seen: Seen,
    latents: torch.Tensor,
    question: str,
    max_new_tokens: int,
) -> tuple[str, BatchFeature]:
    """Answers a question about a picture from its latents; prints the prompt, the counts, the answer and the times."""
    times = StageTimes()
    pixel_values, world_latents = seen.modality.inputs
    with times.stage("process the question"):
        inputs = make_inputs(processor, seen, question)
        del inputs[pixel_values]
        inputs.pop(seen.modality.sizes, None)  # one picture is not padded
        inputs[world_latents] = latents
    prompt = inputs["input_ids"][0]

    clock = TokenClock()
    with times.stage("read the prompt and answer"):
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=clock)
    tokens = output[0, len(prompt) :]
    prompt_time, first, last = clock.times[0], clock.times[1], clock.times[-1]
    times["  the prompt and the first token"] = first - prompt_time
    times["  each further token"] = (last - first) / max(len(tokens) - 1, 1)

    placeholders = re.compile(f"({processor.image_token}|{processor.video_token})+")
    text = processor.decode(prompt)
    shown = placeholders.sub(lambda found: f"{found[1]} x {len(found[0]) // len(found[1])}", text)
    world_tokens = sum(len(found[0]) // len(found[1]) for found in placeholders.finditer(text))
    answer = processor.decode(tokens, skip_special_tokens=True).strip()
    print(f"Question  {question}")
    print(f"Answer    {answer}")
    print(f"Prompt    {shown!r}")
    print(f"Tokens    {len(prompt)} in the prompt, {world_tokens} of them world tokens; {len(tokens)} in the answer")
    print(times)
    return answer, inputs


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="theworld ask",
        description="Ask a TheWorld checkpoint about a picture or a clip.",
        usage="%(prog)s [options] PICTURE QUESTION [QUESTION ...]\n       %(prog)s [options] --scene SEED",
    )
    parser.add_argument("picture", nargs="?", help="a file of an image or of a video")
    parser.add_argument("questions", nargs="*", metavar="question", help="one or more questions about it")
    parser.add_argument("--scene", type=int, metavar="SEED", help="draw this scene, and ask its own questions")
    parser.add_argument(
        "--model", default=BUNDLED, metavar="PATH_OR_REPO", help="a checkpoint (default: the bundled model)"
    )
    parser.add_argument(
        "--save", type=Path, metavar="FILE.png", help="draw the picture and the attention of each answer"
    )
    parser.add_argument("--max-new-tokens", type=int, default=20, metavar="N", help="longest answer (%(default)s)")
    args = parser.parse_args(arguments)
    if args.scene is not None and args.picture:
        parser.error("a scene comes with its own picture and questions: give --scene alone, or PICTURE and QUESTION")
    if args.scene is None and not args.questions:
        parser.error("give a PICTURE and a QUESTION about it, or --scene SEED")
    if args.scene is not None and args.save is None:
        args.save = Path(f"scene-{args.scene}.png")
    return args


def read_input(args: argparse.Namespace) -> tuple[Seen, Sequence[Question]]:
    """The image or video, and the questions; those of `--scene` have answers."""
    if args.scene is not None:
        scene = draw_scene(args.scene)
        return Seen(IMAGE, scene.image, scene.image), scene.questions[:QUESTIONS_PER_SCENE]
    if "://" not in args.picture and not Path(args.picture).is_file():
        raise FileNotFoundError(f"There is no file {args.picture}. Give the path or URL of a picture or a clip.")
    try:
        seen = Seen.read(args.picture)
    except ValueError as error:
        raise ValueError(f"{args.picture} cannot be read as a picture or a clip: {error}") from error
    return seen, [Question("given", text, "") for text in args.questions]


def show(args: argparse.Namespace) -> None:
    """Answers the questions, and draws the attention to the image if `--save` is given."""
    seen, questions = read_input(args)
    times = StageTimes()
    with times.stage("load the model"):
        model = AutoModel.from_pretrained(args.model, trust_remote_code=True).eval()
        processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    print(f"Model     {args.model}, {model.num_parameters():,} parameters, {model.dtype}")
    print(times)

    latents = encode(model, processor, seen)
    answers = []
    for question in questions:
        print()
        answer, inputs = ask(model, processor, seen, latents, question.text, args.max_new_tokens)
        if question.answer:
            print(f"Expected  {question.answer}")
            answer += "  (right)" if answer == question.answer else f"  (wrong: it is {question.answer})"
        answers.append((question.text, answer, inputs))

    if args.save:
        looks = [(text, answer, attention_to_world(model, inputs)) for text, answer, inputs in answers]
        if seen.modality is VIDEO:
            latents = latents[:, -1]
        draw_report(seen.picture, looks, latents).save(args.save)
        print(f"\nDrawn in  {args.save}")


def main(arguments: list[str] | None = None) -> int:
    return run_command("theworld ask", lambda words: show(parse_arguments(words)), arguments)


if __name__ == "__main__":
    sys.exit(main())
