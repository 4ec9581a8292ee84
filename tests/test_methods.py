"""What holds for every method: its file is self-contained, its losses behave, and it trains on every detector."""

import ast
import copy
import inspect
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import kd.methods
from kd.detectors import DETECTORS, STRIDES, build_detector
from kd.distiller import Distiller, check_terms
from kd.features import forward_detector
from kd.methods import METHODS, build_method
from tests.conftest import STRIDES as FAKE_STRIDES

FILES = sorted(file for file in Path(kd.methods.__file__).parent.glob("*.py") if file.name != "__init__.py")
CLASSES = {getattr(make, "func", make) for make in METHODS.values()}
SERVED = [(name, detector) for name in METHODS for detector in DETECTORS if (name, detector) != ("pgd", "faster_rcnn")]
FINEST_FOUR = {("mgd", "faster_rcnn"), ("fgd", "faster_rcnn"), *(("pkd", d) for d in DETECTORS)}  # four levels of five


def make(name: str, student_channels: int = 4, teacher_channels: int = 4) -> nn.Module:
    """A method in float64 for fake outputs."""
    settings = ["nodes=(3, 2, 2)"] if name == "drkd" else []
    return build_method(name, "fcos", student_channels, teacher_channels, FAKE_STRIDES, settings).double()


def tensors(output: SimpleNamespace, names) -> list[torch.Tensor]:
    """All tensors in these attributes of an output."""

    def flat(value):
        return [value] if isinstance(value, torch.Tensor) else [tensor for item in value for tensor in flat(item)]

    return flat([getattr(output, name) for name in names])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_imports(file):
    """A method file imports the standard library, torch and torchvision.ops only, so that it can be copied."""
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


