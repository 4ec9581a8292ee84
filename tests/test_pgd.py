"""PGD against its equations, its authors' numbers and arithmetic done by hand."""

import math

import pytest
import torch
from torch.testing import assert_close
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

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


@pytest.mark.parametrize("case", ["level2", "no_fg"])
def test_matches_reference(reference, case):
    """Losses and gradients of the public code.

    Its classification loss sums mask[i] * difference[j] over all pairs of images. With N = 2 that is our loss plus our
    loss with the masks of the two images swapped, in which the attention terms (delta) are left out.
    """
    case = {name: torch.tensor(value, dtype=torch.float64) for name, value in reference["pgd"]["losses"][case].items()}
    student, teacher = case["student"].requires_grad_(), case["teacher"]
    alpha, beta, delta, T = 0.04 * case["level_weight"], 0.02 * case["level_weight"], 0.0008, 0.8
    key, background = alpha * case["cls_region"], beta * case["background"]
    loss = pgd_cls_loss(student, teacher, key, background, delta, T)
    loss = loss + pgd_cls_loss(student, teacher, key.flip(0), background.flip(0), 0.0, T)
    assert_close(loss, case["cls"], **TOLERANCE)
    assert_close(torch.autograd.grad(loss, student)[0], case["cls_grad"], **TOLERANCE)

    loss = pgd_reg_loss(student, teacher, case["reg_region"], 0.064, delta, T)
    assert_close(loss, case["reg"], **TOLERANCE)
    assert_close(torch.autograd.grad(loss, student)[0], case["reg_grad"], **TOLERANCE)


@pytest.mark.parametrize("tower, xi", [("cls", 0.8), ("reg", 0.6)])
@pytest.mark.parametrize("case, outside", [("img0", 1), ("img1", 0)])
def test_regions_match_reference(reference, case, outside, tower, xi):
    """Key regions of the public code without its jitter.

    It takes the K best of a quality without the in-box test of (1) and tests the chosen positions afterwards. Quality 1
    for its candidates and 0 elsewhere lets `key_region` fit the same Gaussian; `outside` of them lie outside of their
    box. Where none does, our own choice must give the same.
    """
    case = {name: torch.tensor(value) for name, value in reference["pgd"]["regions"][case].items()}
    positions, boxes, logits, top_k = (case[name].double() for name in ("positions", "boxes", "cls_logits", "top_k"))
    target = {"boxes": case["gt_boxes"].double(), "labels": case["gt_labels"]}
    inside = inside_boxes(positions, target["boxes"])
    quality = box_quality(logits.T[None], boxes.T[None], positions, target, xi)
    iou = torch.tensor([[slow_iou(b, box) for b in boxes.tolist()] for box in target["boxes"].tolist()])
    untested = logits[:, target["labels"]].sigmoid().T ** (1 - xi) * iou.double() ** xi
    assert_close(quality, untested * inside, rtol=1e-6, atol=1e-7)
    candidates = torch.zeros_like(untested).scatter(1, untested.topk(int(top_k), dim=1).indices, 1.0)
    regions = torch.stack([key_region(row[None], positions, int(top_k), variance=0.0) for row in candidates])
    expected = case[f"{tower}_region"].double()
    assert_close((regions * inside).amax(dim=0), expected, **TOLERANCE)
    assert_close((~inside.any(dim=0)).double(), case["background"].double())
    assert (candidates.bool() & ~inside).sum() == outside
    if outside == 0:
        assert_close(key_region(quality, positions, int(top_k), variance=0.0), expected, **TOLERANCE)


def test_row_matches_reference(reference):
    """Candidates in a row: with the jitter of the public code its Gaussian falls off, and ours does the same."""
    case = {name: torch.tensor(value).double() for name, value in reference["pgd"]["regions"]["row"].items()}
    region = key_region(case["quality"], case["positions"], int(case["top_k"]))
    assert_close(region, case["region_noise"], rtol=0, atol=0.001)


