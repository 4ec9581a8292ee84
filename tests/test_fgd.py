"""FGD against its equations, its authors' numbers and arithmetic done by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from kd.methods.fgd import FGD, ContextBlock, attentions, focal_losses, split_positions

STRIDES = (8, 16, 32)


def boxes_of(*boxes: list[float]) -> torch.Tensor:
    return torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)


def slow_attentions(x: torch.Tensor, T: float) -> tuple[list[float], list[float]]:
    """Of one image's features [C, P]: spatial by position and channel by channel."""
    C, P = x.shape
    values = [[abs(v) for v in channel] for channel in x.tolist()]
    spatial = [math.exp(sum(channel[p] for channel in values) / C / T) for p in range(P)]
    channel = [math.exp(sum(channel) / P / T) for channel in values]
    return [P * v / sum(spatial) for v in spatial], [C * v / sum(channel) for v in channel]


def slow_context(block: ContextBlock, x: torch.Tensor) -> list[list[float]]:
    """Of one image's features [C, P], with the norm written out."""
    hidden, norm, _, last = block.transform
    (C, P), w = x.shape, block.score.weight.flatten().tolist()
    scores = [math.exp(sum(w[c] * x[c, p].item() for c in range(C))) for p in range(P)]
    context = [sum(scores[p] * x[c, p].item() for p in range(P)) / sum(scores) for c in range(C)]
    z = [b + sum(a * v for a, v in zip(row, context)) for row, b in zip(hidden.weight.tolist(), hidden.bias.tolist())]
    mean = sum(z) / len(z)
    std = math.sqrt(sum((v - mean) ** 2 for v in z) / len(z) + 1e-5)
    z = [max((v - mean) / std * g + b, 0.0) for v, g, b in zip(z, norm.weight.tolist(), norm.bias.tolist())]
    added = [b + sum(a * v for a, v in zip(row, z)) for row, b in zip(last.weight.tolist(), last.bias.tolist())]
    return [[x[c, p].item() + added[c] for p in range(P)] for c in range(C)]


def slow_fgd(method: FGD, student, teacher, targets) -> dict[str, float]:
    """The three losses with RetinaNet's weights."""
    T, alpha, beta, gamma, delta = 0.5, 1e-3, 5e-4, 1e-3, 5e-6
    losses = dict.fromkeys(("loss_fgd_focal", "loss_fgd_attention", "loss_fgd_global"), 0.0)
    for level, stride in enumerate(STRIDES):
        N, C, H, W = student.fpn[level].shape
        places = [(row, column) for row in range(H) for column in range(W)]
        for n, target in enumerate(targets):
            s, t = student.fpn[level][n].flatten(1), teacher.fpn[level][n].flatten(1)
            foreground = []
            for row, column in places:
                best = 0.0
                for box in target["boxes"].tolist():
                    left, top = (math.floor(v / stride) for v in box[:2])
                    right, bottom = (math.ceil(v / stride) for v in box[2:])
                    if left <= column <= right and top <= row <= bottom:
                        best = max(best, 1 / ((bottom - top + 1) * (right - left + 1)))
                foreground.append(best)
            (spatial_s, channel_s), (spatial_t, channel_t) = slow_attentions(s, T), slow_attentions(t, T)
            out_s, out_t = (
                slow_context(method.context_student[level], s),
                slow_context(method.context_teacher[level], t),
            )
            for p in range(len(places)):
                weight = alpha * foreground[p] if foreground[p] else beta / foreground.count(0.0)
                for c in range(C):
                    square = (s[c, p] - t[c, p]).item() ** 2
                    losses["loss_fgd_focal"] += weight * spatial_t[p] * channel_t[c] * square / N
                    losses["loss_fgd_global"] += delta * (out_s[c][p] - out_t[c][p]) ** 2 / N
            pairs = [*zip(spatial_s, spatial_t), *zip(channel_s, channel_t)]
            losses["loss_fgd_attention"] += gamma * sum(abs(a - b) for a, b in pairs) / N
    return losses


def randomise(module: nn.Module, randn) -> None:
    """Give parameters random values; by the reference code, those of the norm are near 1."""
    for name, parameter in module.named_parameters():
        parameter.data = 0.2 * randn(*parameter.shape) + (1 if name == "transform.1.weight" else 0)


def test_matches_equation(fake_output, targets):
    """Slow loops over every index; one image has no boxes."""
    student, teacher = fake_output(1), fake_output(2)
    method = FGD("retinanet", 4, 4, STRIDES).double()
    for block in (*method.context_student, *method.context_teacher):
        randomise(block, lambda *shape: torch.randn(*shape, dtype=torch.float64))
    losses = {name: loss.item() for name, loss in method(student, teacher, targets).items()}
    assert_close(losses, slow_fgd(method, student, teacher, targets))


