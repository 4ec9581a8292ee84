"""TID against its equations in slow loops, on inputs like each detector's, and arithmetic done by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from kd.methods.tid import TID, position_score, split_areas, tid_losses

# detector, anchors, classes, t_pos, t_neg
DETECTORS = [("retinanet", 9, 4, 0.5, 0.4), ("fcos", 1, 4, 0.5, 0.4), ("faster_rcnn", 3, 1, 0.7, 0.3)]


@pytest.fixture
def predictions(fake_output, targets):
    """A function that makes a fake output whose boxes on the first image are its ground truth, up to 60 pixels off."""

    def make(seed: int, A: int, K: int):
        output = fake_output(seed, A=A, K=K)
        generator = torch.Generator().manual_seed(seed)
        for boxes in output.boxes:
            H, W = boxes.shape[3:]
            truth = targets[0]["boxes"][torch.randint(2, (A, H, W), generator=generator)].movedim(3, 1)
            pixels = torch.tensor([1.0, 4, 15, 60])[torch.randint(4, (1, 1, H, W), generator=generator)]
            boxes[0] = truth + pixels * torch.rand(A, 1, H, W, generator=generator)  # moved down and to the right
        return output

    return make


def overlap(p: list[float], q: list[float]) -> float:
    width = max(0.0, min(p[2], q[2]) - max(p[0], q[0]))
    height = max(0.0, min(p[3], q[3]) - max(p[1], q[1]))
    both = width * height
    return both / ((p[2] - p[0]) * (p[3] - p[1]) + (q[2] - q[0]) * (q[3] - q[1]) - both)


def slow_score(logits: list[list[float]], boxes: list[list[float]], target: dict, t_pos: float, t_neg: float) -> float:
    """One position's grade, its anchors' class logits and boxes given."""
    best = 0.0
    for anchor_logits, box in zip(logits, boxes):
        ious = [overlap(box, truth) for truth in target["boxes"].tolist()]
        if not ious:
            return 0.0
        iou = max(ious)
        label = target["labels"][ious.index(iou)].item()
        if len(anchor_logits) == 1:
            right = 1 / (1 + math.exp(-anchor_logits[0])) >= 0.5
        else:
            right = anchor_logits.index(max(anchor_logits)) == label
        score_c = 2 if right and iou > 0 else 0.4
        score_r = 2 if iou >= t_pos else 1.5 if iou > t_neg else 0.4
        best = max(best, score_c * score_r)
    return best


@pytest.mark.parametrize("detector, A, K, t_pos, t_neg", DETECTORS)
def test_matches_equation(predictions, targets, detector, A, K, t_pos, t_neg):
    """Slow loops over every index; labels are 1 and 2 of four classes, and not read where there is one."""
    student, teacher = predictions(1, A, K), predictions(2, A, K)
    for level in range(3):  # in every second column, both predict the same
        for ours, theirs in zip((student.cls_logits, student.boxes), (teacher.cls_logits, teacher.boxes)):
            ours[level][..., ::2] = theirs[level][..., ::2]
    expected = {"key": 0.0, "weak": 0.0, "rest": 0.0}
    sizes = {"key": 0, "weak": 0, "rest": 0}
    for level in range(3):
        N, C, H, W = student.fpn[level].shape
        found = {"key": [], "weak": [], "rest": []}
        for n in range(N):
            for y in range(H):
                for x in range(W):
                    score_s, score_t = (
                        slow_score(
                            output.cls_logits[level][n, :, :, y, x].tolist(),
                            output.boxes[level][n, :, :, y, x].tolist(),
                            targets[n],
                            t_pos,
                            t_neg,
                        )
                        for output in (student, teacher)
                    )
                    area = "rest" if score_t < 2.9 else "weak" if score_t > score_s else "key"
                    s, t = student.fpn[level][n, :, y, x].tolist(), teacher.fpn[level][n, :, y, x].tolist()
                    found[area].append(sum((a - b) ** 2 for a, b in zip(s, t)) / C)
        for area, differences in found.items():
            expected[area] += sum(differences) / max(1, len(differences))
            sizes[area] += len(differences)
    assert min(sizes.values()) > 0

    method = TID(detector, 4, 4, (8, 16, 32), key_weight=3.0, weak_weight=0.7, rest_weight=0.1).double()
    identity_adapters(method)
    assert (method.t_pos, method.t_neg) == (t_pos, t_neg)
    losses = method(student, teacher, targets)
    for area, weight in (("key", 3.0), ("weak", 0.7), ("rest", 0.1)):
        assert_close(losses[f"loss_tid_{area}"].item(), weight * expected[area])


def identity_adapters(method: TID) -> None:
    for adapter in method.adapters:
        torch.nn.init.dirac_(adapter.weight)
        torch.nn.init.zeros_(adapter.bias)


@pytest.mark.parametrize("detector, A, K, t_pos, t_neg", DETECTORS)
def test_zero_at_teacher(predictions, targets, detector, A, K, t_pos, t_neg):
    """Equal features cost nothing; equal predictions leave nothing weak; the good ones are the teacher's alone."""
    teacher, other = predictions(2, A, K), predictions(1, A, K)
    method = TID(detector, 4, 4, (8, 16, 32)).double()
    identity_adapters(method)
    assert all(loss == 0 for loss in method(teacher, teacher, targets).values())

    for level in range(3):
        score_s, score_t = (
            position_score(output.cls_logits[level], output.boxes[level], targets, t_pos, t_neg)
            for output in (other, teacher)
        )
        areas = split_areas(score_s, score_t)
        assert (areas.sum(dim=0) == 1).all()
        assert not split_areas(score_t, score_t)[1].any()
        assert_close(split_areas(score_t, score_t)[0], areas[0] | areas[1])
        assert areas[2, 1].all()  # the second image has no ground truth


