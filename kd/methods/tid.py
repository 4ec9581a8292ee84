"""TID: "Task Integration Distillation for Object Detectors", Neurocomputing 2025, https://arxiv.org/abs/2404.01699.

A detector has two tasks, classifying an object and localising it, and a position can be good at one and poor at the
other. Methods that choose where to distil by class scores alone see half of this, and methods that ask only the teacher
do not see what the student has yet to learn. TID scores every position of both networks on both tasks, by their own
predictions. Positions where the teacher is good are distilled with more weight than the rest: as weak areas where the
student is behind, as key areas where it is not.

    score_r = 2 if IoU >= t_pos, 1.5 if t_neg < IoU < t_pos, 0.4 if IoU <= t_neg    (1) paper; the detector's thresholds
    score_c = 2 if the class is that of the matched ground-truth box, else 0.4      (2) paper: discrete; ours: values
    score   = max over anchors of score_c * score_r                                 (3) paper: product; ours: max
    weak    = score_teacher >= 3 and score_teacher > score_student                  (4) paper: by difference; ours: >= 3
    key     = score_teacher >= 3 and not weak                                       (5) ours
    loss    = sum_area  weight_area  sum_l  1 / #area_l                             (6) paper: weights; ours: the rest
              * sum_{(n,p) in area_l}  mean_c (adapter_l(student_l) - teacher_l)^2

Where:
    IoU is the largest overlap of the predicted box with a ground-truth box of the image, which is the matched one.
    Anchors would not do: they are the same for both networks. A box that overlaps none has a wrong class.
    The class is the arg-max over cls_logits. An RPN, with a single class, is right where its probability is >= 0.5.
    A score >= 3 means the right class and a score_r of 1.5 or 2: the errors of the teacher are not emphasised.
    area is key, weak or rest (all else). #area_l counts its positions in all images of this process, at least 1.
    An image without ground truth is all rest.

This is not a reproduction: there is no public code, and we know the structure of the paper but not all constants. Each
equation is marked as the paper's or ours; weights and 1x1 adapters are ours. So AP measured with this file says little
about the paper, whose detectors are GFL and ATSS.
"""

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

# t_pos, t_neg: IoU above which anchors are positive, and below which negative. FCOS has none and uses RetinaNet's.
THRESHOLDS = {**dict.fromkeys(("retinanet", "fcos", "gfl"), (0.5, 0.4)), "faster_rcnn": (0.7, 0.3)}
HIGH, MIDDLE, LOW = 2.0, 1.5, 0.4  # score_r: paper; score_c takes the first and the last
AREAS = ("key", "weak", "rest")


def position_score(
    cls_logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]], t_pos: float, t_neg: float
) -> Tensor:
    """Return the score of each position of a level, [N, H, W]; 0 in images without ground truth.

    Args:
        cls_logits: [N, A, K, H, W]; K = 1 is objectness, otherwise index k is label k.
        boxes: predicted boxes [N, A, 4, H, W], xyxy pixels.
        targets: for each image boxes [M, 4], xyxy pixels, and labels [M].
        t_pos: IoU from which a box scores high.
        t_neg: IoU up to which a box scores low.

    Raises:
        ValueError: shapes do not agree.
    """
    N, A, K, H, W = cls_logits.shape
    if boxes.shape != (N, A, 4, H, W) or len(targets) != N:
        raise ValueError(
            f"class logits {tuple(cls_logits.shape)} and boxes {tuple(boxes.shape)} must agree, boxes [N, A, 4, H, W], "
            f"with one target per image, not {len(targets)}"
        )
    score = torch.zeros(N, H, W, device=boxes.device)
    for n, target in enumerate(targets):
        if len(target["boxes"]) == 0:
            continue
        iou = box_iou(boxes[n].detach().permute(0, 2, 3, 1).reshape(-1, 4), target["boxes"].to(boxes))  # [AHW, M]
        iou, matched = (x.view(A, H, W) for x in iou.max(dim=1))
        right = cls_logits[n, :, 0] >= 0 if K == 1 else cls_logits[n].argmax(dim=1) == target["labels"][matched]
        # Without iou > 0, a box that overlaps nothing would be matched to the first ground-truth box.
        score_c = torch.where(right & (iou > 0), HIGH, LOW)  # (2)
        score_r = torch.where(iou >= t_pos, HIGH, torch.where(iou > t_neg, MIDDLE, LOW))  # (1)
        score[n] = (score_c * score_r).amax(dim=0)  # (3)
    return score


def split_areas(score_s: Tensor, score_t: Tensor) -> Tensor:
    """Return the key, weak and rest areas as masks [3, N, H, W]; each position is in exactly one.

    Args:
        score_s: the student's scores [N, H, W], from `position_score`.
        score_t: the teacher's.

    Raises:
        ValueError: shapes do not agree.
    """
    if score_s.shape != score_t.shape:
        raise ValueError(f"scores of student {tuple(score_s.shape)} and teacher {tuple(score_t.shape)} must agree")
    good = score_t >= HIGH * MIDDLE
    weak = good & (score_t > score_s)  # (4)
    return torch.stack([good & ~weak, weak, ~good])  # (5)


