"""torchvision's RetinaNet, FCOS and Faster R-CNN on any timm backbone.

The detector classes are torchvision's own, unmodified: what this file adds is the backbone (a timm model cut down to
its feature maps, then torchvision's FeaturePyramidNetwork) and the few arguments that training from scratch and small
images ask for. A ResNet built here has torchvision's parameter names, so checkpoints travel both ways.

| detector | pyramid levels | strides | anchors |
|---|---|---|---|
| fcos, retinanet | P3..P7 | 8..128 | torchvision's, see `build_detector` for small images |
| faster_rcnn | P2..P5 and a pooled P6 | 4..64 | torchvision's, likewise |
"""

import difflib
from functools import partial
from pathlib import Path

import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

DETECTORS = ("fcos", "retinanet", "faster_rcnn")
SHORT_NAMES = {f"r{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101, 152)}
STRIDES = {"fcos": (8, 16, 32, 64, 128), "retinanet": (8, 16, 32, 64, 128), "faster_rcnn": (4, 8, 16, 32, 64)}
FPN_CHANNELS = 256

# torchvision's anchors and numbers of proposals suit photographs of 800 pixels; below this short side, anchors are
# halved and there are fewer proposals.
SMALL_IMAGE = 400
SMALL_PROPOSALS = {
    "rpn_post_nms_top_n_train": 500,  # per image; torchvision: 2000
    "rpn_post_nms_top_n_test": 200,  # torchvision: 1000
    "box_batch_size_per_image": 64,  # RoIs trained on; torchvision: 512
}


class Backbone(nn.Module):
    """A timm feature extractor followed by torchvision's feature pyramid.

    Args:
        body: timm model made with features_only=True; returns one map per stride in `body_strides`, finest first.
        body_strides: stride of each map of the body, in pixels.
        extra_blocks: torchvision's block for the levels above the body's last one.
    """

    def __init__(self, body: nn.Module, body_strides: tuple[int, ...], extra_blocks: nn.Module):
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), FPN_CHANNELS, extra_blocks)
        self.out_channels = FPN_CHANNELS
        self.body_strides = body_strides
        self.channels_last = str(getattr(body, "output_fmt", "NCHW")).endswith("NHWC")

    def body_maps(self, images: Tensor) -> list[Tensor]:
        """Return the body's maps [N, C, H, W], finest first, for images [N, 3, h, w]."""
        maps = self.body(images)
        return [m.permute(0, 3, 1, 2).contiguous() for m in maps] if self.channels_last else maps

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the pyramid's maps [N, 256, H, W], finest first, in float32 (also under autocast).

        torchvision's anchor generator works in the dtype of the maps it is shown: in bfloat16 the anchors of a
        800-pixel image would be rounded to multiples of 4 pixels.
        """
        maps = self.fpn({str(level): m for level, m in enumerate(self.body_maps(images))})
        return {name: m.to(torch.promote_types(m.dtype, torch.float32)) for name, m in maps.items()}


class CoarseLevels(LastLevelP6P7):
    """torchvision's P6 and P7, computed in float32 also under autocast.

    These maps are the smallest, so it costs nothing. On CPUs with avx512_bf16, oneDNN (3.13) fills the weight gradient
    of a bfloat16 convolution with stride 2 from memory that it never wrote where the map is one position wide, as P6
    of a 64-pixel image is.
    """

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Append P6 and P7 to the maps `p` and their names; `c` are the body's maps."""
        with torch.autocast(p[-1].device.type, enabled=False):
            return super().forward([m.to(torch.promote_types(m.dtype, torch.float32)) for m in p], c, names)


def check_detector(detector: str) -> None:
    """Raise ValueError unless `detector` is one of DETECTORS; a close match is named."""
    if detector not in DETECTORS:
        close = difflib.get_close_matches(detector, DETECTORS, n=1)
        raise ValueError(f"unknown detector {detector!r}: choose {close[0] if close else ', '.join(DETECTORS)}")


def timm_name(backbone: str) -> str:
    """Return the timm model name of `backbone`: r50 becomes resnet50, a timm name stays.

    Raises:
        ValueError: no such model; close matches are named.
    """
    name = SHORT_NAMES.get(backbone, backbone)
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, [*SHORT_NAMES, *timm.list_models()], n=5)
        hint = f"did you mean {', '.join(close)}?" if close else f"short names are {', '.join(SHORT_NAMES)}"
        raise ValueError(f"timm has no model named {backbone!r}; {hint}")
    return name


