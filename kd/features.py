"""One explicit forward per detector family that keeps what a distillation method wants to see.

torchvision's own forward returns losses or detections and throws the rest away. `forward_detector` takes the same
steps in the same order, calling torchvision's modules and losses, and returns the intermediate results as a
DetectorOutput. With targets, the losses are bit for bit those of `detector(images, targets)`.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers

CLASSIFICATION = {"cls_tower", "cls_logits"}
REGRESSION = {"reg_tower", "bbox_regression", "boxes"}


@dataclass
class DetectorOutput:
    """What a detector computed for one batch. Lists run over the pyramid levels, finest first.

    Dense detectors have P3..P7 and their two towers; Faster R-CNN has P2..P6, its RPN's shared convolutions as both
    towers, and objectness (K = 1) as class logits. What was not asked for is None.

    Attributes:
        fpn: [N, C, H, W], the pyramid's outputs.
        strides: pixels of the padded input per position, nominal: 2 to the power of the level.
        cls_tower: per level a list over the blocks of the classification tower, each [N, C, H, W].
        reg_tower: the same for the regression tower.
        cls_logits: [N, A, K, H, W].
        bbox_regression: [N, A, 4, H, W], as torchvision's head gives it (FCOS: left, top, right, bottom over the
            stride; else the deltas of torchvision's BoxCoder).
        anchors: [A, 4, H, W], xyxy pixels of the padded input, centred on the positions. torchvision steps them by
            image size // map size, which on levels that do not divide the image is less than the nominal stride.
    """

    fpn: list[Tensor]
    strides: list[int]
    cls_tower: list[list[Tensor]] | None = None
    reg_tower: list[list[Tensor]] | None = None
    cls_logits: list[Tensor] | None = None
    bbox_regression: list[Tensor] | None = None
    anchors: list[Tensor] | None = None
    box_coder: object = None

    @cached_property
    def boxes(self) -> list[Tensor]:
        """Predicted boxes of each level, [N, A, 4, H, W], xyxy pixels of the padded input, unclipped, in float32.

        Decoded by torchvision's own box coder when first asked for; differentiable.
        """
        return [self._decode(deltas, anchors) for deltas, anchors in zip(self.bbox_regression, self.anchors)]

    def _decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        N, A, _, H, W = deltas.shape
        deltas = deltas.permute(0, 3, 4, 1, 2).reshape(-1, 4)
        anchors = anchors.permute(2, 3, 0, 1).reshape(1, -1, 4).expand(N, -1, 4).reshape(-1, 4)
        # RetinaNet's and the RPN's coder has decode_single for one flat set of boxes, FCOS's has only decode.
        decode = getattr(self.box_coder, "decode_single", self.box_coder.decode)
        return decode(deltas, anchors).reshape(N, H, W, A, 4).permute(0, 3, 4, 1, 2)


def forward_detector(
    detector: FCOS | RetinaNet | FasterRCNN,
    images: ImageList,
    targets: list[dict[str, Tensor]] | None = None,
    needs: Collection[str] = (),
) -> tuple[DetectorOutput, dict[str, Tensor]]:
    """Run a detector on transformed images and keep what it computed.

    Args:
        detector: a torchvision detector made by `kd.detectors.build_detector`.
        images: what `detector.transform` returned: normalised, padded [N, 3, h, w] and the sizes before padding.
        targets: transformed targets, boxes [M, 4] xyxy pixels of `images` and labels [M]. Given for a student: the
            whole detector runs and its losses are returned. Not given for a teacher: no losses, no post-processing.
        needs: names of DetectorOutput's attributes; without targets, nothing else is computed.

    Returns:
        The output, and torchvision's losses by torchvision's names (empty without targets).
    """
    features = detector.backbone(images.tensors)
    fpn = list(features.values())
    finest = min(detector.backbone.body_strides)
    output = DetectorOutput(fpn, [finest * 2**level for level in range(len(fpn))])
    if isinstance(detector, FasterRCNN):
        losses = _faster_rcnn(detector, images, features, targets, set(needs), output)
    else:
        losses = _dense(detector, images, targets, set(needs), output)
    if targets is None:  # towers are most of a head's memory, and often only on the way to its logits and boxes
        for tower in {"cls_tower", "reg_tower"} - set(needs):
            setattr(output, tower, None)
    return output, losses


def _dense(
    detector: FCOS | RetinaNet,
    images: ImageList,
    targets: list[dict[str, Tensor]] | None,
    needs: set[str],
    output: DetectorOutput,
) -> dict[str, Tensor]:
    """Run the towers of a dense head into `output`; with targets, return torchvision's losses."""
    classify, regress = detector.head.classification_head, detector.head.regression_head
    head_outputs = {}

    if targets is not None or needs & CLASSIFICATION:
        output.cls_tower = [_tower(classify.conv, feature) for feature in output.fpn]
        logits = [_lift(classify.cls_logits(blocks[-1])) for blocks in output.cls_tower]
        output.cls_logits = [_per_anchor(level, classify.num_classes) for level in logits]
        head_outputs["cls_logits"] = _flatten(output.cls_logits)

    if targets is not None or needs & REGRESSION:
        output.reg_tower = [_tower(regress.conv, feature) for feature in output.fpn]
        deltas = [_lift(regress.bbox_reg(blocks[-1])) for blocks in output.reg_tower]
        if isinstance(detector, FCOS):
            deltas = [nn.functional.relu(level) for level in deltas]
        output.bbox_regression = [_per_anchor(level, 4) for level in deltas]
        head_outputs["bbox_regression"] = _flatten(output.bbox_regression)
        all_anchors = detector.anchor_generator(images, output.fpn)
        output.anchors = _anchors_per_level(all_anchors[0], output.bbox_regression)
        output.box_coder = detector.box_coder

    if targets is None:
        return {}
    if isinstance(detector, RetinaNet):
        return detector.compute_loss(targets, head_outputs, all_anchors)
    centerness = [_lift(regress.bbox_ctrness(blocks[-1])) for blocks in output.reg_tower]
    head_outputs["bbox_ctrness"] = _flatten([_per_anchor(level, 1) for level in centerness])
    return detector.compute_loss(targets, head_outputs, all_anchors, [f.shape[2] * f.shape[3] for f in output.fpn])


