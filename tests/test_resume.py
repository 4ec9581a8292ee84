"""A run that was stopped, by a signal or by a kill, and continued ends as one that was not; bit for bit."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import kd.data
import kd.run.folder
import kd.run.progress
import train
from kd.run.checkpoint import save
from kd.run.signals import StopSignal

ROOT = Path(__file__).parents[1]
SMALL = [
    *("--student", "test_resnet", "--image-size", "64", "64", "--batch-size", "4", "--epochs", "5"),
    *("--device", "cpu"),
]
DISTIL = ["--method", "frs", "--teacher", "test_resnet"]

# A process of its own, on few pictures.
SCRIPT = """
import kd.data, kd.run.progress, train
kd.data.SHAPES_TRAIN, kd.data.SHAPES_VAL = 16, 4
kd.run.progress.CHECKPOINT_MINUTES = 0
if __name__ == "__main__":
    train.main(train.parse_args())
"""


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    monkeypatch.setattr(kd.data, "SHAPES_TRAIN", 16)
    monkeypatch.setattr(kd.data, "SHAPES_VAL", 4)
    monkeypatch.setattr(kd.run.progress, "CHECKPOINT_MINUTES", 0)


def run(*words) -> dict:
    return train.main(train.parse_args([*SMALL, *map(str, words)]))


@pytest.fixture
def start(tmp_path):
    """A function that starts the script in a process of its own, which does not outlive the test."""
    (tmp_path / "script.py").write_text(SCRIPT)
    processes = []

    def start(*words) -> subprocess.Popen:
        processes.append(
            subprocess.Popen(
                [sys.executable, tmp_path / "script.py", *SMALL, *map(str, words)],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def wait_for_checkpoints(process: subprocess.Popen, file: Path, count: int) -> None:
    """Return when the process has written so many checkpoints since this was called, or has ended."""
    seen = {file.stat().st_mtime_ns} if file.exists() else {0}
    while process.poll() is None and len(seen) <= count:
        time.sleep(0.002)
        seen.update({file.stat().st_mtime_ns} if file.exists() else ())


def assert_same_run(first: Path, second: Path) -> None:
    """The students are equal, and so are the logs but for speed."""
    a, b = (torch.load(folder / "model.pt", weights_only=True)["model"] for folder in (first, second))
    assert all(torch.equal(a[name], b[name]) for name in a)
    logs = [[json.loads(line) for line in (f / "log.jsonl").read_text().splitlines()] for f in (first, second)]
    for log in logs:
        for line in log:
            del line["images_per_second"], line["waiting_for_data"]
    assert logs[0] == logs[1]


def test_killed_and_resumed(start, tmp_path):
    """Killed three times at random moments, in the middle of a save among them: a checkpoint is written every step."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run("--output", tmp_path / "teacher", "--epochs", 1)
    words = [*DISTIL, "--teacher-weights", tmp_path / "teacher" / "model.pt", "--workers", 1]
    run(*words, "--output", whole)
    generator = random.Random(0)
    for _ in range(3):
        process = start(*words, "--output", parts, "--resume", "auto")
        wait_for_checkpoints(process, parts / "checkpoint.pt", count=generator.randint(1, 5))
        time.sleep(generator.uniform(0, 0.1))
        process.kill()
        process.communicate()
    assert not (parts / "model.pt").exists(), "the run was over before the third kill"
    run(*words, "--output", parts, "--resume")
    assert_same_run(whole, parts)


