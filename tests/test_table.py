"""The table of all runs: which runs share a row, what a gain is measured against, and runs as a text file."""

import json

import pytest

from kd.tools.curves import draw_curves, read_curves
from kd.tools.table import COLUMNS, collect, compare, format_table, pack

ARGS = {
    **{"detector": "fcos", "student": "r18", "data": None, "train_annotations": None, "image_size": [64, 64]},
    **{"teacher": None, "set": [], "distill_weight": 1.0, "inherit": False, "batch_size": 8, "lr": None},
}


@pytest.fixture
def runs(tmp_path):
    """Two seeds of plain and FRS, one of FRS with another alpha, of l2, of students that inherit and of a teacher, and
    one that was never evaluated."""

    def write(name: str, line: dict, **changes):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "args.json").write_text(json.dumps({**ARGS, "method": "none", "seed": 0, **changes}))
        (folder / "log.jsonl").write_text(json.dumps({"epoch": 4, "iteration": 400, "AP50": 0.5, **line}) + "\n")

    frs = {"method": "frs", "teacher": "r34"}
    write("s0/plain", {"AP": 0.40})
    write("s1/plain", {"AP": 0.44}, seed=1)
    write("s0/frs", {"AP": 0.45, "teacher_AP": 0.48}, **frs)
    write("s1/frs", {"AP": 0.47, "teacher_AP": 0.45}, seed=1, **frs)
    write("s0/other", {"AP": 0.41}, **{**frs, "set": ["alpha=1"]})
    write("s0/l2", {"AP": 0.43}, **{**frs, "method": "l2"})
    write("s0/l2 half", {"AP": 0.425}, **{**frs, "method": "l2", "distill_weight": 0.5})
    write("s0/inherit", {"AP": 0.52}, **{**frs, "method": "none", "inherit": True})
    write("s0/l2 inherit", {"AP": 0.53}, **{**frs, "method": "l2", "inherit": True})
    write("s0/frs inherit", {"AP": 0.55}, **{**frs, "inherit": True})
    write("s0/teacher", {"AP": 0.50}, student="r34")
    write("s0/long", {"AP": 0.60, "teacher_AP": 0.50, "iteration": 800}, **frs)
    write("s0/broken", {})
    return tmp_path


def test_rows(runs):
    """Seeds are compared pairwise: FRS is 0.05 and 0.03 above the plain student, 0.02 above l2, which has one seed.

    The standard deviation of two values is their difference over the root of 2.
    """
    rows = [dict(zip(COLUMNS, row)) for row in compare(collect(runs))]
    names = ("method", "student", "iterations", "seed: AP", "AP", "gain", "over l2", "over inherit")
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("none", "r18", "400", "0: 0.400, 1: 0.440", "0.420 ± 0.028", "", "", ""),
        ("none", "r34", "400", "0: 0.500", "0.500", "", "", ""),
        ("frs", "r34 -> r18", "400", "0: 0.450, 1: 0.470", "0.460 ± 0.014", "+0.040 ± 0.014", "+0.020", ""),
        ("frs alpha=1", "r34 -> r18", "400", "0: 0.410", "0.410", "+0.010", "-0.020", ""),
        ("frs inherit", "r34 -> r18", "400", "0: 0.550", "0.550", "+0.150", "+0.020", "+0.030"),
        ("l2", "r34 -> r18", "400", "0: 0.430", "0.430", "+0.030", "", ""),
        ("l2 inherit", "r34 -> r18", "400", "0: 0.530", "0.530", "+0.130", "", "+0.010"),
        ("l2 x 0.5", "r34 -> r18", "400", "0: 0.425", "0.425", "+0.025", "-0.005", ""),
        ("none inherit", "r34 -> r18", "400", "0: 0.520", "0.520", "+0.120", "-0.010", ""),
        ("frs", "r34 -> r18", "800", "0: 0.600", "0.600", "", "", ""),
    ]
    assert {row["data"] for row in rows} == {"shapes 64x64"}
    assert [row["teacher"] for row in rows] == ["", "", "0.465", *[""] * 6, "0.500 not above"]


