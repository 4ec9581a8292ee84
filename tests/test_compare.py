"""The table of all runs: what shares a row, and what a gain is measured against."""

import json

import pytest

from kd.compare import collect, compare, format_table
from kd.curves import draw_curves, read_curves

SHARED = {
    **{"detector": "fcos", "student": "r18", "data": None, "train_annotations": None, "image_size": [64, 64]},
    **{
        "teacher": None,
        "teacher_weights": None,
        "set": [],
        "distill_weight": 1.0,
        "inherit": False,
        "batch_size": 8,
        "lr": None,
    },
}


@pytest.fixture
def runs(tmp_path):
    """Two seeds of plain and FRS, one of FRS with another alpha, a teacher, and a run that was never evaluated."""

    def write(name: str, line: dict, **changes):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "args.json").write_text(json.dumps({**SHARED, "method": "none", "seed": 0, **changes}))
        text = json.dumps({"epoch": 4, "iteration": 400, "AP50": 0.5, "images_per_second": 10.0, **line})
        (folder / "log.jsonl").write_text(text + "\n")

    frs = {"method": "frs", "teacher": "r34", "teacher_weights": "x"}
    write("s0/plain", {"AP": 0.40})
    write("s1/plain", {"AP": 0.44}, seed=1)
    write("s0/frs", {"AP": 0.45, "teacher_AP": 0.48, "images_per_second": 6.0}, **frs)
    write("s1/frs", {"AP": 0.47, "teacher_AP": 0.45, "images_per_second": 8.0}, seed=1, **frs)
    write("s0/other", {"AP": 0.41}, **{**frs, "set": ["alpha=1"]})
    write("s0/l2", {"AP": 0.43}, **{**frs, "method": "l2"})
    write("s0/l2 half", {"AP": 0.425}, **{**frs, "method": "l2", "distill_weight": 0.5})
    write("s0/teacher", {"AP": 0.50}, student="r34")
    write("s0/long", {"AP": 0.60, "teacher_AP": 0.50, "iteration": 800}, **frs)
    write("s0/broken", {})
    return tmp_path


def test_rows(runs):
    """Means 0.42 and 0.46: a gain of 0.04. Standard deviation of two values: their difference over the root of 2."""
    rows = compare(collect(runs))
    assert [(row[0], row[2], row[4], row[5], row[7], row[9], row[10]) for row in rows] == [
        ("none", "r18", "400", "0: 0.400, 1: 0.440", "0.420 ± 0.028", "", ""),
        ("none", "r34", "400", "0: 0.500", "0.500", "", ""),
        ("frs", "r34 -> r18", "400", "0: 0.450, 1: 0.470", "0.460 ± 0.014", "+0.040", "+0.030"),
        ("frs alpha=1", "r34 -> r18", "400", "0: 0.410", "0.410", "-0.010", "-0.020"),
        ("l2", "r34 -> r18", "400", "0: 0.430", "0.430", "+0.010", ""),
        ("l2 x 0.5", "r34 -> r18", "400", "0: 0.425", "0.425", "+0.005", ""),
        ("frs", "r34 -> r18", "800", "0: 0.600", "0.600", "", ""),
    ]
    assert {row[3] for row in rows} == {"shapes 64x64"} and rows[2][11] == "7.0"
    assert [row[6] for row in rows] == ["", "", "0.465", "", "", "", "0.500 not above"]


def test_formats(runs):
    rows = compare(collect(runs))
    markdown = format_table(rows, markdown=True).splitlines()
    assert len(markdown) == 2 + len(rows) and markdown[0].startswith("| method | detector | student |")
    assert all(line.count("|") == 13 for line in markdown)
    text = format_table(rows, markdown=False).splitlines()
    assert len(text) == 1 + len(rows) and len({line.index("fcos") for line in text[1:]}) == 1


def test_no_runs(tmp_path):
    with pytest.raises(ValueError, match="nor a folder of evaluated runs"):
        collect(tmp_path)


def test_curves(tmp_path):
    """Means over seeds that were trained alike, where several have the epoch. The lines end at their last points."""
    logs = {"plain": [0.1, 0.3], "frs 0": [0.2, 0.4], "frs 1": [0.3], "l2 0": [0.2], "l2 1": [0.3]}
    for name, values in logs.items():
        method, _, seed = name.partition(" ")
        settings = {**SHARED, "method": method if seed else "none", "teacher": "r34" if seed else None}
        (tmp_path / name).mkdir()
        settings |= {"seed": int(seed or 0), "lr": 0.1 if name == "l2 1" else 0.2}
        (tmp_path / name / "args.json").write_text(json.dumps(settings))
        lines = [json.dumps({"epoch": epoch, "AP": ap}) for epoch, ap in enumerate(values, 1)]
        (tmp_path / name / "log.jsonl").write_text("\n".join(lines))
    curves = read_curves(tmp_path)
    assert curves == {
        **{"fcos r18 frs": {1: 0.25, 2: 0.4}, "fcos r18 none": {1: 0.1, 2: 0.3}},
        **{"fcos r18 l2, lr 0.2": {1: 0.2}, "fcos r18 l2, lr 0.1": {1: 0.3}},
    }
    picture = draw_curves(curves)
    # AP 0.1..0.4 on 360 pixels from y = 390 up, epochs 1 and 2 at x = 60 and 650.
    assert [picture.getpixel((650, y)) != (255, 255, 255) for y in (30, 150, 60)] == [True, True, False]
    assert picture.getpixel((60, 210)) == picture.getpixel((650, 30)) != picture.getpixel((650, 150))