def test_stopped_and_resumed(start, tmp_path):
    """SIGTERM: the step is finished, the state saved, and the printed command continues the run."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = ["--workers", 2]
    run(*words, "--output", whole)
    process = start(*words, "--output", parts)
    wait_for_checkpoints(process, parts / "checkpoint.pt", count=3)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM, printed
    command = shlex.split(printed.splitlines()[-1])
    assert command[0] == "python" and command[-2:] == ["--resume", "auto"]
    steps = int(re.search(r"stopped after step (\d+)", printed)[1])
    state = torch.load(parts / "checkpoint.pt", weights_only=True)
    assert 0 < steps == 4 * state["epoch"] + state["step"] < 20
    command[0] = sys.executable
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"continuing {parts} after {state['step']} steps of epoch {state['epoch'] + 1}" in result.stdout
    assert_same_run(whole, parts)


def test_stopped_during_the_last_evaluation(tmp_path, monkeypatch):
    """The teacher is finished and kept, but nothing else is started."""
    evaluate = train.evaluate

    def interrupted(*args, **options):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*args, **options)

    monkeypatch.setattr(train, "evaluate", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(*DISTIL, "--output", tmp_path / "x")
    assert stop.value.code == 128 + signal.SIGTERM
    assert [folder.name for folder in tmp_path.iterdir() if folder.is_dir()] == ["teacher-fcos-test_resnet"]
    assert (tmp_path / "teacher-fcos-test_resnet" / "model.pt").exists()


def test_other_data_or_processes(tmp_path, monkeypatch):
    """A run continues with as many images as it began with, and in all processes."""
    folder = tmp_path / "x"
    run("--max-iterations", 1, "--output", folder)
    (folder / "model.pt").unlink()  # as if it were stopped
    settings = json.loads((folder / "args.json").read_text())
    assert settings.pop("images") == [16, 4]
    monkeypatch.setattr(kd.data, "SHAPES_VAL", 3)
    with pytest.raises(ValueError, match="16 training and 4 validation images, and there are 16 and 3: restore"):
        run("--max-iterations", 1, "--output", folder, "--resume")
    (folder / "args.json").write_text(json.dumps(settings))
    kd.run.folder.check_start(folder, [8, 4])  # runs of before do not know
    for other in (["x", "new", 8, 4], ["x", "continues", 7, 4], ["y", "continues", 8, 4]):
        monkeypatch.setattr(kd.run.folder, "gather", lambda value, other=other: [value, other])
        with pytest.raises(ValueError, match="processes differ .* on a file system that they share"):
            kd.run.folder.check_start(folder, [8, 4])


def test_a_second_signal_ends_the_process():
    """The first is noted; another within a second is torchrun's echo; a later one ends the process at once."""
    script = """
import signal, time
from kd.run.signals import StopSignal
stop = StopSignal()
for _ in range(2):
    signal.raise_signal(signal.SIGINT)
assert stop.number == signal.SIGINT
time.sleep(1.1)
print("alive", flush=True)
signal.raise_signal(signal.SIGINT)
print("not reached", flush=True)
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == -signal.SIGINT
    assert "send the signal again to stop now" in result.stdout and result.stdout.endswith("alive\n")


def test_signals_are_given_back():
    before = signal.getsignal(signal.SIGINT)
    StopSignal().release()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A folder with a teacher, and a distillation that was interrupted while saving in its third epoch."""
    folder, saves = tmp_path_factory.mktemp("interrupted"), []

    def save_some(content, path):
        save(content, path)
        saves.extend([path] if path == folder / "run" / "checkpoint.pt" else [])
        if len(saves) == 12:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kd.data, "SHAPES_TRAIN", 16)
        patch.setattr(kd.data, "SHAPES_VAL", 4)
        patch.setattr(kd.run.progress, "CHECKPOINT_MINUTES", 0)
        patch.setattr(kd.run.progress, "save", save_some)
        run("--output", folder / "teacher", "--epochs", 1)
        with pytest.raises(KeyboardInterrupt):
            run(*DISTIL, "--teacher-weights", folder / "teacher" / "model.pt", "--output", folder / "run")
    return folder


@pytest.fixture
def stopped(interrupted, tmp_path):
    """A copy of that distillation's folder, the teacher beside it."""
    return shutil.copytree(interrupted, tmp_path / "copy") / "run"


def test_what_must_not_change(stopped):
    """Arguments and files are those of the start; device, workers and paths are free."""
    with pytest.raises(ValueError, match=r"started differently: lr was None, is 0.1; seed was 0, is 1\."):
        run(*DISTIL, "--output", stopped, "--resume", "--lr", 0.1, "--seed", 1)
    with pytest.raises(ValueError, match="holds a run: continue it with --resume, choose another --output"):
        run(*DISTIL, "--output", stopped)
    teacher = stopped.parent / "teacher" / "model.pt"
    moved = teacher.rename(stopped.parent / "moved.pt")
    content = torch.load(moved, weights_only=True)
    content["model"]["head.regression_head.bbox_reg.bias"] += 1
    save(content, stopped.parent / "other.pt")
    with pytest.raises(ValueError, match="started differently: sha256 was"):
        run(*DISTIL, "--output", stopped, "--resume", "--teacher-weights", stopped.parent / "other.pt")
    run(*DISTIL, "--output", stopped, "--resume", "--teacher-weights", moved, "--workers", 1)


def test_damaged_checkpoint(stopped):
    file = stopped / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{file} is not a checkpoint that can be loaded safely"):
        run(*DISTIL, "--output", stopped, "--resume")


def test_nothing_to_resume(tmp_path, capsys):
    with pytest.raises(ValueError, match="nothing to resume: .*checkpoint.pt does not exist"):
        run("--output", tmp_path / "x", "--resume")
    assert not (tmp_path / "x").exists()
    metrics = run("--output", tmp_path / "x", "--resume", "auto")
    with pytest.raises(ValueError, match="nothing to resume: the run in .* is finished"):
        run("--output", tmp_path / "x", "--resume")
    capsys.readouterr()
    assert run("--output", tmp_path / "x", "--resume", "auto")["AP"] == metrics["AP"]
    assert f"{tmp_path / 'x'} is finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match="x was started differently: lr was None, is 0.1"):
        run("--output", tmp_path / "x", "--resume", "auto", "--lr", 0.1)


def test_unwritable_output(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write to the output folder .*: Not a directory"):
        run("--output", tmp_path / "file" / "x")


def test_an_epoch_without_steps_left(tmp_path):
    """A run that was killed while it was evaluated has no speed to log, instead of 0 images per second."""
    progress = kd.run.progress.Progress(tmp_path, {}, steps_per_epoch=2, iterations=2, seed=0, title="x")
    progress.step = 2
    assert list(progress.batches([])) == [] and progress.speed["images_per_second"] is None
    progress.end()
