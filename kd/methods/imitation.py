"""Plain feature imitation, the l1 and l2 baselines of "Structural Knowledge Distillation for Object Detection".

NeurIPS 2022, https://arxiv.org/abs/2211.13133. The oldest idea of the field and the bar every other method has to
clear: the student's pyramid shall equal the teacher's, all positions and channels alike. As in that paper, every map
is first stretched to [0, 1] (`normalize`), since two networks have no reason to share a scale: student and teacher
each by its own minimum and maximum, per image and level.

    loss = loss_weight * sum_l  mean_{n,c,p} |stretch(adapter_l(student_l)) - stretch(teacher_l)|^p          p = 1 or 2

There is no public code. The paper's weight belongs to its SSIM loss in the same place; using it here is our reading.
So is the minimum and maximum over channels and positions together. The adapter, optional in the paper, is a 1x1
convolution per level.
"""

import torch
from torch import Tensor, nn

LOSS_WEIGHT = {"retinanet": 4.0, "fcos": 4.0, "faster_rcnn": 2.0}  # the paper's for SSIM: "2 or 4"


def stretch(features: Tensor) -> Tensor:
    """Map each image's features [N, C, H, W] to 0..1 by its own minimum and maximum; a constant map gives 0."""
    low, high = features.amin(dim=(1, 2, 3), keepdim=True), features.amax(dim=(1, 2, 3), keepdim=True)
    # Not an epsilon: dividing a constant map by it would send gradients of 1 / epsilon to the student.
    return (features - low) / (high - low).masked_fill(high == low, 1)


def difference_map(student: Tensor, teacher: Tensor, p: int = 2, normalize: bool = True) -> Tensor:
    """Mean over channels of |student - teacher|^p at each position, [N, H, W].

    Args:
        student: adapted student features [N, C, H, W].
        teacher: teacher features [N, C, H, W], a constant.
        p: 1 or 2.
        normalize: stretch each image's map to 0..1 first.

    Raises:
        ValueError: shapes do not agree, or p is neither 1 nor 2.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must agree")
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, not {p}")
    student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
    if normalize:
        student, teacher = stretch(student), stretch(teacher)
    difference = student - teacher
    powers = difference.abs() if p == 1 else difference.square()
    return powers.sum(dim=1) / powers.shape[1]  # mean's gradient loses channels_last, and its backward is 7 x slower


def imitation_loss(student: Tensor, teacher: Tensor, p: int = 2, normalize: bool = True) -> Tensor:
    """Mean over images and positions of `difference_map`, which takes the same arguments."""
    return difference_map(student, teacher, p, normalize).mean()


def at_least_float32(x: Tensor) -> Tensor:
    """Lift half precision to float32, as under autocast; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Imitation(nn.Module):
    """l1 or l2 imitation of the FPN features.

    Args:
        detector: "retinanet", "fcos" or "faster_rcnn"; chooses the default weight.
        student_channels: channels of the student's pyramid levels.
        teacher_channels: channels of the teacher's.
        strides: one per pyramid level; only their number matters here.
        p: 1 or 2.
        loss_weight: weight of the sum over levels.
        normalize: stretch each image's map to 0..1 first.
        adapter: a 1x1 convolution per level on the student's side; always there where channels differ.
    """

    needs = ("fpn",)
    warmup = 0

    def __init__(
        self,
        detector: str,
        student_channels: int,
        teacher_channels: int,
        strides: tuple[int, ...],
        p: int = 2,
        loss_weight: float | None = None,
        normalize: bool = True,
        adapter: bool = False,
    ):
        super().__init__()
        self.p = p
        self.loss_weight = LOSS_WEIGHT[detector] if loss_weight is None else loss_weight
        self.normalize = normalize
        adapted = adapter or student_channels != teacher_channels
        self.adapters = nn.ModuleList(
            nn.Conv2d(student_channels, teacher_channels, 1) if adapted else nn.Identity() for _ in strides
        )

    def forward(self, student, teacher, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return loss_l1_fpn or loss_l2_fpn, weighted and summed over levels.

        Args:
            student: has fpn, a list over levels of [N, C, H, W].
            teacher: the same, constants.
            targets: not read.
        """
        pairs = zip(self.adapters, student.fpn, teacher.fpn)
        loss = sum(imitation_loss(adapter(s), t, self.p, self.normalize) for adapter, s, t in pairs)
        return {f"loss_l{self.p}_fpn": self.loss_weight * loss}

    def maps(self, student, teacher, targets) -> dict[str, list[Tensor]]:
        """Return "difference" of each level by name, [N, H, W], whose means are what `forward` sums.

        Values are at least 0, with `normalize` at most 1. Arguments as in `forward`.
        """
        pairs = zip(self.adapters, student.fpn, teacher.fpn)
        return {"difference": [difference_map(adapter(s), t, self.p, self.normalize) for adapter, s, t in pairs]}
