"""Check image files without decoding all of them, and read them as upright RGB."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from torch.distributed import get_node_local_rank
from tqdm import tqdm

from kd.data.coco import DataError

# The transposition for each EXIF orientation; 1 is upright. From 5 on, width and height are swapped.
TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Formats of photographs; MPO belongs to JPEG. Pillow knows many more, and starts Ghostscript for one of them.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")

# The last bytes of a complete file.
END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


def check_width(width: int, height: int, longest: int, name: str | Path) -> None:
    """Raise DataError if an image would have no pixel left in width or height at this long side."""
    if max(width, height) > longest * min(width, height):
        raise DataError(
            f"{name}: {width}x{height} pixels would have no height or width left when resized to a long side of "
            f"{longest}: leave it out"
        )


def open_image(path: str | Path) -> Image.Image:
    """Open an image of one of FORMATS; its pixels are decoded when they are needed.

    Raises:
        OSError: the file cannot be read, has another format, or has more pixels than Pillow decodes without a warning.
    """
    # Warnings are filtered for the whole process, because filters cannot be set for a thread.
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    try:
        return Image.open(path, formats=FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        most = Image.MAX_IMAGE_PIXELS // 10**6
        raise OSError(f"more than {most} million pixels: scale it down, or cut it into parts") from error


def find_bad_images(folder: Path, images: list[dict]) -> dict[int, str]:
    """Return the images that cannot be used, by id: file name and reason.

    Args:
        folder: of the files.
        images: entries of COCO's "images".

    Raises:
        DataError: the folder does not exist.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: give the folder that contains the images")
    # Load Pillow's formats before the threads start; loading is not thread-safe.
    Image.preinit()
    Image.init()

    def check(image: dict) -> str | None:
        return why_bad(folder / image["file_name"], (image["width"], image["height"]))

    with ThreadPoolExecutor() as pool:
        reasons = pool.map(check, images)
        bar = {"leave": False, "delay": 2, "disable": get_node_local_rank(0) > 0, "dynamic_ncols": True}
        reasons = tqdm(reasons, f"checking {folder}", len(images), **bar)
        return {image["id"]: f"{image['file_name']!r}: {reason}" for image, reason in zip(images, reasons) if reason}


def why_bad(path: Path, size: tuple[float, float]) -> str | None:
    """Return why an image cannot be used, None if it can.

    A JPEG or PNG with a complete end is judged by its header. Other files are decoded: the end may be missing, or only
    be followed by other bytes.

    Args:
        path: of the file.
        size: annotated width and height.
    """
    try:
        if not path.is_file():
            return "file not found"
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - 8, 0))
            end = file.read()
        with open_image(path) as image:
            find_turn(image, size)
            if image.format not in END_MARKERS or not end.endswith(END_MARKERS[image.format]):
                decode(image, size)
    except UnidentifiedImageError:
        return f"not a {', '.join(FORMATS)} or MPO file ({path.stat().st_size} bytes)"
    except Exception as error:  # Pillow's decoders raise many types
        return str(error) or type(error).__name__
    return None


def read_image(path: Path, size: tuple[float, float]) -> Image.Image:
    """Return an image as RGB, upright.

    Args:
        path: of the file.
        size: annotated width and height.

    Raises:
        DataError: it cannot be read, or has another size.
    """
    try:
        with open_image(path) as image:
            return decode(image, size)
    except Exception as error:  # Pillow's decoders raise many types
        raise DataError(f"{path} cannot be used: {error}. Repair it, or remove it from the annotations") from error


def decode(image: Image.Image, size: tuple[float, float]) -> Image.Image:
    """Return an opened image as RGB, upright and of the annotated width and height."""
    turn = find_turn(image, size)
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    elif image.mode == "P":
        image = image.convert("RGBA")  # Pillow warns of transparent palettes when converting directly to RGB
    image = image.convert("RGB")
    image = image if turn is None else image.transpose(turn)
    if image.size != size:  # happens in damaged TIFFs
        raise ValueError(f"{image.width}x{image.height} pixels, which differs from its header")
    return image


def find_turn(image: Image.Image, size: tuple[float, float]) -> Image.Transpose | None:
    """Return the transposition that makes an image upright and of the annotated size; reads its header only.

    Args:
        image: opened, not decoded.
        size: annotated width and height.

    Raises:
        ValueError: it has another size, or floating-point pixels.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels of unknown range")
    tag = orientation(image)
    if (image.size if tag < 5 else image.size[::-1]) == size:
        return TURNS[tag]
    if image.size == size:  # annotated without applying the orientation
        return None
    raise ValueError(f"{image.width}x{image.height} pixels, but annotated as {size[0]:g}x{size[1]:g}")


def upright_size(path: Path) -> tuple[int, int] | None:
    """Return width and height of an upright image from its header, None if it cannot be read."""
    try:
        with open_image(path) as image:
            return image.size if orientation(image) < 5 else image.size[::-1]
    except Exception:  # Pillow's decoders raise many types; find_bad_images says what is wrong
        return None


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) if it is absent or damaged."""
    if image.format == "TIFF":  # Pillow applies these itself
        return 1
    try:
        # The method of the base class: PNG's own decodes the image to look for a tag behind the pixels.
        tag = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
        return tag if tag in TURNS else 1
    except Exception:  # image viewers ignore a damaged tag as well
        return 1
