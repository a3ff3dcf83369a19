"""Tables: Markdown for people, JSON for `python -m benchmarks summary`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
MIB = 2**20


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and the rest numbers."""
    rules = [":--"] + ["--:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rules, *rows])


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits, without an exponent."""
    if value is None or math.isnan(value):
        return "-"
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def ratio(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"


def save(name: str, title: str, about: dict, text: str, result: dict) -> None:
    """Write `results/NAME.md` and `.json`, and print the former."""
    arguments = [f'"{a}"' if " " in a else a for a in sys.argv[1:]]
    command = " ".join(["python -m benchmarks", *arguments])
    facts = f"`{command}`\n\n{about['device']}; {about['versions']}."
    page = f"# {title}\n\n{facts}\n\n{text}\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(page)
    result = {"command": command, **about, **result}
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(page)


def load(name: str) -> dict | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None
