"""Tests how answers are found in replies, and the statistics of an evaluation."""

from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from theworld.evaluation.judge import judge
from theworld.evaluation.table import Answer, compare, mcnemar, score_task, wilson_interval


LETTERS = {
    "B": "B",
    "(B)": "B",
    " B.": "B",
    "**B**": "B",
    "B) the lamp": "B",
    "B: the lamp": "B",
    "`B`": "B",
    "The answer is B.": "B",
    "Answer: (B) the lamp": "B",
    "The correct option is (B).": "B",
    "the lamp": "B",
    "The lamp.": "B",
    "It is (B), because (B) is near.": "B",
    "(A) or (B)": None,
    "A, B and C": None,
    "A lamp stands there": None,
    "D": None,
    "": None,
    "I do not know": None,
}


@pytest.mark.parametrize(("reply", "letter"), LETTERS.items())
def test_a_letter_is_found_where_it_is_one(reply, letter):
    assert judge(reply, ["the bed", "the lamp", "the door"], "B", "letter") == (letter, letter == "B")


OTHERS = [
    ("word", "Red.", "red", "red", True),
    ("word", "reddish", "red", None, False),
    ("yes or no", "Yes, it is not hidden.", "yes", "yes", True),
    ("yes or no", "False", "no", "no", True),
    ("yes or no", "Incorrect, Region [0] is not below it.", "no", "no", True),
    ("yes or no", "Indeed, Region [0] is below it.", "yes", "yes", True),
    ("yes or no", "In fact, Region [0] is above it.", "no", "no", True),
    ("yes or no", "Region [0] is below it.", "yes", None, False),
    ("region", "Region [1] is wider than Region [0].", "1", "1", True),
    ("region", "region 0", "1", "0", False),
    ("region", "[1]", "1", "1", True),
    ("region", "the bed", "1", None, False),
    ("hour", "around the 12 o'clock direction", "1", "12", True),
    ("hour", "3 o'clock", "1", "3", False),
    ("hour", "10", "11", "10", True),
    ("hour", "north", "11", None, False),
    ("length", "It is 48.47 centimeters.", "0.4", "0.4847", True),
    ("length", "2 ft", "0.4", "0.6096", False),
    ("length", "35.9 inches wide", "0.91186", "0.91186", True),
    ("length", "1.5", "1.5", None, False),
    ("length", "1 m or 2 m", "1", None, False),
    ("number", "About 1,200.", "1200", "1200", 1),
    ("number", "3 chairs", "4", "3", 0.6),
    ("number", "3 or 4", "4", None, 0),
    ("number", "0", "4", "0", 0),
]


@pytest.mark.parametrize(("rule", "reply", "expected", "parsed", "right"), OTHERS)
def test_a_rule_finds_the_answer(rule, reply, expected, parsed, right):
    assert judge(reply, ["red", "blue"], expected, rule) == (parsed, right)


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_two_sided_binomial_test(first, second):
    pairs, least = first + second, min(first, second)
    as_far = [comb(pairs, k) for k in range(pairs + 1) if abs(k - pairs / 2) >= abs(least - pairs / 2)]
    assert mcnemar(first, second) == pytest.approx(sum(as_far) / 2**pairs)


def test_intervals_are_the_published_ones():
    assert wilson_interval(95, 100) == pytest.approx((0.8883, 0.9785), abs=1e-4)
    assert wilson_interval(10, 10)[1] == pytest.approx(1)


def make_answers(right: str) -> list[Answer]:
    return [Answer(str(n), "ab"[n % 2], "", None if c == "?" else "x", float(c == "1")) for n, c in enumerate(right)]


def test_arms_are_compared_on_the_same_questions():
    first, second = make_answers("11110?"), make_answers("0101?0")
    result = score_task({"world": first, "neither": second})
    assert [result["arms"][arm]["all"]["unparsed"] for arm in ("world", "neither")] == [1, 1]
    assert result["arms"]["world"]["a"]["accuracy"] == pytest.approx(2 / 3)
    (difference,) = result["differences"]
    assert (difference["first_better"], difference["second_better"], difference["p"]) == (2, 0, 0.5)
    assert difference["difference"] == pytest.approx(2 / 6)
    backward = compare(second, first)["interval"]
    assert difference["interval"] == pytest.approx((-backward[1], -backward[0]))


SCORES = (0.6, 0.4, 0.8), (0.3, 0.3, 0.3)
HALF = 1.96 * 0.2 / 3**0.5


def test_scores_between_0_and_1_have_normal_intervals():
    first, second = ([Answer(str(n), "a", "", "x", score) for n, score in enumerate(scores)] for scores in SCORES)
    result = score_task({"world": first, "neither": second})
    assert result["arms"]["world"]["all"]["interval"] == pytest.approx((0.6 - HALF, 0.6 + HALF))
    assert result["differences"][0]["interval"] == pytest.approx((0.3 - HALF, 0.3 + HALF))
    assert result["differences"][0]["p"] == 0.25
