"""LD: "Localization Distillation for Dense Object Detection", CVPR 2022, https://arxiv.org/abs/2102.12252.

GFL predicts each edge of a box as a distribution over distances, which says how sure it is of the edge, as class scores
do of the class. LD distils these distributions at the positives and, as the teacher also knows where boxes are that
overlap an object but are not assigned to it, in a valuable localization region around them. Classes are distilled at
the positives.

    KL(z_s, z_t; T) = T^2 * mean_i  p_i(z_t) * (log p_i(z_t) - log p_i(z_s))        p(z) = softmax(z / T)           (1)
    main = main_weight * sum_l sum_{positives}  max_k sigmoid(logit_s) * mean_e KL(edge_s, edge_t; T_edge)          (2)
    vlr  = vlr_weight / 4 * sum_l sum_{region}  max_b IoU(anchor, b) * mean_e KL(edge_s, edge_t; T_edge)            (3)
    cls  = cls_weight * sum_l mean_{positives}  KL(logit_s, logit_t; T_cls)                                         (4)
    region = not positive, and gamma * threshold_b <= DIoU(anchor, b) < threshold_b for a ground-truth box b        (5)

Where:
    i are the bins of an edge, or the K classes; e are the four edges; both are averaged. T_edge is edge_temperature,
    T_cls cls_temperature. The weights in (2) and (3) are constants. max_b runs over the boxes for which (5) holds.
    anchors are squares of 8 strides, and threshold_b is that of ATSS: mean plus standard deviation of the IoU of b with
    the 9 nearest anchors of each level.
    (2) and (3) are sums over the images of this process, so they grow with their number, unlike GFL's own losses. That
    is how the published weights were chosen, with 2 or 3 images on a GPU.

Reference code: https://github.com/HikariTJU/LD at 4287990 (losses/kd_loss.py, dense_heads/ld_head.py,
assigners/atss_assigner.py). Its DIoU divides the intersection by the area of the anchor, not by that of the union, so
that its region reaches further into large boxes; this file follows the paper.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from torchvision.ops import box_iou, distance_box_iou

ANCHOR_SIZE, CANDIDATES = 8, 9  # of ATSS: side of an anchor in strides, anchors of a level nearest to a box


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return (1) over the last dimension of logits of one shape, the teacher's a constant."""
    if student.shape != teacher.shape:
        raise ValueError(f"logits {tuple(student.shape)} and {tuple(teacher.shape)} must agree")
    dtype = torch.promote_types(teacher.dtype, torch.float32)  # half precision rounds the differences away
    log_s, log_t = (x.to(dtype).div(temperature).log_softmax(dim=-1) for x in (student, teacher.detach()))
    return temperature**2 * kl_div(log_s, log_t, reduction="none", log_target=True).mean(dim=-1)  # (1)


def valuable_region(anchors: list[Tensor], boxes: Tensor, gamma: float) -> Tensor:
    """Return the weights of (3) in one image, [P] in 0..1, 0 outside the region; positives are not left out yet.

    Args:
        anchors: of each level [P_l, 4], xyxy pixels, of which P_l sum to P.
        boxes: ground truth [M, 4], xyxy pixels.
        gamma: see (5).
    """
    everywhere = torch.cat(anchors)
    if len(boxes) == 0:
        return everywhere.new_zeros(len(everywhere))
    iou = box_iou(everywhere, boxes)  # [P, M]
    candidates = []
    for level, level_iou in zip(anchors, iou.split([len(level) for level in anchors])):
        offset = (level[:, None, :2] + level[:, None, 2:] - boxes[:, :2] - boxes[:, 2:]) / 2
        distance = offset.norm(dim=2)  # [P_l, M]
        nearest = distance.topk(min(CANDIDATES, len(level)), dim=0, largest=False).indices
        candidates.append(level_iou.gather(0, nearest))
    candidates = torch.cat(candidates)
    threshold = candidates.mean(dim=0) + candidates.std(dim=0)  # [M]
    diou = distance_box_iou(everywhere, boxes)
    return iou.where((diou >= gamma * threshold) & (diou < threshold), 0.0).amax(dim=1)  # (5)