def _faster_rcnn(
    detector: FasterRCNN,
    images: ImageList,
    features: dict[str, Tensor],
    targets: list[dict[str, Tensor]] | None,
    needs: set[str],
    output: DetectorOutput,
) -> dict[str, Tensor]:
    """Run the RPN's head into `output`; with targets, also proposals and RoI heads, and return torchvision's losses."""
    if targets is None and not needs & (CLASSIFICATION | REGRESSION):
        return {}
    rpn = detector.rpn
    output.cls_tower = output.reg_tower = [_tower(rpn.head.conv, feature) for feature in output.fpn]
    objectness = [_lift(rpn.head.cls_logits(blocks[-1])) for blocks in output.cls_tower]
    deltas = [_lift(rpn.head.bbox_pred(blocks[-1])) for blocks in output.reg_tower]
    anchors = rpn.anchor_generator(images, output.fpn)
    output.cls_logits = [_per_anchor(level, 1) for level in objectness]
    output.bbox_regression = [_per_anchor(level, 4) for level in deltas]
    output.anchors = _anchors_per_level(anchors[0], output.bbox_regression)
    output.box_coder = rpn.box_coder
    if targets is None:
        return {}

    anchors_per_level = [level[0].numel() for level in objectness]
    flat_objectness, flat_deltas = concat_box_prediction_layers(objectness, deltas)
    proposals = rpn.box_coder.decode(flat_deltas.detach(), anchors).view(len(anchors), -1, 4)
    proposals, _ = rpn.filter_proposals(proposals, flat_objectness, images.image_sizes, anchors_per_level)
    labels, matched_gt_boxes = rpn.assign_targets_to_anchors(anchors, targets)
    regression_targets = rpn.box_coder.encode(matched_gt_boxes, anchors)
    loss_objectness, loss_rpn_box_reg = rpn.compute_loss(flat_objectness, flat_deltas, labels, regression_targets)

    _, losses = detector.roi_heads(features, proposals, images.image_sizes, targets)
    return {**losses, "loss_objectness": loss_objectness, "loss_rpn_box_reg": loss_rpn_box_reg}


def _tower(conv: nn.Sequential, feature: Tensor) -> list[Tensor]:
    """Return the outputs [N, C, H, W] of each block (convolution, norm, ReLU) of a tower."""
    outputs = []
    for block in conv:
        feature = block(feature)
        if not isinstance(block, nn.Conv2d | nn.GroupNorm):  # FCOS lists convolution, norm and ReLU one by one
            outputs.append(feature)
    return outputs


def _lift(x: Tensor) -> Tensor:
    """Turn what a head returns under autocast to float32.

    torchvision's box coders round anchors to the type of the predictions: in bfloat16, boxes near pixel 1000 come in
    steps of 4 pixels, and the RPN passes its type on to the ground truth, where a box narrower than a step becomes
    empty and its regression target nan.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _per_anchor(maps: Tensor, values: int) -> Tensor:
    """View [N, A * values, H, W] as [N, A, values, H, W]."""
    return maps.unflatten(1, (-1, values))


def _flatten(levels: list[Tensor]) -> Tensor:
    """Concatenate levels of [N, A, values, H, W] to torchvision's [N, sum of HWA, values]."""
    return torch.cat([level.permute(0, 3, 4, 1, 2).flatten(1, 3) for level in levels], dim=1)


def _anchors_per_level(anchors: Tensor, levels: list[Tensor]) -> list[Tensor]:
    """Split one image's anchors [sum of HWA, 4] into [A, 4, H, W] like each level of [N, A, 4, H, W]."""
    shapes = [(level.shape[3], level.shape[4], level.shape[1]) for level in levels]
    parts = anchors.split([H * W * A for H, W, A in shapes])
    return [part.view(H, W, A, 4).permute(2, 3, 0, 1) for part, (H, W, A) in zip(parts, shapes)]
