"""
The repo's Markdown pages: snippets, tables, links.

Every test that runs or checks something that the docs say reads it here:

    snippets("docs/video.md", "python")       all Python snippets of a page, in order
    snippet("docs/serving.md", "openai")      the one that contains this word
    table("README.md", "| | scenes, all |")   the cells of a table, by the start of its header

A snippet that needs another environment, or a test of its own, has a line directly above it:

    *Tested by `test_vllm.py` (`make test-vllm`).*
"""

import re
from dataclasses import dataclass

from tests.helpers import ROOT


PAGES = (
    "README.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")),
    "recipe/README.md",
    "demo/space/README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
)

SNIPPET = re.compile(
    r"(?:^\*Tested by `(?P<test>test_\w+\.py)` \(`make (?P<target>[\w-]+)`\)\.\*\n\n)?"
    r"^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    flags=re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Snippet:
    """
    A fenced block of a page.

    Args:
        page: Path of the page, relative to the repo's root.
        line: Line of its first line of code, from 1.
        language: What follows the fence, such as "python"; may be empty.
        code: What is in the block.
        test: Name of the test file that runs it, if the page says one; None: `test_snippets.py`.
        target: The Makefile's target that runs that test.
    """

    page: str
    line: int
    language: str
    code: str
    test: str | None
    target: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def promised(self) -> list[str]:
        """The comments after `print(...)`: the lines that the snippet prints."""
        return re.findall(r"print\(.*\)  # (.*)$", self.code, flags=re.MULTILINE)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names with the shapes in the comments after their assignments."""
        found = re.findall(r"^\s*(\w+) = .*  # \(([\d, ]+)\)$", self.code, flags=re.MULTILINE)
        return {name: tuple(int(side) for side in shape.split(",")) for name, shape in found}

    @property
    def commands(self) -> list[str]:
        """The lines of a shell snippet without comments and empty lines."""
        return [command for line in self.code.splitlines() if (command := line.split("  #")[0].strip())]


def read(page: str) -> str:
    return (ROOT / page).read_text()


def snippets(page: str, language: str | None = None) -> list[Snippet]:
    """All snippets of a page in this language, or in any, in order."""
    text = read(page)
    found = []
    for match in SNIPPET.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Snippet(page, line, match["language"], match["code"], match["test"], match["target"]))
    return [each for each in found if language in (None, each.language)]


def snippet(page: str, word: str, language: str = "python") -> Snippet:
    """The only snippet of a page in this language that contains `word`."""
    (found,) = (each for each in snippets(page, language) if word in each.code)
    return found


def all_snippets(language: str | None = None) -> list[Snippet]:
    return [each for page in PAGES for each in snippets(page, language)]


def command(page: str, word: str) -> str:
    """The only command in a page's shell snippets that contains `word`."""
    (found,) = (line for each in snippets(page, "bash") for line in each.commands if word in line)
    return found


def sentences(page: str) -> str:
    """A page's text on one line, to look for a sentence however its lines are broken."""
    return " ".join(read(page).split())


def table(page: str, header: str) -> list[list[str]]:
    """The cells of a page's only table whose header row starts with `header`: header row first."""
    lines = read(page).splitlines()
    (start,) = (number for number, line in enumerate(lines) if line.startswith(header))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [rows[0], *rows[2:]]


def code_in(text: str) -> list[str]:
    """The contents of single backticks in Markdown."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


def prose(page: str) -> str:
    """A page without its snippets."""
    return SNIPPET.sub("", read(page))


def anchors(page: str) -> set[str]:
    """What links to the headings of a page end in, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
