"""samples.png: images with their ground truth and the detections of teacher and student."""

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_pil_image

from kd.data import class_names
from kd.evaluation import Detections

TILE, GAP, LINE = 256, 8, 24  # pixels: longest side of an image, space between images, height of a line of text
IMAGES = 6  # in a row, which is 1,592 pixels wide
THRESHOLD = 0.5  # detections below this score are not drawn


def draw_samples(dataset: Dataset, rows: dict[str, Detections], threshold: float = THRESHOLD) -> Image.Image:
    """Draw the first images of a data set: a row with the ground truth, then one for each detector.

    Args:
        dataset: as `kd.data.open_dataset` returns it.
        rows: detections by the title of their row.
        threshold: detections below this score are left out.
    """
    samples = [dataset[index] for index in range(min(IMAGES, len(dataset)))]
    names = class_names(dataset.categories)
    truth = {target["image_id"]: {**target, "scores": torch.ones(len(target["labels"]))} for _, target in samples}
    tiles = [
        [draw_detections(image, found[target["image_id"]], names, threshold) for image, target in samples]
        for found in (truth, *rows.values())
    ]
    titles = ["ground truth", *(f"{title}, scores from {threshold:g}" for title in rows)]
    height = max(tile.height for tile in tiles[0])
    font = ImageFont.load_default(size=15)
    width = max(len(samples) * (TILE + GAP), *(int(font.getlength(title)) + GAP for title in titles))
    canvas = Image.new("RGB", (GAP + width, len(tiles) * (LINE + height + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    for row, (title, line) in enumerate(zip(titles, tiles)):
        y = row * (LINE + height + GAP)
        draw.text((GAP, y + LINE // 2), title, "black", font, anchor="lm")
        for column, tile in enumerate(line):
            canvas.paste(tile, (GAP + column * (TILE + GAP), y + LINE))
    return canvas


def draw_detections(
    image: Tensor, found: dict[str, Tensor], names: dict[int, str], threshold: float, side: int = TILE
) -> Image.Image:
    """Draw detections on an image, the best last so that nothing covers it.

    Args:
        image: [3, h, w] in 0..1.
        found: boxes [D, 4], xyxy pixels of the image, labels [D] and scores [D], which are not written where all are 1.
        names: of the labels.
        threshold: detections below this score are left out.
        side: longest side of the picture, in pixels. Lines and captions grow with it beyond 768 pixels.
    """
    h, w = image.shape[1:]
    zoom = side / max(h, w)
    picture = to_pil_image(image).resize((max(round(zoom * w), 1), max(round(zoom * h), 1)))
    order = found["scores"].argsort()
    order = order[found["scores"][order] >= threshold]
    boxes, labels, scores = ((found[key][order]).tolist() for key in ("boxes", "labels", "scores"))
    captions = [names.get(label, "?") for label in labels]
    if min(scores, default=1) < 1:
        captions = [f"{caption} {score:.2f}" for caption, score in zip(captions, scores)]
    colors = [f"hsl({137 * label % 360}, 100%, 60%)" for label in labels]
    draw_boxes(picture, [[zoom * x for x in box] for box in boxes], captions, colors, max(12, side // 64))
    return picture


def draw_boxes(
    picture: Image.Image, boxes: list[list[float]], captions: list[str], colors: list[str], size: int = 12
) -> None:
    """Draw boxes, xyxy pixels, in their order, with captions outside the box where there is space.

    Args:
        picture: drawn on.
        boxes: [x1, y1, x2, y2] each.
        captions: one for each box; "" for none.
        colors: one for each box.
        size: of the captions, in pixels; lines are a sixth as wide.
    """
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=size)
    for (x1, y1, x2, y2), caption, color in zip(boxes, captions, colors):
        draw.rectangle((x1, y1, x2, y2), outline=color, width=size // 6)
        if caption:
            width, height = draw.textlength(caption, font) + 4, size + 4
            above, below = y1 - height, y2
            top = above if above >= 0 else below if below + height <= picture.height else y1
            left = max(0, min(x1, picture.width - width))
            draw.rectangle((left, top, left + width, top + height), fill=color)
            draw.text((left + 2, top + height / 2), caption, "black", font, anchor="lm")
