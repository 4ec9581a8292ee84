"""Build one of torchvision's detectors, or GFL, on a timm backbone."""

import difflib
from collections.abc import Sequence
from functools import partial

from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.retinanet import RetinaNetHead

from kd.detectors.anchors import make_anchors
from kd.detectors.backbone import FPN_CHANNELS, STRIDES, build_backbone, freeze_like_torchvision
from kd.detectors.gfl import GFL

DETECTORS = tuple(STRIDES)

# torchvision's anchors and numbers of proposals suit photographs of 800 pixels. Below this short side, anchors are
# half as large and there are fewer proposals, unless a teacher has others.
SMALL_IMAGE = 400
SMALL_PROPOSALS = {
    "rpn_post_nms_top_n_train": 500,  # per image; torchvision: 2000
    "rpn_post_nms_top_n_test": 200,  # torchvision: 1000
    "box_batch_size_per_image": 64,  # RoIs trained on; torchvision: 512
}


def check_detector(detector: str) -> None:
    """Raise ValueError unless `detector` is one of DETECTORS."""
    if detector not in DETECTORS:
        close = difflib.get_close_matches(detector, DETECTORS, n=1)
        raise ValueError(f"unknown detector {detector!r}: choose {close[0] if close else ', '.join(DETECTORS)}")


def build_detector(
    detector: str,
    backbone: str,
    num_classes: int,
    *,
    image_size: tuple[int, int] = (800, 1333),
    pretrained: bool | str = False,
    from_scratch: bool | None = None,
    anchors: str | None = None,
    tower_norm: bool | None = None,
    giou: bool = False,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
) -> FCOS | RetinaNet | FasterRCNN:
    """Build a detector on a timm backbone.

    With pretrained weights, the batch norm of the backbone and its layers up to stride 4 are frozen, as in torchvision;
    in an HRNet these are most. From scratch, batch norm is trained and RetinaNet's towers have group norm, as in
    torchvision's retinanet_resnet50_fpn_v2. anchors, tower_norm and giou make a student that fits a teacher of other
    origin.

    The bias of FCOS's regression output starts at 2 strides instead of 0: the ReLU behind it would not recover from
    negative outputs at the start.

    Args:
        detector: one of DETECTORS.
        backbone: a short name (r18, r50, ...) or a timm model name.
        num_classes: K, including the background class 0, as in torchvision.
        image_size: (short side, long side) in pixels that images are resized to.
        pretrained: True loads ImageNet weights from timm's model hub, a path loads them from a timm state_dict.
        from_scratch: whether normalisation is trained, see above; default: true without pretrained weights. Needed
            when a saved detector is built again.
        anchors: as in `kd.detectors.anchors.make_anchors`. With "half", anchors of RetinaNet and Faster R-CNN begin at
            16 pixels, and Faster R-CNN uses fewer proposals (SMALL_PROPOSALS). Default: "half" below a short side of
            400 pixels, else "torchvision".
        tower_norm: whether RetinaNet's towers have group norm; default: as from_scratch.
        giou: train RetinaNet's boxes with GIoU instead of L1, as torchvision's retinanet_resnet50_fpn_v2.
        image_mean: of red, green and blue in 0..1; default: that of the backbone's weights in timm.
        image_std: likewise. Images are normalised with both.

    Returns:
        The detector. Except for GFL, its state_dict loads into torchvision's own class, which then detects the same
        unless anchors are "mmdet", which torchvision lacks.

    Raises:
        ValueError: unknown detector, backbone or anchors, weights that cannot be loaded, or an invalid size.
    """
    check_detector(detector)
    min_size, max_size = image_size
    if not 32 <= min_size <= max_size:
        raise ValueError(f"image size {min_size} {max_size}: the short side must be 32 or more, the long side no less")
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}: background and at least one class are needed")
    if from_scratch is None:
        from_scratch = not pretrained
    if anchors is None:
        anchors = "half" if min_size < SMALL_IMAGE else "torchvision"

    body_and_fpn = build_backbone(backbone, detector, pretrained)
    if not from_scratch:
        body_and_fpn.body = freeze_like_torchvision(body_and_fpn.body, backbone)

    options = {
        "num_classes": num_classes,
        "min_size": min_size,
        "max_size": max_size,
        "image_mean": list(image_mean or body_and_fpn.body.pretrained_cfg["mean"]),
        "image_std": list(image_std or body_and_fpn.body.pretrained_cfg["std"]),
    }
    generator = make_anchors(detector, anchors)
    if detector == "fcos":
        # torchvision's score threshold of 0.2 drops detections that count for COCO's AP; RetinaNet has 0.05.
        model = FCOS(body_and_fpn, anchor_generator=generator, score_thresh=0.05, **options)
        nn.init.constant_(model.head.regression_head.bbox_reg.bias, 2.0)
    elif detector == "gfl":
        model = GFL(body_and_fpn, anchor_generator=generator, **options)
    elif detector == "retinanet":
        norm = partial(nn.GroupNorm, 32) if (from_scratch if tower_norm is None else tower_norm) else None
        head = RetinaNetHead(FPN_CHANNELS, generator.num_anchors_per_location()[0], num_classes, norm_layer=norm)
        head.regression_head._loss_type = "giou" if giou else "l1"  # as torchvision sets it
        model = RetinaNet(body_and_fpn, anchor_generator=generator, head=head, detections_per_img=100, **options)
    else:
        proposals = SMALL_PROPOSALS if anchors == "half" else {}
        model = FasterRCNN(body_and_fpn, rpn_anchor_generator=generator, **proposals, **options)
    return model
