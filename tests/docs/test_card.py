"""Tests what the model card and the docs state: length, metadata, tables, numbers, options, links and files."""

import json
import re
from typing import get_args

import pytest
from huggingface_hub import ModelCard
from transformers import Gemma2Config

from benchmarks.__main__ import as_table as benchmark_table
from benchmarks.reliability import PARTS
from benchmarks.reliability import as_table as reliability_table
from recipe.evaluate import LAST_FRAME
from recipe.evaluate import table as evaluation_table
from tests.helpers import ROOT
from tests.helpers.bad_inputs import BAD_INPUTS
from tests.helpers.docs import PAGES, all_snippets, anchors, code_in, prose, read, sentences, table
from theworld import TheWorldConfig, TheWorldProcessor, cli, convert_weights
from theworld.evaluation.clips import CLIP_KINDS
from theworld.evaluation.scenes import KINDS
from theworld.training.train import Arguments
from theworld.versions_theworld import TESTED


RESULTS = ROOT / "results"
# Options of programs that are not ours.
FOREIGN = {
    "vllm": {
        "--trust-remote-code",
        "--tensor-parallel-size",
        "--dtype",
        "--enable-lora",
        "--lora-modules",
        "--trust-request-mm-kwargs",
    },
    "accelerate": {"--multi_gpu", "--num_processes"},
    "torchrun": {"--nproc-per-node"},
    "trl": {
        "--model_name_or_path",
        "--trust_remote_code",
        "--dataset_name",
        "--load_in_4bit",
        "--use_peft",
        "--lora_target_modules",
    },
    "lm_eval": {"--model_args", "--include_path", "--tasks", "--apply_chat_template", "--batch_size", "--limit"},
    "hf": {"--repo-type", "--local-dir"},
}
# The changelog names options of other versions.
WITH_OPTIONS = [page for page in PAGES if page != "CHANGELOG.md"]


