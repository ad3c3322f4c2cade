"""Pins that bad input is read as it was meant, or refused in words, by the table of `bad_inputs.py`."""

import re

import pytest
import torch
from test_readme import README

from tests.helpers.bad_inputs import BAD_INPUTS, Given, Row, damaged_files, read_file, whole_files


@pytest.fixture(scope="module")
def given(convert, convert_whole, tmp_path_factory) -> Given:
    folder = tmp_path_factory.mktemp("files")
    return Given.load(convert("gemma2"), folder, with_vision=Given.load(convert_whole(), folder))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("row", BAD_INPUTS, ids=[row.name for row in BAD_INPUTS])
def test_bad_input_is_read_right_or_refused(given, row: Row):
    row.check(given)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what it finds odd
def test_a_damaged_file_is_read_or_refused_in_words(given):
    read = [read_file(given, form, content) for form, content in damaged_files(each=50)]
    assert 100 < sum(read) < len(read) - 100
    assert all(read_file(given, form, content) for form, content in whole_files().items())


@pytest.mark.parametrize(
    "row",
    [
        Row("answered", lambda given: 1, "never"),
        Row("refused in other words", lambda given: int("x"), "never"),
        Row("another answer", lambda given: torch.zeros(1), lambda given: torch.ones(1)),
    ],
    ids=lambda row: row.name,
)
def test_a_row_can_fail(given, row: Row):
    with pytest.raises(AssertionError):
        row.check(given)


def test_a_file_can_fail(given, monkeypatch):
    monkeypatch.setattr(Given, "pixels", lambda given, image: {}[image])
    with pytest.raises(AssertionError, match="BMP: KeyError"):
        read_file(given, "BMP", whole_files()["BMP"])


def test_the_table_is_as_long_as_the_readme_says_and_its_names_differ():
    said = re.search(r"More than (\d+) bad inputs are a table", README).group(1)
    assert len({row.name for row in BAD_INPUTS}) == len(BAD_INPUTS) > int(said)
