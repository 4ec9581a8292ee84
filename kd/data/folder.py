"""Images of a folder with annotations in COCO's, CrowdHuman's or VOC's format."""

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.models.detection.faster_rcnn import FasterRCNN_ResNet50_FPN_Weights
from torchvision.transforms.v2 import functional

from kd.data.coco import DataError, raise_for
from kd.data.images import find_bad_images, read_image
from kd.data.layouts import data_format, read_annotations
from kd.data.transforms import apply_seeded

# torchvision's names of labels 0..90; "N/A" fills the gaps of COCO's own ids.
COCO_NAMES = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]

# Boxes narrower than this part of the image are left out. float32 resolves 1.2e-7 of it: below a few times that, a flip
# or a resize can round both edges of a box to the same number, which torchvision's detectors reject.
THINNEST = 1e-6


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
    """Images of a folder with boxes from an annotation file.

    How imperfect data is handled:

    - A file that is missing, not a JPEG, PNG, WebP, BMP, TIFF, GIF or MPO, truncated, of another size than annotated or
      of more than 89 million pixels is an error, or left out with skip_bad_images. A JPEG or PNG with a complete end is
      not decoded for this check, other files are. Damage that the check misses is an error during training that names
      the file. The exception is a hole in the pixels of a JPEG, which Pillow fills with gray without notice.
    - An EXIF orientation is applied, unless only the stored size agrees with the annotations.
    - Gray, palette and CMYK images are converted to RGB, transparency is dropped, 16-bit gray is scaled to 8 bits.
      Images of floating-point numbers are bad images, because their range is unknown.
    - An image without boxes is kept as a negative. A data set without any box is an error.
    - Boxes are clipped to the image. A box without area there, or with a negative width or height, is left out of
      training and evaluation. Evaluation uses the others as they are annotated, as other tools do.
    - Crowd regions, to which CrowdHuman's ignored boxes and VOC's difficult ones belong, are left out of training. In
      evaluation, detections there count as neither right nor wrong.
    - A box that is not four finite numbers, an id that is not an integer or not unique, or an annotation of an unknown
      image or category is an error. Ids may have gaps and may be 0 or negative.
    - An absent or negative area is replaced by the area of the box; an absent iscrowd is 0.
    - Two categories of the same name are two classes; ids distinguish them, as in pycocotools.
    - file_name may contain subfolders or be an absolute path.

    Args:
        images: folder of the image files.
        annotations: COCO's JSON file with "images", "annotations" and "categories"; or, as kd/data/README.md
            describes, an .odgt file of CrowdHuman or a .txt list of VOC.
        transforms: called on (image, target).
        seed: for the random numbers of the transforms.
        skip_bad_images: leave out images that cannot be read, instead of raising an error.

    Attributes:
        format: of the annotations: "coco", "crowdhuman" or "voc".
        categories: COCO category of each label.
        num_classes: K, the largest label plus one.
        summary: one line with what was read and what was left out.
        aspect_ratios: width / height of each image.
        epoch: counted from 0; the random numbers of the transforms depend on seed, epoch and index only.

    Raises:
        DataError: see above; names the file and up to 20 offenders.
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
        self.format = data_format(annotations)
        coco = read_annotations(Path(annotations), self.folder)
        self.categories = label_categories(coco["categories"])
        self.num_classes = max(self.categories) + 1
        bad = find_bad_images(self.folder, coco["images"])
        if not skip_bad_images:
            advice = "Repair them, correct the annotations, or leave them out with --skip-bad-images."
            named = [f"line {i}, {why}" if self.format == "crowdhuman" else why for i, why in bad.items()]
            raise_for(f"{annotations}: images in {self.folder} that cannot be used", named, advice)
        self.images = sorted((i for i in coco["images"] if i["id"] not in bad), key=lambda image: image["id"])
        listed = [a for a in coco["annotations"] if a["image_id"] not in bad]

        self.aspect_ratios = np.array([i["width"] / i["height"] for i in self.images])
        # Arrays instead of Python objects, which every data loading process would copy when it reads them.
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
            raise DataError(f"{annotations} has no box to train or evaluate on: {self.summary}")

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
        """Return the annotations in COCO's format, a new dict each time because pycocotools writes into it."""
        annotations = [
            {
                "id": number,
                "image_id": self.images[row]["id"],
                "category_id": self.categories[label]["id"],
                "bbox": xywh,
                "area": area,
                "iscrowd": int(crowd),
            }
            # Ids from 1: pycocotools marks a match by the id of the annotation, and no match by 0.
            for number, (row, label, xywh, area, crowd) in enumerate(zip(*map(np.ndarray.tolist, self._columns)), 1)
        ]
        return {"images": self.images, "annotations": annotations, "categories": list(self.categories.values())}
