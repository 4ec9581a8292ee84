"""samples.png: boxes, labels and scores are where they should be, and the best detection is on top."""

import pytest
import torch
from PIL import Image, ImageColor
from torchvision.transforms.functional import pil_to_tensor

from kd.data import Shapes
from kd.data.transforms import augmentation
from kd.tools.samples import GAP, LINE, TILE, draw_boxes, draw_detections, draw_samples

NAMES = {1: "circle", 2: "square"}


def color(label: int) -> tuple[int, ...]:
    return ImageColor.getrgb(f"hsl({137 * label % 360}, 100%, 60%)")


def found(*rows: tuple[list[float], float, int]) -> dict[str, torch.Tensor]:
    boxes, scores, labels = zip(*rows)
    return {"boxes": torch.tensor(boxes), "scores": torch.tensor(scores), "labels": torch.tensor(labels)}


@pytest.mark.parametrize("order", [1, -1])
def test_the_better_detection_is_on_top(order):
    """Two boxes of one place and different classes: what remains is the color of the one with the higher score."""
    box = [8.0, 16.0, 24.0, 28.0]  # of 32 pixels, drawn eight times as large
    rows = [(box, 0.9, 1), (box, 0.6, 2)][::order]
    picture = draw_detections(torch.zeros(3, 32, 32), found(*rows), NAMES, threshold=0.5)
    assert picture.size == (TILE, TILE)
    assert picture.getpixel((64, 200)) == picture.getpixel((100, 128)) == picture.getpixel((65, 115)) == color(1)


def test_threshold_and_captions():
    """Below the threshold nothing is drawn. Captions lie outside the box, above it if there is space."""
    empty = draw_detections(torch.zeros(3, 32, 32), found(([8.0, 8, 24, 24], 0.4, 1)), NAMES, threshold=0.5)
    assert empty.getcolors() == [(TILE * TILE, (0, 0, 0))]
    picture = draw_detections(torch.zeros(3, 32, 32), found(([8.0, 8, 24, 24], 0.6, 1)), NAMES, threshold=0.5)
    assert picture.getpixel((65, 63 - 4)) == color(1)  # the caption's background
    assert picture.crop((67, 67, 189, 189)).getcolors() == [(122 * 122, (0, 0, 0))]  # the object is not covered
    at_top = draw_detections(torch.zeros(3, 32, 32), found(([8.0, 0, 24, 24], 0.6, 1)), NAMES, threshold=0.5)
    assert at_top.getpixel((65, 192 + 6)) == color(1) and at_top.getpixel((100, 6)) == (0, 0, 0)


def test_boxes_without_captions():
    picture = Image.new("RGB", (40, 40))
    draw_boxes(picture, [[10, 10, 20, 20]], [""], ["red"])
    assert picture.getpixel((10, 15)) == (255, 0, 0) and picture.getpixel((15, 5)) == (0, 0, 0)


def test_rows():
    """A title and a row of images for the ground truth, then for each detector; 1,600 pixels wide at most."""
    dataset = Shapes(7, 0, 64, augmentation(train=False))
    nothing = {index: found(([0.0, 0, 1, 1], 0.1, 1)) for index in range(7)}
    perfect = {}
    for index in range(7):
        target = dataset[index][1]
        perfect[index] = {**target, "scores": torch.full((len(target["labels"]),), 0.9)}
    picture = draw_samples(dataset, {"teacher": perfect, "student": nothing})
    assert picture.size == (GAP + 6 * (TILE + GAP), 3 * (LINE + TILE + GAP)) and picture.width <= 1600
    pixels = pil_to_tensor(picture)
    truth, teacher, student = (pixels[:, row * (LINE + TILE + GAP) + LINE :][:, :TILE] for row in range(3))
    assert not torch.equal(truth, student) and not torch.equal(truth, teacher)
    plain = pil_to_tensor(draw_detections(dataset[2][0], nothing[2], {}, 0.5))
    assert torch.equal(student[:, :, GAP + 2 * (TILE + GAP) :][:, :, :TILE], plain)
