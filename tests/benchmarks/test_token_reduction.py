"""The reducers' figures: the README shows what the committed file holds, and published shares are what arithmetic gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import token_reduction, token_reduction_published
from token_reduction import methods

ROOT = Path(__file__).parents[2]


def test_the_readme_holds_the_table_of_the_committed_figures():
    result = json.loads((ROOT / "benchmarks" / "results" / "token_reduction.json").read_text())
    first, last = token_reduction.MARKS
    shown = (ROOT / "README.md").read_text().split(first + "\n")[1].split("\n" + last)[0]
    assert shown == token_reduction.table(result)
    assert sorted(row["method"] for row in result["rows"]) == sorted(methods())
    assert all(0 < row["coverage"] <= 1 + 1e-6 and row["words_read"] is not None for row in result["rows"])


def test_the_table_goes_between_its_marks_and_nowhere_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n{}\nold\n{}\nb\n".format(*token_reduction.MARKS))
    token_reduction.into_readme(page, "new")
    assert page.read_text() == "a\n{}\nnew\n{}\nb\n".format(*token_reduction.MARKS)
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="needs the lines"):
        token_reduction.into_readme(page, "new")


def test_published_shares_are_reproduced_where_arithmetic_allows():
    rows = token_reduction_published.published()
    assert [row["ours"] == pytest.approx(row["published"]) for row in rows] == [True, True, False, False, True, True]
    tiles, video = rows[2], rows[3]
    assert tiles["ours"] == pytest.approx(tiles["published"], abs=0.011)  # one kept row of 282 is rounded
    assert tiles["with_kept_rows_not_rounded"] == tiles["published"] > tiles["without_the_system_prompt"] + 0.9
    assert video["needs"] == {"text_rows": [66, 66]}  # 35 of the system prompt and 31 of a question
