"""CrossKD against its authors' numbers, its equations and arithmetic done by hand."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import generalized_box_iou_loss

from kd.detectors import build_detector
from kd.features import _finish, forward_detector
from kd.methods.crosskd import CrossKD, align, crosskd_cls_loss, edge_divergence, iou_loss

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "crosskd.pt"


@pytest.fixture(scope="module")
def golden() -> dict:
    """Numbers of jbwang1997/CrossKD at 87e156a, computed in float64."""
    if not GOLDEN.exists():
        pytest.skip(f"{GOLDEN} does not exist")
    return torch.load(GOLDEN, weights_only=True)["cases"]


def per_anchor(maps: torch.Tensor, values: int) -> torch.Tensor:
    """The reference's maps [N, A * values, H, W] as [N, A, values, H, W]."""
    return maps.unflatten(1, (-1, values))


def test_losses_match_reference(golden):
    """Values and gradients of the three sums, which the reference also weights by position and divides.

    It adds the epsilon of float32 to the divisors.
    """
    for beta in (1, 2):
        case = golden[f"kd_qfl_beta{beta}"]
        s, t = (case["inputs"][name] for name in ("student", "teacher"))
        s.requires_grad_()
        rows = torch.stack([crosskd_cls_loss(a, b, float(beta)) for a, b in zip(s, t)])
        loss = (case["inputs"]["weight"] * rows).sum() / case["inputs"]["avg_factor"]
        assert_close(loss, case["outputs"]["loss"], rtol=1e-7, atol=0)
        assert_close(torch.autograd.grad(loss, s)[0], case["grads"]["student"], rtol=1e-7, atol=1e-12)

    case = golden["kl_sum_T1"]  # of single distributions: the mean over edges is ours
    s, t = (case["inputs"][name] for name in ("student", "teacher"))
    s.requires_grad_()
    kl = edge_divergence(s[:, None], t[:, None])
    loss = case["inputs"]["loss_weight"] * (case["inputs"]["weight"] * kl).sum() / case["inputs"]["avg_factor"]
    assert_close(loss, case["outputs"]["loss"], rtol=1e-7, atol=0)
    assert_close(torch.autograd.grad(loss, s)[0], case["grads"]["student"], rtol=1e-7, atol=1e-12)

    case = golden["align_scale"]
    s, t = case["inputs"]["student"], case["inputs"]["teacher"]
    assert_close(align(s, t), case["outputs"]["aligned"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["retina", "gfl"])
def test_head_reuse_matches_reference(golden, name):
    """The student's features through the rest of the teacher's head; the towers are the reference's."""

    def scaled(layer, factor, features, level):
        return factor * layer(features)

    case = golden[f"{name}_reuse_head"]
    inputs, params = case["inputs"], case["params"]
    for branch, last, index, scale in (("cls", f"{name}_cls", 0, 1.0), ("reg", f"{name}_reg", 1, inputs["scale"])):
        tower = nn.Sequential()
        for block in range(4):
            convolution = nn.Conv2d(8, 8, 3, padding=1).double()
            state = {kind: params[f"{branch}_convs.{block}.conv.{kind}"] for kind in ("weight", "bias")}
            convolution.load_state_dict(state)
            tower.extend([convolution, nn.ReLU()])
        output = nn.Conv2d(8, len(params[f"{last}.bias"]), 3, padding=1).double()
        output.load_state_dict({kind: params[f"{last}.{kind}"] for kind in ("weight", "bias")})
        block = inputs["reused_teacher_head_idx"] - 1
        holds = inputs[f"student_{branch}_hold"], inputs[f"teacher_{branch}_hold"]
        for s, t, reused in zip(*holds, case["outputs"]["reused"]):
            found = _finish(tower, partial(scaled, output, scale), align(s, t), block, 0)
            assert_close(found, reused[index], rtol=1e-9, atol=1e-12)


def test_mimic_matches_reference(golden):
    """Whole losses of a level. label_weights, which leave anchors out, are the reference's."""
    case = golden["gfl_mimic_level0"]
    inputs, outputs = case["inputs"], case["outputs"]
    valid = inputs["label_weights"].view(2, 1, 16, 16)
    logits, cross = (per_anchor(inputs[f"{kind}_cls"], 3) for kind in ("teacher", "reused"))
    edges = [per_anchor(inputs[f"{kind}_reg"], 17)[:, None].permute(0, 1, 4, 5, 2, 3) for kind in ("reused", "teacher")]
    kept = [x.movedim(2, -1)[valid > 0] for x in (cross, logits)]
    assert_close(crosskd_cls_loss(*kept, 1.0) / inputs["avg_factor"], outputs["loss_cls_kd"], rtol=1e-7, atol=0)
    weight = valid * logits.sigmoid().amax(dim=2)
    assert_close(4 * (weight * edge_divergence(*edges)).sum(), outputs["loss_reg_kd"], rtol=1e-7, atol=0)
    assert_close(weight.sum(), outputs["reg_weight_sum"], rtol=1e-7, atol=0)

    case = golden["retina_mimic_level0"]
    inputs = case["inputs"]
    anchors, valid = inputs["anchors"].flatten(0, 1), inputs["label_weights"].flatten()
    shapes = {"teacher_cls": 3, "reused_cls": 3, "teacher_reg": 4, "reused_reg": 4}
    rows = {n: per_anchor(inputs[n], v).permute(0, 3, 4, 1, 2).reshape(-1, v) for n, v in shapes.items()}
    boxes = [
        BoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single(rows[name], anchors) for name in ("reused_reg", "teacher_reg")
    ]
    kept = [rows[name][valid > 0] for name in ("reused_cls", "teacher_cls")]
    assert_close(crosskd_cls_loss(*kept, 1.0) / inputs["avg_factor"], case["outputs"]["loss_cls_kd"], rtol=1e-7, atol=0)
    weight = valid * rows["teacher_cls"].sigmoid().amax(dim=1)
    reg = (weight * generalized_box_iou_loss(*boxes)).sum() / inputs["avg_factor"]
    assert_close(reg, case["outputs"]["loss_reg_kd"], rtol=1e-6, atol=0)

    case = golden["fcos_mimic_flat"]
    inputs = case["inputs"]
    points = inputs["points"]
    sides = inputs["reused_ltrb"], inputs["teacher_ltrb"]
    boxes = [torch.cat([points - ltrb[:, :2], points + ltrb[:, 2:]], dim=1) for ltrb in sides]
    cls = 0.4 * crosskd_cls_loss(inputs["reused_cls"], inputs["teacher_cls"], 1.0) / inputs["avg_factor"]
    weight = inputs["teacher_cls"].sigmoid().amax(dim=1)
    assert_close(cls, case["outputs"]["loss_cls_kd"], rtol=1e-7, atol=0)
    reg = 0.75 * (weight * iou_loss(*boxes)).sum() / inputs["avg_factor"]
    assert_close(reg, case["outputs"]["loss_reg_kd"], rtol=1e-7, atol=0)


@pytest.mark.parametrize("detector", ["fcos", "retinanet", "gfl"])
def test_matches_equation(fake_output, detector):
    """Slow loops over every index, from what the teacher's head made of the aligned features."""
    student, teacher = fake_output(1, A=1), fake_output(2, A=1)
    method = CrossKD(detector, 4, 4, (8, 16, 32), block=1)
    for level in student.positive:
        level[1] = False  # counts as one
    if detector == "gfl":
        teacher.finish_reg = teacher.finish_edges
    cls = reg = total = 0.0
    for level, logits in enumerate(teacher.cls_logits):
        h_cls = align(student.cls_before_relu[level][1], teacher.cls_before_relu[level][1])
        h_reg = align(student.reg_before_relu[level][1], teacher.reg_before_relu[level][1])
        cross, regression = teacher.finish_cls(h_cls, 1, level), teacher.finish_reg(h_reg, 1, level)
        boxes = teacher.decode(regression, level) if detector != "gfl" else None
        N, _, K, H, W = logits.shape
        for n, y, x in ((n, y, x) for n in range(N) for y in range(H) for x in range(W)):
            scores = []
            for k in range(K):
                p, q = (1 / (1 + math.exp(-z[n, 0, k, y, x].item())) for z in (cross, logits))
                cls += abs(p - q) * -(q * math.log(p) + (1 - q) * math.log(1 - p))
                scores.append(q)
            total += max(scores)
            if detector == "gfl":
                distance = 0.0
                for e in range(4):
                    pair = regression, teacher.edge_logits[level]
                    z_x, z_t = ([math.exp(z[n, 0, e, i, y, x].item()) for i in range(5)] for z in pair)
                    for a, b in zip(z_x, z_t):
                        distance += b / sum(z_t) * (math.log(b / sum(z_t)) - math.log(a / sum(z_x))) / 4
            else:
                a, b = (z[n, 0, :, y, x].tolist() for z in (boxes, teacher.boxes[level]))
                wide, high = (max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]), 0.0) for i in (0, 1))
                union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - wide * high
                around = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
                iou = wide * high / union
                distance = -math.log(max(iou, 1e-6)) if detector == "fcos" else 1 - iou + (around - union) / around
            reg += max(scores) * distance
    losses = method(student, teacher, [])
    P = sum(max(1, sum(level[n].sum().item() for level in student.positive)) for n in range(2))
    cls_weight, reg_weight = {"retinanet": (1, 1), "fcos": (0.4, 0.75), "gfl": (1, 4)}[detector]
    assert_close(losses["loss_crosskd_cls"].item(), cls_weight * cls / P, rtol=1e-6, atol=0)
    W = total if detector == "gfl" else P
    assert_close(losses["loss_crosskd_reg"].item(), reg_weight * reg / W, rtol=1e-6, atol=0)


