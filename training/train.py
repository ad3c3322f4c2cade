# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Fine-tunes a TheWorld checkpoint with TRL's SFTTrainer: the command `theworld train`.

    theworld train --model MODEL --dataset DATASET --train projection --output-dir DIR
    accelerate launch --multi_gpu --num_processes 2 -m theworld.cli train ...   each process has the whole model
    torchrun --nproc-per-node 2 -m theworld.cli train --fsdp-size 2 ...         each has a part of every weight
    torchrun --nproc-per-node 2 -m theworld.cli train --tp-size 2 ...           each computes a part of every layer

Options are those of `Arguments` below and of TRL's SFTConfig, all of them also from `--config FILE.yaml`.
"""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from accelerate import Accelerator, ParallelismConfig
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from packaging import version
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedModel, TrainerCallback, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints
from transformers.utils import CONFIG_NAME
from trl import SFTConfig, SFTTrainer, TrlParser
from yaml import YAMLError

from theworld import TheWorldProcessor
from theworld.checkpoints.atomic import (
    carry_over,
    check_replaceable,
    replace_folder,
    restore_or_remove_abandoned,
    sibling,
    try_lock,
    write_checksums,
)
from theworld.cli import OneLineErrors, run_command
from theworld.training.data import ConversationCollator, load_conversations
from theworld.training.latents import checkpoint_folder, encoder_tensors, is_latents, load_latents


ADAPTER_CONFIG = "adapter_config.json"
LORA_TARGET_MODULES = r".*\.language_model\.layers\..*_proj"


@dataclass
class Arguments:
    """The options that TRL's SFTConfig does not have."""

    model: str = field(metadata={"help": "Folder or Hub repo of a TheWorld checkpoint."})
    dataset: str = field(
        metadata={"help": "JSONL file, folder or Hub dataset of conversations, or a folder of precomputed latents."}
    )
    split: str = field(
        default="train", metadata={"help": "Split of the dataset to train on, or a part such as 'train[:9000]'."}
    )
    image_root: str | None = field(
        default=None, metadata={"help": "Folder of the dataset's image paths, if it is not that of the dataset."}
    )
    eval_split: str | None = field(
        default=None,
        metadata={"help": "Split to evaluate on, with --eval_strategy. For a file, a part such as 'train[9000:]'."},
    )
    train: Literal["projection", "lora", "language", "all"] = field(
        default="projection",
        metadata={
            "help": "The projection; projection and LoRA on Gemma; projection and Gemma; or all, encoder included. "
            "The first two save an adapter, the others a whole checkpoint."
        },
    )
    modalities: str | None = field(
        default=None,
        metadata={
            "help": "What images become: 'world' (world tokens), 'vision' (the tokens of Gemma 3's tower, which stays "
            "frozen) or 'world,vision'. The default is what the checkpoint has. The trained model keeps the choice."
        },
    )
    lora_rank: int = field(default=16, metadata={"help": "Rank of the LoRA matrices."})
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Dtype of the weights in memory; an adapter is always float32."}
    )
    fsdp_size: int = field(default=1, metadata={"help": "Processes that split the weights (transformers 5.23)."})
    tp_size: int = field(default=1, metadata={"help": "Processes that split each layer (transformers 5.23)."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a model or checkpoints in --output-dir."})

    @property
    def trains_adapter(self) -> bool:
        return self.train in ("projection", "lora")

    @property
    def num_shards(self) -> int:
        """The number of processes that the model is split over."""
        return self.fsdp_size * self.tp_size


class CPUParallelismConfig(ParallelismConfig):
    """Allows tensor parallelism on CPU, which accelerate rejects."""

    def _validate_accelerator(self, accelerator: Accelerator) -> None:
        if accelerator.device.type != "cpu":
            super()._validate_accelerator(accelerator)


class RemovedEncoder(nn.Module):
    """Replaces the encoder when training on latents."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        raise ValueError("This model trains on latents, and its encoder is not in memory. Give `world_latents`.")


class Trainer(SFTTrainer):
    """
    `SFTTrainer` that saves checkpoints atomically, with checksums.

    It writes to a temporary folder next to the run's folder first. A whole checkpoint always contains the encoder.
    """

    partial: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self.partial is None else str(self.partial)

    @contextmanager
    def temporary_folder(self, output: Path, name: str) -> Iterator[Path]:
        """A folder next to `output` for all processes to fill; removed on failure, leaving `output` unchanged."""
        if self.is_world_process_zero():
            restore_or_remove_abandoned(output)
        (partial,) = broadcast_object_list([sibling(output, "partial")])
        partial.mkdir(parents=True, exist_ok=True)
        lock = try_lock(partial)
        try:
            yield partial
        except (OSError, RuntimeError, SafetensorError) as error:
            kept = sorted(each.name for each in output.glob("checkpoint-*"))
            raise OSError(
                f"{name} could not be written ({error}), and was removed. "
                f"Resume later with --resume_from_checkpoint; there is {', '.join(kept) or 'no checkpoint yet'}."
            ) from error
        finally:
            if lock is not None:
                os.close(lock)
            if self.is_world_process_zero():
                shutil.rmtree(partial, ignore_errors=True)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run, name = Path(super()._get_output_dir(trial)).absolute(), f"checkpoint-{self.state.global_step}"
        with self.temporary_folder(run, name) as self.partial:
            try:
                super()._save_checkpoint(model, trial)
            finally:
                written, self.partial = self.partial / name, None
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                if self.state.best_model_checkpoint == str(written):
                    self.state.best_model_checkpoint = str(run / name)
                    self.state.save_to_json(str(written / TRAINER_STATE_NAME))
                write_checksums(written)
                run.mkdir(parents=True, exist_ok=True)
                replace_folder(written, run / name, overwrite=True)
                best = self.state.best_model_checkpoint
                rotate_checkpoints(str(run), self.args.save_total_limit, best_model_checkpoint=best, use_mtime=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        output = Path(output_dir or str(self.args.output_dir)).absolute()
        with self.temporary_folder(output, "The trained model") as partial:
            super().save_model(str(partial), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                write_checksums(partial)
                carry_over(output, partial)
                replace_folder(partial, output, overwrite=True)
        self.accelerator.wait_for_everyone()  # before this, files that a process writes to `output` are lost
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PreTrainedModel) and isinstance(model.model.world_encoder, RemovedEncoder):
            encoder = encoder_tensors(checkpoint_folder(str(model.name_or_path)))
            dtype = model.dtype
            state_dict = {**(state_dict or model.state_dict()), **{n: tensor.to(dtype) for n, tensor in encoder}}
        super()._save(output_dir, state_dict)


def load_model(args: Arguments) -> PreTrainedModel:
    """The checkpoint, split over processes if the options say so."""
    options = {}
    if args.num_shards > 1:
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(fsdp_size=args.fsdp_size, tp_size=args.tp_size)
    return AutoModel.from_pretrained(args.model, trust_remote_code=True, dtype=getattr(torch, args.dtype), **options)


def choose_modalities(args: Arguments, processor: TheWorldProcessor) -> None:
    """
    Sets the processor's switches, which are saved with the trained model.

    Raises:
        ValueError: For a modality that the checkpoint does not have, or that `--train` or the dataset needs or lacks.
    """
    has = ("world",) if processor.vision_settings is None else ("world", "vision")
    chosen = tuple((args.modalities or ",".join(has)).split(","))
    if not set(chosen) <= set(has):
        raise ValueError(f"--modalities {args.modalities} is not in this checkpoint, which has {', '.join(has)}.")
    processor.world, processor.vision = "world" in chosen, "vision" in chosen
    if not processor.world and args.train in ("projection", "all"):
        raise ValueError(
            f"--train {args.train} trains what makes world tokens, which --modalities vision does not use. Choose "
            "--train lora or language."
        )
    if processor.vision and is_latents(args.dataset):
        raise ValueError(
            f"{args.dataset} contains latents, which Gemma 3's tower does not read. Give the dataset itself, or "
            "--modalities world."
        )


def freeze_untrained(model: PreTrainedModel, args: Arguments, world: bool = True) -> PreTrainedModel | PeftModel:
    """Freezes the parts that are not trained, or not used without the world; adds an adapter to train those of it."""
    if not args.trains_adapter:
        model.requires_grad_(True)
        model.model.world_encoder.requires_grad_(args.train == "all")
        model.model.world_projection.requires_grad_(world)
        if model.config.vision_config is not None:
            model.model.vision_tower.requires_grad_(False)
            model.model.multi_modal_projector.requires_grad_(False)
        for name, parameter in model.model.world_encoder.named_parameters():
            if ".time_conv." in name:  # images do not use these, and distributed training would wait for gradients
                parameter.requires_grad_(False)
        return model
    # The embedding of `<world>` is never used: world tokens replace it.
    world_tokens = [model.config.start_of_world_token_id, model.config.end_of_world_token_id]
    adapter = LoraConfig(
        r=args.lora_rank,
        lora_alpha=2 * args.lora_rank,
        target_modules=LORA_TARGET_MODULES if args.train == "lora" else DUMMY_TARGET_MODULES,
        modules_to_save=["world_projection"] if world else None,
        trainable_token_indices={"embed_tokens": world_tokens} if world else None,
    )
    adapted = get_peft_model(model, adapter)
    # TRL reads the head's bias; PEFT's trainable-token wrapper lacks that attribute (peft#3649).
    adapted.get_output_embeddings().bias = None
    return adapted


def load_data(args: Arguments, collator: ConversationCollator) -> tuple[Dataset, Dataset | None]:
    """The conversations to train on, and to evaluate on."""
    if not is_latents(args.dataset):
        splits = [args.split, *([args.eval_split] if args.eval_split else [])]
        loaded = [load_conversations(args.dataset, split, collator, args.image_root) for split in splits]
        return loaded[0], loaded[1] if args.eval_split else None
    if args.train == "all":
        raise ValueError("--train all trains the encoder, which needs images, not latents. Give the dataset itself.")
    if args.eval_split is not None:
        raise ValueError(f"{args.dataset} contains the latents of one split. Omit --eval-split.")
    if args.image_root is not None:
        raise ValueError(f"{args.dataset} contains latents, not paths of images. Omit --image-root.")
    return load_latents(Path(args.dataset), args.model, collator, args.split), None


# Options of SFTConfig without effect, because `ConversationCollator` makes the batches; with their default values.
WITHOUT_EFFECT = {
    "chat_template_path": None,
    "completion_only_loss": None,
    "dataset_kwargs": None,
    "dataset_num_proc": None,
    "dataset_text_field": "text",
    "do_predict": False,
    "eval_packing": None,
    "model_init_kwargs": None,
    "packing": False,
    "pad_to_multiple_of": None,
    "pad_token": None,
    "padding_free": False,
    "shuffle_dataset": False,
    "trust_remote_code": True,
}


def check_options(args: Arguments, config: SFTConfig) -> None:
    """Raises a `ValueError` for options that would be ignored, or that contradict each other."""
    ignored = [name for name, default in WITHOUT_EFFECT.items() if getattr(config, name) != default]
    if ignored:
        raise ValueError(
            f"--{', --'.join(ignored)} would have no effect: the loss is that of the assistant's messages, with the "
            "checkpoint's own code and chat template. Omit it."
        )
    if args.train != "lora" and args.lora_rank != Arguments.lora_rank:
        raise ValueError(f"--lora-rank is for --train lora, got --train {args.train}. Omit it.")
    evaluates = config.eval_strategy != "no" or config.eval_on_start
    if evaluates and args.eval_split is None:
        raise ValueError("--eval_strategy and --eval_on_start need --eval-split, the split to evaluate on.")
    if args.eval_split is not None and not evaluates:
        raise ValueError(
            f"--eval-split {args.eval_split} is never evaluated without --eval_strategy. Give 'steps' or 'epoch'."
        )
    if args.eval_split is not None and overlap(args.split, args.eval_split):
        raise ValueError(
            f"--eval-split {args.eval_split} contains rows of --split {args.split}. Give another split, or "
            "two parts of one, such as 'train[:90%]' and 'train[90%:]'."
        )


def overlap(split: str, other: str) -> bool:
    """Whether two splits are equal, or one is a part of the other."""
    return split == other or split.partition("[")[0] == other.partition("[")[0] and not ("[" in split and "[" in other)


class Parser(OneLineErrors, TrlParser):
    """TRL's parser, with errors in one line."""


def parse_arguments(arguments: list[str]) -> tuple[Arguments, SFTConfig]:
    parser = Parser((Arguments, SFTConfig), prog="theworld train")  # type: ignore[arg-type] # wants its own NewType
    # TRL's default max_length of 1024 would cut conversations with many world tokens. Without an accelerator,
    # processes only find each other with use_cpu.
    on_cpu = not torch.accelerator.is_available()
    parser.set_defaults(max_length=None, report_to="none", trust_remote_code=True, use_cpu=on_cpu)
    try:
        args, config = parser.parse_args_and_config(arguments)
    except YAMLError as error:
        raise ValueError(f"The --config file is not valid YAML: {error}") from error
    check_options(args, config)
    # The collator does all preprocessing.
    config.dataset_kwargs = {"skip_prepare_dataset": True}
    config.remove_unused_columns = False
    if args.tp_size > 1:
        config.parallelism_config = CPUParallelismConfig(tp_size=args.tp_size)
    config.resume_from_checkpoint = find_checkpoint(config)
    if args.num_shards > 1:
        config.save_only_model = True  # transformers has no other checkpoints of a model that processes share
    return args, config


def find_checkpoint(config: SFTConfig) -> str | None:
    """
    The folder to resume from: the value of `--resume_from_checkpoint`, or for "true" the newest of the run.

    Raises:
        ValueError: If there is no such checkpoint.
    """
    name = str(config.resume_from_checkpoint or "false")
    if name.lower() == "false":
        return None
    if name.lower() == "true":
        folder = str(config.output_dir)
        name = (get_last_checkpoint(folder) if os.path.isdir(folder) else None) or ""
    if not name or not (Path(name) / TRAINER_STATE_NAME).is_file():
        raise ValueError(
            "--resume_from_checkpoint takes a folder `checkpoint-N` of an earlier run, or `true` for the newest in "
            f"--output-dir. There is none {f'at {name}' if name else f'in {config.output_dir}'}."
        )
    return name


def check_shares(args: Arguments, config: SFTConfig) -> None:
    """Raises a `ValueError` for options that a model split over processes does not support."""
    if args.num_shards == 1:
        return
    if version.parse(transformers.__version__) < version.parse("5.23"):
        raise ValueError(
            f"--fsdp-size and --tp-size need transformers 5.23 or later, and {transformers.__version__} is installed. "
            "Upgrade it, or give each process the whole model with `accelerate launch`."
        )
    if args.fsdp_size > 1 and args.tp_size > 1:
        raise ValueError(
            f"--fsdp-size {args.fsdp_size} and --tp-size {args.tp_size} cannot be combined: head and "
            "embedding share one weight, which cannot be split in both ways. Choose one of them."
        )
    if args.trains_adapter:
        raise ValueError(
            f"--train {args.train} trains an adapter, which --fsdp-size and --tp-size cannot split. Omit "
            "them (`accelerate launch` gives each process the whole model), or choose --train language or all."
        )
    if config.resume_from_checkpoint or config.load_best_model_at_end:
        raise ValueError(
            "With --fsdp-size or --tp-size a checkpoint is written, but cannot be loaded into the running model. "
            "Omit --resume_from_checkpoint and --load_best_model_at_end; start a new run from a checkpoint with "
            "--model."
        )
    if args.num_shards != (processes := int(os.environ.get("WORLD_SIZE", 1))):
        raise ValueError(
            f"--fsdp-size {args.fsdp_size} with --tp-size {args.tp_size} needs {args.num_shards} processes, got "
            f"{processes}. Start them with `torchrun --nproc-per-node {args.num_shards} -m theworld.cli train ...`."
        )


def check_heads(args: Arguments, num_key_value_heads: int) -> None:
    """Raises a `ValueError` if tensor parallelism would split a head."""
    if num_key_value_heads % args.tp_size:
        raise ValueError(
            f"--tp-size {args.tp_size} does not divide the {num_key_value_heads} key-value head(s) of this Gemma. "
            "Give a divisor, or use --fsdp-size."
        )


def check_resumable(args: Arguments, checkpoint: Path) -> None:
    """Raises a `ValueError` if a checkpoint has no optimizer, or is of a run with another `--train`."""
    if not any(checkpoint.glob("optimizer*")):
        raise ValueError(
            f"{checkpoint} has no optimizer state (--fsdp-size, --tp-size and --save_only_model do not save it), so "
            "a run cannot resume from it. Start a new run with it as --model."
        )
    wrote = "an adapter" if (checkpoint / ADAPTER_CONFIG).is_file() else "a whole model"
    if wrote != (writes := "an adapter" if args.trains_adapter else "a whole model"):
        raise ValueError(
            f"{checkpoint} is {wrote}, but --train {args.train} trains {writes}. Resume with the --train of the run."
        )


def check_output(args: Arguments, config: SFTConfig) -> None:
    """
    Checks, before any work is done, that the run may write to `--output-dir`.

    Raises:
        ValueError: If it is the model to start from.
        FileExistsError: If it contains a model or checkpoints, and the run neither resumes one of them nor overwrites.
        OSError: If it cannot be written.
    """
    output = Path(str(config.output_dir)).absolute()
    if output.resolve() == Path(args.model).resolve():
        raise ValueError(f"--output-dir is {args.model}, the --model that the run starts from. Choose another folder.")
    check_replaceable(output)
    of_runs = (CONFIG_NAME, ADAPTER_CONFIG, f"{PREFIX_CHECKPOINT_DIR}-*")
    held = sorted(path.name for pattern in of_runs for path in output.glob(pattern))
    resumes = config.resume_from_checkpoint and Path(config.resume_from_checkpoint).resolve().parent
    if held and not args.overwrite and resumes != output.resolve():
        raise FileExistsError(
            f"{output} contains {', '.join(held)} of an earlier run. Choose another --output-dir, resume with "
            "`--resume_from_checkpoint true`, or replace them with `--overwrite true`."
        )


def prepare(arguments: list[str], callbacks: Sequence[TrainerCallback] = ()) -> Trainer:
    """
    Checks the options and every row, then loads the model.

    Raises:
        ValueError, OSError: For wrong options, or data that cannot be trained on.
    """
    args, config = parse_arguments(arguments)
    check_shares(args, config)
    check_output(args, config)
    if config.resume_from_checkpoint:
        check_resumable(args, Path(config.resume_from_checkpoint))
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    choose_modalities(args, processor)
    text_config = AutoConfig.from_pretrained(args.model, trust_remote_code=True).text_config
    check_heads(args, text_config.num_key_value_heads)
    context = text_config.max_position_embeddings
    collator = ConversationCollator(processor, min(config.max_length or context, context))
    train_dataset, eval_dataset = load_data(args, collator)
    set_seed(config.seed)  # for the adapter's weights; the Trainer sets it again
    model = load_model(args)
    if is_latents(args.dataset):
        model.model.world_encoder = RemovedEncoder()
    return Trainer(
        freeze_untrained(model, args, processor.world),
        args=config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        processing_class=processor,
        callbacks=list(callbacks),
    )


def train_and_save(trainer: Trainer) -> Trainer:
    """Trains, from a checkpoint if the options name one, and saves the model."""
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    return trainer


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; errors during training keep their traceback."""
    prepared: list[Trainer] = []
    status = run_command("theworld train", lambda words: prepared.append(prepare(words)), arguments)
    for trainer in prepared:
        train_and_save(trainer)
    return status


if __name__ == "__main__":
    sys.exit(main())
