"""FRS against its equations, its authors' numbers and arithmetic done by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from kd.methods.frs import FRS, feature_richness, frs_feature_loss, frs_head_loss


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_matches_equation(fake_output):
    """Slow loops over every index."""
    student, teacher = fake_output(1), fake_output(2)
    for s, t, logits_s, logits_t in zip(student.fpn, teacher.fpn, student.cls_logits, teacher.cls_logits):
        N, C, H, W = s.shape
        fpn = head = weight = 0.0
        for n in range(N):
            for y in range(H):
                for x in range(W):
                    pairs = [
                        (logits_s[n, a, k, y, x].item(), logits_t[n, a, k, y, x].item())
                        for a in range(logits_s.shape[1])
                        for k in range(logits_s.shape[2])
                    ]
                    richness = max(sigmoid(t_logit) for _, t_logit in pairs)
                    fpn += richness * sum((t[n, c, y, x].item() - s[n, c, y, x].item()) ** 2 for c in range(C))
                    for s_logit, t_logit in pairs:
                        p, q = sigmoid(s_logit), sigmoid(t_logit)
                        head += richness * -(q * math.log(p) + (1 - q) * math.log(1 - p))
                    weight += richness
        richness = feature_richness(logits_t)
        assert_close(frs_feature_loss(s, t, richness).item(), fpn / weight)
        assert_close(frs_head_loss(logits_s, logits_t, richness).item(), head / weight)


@pytest.mark.parametrize("detector", ["fcos", "retinanet", "faster_rcnn"])
def test_matches_reference(reference, fake_output, detector):
    """Losses and gradients of the public code, whose inputs are random numbers of seed 0 in this order.

    The default weights are those of the detector. Gradients are compared by their norms on each level, and one by one
    on the coarsest level and for the adapters' biases.
    """
    case = reference["frs"]["cases"][detector]
    sizes, generator = [(16, 16), (8, 8), (4, 4)], torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    student, teacher = fake_output(0), fake_output(0)
    for output in (student, teacher):
        output.fpn = [randn(2, 8, *size) for size in sizes]
    for output in (student, teacher):
        output.cls_logits = [1.5 * randn(2, case["logits"], *size) for size in sizes]
        output.cls_logits = [logits.unflatten(1, (case["anchors"], -1)) for logits in output.cls_logits]
    method = FRS(detector, 8, 8, (8, 16, 32)).double()
    for adapter in method.adapters:
        adapter.weight.data, adapter.bias.data = 0.2 * randn(8, 8, 3, 3), 0.2 * randn(8)
    for tensor in (*student.fpn, *student.cls_logits):
        tensor.requires_grad_()

    losses = method(student, teacher, [])
    tolerance = {"rtol": 1e-9, "atol": 1e-12}
    assert_close(losses["loss_frs_fpn"].item(), case["loss_fpn"], **tolerance)
    assert_close(losses["loss_frs_head"].item(), case["loss_head"], **tolerance)
    sum(losses.values()).backward()
    assert_close([level.grad.norm().item() for level in student.fpn], case["grad_fpn_norms"], **tolerance)
    assert_close([level.grad.norm().item() for level in student.cls_logits], case["grad_logits_norms"], **tolerance)
    assert_close(student.fpn[2].grad[1].tolist(), case["grad_fpn_2"], **tolerance)
    assert_close(student.cls_logits[2].grad[1].flatten(0, 1).tolist(), case["grad_logits_2"], **tolerance)
    adapters = list(method.adapters)
    assert_close([adapter.bias.grad.tolist() for adapter in adapters], case["grad_adapter_biases"], **tolerance)
    norms = [adapter.weight.grad.norm().item() for adapter in adapters]
    assert_close(norms, case["grad_adapter_weight_norms"], **tolerance)


def test_hand_computed():
    """Two positions, two channels, one anchor and class.

    Teacher logits ln 3 and -ln 3 give richness 0.75 and 0.25, which sum to 1.
    Squared differences: 1 + 4 = 5 and 9 + 0 = 9, so the feature loss is 0.75 * 5 + 0.25 * 9 = 6.
    Student logits 0 cost ln 2 against any probability, so the head loss is ln 2.
    """
    logits_t = torch.tensor([math.log(3), -math.log(3)], dtype=torch.float64).view(1, 1, 1, 1, 2)
    richness = feature_richness(logits_t)
    assert_close(richness, torch.tensor([[[0.75, 0.25]]], dtype=torch.float64))
    teacher = torch.zeros(1, 2, 1, 2, dtype=torch.float64)
    student = torch.tensor([[1.0, 3.0], [2.0, 0.0]], dtype=torch.float64).view(1, 2, 1, 2)
    assert_close(frs_feature_loss(student, teacher, richness).item(), 6.0)
    assert_close(frs_head_loss(torch.zeros_like(logits_t), logits_t, richness).item(), math.log(2))


def test_zero_at_teacher(fake_output):
    """Equal features cost nothing; equal logits cost the teacher's entropy, which no student can undercut."""
    teacher = fake_output(2)
    richness = feature_richness(teacher.cls_logits[0])
    assert frs_feature_loss(teacher.fpn[0], teacher.fpn[0], richness) == 0
    at_teacher = teacher.cls_logits[0].clone().requires_grad_()
    frs_head_loss(at_teacher, teacher.cls_logits[0], richness).backward()
    assert_close(at_teacher.grad, torch.zeros_like(at_teacher))


def test_normaliser(fake_output):
    """A mean over the positions of the batch: repeating it changes nothing, but it is not a mean over images."""
    s, t, logits = fake_output(1).fpn[0], fake_output(2).fpn[0], fake_output(2).cls_logits[0]
    richness = feature_richness(logits)
    once = frs_feature_loss(s, t, richness)
    assert_close(frs_feature_loss(torch.cat([s, s]), torch.cat([t, t]), torch.cat([richness, richness])), once)
    one_by_one = sum(frs_feature_loss(s[n : n + 1], t[n : n + 1], richness[n : n + 1]) for n in range(2)) / 2
    assert (once - one_by_one).abs() > 1e-3


def test_maps(fake_output):
    """The richness of both networks; that of the teacher gives the losses."""
    student, teacher = fake_output(1), fake_output(2)
    method = FRS("fcos", 4, 4, (8, 16, 32), alpha=2.0, beta=3.0).double()
    maps = method.maps(student, teacher, [])
    for name, output in (("teacher", teacher), ("student", student)):
        assert_close(maps[f"richness {name}"], [feature_richness(logits) for logits in output.cls_logits])
    fpn_loss = head_loss = 0
    for level, richness in enumerate(maps["richness teacher"]):
        fpn_loss += frs_feature_loss(method.adapters[level](student.fpn[level]), teacher.fpn[level], richness)
        head_loss += frs_head_loss(student.cls_logits[level], teacher.cls_logits[level], richness)
    losses = method(student, teacher, [])
    assert_close(losses, {"loss_frs_fpn": 2 * fpn_loss, "loss_frs_head": 3 * head_loss})


def test_errors(fake_output):
    output = fake_output(1)
    richness = feature_richness(output.cls_logits[0])
    with pytest.raises(ValueError, match="must agree"):
        frs_feature_loss(output.fpn[0], output.fpn[1], richness)
    with pytest.raises(ValueError, match="richness"):
        frs_feature_loss(output.fpn[0], output.fpn[0], richness[0])
    with pytest.raises(ValueError, match="must agree"):
        frs_head_loss(output.cls_logits[0], output.cls_logits[0][:, :1], richness)
