# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""
Exact rules that find the answer in a model's reply.

Each rule takes a reply and the possible answers, and returns the answer, or None if there is none or more than one.
Applied to a dataset's own answer, a rule gives what is expected.
"""

import re
from collections.abc import Callable


LETTERS = "ABCDEFGHIJ"
METERS = {
    "m": 1,
    "meter": 1,
    "metre": 1,
    "cm": 0.01,
    "centimeter": 0.01,
    "centimetre": 0.01,
    "mm": 0.001,
    "millimeter": 0.001,
    "millimetre": 0.001,
    "km": 1000,
    "kilometer": 1000,
    "kilometre": 1000,
    "ft": 0.3048,
    "foot": 0.3048,
    "feet": 0.3048,
    "in": 0.0254,
    "inch": 0.0254,
    "inches": 0.0254,
    "yd": 0.9144,
    "yard": 0.9144,
}
LENGTH = re.compile(rf"(\d+(?:\.\d+)?|\.\d+)\s*({'|'.join(sorted(METERS, key=len, reverse=True))})s?\b", re.IGNORECASE)
YES, NO = r"\b(yes|true|correct|indeed)\b", r"\b(no|not|false|incorrect|in fact|actually)\b|n't\b"


def only(found: list[str]) -> str | None:
    """The one answer that was found, if it is one."""
    return found[0] if len(set(found)) == 1 else None


def plain(text: str) -> str:
    """A text without case, surrounding punctuation and double spaces."""
    return " ".join(text.lower().split()).strip(" .,;:!?\"'`*()[]")


def find_letter(reply: str, choices: list[str]) -> str | None:
    """
    The letter of a choice.

    In this order: the letter alone, letters in brackets, a letter before a bracket, colon or period at the start, the
    letter after "answer" or "option", and the text of a choice.
    """
    letters = LETTERS[: len(choices)]
    patterns = (
        rf"^\W*([{letters}])\W*$",
        rf"[(\[`]([{letters}])[)\]`]",
        rf"^\W*([{letters}])[).:\n]",
        rf"(?i:\b(?:answer|option|choice)\b(?:\s+is)?)\W*([{letters}])\b",
    )
    for pattern in patterns:
        if found := re.findall(pattern, reply.strip()):
            return only(found)
    return only([letter for letter, choice in zip(letters, choices, strict=False) if plain(choice) == plain(reply)])


def find_word(reply: str, choices: list[str]) -> str | None:
    """The choice that is the whole reply."""
    return only([choice for choice in choices if plain(choice) == plain(reply)])


def find_yes_or_no(reply: str, choices: list[str]) -> str | None:
    """The first word, if it is yes or no, or true or false; else whether the reply denies or affirms."""
    match re.split(r"\W+", reply.strip().lower() + " ")[0]:
        case "yes" | "true":
            return "yes"
        case "no" | "false":
            return "no"
    if re.search(NO, reply, re.IGNORECASE):
        return "no"
    return "yes" if re.search(YES, reply, re.IGNORECASE) else None


def find_region(reply: str, choices: list[str]) -> str | None:
    """The region that the reply names first."""
    found = re.search(r"\bregion\W*(\d+)|^\W*(\d+)\W*$", reply.strip(), re.IGNORECASE)
    return (found[1] or found[2]) if found else None


def find_hour(reply: str, choices: list[str]) -> str | None:
    """The direction on a clock."""
    hours = re.findall(r"\b(1[0-2]|[1-9])(?=\s*o.?clock|\W*$)", reply.strip(), re.IGNORECASE)
    return only(hours)


def find_length(reply: str, choices: list[str]) -> str | None:
    """A length, in meters."""
    lengths = [f"{float(number) * METERS[unit.lower()]:.6g}" for number, unit in LENGTH.findall(reply)]
    return only(lengths)


def find_number(reply: str, choices: list[str]) -> str | None:
    """The only number."""
    return only([number.replace(",", "") for number in re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?|\.\d+", reply)])


def equal(parsed: str, expected: str) -> bool:
    return parsed == expected


def within_an_hour(parsed: str, expected: str) -> bool:
    """At most 30 degrees apart."""
    apart = abs(int(parsed) - int(expected))
    return min(apart, 12 - apart) <= 1


def within_a_quarter(parsed: str, expected: str) -> bool:
    """At most 25 % from the expected length."""
    return abs(float(parsed) - float(expected)) <= 0.25 * float(expected)


def mean_relative_accuracy(parsed: str, expected: str) -> float:
    """VSI-Bench's: the share of ten limits, from 50 % to 5 %, that the relative error does not exceed."""
    number, true = float(parsed), float(expected)
    error = abs(number - true) / true if true else float(number != true)
    return sum(error <= 1 - limit / 100 + 1e-9 for limit in range(50, 100, 5)) / 10


Find = Callable[[str, list[str]], str | None]
# A rule: how the answer is found, and its score, where True is 1.
RULES: dict[str, tuple[Find, Callable[[str, str], float]]] = {
    "letter": (find_letter, equal),
    "word": (find_word, equal),
    "yes or no": (find_yes_or_no, equal),
    "region": (find_region, equal),
    "hour": (find_hour, within_an_hour),
    "length": (find_length, within_a_quarter),
    "number": (find_number, mean_relative_accuracy),
}


def judge(reply: str, choices: list[str], expected: str, rule: str) -> tuple[str | None, float]:
    """The answer in a reply by a rule of `RULES`, and its score from 0 to 1."""
    find, fits = RULES[rule]
    parsed = find(reply, choices)
    return parsed, 0.0 if parsed is None else float(fits(parsed, expected))
