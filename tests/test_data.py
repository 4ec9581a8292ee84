"""Reading COCO-format folders: labels, boxes, images of every kind, and errors that name what is wrong."""

import json

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from kd.data import COCO_NAMES, CocoFolder, DataError, augmentation, collate, label_categories, open_dataset, read_coco


def valid() -> dict:
    return {
        "images": [
            {"id": 5, "file_name": "a.jpg", "width": 40, "height": 30},
            {"id": 3, "file_name": "b.png", "width": 20, "height": 20},
        ],
        "categories": [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 9, "bbox": [2, 3, 10, 8], "area": 80, "iscrowd": 0},
            {"id": 2, "image_id": 5, "category_id": 4, "bbox": [30, 20, 20, 20], "area": 400, "iscrowd": 0},
            {"id": 3, "image_id": 5, "category_id": 4, "bbox": [50, 50, 5, 5], "area": 25, "iscrowd": 0},
            {"id": 4, "image_id": 5, "category_id": 4, "bbox": [0, 0, 40, 30], "area": 1200, "iscrowd": 1},
        ],
    }


@pytest.fixture
def write(tmp_path):
    """A function that writes annotations and two images, and returns the paths."""

    def to_disk(coco) -> tuple:
        Image.new("RGB", (40, 30), (255, 0, 0)).save(tmp_path / "a.jpg", quality=95)
        Image.new("L", (20, 20), 128).save(tmp_path / "b.png")
        (tmp_path / "instances.json").write_text(coco if isinstance(coco, str) else json.dumps(coco))
        return tmp_path, tmp_path / "instances.json"

    return to_disk


def test_boxes_and_labels(write):
    """Category ids 4 and 9 become 1 and 2; a box past the edge is cut, one outside and the crowd are left out."""
    dataset = CocoFolder(*write(valid()), transforms=augmentation(train=False))
    assert dataset.num_classes == 3
    assert {label: c["name"] for label, c in dataset.categories.items()} == {1: "cat", 2: "dog"}
    (empty, no_boxes), (image, target) = dataset[0], dataset[1]  # by ascending image id
    assert_close(target["boxes"], torch.tensor([[2.0, 3.0, 12.0, 11.0], [30.0, 20.0, 40.0, 30.0]]))
    assert target["labels"].tolist() == [2, 1] and target["image_id"] == 5
    assert image.shape == (3, 30, 40) and image.dtype == torch.float32
    assert_close(image[:, 15, 20], torch.tensor([1.0, 0.0, 0.0]), atol=0.02, rtol=0)
    assert no_boxes["boxes"].shape == (0, 4) and no_boxes["labels"].shape == (0,)
    assert empty.shape == (3, 20, 20) and (empty == 128 / 255).all()
    assert "2 images (1 without boxes), 2 boxes of 2 categories, 1 crowd regions and 1 boxes" in dataset.summary
    images, targets = collate([dataset[0], dataset[1]])
    assert isinstance(images, list) and isinstance(targets, list)


def test_flip(write):
    """x becomes w - x: the box from 2 to 12 of a 40-pixel image is from 28 to 38."""
    dataset = CocoFolder(*write(valid()), transforms=augmentation(train=True))
    seen = {tuple(dataset[1][1]["boxes"][0].tolist()) for _ in range(30)}
    assert seen == {(2, 3, 12, 11), (28, 3, 38, 11)}


def test_coco_keeps_its_own_ids():
    """COCO's 80 categories are labels 1..90 with gaps, as in torchvision; any subset is contiguous."""
    coco = [{"id": i, "name": name} for i, name in enumerate(COCO_NAMES) if i and name != "N/A"]
    assert len(coco) == 80
    labels = label_categories(coco)
    assert max(labels) == 90 and all(label == c["id"] for label, c in labels.items())
    assert list(label_categories(coco[10:])) == list(range(1, 71))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: "{", "is not JSON"),
        (lambda c: [{"image_id": 1, "score": 0.5}], "not a COCO instances file"),
        (lambda c: {**c, "images": []}, "lists 0 images"),
        (lambda c: {**c, "categories": []}, "0 categories"),
        (lambda c: {**c, "images": [{"id": 1}]}, "entry 0 of images has no file_name, width, height"),
        (
            lambda c: {**c, "annotations": [{"id": 7, "image_id": 99, "category_id": 4, "bbox": [0, 0, 1, 1]}]},
            "image_id",
        ),
        (lambda c: {**c, "categories": c["categories"][:1]}, "unknown category_id"),
        (
            lambda c: {**c, "images": [*c["images"], {"id": 9, "file_name": "gone.jpg", "width": 9, "height": 9}]},
            "gone.jpg",
        ),
    ],
)
def test_errors(write, change, message):
    with pytest.raises(DataError, match=message):
        CocoFolder(*write(change(valid())))


def test_absent_file(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_coco(tmp_path / "absent.json")


def test_shapes_are_the_default():
    dataset = open_dataset(None, None, (64, 64), train=False)
    image, target = dataset[3]
    assert image.shape == (3, 64, 64) and image.min() >= 0 and image.max() <= 1
    assert dataset.num_classes == 5 and "built-in shapes" in dataset.summary