class LD(nn.Module):
    """Localization distillation of GFL.

    Args:
        detector: "gfl".
        student_channels, teacher_channels: not used.
        strides: of the levels, in pixels.
        main_weight, vlr_weight, cls_weight: of (2), (3) and (4); the defaults are the reference code's.
        edge_temperature, cls_temperature: of (2) and (3), and of (4).
        gamma: lower end of the region in (5), relative to ATSS's threshold.

    Example::

        x, y = torch.meshgrid(8.0 * torch.arange(30), 8.0 * torch.arange(20), indexing="xy")
        anchors = torch.stack([x - 4, y - 4, x + 4, y + 4])[None]  # [A, 4, H, W] of one level
        (logits_s, logits_t), (edges_s, edges_t) = torch.randn(2, 2, 1, 80, 20, 30), torch.randn(2, 2, 1, 4, 17, 20, 30)
        positive = torch.rand(2, 1, 20, 30) > 0.9
        student = SimpleNamespace(cls_logits=[logits_s], edge_logits=[edges_s], positive=[positive], anchors=[anchors])
        teacher = SimpleNamespace(cls_logits=[logits_t], edge_logits=[edges_t])
        target = {"boxes": torch.tensor([[20.0, 30, 90, 80]]), "labels": torch.tensor([1])}
        losses = LD("gfl", 256, 256, strides=(8,))(student, teacher, [target] * 2)  # {"loss_ld_main": ..., ...}
    """

    needs = ("cls_logits", "edge_logits", "anchors", "positive")
    warmup = 0

    def __init__(
        self,
        detector: str,
        student_channels: int,
        teacher_channels: int,
        strides: tuple[int, ...],
        *,
        main_weight: float = 0.25,
        vlr_weight: float = 0.25,
        cls_weight: float = 10.0,
        edge_temperature: float = 10.0,
        cls_temperature: float = 2.0,
        gamma: float = 0.25,
    ):
        super().__init__()
        if detector != "gfl":
            raise ValueError(f"LD reads the edge distributions of GFL, which {detector} does not have")
        if min(edge_temperature, cls_temperature) <= 0 or gamma > 1:
            raise ValueError(f"expected {edge_temperature=} > 0, {cls_temperature=} > 0 and {gamma=} <= 1")
        self.strides = strides
        self.main_weight, self.vlr_weight, self.cls_weight = main_weight, vlr_weight, cls_weight
        self.edge_temperature, self.cls_temperature, self.gamma = edge_temperature, cls_temperature, gamma

    def forward(self, student, teacher, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return loss_ld_main, loss_ld_vlr and loss_ld_cls, weighted and summed over levels.

        Args:
            student: has, for each level, cls_logits [N, A, K, H, W], edge_logits [N, A, 4, BINS, H, W], anchors
                [A, 4, H, W], xyxy pixels, of which only the centres count, and positive [N, A, H, W], booleans.
            teacher: the first two, constants.
            targets: for each image boxes [M, 4], xyxy pixels of the resized image.
        """
        main = vlr = cls = 0
        for level, region in enumerate(self.regions(student, targets)):
            positive = student.positive[level].to(region)
            edges = (x.edge_logits[level].movedim(3, -1) for x in (student, teacher))  # [N, A, 4, H, W, BINS]
            edge_kl = kl_divergence(*edges, self.edge_temperature).mean(dim=2)  # [N, A, H, W]
            logits = [x.cls_logits[level].movedim(2, -1) for x in (student, teacher)]  # [N, A, H, W, K]
            score = logits[0].detach().sigmoid().amax(dim=-1)
            main += (positive * score * edge_kl).sum()  # (2)
            vlr += (region * edge_kl).sum()  # (3)
            cls_kl = kl_divergence(*logits, self.cls_temperature)
            cls += (positive * cls_kl).sum() / positive.sum().clamp(min=1)  # (4)
        return {
            "loss_ld_main": self.main_weight * main,
            "loss_ld_vlr": self.vlr_weight / 4 * vlr,
            "loss_ld_cls": self.cls_weight * cls,
        }

    def regions(self, student, targets: list[dict[str, Tensor]]) -> list[Tensor]:
        """Return for each level the weights of (3), [N, A, H, W], without positives."""
        boxes = [target["boxes"] for target in targets]  # first: without them, nothing is positive either
        anchors = []
        for level, stride in zip(student.anchors, self.strides, strict=True):
            low, high = level.flatten(2).permute(2, 0, 1).flatten(0, 1).chunk(2, dim=1)  # [HWA, 2] each
            centre, half = (low + high) / 2, ANCHOR_SIZE * stride / 2
            anchors.append(torch.cat([centre - half, centre + half], dim=1))
        if len(targets) != len(student.positive[0]):
            raise ValueError(f"{len(targets)} targets for {len(student.positive[0])} images")
        images = torch.stack([valuable_region(anchors, b, self.gamma) for b in boxes])
        levels = images.split([len(level) for level in anchors], dim=1)
        regions = []
        for level, positive in zip(levels, student.positive):
            _, A, H, W = positive.shape
            level = level.unflatten(1, (H, W, A)).permute(0, 3, 1, 2)
            regions.append(level.where(~positive, 0.0))
        return regions

    def maps(self, student, teacher, targets) -> dict[str, list[Tensor]]:
        """Return "positives" and "valuable region" by name, a list over levels of [N, H, W] in 0..1."""
        regions = [level.amax(dim=1) for level in self.regions(student, targets)]
        return {"positives": [level.amax(dim=1).float() for level in student.positive], "valuable region": regions}
