"""What docs/privacy.md names is there."""

import ast
import re
from pathlib import Path

import pytest

from dp_synth.reporting import meaning

_TESTS = Path(__file__).parent
_PAGE = (_TESTS.parent / "docs" / "privacy.md").read_text()
_SEVERITIES = {"critical", "theoretical", "negligible"}


def _pitfalls():
    """The cells of each row of the tables of pitfalls."""
    tables = _PAGE.split("## How to read eps")[0]
    rows = [line for line in tables.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return [row for row in cells if row[0] != "Threat"]


def _defined(file):
    tree = ast.parse((_TESTS / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", _pitfalls(), ids=lambda row: row[0][:40])
def test_every_pitfall_has_tests_that_exist(row):
    _, severity, blocked, tests = row
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", tests)
    assert severity in _SEVERITIES and blocked
    assert named and len(named) == tests.count("`") // 2
    for file, test in named:
        assert test in _defined(file), f"{file}::{test}"


def test_the_table_of_eps_is_what_the_program_computes():
    rows = re.findall(r"^\| (1|3|10) \| ([\d.]+) % \| ([\d.]+) % \|", _PAGE, re.MULTILINE)
    assert len(rows) == 3
    for eps, guess, found in rows:
        computed = (meaning.guess(float(eps), 1e-5), meaning.found(float(eps), 1e-5, 0.001))
        assert computed == (f"{guess}\N{NO-BREAK SPACE}%", f"{found}\N{NO-BREAK SPACE}%")
