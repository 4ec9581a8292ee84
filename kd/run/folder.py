"""The folder of a run.

| file | written | contents |
|---|---|---|
| args.json | before training | arguments, versions, git revision, SHA-256 of annotations and weights |
| log.jsonl | a line per epoch | losses, learning rate, speed, COCO's numbers if evaluated |
| checkpoint.pt | each epoch and every ten minutes | everything needed to continue |
| model.pt | at the end | the student alone: weights and how to build it |
| best.pt | at evaluations, if there are several | the same, at its highest AP so far |
| lock | during training | the process that trains here |
| samples.png | at each evaluation | ground truth, detections of the teacher and of the student |
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import timm
import torch
import torchvision

from kd.data import annotation_files
from kd.evaluation import SCORER
from kd.run.distributed import gather, rank, say, world_size
from kd.run.files import write_text

# Arguments that may differ when a run is continued: they change where and when, not what is computed. Files are
# compared by hash, and of --pretrained also whether it is given.
PATHS = (
    *("output", "teacher_weights", "student_weights", "pretrained"),
    *("data", "train_images", "train_annotations", "val_images", "val_annotations"),
)
FREE = {*PATHS, "device", "workers", "resume", "images", "not_inherited", "term_weights"}

# Arguments that the tables need.
ALWAYS = {
    *("method", "detector", "student", "teacher", "data", "train_annotations", "image_size", "seed"),
    *("set", "distill_weight", "inherit"),
}

FILES = ("train_annotations", "val_annotations", "teacher_weights", "student_weights")  # of which the hash is kept
RESTORE = "Restore it, or delete the run"


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


def check_start(folder: Path, images: list[int]) -> None:
    """Check that all processes start alike, and that a run continues with as many images as it began with.

    Args:
        folder: of the run.
        images: numbers of training and validation images that can be read.

    Raises:
        ValueError: they do not; without this, processes would train different models.
    """
    settings = started_with(folder)
    starts = gather([folder.name, "continues" if settings else "new", *images])
    if any(start != starts[0] for start in starts):
        raise ValueError(
            f"processes differ in their run, whether it is new, or its training and validation images: {starts}. All "
            f"machines must see the same data, and {folder} on a file system that they share"
        )
    before = settings.get("images", images)
    if before != images:
        raise ValueError(
            f"{folder} was started with {before[0]} training and {before[1]} validation images, and there are "
            f"{images[0]} and {images[1]}: restore the images, or use another --output"
        )


def is_finished(folder: Path) -> bool:
    """Return whether a run has finished."""
    return (folder / "model.pt").exists()


def open_folder(folder: Path, args: argparse.Namespace) -> bool:
    """Create the folder and write args.json, or compare it with the run to continue; return whether there is one.

    Raises:
        ValueError: the run to continue was started with other arguments, number of processes or files.
    """
    description = describe(args)
    say(f"{folder}: {', '.join(f'{name} {value}' for name, value in description['versions'].items())}")
    if started_with(folder):
        check_same_run(folder, description)
        return True
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(json.dumps(description, indent=1), folder / "args.json")
        write_text("", folder / "log.jsonl")
    return False


def started_with(folder: Path) -> dict:
    """Return the args.json of a run that can be continued or is finished, empty if there is none."""
    return read_settings(folder) if (folder / "checkpoint.pt").exists() or is_finished(folder) else {}


def teacher_file(folder: Path, settings: dict) -> str | None:
    """Return the teacher's file of a run; None if it has none.

    Args:
        folder: of the run.
        settings: its args.json, or empty.

    Raises:
        ValueError: it is not there.
    """
    path = settings.get("teacher_weights")
    if path and not Path(path).is_file():
        raise ValueError(f"the teacher of {folder} is not at {path}: give its file as --teacher-weights")
    return path


def read_settings(folder: Path) -> dict:
    """Return the args.json of a run.

    Raises:
        ValueError: it does not exist, is damaged, or lacks arguments that every run has.
    """
    file = folder / "args.json"
    settings = parse(read_text(file), f"{file} is damaged")
    missing = sorted(ALWAYS - settings.keys())
    if missing:
        raise ValueError(f"{file} was not written by train.py: it lacks {', '.join(missing)}")
    return settings


def describe(args: argparse.Namespace) -> dict:
    """Return the content of args.json: the arguments with absolute paths, and what else a result depends on."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        SCORER: version(SCORER),
        "revision": revision(),
    }
    files = {name: getattr(args, name) for name in FILES}
    files["pretrained"] = args.pretrained if isinstance(args.pretrained, str) else None
    hashes = {
        name: annotations_hash(file) if name.endswith("annotations") else file_hash(file)
        for name, file in files.items()
        if file
    }
    paths = {name: os.path.abspath(getattr(args, name)) for name in PATHS if isinstance(getattr(args, name), str)}
    return {**vars(args), **paths, "processes": world_size(), "sha256": hashes, "versions": versions}


