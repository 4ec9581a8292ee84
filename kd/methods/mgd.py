"""MGD: "Masked Generative Distillation", ECCV 2022, https://arxiv.org/abs/2205.01529.

Neighbouring positions of a feature map share information. MGD erases the student's features at random positions and
lets a small block of convolutions generate the teacher's whole map from what is left. The student never has to equal
the teacher. It has to contain, around every position, what is needed to generate the teacher's features there.

    mask_l[n, p] = 0 with probability mask_ratio, else 1                                                            (1)
    generated_l  = generate_l(mask_l * adapter_l(student_l))                                                        (2)
    loss = alpha * sum_l  1/N  sum_{n,c,p} (generated_l - teacher_l)^2                                              (3)

Where:
    mask_l is drawn anew at every step, per image and position, and is the same for all channels. Its random numbers are
    those of torch.manual_seed, so a run that seeds its steps can be repeated.
    generate_l is a 3x3 convolution, ReLU and another 3x3 convolution. It is trained along and dropped afterwards.
    (3) divides by the N images of this process, not by channels and positions. alpha is small for this reason: a mean
    over all of them would be about a million times smaller and distil nothing.
    With Faster R-CNN only the four finest levels, P2..P5, are compared.
    adapter_l is a 1x1 convolution where channels differ, else the identity.

Reference code: https://github.com/yzd-v/MGD at 2c9da0b (det/mmdet/distillation/losses/mgd.py, det/configs/distillers).
alpha and mask_ratio are called alpha_mgd and lambda_mgd there.
"""

import torch
from torch import Tensor, nn

# alpha, mask_ratio and number of levels, finest first: reference code; FCOS and GFL, as RetinaNet, are ours.
DEFAULTS = {**dict.fromkeys(("retinanet", "fcos", "gfl"), (2e-5, 0.65, 5)), "faster_rcnn": (5e-7, 0.45, 4)}


def draw_mask(features: Tensor, mask_ratio: float) -> Tensor:
    """Return a random mask [N, 1, H, W] for features [N, C, H, W]: 0 with probability mask_ratio, else 1."""
    N, _, H, W = features.shape
    random = torch.rand(N, 1, H, W, dtype=features.dtype, device=features.device)
    return (random <= 1 - mask_ratio).to(features.dtype)  # (1)


def generation_error(student: Tensor, teacher: Tensor, mask: Tensor, generate: nn.Module) -> Tensor:
    """Return the squared difference of generated and true features at each position, summed over channels, [N, H, W].

    Args:
        student: adapted features of the student [N, C, H, W].
        teacher: features of the teacher [N, C, H, W], a constant.
        mask: [N, 1, H, W], 1 where the student's features are kept and 0 where they are erased.
        generate: the generation block, from [N, C, H, W] to [N, C, H, W].

    Raises:
        ValueError: shapes do not agree.
    """
    if student.shape != teacher.shape or mask.shape != student[:, :1].shape:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must agree, and mask "
            f"{tuple(mask.shape)} must be [N, 1, H, W]"
        )
    generated = generate(mask * student)  # (2)
    dtype = torch.promote_types(teacher.dtype, torch.float32)  # half precision rounds the differences away
    return (generated.to(dtype) - teacher.detach().to(dtype)).square().sum(dim=1)


class MGD(nn.Module):
    """Distillation of FPN features by generating the teacher's from a masked student's.

    Args:
        detector: "retinanet", "fcos", "gfl" or "faster_rcnn"; chooses the defaults and the number of levels.
        student_channels: channels of the student's FPN.
        teacher_channels: channels of the teacher's.
        strides: of the levels, in pixels; only their number matters here.
        alpha: weight of the sum over levels.
        mask_ratio: share of positions that are erased, from 0 (none) to below 1.

    Raises:
        ValueError: mask_ratio is out of range.

    Example::

        sizes = [(40, 60), (20, 30)]  # of the levels
        student = SimpleNamespace(fpn=[torch.rand(2, 64, *size) for size in sizes])
        teacher = SimpleNamespace(fpn=[torch.rand(2, 256, *size) for size in sizes])
        mgd = MGD("fcos", student_channels=64, teacher_channels=256, strides=(8, 16))
        losses = mgd(student, teacher, targets=[])  # {"loss_mgd_fpn": ...}
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
        alpha: float | None = None,
        mask_ratio: float | None = None,
    ):
        super().__init__()
        default_alpha, default_ratio, self.levels = DEFAULTS[detector]
        self.alpha = default_alpha if alpha is None else alpha
        self.mask_ratio = default_ratio if mask_ratio is None else mask_ratio
        if not 0 <= self.mask_ratio < 1:
            raise ValueError(f"mask_ratio must be at least 0 and below 1, not {self.mask_ratio}")
        adapted = student_channels != teacher_channels
        self.adapters = nn.ModuleList(
            nn.Conv2d(student_channels, teacher_channels, 1) if adapted else nn.Identity()
            for _ in strides[: self.levels]
        )
        self.generation_blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
                nn.ReLU(inplace=True),
                nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
            )
            for _ in strides[: self.levels]
        )

    def forward(self, student, teacher, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return loss_mgd_fpn, weighted and summed over levels; draws new masks.

        Args:
            student: has fpn, a list over levels of [N, C, H, W].
            teacher: the same, constants.
            targets: not used.
        """
        errors = self.errors(student, teacher, self.draw_masks(teacher))
        return {"loss_mgd_fpn": self.alpha * sum(error.sum() / len(error) for error in errors)}  # (3)

    def draw_masks(self, teacher) -> list[Tensor]:
        """Return a new mask [N, 1, H, W] for each level."""
        return [draw_mask(t, self.mask_ratio) for t in teacher.fpn[: self.levels]]

    def errors(self, student, teacher, masks: list[Tensor]) -> list[Tensor]:
        """Return the generation error [N, H, W] of each level."""
        fpn_s, fpn_t = student.fpn[: self.levels], teacher.fpn[: self.levels]
        levels = zip(self.adapters, self.generation_blocks, fpn_s, fpn_t, masks, strict=True)
        return [generation_error(adapter(s), t, mask, generate) for adapter, generate, s, t, mask in levels]

    def maps(self, student, teacher, targets) -> dict[str, list[Tensor]]:
        """Return maps by name, a list over levels of [N, H, W]; draws new masks.

        "mask" is 1 where the student's features are kept and 0 where they are erased. "generation error", at least 0,
        is what `forward` sums, for this mask.
        """
        masks = self.draw_masks(teacher)
        return {"mask": [mask[:, 0] for mask in masks], "generation error": self.errors(student, teacher, masks)}
