"""The teacher is a constant, the student is torchvision's, and a term that does nothing is an error."""

import copy
import time

import pytest
import torch
from torch.testing import assert_close

from kd.detectors import build_detector
from kd.distiller import Distiller, check_pair, check_terms, inherit
from kd.methods import METHODS

SIZE = (64, 96)


@pytest.fixture
def batch():
    images = [torch.rand(3, 64, 80), torch.rand(3, 64, 64)]
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    return images, [target, {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}]


def make(method: str = "frs") -> Distiller:
    student, teacher = (build_detector("fcos", "test_resnet", 3, image_size=SIZE) for _ in range(2))
    return Distiller(student, teacher, METHODS[method]("fcos", 256, 256, (8, 16, 32, 64, 128)))


def test_teacher_is_unchanged_by_a_training_step(batch):
    distiller = make()
    before = copy.deepcopy(distiller.teacher.state_dict())
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    distiller.train()
    sum(distiller(*batch).values()).backward()
    optimizer.step()
    assert not any(module.training for module in distiller.teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in distiller.teacher.parameters())
    for name, value in distiller.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_teacher_is_outside_the_module():
    distiller = make()
    inside = {id(p) for p in distiller.parameters()}
    assert inside and not any(id(p) in inside for p in distiller.teacher.parameters())
    assert all(name.split(".")[0] in ("student", "method", "iteration") for name in distiller.state_dict())


def test_without_a_method_the_losses_are_torchvisions(batch):
    student = build_detector("fcos", "test_resnet", 3, image_size=SIZE)
    losses, expected = Distiller(student)(*batch), student(*batch)
    assert losses.keys() == expected.keys()
    assert all(torch.equal(losses[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="go together"):
        Distiller(student, teacher=student)


def test_weight_is_for_the_method_alone(batch):
    """A quarter of the weight is a quarter of the method's losses; detection losses are not touched."""
    distiller = make().eval()  # batch statistics fixed: every call gives the same losses
    full, quarter = distiller(*batch), distiller(*batch, weight=0.25)
    for name, loss in full.items():
        assert_close(quarter[name], 0.25 * loss if name.startswith("loss_frs") else loss)


def test_stopwatch_knows_the_parts(batch):
    """Every part has been timed once, and took less than all of them together."""
    distiller = make()
    started = time.perf_counter()
    distiller(*batch)
    elapsed, parts = time.perf_counter() - started, distiller.stopwatch.read()
    assert list(parts) == ["transform", "teacher", "student", "method"]
    assert all(seconds > 0 for seconds in parts.values()) and sum(parts.values()) <= elapsed


def test_teacher_input_is_normalised_its_own_way():
    """Where mean and std differ, the teacher sees what its own transform would have made, zero padding included."""
    student = build_detector("fcos", "mobilenetv3_small_100", 3, image_size=SIZE)
    teacher = build_detector("fcos", "test_resnet", 3, image_size=SIZE)
    assert student.transform.image_mean != teacher.transform.image_mean
    distiller = Distiller(student, teacher, METHODS["l2"]("fcos", 256, 256, (8, 16, 32, 64, 128)))
    images = [torch.rand(3, 64, 90), torch.rand(3, 50, 64)]
    ours, _ = student.transform(images)
    expected, _ = teacher.transform(images)
    assert_close(distiller._as_teacher_input(ours).tensors, expected.tensors)


def test_a_pair_that_does_not_fit_is_refused():
    student = build_detector("fcos", "test_resnet", 3, image_size=SIZE)
    with pytest.raises(ValueError, match="detector: student FCOS, teacher RetinaNet"):
        check_pair(student, build_detector("retinanet", "test_resnet", 3, image_size=SIZE))
    with pytest.raises(ValueError, match="number of classes.*student 3, teacher 4"):
        check_pair(student, build_detector("fcos", "test_resnet", 4, image_size=SIZE))
    small = build_detector("retinanet", "test_resnet", 3, image_size=SIZE)
    with pytest.raises(ValueError, match="anchor sizes"):
        check_pair(small, build_detector("retinanet", "test_resnet", 3, image_size=(800, 1333)))
    check_pair(student, build_detector("fcos", "mobilenetv3_small_100", 3, image_size=SIZE))


def test_a_silent_term_is_an_error(batch):
    distiller = make()
    losses = distiller(*batch)
    terms = ["loss_frs_fpn", "loss_frs_head"]
    assert check_terms(losses, terms, terms, distiller.student) == []
    one_zero = {**losses, "loss_frs_fpn": losses["loss_frs_fpn"] * 0}
    assert check_terms(one_zero, terms, terms, distiller.student) == ["loss_frs_fpn"]
    assert check_terms(one_zero, terms, terms[:1], distiller.student) == ["loss_frs_fpn"]  # on the next batch
    with pytest.raises(RuntimeError, match="loss_frs_fpn is zero"):
        check_terms(one_zero, terms[:1], terms[:1], distiller.student)
    with pytest.raises(RuntimeError, match="has no gradient"):
        check_terms({"loss_frs_fpn": losses["loss_frs_fpn"].detach()}, terms[:1], terms[:1], distiller.student)
    adapter_only = distiller.method.adapters[0].weight.square().sum()
    with pytest.raises(RuntimeError, match="sends no gradient to any parameter of the student"):
        check_terms({"loss_frs_fpn": adapter_only}, terms[:1], terms[:1], distiller.student)


@pytest.mark.parametrize("detector", ["fcos", "retinanet", "faster_rcnn"])
def test_inherit(detector):
    """Pyramid and heads become the teacher's, the body stays; laterals of other channels are refused."""
    student, teacher = (build_detector(detector, "test_resnet", 3, image_size=SIZE) for _ in range(2))
    before = copy.deepcopy(student.state_dict())
    inherit(student, teacher)
    for name, value in student.state_dict().items():
        expected = before if name.startswith("backbone.body.") else teacher.state_dict()
        assert torch.equal(value, expected[name]), name
    other = build_detector(detector, "mobilenetv3_small_100", 3, image_size=SIZE)
    with pytest.raises(ValueError, match="cannot inherit backbone.fpn.inner_blocks.0.0.weight"):
        inherit(other, teacher)