def test_a_run_that_has_not_finished(tmp_path):
    """After 6 of 12 epochs it is no second seed of a run of 6."""
    for seed, epochs in ((0, 6), (1, 12)):
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "args.json").write_text(json.dumps({**ARGS, "method": "none", "seed": seed, "epochs": epochs}))
        (folder / "log.jsonl").write_text(json.dumps({"epoch": 6, "iteration": 600, "AP": 0.3, "AP50": 0.5}) + "\n")
    rows = [dict(zip(COLUMNS, row)) for row in compare(collect(tmp_path))]
    assert sorted(row["seed: AP"] for row in rows) == ["0: 0.300", "1: 0.300"]


def test_formats(runs):
    """What all rows share is above the table, empty columns are left out; the others are aligned, or Markdown."""
    rows = compare(collect(runs))
    heading, blank, *markdown = format_table(rows, markdown=True).splitlines()
    assert heading == "detector: fcos, data: shapes 64x64" and blank == ""
    assert len(markdown) == 2 + len(rows) and markdown[0].startswith("| method | student | iterations |")
    assert {line.count("|") for line in markdown} == {11}
    text = format_table(rows, markdown=False).splitlines()[2:]
    assert len(text) == 1 + len(rows) and len({line.index("00") for line in text[1:-1]}) == 1
    assert "over" not in format_table(rows[:2], markdown=True)  # no student to compare
    assert "detector" in format_table(rows[:1], markdown=False).splitlines()[0]  # nothing to hoist from a single row


def test_packed(runs, tmp_path):
    """A text file with a line per run is read like the folder."""
    pack(collect(runs), tmp_path / "runs.jsonl")
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 12
    assert compare(collect(tmp_path / "runs.jsonl")) == compare(collect(runs))
    assert [run["folder"] for run in collect(tmp_path / "runs.jsonl")][:2] == ["s0/frs", "s0/frs inherit"]


def test_no_runs(tmp_path):
    with pytest.raises(ValueError, match="nor a folder of evaluated runs"):
        collect(tmp_path)
    with pytest.raises(ValueError, match="absent does not exist"):
        collect(tmp_path / "absent")


def test_curves(tmp_path):
    """Means over seeds that were trained alike, where several have the epoch. The lines end at their last points."""
    logs = {"plain": [0.1, 0.3], "frs 0": [0.2, 0.4], "frs 1": [0.3], "l2 0": [0.2], "l2 1": [0.3]}
    for name, values in logs.items():
        method, _, seed = name.partition(" ")
        settings = {**ARGS, "method": method if seed else "none", "teacher": "r34" if seed else None}
        (tmp_path / name).mkdir()
        settings |= {"seed": int(seed or 0), "lr": 0.1 if name == "l2 1" else 0.2}
        (tmp_path / name / "args.json").write_text(json.dumps(settings))
        lines = [json.dumps({"epoch": epoch, "AP": ap}) for epoch, ap in enumerate(values, 1)]
        (tmp_path / name / "log.jsonl").write_text("\n".join(lines))
    curves = read_curves(collect(tmp_path))
    assert curves == {
        **{"fcos r18 frs": {1: 0.25, 2: 0.4}, "fcos r18 none": {1: 0.1, 2: 0.3}},
        **{"fcos r18 l2, lr 0.2": {1: 0.2}, "fcos r18 l2, lr 0.1": {1: 0.3}},
    }
    runs = [{"args": {**ARGS, "method": "none", "epochs": n}, "log": [{"epoch": n, "AP": 0.3}]} for n in (6, 12)]
    assert list(read_curves(runs)) == ["fcos r18 none, epochs 12", "fcos r18 none, epochs 6"]
    picture = draw_curves(curves)
    # AP 0.1..0.4 on 360 pixels from y = 390 up, epochs 1 and 2 at x = 60 and 650.
    assert [picture.getpixel((650, y)) != (255, 255, 255) for y in (30, 150, 60)] == [True, True, False]
    assert picture.getpixel((60, 210)) == picture.getpixel((650, 30)) != picture.getpixel((650, 150))
