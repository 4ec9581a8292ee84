"""What holds for every method: its file is self-contained, its losses behave, and it trains on every detector."""

import ast
import copy
import inspect
import re
import shutil
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._pytree import tree_map

import kd.methods
from kd.detectors import DETECTORS, STRIDES, build_detector
from kd.distiller import Distiller, check_terms
from kd.features import forward_detector
from kd.methods import METHODS, build_method
from tests.conftest import STRIDES as FAKE_STRIDES

FILES = sorted(file for file in Path(kd.methods.__file__).parent.glob("*.py") if file.name != "__init__.py")
DENSE = [detector for detector in DETECTORS if detector != "faster_rcnn"]
CLASSES = {getattr(make, "func", make) for make in METHODS.values()}
SERVES = {"pgd": DENSE, "bckd": DENSE, "crosskd": DENSE, "ld": ["gfl"]}  # the others all
SERVED = [(name, detector) for name in METHODS for detector in SERVES.get(name, DETECTORS)]
READ_FEATURES = [name for name in METHODS if name not in ("ld", "bckd")]
FEATURES = ("fpn", "cls_tower", "reg_tower", "cls_before_relu", "reg_before_relu")
FINEST_FOUR = {("mgd", "faster_rcnn"), ("fgd", "faster_rcnn"), *(("pkd", d) for d in DETECTORS)}  # four levels of five


def make(name: str, student_channels: int = 4, teacher_channels: int = 4) -> nn.Module:
    """A method in float64 for fake outputs."""
    settings = ["nodes=(3, 2, 2)"] if name == "drkd" else []
    detector = SERVES.get(name, ["fcos"])[0]
    return build_method(name, detector, student_channels, teacher_channels, FAKE_STRIDES, settings).double()


def tensors(output: SimpleNamespace, names) -> list[torch.Tensor]:
    """All floating-point tensors in these attributes of an output."""

    def flat(value):
        if isinstance(value, torch.Tensor):
            return [value] if value.is_floating_point() else []
        return [tensor for item in value for tensor in flat(item)]

    return flat([getattr(output, name) for name in names if not callable(getattr(output, name))])


def convert(output: SimpleNamespace, function) -> None:
    """Replace every tensor of an output by function(attribute, tensor)."""
    for attribute, value in vars(output).items():
        if not callable(value):
            setattr(output, attribute, tree_map(partial(function, attribute), value))


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
    header = (
        "import sys\nsys.path.insert(0, '.')\nfrom types import SimpleNamespace\nimport torch\nfrom torch import nn\n"
    )
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
    reads = [attribute for attribute in method.needs if attribute in (*FEATURES, "cls_logits")]
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

    if name not in READ_FEATURES:  # their weights are constants, which finite differences do not know
        return
    probe, index = getattr(student, reads[0]), 1  # one tensor by finite differences
    if isinstance(probe[index], list):  # of the blocks of a tower
        probe, index = probe[index], getattr(method, "block", 0)

    def loss_of(features):
        torch.manual_seed(0)  # MGD draws masks
        before, probe[index] = probe[index], features
        total = sum(method.eval()(student, teacher, targets).values())
        probe[index] = before
        return total

    assert torch.autograd.gradcheck(loss_of, probe[index].detach().clone().requires_grad_())


@pytest.mark.parametrize("name", READ_FEATURES)
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