def test_hand_computed():
    """Values 0 and 2 have mean 1 and standard deviation sqrt 2; 5 and 11 have 8 and 3 sqrt 2: then 5 and 11.

    Boxes that share 1 of 7 have -log IoU = ln 7, disjoint ones ln 1e6. A teacher of 3/4, 1/4 and equal bins of the
    student: KL(p_t || p_x) = 3/4 ln 3 - ln 2 on one edge, 0 on three.
    """
    student = torch.tensor([0.0, 2.0], dtype=torch.float64).view(1, 1, 1, 2)
    teacher = torch.tensor([5.0, 11.0], dtype=torch.float64).view(1, 1, 1, 2)
    assert_close(align(student, teacher).flatten().tolist(), [5.0, 11.0], rtol=1e-5, atol=0)
    boxes = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3], [4, 4, 5, 5]], dtype=torch.float64)
    assert_close(iou_loss(boxes[[0, 0]], boxes[1:]).tolist(), [math.log(7), 6 * math.log(10)])
    edges = torch.zeros(1, 4, 2, dtype=torch.float64)
    edges[0, 2, 0] = math.log(3)
    assert_close(edge_divergence(torch.zeros_like(edges), edges).item(), (0.75 * math.log(3) - math.log(2)) / 4)


@pytest.mark.parametrize("detector", ["fcos", "retinanet", "gfl"])
def test_own_features(detector):
    """Through a real head: a teacher that is its own student has cross predictions equal to its own, and no loss.

    Other features give other predictions, and only the student's first blocks receive gradients.
    """
    teacher = build_detector(detector, "test_resnet", 4, image_size=(64, 64)).eval()
    teacher.requires_grad_(False)
    target = {"boxes": torch.tensor([[8.0, 8, 40, 50]]), "labels": torch.tensor([1])}
    images, targets = teacher.transform([torch.rand(3, 64, 64)], [target])
    method = CrossKD(detector, 256, 256, (8, 16, 32, 64, 128))
    output, _ = forward_detector(teacher, images, targets, method.needs)
    for level, logits in enumerate(output.cls_logits):
        h = output.cls_before_relu[level][method.block], output.reg_before_relu[level][method.block]
        regression = output.edge_logits if detector == "gfl" else output.bbox_regression
        assert_close(output.finish_cls(h[0], method.block, level), logits)
        assert_close(output.finish_reg(h[1], method.block, level), regression[level])
    student = build_detector(detector, "test_resnet", 4, image_size=(64, 64))
    student_output, _ = forward_detector(student, images, targets, method.needs)
    sum(method(student_output, output, targets).values()).backward()
    received = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    towers = {name.split("head.conv.")[1].split(".")[0] for name in received if "head.conv." in name}
    layers = {"fcos": "0 1 3 4", "retinanet": "0 1 2", "gfl": "0 1 3 4 6 7"}  # convolutions and norms of these blocks
    assert towers == set(layers[detector].split())
    assert not any("cls_logits" in name or "bbox_reg" in name for name in received)


