"""The project's pages in Markdown, and the examples in them. Knows nothing of how an example is run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLE_URL = "http://127.0.0.1:3000"
# Everything that is written for people, by its path in the repository.
PAGES = {
    str(file.relative_to(ROOT)): file.read_text(encoding="utf-8")
    for file in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
        *(ROOT / folder / "README.md" for folder in ("bentoctl", "benchmarks", "stable_diffusion/demo")),
        *sorted((ROOT / "docs").glob("*.md")),
    )
}


@dataclass(frozen=True)
class Example:
    """A fenced block of a page."""

    page: str
    language: str  # "" where the fence names none
    text: str

    @property
    def first_line(self) -> str:
        return self.text.partition("\n")[0]


EXAMPLES = [
    Example(page, language, text)
    for page, content in PAGES.items()
    for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", content, re.MULTILINE | re.DOTALL)
]


def examples_of(page: str, language: str) -> list[Example]:
    return [example for example in EXAMPLES if (example.page, example.language) == (page, language)]


def anchors_of(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def make_targets_in(page: str) -> set[str]:
    """The targets of the Makefile that a page names in code."""
    code = re.findall(r"^```\w*\n.*?^```$|`[^`\n]+`", PAGES[page], re.MULTILINE | re.DOTALL)
    named = {target for piece in code for target in re.findall(r"(?:^|`|\s)make ([a-z][\w-]*)", piece, re.MULTILINE)}
    return named - {"test-NAME"}
