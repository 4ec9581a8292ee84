"""Pictures of where a method looks: its maps over the image and cell by cell.

Each map is a row of up to three levels, those that vary most. A level is drawn twice: interpolated over the dimmed
image, and as cells. Colours run from 0 to the largest value of the map, which is written above it; "... teacher" and
"... student" share a scale. A map whose name ends in "matrix" relates the objects of the image and is drawn as cells.
"""

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_pil_image

from kd.data import class_names
from kd.data.images import check_width
from kd.distiller import Distiller
from kd.features import forward_detector
from kd.tools.predict import read_photograph
from kd.tools.samples import draw_boxes

TILE, GAP, LINE, BAR = 216, 8, 24, (120, 12)  # pixels: longest side, space, height of a text line, colour bar
LEVELS = 3
BOX_COLOR = "#00c8ff"  # far from all COLORS
COLORS = ((10, 8, 36), (68, 24, 108), (150, 38, 110), (220, 76, 70), (248, 156, 50), (252, 246, 190))  # RGB, 0 to top


@torch.no_grad()
def explain_image(distiller: Distiller, name: str, dataset: Dataset, title: str) -> Image.Image:
    """Draw where the method of a distiller looks on an image.

    Args:
        distiller: in eval mode, on one device with its teacher.
        name: of the image, see `find_image`.
        dataset: the validation set.
        title: of the picture; the name of the image is added.

    Raises:
        ValueError: the image does not exist or is too narrow, or the method needs ground truth that is unknown.
    """
    student, method = distiller.student, distiller.method
    image, target = find_image(name, dataset)
    check_width(image.shape[2], image.shape[1], student.transform.max_size, name)
    device = next(student.parameters()).device
    known = [{key: target[key].to(device) for key in ("boxes", "labels")}] if target else None
    images, targets = student.transform([image.to(device)], known)
    output, _ = forward_detector(student, images, targets, method.needs)
    try:
        maps = method.maps(output, distiller.run_teacher(images), targets or [{}])
    except KeyError as error:
        if error.args != ("boxes",):
            raise
        raise ValueError(
            f"{title}: ground-truth boxes are needed, and unknown for {name}: give the id or the file of an image in "
            "the validation set"
        ) from error
    names, strides = class_names(dataset.categories), student.backbone.strides
    title = f"{title}, image {Path(name).name}"
    return draw_explanation(title, image, target, names, maps, strides, images.image_sizes[0])


def find_image(name: str, dataset: Dataset) -> tuple[Tensor, dict]:
    """Return an image [3, h, w] in 0..1 and its target, which is empty if the data set does not have it.

    Args:
        name: path of a file, or id of an image in the data set. A file with the name and pixels of an image in the data
            set is taken for that image.
        dataset: the validation set.

    Raises:
        ValueError: it is neither an image file nor an id.
    """
    entries = dataset.coco()["images"]
    if not Path(name).is_file():
        ids = [str(entry["id"]) for entry in entries]
        if name not in ids:
            some = ", ".join(ids[:3])
            raise ValueError(f"{name} is neither a file nor an image id of the validation set (ids: {some}, ...)")
        return dataset[ids.index(name)]
    image = read_photograph(name)
    for index, entry in enumerate(entries):
        if Path(entry.get("file_name", "")).name == Path(name).name:
            known, target = dataset[index]
            if known.shape == image.shape and torch.allclose(known, image):
                return known, target
    return image, {}


def draw_explanation(
    title: str,
    image: Tensor,
    target: dict[str, Tensor],
    names: dict[int, str],
    maps: dict[str, list[Tensor]],
    strides: tuple[int, ...],
    input_size: tuple[int, int],
) -> Image.Image:
    """Draw an image with its ground truth, and the maps of a method.

    Args:
        title: of the picture.
        image: [3, h, w] in 0..1.
        target: boxes [M, 4], xyxy pixels of the image, and labels [M]; empty if unknown.
        names: of the labels.
        maps: what the method's `maps` returned for this image alone: by name, a list over levels of [1, H, W], at least
            0, or of matrices [1, n, n].
        strides: of the levels, in pixels of the network's input.
        input_size: height and width of the image in the network's input, without padding.
    """
    zoom = TILE / max(image.shape[1:])
    h, w = (max(round(zoom * side), 1) for side in image.shape[1:])
    image = interpolate(image[None], (h, w), mode="bilinear", antialias=True)[0].clamp(0, 1)
    boxes = (zoom * target["boxes"]).tolist() if target else []
    labels = [names.get(label, "?") for label in target["labels"].tolist()] if target else []
    photo = to_pil_image(image)
    draw_boxes(photo, boxes, labels, [BOX_COLOR] * len(boxes))

    rows = []  # name, largest value and [(caption, tile), ...] of each map
    for name, top in find_tops(maps).items():
        tiles = []
        for level in choose_levels(maps[name]):
            values = maps[name][level][0].float().cpu()
            if name.endswith("matrix"):
                cells = colorize(enlarge(values, min(h, w)), top)
                tiles.append((f"stride {strides[level]}", to_pil_image(cells)))
                continue
            smooth = (interpolated(values, strides[level], input_size, (h, w)) / (top or 1)).clamp(0, 1)
            overlay = torch.lerp(0.4 * image, colorize(smooth, 1) / 255, smooth)
            cells = colorize(nearest(values, strides[level], input_size, (h, w)), top)
            for caption, tile in ((f"stride {strides[level]}", to_pil_image(overlay)), ("cells", to_pil_image(cells))):
                draw_boxes(tile, boxes, [""] * len(boxes), [BOX_COLOR] * len(boxes))
                tiles.append((caption, tile))
        rows.append((name, top, tiles))
    return arrange(title, photo, rows)