def test_edge_cases(fake_output):
    """A level of one position in one image, and a constant channel, become the teacher's mean without gradient."""
    s, t = torch.randn(1, 4, 1, 1, requires_grad=True), torch.randn(1, 4, 1, 1)
    assert_close(align(s, t), t)
    constant = torch.full((2, 1, 3, 3), 0.7, requires_grad=True)
    teacher = torch.randn(2, 1, 3, 3)
    aligned = align(constant, teacher)
    assert_close(aligned, teacher.mean().expand(2, 1, 3, 3))
    aligned.sum().backward()
    assert constant.grad.abs().max() == 0


def test_errors(fake_output):
    student, teacher = fake_output(1), fake_output(2)
    with pytest.raises(ValueError, match="block=2, counted from 0, but the towers have 2 blocks"):
        CrossKD("fcos", 4, 4, (8, 16, 32), block=2)(student, teacher, [])
    teacher.decode = lambda regression, level: regression[:, 0]
    with pytest.raises(ValueError, match=r"predicts \(2, 2, 4, 4, 6\), its finish_reg \(2, 4, 4, 6\)"):
        CrossKD("fcos", 4, 4, (8, 16, 32))(student, teacher, [])
    with pytest.raises(ValueError, match="must agree"):
        align(torch.rand(1, 4, 2, 2), torch.rand(1, 4, 2, 3))
    with pytest.raises(ValueError, match="must agree"):
        crosskd_cls_loss(torch.rand(1, 4, 2, 2), torch.rand(1, 4, 2, 3), 1.0)
    with pytest.raises(ValueError, match="faster_rcnn does not have"):
        CrossKD("faster_rcnn", 256, 256, (8,))
