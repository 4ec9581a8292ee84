"""PGD: "Prediction-Guided Distillation for Dense Object Detection", ECCV 2022, https://arxiv.org/abs/2203.05469.

The final detection of an object comes from few positions of a dense detector, which a mask drawn from the annotation
cannot know. PGD asks the teacher: it scores every position by the teacher's prediction for the object, keeps the top_k
best of all levels and fits a Gaussian to them. Such key regions weight the imitation of the first block of the
classification tower and, with another exponent xi, of the regression tower.

    quality(X, b) = [X inside b] * score(X, b)^(1 - xi) * IoU(X, b)^xi                                              (1)
    region(X) = max_b exp(-1/2 (X - mu_b)^T Sigma_b^-1 (X - mu_b))   where X is among the best of b, else 0         (2)
    spatial(f) = HW * softmax_p(mean_c |f| / T)        channel(f) = C * softmax_c(|f| / T)                          (3)
    cls = sum_l mean_n [ lambda_l sum_p (alpha region / #region + beta background / #background) * spatial(t) sum_c D
                         + delta (mean_p sum_c |channel(s) - channel(t)| + sum_p |spatial(s) - spatial(t)|) ]       (4)
    reg = sum_l mean_{key p} [ gamma region * mean_c D + delta sum_c |channel(s) - channel(t)| ]                    (5)

Where:
    s, t are features of student and teacher in a tower's first block on level l, and D = channel(t) * (s - t)^2.
    score(X, b) is the teacher's probability at position X for the class of ground-truth box b, IoU(X, b) the overlap of
    its predicted box with b. With several anchors the best quality counts (our reading).
    mu_b and Sigma_b are mean and covariance of the top_k best positions of b, in pixels. background is 1 inside no box.
    #region and #background count positions that are not 0, per image and level. (4) averages over images, (5) over the
    key positions (region > 0) of all images of this process.

Reference code: https://github.com/ChenhongyiYang/PGD at 81c54d5 (losses/pgd_{cls,reg}.py, pgd_heads/), whose students
inherit neck and heads (--inherit). Two faults are not taken over: broadcasting applies each mask of (4) to every image,
so cls is 1.9 to 3.5 times too large at N = 4, and anchor-free heads swap x and y in [X inside b]. For FCOS, alpha=0.1
and beta=0.05 come near that cls; without the swap, 0.16 and 0.08 do. All heads there test [X inside b] after choosing.
"""

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou


def inside_boxes(positions: Tensor, boxes: Tensor) -> Tensor:
    """Return whether positions [P, 2] lie strictly inside boxes [M, 4], xyxy: booleans [M, P]."""
    return ((positions > boxes[:, None, :2]) & (positions < boxes[:, None, 2:])).all(dim=-1)


def box_quality(cls_logits: Tensor, boxes: Tensor, positions: Tensor, target: dict[str, Tensor], xi: float) -> Tensor:
    """Return the quality of the teacher's predictions in one image for each ground-truth box, [M, P] in 0..1.

    Takes cls_logits [A, K, P], predicted boxes [A, 4, P] in xyxy pixels, and positions [P, 2] in xy pixels.
    """
    (A, _, P), gt_boxes, gt_labels = cls_logits.shape, target["boxes"], target["labels"]
    if boxes.shape != (A, 4, P) or positions.shape != (P, 2) or gt_boxes.shape != (len(gt_labels), 4):
        shapes = [tuple(t.shape) for t in (cls_logits, boxes, positions, gt_boxes, gt_labels)]
        raise ValueError(f"[A, K, P], [A, 4, P], [P, 2], [M, 4] and [M] expected, not {shapes}")
    score = cls_logits.detach()[:, gt_labels].sigmoid().transpose(0, 1)  # [M, A, P]
    boxes = boxes.detach().transpose(1, 2).flatten(0, 1)  # [AP, 4]
    iou = box_iou(gt_boxes.to(boxes.dtype), boxes).view(-1, A, P)
    quality = (score ** (1 - xi) * iou**xi).amax(dim=1)  # [M, P]
    return torch.where(inside_boxes(positions, gt_boxes), quality, 0.0)  # (1)


