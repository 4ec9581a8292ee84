"""SSIM: "Structural Knowledge Distillation for Object Detection", NeurIPS 2022, https://arxiv.org/abs/2211.13133.

An l1 or l2 distance compares two feature maps value by value and ignores how neighbours relate. A few large activations
dominate it, and an edge shifted by one position costs as much as a missing edge. The structural similarity index, known
from image compression, compares the maps through a small window instead: their mean (luminance), spread (contrast) and
correlation (structure) in it. Each map is first normalised to [0, 1] by its own minimum and maximum.

    luminance(s, t)          = (2 mu_s mu_t + C1) / (mu_s^2 + mu_t^2 + C1)                                  (1)
    contrast_structure(s, t) = (2 cov + C2) / (var_s + var_t + C2)                                          (2)
    loss = loss_weight * sum_l  mean_{n,c,p}  (1 - luminance * contrast_structure) / 2                      (3)

Where:
    s = normalize(adapter_l(student_l)) and t = normalize(teacher_l), adapter_l an optional 1x1 convolution.
    mu, var and cov are mean, variance and covariance in a Gaussian window of 11x11 positions around each position,
    channel by channel. cov may be negative.
    (2) is SSIM's contrast (2 std_s std_t + C2) / (var_s + var_t + C2) times its structure (cov + C2/2) /
    (std_s std_t + C2/2).
    (3) averages over this process's images. A level costs 0 for equal maps, about 0.5 for unrelated maps, at most 1.

There is no final public code. The paper refers to kornia's ssim_loss, the same up to an epsilon of 1e-12. An early
prototype, https://github.com/PhilipdeRijk/KD at 2d8a87b, compares maps without normalisation in a window of 3;
we follow the paper. Our reading: minimum and maximum are taken per image and level, over channels and positions;
normalize="channel" takes them per channel. On levels too small to be mirrored at the border (a side below 6), the
window shrinks; with a side of 1 only luminance remains.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

LOSS_WEIGHT = {"retinanet": 4.0, "fcos": 4.0, "gfl": 4.0, "faster_rcnn": 2.0}  # paper: 2 or 4; the split is ours
C1, C2 = 0.01**2, 0.03**2  # SSIM's usual constants for values in 0..1


def min_max_normalize(features: Tensor, normalize: str = "image") -> Tensor:
    """Scale features [N, C, H, W] to 0..1 by their own minimum and maximum; constant features become 0.

    Args:
        features: of any range; gradients also flow through minimum and maximum.
        normalize: "image" takes them over (C, H, W) of each image, "channel" over (H, W) of each channel.

    Raises:
        ValueError: normalize is neither.
    """
    if normalize not in ("image", "channel"):
        raise ValueError(f'normalize must be "image" or "channel", not {normalize!r}')
    dims = (1, 2, 3) if normalize == "image" else (2, 3)
    low, high = features.amin(dim=dims, keepdim=True), features.amax(dim=dims, keepdim=True)
    # Adding an epsilon to the denominator would give constant features gradients of 1 / epsilon.
    return (features - low) / (high - low).masked_fill(high == low, 1)


def gaussian_mean(x: Tensor, window: int, sigma: float) -> Tensor:
    """Return the mean of x [N, C, H, W] in a Gaussian window around each position, mirrored at the border.

    The window is separable: a convolution along rows, then one along columns. A window wider than 2 * min(H, W) - 1
    shrinks to that.

    Raises:
        ValueError: window is not odd and positive.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window must be odd and positive, not {window}")
    C, H, W = x.shape[1:]
    radius = min(window // 2, H - 1, W - 1)
    taps = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device).square().div(-2 * sigma**2).softmax(dim=0)
    # A variance is a small difference of two such means. Autocast would round them to half precision, and cuDNN, which
    # computes channels_last convolutions, to TF32. On a CPU channels_last is twice as fast.
    layout = torch.channels_last if x.device.type == "cpu" else torch.contiguous_format
    with torch.autocast(x.device.type, enabled=False):
        x = pad(x.contiguous(memory_format=layout), (radius,) * 4, mode="reflect")
        x = conv2d(x, taps.view(1, 1, 1, -1).expand(C, 1, 1, -1), groups=C)
        return conv2d(x, taps.view(1, 1, -1, 1).expand(C, 1, -1, 1), groups=C)


