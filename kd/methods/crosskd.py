"""CrossKD: "Cross-Head Knowledge Distillation for Object Detection", CVPR 2024, https://arxiv.org/abs/2306.11369.

A student that imitates its teacher's predictions and is trained on the ground truth has to serve two masters, who often
disagree. CrossKD gives each its own predictions: the student's features in the middle of its head go through the rest
of the teacher's head, and what comes out is compared with the teacher's predictions. The student's last layers learn
from the ground truth only.

    h = (h_s - mean(h_s)) / (std(h_s) + 1e-6) * std(h_t) + mean(h_t)                                                (1)
    x_cls, x_reg = the rest of the teacher's head, for h of its classification and of its regression tower
    cls = cls_weight / P * sum_{n,a,k,p} |sigmoid(x_cls) - q|^beta * BCE(x_cls, q)       q = sigmoid(logit_t)       (2)
    reg = reg_weight / W * sum_{n,a,p}  max_k q * distance(x_reg, regression_t)                                     (3)

Where:
    h_s and h_t are the outputs of a block of a tower before its ReLU: the third of four, for FCOS the second. mean and
    std run over the images of this process and the positions of a level, for each channel.
    distance is 1 - GIoU of the boxes for RetinaNet, -log IoU for FCOS, and for GFL the Kullback-Leibler divergence of
    the edge distributions, KL(p_t || p_x), summed over bins and averaged over the four edges.
    P counts the anchors that the student's detector assigns to ground-truth boxes, at least 1 an image, over the images
    of this process. W is the sum of max_k q for GFL, else P. Positions p of all levels, anchors and classes are summed.
    The gradient passes through the teacher's layers, which do not change, to h_s, also through (1).

Reference code: https://github.com/jbwang1997/CrossKD at 87e156a. It leaves out anchors that reach outside the image,
averages P and W over processes, and divides both losses of FCOS by the sum of its centre-ness targets, which is smaller
than P. The authors' FCOS takes the exponential of its regression, torchvision's a ReLU, so that its boxes may be empty:
then IoU counts as 1e-6, without gradient.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, kl_div
from torchvision.ops import generalized_box_iou_loss

# block, cls_weight, reg_weight: reference code
DEFAULTS = {"retinanet": (2, 1.0, 1.0), "fcos": (1, 0.4, 0.75), "gfl": (2, 1.0, 4.0)}


def align(student: Tensor, teacher: Tensor) -> Tensor:
    """Give the student's features, [N, C, H, W], the mean and standard deviation of each channel of the teacher's.

    A constant channel of the student becomes the teacher's mean, without gradient.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must agree, [N, C, H, W]")
    dims, values = (0, 2, 3), teacher[:, 0].numel()  # of a channel
    (std_s, mean_s), (std_t, mean_t) = (
        torch.std_mean(x, dims, correction=min(1, values - 1), keepdim=True) for x in (student, teacher.detach())
    )
    scale = torch.where(std_s > 0, std_t / (std_s + 1e-6), 0.0)
    return (student - mean_s) * scale + mean_t  # (1)


def crosskd_cls_loss(cross_logits: Tensor, teacher_logits: Tensor, beta: float) -> Tensor:
    """Return the sum in (2) over all elements, for logits [N, A, K, H, W] of one level, the teacher's a constant."""
    if cross_logits.shape != teacher_logits.shape:
        raise ValueError(f"logits {tuple(cross_logits.shape)} and {tuple(teacher_logits.shape)} must agree")
    target = teacher_logits.detach().sigmoid()
    loss = binary_cross_entropy_with_logits(cross_logits, target, reduction="none")
    return ((cross_logits.sigmoid() - target).abs() ** beta * loss).sum()  # (2)


