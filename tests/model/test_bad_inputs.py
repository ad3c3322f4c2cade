"""Tests that bad input is read as intended, or rejected with a clear message (`tests/helpers/bad_inputs.py`)."""

import pytest
import torch

from tests.helpers.bad_inputs import BAD_INPUTS, Given, Row, damaged_files, read_file, whole_files


@pytest.fixture(scope="module")
def given(convert, convert_whole, tmp_path_factory) -> Given:
    folder = tmp_path_factory.mktemp("files")
    return Given.load(convert("gemma2"), folder, with_vision=Given.load(convert_whole(), folder))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("row", BAD_INPUTS, ids=[row.name for row in BAD_INPUTS])
def test_bad_input_is_read_right_or_rejected(given, row: Row):
    row.check(given)


@pytest.mark.filterwarnings("ignore")  # Pillow's, about damaged files
def test_a_damaged_file_is_read_or_rejected(given):
    read = [read_file(given, form, content) for form, content in damaged_files(each=50)]
    assert 100 < sum(read) < len(read) - 100
    assert all(read_file(given, form, content) for form, content in whole_files().items())


@pytest.mark.parametrize(
    "row",
    [
        Row("answered", lambda given: 1, "never"),
        Row("rejected with another message", lambda given: int("x"), "never"),
        Row("another answer", lambda given: torch.zeros(1), lambda given: torch.ones(1)),
    ],
    ids=lambda row: row.name,
)
def test_the_check_of_a_row_can_fail(given, row: Row):
    with pytest.raises(AssertionError):
        row.check(given)


def test_the_check_of_a_file_can_fail(given, monkeypatch):
    monkeypatch.setattr(Given, "pixels", lambda given, image: {}[image])
    with pytest.raises(AssertionError, match="BMP: KeyError"):
        read_file(given, "BMP", whole_files()["BMP"])
