"""Data sets: folders in the layout of COCO, Roboflow, CrowdHuman or VOC (README.md), and the built-in shapes.

Every data set yields (image, target): image [3, h, w] in 0..1; target with boxes (FloatTensor[M, 4]) in [x1, y1, x2,
y2] pixels, 0 <= x1 < x2 <= w and 0 <= y1 < y2 <= h, labels (Int64Tensor[M]) in 1..K-1, and image_id (int). It also has
`categories` (COCO category of each label), `num_classes` (K), `summary` (one line), `coco()` (ground truth in COCO's
format), `format` ("coco", "crowdhuman" or "voc", whose own metrics are computed), `aspect_ratios` (width / height of
each image), and `epoch`, which the training loop sets: with the seed, it determines how images are augmented.
"""

from torch.utils.data import Dataset

from kd.data.batches import collate, group_batches
from kd.data.coco import DataError
from kd.data.folder import CocoFolder
from kd.data.images import check_width, open_image
from kd.data.layouts import annotation_files, find_layout
from kd.data.shapes import Shapes
from kd.data.transforms import augmentation, set_train_scales

SHAPES_TRAIN, SHAPES_VAL = 800, 200  # pictures of the built-in data set


def open_dataset(
    images: str | None,
    annotations: str | None,
    image_size: tuple[int, int],
    train: bool,
    seed: int = 0,
    skip_bad_images: bool = False,
) -> Dataset:
    """Open the training or validation set.

    Args:
        images: folder of the image files.
        annotations: COCO's JSON file, CrowdHuman's .odgt file or VOC's .txt list; None for the built-in shapes.
        image_size: (short side, long side) in pixels that detectors resize to; its first number is the side of the
            built-in pictures.
        train: whether to return the training set, with augmentation.
        seed: for the random numbers of the augmentation.
        skip_bad_images: leave out images that cannot be read, instead of raising an error.

    Raises:
        DataError: the data cannot be used, or an image is too narrow for its long side, the second number of
            image_size.
    """
    if annotations:
        dataset = CocoFolder(images, annotations, augmentation(train), seed, skip_bad_images)
        for entry in dataset.images:
            check_width(entry["width"], entry["height"], image_size[1], entry["file_name"])
        return dataset
    count, picture_seed = (SHAPES_TRAIN, 1) if train else (SHAPES_VAL, 0)
    return Shapes(count, picture_seed, image_size[0], augmentation(train), seed)


def summarize(train_set: Dataset, val_set: Dataset) -> str:
    """Return the summaries of training and validation set, and a warning if they share image files."""
    lines = [f"training on {train_set.summary}", f"validating on {val_set.summary}"]
    sets = [dataset for dataset in (train_set, val_set) if isinstance(dataset, CocoFolder)]
    files = [{dataset.folder.resolve() / image["file_name"] for image in dataset.images} for dataset in sets]
    shared = sorted(set.intersection(*files)) if files else []
    if shared:
        lines.append(
            f"warning: {len(shared)} of {len(val_set)} validation images are also training images, first {shared[0]}: "
            "AP will be too high"
        )
    return "\n".join(lines)


def class_names(categories: dict[int, dict]) -> dict[int, str]:
    """Return the name of each label."""
    return {label: category["name"] for label, category in categories.items()}


def check_same_classes(train_set: Dataset, val_set: Dataset) -> None:
    """Raise DataError unless training and validation set have the same classes."""
    ours, theirs = class_names(train_set.categories), class_names(val_set.categories)
    differing = sorted(label for label in ours.keys() | theirs.keys() if ours.get(label) != theirs.get(label))
    if differing:
        raise DataError(f"training and validation annotations list different categories, at labels {differing[:10]}")


__all__ = [
    "CocoFolder",
    "DataError",
    "Shapes",
    "annotation_files",
    "check_same_classes",
    "class_names",
    "collate",
    "find_layout",
    "group_batches",
    "open_dataset",
    "open_image",
    "set_train_scales",
    "summarize",
]
