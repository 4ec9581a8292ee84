"""SSIM: "Structural Knowledge Distillation for Object Detection", NeurIPS 2022, https://arxiv.org/abs/2211.13133.

An l1 or l2 distance compares two feature maps number by number, as if neighbours had nothing to do with each other; a
few large activations decide it, and an edge moved by one position costs as much as an edge lost. Image compression met
the same trouble and answered with the structural similarity index, SSIM: look at both maps through a small window and
compare mean (luminance), spread (contrast) and correlation (structure) of what is inside. Maps are first stretched to
[0, 1], student and teacher each by its own minimum and maximum. mu, var and cov are weighted by a Gaussian around each
position, channel by channel; std is the root of var; C1, C2, C3 keep the fractions finite.

    luminance = (2 mu_s mu_t + C1) / (mu_s^2 + mu_t^2 + C1)
    contrast  = (2 std_s std_t + C2) / (var_s + var_t + C2)
    structure = (cov + C3) / (std_s std_t + C3)                           negative where one map rises, the other falls
    ssim      = luminance^alpha * contrast^beta * structure^gamma         all exponents 1, else for ablations

    loss = loss_weight * sum_l  mean_{n,c,p} (1 - ssim(stretch(adapter_l(student_l)), stretch(teacher_l))) / 2

A level costs 0 for equal maps, about 0.5 for unrelated ones, at most 1. Each process takes the mean over its own batch.
There is no final public code. The paper points to kornia's ssim_loss: this formula with all exponents 1, plus 1e-12 in
the denominator and a clamp to 0..1, neither of which shows. An early prototype, https://github.com/PhilipdeRijk/KD at
2d8a87b, compares unstretched maps in a window of 3; we follow the paper. Our reading: one minimum and maximum per image
and level, over channels and positions; normalize="channel" takes one per channel. Where a level is too small to be
mirrored at its border (for window 11, a shorter side below 6), the window shrinks. At 1x1 only luminance is left of
ssim, and nothing at all with normalize="channel". structure can be negative, which only a whole gamma allows.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

LOSS_WEIGHT = {"retinanet": 4.0, "fcos": 4.0, "faster_rcnn": 2.0}  # paper: 2 or 4, little between them; split is ours

C1, C2 = 0.01**2, 0.03**2  # SSIM's usual constants for values in 0..1
C3 = C2 / 2  # the choice with which contrast * structure = (2 cov + C2) / (var_s + var_t + C2)


def stretch(features: Tensor, normalize: str = "image") -> Tensor:
    """Map features [N, C, H, W] to 0..1 by their own minimum and maximum; a constant map gives 0.

    Args:
        features: any range; gradients flow through the minimum and maximum too.
        normalize: "image" for one pair per image, over (C, H, W); "channel" for one per image and channel, over (H, W).

    Raises:
        ValueError: normalize is neither.
    """
    if normalize not in ("image", "channel"):
        raise ValueError(f'normalize must be "image" or "channel", not {normalize!r}')
    dims = (1, 2, 3) if normalize == "image" else (2, 3)
    low, high = features.amin(dim=dims, keepdim=True), features.amax(dim=dims, keepdim=True)
    # Not an epsilon: dividing a constant map by it would send gradients of 1 / epsilon to the student.
    return (features - low) / (high - low).masked_fill(high == low, 1)


def blur(x: Tensor, window: int, sigma: float) -> Tensor:
    """Gaussian mean around each position of x [N, C, H, W], mirrored at the border; same shape.

    Rows, then columns: 2 * window products a position in place of window^2. A window too wide for x to be mirrored
    shrinks to 2 * min(H, W) - 1 at the same sigma.

    Raises:
        ValueError: window is not odd and positive.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window must be odd and positive, not {window}")
    C, H, W = x.shape[1:]
    radius = min(window // 2, H - 1, W - 1)
    taps = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device).square().div(-2 * sigma**2).softmax(dim=0)
    # A variance is the small difference of two of these means. Autocast would round them to half precision, and cuDNN,
    # which takes over where the layout is channels_last, to TF32. On a CPU channels_last is twice as fast.
    layout = torch.channels_last if x.device.type == "cpu" else torch.contiguous_format
    with torch.autocast(x.device.type, enabled=False):
        x = pad(x.contiguous(memory_format=layout), (radius,) * 4, mode="reflect")
        x = conv2d(x, taps.view(1, 1, 1, -1).expand(C, 1, 1, -1), groups=C)
        return conv2d(x, taps.view(1, 1, -1, 1).expand(C, 1, -1, 1), groups=C)


