"""Read and check annotation files in COCO's format.

The checks cover what training and pycocotools silently rely on: with a box of NaN, two annotations of one id, or an id
too large for floating point, pycocotools does not stop but returns wrong numbers.
"""

import json
import reprlib
from collections import Counter
from pathlib import Path

# pycocotools keeps ids in float64, which is exact for integers below this. The bound also excludes NaN and infinity.
LARGEST = 2**53


class DataError(ValueError):
    """A data set that cannot be used. The message says what is wrong, where, and what to do."""


def is_number(value) -> bool:
    """Return whether a value is a finite number; bool, which Python counts as int, is not."""
    return type(value) in (int, float) and abs(value) < LARGEST


def is_id(value) -> bool:
    """Return whether a value can be an id."""
    return type(value) is int and abs(value) < LARGEST


def is_text(value) -> bool:
    """Return whether a value is a string."""
    return isinstance(value, str)


def is_length(value) -> bool:
    """Return whether a value can be an image's width or height."""
    return is_number(value) and value > 0


def is_box(value) -> bool:
    """Return whether a value is a list of four finite numbers."""
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


# The fields that are kept. Each has a test of its value, which is None where the field is absent, and its description.
FIELDS = {
    "images": {
        "id": (is_id, "an integer below 2^53"),
        "file_name": (is_text, "a string"),
        "width": (is_length, "a number above 0"),
        "height": (is_length, "a number above 0"),
    },
    "categories": {
        "id": (is_id, "an integer below 2^53"),
        "name": (is_text, "a string"),
    },
    "annotations": {
        "id": (is_id, "an integer below 2^53"),
        "image_id": (is_id, "an integer below 2^53"),
        "category_id": (is_id, "an integer below 2^53"),
        "bbox": (is_box, "[x, y, width, height], four finite numbers"),
        "area": (lambda value: value is None or is_number(value), "a finite number or absent"),
        "iscrowd": (lambda value: value is None or value in (0, 1), "0, 1 or absent"),
    },
}


def read_coco(file: Path) -> dict[str, list[dict]]:
    """Read a COCO instances file, and check it with `check_coco`.

    Raises:
        DataError: the file cannot be read, is not JSON or not in COCO's format.
    """
    content = read_json(file)
    if isinstance(content, list) and content and isinstance(content[0], dict) and "image_id" in content[0]:
        raise DataError(
            f"{file} is a results file with {len(content)} detections: give the annotation file it belongs to"
        )
    absent = [key for key in FIELDS if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if absent:
        raise DataError(
            f"{file} is not a COCO instances file: it has no list of {', '.join(absent)}. "
            "Give a JSON object with lists of images, categories and annotations"
        )
    return check_coco(content, file)


def check_coco(content: dict[str, list], file: Path) -> dict[str, list[dict]]:
    """Check annotations in COCO's format, and fill in absent areas and crowd flags.

    Args:
        content: lists of images, categories and annotations.
        file: that they come from, for the messages.

    Returns:
        images, categories and annotations with the fields of FIELDS only; polygons and URLs are most of COCO's size.

    Raises:
        DataError: there are no images or categories, or an invalid field, a repeated id, or an annotation of an unknown
            image or category.
    """
    coco = {}
    for key, fields in FIELDS.items():
        if key != "annotations" and not content[key]:
            raise DataError(f"{file} lists no {key}: give an annotation file with {key}")
        not_objects = [f"entry {i}" for i, entry in enumerate(content[key]) if not isinstance(entry, dict)]
        raise_for(f"{file}: {key} that are not JSON objects", not_objects, "Correct or remove them.")
        coco[key] = [{field: entry.get(field) for field in fields} for entry in content[key]]
        for field, (test, words) in fields.items():
            wrong = [i for i, entry in enumerate(coco[key]) if not test(entry[field])]
            # Entries are named by their ids, which are checked first.
            names = [f"entry {i}" if field == "id" else f"id {coco[key][i]['id']}" for i in wrong]
            found = [f"{name} has {reprlib.repr(coco[key][i][field])}" for name, i in zip(names, wrong)]
            raise_for(f"{file}: {key} whose {field} is not {words}", found, "Correct or remove them.")
        times = Counter(entry["id"] for entry in coco[key])
        twice = [f"id {number}" for number, count in times.items() if count > 1]
        raise_for(f"{file}: ids that several {key} share", twice, "Give each its own id.")
    for field, key in (("image_id", "images"), ("category_id", "categories")):
        known = {entry["id"] for entry in coco[key]}
        unknown = [f"id {a['id']} has {a[field]}" for a in coco["annotations"] if a[field] not in known]
        raise_for(f"{file}: annotations whose {field} is not among the {key}", unknown, "Correct or remove them.")
    for annotation in coco["annotations"]:
        if annotation["area"] is None or annotation["area"] < 0:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        annotation["iscrowd"] = int(annotation["iscrowd"] or 0)
    return coco


def read_bytes(file: Path) -> bytes:
    """Return the content of a file; raise DataError if it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}. Check the path") from error


def read_json(file: Path):
    """Return the content of a JSON file in any Unicode encoding."""
    content = read_bytes(file)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise DataError(f"{file} is not JSON: {error}. Give a COCO instances file") from error


def raise_for(fault: str, offenders: list[str], advice: str) -> None:
    """Raise DataError if there are offenders: the fault, their number, the first 20, and what to do."""
    if offenders:
        named = ", ".join(offenders[:20]) + (", ..." if len(offenders) > 20 else "")
        raise DataError(f"{fault} ({len(offenders)}): {named}. {advice}")
