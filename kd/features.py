"""One explicit forward per detector family that returns what the detector computed.

torchvision's forward returns losses or detections and discards everything else. `forward_detector` takes the same steps
in the same order with torchvision's own modules, and also returns the intermediate results as a DetectorOutput. Given
targets, its losses equal those of `detector(images, targets)` to the last bit in float32.

Under autocast, head outputs are converted to float32. torchvision's box coders round anchors to the dtype of the
predictions: in bfloat16, coordinates near pixel 1000 are multiples of 4. The RPN rounds the ground truth as well, so a
narrow box becomes empty and its regression target nan.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers

from kd.detectors.backbone import at_least_float32
from kd.detectors.gfl import GFL, distances


@dataclass
class DetectorOutput:
    """What a detector computed for one batch. Lists run over pyramid levels, finest first.

    FCOS, GFL and RetinaNet have levels P3..P7 and two towers. For Faster R-CNN, with levels P2..P6, everything comes
    from the RPN: its shared convolution stands for both towers, objectness (K = 1) for the class logits.

    All tensors are float32, except the towers, which keep the dtype of autocast. What was not computed is None.

    Attributes:
        fpn: FPN outputs, [N, C, H, W].
        cls_tower: for each level, the outputs of each block (convolution, norm, ReLU) of the classification tower,
            [N, C, H, W].
        reg_tower: the same for the regression tower.
        cls_logits: [N, A, K, H, W].
        bbox_regression: [N, A, 4, H, W], as torchvision's head returns it: left, top, right, bottom in strides for
            FCOS and GFL, otherwise the deltas of torchvision's BoxCoder.
        edge_logits: GFL's distributions of these four distances, [N, A, 4, BINS, H, W].
        anchors: [A, 4, H, W], xyxy pixels of the padded input, centred on the positions. torchvision places them every
            (image size // map size) pixels, which is less than the stride where the stride does not divide the image.
        box_coder: torchvision's, decodes `bbox_regression`.
    """

    fpn: list[Tensor]
    cls_tower: list[list[Tensor]] | None = None
    reg_tower: list[list[Tensor]] | None = None
    cls_logits: list[Tensor] | None = None
    bbox_regression: list[Tensor] | None = None
    edge_logits: list[Tensor] | None = None
    anchors: list[Tensor] | None = None
    box_coder: object = None

    @cached_property
    def boxes(self) -> list[Tensor]:
        """Predicted boxes of each level, [N, A, 4, H, W], xyxy pixels of the padded input, not clipped.

        Decoded by torchvision's box coder on first access; differentiable.
        """
        return [self._decode(deltas, anchors) for deltas, anchors in zip(self.bbox_regression, self.anchors)]

    def _decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        N, A, _, H, W = deltas.shape
        deltas = deltas.permute(0, 3, 4, 1, 2).reshape(-1, 4)  # [NHWA, 4]
        anchors = anchors.permute(2, 3, 0, 1).reshape(1, -1, 4).expand(N, -1, 4).reshape(-1, 4)  # [NHWA, 4]
        # decode_single is the version for one flat set of boxes; FCOS's coder has only decode.
        decode = getattr(self.box_coder, "decode_single", self.box_coder.decode)
        return decode(deltas, anchors).reshape(N, H, W, A, 4).permute(0, 3, 4, 1, 2)


def forward_detector(
    detector: FCOS | RetinaNet | FasterRCNN,
    images: ImageList,
    targets: list[dict[str, Tensor]] | None = None,
    needs: Collection[str] = (),
) -> tuple[DetectorOutput, dict[str, Tensor]]:
    """Run a detector on transformed images.

    Args:
        detector: as `kd.detectors.build_detector` returns it.
        images: output of `detector.transform`: normalised, padded [N, 3, h, w] and the sizes before padding.
        targets: transformed targets, boxes [M, 4] in xyxy pixels of `images` and labels [M]. With targets the
            whole detector runs; without, only what `needs` requires.
        needs: names of the DetectorOutput attributes to keep.

    Returns:
        The output, and torchvision's losses by torchvision's names; no losses without targets.
    """
    forward = _forward_faster_rcnn if isinstance(detector, FasterRCNN) else _forward_dense
    return forward(detector, images, targets, set(needs))


def _forward_dense(
    detector: FCOS | RetinaNet, images: ImageList, targets: list[dict[str, Tensor]] | None, needs: set[str]
) -> tuple[DetectorOutput, dict[str, Tensor]]:
    """Follow FCOS.forward, which is GFL's too, and RetinaNet.forward."""
    classify, regress = detector.head.classification_head, detector.head.regression_head
    fpn = list(detector.backbone(images.tensors).values())
    output, head_outputs = DetectorOutput(fpn), {}

    if targets is not None or needs & {"cls_tower", "cls_logits"}:
        cls_tower = [_tower(classify.conv, level) for level in fpn]
        logits = [at_least_float32(classify.cls_logits(blocks[-1])) for blocks in cls_tower]
        output.cls_logits = [_per_anchor(level, classify.num_classes) for level in logits]
        output.cls_tower = cls_tower if "cls_tower" in needs else None
        head_outputs["cls_logits"] = _flatten(output.cls_logits)

    if targets is not None or needs & {"reg_tower", "bbox_regression", "edge_logits", "anchors", "boxes"}:
        reg_tower = [_tower(regress.conv, level) for level in fpn]
        if isinstance(detector, GFL):
            edges = [at_least_float32(regress.edge_logits(b[-1], level)) for level, b in enumerate(reg_tower)]
            deltas = [distances(level.movedim(2, -1)) for level in edges]
            output.edge_logits = [level.unsqueeze(1) for level in edges]
            head_outputs["edge_logits"] = torch.cat([level.permute(0, 3, 4, 1, 2).flatten(1, 2) for level in edges], 1)
        else:
            layers = [regress.bbox_reg] * len(fpn)
            if isinstance(regress.bbox_reg, nn.ModuleList):  # mmdetection's FCOS has one for each level
                layers = regress.bbox_reg
            deltas = [at_least_float32(layer(blocks[-1])) for layer, blocks in zip(layers, reg_tower)]
        if type(detector) is FCOS:
            deltas = [nn.functional.relu(level) for level in deltas]
        output.bbox_regression = [_per_anchor(level, 4) for level in deltas]
        output.reg_tower = reg_tower if "reg_tower" in needs else None
        head_outputs["bbox_regression"] = _flatten(output.bbox_regression)
        anchors = detector.anchor_generator(images, fpn)
        output.anchors = _anchors_per_level(anchors[0], output.bbox_regression)
        output.box_coder = detector.box_coder

    if targets is None:
        return output, {}
    if isinstance(detector, RetinaNet):
        return output, detector.compute_loss(targets, head_outputs, anchors)
    if type(detector) is FCOS:
        centerness = [at_least_float32(regress.bbox_ctrness(blocks[-1])) for blocks in reg_tower]
        head_outputs["bbox_ctrness"] = _flatten([_per_anchor(level, 1) for level in centerness])
    anchors_per_level = [level.shape[2] * level.shape[3] for level in fpn]
    return output, detector.compute_loss(targets, head_outputs, anchors, anchors_per_level)


def _forward_faster_rcnn(
    detector: FasterRCNN, images: ImageList, targets: list[dict[str, Tensor]] | None, needs: set[str]
) -> tuple[DetectorOutput, dict[str, Tensor]]:
    """Follow GeneralizedRCNN.forward and RegionProposalNetwork.forward."""
    features = detector.backbone(images.tensors)
    fpn = list(features.values())
    output, rpn = DetectorOutput(fpn), detector.rpn
    if targets is None and not needs - {"fpn"}:
        return output, {}

    tower = [_tower(rpn.head.conv, level) for level in fpn]
    objectness = [at_least_float32(rpn.head.cls_logits(blocks[-1])) for blocks in tower]
    deltas = [at_least_float32(rpn.head.bbox_pred(blocks[-1])) for blocks in tower]
    anchors = rpn.anchor_generator(images, fpn)
    output.cls_tower = tower if "cls_tower" in needs else None
    output.reg_tower = tower if "reg_tower" in needs else None
    output.cls_logits = [_per_anchor(level, 1) for level in objectness]
    output.bbox_regression = [_per_anchor(level, 4) for level in deltas]
    output.anchors = _anchors_per_level(anchors[0], output.bbox_regression)
    output.box_coder = rpn.box_coder
    if targets is None:
        return output, {}

    anchors_per_level = [level[0].numel() for level in objectness]
    flat_objectness, flat_deltas = concat_box_prediction_layers(objectness, deltas)
    proposals = rpn.box_coder.decode(flat_deltas.detach(), anchors).view(len(anchors), -1, 4)
    proposals, _ = rpn.filter_proposals(proposals, flat_objectness, images.image_sizes, anchors_per_level)
    labels, matched_gt_boxes = rpn.assign_targets_to_anchors(anchors, targets)
    regression_targets = rpn.box_coder.encode(matched_gt_boxes, anchors)
    loss_objectness, loss_rpn_box_reg = rpn.compute_loss(flat_objectness, flat_deltas, labels, regression_targets)

    _, losses = detector.roi_heads(features, proposals, images.image_sizes, targets)
    return output, {**losses, "loss_objectness": loss_objectness, "loss_rpn_box_reg": loss_rpn_box_reg}


def _tower(conv: nn.Sequential, level: Tensor) -> list[Tensor]:
    """Return the outputs [N, C, H, W] of each block (convolution, norm, ReLU) of a tower."""
    outputs = []
    for block in conv:
        level = block(level)
        if not isinstance(block, nn.Conv2d | nn.GroupNorm):  # FCOS lists convolution, norm and ReLU one by one
            outputs.append(level)
    return outputs


def _per_anchor(maps: Tensor, values: int) -> Tensor:
    """View [N, A * values, H, W] as [N, A, values, H, W]."""
    return maps.unflatten(1, (-1, values))


def _flatten(levels: list[Tensor]) -> Tensor:
    """Concatenate levels of [N, A, values, H, W] to torchvision's [N, sum of HWA, values]."""
    return torch.cat([level.permute(0, 3, 4, 1, 2).flatten(1, 3) for level in levels], dim=1)


def _anchors_per_level(anchors: Tensor, levels: list[Tensor]) -> list[Tensor]:
    """Split the anchors of one image [sum of HWA, 4] into [A, 4, H, W], for levels of [N, A, 4, H, W]."""
    shapes = [(level.shape[3], level.shape[4], level.shape[1]) for level in levels]
    parts = anchors.split([H * W * A for H, W, A in shapes])
    return [part.view(H, W, A, 4).permute(2, 3, 0, 1) for part, (H, W, A) in zip(parts, shapes)]
