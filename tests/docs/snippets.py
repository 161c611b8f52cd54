"""The fenced blocks of README.md, CONTRIBUTING.md and docs/."""

import dataclasses
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Stands before a block that cannot run here, with the reason.
NOT_RUN = "<!-- compiled only: "


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: `line` is where its text begins; `runs` is False behind a comment that says why not."""

    page: Path
    line: int
    language: str
    text: str
    runs: bool

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, language: str) -> list[Block]:
    """The page's blocks of one language, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        before = text[: match.start()].rstrip("\n").rsplit("\n", 1)[-1]
        if match[1] == language:
            line = text[: match.start(2)].count("\n") + 1
            found.append(Block(page, line, language, match[2], not before.startswith(NOT_RUN)))
    return found


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a shell block, comments left out and continued lines joined."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]
