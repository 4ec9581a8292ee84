"""PGD: "Prediction-Guided Distillation for Dense Object Detection", ECCV 2022, https://arxiv.org/abs/2203.05469.

Few of an object's positions carry its final prediction. A mask drawn from the annotation cannot know which, and teaches
also where the teacher is poor. PGD asks the teacher: for each ground-truth box its prediction at every position is
graded, the best K of all levels are kept, and a Gaussian fitted to them weights the imitation of the first block of
both towers. For position X, box b of class k and the teacher's box_t at X:

    quality(X, b) = [X strictly inside b] * sigmoid(logit_t[k])^(1 - xi) * IoU(box_t, b)^xi                      (Eq. 1)
    region(X) = max_b exp(-1/2 (X - mu_b)^T Sigma_b^-1 (X - mu_b)) on the top K of box b, else 0
    spatial = HW * softmax_p(mean_c |f| / T)    channel = C * softmax_c(|f| / T)    D = channel_t (student - teacher)^2

    cls = sum_l  lambda_l alpha mean_n sum_p (region / #{region != 0} + background / (2 #background)) spatial_t sum_c D
                 + delta mean_n (mean_p sum_c |channel_s - channel_t| + sum_p |spatial_s - spatial_t|)
    reg = sum_l  mean_{region != 0} (gamma region mean_c D + delta sum_c |channel_s - channel_t|)

cls counts per image and level (background: inside no box), then averages over this process's images. reg averages over
a level's key positions in this process's batch: with several processes, one weighs more where its process has few.

Reference code: https://github.com/ChenhongyiYang/PGD at 81c54d5 (losses/pgd_{cls,reg}.py, pgd_heads/). Not copied:
1. Its cls puts every image's mask on every image's difference: about N times the value meant, and alpha was tuned so
   at N = 4. Here is the loss as meant; alpha=0.16 comes near the public size.
2. Its anchor-free in-box test and background read (x, y) as (y, x). Its top K precede the in-box test, part of Eq. 1.
It jitters the top K by +-0.05 px to keep Sigma invertible; here the jitter's variance is added to Sigma's diagonal. Its
anchor-free points lie half a stride off; torchvision centres anchors at (column, row) * stride if strides divide h, w.
Its students start with the teacher's neck and head; ours need not. Our reading: a position's best anchor counts.
"""

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou


def inside_boxes(positions: Tensor, boxes: Tensor) -> Tensor:
    """Return whether positions [P, 2] lie strictly inside boxes [M, 4], xyxy pixels: booleans [M, P]."""
    return ((positions > boxes[:, None, :2]) & (positions < boxes[:, None, 2:])).all(dim=-1)


def box_quality(cls_logits: Tensor, boxes: Tensor, positions: Tensor, target: dict[str, Tensor], xi: float) -> Tensor:
    """Grade a teacher's predictions in one image for each box of its target by Eq. 1, best of anchors: [M, P] in 0..1.

    Takes cls_logits [A, K, P], boxes [A, 4, P] in xyxy pixels and positions [P, 2]; raises ValueError on other shapes.
    Memory is several [M, A, P].
    """
    (A, _, P), gt_boxes, gt_labels = cls_logits.shape, target["boxes"], target["labels"]
    if boxes.shape != (A, 4, P) or positions.shape != (P, 2) or gt_boxes.shape != (len(gt_labels), 4):
        shapes = [tuple(t.shape) for t in (cls_logits, boxes, positions, gt_boxes, gt_labels)]
        raise ValueError(f"[A, K, P], [A, 4, P], [P, 2], [M, 4] and [M] cannot be {shapes}")
    score = at_least_float32(cls_logits.detach()[:, gt_labels]).sigmoid().transpose(0, 1)  # [M, A, P]
    boxes = at_least_float32(boxes.detach()).transpose(1, 2).flatten(0, 1)  # [A * P, 4]
    iou = box_iou(gt_boxes.to(boxes.dtype), boxes).view(-1, A, P)
    return torch.where(inside_boxes(positions, gt_boxes), (score ** (1 - xi) * iou**xi).amax(dim=1), 0.0)


