"""The table that a run prints at its end."""

import argparse
from pathlib import Path

from torch import nn

from kd.run.arguments import inherit_arguments, plain_arguments
from kd.run.folder import best_evaluation, changes_since, describe, is_finished, read_evaluations

LOW_RATIO, HIGH_RATIO = 0.05, 5  # of a distillation loss to the detection loss, beyond which a hint is printed


def result(name: str, metrics: dict[str, float], detector: nn.Module) -> dict:
    """Return a row for `print_results`."""
    return {"name": name, **metrics, "parameters": sum(parameter.numel() for parameter in detector.parameters())}


def format_ratios(ratios: dict[str, float], when: str) -> str:
    """Return a line with the ratio of each distillation loss to the detection loss, and a hint where one is far off."""
    text = ", ".join(f"{name} {ratio:.3g}" for name, ratio in ratios.items())
    off = [name for name, ratio in ratios.items() if not LOW_RATIO <= ratio <= HIGH_RATIO]
    hint = f"; outside {LOW_RATIO} to {HIGH_RATIO}, try --distill-weight auto: {', '.join(off)}" if off else ""
    return f"{when}, relative to the detection loss: {text}{hint}"


def print_results(args: argparse.Namespace, rows: list[dict], iterations: int) -> None:
    """Print a table of the teacher (if any), students to compare with (if they were trained likewise), and the student.

    They are the plain one and, for a method with --inherit, one that only inherits.

    Args:
        args: of the run.
        rows: from `result`, of the teacher (if any) and the student.
        iterations: of the run.
    """
    others = {}
    if args.teacher:
        others["plain"] = plain_arguments(args, "none", args.student, args.epochs)
    if args.inherit and args.method != "none":
        others["inherit"] = inherit_arguments(args)
    for name, other in others.items():
        folder = Path(other.output)
        try:
            evaluations = read_evaluations(folder)
            same = evaluations and is_finished(folder) and not changes_since(folder, describe(other))
        except ValueError as error:
            print(f"not compared with {folder}: {error}")
            continue
        if same:
            row = {**rows[-1], **evaluations[-1], "name": f"{name} {args.student}"}
            rows = [*rows[:-1], row, rows[-1]]
    best = best_evaluation(Path(args.output))
    if best["AP"] > rows[-1]["AP"]:
        rows.append({**rows[-1], **best, "name": f"{rows[-1]['name']}, epoch {best['epoch']} (best.pt)"})
    width = max(len(row["name"]) for row in rows)
    print(f"\n{args.detector}, {iterations} iterations\n")
    print(f"{'':{width}}{'AP':>8}{'AP50':>8}{'AP75':>8}{'parameters':>14}")
    for row in rows:
        numbers = "".join(f"{row[key]:8.3f}" for key in ("AP", "AP50", "AP75"))
        print(f"{row['name']:{width}}{numbers}{row['parameters'] / 1e6:12.1f} M")