def key_region(quality: Tensor, positions: Tensor, top_k: int, variance: float = 0.1**2 / 12) -> Tensor:
    """Return the key region of one image, [P] in 0..1, for quality [M, P] and positions [P, 2] in xy pixels.

    Only positions of quality above 0 count. variance, in square pixels, is added to the diagonal of Sigma, which would
    be singular for positions in a row; the default is that of the +-0.05 pixels by which the reference code jitters.
    """
    if quality.ndim != 2 or positions.shape != (quality.shape[1], 2):
        raise ValueError(f"quality {tuple(quality.shape)} must be [M, P], positions {tuple(positions.shape)} [P, 2]")
    best, indices = quality.topk(min(top_k, len(positions)), dim=1)  # [M, K]
    valid = (best > 0).double()
    share = (valid / valid.sum(dim=1, keepdim=True).clamp(min=1))[..., None]  # [M, K, 1]
    xy = positions[indices].double()  # [M, K, 2]
    offset = xy - (share * xy).sum(dim=1, keepdim=True)  # X - mu
    sigma = (share * offset).mT @ offset + variance * torch.eye(2).to(xy)  # [M, 2, 2]
    inverse = torch.linalg.inv_ex(sigma).inverse  # inv would wait for the GPU to check for errors
    weights = (valid * (-0.5 * ((offset @ inverse) * offset).sum(dim=2)).exp()).to(quality.dtype)  # [M, K]
    return quality.new_zeros(len(positions)).scatter_reduce(0, indices.flatten(), weights.flatten(), "amax")  # (2)


def attentions(features: Tensor, T: float) -> tuple[Tensor, Tensor]:
    """Return spatial [N, H, W] and channel [N, C, H, W] attention of features [N, C, H, W]; both have mean 1."""
    N, C, H, W = features.shape
    mean = features.abs().sum(dim=1) / C  # unlike .mean, keeps channels_last in the backward pass: 7 times faster
    return H * W * (mean.flatten(1) / T).softmax(dim=1).view(N, H, W), C * (features.abs() / T).softmax(dim=1)  # (3)


def pgd_cls_loss(student: Tensor, teacher: Tensor, key: Tensor, background: Tensor, delta: float, T: float) -> Tensor:
    """Return the loss of the classification tower on one level: sum over channels, mean over images.

    Takes features [N, C, H, W], the student's adapted, the teacher's a constant, and the weighted masks [N, H, W]
    key = lambda_l * alpha * region and background = lambda_l * beta * background.
    """
    student, teacher = check_features(student, teacher, key, background)
    (spatial_s, channel_s), (spatial_t, channel_t) = attentions(student, T), attentions(teacher, T)
    difference = spatial_t * (channel_t * (student - teacher).square()).sum(dim=1)  # [N, H, W]
    weights = sum(m / (m != 0).sum(dim=(1, 2), keepdim=True).clamp(min=1) for m in (key, background))
    attention = (channel_s - channel_t).abs().sum() / key[0].numel() + (spatial_s - spatial_t).abs().sum()
    return ((weights * difference).sum() + delta * attention) / len(student)  # (4)


def pgd_reg_loss(student: Tensor, teacher: Tensor, region: Tensor, gamma: float, delta: float, T: float) -> Tensor:
    """Return the loss of the regression tower on one level: mean over the key positions of the batch, 0 without any.

    Over channels, squared differences are averaged but attention differences summed. region is [N, H, W].
    """
    student, teacher = check_features(student, teacher, region)
    channel_s, channel_t = attentions(student, T)[1], attentions(teacher, T)[1]
    difference = (channel_t * (student - teacher).square()).sum(dim=1) / student.shape[1]  # [N, H, W]
    is_key = region != 0
    loss = gamma * region * difference + delta * is_key * (channel_s - channel_t).abs().sum(dim=1)
    return loss.sum() / is_key.sum().clamp(min=1)  # (5)


