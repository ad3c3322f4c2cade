"""Tests the converter: it reads real formats, keeps all numbers, and reports errors in one clear line."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Gemma2Config,
    Gemma3Config,
    GenerationConfig,
    SiglipVisionConfig,
)

from tests.helpers.checkpoints import TEXT_CONFIGS, make_gemma, make_tokenizer, make_vae
from theworld import TheWorldForConditionalGeneration, convert_weights
from theworld.checkpoints import sources as hub_sources
from theworld.checkpoints import tensors as conversion
from theworld.checkpoints.reader import CheckpointError
from theworld.checkpoints.tensors import map_gemma_key, map_vae_key


@pytest.fixture
def run(sources, tmp_path, capsys):
    """Runs the command; gives its exit code, what it printed, and its error line."""

    def run(*options: str, vae=sources / "pipeline", gemma=sources / "gemma2", output=tmp_path / "out"):
        arguments = ["--vae", str(vae), "--gemma", str(gemma), "--output-dir", str(output)]
        code = convert_weights.main([*arguments, "--image-size", "64", *options])
        printed = capsys.readouterr()
        return code, printed.out, printed.err.splitlines()[-1] if printed.err else ""

    return run


@pytest.fixture
def copied(sources, tmp_path):
    """A copy of a source folder that a test may spoil."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(sources / name, tmp_path / "spoiled" / name))

    return copy


def edit_json(path: Path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensors(path: Path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("encoder.conv_in.weight", "model.world_encoder.encoder.conv_in.weight"),
        ("quant_conv.bias", "model.world_encoder.quant_conv.bias"),
        ("decoder.conv_in.weight", None),
        ("post_quant_conv.weight", None),
    ],
)
def test_vae_keys(key, name):
    assert map_vae_key(key) == name


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
        ("model.layers.3.mlp.up_proj.weight", "model.language_model.layers.3.mlp.up_proj.weight"),
        ("language_model.model.norm.weight", "model.language_model.norm.weight"),
        ("model.language_model.norm.weight", "model.language_model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("vision_tower.vision_model.post_layernorm.bias", None),
        ("model.vision_tower.vision_model.post_layernorm.bias", None),
        ("multi_modal_projector.mm_input_projection_weight", None),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", None),
    ],
)
def test_gemma_keys(key, name):
    assert map_gemma_key(key) == name


@pytest.mark.parametrize("map_key", [map_vae_key, map_gemma_key])
def test_unknown_keys_are_errors(map_key):
    with pytest.raises(CheckpointError, match="has a tensor 'transformer.wte.weight'"):
        map_key("transformer.wte.weight")


def test_weights_arrive_bit_for_bit(sources, checkpoint):
    model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True)
    vae = AutoencoderKLWan.from_pretrained(sources / "pipeline" / "vae").state_dict()
    gemma = AutoModelForCausalLM.from_pretrained(sources / model.config.text_config.model_type).state_dict()
    state = model.state_dict()
    for key, tensor in vae.items():
        if (name := map_vae_key(key)) is not None:
            assert torch.equal(state.pop(name), tensor), key
    for key, tensor in gemma.items():
        assert torch.equal(state.pop(map_gemma_key(key)), tensor), key
    assert set(state) == {"model.world_projection.linear_1.weight", "model.world_projection.linear_1.bias"}