def key_region(quality: Tensor, positions: Tensor, top_k: int, variance: float = 0.1**2 / 12) -> Tensor:
    """Weight one image's positions [P, 2] by the Gaussian of each box's best, maximum over boxes: [P] in 0..1.

    The best are the top_k of each row of quality [M, P], if above 0. variance, the jitter's of the reference code, goes
    on the diagonal of their biased covariance: those in a row span no area. Raises ValueError on other shapes.
    """
    if quality.ndim != 2 or positions.shape != (quality.shape[1], 2):
        raise ValueError(f"quality {tuple(quality.shape)} is not [M, P] for positions {tuple(positions.shape)}, [P, 2]")
    best, indices = quality.topk(min(top_k, len(positions)), dim=1)  # [M, top_k]
    valid = (best > 0).to(best.dtype)
    share = valid / valid.sum(dim=1, keepdim=True).clamp(min=1)
    x, y = (v - (share * v).sum(dim=1, keepdim=True) for v in positions[indices].to(best.dtype).unbind(dim=-1))
    # A square in x plus one in what x leaves of y: float32 would lose the determinant for positions on a diagonal.
    variance_x = (share * x**2).sum(dim=1, keepdim=True) + variance
    slope = (share * x * y).sum(dim=1, keepdim=True) / variance_x
    rest = y - slope * x
    variance_rest = (share * rest**2).sum(dim=1, keepdim=True) + (1 + slope**2) * variance
    weights = valid * (-0.5 * (x**2 / variance_x + rest**2 / variance_rest)).exp()
    return best.new_zeros(len(positions)).scatter_reduce(0, indices.flatten(), weights.flatten(), "amax")