def build_backbone(
    backbone: str, detector: str, *, pretrained: bool = False, pretrained_weights: str | None = None
) -> Backbone:
    """Build a timm body and its feature pyramid for one detector.

    Args:
        backbone: a short name or a timm model name.
        detector: one of DETECTORS; decides which strides are needed.
        pretrained: fetch timm's ImageNet weights from the model hub.
        pretrained_weights: a local file with timm's weights of this model; implies `pretrained`.

    Raises:
        ValueError: the model is unknown, cannot return the maps a pyramid needs, or its weights cannot be had.
    """
    name = timm_name(backbone)
    body_strides = tuple(s for s in STRIDES[detector] if s <= 32)
    try:
        with torch.device("meta"):
            info = timm.create_model(name, features_only=True).feature_info
    except (RuntimeError, AssertionError, AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"timm's {name} has no features_only mode ({error}), so a pyramid cannot stand on it"
        ) from error
    reductions = info.reduction()
    missing = [s for s in body_strides if s not in reductions]
    if missing:
        raise ValueError(
            f"{name} returns maps at strides {reductions}, but {detector} needs {list(body_strides)}: choose a "
            f"backbone with a feature hierarchy (a plain ViT has a single stride)"
        )
    # Several maps may share a stride; the last of them is the deepest.
    indices = tuple(len(reductions) - 1 - reductions[::-1].index(stride) for stride in body_strides)

    overlay = None if pretrained_weights is None else {"file": pretrained_weights}
    if pretrained_weights is not None and not Path(pretrained_weights).is_file():
        raise ValueError(f"no file with pretrained weights at {pretrained_weights}")
    try:
        body = timm.create_model(
            name,
            features_only=True,
            out_indices=indices,
            pretrained=pretrained or pretrained_weights is not None,
            pretrained_cfg_overlay=overlay,
        )
    except Exception as error:  # whatever the hub, the file system or the unpickler raise: told once, with the way out
        if not pretrained and pretrained_weights is None:
            raise
        source = pretrained_weights or "the model hub"
        raise ValueError(
            f"the pretrained weights of {name} could not be loaded from {source}: {error}. "
            f"Give a local file with --pretrained-weights FILE, or train from scratch without --pretrained"
        ) from error
    if pretrained_weights is not None:
        _check_all_loaded(body, pretrained_weights, name)

    extra_blocks = LastLevelMaxPool() if detector == "faster_rcnn" else CoarseLevels(FPN_CHANNELS, FPN_CHANNELS)
    result = Backbone(body, body_strides, extra_blocks)
    _check_maps(result, name)
    return result


def _check_all_loaded(body: nn.Module, file: str, name: str) -> None:
    """Raise ValueError unless `file` holds every tensor of the body: timm loads feature extractors non-strictly."""
    # A feature extractor may flatten the first dot of a name: stages.0.x becomes stages_0.x.
    held = {key.replace(".", "_") for key in timm.models.load_state_dict(file)}
    missing = [key for key in body.state_dict() if key.replace(".", "_") not in held]
    if missing:
        raise ValueError(
            f"{file} is not a checkpoint of timm's {name}: it lacks {len(missing)} tensors, first {missing[0]}"
        )


