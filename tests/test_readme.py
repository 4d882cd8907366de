"""The README's tables are those of the results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from microvllm.bench.report import with_tables

README = (Path(__file__).parents[1] / "README.md").read_text()
MARKED = re.compile(r"<!-- bench: (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)


def test_the_tables_are_those_of_the_results():
    assert len(MARKED.findall(README)) >= 4
    assert with_tables(README) == README, "run python -m bench.report"


def test_a_table_that_differs_is_seen():
    name, body = MARKED.findall(README)[0]
    changed = README.replace(body, body.replace("|", "| 1", 1))
    assert changed != README and with_tables(changed) == README, name


def test_a_table_without_a_result_is_an_error():
    with pytest.raises(FileNotFoundError):
        with_tables("<!-- bench: cpu/no-such-result -->\n<!-- end -->")
