"""GFL, "Generalized Focal Loss" (Li et al., NeurIPS 2020, arXiv 2006.04388), in the manner of torchvision's FCOS.

Two things differ from FCOS. A class score is trained to be the IoU of its box with the ground truth, so there is no
centre-ness. Each edge of a box is not a number but a distribution over distances of 0, 1, ..., 16 strides from the
position, whose mean is the distance. With class logits z, and the distribution p(i) of an edge at a positive position:

    classification = 1/N_pos sum_positions,classes |q - sigmoid(z)|^2 BCE(z, q)                                      (1)
    bbox_regression = 2/W sum_positives w (1 - GIoU)                                                                 (2)
    edge_distribution = 1/(4 W) sum_positives w mean_edges [-(1 - f) log p(i) - f log p(i + 1)]                      (3)

q is the IoU at the class of the assigned box and 0 elsewhere, and i + f, with f in 0..1, the true distance in strides.
w is the largest class probability of the position, W = max(1, sum w), and N_pos counts the positives, at least 1 an
image. q and w are constants, 2 and 1/4 the authors' loss weights. Positives are assigned by ATSS (Zhang et al., CVPR
2020, arXiv 1912.02424), see `atss`.

N_pos and W are those of one process; the authors average them over processes. Positions in the padding of a batch are
negatives, as in torchvision; the authors leave them out.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torchvision.models.detection import FCOS
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSRegressionHead
from torchvision.ops import box_iou, generalized_box_iou_loss

LEVELS = 5
BINS = 17  # distances of 0..16 strides
CANDIDATES = 9  # positions of a level that ATSS considers for a box
ANCHOR_SIZE = 8  # side of ATSS's boxes, in strides


class GFL(FCOS):
    """GFL with the interface of torchvision's FCOS: losses by name in training, detections in evaluation.

    Its anchors are FCOS's, squares of one stride, so that boxes are decoded as FCOS's are.

    Args:
        backbone: returns five maps by name, of strides 8 to 128; has out_channels.
        num_classes: K, including the background class 0.
        options: of torchvision's FCOS, but head.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, *, score_thresh: float = 0.05, **options):
        head = GFLHead(backbone.out_channels, num_classes)
        super().__init__(backbone, num_classes, head=head, score_thresh=score_thresh, **options)

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        num_anchors_per_level: list[int],
    ) -> dict[str, Tensor]:
        """Return losses (1) to (3) of a batch.

        Args:
            targets: boxes [M, 4], xyxy pixels, and labels [M], per image.
            head_outputs: of GFLHead.
            anchors: [P, 4] per image, all levels.
            num_anchors_per_level: they sum to P.
        """
        matched = [atss(a, num_anchors_per_level, target["boxes"]) for a, target in zip(anchors, targets)]
        return self.head.compute_loss(targets, head_outputs, anchors, matched)

    def postprocess_detections(
        self, head_outputs: dict[str, list[Tensor]], anchors: list[list[Tensor]], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Return detections as FCOS does, scored by the class probability alone."""
        # FCOS's sqrt(sigmoid(cls_logits) * sigmoid(bbox_ctrness)) is the class probability where both logits are equal.
        head_outputs = {**head_outputs, "bbox_ctrness": head_outputs["cls_logits"]}
        return super().postprocess_detections(head_outputs, anchors, image_shapes)


class GFLHead(nn.Module):
    """FCOS's two towers; the second ends in the distributions of four edges.

    Args:
        in_channels: of the feature maps.
        num_classes: K, including the background class 0.
    """

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__()
        self.classification_head = FCOSClassificationHead(in_channels, 1, num_classes)
        self.regression_head = GFLRegressionHead(in_channels)

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        """Return cls_logits [N, P, K], edge_logits [N, P, 4, BINS] and bbox_regression [N, P, 4] for maps [N, C, H, W].

        bbox_regression are the distances (left, top, right, bottom) in strides, as FCOS's.
        """
        edges = torch.cat([level.permute(0, 3, 4, 1, 2).flatten(1, 2) for level in self.regression_head(x)], dim=1)
        return {"cls_logits": self.classification_head(x), "edge_logits": edges, "bbox_regression": distances(edges)}

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """Return losses (1) to (3); matched_idxs [P] has the index of the box of each position, -1 for none."""
        logits, edges = head_outputs["cls_logits"], head_outputs["edge_logits"]
        matched, anchors = torch.stack(matched_idxs), torch.stack(anchors)
        image, position = (matched >= 0).nonzero(as_tuple=True)  # of the positives
        labels, boxes = (
            torch.cat([target[key][found[found >= 0]] for target, found in zip(targets, matched)])
            for key in ("labels", "boxes")
        )

        anchors = anchors[image, position]
        stride = anchors[:, 2:3] - anchors[:, 0:1]
        centre = (anchors[:, :2] + anchors[:, 2:]) / 2 / stride
        boxes = boxes / stride  # everything in strides from here
        left_top, right_bottom = distances(edges[image, position]).split(2, dim=1)
        predicted = torch.cat([centre - left_top, centre + right_bottom], dim=1)
        weight = logits[image, position].detach().sigmoid().amax(dim=1)
        total = weight.sum().clamp(min=1)

        quality = torch.zeros_like(logits)
        quality[image, position, labels] = aligned_iou(predicted.detach(), boxes).to(quality)
        positives = sum(max(1, count) for count in (matched >= 0).sum(dim=1).tolist())
        giou_loss = generalized_box_iou_loss(predicted, boxes)
        true = torch.cat([centre - boxes[:, :2], boxes[:, 2:] - centre], dim=1)
        edge_loss = distribution_focal_loss(edges[image, position], true).mean(dim=1)
        return {
            "classification": quality_focal_loss(logits, quality) / positives,  # (1)
            "bbox_regression": 2 * (weight * giou_loss).sum() / total,  # (2)
            "edge_distribution": (weight * edge_loss).sum() / 4 / total,  # (3)
        }


class GFLRegressionHead(FCOSRegressionHead):
    """FCOS's tower, followed by the logits of four distributions, times a learned factor per level.

    Args:
        in_channels: of the feature maps.
    """

    def __init__(self, in_channels: int):
        super().__init__(in_channels, num_anchors=1)
        self.bbox_reg = nn.Conv2d(in_channels, 4 * BINS, kernel_size=3, padding=1)
        nn.init.normal_(self.bbox_reg.weight, std=0.01)
        nn.init.zeros_(self.bbox_reg.bias)
        self.scales = nn.Parameter(torch.ones(LEVELS))
        del self.bbox_ctrness

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        """Return [N, 4, BINS, H, W] of each level."""
        return [self.edge_logits(self.conv(features), level) for level, features in enumerate(x)]

    def edge_logits(self, tower: Tensor, level: int) -> Tensor:
        """Return [N, 4, BINS, H, W] for the output of the tower at a level."""
        return (self.scales[level] * self.bbox_reg(tower)).unflatten(1, (4, BINS))


def distances(edge_logits: Tensor) -> Tensor:
    """Return the means [..., 4], in strides, of distributions given as logits [..., 4, BINS]."""
    bins = torch.arange(BINS, dtype=edge_logits.dtype, device=edge_logits.device)
    return (edge_logits.softmax(dim=-1) * bins).sum(dim=-1)  # no product of matrices: autocast would round it


def quality_focal_loss(logits: Tensor, quality: Tensor) -> Tensor:
    """Return the sum over all elements of (1), for logits and quality of the same shape."""
    cross_entropy = binary_cross_entropy_with_logits(logits, quality, reduction="none")
    return ((quality - logits.sigmoid()).square() * cross_entropy).sum()


def distribution_focal_loss(edge_logits: Tensor, true: Tensor) -> Tensor:
    """Return the cross-entropy [M, 4] of edges [M, 4, BINS] to the two bins around the true distances [M, 4]."""
    true = true.clamp(0, BINS - 1.1)
    below = true.long()
    fraction = true - below
    lower, upper = (
        cross_entropy(edge_logits.flatten(0, 1), bins.flatten(), reduction="none").view_as(true)
        for bins in (below, below + 1)
    )
    return (1 - fraction) * lower + fraction * upper


def aligned_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the IoU [M] of boxes [M, 4] with the others [M, 4], pair by pair."""
    left_top, right_bottom = torch.max(boxes[:, :2], others[:, :2]), torch.min(boxes[:, 2:], others[:, 2:])
    intersection = (right_bottom - left_top).clamp(min=0).prod(dim=1)
    areas = sum((b[:, 2:] - b[:, :2]).prod(dim=1) for b in (boxes, others))
    return intersection / (areas - intersection).clamp(min=1e-6)


def atss(anchors: Tensor, num_anchors_per_level: list[int], boxes: Tensor) -> Tensor:
    """Assign boxes to the positions of an image by ATSS.

    On each level, the CANDIDATES positions nearest to the centre of a box are considered, with squares of ANCHOR_SIZE
    strides. Those with an IoU of at least the mean plus the standard deviation of all of them, and with their centre
    inside the box, are positives. A position with several boxes takes the one of the highest IoU.

    Args:
        anchors: [P, 4], squares of one stride, xyxy pixels.
        num_anchors_per_level: they sum to P.
        boxes: [M, 4], xyxy pixels.

    Returns:
        The index of the box of each position [P], -1 for none.
    """
    if len(boxes) == 0:
        return torch.full((len(anchors),), -1, device=anchors.device)
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    half = (anchors[:, 2:] - anchors[:, :2]) / 2 * ANCHOR_SIZE
    iou = box_iou(torch.cat([centres - half, centres + half], dim=1), boxes)  # [P, M]
    distance = (centres[:, None] - (boxes[:, :2] + boxes[:, 2:]) / 2).norm(dim=2)

    candidates, start = [], 0
    for level in distance.split(num_anchors_per_level):
        candidates.append(level.topk(min(CANDIDATES, len(level)), dim=0, largest=False).indices + start)
        start += len(level)
    candidates = torch.cat(candidates)  # [up to 45, M]
    candidate_iou = iou.gather(0, candidates)
    threshold = candidate_iou.mean(dim=0) + candidate_iou.std(dim=0)
    edges = torch.cat([centres[:, None] - boxes[:, :2], boxes[:, 2:] - centres[:, None]], dim=2)
    positive = torch.zeros_like(iou, dtype=torch.bool).scatter(0, candidates, candidate_iou >= threshold)
    positive &= edges.amin(dim=2) > 0.01

    best, index = iou.where(positive, -1).max(dim=1)
    return index.where(best >= 0, -1)
