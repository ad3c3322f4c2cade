"""Small checkpoints with random weights in the formats that users have: a diffusers VAE folder and a Gemma folder."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma2Config,
    Gemma3Config,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    SiglipVisionConfig,
)


VAE_FIELDS = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}

TEXT_FIELDS = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 8192,
}

TEXT_CONFIGS = {
    "gemma": GemmaConfig(**TEXT_FIELDS),
    # A window shorter than an image's tokens, so that sliding layers slide.
    "gemma2": Gemma2Config(**TEXT_FIELDS, sliding_window=32, query_pre_attn_scalar=32),
    "gemma3_text": Gemma3TextConfig(
        **TEXT_FIELDS,
        sliding_window=32,
        query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "full_attention"],
    ),
}

VISION_FIELDS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 2,
    "vision_use_head": False,
}
# As Gemma 3's tokenizer names them.
VISION_TOKENS = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}


def make_tokenizer(num_unused: int = 10, **options) -> GemmaTokenizer:
    """A Gemma tokenizer over bytes and a few words, its first ids as in Gemma 2's: `<unused0>` is 7."""
    vocabulary = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<2mass>", "[@BOS@]"]
    vocabulary += [f"<unused{n}>" for n in range(num_unused)]
    vocabulary += ["<start_of_turn>", "<end_of_turn>", "\n"]
    vocabulary += [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary += ["▁", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?!'-"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("i", "n"), ("i", "s"), ("▁", "is")]
    vocabulary += ["".join(pair) for pair in merges]
    tokenizer = GemmaTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)}, merges=merges, add_bos_token=True, **options
    )
    # Gemma's own file lists these among its added tokens, so that no merge ever splits them.
    tokenizer.add_tokens(["<2mass>", "[@BOS@]", *(f"<unused{n}>" for n in range(num_unused)), "\n"])
    tokenizer.add_tokens(["<start_of_turn>", "<end_of_turn>"], special_tokens=True)
    return tokenizer


def make_vae(folder: Path, **fields) -> Path:
    torch.manual_seed(0)
    AutoencoderKLWan(**{**VAE_FIELDS, **fields}).save_pretrained(folder)
    return folder


def make_gemma(folder: Path, config: PreTrainedConfig, num_unused: int = 10, **save_options) -> Path:
    torch.manual_seed(1)
    auto_class = AutoModelForImageTextToText if isinstance(config, Gemma3Config) else AutoModelForCausalLM
    model = auto_class.from_config(config)
    model.generation_config = GenerationConfig(bos_token_id=2, pad_token_id=0, eos_token_id=[1, 8 + num_unused])
    model.save_pretrained(folder, **save_options)
    tokenizer = make_tokenizer(num_unused)
    tokenizer.chat_template = "{{ bos_token }}Gemma's own template, which knows no images"
    tokenizer.save_pretrained(folder)
    # Gemma's repos were written by transformers 4, which listed the added tokens here too.
    path = folder / "tokenizer_config.json"
    attributes = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    listed = {
        index: {name: getattr(token, name) for name in attributes}
        for index, token in tokenizer.added_tokens_decoder.items()
    }
    fields = {**json.loads(path.read_text()), "added_tokens_decoder": listed, "add_bos_token": True}
    path.write_text(json.dumps(fields))
    return folder


def make_multimodal_gemma(folder: Path) -> Path:
    """A Gemma 3 with a vision tower and its processor; an image's 64 tokens exceed the sliding window."""
    tokenizer = make_tokenizer(extra_special_tokens=VISION_TOKENS)
    ids = {f"{name}_index": tokenizer.convert_tokens_to_ids(token) for name, token in VISION_TOKENS.items()}
    config = Gemma3Config(
        text_config=TEXT_CONFIGS["gemma3_text"],
        vision_config=SiglipVisionConfig(**VISION_FIELDS),
        mm_tokens_per_image=64,
        **ids,
    )
    torch.manual_seed(2)
    model = AutoModelForImageTextToText.from_config(config)
    projector = model.model.multi_modal_projector
    torch.nn.init.normal_(projector.mm_input_projection_weight)  # initialized to zeros otherwise
    torch.nn.init.normal_(projector.mm_soft_emb_norm.weight)
    model.generation_config = GenerationConfig(bos_token_id=2, pad_token_id=0, eos_token_id=1)
    model.save_pretrained(folder)
    size = {"height": VISION_FIELDS["image_size"], "width": VISION_FIELDS["image_size"]}
    Gemma3Processor(Gemma3ImageProcessorPil(size=size), tokenizer, image_seq_length=64).save_pretrained(folder)
    return folder


def make_pipeline(folder: Path) -> Path:
    """A pipeline repo: the VAE in `vae/`, and other folders that must never be read."""
    make_vae(folder / "vae")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Cosmos2VideoToWorldPipeline"}))
    (folder / "transformer").mkdir()
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_text("not to be read")
    return folder
