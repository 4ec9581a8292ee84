"""The distillation methods by name. Each file is self-contained; this is the only place that lists them.

A method is a module called as method(student, teacher, targets). It returns its weighted losses by name. `needs` lists
the DetectorOutput attributes it reads. `warmup` is the number of training steps over which its losses grow to full
weight, which train.py limits to a tenth of the run. `maps`, called with the same arguments, returns where it looks, for
`eval.py --explain`. With --inherit, convolutions with bias whose name contains "adapter" begin as the identity.
"""

import ast
import inspect
import sys
from functools import partial
from types import UnionType
from typing import get_args, get_origin

from torch import nn

from kd.methods.bckd import BCKD
from kd.methods.crosskd import CrossKD
from kd.methods.cwd import CWD
from kd.methods.drkd import DRKD
from kd.methods.fgd import FGD
from kd.methods.frs import FRS
from kd.methods.imitation import Imitation
from kd.methods.ld import LD
from kd.methods.mgd import MGD
from kd.methods.pgd import PGD
from kd.methods.pkd import PKD
from kd.methods.ssim import SSIM
from kd.methods.tid import TID

METHODS = {
    "l1": partial(Imitation, p=1),
    "l2": partial(Imitation, p=2),
    "frs": FRS,
    "pgd": PGD,
    "ssim": SSIM,
    "drkd": DRKD,
    "tid": TID,
    "pkd": PKD,
    "cwd": CWD,
    "mgd": MGD,
    "fgd": FGD,
    "ld": LD,
    "bckd": BCKD,
    "crosskd": CrossKD,
}


def build_method(
    name: str,
    detector: str,
    student_channels: int,
    teacher_channels: int,
    strides: tuple[int, ...],
    settings: list[str],
    inherits: bool = False,
) -> nn.Module:
    """Build a method.

    Args:
        name: a key of METHODS.
        detector: chooses the default hyper-parameters.
        student_channels: channels of the student's FPN levels.
        teacher_channels: channels of the teacher's.
        strides: of the levels, in pixels.
        settings: hyper-parameters as NAME=VALUE, VALUE a Python literal or text.
        inherits: whether the student begins with its teacher's FPN and heads. Then adapters between equal numbers of
            channels begin as the identity: random ones would pull the student away from what it inherited.

    Raises:
        ValueError: the method does not support the detector, has no such hyper-parameter, or needs another type; one is
            given twice; a number is negative or not finite.
    """
    make, legal, values = METHODS[name], hyper_parameters(name), {}
    for text in settings:
        key, _, value = text.partition("=")
        if key not in legal or not value:
            raise ValueError(f"--set {text}: {name} takes NAME=VALUE with NAME one of {', '.join(legal)}")
        if key in values:
            raise ValueError(f"--set {text}: {key} is given twice")
        try:
            values[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[key] = value
        kind = legal[key].annotation
        if not has_type(values[key], kind):
            kind = kind.__name__ if isinstance(kind, type) else kind
            raise ValueError(f"--set {text}: {name} takes {key} as {kind}, default {legal[key].default}")
        if not all(0 <= number <= sys.float_info.max for number in numbers(values[key])):
            raise ValueError(f"--set {text}: give finite numbers from 0")
    method = make(detector, student_channels, teacher_channels, strides, **values)
    if inherits and student_channels == teacher_channels:
        for key, module in method.named_modules():
            if "adapter" in key and isinstance(module, nn.Conv2d):
                nn.init.dirac_(module.weight)
                nn.init.zeros_(module.bias)
    return method


def needs(name: str) -> tuple[str, ...]:
    """Return the DetectorOutput attributes that a method reads."""
    return getattr(METHODS[name], "func", METHODS[name]).needs


def hyper_parameters(name: str) -> dict[str, inspect.Parameter]:
    """Return the hyper-parameters of a method by name."""
    fixed = getattr(METHODS[name], "keywords", {})  # l1 and l2 are one class with p fixed
    parameters = inspect.signature(METHODS[name]).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in fixed}


def describe_method(name: str) -> str:
    """Return the hyper-parameters of a method with their defaults, and what they mean, as text."""
    make = METHODS[name]
    meaning = inspect.getdoc(getattr(make, "func", make)).partition("\n\nExample")[0]
    defaults = " ".join(f"{p.name}={p.default}" for p in hyper_parameters(name).values())
    return f"{meaning}\n\nDefaults (None: depends on the detector), to be changed by --set NAME=VALUE:\n    {defaults}"


def numbers(value: object) -> list[float]:
    """Return the numbers of a value: itself, the elements of a tuple, or none."""
    values = value if isinstance(value, tuple) else (value,)
    return [number for number in values if isinstance(number, int | float)]


def has_type(value: object, annotation: object) -> bool:
    """Return whether a value agrees with an annotation: a plain type, a tuple, or a union of them."""
    if get_origin(annotation) is UnionType:
        return any(has_type(value, member) for member in get_args(annotation))
    if get_origin(annotation) is tuple:
        element, *others = get_args(annotation)
        if not isinstance(value, tuple) or (others != [Ellipsis] and len(value) != 1 + len(others)):
            return False
        return all(has_type(v, element) for v in value)
    return type(value) is annotation or (annotation is float and type(value) is int)
