"""Fill in the arguments of the training script, and reject invalid combinations up front."""

import argparse
import difflib
import math
import os
from pathlib import Path

import torch

from kd.data.layouts import PATHS, find_layout
from kd.detectors import FPN_CHANNELS, STRIDES, ZOO, check_detector, timm_name
from kd.methods import METHODS, build_method
from kd.run.contents import SIDES
from kd.run.distributed import world_size
from kd.run.folder import check_folder, run_name

# Defaults that depend on the data. Learning rates are in make_optimizer; the shapes are evaluated at the end.
SHAPES_RECIPE = {"epochs": 1, "batch_size": 8, "image_size": [64, 64], "optimizer": "adamw"}
COCO_RECIPE = {"epochs": 12, "batch_size": 2, "image_size": [800, 1333], "optimizer": "sgd", "eval_interval": 1}

# The smallest and the largest value. Random numbers depend on 32 bits of the seed; beyond the other limits are typing
# errors, which would run out of memory or overflow.
RANGE = {
    **dict.fromkeys(("epochs", "max_iterations", "eval_interval", "batch_size", "accumulate"), (1, 10**9)),
    **{"clip_grad": (0, 10**9), "aspect_ratio_group_factor": (0, 100), "seed": (0, 2**32 - 1)},
}
POSITIVE = ("lr", "distill_weight")
WORKERS = 16  # data loading processes that any machine may have
PLAIN = {"method": "none", "teacher": None, "teacher_weights": None, "set": [], "distill_weight": 1.0, "inherit": False}


def settle(args: argparse.Namespace) -> None:
    """Fill in missing arguments, and check all of them.

    Raises:
        ValueError: an argument is invalid; the message says what is valid.
    """
    check_paths(args)
    recipe = COCO_RECIPE if args.data or args.train_annotations else SHAPES_RECIPE
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check_names(args)
    check_numbers(args)
    check_machine(args)
    check_sync_bn(args)
    if args.data:
        for name, path in find_layout(args.data).items():
            setattr(args, name, getattr(args, name) or path)
    missing = [option(path) for path in PATHS if getattr(args, path) is None]
    if 0 < len(missing) < 4:
        raise ValueError(f"without --data, all four paths are needed: {', '.join(missing)} missing")
    if args.amp is None:
        if torch.device(args.device).type == "cuda":
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            has_bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
        args.amp = "bf16" if has_bf16 else "off"
    if args.output is None:
        name = "inherit" if args.method == "none" and args.inherit else args.method
        args.output = str(Path("runs", run_name(args, name, args.student)))
    check_folder(Path(args.output), args.resume)


def plain_arguments(args: argparse.Namespace, name: str, backbone: str, epochs: int) -> argparse.Namespace:
    """Return the arguments for plain training of a backbone in the setting of `args`, in a folder next to its own."""
    folder = str(Path(args.output).parent / run_name(args, name, backbone))
    changes = {"student": backbone, "epochs": epochs, "output": folder, "resume": "auto"}
    return argparse.Namespace(**{**vars(args), **PLAIN, **changes})