def test_the_folder_is_a_complete_model_repo(checkpoint):
    assert {path.name for path in checkpoint.iterdir()} == {
        "README.md",
        "SHA256SUMS",
        "chat_template.jinja",
        "validation_theworld.py",
        "config.json",
        "configuration_theworld.py",
        "encoder_theworld.py",
        "wan_blocks_theworld.py",
        "generation_config.json",
        "generation_theworld.py",
        "images_theworld.py",
        "model.safetensors",
        "modeling_theworld.py",
        "padding_theworld.py",
        "processing_theworld.py",
        "processor_config.json",
        "modalities_theworld.py",
        "tokenizer.json",
        "tokenizer_config.json",
        "versions_theworld.py",
        "videos_theworld.py",
        "winograd_theworld.py",
    }
    template = (convert_weights.HERE / "chat_template.jinja").read_text()
    assert (checkpoint / "chat_template.jinja").read_text() == template
    assert AutoTokenizer.from_pretrained(checkpoint).chat_template == template
    saved = json.loads((checkpoint / "config.json").read_text())
    assert saved["architectures"] == ["TheWorldForConditionalGeneration"]
    assert set(saved["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageTextToText",
        "AutoModelForMultimodalLM",
    }


def test_generation_config_is_gemmas_and_never_emits_world_tokens(checkpoint):
    generation_config = GenerationConfig.from_pretrained(checkpoint)
    assert generation_config.eos_token_id == [1, 18]
    assert generation_config.suppress_tokens == [7, 8, 9, 10]


def test_only_unused_entries_become_world_tokens(sources, checkpoint):
    before, after = AutoTokenizer.from_pretrained(sources / "gemma2"), AutoTokenizer.from_pretrained(checkpoint)
    renamed = {"<unused0>": "<world>", "<unused1>": "<start_of_world>", "<unused2>": "<end_of_world>"}
    renamed["<unused3>"] = "<world_video>"
    expected = {renamed.get(token, token): index for token, index in before.get_vocab().items()}
    assert after.get_vocab() == expected and len(after) == len(before)
    text = "The world is in\nthe <start_of_turn> 1 é"
    assert after(text).input_ids == before(text).input_ids
    a = after.convert_tokens_to_ids("a")
    assert after("a<world><end_of_world>").input_ids == [2, a, 7, 9]
    assert after.decode([2, a, 7, 9], skip_special_tokens=True) == "a"


def test_the_processor_pads_videos_for_the_encoder(tmp_path, run):
    vae = make_vae(tmp_path / "vae", temperal_downsample=[False, True, False])
    assert run(vae=vae)[0] == 0
    model = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    inputs = processor(text="<world_video>", videos=torch.zeros(4, 64, 64, 3, dtype=torch.uint8), return_tensors="pt")
    assert inputs["pixel_values_videos"].shape[1] == 5
    assert model(**inputs.to(model.dtype)).video_hidden_states.shape[1] == 3 * 64


def test_without_unused_entries_rows_are_appended_at_the_mean(tmp_path, run):
    vocab_size = len(make_tokenizer(num_unused=0))
    config = Gemma2Config(**{**TEXT_CONFIGS["gemma2"].to_dict(), "vocab_size": vocab_size})
    gemma = make_gemma(tmp_path / "gemma", config, num_unused=0)
    assert run("--dtype", "float32", gemma=gemma)[0] == 0
    model = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    table = model.get_input_embeddings().weight
    source = load_file(gemma / "model.safetensors")["model.embed_tokens.weight"]
    assert processor.image_token_id == model.config.image_token_id == vocab_size
    assert len(table) % 64 == 0 and len(table) - vocab_size >= 4
    assert torch.equal(table[:vocab_size], source)
    torch.testing.assert_close(table[vocab_size:], source.mean(0).expand(len(table) - vocab_size, -1))
    assert model.lm_head.weight is table


def test_rows_that_no_token_has_are_never_sampled(tmp_path, run):
    vocab_size = len(make_tokenizer(num_unused=0))
    config = Gemma2Config(**{**TEXT_CONFIGS["gemma2"].to_dict(), "vocab_size": vocab_size})
    assert run("--dtype", "float32", gemma=make_gemma(tmp_path / "gemma", config, num_unused=0))[0] == 0
    model = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[:vocab_size] /= 1000  # all that is likely is what was appended
        sampled = model.generate(torch.full((8, 2), 20), do_sample=True, top_k=0, max_new_tokens=32, eos_token_id=[])
    assert model.config.text_config.vocab_size > vocab_size + 4
    assert sampled.max() < vocab_size


def test_an_entry_beyond_the_table_appends_no_rows(tmp_path, run):
    """Gemma 3 1B's tokenizer has 262145 entries for an embedding of 262144 rows."""
    vocab_size = len(make_tokenizer()) - 1
    config = Gemma2Config(**{**TEXT_CONFIGS["gemma2"].to_dict(), "vocab_size": vocab_size})
    gemma = make_gemma(tmp_path / "gemma", config)
    assert run("--dtype", "float32", gemma=gemma)[0] == 0
    model = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    source = load_file(gemma / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.get_input_embeddings().weight, source)
    assert (model.config.image_token_id, model.config.video_token_id) == (7, 10)
    assert model.generation_config.suppress_tokens == [7, 8, 9, 10]


def test_a_table_with_room_keeps_its_size(tmp_path, run):
    """Gemma 3's table has more rows than its tokenizer has entries."""
    gemma = make_gemma(tmp_path / "gemma", TEXT_CONFIGS["gemma2"], num_unused=2)
    assert run("--dtype", "float32", gemma=gemma)[0] == 0
    model = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert len(model.get_input_embeddings().weight) == TEXT_CONFIGS["gemma2"].vocab_size
    assert model.config.image_token_id == len(make_tokenizer(num_unused=2))


def test_sharded_sources_in_bfloat16(tmp_path, sources, run):
    gemma = make_gemma(tmp_path / "gemma", TEXT_CONFIGS["gemma2"], max_shard_size="100KB")
    vae = make_vae(tmp_path / "vae")
    AutoencoderKLWan.from_pretrained(vae).save_pretrained(tmp_path / "vae-sharded", max_shard_size="200KB")
    assert (
        len(list(gemma.glob("*.safetensors"))) > 1 and len(list((tmp_path / "vae-sharded").glob("*.safetensors"))) > 1
    )
    assert run(gemma=gemma, vae=tmp_path / "vae-sharded")[0] == 0
    model = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.dtype == torch.bfloat16
    source = load_file(sources / "gemma2" / "model.safetensors")["model.norm.weight"]
    assert torch.equal(model.model.language_model.norm.weight, source.to(torch.bfloat16))


def test_large_outputs_are_sharded_with_an_index(run, tmp_path, monkeypatch):
    assert run("--dtype", "float32", output=tmp_path / "whole")[0] == 0
    monkeypatch.setattr(conversion, "MAX_SHARD_SIZE", "200KB")
    assert run("--dtype", "float32", output=tmp_path / "sharded")[0] == 0
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    whole, sharded = (
        AutoModel.from_pretrained(tmp_path / name, trust_remote_code=True).state_dict()
        for name in ("whole", "sharded")
    )
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for name, tensor in sharded.items() if name != "lm_head.weight"
    )
    assert all(torch.equal(whole[name], sharded[name]) for name in whole) and len(whole) == len(sharded)


