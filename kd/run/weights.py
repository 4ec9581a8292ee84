"""Weights of other detectors: of teachers, from files of several kinds, and those that a student starts from."""

from pathlib import Path

from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from kd.data import class_names
from kd.detectors import (
    FEATURES,
    ZOO,
    build_detector,
    build_zoo,
    check_pair,
    describe_mmdet,
    fetch_weights,
    fitting_arguments,
    load_mmdet,
    match_classes,
    timm_name,
    zoo_classes,
)
from kd.distiller import Distiller
from kd.methods import METHODS, build_method, needs
from kd.run.checkpoint import build_saved, load, load_strictly, normalisation
from kd.run.contents import check_parts, is_state_dict
from kd.run.folder import teacher_file

CLASS_HEADS = ("head.classification_head.cls_logits.", "roi_heads.box_predictor.")


def load_teacher(
    path: str | Path | None,
    detector: str,
    name: str,
    categories: dict[int, dict],
    image_size: tuple[int, int],
    method: str | None = None,
) -> nn.Module:
    """Load a teacher, and give it the classes of the data, matched by name.

    Args:
        path: model.pt of a run, a state_dict of torchvision, or a checkpoint of mmdetection; None for the weights that
            torchvision publishes.
        detector: one of DETECTORS.
        name: a key of ZOO, or a backbone, by a short name or timm's; must agree with the file.
        categories: COCO category of each label of the data. A state_dict has no names: without a name of ZOO, it must
            have the same labels.
        image_size: (short side, long side) in pixels that images are resized to, also where the file has another size.
        method: that it serves; with None or "none", it may lack any of the classes.

    Returns:
        The detector in eval mode.

    Raises:
        ValueError: the file is of another kind, or has another detector, backbone or weights that do not fit, or the
            teacher does not know a class and the method reads more than features.
    """
    content = {} if path is None else load(path)
    if name in ZOO:
        teacher, known = build_zoo(name, image_size), zoo_classes(name)
        load_strictly(teacher, read_weights(path) if path else fetch_weights(name), path or name)
    elif converted := load_converted(content, path, detector, name, image_size):
        teacher, known = converted
    elif is_state_dict(content):
        return load_torchvision(path, detector, name, max(categories) + 1, image_size)
    else:
        teacher, known = build_saved(content, path), class_names(content["categories"])
        teacher.transform.min_size, teacher.transform.max_size = (image_size[0],), image_size[1]
        check_backbone(content["arguments"]["backbone"], name, path)
    missing = match_classes(teacher, known, class_names(categories))
    if missing and method in METHODS and set(needs(method)) - FEATURES:
        raise ValueError(
            f"the teacher {path or name} does not know the classes {', '.join(missing)}, whose predictions {method} "
            "reads: take a teacher that does, or a method that reads features alone"
        )
    return teacher


def check_backbone(held: str, name: str, path: str | Path) -> None:
    """Raise ValueError unless a file has the backbone that was named."""
    if timm_name(held).split(".")[0] != timm_name(name).split(".")[0]:  # behind the dot are pretrained weights
        raise ValueError(f"{path} contains a {held}, but --teacher is {name}")


def load_converted(
    content: object, path: str | Path, detector: str, name: str, image_size: tuple[int, int]
) -> tuple[nn.Module, dict[int, str]] | None:
    """Return the detector in a checkpoint of mmdetection and its classes, None for the content of other files.

    Arguments and errors are those of `load_teacher`.
    """
    if not isinstance(content, dict) or not is_state_dict(content.get("state_dict", content)):
        return None
    try:
        described = describe_mmdet(content)
        if described is None:
            return None
        family, backbone = described
        if family != detector:
            raise ValueError(f"it contains a {family}, but --detector is {detector}")
        converted = load_mmdet(content, image_size)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    check_backbone(backbone, name, path)
    return converted


def load_torchvision(
    path: str | Path, detector: str, backbone: str, num_classes: int, image_size: tuple[int, int]
) -> nn.Module:
    """Load a state_dict of torchvision, such as the COCO weights of retinanet_resnet50_fpn, into our own detector.

    The COCO_V1 checkpoints of fcos, retinanet and fasterrcnn_resnet50_fpn fit. The V2 ones have other necks and heads:
    see `kd.detectors.build_zoo`.

    Raises:
        ValueError: the file is not a state_dict, or its weights do not fit.
    """
    arguments = {"image_size": image_size, "from_scratch": is_from_scratch(path), "anchors": "torchvision"}
    model = build_detector(detector, backbone, num_classes, **arguments)
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
        return build_saved(content, path).state_dict()
    if not is_state_dict(content):
        raise ValueError(f"{path} is neither a detector written by train.py nor a state_dict")
    return content


def is_from_scratch(path: str | Path) -> bool:
    """Return whether the batch norm of a detector file was trained, and not frozen."""
    return any(name.endswith("num_batches_tracked") for name in read_weights(path))


def arguments_of(path: str | Path, detector: str) -> dict[str, object]:
    """Return the arguments of `build_detector` that a detector needs to be what its weights were trained for.

    Args:
        path: model.pt of a run, or a state_dict of torchvision.
        detector: of the student.

    Raises:
        ValueError: the file is of neither kind.
    """
    content = load(path)
    if isinstance(content, dict) and "arguments" in content:
        saved = build_saved(content, path)
        from_scratch = content["arguments"]["from_scratch"]
        return {"from_scratch": from_scratch, **normalisation(saved), **fitting_arguments(saved, detector)}
    return {"from_scratch": is_from_scratch(path), "anchors": "torchvision"}


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
    path = teacher_file(folder, settings | ({"teacher_weights": teacher_weights} if teacher_weights else {}))
    teacher = load_teacher(path, settings["detector"], settings["teacher"], categories, settings["image_size"])
    channels = student.backbone.out_channels, teacher.backbone.out_channels
    method = build_method(
        settings["method"], settings["detector"], *channels, student.backbone.strides, settings["set"]
    )
    check_pair(student, teacher, method.needs)
    content = load(folder / "checkpoint.pt")  # model.pt has only the student
    check_parts(content, {"distiller": dict}, folder / "checkpoint.pt", "is not a checkpoint of a run")
    state = content["distiller"]
    state = {name.removeprefix("method."): value for name, value in state.items() if name.startswith("method.")}
    load_strictly(method, state, folder / "checkpoint.pt")
    return Distiller(student, teacher, method).eval()