def inherit_arguments(args: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments for inheriting alone in the setting of `args`, in a folder next to its own."""
    kept = {name: getattr(args, name) for name in ("teacher", "teacher_weights", "inherit")}
    folder = str(Path(args.output).parent / run_name(args, "inherit", args.student))
    return argparse.Namespace(**{**vars(args), **PLAIN, **kept, "output": folder})


def check_paths(args: argparse.Namespace) -> None:
    """Raise ValueError where a text is empty, a file of weights does not exist, or --data is a file."""
    for name, value in vars(args).items():
        if value == "":
            raise ValueError(f"{option(name)} is empty: give a value, or leave it out")
    for name in ("teacher_weights", "student_weights", "pretrained"):
        value = getattr(args, name)
        if isinstance(value, str) and not Path(value).is_file():
            raise ValueError(f"{option(name)} {value}: {'not a file' if Path(value).exists() else 'no such file'}")
    if args.data and Path(args.data).is_file():
        raise ValueError(
            f"--data {args.data} is a file: give the folder that contains train2017/, val2017/ and annotations/ (other "
            "layouts: see --help), or leave it out and give --train-images, --train-annotations, --val-images and "
            "--val-annotations"
        )


def check_names(args: argparse.Namespace) -> None:
    """Raise ValueError unless method, detector and backbones exist and fit together."""
    if args.method not in ("none", *METHODS):
        close = difflib.get_close_matches(args.method.lower(), METHODS, n=1)
        raise ValueError(
            f"unknown method {args.method!r}: choose {close[0] if close else ', '.join(('none', *METHODS))}"
        )
    if not args.teacher and (args.method != "none" or args.inherit):
        reader = "--inherit" if args.method == "none" else f"--method {args.method}"
        raise ValueError(f"{reader} needs a teacher: add --teacher NAME")
    if args.method == "none":
        for name in ("set", "distill_weight", *(() if args.inherit else ("teacher", "teacher_weights"))):
            if getattr(args, name) != PLAIN[name]:
                remedy = ", or add --inherit" if name.startswith("teacher") else ""
                raise ValueError(f"--method none does not distil: leave out {option(name)}{remedy}")
    if args.student_weights and (args.pretrained or args.inherit):
        raise ValueError("--student-weights replaces the whole student: leave out --pretrained and --inherit")
    timm_name(args.student)
    if args.teacher and args.teacher not in ZOO:
        try:
            timm_name(args.teacher)
        except ValueError as error:
            raise ValueError(f"{error}. Detectors of torchvision are {', '.join(ZOO)}") from error
    family = ZOO.get(args.teacher)
    args.detector = args.detector or family or "fcos"
    check_detector(args.detector)
    if family and args.detector != family:
        raise ValueError(
            f"--teacher {args.teacher} is a detector of the family {family}: leave out --detector {args.detector}"
        )
    if args.method != "none":
        with torch.device("meta"):  # find wrong hyper-parameters before a teacher is trained
            build_method(args.method, args.detector, FPN_CHANNELS, FPN_CHANNELS, STRIDES[args.detector], args.set)


def check_numbers(args: argparse.Namespace) -> None:
    """Raise ValueError where a number is out of range."""
    for name, (smallest, largest) in RANGE.items():
        value = getattr(args, name)
        if value is not None and not smallest <= value <= largest:
            raise ValueError(f"{option(name)} is {value}: give a number from {smallest} to {largest}")
    for name in POSITIVE:
        value = getattr(args, name)
        value = float(value.partition(":")[2] or 1) if isinstance(value, str) else value  # --distill-weight auto:RATIO
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{option(name)} is {value}: give a finite number above 0")
    for name, words in (("image_size", "the short side, then the long side"), ("multi_scale", "the lower side first")):
        low, high = getattr(args, name) or SIDES
        if not SIDES[0] <= low <= high <= SIDES[1]:
            raise ValueError(f"{option(name)} {low} {high}: give {words}, from {SIDES[0]} to {SIDES[1]} pixels")
    low, high = args.image_size
    if args.multi_scale and not args.multi_scale[0] <= low <= args.multi_scale[1]:
        raise ValueError(
            f"--multi-scale {args.multi_scale[0]} {args.multi_scale[1]}: give a range that includes the short side of "
            f"--image-size, {low}, at which the student is evaluated"
        )
    if args.data is None and args.train_annotations is None and low != high:
        raise ValueError(f"the built-in shapes are square: give --image-size {low} {low}")


def check_machine(args: argparse.Namespace) -> None:
    """Raise ValueError where this machine does not have the device or so many processors, of train.py or eval.py."""
    kind, _, number = args.device.partition(":")
    if kind not in ("cuda", "cpu") or (number and not (kind == "cuda" and number.isdecimal())):
        raise ValueError(f"--device {args.device}: give cuda, cuda:NUMBER or cpu")
    found = torch.cuda.device_count()
    if kind == "cuda" and found == 0:
        raise ValueError(f"--device {args.device}: torch finds no GPU; give --device cpu")
    index = int(os.environ.get("LOCAL_RANK", number or 0))
    if kind == "cuda" and index >= found:
        raise ValueError(f"--device {args.device}: there is no GPU {index} for this process; torch finds {found}")
    processors = os.cpu_count()
    if not 0 <= args.workers <= max(WORKERS, processors):
        raise ValueError(
            f"--workers is {args.workers}: give a number from 0 to {max(WORKERS, processors)}; this machine has "
            f"{processors} processors"
        )


def check_sync_bn(args: argparse.Namespace) -> None:
    """Raise ValueError where --sync-bn has no effect."""
    kind = torch.device(args.device).type
    if args.sync_bn and (kind != "cuda" or world_size() == 1):
        raise ValueError("--sync-bn needs several GPUs: start with torchrun, or leave it out")
    if args.sync_bn and args.pretrained:
        raise ValueError("--sync-bn has no effect: batch norm is frozen with --pretrained")


def option(name: str) -> str:
    """Return the command line's spelling of an argument."""
    return "--" + name.replace("_", "-")
