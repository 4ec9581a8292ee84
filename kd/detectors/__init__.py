"""torchvision's RetinaNet, FCOS and Faster R-CNN, and GFL, on timm backbones.

RetinaNet, FCOS and Faster R-CNN are torchvision's own classes, unmodified. This package adds the backbone (a timm
feature extractor under torchvision's FeaturePyramidNetwork), the few arguments that small images and training from
scratch need, and GFL. A ResNet has torchvision's parameter names, so checkpoints load in both directions.

Detectors that others trained: torchvision's zoo by name (zoo.py) and checkpoints of mmdetection (mmdet.py). As teachers
they are cut to the classes of the data by name (classes.py), and a student gets their anchors (anchors.py, pair.py).

| detector | pyramid levels | strides | heads that methods read |
|---|---|---|---|
| fcos, gfl, retinanet | P3..P7 | 8..128 | classification and regression tower |
| faster_rcnn | P2..P5 and a pooled P6 | 4..64 | the RPN |
"""

from kd.detectors.backbone import FPN_CHANNELS, STRIDES, timm_name
from kd.detectors.build import DETECTORS, build_detector, check_detector
from kd.detectors.classes import match_classes
from kd.detectors.mmdet import describe_mmdet, load_mmdet
from kd.detectors.pair import FEATURES, check_pair, fitting_arguments, inherit
from kd.detectors.zoo import ZOO, build_zoo, fetch_weights, zoo_classes

__all__ = [
    "DETECTORS",
    "FEATURES",
    "FPN_CHANNELS",
    "STRIDES",
    "ZOO",
    "build_detector",
    "build_zoo",
    "check_detector",
    "check_pair",
    "describe_mmdet",
    "fetch_weights",
    "fitting_arguments",
    "inherit",
    "load_mmdet",
    "match_classes",
    "timm_name",
    "zoo_classes",
]