def reference_parameters(method: FGD, level: int) -> dict[str, nn.Parameter | None]:
    """Our parameters by the names and in the order of the public code; a bias that we leave out is None."""
    sides = {"s": method.context_student[level], "t": method.context_teacher[level]}
    named = {f"align.{name}": parameter for name, parameter in method.adapters[level].named_parameters()}
    for side, block in sides.items():
        named |= {f"conv_mask_{side}.weight": block.score.weight, f"conv_mask_{side}.bias": None}
    for side, block in sides.items():
        named |= {f"channel_add_conv_{side}.{name}": p for name, p in block.transform.named_parameters()}
    return named


def test_matches_reference(reference):
    """Losses and gradients of the public code, whose parameters and inputs are random numbers of seed 0 in this order.

    Image 1 is 120x100 in a map of 128 pixels, and the public code stretches its boxes over the map; so does this test.
    Gradients of features are compared by their norms on each level, and one by one on the coarsest level; those of
    parameters by their norms.
    """
    generator, tolerance = torch.Generator().manual_seed(0), {"rtol": 1e-9, "atol": 1e-12}

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    first = boxes_of([8, 8, 72, 56], [40, 60, 120, 124], [90, 10, 110, 40])
    stretch = torch.tensor([128 / 100, 128 / 120] * 2, dtype=torch.float64)
    second = stretch * boxes_of([4, 50, 60, 110], [70, 20, 100, 100])
    for name, case in reference["fgd"]["cases"].items():
        strides = (16,) if name == "first_without_boxes" else STRIDES
        C = 6 if name == "channels_6" else 8
        method, student, losses = FGD("retinanet", C, 8, strides).double(), [], []
        for level, stride in enumerate(strides):
            for key, parameter in reference_parameters(method, level).items():
                values = 0.2 * randn(*(parameter.shape if parameter is not None else (1,)))
                if parameter is not None:
                    parameter.data = values + (1 if ".1.weight" in key else 0)
            s, t = randn(2, C, 128 // stride, 128 // stride).requires_grad_(), randn(2, 8, 128 // stride, 128 // stride)
            student.append(s)
            boxes = [boxes_of() if name == "first_without_boxes" else first, second]
            foreground, background = torch.stack([split_positions(b, stride, s.shape[2:]) for b in boxes], dim=1)
            adapted = method.adapters[level](s)
            focal, attention = focal_losses(adapted, t, 1e-3 * foreground + 5e-4 * background, 0.5)
            relation = (method.context_student[level](adapted) - method.context_teacher[level](t)).square().sum() / 2
            if "mask_loss" in case:
                assert_close(attention.item(), case["mask_loss"][level], **tolerance)
                assert_close(relation.item(), case["rela_loss"][level], **tolerance)
            losses.append(focal + 1e-3 * attention + 5e-6 * relation)
        assert_close([loss.item() for loss in losses], case["losses"], **tolerance)
        sum(losses).backward()
        assert_close([s.grad.norm().item() for s in student], case["grad_norms"], **tolerance)
        if "grad_last" in case:
            assert_close(student[-1].grad[1].tolist(), case["grad_last"], **tolerance)
            for level, norms in enumerate(case["grad_parameter_norms"]):
                ours = {k: p.grad for k, p in reference_parameters(method, level).items() if p is not None}
                assert_close({k: g.norm().item() for k, g in ours.items()}, {k: norms[k] for k in ours}, **tolerance)


def test_hand_computed():
    """Stride 8, 3 rows of 5 positions. The box (9, 8) to (24, 15) spans columns 1 to 3, rows 1 to 2: h = 1, w = 2.

    Its weight is 1 / (2 * 3), and 9 positions are background. A box (16, 8) to (16, 8) covers one position with weight
    1 and wins there. A box that leaves the map counts all its positions, so its weight is 1 / (3 * 3) with
    columns 4 to 6 and rows 2 to 4.
    """
    foreground, background = split_positions(boxes_of([9, 8, 24, 15]), 8, (3, 5))
    sixth, ninth = 1 / 6, 1 / 9
    inside = [0.0, sixth, sixth, sixth, 0.0]
    assert_close(foreground.tolist(), [[0.0] * 5, inside, inside])
    edge = [ninth, 0.0, 0.0, 0.0, ninth]
    assert_close(background.tolist(), [[ninth] * 5, edge, edge])

    boxes = boxes_of([9, 8, 24, 15], [16, 8, 16, 8], [34, 17, 48, 30])
    foreground, background = split_positions(boxes, 8, (3, 5))
    assert_close(foreground.tolist(), [[0.0] * 5, [0.0, sixth, 1.0, sixth, 0.0], [0.0, sixth, sixth, sixth, ninth]])
    assert_close(background.sum().item(), 1.0)


def test_hand_computed_losses():
    """Two positions, two channels, T = 1. The teacher's features are 2 ln 3 at (channel 0, position 0), else 0.

    Means over channels are ln 3 and 0, so spatial is 2 * (3/4, 1/4). Means over positions are the same, and channel is
    3/2, 1/2. A student of zeros has attentions of 1, each 1/2 away: 4 of them, in sum 2. A student that differs from
    the teacher by 1 in channel 1 at both positions: weights (2, 4) give (2 * 3/2 + 4 * 1/2) * 1/2 = 5/2.
    """
    teacher = torch.zeros(1, 2, 1, 2, dtype=torch.float64)
    teacher[0, 0, 0, 0] = 2 * math.log(3)
    weights = torch.tensor([2.0, 4.0], dtype=torch.float64).view(1, 1, 2)
    spatial, channel = attentions(teacher, 1.0)
    assert_close(spatial.flatten().tolist(), [1.5, 0.5])
    assert_close(channel.flatten().tolist(), [1.5, 0.5])
    _, attention = focal_losses(torch.zeros_like(teacher), teacher, weights, 1.0)
    assert_close(attention.item(), 2.0)
    student = teacher.clone()
    student[0, 1] += 1
    focal, _ = focal_losses(student, teacher, weights, 1.0)
    assert_close(focal.item(), 2.5)


def test_padding(fake_output):
    """A box lies where its pixels are, whatever the padding: the same box in a wider input covers the same columns."""
    box = boxes_of([10, 5, 22, 14])
    small, large = split_positions(box, 8, (4, 6))[0], split_positions(box, 8, (4, 9))[0]
    assert torch.equal(large[:, :6], small) and not large[:, 6:].any()


def test_box_sizes():
    """A small and a large object have the same weight in total."""
    for box in ([0, 0, 8, 8], [0, 0, 120, 88]):
        assert_close(split_positions(boxes_of(box), 8, (16, 16))[0].sum().item(), 1.0)


def test_context_block():
    """At first it returns its input, so (7) is the squared difference; the scores start with variance 2 / C."""
    x = torch.randn(2, 64, 4, 5)
    block = ContextBlock(64)
    assert torch.equal(block(x), x)
    scores = torch.stack([ContextBlock(64).score.weight for _ in range(50)])
    assert abs(scores.var() * 64 / 2 - 1) < 0.1  # 3200 draws: five standard deviations are 0.125
    student, teacher = torch.randn(2, 64, 4, 5), torch.randn(2, 64, 4, 5)
    method = FGD("fcos", 64, 64, (8,), global_weight=0.5)
    outputs = SimpleNamespace(fpn=[student]), SimpleNamespace(fpn=[teacher])
    loss = method(*outputs, [{"boxes": torch.zeros(0, 4)}] * 2)["loss_fgd_global"]
    assert_close(loss, 0.5 * (student - teacher).square().sum() / 2)


def test_zero_at_teacher(fake_output, targets):
    """While the context blocks are as initialised."""
    teacher = fake_output(2)
    assert all(loss == 0 for loss in FGD("fcos", 4, 4, STRIDES).double()(teacher, teacher, targets).values())


def test_half_precision():
    """Features of float16 do not make the weights of many positions vanish."""
    features = [torch.rand(1, 4, 100, 168) for _ in range(2)]
    method = FGD("retinanet", 4, 4, (8,))
    exact, half = (
        method(*(SimpleNamespace(fpn=[f.half().to(dtype)]) for f in features), [{"boxes": torch.zeros(0, 4)}])
        for dtype in (torch.float32, torch.float16)
    )
    assert exact["loss_fgd_focal"] > 0
    assert_close(half, exact, rtol=1e-4, atol=0)


def test_images_without_boxes(fake_output, targets):
    """All is background, with equal weights, and the focal loss is background's alone; no position is covered twice."""
    student, teacher, empty = fake_output(1), fake_output(2), targets[1]
    foreground, background = split_positions(empty["boxes"], 8, (4, 6))
    assert not foreground.any() and torch.equal(background, torch.full_like(background, 1 / 24))
    losses = [
        FGD("fcos", 4, 4, STRIDES, foreground_weight=weight).double()(student, teacher, [empty, empty])
        for weight in (0.0, 1.0)
    ]
    assert_close(losses[0]["loss_fgd_focal"], losses[1]["loss_fgd_focal"])
    everywhere = boxes_of([0, 0, 48, 32])
    assert not split_positions(everywhere, 8, (4, 6))[1].any()  # no background, and no division by 0


def test_gradients(fake_output, targets):
    """By finite differences for features; none to the teacher; both context blocks are trained."""
    student, teacher = fake_output(1), fake_output(2)
    method = FGD("fcos", 4, 4, STRIDES).double()
    s, t = student.fpn[0].requires_grad_(), teacher.fpn[0].requires_grad_()
    weights = torch.rand(2, 4, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: sum(focal_losses(s, t, weights, 0.8)), s)
    sum(focal_losses(s, t, weights, 0.8)).backward()
    method(student, teacher, targets)["loss_fgd_global"].backward()
    assert t.grad is None
    for block in (*method.context_student, *method.context_teacher):
        assert block.transform[-1].weight.grad.any()  # the others wait for it to leave 0


def test_normaliser(fake_output, targets):
    """Means over images: repeating the batch changes nothing, and two images give the mean of each alone."""
    method, student, teacher = FGD("fcos", 4, 4, STRIDES).double(), fake_output(1), fake_output(2)

    def losses(images: list[int]) -> dict[str, torch.Tensor]:
        outputs = [SimpleNamespace(fpn=[level[images] for level in o.fpn]) for o in (student, teacher)]
        return method(*outputs, [targets[n] for n in images])

    once, first, second = losses([0, 1]), losses([0]), losses([1])
    assert_close(losses([0, 1, 0, 1]), once)
    assert_close({name: (first[name] + second[name]) / 2 for name in once}, once)


@pytest.mark.parametrize(
    "detector, defaults, levels",
    [
        ("retinanet", (0.5, 1e-3, 5e-4, 1e-3, 5e-6), 5),
        ("fcos", (0.8, 1.6e-3, 8e-4, 8e-4, 8e-6), 5),
        ("gfl", (0.5, 1e-3, 5e-4, 5e-4, 5e-6), 5),
        ("faster_rcnn", (0.5, 5e-5, 2.5e-5, 5e-5, 5e-7), 4),
    ],
)
def test_weights_and_levels(fake_output, targets, detector, defaults, levels):
    """Each weight of the reference code multiplies its own term; Faster R-CNN compares four levels."""
    sizes = ((4, 6), (2, 3), (2, 2), (1, 2), (1, 1))
    outputs = fake_output(1, sizes=sizes), fake_output(2, sizes=sizes)
    T, foreground, background, attention, context = defaults
    strides = (8, 16, 32, 64, 128)
    losses = FGD(detector, 4, 4, strides).double()(*outputs, targets)
    ones = dict.fromkeys(("foreground_weight", "background_weight", "attention_weight", "global_weight"), 1.0)
    unit = FGD(detector, 4, 4, strides, **ones).double()(*outputs, targets)
    only = FGD(detector, 4, 4, strides, **ones | {"background_weight": 0.0}).double()(*outputs, targets)
    assert_close(losses["loss_fgd_attention"], attention * unit["loss_fgd_attention"])
    assert_close(losses["loss_fgd_global"], context * unit["loss_fgd_global"])
    rest = unit["loss_fgd_focal"] - only["loss_fgd_focal"]
    assert_close(losses["loss_fgd_focal"], foreground * only["loss_fgd_focal"] + background * rest)
    pairs = list(zip(outputs[0].fpn, outputs[1].fpn))[:levels]
    attentions_alone = sum(focal_losses(s, t, torch.zeros_like(s[:, 0]), T)[1] for s, t in pairs)
    assert_close(unit["loss_fgd_attention"], attentions_alone)


def test_maps(fake_output, targets):
    """What the focal loss is computed from."""
    student, teacher = fake_output(1), fake_output(2, C=6)
    method = FGD("fcos", 4, 6, STRIDES).double()
    maps = method.maps(student, teacher, targets)
    focal = 0
    for level, adapter in enumerate(method.adapters):
        s, t = adapter(student.fpn[level]), teacher.fpn[level]
        weights = 1.6e-3 * maps["foreground"][level] + 8e-4 * maps["background"][level]
        difference = (attentions(t, 0.8)[1][..., None, None] * (s - t).square()).sum(dim=1)
        focal += (weights * maps["attention teacher"][level] * difference).sum() / 2
        assert_close(maps["attention student"][level], attentions(s, 0.8)[0])
    assert_close(method(student, teacher, targets)["loss_fgd_focal"], focal)


def test_errors(fake_output):
    s, other = fake_output(1).fpn[:2]
    weights = torch.ones(2, 4, 6)
    with pytest.raises(ValueError, match=r"must agree: .*\(2, 4, 2, 3\)"):
        focal_losses(s, other, weights, 0.5)
    with pytest.raises(ValueError, match=r"must agree: .*\(2, 1, 4, 6\)"):
        focal_losses(s, s, weights[:, None], 0.5)
