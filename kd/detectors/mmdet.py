"""Checkpoints of mmdetection's zoo (v2.0) as torchvision's detectors, converted in memory.

RetinaNet, Faster R-CNN, FCOS and GFL on ResNet-50, ResNet-101 and ResNeXt-101 (64x4d) detect here what they detect in
mmdetection, given the same resized image. FCOS's scores, by which its candidates are ranked too, are
sqrt(class * centre-ness) as in torchvision. They differ from our own detectors in anchors
(`kd.detectors.anchors.ExactAnchors`), P6 and P7, RoIAlign, FCOS's regression and centre-ness, and those on ResNets from
Caffe in strides, mean and std.
"""

import re

import torch
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOSHead
from torchvision.ops import poolers, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from kd.detectors.backbone import STRIDES
from kd.detectors.build import build_detector
from kd.detectors.classes import NEVER
from kd.detectors.zoo import zoo_classes

FAMILIES = {  # a tensor that only this one has
    "bbox_head.retina_cls.weight": "retinanet",
    "bbox_head.conv_centerness.weight": "fcos",
    "bbox_head.gfl_cls.weight": "gfl",
    "roi_head.bbox_head.fc_cls.weight": "faster_rcnn",
}
BACKBONES = {(6, 64): "resnet50", (23, 64): "resnet101", (23, 256): "resnext101_64x4d"}  # blocks of layer3, width
NAMES = (
    (r"backbone\.", "backbone.body."),
    (r"neck\.lateral_convs\.(\d)\.conv", r"backbone.fpn.inner_blocks.\1.0"),
    (r"neck\.fpn_convs\.(\d)\.conv", r"backbone.fpn.layer_blocks.\1.0"),
    (r"bbox_head\.cls_convs\.", "head.classification_head.conv."),
    (r"bbox_head\.reg_convs\.", "head.regression_head.conv."),
    (r"bbox_head\.(retina|conv|gfl)_cls", "head.classification_head.cls_logits"),
    (r"bbox_head\.(retina|conv|gfl)_reg", "head.regression_head.bbox_reg"),
    (r"bbox_head\.conv_centerness", "head.classification_head.bbox_ctrness"),
    (r"rpn_head\.rpn_conv", "rpn.head.conv.0.0"),
    (r"rpn_head\.rpn_cls", "rpn.head.cls_logits"),
    (r"rpn_head\.rpn_reg", "rpn.head.bbox_pred"),
    (r"roi_head\.bbox_head\.shared_fcs\.0", "roi_heads.box_head.fc6"),
    (r"roi_head\.bbox_head\.shared_fcs\.1", "roi_heads.box_head.fc7"),
    (r"roi_head\.bbox_head\.fc_cls", "roi_heads.box_predictor.cls_score"),
    (r"roi_head\.bbox_head\.fc_reg", "roi_heads.box_predictor.bbox_pred"),
)


def describe_mmdet(content: dict) -> tuple[str, str] | None:
    """Return detector and timm backbone of a checkpoint or state_dict of mmdetection, None for the content of others.

    Raises:
        ValueError: it is another family or backbone.
    """
    weights = content.get("state_dict", content)
    if not any(name.startswith("neck.") for name in weights):
        return None
    detector = next((family for name, family in FAMILIES.items() if name in weights), None)
    depth = len({name.split(".")[2] for name in weights if name.startswith("backbone.layer3.")})
    width = weights.get("backbone.layer1.0.conv2.weight", torch.empty(0)).shape[0]
    if detector is None or (depth, width) not in BACKBONES:
        raise ValueError(f"not one of mmdetection's {', '.join(FAMILIES.values())} on {', '.join(BACKBONES.values())}")
    return detector, BACKBONES[depth, width]


def load_mmdet(content: dict, image_size: tuple[int, int] = (800, 1333)) -> tuple[nn.Module, dict[int, str]]:
    """Build the detector in a checkpoint of mmdetection.

    Args:
        content: a state_dict, or state_dict and meta, with the text of the configuration and CLASSES, else COCO's.
        image_size: (short side, long side) in pixels that images are resized to.

    Returns:
        The detector in eval mode, and the name of each of its labels, which start from 1.

    Raises:
        ValueError: it is another family or backbone, is configured otherwise than the zoo's, or has other parts.
    """
    detector, backbone = describe_mmdet(content)
    names = content.get("meta", {}).get("CLASSES") or zoo_classes("retinanet_resnet50_fpn").values()
    config, classes = str(content.get("meta", {}).get("config", "")), len(names) + 1
    style = "caffe" if detector == "fcos" and backbone.startswith("resnet") else "pytorch"
    styles = re.findall(r"\bstyle=['\"](\w+)", config)  # the last one counts: it replaces the base's
    if styles[-1:] not in ([], [style]) or re.search("(norm_on_bbox|centerness_on_reg)=True", config):
        raise ValueError(f"a {detector} of mmdetection with settings that are not supported: give one of {style} style")
    model = build_detector(detector, backbone, classes, image_size=image_size, from_scratch=False, anchors="mmdet")
    if detector in ("retinanet", "gfl"):
        model.backbone.fpn.extra_blocks = LinearP6P7(2048 if detector == "retinanet" else 256, 256)
    elif detector == "fcos":
        model.head, model.nms_thresh = ExponentialHead(256, 1, classes), 0.5
    else:
        model.roi_heads.box_roi_pool = AlignedPooler()
    try:
        weights = convert(content.get("state_dict", content), detector)
        if style == "caffe":
            use_caffe(model, weights)
        model.load_state_dict(weights, strict=True)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"a {detector} of mmdetection with other parts than its zoo's: {error}") from error
    return model.eval(), dict(enumerate(names, start=1))


