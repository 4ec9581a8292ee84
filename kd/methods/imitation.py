"""Feature imitation: the l1 and l2 baselines of "Structural Knowledge Distillation for Object Detection".

NeurIPS 2022, https://arxiv.org/abs/2211.13133. The oldest idea of the field, and what every other method has to beat:
the student's FPN features imitate the teacher's, at all positions and channels alike. As in that paper, each feature
map is first normalised to [0, 1], because two networks need not share a scale: student and teacher each by its own
minimum and maximum, per image and level.

    loss = loss_weight * sum_l  mean_{n,c,p} |normalize(adapter_l(student_l)) - normalize(teacher_l)|^p             (1)

with p = 1 or 2. The paper's (|d|^p)^(1/p), taken element by element, is |d| for either p; we omit the root.

There is no public code. Our reading: minimum and maximum are taken over channels and positions together, the adapter
(optional in the paper) is a 1x1 convolution per level, and loss_weight is the paper's weight of its SSIM loss.
"""

import torch
from torch import Tensor, nn

# The paper's for SSIM, 2 or 4; the split is ours.
LOSS_WEIGHT = {"retinanet": 4.0, "fcos": 4.0, "gfl": 4.0, "faster_rcnn": 2.0}


def min_max_normalize(features: Tensor) -> Tensor:
    """Scale the features [N, C, H, W] of each image to 0..1 by their minimum and maximum; constant ones become 0."""
    low, high = features.amin(dim=(1, 2, 3), keepdim=True), features.amax(dim=(1, 2, 3), keepdim=True)
    # Adding an epsilon to the denominator would give constant features gradients of 1 / epsilon.
    return (features - low) / (high - low).masked_fill(high == low, 1)


def difference_map(student: Tensor, teacher: Tensor, p: int = 2, normalize: bool = True) -> Tensor:
    """Return the mean over channels of |student - teacher|^p at each position, [N, H, W].

    Args:
        student: adapted features of the student [N, C, H, W].
        teacher: features of the teacher [N, C, H, W], a constant.
        p: 1 or 2.
        normalize: normalise the features of each image first.

    Raises:
        ValueError: shapes do not agree, or p is neither 1 nor 2.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must agree")
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, not {p}")
    dtype = torch.promote_types(teacher.dtype, torch.float32)  # half precision rounds the differences away
    student, teacher = student.to(dtype), teacher.detach().to(dtype)
    if normalize:
        student, teacher = min_max_normalize(student), min_max_normalize(teacher)
    difference = student - teacher
    powers = difference.abs() if p == 1 else difference.square()
    return powers.sum(dim=1) / powers.shape[1]  # unlike mean, keeps channels_last in the backward pass: 7 times faster


def imitation_loss(student: Tensor, teacher: Tensor, p: int = 2, normalize: bool = True) -> Tensor:
    """Return the mean over images and positions of `difference_map`; same arguments."""
    return difference_map(student, teacher, p, normalize).mean()


class Imitation(nn.Module):
    """l1 or l2 imitation of FPN features.

    Args:
        detector: "retinanet", "fcos", "gfl" or "faster_rcnn"; chooses the default weight.
        student_channels: channels of the student's FPN.
        teacher_channels: channels of the teacher's.
        strides: of the levels, in pixels; only their number matters here.
        p: 1 or 2.
        loss_weight: weight of the sum over levels.
        normalize: normalise the features of each image first.
        adapter: use a 1x1 convolution per level on the student's side; always used where channels differ.

    Example::

        sizes = [(40, 60), (20, 30)]  # of the levels
        student = SimpleNamespace(fpn=[torch.rand(2, 64, *size) for size in sizes])
        teacher = SimpleNamespace(fpn=[torch.rand(2, 256, *size) for size in sizes])
        l2 = Imitation("fcos", student_channels=64, teacher_channels=256, strides=(8, 16), p=2)
        losses = l2(student, teacher, targets=[])  # {"loss_l2_fpn": ...}
    """

    needs = ("fpn",)
    warmup = 0

    def __init__(
        self,
        detector: str,
        student_channels: int,
        teacher_channels: int,
        strides: tuple[int, ...],
        *,
        p: int = 2,
        loss_weight: float | None = None,
        normalize: bool = True,
        adapter: bool = False,
    ):
        super().__init__()
        self.p, self.normalize = p, normalize
        self.loss_weight = LOSS_WEIGHT[detector] if loss_weight is None else loss_weight
        adapted = adapter or student_channels != teacher_channels
        self.adapters = nn.ModuleList(
            nn.Conv2d(student_channels, teacher_channels, 1) if adapted else nn.Identity() for _ in strides
        )

    def forward(self, student, teacher, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return loss_l1_fpn or loss_l2_fpn, weighted and summed over levels.

        Args:
            student: has fpn, a list over levels of [N, C, H, W].
            teacher: the same, constants.
            targets: not used.
        """
        levels = zip(self.adapters, student.fpn, teacher.fpn, strict=True)
        loss = sum(imitation_loss(adapter(s), t, self.p, self.normalize) for adapter, s, t in levels)  # (1)
        return {f"loss_l{self.p}_fpn": self.loss_weight * loss}

    def maps(self, student, teacher, targets) -> dict[str, list[Tensor]]:
        """Return "difference", a list over levels of [N, H, W], at least 0; `forward` sums its means."""
        levels = zip(self.adapters, student.fpn, teacher.fpn, strict=True)
        return {"difference": [difference_map(adapter(s), t, self.p, self.normalize) for adapter, s, t in levels]}
