"""Read PASCAL VOC's annotations, laid out as for torchvision.datasets.VOCDetection.

    VOCdevkit/VOC2007/ImageSets/Main/trainval.txt    an image ID per line, such as 000005
    VOCdevkit/VOC2007/Annotations/000005.xml         its objects
    VOCdevkit/VOC2007/JPEGImages/000005.jpg

VOC counts pixels from 1 and includes the last one, so an image of width w is covered by xmin 1 and xmax w. A box here
has its edges between the pixels, [xmin - 1, ymin - 1, xmax, ymax], which covers the same pixels. IoUs then are those of
VOC's own code, which adds 1 to each width and height, and a box can cover the whole image.
"""

import glob
import reprlib
from pathlib import Path
from xml.etree import ElementTree

from torchvision.models.segmentation import FCN_ResNet50_Weights

from kd.data.coco import DataError, check_coco, is_number, raise_for, read_bytes

# The 20 classes in VOC's order, which is alphabetical; the first of torchvision's names is the background.
CLASSES = FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"][1:]
IDS = {name: number for number, name in enumerate(CLASSES, start=1)}
CORNERS = ("xmin", "ymin", "xmax", "ymax")


def voc_lists(pattern: Path) -> list[Path]:
    """Return the lists of images that a path means: itself, or those that match it as a glob pattern.

    Raises:
        DataError: there is no such file, or it is not in a folder ImageSets/Main.
    """
    lists = [pattern] if pattern.is_file() else [Path(name) for name in sorted(glob.glob(str(pattern)))]
    if not lists:
        raise DataError(f"{pattern} does not exist: give a list of images, VOC2007/ImageSets/Main/trainval.txt")
    for file in lists:
        if file.absolute().parts[-3:-1] != ("ImageSets", "Main"):
            raise DataError(f"{file} is not in a folder ImageSets/Main, as VOC's lists are: move it there")
    return lists


def voc_annotations(file: Path) -> list[Path]:
    """Return the XML files of the images in a list, in its order.

    Raises:
        DataError: the list cannot be read, or a line is not one ID.
    """
    lines = read_bytes(file).decode(errors="replace").splitlines()
    wrong = [f"line {number}: {reprlib.repr(line)}" for number, line in enumerate(lines, 1) if len(line.split()) > 1]
    raise_for(f"{file}: lines that are not one image ID", wrong, "Give trainval.txt, not the list of a class.")
    return [file.absolute().parents[2] / "Annotations" / f"{line.strip()}.xml" for line in lines if line.strip()]


def read_voc(pattern: Path) -> dict[str, list[dict]]:
    """Read VOC's annotations, in COCO's format.

    Difficult objects become crowd regions: they are left out of training, and detections there count as neither right
    nor wrong. Truncated objects are objects like others. The parts of a person (hands, feet, head) are not read.

    Args:
        pattern: a list, or `VOCdevkit/VOC20[01][27]/ImageSets/Main/trainval.txt` for those of 2007 and 2012. File names
            are relative to VOCdevkit. Images are numbered over all lists, from 1.

    Returns:
        As `read_coco`.

    Raises:
        DataError: a file cannot be read, is not XML or has an invalid size, class or box.
    """
    images, annotations, wrong = [], [], []
    files = [xml for file in voc_lists(pattern) for xml in voc_annotations(file)]
    for number, xml in enumerate(files, start=1):
        try:
            root = ElementTree.fromstring(read_bytes(xml))
        except (ElementTree.ParseError, LookupError, ValueError) as error:
            raise DataError(f"{xml} is not XML: {error}. Restore it, or remove it from the list") from error
        width, height = (to_number(root.findtext(f"size/{name}")) for name in ("width", "height"))
        if not (width or 0) > 0 or not (height or 0) > 0:
            wrong.append(f"{xml}: size is not a width and a height above 0")
        name = f"{xml.parents[1].name}/JPEGImages/{xml.stem}.jpg"
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for position, thing in enumerate(root.findall("object"), start=1):
            corners = [to_number(thing.findtext(f"bndbox/{name}")) for name in CORNERS]
            label, difficult = (thing.findtext("name") or "").strip(), thing.findtext("difficult", "0").strip()
            if label not in IDS or None in corners or difficult not in ("0", "1"):
                found = f"name {label!r}, difficult {difficult!r}, {', '.join(CORNERS)} {corners}"
                wrong.append(f"{xml}, object {position}: {found}")
                continue
            xmin, ymin, xmax, ymax = corners
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": IDS[label],
                    "bbox": [xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1],
                    "iscrowd": int(difficult),
                }
            )
    advice = f"Names are {', '.join(CLASSES)}; difficult is 0 or 1; corners are numbers."
    raise_for(f"{pattern}: invalid annotations", wrong, advice)
    categories = [{"id": number, "name": name} for name, number in IDS.items()]
    return check_coco({"images": images, "categories": categories, "annotations": annotations}, pattern)


def to_number(text: str | None) -> float | None:
    """Return the finite number in a text, None if there is none."""
    try:
        return float(text) if is_number(float(text)) else None
    except (TypeError, ValueError):
        return None
