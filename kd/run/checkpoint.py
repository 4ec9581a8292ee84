"""Files of a run: written atomically, read without executing anything."""

import os
import pickle
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from kd.detectors import build_detector, check_pair, timm_name
from kd.distiller import Distiller
from kd.methods import build_method

CLASS_HEADS = ("head.classification_head.cls_logits.", "roi_heads.box_predictor.")


def save(content: dict, path: Path) -> None:
    """Write `content` to `path`; a crash leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path: str | Path) -> dict:
    """Read tensors and plain values from `path` to the CPU.

    Raises:
        ValueError: the file does not exist, is damaged, or contains other objects, which are never unpickled.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a checkpoint that can be loaded safely: {reason}") from error


def restore(parts: dict[str, object], path: Path) -> dict:
    """Load into each part the state saved under its name; return the content of the file.

    Args:
        parts: objects with load_state_dict.
        path: of a file that `save` wrote.

    Raises:
        ValueError: the file cannot be loaded or lacks a part.
    """
    content = load(path)
    missing = [name for name in parts if not isinstance(content, dict) or name not in content]
    if missing:
        raise ValueError(f"{path} is not a checkpoint of this run: it lacks {', '.join(missing)}")
    for name, part in parts.items():
        part.load_state_dict(content[name])
    return content


def save_model(detector: nn.Module, arguments: dict, categories: dict[int, dict], path: Path) -> None:
    """Write a detector and what is needed to build it again.

    Args:
        detector: the student (or teacher) without the method's adapters.
        arguments: of `build_detector`, with from_scratch and without pretrained.
        categories: COCO category of each label.
        path: of the file.
    """
    named = {label: {"id": category["id"], "name": category["name"]} for label, category in categories.items()}
    save({"model": detector.state_dict(), "arguments": arguments, "categories": named}, path)


def load_model(path: str | Path) -> tuple[nn.Module, dict]:
    """Build the detector in a file of `save_model`, and load its weights strictly.

    Returns:
        The detector in eval mode, and the content of the file.

    Raises:
        ValueError: the file is of another kind, or its weights do not fit.
    """
    content = load(path)
    if not isinstance(content, dict) or not {"model", "arguments", "categories"} <= content.keys():
        raise ValueError(f"{path} was not written by train.py: it lacks model, arguments or categories")
    detector = build_detector(**content["arguments"])
    load_strictly(detector, content["model"], path)
    return detector.eval(), content


def load_teacher(
    path: str | Path, detector: str, backbone: str, categories: dict[int, dict], image_size: tuple[int, int]
) -> nn.Module:
    """Load a teacher from the model.pt of a run or from a state_dict of torchvision.

    Args:
        path: of the file.
        detector: one of DETECTORS.
        backbone: a short name or a timm model name; must agree with the file.
        categories: COCO category of each label of the data; names must agree with the file if it has them.
        image_size: (short side, long side) in pixels, for a state_dict, which does not contain it.

    Returns:
        The detector in eval mode.

    Raises:
        ValueError: the file is of neither kind, or has another backbone, other classes or weights that do not fit.
    """
    if "arguments" not in load(path):
        return load_torchvision(path, detector, backbone, max(categories) + 1, image_size)
    teacher, content = load_model(path)
    theirs, ours = ({label: c["name"] for label, c in known.items()} for known in (content["categories"], categories))
    differing = sorted(label for label in theirs.keys() | ours.keys() if theirs.get(label) != ours.get(label))
    if differing:
        raise ValueError(f"the classes of the teacher {path} differ from those of the data at labels {differing[:10]}")
    held = content["arguments"]["backbone"]
    if timm_name(held).split(".")[0] != timm_name(backbone).split(".")[0]:  # behind the dot are pretrained weights
        raise ValueError(f"{path} contains a {held}, but --teacher is {backbone}")
    return teacher