@pytest.mark.parametrize("name", READ_FEATURES)
def test_constant_features(fake_output, targets, name):
    """A constant channel and a constant image have finite losses and moderate gradients."""
    method, student = make(name), fake_output(1)
    features = tensors(student, FEATURES)
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
    boxes = [{"boxes": target["boxes"].float(), "labels": target["labels"]} for target in targets]

    for output in outputs:
        convert(output, lambda _, tensor: tensor.float() if tensor.is_floating_point() else tensor)
        convert(output, lambda name, tensor: tensor.bfloat16() if name in FEATURES[1:] else tensor)
    torch.manual_seed(0)  # MGD draws masks
    with torch.autocast("cpu", torch.bfloat16):
        half = method(*outputs, boxes)
    for output in outputs:  # only the method's own rounding is left to differ
        convert(output, lambda name, tensor: tensor.float() if name in FEATURES[1:] else tensor)
    torch.manual_seed(0)
    exact = method(*outputs, boxes)
    assert all(loss.dtype == torch.float32 for loss in half.values())
    assert_close(half, exact, rtol=0.05, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_half_precision(fake_output, targets, name):
    """What networks return under autocast has nearly the losses of the same values in float32."""
    method, outputs = make(name, 4, 6).float(), (fake_output(1), fake_output(2, C=6))
    rounded = (*FEATURES, "cls_logits", "edge_logits")
    for output in outputs:
        convert(output, lambda _, tensor: tensor.float() if tensor.is_floating_point() else tensor)
        convert(output, lambda name, tensor: tensor.bfloat16() if name in rounded else tensor)
    boxes = [{"boxes": target["boxes"].float(), "labels": target["labels"]} for target in targets]
    torch.manual_seed(0)  # MGD draws masks
    with torch.autocast("cpu", torch.bfloat16):
        half = method(*outputs, boxes)
    for output in outputs:
        convert(output, lambda name, tensor: tensor.float() if name in rounded else tensor)
    torch.manual_seed(0)
    assert all(loss.dtype == torch.float32 for loss in half.values())
    assert_close(half, method(*outputs, boxes), rtol=0.03, atol=1e-6)


def test_adapters_of_a_student_that_inherits():
    """Where channels agree they begin as the identity, of any size of kernel; else as they would."""
    adapters = 0
    for name in METHODS:
        detector, settings = SERVES.get(name, ["fcos"])[0], ["nodes=(3, 2, 2)"] if name == "drkd" else []
        for channels, inherits in ((4, True), (4, False), (6, True)):
            torch.manual_seed(0)
            method = build_method(name, detector, 4, channels, FAKE_STRIDES, settings, inherits)
            torch.manual_seed(0)
            usual = build_method(name, detector, 4, channels, FAKE_STRIDES, settings)
            for (key, ours), theirs in zip(method.named_modules(), usual.modules(), strict=True):
                x = torch.rand(1, 4, 5, 6)
                if "adapter" in key and isinstance(ours, nn.Conv2d) and inherits and channels == 4:
                    assert torch.equal(ours(x), x) and not torch.equal(theirs(x), x)
                    adapters += 1
                else:
                    assert_close(list(ours.parameters(recurse=False)), list(theirs.parameters(recurse=False)))
    assert adapters == 3 + 3 + 3 + 2 + 2  # of FRS, TID, and the three kinds of DRKD


@pytest.mark.parametrize("name", METHODS)
def test_missing_level(fake_output, targets, name):
    """A level that one network lacks is an error, not left out."""
    for student_levels, teacher_levels in ((3, 2), (2, 3), (2, 2)):
        outputs = [fake_output(seed) for seed in (1, 2)]
        for output, levels in zip(outputs, (student_levels, teacher_levels)):
            for attribute, value in vars(output).items():
                if isinstance(value, list):
                    setattr(output, attribute, value[:levels])
        if name in ("pgd", "bckd", "crosskd") and student_levels == teacher_levels:
            continue  # they do not ask for the strides of the levels
        with pytest.raises((ValueError, IndexError)):
            make(name)(*outputs, targets)


@pytest.mark.parametrize("name", METHODS)
def test_order_of_ground_truth(fake_output, targets, name):
    """The order of the boxes of an image does not matter."""
    method, student, teacher = make(name), fake_output(1), fake_output(2)
    turned = [{key: values.flip(0) for key, values in target.items()} for target in targets]
    torch.manual_seed(0)  # MGD draws masks
    losses = method(student, teacher, targets)
    torch.manual_seed(0)
    assert_close(method(student, teacher, turned), losses)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("ssim", "drkd", "bckd")])
def test_reads_no_value_back(fake_output, targets, name):
    """Meta tensors have no values: an operation that waits for values of the GPU fails on them.

    Autocast, which SSIM and DRKD turn off, rejects them, and torchvision's GIoU, which BCKD uses, reads a mask.
    """
    if name == "tid":
        targets = targets[:1] * 2
    method, outputs = make(name).to("meta"), (fake_output(1), fake_output(2))
    for output in outputs:
        convert(output, lambda _, tensor: tensor.to("meta"))
    targets = [{key: values.to("meta") for key, values in target.items()} for target in targets]
    assert all(loss.shape == () for loss in method(*outputs, targets).values())


@pytest.fixture(scope="module")
def networks():
    """Student and teacher of each detector, built once and copied."""
    torch.manual_seed(0)
    built = {d: [build_detector(d, "test_resnet", 3, image_size=(32, 48)) for _ in range(2)] for d in DETECTORS}
    return lambda detector: copy.deepcopy(built[detector])


@pytest.mark.parametrize("name", ["cwd", "fgd", "pgd"])
def test_temperature_is_positive(name):
    with pytest.raises(ValueError, match="temperature"):
        METHODS[name]("fcos", 4, 4, FAKE_STRIDES, temperature=0.0)


@pytest.mark.parametrize("name", ["pgd", "tid", "drkd", "fgd", "ld"])
def test_one_target_for_two_images(fake_output, targets, name):
    """Methods that read boxes do not spread those of one image over the batch."""
    with pytest.raises((ValueError, RuntimeError)):
        make(name)(fake_output(1), fake_output(2), targets[:1])


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
            student, _ = forward_detector(distiller.student, images, targets, distiller.method.needs)
            maps = distiller.method.maps(student, distiller.run_teacher(images), targets)
        assert len(maps) > 0
        for map_name, levels in maps.items():
            if map_name.endswith("matrix"):
                assert all(level.shape == (1, len(boxes), len(boxes)) for level in levels)
            else:
                assert [level.shape for level in levels] == [level[:, 0].shape for level in student.fpn[:count]]
            assert all(level.isfinite().all() and (level >= 0).all() for level in levels)
