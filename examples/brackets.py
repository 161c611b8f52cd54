"""Writes the texts of configs/train/grpo-tiny.toml: `python examples/brackets.py`.

`texts.jsonl` has prompts of opened brackets and completions that close them, of somebody careless: every fifth bracket
of a completion is another. A model learns from it what a completion looks like. `prompts.jsonl` has other prompts,
without completions: a reward says what is right.
"""

import json
import random
import sys
from pathlib import Path

PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">"}


def prompt(numbers: random.Random, most: int) -> tuple[str, str]:
    """Brackets of which 1 to `most` are open, and what closes them."""
    text, opened = "", []
    depth = numbers.randint(1, most)
    while len(opened) < depth:
        if opened and numbers.random() < 0.3:
            text += PAIRS[opened.pop()]
        else:
            opened.append(numbers.choice("([{<"))
            text += opened[-1]
    return text, "".join(PAIRS[bracket] for bracket in reversed(opened))


def careless(numbers: random.Random, closing: str) -> str:
    """The same with every fifth bracket another."""
    return "".join(numbers.choice(")]}>") if numbers.random() < 4 / 15 else bracket for bracket in closing)


def main(folder: Path = Path("runs/brackets"), texts: int = 4000, prompts: int = 1000, most: int = 4) -> None:
    """Writes both files; no prompt is in both, or twice."""
    numbers = random.Random(0)
    made: dict[str, str] = {}
    while len(made) < texts + prompts:
        text, closing = prompt(numbers, most)
        made.setdefault(text, closing)
    records = [{"prompt": text, "completion": closing} for text, closing in made.items()]
    numbers.shuffle(records)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = {
        "texts.jsonl": [{**one, "completion": careless(numbers, one["completion"])} for one in records[:texts]],
        "prompts.jsonl": [{"prompt": record["prompt"]} for record in records[texts:]],
    }
    for name, lines in chosen.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        print(f"wrote {len(lines):,} records to {folder / name}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
