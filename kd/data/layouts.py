"""Recognise the layout of a data folder by what lies in it, and the format of an annotation file by its suffix.

kd/data/README.md describes the layouts.
"""

import glob
from pathlib import Path

from kd.data.coco import DataError, read_coco
from kd.data.crowdhuman import read_crowdhuman
from kd.data.voc import read_voc, voc_annotations, voc_lists

FORMATS = {".odgt": "crowdhuman", ".txt": "voc"}  # of annotation files by suffix; others are COCO's
PATHS = ("train_images", "train_annotations", "val_images", "val_annotations")

# VOC2007 and VOC2012 as one path, a glob pattern. It does not match the years between, which VOC2012 contains.
VOC_YEARS = "VOC20[01][27]"


def coco_paths(root: Path) -> tuple[Path, ...]:
    """Return images and annotations of training and validation, in the order of PATHS; so do the next functions."""
    train, val = (root / "annotations" / f"instances_{split}.json" for split in ("train2017", "val2017"))
    return root / "train2017", train, root / "val2017", val


def roboflow_paths(root: Path) -> tuple[Path, ...]:
    """Validate on valid/, or on test/ without it."""
    name = "_annotations.coco.json"
    train, val = root / "train", root / ("test" if not (root / "valid").exists() else "valid")
    return train, train / name, val, val / name


def crowdhuman_paths(root: Path) -> tuple[Path, ...]:
    """Both annotation files have their images in one folder."""
    images = root / "Images"
    return images, root / "annotation_train.odgt", images, root / "annotation_val.odgt"


def voc_paths(root: Path) -> tuple[Path, ...]:
    """Train on trainval of 2007 and 2012 and validate on test of 2007; with 2012 alone, take its train and val."""
    devkit = root / "VOCdevkit" if (root / "VOCdevkit").exists() else root
    lists = {year: devkit / year / "ImageSets" / "Main" for year in ("VOC2007", "VOC2012") if (devkit / year).exists()}
    if list(lists) == ["VOC2012"]:
        return devkit, lists["VOC2012"] / "train.txt", devkit, lists["VOC2012"] / "val.txt"
    train = [folder / "trainval.txt" for folder in lists.values() if (folder / "trainval.txt").exists()]
    both = Path(glob.escape(str(devkit)), VOC_YEARS, "ImageSets", "Main", "trainval.txt")
    first = train[0] if train else lists["VOC2007"] / "trainval.txt"
    return devkit, both if len(train) == 2 else first, devkit, lists["VOC2007"] / "test.txt"


# By the description of a layout: the paths of which its folders have at least one, and its function.
LAYOUTS = {
    "COCO (train2017/, val2017/, annotations/instances_train2017.json and instances_val2017.json)": (
        ("train2017", "val2017", "annotations/instances_train2017.json", "annotations/instances_val2017.json"),
        coco_paths,
    ),
    "Roboflow's COCO export (train/ and valid/, or test/ without it, each with _annotations.coco.json)": (
        ("train/_annotations.coco.json", "valid/_annotations.coco.json", "test/_annotations.coco.json"),
        roboflow_paths,
    ),
    "CrowdHuman (annotation_train.odgt, annotation_val.odgt, Images/)": (
        ("annotation_train.odgt", "annotation_val.odgt"),
        crowdhuman_paths,
    ),
    "VOC (VOCdevkit/ or its parent, with VOC2007/, VOC2012/ or both)": (
        ("VOC2007", "VOC2012", "VOCdevkit/VOC2007", "VOCdevkit/VOC2012"),
        voc_paths,
    ),
}


def find_layout(folder: str) -> dict[str, str]:
    """Return the paths in a data folder by their names in PATHS. They may not exist: eval.py needs no training set.

    Raises:
        DataError: the folder does not exist, or has none or several of the layouts.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"--data {folder}: no such folder")
    found = [paths for marks, paths in LAYOUTS.values() if any((root / mark).exists() for mark in marks)]
    if len(found) != 1:
        content = sorted(f"{path.name}/" if path.is_dir() else path.name for path in root.iterdir())
        listed = ", ".join(content[:10]) + (", ..." if len(content) > 10 else "")
        raise DataError(
            f"--data {folder} has {'several layouts' if found else 'no known layout'}; it contains "
            f"{listed or 'nothing'}. Known layouts are {'; '.join(LAYOUTS)}. "
            "For others give images and annotations of each split instead of --data"
        )
    return dict(zip(PATHS, map(str, found[0](root))))


def data_format(annotations: str | Path) -> str:
    """Return the format of an annotation file: "coco", "crowdhuman" or "voc"."""
    return FORMATS.get(Path(annotations).suffix, "coco")


def read_annotations(annotations: Path, images: Path) -> dict[str, list[dict]]:
    """Return annotations of any format as `read_coco` does; images is the folder of the image files."""
    readers = {"crowdhuman": lambda file: read_crowdhuman(file, images), "voc": read_voc, "coco": read_coco}
    return readers[data_format(annotations)](annotations)


def annotation_files(annotations: str | Path) -> list[Path]:
    """Return the files that annotations consist of: for VOC the lists and their XML files, else one."""
    if data_format(annotations) != "voc":
        return [Path(annotations)]
    return [file for images in voc_lists(Path(annotations)) for file in (images, *voc_annotations(images))]
