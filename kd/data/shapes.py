"""The built-in data set: shapes drawn on the fly, the same picture for the same seed and index on every machine.

Four classes with distinct outlines and usually distinct hues. A picture has one to four objects, 0.3 to 0.7 of its side
in diameter, that may overlap, on a dull textured background with lines as distractors and noise. A detector learns
them from scratch in minutes.
"""

import colorsys
import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import Dataset
from torchvision import tv_tensors

from kd.data.transforms import apply_seeded

CLASSES = ("circle", "square", "triangle", "cross")


def outline(name: str, size: float, angle: float) -> np.ndarray:
    """Return the corners [P, 2] in xy pixels of a shape around the origin, `size` pixels in diameter."""
    if name == "circle":
        turns, radii = np.arange(32) / 32, 1.0
    elif name == "cross":
        w = 0.3
        xy = np.array(
            [(w, 1), (w, w), (1, w), (1, -w), (w, -w), (w, -1), (-w, -1), (-w, -w), (-1, -w), (-1, w), (-w, w), (-w, 1)]
        )
        turns, radii = np.arctan2(xy[:, 1], xy[:, 0]) / (2 * math.pi), np.hypot(*xy.T) / math.hypot(1, w)
    else:
        corners = {"triangle": 3, "square": 4}[name]
        turns, radii = np.arange(corners) / corners, 1.0
    radians = 2 * math.pi * turns + angle
    return size / 2 * (radii * np.stack([np.cos(radians), np.sin(radians)])).T


def sketch(rng: np.random.Generator, image_size: int) -> list[tuple[int, np.ndarray]]:
    """Place the objects of one picture, back to front: a list of (label 1..4, corners [P, 2] in xy pixels)."""
    objects, boxes = [], []
    for _ in range(rng.integers(1, 5)):
        for _ in range(20):  # attempts, until no object hides more than a third of another
            label = int(rng.integers(1, len(CLASSES) + 1))
            size = math.exp(rng.uniform(math.log(image_size * 0.3), math.log(image_size * 0.7)))
            corners = outline(CLASSES[label - 1], size, rng.uniform(-0.3, 0.3))
            low, high = corners.min(axis=0), corners.max(axis=0)
            corners = corners + rng.uniform(-low, image_size - high)
            box = np.concatenate([corners.min(axis=0), corners.max(axis=0)])
            if all(covered(box, other) < 1 / 3 and covered(other, box) < 1 / 3 for other in boxes):
                objects.append((label, corners))
                boxes.append(box)
                break
    return objects


def covered(box: np.ndarray, other: np.ndarray) -> float:
    """Return the share of `box` (xyxy) that `other` covers."""
    width, height = np.clip(np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2]), 0, None)
    return width * height / np.prod(box[2:] - box[:2])


def color(rng: np.random.Generator, hue: float, saturation: tuple[float, float]) -> tuple[int, ...]:
    """Return a random RGB color with a hue in turns and a range of saturation in 0..1."""
    rgb = colorsys.hsv_to_rgb(hue % 1, rng.uniform(*saturation), rng.uniform(0.4, 0.9))
    return tuple(int(255 * value) for value in rgb)


def background(rng: np.random.Generator, image_size: int) -> Image.Image:
    """Return smooth blotches and a grating around a dull color."""
    cells = int(rng.integers(3, 12))
    blotches = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    blotches = np.asarray(blotches.resize((image_size, image_size), Image.Resampling.BICUBIC), dtype=np.float32) - 128
    angle, period = rng.uniform(0, math.pi), rng.uniform(4, 20)
    along = np.arange(image_size) * 2 * math.pi / period
    grating = np.sin(math.cos(angle) * along[None, :] + math.sin(angle) * along[:, None])
    pattern = rng.uniform(0, 0.4) * blotches + rng.uniform(0, 20) * grating[..., None]
    return Image.fromarray(np.clip(color(rng, rng.uniform(), (0.0, 0.3)) + pattern, 0, 255).astype(np.uint8))


def paint(rng: np.random.Generator, objects: list[tuple[int, np.ndarray]], image_size: int) -> np.ndarray:
    """Paint lines and objects over a background, then noise: [H, W, 3], uint8."""
    image = background(rng, image_size)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 4)):
        ends = rng.uniform(0, image_size, 4).tolist()
        draw.line(ends, fill=color(rng, rng.uniform(), (0.5, 1.0)), width=2)
    for label, corners in objects:
        hue = label / len(CLASSES) + rng.normal(0, 0.08)  # neighbours are 0.25 apart: 1 in 8 looks like another
        draw.polygon(corners.flatten().tolist(), fill=color(rng, hue, (0.5, 1.0)))
    noise = rng.normal(0, rng.uniform(2, 20), (image_size, image_size, 3))
    return np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)


class Shapes(Dataset):
    """Pictures of shapes with boxes, drawn on access.

    Args:
        num_images: number of pictures.
        picture_seed: pictures of different seeds are different pictures.
        image_size: side of the square pictures, in pixels.
        transforms: called on (image, target), as for torchvision's detection data sets.
        seed: for the random numbers of the transforms.

    Attributes:
        format: "coco", that of `coco()`.
        epoch: counted from 0; the random numbers of the transforms depend on seed, epoch and index only.
    """

    format = "coco"

    def __init__(self, num_images: int, picture_seed: int, image_size: int, transforms=None, seed: int = 0):
        self.num_images, self.picture_seed, self.image_size = num_images, picture_seed, image_size
        self.transforms, self.seed, self.epoch = transforms, seed, 0
        self.categories = {label: {"id": label, "name": name} for label, name in enumerate(CLASSES, start=1)}
        self.num_classes = len(CLASSES) + 1
        self.aspect_ratios = np.ones(num_images)
        self.summary = (
            f"built-in shapes, seed {picture_seed}: {num_images} pictures of {image_size}x{image_size} pixels"
        )

    def __len__(self) -> int:
        return self.num_images

    def _objects(self, index: int) -> tuple[np.random.Generator, list[tuple[int, np.ndarray]]]:
        rng = np.random.default_rng((self.picture_seed, index))
        return rng, sketch(rng, self.image_size)

    def __getitem__(self, index: int):
        """Return (image [3, H, W] uint8, target with boxes [M, 4] xyxy pixels, labels [M] 1..4, image_id)."""
        rng, objects = self._objects(index)
        image = tv_tensors.Image(torch.from_numpy(paint(rng, objects, self.image_size)).permute(2, 0, 1))
        corners = [(*c.min(axis=0), *c.max(axis=0)) for _, c in objects]
        boxes = torch.tensor(np.array(corners), dtype=torch.float32).clamp(0, self.image_size)
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(self.image_size, self.image_size)),
            "labels": torch.tensor([label for label, _ in objects]),
            "image_id": index,
        }
        return apply_seeded(self.transforms, image, target, self.seed, self.epoch, index)

    def coco(self) -> dict:
        """Return the annotations of all pictures in COCO's format, without painting them."""
        annotations = []
        for index in range(self.num_images):
            for label, corners in self._objects(index)[1]:
                low, high = corners.min(axis=0).clip(0), corners.max(axis=0).clip(max=self.image_size)
                width, height = (high - low).tolist()
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index,
                        "category_id": label,
                        "bbox": [*low.tolist(), width, height],
                        "area": width * height,
                        "iscrowd": 0,
                    }
                )
        images = [{"id": i, "width": self.image_size, "height": self.image_size} for i in range(self.num_images)]
        return {"images": images, "annotations": annotations, "categories": list(self.categories.values())}
