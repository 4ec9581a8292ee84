"""Fill in the arguments of the training script, and reject invalid combinations up front."""

import argparse
import difflib
from pathlib import Path

import torch

from kd.detectors import FPN_CHANNELS, STRIDES, check_detector, timm_name
from kd.methods import METHODS, build_method
from kd.run.distributed import world_size
from kd.run.folder import check_folder, run_name

# Defaults that depend on the data. Learning rates are in make_optimizer; the shapes are evaluated at the end.
SHAPES_RECIPE = {"epochs": 1, "batch_size": 8, "image_size": [64, 64], "optimizer": "adamw"}
COCO_RECIPE = {"epochs": 12, "batch_size": 2, "image_size": [800, 1333], "optimizer": "sgd", "eval_interval": 1}

MINIMUM = {
    **{"epochs": 1, "batch_size": 1, "eval_interval": 1, "max_iterations": 1, "accumulate": 1, "workers": 0, "seed": 0},
    **{"clip_grad": 0, "aspect_ratio_group_factor": 0},
}
POSITIVE = ("lr", "distill_weight")
PLAIN = {"method": "none", "teacher": None, "teacher_weights": None, "set": [], "distill_weight": 1.0, "inherit": False}


def settle(args: argparse.Namespace) -> None:
    """Fill in missing arguments, and check all of them.

    Raises:
        ValueError: an argument is invalid; the message says what is valid.
    """
    recipe = COCO_RECIPE if args.data or args.train_annotations else SHAPES_RECIPE
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check_names(args)
    check_numbers(args)
    check_machine(args)
    if args.data:
        root = Path(args.data)
        args.train_images = args.train_images or str(root / "train2017")
        args.val_images = args.val_images or str(root / "val2017")
        args.train_annotations = args.train_annotations or str(root / "annotations" / "instances_train2017.json")
        args.val_annotations = args.val_annotations or str(root / "annotations" / "instances_val2017.json")
    paths = ("train_images", "train_annotations", "val_images", "val_annotations")
    missing = [option(path) for path in paths if getattr(args, path) is None]
    if 0 < len(missing) < 4:
        raise ValueError(f"without --data, all four paths are needed: {', '.join(missing)} missing")
    if args.amp is None:
        if torch.device(args.device).type == "cuda":
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            has_bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
        args.amp = "bf16" if has_bf16 else "off"
    if args.output is None:
        args.output = str(Path("runs", run_name(args, args.method, args.student)))
    check_folder(Path(args.output), args.resume)


def plain_arguments(args: argparse.Namespace, name: str, backbone: str, epochs: int) -> argparse.Namespace:
    """Return the arguments for plain training of a backbone in the setting of `args`, in a folder next to its own."""
    folder = str(Path(args.output).parent / run_name(args, name, backbone))
    changes = {"student": backbone, "epochs": epochs, "output": folder, "resume": "auto"}
    return argparse.Namespace(**{**vars(args), **PLAIN, **changes})


def check_names(args: argparse.Namespace) -> None:
    """Raise ValueError unless method, detector and backbones exist and fit together."""
    if args.method not in ("none", *METHODS):
        close = difflib.get_close_matches(args.method, METHODS, n=1)
        raise ValueError(
            f"unknown method {args.method!r}: choose {close[0] if close else ', '.join(('none', *METHODS))}"
        )
    if args.method != "none" and not args.teacher:
        raise ValueError(f"--method {args.method} needs a teacher: add --teacher BACKBONE")
    if args.method == "none":
        for name, default in PLAIN.items():
            if getattr(args, name) != default:
                raise ValueError(f"--method none does not distil: leave out {option(name)}")
    if args.student_weights and (args.pretrained or args.inherit):
        raise ValueError("--student-weights replaces the whole student: leave out --pretrained and --inherit")
    for backbone in filter(None, (args.student, args.teacher)):
        timm_name(backbone)
    check_detector(args.detector)
    if args.method != "none":
        with torch.device("meta"):  # find wrong hyper-parameters before a teacher is trained
            build_method(args.method, args.detector, FPN_CHANNELS, FPN_CHANNELS, STRIDES[args.detector], args.set)


def check_numbers(args: argparse.Namespace) -> None:
    """Raise ValueError where a number is out of range."""
    for name, minimum in MINIMUM.items():
        value = getattr(args, name)
        if value is not None and not value >= minimum:
            raise ValueError(f"{option(name)} is {value}: give {minimum} or more")
    for name in POSITIVE:
        value = getattr(args, name)
        value = float(value.partition(":")[2] or 1) if isinstance(value, str) else value  # --distill-weight auto:RATIO
        if value is not None and not value > 0:
            raise ValueError(f"{option(name)} is {value}: give a number above 0")
    low, high = args.image_size
    if not 32 <= low <= high:
        raise ValueError(f"--image-size {low} {high}: give the short side, 32 or more, then the long side")
    if args.multi_scale and not 32 <= args.multi_scale[0] <= args.multi_scale[1]:
        raise ValueError(
            f"--multi-scale {args.multi_scale[0]} {args.multi_scale[1]}: give the lower side first, from 32"
        )
    if args.data is None and args.train_annotations is None and low != high:
        raise ValueError(f"the built-in shapes are square: give --image-size {low} {low}")


def check_machine(args: argparse.Namespace) -> None:
    """Raise ValueError where the device does not exist or lacks what is asked for."""
    try:
        kind = torch.device(args.device).type
    except RuntimeError as error:
        raise ValueError(f"--device {args.device} is not a torch device: give cuda or cpu") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: torch finds no GPU; give --device cpu")
    if args.sync_bn and (kind != "cuda" or world_size() == 1):
        raise ValueError("--sync-bn needs several GPUs: start with torchrun, or leave it out")
    if args.sync_bn and args.pretrained:
        raise ValueError("--sync-bn has no effect: batch norm is frozen with --pretrained")


def option(name: str) -> str:
    """Return the command line's spelling of an argument."""
    return "--" + name.replace("_", "-")