def ssim_map(
    student: Tensor,
    teacher: Tensor,
    window: int = 11,
    sigma: float = 1.5,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: int = 1,
) -> Tensor:
    """Structural similarity of each position and channel, [N, C, H, W] in -1..1.

    Args:
        student: [N, C, H, W] in 0..1, float32 or float64.
        teacher: the same, a constant.
        window: width of the Gaussian window in positions, odd.
        sigma: its standard deviation in positions.
        alpha: exponent of luminance; 0 switches a component off.
        beta: exponent of contrast.
        gamma: exponent of structure, a whole number. An even one forgives a reversed map.

    Raises:
        ValueError: shapes do not agree, or exponents are negative or all 0, or gamma is not whole.
    """
    if student.shape != teacher.shape or student.dim() != 4:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must agree, [N, C, H, W]")
    if min(alpha, beta, gamma) < 0 or alpha == beta == gamma == 0 or gamma != int(gamma):
        raise ValueError(f"alpha, beta and gamma must be at least 0, not all 0, gamma whole: {alpha}, {beta}, {gamma}")
    teacher = teacher.detach()
    mu_s, mu_t = blur(student, window, sigma), blur(teacher, window, sigma)
    product, squares = mu_s * mu_t, mu_s.square() + mu_t.square()
    cov = blur(student * teacher, window, sigma) - product
    var_sum = blur(student.square() + teacher.square(), window, sigma) - squares  # var_s + var_t

    luminance = (2 * product + C1) / (squares + C1)
    if alpha == beta == gamma == 1:
        return luminance * (2 * cov + C2) / (var_sum + C2)
    var_t = blur(teacher.square(), window, sigma) - mu_t.square()
    # Rounding can push a variance below 0, and at 0 the root has no finite slope.
    var_s, var_t = (var_sum - var_t).clamp(min=0) + 1e-12, var_t.clamp(min=0) + 1e-12
    std_product = var_s.sqrt() * var_t.sqrt()
    contrast = (2 * std_product + C2) / (var_s + var_t + C2)
    structure = (cov + C3) / (std_product + C3)
    components = ((luminance, alpha), (contrast, beta), (structure, gamma))
    return math.prod(component**exponent for component, exponent in components if exponent)


def dissimilarity(student: Tensor, teacher: Tensor, normalize: str = "image", **ssim) -> Tensor:
    """Mean over channels of (1 - ssim) / 2 at each position, [N, H, W] in 0..1, of the stretched maps.

    Args:
        student: adapted student features [N, C, H, W], any range.
        teacher: teacher features [N, C, H, W], a constant.
        normalize: "image" or "channel", see `stretch`.
        **ssim: window, sigma and exponents of `ssim_map`, which also says what it refuses.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
    similarity = ssim_map(stretch(student, normalize), stretch(teacher, normalize), **ssim)
    # Not a mean over channels: its gradient loses channels_last, and what follows in the backward pass is 7 x slower.
    return (1 - similarity.sum(dim=1) / similarity.shape[1]) / 2


def ssim_loss(student: Tensor, teacher: Tensor, normalize: str = "image", **ssim) -> Tensor:
    """Mean over images and positions of `dissimilarity`, which takes the same arguments."""
    return dissimilarity(student, teacher, normalize, **ssim).mean()


def at_least_float32(x: Tensor) -> Tensor:
    """Lift half precision to float32, as under autocast; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class SSIM(nn.Module):
    """Structural distillation of the FPN features.

    Args:
        detector: "retinanet", "fcos" or "faster_rcnn"; chooses the default weight.
        student_channels, teacher_channels: of the pyramid levels.
        strides: one per pyramid level; only their number matters here.
        alpha, beta, gamma, window, sigma: see `ssim_map`; the defaults are the paper's.
        loss_weight: weight of the sum over levels.
        normalize: what is stretched to 0..1 as one: "image", a level of an image, or "channel", each channel of it.
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
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: int = 1,
        window: int = 11,
        sigma: float = 1.5,
        loss_weight: float | None = None,
        normalize: str = "image",
        adapter: bool = False,
    ):
        super().__init__()
        self.ssim = {"alpha": alpha, "beta": beta, "gamma": gamma, "window": window, "sigma": sigma}
        self.loss_weight = LOSS_WEIGHT[detector] if loss_weight is None else loss_weight
        self.normalize = normalize
        adapted = adapter or student_channels != teacher_channels
        self.adapters = nn.ModuleList(
            nn.Conv2d(student_channels, teacher_channels, 1) if adapted else nn.Identity() for _ in strides
        )

    def forward(self, student, teacher, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return loss_ssim_fpn, weighted and summed over levels.

        Args:
            student: has fpn, a list over levels of [N, C, H, W].
            teacher: the same, constants.
            targets: not read.
        """
        pairs = zip(self.adapters, student.fpn, teacher.fpn)
        loss = sum(ssim_loss(adapter(s), t, self.normalize, **self.ssim) for adapter, s, t in pairs)
        return {"loss_ssim_fpn": self.loss_weight * loss}

    def maps(self, student, teacher, targets) -> dict[str, list[Tensor]]:
        """Return "dissimilarity" of each level by name, [N, H, W] in 0..1, whose means are what `forward` sums."""
        pairs = zip(self.adapters, student.fpn, teacher.fpn)
        return {"dissimilarity": [dissimilarity(adapter(s), t, self.normalize, **self.ssim) for adapter, s, t in pairs]}