def attentions(features: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the spatial [N, H, W] and channel [N, C, H, W] attention of features [N, C, H, W]; both have mean 1."""
    # Here and below, not a mean over channels: its gradient loses channels_last, and what follows is 7 x slower.
    spatial = (features.abs().sum(dim=1).flatten(1) / features.shape[1] / temperature).softmax(dim=1)
    spatial = spatial * features[0, 0].numel()
    return spatial.view_as(features[:, 0]), (features.abs() / temperature).softmax(dim=1) * features.shape[1]


def pgd_cls_loss(
    student: Tensor, teacher: Tensor, region: Tensor, background: Tensor, alpha: float, delta: float, temperature: float
) -> Tensor:
    """Classification tower of one level: sum over channels, sum over positions weighted per image, mean over images.

    Takes features [N, C, H, W], the teacher's a constant; region in 0..1 and background, 0 or 1, both [N, H, W].
    """
    student, teacher = checked(student, teacher, region, background)
    (spatial_s, channel_s), (spatial_t, channel_t) = attentions(student, temperature), attentions(teacher, temperature)
    difference = spatial_t * (channel_t * (student - teacher).square()).sum(dim=1)  # [N, H, W]
    key, other = (m / (m != 0).sum(dim=(1, 2), keepdim=True).clamp(min=1) for m in (region, background))
    attention = (channel_s - channel_t).abs().sum() / region[0].numel() + (spatial_s - spatial_t).abs().sum()
    return (alpha * ((key + 0.5 * other) * difference).sum() + delta * attention) / len(student)


def pgd_reg_loss(
    student: Tensor, teacher: Tensor, region: Tensor, gamma: float, delta: float, temperature: float
) -> Tensor:
    """Regression tower of one level: mean over the positions of region != 0 in the batch, 0 without any.

    Over channels, the squared difference is a mean and the attention difference a sum. Arguments as above.
    """
    student, teacher = checked(student, teacher, region)
    channel_s, channel_t = attentions(student, temperature)[1], attentions(teacher, temperature)[1]
    difference, chosen = channel_t * (student - teacher).square(), region != 0
    mean = difference.sum(dim=1) / difference.shape[1]
    loss = gamma * region * mean + delta * chosen * (channel_s - channel_t).abs().sum(dim=1)
    return loss.sum() / chosen.sum().clamp(min=1)


def checked(student: Tensor, teacher: Tensor, *maps: Tensor) -> tuple[Tensor, Tensor]:
    """Lift features [N, C, H, W], detach the teacher's; raise ValueError unless they and maps [N, H, W] agree."""
    if student.shape != teacher.shape or any(m.shape != student[:, 0].shape for m in maps):
        raise ValueError(f"features and maps must agree: {[tuple(t.shape) for t in (student, teacher, *maps)]}")
    return at_least_float32(student), at_least_float32(teacher.detach())


def at_least_float32(x: Tensor) -> Tensor:
    """Lift half precision to float32, as under autocast; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class PGD(nn.Module):
    """Prediction-guided distillation of the first blocks of a dense head's two towers.

    Args:
        detector: "retinanet" or "fcos"; defaults are the reference code's for FCOS, for RetinaNet too (our reading).
        student_channels, teacher_channels: of the towers; if they differ, one 1x1 convolution per tower (our reading).
        strides: one per pyramid level, pixels.
        alpha: weight of the classification tower's squared difference; the background has half (reference code).
        gamma: weight of the regression tower's; 1.6 * alpha in every reference configuration.
        delta: weight of the attention differences.
        temperature: of the attentions; 0.4 for AutoAssign.
        top_k: positions per ground-truth box, all levels together; 9 for ATSS.
        xi: share of the IoU in the quality, for the classification and for the regression tower.
        level_weights: lambda_l, at least one per level.
        mask: "predictions", or "boxes" to compare them with: all positions inside a ground-truth box count 1.

    Raises:
        ValueError: a detector without towers, or another mask.
    """

    needs = ("cls_tower", "reg_tower", "cls_logits", "boxes")
    warmup = 0

    def __init__(
        self,
        detector: str,
        student_channels: int,
        teacher_channels: int,
        strides: tuple[int, ...],
        alpha: float = 0.04,
        gamma: float = 0.064,
        delta: float = 0.0008,
        temperature: float = 0.8,
        top_k: int = 30,
        xi: tuple[float, float] = (0.8, 0.6),
        level_weights: tuple[float, ...] = (1.0, 1.25, 1.5, 1.75, 2.0),
        mask: str = "predictions",
    ):
        super().__init__()
        if detector not in ("retinanet", "fcos"):
            raise ValueError(f"PGD reads a dense head's class scores and two towers, which {detector} does not have")
        if mask not in ("predictions", "boxes"):
            raise ValueError(f'mask must be "predictions" or "boxes", not {mask!r}')
        self.mask, self.strides = mask, tuple(strides)
        self.level_weights, self.top_k, self.xi = level_weights, top_k, xi
        self.alpha, self.gamma, self.delta, self.temperature = alpha, gamma, delta, temperature
        same = student_channels == teacher_channels
        self.cls_adapter = nn.Identity() if same else nn.Conv2d(student_channels, teacher_channels, 1)
        self.reg_adapter = nn.Identity() if same else nn.Conv2d(student_channels, teacher_channels, 1)

    def regions(self, teacher, targets: list[dict[str, Tensor]]) -> list[Tensor]:
        """Return of each level [3, N, H, W]: key regions of classification and regression tower, background."""
        sizes = [level.shape[-2:] for level in teacher.cls_logits]
        logits, boxes = (torch.cat([m.flatten(3) for m in maps], dim=3) for maps in (teacher.cls_logits, teacher.boxes))
        cells = [torch.arange(size.numel(), device=boxes.device) for size in sizes]  # row by row
        xy = [torch.stack([c % W, c // W], dim=1) * stride for c, (_, W), stride in zip(cells, sizes, self.strides)]
        xy = torch.cat(xy)  # [P, 2]
        images = []
        for n, target in enumerate(targets):
            inside = inside_boxes(xy, target["boxes"]).any(dim=0)
            if self.mask == "predictions":
                keys = [key_region(box_quality(logits[n], boxes[n], xy, target, xi), xy, self.top_k) for xi in self.xi]
            else:
                keys = [inside.to(boxes)] * len(self.xi)
            images.append(torch.stack([*keys, ~inside]))
        levels = torch.stack(images, dim=1).split([size.numel() for size in sizes], dim=2)  # [3, N, H * W] each
        return [level.unflatten(2, size) for level, size in zip(levels, sizes)]

    def forward(self, student, teacher, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return loss_pgd_cls and loss_pgd_reg, weighted and summed over levels.

        Args:
            student: has cls_tower and reg_tower, over levels and blocks, [N, C, H, W].
            teacher: the same, with cls_logits [N, A, K, H, W] and boxes [N, A, 4, H, W], xyxy pixels; constants.
            targets: boxes [M, 4], xyxy pixels, and labels [M], indices into K; M may be 0.
        """
        cls_loss = reg_loss = 0
        for level, (cls_region, reg_region, background) in enumerate(self.regions(teacher, targets)):
            alpha, rest = self.alpha * self.level_weights[level], (self.delta, self.temperature)
            features_s, features_t = self.cls_adapter(student.cls_tower[level][0]), teacher.cls_tower[level][0]
            cls_loss += pgd_cls_loss(features_s, features_t, cls_region, background, alpha, *rest)
            features_s, features_t = self.reg_adapter(student.reg_tower[level][0]), teacher.reg_tower[level][0]
            reg_loss += pgd_reg_loss(features_s, features_t, reg_region, self.gamma, *rest)
        return {"loss_pgd_cls": cls_loss, "loss_pgd_reg": reg_loss}

    def maps(self, student, teacher, targets) -> dict[str, list[Tensor]]:
        """Return maps of each level by name, [N, H, W] in 0..1; `forward` weights by all but the student's."""
        cls_t, reg_t, background = map(list, zip(*self.regions(teacher, targets)))
        cls_s, reg_s, _ = map(list, zip(*self.regions(student, targets)))
        maps = {"classification region teacher": cls_t, "classification region student": cls_s}
        return maps | {"regression region teacher": reg_t, "regression region student": reg_s, "background": background}