@pytest.mark.parametrize("method", CLASSES, ids=lambda method: method.__name__)
def test_example_runs_in_an_empty_folder(method, tmp_path):
    """The example in the class docstring, with nothing but a copy of the file; its losses are finite and not zero."""
    file = Path(inspect.getsourcefile(method))
    shutil.copy(file, tmp_path)
    code = textwrap.dedent(re.search(r"Example::\n\n(.*?)(?:\n\n|\Z)", inspect.getdoc(method), re.DOTALL)[1])
    header = "import sys\nsys.path.insert(0, '.')\nfrom types import SimpleNamespace\nimport torch\n"
    header += f"from {file.stem} import {method.__name__}\ntorch.manual_seed(0)\n"
    footer = "\nassert 'kd' not in sys.modules\nprint(sum(losses.values()).item())\n"
    (tmp_path / "use.py").write_text(header + code + footer)
    result = subprocess.run([sys.executable, "-I", "use.py"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 0 < float(result.stdout) < float("inf")


@pytest.mark.parametrize("name", METHODS)
def test_gradients(fake_output, targets, name):
    """By finite differences for what the student sends; none to the teacher; adapters and units are trained."""
    method, student, teacher = make(name), fake_output(1), fake_output(2)
    reads = [attribute for attribute in method.needs if attribute in ("fpn", "cls_tower", "reg_tower")]
    constants = tensors(teacher, [attribute for attribute in method.needs if attribute != "anchors"])
    for tensor in (*tensors(student, method.needs), *constants):
        tensor.requires_grad_()
    losses = method(student, teacher, targets)
    assert all(name.startswith("loss_") and loss.shape == () for name, loss in losses.items())
    sum(losses.values()).backward()
    assert all(tensor.grad is None for tensor in constants)
    received = [tensor.grad is not None and tensor.grad.abs().max() > 0 for tensor in tensors(student, reads)]
    assert any(received)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())

    level = 1  # one tensor by finite differences
    probe = student.fpn if "fpn" in reads else student.cls_tower[level]
    index = level if "fpn" in reads else 0

    def loss_of(features):
        torch.manual_seed(0)  # MGD draws masks
        before, probe[index] = probe[index], features
        total = sum(method.eval()(student, teacher, targets).values())
        probe[index] = before
        return total

    assert torch.autograd.gradcheck(loss_of, probe[index].detach().clone().requires_grad_())


@pytest.mark.parametrize("name", METHODS)
def test_channels_may_differ(fake_output, targets, name):
    """An adapter is trained then."""
    method = make(name, 4, 6)
    losses = method(fake_output(1), fake_output(2, C=6), targets)
    sum(losses.values()).backward()
    assert len(list(method.parameters())) > 0
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in method.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_images_without_boxes(fake_output, targets, name):
    """First, last, alone, and the only ones of the batch; losses are finite and can be differentiated."""
    method, empty = make(name), targets[1]
    for N, given in ((2, targets), (2, targets[::-1]), (2, [empty, empty]), (1, [empty])):
        student = fake_output(1, N=N)
        inputs = [tensor.requires_grad_() for tensor in tensors(student, method.needs)]
        losses = method(student, fake_output(2, N=N), given)
        assert all(loss.isfinite() and loss.requires_grad for loss in losses.values())
        sum(losses.values()).backward()
        gradients = [tensor.grad for tensor in inputs if tensor.grad is not None]
        assert gradients and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", METHODS)
def test_constant_features(fake_output, targets, name):
    """A constant channel and a constant image have finite losses and moderate gradients."""
    method, student = make(name), fake_output(1)
    features = tensors(student, ("fpn", "cls_tower", "reg_tower"))
    for level in features:
        level[:, 1], level[1] = 0.7, 2.0
        level.requires_grad_()
    losses = method(student, fake_output(2), targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    gradients = [level.grad for level in features if level.grad is not None]
    assert gradients and all(g.isfinite().all() and g.abs().max() < 100 for g in gradients)


@pytest.mark.parametrize("name", METHODS)
def test_autocast(fake_output, targets, name):
    """With float32 inputs under autocast, losses are float32 and close to those without it; towers are bfloat16."""
    method, outputs = make(name, 4, 6).float(), (fake_output(1), fake_output(2, C=6))
    for output in outputs:
        for attribute, value in vars(output).items():
            dtype = torch.bfloat16 if "tower" in attribute else torch.float32
            convert = lambda v, d=dtype: [convert(x) for x in v] if isinstance(v, list) else v.to(d)  # noqa: E731, B023
            setattr(output, attribute, convert(value))
    boxes = [{"boxes": target["boxes"].float(), "labels": target["labels"]} for target in targets]
    for output in outputs:  # what autocast would have rounded, so that only the method differs below
        output.cls_tower, output.reg_tower = (
            [[block.float().bfloat16() for block in level] for level in tower]
            for tower in (output.cls_tower, output.reg_tower)
        )
    torch.manual_seed(0)  # MGD draws masks
    with torch.autocast("cpu", torch.bfloat16):
        half = method(*outputs, boxes)
    for output in outputs:
        output.cls_tower, output.reg_tower = (
            [[block.float() for block in level] for level in tower] for tower in (output.cls_tower, output.reg_tower)
        )
    torch.manual_seed(0)
    exact = method(*outputs, boxes)
    assert all(loss.dtype == torch.float32 for loss in half.values())
    assert_close(half, exact, rtol=0.05, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_order_of_ground_truth(fake_output, targets, name):
    """The order of the boxes of an image does not matter."""
    method, student, teacher = make(name), fake_output(1), fake_output(2)
    turned = [{key: values.flip(0) for key, values in target.items()} for target in targets]
    torch.manual_seed(0)  # MGD draws masks
    losses = method(student, teacher, targets)
    torch.manual_seed(0)
    assert_close(method(student, teacher, turned), losses)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("ssim", "drkd")])  # autocast rejects meta
def test_reads_no_value_back(fake_output, targets, name):
    """Meta tensors have no values: an operation that waits for values of the GPU fails on them."""
    if name == "tid":
        targets = targets[:1] * 2
    method, outputs = make(name).to("meta"), (fake_output(1), fake_output(2))
    for output in outputs:
        for attribute, value in vars(output).items():
            convert = lambda v: [convert(x) for x in v] if isinstance(v, list) else v.to("meta")  # noqa: E731, B023
            setattr(output, attribute, convert(value))
    targets = [{key: values.to("meta") for key, values in target.items()} for target in targets]
    assert all(loss.shape == () for loss in method(*outputs, targets).values())


@pytest.fixture(scope="module")
def networks():
    """Student and teacher of each detector, built once and copied."""
    torch.manual_seed(0)
    built = {d: [build_detector(d, "test_resnet", 3, image_size=(32, 48)) for _ in range(2)] for d in DETECTORS}
    return lambda detector: copy.deepcopy(built[detector])


def test_pgd_needs_a_dense_detector():
    with pytest.raises(ValueError, match="faster_rcnn does not have"):
        METHODS["pgd"]("faster_rcnn", 256, 256, STRIDES["faster_rcnn"])


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "detector"), SERVED)
def test_one_training_step(networks, name, detector, amp):
    """Finite losses; gradients reach every parameter of method and student, none the teacher; one image is empty."""
    student, teacher = networks(detector)
    distiller = Distiller(student, teacher, METHODS[name](detector, 256, 256, STRIDES[detector])).train()
    images = [torch.rand(3, 32, 40), torch.rand(3, 32, 32)]
    targets = [
        {"boxes": torch.tensor([[4.0, 4.0, 20.0, 25.0], [10.0, 2.0, 35.0, 15.0]]), "labels": torch.tensor([1, 2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)},
    ]
    if not amp:
        check_terms(distiller, images, targets)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        detection, distillation = distiller(images, targets)
    assert distillation and all(key.startswith(f"loss_{name}_") for key in distillation)
    losses = {**detection, **distillation}
    assert all(torch.isfinite(loss) and loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in distiller.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert student.state_dict().keys() == networks(detector)[0].state_dict().keys()  # nothing of the method is in it


@pytest.mark.parametrize(("name", "detector"), SERVED)
def test_maps(networks, name, detector):
    """One map per level compared over its positions, at least 0, and matrices of objects; also without boxes."""
    distiller = Distiller(*networks(detector), METHODS[name](detector, 256, 256, STRIDES[detector])).eval()
    count = 4 if (name, detector) in FINEST_FOUR else 5
    for boxes in (torch.tensor([[4.0, 4.0, 20.0, 25.0], [10.0, 2.0, 35.0, 15.0]]), torch.zeros(0, 4)):
        target = {"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.long)}
        with torch.no_grad():
            images, targets = distiller.student.transform([torch.rand(3, 32, 40)], [target])
            student, _ = forward_detector(distiller.student, images, needs=distiller.method.needs)
            maps = distiller.method.maps(student, distiller.run_teacher(images), targets)
        assert len(maps) > 0
        for map_name, levels in maps.items():
            if map_name.endswith("matrix"):
                assert all(level.shape == (1, len(boxes), len(boxes)) for level in levels)
            else:
                assert [level.shape for level in levels] == [level[:, 0].shape for level in student.fpn[:count]]
            assert all(level.isfinite().all() and (level >= 0).all() for level in levels)
