"""Data sets by their arguments; COCO-format folders: their labels, boxes and batches.

Every data set here yields (image, target): image [3, h, w] in 0..1; target with boxes (FloatTensor[M, 4]) in [x1, y1,
x2, y2] pixels, 0 <= x1 < x2 <= w and 0 <= y1 < y2 <= h, labels (Int64Tensor[M]) in 1..K-1, and image_id (int).
"""

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.models.detection.faster_rcnn import FasterRCNN_ResNet50_FPN_Weights
from torchvision.transforms.v2 import functional

from kd.coco import DataError, read_coco, refuse
from kd.images import find_bad_images, read_image
from kd.shapes import Shapes
from kd.transforms import apply_seeded, augmentation

# torchvision's names of labels 0..90; "N/A" fills the gaps of COCO's own ids.
COCO_NAMES = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]

SHAPES_TRAIN, SHAPES_VAL = 1600, 200  # pictures of the built-in data set

# The smallest part of the image's side that a box may have. float32 tells 1.2e-7 of it apart: below a few times that, a
# flip or a resize can round both edges of a box to the same number, which torchvision's detectors refuse.
THINNEST = 1e-6


def collate(batch: list[tuple]) -> tuple[list, list]:
    """Return a batch's images and targets as two lists: sizes differ, so nothing is stacked."""
    images, targets = zip(*batch)
    return list(images), list(targets)


