"""Many runs as one table: runs that differ only in their seed share a row."""

import json
import statistics
from collections import defaultdict
from pathlib import Path

from kd.runs import read_evaluations

COLUMNS = (
    *("method", "detector", "student", "data", "iterations", "seed: AP", "teacher", "AP", "AP50", "gain", "over l2"),
    "images/s",
)

# What two runs must share to be repetitions of each other, and, without the method's part, to be compared.
SETTING = (
    *("detector", "student", "data", "train_annotations", "val_annotations", "image_size", "multi_scale", "iteration"),
    *("batch_size", "processes", "optimizer", "lr", "clip_grad", "amp", "compile", "ema", "sync_bn"),
    *("pretrained", "pretrained_weights"),
)
METHOD = ("method", "teacher", "set", "distill_weight", "inherit")
L2 = {"method": "l2", "set": [], "distill_weight": 1.0, "inherit": False}  # what a method has to beat


def collect(folder: Path) -> list[dict]:
    """Return every evaluated run below a folder: its args.json, its last evaluated line, and its folder.

    Raises:
        ValueError: there is none.
    """
    runs = []
    for file in sorted(folder.rglob("args.json")):
        lines = read_evaluations(file.parent)
        if lines:
            runs.append({**json.loads(file.read_text()), **lines[-1], "folder": file.parent})
    if not runs:
        raise ValueError(f"{folder} is neither a run (no model.pt) nor a folder of evaluated runs")
    return runs


def compare(runs: list[dict]) -> list[tuple[str, ...]]:
    """Return a row of COLUMNS for each setting and method, teachers and plain students before what is distilled.

    AP and AP50 are means over the seeds, with the standard deviation where there are several; "teacher" is its mean AP,
    measured before training, and marked where it is not above the students'. Gains are those of the mean AP over plain
    students, and over l2 at its published weight, of the same setting; empty where there are none.
    """
    groups = defaultdict(list)
    for run in runs:
        groups[key(run, SETTING), key(run, METHOD)].append(run)
    mean = {group: statistics.mean(run["AP"] for run in members) for group, members in groups.items()}
    plain = {setting: mean[setting, method] for setting, method in groups if json.loads(method)[0] == "none"}

    rows = []
    for (setting, method), members in groups.items():
        run = members[0]
        l2 = mean.get((setting, key(run | L2, METHOD)))
        ours = mean[setting, method]
        rows.append(
            (
                method_name(run),
                run["detector"],
                f"{run['teacher']} -> {run['student']}" if run["teacher"] else run["student"],
                data_name(run),
                str(run["iteration"]),
                ", ".join(f"{r['seed']}: {r['AP']:.3f}" for r in sorted(members, key=lambda r: r["seed"])),
                teacher_ap(members, ours),
                mean_and_spread([r["AP"] for r in members]),
                mean_and_spread([r["AP50"] for r in members]),
                gain(ours, plain.get(setting)) if run["method"] != "none" else "",
                gain(ours, l2) if run["method"] not in ("none", "l2") else "",
                f"{statistics.median(r['images_per_second'] for r in members):.1f}",
            )
        )
    order = {row: (row[3], row[1], row[4], row[0] != "none", row[2], row[0]) for row in rows}
    return sorted(rows, key=order.get)


def method_name(run: dict) -> str:
    """Return a run's method with what was changed of it."""
    words = [run["method"], *run["set"], *(["inherit"] if run["inherit"] else [])]
    words += [f"x {run['distill_weight']:g}"] if run["distill_weight"] != 1 else []
    return " ".join(words)


def teacher_ap(members: list[dict], ours: float) -> str:
    """Return the mean AP of the runs' teachers, marked unless it is above the students' mean; nothing without one."""
    values = [run["teacher_AP"] for run in members if run.get("teacher_AP") is not None]
    if not values:
        return ""
    teacher = statistics.mean(values)
    return f"{teacher:.3f}" if teacher > ours else f"{teacher:.3f} not above"


def gain(ours: float, baseline: float | None) -> str:
    """Return the difference with its sign, nothing without a baseline."""
    return "" if baseline is None else f"{ours - baseline:+.3f}"


def key(run: dict, names: tuple[str, ...]) -> str:
    """Return a run's values of these names as one string."""
    return json.dumps([run.get(name) for name in names])


def data_name(run: dict) -> str:
    """Return a short name of a run's data."""
    size = "x".join(map(str, run["image_size"]))
    if run["data"]:
        return f"{Path(run['data']).name} {size}"
    return f"{Path(run['train_annotations']).stem if run['train_annotations'] else 'shapes'} {size}"


def mean_and_spread(values: list[float]) -> str:
    """Return the mean, and the standard deviation where there are several values."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def format_table(rows: list[tuple[str, ...]], markdown: bool) -> str:
    """Return a heading and the rows, in columns of text or as a table of Markdown."""
    if markdown:
        lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in (COLUMNS, *rows)
    )
