# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
"""The statistics of an evaluation, and the page that shows them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, stdev


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
        score: 1 if it is the expected one, 0 if not; between them for a number that is near.
    """

    id: str
    category: str
    reply: str
    parsed: str | None
    score: float


def wilson_interval(right: float, total: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a share."""
    share = right / total
    center = (share + Z**2 / (2 * total)) / (1 + Z**2 / total)
    half = Z * math.sqrt(share * (1 - share) / total + Z**2 / (4 * total**2)) / (1 + Z**2 / total)
    return center - half, center + half


def normal_interval(values: list[float]) -> tuple[float, float]:
    """The 95 % confidence interval of a mean, by the normal distribution."""
    mean = fmean(values)
    half = Z * (stdev(values) if len(values) > 1 else 0) / math.sqrt(len(values))
    return mean - half, mean + half


def mcnemar(first_better: int, second_better: int) -> float:
    """The p-value of McNemar's exact test, two-sided: of questions that one of two arms answers better."""
    pairs = first_better + second_better
    tail = sum(math.comb(pairs, k) for k in range(min(first_better, second_better) + 1))
    return min(1.0, 2 * tail / 2**pairs)


def paired_interval(differences: list[float]) -> tuple[float, float]:
    """
    The 95 % confidence interval of the mean of paired differences.

    That of Bonett and Price (2012) if they are -1, 0 or 1: Wald's, with one more pair of each discordant kind.
    """
    if not all(difference in (-1, 0, 1) for difference in differences):
        return normal_interval(differences)
    total = len(differences) + 2
    gained, lost = (differences.count(1) + 1) / total, (differences.count(-1) + 1) / total
    half = Z * math.sqrt((gained + lost - (gained - lost) ** 2) / total)
    return max(-1.0, gained - lost - half), min(1.0, gained - lost + half)


def compare(first: list[Answer], second: list[Answer]) -> dict:
    """The difference of accuracy of two arms on the same questions, with its interval and McNemar's exact test."""
    differences = [one.score - other.score for one, other in zip(first, second, strict=True)]
    first_better, second_better = (sum(sign * each > 0 for each in differences) for sign in (1, -1))
    return {
        "difference": fmean(differences),
        "interval": paired_interval(differences),
        "first_better": first_better,
        "second_better": second_better,
        "p": mcnemar(first_better, second_better),
    }


def count(answers: list[Answer]) -> dict:
    """The accuracy of answers, with its 95 % interval: Wilson's, unless a score is between 0 and 1."""
    scores = [answer.score for answer in answers]
    binary = all(each in (0, 1) for each in scores)
    return {
        "total": len(scores),
        "accuracy": fmean(scores),
        "interval": wilson_interval(sum(scores), len(scores)) if binary else normal_interval(scores),
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
        ["", "difference", "the first is better", "the second is better", "p"],
        (
            [
                f"{each['first']} - {each['second']}",
                percent(each["difference"], each["interval"], "+"),
                str(each["first_better"]),
                str(each["second_better"]),
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
        "Accuracy in percent with 95 % intervals. An unparsed answer is wrong.",
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