def iou_loss(boxes: Tensor, others: Tensor) -> Tensor:
    """Return -log IoU, [...], of boxes [..., 4] with the others, pair by pair; an IoU below 1e-6 counts as that."""
    low, high = torch.maximum(boxes[..., :2], others[..., :2]), torch.minimum(boxes[..., 2:], others[..., 2:])
    intersection = (high - low).clamp(min=0).prod(dim=-1)
    areas = sum((b[..., 2:] - b[..., :2]).prod(dim=-1) for b in (boxes, others))
    return -(intersection / (areas - intersection).clamp(min=1e-6)).clamp(min=1e-6).log()


def edge_divergence(cross: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(p_t || p_x), [...]: sum over bins, mean over edges, for logits of distributions [..., 4, BINS]."""
    log_x, log_t = cross.log_softmax(dim=-1), teacher.log_softmax(dim=-1)
    return kl_div(log_x, log_t, reduction="none", log_target=True).sum(dim=-1).mean(dim=-1)


def count_positives(positive: list[Tensor]) -> Tensor:
    """Return P, 0-dimensional, for levels of booleans [N, A, H, W]."""
    per_image = torch.stack([level.flatten(1).sum(dim=1) for level in positive]).sum(dim=0)  # [N]
    return per_image.clamp(min=1).sum()


class CrossKD(nn.Module):
    """Distillation of the predictions that the teacher's head makes of the student's features.

    Args:
        detector: "retinanet", "fcos" or "gfl"; chooses the distance and the defaults.
        student_channels, teacher_channels: of the towers. If they differ, a 1x1 convolution adapts each (our reading).
        strides: not used.
        block: whose output is handed over, counted from 0.
        cls_weight, reg_weight, beta: of (2) and (3), and the exponent in (2).

    Example::

        # The rest of both branches of the teacher's head, from the ReLU of a block on; here it is the last.
        cls_rest, reg_rest = (nn.Sequential(nn.ReLU(), nn.Conv2d(16, n, 3, padding=1)) for n in (80, 4 * 17))
        features_s, features_t = torch.randn(2, 2, 16, 20, 30)  # output of that block before its ReLU, of one level
        student = SimpleNamespace(cls_before_relu=[[features_s]], reg_before_relu=[[features_s]],
                                  positive=[torch.rand(2, 1, 20, 30) > 0.9])
        teacher = SimpleNamespace(cls_before_relu=[[features_t]], reg_before_relu=[[features_t]],
                                  cls_logits=[torch.randn(2, 1, 80, 20, 30)],
                                  edge_logits=[torch.randn(2, 1, 4, 17, 20, 30)],
                                  finish_cls=lambda h, block, level: cls_rest(h)[:, None],
                                  finish_reg=lambda h, block, level: reg_rest(h).unflatten(1, (1, 4, 17)))
        losses = CrossKD("gfl", 16, 16, (8,), block=0)(student, teacher, targets=[])  # {"loss_crosskd_cls": ..., ...}
    """

    needs = ("cls_logits", "positive", "cls_before_relu", "reg_before_relu", "finish_cls", "finish_reg")
    needs += ("edge_logits", "boxes", "decode")  # of GFL; of RetinaNet and FCOS
    warmup = 0

    def __init__(
        self,
        detector: str,
        student_channels: int,
        teacher_channels: int,
        strides: tuple[int, ...],
        *,
        block: int | None = None,
        cls_weight: float | None = None,
        reg_weight: float | None = None,
        beta: float = 1.0,
    ):
        super().__init__()
        if detector not in DEFAULTS:
            raise ValueError(f"CrossKD needs two towers of a dense head, which {detector} does not have")
        defaults = DEFAULTS[detector]
        self.block = defaults[0] if block is None else block
        self.cls_weight = defaults[1] if cls_weight is None else cls_weight
        self.reg_weight = defaults[2] if reg_weight is None else reg_weight
        self.detector, self.beta = detector, beta
        adapt = student_channels != teacher_channels
        self.cls_adapter = nn.Conv2d(student_channels, teacher_channels, 1) if adapt else nn.Identity()
        self.reg_adapter = nn.Conv2d(student_channels, teacher_channels, 1) if adapt else nn.Identity()

    def forward(self, student, teacher, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return loss_crosskd_cls and loss_crosskd_reg, weighted and summed over levels.

        Args:
            student: has, for each level, cls_before_relu and reg_before_relu, lists over blocks of [N, C, H, W], and
                positive [N, A, H, W], whether an anchor is assigned to a ground-truth box.
            teacher: has the same towers, cls_logits [N, A, K, H, W], and for GFL edge_logits [N, A, 4, BINS, H, W],
                else boxes [N, A, 4, H, W] in xyxy. finish_cls(features, block, level) and finish_reg run the rest of
                its head on features [N, C, H, W] that take the place of cls_before_relu[level][block]; they return what
                has the shape of cls_logits, and of edge_logits or of box regression. decode(regression, level) returns
                boxes. All are constants, but finish_cls and finish_reg let gradients through.
            targets: not used.
        """
        if len(student.positive) != len(teacher.cls_logits):
            raise ValueError(f"{len(student.positive)} levels of the student, {len(teacher.cls_logits)} of the teacher")
        cls = reg = total = 0
        for level, logits in enumerate(teacher.cls_logits):
            cross_logits, cross_regression = self.cross(student, teacher, level)
            cls += crosskd_cls_loss(cross_logits, logits, self.beta)
            weight = logits.detach().sigmoid().amax(dim=2)  # [N, A, H, W]
            reg += (weight * self.distance(cross_regression, teacher, level)).sum()  # (3)
            total += weight.sum()
        P = count_positives(student.positive)
        W = total.clamp(min=torch.finfo(total.dtype).tiny) if self.detector == "gfl" else P
        return {"loss_crosskd_cls": self.cls_weight * cls / P, "loss_crosskd_reg": self.reg_weight * reg / W}

    def cross(self, student, teacher, level: int) -> tuple[Tensor, Tensor]:
        """Return what the teacher's head makes of the student's features on a level: class logits and regression."""
        blocks = len(teacher.cls_before_relu[level])
        if self.block >= blocks:
            raise ValueError(f"block={self.block}, counted from 0, but the towers have {blocks} blocks")
        dtype = teacher.cls_logits[level].dtype  # towers are bfloat16 under autocast
        h_s = student.cls_before_relu[level][self.block], student.reg_before_relu[level][self.block]
        h_t = teacher.cls_before_relu[level][self.block], teacher.reg_before_relu[level][self.block]
        adapted = self.cls_adapter(h_s[0]).to(dtype), self.reg_adapter(h_s[1]).to(dtype)
        aligned = [align(s, t.to(dtype)) for s, t in zip(adapted, h_t)]
        return (
            teacher.finish_cls(aligned[0], self.block, level),
            teacher.finish_reg(aligned[1], self.block, level),
        )

    def distance(self, cross_regression: Tensor, teacher, level: int) -> Tensor:
        """Return the distance of (3), [N, A, H, W]."""
        if self.detector == "gfl":
            cross, predicted = cross_regression, teacher.edge_logits[level].detach()
        else:
            cross, predicted = teacher.decode(cross_regression, level), teacher.boxes[level].detach()
        if cross.shape != predicted.shape:
            raise ValueError(f"the teacher predicts {tuple(predicted.shape)}, its finish_reg {tuple(cross.shape)}")
        if self.detector == "gfl":
            return edge_divergence(*(x.permute(0, 1, 4, 5, 2, 3) for x in (cross, predicted)))
        distance = iou_loss if self.detector == "fcos" else generalized_box_iou_loss
        return distance(cross.movedim(2, -1), predicted.movedim(2, -1))

    def maps(self, student, teacher, targets) -> dict[str, list[Tensor]]:
        """Return "score teacher", which weights (3), and "score cross", [N, H, W] in 0..1, lists over levels."""
        crosses = [self.cross(student, teacher, level)[0] for level in range(len(teacher.cls_logits))]
        return {
            "score teacher": [logits.sigmoid().amax(dim=(1, 2)) for logits in teacher.cls_logits],
            "score cross": [logits.sigmoid().amax(dim=(1, 2)) for logits in crosses],
        }
