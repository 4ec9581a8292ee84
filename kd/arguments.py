"""The training script's arguments: filled in, and refused before anything is computed where they cannot be meant."""

import argparse
import ast
import difflib
import importlib.util
import inspect
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin

import torch
from torch import nn

from kd.detectors import FPN_CHANNELS, STRIDES, check_detector, timm_name
from kd.methods import METHODS
from kd.processes import world_size

# What an argument is when it is not given. Learning rates are in make_optimizer; the shapes are evaluated at the end.
SHAPES_RECIPE = {"epochs": 2, "batch_size": 8, "image_size": [64, 64], "optimizer": "adamw"}
COCO_RECIPE = {"epochs": 12, "batch_size": 2, "image_size": [800, 1333], "optimizer": "sgd", "eval_interval": 1}

LEAST = {"epochs": 1, "batch_size": 1, "eval_interval": 1, "max_iterations": 1, "workers": 0, "seed": 0}
ABOVE_ZERO = ("lr", "distill_weight", "clip_grad", "checkpoint_minutes")


def settle(args: argparse.Namespace) -> None:
    """Fill in what was not given.

    Raises:
        ValueError: what cannot be meant, with what could be.
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
    absent = [option(path) for path in paths if getattr(args, path) is None]
    if 0 < len(absent) < 4:
        raise ValueError(f"without --data, all four paths are needed: {', '.join(absent)} missing")
    if args.amp is None:
        has_bf16 = args.device.startswith("cuda") or torch.cpu.get_capabilities().get("avx512_bf16", False)
        args.amp = "bf16" if has_bf16 else "off"
    if args.output is None:
        args.output = str(Path("runs", run_name(args, args.method, args.student)))


def check_names(args: argparse.Namespace) -> None:
    """Raise ValueError unless method, detector and backbones exist and go together."""
    if args.method not in ("none", *METHODS):
        close = difflib.get_close_matches(args.method, METHODS, n=1)
        raise ValueError(
            f"unknown method {args.method!r}: choose {close[0] if close else ', '.join(('none', *METHODS))}"
        )
    if args.method != "none" and not args.teacher:
        raise ValueError(f"--method {args.method} needs a teacher: add --teacher BACKBONE")
    if args.method == "none":
        for name in ("teacher", "teacher_weights", "set", "inherit"):
            if getattr(args, name):
                raise ValueError(f"--method none has no teacher: leave out {option(name)}")
        if args.distill_weight != 1:
            raise ValueError("--method none has no losses to weight: leave out --distill-weight")
    for backbone in filter(None, (args.student, args.teacher)):
        timm_name(backbone)
    check_detector(args.detector)
    if args.method != "none":
        with torch.device("meta"):  # a wrong hyper-parameter shall not be found after an hour of training a teacher
            build_method(args)


def check_numbers(args: argparse.Namespace) -> None:
    """Raise ValueError where a number is out of its range."""
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"{option(name)} is {value}: give {least} or more")
    for name in ABOVE_ZERO:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"{option(name)} is {value}: give a number above 0")
    if args.ema is not None and not 0 < args.ema < 1:
        raise ValueError(f"--ema is {args.ema}: give a decay between 0 and 1, such as 0.9998")
    low, high = args.image_size
    if not 32 <= low <= high:
        raise ValueError(f"--image-size {low} {high}: give the short side, 32 or more, then the longest side")
    if args.data is None and args.train_annotations is None and low != high:
        raise ValueError(f"the built-in shapes are square: give --image-size {low} {low}")


def check_machine(args: argparse.Namespace) -> None:
    """Raise ValueError where a device or package is not there, or cannot do what is asked of it."""
    try:
        kind = torch.device(args.device).type
    except RuntimeError as error:
        raise ValueError(f"--device {args.device} is no device of torch: give cuda or cpu") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: this torch sees no GPU; give --device cpu")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--tensorboard: the package is not installed; pip install tensorboard, or leave it out")
    if args.sync_bn and (kind != "cuda" or world_size() == 1):
        raise ValueError("--sync-bn is for several GPUs: start with torchrun, or leave it out")
    if args.sync_bn and (args.pretrained or args.pretrained_weights):
        raise ValueError("--sync-bn has nothing to do: from pretrained weights, batch norm is frozen")


def option(name: str) -> str:
    """Return the command line's spelling of an argument."""
    return "--" + name.replace("_", "-")


def run_name(args: argparse.Namespace, method: str, student: str) -> str:
    """Return the name of the run of a method and student in the setting of `args`."""
    teacher = [args.teacher] if method != "none" else []
    data = [Path(args.data).resolve().name] if args.data else []
    return "-".join([method, args.detector, *teacher, student, *data])


def build_method(args: argparse.Namespace) -> nn.Module:
    """Build the method with the hyper-parameters of --set NAME=VALUE.

    Raises:
        ValueError: a name that the method does not have, text that is not NAME=VALUE, a value of another type, or a
            detector it does not serve.
    """
    make = METHODS[args.method]
    settled = getattr(make, "keywords", {})  # l1 and l2 are one class; p is not to be changed
    legal = {k: v for k, v in list(inspect.signature(make).parameters.items())[4:] if k not in settled}
    values = {}
    for text in args.set:
        name, _, value = text.partition("=")
        if name not in legal or not value:
            raise ValueError(f"--set {text}: {args.method} takes NAME=VALUE with NAME one of {', '.join(legal)}")
        try:
            values[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[name] = value
        if not has_type(values[name], legal[name].annotation):
            kind = legal[name].annotation
            kind = kind.__name__ if isinstance(kind, type) else kind
            raise ValueError(f"--set {text}: {args.method} takes {name} as {kind}, default {legal[name].default}")
    return make(args.detector, FPN_CHANNELS, FPN_CHANNELS, STRIDES[args.detector], **values)


def has_type(value: object, annotation: object) -> bool:
    """Return whether a value is what an annotation says: a plain type, a tuple of one type, or a union of such."""
    if get_origin(annotation) is UnionType:
        return any(has_type(value, member) for member in get_args(annotation))
    if get_origin(annotation) is tuple:
        element, *others = get_args(annotation)
        if not isinstance(value, tuple) or (others != [Ellipsis] and len(value) != 1 + len(others)):
            return False
        return all(has_type(v, element) for v in value)
    return type(value) is annotation or (annotation is float and type(value) is int)
