"""The tables of results are what the runs' logs say, which are kept in an archive."""

import tarfile
from pathlib import Path

import pytest

from kd.tools.table import COLUMNS, collect, compare, format_table

ROOT = Path(__file__).parents[1]
SHORT = ("method", "seed: AP", "AP", "gain", "over l2")  # columns of the README's tables


@pytest.fixture
def runs(tmp_path):
    with tarfile.open(ROOT / ".github" / "runs.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "runs"


def test_whole_tables(runs):
    """RESULTS.md has every row of every folder."""
    text = (ROOT / "kd" / "methods" / "RESULTS.md").read_text()
    folders = sorted(folder for folder in runs.iterdir())
    assert [folder.name for folder in folders] == ["ablations", "person", "shapes"]
    for folder in folders:
        for line in format_table(compare(collect(folder)), markdown=True).splitlines():
            assert line in text


def test_short_tables(runs):
    """Each row of the README's tables of results is one of those, with some columns left out."""
    columns = [COLUMNS.index(name) for name in SHORT]
    rows = [[row[column] for column in columns] for row in compare(collect(runs))]
    lines = (ROOT / "README.md").read_text().splitlines()
    starts = [i + 2 for i, line in enumerate(lines) if line == f"| {' | '.join(SHORT)} |"]
    assert len(starts) == 2
    for start in starts:
        for line in lines[start : lines.index("", start)]:
            assert [cell.strip() for cell in line[1:-1].split("|")] in rows, line
