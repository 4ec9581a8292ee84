"""Check what files contain before anything is built from it: model.pt may come from elsewhere, or be damaged."""

import reprlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from kd.detectors import DETECTORS
from kd.detectors.anchors import ANCHORS

SIDES = (32, 10_000)  # smallest and largest image side, in pixels
MOST_CLASSES = 20_000  # V3Det, the public data set with the most, has 13,204


def is_whole(value, smallest: int, largest: int) -> bool:
    """Return whether a value is an integer in a range that includes both ends; bool is not one."""
    return type(value) is int and smallest <= value <= largest


def is_size(value) -> bool:
    """Return whether a value is (short side, long side)."""
    is_pair = isinstance(value, tuple | list) and len(value) == 2
    return is_pair and all(is_whole(side, *SIDES) for side in value) and value[0] <= value[1]


def is_color(value) -> bool:
    """Return whether a value is three numbers from 0 to 1."""
    is_triple = isinstance(value, tuple | list) and len(value) == 3
    return is_triple and all(type(part) in (int, float) and 0 <= part <= 1 for part in value)


# The arguments of `build_detector` that model.pt may have. Others could load or download files.
ARGUMENTS = {
    "detector": (lambda value: value in DETECTORS, f"one of {', '.join(DETECTORS)}"),
    "backbone": (lambda value: isinstance(value, str), "a string"),
    "num_classes": (lambda value: is_whole(value, 2, MOST_CLASSES), f"an integer from 2 to {MOST_CLASSES}"),
    "image_size": (is_size, f"the short and the long side, from {SIDES[0]} to {SIDES[1]} pixels"),
    "from_scratch": (lambda value: isinstance(value, bool), "True or False"),
    "anchors": (lambda value: value is None or value in ANCHORS, f"one of {', '.join(ANCHORS)} or absent"),
    "tower_norm": (lambda value: value is None or isinstance(value, bool), "True, False or absent"),
    "giou": (lambda value: value is None or isinstance(value, bool), "True, False or absent"),
    "image_mean": (lambda value: value is None or is_color(value), "three numbers from 0 to 1, or absent"),
    "image_std": (
        lambda value: value is None or (is_color(value) and min(value) > 0),
        "three numbers above 0, up to 1, or absent",
    ),
}


def check_model(content: object, path: str | Path) -> None:
    """Check the content of a model.pt, except whether its weights fit.

    Raises:
        ValueError: a part is absent or of another kind, an argument is unknown or out of range, or a category has no
            label of the detector.
    """
    parts = {"model": dict, "arguments": dict, "categories": dict}
    check_parts(content, parts, path, "was not written by train.py")
    arguments, categories = content["arguments"], content["categories"]
    unknown = [reprlib.repr(name) for name in arguments if name not in ARGUMENTS]
    if unknown:
        raise ValueError(f"{path} is not used: its arguments {first_three(unknown)} are unknown")
    for name, (test, words) in ARGUMENTS.items():
        if not test(arguments.get(name)):
            raise ValueError(f"{path} is not used: {name} is {reprlib.repr(arguments.get(name))}, not {words}")
    for label, category in categories.items():
        is_named = isinstance(category, dict) and isinstance(category.get("name"), str)
        if not is_named or not is_whole(label, 1, arguments["num_classes"] - 1):
            raise ValueError(
                f"{path} is not used: among its categories, label {reprlib.repr(label)} is {reprlib.repr(category)}, "
                f"but labels are 1 to {arguments['num_classes'] - 1}, and a category has a name"
            )


def check_parts(content: object, parts: dict[str, type], path: str | Path, fault: str) -> None:
    """Raise ValueError with a fault unless the content of a file has these parts of these types."""
    if not isinstance(content, dict):
        raise ValueError(f"{path} {fault}: it has type {type(content).__name__}, not dict")
    missing = [name for name in parts if name not in content]
    if missing:
        raise ValueError(f"{path} {fault}: it lacks {', '.join(missing)}")
    for name, kind in parts.items():
        if not isinstance(content[name], kind) or isinstance(content[name], bool):
            raise ValueError(f"{path} {fault}: {name} has type {type(content[name]).__name__}, not {kind.__name__}")


def is_state_dict(value: object) -> bool:
    """Return whether a value consists of tensors with names."""
    return isinstance(value, dict) and all(isinstance(n, str) and isinstance(v, Tensor) for n, v in value.items())


def not_finite(content: object, name: str = "") -> Iterator[str]:
    """Yield the names of tensors with NaN or infinity, in a tensor or nested dictionaries and lists."""
    if isinstance(content, Tensor):
        if not content.isfinite().all():
            yield name
    elif isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from not_finite(value, f"{name}.{key}" if name else str(key))


def first_three(names: Iterable[str]) -> str:
    """Return the first three names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