@pytest.fixture(scope="module")
def multimodal_gemma(tmp_path_factory) -> Path:
    vision_config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = Gemma3Config(text_config=TEXT_CONFIGS["gemma3_text"], vision_config=vision_config, mm_tokens_per_image=4)
    return make_gemma(tmp_path_factory.mktemp("multimodal") / "gemma3", config)


def test_the_language_part_of_a_multimodal_gemma_3(multimodal_gemma, run, tmp_path):
    code, printed, _ = run("--dtype", "float32", gemma=multimodal_gemma)
    assert code == 0
    assert "decoder, multi_modal_projector, post_quant_conv, vision_tower" in printed
    model = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert model.config.text_config.model_type == "gemma3_text"
    source = AutoModelForImageTextToText.from_pretrained(multimodal_gemma).eval()
    input_ids = torch.randint(20, 340, (1, 40))
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, source(input_ids).logits)


def test_an_untied_head_is_kept(tmp_path, run):
    config = Gemma2Config(**{**TEXT_CONFIGS["gemma2"].to_dict(), "tie_word_embeddings": False})
    gemma = make_gemma(tmp_path / "gemma", config)
    assert run("--dtype", "float32", gemma=gemma)[0] == 0
    model = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    source = load_file(gemma / "model.safetensors")
    assert torch.equal(model.lm_head.weight, source["lm_head.weight"])
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


