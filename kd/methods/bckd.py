"""BCKD: "Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object Detection", ICCV 2023.

https://arxiv.org/abs/2308.14286. Logit distillation for classifiers compares softmax distributions over classes. Dense
detectors score every class by its own sigmoid, and a softmax would hide how high the scores are. BCKD treats every
class at every position as a binary problem, and weights it by how much teacher and student disagree. The largest
disagreement at a position also weights the distance of the two predicted boxes.

    cls = cls_weight / P * sum_{n,a,k,p} |q_t - q_s| * BCE(logit_s, q_t)                                            (1)
    loc = loc_weight / P * sum_{n,a,p} max_k |q_t - q_s| * (1 - GIoU(box_s, box_t))                                 (2)

Where:
    q = sigmoid(logit), and BCE(logit_s, q_t) = -q_t log q_s - (1 - q_t) log(1 - q_s).
    Positions p of all levels, anchors a and classes k are summed.
    P counts the anchors that the student's detector assigns to ground-truth boxes, at least 1 an image, over the images
    of this process. The authors average it over processes.
    The weight in (1) passes its gradient on to the student; in (2) it is a constant.

Reference code: https://github.com/TinyTigerPan/BCKD at 851f5b4, for GFL only; its weights serve the other detectors
here (our reading). It leaves out levels without positives, which the paper does not say and this file does not do.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchvision.ops import generalized_box_iou_loss

CLS_WEIGHT, LOC_WEIGHT = 1.0, 4.0  # reference code


def disagreement(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return |q_t - q_s|, in 0..1, for logits of one shape."""
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"logits {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)} must agree")
    return (teacher_logits.detach().sigmoid() - student_logits.sigmoid()).abs()


def bckd_cls_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return the sum in (1) over all elements, for logits [N, A, K, H, W] of one level, the teacher's a constant."""
    weight, target = disagreement(student_logits, teacher_logits), teacher_logits.detach().sigmoid()
    return (weight * binary_cross_entropy_with_logits(student_logits, target, reduction="none")).sum()  # (1)


def bckd_loc_loss(student_boxes: Tensor, teacher_boxes: Tensor, weight: Tensor) -> Tensor:
    """Return the sum in (2) over images, anchors and positions of one level.

    Args:
        student_boxes: [N, A, 4, H, W], xyxy.
        teacher_boxes: the same, constants.
        weight: [N, A, H, W], a constant.

    Raises:
        ValueError: shapes do not agree.
    """
    if student_boxes.shape != teacher_boxes.shape or weight.shape != student_boxes[:, :, 0].shape:
        shapes = [tuple(x.shape) for x in (student_boxes, teacher_boxes, weight)]
        raise ValueError(f"boxes and weights must agree, [N, A, 4, H, W] and [N, A, H, W], not {shapes}")
    loss = generalized_box_iou_loss(student_boxes.movedim(2, -1), teacher_boxes.detach().movedim(2, -1))
    return (weight.detach() * loss).sum()  # (2)


def count_positives(positive: list[Tensor]) -> Tensor:
    """Return P, 0-dimensional, for levels of booleans [N, A, H, W]."""
    per_image = torch.stack([level.flatten(1).sum(dim=1) for level in positive]).sum(dim=0)  # [N]
    return per_image.clamp(min=1).sum()


class BCKD(nn.Module):
    """Distillation of class scores, each a binary problem, and of boxes.

    Args:
        detector: "retinanet", "fcos" or "gfl"; all have the same defaults.
        student_channels, teacher_channels, strides: not used.
        cls_weight, loc_weight: of (1) and (2).

    Example::

        logits_s, logits_t = torch.randn(2, 2, 1, 80, 20, 30)  # of one level
        low, size = 200 * torch.rand(2, 2, 1, 2, 20, 30), 50 * torch.rand(2, 2, 1, 2, 20, 30) + 1
        boxes_s, boxes_t = torch.cat([low, low + size], dim=3)
        student = SimpleNamespace(cls_logits=[logits_s], boxes=[boxes_s], positive=[torch.rand(2, 1, 20, 30) > 0.9])
        teacher = SimpleNamespace(cls_logits=[logits_t], boxes=[boxes_t])
        losses = BCKD("fcos", 256, 256, strides=(8,))(student, teacher, targets=[])  # {"loss_bckd_cls": ..., ...}
    """

    needs = ("cls_logits", "boxes", "positive")
    warmup = 0

    def __init__(
        self,
        detector: str,
        student_channels: int,
        teacher_channels: int,
        strides: tuple[int, ...],
        *,
        cls_weight: float = CLS_WEIGHT,
        loc_weight: float = LOC_WEIGHT,
    ):
        super().__init__()
        if detector not in ("retinanet", "fcos", "gfl"):
            raise ValueError(f"BCKD reads class logits and boxes of a dense head, which {detector} does not have")
        self.cls_weight, self.loc_weight = cls_weight, loc_weight

    def forward(self, student, teacher, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return loss_bckd_cls and loss_bckd_loc, weighted and summed over levels.

        Args:
            student: has, for each level, cls_logits [N, A, K, H, W], boxes [N, A, 4, H, W] in xyxy, and positive
                [N, A, H, W], whether an anchor is assigned to a ground-truth box.
            teacher: the first two, constants.
            targets: not used.
        """
        logits = list(zip(student.cls_logits, teacher.cls_logits, strict=True))
        weights = [disagreement(s.detach(), t).amax(dim=2) for s, t in logits]  # [N, A, H, W]
        cls = sum(bckd_cls_loss(s, t) for s, t in logits)
        loc = sum(
            bckd_loc_loss(s, t, weight) for s, t, weight in zip(student.boxes, teacher.boxes, weights, strict=True)
        )
        P = count_positives(student.positive)
        return {"loss_bckd_cls": self.cls_weight * cls / P, "loss_bckd_loc": self.loc_weight * loc / P}

    def maps(self, student, teacher, targets) -> dict[str, list[Tensor]]:
        """Return "disagreement", the largest of a position, a list over levels of [N, H, W] in 0..1."""
        logits = zip(student.cls_logits, teacher.cls_logits)
        return {"disagreement": [disagreement(s, t).amax(dim=(1, 2)) for s, t in logits]}
