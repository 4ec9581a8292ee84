"""A run's folder: whether it may be used, what it was started with, what it has reached.

| file | written | holds |
|---|---|---|
| args.json | before training | arguments, versions, git revision, SHA-256 of annotations and teacher |
| log.jsonl | a line an epoch | losses, learning rate, speed, COCO's numbers where it was evaluated |
| checkpoint.pt | each epoch and every few minutes | everything to continue |
| model.pt | at the end | the student alone: weights and how to build it |
| samples.png | at each evaluation | ground truth, the teacher's detections, the student's |
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
from kd.processes import world_size

# What may differ when a run is continued: it changes where and when, not what is computed. Files are compared by hash.
FREE = {
    *("device", "workers", "output", "resume", "checkpoint_minutes", "tensorboard"),
    *("data", "train_images", "train_annotations", "val_images", "val_annotations"),
    *("teacher_weights", "pretrained_weights"),
}


def open_folder(folder: Path, resume: str | None) -> bool:
    """Create a run's folder, or look into it; return whether there is a checkpoint to continue from.

    Args:
        folder: of the run.
        resume: None for a new run, "required" to continue one, "auto" to continue one if there is one.

    Raises:
        ValueError: the folder cannot be written, holds another run, or there is nothing to continue.
    """
    started = (folder / "checkpoint.pt").exists()
    if resume is None and (started or is_finished(folder)):
        raise ValueError(f"{folder} holds a run: continue it with --resume, choose another --output, or delete it")
    if resume == "required" and is_finished(folder):
        raise ValueError(f"nothing to resume: the run in {folder} is finished")
    if resume == "required" and not started:
        raise ValueError(f"nothing to resume: {folder / 'checkpoint.pt'} does not exist")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.jsonl").touch()
    except OSError as error:
        raise ValueError(f"the output folder {folder} cannot be written: {error.strerror}") from error
    return started


def is_finished(folder: Path) -> bool:
    """Return whether a run has ended and left its student."""
    return (folder / "model.pt").exists()


def describe(args: argparse.Namespace) -> dict:
    """Return what args.json holds: the arguments, and what they alone do not tell."""
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
    files = ("train_annotations", "val_annotations", "teacher_weights", "pretrained_weights")
    hashes = {name: file_hash(getattr(args, name)) for name in files if getattr(args, name)}
    return {**vars(args), "processes": world_size(), "sha256": hashes, "versions": versions}


def check_same_run(folder: Path, description: dict) -> None:
    """Make sure that a run is continued as it was started.

    Raises:
        ValueError: an argument, the number of processes or the content of a file differs; all that do are named.
    """
    before = json.loads((folder / "args.json").read_text())
    names = sorted((before.keys() | description.keys()) - FREE - {"versions"})
    changes = [
        f"{name} was {before.get(name)}, is {description.get(name)}"
        for name in names
        if before.get(name) != description.get(name)
    ]
    if changes:
        raise ValueError(f"{folder} was started differently: {'; '.join(changes)}")


def file_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def append_log(folder: Path, line: dict) -> None:
    """Add a line to log.jsonl."""
    with open(folder / "log.jsonl", "a") as log:
        log.write(json.dumps(line) + "\n")


def cut_log(folder: Path, epochs: int) -> None:
    """Keep the lines of log.jsonl up to an epoch: a killed run may have written further than it had saved."""
    lines = (folder / "log.jsonl").read_text().splitlines()[:epochs]
    (folder / "log.jsonl").write_text("".join(line + "\n" for line in lines))


def read_evaluations(folder: Path) -> list[dict]:
    """Return the lines of a run's log.jsonl that were evaluated, first to last."""
    log = folder / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [line for line in lines if "AP" in line]