def revision() -> str | None:
    """Return the git revision of this code, None if git is not installed or does not know the code."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        return None


def changes_since(folder: Path, description: dict) -> list[str]:
    """Return in which arguments, number of processes or files a run differs from a description by `describe`."""
    before, now = compared(read_settings(folder)), compared(description)
    return [
        f"{name} was {before.get(name)}, is {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def compared(description: dict) -> dict:
    """Return the part of a description by `describe` that must not change."""
    kept = {name: value for name, value in description.items() if name not in FREE | {"versions"}}
    return {**kept, "pretrained": bool(description.get("pretrained"))}


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


def annotations_hash(path: str) -> str:
    """Return the SHA-256 of an annotation file; for VOC that of the SHA-256s of its lists and all their XML files.

    Image files, from which CrowdHuman's image sizes are read, are not part of it.
    """
    hashes = [file_hash(file) for file in annotation_files(path)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def append_log(folder: Path, line: dict) -> None:
    """Add a line to log.jsonl."""
    log = folder / "log.jsonl"
    write_text(read_text(log) + json.dumps(line) + "\n", log)


def cut_log(folder: Path, epochs: int) -> None:
    """Keep the lines of log.jsonl up to an epoch; a killed run may have logged more than it saved.

    Raises:
        ValueError: the file is damaged or ends before that epoch.
    """
    log = folder / "log.jsonl"
    lines = read_log(folder)[:epochs]
    if len(lines) < epochs:
        raise ValueError(f"{log} has {len(lines)} lines, but {epochs} epochs are completed: restore the file")
    write_text("".join(json.dumps(line) + "\n" for line in lines), log)


def read_evaluations(folder: Path) -> list[dict]:
    """Return the lines of log.jsonl that have an evaluation, in order."""
    return [line for line in read_log(folder) if "AP" in line]


def read_log(folder: Path) -> list[dict]:
    """Return the lines of log.jsonl, none if it does not exist.

    Raises:
        ValueError: a line is damaged; the message says which.
    """
    log = folder / "log.jsonl"
    lines = read_text(log).splitlines() if log.exists() else []
    return [parse(line, f"line {number} of {log} is damaged") for number, line in enumerate(lines, 1)]


def read_text(file: Path) -> str:
    """Return the content of a text file; raise ValueError if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is damaged: it is not text. {RESTORE}") from error


def parse(text: str, fault: str) -> dict:
    """Return a JSON object; raise ValueError with the fault, the reason and what to do if the text is not one."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{fault}: {error}. {RESTORE}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{fault}: it is not a JSON object. {RESTORE}")
    return content


def best_evaluation(folder: Path) -> dict:
    """Return the line of log.jsonl with the highest AP, empty if there is no evaluation."""
    return max(read_evaluations(folder), key=lambda line: line["AP"], default={})


def run_name(args: argparse.Namespace, method: str, student: str) -> str:
    """Return the default folder name of a run in the setting of `args`.

    Args:
        args: of the run.
        method: a method, "none", "inherit" for inheriting alone, or "teacher" for plain training of a teacher.
        student: backbone.
    """
    teacher = [args.teacher] if method not in ("none", "teacher") else []
    data = [Path(args.data).resolve().name] if args.data else []
    seed = [f"seed{args.seed}"] if args.seed else []
    return "-".join([method, args.detector, *teacher, student, *data, *seed])
