"""Tests the layout: names of modules, import cycles, the size of the root, the length of functions."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers import ROOT


PACKAGE = ("checkpoints", "demo", "evaluation", "training")
FOLDERS = (*PACKAGE, "benchmarks", "recipe", "scripts", "tests")
REMOTE_CODE = sorted(ROOT.glob("*_theworld.py"))
INSTALLED = [*ROOT.glob("*.py"), *(file for folder in PACKAGE for file in (ROOT / folder).glob("*.py"))]
FILES = sorted({*INSTALLED, *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))})
TEST_FILES = [file for file in FILES if file.is_relative_to(ROOT / "tests")]


def imports_of(file: Path) -> Iterator[tuple[int, str]]:
    """What a file imports: how many dots come first, and the name, of a module or of what is in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, ".".join(filter(None, (node.module, alias.name)))) for alias in node.names)


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("file", TEST_FILES, ids=name_of)
def test_no_test_file_imports_another(file):
    """Fixtures come from conftest.py, functions from tests/helpers."""
    for _, name in imports_of(file):
        parts = name.split(".")
        is_test = any(part.startswith("test_") for part in parts) and parts[0] != "transformers_tests"
        assert not is_test and "conftest" not in parts, name


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_module_is_imported_by_a_bare_name(file):
    """A module that is imported under two names exists twice."""
    stems = {each.stem for each in FILES} | set(PACKAGE)
    for dots, name in imports_of(file):
        assert dots or name.split(".")[0] not in stems, name


@pytest.mark.parametrize("file", INSTALLED, ids=name_of)
def test_installed_code_imports_by_absolute_names(file):
    """Only remote code is relative: transformers loads it from a folder with another name."""
    for dots, name in imports_of(file):
        if file in REMOTE_CODE:
            assert dots <= 1 and name.split(".")[0] not in ("theworld", "tests", "recipe", "benchmarks"), name
        elif file.name != "__init__.py":
            assert not dots and name.split(".")[0] not in ("tests", "recipe", "benchmarks"), name


def test_imports_have_no_cycle():
    modules = {name_of(file).removesuffix(".py").replace("/", "."): file for file in INSTALLED}
    graph = {}
    for module, file in modules.items():
        names = [name.removeprefix("theworld.") for _, name in imports_of(file)]
        graph[module] = {other for name in names for other in (name, name.rpartition(".")[0]) if other in modules}
    assert "configuration_theworld" in graph["modeling_theworld"] and "cli" in graph["training.train"]
    list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("file", REMOTE_CODE, ids=name_of)
def test_functions_of_remote_code_have_at_most_60_lines(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            assert not body or node.end_lineno - body[0].lineno < 60, node.name


def test_the_root_has_at_most_16_python_files():
    assert len(list(ROOT.glob("*.py"))) <= 16
