"""PGD against its equations, its authors' numbers and arithmetic done by hand."""

import math

import pytest
import torch
from torch.testing import assert_close
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from kd.methods.pgd import PGD, attentions, box_quality, inside_boxes, key_region, pgd_cls_loss, pgd_reg_loss

STRIDES = (8, 16, 32)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-12}


def slow_iou(a: list[float], b: list[float]) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(w, 0) * max(h, 0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def slow_region(teacher, n: int, target: dict, xi: float, top_k: int) -> dict[tuple[int, int, int], float]:
    """Weight of every (level, row, column) of image n that has one."""
    weights = {}
    for box, label in zip(target["boxes"].tolist(), target["labels"].tolist()):
        graded = []
        for level, stride in enumerate(STRIDES):
            _, A, _, H, W = teacher.cls_logits[level].shape
            for row in range(H):
                for column in range(W):
                    x, y = column * stride, row * stride
                    if not (box[0] < x < box[2] and box[1] < y < box[3]):
                        continue
                    quality = max(
                        (1 / (1 + math.exp(-teacher.cls_logits[level][n, a, label, row, column].item()))) ** (1 - xi)
                        * slow_iou(teacher.boxes[level][n, a, :, row, column].tolist(), box) ** xi
                        for a in range(A)
                    )
                    if quality > 0:
                        graded.append((quality, x, y, (level, row, column)))
        best = sorted(graded, reverse=True)[:top_k]
        if not best:
            continue
        mean_x, mean_y = (sum(g[i] for g in best) / len(best) for i in (1, 2))
        xx = sum((g[1] - mean_x) ** 2 for g in best) / len(best) + 0.1**2 / 12
        yy = sum((g[2] - mean_y) ** 2 for g in best) / len(best) + 0.1**2 / 12
        xy = sum((g[1] - mean_x) * (g[2] - mean_y) for g in best) / len(best)
        for _, x, y, place in best:
            u, v = x - mean_x, y - mean_y
            square = (yy * u * u - 2 * xy * u * v + xx * v * v) / (xx * yy - xy * xy)
            weights[place] = max(weights.get(place, 0.0), math.exp(-square / 2))
    return weights


def slow_attentions(features: torch.Tensor, T: float) -> tuple[dict, dict]:
    """Of one image's features [C, H, W]: spatial by (row, column) and channel by (row, column, c)."""
    C, H, W = features.shape
    places = [(row, column) for row in range(H) for column in range(W)]
    vector = {p: [abs(features[c, p[0], p[1]].item()) for c in range(C)] for p in places}
    whole = sum(math.exp(sum(vector[p]) / C / T) for p in places)
    spatial = {p: H * W * math.exp(sum(vector[p]) / C / T) / whole for p in places}
    channel = {
        (*p, c): C * math.exp(vector[p][c] / T) / sum(math.exp(v / T) for v in vector[p])
        for p in places
        for c in range(C)
    }
    return spatial, channel


def slow_pgd(student, teacher, targets, top_k: int) -> tuple[float, float]:
    alpha, gamma, delta, T = 0.04, 0.064, 0.0008, 0.8
    N, cls_loss, reg_loss = len(targets), 0.0, 0.0
    for level, (stride, level_weight) in enumerate(zip(STRIDES, (1, 1.25, 1.5))):
        key_count, reg_sum = 0, 0.0
        for n, target in enumerate(targets):
            cls_region = slow_region(teacher, n, target, 0.8, top_k)
            reg_region = slow_region(teacher, n, target, 0.6, top_k)
            s, t = student.cls_tower[level][0][n], teacher.cls_tower[level][0][n]
            (spatial_s, channel_s), (spatial_t, channel_t) = slow_attentions(s, T), slow_attentions(t, T)
            background = [
                (row, column)
                for row, column in spatial_t
                if not any(
                    b[0] < column * stride < b[2] and b[1] < row * stride < b[3] for b in target["boxes"].tolist()
                )
            ]
            keys = sum(place[0] == level for place in cls_region)
            for row, column in spatial_t:
                difference = spatial_t[row, column] * sum(
                    channel_t[row, column, c] * (s[c, row, column] - t[c, row, column]).item() ** 2
                    for c in range(len(s))
                )
                if (level, row, column) in cls_region:
                    cls_loss += level_weight * alpha * cls_region[level, row, column] / keys * difference / N
                if (row, column) in background:
                    cls_loss += level_weight * 0.5 * alpha / len(background) * difference / N
            cls_loss += delta * sum(abs(channel_s[i] - channel_t[i]) for i in channel_t) / (N * len(spatial_t))
            cls_loss += delta * sum(abs(spatial_s[i] - spatial_t[i]) for i in spatial_t) / N

            s, t = student.reg_tower[level][0][n], teacher.reg_tower[level][0][n]
            channel_s, channel_t = slow_attentions(s, T)[1], slow_attentions(t, T)[1]
            for (_, row, column), weight in ((k, v) for k, v in reg_region.items() if k[0] == level):
                key_count += 1
                for c in range(len(s)):
                    i, d = (row, column, c), (s[c, row, column] - t[c, row, column]).item()
                    reg_sum += gamma * weight * channel_t[i] * d**2 / len(s) + delta * abs(channel_s[i] - channel_t[i])
        reg_loss += reg_sum / key_count if key_count else 0.0
    return cls_loss, reg_loss


@pytest.mark.parametrize("top_k", [3, 30])
def test_matches_equation(fake_output, targets, top_k):
    """Slow loops over every index, written from the equations; 30 is more than any box has positions inside."""
    student, teacher = fake_output(1), fake_output(2)
    targets[1] = {"boxes": torch.tensor([[3.0, 3.0, 45.0, 30.0]], dtype=torch.float64), "labels": torch.tensor([0])}
    losses = PGD("fcos", 4, 4, STRIDES, top_k=top_k)(student, teacher, targets)
    cls_loss, reg_loss = slow_pgd(student, teacher, targets, top_k)
    assert_close(losses["loss_pgd_cls"].item(), cls_loss)
    assert_close(losses["loss_pgd_reg"].item(), reg_loss)
    assert reg_loss > 0


# Outputs of https://github.com/ChenhongyiYang/PGD at 81c54d5 on the inputs of the reference file: (cls, reg).
REFERENCE = {
    "level0": (1.0, 2.201876805852257, 0.14138293113705616),
    "level1": (1.25, 2.9614528413566656, 0.096638571870252),
    "level2": (1.5, 1.7966511528615836, 0.11456636100340153),
    "no_fg": (1.0, 1.0624443859209394, 0.0),
}


@pytest.mark.parametrize("case", REFERENCE)
def test_matches_reference(golden, case):
    """Losses and gradients.

    The public classification loss sums mask[i] * difference[j] over all pairs of images. With N = 2 that is our loss
    plus our loss with the masks of the two images swapped, which leaves the attention terms (delta) as they are.
    """
    level_weight, cls_value, reg_value = REFERENCE[case]
    cases = golden("pgd")
    reference = cases[f"cls_loss_{case}"]
    inputs = reference["inputs"]
    student = inputs["student"].clone().requires_grad_()
    region, background = inputs["mask_fg"][:, 0], inputs["mask_bg"][:, 0]
    alpha, delta, T = 0.04 * level_weight, 0.0008, 0.8
    loss = pgd_cls_loss(student, inputs["teacher"], region, background, alpha, delta, T)
    crossed = pgd_cls_loss(student, inputs["teacher"], region.flip(0), background.flip(0), alpha, 0.0, T)
    assert_close((loss + crossed).item(), cls_value, **TOLERANCE)
    (gradient,) = torch.autograd.grad(loss + crossed, student)
    assert_close(gradient, reference["grads"]["student"], **TOLERANCE)

    reference = cases[f"reg_loss_{case}"]
    inputs = reference["inputs"]
    student = inputs["student"].clone().requires_grad_()
    loss = pgd_reg_loss(student, inputs["teacher"], inputs["mask_fg"][:, 0], 0.064, delta, T)
    assert_close(loss.item(), reg_value, **TOLERANCE)
    (gradient,) = torch.autograd.grad(loss, student)
    assert_close(gradient, reference["grads"]["student"], **TOLERANCE)


def forced_region(logits, boxes, positions, target, xi, top_k):
    """Our Gaussian without jitter on the public code's candidates, and how many of these lie outside of their box.

    The public code takes the top K of a quality without Eq. 1's in-box test and tests the chosen positions afterwards.
    Quality 1 on its candidates and 0 elsewhere makes `key_region` fit the same Gaussian; the test then goes outside.
    """
    inside = inside_boxes(positions, target["boxes"])
    quality = logits[:, target["labels"]].sigmoid().T ** (1 - xi) * box_iou(target["boxes"], boxes) ** xi
    assert_close(box_quality(logits.T[None], boxes.T[None], positions, target, xi), quality * inside)
    candidates = torch.zeros_like(quality).scatter(1, quality.topk(top_k, dim=1).indices, 1.0)
    regions = [key_region(candidates[m : m + 1], positions, top_k, variance=0.0) for m in range(len(inside))]
    return (torch.stack(regions) * inside).amax(dim=0), (candidates.bool() & ~inside).sum().item()


@pytest.mark.parametrize("case", ["cls_img0", "cls_img1", "reg_img0", "reg_img1"])
def test_matches_reference_anchor_based(golden, case):
    """Key regions without the public code's jitter. On image 1 all candidates lie inside, so nothing needs forcing.

    weight_noise has one draw of the jitter; our variance stands for it on average, and agrees to a percent.
    """
    reference = golden("pgd")[f"pgw_anchor_{case}"]
    inputs, outputs = reference["inputs"], reference["outputs"]
    positions = (inputs["anchors"][:, :2] + inputs["anchors"][:, 2:]) / 2
    target = {"boxes": inputs["gt_boxes"], "labels": inputs["gt_labels"]}
    logits, boxes, xi, top_k = (inputs[k] for k in ("cls_logits", "decoded_boxes", "alpha", "topk"))
    region, outside = forced_region(logits, boxes, positions, target, xi, top_k)
    assert_close(region, outputs["weight_zero_noise"], **TOLERANCE)
    assert_close((~inside_boxes(positions, target["boxes"]).any(dim=0)).double(), outputs["background"])
    assert outside == (0 if case.endswith("1") else 1)
    if outside == 0:
        quality = box_quality(logits.T[None], boxes.T[None], positions, target, xi)
        assert_close(key_region(quality, positions, top_k, variance=0.0), outputs["weight_zero_noise"], **TOLERANCE)
        assert_close(key_region(quality, positions, top_k), outputs["weight_noise"], rtol=0, atol=0.01)


def test_matches_reference_row(golden):
    """Candidates in a row: without jitter the public Gaussian is flat, with it it falls off, and ours does the same."""
    reference = golden("pgd")["pgw_anchor_degenerate_row"]
    inputs, outputs = reference["inputs"], reference["outputs"]
    positions = (inputs["anchors"][:, :2] + inputs["anchors"][:, 2:]) / 2
    target = {"boxes": inputs["gt_boxes"], "labels": inputs["gt_labels"]}
    quality = box_quality(inputs["cls_logits"].T[None], inputs["decoded_boxes"].T[None], positions, target, 0.8)
    assert_close(key_region(quality, positions, inputs["topk"]), outputs["weight_noise"], rtol=0, atol=0.001)
    assert (outputs["weight_zero_noise"][inputs["row"]] == 1).all()


@pytest.mark.parametrize("n", [0, 1])
def test_matches_reference_anchor_free(golden, n):
    """Maps of the public FCOS code after its x/y swap was repaired, without jitter; official_* have the swap.

    Its points carry half a stride of offset, so positions are given here. Many candidates lie outside: forced as above.
    """
    reference = golden("pgd")["pgw_fcos_maps"]
    inputs, outputs = reference["inputs"], reference["outputs"]["fixed_xy_zero_noise"]
    positions = torch.cat(inputs["points_xy"])
    logits = torch.cat([level[n].flatten(1).T for level in inputs["teacher_cls_logits"]])
    sides = torch.cat([level[n].flatten(1).T for level in inputs["teacher_ltrb_pixels"]])
    boxes = torch.cat([positions - sides[:, :2], positions + sides[:, 2:]], dim=1)
    target = {"boxes": inputs["gt_boxes"][n], "labels": inputs["gt_labels"][n]}
    for tower, xi in (("cls", inputs["alpha_cls"]), ("reg", inputs["alpha_reg"])):
        region, _ = forced_region(logits, boxes, positions, target, xi, inputs["topk"])
        expected = torch.cat([level[n].flatten() for level in outputs[f"{tower}_value_maps"]])
        assert_close(region, expected, **TOLERANCE)
    assert_close((~inside_boxes(positions, target["boxes"]).any(dim=0)).double(), outputs["back_flat"][n])


def test_zero_at_teacher(fake_output, targets):
    """A perfect student costs nothing; the order of an image's boxes does not matter."""
    student, teacher = fake_output(1), fake_output(2)
    method = PGD("fcos", 4, 4, STRIDES)
    assert all(loss == 0 for loss in method(teacher, teacher, targets).values())
    turned = [{name: values.flip(0) for name, values in target.items()} for target in targets]
    assert_close(method(student, teacher, turned), method(student, teacher, targets))


def test_hand_computed():
    """Regions: positions every 8 pixels, quality given.

    Three positions in a row, x = 8, 16, 24: mean 16, variance 128/3, so the squared distances are 0 in the middle and
    64 / (128/3) = 3/2 at the ends: weights 1 and exp(-3/4), up to the jitter's variance v beside 128/3.
    Three positions that are not in a row are each at squared distance 2, wherever they lie: the three sum to
    K * dimensions = 6 for any fitted Gaussian, and an affine map makes them an equilateral triangle. Weights exp(-1).
    """
    positions = torch.cartesian_prod(torch.arange(3), torch.arange(5)).flip(1).double() * 8  # 3 rows of 5
    end, v = math.exp(-3 / 4), 0.1**2 / 12

    def quality(*places: int) -> torch.Tensor:
        return torch.zeros(1, 15, dtype=torch.float64).scatter(1, torch.tensor([places]), 0.5)

    def expected(weights: dict[int, float]) -> torch.Tensor:
        return torch.tensor([weights.get(place, 0.0) for place in range(15)], dtype=torch.float64)

    row = key_region(quality(1, 2, 3), positions, 30)  # K larger than the three positions, and than all fifteen
    assert_close(row, expected({1: math.exp(-32 / (128 / 3 + v)), 2: 1.0, 3: math.exp(-32 / (128 / 3 + v))}))
    corner = key_region(quality(1, 2, 11), positions, 3, variance=0.0)
    assert_close(corner, expected(dict.fromkeys((1, 2, 11), math.exp(-1))))
    assert_close(key_region(quality(7), positions, 3), expected({7: 1.0}))  # alone: its own mean
    first = torch.linspace(1, 0.1, 15, dtype=torch.float64)[None]
    assert_close(key_region(first, positions, 3, variance=1e-9), expected({0: end, 1: 1.0, 2: end}))  # the best three

    # Rows of places 0 1 2 and 1 2 3: each middle is 1, and wins over the other box's end.
    both = key_region(torch.cat([quality(0, 1, 2), quality(1, 2, 3)]), positions, 3, variance=1e-9)
    assert_close(both, expected({0: end, 1: 1.0, 2: 1.0, 3: end}))

    # p = 3/4 and IoU 1/2 grade 0.75^0.2 * 0.5^0.8 inside the box; (16, 8) and (24, 8) are inside, x = 8 on its border.
    logits, boxes = torch.full((1, 2, 15), math.log(3)).double(), torch.tensor([8.0, 4.0, 18.0, 12.0]).double()
    target = {"boxes": torch.tensor([[8.0, 4.0, 28.0, 12.0]]).double(), "labels": torch.tensor([1])}
    graded = box_quality(logits, boxes[None, :, None].expand(1, 4, 15), positions, target, 0.8)
    assert_close(graded[0], expected(dict.fromkeys((7, 8), 0.75**0.2 * 0.5**0.8)))

    # A box between the positions has none inside, no weight, and no NaN; it takes nothing from another box.
    target = {
        "boxes": torch.tensor([[9.0, 1.0, 15.0, 7.0], [8.0, 4.0, 28.0, 12.0]]).double(),
        "labels": torch.ones(2).long(),
    }
    graded = box_quality(logits, boxes[None, :, None].expand(1, 4, 15), positions, target, 0.8)
    assert_close(key_region(graded, positions, 3), key_region(graded[1:], positions, 3))
    assert not key_region(graded[:1], positions, 3).any()


def test_hand_computed_quality(fake_output):
    """Two positions inside the box, the best one kept: (8, 8) has p = 0.2, IoU = 0.8, and (16, 8) p = 0.8, IoU = 0.4.

    Their qualities' ratio is 4^(1 - xi) / 2^xi: 1.32 / 1.74 for the classification tower, xi = 0.8, which takes the
    better box at (8, 8), but 1.74 / 1.52 for the regression tower, xi = 0.6, which takes the better score at (16, 8).
    """
    teacher = fake_output(2, N=1, A=1, K=2, sizes=((2, 4),))
    target = {"boxes": torch.tensor([[4.0, 4.0, 24.0, 14.0]]).double(), "labels": torch.tensor([1])}
    teacher.cls_logits[0][0, 0, 0] = 10.0  # the other class is certain everywhere, and not asked
    teacher.cls_logits[0][0, 0, 1, 1, 1:3] = torch.tensor([0.2, 0.8]).double().logit()
    teacher.boxes[0][0, 0, :, 1, 1:3] = torch.tensor([[4.0, 4.0, 20.0, 14.0], [4.0, 4.0, 12.0, 14.0]]).double().T
    cls_region, reg_region, background = PGD("retinanet", 4, 4, (8,), top_k=1).regions(teacher, [target])[0][:, 0]
    assert cls_region.tolist() == [[0, 0, 0, 0], [0, 1, 0, 0]]
    assert reg_region.tolist() == [[0, 0, 0, 0], [0, 0, 1, 0]]
    assert background.tolist() == [[1, 1, 1, 1], [1, 0, 0, 1]]


def test_hand_computed_losses():
    """One position and two channels: teacher 0, so its attentions are 1; student (1, 0), temperature 1.

    The student's channel attention is 2 sigma(1) and 2 - 2 sigma(1), both tanh(1/2) away from 1. Squares sum to 1 and
    have mean 1/2. Region 1/2: alone, it counts as 1/2 in both losses. Background: counts as 1, times half of alpha.
    """
    teacher = torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    student = torch.tensor([1.0, 0.0], dtype=torch.float64).view(1, 2, 1, 1)
    half, one = torch.full((1, 1, 1), 0.5, dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64)
    attention = 0.1 * 2 * math.tanh(0.5)
    assert_close(pgd_cls_loss(student, teacher, half, 0 * one, 3.0, 0.1, 1.0).item(), 3 / 2 + attention)
    assert_close(pgd_cls_loss(student, teacher, 0 * half, one, 3.0, 0.1, 1.0).item(), 3 / 2 + attention)
    assert_close(pgd_reg_loss(student, teacher, half, 3.0, 0.1, 1.0).item(), 3 / 2 / 2 + attention)


def test_positions(fake_output):
    """Boxes of two pixels around torchvision's own anchor centres: each holds its position and no other there."""
    sizes, strides = ((4, 6), (2, 3)), (8, 16)
    teacher, method = fake_output(2, N=1, sizes=sizes), PGD("retinanet", 4, 4, strides)
    images = ImageList(torch.zeros(1, 3, 32, 48), [(32, 48)])
    anchors = AnchorGenerator(((8,), (16,)), ((1.0,),) * 2)(images, [torch.zeros(1, 1, *size) for size in sizes])[0]
    centres = ((anchors[:, :2] + anchors[:, 2:]) / 2).double().split([24, 6])
    for level, (_, W) in enumerate(sizes):
        for place, centre in enumerate(centres[level]):
            target = {"boxes": torch.cat([centre - 1, centre + 1])[None], "labels": torch.tensor([1])}
            background = method.regions(teacher, [target])[level][2, 0]
            assert (background == 0).nonzero().tolist() == [[place // W, place % W]]


def test_gradients(fake_output, targets):
    student, teacher = fake_output(1), fake_output(2)
    region, _, background = PGD("fcos", 4, 4, STRIDES).regions(teacher, targets)[0]
    features = student.fpn[0].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda f: pgd_cls_loss(f, teacher.fpn[0], region, background, 0.04, 0.0008, 0.8), features
    )
    assert torch.autograd.gradcheck(lambda f: pgd_reg_loss(f, teacher.fpn[0], region, 0.064, 0.0008, 0.8), features)

    method, teacher = PGD("retinanet", 4, 6, STRIDES).double(), fake_output(2, C=6)
    assert len(list(method.parameters())) == 4 and not list(PGD("retinanet", 4, 4, STRIDES).parameters())
    towers = [block.requires_grad_() for tower in (teacher.cls_tower, teacher.reg_tower) for block in sum(tower, [])]
    constants = [t.requires_grad_() for t in (*teacher.cls_logits, *teacher.boxes)] + towers
    sum(method(student, teacher, targets).values()).backward()
    assert all(t.grad is None for t in constants)
    maps = [t[0].flatten(2) for t in (teacher.cls_logits[0], teacher.boxes[0])]
    assert not box_quality(*maps, torch.zeros(24, 2), targets[0], 0.8).requires_grad
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in method.parameters())


def test_edge_cases(fake_output, targets):
    # No boxes at all: background and attention remain; the regression loss is a zero that can be differentiated.
    method, teacher, empty = PGD("fcos", 4, 6, STRIDES).double(), fake_output(2, C=6), targets[1]
    for N in (1, 2):
        losses = method(fake_output(1, N=N), fake_output(2, N=N, C=6), [empty] * N)
        sum(losses.values()).backward()
        assert torch.isfinite(losses["loss_pgd_cls"]) and losses["loss_pgd_cls"] > 0
        assert losses["loss_pgd_reg"] == 0 and losses["loss_pgd_reg"].requires_grad
    assert all(p.grad.isfinite().all() for p in method.parameters())

    # An image without boxes first or last; its regions are empty, its background is everything.
    for n, order in ((0, targets[::-1]), (1, targets)):
        for region in method.regions(teacher, order):
            assert not region[:2, n].any() and region[2, n].all()
        assert all(torch.isfinite(loss) and loss > 0 for loss in method(fake_output(1), teacher, order).values())

    # Half precision, by hand and by autocast, is lifted; float64 stays.
    student, teacher = fake_output(1), fake_output(2)
    exact = PGD("fcos", 4, 4, STRIDES)(student, teacher, targets)
    for output in (student, teacher):
        output.cls_tower, output.reg_tower = (
            [[block.bfloat16() for block in level] for level in tower] for tower in (output.cls_tower, output.reg_tower)
        )
    teacher.cls_logits = [level.bfloat16() for level in teacher.cls_logits]
    teacher.boxes = [level.float() for level in teacher.boxes]
    targets[0]["boxes"] = targets[0]["boxes"].float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lifted = PGD("fcos", 4, 4, STRIDES)(student, teacher, targets)
        adapted = PGD("fcos", 4, 6, STRIDES)(student, fake_output(2, C=6), targets)
    assert all(loss.dtype == torch.float64 for loss in exact.values())
    assert all(loss.dtype == torch.float32 for loss in lifted.values())
    assert all(loss.isfinite() for loss in adapted.values())
    assert_close(lifted, {name: loss.float() for name, loss in exact.items()}, rtol=0.05, atol=0)

    f, region = student.fpn[0].bfloat16(), torch.ones(2, 4, 6, dtype=torch.bfloat16)
    assert pgd_cls_loss(f, f, region, region, 0.04, 0.0008, 0.8).dtype == torch.float32
    assert pgd_reg_loss(f, f, region, 0.064, 0.0008, 0.8).dtype == torch.float32
    maps = [t[0].flatten(2).bfloat16() for t in (teacher.cls_logits[0], teacher.boxes[0])]
    assert box_quality(*maps, torch.zeros(24, 2), targets[0], 0.8).dtype == torch.float32

    # Thirty positions on a diagonal: float32 keeps what float64 says.
    diagonal = torch.arange(30, dtype=torch.float64)[:, None].expand(30, 2) * 32
    exact = key_region(torch.ones(1, 30, dtype=torch.float64), diagonal, 30)
    assert_close(key_region(torch.ones(1, 30), diagonal.float(), 30).double(), exact, rtol=1e-4, atol=1e-6)


def test_reads_no_value_back(fake_output, targets):
    """Meta tensors have shapes and no values: whatever would make the host wait for a GPU's values fails on them."""
    student, teacher = fake_output(1), fake_output(2)
    for output in (student, teacher):
        for name in ("cls_tower", "reg_tower"):
            setattr(output, name, [[block.to("meta") for block in level] for level in getattr(output, name)])
        output.cls_logits, output.boxes = (
            [level.to("meta") for level in maps] for maps in (output.cls_logits, output.boxes)
        )
    targets = [{name: values.to("meta") for name, values in target.items()} for target in targets]
    losses = PGD("fcos", 4, 4, STRIDES)(student, teacher, targets)
    assert all(loss.shape == () for loss in losses.values())


def test_normaliser(fake_output, targets):
    """Repeating the batch changes nothing. Image by image, classification splits into a mean, regression does not."""
    student, teacher = fake_output(1), fake_output(2)
    region, _, background = PGD("fcos", 4, 4, STRIDES).regions(teacher, targets)[0]
    s, t = student.fpn[0], teacher.fpn[0]

    def cls_loss(i) -> torch.Tensor:
        return pgd_cls_loss(s[i], t[i], region[i], background[i], 0.04, 0.0008, 0.8)

    def reg_loss(i) -> torch.Tensor:
        return pgd_reg_loss(s[i], t[i], region[i], 0.064, 0.0008, 0.8)

    batch, twice = [0, 1], [0, 1, 0, 1]
    assert_close(cls_loss(twice), cls_loss(batch))
    assert_close(reg_loss(twice), reg_loss(batch))
    assert_close((cls_loss([0]) + cls_loss([1])) / 2, cls_loss(batch))
    # All key positions are in the first image; as a mean over images, they would count half.
    assert_close(reg_loss([0]), reg_loss(batch))
    assert reg_loss([1]) == 0


def test_level_weights(fake_output, targets):
    """lambda_l acts on the squared difference of the classification tower only, and the attentions have mean 1."""
    student, teacher = fake_output(1), fake_output(2)
    once, twice = (PGD("fcos", 4, 4, STRIDES, level_weights=w)(student, teacher, targets) for w in ((1,) * 3, (2,) * 3))
    no_attention = PGD("fcos", 4, 4, STRIDES, level_weights=(1,) * 3, delta=0.0)(student, teacher, targets)
    assert_close(twice["loss_pgd_cls"] - once["loss_pgd_cls"], no_attention["loss_pgd_cls"])
    assert_close(twice["loss_pgd_reg"], once["loss_pgd_reg"])
    assert all(attention.mean().sub(1).abs() < 1e-12 for attention in attentions(teacher.fpn[0], 0.8))


def test_maps(fake_output, targets):
    """The losses are those that the teacher's regions and the background give; the student's are by its own scores."""
    student, teacher = fake_output(1), fake_output(2)
    method = PGD("fcos", 4, 4, STRIDES, top_k=3)
    maps = method.maps(student, teacher, targets)
    cls_loss = reg_loss = 0
    for level, level_weight in enumerate((1, 1.25, 1.5)):
        tower_s, tower_t = student.cls_tower[level][0], teacher.cls_tower[level][0]
        key, background = maps["classification region teacher"][level], maps["background"][level]
        cls_loss += pgd_cls_loss(tower_s, tower_t, key, background, 0.04 * level_weight, 0.0008, 0.8)
        tower_s, tower_t = student.reg_tower[level][0], teacher.reg_tower[level][0]
        reg_loss += pgd_reg_loss(tower_s, tower_t, maps["regression region teacher"][level], 0.064, 0.0008, 0.8)
    assert_close(method(student, teacher, targets), {"loss_pgd_cls": cls_loss, "loss_pgd_reg": reg_loss})
    for level, (cls_region, reg_region, background) in enumerate(method.regions(student, targets)):
        assert_close(maps["classification region student"][level], cls_region)
        assert_close(maps["regression region student"][level], reg_region)
        assert_close(maps["background"][level], background)


def test_boxes_as_mask(fake_output, targets):
    """Each position counts 1 in both regions or in the background, whatever the teacher predicts."""
    method = PGD("fcos", 4, 4, STRIDES, mask="boxes")
    levels = method.regions(fake_output(2), targets)
    assert levels[0][:, 0].tolist() == [
        # boxes (4, 4, 30, 26) and (10, 2, 44, 18), positions at multiples of 8
        *[[[0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]]] * 2,
        [[1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 1, 1]],
    ]
    for key, other, background in levels:
        assert key.equal(other) and key.equal(1 - background) and not key[1].any()
    losses = method(fake_output(1), fake_output(2), targets)
    assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values())


