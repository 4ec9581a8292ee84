"""TID: "Task Integration Distillation for Object Detectors", Neurocomputing 2025, https://arxiv.org/abs/2404.01699.

A detector has two tasks, to name an object and to place its box, and a position can be good at one and poor at the
other. Methods that choose where to distil by the class scores alone see half of that, and those that ask the teacher
alone do not see what the student has yet to learn. TID grades every position of both networks on both tasks, by their
own predictions. Where the teacher's grade is high lies what matters (key); where it beats the student's lies what the
student still lacks (weak); each of these areas, and the rest, is distilled with a weight of its own.

This is not a reproduction. There is no public code, and we know the paper's structure but not all of its constants, so
each line below is marked as the paper's or as our reading, and AP measured with this file says little about the paper.

    score_r = 2 if IoU >= t_pos, 1.5 if t_neg < IoU < t_pos, 0.4 if IoU <= t_neg    paper; thresholds of the detector
              IoU: the largest of a predicted box with the image's ground truth     paper; decoded boxes: ours
    score_c = 2 if the class is that of the ground-truth box so matched, else 0.4   paper: discrete; its values: ours
    score   = max over anchors of score_c * score_r                                 paper: the product; the max: ours

    key  = score_teacher >= 3                                                       ours: class right, box 1.5 or 2
    weak = score_teacher > score_student, and not key                               paper: by difference; how: ours
    rest = everything else                                                          paper: three areas

    loss = sum over areas  weight_area * sum_l  sum_{(n,p) in area_l} mean_c (adapter_l(student_l) - teacher_l)^2
                                                / max(1, |area_l|)                  paper: weights; the rest: ours

IoU is taken with predicted boxes because anchors are common to teacher and student and could not tell them apart. The
class is the arg-max over cls_logits, however small its probability; an RPN knows only objects, and is right where its
probability is at least 0.5. A box that overlaps no ground truth is matched to none, and its class counts as wrong. An
image without ground truth is all rest. On Faster R-CNN, predictions are the RPN's. Where the teacher is right and the
student wrong, a position is key already, which leaves little to be weak. Areas are constants; |area_l| counts the
positions of all images in this process's batch, so an image that holds most of an area holds most of its loss.
"""

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

# (t_pos, t_neg): IoU from which a sample is positive, and up to which it is negative. FCOS has none; RetinaNet's serve.
THRESHOLDS = {"retinanet": (0.5, 0.4), "fcos": (0.5, 0.4), "faster_rcnn": (0.7, 0.3)}
SCORES = (2.0, 1.5, 0.4)  # high, middle, low: the paper's for IoU; score_c takes the first and the last
AREAS = ("key", "weak", "rest")
AREA_WEIGHTS = (2.0, 1.0, 0.5)  # key, weak, rest: our choice, not the paper's


def position_score(
    cls_logits: Tensor,
    boxes: Tensor,
    targets: list[dict[str, Tensor]],
    t_pos: float,
    t_neg: float,
    scores: tuple[float, float, float] = SCORES,
    tasks: str = "both",
) -> Tensor:
    """Grade each position of a level by its class and its box, [N, H, W]; 0 on images without ground truth.

    Args:
        cls_logits: [N, A, K, H, W]; K = 1 is objectness, else slot k is class k of the labels.
        boxes: predicted boxes [N, A, 4, H, W], xyxy pixels.
        targets: per image boxes [M, 4], xyxy pixels, and labels [M].
        t_pos: IoU from which a box scores high.
        t_neg: IoU up to which it scores low.
        scores: high, middle, low.
        tasks: "both", or the one to grade by, "class" or "box"; the other then scores high everywhere.

    Raises:
        ValueError: shapes do not agree.
    """
    N, A, K, H, W = cls_logits.shape
    if boxes.shape != (N, A, 4, H, W) or len(targets) != N:
        raise ValueError(
            f"class logits {tuple(cls_logits.shape)} and boxes {tuple(boxes.shape)} must agree, boxes [N, A, 4, H, W], "
            f"with one target per image, not {len(targets)}"
        )
    high, middle, low = scores
    boxes = at_least_float32(boxes.detach())
    score = torch.zeros(N, H, W, device=boxes.device)
    for n, target in enumerate(targets):
        if len(target["boxes"]) == 0:
            continue
        iou = box_iou(boxes[n].permute(0, 2, 3, 1).reshape(-1, 4), target["boxes"].to(boxes))
        iou, matched = (x.view(A, H, W) for x in iou.max(dim=1))
        right = cls_logits[n, :, 0] >= 0 if K == 1 else cls_logits[n].argmax(dim=1) == target["labels"][matched]
        # Without IoU > 0, boxes that touch nothing would be held against whichever ground truth is listed first.
        score_c = torch.where(right & (iou > 0) | (tasks == "box"), high, low)
        score_r = torch.where((iou >= t_pos) | (tasks == "class"), high, torch.where(iou > t_neg, middle, low))
        score[n] = (score_c * score_r).amax(dim=0)
    return score


def split_areas(score_s: Tensor, score_t: Tensor, key_score: float = SCORES[0] * SCORES[1]) -> Tensor:
    """Return the key, weak and rest areas as one mask [3, N, H, W]; each position is in exactly one.

    Args:
        score_s: the student's scores [N, H, W], from `position_score`.
        score_t: the teacher's.
        key_score: teacher's score from which a position is key.

    Raises:
        ValueError: shapes do not agree.
    """
    if score_s.shape != score_t.shape:
        raise ValueError(f"student scores {tuple(score_s.shape)} and teacher's {tuple(score_t.shape)} must agree")
    key = score_t >= key_score * (1 - 1e-6)  # a product rounded in float32 may fall just below
    weak = (score_t > score_s) & ~key
    return torch.stack([key, weak, ~(key | weak)])


