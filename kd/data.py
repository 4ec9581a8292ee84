"""Data sets by their arguments; COCO-format folders: reading, checking, augmenting, batching.

Every data set here yields (image, target): image [3, h, w] in 0..1; target with boxes (FloatTensor[M, 4]) in [x1, y1,
x2, y2] pixels, 0 <= x1 < x2 <= w and 0 <= y1 < y2 <= h, labels (Int64Tensor[M]) in 1..K-1, and image_id (int).
"""

import json
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.models.detection.faster_rcnn import FasterRCNN_ResNet50_FPN_Weights
from torchvision.transforms import v2

from kd.shapes import Shapes

# torchvision's names of labels 0..90; "N/A" fills the gaps of COCO's own ids.
COCO_NAMES = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]


SHAPES_TRAIN, SHAPES_VAL = 1600, 200  # pictures of the built-in data set


class DataError(ValueError):
    """A data set that cannot be trained or evaluated on; the message says what is wrong, where, and what to do."""


def augmentation(train: bool) -> v2.Compose:
    """Return the transforms of (image, target): a horizontal flip when training, then floats in 0..1."""
    flip = [v2.RandomHorizontalFlip()] if train else []
    return v2.Compose(
        [*flip, v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True), v2.ToPureTensor()]
    )


def collate(batch: list[tuple]) -> tuple[list, list]:
    """Return a batch's images and targets as two lists: sizes differ, so nothing is stacked."""
    images, targets = zip(*batch)
    return list(images), list(targets)


def open_dataset(images: str | None, annotations: str | None, image_size: tuple[int, int], train: bool) -> Dataset:
    """Open the training or the validation set: a COCO-format folder, or the built-in shapes without annotations.

    Both offer categories (COCO category of each label), num_classes (K), summary (a line of text) and coco().
    """
    if annotations:
        return CocoFolder(images, annotations, augmentation(train))
    count, seed = (SHAPES_TRAIN, 1) if train else (SHAPES_VAL, 0)
    return Shapes(count, seed, image_size[0], augmentation(train))


def class_names(categories: dict[int, dict]) -> dict[int, str]:
    """Return the name of each label."""
    return {label: category["name"] for label, category in categories.items()}


def label_categories(categories: list[dict]) -> dict[int, dict]:
    """Map labels to COCO categories: COCO's own 80 keep their ids (1..90 with gaps), others get 1..K-1 in order.

    COCO's ids as labels are torchvision's convention, so its checkpoints fit.
    """
    is_coco = len(categories) == 80 and all(
        0 < c["id"] < len(COCO_NAMES) and c["name"] == COCO_NAMES[c["id"]] for c in categories
    )
    ordered = sorted(categories, key=lambda c: c["id"])
    return {c["id"] if is_coco else label: c for label, c in enumerate(ordered, start=1)}


class CocoFolder(Dataset):
    """Images of a folder with boxes from a COCO instances file.

    What is done with imperfect annotations: boxes are clipped to the image; boxes without area left and crowd regions
    are kept out of training; images without boxes stay as negatives. Evaluation sees the file as it is.

    Args:
        images: folder of the image files.
        annotations: JSON file with "images", "annotations" and "categories".
        transforms: called on (image, target).

    Attributes:
        categories: COCO category of each label.
        num_classes: K, the largest label plus one.
        summary: one line that says what was read.

    Raises:
        DataError: files that are missing or not COCO; nothing in them; images that are not there (up to 20 are named).
    """

    def __init__(self, images: str | Path, annotations: str | Path, transforms=None):
        self.folder, self.file, self.transforms = Path(images), Path(annotations), transforms
        self._coco = read_coco(self.file)
        self.categories = label_categories(self._coco["categories"])
        self.num_classes = max(self.categories) + 1
        self.images = sorted(self._coco["images"], key=lambda image: image["id"])
        missing = [i["file_name"] for i in self.images if not (self.folder / i["file_name"]).is_file()]
        if missing:
            named = ", ".join(missing[:20])
            raise DataError(f"{len(missing)} images of {self.file} are not in {self.folder}: {named}")

        label_of = {category["id"]: label for label, category in self.categories.items()}
        size_of = {image["id"]: (image["width"], image["height"]) for image in self.images}
        boxes = {image["id"]: [] for image in self.images}
        labels = {image["id"]: [] for image in self.images}
        crowds = empty = 0
        for annotation in self._coco["annotations"]:
            image_id = annotation["image_id"]
            if annotation.get("iscrowd"):
                crowds += 1
                continue
            width, height = size_of[image_id]
            x, y, w, h = annotation["bbox"]
            x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
            if not (x2 > x1 and y2 > y1):
                empty += 1
                continue
            boxes[image_id].append((x1, y1, x2, y2))
            labels[image_id].append(label_of[annotation["category_id"]])
        self.boxes = [torch.tensor(boxes[i["id"]], dtype=torch.float32).reshape(-1, 4) for i in self.images]
        self.labels = [torch.tensor(labels[i["id"]], dtype=torch.int64) for i in self.images]

        kept = sum(map(len, self.labels))
        without = sum(len(image_labels) == 0 for image_labels in self.labels)
        self.summary = (
            f"{self.file.name}: {len(self.images)} images ({without} without boxes), {kept} boxes of "
            f"{len(self.categories)} categories, {crowds} crowd regions and {empty} boxes without area left out"
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        """Return (image [3, h, w] uint8 before transforms, target)."""
        with Image.open(self.folder / self.images[index]["file_name"]) as file:
            image = tv_tensors.Image(v2.functional.pil_to_tensor(file.convert("RGB")))
        target = {
            "boxes": tv_tensors.BoundingBoxes(self.boxes[index], format="XYXY", canvas_size=image.shape[-2:]),
            "labels": self.labels[index],
            "image_id": self.images[index]["id"],
        }
        return self.transforms(image, target) if self.transforms else (image, target)

    def coco(self) -> dict:
        """Return the annotations as read from the file, for evaluation."""
        return self._coco


def read_coco(file: Path) -> dict:
    """Read a COCO instances file and check its structure.

    Raises:
        DataError: not there, not JSON, not COCO, without images, or naming images and categories that it does not list.
    """
    try:
        coco = json.loads(file.read_text())
    except OSError as error:
        raise DataError(f"the annotations {file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    if not isinstance(coco, dict) or not all(
        isinstance(coco.get(key), list) for key in ("images", "annotations", "categories")
    ):
        raise DataError(f'{file} is not a COCO instances file: it needs lists "images", "annotations" and "categories"')
    if not coco["images"] or not coco["categories"]:
        raise DataError(f"{file} lists {len(coco['images'])} images and {len(coco['categories'])} categories")
    for key, fields in {
        "images": ("id", "file_name", "width", "height"),
        "annotations": ("id", "image_id", "category_id", "bbox"),
        "categories": ("id", "name"),
    }.items():
        for position, entry in enumerate(coco[key]):
            absent = [field for field in fields if not isinstance(entry, dict) or field not in entry]
            if absent:
                raise DataError(f"{file}: entry {position} of {key} has no {', '.join(absent)}")
    for key, known in (("image_id", coco["images"]), ("category_id", coco["categories"])):
        ids = {entry["id"] for entry in known}
        unknown = [a["id"] for a in coco["annotations"] if a[key] not in ids]
        if unknown:
            raise DataError(f"{file}: {len(unknown)} annotations name an unknown {key}, first annotation {unknown[0]}")
    for annotation in coco["annotations"]:
        # pycocotools reads both; not every labelling tool writes them.
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
        annotation.setdefault("iscrowd", 0)
    return coco
