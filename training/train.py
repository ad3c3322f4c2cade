# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Fine-tunes a TheWorld checkpoint by TRL's SFTTrainer.

    python train.py --model MODEL --dataset DATASET --train projection --output_dir FOLDER
    accelerate launch --num_processes 2 train.py ...            each process has the whole model
    torchrun --nproc-per-node 2 train.py --fsdp_size 2 ...      each has a share of every weight
    torchrun --nproc-per-node 2 train.py --tp_size 2 ...        each has a share of every layer's work

Besides the options of `Arguments` below it takes those of TRL's SFTConfig, all of them also by `--config FILE.yaml`.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import transformers
from accelerate import Accelerator, ParallelismConfig
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from packaging import version
from peft import LoraConfig, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedModel, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints
from transformers.utils import CONFIG_NAME
from trl import SFTConfig, SFTTrainer, TrlParser

from theworld.checkpoints.atomic import (
    carry_over,
    check_replaceable,
    replace_folder,
    restore_or_remove_abandoned,
    sibling,
    try_lock,
    write_checksums,
)
from theworld.training.data import ConversationCollator, load_conversations
from theworld.training.precompute_latents import checkpoint_folder, encoder_tensors, is_latents, load_latents


ADAPTER_CONFIG = "adapter_config.json"
GEMMA_MATRICES = r".*\.language_model\.layers\..*_proj"


@dataclass
class Arguments:
    """What is trained, and on what."""

    model: str = field(metadata={"help": "Folder or Hub repo of a TheWorld checkpoint."})
    dataset: str = field(
        metadata={"help": "JSONL file, folder or Hub dataset of conversations, or a folder of precomputed latents."}
    )
    split: str = field(
        default="train", metadata={"help": "The dataset's split to train on, or a part of it, as 'train[:9000]'."}
    )
    eval_split: str | None = field(
        default=None,
        metadata={"help": "The split to evaluate on, with --eval_strategy. Part of a file: 'train[9000:]'."},
    )
    train: Literal["projection", "lora", "language", "all"] = field(
        default="projection",
        metadata={
            "help": "The projection alone (1, align); with LoRA on Gemma, or with all of Gemma (2, instruct); or the "
            "encoder too (3). The first two save an adapter, the others a whole checkpoint."
        },
    )
    lora_rank: int = field(default=16, metadata={"help": "Rank of the LoRA matrices."})
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Of the weights in memory; what an adapter trains is float32 anyway."}
    )
    fsdp_size: int = field(default=1, metadata={"help": "Processes that share the weights (transformers 5.23)."})
    tp_size: int = field(default=1, metadata={"help": "Processes that share each layer's work (transformers 5.23)."})
    overwrite: bool = field(
        default=False, metadata={"help": "Train anew into an --output_dir that holds a model or checkpoints."}
    )

    @property
    def trains_adapter(self) -> bool:
        return self.train in ("projection", "lora")

    @property
    def num_shards(self) -> int:
        """How many processes hold the model together, each a part."""
        return self.fsdp_size * self.tp_size


class ParallelismOnCpu(ParallelismConfig):
    """accelerate's; it admits tensor parallelism on accelerators alone, though nothing in it needs one."""

    def _validate_accelerator(self, accelerator: Accelerator) -> None:
        if accelerator.device.type != "cpu":
            super()._validate_accelerator(accelerator)


