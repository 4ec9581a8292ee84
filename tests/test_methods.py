"""What every method must do, whichever it is: stand alone, and make one training step on each detector it serves."""

import ast
import copy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kd.methods
from kd.detectors import DETECTORS, STRIDES, build_detector
from kd.distiller import Distiller, check_terms
from kd.methods import METHODS

FILES = sorted(file for file in Path(kd.methods.__file__).parent.glob("*.py") if file.name != "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_imports_nothing_of_ours(file):
    """The standard library, torch and torchvision.ops only, so that the file can be copied."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names = [node.module]
        else:
            continue
        for name in names:
            top = name.split(".")[0]
            allowed = top in sys.stdlib_module_names or top == "torch" or name.startswith("torchvision.ops")
            assert allowed, f"line {node.lineno} imports {name}"


USE_ALONE = """
import importlib, sys
from types import SimpleNamespace
import torch
from torch import nn

sys.path.insert(0, ".")
module = importlib.import_module(sys.argv[1])
(cls,) = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, nn.Module) and hasattr(c, "needs")]
sizes = [(6, 8), (3, 4), (2, 2)]


def output(grad):
    maps = lambda *c: [torch.rand(2, *c, h, w, requires_grad=grad) for h, w in sizes]
    boxes = [torch.cat([b, b + 20], dim=2) for b in maps(1, 2)]
    tower = [[m] for m in maps(8)]
    return SimpleNamespace(fpn=maps(8), cls_tower=tower, reg_tower=tower, cls_logits=maps(1, 3), boxes=boxes,
                           strides=[8, 16, 32])


method = cls("fcos", 8, 8, (8, 16, 32))
target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
losses = method(output(True), output(False), [target, target])
assert losses and all(torch.isfinite(loss) for loss in losses.values())
sum(losses.values()).backward()
assert method.maps(output(False), output(False), [target, target])
assert "kd" not in sys.modules
print(*losses)
"""


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_works_in_an_empty_folder(file, tmp_path):
    shutil.copy(file, tmp_path)
    (tmp_path / "use.py").write_text(USE_ALONE)
    result = subprocess.run(
        [sys.executable, "-I", "use.py", file.stem], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("loss_")


@pytest.fixture(scope="module")
def networks():
    """Student and teacher per detector, built once and copied."""
    torch.manual_seed(0)
    built = {d: [build_detector(d, "test_resnet", 3, image_size=(32, 48)) for _ in range(2)] for d in DETECTORS}
    return lambda detector: copy.deepcopy(built[detector])


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("name", METHODS)
def test_one_training_step(networks, name, detector, amp):
    """Finite losses; gradients reach every parameter of method and student, none the teacher; one image is empty."""
    student, teacher = networks(detector)
    if name == "pgd" and detector == "faster_rcnn":
        with pytest.raises(ValueError, match="faster_rcnn|Faster R-CNN"):
            METHODS[name](detector, 256, 256, STRIDES[detector])
        return
    distiller = Distiller(student, teacher, METHODS[name](detector, 256, 256, STRIDES[detector])).train()
    images = [torch.rand(3, 32, 40), torch.rand(3, 32, 32)]
    targets = [
        {"boxes": torch.tensor([[4.0, 4.0, 20.0, 25.0], [10.0, 2.0, 35.0, 15.0]]), "labels": torch.tensor([1, 2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)},
    ]
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        losses = distiller(images, targets)
    terms = [key for key in losses if key.startswith(f"loss_{name}_")]
    assert terms and all(torch.isfinite(loss) and loss.dtype == torch.float32 for loss in losses.values())
    if not amp:
        check_terms(losses, terms, terms, student)
    sum(losses.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in distiller.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    # What is exported is torchvision's student: nothing of the method is in it.
    assert student.state_dict().keys() == networks(detector)[0].state_dict().keys()


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("name", METHODS)
def test_maps(networks, name, detector):
    """One map per level over its positions, at least 0, and matrices of objects; an image may have no boxes."""
    if name == "pgd" and detector == "faster_rcnn":
        return
    distiller = Distiller(*networks(detector), METHODS[name](detector, 256, 256, STRIDES[detector])).eval()
    for boxes in (torch.tensor([[4.0, 4.0, 20.0, 25.0], [10.0, 2.0, 35.0, 15.0]]), torch.zeros(0, 4)):
        target = {"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.long)}
        images, targets = distiller.student.transform([torch.rand(3, 32, 40)], [target])
        student, teacher = distiller.outputs(images)
        with torch.no_grad():
            maps = distiller.method.maps(student, teacher, targets)
        assert len(maps) > 0
        for map_name, levels in maps.items():
            if "matrix" in map_name:
                assert all(level.shape == (1, len(boxes), len(boxes)) for level in levels)
            else:
                sizes = distiller.teacher.backbone(images.tensors).values()
                assert [level.shape for level in levels] == [size[:, 0].shape for size in sizes]
            assert all(level.isfinite().all() and (level >= 0).all() for level in levels)
