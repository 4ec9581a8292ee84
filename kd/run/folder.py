"""The folder of a run.

| file | written | contents |
|---|---|---|
| args.json | before training | arguments, versions, git revision, SHA-256 of annotations and weights |
| log.jsonl | a line per epoch | losses, learning rate, speed, COCO's numbers if evaluated |
| checkpoint.pt | each epoch and every ten minutes | everything needed to continue |
| model.pt | at the end | the student alone: weights and how to build it |
| best.pt | at evaluations, if there are several | the same, at its highest AP so far |
| samples.png | at each evaluation | ground truth, detections of the teacher and of the student |
"""

import argparse
import hashlib
import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import timm
import torch
import torchvision

from kd.evaluation import SCORER
from kd.run.distributed import rank, say, world_size

# Arguments that may differ when a run is continued: they change where and when, not what is computed. Files are
# compared by hash.
FREE = {
    *("device", "workers", "output", "resume", "teacher_weights", "student_weights", "pretrained"),
    *("not_inherited", "term_weights"),
    *("data", "train_images", "train_annotations", "val_images", "val_annotations"),
}


FILES = ("train_annotations", "val_annotations", "teacher_weights", "student_weights")


def check_folder(folder: Path, resume: str | None) -> None:
    """Check that a run can start or continue in a folder.

    Args:
        folder: of the run.
        resume: None for a new run, "required" to continue one, "auto" to continue it if it exists.

    Raises:
        ValueError: the folder holds another run, or there is nothing to continue.
    """
    started = (folder / "checkpoint.pt").exists()
    if resume is None and (started or is_finished(folder)):
        raise ValueError(f"{folder} holds a run: continue it with --resume, choose another --output, or delete it")
    if resume == "required" and is_finished(folder):
        raise ValueError(f"nothing to resume: the run in {folder} is finished")
    if resume == "required" and not started:
        raise ValueError(f"nothing to resume: {folder / 'checkpoint.pt'} does not exist")


def is_finished(folder: Path) -> bool:
    """Return whether a run has finished."""
    return (folder / "model.pt").exists()


def open_folder(folder: Path, args: argparse.Namespace) -> bool:
    """Create the folder and write args.json, or compare it with the run to continue; return whether there is one.

    Raises:
        ValueError: the folder cannot be written, or the run to continue was started with other arguments, number of
            processes or files.
    """
    description = describe(args)
    say(f"{folder}: {', '.join(f'{name} {value}' for name, value in description['versions'].items())}")
    if started_with(folder):
        check_same_run(folder, description)
        return True
    if rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "args.json").write_text(json.dumps(description, indent=1))
            (folder / "log.jsonl").write_text("")
        except OSError as error:
            raise ValueError(f"cannot write to the output folder {folder}: {error.strerror}") from error
    return False


def started_with(folder: Path) -> dict:
    """Return the args.json of a run that can be continued, empty if there is none."""
    return json.loads((folder / "args.json").read_text()) if (folder / "checkpoint.pt").exists() else {}


def describe(args: argparse.Namespace) -> dict:
    """Return the content of args.json."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    revision = subprocess.run(command, capture_output=True, text=True, check=False)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        SCORER: version(SCORER),
        "revision": revision.stdout.strip() or None,
    }
    files = {name: getattr(args, name) for name in FILES}
    files["pretrained"] = args.pretrained if isinstance(args.pretrained, str) else None
    hashes = {name: file_hash(file) for name, file in files.items() if file}
    return {**vars(args), "processes": world_size(), "sha256": hashes, "versions": versions}


def changes_since(folder: Path, description: dict) -> list[str]:
    """Return in which arguments, number of processes or files a run differs from a description by `describe`."""
    before = json.loads((folder / "args.json").read_text())
    return [
        f"{name} was {before.get(name)}, is {description.get(name)}"
        for name in sorted((before.keys() | description.keys()) - FREE - {"versions"})
        if before.get(name) != description.get(name)
    ]


def check_same_run(folder: Path, description: dict) -> None:
    """Raise ValueError if a run was started with other arguments, number of processes or files; name all of them."""
    changes = changes_since(folder, description)
    if changes:
        raise ValueError(
            f"{folder} was started differently: {'; '.join(changes)}. Use the same settings or another --output, or "
            "delete the folder"
        )


def file_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def append_log(folder: Path, line: dict) -> None:
    """Add a line to log.jsonl."""
    with open(folder / "log.jsonl", "a") as log:
        log.write(json.dumps(line) + "\n")


def cut_log(folder: Path, epochs: int) -> None:
    """Keep the lines of log.jsonl up to an epoch; a killed run may have logged more than it saved."""
    lines = (folder / "log.jsonl").read_text().splitlines()[:epochs]
    (folder / "log.jsonl").write_text("".join(line + "\n" for line in lines))


def read_evaluations(folder: Path) -> list[dict]:
    """Return the lines of log.jsonl that have an evaluation, in order."""
    log = folder / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [line for line in lines if "AP" in line]


def best_evaluation(folder: Path) -> dict:
    """Return the line of log.jsonl with the highest AP, empty if there is no evaluation."""
    return max(read_evaluations(folder), key=lambda line: line["AP"], default={})


def run_name(args: argparse.Namespace, method: str, student: str) -> str:
    """Return the default folder name of a run in the setting of `args`.

    Args:
        args: of the run.
        method: a method, "none", or "teacher" for plain training of a teacher.
        student: backbone.
    """
    teacher = [args.teacher] if method not in ("none", "teacher") else []
    data = [Path(args.data).resolve().name] if args.data else []
    seed = [f"seed{args.seed}"] if args.seed else []
    return "-".join([method, args.detector, *teacher, student, *data, *seed])