def test_errors(fake_output, targets):
    with pytest.raises(ValueError, match='"predictions" or "boxes"'):
        PGD("fcos", 4, 4, STRIDES, mask="box")
    with pytest.raises(ValueError, match="faster_rcnn"):
        PGD("faster_rcnn", 4, 4, STRIDES)
    output = fake_output(1)
    f, region = output.fpn[0], torch.ones(2, 4, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"must agree: .*\(2, 4, 2, 3\)"):
        pgd_cls_loss(f, output.fpn[1], region, region, 0.04, 0.0008, 0.8)
    with pytest.raises(ValueError, match=r"must agree: .*\(4, 6\)"):
        pgd_cls_loss(f, f, region, region[0], 0.04, 0.0008, 0.8)
    with pytest.raises(ValueError, match=r"must agree: .*\(2, 1, 4, 6\)"):
        pgd_reg_loss(f, f, region[:, None], 0.064, 0.0008, 0.8)
    logits, boxes, positions = torch.zeros(2, 3, 5), torch.zeros(2, 4, 5), torch.zeros(5, 2)
    with pytest.raises(ValueError, match=r"\(2, 5, 4\)"):
        box_quality(logits, boxes.transpose(1, 2), positions, targets[0], 0.8)
    with pytest.raises(ValueError, match=r"\(4, 2\)"):
        box_quality(logits, boxes, positions[:4], targets[0], 0.8)
    with pytest.raises(ValueError, match=r"\(1,\)"):
        box_quality(logits, boxes, positions, {**targets[0], "labels": torch.tensor([1])}, 0.8)
    with pytest.raises(ValueError, match=r"\(5,\)"):
        key_region(torch.zeros(5), positions, 3)
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        key_region(torch.zeros(2, 4), positions, 3)