def test_order_of_anchors(predictions, targets):
    output = predictions(1, 3, 4)
    logits, boxes = output.cls_logits[0], output.boxes[0]
    score = position_score(logits, boxes, targets, 0.5, 0.4)
    assert_close(position_score(logits.flip(1), boxes.flip(1), targets, 0.5, 0.4), score)


# One ground truth of 10x10; a predicted box of the same corner and width has its height over 10 as IoU.
@pytest.mark.parametrize(
    "height, right, expected",
    [
        (10, True, 4.0),
        (5, True, 4.0),  # t_pos itself is positive
        (4.5, True, 3.0),
        (4, True, 0.8),  # t_neg itself is negative
        (10, False, 0.8),
        (4.5, False, 0.6),
        (1, False, 0.16),
    ],
)
def test_hand_computed_score(height, right, expected):
    target = {"boxes": torch.tensor([[0.0, 0, 10, 10]]), "labels": torch.tensor([2])}
    boxes = torch.tensor([0.0, 0, 10, height]).view(1, 1, 4, 1, 1)
    far = torch.tensor([50.0, 50, 60, 60]).view(1, 1, 4, 1, 1)
    for logits in ([-9.0, -8, -3 if right else -10], [0.1 if right else -0.1]):  # slot 2 is class 2; or objectness
        logits = torch.tensor(logits).view(1, 1, -1, 1, 1)
        assert_close(position_score(logits, boxes, [target], 0.5, 0.4).item(), expected)
        assert_close(position_score(logits, far, [target], 0.5, 0.4).item(), 0.16)
        two = position_score(torch.cat([logits] * 2, 1), torch.cat([far, boxes], 1), [target], 0.5, 0.4)
        assert_close(two.item(), expected)


def test_hand_computed():
    """One level of five positions in a row, two channels, one anchor, ground truth of class 1.

    Teacher's scores: 4 and 3 where the student has as much (key), 4 where the student has 0.8 (weak), and two where the
    teacher is not good itself, 0.8 against the student's 0.16 and 0.16 against 4 (rest).
    Squared differences, mean over channels: (1 + 9) / 2 = 5, (4 + 0) / 2 = 2, (0 + 4) / 2 = 2, 8 and 0.
    key = (5 + 2) / 2 = 3.5, weak = 2, rest = (8 + 0) / 2 = 4; weighted by the defaults 2, 2 and 0.5: 7, 4 and 2.
    """
    score_s = torch.tensor([4.0, 3.0, 0.8, 0.16, 4.0]).view(1, 1, 5)
    score_t = torch.tensor([4.0, 3.0, 4.0, 0.8, 0.16]).view(1, 1, 5)
    areas = split_areas(score_s, score_t)
    assert areas.int().tolist() == [[[[1, 1, 0, 0, 0]]], [[[0, 0, 1, 0, 0]]], [[[0, 0, 0, 1, 1]]]]
    student = torch.tensor([[1.0, 2, 0, 4, 0], [3, 0, 2, 0, 0]], dtype=torch.float64).view(1, 2, 1, 5)
    losses = tid_losses(student, torch.zeros_like(student), areas)
    assert_close(losses, torch.tensor([3.5, 2, 4], dtype=torch.float64))
    method = TID("fcos", 2, 2, (8,))
    assert [w * loss for w, loss in zip(method.area_weights, losses.tolist())] == [7.0, 4.0, 2.0]