def load(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


# The card


def test_the_card_has_at_most_2000_words():
    assert len(read("README.md").split()) <= 2000


def test_the_cards_metadata_is_valid():
    data = ModelCard.load(ROOT / "README.md").data
    assert data.library_name == "transformers" and data.pipeline_tag == "image-text-to-text"
    assert data.license == "apache-2.0" and "custom_code" in data.tags and data.language == "en"
    assert data.model_name == "TheWorld, the bundled model"


def test_the_cards_metadata_has_the_evaluations_results():
    scores = load("evaluation.json")["scores"]
    listed = {
        result.metric_name: result.metric_value for result in ModelCard.load(ROOT / "README.md").data.eval_results
    }
    assert listed == {
        name: round(100 * scores[condition][part]["share"], 1)
        for name, (condition, part) in {
            "accuracy": ("world tokens", "overall"),
            "accuracy without an image": ("no image", "overall"),
            "accuracy on clips": ("world tokens", "clips"),
            "accuracy on clips by the last frame alone": (LAST_FRAME, "clips"),
        }.items()
    }


def test_the_cards_results_are_those_of_the_full_table():
    (_, *groups), *rows = table("README.md", "| | scenes, all | clips, all |")
    header, *full = table("docs/evaluation.md", "| | world tokens |")
    cells = {(kind, run): cell for kind, *of_kind in full for run, cell in zip(header[1:], of_kind, strict=True)}
    assert [run for run, *_ in rows] == [*header[1:7], "guessing"]
    for run, *of_run in rows[:-1]:
        assert of_run == [cells[group, run] for group in groups]
    chances = (sum(1 / len(answers) for answers in kinds.values()) / len(kinds) for kinds in (KINDS, CLIP_KINDS))
    assert rows[-1][1:] == [f"{chance:.1%}".rstrip("%") for chance in chances]


def test_the_status_says_that_no_projection_was_trained():
    before_install = read("README.md").split("\n## Install\n")[0]
    assert "No real projection has been trained" in before_install


# Tables and numbers


@pytest.mark.parametrize(
    ("page", "name", "as_table"),
    [
        ("docs/evaluation.md", "evaluation", lambda report: evaluation_table(report["scores"])),
        ("docs/performance.md", "benchmarks", lambda report: benchmark_table(report["rows"])),
        ("docs/reliability.md", "reliability", reliability_table),
        ("docs/quantization.md", "quantized", None),  # test_quantized.py makes it, in an environment of its own
    ],
    ids=lambda each: each if isinstance(each, str) and "/" in each else "",
)
def test_result_tables_are_those_of_a_run(page, name, as_table):
    expected = (RESULTS / f"{name}.md").read_text().strip()
    assert expected in read(page)
    assert as_table is None or as_table(load(f"{name}.json")) == expected


def test_the_benchmarks_machine_and_duration_are_stated():
    report = load("benchmarks.json")
    assert report["machine"] in sentences("docs/performance.md") and report["seconds"] < 15 * 60


def test_the_stress_tests_held():
    report = load("reliability.json")
    assert list(report) == list(PARTS) and all(each["tried"] == each["held"] > 0 for each in report.values())
    assert report["bad_inputs"]["tried"] == len(BAD_INPUTS)
    for server in (report["web"], report["vllm"]):
        assert server["tried"] == 1000 and server["growth"] < 1.05 and 100 < server["broken off"] < 300


def test_the_number_of_bad_inputs_is_stated():
    stated = re.search(r"More than (\d+) bad inputs are listed", sentences("docs/reliability.md")).group(1)
    assert len({row.name for row in BAD_INPUTS}) == len(BAD_INPUTS) > int(stated)


def test_the_training_numbers_are_those_of_a_run():
    page, training = sentences("docs/finetuning.md"), load("training.json")
    for parts in ("projection", "language"):
        ratio = training[parts]
        stated = (
            f"{ratio['ratio']} times faster (range {ratio['least']} to {ratio['greatest']}) with `--train {parts}`"
        )
        assert stated in page


def test_the_new_question_numbers_are_those_of_a_run():
    page, learned = sentences("docs/finetuning.md"), load("new_kind.json")
    before, after = learned["before"], learned["after"]
    assert learned["question"].rstrip("?") in page and learned["adapter bytes"] < 1e6
    for part in ("new", "old"):
        stated = f"from {before[part]['share']:.1%} to {after[part]['share']:.1%}".replace("%", " %")
        assert stated in page
    assert after["new"]["share"] >= 0.9 and after["old"]["share"] >= before["old"]["share"] - 0.02


def test_the_limits_of_gemma_2_are_its_own():
    config = Gemma2Config()
    assert (config.max_position_embeddings, config.sliding_window) == (2 * 4096, 4096)


def test_the_web_pages_limits_are_its_own():
    app = read("demo/app.py")
    limits = dict(table("docs/serving.md", "| limit |")[1:])
    for limit, (what, stated) in {
        "MAX_BYTES = 5_000_000": ("a request", "5 MB"),
        "Image.MAX_IMAGE_PIXELS = 2**24": ("a picture", "16 megapixels"),
        "MAX_CHARACTERS = 1000": ("a question", "1000 characters"),
        "MAX_SECONDS = 60": ("an answer", "stops after 60 seconds"),
        "MAX_WAITING = 64": ("the queue", "64 requests"),
        "KEPT_SECONDS = 3600": ("uploads and conversations", "deleted after one hour"),
    }.items():
        assert f"\n{limit}\n" in app and limits[what].startswith(stated)


def test_the_special_tokens_are_those_of_config_and_template():
    _header, *rows = table("docs/architecture.md", "| token | config field |")
    tokens = {row[0].strip("`"): row[1].strip("`") for row in rows}
    assert len(tokens) == 7
    assert tuple(tokens)[:4] == TheWorldProcessor.world_tokens
    template, config = read("chat_template.jinja"), TheWorldConfig.from_pretrained(ROOT)
    vocabulary = TheWorldProcessor.from_pretrained(ROOT).tokenizer.get_vocab()
    for token, field in tokens.items():
        assert f"'{token}'" in template
        assert getattr(config, field) == vocabulary.get(token)


# Versions


def test_the_versions_are_those_of_the_tests():
    card = sentences("README.md")
    for package, (oldest, newest) in TESTED.items():
        assert f"{package} {oldest} to {newest}" in card
        for name, expected in (("newest", newest), ("oldest", oldest)):
            assert f"\n{package}=={expected}." in constraints(name)
    floor = re.search(r'"torch>=([\d.]+)"', read("pyproject.toml")).group(1)
    assert f"torch 2.13 (torch {floor} or later" in card and "\ntorch==2.13." in constraints("newest")


def constraints(name: str) -> str:
    return read(f"constraints/{name}.txt")


def test_the_table_of_versions_is_that_of_the_environments():
    _header, *rows = table("docs/usage.md", "| transformers | diffusers |")
    ci = read(".ci/run").splitlines()
    targets = [re.search(r"`make (\S+)`", row[2]).group(1) for row in rows]
    assert targets == ["test", "test-vllm", "test-oldest"]
    for (transformers, diffusers, _), name, target in zip(rows, ("newest", "vllm", "oldest"), targets, strict=True):
        assert {f"transformers=={transformers}", f"diffusers=={diffusers}"} <= set(constraints(name).split())
        assert f"make {target}" in ci


# Options


@pytest.fixture
def options(capsys) -> dict[str, set[str]]:
    """The options of each subcommand of `theworld`."""
    # It needs lm-eval.
    found = {"evaluate": set(re.findall(r'add\(\s*"(--[\w-]+)"', read("evaluation/evaluate.py")))}
    for command in cli.COMMANDS:
        if command not in ("app", "evaluate"):  # the first has none, and needs gradio
            capsys.readouterr()
            with pytest.raises(SystemExit):
                cli.main([command, "--help"])
            found[command] = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    return found


@pytest.mark.parametrize("page", WITH_OPTIONS)
def test_every_option_named_exists(page, options):
    known = set.union(*options.values(), *FOREIGN.values())
    named = " ".join(code_in(prose(page))) + " ".join(each.code for each in all_snippets("bash") if each.page == page)
    assert set(re.findall(r"(?<![\w-])--[\w-]+", named)) <= known


def test_the_table_of_conversion_is_the_converters(options):
    _header, *rows = table("docs/conversion.md", "| option |")
    documented = set(re.findall(r"--[\w-]+", " ".join(row[0] + row[2].split(";")[-1] for row in rows)))
    assert documented == options["convert"] - {"--help"}
    arguments = vars(convert_weights.parse_arguments(["--vae", "a", "--gemma", "b", "--output-dir", "c"]))
    for option, default, _ in rows:
        if default:
            value = arguments[option.strip("`-").replace("-", "_")]
            assert str(value) == default.strip("`") or (default == "off" and value is False), option


def test_the_tables_of_training_are_the_commands():
    fields = Arguments.__dataclass_fields__
    _header, *rows = table("docs/finetuning.md", "| option |")
    assert {row[0].strip("`-").replace("-", "_") for row in rows} == set(fields)
    for option, default, _ in rows:
        field = fields[option.strip("`-").replace("-", "_")]
        assert not default or str(field.default) == default.strip("`"), option
    _header, *parts = table("docs/finetuning.md", "| `--train` | trains |")
    assert tuple(row[0].strip("`") for row in parts) == get_args(fields["train"].type)


# Links and files


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (folder / name).resolve() if name else ROOT / page
        path = target.relative_to(ROOT).as_posix()
        assert (ROOT / path).exists(), link
        assert not anchor or anchor in anchors(path), link


def paths_in(page: str) -> set[str]:
    """Paths in a page's prose, relative to the repo's root, and those in tables of files, relative to the page."""
    folder = (ROOT / page).parent if page == "recipe/README.md" else ROOT
    listed = re.findall(r"^\|[^|]*\| (`[^|]*`) \|", prose(page), re.MULTILINE) if page == "recipe/README.md" else []
    if page == "docs/architecture.md":
        listed = [row[0] for row in table(page, "| file |")] + [row[1] for row in table(page, "| step |")]
    named = [(folder / path).resolve() for path in code_in(" ".join(listed))]
    named += [
        ROOT / path for path in code_in(prose(page)) if re.fullmatch(r"\w[\w.-]*/([\w.-]+/)*([\w-]+\.\w+)?", path)
    ]
    return {path.relative_to(ROOT).as_posix() + ("" if path.suffix else "/") for path in named}


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_every_file_named_is_there(page):
    for path in paths_in(page):
        assert (ROOT / path).exists(), path


def test_the_tree_lists_every_file_of_the_remote_code():
    listed = {name for row in table("docs/architecture.md", "| file |") for name in code_in(row[0])}
    remote = {path.name for path in ROOT.glob("*_theworld.py")}
    assert remote <= listed


def test_the_port_guide_names_what_exists():
    guide = read("docs/architecture.md").split("\n## Port to the next Gemma\n")[1]
    names = {name for name in code_in(guide) if re.fullmatch(r"[A-Z_]{4,}|_?[a-z]+_\w+", name)}
    folders = ("", "checkpoints/", "training/", "tests/helpers/", "tests/checkpoints/", "tests/integration/")
    code = " ".join(path.read_text() for folder in folders for path in ROOT.glob(f"{folder}*.py"))
    assert len(names) > 15
    assert {name for name in names if not re.search(rf"\b{name}\b", code)} == set()


def test_every_page_is_listed_in_the_card():
    links = set(re.findall(r"\]\(([^)#]+)", read("README.md")))
    assert {page for page in PAGES if page.startswith("docs/")} | {"CONTRIBUTING.md", "SECURITY.md"} <= links


def test_the_changelog_knows_the_version():
    version = re.search(r'^version = "(.*)"', read("pyproject.toml"), flags=re.MULTILINE).group(1)
    headings = re.findall(r"^## \[(.*?)\]", read("CHANGELOG.md"), flags=re.MULTILINE)
    assert headings[0] == "Unreleased" and version in headings
