"""Detections of a model on image files that need no annotations: pictures, and a file in COCO's results format.

COCO's results are a list of {"image_id", "category_id", "bbox": [x, y, width, height] in pixels, "score"}. Files have
no ids: "image_id" is the name of the file, with subfolders, relative to the folder that holds all given images. The
picture has the same name, so files of one name in several folders stay apart.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from kd.data import class_names
from kd.data.images import FORMATS, check_width, decode, open_image, orientation
from kd.tools.samples import THRESHOLD, draw_detections

SMALLEST = 512  # pixels: smaller images are enlarged to this longest side, on which captions can be read


def read_photograph(path: str | Path) -> Tensor:
    """Return an image [3, h, w] in 0..1: upright, converted to RGB as in training; the first of several in a file.

    Raises:
        ValueError: the file cannot be read as an image of a photograph's format.
    """
    try:
        with open_image(path) as file:
            size = file.size if orientation(file) < 5 else file.size[::-1]
            return pil_to_tensor(decode(file, size)) / 255
    except Exception as error:  # Pillow's decoders raise many types
        raise ValueError(f"{path} is not an image that can be read: {error}") from error


def find_files(paths: list[str]) -> dict[str, Path]:
    """Return the files of paths, which are files or folders, by their names relative to the folder that holds all.

    Raises:
        ValueError: a path does not exist, or there is no file.
    """
    absolute = [Path(os.path.abspath(path)) for path in paths]
    for path, given in zip(absolute, paths):
        if not path.is_file() and not path.is_dir():
            raise ValueError(f"{given} is neither a file nor a folder: give image files or folders of them")
    root = os.path.commonpath([path if path.is_dir() else path.parent for path in absolute])
    found = [file for path in absolute for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
    files = {file.relative_to(root).as_posix(): file for file in found if file.is_file()}
    if not files:
        raise ValueError(f"{', '.join(paths)} holds no file")
    return files


@torch.inference_mode()
def predict(
    detector: nn.Module, categories: dict[int, dict], paths: list[str], folder: Path, threshold: float = THRESHOLD
) -> str:
    """Write a picture of each image with its detections, and detections.json with all of them, into a folder.

    Args:
        detector: in eval mode.
        categories: COCO category of each label; detections of other labels are dropped.
        paths: of image files and folders. Other files in the folders are skipped.
        folder: written to; it is created.
        threshold: detections below this score are not drawn.

    Returns:
        One line with the numbers of images, detections and skipped files.

    Raises:
        ValueError: a path does not exist or is a file that is not an image, there is no image, or a picture would
            overwrite its image.
    """
    files, given = find_files(paths), {os.path.abspath(path) for path in paths}
    if any(os.path.abspath(folder / name) == str(path) for name, path in files.items()):
        raise ValueError(f"pictures are written to {folder} and would overwrite images there: give images elsewhere")
    results, skipped, names = [], [], class_names(categories)
    device = next(detector.parameters()).device
    for name, path in tqdm(files.items(), "predictions", leave=False, dynamic_ncols=True):
        try:
            image = read_photograph(path)
            check_width(image.shape[2], image.shape[1], detector.transform.max_size, path)
        except ValueError as error:
            if str(path) in given:
                raise
            skipped.append(str(error))
            continue
        found = {key: value.cpu() for key, value in detector([image.to(device)])[0].items()}
        known = torch.tensor([label in names for label in found["labels"].tolist()], dtype=torch.bool)
        found = {key: value[known] for key, value in found.items()}
        results += coco_results(name, found, categories)
        picture = draw_detections(image, found, names, threshold, max(SMALLEST, *image.shape[1:]))
        save_picture(picture, folder / name)
    if len(skipped) == len(files):
        raise ValueError(f"{', '.join(paths)} holds no image that can be read; the first file: {skipped[0]}")
    (folder / "detections.json").write_text(json.dumps(results))
    drawn = sum(result["score"] >= threshold for result in results)
    line = f"{len(files) - len(skipped)} images, {len(results)} detections, {drawn} drawn (scores from {threshold:g})"
    return line + (f"; skipped {len(skipped)} files, the first: {skipped[0]}" if skipped else "")


def coco_results(name: str, found: dict[str, Tensor], categories: dict[int, dict]) -> Iterator[dict]:
    """Yield the detections of an image in COCO's results format, in thousandths of a pixel."""
    for (x1, y1, x2, y2), label, score in zip(*(found[key].tolist() for key in ("boxes", "labels", "scores"))):
        box = [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)]
        yield {"image_id": name, "category_id": categories[label]["id"], "bbox": box, "score": round(score, 5)}


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture in the format of its suffix, as JPEG if it has none of FORMATS."""
    format = Image.registered_extensions().get(path.suffix.lower())
    format = format if format in FORMATS else "JPEG"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, format, **({"quality": 90} if format == "JPEG" else {}))