@torch.no_grad()
def _check_maps(backbone: Backbone, name: str) -> None:
    """Raise ValueError unless the body's real maps have the strides and channels that timm announces."""
    height, width = backbone.body.pretrained_cfg.get("input_size", (3, 224, 224))[1:]
    training = backbone.training
    backbone.eval()
    shapes = [tuple(m.shape[1:]) for m in backbone.body_maps(torch.zeros(1, 3, height, width))]
    backbone.train(training)
    channels = backbone.body.feature_info.channels()
    expected = [(c, -(-height // s), -(-width // s)) for c, s in zip(channels, backbone.body_strides)]
    if shapes != expected:
        raise ValueError(
            f"{name} announces maps [C, H, W] of {expected} for a {height}x{width} image but returns {shapes}"
        )


def _freeze_stem(body: nn.Module, name: str) -> None:
    """Freeze all parameters up to the stage at stride 4, as torchvision does for its three trainable layers."""
    with torch.device("meta"):
        info = timm.create_model(name, features_only=True).feature_info
    stage = [n for n, r in zip(info.module_name(), info.reduction()) if r <= 4][-1].replace(".", "_") + "_"
    parameters = list(body.named_parameters())
    last = max(i for i, (key, _) in enumerate(parameters) if key.replace(".", "_").startswith(stage))
    for _, parameter in parameters[: last + 1]:
        parameter.requires_grad_(False)


def build_detector(
    detector: str,
    backbone: str,
    num_classes: int,
    *,
    image_size: tuple[int, int] = (800, 1333),
    pretrained: bool = False,
    pretrained_weights: str | None = None,
    from_scratch: bool | None = None,
) -> FCOS | RetinaNet | FasterRCNN:
    """Build a torchvision detector on a timm backbone, with the backbone's own input mean and standard deviation.

    Starting from pretrained weights, the backbone's batch norm and its layers up to stride 4 are frozen and the heads
    are torchvision's plain ones. From scratch, batch norm is trained and RetinaNet's towers get the group norm of
    torchvision's retinanet_resnet50_fpn_v2.

    FCOS's last regression bias starts at 2 strides instead of 0: the outputs pass a ReLU, which at 0 can die for good.

    Args:
        detector: one of DETECTORS.
        backbone: a short name (r18, r50, ...) or a timm model name.
        num_classes: K, including the background class 0, as in torchvision.
        image_size: (short side, longest side) in pixels that images are resized to. Below a short side of 400, the
            anchors of RetinaNet and Faster R-CNN are half of torchvision's, 16 pixels and up, and Faster R-CNN proposes
            and trains on fewer RoIs (SMALL_PROPOSALS).
        pretrained: ImageNet weights from timm's model hub.
        pretrained_weights: ImageNet weights from a local timm state_dict.
        from_scratch: trainable norm, see above; by default, true where there are no pretrained weights. Given
            explicitly when a saved model is rebuilt.

    Raises:
        ValueError: unknown detector or backbone, weights that cannot be had, impossible sizes.
    """
    check_detector(detector)
    min_size, max_size = image_size
    if not 32 <= min_size <= max_size:
        raise ValueError(
            f"image size {min_size} {max_size} (short side, longest side) must be 32 or more, in this order"
        )
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}: background and at least one class are needed")
    if from_scratch is None:
        from_scratch = not (pretrained or pretrained_weights)

    body_and_fpn = build_backbone(backbone, detector, pretrained=pretrained, pretrained_weights=pretrained_weights)
    if not from_scratch:
        body_and_fpn.body = freeze_batch_norm_2d(body_and_fpn.body)
        _freeze_stem(body_and_fpn.body, timm_name(backbone))

    arguments = {
        "num_classes": num_classes,
        "min_size": min_size,
        "max_size": max_size,
        "image_mean": list(body_and_fpn.body.pretrained_cfg["mean"]),
        "image_std": list(body_and_fpn.body.pretrained_cfg["std"]),
    }
    small = min_size < SMALL_IMAGE
    anchor_unit = 16 if small else 32
    if detector == "fcos":
        # torchvision's threshold of 0.2 drops detections that COCO's AP counts; 0.05 is RetinaNet's.
        model = FCOS(body_and_fpn, score_thresh=0.05, **arguments)
        nn.init.constant_(model.head.regression_head.bbox_reg.bias, 2.0)
    elif detector == "retinanet":
        sizes = tuple(tuple(int(anchor_unit * 2**level * 2 ** (third / 3)) for third in range(3)) for level in range(5))
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
        norm = partial(nn.GroupNorm, 32) if from_scratch else None
        head = RetinaNetHead(FPN_CHANNELS, anchors.num_anchors_per_location()[0], num_classes, norm_layer=norm)
        model = RetinaNet(body_and_fpn, anchor_generator=anchors, head=head, detections_per_img=100, **arguments)
    else:
        sizes = tuple((anchor_unit * 2**level,) for level in range(5))
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
        proposals = SMALL_PROPOSALS if small else {}
        model = FasterRCNN(body_and_fpn, rpn_anchor_generator=anchors, **proposals, **arguments)
    return model