def test_where_the_teacher_errs_nothing_is_weak():
    """However far the student is behind: every score below 3 of the teacher is rest."""
    scores = torch.tensor([0.0, 0.16, 0.6, 0.8, 3.0, 4.0])
    score_t, score_s = (grid.reshape(1, 1, -1) for grid in torch.meshgrid(scores, scores, indexing="ij"))
    key, weak, rest = split_areas(score_s, score_t)
    assert torch.equal(rest, score_t < 3)
    assert torch.equal(weak, (score_t == 4) & (score_s < 4) | (score_t == 3) & (score_s < 3))


def test_normaliser(predictions, targets):
    """A mean over the batch's positions of an area: repeating the batch changes nothing, images do not split."""
    student, teacher = predictions(1, 3, 4), predictions(2, 3, 4)
    s, t = student.fpn[0], teacher.fpn[0]
    both = [targets[0], {name: values[:1] for name, values in targets[0].items()}]
    scores = [position_score(o.cls_logits[0], o.boxes[0], both, 0.5, 0.4) for o in (student, teacher)]
    areas = split_areas(*scores)
    once = tid_losses(s, t, areas)
    assert_close(tid_losses(torch.cat([s, s]), torch.cat([t, t]), torch.cat([areas, areas], dim=1)), once)
    one_by_one = sum(tid_losses(s[n : n + 1], t[n : n + 1], areas[:, n : n + 1]) for n in range(2)) / 2
    assert ((once - one_by_one).abs() > 1e-3).any()

    # An image without ground truth joins the rest and leaves key and weak as they are.
    nothing = torch.zeros_like(areas[:, :1])
    nothing[2] = True
    joined = tid_losses(torch.cat([s, s[:1]]), torch.cat([t, t[:1]]), torch.cat([areas, nothing], dim=1))
    assert_close(joined[:2], once[:2])
    assert (joined[2] - once[2]).abs() > 1e-3


def test_maps(predictions, targets):
    """Areas follow from the scores of both networks, and give the losses."""
    student, teacher = predictions(1, 3, 4), predictions(2, 3, 4)
    method = TID("fcos", 4, 4, (8, 16, 32)).double()
    maps, expected = method.maps(student, teacher, targets), 0
    for level in range(3):
        score_s, score_t = (
            position_score(output.cls_logits[level], output.boxes[level], targets, 0.5, 0.4)
            for output in (student, teacher)
        )
        key, weak, rest = (maps[f"{area} area"][level] for area in ("key", "weak", "rest"))
        assert torch.equal(key, ((score_t > 2.9) & (score_t <= score_s)).float())
        assert torch.equal(weak, ((score_t > 2.9) & (score_t > score_s)).float())
        assert torch.equal(key + weak + rest, torch.ones_like(key))
        adapted = method.adapters[level](student.fpn[level])
        expected += tid_losses(adapted, teacher.fpn[level], torch.stack([key, weak, rest]))
    losses = method(student, teacher, targets).values()
    assert_close(torch.stack([*losses]), expected * torch.tensor([2.0, 2.0, 0.5], dtype=torch.float64))


def test_errors(fake_output, targets):
    output = fake_output(1)
    logits, boxes = output.cls_logits[0], output.boxes[0]
    with pytest.raises(ValueError, match="boxes"):
        position_score(logits, boxes[:, :1], targets, 0.5, 0.4)
    with pytest.raises(ValueError, match="one target per image"):
        position_score(logits, boxes, targets[:1], 0.5, 0.4)
    score = position_score(logits, boxes, targets, 0.5, 0.4)
    areas = split_areas(score, score)
    with pytest.raises(ValueError, match="must agree"):
        split_areas(score, score[:1])
    with pytest.raises(ValueError, match="must agree"):
        tid_losses(output.fpn[0], output.fpn[1], areas)
    with pytest.raises(ValueError, match="areas"):
        tid_losses(output.fpn[0], output.fpn[0], areas[:, 0])
    with pytest.raises(ValueError, match="t_neg"):
        TID("fcos", 4, 4, (8,), t_pos=0.3)
