"""The built-in pictures are the same everywhere, and their boxes fit."""

import numpy as np
import torch
from torch.testing import assert_close

from kd.data.shapes import CLASSES, Shapes, covered, outline


def test_the_same_picture_for_the_same_seed_and_index():
    """The numbers were read once; another machine or release of numpy must give them too."""
    first, again, other = Shapes(5, 0, 64), Shapes(9, 0, 64), Shapes(5, 1, 64)
    image, target = first[3]
    assert torch.equal(image, again[3][0]) and torch.equal(target["boxes"], again[3][1]["boxes"])
    assert not torch.equal(image, other[3][0])
    assert target["labels"].tolist() == [4, 4, 3]
    assert_close(
        torch.as_tensor(target["boxes"][0]), torch.tensor([7.8810, 7.4398, 47.0099, 46.5687]), atol=1e-3, rtol=0
    )


def test_boxes_are_inside_and_labels_known():
    for image, target in (Shapes(30, 2, 64)[i] for i in range(30)):
        boxes = target["boxes"]
        assert image.shape == (3, 64, 64) and image.dtype == torch.uint8
        assert 1 <= len(boxes) <= 4 and (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= 64).all()
        assert (boxes[:, 2:] - boxes[:, :2] > 6).all()
        assert target["labels"].min() >= 1 and target["labels"].max() <= len(CLASSES)


def test_annotations_agree_with_the_pictures():
    dataset = Shapes(10, 0, 64)
    coco = dataset.coco()
    assert len(coco["images"]) == 10
    for index in range(10):
        boxes = [a["bbox"] for a in coco["annotations"] if a["image_id"] == index]
        x1, y1, x2, y2 = dataset[index][1]["boxes"].unbind(1)
        assert_close(torch.tensor(boxes), torch.stack([x1, y1, x2 - x1, y2 - y1], dim=1), atol=1e-4, rtol=0)


def test_outlines():
    """A square of diameter 2, not turned, has its corners on the axes; all shapes stay within their diameter."""
    assert_close(torch.from_numpy(outline("square", 2, 0)), torch.tensor([[1, 0], [0, 1], [-1, 0], [0, -1.0]]).double())
    for name in CLASSES:
        radii = np.hypot(*outline(name, 10, 0.3).T)
        assert radii.max() <= 5 + 1e-9 and radii.max() > 4.9


def test_covered():
    """The right half of a 10 x 10 box is covered; of the 5 x 20 box that covers it, a half."""
    box, other = np.array([0, 0, 10, 10.0]), np.array([5, -5, 10, 15.0])
    assert covered(box, other) == 0.5
    assert covered(other, box) == 0.5
    assert covered(box, box + 20) == 0
