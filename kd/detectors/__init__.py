"""torchvision's RetinaNet, FCOS and Faster R-CNN, and GFL, on timm backbones.

RetinaNet, FCOS and Faster R-CNN are torchvision's own classes, unmodified. This package adds the backbone (a timm
feature extractor under torchvision's FeaturePyramidNetwork), the few arguments that small images and training from
scratch need, and GFL. A ResNet has torchvision's parameter names, so checkpoints load in both directions.

| detector | pyramid levels | strides | heads that methods read |
|---|---|---|---|
| fcos, gfl, retinanet | P3..P7 | 8..128 | classification and regression tower |
| faster_rcnn | P2..P5 and a pooled P6 | 4..64 | the RPN |
"""

from kd.detectors.backbone import FPN_CHANNELS, STRIDES, timm_name
from kd.detectors.build import DETECTORS, build_detector, check_detector
from kd.detectors.pair import check_pair, inherit

__all__ = [
    "DETECTORS",
    "FPN_CHANNELS",
    "STRIDES",
    "build_detector",
    "check_detector",
    "check_pair",
    "inherit",
    "timm_name",
]
