"""FGD: "Focal and Global Knowledge Distillation for Detectors", CVPR 2022, https://arxiv.org/abs/2111.11837.

Imitating a whole map alike spends the student on background, which is most of it. FGD's focal part separates objects
from background by the ground-truth boxes, gives small objects as much weight in total as large ones, and follows the
teacher's attention to positions and channels. This cuts objects from their surroundings, so the global part compares
the maps once more, after a block has added the context of the whole map to every position.

    spatial(x) = HW * softmax_p(mean_c |x| / T)        channel(x) = C * softmax_c(mean_p |x| / T)                   (1)
    foreground[n, p] = max_b 1 / ((h_b + 1) (w_b + 1)) over the boxes b of image n that cover p, 0 without any      (2)
    background[n, p] = 1 / #background_n where foreground is 0, else 0                                              (3)
    focal     = 1/N sum_{n,p} (foreground_weight * foreground + background_weight * background)
                * spatial(t) * sum_c channel(t) * (s - t)^2                                                         (4)
    attention = attention_weight/N (sum_{n,p} |spatial(s) - spatial(t)| + sum_{n,c} |channel(s) - channel(t)|)      (5)
    context(x) = x + W_2 relu(norm(W_1 sum_p softmax_p(w x) x))                                                     (6)
    global    = global_weight/N sum_{n,c,p} (context_student(s) - context_teacher(t))^2                             (7)

Where:
    s = adapter_l(student_l), t = teacher_l; (4), (5) and (7) are summed over levels l, with Faster R-CNN over the four
    finest, P2..P5. adapter_l is a 1x1 convolution where channels differ, else the identity.
    In units of the stride, a box covers the positions from the floor of its left and top edge to the ceiling of its
    right and bottom edge, both included; w_b and h_b are their differences. #background_n counts positions of image n.
    N is the number of images of this process. Channels and positions are summed, not averaged.
    Context blocks, the teacher's too, are trained and then dropped; (7) also falls where both discard what differs.

Reference code: https://github.com/yzd-v/FGD at c03a6cf (mmdet/distillation/losses/fgd.py, configs/distillers/fgd). Its
weights are called alpha, beta, gamma and lambda; its students inherit neck and heads (--inherit). It scales boxes to
the padded map by the image's size without padding, which shifts them in padded images; here they are in place.
"""

import torch
from torch import Tensor, nn

# T; foreground, background, attention and global weight; number of levels, finest first: reference code.
DEFAULTS = {
    "retinanet": (0.5, 1e-3, 5e-4, 1e-3, 5e-6, 5),
    "fcos": (0.8, 1.6e-3, 8e-4, 8e-4, 8e-6, 5),
    "gfl": (0.5, 1e-3, 5e-4, 5e-4, 5e-6, 5),
    "faster_rcnn": (0.5, 5e-5, 2.5e-5, 5e-5, 5e-7, 4),
}


def attentions(features: Tensor, T: float) -> tuple[Tensor, Tensor]:
    """Return spatial [N, H, W] and channel [N, C] attention of features [N, C, H, W]; both have mean 1."""
    N, C, H, W = features.shape
    magnitude = features.abs()
    mean = magnitude.sum(dim=1) / C  # unlike .mean, keeps channels_last in the backward pass
    spatial = H * W * (mean.flatten(1) / T).softmax(dim=1).view(N, H, W)
    return spatial, C * (magnitude.mean(dim=(2, 3)) / T).softmax(dim=1)  # (1)


