"""The README's tables, from bench/results:   python -m bench.report [--check]

A table stands between <!-- bench: FOLDER/NAME --> and <!-- end -->, and is the rows of bench/results/FOLDER/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from .record import RESULTS, table

README = Path(__file__).parents[1] / "README.md"
MARKED = re.compile(r"(<!-- bench: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """The text with every marked table as the results have it; FileNotFoundError for a result that is not there."""

    def fill(match: re.Match) -> str:
        record = json.loads((RESULTS / f"{match[2]}.json").read_text())
        origin = f"*{record['device']}, {record['date']}, commit {record['commit']}: `{record['command']}`*"
        return f"{match[1]}{table(record['rows'])}\n\n{origin}\n{match[3]}"

    return MARKED.sub(fill, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the README differs")
    options = parser.parse_args()
    before = README.read_text()
    after = with_tables(before)
    if options.check:
        sys.exit("README.md differs from bench/results: run python -m bench.report" if after != before else 0)
    README.write_text(after)


if __name__ == "__main__":
    main()