def test_the_report_counts_what_was_written(run, tmp_path):
    code, printed, _ = run("--dtype", "float32")
    assert code == 0
    table = {line[:20].strip(): line[20:].split() for line in printed.splitlines()}
    model = TheWorldForConditionalGeneration.from_pretrained(tmp_path / "out")
    parts = {
        "world encoder": model.model.world_encoder,
        "projection": model.model.world_projection,
        "Gemma": model.model.language_model,
        "total": model,
    }
    for part, module in parts.items():
        count = sum(parameter.numel() for parameter in module.parameters())
        assert table[part] == [f"{count:,}", f"{4 * count:,}"], part
    assert int(table["dropped keys"][0]) == 86
    assert float(table["latent difference"][0]) < 1e-5


def test_the_same_sources_give_the_same_files(run, tmp_path):
    contents = []
    for output in (tmp_path / "first", tmp_path / "second"):
        assert run(output=output)[0] == 0
        contents.append((output / "model.safetensors").read_bytes())
    assert contents[0] == contents[1]


def test_options_reach_the_config(run, tmp_path):
    options = ["--projector-type", "mlp", "--latent-merge-size", "2", "--normalize-latents", "--dtype", "float16"]
    assert run(*options)[0] == 0
    model = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    config = model.config
    assert (config.projector_type, config.latent_merge_size, config.normalize_latents) == ("mlp", 2, True)
    assert model.dtype == torch.float16 and model.model.world_projection.linear_1.in_features == 64


def fake_hub(sources: Path, tmp_path: Path, requests: list):
    """Replaces `snapshot_download`: copies the matching files to a folder named by a commit."""
    repos = {
        "org/pipeline": (sources / "pipeline", "a" * 40),
        "org/gemma": (sources / "gemma2", "b" * 40),
        "org/vae": (sources / "pipeline" / "vae", "c" * 40),
    }

    def snapshot_download(repo_id, revision=None, allow_patterns=None):
        requests.append((repo_id, revision))
        folder, commit = repos[repo_id]
        snapshot = tmp_path / "hub" / commit
        names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, snapshot / name)
        return str(snapshot)

    return snapshot_download


def test_hub_sources_are_fetched_sparsely_and_named_by_commit(sources, tmp_path, run, monkeypatch):
    requests = []
    monkeypatch.setattr(hub_sources, "snapshot_download", fake_hub(sources, tmp_path, requests))
    options = ["--vae-revision", "v1", "--gemma-revision", "main"]
    assert run(*options, vae="org/pipeline", gemma="org/gemma")[0] == 0
    assert requests == [("org/pipeline", "v1"), ("org/gemma", "main")]
    fetched = {
        str(path.relative_to(tmp_path / "hub" / ("a" * 40))) for path in (tmp_path / "hub" / ("a" * 40)).rglob("*.*")
    }
    assert fetched == {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}

    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == ["org/pipeline", "org/gemma"]
    assert card.data.pipeline_tag == "image-text-to-text" and "custom_code" in card.data.tags
    assert f"`org/pipeline` at commit `{'a' * 40}`" in card.text and f"`org/gemma` at commit `{'b' * 40}`" in card.text


def test_a_repo_that_is_a_vae_itself(sources, tmp_path, run, monkeypatch):
    monkeypatch.setattr(hub_sources, "snapshot_download", fake_hub(sources, tmp_path, []))
    assert run("--vae-subfolder", "", vae="org/vae")[0] == 0
    assert ModelCard.load(tmp_path / "out" / "README.md").data.base_model == ["org/vae"]


@pytest.mark.parametrize(
    ("options", "unit"),
    [([], "8x8 pixels"), (["--latent-merge-size", "2"], "16x16 pixels"), (["--token-layout", "channel"], "channel")],
)
def test_the_card_says_what_a_token_stands_for(convert, options, unit):
    assert f"one token for each {unit}" in (convert("gemma2", *options) / "README.md").read_text()


def test_the_card_says_whether_vision_was_kept(convert, convert_whole):
    kept = "Gemma 3's vision tower is kept: images also pass through its SigLIP tower, 64 tokens each."
    assert kept in (convert_whole() / "README.md").read_text()
    assert "SigLIP" not in (convert("gemma2") / "README.md").read_text()


