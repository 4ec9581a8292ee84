"""LD against its authors' numbers, its equations and arithmetic done by hand."""

import math
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from torchvision.ops import box_area, box_iou, distance_box_iou

from kd.methods import ld
from kd.methods.ld import LD, kl_divergence, valuable_region

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "ld.pt"


@pytest.fixture(scope="module")
def golden() -> dict:
    """Numbers of HikariTJU/LD at 4287990, computed in float64."""
    if not GOLDEN.exists():
        pytest.skip(f"{GOLDEN} does not exist")
    return torch.load(GOLDEN, weights_only=True)["cases"]


@pytest.mark.parametrize("case", ["ld_kl_T10", "kd_cls_T2"])
def test_divergence_matches_reference(golden, case):
    inputs, outputs, grads = (golden[case][key] for key in ("inputs", "outputs", "grads"))
    student = inputs["student_logits"].requires_grad_()
    kl = kl_divergence(student, inputs["teacher_logits"], inputs["T"])
    loss = inputs["loss_weight"] * (inputs["weight"] * kl).sum() / inputs["avg_factor"]
    assert_close(loss, outputs["loss"], rtol=1e-9, atol=0)
    assert_close(torch.autograd.grad(loss, student)[0], grads["student_logits"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("image", ["regions_img0", "regions_img1"])
def test_region_matches_reference(golden, image, monkeypatch):
    """With the reference's DIoU, which divides the intersection by the area of the anchor."""

    def reference_diou(anchors, boxes):
        iou = box_iou(anchors, boxes)
        intersection = iou / (1 + iou) * (box_area(anchors)[:, None] + box_area(boxes))
        return intersection / box_area(anchors)[:, None] + distance_box_iou(anchors, boxes) - iou

    inputs, outputs = (golden[image][key] for key in ("inputs", "outputs"))
    anchors = inputs["anchors"].split(inputs["num_level_anchors"])
    monkeypatch.setattr(ld, "distance_box_iou", reference_diou)
    region = valuable_region(list(anchors), inputs["gt_boxes"], 0.25)
    assert_close(region, outputs["vlr_region"], rtol=1e-9, atol=1e-12)
    assert (region > 0).sum() > 100


def test_losses_match_reference(golden, monkeypatch):
    """One level of two images with the reference's positives and region, values and gradients."""
    case = golden["loss_single_level0_gibox"]
    inputs, outputs, grads = (case[key] for key in ("inputs", "outputs", "grads"))
    region = inputs["vlr_region"].view(2, 1, 16, 16)
    student, teacher = (
        Output(
            cls_logits=[inputs[f"{name}cls_logits"].unsqueeze(1).requires_grad_()],
            edge_logits=[inputs[f"{name}reg_logits"].unflatten(1, (1, 4, 17)).requires_grad_()],
            positive=[(inputs["labels"] < 3).view(2, 1, 16, 16)],
        )
        for name in ("", "teacher_")
    )
    method = LD("gfl", 8, 8, (8,))
    monkeypatch.setattr(method, "regions", lambda student, targets: [region])
    losses = method(student, teacher, [])
    for ours, theirs in (("main", "loss_ld"), ("vlr", "loss_ld_vlr"), ("cls", "loss_kd")):
        assert_close(losses[f"loss_ld_{ours}"], outputs[theirs], rtol=1e-9, atol=0)
        ((name, expected),) = grads[theirs].items()
        found = {"reg_logits": student.edge_logits, "cls_logits": student.cls_logits}[name][0]
        gradient = torch.autograd.grad(losses[f"loss_ld_{ours}"], found, retain_graph=True)[0]
        assert_close(gradient.reshape(expected.shape), expected, rtol=1e-9, atol=1e-12)
    sum(losses.values()).backward()
    assert teacher.cls_logits[0].grad is None and teacher.edge_logits[0].grad is None


class Output:
    """Attributes by name."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


def test_matches_equation(fake_output, targets):
    """Slow loops over every index; the region by loops over anchors and boxes, in the second image without boxes."""
    student, teacher = fake_output(1, A=1), fake_output(2, A=1)
    method = LD("gfl", 4, 4, (8, 16, 32), gamma=0.1)
    levels = []
    for level, stride in zip(student.anchors, (8, 16, 32)):
        centre = (level[0, :2] + level[0, 2:]).flatten(1).T / 2
        levels.append(torch.cat([centre - 4 * stride, centre + 4 * stride], dim=1))

    def iou(a, b):
        wide, high = (max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]), 0.0) for i in (0, 1))
        return wide * high / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - wide * high)

    def offset(a, b):
        return math.hypot(*((a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)))

    regions = [[0.0] * len(level) for level in levels]
    for box in targets[0]["boxes"].tolist():
        nearest = []
        for level in levels:
            ordered = sorted(level.tolist(), key=lambda a: offset(a, box))[:9]
            nearest += [iou(a, box) for a in ordered]
        mean = sum(nearest) / len(nearest)
        threshold = mean + math.sqrt(sum((v - mean) ** 2 for v in nearest) / (len(nearest) - 1))
        for region, level in zip(regions, levels):
            for i, a in enumerate(level.tolist()):
                around = math.hypot(*(max(a[j + 2], box[j + 2]) - min(a[j], box[j]) for j in (0, 1)))
                diou = iou(a, box) - (offset(a, box) / around) ** 2
                if 0.1 * threshold <= diou < threshold:
                    region[i] = max(region[i], iou(a, box))
    assert sum(value > 0 for region in regions for value in region) > 2

    def kl(z_s, z_t, T):
        p_s, p_t = (
            [math.exp(v / T) / sum(math.exp(u / T) for u in z) for v in z] for z in (z_s.tolist(), z_t.tolist())
        )
        return T**2 * sum(b * (math.log(b) - math.log(a)) for a, b in zip(p_s, p_t)) / len(p_s)

    main = vlr = cls = 0.0
    for level, region in enumerate(regions):
        N, _, H, W = student.positive[level].shape
        of_level = []
        for n, y, x in ((n, y, x) for n in range(N) for y in range(H) for x in range(W)):
            edges = [o.edge_logits[level][n, 0, :, :, y, x] for o in (student, teacher)]
            logits = [o.cls_logits[level][n, 0, :, y, x] for o in (student, teacher)]
            edge_kl = sum(kl(a, b, 10) for a, b in zip(*edges)) / 4
            if student.positive[level][n, 0, y, x]:
                main += 0.25 * max(1 / (1 + math.exp(-z)) for z in logits[0].tolist()) * edge_kl
                of_level.append(kl(*logits, 2))
            elif n == 0:
                vlr += 0.25 / 4 * region[y * W + x] * edge_kl
        cls += 10 * sum(of_level) / max(len(of_level), 1)
    losses = method(student, teacher, targets)
    assert_close([loss.item() for loss in losses.values()], [main, vlr, cls], rtol=1e-6, atol=0)


def test_hand_computed():
    """Of probabilities 1/2, 1/2 to 3/4, 1/4, with the mean over two bins: (3/4 ln 3 - ln 2) / 2, at T = 2 four times.

    Squares of side 2 that share 1 of 7, with centres sqrt 2 apart in a square of diagonal 3 sqrt 2, have a DIoU of
    1/7 - 1/9 = 0.03. With both as anchors of the first, IoU 1 and 1/7, the threshold is 4/7 + 6/7 / sqrt 2 = 1.18: 1 is
    between a quarter of it and itself, 0.03 is not.
    """
    teacher = torch.tensor([math.log(3), 0.0], dtype=torch.float64)
    divergence = 0.75 * math.log(3) - math.log(2)
    assert_close(kl_divergence(torch.zeros_like(teacher), teacher, 1.0).item(), divergence / 2)
    assert_close(kl_divergence(torch.zeros_like(teacher), 2 * teacher, 2.0).item(), 2 * divergence)
    boxes = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3]], dtype=torch.float64)
    assert valuable_region([boxes], boxes[:1], 0.25).tolist() == [1.0, 0.0]


def test_zero_at_teacher(fake_output, targets):
    """Also for a constant added to the logits of an edge, or to all classes."""
    student, teacher = fake_output(1, A=1), fake_output(2, A=1)
    student.edge_logits = [level + 3 for level in teacher.edge_logits]
    student.cls_logits = [level - 2 for level in teacher.cls_logits]
    losses = LD("gfl", 4, 4, (8, 16, 32))(student, teacher, targets)
    assert_close([loss.item() for loss in losses.values()], [0.0] * 3, rtol=0, atol=1e-12)


def test_gradients():
    s, t = torch.randn(2, 3, 5, 4, dtype=torch.float64).requires_grad_(), torch.randn(3, 5, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: kl_divergence(s[0], t, 3.0), s)


def test_normaliser(fake_output, targets):
    """Twice the batch has twice the losses of edges and the same of classes: a mean over positives of a level."""
    outputs, method = (fake_output(1, A=1), fake_output(2, A=1)), LD("gfl", 4, 4, (8, 16, 32))
    once = method(*outputs, targets)
    for output in outputs:
        for name in ("cls_logits", "edge_logits", "positive"):
            setattr(output, name, [torch.cat([level, level]) for level in getattr(output, name)])
    twice = method(*outputs, targets * 2)
    assert_close(twice["loss_ld_main"], 2 * once["loss_ld_main"])
    assert_close(twice["loss_ld_vlr"], 2 * once["loss_ld_vlr"])
    assert_close(twice["loss_ld_cls"], once["loss_ld_cls"])


def test_errors():
    with pytest.raises(ValueError, match="must agree"):
        kl_divergence(torch.rand(2, 17), torch.rand(2, 16), 1.0)
    with pytest.raises(ValueError, match="fcos does not have"):
        LD("fcos", 256, 256, (8,))
    with pytest.raises(ValueError, match="cls_temperature=0"):
        LD("gfl", 256, 256, (8,), cls_temperature=0)
    with pytest.raises(KeyError, match="boxes"):  # of an image of which none are known
        LD("gfl", 256, 256, ()).maps(Output(anchors=[], positive=None), Output(), [{}])
