"""torchvision's COCO detectors by name, with their published weights.

| name | AP on COCO val, published |
|---|---|
| fcos_resnet50_fpn | 39.2 |
| retinanet_resnet50_fpn | 36.4 |
| retinanet_resnet50_fpn_v2 | 41.5 |
| fasterrcnn_resnet50_fpn | 37.0 |
| fasterrcnn_resnet50_fpn_v2 | 46.7 |
"""

import hashlib
import pickle
from pathlib import Path

import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor
from torchvision.models import WeightsEnum, get_model, get_model_weights
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.ops import FrozenBatchNorm2d

from kd.detectors.backbone import build_backbone

ZOO = {
    "fcos_resnet50_fpn": "fcos",
    "retinanet_resnet50_fpn": "retinanet",
    "retinanet_resnet50_fpn_v2": "retinanet",
    "fasterrcnn_resnet50_fpn": "faster_rcnn",
    "fasterrcnn_resnet50_fpn_v2": "faster_rcnn",
}


def build_zoo(name: str, image_size: tuple[int, int] = (800, 1333)) -> FCOS | RetinaNet | FasterRCNN:
    """Build a detector of torchvision's zoo as its weights need it, with 91 classes.

    Pyramid, heads, anchors and thresholds are torchvision's own. Its body is timm's ResNet-50, as in `build_detector`,
    with the same parameter names and outputs.

    Args:
        name: a key of ZOO.
        image_size: (short side, long side) in pixels that images are resized to.

    Returns:
        The detector in eval mode, with random weights.
    """
    model = get_model(name, weights=None, weights_backbone=None, min_size=image_size[0], max_size=image_size[1])
    backbone = build_backbone("r50", ZOO[name])
    backbone.fpn, model.backbone = model.backbone.fpn, backbone
    if not name.endswith("_v2"):
        backbone.body = freeze_batch_norm_2d(backbone.body)
        if name != "fcos_resnet50_fpn":  # torchvision's overwrite_eps
            for module in backbone.body.modules():
                if isinstance(module, FrozenBatchNorm2d):
                    module.eps = 0.0
    return model.eval()


def zoo_classes(name: str) -> dict[int, str]:
    """Return the name of each label of a detector of the zoo: COCO's 80 classes, among 91 labels."""
    names = get_model_weights(name).COCO_V1.meta["categories"]
    return {label: text for label, text in enumerate(names) if text not in ("__background__", "N/A")}


def fetch_weights(name: str) -> dict[str, Tensor]:
    """Return the published weights of a detector of the zoo, downloaded once into the folder of torch.hub.

    torch.hub compares the hash in the name of a file when it downloads it; this function also compares that of a file
    which is already there. Nothing in the file is executed.

    Raises:
        ValueError: there is no network, or the file is damaged or contains other objects; the message names the URL
            and where the file belongs.
    """
    weights: WeightsEnum = get_model_weights(name).COCO_V1
    path = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    if path.exists():
        expected, found = path.stem.rpartition("-")[2], hashlib.sha256(path.read_bytes()).hexdigest()
        if not found.startswith(expected):
            raise ValueError(
                f"{path} is damaged: its SHA-256 begins with {found[: len(expected)]}, not {expected}. Delete it, and "
                f"it is downloaded again from {weights.url}"
            )
    try:
        return weights.get_state_dict(progress=True, check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:  # no network, wrong hash, other objects
        raise ValueError(
            f"cannot load the weights of {name}: {str(error).splitlines()[0]}. Download {weights.url} to {path.parent}"
        ) from error