def arrange(title: str, photo: Image.Image, rows: list[tuple[str, float, list]]) -> Image.Image:
    """Lay out the photo at the left, and rows of captioned tiles at the right."""
    step, height = TILE + GAP, 2 * LINE + photo.height + GAP
    columns = max(len(tiles) for _, _, tiles in rows)
    canvas = Image.new("RGB", (GAP + (1 + columns) * step, LINE + len(rows) * height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=15)
    draw.text((GAP, LINE // 2), title, "black", font, anchor="lm")
    canvas.paste(photo, (GAP, 3 * LINE))
    for row, (name, top, tiles) in enumerate(rows):
        x, y = GAP + step, LINE + row * height
        draw.text((x, y + LINE // 2), f"{name}:  0", "black", font, anchor="lm")
        x += int(draw.textlength(f"{name}:  0", font)) + GAP
        bar = colorize(torch.linspace(0, 1, BAR[0]).expand(BAR[1], -1), 1)
        canvas.paste(to_pil_image(bar), (x, y + (LINE - BAR[1]) // 2))
        draw.text((x + BAR[0] + GAP, y + LINE // 2), f"{top:.3g}", "black", font, anchor="lm")
        for column, (caption, tile) in enumerate(tiles, start=1):
            draw.text((GAP + column * step, y + 3 * LINE // 2), caption, "black", font, anchor="lm")
            canvas.paste(tile, (GAP + column * step, y + 2 * LINE))
    return canvas


def find_tops(maps: dict[str, list[Tensor]]) -> dict[str, float]:
    """Return the largest value of each map, where teacher and student share it, in the order of the rows."""

    def quantity(name: str) -> str:
        return name.removesuffix(" teacher").removesuffix(" student")

    tops = {}
    for name, levels in maps.items():
        values = [level.max().item() for level in levels if level.numel()]
        tops[quantity(name)] = max(tops.get(quantity(name), 0.0), *values, 0.0)
    return {name: top for shared, top in tops.items() for name in maps if quantity(name) == shared}


def choose_levels(levels: list[Tensor]) -> list[int]:
    """Return the indices of the levels [1, H, W] with the largest range of values, at most LEVELS, finest first."""
    ranges = [(level.max() - level.min()).item() if level.numel() else 0.0 for level in levels]
    order = sorted(range(len(levels)), key=lambda level: -ranges[level])
    shown = [level for level in order[:LEVELS] if ranges[level] > 0.05 * max(ranges)]
    return sorted(shown) or [0]


def colorize(values: Tensor, top: float) -> Tensor:
    """Return the colours [3, H, W], uint8, of values [H, W] in 0..top."""
    colors = torch.tensor(COLORS, dtype=torch.float32)
    place = values * ((len(COLORS) - 1) / (top or 1))
    below = place.long().clamp(max=len(COLORS) - 2)
    mixed = torch.lerp(colors[below], colors[below + 1], (place - below)[..., None])
    return mixed.round().to(torch.uint8).movedim(2, 0)


def positions(stride: int, input_size: tuple[int, int], size: tuple[int, int]) -> list[Tensor]:
    """Return row and column, in positions of a level, of each pixel row and column of a picture of `size`.

    Position (i, j) is drawn at y = i * stride, x = j * stride of the network's input.
    """
    return [(torch.arange(pixels) + 0.5) * (extent / pixels / stride) for pixels, extent in zip(size, input_size)]


def nearest(level: Tensor, stride: int, input_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Give each pixel the value of its nearest position: `size` from [H, W]; arguments as in `positions`."""
    rows, columns = (
        p.round().long().clamp(max=cells - 1) for p, cells in zip(positions(stride, input_size, size), level.shape)
    )
    return level[rows[:, None], columns]


def interpolated(level: Tensor, stride: int, input_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Interpolate between positions: `size` from [H, W]; arguments as in `positions`."""
    y, x = (2 * p / max(cells - 1, 1) - 1 for p, cells in zip(positions(stride, input_size, size), level.shape))
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]
    return grid_sample(level[None, None], grid, mode="bilinear", padding_mode="border", align_corners=True)[0, 0]


def enlarge(matrix: Tensor, side: int) -> Tensor:
    """Enlarge a matrix [n, n] to at most [side, side], each entry a square."""
    factor = side // max(len(matrix), 1)
    return matrix.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