def test_zero_at_teacher(fake_output, targets):
    """A perfect student costs nothing."""
    teacher = fake_output(2)
    assert all(loss == 0 for loss in PGD("fcos", 4, 4, STRIDES)(teacher, teacher, targets).values())


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
    have mean 1/2. Weights are alpha = 3 on a region of 1/2, beta = 1.5 on the background, gamma = 3.
    """
    teacher = torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    student = torch.tensor([1.0, 0.0], dtype=torch.float64).view(1, 2, 1, 1)
    half, one = torch.full((1, 1, 1), 0.5, dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64)
    attention = 0.1 * 2 * math.tanh(0.5)
    assert_close(pgd_cls_loss(student, teacher, 3 * half, 0 * one, 0.1, 1.0).item(), 3 / 2 + attention)
    assert_close(pgd_cls_loss(student, teacher, 0 * half, 1.5 * one, 0.1, 1.0).item(), 3 / 2 + attention)
    assert_close(pgd_reg_loss(student, teacher, half, 3.0, 0.1, 1.0).item(), 3 / 2 / 2 + attention)


@pytest.mark.parametrize("input_size", [(32, 48), (40, 52)])
def test_positions(fake_output, input_size):
    """Boxes of two pixels around torchvision's own anchor centres: each holds its position and no other of its level.

    Where the strides 8 and 16 do not divide the input, torchvision's anchors lie closer than the strides.
    """
    sizes = [tuple(-(-side // stride) for side in input_size) for stride in (8, 16)]
    teacher, method = fake_output(2, N=1, A=1, sizes=sizes), PGD("retinanet", 4, 4, (8, 16))
    images = ImageList(torch.zeros(1, 3, *input_size), [input_size])
    anchors = AnchorGenerator(((8,), (16,)), ((1.0,),) * 2)(images, [torch.zeros(1, 1, *size) for size in sizes])[0]
    levels = anchors.double().split([H * W for H, W in sizes])
    teacher.anchors = [level.T.view(1, 4, *size) for level, size in zip(levels, sizes)]
    for level, (_, W) in enumerate(sizes):
        for place, (x1, y1, x2, y2) in enumerate(levels[level].tolist()):
            x, y = (x1 + x2) / 2, (y1 + y2) / 2
            target = {"boxes": torch.tensor([[x - 1, y - 1, x + 1, y + 1]]).double(), "labels": torch.tensor([1])}
            background = method.regions(teacher, [target])[level][2, 0]
            assert (background == 0).nonzero().tolist() == [[place // W, place % W]]


def test_gradients(fake_output, targets):
    """By finite differences for both losses; regions are constants."""
    student, teacher = fake_output(1), fake_output(2)
    cls_region, reg_region, background = PGD("fcos", 4, 4, STRIDES).regions(teacher, targets)[0]
    features, t = student.fpn[0].requires_grad_(), teacher.fpn[0]
    assert torch.autograd.gradcheck(lambda f: pgd_cls_loss(f, t, cls_region, background, 0.0008, 0.8), features)
    assert torch.autograd.gradcheck(lambda f: pgd_reg_loss(f, t, reg_region, 0.064, 0.0008, 0.8), features)
    maps = [t[0].flatten(2).requires_grad_() for t in (teacher.cls_logits[0], teacher.boxes[0])]
    assert not box_quality(*maps, torch.zeros(24, 2), targets[0], 0.8).requires_grad


def test_no_key_positions(fake_output, targets):
    """Without boxes, background and attention remain; the regression loss is a zero that can be differentiated."""
    method, empty = PGD("fcos", 4, 4, STRIDES), targets[1]
    student, teacher = fake_output(1), fake_output(2)
    for level in student.reg_tower:
        level[0].requires_grad_()
    losses = method(student, teacher, [empty, empty])
    assert losses["loss_pgd_cls"] > 0
    assert losses["loss_pgd_reg"] == 0 and losses["loss_pgd_reg"].requires_grad
    for n, order in ((0, targets[::-1]), (1, targets)):
        for region in method.regions(teacher, order):
            assert not region[:2, n].any() and region[2, n].all()


def test_diagonal():
    """Thirty positions on a diagonal, in float32: the same as in float64."""
    diagonal = torch.arange(30, dtype=torch.float64)[:, None].expand(30, 2) * 32
    exact = key_region(torch.ones(1, 30, dtype=torch.float64), diagonal, 30)
    assert_close(key_region(torch.ones(1, 30), diagonal.float(), 30).double(), exact, rtol=1e-5, atol=1e-7)


def test_normaliser(fake_output, targets):
    """Repeating the batch changes nothing. Image by image, classification splits into a mean, regression does not."""
    student, teacher = fake_output(1), fake_output(2)
    region, _, background = PGD("fcos", 4, 4, STRIDES).regions(teacher, targets)[0]
    s, t = student.fpn[0], teacher.fpn[0]

    def cls_loss(i) -> torch.Tensor:
        return pgd_cls_loss(s[i], t[i], 0.04 * region[i], 0.02 * background[i], 0.0008, 0.8)

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
    """lambda_l acts on the squared differences of the classification tower only, and attentions have mean 1."""
    student, teacher = fake_output(1), fake_output(2)
    once, twice = (PGD("fcos", 4, 4, STRIDES, level_weights=w)(student, teacher, targets) for w in ((1,) * 3, (2,) * 3))
    no_attention = PGD("fcos", 4, 4, STRIDES, level_weights=(1,) * 3, delta=0.0)(student, teacher, targets)
    assert_close(twice["loss_pgd_cls"] - once["loss_pgd_cls"], no_attention["loss_pgd_cls"])
    assert_close(twice["loss_pgd_reg"], once["loss_pgd_reg"])
    assert all(attention.mean().sub(1).abs() < 1e-12 for attention in attentions(teacher.fpn[0], 0.8))


def test_maps(fake_output, targets):
    """The key regions with which the losses are computed."""
    student, teacher = fake_output(1), fake_output(2)
    method = PGD("fcos", 4, 4, STRIDES, top_k=3)
    maps = method.maps(student, teacher, targets)
    cls_loss = reg_loss = 0
    for level, weight in enumerate((1, 1.25, 1.5)):
        background = method.regions(teacher, targets)[level][2]
        tower_s, tower_t = student.cls_tower[level][0], teacher.cls_tower[level][0]
        key = 0.04 * weight * maps["classification region"][level]
        cls_loss += pgd_cls_loss(tower_s, tower_t, key, 0.02 * weight * background, 0.0008, 0.8)
        tower_s, tower_t = student.reg_tower[level][0], teacher.reg_tower[level][0]
        reg_loss += pgd_reg_loss(tower_s, tower_t, maps["regression region"][level], 0.064, 0.0008, 0.8)
    assert_close(method(student, teacher, targets), {"loss_pgd_cls": cls_loss, "loss_pgd_reg": reg_loss})


def test_errors(fake_output, targets):
    with pytest.raises(ValueError, match="faster_rcnn"):
        PGD("faster_rcnn", 4, 4, STRIDES)
    output = fake_output(1)
    f, region = output.fpn[0], torch.ones(2, 4, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"must agree: .*\(2, 4, 2, 3\)"):
        pgd_cls_loss(f, output.fpn[1], region, region, 0.0008, 0.8)
    with pytest.raises(ValueError, match=r"must agree: .*\(4, 6\)"):
        pgd_cls_loss(f, f, region, region[0], 0.0008, 0.8)
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