class AbsentEncoder(nn.Module):
    """Stands where the encoder was, in training on latents."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        raise ValueError("This model trains on latents, and its encoder is not in memory. Give `world_latents`.")


class Trainer(SFTTrainer):
    """
    `SFTTrainer`, whose saves are complete or absent, whenever the process dies, and carry the sums of their files.

    What is saved is written beside the run's folder first. A whole checkpoint has its encoder.
    """

    partial: Path | None = None

    def _get_output_dir(self, trial: None) -> str:
        return super()._get_output_dir(trial) if self.partial is None else str(self.partial)

    @contextmanager
    def written_beside(self, output: Path, name: str) -> Iterator[Path]:
        """A folder beside `output` for all processes to fill; if `name` fails it goes, and `output` is as it was."""
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
                f"Go on later with --resume_from_checkpoint; there is {', '.join(kept) or 'no checkpoint yet'}."
            ) from error
        finally:
            if lock is not None:
                os.close(lock)
            if self.is_world_process_zero():
                shutil.rmtree(partial, ignore_errors=True)

    def _save_checkpoint(self, model: nn.Module, trial: None) -> None:
        run, name = Path(super()._get_output_dir(trial)).absolute(), f"checkpoint-{self.state.global_step}"
        with self.written_beside(run, name) as self.partial:
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
        output = Path(output_dir or self.args.output_dir).absolute()
        with self.written_beside(output, "The trained model") as partial:
            super().save_model(str(partial), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                write_checksums(partial)
                carry_over(output, partial)
                replace_folder(partial, output, overwrite=True)
        self.accelerator.wait_for_everyone()  # what a process writes into `output` before is lost
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PreTrainedModel) and isinstance(model.model.world_encoder, AbsentEncoder):
            encoder = encoder_tensors(checkpoint_folder(model.name_or_path))
            dtype = model.dtype
            state_dict = {**(state_dict or model.state_dict()), **{n: tensor.to(dtype) for n, tensor in encoder}}
        super()._save(output_dir, state_dict)


def load_model(args: Arguments) -> PreTrainedModel:
    """The checkpoint, shared out among processes if they are to share it."""
    options = {}
    if args.num_shards > 1:
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(fsdp_size=args.fsdp_size, tp_size=args.tp_size)
    return AutoModel.from_pretrained(args.model, trust_remote_code=True, dtype=getattr(torch, args.dtype), **options)


def choose_parts(model: PreTrainedModel, args: Arguments) -> nn.Module:
    """Freezes what is not to be trained; an adapter holds the parts of "projection" and "lora"."""
    if not args.trains_adapter:
        model.requires_grad_(True)
        model.model.world_encoder.requires_grad_(args.train == "all")
        for name, parameter in model.model.world_encoder.named_parameters():
            if ".time_conv." in name:  # no image reaches these, and distributed training would wait for them
                parameter.requires_grad_(False)
        return model
    # `<world>` itself is never read: world tokens take its place.
    world_tokens = [model.config.start_of_world_token_id, model.config.end_of_world_token_id]
    adapter = LoraConfig(
        r=args.lora_rank,
        lora_alpha=2 * args.lora_rank,
        target_modules=GEMMA_MATRICES if args.train == "lora" else DUMMY_TARGET_MODULES,
        modules_to_save=["world_projection"],
        trainable_token_indices={"embed_tokens": world_tokens},
    )
    model = get_peft_model(model, adapter)
    # TRL reads the head's weight and bias, which PEFT's wrapper of trained tokens has no word for (peft#3649).
    model.get_output_embeddings().bias = None
    return model


def load_data(args: Arguments, collator: ConversationCollator) -> tuple[Dataset, Dataset | None]:
    """The conversations to train on, and to evaluate on."""
    if not is_latents(args.dataset):
        splits = (args.split, args.eval_split)
        return tuple(split and load_conversations(args.dataset, split, collator) for split in splits)
    if args.train == "all":
        raise ValueError("--train all trains the encoder, which latents have behind them. Give the images instead.")
    if args.eval_split is not None:
        raise ValueError(f"{args.dataset} holds the latents of one split. Leave --eval_split out.")
    return load_latents(Path(args.dataset), args.model, collator, args.split), None


# Options of SFTConfig that change nothing here, since `ConversationCollator` makes the batches; with the values that
# they have if they are not given.
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
            f"--{', --'.join(ignored)} would change nothing: whole conversations are trained on what the assistant "
            "says, by the checkpoint's own code and chat template. Leave it out."
        )
    if args.train != "lora" and args.lora_rank != Arguments.lora_rank:
        raise ValueError(f"--lora_rank is for --train lora, got --train {args.train}. Leave it out.")
    evaluates = config.eval_strategy != "no" or config.eval_on_start
    if evaluates and args.eval_split is None:
        raise ValueError("--eval_strategy and --eval_on_start need --eval_split, the split to evaluate on.")
    if args.eval_split is not None and not evaluates:
        raise ValueError(
            f"--eval_split {args.eval_split} is never evaluated on without --eval_strategy. Give 'steps' or 'epoch'."
        )
    if args.eval_split is not None and overlap(args.split, args.eval_split):
        raise ValueError(
            f"--eval_split {args.eval_split} holds rows that --split {args.split} trains on. Give another split, or "
            "two parts of one, such as 'train[:90%]' and 'train[90%:]'."
        )


def overlap(split: str, other: str) -> bool:
    """Whether one of two splits is the other, or a part of it."""
    return split == other or split.partition("[")[0] == other.partition("[")[0] and not ("[" in split and "[" in other)


def parse_arguments(arguments: list[str] | None = None) -> tuple[Arguments, SFTConfig]:
    parser = TrlParser((Arguments, SFTConfig))
    # World tokens are many: no conversation is to be cut because TRL's default is a length of 1024. And processes on
    # CPUs only find each other where the CPU was asked for.
    on_cpu = not torch.accelerator.is_available()
    parser.set_defaults(max_length=None, report_to="none", trust_remote_code=True, use_cpu=on_cpu)
    args, config = parser.parse_args_and_config(arguments)
    check_options(args, config)
    # The collator does all that there is to do with a row.
    config.dataset_kwargs = {"skip_prepare_dataset": True}
    config.remove_unused_columns = False
    if args.tp_size > 1:
        config.parallelism_config = ParallelismOnCpu(tp_size=args.tp_size)
    config.resume_from_checkpoint = find_checkpoint(config)
    if args.num_shards > 1:
        config.save_only_model = True  # transformers has no other checkpoints of a model that processes share
    return args, config


def find_checkpoint(config: SFTConfig) -> str | None:
    """
    The folder to go on from: what `--resume_from_checkpoint` names; if that is "true", the newest of the run's.

    Raises:
        ValueError: If there is none.
    """
    name = str(config.resume_from_checkpoint or "false")
    if name.lower() == "false":
        return None
    if name.lower() == "true":
        name = os.path.isdir(config.output_dir) and get_last_checkpoint(config.output_dir)
    if not name or not (Path(name) / TRAINER_STATE_NAME).is_file():
        raise ValueError(
            f"--resume_from_checkpoint takes a folder `checkpoint-N` that a run wrote, or `true` for the newest in "
            f"--output_dir. There is none {f'at {name}' if name else f'in {config.output_dir}'}."
        )
    return name


def check_shares(args: Arguments, config: SFTConfig) -> None:
    """Raises a `ValueError` for what processes that share a model, each with a part, cannot do."""
    if args.num_shards == 1:
        return
    if version.parse(transformers.__version__) < version.parse("5.23"):
        raise ValueError(
            f"--fsdp_size and --tp_size need transformers 5.23 or later, and {transformers.__version__} is installed. "
            "Upgrade it, or give each process the whole model with `accelerate launch`."
        )
    if args.fsdp_size > 1 and args.tp_size > 1:
        raise ValueError(
            f"--fsdp_size {args.fsdp_size} and --tp_size {args.tp_size} cannot be combined: the weight that head "
            "and embeddings have in common cannot be shared out both ways. Choose one of them."
        )
    if args.trains_adapter:
        raise ValueError(
            f"--train {args.train} trains an adapter, which --fsdp_size and --tp_size cannot share out. Leave them "
            "out (`accelerate launch` gives each process the whole model), or choose --train language or all."
        )
    if config.resume_from_checkpoint or config.load_best_model_at_end:
        raise ValueError(
            "With --fsdp_size or --tp_size a checkpoint is written, but cannot be loaded into the running model. "
            "Leave out --resume_from_checkpoint and --load_best_model_at_end; start a new run from a checkpoint with "
            "--model."
        )
    if args.num_shards != (processes := int(os.environ.get("WORLD_SIZE", 1))):
        raise ValueError(
            f"--fsdp_size {args.fsdp_size} with --tp_size {args.tp_size} needs {args.num_shards} processes, got "
            f"{processes}. Start them with `torchrun --nproc-per-node {args.num_shards} train.py ...`."
        )


def check_resumable(args: Arguments, checkpoint: Path) -> None:
    """Raises a `ValueError` if a checkpoint is not one of a run with the same `--train`, or has no optimizer."""
    if not any(checkpoint.glob("optimizer*")):
        raise ValueError(
            f"{checkpoint} holds a model without its optimizer (--fsdp_size, --tp_size and --save_only_model write "
            "such ones), so that no run can go on from it. Start a new run with it as --model."
        )
    wrote = "an adapter" if (checkpoint / ADAPTER_CONFIG).is_file() else "a whole model"
    if wrote != (writes := "an adapter" if args.trains_adapter else "a whole model"):
        raise ValueError(
            f"{checkpoint} holds {wrote}, and --train {args.train} trains {writes}. Resume with the run's own --train."
        )


def check_output(args: Arguments, config: SFTConfig) -> None:
    """
    Raises, before work is done in vain, if the run would replace what nobody asked it to.

    Raises:
        ValueError: If the output is the model to start from.
        FileExistsError: If it holds a model or checkpoints, and the run neither resumes one of them nor overwrites.
        OSError: If it cannot be written.
    """
    output = Path(config.output_dir).absolute()
    if output.resolve() == Path(args.model).resolve():
        raise ValueError(f"--output_dir is {args.model}, the --model that the run starts from. Choose another folder.")
    check_replaceable(output)
    of_runs = (CONFIG_NAME, ADAPTER_CONFIG, f"{PREFIX_CHECKPOINT_DIR}-*")
    held = sorted(path.name for pattern in of_runs for path in output.glob(pattern))
    resumes = config.resume_from_checkpoint and Path(config.resume_from_checkpoint).resolve().parent
    if held and not args.overwrite and resumes != output.resolve():
        raise FileExistsError(
            f"{output} holds {', '.join(held)} of an earlier run. Choose another --output_dir, go on with "
            "`--resume_from_checkpoint true`, or replace them with `--overwrite true`."
        )


def main(arguments: list[str] | None = None, callbacks: Sequence[TrainerCallback] = ()) -> Trainer:
    args, config = parse_arguments(arguments)
    check_shares(args, config)
    check_output(args, config)
    if config.resume_from_checkpoint:
        check_resumable(args, Path(config.resume_from_checkpoint))
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    context = AutoConfig.from_pretrained(args.model, trust_remote_code=True).text_config.max_position_embeddings
    collator = ConversationCollator(processor, min(config.max_length or context, context))
    train_dataset, eval_dataset = load_data(args, collator)
    model = load_model(args)
    if is_latents(args.dataset):
        model.model.world_encoder = AbsentEncoder()
    trainer = Trainer(
        choose_parts(model, args),
        args=config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        processing_class=processor,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
