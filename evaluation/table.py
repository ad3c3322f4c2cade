# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""The statistics of an evaluation, and the page that shows them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations


ALL = "all"
Z = 1.96  # 95 %


@dataclass(frozen=True)
class Answer:
    """
    A model's answer to a question.

    Args:
        id: The question's name, the same in every arm.
        category: What kind of question it is.
        reply: What the model said.
        parsed: The answer in it; None if there is none.
        right: Whether it is the expected one.
    """

    id: str
    category: str
    reply: str
    parsed: str | None
    right: bool


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a share."""
    share = right / total
    center = (share + Z**2 / (2 * total)) / (1 + Z**2 / total)
    half = Z * math.sqrt(share * (1 - share) / total + Z**2 / (4 * total**2)) / (1 + Z**2 / total)
    return center - half, center + half


def mcnemar(first_only: int, second_only: int) -> float:
    """The p-value of McNemar's exact test, two-sided: of questions that one of two arms alone answers right."""
    pairs = first_only + second_only
    tail = sum(math.comb(pairs, k) for k in range(min(first_only, second_only) + 1))
    return min(1.0, 2 * tail / 2**pairs)


def compare(first: list[Answer], second: list[Answer]) -> dict:
    """
    The difference of accuracy of two arms on the same questions, with its 95 % interval and the exact McNemar test.

    The interval is that of Bonett and Price (2012): Wald's, with one more pair of each discordant kind.
    """
    pairs = [(one.right, other.right) for one, other in zip(first, second, strict=True)]
    total, first_only, second_only = len(pairs), pairs.count((True, False)), pairs.count((False, True))
    gained, lost = (first_only + 1) / (total + 2), (second_only + 1) / (total + 2)
    half = Z * math.sqrt((gained + lost - (gained - lost) ** 2) / (total + 2))
    return {
        "difference": (first_only - second_only) / total,
        "interval": (max(-1.0, gained - lost - half), min(1.0, gained - lost + half)),
        "first_only": first_only,
        "second_only": second_only,
        "p": mcnemar(first_only, second_only),
    }


def count(answers: list[Answer]) -> dict:
    """The accuracy of answers, with its 95 % interval; an unparsed answer is wrong."""
    right = sum(answer.right for answer in answers)
    return {
        "right": right,
        "total": len(answers),
        "accuracy": right / len(answers),
        "interval": wilson_interval(right, len(answers)),
        "unparsed": sum(answer.parsed is None for answer in answers),
    }


def score(answers: list[Answer]) -> dict[str, dict]:
    """`count` of each category, in alphabetical order, and of all answers."""
    categories = sorted({answer.category for answer in answers})
    scores = {name: count([answer for answer in answers if answer.category == name]) for name in categories}
    return {**scores, ALL: count(answers)}


def score_task(arms: dict[str, list[Answer]]) -> dict:
    """The scores of every arm of a task, and what differs between each two of them."""
    differences = [
        {"first": first, "second": second, **compare(arms[first], arms[second])}
        for first, second in combinations(arms, 2)
    ]
    return {"arms": {arm: score(answers) for arm, answers in arms.items()}, "differences": differences}


# The page


def row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def rows(header: list[str], body: Iterable[list[str]]) -> list[str]:
    return [row(header), row("---" for _ in header), *map(row, body)]


def percent(share: float, interval: tuple[float, float], sign: str = "") -> str:
    low, high = (f"{round(100 * end, 1) + 0.0:{sign}.1f}" for end in interval)  # not -0.0
    return f"{100 * share:{sign}.1f} ({low} to {high})"


def accuracy_table(arms: dict[str, dict]) -> list[str]:
    """A row for each category, a column for each arm."""
    of_any = next(iter(arms.values()))
    body = [
        [
            name,
            str(of_any[name]["total"]),
            *(percent(of[name]["accuracy"], of[name]["interval"]) for of in arms.values()),
        ]
        for name in of_any
    ]
    body.append(["unparsed", "", *(str(of[ALL]["unparsed"]) for of in arms.values())])
    return rows(["", "questions", *arms], body)


def difference_table(differences: list[dict]) -> list[str]:
    """A row for each pair of arms."""
    return rows(
        ["", "difference", "only the first is right", "only the second is right", "p"],
        (
            [
                f"{each['first']} - {each['second']}",
                percent(each["difference"], each["interval"], "+"),
                str(each["first_only"]),
                str(each["second_only"]),
                f"{each['p']:.2g}",
            ]
            for each in differences
        ),
    )


def page(report: dict) -> str:
    """The report as Markdown."""
    lines = [
        f"# {report['model']}",
        "",
        "Accuracy in percent with 95 % (Wilson) intervals. An unparsed answer is wrong.",
    ]
    for task, result in report["tasks"].items():
        lines += ["", f"## {task}", "", *accuracy_table(result["arms"])]
        if result["differences"]:
            lines += ["", "Differences in points with 95 % intervals, and McNemar's exact test:", ""]
            lines += difference_table(result["differences"])
    lines += ["", "## Run", "", *rows(["", ""], run_rows(report))]
    return "\n".join(lines) + "\n"


def run_rows(report: dict) -> list[list[str]]:
    """What made the numbers: seconds, settings, versions, commits, and the SHA-256 of the weights."""
    seconds = [
        [f"seconds, {task}", ", ".join(f"{arm} {value}" for arm, value in result["seconds"].items())]
        for task, result in report["tasks"].items()
    ]
    named = [[name, str(value)] for part in ("settings", "versions") for name, value in report[part].items()]
    commits = [["commit of the code", str(report["commit"])], ["commit of the model", str(report["model_commit"])]]
    weights = [[f"SHA-256 of {name}", f"`{digest}`"] for name, digest in report["weights"].items()]
    return [*seconds, *named, *commits, *weights]