def check_features(student: Tensor, teacher: Tensor, *maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return features in the dtype of the maps, the teacher's detached; raise ValueError unless all shapes agree."""
    if student.shape != teacher.shape or any(m.shape != student[:, 0].shape for m in maps):
        raise ValueError(f"features and maps must agree: {[tuple(t.shape) for t in (student, teacher, *maps)]}")
    return student.to(maps[0].dtype), teacher.detach().to(maps[0].dtype)  # towers are bfloat16 under autocast


class PGD(nn.Module):
    """Prediction-guided distillation of the first blocks of a dense head's towers.

    Args:
        detector: "retinanet", "fcos" or "gfl". Defaults: reference code for FCOS and GFL; RetinaNet as FCOS.
        student_channels, teacher_channels: of the towers. If they differ, a 1x1 convolution adapts each (our reading).
        strides: of the levels; only their number matters, as positions come from the anchors.
        alpha, beta: weights of key regions and background in the classification tower; reference: beta = 0.5 * alpha.
        gamma, delta: weights of key regions in the regression tower (reference: 1.6 * alpha) and of the attentions.
        temperature, level_weights, xi: T, lambda_l, and xi of the classification and the regression tower.

    Example::

        x, y = torch.meshgrid(8.0 * torch.arange(30), 8.0 * torch.arange(20), indexing="xy")
        anchors = torch.stack([x - 16, y - 16, x + 16, y + 16])[None]  # [A, 4, H, W] of one level
        logits, (tower_s, tower_t) = torch.randn(2, 1, 80, 20, 30), torch.rand(2, 2, 256, 20, 30)
        student = SimpleNamespace(cls_tower=[[tower_s]], reg_tower=[[tower_s]])
        teacher = SimpleNamespace(cls_tower=[[tower_t]], reg_tower=[[tower_t]], cls_logits=[logits],
                                  boxes=[anchors.expand(2, 1, 4, 20, 30)], anchors=[anchors])
        target = {"boxes": torch.tensor([[20.0, 30, 90, 80]]), "labels": torch.tensor([1])}
        losses = PGD("fcos", 256, 256, strides=(8,))(student, teacher, [target] * 2)  # {"loss_pgd_cls": ..., ...}
    """

    needs = ("cls_tower", "reg_tower", "cls_logits", "boxes", "anchors")
    warmup = 0

    def __init__(
        self,
        detector: str,
        student_channels: int,
        teacher_channels: int,
        strides: tuple[int, ...],
        *,
        alpha: float = 0.04,
        beta: float = 0.02,
        gamma: float = 0.064,
        delta: float = 0.0008,
        temperature: float = 0.8,
        top_k: int = 30,
        xi: tuple[float, float] = (0.8, 0.6),
        level_weights: tuple[float, ...] = (1.0, 1.25, 1.5, 1.75, 2.0),
    ):
        super().__init__()
        if detector not in ("retinanet", "fcos", "gfl"):
            raise ValueError(f"PGD reads the class logits and towers of a dense head, which {detector} does not have")
        if top_k < 1 or temperature <= 0 or max(xi) > 1 or len(level_weights) < len(strides):
            raise ValueError(f"expected {top_k=} > 0, {temperature=} > 0, {xi=} <= 1, {level_weights=} of all levels")
        self.alpha, self.beta, self.gamma, self.top_k, self.xi = alpha, beta, gamma, top_k, xi
        self.delta, self.temperature, self.level_weights = delta, temperature, level_weights
        adapt = student_channels != teacher_channels
        self.cls_adapter = nn.Conv2d(student_channels, teacher_channels, 1) if adapt else nn.Identity()
        self.reg_adapter = nn.Conv2d(student_channels, teacher_channels, 1) if adapt else nn.Identity()

    def forward(self, student, teacher, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return loss_pgd_cls and loss_pgd_reg, weighted and summed over levels.

        Args:
            student: has cls_tower and reg_tower, for each level a list over blocks of [N, C, H, W].
            teacher: also cls_logits [N, A, K, H, W], boxes [N, A, 4, H, W], anchors [A, 4, H, W], in xyxy pixels.
            targets: for each image boxes [M, 4], xyxy pixels of the resized image, and labels [M], indices into K.
        """
        cls_loss = reg_loss = 0
        levels = zip(student.cls_tower, student.reg_tower, self.regions(teacher, targets), strict=True)
        for level, (cls_s, reg_s, (cls_region, reg_region, background)) in enumerate(levels):
            s, t, weight = self.cls_adapter(cls_s[0]), teacher.cls_tower[level][0], self.level_weights[level]
            key, background = weight * self.alpha * cls_region, weight * self.beta * background
            cls_loss += pgd_cls_loss(s, t, key, background, self.delta, self.temperature)
            s, t = self.reg_adapter(reg_s[0]), teacher.reg_tower[level][0]
            reg_loss += pgd_reg_loss(s, t, reg_region, self.gamma, self.delta, self.temperature)
        return {"loss_pgd_cls": cls_loss, "loss_pgd_reg": reg_loss}

    def regions(self, teacher, targets: list[dict[str, Tensor]]) -> list[Tensor]:
        """Return for each level the key regions of both towers and the background, [3, N, H, W]."""
        positions = torch.cat([(level[0, :2] + level[0, 2:]).flatten(1).T / 2 for level in teacher.anchors])  # [P, 2]
        logits, boxes = (torch.cat([x.flatten(3) for x in maps], dim=3) for maps in (teacher.cls_logits, teacher.boxes))
        images = []
        for z, b, target in zip(logits, boxes, targets, strict=True):
            keys = [key_region(box_quality(z, b, positions, target, xi), positions, self.top_k) for xi in self.xi]
            images.append(torch.stack([*keys, ~inside_boxes(positions, target["boxes"]).any(dim=0)]))  # [3, P]
        levels = torch.stack(images, dim=1).split([x[0, 0].numel() for x in teacher.anchors], dim=2)  # [3, N, HW] each
        return [level.unflatten(2, x.shape[-2:]) for level, x in zip(levels, teacher.anchors)]

    def maps(self, student, teacher, targets) -> dict[str, list[Tensor]]:
        """Return the key regions of both towers by name, a list over levels of [N, H, W] in 0..1."""
        cls_regions, reg_regions, _ = map(list, zip(*self.regions(teacher, targets)))
        return {"classification region": cls_regions, "regression region": reg_regions}
