"""BCKD against its equations and arithmetic done by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from kd.methods.bckd import BCKD, bckd_cls_loss, bckd_loc_loss, count_positives, disagreement


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def giou(a: list[float], b: list[float]) -> float:
    """IoU less the part of the enclosing box that neither covers."""
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0.0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    enclosing = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return width * height / union - (enclosing - union) / enclosing


def test_matches_equation(fake_output):
    """Slow loops over every index; at least one positive an image."""
    student, teacher = fake_output(1), fake_output(2)
    for level in student.positive:
        level[1] = False
    cls = loc = 0.0
    P = max(1, sum(level[0].sum().item() for level in student.positive)) + 1
    levels = zip(student.cls_logits, teacher.cls_logits, student.boxes, teacher.boxes)
    for logits_s, logits_t, boxes_s, boxes_t in levels:
        N, A, K, H, W = logits_s.shape
        for n, a, y, x in ((n, a, y, x) for n in range(N) for a in range(A) for y in range(H) for x in range(W)):
            differences = []
            for k in range(K):
                p, q = sigmoid(logits_s[n, a, k, y, x].item()), sigmoid(logits_t[n, a, k, y, x].item())
                differences.append(abs(q - p))
                cls += abs(q - p) * -(q * math.log(p) + (1 - q) * math.log(1 - p))
            loc += max(differences) * (1 - giou(boxes_s[n, a, :, y, x].tolist(), boxes_t[n, a, :, y, x].tolist()))
    losses = BCKD("fcos", 4, 4, (8, 16, 32))(student, teacher, [])
    assert_close(losses["loss_bckd_cls"].item(), cls / P, rtol=1e-6, atol=0)
    assert_close(losses["loss_bckd_loc"].item(), 4 * loc / P, rtol=1e-6, atol=0)


def test_hand_computed():
    """One position with two classes. Student 1/2 and 1/2, teacher 3/4 and 1/2: |q_t - q_s| is 1/4 and 0.

    BCE(1/2, 3/4) = ln 2, so cls = ln 2 / 4, as the other class agrees. With the sides swapped BCE is
    -1/2 ln 3/4 - 1/2 ln 1/4 = 2 ln 2 - 1/2 ln 3. The boxes share 1 of 4 + 4 - 1 = 7 and are enclosed by 9:
    GIoU = 1/7 - 2/9 = -5/63, so loc = 1/4 * 68/63.
    """
    student = torch.zeros(1, 1, 2, 1, 1, dtype=torch.float64)
    teacher = torch.tensor([math.log(3), 0.0], dtype=torch.float64).view(1, 1, 2, 1, 1)
    assert_close(disagreement(student, teacher).flatten().tolist(), [0.25, 0.0])
    assert_close(bckd_cls_loss(student, teacher).item(), math.log(2) / 4)
    assert_close(bckd_cls_loss(teacher, student).item(), (2 * math.log(2) - math.log(3) / 2) / 4)
    boxes = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3]], dtype=torch.float64).view(2, 1, 1, 4, 1, 1)
    weight = disagreement(student, teacher).amax(dim=2)
    assert_close(bckd_loc_loss(boxes[0], boxes[1], weight).item(), 68 / 63 / 4, rtol=1e-6, atol=0)


def test_zero_at_teacher(fake_output):
    """Where the logits agree, both losses are 0, wherever the boxes are."""
    student, teacher = fake_output(1), fake_output(2)
    student.cls_logits = teacher.cls_logits
    losses = BCKD("gfl", 4, 4, (8, 16, 32))(student, teacher, [])
    assert all(loss == 0 for loss in losses.values())


def test_gradients(fake_output):
    """By finite differences, also through the weight of (1), which is a constant in (2); none to the teacher."""
    student, teacher = fake_output(1), fake_output(2)
    s, t, a, b = (o[1].requires_grad_() for o in (student.cls_logits, teacher.cls_logits, student.boxes, teacher.boxes))
    assert torch.autograd.gradcheck(lambda s: bckd_cls_loss(s, t), s)
    weight = disagreement(s, t).amax(dim=2)
    assert torch.autograd.gradcheck(lambda a: bckd_loc_loss(a, b, weight), a)
    (bckd_cls_loss(s.detach(), t) + bckd_loc_loss(a, b, weight)).backward()
    assert s.grad is None and t.grad is None and b.grad is None and a.grad.abs().max() > 0


def test_normaliser(fake_output):
    """P counts positives of all levels, at least 1 in each image; twice the batch has the same losses."""
    levels = [torch.tensor([[[1, 1]], [[0, 0]], [[0, 0]]], dtype=torch.bool)[..., None], torch.zeros(3, 1, 1, 1).bool()]
    assert count_positives(levels) == 2 + 1 + 1
    method, outputs = BCKD("retinanet", 4, 4, (8, 16, 32)), (fake_output(1), fake_output(2))
    once = method(*outputs, [])
    for output in outputs:
        for name in ("cls_logits", "boxes", "positive"):
            setattr(output, name, [torch.cat([level, level]) for level in getattr(output, name)])
    assert_close(method(*outputs, []), once)


def test_errors(fake_output):
    student, teacher = fake_output(1), fake_output(2)
    with pytest.raises(ValueError, match="must agree"):
        bckd_cls_loss(student.cls_logits[0], teacher.cls_logits[1])
    with pytest.raises(ValueError, match="must agree"):
        bckd_loc_loss(student.boxes[0], teacher.boxes[0], student.cls_logits[0])
    with pytest.raises(ValueError, match="faster_rcnn does not have"):
        BCKD("faster_rcnn", 256, 256, (8,))