def test_private_needs_a_repo(run):
    code, _, error = run("--private")
    assert code == 1 and "--private is for the repo that --push-to-hub names" in error


def test_push_to_hub_uploads_the_finished_folder(run, tmp_path, monkeypatch):
    calls = []

    class FakeApi:
        def create_repo(self, repo_id, private, exist_ok):
            calls.append(("create", repo_id, private, exist_ok))

        def upload_folder(self, repo_id, folder_path):
            calls.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr(convert_weights, "HfApi", FakeApi)
    assert run("--push-to-hub", "org/theworld")[0] == 0
    assert calls[0] == ("create", "org/theworld", None, True)
    assert calls[1] == ("upload", "org/theworld", sorted(path.name for path in (tmp_path / "out").iterdir()))
    assert 'from_pretrained("org/theworld"' in (tmp_path / "out" / "README.md").read_text()


SPOILED = {
    "no config": (
        "gemma2",
        lambda folder: (folder / "config.json").unlink(),
        "has no config.json. Give a folder that `save_pretrained` wrote",
    ),
    "another architecture": (
        "gemma2",
        lambda folder: edit_json(folder / "config.json", architectures=["LlamaForCausalLM"]),
        "expected one of GemmaForCausalLM, .*, got LlamaForCausalLM",
    ),
    "a pickled checkpoint": (
        "gemma2",
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "neither model.safetensors nor model.safetensors.index.json. Only safetensors",
    ),
    "a Git LFS pointer": (
        "gemma2",
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "model.safetensors is not a complete safetensors file .* Download it again",
    ),
    "a truncated file": (
        "gemma2",
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100]),
        "is not a complete safetensors file",
    ),
    "a missing tensor": (
        "gemma2",
        lambda folder: edit_tensors(folder / "model.safetensors", lambda tensors: tensors.pop("model.norm.weight")),
        r"1 tensor\(s\) are missing from the checkpoints, such as 'model.language_model.norm.weight'",
    ),
    "an unknown tensor": (
        "gemma2",
        lambda folder: edit_tensors(folder / "model.safetensors", lambda tensors: tensors.update(extra=torch.ones(1))),
        "has a tensor 'extra', which no Gemma text model has",
    ),
    "a tied head that is another": (
        "gemma2",
        lambda folder: edit_tensors(
            folder / "model.safetensors", lambda tensors: tensors.update({"lm_head.weight": torch.ones(512, 64)})
        ),
        "'lm_head.weight' and 'model.embed_tokens.weight' differ, but config.json ties them",
    ),
    "a layer too many": (
        "gemma2",
        lambda folder: edit_json(folder / "config.json", num_hidden_layers=1, layer_types=["full_attention"]),
        "'model.layers.1.* is not in the model that its config.json describes",
    ),
    "NaN": (
        "gemma2",
        lambda folder: edit_tensors(
            folder / "model.safetensors", lambda tensors: tensors["model.norm.weight"].fill_(torch.nan)
        ),
        "'model.language_model.norm.weight' contains NaN or infinity in torch.bfloat16",
    ),
    "another vocabulary": (
        "gemma2",
        lambda folder: edit_json(folder / "config.json", vocab_size=576),
        r"'model.embed_tokens.weight' is \[512, 64\], but its config.json describes \[576, 64\]",
    ),
    "another VAE": (
        "pipeline",
        lambda folder: edit_json(folder / "vae" / "config.json", _class_name="AutoencoderKL"),
        "expected the config.json of a diffusers AutoencoderKLWan, got 'AutoencoderKL'. Name the pipeline's VAE",
    ),
    "another z_dim": (
        "pipeline",
        lambda folder: edit_json(
            folder / "vae" / "config.json", z_dim=8, latents_mean=[0.0] * 8, latents_std=[1.0] * 8
        ),
        r"Tensor 'encoder.conv_out.* is \[32.*\], but its config.json describes \[16.*Weights and config belong to",
    ),
    "z_dim without its statistics": (
        "pipeline",
        lambda folder: edit_json(folder / "vae" / "config.json", z_dim=8),
        "need one number for each of the latent channels, z_dim=8, got 16 and 16",
    ),
    "Wan 2.2": (
        "pipeline",
        lambda folder: edit_json(folder / "vae" / "config.json", is_residual=True, patch_size=2),
        "TheWorld supports the VAE of Wan 2.1 and Cosmos-Predict2, but this one has",
    ),
    "a VAE with another's tensor": (
        "pipeline",
        lambda folder: edit_tensors(
            folder / "vae" / "diffusion_pytorch_model.safetensors", lambda tensors: tensors.update(extra=torch.ones(1))
        ),
        "has a tensor 'extra', which no AutoencoderKLWan has",
    ),
    "no VAE": ("pipeline", lambda folder: shutil.rmtree(folder / "vae"), "pipeline has no config.json"),
}


