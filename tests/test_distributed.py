"""Two processes under torchrun: the student and the losses of one process, and an end when one of them fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch.testing import assert_close

import kd.data
import train
from kd.distiller import Distiller

ROOT = Path(__file__).parents[1]
COMMON = [
    *("--detector", "retinanet", "--student", "test_resnet", "--image-size", "64", "64", "--max-iterations", "5"),
    *("--device", "cpu", "--amp", "off", "--optimizer", "sgd", "--lr", "0.02"),
]
METHODS = ("none", "l2", "frs", "pgd", "drkd")

# What each process runs: few pictures, a third of them without boxes, so that a process may be left without any.
PICTURES = """
import kd.data
from kd.data.shapes import Shapes

kd.data.SHAPES_TRAIN, kd.data.SHAPES_VAL = 20, 5
whole = Shapes.__getitem__

def without_some_boxes(self, index):
    image, target = whole(self, index)
    if index % 3 == 0:
        target["boxes"], target["labels"] = target["boxes"][:0], target["labels"][:0]
    return image, target

Shapes.__getitem__ = without_some_boxes
"""
SCRIPT = f"""
import os, sys
{PICTURES}
import train
from torch import distributed

if __name__ == "__main__":
    if "--fail" in sys.argv:
        sys.argv.remove("--fail")
        from kd.run.distributed import rank
        from kd.methods import FRS
        def fail(self, *_):
            if rank() == 1:
                raise RuntimeError("process one cannot go on")
            return {{"loss_frs_fpn": sum(p.sum() for p in self.parameters())}}
        FRS.forward = fail
    methods, folder, *words = sys.argv[1:]
    for method in methods.split(","):
        own = ["--method", method, "--output", folder + "/" + method]
        if method != "none":
            own += ["--teacher", "test_resnet", "--teacher-weights", os.path.dirname(folder) + "/teacher/model.pt"]
        train.main(train.parse_args([*words, *own]))
    distributed.destroy_process_group()
"""


def torchrun(script: Path, *words) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launcher, script, *map(str, words)], env=environment, capture_output=True, text=True)


@pytest.fixture
def setting(tmp_path, monkeypatch):
    """The script, the words both ways of running share (frozen norm, for it is the batch's otherwise), a teacher."""
    from kd.data.shapes import Shapes

    monkeypatch.setattr(Shapes, "__getitem__", Shapes.__getitem__)  # to be put back after the test
    for name in ("SHAPES_TRAIN", "SHAPES_VAL"):
        monkeypatch.setattr(kd.data, name, getattr(kd.data, name))
    exec(PICTURES, {})
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pth")
    words = [*COMMON, "--pretrained", str(tmp_path / "weights.pth")]
    train.main(train.parse_args([*words, "--batch-size", "4", "--seed", "1", "--output", str(tmp_path / "teacher")]))
    return script, words


class InHalves(Distiller):
    """What DistributedDataParallel does with two processes: each takes its losses from every second image."""

    def forward(self, images, targets):
        step, halves = self.iteration.clone(), []
        for n in range(2):
            self.iteration.copy_(step)  # both halves are of the same step of the warm-up
            halves.append(super().forward(images[n::2], targets[n::2]))
        (detection, distillation), others = halves[0], {**halves[1][0], **halves[1][1]}
        return tuple({name: (ours[name] + others[name]) / 2 for name in ours} for ours in (detection, distillation))


def test_two_processes_equal_one(setting, tmp_path, monkeypatch):
    """After five steps, the student is that of one process with twice the batch.

    RetinaNet's losses and l2 are means over images. FRS, PGD and DRKD normalise over the images of a process, as their
    docstrings say: there, one process has to take the mean of the losses of two halves.
    """
    script, words = setting
    result = torchrun(script, ",".join(METHODS), tmp_path / "two", *words, "--batch-size", 2)
    assert result.returncode == 0, result.stderr
    for method in METHODS:
        monkeypatch.setattr(train, "Distiller", Distiller if method in ("none", "l2") else InHalves)
        own = ["--method", method, "--batch-size", "4", "--output", str(tmp_path / "one" / method)]
        teacher = ["--teacher", "test_resnet", "--teacher-weights", str(tmp_path / "teacher" / "model.pt")]
        train.main(train.parse_args([*words, *own, *(teacher if method != "none" else [])]))
        one, two = (torch.load(tmp_path / n / method / "model.pt", weights_only=True)["model"] for n in ("one", "two"))
        torch.manual_seed(0)
        start = train.build_detector(
            "retinanet", "test_resnet", 5, image_size=(64, 64), pretrained=str(tmp_path / "weights.pth")
        ).state_dict()
        moved = max((one[name] - start[name]).abs().max().item() for name in one)
        assert moved > 1e-2, f"{method}: the student has hardly changed, so this proves nothing"
        assert_close(two, one, atol=1e-5, rtol=0, msg=lambda text, method=method: f"{method}: {text}")

        lines = [json.loads((tmp_path / n / method / "log.jsonl").read_text().splitlines()[-1]) for n in ("one", "two")]
        assert_close(lines[1]["losses"], lines[0]["losses"], rtol=1e-4, atol=1e-5)


def test_a_failing_process_ends_all(setting, tmp_path):
    script, words = setting
    result = torchrun(script, "frs", tmp_path / "two", *words, "--batch-size", "2", "--fail")
    assert result.returncode != 0
    assert "RuntimeError: process one cannot go on" in result.stderr
    assert not (tmp_path / "two" / "frs" / "model.pt").exists()