def convert(weights: dict[str, Tensor], detector: str) -> dict[str, Tensor]:
    """Return the state_dict of a detector by torchvision's names, with a background class in front."""
    unused = ("num_batches_tracked", "integral.project")  # the latter counts from 0 to 16
    result = {rename(name, detector): w for name, w in weights.items() if not name.endswith(unused)}
    for kind, fill in (("weight", 0.0), ("bias", NEVER)):
        if detector == "faster_rcnn":
            cls_score, bbox_pred = (f"roi_heads.box_predictor.{name}.{kind}" for name in ("cls_score", "bbox_pred"))
            result[cls_score] = result[cls_score].roll(1, dims=0)  # background is mmdetection's last class
            result[bbox_pred] = torch.cat([torch.zeros_like(result[bbox_pred][:4]), result[bbox_pred]])
        else:
            logits = f"head.classification_head.cls_logits.{kind}"
            rows = result[logits].unflatten(0, (9 if detector == "retinanet" else 1, -1))  # [A, K, ...]
            result[logits] = torch.cat([torch.full_like(rows[:, :1], fill), rows], dim=1).flatten(0, 1)
    if detector in ("fcos", "gfl"):
        scales = [result.pop(f"bbox_head.scales.{level}.scale") for level in range(5)]
        towers = {name: w for name, w in result.items() if "_head.conv." in name and w.ndim == 4}
        result |= {name.replace("weight", "bias"): torch.zeros(len(w)) for name, w in towers.items()}
    if detector == "gfl":
        result["head.regression_head.scales"] = torch.stack(scales)
    if detector == "fcos":
        weight, bias = (result.pop(f"head.regression_head.bbox_reg.{kind}") for kind in ("weight", "bias"))
        for level, (scale, stride) in enumerate(zip(scales, STRIDES["fcos"])):
            result[f"head.regression_head.bbox_reg.{level}.weight"] = scale * weight
            result[f"head.regression_head.bbox_reg.{level}.bias"] = scale * bias - torch.tensor(stride).log()
    return result


def rename(name: str, detector: str) -> str:
    """Return torchvision's name of a tensor."""
    for pattern, replacement in NAMES:
        name = re.sub(f"^{pattern}", replacement, name)
    if detector == "faster_rcnn":
        return name
    name = name.replace("layer_blocks.3.0", "extra_blocks.p6").replace("layer_blocks.4.0", "extra_blocks.p7")
    if detector == "retinanet":
        return re.sub(r"conv\.(\d)\.conv", r"conv.\1.0", name)
    return re.sub(r"conv\.(\d)\.(conv|gn)", lambda m: f"conv.{3 * int(m[1]) + (m[2] == 'gn')}", name)


def use_caffe(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Set the strides, mean and std of Caffe's ResNets; change the weights of the first layer from BGR to RGB."""
    for stage in ("layer2", "layer3", "layer4"):
        block = model.backbone.body[stage][0]
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    model.transform.image_mean = [mean / 255 for mean in (122.7717, 115.9465, 102.9801)]
    model.transform.image_std = [1 / 255] * 3
    weights["backbone.body.conv1.weight"] = weights["backbone.body.conv1.weight"].flip(1)


class LinearP6P7(LastLevelP6P7):
    """P6 from C5, or P5 with as many channels as P6, and P7 from P6, without torchvision's ReLU before P7."""

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Append P6 and P7 to the levels `p` and their names; `c` are the maps of the body."""
        p6 = self.p6(p[-1] if self.use_P5 else c[-1])
        return [*p, p6, self.p7(p6)], [*names, "p6", "p7"]


class ExponentialConv2d(nn.Conv2d):
    """exp(convolution)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return positive maps in float32, for maps `x` [N, C, H, W]."""
        return super().forward(x).float().exp()


class ExponentialHead(FCOSHead):
    """FCOS's head with a layer exp(scale_l * x) / stride_l for the distances of each level l, centre-ness by class."""

    def __init__(self, in_channels: int, num_anchors: int, num_classes: int):
        super().__init__(in_channels, num_anchors, num_classes)
        self.regression_head.bbox_reg = nn.ModuleList(ExponentialConv2d(in_channels, 4, 3, padding=1) for _ in range(5))
        self.classification_head.bbox_ctrness = self.regression_head.bbox_ctrness
        del self.regression_head.bbox_ctrness

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        """Return torchvision's outputs [N, sum of HW, values]."""
        classify, regress = self.classification_head, self.regression_head
        towers = [classify.conv(level) for level in x]
        outputs = {
            "cls_logits": [classify.cls_logits(tower) for tower in towers],
            "bbox_regression": [layer(regress.conv(level)) for layer, level in zip(regress.bbox_reg, x)],
            "bbox_ctrness": [classify.bbox_ctrness(tower) for tower in towers],
        }
        return {name: torch.cat([maps.flatten(2).mT for maps in levels], 1) for name, levels in outputs.items()}


class AlignedPooler(nn.Module):
    """RoIAlign that is aligned and adapts its samples to the size of the region, from four levels."""

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Return [R, C, 7, 7] for the R boxes of all images, xyxy pixels."""
        rois = torch.cat([nn.functional.pad(part, (1, 0), value=index) for index, part in enumerate(boxes)])
        levels = poolers.LevelMapper(2, 5)(boxes)
        result = x["0"].new_zeros(len(rois), x["0"].shape[1], 7, 7)
        for index, stride in enumerate(STRIDES["faster_rcnn"][:4]):
            chosen = levels == index
            result[chosen] = roi_align(x[str(index)], rois[chosen], 7, 1 / stride, aligned=True)
        return result