def split_positions(boxes: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
    """Return foreground and background of one image, [2, H, W], for boxes [M, 4] in xyxy pixels; stride in pixels."""
    left, top = (boxes[:, :2] / stride).floor().T[..., None]  # [M, 1] each
    right, bottom = (boxes[:, 2:] / stride).ceil().T[..., None]
    y, x = (torch.arange(side, device=boxes.device) for side in size)
    in_rows, in_columns = (top <= y) & (y <= bottom), (left <= x) & (x <= right)  # [M, H], [M, W]
    area = (bottom - top + 1) * (right - left + 1)  # [M, 1]
    covered = in_rows[:, :, None] & in_columns[:, None, :]  # [M, H, W]
    foreground = torch.cat([covered / area[..., None], area.new_zeros(1, *size)]).amax(dim=0)  # (2)
    background = (foreground == 0).to(foreground)
    return torch.stack([foreground, background / background.sum().clamp(min=1)])  # (3)


def focal_losses(student: Tensor, teacher: Tensor, weights: Tensor, T: float) -> tuple[Tensor, Tensor]:
    """Return (4) and, without its weight, (5) of one level: sums over channels and positions, means over images.

    Takes features [N, C, H, W], the student's adapted, the teacher's a constant, and the weighted sum of foreground and
    background [N, H, W]. Raises ValueError if shapes do not agree.
    """
    if student.shape != teacher.shape or weights.shape != student[:, 0].shape:
        raise ValueError(f"features and weights must agree: {[tuple(t.shape) for t in (student, teacher, weights)]}")
    teacher = teacher.detach()
    (spatial_s, channel_s), (spatial_t, channel_t) = attentions(student, T), attentions(teacher, T)
    difference = (channel_t[:, :, None, None] * (student - teacher).square()).sum(dim=1)  # [N, H, W]
    focal = (weights * spatial_t * difference).sum()  # (4)
    attention = (spatial_s - spatial_t).abs().sum() + (channel_s - channel_t).abs().sum()  # (5)
    return focal / len(student), attention / len(student)


class ContextBlock(nn.Module):
    """Adds the context of the whole map to every position, (6). At first it returns its input. It is GCNet's block."""

    def __init__(self, channels: int):
        super().__init__()
        self.score = nn.Conv2d(channels, 1, 1, bias=False)  # w; the softmax would cancel a bias
        hidden, last = nn.Linear(channels, channels // 2), nn.Linear(channels // 2, channels)  # W_1, W_2
        self.transform = nn.Sequential(hidden, nn.LayerNorm(channels // 2), nn.ReLU(), last)
        nn.init.kaiming_normal_(self.score.weight, nonlinearity="relu")
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, C, H, W] for features [N, C, H, W]."""
        attention = self.score(x).flatten(2).softmax(dim=2)  # [N, 1, HW]
        context = (x.flatten(2) @ attention.mT).squeeze(2)  # [N, C]
        return x + self.transform(context)[:, :, None, None]  # (6)


class FGD(nn.Module):
    """Focal and global distillation of FPN features.

    Args:
        detector: "retinanet", "fcos", "gfl" or "faster_rcnn"; chooses the defaults and the number of levels.
        student_channels, teacher_channels: of the FPN.
        strides: of the levels, in pixels, finest first.
        temperature: T of the attentions.
        foreground_weight, background_weight, attention_weight, global_weight: of (4), (5) and (7).

    Example::

        sizes = [(40, 60), (20, 30)]  # of the levels
        student = SimpleNamespace(fpn=[torch.rand(2, 64, *size) for size in sizes])
        teacher = SimpleNamespace(fpn=[torch.rand(2, 256, *size) for size in sizes])
        target = {"boxes": torch.tensor([[20.0, 30, 90, 80], [100, 40, 200, 160]])}
        losses = FGD("fcos", 64, 256, strides=(8, 16))(student, teacher, [target, target])  # {"loss_fgd_focal": ...}
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
        temperature: float | None = None,
        foreground_weight: float | None = None,
        background_weight: float | None = None,
        attention_weight: float | None = None,
        global_weight: float | None = None,
    ):
        super().__init__()
        *defaults, self.levels = DEFAULTS[detector]
        given = (temperature, foreground_weight, background_weight, attention_weight, global_weight)
        self.temperature, *self.weights = (default if g is None else g for g, default in zip(given, defaults))
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")
        self.strides, adapted = strides[: self.levels], student_channels != teacher_channels
        self.adapters = nn.ModuleList(
            nn.Conv2d(student_channels, teacher_channels, 1) if adapted else nn.Identity() for _ in self.strides
        )
        self.context_student = nn.ModuleList(ContextBlock(teacher_channels) for _ in self.strides)
        self.context_teacher = nn.ModuleList(ContextBlock(teacher_channels) for _ in self.strides)

    def forward(self, student, teacher, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return loss_fgd_focal, loss_fgd_attention and loss_fgd_global, weighted and summed over levels.

        Args:
            student: has fpn, a list over levels of [N, C, H, W].
            teacher: the same, constants.
            targets: for each image boxes [M, 4], xyxy pixels of the resized image.
        """
        foreground_weight, background_weight, attention_weight, global_weight = self.weights
        losses = {"loss_fgd_focal": 0, "loss_fgd_attention": 0, "loss_fgd_global": 0}
        for level, (foreground, background) in enumerate(self.regions(teacher, targets)):
            s, t = self.adapters[level](student.fpn[level]), teacher.fpn[level].detach()
            dtype = torch.promote_types(t.dtype, torch.float32)  # half precision rounds the differences away
            s, t = s.to(dtype), t.to(dtype)
            weights = foreground_weight * foreground + background_weight * background
            focal, attention = focal_losses(s, t, weights, self.temperature)
            difference = self.context_student[level](s) - self.context_teacher[level](t)
            losses["loss_fgd_focal"] += focal
            losses["loss_fgd_attention"] += attention_weight * attention
            losses["loss_fgd_global"] += global_weight * difference.square().sum() / len(s)  # (7)
        return losses

    def regions(self, teacher, targets: list[dict[str, Tensor]]) -> list[Tensor]:
        """Return foreground and background of each level, [2, N, H, W]."""
        dtype = torch.promote_types(teacher.fpn[0].dtype, torch.float32)  # 1 / #positions underflows in half precision
        boxes = [target["boxes"].to(teacher.fpn[0].device, dtype) for target in targets]
        levels = zip(self.strides, teacher.fpn[: self.levels], strict=True)
        return [torch.stack([split_positions(b, stride, t.shape[2:]) for b in boxes], dim=1) for stride, t in levels]

    def maps(self, student, teacher, targets) -> dict[str, list[Tensor]]:
        """Return maps by name, a list over levels of [N, H, W]; the attentions are spatial."""
        foregrounds, backgrounds = map(list, zip(*self.regions(teacher, targets)))
        adapted = [adapter(s) for adapter, s in zip(self.adapters, student.fpn)]
        return {
            "foreground": foregrounds,
            "background": backgrounds,
            "attention teacher": [attentions(t, self.temperature)[0] for _, t in zip(self.strides, teacher.fpn)],
            "attention student": [attentions(s, self.temperature)[0] for s in adapted],
        }