def ssim_map(student: Tensor, teacher: Tensor, window: int = 11, sigma: float = 1.5) -> Tensor:
    """Return the structural similarity at each position and channel, [N, C, H, W] in -1..1.

    Args:
        student: [N, C, H, W] in 0..1, float32 or float64.
        teacher: the same, a constant.
        window: width of the Gaussian window in positions, odd.
        sigma: standard deviation of the Gaussian in positions.

    Raises:
        ValueError: shapes do not agree.
    """
    if student.shape != teacher.shape or student.dim() != 4:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must agree, [N, C, H, W]")
    teacher = teacher.detach()
    mu_s, mu_t = gaussian_mean(student, window, sigma), gaussian_mean(teacher, window, sigma)
    product, squares = mu_s * mu_t, mu_s.square() + mu_t.square()
    cov = gaussian_mean(student * teacher, window, sigma) - product
    var_sum = gaussian_mean(student.square() + teacher.square(), window, sigma) - squares  # var_s + var_t
    luminance = (2 * product + C1) / (squares + C1)  # (1)
    return luminance * (2 * cov + C2) / (var_sum + C2)  # (2)


def dissimilarity(student: Tensor, teacher: Tensor, normalize: str = "image", **window) -> Tensor:
    """Return the mean over channels of (1 - ssim) / 2 at each position, [N, H, W] in 0..1.

    Args:
        student: adapted features of the student [N, C, H, W], of any range.
        teacher: features of the teacher [N, C, H, W], a constant.
        normalize: as for `min_max_normalize`.
        **window: window and sigma, as for `ssim_map`.
    """
    dtype = torch.promote_types(teacher.dtype, torch.float32)  # half precision rounds the differences away
    student, teacher = student.to(dtype), teacher.detach().to(dtype)
    ssim = ssim_map(min_max_normalize(student, normalize), min_max_normalize(teacher, normalize), **window)
    return (1 - ssim.sum(dim=1) / ssim.shape[1]) / 2  # unlike mean, keeps channels_last in the backward pass


def ssim_loss(student: Tensor, teacher: Tensor, normalize: str = "image", **window) -> Tensor:
    """Return the mean over images and positions of `dissimilarity`; same arguments."""
    return dissimilarity(student, teacher, normalize, **window).mean()


class SSIM(nn.Module):
    """Structural distillation of FPN features.

    Args:
        detector: "retinanet", "fcos", "gfl" or "faster_rcnn"; chooses the default weight.
        student_channels: channels of the student's FPN.
        teacher_channels: channels of the teacher's.
        strides: of the levels, in pixels; only their number matters here.
        window: width of the Gaussian window in positions (paper).
        sigma: standard deviation of the Gaussian in positions (paper).
        loss_weight: weight of the sum over levels.
        normalize: "image" or "channel", see `min_max_normalize`.
        adapter: use a 1x1 convolution per level on the student's side; always used where channels differ.

    Raises:
        ValueError: window, sigma or normalize is invalid.

    Example::

        sizes = [(40, 60), (20, 30)]  # of the levels
        student = SimpleNamespace(fpn=[torch.rand(2, 64, *size) for size in sizes])
        teacher = SimpleNamespace(fpn=[torch.rand(2, 256, *size) for size in sizes])
        ssim = SSIM("fcos", student_channels=64, teacher_channels=256, strides=(8, 16))
        losses = ssim(student, teacher, targets=[])  # {"loss_ssim_fpn": ...}
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
        window: int = 11,
        sigma: float = 1.5,
        loss_weight: float | None = None,
        normalize: str = "image",
        adapter: bool = False,
    ):
        super().__init__()
        if window < 1 or window % 2 == 0 or sigma <= 0:
            raise ValueError(f"window must be odd and positive, sigma positive, not {window} and {sigma}")
        if normalize not in ("image", "channel"):
            raise ValueError(f'normalize must be "image" or "channel", not {normalize!r}')
        self.options = {"normalize": normalize, "window": window, "sigma": sigma}
        self.loss_weight = LOSS_WEIGHT[detector] if loss_weight is None else loss_weight
        adapted = adapter or student_channels != teacher_channels
        self.adapters = nn.ModuleList(
            nn.Conv2d(student_channels, teacher_channels, 1) if adapted else nn.Identity() for _ in strides
        )

    def forward(self, student, teacher, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return loss_ssim_fpn, weighted and summed over levels.

        Args:
            student: has fpn, a list over levels of [N, C, H, W].
            teacher: the same, constants.
            targets: not used.
        """
        levels = zip(self.adapters, student.fpn, teacher.fpn, strict=True)
        loss = sum(ssim_loss(adapter(s), t, **self.options) for adapter, s, t in levels)  # (3)
        return {"loss_ssim_fpn": self.loss_weight * loss}

    def maps(self, student, teacher, targets) -> dict[str, list[Tensor]]:
        """Return "dissimilarity", a list over levels of [N, H, W] in 0..1; `forward` sums its means."""
        levels = zip(self.adapters, student.fpn, teacher.fpn, strict=True)
        return {"dissimilarity": [dissimilarity(adapter(s), t, **self.options) for adapter, s, t in levels]}
