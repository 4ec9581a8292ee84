"""CWD: "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, https://arxiv.org/abs/2011.13256.

What a channel of a feature map has found shows in where it responds most. CWD turns every channel into a distribution
over positions by a softmax, and compares the student's distributions with the teacher's by their Kullback-Leibler
divergence. The teacher's probability weights each position: the student must respond where the teacher does, and
background, where that probability is near 0, hardly counts.

    log_P(x) = x / temperature - log sum_p exp(x / temperature)       per image and channel                         (1)
    loss = loss_weight * sum_l  temperature^2 * mean_{n,c}  sum_p  P(t) * (log_P(t) - log_P(s))                     (2)

Where:
    s = adapter_l(student_l) and t = teacher_l; P is the exponential of log_P, and sums to 1 over positions.
    Positions are summed; images of this process and channels are averaged. The loss does not depend on a constant added
    to a channel. A level of one position costs nothing.
    temperature^2 keeps gradients at the same size at any temperature, as in classification.
    adapter_l is a 1x1 convolution where channels differ, else the identity.

Reference code: https://github.com/open-mmlab/mmrazor at 90c7af1 (models/losses/cwd.py, configs/distill/mmdet/cwd),
which has no adapters. Its configurations for FPN features give the defaults here. The published detection result
belongs to another place: the class logits of GFL.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

LOSS_WEIGHT, TEMPERATURE = 10.0, 1.0  # reference code, for RetinaNet, Faster R-CNN and GFL; FCOS is ours


def log_distribution(features: Tensor, temperature: float) -> Tensor:
    """Return the logarithm of each channel's softmax over positions, [N, C, H, W], for features [N, C, H, W]."""
    logits = features / temperature
    return logits - logits.logsumexp(dim=(2, 3), keepdim=True)  # (1)


def response(features: Tensor, temperature: float) -> Tensor:
    """Return the mean over channels of P relative to a uniform distribution, [N, H, W], of mean 1 over positions."""
    _, _, H, W = features.shape
    return H * W * log_distribution(features, temperature).exp().mean(dim=1)


def cwd_loss(student: Tensor, teacher: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Return the divergence of the channels' distributions: sum over positions, mean over images and channels.

    Args:
        student: adapted features of the student [N, C, H, W], of any range.
        teacher: features of the teacher [N, C, H, W], a constant.
        temperature: divides both; above 1, more positions count.

    Raises:
        ValueError: shapes do not agree.
    """
    if student.shape != teacher.shape or student.dim() != 4:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must agree, [N, C, H, W]")
    dtype = torch.promote_types(teacher.dtype, torch.float32)  # half precision rounds the differences away
    log_s, log_t = (log_distribution(x.to(dtype), temperature) for x in (student, teacher.detach()))
    divergence = kl_div(log_s, log_t, reduction="none", log_target=True)  # P(t) * (log_P(t) - log_P(s))
    return temperature**2 * divergence.sum(dim=(2, 3)).mean()  # (2)


class CWD(nn.Module):
    """Distillation of where each channel of the FPN responds.

    Args:
        detector: not used: all detectors have the same defaults.
        student_channels: channels of the student's FPN.
        teacher_channels: channels of the teacher's.
        strides: of the levels, in pixels; only their number matters here.
        loss_weight: weight of the sum over levels.
        temperature: as for `cwd_loss`.

    Example::

        sizes = [(40, 60), (20, 30)]  # of the levels
        student = SimpleNamespace(fpn=[torch.rand(2, 64, *size) for size in sizes])
        teacher = SimpleNamespace(fpn=[torch.rand(2, 256, *size) for size in sizes])
        cwd = CWD("fcos", student_channels=64, teacher_channels=256, strides=(8, 16))
        losses = cwd(student, teacher, targets=[])  # {"loss_cwd_fpn": ...}
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
        loss_weight: float = LOSS_WEIGHT,
        temperature: float = TEMPERATURE,
    ):
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, not {temperature}")
        self.loss_weight, self.temperature = loss_weight, temperature
        adapted = student_channels != teacher_channels
        self.adapters = nn.ModuleList(
            nn.Conv2d(student_channels, teacher_channels, 1) if adapted else nn.Identity() for _ in strides
        )

    def forward(self, student, teacher, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return loss_cwd_fpn, weighted and summed over levels.

        Args:
            student: has fpn, a list over levels of [N, C, H, W].
            teacher: the same, constants.
            targets: not used.
        """
        levels = zip(self.adapters, student.fpn, teacher.fpn, strict=True)
        loss = sum(cwd_loss(adapter(s), t, self.temperature) for adapter, s, t in levels)
        return {"loss_cwd_fpn": self.loss_weight * loss}

    def maps(self, student, teacher, targets) -> dict[str, list[Tensor]]:
        """Return maps by name, a list over levels of [N, H, W], at least 0 and of mean 1; see `response`.

        "response teacher" weights the loss. "response student" is what is compared with it, channel by channel.
        """
        adapted = [adapter(s) for adapter, s in zip(self.adapters, student.fpn)]
        return {
            "response teacher": [response(t, self.temperature) for t in teacher.fpn],
            "response student": [response(s, self.temperature) for s in adapted],
        }
