"""torchvision's RetinaNet, FCOS and Faster R-CNN on timm backbones.

The detector classes are torchvision's own, unmodified. This package adds the backbone (a timm feature extractor under
torchvision's FeaturePyramidNetwork) and the few arguments that small images and training from scratch need. A ResNet
has torchvision's parameter names, so checkpoints load in both directions.

| detector | pyramid levels | strides | heads that methods read |
|---|---|---|---|
| fcos, retinanet | P3..P7 | 8..128 | classification and regression tower |
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
