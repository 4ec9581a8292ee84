"""One explicit forward per detector family that returns what the detector computed.

torchvision's forward returns losses or detections and discards everything else. `forward_detector` takes the same steps
in the same order with torchvision's own modules, and also returns the intermediate results as a DetectorOutput. Given
targets, its losses equal those of `detector(images, targets)` to the last bit in float32.

Under autocast, head outputs are converted to float32. torchvision's box coders round anchors to the dtype of the
predictions: in bfloat16, coordinates near pixel 1000 are multiples of 4. The RPN rounds the ground truth as well, so a
narrow box becomes empty and its regression target nan.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property, partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.fcos import FCOSRegressionHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers

from kd.detectors.backbone import at_least_float32
from kd.detectors.gfl import GFL, GFLRegressionHead, distances

REGRESSION = ("bbox_regression", "edge_logits", "anchors", "boxes")  # attributes from the last layer of that branch


@dataclass
class DetectorOutput:
    """What a detector computed for one batch. Lists run over pyramid levels, finest first.

    FCOS, GFL and RetinaNet have levels P3..P7 and two towers. For Faster R-CNN, with levels P2..P6, everything but fpn
    comes from the RPN: its shared convolution stands for both towers, objectness (K = 1) for the class logits.

    Numbers are float32, except in the towers, which keep the dtype of autocast. What was not computed is None; so are
    towers that were not asked for.

    Attributes:
        fpn: FPN outputs, [N, C, H, W].
        cls_tower: for each level, the outputs of each block (convolution, norm, ReLU) of the classification tower,
            [N, C, H, W].
        reg_tower: the same for the regression tower.
        cls_before_relu: for each level, the outputs of the same blocks before their ReLU, [N, C, H, W]. Dense detectors
            only.
        reg_before_relu: the same for the regression tower.
        cls_logits: [N, A, K, H, W].
        bbox_regression: [N, A, 4, H, W], as torchvision's head returns it: left, top, right, bottom in strides for
            FCOS and GFL, otherwise the deltas of torchvision's BoxCoder.
        edge_logits: GFL's distributions of these four distances, [N, A, 4, BINS, H, W].
        anchors: [A, 4, H, W], xyxy pixels of the padded input, centred on the positions. torchvision places them every
            (image size // map size) pixels, which is less than the stride where the stride does not divide the image.
        box_coder: torchvision's, decodes `bbox_regression`.
        positive: [N, A, H, W], whether an anchor is assigned to a ground-truth box. None without targets.
        finish_cls: finish_cls(features, block, level) runs the rest of the classification branch on features
            [N, C, H, W] that take the place of cls_before_relu[level][block]; returns class logits [N, A, K, H, W].
            Dense detectors only.
        finish_reg: the same for the regression branch; returns bbox_regression, for GFL edge_logits, of the level.
    """

    fpn: list[Tensor]
    cls_tower: list[list[Tensor]] | None = None
    reg_tower: list[list[Tensor]] | None = None
    cls_before_relu: list[list[Tensor]] | None = None
    reg_before_relu: list[list[Tensor]] | None = None
    cls_logits: list[Tensor] | None = None
    bbox_regression: list[Tensor] | None = None
    edge_logits: list[Tensor] | None = None
    anchors: list[Tensor] | None = None
    box_coder: object = None
    positive: list[Tensor] | None = None
    finish_cls: Callable[[Tensor, int, int], Tensor] | None = None
    finish_reg: Callable[[Tensor, int, int], Tensor] | None = None

    @cached_property
    def boxes(self) -> list[Tensor]:
        """Predicted boxes of each level, [N, A, 4, H, W], xyxy pixels of the padded input, not clipped.

        Decoded by torchvision's box coder on first access; differentiable.
        """
        return [self.decode(deltas, level) for level, deltas in enumerate(self.bbox_regression)]

    def decode(self, deltas: Tensor, level: int) -> Tensor:
        """Return the boxes [N, A, 4, H, W] for values of `bbox_regression` on a level."""
        N, A, _, H, W = deltas.shape
        deltas = deltas.permute(0, 3, 4, 1, 2).reshape(-1, 4)  # [NHWA, 4]
        anchors = self.anchors[level].permute(2, 3, 0, 1).reshape(1, -1, 4).expand(N, -1, 4).reshape(-1, 4)  # [NHWA, 4]
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
        needs: names of the DetectorOutput attributes to return; towers, also before ReLU, only if named here.

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

    if targets is not None or needs & {"cls_tower", "cls_before_relu", "cls_logits"}:
        before, cls_tower = _towers(classify.conv, fpn, "cls_before_relu" in needs)
        output.cls_logits = [_cls_logits(classify, blocks[-1], level) for level, blocks in enumerate(cls_tower)]
        output.cls_before_relu = before
        output.cls_tower = cls_tower if "cls_tower" in needs else None
        head_outputs["cls_logits"] = _flatten(output.cls_logits)

    if targets is not None or needs & {*REGRESSION, "reg_tower", "reg_before_relu"}:
        before, reg_tower = _towers(regress.conv, fpn, "reg_before_relu" in needs)
        regression = [_regression(regress, blocks[-1], level) for level, blocks in enumerate(reg_tower)]
        output.bbox_regression = regression
        if isinstance(detector, GFL):
            edges = [level.movedim(3, -1) for level in regression]  # [N, 1, 4, H, W, BINS]
            output.edge_logits, output.bbox_regression = regression, [distances(level) for level in edges]
            head_outputs["edge_logits"] = torch.cat([e.permute(0, 3, 4, 1, 2, 5).flatten(1, 3) for e in edges], dim=1)
        output.reg_before_relu = before
        output.reg_tower = reg_tower if "reg_tower" in needs else None
        head_outputs["bbox_regression"] = _flatten(output.bbox_regression)
        anchors = detector.anchor_generator(images, fpn)
        output.anchors = [level[0] for level in _unflatten(anchors[0][None], output.bbox_regression)]
        output.box_coder = detector.box_coder

    output.finish_cls = partial(_finish, classify.conv, partial(_cls_logits, classify))
    output.finish_reg = partial(_finish, regress.conv, partial(_regression, regress))
    if targets is None:
        return output, {}

    if type(detector) is FCOS:
        centerness = [at_least_float32(regress.bbox_ctrness(blocks[-1])) for blocks in reg_tower]
        head_outputs["bbox_ctrness"] = _flatten([_per_anchor(level, 1) for level in centerness])
    arguments = [targets, head_outputs, anchors]
    if not isinstance(detector, RetinaNet):
        arguments.append([level.shape[2] * level.shape[3] for level in fpn])  # anchors per level
    matched_idxs = _match(detector, *arguments)
    positive = torch.stack(matched_idxs).unsqueeze(2) >= 0
    output.positive = [level.squeeze(2) for level in _unflatten(positive, output.cls_logits)]
    return output, detector.head.compute_loss(targets, head_outputs, anchors, matched_idxs)


def _forward_faster_rcnn(
    detector: FasterRCNN, images: ImageList, targets: list[dict[str, Tensor]] | None, needs: set[str]
) -> tuple[DetectorOutput, dict[str, Tensor]]:
    """Follow GeneralizedRCNN.forward and RegionProposalNetwork.forward."""
    features = detector.backbone(images.tensors)
    fpn = list(features.values())
    output, rpn = DetectorOutput(fpn), detector.rpn
    if targets is None and not needs - {"fpn"}:
        return output, {}

    _, tower = _towers(rpn.head.conv, fpn)
    objectness = [at_least_float32(rpn.head.cls_logits(blocks[-1])) for blocks in tower]
    deltas = [at_least_float32(rpn.head.bbox_pred(blocks[-1])) for blocks in tower]
    anchors = rpn.anchor_generator(images, fpn)
    output.cls_tower = tower if "cls_tower" in needs else None
    output.reg_tower = tower if "reg_tower" in needs else None
    output.cls_logits = [_per_anchor(level, 1) for level in objectness]
    output.bbox_regression = [_per_anchor(level, 4) for level in deltas]
    output.anchors = [level[0] for level in _unflatten(anchors[0][None], output.bbox_regression)]
    output.box_coder = rpn.box_coder
    if targets is None:
        return output, {}

    anchors_per_level = [level[0].numel() for level in objectness]
    flat_objectness, flat_deltas = concat_box_prediction_layers(objectness, deltas)
    proposals = rpn.box_coder.decode(flat_deltas.detach(), anchors).view(len(anchors), -1, 4)
    proposals, _ = rpn.filter_proposals(proposals, flat_objectness, images.image_sizes, anchors_per_level)
    labels, matched_gt_boxes = rpn.assign_targets_to_anchors(anchors, targets)
    positive = torch.stack(labels).unsqueeze(2) >= 1
    output.positive = [level.squeeze(2) for level in _unflatten(positive, output.cls_logits)]
    regression_targets = rpn.box_coder.encode(matched_gt_boxes, anchors)
    loss_objectness, loss_rpn_box_reg = rpn.compute_loss(flat_objectness, flat_deltas, labels, regression_targets)

    _, losses = detector.roi_heads(features, proposals, images.image_sizes, targets)
    return output, {**losses, "loss_objectness": loss_objectness, "loss_rpn_box_reg": loss_rpn_box_reg}


def _towers(
    conv: nn.Sequential, levels: list[Tensor], keep: bool = False
) -> tuple[list[list[Tensor]] | None, list[list[Tensor]]]:
    """Run a tower on each level; return the outputs of its blocks before (None unless `keep`) and after their ReLU."""
    before, after = [[] for _ in levels], [[] for _ in levels]
    for index, level in enumerate(levels):
        for layer in _layers(conv):
            if not isinstance(layer, nn.ReLU):
                level = layer(level)
                continue
            if keep:
                before[index].append(level)
            level = level.relu() if keep else layer(level)  # RetinaNet's ReLU overwrites its input
            after[index].append(level)
    return before if keep else None, after


def _finish(
    conv: nn.Sequential, last: Callable[[Tensor, int], Tensor], features: Tensor, block: int, level: int
) -> Tensor:
    """Run a tower on features [N, C, H, W] from the ReLU of a block on, and then its last layer."""
    layers = _layers(conv)
    relus = [index for index, layer in enumerate(layers) if isinstance(layer, nn.ReLU)]
    features = features.relu()
    for layer in layers[relus[block] + 1 :]:
        features = layer(features)
    return last(features, level)


def _layers(conv: nn.Sequential) -> list[nn.Module]:
    """Return the layers of a tower one by one: torchvision's RetinaNet groups them by block, its FCOS does not."""
    return [layer for layer in conv.modules() if not isinstance(layer, nn.Sequential)]


def _cls_logits(head: nn.Module, features: Tensor, level: int) -> Tensor:
    """Return class logits [N, A, K, H, W] for the output of the tower; every level has the same layer."""
    return _per_anchor(at_least_float32(head.cls_logits(features)), head.num_classes)


def _regression(head: nn.Module, features: Tensor, level: int) -> Tensor:
    """Return box regression [N, A, 4, H, W], or GFL's edge logits [N, 1, 4, BINS, H, W], for the tower's output."""
    if isinstance(head, GFLRegressionHead):
        return at_least_float32(head.edge_logits(features, level)).unsqueeze(1)
    several = isinstance(head.bbox_reg, nn.ModuleList)  # mmdetection's FCOS has a layer for each level
    deltas = at_least_float32((head.bbox_reg[level] if several else head.bbox_reg)(features))
    return _per_anchor(deltas.relu() if isinstance(head, FCOSRegressionHead) else deltas, 4)


def _match(detector: FCOS | RetinaNet, *arguments) -> list[Tensor]:
    """Return for each image the index [HWA] of the ground-truth box of each anchor, negative for none.

    torchvision's compute_loss, whose arguments these are, finds the indices and hands them to the head's compute_loss.
    A stand-in for the head returns them, so that the losses can be computed once they are known.
    """
    head = SimpleNamespace(compute_loss=lambda targets, head_outputs, anchors, matched_idxs: matched_idxs)
    settings = {name: getattr(detector, name, None) for name in ("proposal_matcher", "center_sampling_radius")}
    stand_in = SimpleNamespace(head=head, **settings)
    return type(detector).compute_loss(stand_in, *arguments)


def _per_anchor(maps: Tensor, values: int) -> Tensor:
    """View [N, A * values, H, W] as [N, A, values, H, W]."""
    return maps.unflatten(1, (-1, values))


def _flatten(levels: list[Tensor]) -> Tensor:
    """Concatenate levels of [N, A, values, H, W] to torchvision's [N, sum of HWA, values]."""
    return torch.cat([level.permute(0, 3, 4, 1, 2).flatten(1, 3) for level in levels], dim=1)


def _unflatten(values: Tensor, levels: list[Tensor]) -> list[Tensor]:
    """Split [N, sum of HWA, values] into [N, A, values, H, W], for levels of [_, A, _, H, W]; undoes `_flatten`."""
    shapes = [(level.shape[3], level.shape[4], level.shape[1]) for level in levels]
    parts = values.split([H * W * A for H, W, A in shapes], dim=1)
    return [part.unflatten(1, shape).permute(0, 3, 4, 1, 2) for part, shape in zip(parts, shapes)]
