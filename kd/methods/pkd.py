"""PKD: "General Distillation Framework for Object Detectors via Pearson Correlation Coefficient", NeurIPS 2022.

https://arxiv.org/abs/2207.02039. Two networks can describe an image equally well with features of different sizes. A
squared difference forces the student to copy the teacher's sizes too, and is dominated by the few channels and levels
whose values are large. PKD standardises every channel first, so that only the pattern of its values over positions
counts, and all channels count alike. What is left is Pearson's correlation r of student and teacher, per channel:

    standardize(x) = (x - mean_{n,p} x) / (std_{n,p} x + 1e-6)                                                      (1)
    loss = loss_weight * sum_l  mean_{n,c,p}  (standardize(adapter_l(student_l)) - standardize(teacher_l))^2 / 2    (2)

Where:
    mean and std of each channel are taken over its P = N * H * W values, the positions of all images of this process,
    padding included. std is the unbiased one, which divides by P - 1.
    One level of (2) is mean_c (1 - r_c) * (P - 1) / P, but for the epsilon: 0 for channels that agree up to a positive
    scale and a shift, about 1 for unrelated ones, at most 2. A constant channel becomes 0 and costs about 1/2.
    Only the four finest levels are compared: P3..P6, with Faster R-CNN P2..P5.
    adapter_l is a 1x1 convolution where channels differ, else the identity.

Reference code: https://github.com/open-mmlab/mmrazor at 90c7af1 (models/losses/pkd_loss.py, configs/distill/mmdet/pkd),
which has no adapters and resizes maps of different sizes, which one shared transform never gives. A single value has no
unbiased std and gives nan there; here it counts as a constant.
"""

import torch
from torch import Tensor, nn

# Reference code; FCOS and GFL, as RetinaNet, are ours.
LOSS_WEIGHT = {"retinanet": 10.0, "fcos": 10.0, "gfl": 10.0, "faster_rcnn": 6.0}
LEVELS = 4  # the finest: reference code
EPSILON = 1e-6  # reference code


def standardize(features: Tensor) -> Tensor:
    """Return features [N, C, H, W] with mean 0 and standard deviation 1 of each channel over images and positions.

    A constant channel becomes 0, without gradient: EPSILON would enlarge its rounding errors a million times.
    """
    N, _, H, W = features.shape
    std, mean = torch.std_mean(features, dim=(0, 2, 3), keepdim=True, correction=min(N * H * W - 1, 1))
    return (features - mean) * torch.where(std > 0, 1 / (std + EPSILON), 0.0)  # (1)


def decorrelation(student: Tensor, teacher: Tensor) -> Tensor:
    """Return what each position contributes to 1 - r, [N, H, W], at least 0: mean over channels; its mean is the loss.

    Args:
        student: adapted features of the student [N, C, H, W], of any range.
        teacher: features of the teacher [N, C, H, W], a constant.

    Raises:
        ValueError: shapes do not agree.
    """
    if student.shape != teacher.shape or student.dim() != 4:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must agree, [N, C, H, W]")
    dtype = torch.promote_types(teacher.dtype, torch.float32)  # half precision rounds the differences away
    difference = standardize(student.to(dtype)) - standardize(teacher.detach().to(dtype))
    return difference.square().sum(dim=1) / (2 * difference.shape[1])  # .mean would not keep channels_last in backward


def pkd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over images and positions of `decorrelation`; same arguments."""
    return decorrelation(student, teacher).mean()


class PKD(nn.Module):
    """Distillation of FPN features by their correlation.

    Args:
        detector: "retinanet", "fcos", "gfl" or "faster_rcnn"; chooses the default weight.
        student_channels: channels of the student's FPN.
        teacher_channels: channels of the teacher's.
        strides: of the levels, in pixels; only their number matters here.
        loss_weight: weight of the sum over levels.

    Example::

        sizes = [(40, 60), (20, 30)]  # of the levels
        student = SimpleNamespace(fpn=[torch.rand(2, 64, *size) for size in sizes])
        teacher = SimpleNamespace(fpn=[torch.rand(2, 256, *size) for size in sizes])
        pkd = PKD("fcos", student_channels=64, teacher_channels=256, strides=(8, 16))
        losses = pkd(student, teacher, targets=[])  # {"loss_pkd_fpn": ...}
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
        loss_weight: float | None = None,
    ):
        super().__init__()
        self.loss_weight = LOSS_WEIGHT[detector] if loss_weight is None else loss_weight
        adapted = student_channels != teacher_channels
        self.adapters = nn.ModuleList(
            nn.Conv2d(student_channels, teacher_channels, 1) if adapted else nn.Identity() for _ in strides[:LEVELS]
        )

    def forward(self, student, teacher, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return loss_pkd_fpn, weighted and summed over the finest levels.

        Args:
            student: has fpn, a list over levels of [N, C, H, W].
            teacher: the same, constants.
            targets: not used.
        """
        levels = zip(self.adapters, student.fpn[:LEVELS], teacher.fpn[:LEVELS], strict=True)
        loss = sum(pkd_loss(adapter(s), t) for adapter, s, t in levels)  # (2)
        return {"loss_pkd_fpn": self.loss_weight * loss}

    def maps(self, student, teacher, targets) -> dict[str, list[Tensor]]:
        """Return "decorrelation", a list over the finest levels of [N, H, W]; `forward` sums its means.

        Correlation needs more than one value: with the images of a batch, these maps differ from those of one image.
        """
        levels = zip(self.adapters, student.fpn[:LEVELS], teacher.fpn[:LEVELS], strict=True)
        return {"decorrelation": [decorrelation(adapter(s), t) for adapter, s, t in levels]}
