"""FRS: "Distilling Object Detectors with Feature Richness", NeurIPS 2021, https://arxiv.org/abs/2111.00674.

Imitating the whole feature map of a teacher spends the student's capacity on empty background. Imitating only inside
the ground-truth boxes discards background that looks like an object, and keeps box corners that contain none of it. FRS
lets the teacher decide: a position is rich if the teacher predicts any class there with high probability, whatever the
annotation says. The richness weights two losses on every pyramid level l:

    richness_l[n, p] = max_{a,k} sigmoid(logits_teacher_l[n, a, k, p])                                              (1)
    fpn  = alpha * sum_l  1/R_l  sum_{n,p}  richness_l * sum_c (teacher_l - adapter_l(student_l))^2                 (2)
    head = beta  * sum_l  1/R_l  sum_{n,p}  richness_l * sum_{a,k} BCE(logits_student_l, sigmoid(logits_teacher_l)) (3)

Where:
    R_l = sum_{n,p} richness_l, one number per level for the whole batch (of this process, with several GPUs). Channels,
    anchors and classes are summed, not averaged.
    adapter_l is a 3x3 convolution on the student's side.
    On Faster R-CNN, the logits are the RPN's objectness.

Reference code: https://github.com/duzhixing/FRS at decd60c (distill_frs_single.py, distill_frs_two.py, neck/adap.py),
which agrees with the paper. Two differences in form: the cross-entropy is computed from logits, which is stable and
allowed under autocast, and no gradient reaches the teacher.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

# alpha, beta: reference code
WEIGHTS = {"retinanet": (0.005, 0.02), "fcos": (0.01, 0.05), "gfl": (0.1, 0.05), "faster_rcnn": (0.002, 0.1)}


def feature_richness(cls_logits: Tensor) -> Tensor:
    """Return the largest class probability at each position, [N, H, W], for teacher logits [N, A, K, H, W]."""
    best = cls_logits.detach().amax(dim=(1, 2))
    return best.to(torch.promote_types(best.dtype, torch.float32)).sigmoid()  # (1); half precision rounds to 0


def rich_mean(values: Tensor, richness: Tensor) -> Tensor:
    """Return the mean of values [N, H, W] over the positions of the batch, weighted by richness [N, H, W]."""
    total = richness.sum().clamp(min=torch.finfo(richness.dtype).tiny)  # 0 where no logit is above -103
    return (richness * values).sum() / total


def frs_feature_loss(student: Tensor, teacher: Tensor, richness: Tensor) -> Tensor:
    """Squared difference of features: sum over channels, mean over the positions of the batch weighted by richness.

    Args:
        student: adapted features of the student [N, C, H, W].
        teacher: features of the teacher [N, C, H, W], a constant.
        richness: [N, H, W].

    Raises:
        ValueError: shapes do not agree.
    """
    if student.shape != teacher.shape or richness.shape != student[:, 0].shape:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must agree, and richness "
            f"{tuple(richness.shape)} must be [N, H, W]"
        )
    difference = (teacher.detach() - student.to(richness.dtype)).square().sum(dim=1)  # [N, H, W]
    return rich_mean(difference, richness)  # (2)


def frs_head_loss(student_logits: Tensor, teacher_logits: Tensor, richness: Tensor) -> Tensor:
    """Cross-entropy to the teacher's probabilities: sum over anchors and classes, mean over positions as above.

    Args:
        student_logits: [N, A, K, H, W].
        teacher_logits: [N, A, K, H, W], a constant.
        richness: [N, H, W].

    Raises:
        ValueError: shapes do not agree.
    """
    if student_logits.shape != teacher_logits.shape or richness.shape != student_logits[:, 0, 0].shape:
        raise ValueError(
            f"logits of student {tuple(student_logits.shape)} and teacher {tuple(teacher_logits.shape)} must agree, "
            f"and richness {tuple(richness.shape)} must be [N, H, W]"
        )
    student_logits, teacher_logits = (x.to(richness.dtype) for x in (student_logits, teacher_logits.detach()))
    cross_entropy = binary_cross_entropy_with_logits(student_logits, teacher_logits.sigmoid(), reduction="none")
    return rich_mean(cross_entropy.sum(dim=(1, 2)), richness)  # (3)


class FRS(nn.Module):
    """Distillation of FPN features and class logits, weighted by feature richness.

    Args:
        detector: "retinanet", "fcos", "gfl" or "faster_rcnn"; chooses the default weights.
        student_channels: channels of the student's FPN.
        teacher_channels: channels of the teacher's.
        strides: of the levels, in pixels; only their number matters here.
        alpha: weight of the feature loss.
        beta: weight of the head loss.

    Example::

        sizes = [(40, 60), (20, 30)]  # of the levels
        student = SimpleNamespace(fpn=[torch.rand(2, 64, *size) for size in sizes],
                                  cls_logits=[torch.randn(2, 1, 80, *size) for size in sizes])
        teacher = SimpleNamespace(fpn=[torch.rand(2, 256, *size) for size in sizes], cls_logits=student.cls_logits)
        frs = FRS("fcos", student_channels=64, teacher_channels=256, strides=(8, 16))
        losses = frs(student, teacher, targets=[])  # {"loss_frs_fpn": ..., "loss_frs_head": ...}
    """

    needs = ("fpn", "cls_logits")
    warmup = 500  # steps over which the training loop lets both losses grow to full weight: reference code

    def __init__(
        self,
        detector: str,
        student_channels: int,
        teacher_channels: int,
        strides: tuple[int, ...],
        *,
        alpha: float | None = None,
        beta: float | None = None,
    ):
        super().__init__()
        default_alpha, default_beta = WEIGHTS[detector]
        self.alpha = default_alpha if alpha is None else alpha
        self.beta = default_beta if beta is None else beta
        self.adapters = nn.ModuleList(nn.Conv2d(student_channels, teacher_channels, 3, padding=1) for _ in strides)

    def forward(self, student, teacher, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return loss_frs_fpn and loss_frs_head, weighted and summed over levels.

        Args:
            student: has fpn, a list over levels of [N, C, H, W], and cls_logits, of [N, A, K, H, W].
            teacher: the same, constants.
            targets: not used.
        """
        fpn_loss = head_loss = 0
        levels = zip(self.adapters, student.fpn, teacher.fpn, student.cls_logits, teacher.cls_logits, strict=True)
        for adapter, s, t, logits_s, logits_t in levels:
            richness = feature_richness(logits_t)
            fpn_loss += frs_feature_loss(adapter(s), t, richness)
            head_loss += frs_head_loss(logits_s, logits_t, richness)
        return {"loss_frs_fpn": self.alpha * fpn_loss, "loss_frs_head": self.beta * head_loss}

    def maps(self, student, teacher, targets) -> dict[str, list[Tensor]]:
        """Return maps by name, a list over levels of [N, H, W] in 0..1; arguments as in `forward`.

        "richness teacher" weights both losses. "richness student" is not used by them and is there for comparison.
        """
        return {
            "richness teacher": [feature_richness(logits) for logits in teacher.cls_logits],
            "richness student": [feature_richness(logits) for logits in student.cls_logits],
        }