def tid_losses(student: Tensor, teacher: Tensor, areas: Tensor) -> Tensor:
    """Return the squared difference of each area [3]: mean over channels, mean over its positions in the batch.

    Args:
        student: adapted features of the student [N, C, H, W].
        teacher: features of the teacher [N, C, H, W], a constant.
        areas: [3, N, H, W], from `split_areas`; an empty area gives 0.

    Raises:
        ValueError: shapes do not agree.
    """
    if student.shape != teacher.shape or areas.shape[1:] != student[:, 0].shape:
        shapes = [tuple(t.shape) for t in (student, teacher, areas)]
        raise ValueError(f"features [N, C, H, W], twice, and areas [3, N, H, W] must agree, not {shapes}")
    dtype = torch.promote_types(teacher.dtype, torch.float32)  # half precision rounds the differences away
    difference = (teacher.detach().to(dtype) - student).square()
    difference = difference.sum(dim=1) / difference.shape[1]  # unlike mean, keeps channels_last in the backward pass
    areas = areas.to(difference)
    return (areas * difference).sum(dim=(1, 2, 3)) / areas.sum(dim=(1, 2, 3)).clamp(min=1)  # (6)


class TID(nn.Module):
    """Distillation of FPN features in areas chosen by the predictions of both networks.

    Args:
        detector: "retinanet", "fcos", "gfl" or "faster_rcnn"; chooses the default thresholds.
        student_channels, teacher_channels: of the FPN.
        strides: of the levels, in pixels; only their number matters here.
        t_pos, t_neg: as for `position_score`.
        key_weight, weak_weight, rest_weight: of the areas; ours. RESULTS.md compares four choices.

    Raises:
        ValueError: t_neg is above t_pos.

    Example::

        sizes, box = [(40, 60), (20, 30)], torch.tensor([20.0, 30, 90, 80])
        output = SimpleNamespace(fpn=[torch.rand(2, 256, *size) for size in sizes],
                                 cls_logits=[torch.randn(2, 1, 80, *size) for size in sizes],
                                 boxes=[box.view(4, 1, 1).expand(2, 1, 4, *size) for size in sizes])
        target = {"boxes": box[None], "labels": torch.tensor([1])}
        losses = TID("fcos", 256, 256, strides=(8, 16))(output, output, [target, target])  # {"loss_tid_key": ..., ...}
    """

    needs = ("fpn", "cls_logits", "boxes")
    warmup = 0

    def __init__(
        self,
        detector: str,
        student_channels: int,
        teacher_channels: int,
        strides: tuple[int, ...],
        *,
        t_pos: float | None = None,
        t_neg: float | None = None,
        key_weight: float = 2.0,
        weak_weight: float = 2.0,
        rest_weight: float = 0.5,
    ):
        super().__init__()
        self.t_pos, self.t_neg = THRESHOLDS[detector]
        self.t_pos = self.t_pos if t_pos is None else t_pos
        self.t_neg = self.t_neg if t_neg is None else t_neg
        if self.t_neg > self.t_pos:
            raise ValueError(f"t_neg {self.t_neg} must not exceed t_pos {self.t_pos}")
        self.area_weights = (key_weight, weak_weight, rest_weight)
        self.adapters = nn.ModuleList(nn.Conv2d(student_channels, teacher_channels, 1) for _ in strides)

    def forward(self, student, teacher, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return loss_tid_key, loss_tid_weak and loss_tid_rest, weighted and summed over levels.

        Args:
            student: has, for each level, fpn [N, C, H, W], cls_logits [N, A, K, H, W] and boxes [N, A, 4, H, W], xyxy
                pixels, in float32. Only fpn receives gradients.
            teacher: the same, constants.
            targets: for each image boxes [M, 4], xyxy pixels of the resized image, and labels [M].
        """
        losses = 0
        for level, (adapter, areas) in enumerate(
            zip(self.adapters, self.areas(student, teacher, targets), strict=True)
        ):
            losses += tid_losses(adapter(student.fpn[level]), teacher.fpn[level], areas)
        return {f"loss_tid_{name}": w * loss for name, w, loss in zip(AREAS, self.area_weights, losses)}

    def areas(self, student, teacher, targets) -> list[Tensor]:
        """Return the areas of each level [3, N, H, W]."""
        scores_s, scores_t = (
            [position_score(*level, targets, self.t_pos, self.t_neg) for level in zip(output.cls_logits, output.boxes)]
            for output in (student, teacher)
        )
        return [split_areas(s, t) for s, t in zip(scores_s, scores_t)]

    def maps(self, student, teacher, targets) -> dict[str, list[Tensor]]:
        """Return "key area", "weak area" and "rest area", a list over levels of [N, H, W], 1 inside and 0 outside."""
        areas = self.areas(student, teacher, targets)
        return {f"{name} area": [level[i].float() for level in areas] for i, name in enumerate(AREAS)}