def load_torchvision(
    path: str | Path, detector: str, backbone: str, num_classes: int, image_size: tuple[int, int]
) -> nn.Module:
    """Load a state_dict of torchvision, such as the COCO weights of retinanet_resnet50_fpn, into our own detector.

    The COCO_V1 checkpoints of fcos, retinanet and fasterrcnn_resnet50_fpn fit. The V2 ones have other necks and heads.

    Raises:
        ValueError: the file is not a state_dict, or its weights do not fit.
    """
    scratch = is_from_scratch(path)
    model = build_detector(detector, backbone, num_classes, image_size=image_size, from_scratch=scratch)
    load_strictly(model, read_weights(path), path)
    if detector in ("retinanet", "faster_rcnn"):  # torchvision evaluates these checkpoints with eps = 0
        for module in model.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.eps = 0.0
    return model.eval()


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the state_dict of a detector, from a model.pt or a state_dict of torchvision.

    Raises:
        ValueError: the file is of neither kind.
    """
    content = load(path)
    if isinstance(content, dict) and "arguments" in content:
        return load_model(path)[0].state_dict()
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} is neither a detector written by train.py nor a state_dict")
    return content


def is_from_scratch(path: str | Path) -> bool:
    """Return whether the batch norm of a detector file was trained, and not frozen."""
    return any(name.endswith("num_batches_tracked") for name in read_weights(path))


def start_from(detector: nn.Module, path: str | Path) -> list[str]:
    """Load the weights of another detector of the same kind, of which the classes may differ.

    Args:
        detector: keeps its initial class head where the numbers of classes differ.
        path: model.pt of a run, or a state_dict of torchvision.

    Returns:
        The names of the tensors that were left.

    Raises:
        ValueError: the file cannot be loaded, or other weights do not fit.
    """
    weights, own = read_weights(path), detector.state_dict()
    differing = [name for name in weights if name in own and weights[name].shape != own[name].shape]
    left = [name for name in differing if name.startswith(CLASS_HEADS)]
    load_strictly(detector, {**weights, **{name: own[name] for name in left}}, path)
    return left


def load_distiller(
    folder: Path, settings: dict, student: nn.Module, categories: dict[int, dict], teacher_weights: str | None
) -> Distiller:
    """Return the student, teacher and trained method of a run in eval mode.

    Args:
        folder: of the run.
        settings: its args.json.
        student: from its model.pt.
        categories: COCO category of each label.
        teacher_weights: file of the teacher; None for the one trained with.

    Raises:
        ValueError: the run has no method, a file is missing, or something does not fit.
    """
    if settings["method"] == "none":
        raise ValueError(f"{folder} has no method to explain: it was trained with --method none")
    path = teacher_weights or settings["teacher_weights"]
    if not Path(path).is_file():
        raise ValueError(f"the teacher of {folder} is not at {path}: give its file as --teacher-weights")
    teacher = load_teacher(path, settings["detector"], settings["teacher"], categories, settings["image_size"])
    channels = student.backbone.out_channels, teacher.backbone.out_channels
    method = build_method(
        settings["method"], settings["detector"], *channels, student.backbone.strides, settings["set"]
    )
    check_pair(student, teacher, method.needs)
    state = load(folder / "checkpoint.pt")["distiller"]  # model.pt has only the student
    state = {name.removeprefix("method."): value for name, value in state.items() if name.startswith("method.")}
    load_strictly(method, state, folder / "checkpoint.pt")
    return Distiller(student, teacher, method).eval()


def load_strictly(network: nn.Module, state_dict: dict, path: str | Path) -> None:
    """Load a state_dict of which every tensor must fit.

    Raises:
        ValueError: names the file and the missing, unexpected or misshapen tensors.
    """
    try:
        network.load_state_dict(state_dict, strict=True)
    except RuntimeError as error:
        raise ValueError(f"the weights in {path} do not fit the {type(network).__name__}: {error}") from error
