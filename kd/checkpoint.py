"""Files of a run: written whole or not at all, read without executing anything."""

import os
import pickle
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from kd.detectors import build_detector, timm_name


def save(content: dict, path: Path) -> None:
    """Write `content` to `path` so that a crash leaves the old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path: str | Path) -> dict:
    """Read tensors and plain values from `path`, on the CPU.

    Raises:
        ValueError: not there, damaged, or holding objects other than tensors and plain values, which are never
            unpickled.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"the checkpoint {path} cannot be read: {error.strerror}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a checkpoint that can be loaded safely: {reason}") from error


def restore(parts: dict[str, object], path: Path) -> dict:
    """Give each part the state that was saved under its name; return the file's content.

    Args:
        parts: whatever has load_state_dict: modules, optimizer, schedule.
        path: a file that `save` wrote.

    Raises:
        ValueError: not such a file, or one of another run.
    """
    content = load(path)
    lacking = [name for name in parts if not isinstance(content, dict) or name not in content]
    if lacking:
        raise ValueError(f"{path} is not a checkpoint of this run: it lacks {', '.join(lacking)}")
    for name, part in parts.items():
        part.load_state_dict(content[name])
    return content


def save_model(detector: nn.Module, arguments: dict, categories: dict[int, dict], path: Path) -> None:
    """Write a detector alone, with what is needed to build it again.

    Args:
        detector: the student (or teacher), without adapters.
        arguments: `build_detector`'s, with from_scratch given and no pretrained weights.
        categories: COCO category of each label.
        path: file to write.
    """
    named = {label: {"id": category["id"], "name": category["name"]} for label, category in categories.items()}
    save({"model": detector.state_dict(), "arguments": arguments, "categories": named}, path)


def load_model(path: str | Path) -> tuple[nn.Module, dict]:
    """Build the detector that `save_model` wrote and load its weights strictly.

    Returns:
        The detector in eval mode, and the file's content.

    Raises:
        ValueError: not such a file, or weights that do not fit.
    """
    content = load(path)
    if not isinstance(content, dict) or not {"model", "arguments", "categories"} <= content.keys():
        raise ValueError(f"{path} does not hold a detector written by train.py (model, arguments, categories)")
    detector = build_detector(**content["arguments"])
    load_strictly(detector, content["model"], path)
    return detector.eval(), content


def load_teacher(
    path: str | Path, detector: str, backbone: str, categories: dict[int, dict], image_size: tuple[int, int]
) -> nn.Module:
    """Load a teacher from a run's model.pt or from a plain state_dict of torchvision.

    Args:
        path: of the file.
        detector: one of DETECTORS.
        backbone: a short name or a timm model name; must be the file's.
        categories: COCO category of each label of the data; their names must be the file's, if it says them.
        image_size: (short side, longest side) in pixels; for a plain state_dict, which does not say it.

    Returns:
        The detector in eval mode.

    Raises:
        ValueError: neither kind of file, or one of another backbone, of other classes, or of weights that do not fit.
    """
    if "arguments" not in load(path):
        return load_torchvision(path, detector, backbone, max(categories) + 1, image_size)
    teacher, content = load_model(path)
    theirs, ours = ({label: c["name"] for label, c in known.items()} for known in (content["categories"], categories))
    differing = sorted(label for label in theirs.keys() | ours.keys() if theirs.get(label) != ours.get(label))
    if differing:
        raise ValueError(f"the teacher {path} knows other classes than the data, at labels {differing[:10]}")
    held = content["arguments"]["backbone"]
    if timm_name(held) != timm_name(backbone):
        raise ValueError(f"{path} holds a {held}, but the teacher is said to be a {backbone}")
    return teacher


def load_torchvision(
    path: str | Path, detector: str, backbone: str, num_classes: int, image_size: tuple[int, int]
) -> nn.Module:
    """Load a plain state_dict of torchvision, such as retinanet_resnet50_fpn's COCO weights, into our own detector.

    The three COCO_V1 checkpoints fit (fcos, retinanet and fasterrcnn_resnet50_fpn); the V2 ones have other necks and
    heads.

    Raises:
        ValueError: not such a file, or weights that do not fit.
    """
    state_dict = load(path)
    if not isinstance(state_dict, dict) or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise ValueError(f"{path} is neither a detector written by train.py nor a plain state_dict")
    from_scratch = any(name.endswith("num_batches_tracked") for name in state_dict)
    model = build_detector(detector, backbone, num_classes, image_size=image_size, from_scratch=from_scratch)
    load_strictly(model, state_dict, path)
    if detector != "fcos":  # torchvision evaluates its first RetinaNet and Faster R-CNN checkpoints with eps = 0
        for module in model.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.eps = 0.0
    return model.eval()


def load_strictly(network: nn.Module, state_dict: dict, path: str | Path) -> None:
    """Load a state_dict of which every tensor must fit.

    Raises:
        ValueError: names the first missing, unexpected or misshapen tensors and where they came from.
    """
    try:
        network.load_state_dict(state_dict, strict=True)
    except RuntimeError as error:
        raise ValueError(f"the weights in {path} do not fit the {type(network).__name__}: {error}") from error
