"""Pictures of where a method looks: the maps that it names, each a row, level by level beside the image.

A row's colors go from 0 to a value stated above it, the largest of all its levels. Rows whose names differ in a last
word "teacher" or "student" stand together and share their scale. A name that ends in "matrix" before that word is a
matrix of an image's objects; every other map covers the image.
"""

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes

# Pixels of the picture: the image's longer side, the space between tiles, the height of a line of text, and width and
# height of a color scale.
TILE, GAP, LINE, BAR = 240, 8, 26, (120, 12)

BOXES = "#00c8ff"  # far from all COLORS

# RGB in 0..255, from 0 to the top of a scale, each lighter than the one before.
COLORS = ((10, 8, 36), (68, 24, 108), (150, 38, 110), (220, 76, 70), (248, 156, 50), (252, 246, 190))


def draw_explanation(
    image: Tensor,
    target: dict[str, Tensor],
    class_names: dict[int, str],
    maps: dict[str, list[Tensor]],
    strides: list[int],
    input_size: tuple[int, int],
) -> Tensor:
    """Draw an image with its ground truth and, row by row, a method's maps of it.

    Args:
        image: [3, h, w], values in 0..1.
        target: boxes [M, 4], xyxy pixels of the image, and labels [M]; empty where they are not known.
        class_names: name of each label.
        maps: what the method's `maps` returned for this image alone: by name a list over levels of [1, H, W], at least
            0, or of matrices [1, n, n], which may have fewer levels.
        strides: of the levels, pixels of the network's input.
        input_size: height and width of the image as the networks saw it, without padding.

    Returns:
        [3, H, W], values in 0..1.
    """
    zoom = TILE / max(image.shape[1:])
    h, w = (max(round(zoom * side), 1) for side in image.shape[1:])
    photo = nn.functional.interpolate(image[None], (h, w), mode="bilinear", antialias=True)[0]
    labels = [class_names.get(label, "?") for label in target["labels"].tolist()] if target else []
    boxes = zoom * target["boxes"] if target else torch.zeros(0, 4)
    photo = outline((255 * photo).round().to(torch.uint8), boxes, labels, fill_labels=True)

    tops = find_tops(maps)
    left = [GAP + column * (max(w, BAR[0]) + GAP) for column in range(1 + len(strides))]
    canvas = Image.new("RGB", (left[-1] + w + GAP, LINE + len(maps) * (LINE + h + GAP)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=15)
    for x, title in zip(left, ["image", *(f"stride {stride}" for stride in strides)]):
        draw.text((x, LINE // 2), title, "black", font, anchor="lm")
    scale = 3 * GAP + max(left[1], *(left[0] + int(draw.textlength(name, font)) for name in maps))
    for row, (name, top) in enumerate(tops.items()):
        y = LINE + row * (LINE + h + GAP)
        draw.text((left[0], y + LINE // 2), name, "black", font, anchor="lm")
        draw.text((scale - GAP, y + LINE // 2), "0", "black", font, anchor="rm")
        bar = colorize(torch.linspace(0, top, BAR[0]).expand(BAR[1], -1), top)
        canvas.paste(to_pil_image(bar), (scale, y + (LINE - BAR[1]) // 2))
        draw.text((scale + BAR[0] + GAP, y + LINE // 2), f"{top:.3g}", "black", font, anchor="lm")
        if row == 0:
            canvas.paste(to_pil_image(photo), (left[0], y + LINE))
        for x, level, stride in zip(left[1:], maps[name], strides):
            if quantity(name).endswith("matrix"):
                tile = colorize(enlarge(level[0], min(h, w)), top)
            else:
                tile = outline(colorize(spread(level[0], stride, input_size, (h, w)), top), boxes)
            canvas.paste(to_pil_image(tile), (x, y + LINE))
    return pil_to_tensor(canvas).float() / 255


def quantity(name: str) -> str:
    """Return a map's name without its network: "richness" for "richness teacher"."""
    return name.removesuffix(" teacher").removesuffix(" student")


def find_tops(maps: dict[str, list[Tensor]]) -> dict[str, float]:
    """Return the value at the top of each map's scale, in the order of the rows; 0 where all values are."""
    tops = {}
    for name, levels in maps.items():
        values = [level.max().item() for level in levels if level.numel()]
        tops[quantity(name)] = max(tops.get(quantity(name), 0.0), *values, 0.0)
    return {name: top for shared, top in tops.items() for name in maps if quantity(name) == shared}


def colorize(values: Tensor, top: float) -> Tensor:
    """Return the colors [3, H, W], uint8, of values [H, W] in 0..top."""
    colors = torch.tensor(COLORS, dtype=torch.float32)
    place = values.float().cpu() * ((len(COLORS) - 1) / (top or 1))
    below = place.long().clamp(max=len(COLORS) - 2)
    mixed = torch.lerp(colors[below], colors[below + 1], (place - below)[..., None])
    return mixed.round().to(torch.uint8).movedim(2, 0)


def spread(level: Tensor, stride: int, input_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Give each pixel the value of its nearest position, [h, w].

    Args:
        level: [H, W]. The position in row i and column j is at x = j * stride, y = i * stride of the network's input,
            where torchvision centres its anchors.
        stride: pixels of the input per position.
        input_size: height and width of the image in the input.
        size: h and w, to which the image is drawn.
    """
    rows, columns = (
        ((torch.arange(pixels) + 0.5) * (extent / pixels / stride)).round().long().clamp(max=positions - 1)
        for pixels, extent, positions in zip(size, input_size, level.shape)
    )
    return level[rows[:, None], columns]


def enlarge(matrix: Tensor, side: int) -> Tensor:
    """Enlarge a matrix [n, n] to at most [side, side], each entry a square."""
    return matrix.repeat_interleave(side // max(len(matrix), 1), 0).repeat_interleave(side // max(len(matrix), 1), 1)


def outline(tile: Tensor, boxes: Tensor, labels: list[str] | None = None, **options) -> Tensor:
    """Draw boxes [M, 4], xyxy pixels, on a tile [3, h, w], uint8; torchvision's own warns where there are none."""
    return draw_bounding_boxes(tile, boxes, labels, BOXES, **options) if len(boxes) else tile