def open_dataset(
    images: str | None,
    annotations: str | None,
    image_size: tuple[int, int],
    train: bool,
    seed: int = 0,
    skip_bad_images: bool = False,
) -> Dataset:
    """Open the training or the validation set: a COCO-format folder, or the built-in shapes without annotations.

    Both offer categories (COCO category of each label), num_classes (K), summary (a line of text), coco(), and epoch:
    whoever trains sets it before the loader's processes start, and with seed it determines how images are augmented.

    Args:
        images: folder of the image files.
        annotations: JSON file; None for the shapes.
        image_size: its first number is the side of the built-in pictures.
        train: whether it is the training set, which is augmented.
        seed: of the augmentation's random numbers.
        skip_bad_images: leave images out that cannot be used, instead of an error.
    """
    if annotations:
        return CocoFolder(images, annotations, augmentation(train), seed, skip_bad_images)
    count, picture_seed = (SHAPES_TRAIN, 1) if train else (SHAPES_VAL, 0)
    return Shapes(count, picture_seed, image_size[0], augmentation(train), seed)


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

    What is done with imperfect ones:

    - An image that is missing, is none, is truncated, or has another size than annotated: an error, or left out with
      skip_bad_images. A JPEG or PNG that ends as it should is not decoded for this, others are; what is damaged inside
      and still fails during training is an error then, with the file's name.
    - A picture with an EXIF orientation is turned by it, unless only its size as stored agrees with the annotations.
    - Gray, palette and CMYK pictures become RGB, transparency is dropped, 16-bit gray is scaled to 8 bits; pictures of
      floating-point numbers, whose range nobody knows, are bad images.
    - An image without boxes stays as a negative; a data set without any box is an error.
    - A box is clipped to its image; one with no area left there, or with a negative width or height, is left out of
      training and evaluation. Evaluation takes the others as they are written, as other tools do.
    - A crowd region is left out of training; in evaluation what is detected there is neither right nor wrong.
    - A box that is not four finite numbers, an id that is not an integer or is given twice, an annotation of an unknown
      image or category: an error. Ids may have gaps, and may be 0 or negative.
    - An area that is absent or negative is the box's; an absent iscrowd is 0.
    - Two categories with the same name are two classes: ids tell them apart, as in pycocotools.
    - A file_name may lie in subfolders, or be an absolute path.

    Args:
        images: folder of the image files.
        annotations: JSON file with "images", "annotations" and "categories".
        transforms: called on (image, target).
        seed: of the transforms' random numbers.
        skip_bad_images: leave images out that cannot be used, instead of an error.

    Attributes:
        categories: COCO category of each label.
        num_classes: K, the largest label plus one.
        summary: one line that says what was read, and what was left out.
        epoch: counted from 0; the transforms' random numbers depend on seed, epoch and index alone.

    Raises:
        DataError: see above; it names the file, and up to 20 of what is wrong.
    """

    def __init__(
        self,
        images: str | Path,
        annotations: str | Path,
        transforms=None,
        seed: int = 0,
        skip_bad_images: bool = False,
    ):
        self.folder, self.transforms, self.seed, self.epoch = Path(images), transforms, seed, 0
        coco = read_coco(Path(annotations))
        self.categories = label_categories(coco["categories"])
        self.num_classes = max(self.categories) + 1
        bad = find_bad_images(self.folder, coco["images"])
        if not skip_bad_images:
            advice = "Repair them, correct the annotations, or leave them out: --skip-bad-images."
            refuse(f"{annotations}: images in {self.folder} that cannot be used", list(bad.values()), advice)
        self.images = sorted((i for i in coco["images"] if i["id"] not in bad), key=lambda image: image["id"])
        listed = [a for a in coco["annotations"] if a["image_id"] not in bad]

        # Arrays, not objects: a data loading process gets its own copy of every Python object that it looks at.
        label_of = {category["id"]: label for label, category in self.categories.items()}
        row_of = {image["id"]: row for row, image in enumerate(self.images)}
        row = np.array([row_of[a["image_id"]] for a in listed], dtype=np.int64)
        label = np.array([label_of[a["category_id"]] for a in listed], dtype=np.int64)
        xywh = np.array([a["bbox"] for a in listed], dtype=np.float64).reshape(-1, 4)
        area = np.array([a["area"] for a in listed], dtype=np.float64)
        crowd = np.array([a["iscrowd"] for a in listed], dtype=bool)

        size = np.array([(i["width"], i["height"]) for i in self.images], dtype=np.float64).reshape(-1, 2)[row]
        low, high = np.clip(xywh[:, :2], 0, size), np.clip(xywh[:, :2] + xywh[:, 2:], 0, size)
        visible = (high - low > THINNEST * size).all(axis=1)
        self._columns = [column[visible] for column in (row, label, xywh, area, crowd)]

        trained = np.flatnonzero(visible & ~crowd)
        trained = trained[np.argsort(row[trained], kind="stable")]
        starts = np.searchsorted(row[trained], np.arange(1, len(self.images)))
        self.boxes = np.split(np.hstack([low, high])[trained].astype(np.float32), starts)
        self.labels = np.split(label[trained], starts)

        without = len(self.images) - len(np.unique(row[trained]))
        self.summary = (
            f"{Path(annotations).name}: {len(self.images)} images ({without} without boxes), {len(trained)} boxes of "
            f"{len(self.categories)} categories; left out: {(visible & crowd).sum()} crowd regions, "
            f"{(~visible).sum()} boxes without area, {len(bad)} bad images"
        )
        if len(trained) == 0:
            raise DataError(f"{annotations} leaves no box to train or evaluate on. See what it holds: {self.summary}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        """Return (image [3, h, w] uint8 before transforms, target)."""
        entry = self.images[index]
        image = read_image(self.folder / entry["file_name"], (entry["width"], entry["height"]))
        image = tv_tensors.Image(functional.pil_to_tensor(image))
        boxes = torch.tensor(self.boxes[index])
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=image.shape[-2:]),
            "labels": torch.tensor(self.labels[index]),
            "image_id": entry["id"],
        }
        return apply_seeded(self.transforms, image, target, self.seed, self.epoch, index)

    def coco(self) -> dict:
        """Return the annotations in COCO's format, for evaluation; made anew, for pycocotools writes into them."""
        annotations = [
            {
                "id": number,
                "image_id": self.images[row]["id"],
                "category_id": self.categories[label]["id"],
                "bbox": xywh,
                "area": area,
                "iscrowd": int(crowd),
            }
            # Ids from 1, whatever they were: pycocotools notes the id of what a detection matches, and 0 for nothing.
            for number, (row, label, xywh, area, crowd) in enumerate(zip(*map(np.ndarray.tolist, self._columns)), 1)
        ]
        return {"images": self.images, "annotations": annotations, "categories": list(self.categories.values())}