def tid_losses(student: Tensor, teacher: Tensor, areas: Tensor) -> Tensor:
    """Squared feature difference of each area [3]: mean over channels, mean over the area's positions in the batch.

    Args:
        student: adapted student features [N, C, H, W].
        teacher: teacher features [N, C, H, W], a constant.
        areas: [3, N, H, W], from `split_areas`; an empty area gives 0.

    Raises:
        ValueError: shapes do not agree.
    """
    if student.shape != teacher.shape or areas.shape[1:] != student[:, 0].shape:
        shapes = [tuple(t.shape) for t in (student, teacher, areas)]
        raise ValueError(f"features [N, C, H, W], twice, and areas [3, N, H, W] must agree, not {shapes}")
    difference = (at_least_float32(student) - at_least_float32(teacher.detach())).square()
    difference = difference.sum(dim=1) / difference.shape[1]  # mean's gradient loses channels_last: backward 7 x slower
    areas = areas.to(difference)
    return (areas * difference).sum(dim=(1, 2, 3)) / areas.sum(dim=(1, 2, 3)).clamp(min=1)


def at_least_float32(x: Tensor) -> Tensor:
    """Lift half precision to float32, as under autocast; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class TID(nn.Module):
    """Distillation of the FPN features, weighted by what both tasks say of each position.

    Args:
        detector: "retinanet", "fcos" or "faster_rcnn"; chooses the default thresholds.
        student_channels, teacher_channels: of the pyramid levels.
        strides: one per pyramid level; only their number matters here.
        t_pos, t_neg, scores, tasks: see `position_score`; scores must fall. Key are positions of high * middle or more.
        key_weight, weak_weight, rest_weight: of the areas.

    Raises:
        ValueError: t_neg is above t_pos, scores do not fall, or there are no such tasks.
    """

    needs = ("fpn", "cls_logits", "boxes")
    warmup = 0

    def __init__(
        self,
        detector: str,
        student_channels: int,
        teacher_channels: int,
        strides: tuple[int, ...],
        t_pos: float | None = None,
        t_neg: float | None = None,
        scores: tuple[float, float, float] = SCORES,
        key_weight: float = AREA_WEIGHTS[0],
        weak_weight: float = AREA_WEIGHTS[1],
        rest_weight: float = AREA_WEIGHTS[2],
        tasks: str = "both",
    ):
        super().__init__()
        self.t_pos, self.t_neg = THRESHOLDS[detector]
        self.t_pos = self.t_pos if t_pos is None else t_pos
        self.t_neg = self.t_neg if t_neg is None else t_neg
        if self.t_neg > self.t_pos or not scores[0] > scores[1] > scores[2]:
            raise ValueError(f"t_neg {self.t_neg} must not exceed t_pos {self.t_pos}, and scores {scores} must fall")
        if tasks not in ("both", "class", "box"):
            raise ValueError(f'tasks must be "both", "class" or "box", not {tasks!r}')
        self.scores, self.tasks = scores, tasks
        self.weights = dict(zip(AREAS, (key_weight, weak_weight, rest_weight)))
        if tasks != "both":
            del self.weights["weak"]  # by one task a position is key or scores lowest, so none is weak
        self.adapters = nn.ModuleList(nn.Conv2d(student_channels, teacher_channels, 1) for _ in strides)

    def forward(self, student, teacher, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return loss_tid_key, loss_tid_weak (with both tasks) and loss_tid_rest, weighted and summed over levels.

        Args:
            student: has fpn, a list over levels of [N, C, H, W], cls_logits, of [N, A, K, H, W], and boxes, of
                [N, A, 4, H, W], xyxy pixels. Only fpn receives gradients.
            teacher: the same, constants.
            targets: per image boxes [M, 4], xyxy pixels of the same input, and labels [M].
        """
        losses = 0
        levels = zip(self.adapters, student.fpn, teacher.fpn, self.grade(student, teacher, targets))
        for adapter, features_s, features_t, (_, _, areas) in levels:
            losses += tid_losses(adapter(features_s), features_t, areas)
        losses = dict(zip(AREAS, losses))
        return {f"loss_tid_{area}": weight * losses[area] for area, weight in self.weights.items()}

    def grade(self, student, teacher, targets) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return of each level the student's and the teacher's scores [N, H, W], and their areas [3, N, H, W]."""
        levels, how = [], (self.t_pos, self.t_neg, self.scores, self.tasks)
        for level in range(len(self.adapters)):
            score_s, score_t = (
                position_score(x.cls_logits[level], x.boxes[level], targets, *how) for x in (student, teacher)
            )
            levels.append((score_s, score_t, split_areas(score_s, score_t, self.scores[0] * self.scores[1])))
        return levels

    def maps(self, student, teacher, targets) -> dict[str, list[Tensor]]:
        """Return maps of each level by name, [N, H, W]; arguments as in `forward`.

        "score teacher" and "score student" are at least 0, at most high * high; "key area", "weak area" and "rest area"
        are 1 inside and 0 outside.
        """
        scores_s, scores_t, areas = zip(*self.grade(student, teacher, targets))
        maps = {"score teacher": list(scores_t), "score student": list(scores_s)}
        return maps | {f"{area} area": [level[i].float() for level in areas] for i, area in enumerate(AREAS)}
