"""The teacher is a constant, the student is torchvision's, and a term that does nothing is an error."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from kd.detectors import build_detector
from kd.distiller import Distiller, check_not_zero, check_terms, measure_ratios
from kd.methods import METHODS

SIZE = (64, 96)


@pytest.fixture
def batch():
    images = [torch.rand(3, 64, 80), torch.rand(3, 64, 64)]
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    return images, [target, {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}]


def make(method: nn.Module | None = None, **options) -> Distiller:
    student, teacher = (build_detector("fcos", "test_resnet", 3, image_size=SIZE) for _ in range(2))
    return Distiller(student, teacher, method or METHODS["frs"]("fcos", 256, 256, student.backbone.strides), **options)


def drkd() -> nn.Module:
    return METHODS["drkd"]("fcos", 256, 256, (8, 16, 32, 64, 128))


def test_teacher_is_unchanged_by_a_training_step(batch):
    distiller = make()
    before = copy.deepcopy(distiller.teacher.state_dict())
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    distiller.train()
    detection, distillation = distiller(*batch)
    sum([*detection.values(), *distillation.values()]).backward()
    optimizer.step()
    assert not any(module.training for module in distiller.teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in distiller.teacher.parameters())
    for name, value in distiller.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_teacher_is_outside_the_module():
    distiller = make()
    inside = {id(p) for p in distiller.parameters()}
    assert inside and not any(id(p) in inside for p in distiller.teacher.parameters())
    assert {name.split(".")[0] for name in distiller.state_dict()} == {"student", "method", "iteration"}


def test_without_a_method_the_losses_are_torchvisions(batch):
    student = build_detector("fcos", "test_resnet", 3, image_size=SIZE)
    (detection, distillation), expected = Distiller(student)(*batch), student(*batch)
    assert detection.keys() == expected.keys() and distillation == {}
    assert all(torch.equal(detection[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="both a teacher and a method"):
        Distiller(student, teacher=student)


def test_weights_are_for_the_method_alone(batch):
    """A quarter of one loss, eight times another, the rest and the detection losses as they are."""
    distiller = make(drkd()).eval()  # with batch statistics fixed, every call gives the same losses
    detection, full = distiller(*batch)
    distiller.weights = {"loss_drkd_pixel": 0.25, "loss_drkd_relation": 8.0}
    again, weighted = distiller(*batch)
    assert_close(again, detection)
    expected = {"loss_drkd_pixel": 0.25 * full["loss_drkd_pixel"], "loss_drkd_relation": 8 * full["loss_drkd_relation"]}
    assert_close(weighted, {**full, **expected})


def test_measured_ratios(batch):
    """Sums over batches of each raw loss over those of all detection losses; nothing in the distiller changes."""
    distiller = make(drkd(), warmup=4)
    distiller.weights = {"loss_drkd_pixel": 0.25}
    before = {name: value.clone() for name, value in distiller.state_dict().items()}
    images, targets = batch
    ratios = measure_ratios(distiller, [(images[:1], targets[:1]), (images[1:], targets[1:])])
    assert_close(dict(distiller.state_dict()), before)

    plain = Distiller(distiller.student, distiller.teacher, distiller.method)
    parts = [plain(images[:1], targets[:1]), plain(images[1:], targets[1:])]
    detection = sum(sum(part[0].values()) for part in parts)
    assert_close(ratios, {name: (parts[0][1][name] + parts[1][1][name]) / detection for name in parts[0][1]})


def test_warmup(batch):
    """Distillation losses grow to their weight: 1/4 of it at the first of 4 steps, all of it from the fourth on."""
    distiller = make(warmup=4).eval()
    distiller.warmup = 0
    full = distiller(*batch)[1]
    distiller.warmup = 4
    for step, part in enumerate((0.25, 0.5, 0.75, 1, 1)):
        distiller.iteration.fill_(step)
        detection, distillation = distiller(*batch)
        assert_close(distillation, {name: part * loss for name, loss in full.items()})
    distiller.train()(*batch)
    assert distiller.iteration == 5  # counts in training only, and is saved
    assert "iteration" in distiller.state_dict()


def test_teacher_input_is_normalised_its_own_way():
    """Where mean and std differ, the teacher sees what its own transform would return, zero padding included."""
    student = build_detector("fcos", "mobilenetv3_small_100", 3, image_size=SIZE)
    teacher = build_detector("fcos", "test_resnet", 3, image_size=SIZE)
    assert student.transform.image_mean != teacher.transform.image_mean
    seen = []
    teacher.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    distiller = Distiller(student, teacher, METHODS["l2"]("fcos", 256, 256, student.backbone.strides))
    images = [torch.rand(3, 64, 90), torch.rand(3, 50, 64)]
    distiller.run_teacher(student.transform(images, None)[0])
    assert_close(seen[0], teacher.transform(images, None)[0].tensors)


def test_targets_are_resized_with_the_images():
    """The method sees boxes of the resized image, and both networks the same one."""
    seen = {}

    class Spy(nn.Module):
        needs, warmup = ("fpn",), 0

        def forward(self, student, teacher, targets):
            seen.update(boxes=targets[0]["boxes"], sizes=[o.fpn[0].shape[-2:] for o in (student, teacher)])
            return {"loss_spy": student.fpn[0].sum()}

    target = {"boxes": torch.tensor([[8.0, 8.0, 16.0, 24.0]]), "labels": torch.tensor([1])}
    make(Spy())([torch.rand(3, 32, 32)], [target])
    assert_close(seen["boxes"], torch.tensor([[16.0, 16.0, 32.0, 48.0]]))  # the short side becomes 64
    assert seen["sizes"] == [(8, 8), (8, 8)]


class Terms(nn.Module):
    """A method that returns what it is told."""

    needs, warmup = ("fpn",), 0

    def __init__(self, **terms):
        super().__init__()
        self.terms, self.own = terms, nn.Parameter(torch.ones(()))

    def forward(self, student, teacher, targets):
        values = SimpleNamespace(student=student.fpn[0].square().mean(), own=self.own**2)
        return {f"loss_{name}": term(values) for name, term in self.terms.items()}


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"a": lambda v: v.student * 0}, "loss_a is zero"),
        ({"a": lambda v: v.student * 0, "b": lambda v: v.own * 0}, "loss_a, loss_b is zero"),
        ({"a": lambda v: v.student.detach()}, "loss_a = .* has no gradient"),
        ({"a": lambda v: v.student, "b": lambda v: v.own}, "loss_b = 1 sends no gradient to any parameter of the stud"),
    ],
)
def test_a_silent_term_is_an_error(batch, terms, message):
    with pytest.raises(RuntimeError, match=message):
        check_terms(make(Terms(**terms)), *batch)


def test_a_single_zero_is_returned(batch):
    """One of several terms may be zero for a reason; tiny weights pass, and the distiller is left as it was."""
    distiller = make(Terms(a=lambda v: v.student * 1e-9, b=lambda v: v.student * 0)).train()
    before = copy.deepcopy(distiller.state_dict())
    assert check_terms(distiller, *batch) == ["loss_b"]
    assert distiller.training and distiller.student.training
    assert all(torch.equal(value, before[name]) for name, value in distiller.state_dict().items())
    assert all(parameter.grad is None for parameter in distiller.parameters())


def test_zero_for_an_epoch_is_an_error():
    check_not_zero({"loss_a": 0.5, "loss_b": 0.0}, steps=49)  # too few to say
    with pytest.raises(RuntimeError, match="loss_b was zero in all of 50 steps: .* 1e-9"):
        check_not_zero({"loss_a": 0.5, "loss_b": 0.0}, steps=50)
