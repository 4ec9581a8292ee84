"""FRS: "Distilling Object Detectors with Feature Richness", NeurIPS 2021, https://arxiv.org/abs/2111.00674.

Imitating a teacher's whole feature map spends the student's capacity on empty background, and imitating only inside the
ground-truth boxes throws away background that looks like an object and pulls in object corners that say nothing. FRS
lets the teacher decide: a position is rich where the teacher sees some class with high probability, whatever the
annotation says. The richness weights two losses on every pyramid level l: squared differences of the features, and
cross-entropy of the class scores.

    richness_l[n, p] = max over a, k of sigmoid(cls_logits_teacher_l[n, a, k, p])                      a constant

    fpn  = alpha * sum_l  sum_{n,p} richness_l * sum_c (teacher_l - adapter_l(student_l))^2  / sum_{n,p} richness_l
    head = beta  * sum_l  sum_{n,p} richness_l * sum_{a,k} BCE(student logits, teacher prob.) / sum_{n,p} richness_l

The normaliser is one number per level over the whole batch: channels, anchors and classes are summed, not averaged.
With several processes each normalises over its own share of the batch. On Faster R-CNN, both losses act on the RPN.
For the paper's comparison, mask="boxes" weights by what FRS replaces: 1 where a ground-truth box lies, 0 elsewhere.

Reference code: https://github.com/duzhixing/FRS at decd60c (distill_frs_single.py, distill_frs_two.py, neck/adap.py).
It agrees with the paper. This file differs in form only: cross-entropy is taken on logits, which is stable and legal
under autocast, and the teacher is a constant.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

# (alpha, beta) of the reference configurations.
WEIGHTS = {"retinanet": (0.005, 0.02), "fcos": (0.01, 0.05), "faster_rcnn": (0.002, 0.1)}
LEAST = 1e-6  # of a normaliser


def feature_richness(cls_logits: Tensor) -> Tensor:
    """Return the largest class probability of each position, [N, H, W] in 0..1, for teacher logits [N, A, K, H, W]."""
    return at_least_float32(cls_logits.detach()).amax(dim=(1, 2)).sigmoid()


def box_mask(targets: list[dict[str, Tensor]], stride: int, size: tuple[int, int]) -> Tensor:
    """Return 1 for each cell, `stride` pixels wide, that a ground-truth box overlaps, else 0: [N, *size]."""
    masks = []
    for target in targets:
        x1, y1, x2, y2 = target["boxes"][:, :, None].unbind(dim=1)  # [M, 1] each, pixels of the network input
        top, left = (torch.arange(n, device=x1.device) * stride for n in size)
        rows, columns = (y1 < top + stride) & (y2 > top), (x1 < left + stride) & (x2 > left)
        masks.append((rows[:, :, None] & columns[:, None, :]).any(dim=0))
    return torch.stack(masks).float()


def frs_feature_loss(student: Tensor, teacher: Tensor, richness: Tensor) -> Tensor:
    """Squared feature difference: sum over channels, mean over the batch's positions weighted by richness.

    Where all weights are 0, as a box mask's may be, the loss is 0.

    Args:
        student: adapted student features [N, C, H, W].
        teacher: teacher features [N, C, H, W], a constant.
        richness: [N, H, W], from `feature_richness` or `box_mask`.

    Raises:
        ValueError: shapes do not agree.
    """
    if student.shape != teacher.shape or richness.shape != student[:, 0].shape:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must agree, with richness [N, H, W], "
            f"not {tuple(richness.shape)}"
        )
    difference = (at_least_float32(student) - at_least_float32(teacher.detach())).square().sum(dim=1)
    return (richness * difference).sum() / richness.sum().clamp(min=LEAST)


def frs_head_loss(student_logits: Tensor, teacher_logits: Tensor, richness: Tensor) -> Tensor:
    """Cross-entropy to the teacher's probabilities: sum over anchors and classes, mean over positions as above.

    Args:
        student_logits: [N, A, K, H, W].
        teacher_logits: [N, A, K, H, W], a constant.
        richness: [N, H, W], from `feature_richness` or `box_mask`.

    Raises:
        ValueError: shapes do not agree.
    """
    if student_logits.shape != teacher_logits.shape or richness.shape != student_logits[:, 0, 0].shape:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} must "
            f"agree, with richness [N, H, W], not {tuple(richness.shape)}"
        )
    probability = at_least_float32(teacher_logits.detach()).sigmoid()
    cross_entropy = binary_cross_entropy_with_logits(at_least_float32(student_logits), probability, reduction="none")
    return (richness * cross_entropy.sum(dim=(1, 2))).sum() / richness.sum().clamp(min=LEAST)


def at_least_float32(x: Tensor) -> Tensor:
    """Lift half precision to float32, as under autocast; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class FRS(nn.Module):
    """Feature-richness distillation of FPN features and classification scores.

    Args:
        detector: "retinanet", "fcos" or "faster_rcnn"; chooses the default weights.
        student_channels: channels of the student's pyramid levels.
        teacher_channels: channels of the teacher's.
        strides: one per pyramid level, pixels.
        alpha: weight of the feature loss.
        beta: weight of the head loss.
        mask: "richness", or "boxes" to compare it with.

    Raises:
        ValueError: another mask.
    """

    needs = ("fpn", "cls_logits")
    warmup = 500  # iterations, reference code

    def __init__(
        self,
        detector: str,
        student_channels: int,
        teacher_channels: int,
        strides: tuple[int, ...],
        alpha: float | None = None,
        beta: float | None = None,
        mask: str = "richness",
    ):
        super().__init__()
        if mask not in ("richness", "boxes"):
            raise ValueError(f'mask must be "richness" or "boxes", not {mask!r}')
        self.mask, self.strides = mask, tuple(strides)
        self.alpha, self.beta = WEIGHTS[detector]
        self.alpha = self.alpha if alpha is None else alpha
        self.beta = self.beta if beta is None else beta
        self.adapters = nn.ModuleList(nn.Conv2d(student_channels, teacher_channels, 3, padding=1) for _ in strides)

    def forward(self, student, teacher, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return loss_frs_fpn and loss_frs_head, weighted and summed over levels.

        Args:
            student: has fpn, a list over levels of [N, C, H, W], and cls_logits, of [N, A, K, H, W].
            teacher: the same, constants.
            targets: not read, unless the mask is "boxes": then per image boxes [M, 4], xyxy pixels.
        """
        fpn_loss = head_loss = 0
        for level, (adapter, richness) in enumerate(zip(self.adapters, self.weights(teacher, targets))):
            fpn_loss += frs_feature_loss(adapter(student.fpn[level]), teacher.fpn[level], richness)
            head_loss += frs_head_loss(student.cls_logits[level], teacher.cls_logits[level], richness)
        return {"loss_frs_fpn": self.alpha * fpn_loss, "loss_frs_head": self.beta * head_loss}

    def weights(self, teacher, targets: list[dict[str, Tensor]]) -> list[Tensor]:
        """Return what a position counts in both losses, of each level [N, H, W] in 0..1."""
        if self.mask == "richness":
            return [feature_richness(logits) for logits in teacher.cls_logits]
        sizes = (logits.shape[-2:] for logits in teacher.cls_logits)
        return [box_mask(targets, stride, size) for stride, size in zip(self.strides, sizes)]

    def maps(self, student, teacher, targets) -> dict[str, list[Tensor]]:
        """Return maps of each level by name, [N, H, W] in 0..1; arguments as in `forward`.

        "richness teacher", or "boxes", is the weight of a position in both losses. "richness student", which no loss
        reads, shows where the student would look by itself.
        """
        return {
            "richness teacher" if self.mask == "richness" else "boxes": self.weights(teacher, targets),
            "richness student": [feature_richness(logits) for logits in student.cls_logits],
        }
