"""Read annotation files of CrowdHuman (.odgt), https://www.crowdhuman.org.

A line per image, each a JSON object: {"ID": "273271,c9db000d5146c15", "gtboxes": [{"tag": "person", "fbox": [x, y,
width, height], "extra": {"ignore": 1}, ...}]}. fbox, the box of the full body in pixels, is read; vbox, its visible
part, and hbox, the head, are not. An fbox may reach outside the image.
"""

import json
import reprlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from kd.data.coco import DataError, check_coco, is_box, is_number, raise_for, read_bytes
from kd.data.images import upright_size

PERSON = {"id": 1, "name": "person"}


def read_crowdhuman(file: Path, images: Path) -> dict[str, list[dict]]:
    """Read an .odgt file, in COCO's format.

    The only class is person. A box is a crowd region if its tag is not "person" (it is "mask" for groups, reflections
    and posters) or its extra.ignore is not 0. A head without a full body is left out. The id of an image is the number
    of its line, from 1, because CrowdHuman's IDs are text.

    Args:
        file: annotation_train.odgt or annotation_val.odgt.
        images: folder of the files ID.jpg. The annotations have no image sizes, so these are read from the headers. An
            image whose header cannot be read gets the size 1x1; `find_bad_images` says what is wrong with it.

    Returns:
        As `read_coco`.

    Raises:
        DataError: the file cannot be read, or a line or a box is invalid; the message names the line.
    """
    lines = [(n, line) for n, line in enumerate(read_bytes(file).splitlines(), start=1) if line.strip()]
    entries = {number: parse(line, f"{file}, line {number}") for number, line in lines}
    annotations, wrong = [], []
    for number, entry in entries.items():
        for position, box in enumerate(entry["gtboxes"]):
            fault = find_fault(box)
            if fault:
                wrong.append(f"line {number}, box {position}: {fault}")
            elif "fbox" in box:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": PERSON["id"],
                        "bbox": box["fbox"],
                        "iscrowd": int(box["tag"] != "person" or box.get("extra", {}).get("ignore", 0) != 0),
                    }
                )
    raise_for(f"{file}: invalid boxes", wrong, "Correct or remove them.")

    names = [f"{entry['ID']}.jpg" for entry in entries.values()]
    Image.init()  # loads Pillow's formats, which is not thread-safe
    with ThreadPoolExecutor() as pool:
        sizes = pool.map(upright_size, [images / name for name in names])
        files = [
            {"id": number, "file_name": name, "width": width, "height": height}
            for number, name, (width, height) in zip(entries, names, (size or (1, 1) for size in sizes))
        ]
    return check_coco({"images": files, "categories": [PERSON], "annotations": annotations}, file)


def parse(line: bytes, place: str) -> dict:
    """Return the JSON object of a line; raise DataError, with the place, unless it has an ID and a list of gtboxes."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not JSON: {error}. Give an .odgt file of CrowdHuman") from error
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("ID"), str)
        or not isinstance(entry.get("gtboxes"), list)
    ):
        raise DataError(f'{place} is not {{"ID": text, "gtboxes": [...]}}: {reprlib.repr(entry)}. Correct or remove it')
    return entry


def find_fault(box) -> str | None:
    """Return why an entry of gtboxes is invalid, None if it is valid."""
    if not isinstance(box, dict):
        return f"{reprlib.repr(box)} is not a JSON object"
    if not isinstance(box.get("tag"), str):
        return f"tag is {reprlib.repr(box.get('tag'))}, not a text"
    if not is_box(box.get("fbox")) and ("fbox" in box or "hbox" not in box):
        return f"fbox is {reprlib.repr(box.get('fbox'))}, not [x, y, width, height], four finite numbers"
    extra = box.get("extra", {})
    if not isinstance(extra, dict) or not is_number(extra.get("ignore", 0)):
        return f"extra is {reprlib.repr(extra)}, not an object whose ignore is a number"
    return None
