"""Many runs as one table. Runs that differ only in their seed share a row."""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from kd.run.folder import read_evaluations, read_settings

COLUMNS = (
    "method",
    "detector",
    "student",
    "data",
    "iterations",
    "seed: AP",
    "teacher",
    "AP",
    "AP50",
    "gain",
    "over l2",
    "over inherit",
)

# Runs that agree in SETTING can be compared. Runs that also agree in METHOD are repetitions.
SETTING = (
    *("detector", "student", "data", "train_annotations", "val_annotations", "image_size", "multi_scale"),
    *("epochs", "max_iterations", "iteration"),  # a run that has not finished is no repetition of one that has
    *("batch_size", "accumulate", "processes", "optimizer", "lr", "clip_grad", "amp", "sync_bn", "pretrained"),
    "student_weights",
)
LATER = {"accumulate": 1}  # arguments that older runs lack, and what they were
METHOD = ("method", "teacher", "set", "distill_weight", "inherit")

# What a row is compared with, as changes of METHOD. L2 inherits if the row does.
L2 = {"method": "l2", "set": [], "distill_weight": 1.0}
INHERIT = {**L2, "method": "none"}
PLAIN = {**INHERIT, "teacher": None, "inherit": False}


def collect(path: Path) -> list[dict]:
    """Return every evaluated run: "folder", "args" (its args.json) and "log" (the evaluated lines of log.jsonl).

    A run whose files are damaged is named on stderr and left out.

    Args:
        path: a folder of runs, or a file with one run per line, as `pack` writes it.

    Raises:
        ValueError: there are none.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if path.is_file():
        runs = read_packed(path)
    else:
        runs = []
        for folder in sorted(file.parent for file in path.rglob("args.json")):
            try:
                run = {"args": read_settings(folder), "log": read_evaluations(folder)}
            except ValueError as error:
                print(f"left out: {error}", file=sys.stderr)
            else:
                runs.append({"folder": str(folder.relative_to(path)), **run})
    runs = [run for run in runs if run["log"]]
    if not runs:
        raise ValueError(f"{path} is neither a run (no model.pt) nor a folder of evaluated runs")
    return runs


def read_packed(file: Path) -> list[dict]:
    """Return the runs in a file of `pack`.

    Raises:
        ValueError: it is not such a file.
    """
    try:
        runs = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except ValueError:  # not text, or not JSON
        runs = [None]
    if not all(isinstance(run, dict) and {"folder", "args", "log"} <= run.keys() for run in runs):
        raise ValueError(f"{file} is not a file of --pack: give one, the folder of a run, or a folder of runs")
    return runs


def pack(runs: list[dict], file: Path) -> None:
    """Write runs to a text file, one per line, with numbers rounded to 6 digits."""

    def rounded(value):
        if isinstance(value, dict):
            return {key: rounded(item) for key, item in value.items()}
        if isinstance(value, list):
            return [rounded(item) for item in value]
        return float(f"{value:.6g}") if isinstance(value, float) else value

    file.write_text("".join(json.dumps(rounded(run)) + "\n" for run in runs))


def compare(runs: list[dict]) -> list[tuple[str, ...]]:
    """Return a row of COLUMNS for each setting and method, teachers and plain students first.

    AP and AP50 are means over the seeds. "gain" is the mean of the differences to the plain student of the same seed
    and setting, "over l2" to that of l2 at its default weight, which inherits if they do, and for students that inherit
    "over inherit" to the one that only inherits; over the seeds that both have. All have the standard deviation of
    several. "teacher" is the teacher's mean AP before training, marked where it is not above the students'.
    """
    groups = defaultdict(list)
    for run in runs:
        run = {**run["args"], **run["log"][-1]}
        groups[key(run, SETTING), key(run, METHOD)].append(run)

    def over(members: list[dict], changes: dict) -> str:
        """Return the gain over the runs of the same setting that differ by these changes of METHOD."""
        others = groups.get((key(members[0], SETTING), key(members[0] | changes, METHOD)), [])
        return gain(members, others) if others is not members else ""  # nothing over itself

    rows = []
    for members in groups.values():
        run = members[0]
        rows.append(
            (
                method_name(run),
                run["detector"],
                f"{run['teacher']} -> {run['student']}" if run["teacher"] else run["student"],
                data_name(run),
                str(run["iteration"]),
                ", ".join(f"{r['seed']}: {r['AP']:.3f}" for r in sorted(members, key=lambda r: r["seed"])),
                teacher_ap(members),
                mean_and_spread([r["AP"] for r in members]),
                mean_and_spread([r["AP50"] for r in members]),
                over(members, PLAIN),
                over(members, L2),
                over(members, INHERIT),
            )
        )
    order = {row: (row[3], row[1], row[4], row[0] != "none", row[2], row[0]) for row in rows}
    return sorted(rows, key=order.get)


def method_name(run: dict) -> str:
    """Return the method of a run with its changed hyper-parameters."""
    words = [run["method"], *run["set"], *(["inherit"] if run["inherit"] else [])]
    weight = run["distill_weight"]
    words += [f"x {weight if isinstance(weight, str) else f'{weight:g}'}"] if weight != 1 else []
    return " ".join(words)


def teacher_ap(members: list[dict]) -> str:
    """Return the mean AP of the teachers of runs, marked unless it is above the students'; empty without teachers."""
    values = [run["teacher_AP"] for run in members if run.get("teacher_AP") is not None]
    if not values:
        return ""
    teacher = statistics.mean(values)
    above = teacher > statistics.mean(run["AP"] for run in members)
    return f"{teacher:.3f}" if above else f"{teacher:.3f} not above"


def gain(members: list[dict], others: list[dict]) -> str:
    """Return the mean and spread of the differences in AP of runs with the same seed, empty if there are none."""
    baseline = {run["seed"]: run["AP"] for run in others}
    values = [run["AP"] - baseline[run["seed"]] for run in members if run["seed"] in baseline]
    return mean_and_spread(values, sign="+") if values else ""


def key(run: dict, names: tuple[str, ...]) -> str:
    """Return the values of these names as one string."""
    return json.dumps([run.get(name, LATER.get(name)) for name in names])


def data_name(run: dict) -> str:
    """Return a short name of the data of a run."""
    size = "x".join(map(str, run["image_size"]))
    if run["data"]:
        return f"{Path(run['data']).name} {size}"
    return f"{Path(run['train_annotations']).stem if run['train_annotations'] else 'shapes'} {size}"


def mean_and_spread(values: list[float], sign: str = "") -> str:
    """Return the mean, and the standard deviation of several values. sign "+" also marks a positive mean."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.3f}{spread}"


def format_table(rows: list[tuple[str, ...]], markdown: bool) -> str:
    """Return the rows as columns of text or as a Markdown table, without empty columns; what rows share is above."""
    columns = list(zip(COLUMNS, *rows))
    shared = [column for column in columns if len(rows) > 1 and len(set(column[1:])) == 1 and column[1]]
    kept = [column for column in columns if column not in shared and any(column[1:])]
    lines = list(zip(*kept))
    heading = f"{', '.join(f'{column[0]}: {column[1]}' for column in shared)}\n\n" if shared else ""
    if markdown:
        lines.insert(1, ("---",) * len(kept))
        return heading + "\n".join(f"| {' | '.join(line)} |" for line in lines)
    widths = [max(map(len, column)) for column in kept]
    return heading + "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines
    )