@pytest.mark.parametrize(("source", "spoil", "message"), SPOILED.values(), ids=SPOILED)
def test_damaged_sources_give_one_line_and_leave_nothing(run, copied, tmp_path, source, spoil, message):
    folder = copied(source)
    spoil(folder)
    outputs = tmp_path / "outputs"
    code, printed, error = run(**{"vae" if source == "pipeline" else "gemma": folder}, output=outputs / "out")
    assert code == 1 and not printed
    assert error.startswith("theworld convert: error: ")
    assert re.search(message, error), error
    assert not list(outputs.iterdir())


def test_a_missing_shard_is_named(tmp_path, run):
    gemma = make_gemma(tmp_path / "gemma", TEXT_CONFIGS["gemma2"], max_shard_size="100KB")
    shard = sorted(gemma.glob("*.safetensors"))[1]
    shard.unlink()
    code, _, error = run(gemma=gemma)
    assert code == 1 and f"names {shard.name}, which is missing. Complete the download" in error


def test_a_source_that_cannot_be_found_is_named(run):
    code, _, error = run(vae="no such folder")
    assert code == 1 and "no such folder is neither a folder nor a Hub id (ORG/NAME)" in error
    code, _, error = run(vae="org/unreachable")
    assert code == 1 and "org/unreachable is not a local folder, and the download failed: " in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--max-pixels", "4096"],
            "--max-pixels keeps the shape of each image, and --image-size makes all images squares",
        ),
        (["--image-size", "60"], "--image-size must be a positive multiple of 8, got 60"),
        (["--latent-merge-size", "2", "--image-size", "72"], "--image-size must be a positive multiple of 16, got 72"),
        (["--token-layout", "channel", "--latent-merge-size", "2"], "`latent_merge_size=2` merges positions"),
    ],
)
def test_options_that_contradict_each_other(run, tmp_path, options, message):
    code, _, error = run(*options)
    assert code == 1 and message in error
    assert not (tmp_path / "out").exists()


def test_a_full_folder_is_kept_without_overwrite(run, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    assert run()[0] == 0  # empty is as good as absent
    shutil.rmtree(output)
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    code, _, error = run()
    assert code == 1 and "exists and holds something. Choose another --output-dir, or pass --overwrite" in error
    assert (output / "thesis.txt").read_text() == "years of work"
    assert run("--overwrite")[0] == 0
    assert (output / "config.json").exists() and not (output / "thesis.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_overwrite_keeps_the_old_folder(run, copied, tmp_path):
    output = tmp_path / "out"
    assert run()[0] == 0
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    gemma = copied("gemma2")
    edit_tensors(gemma / "model.safetensors", lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
    assert run("--overwrite", gemma=gemma)[0] == 1
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "spoiled"}


def test_an_output_that_is_a_source_is_rejected(run, copied):
    gemma = copied("gemma2")
    code, _, error = run("--overwrite", gemma=gemma, output=gemma)
    assert code == 1 and "would replace the source" in error
    assert (gemma / "model.safetensors").exists()


def test_a_file_in_the_outputs_place_is_kept(run, tmp_path):
    (tmp_path / "out").write_text("mine")
    code, _, error = run("--overwrite")
    assert code == 1 and "It is not a folder" in error and (tmp_path / "out").read_text() == "mine"
