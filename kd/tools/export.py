"""A detector as an ONNX file, written by torch.onnx's tracing exporter and compared with torch.

torch.export, which the newer exporter builds on, fails in torchvision itself: pytorch/vision issues 9306 and 9462.
"""

import copy
import math
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.onnx.operators import shape_as_tensor

OUTPUTS = ["boxes", "scores", "labels"]
OPSET = 17
BOX_TOLERANCE, SCORE_TOLERANCE = 0.1, 1e-3  # pixels and score by which ONNX Runtime may differ from torch


class SingleImage(nn.Module):
    """A detector of one image with its outputs in one order, which differs among torchvision's detectors.

    Args:
        detector: it is copied.
    """

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.detector = copy.deepcopy(detector).cpu().eval().requires_grad_(False)
        self.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes [D, 4] in xyxy pixels, scores [D] and labels [D] for an image [3, h, w] in 0..1.

        Traced, torchvision's transform computes the size of its input in float32 instead of Python's float64, a pixel
        less for some images. Here it is computed in float64.
        """
        transform = self.detector.transform
        sides = shape_as_tensor(image)[1:].double()
        limits = torch.tensor([transform.min_size[-1], transform.max_size], dtype=torch.float64)
        height, width = (sides * (limits / torch.stack([sides.min(), sides.max()])).min()).floor().long()
        transform.fixed_size = (width, height)
        (found,) = self.detector([image])
        return tuple(found[name] for name in OUTPUTS)


def export_onnx(detector: nn.Module, path: str | Path) -> None:
    """Write a detector of one image of any size to an ONNX file.

    Its input "image" is [3, height, width] in 0..1, its outputs boxes, scores and labels are those of `SingleImage`.

    Args:
        detector: as `kd.detectors.build_detector` returns it.
        path: of the file.

    Raises:
        ValueError: the package onnx is not installed.
    """
    try:
        import onnx  # noqa: F401, torch's exporter needs it
    except ImportError as error:
        raise ValueError("an export needs the package onnx: pip install onnx onnxruntime") from error
    image = torch.rand(3, *2 * [detector.transform.min_size[-1]])
    with warnings.catch_warnings():  # of every size that is taken for a constant, in code that torchvision made for it
        warnings.simplefilter("ignore")
        torch.onnx.export(
            SingleImage(detector),
            (image,),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=OUTPUTS,
            dynamic_axes={"image": {1: "height", 2: "width"}, **{name: {0: "detections"} for name in OUTPUTS}},
        )


@torch.no_grad()
def compare_onnx(detector: nn.Module, path: str | Path, images: Iterable[Tensor]) -> str:
    """Compare an exported file, run by ONNX Runtime, with its detector in torch; both on the CPU.

    Args:
        detector: in eval mode, on the CPU.
        path: of the file.
        images: [3, h, w] in 0..1 each. Their halves are compared, too: a file may be right only for the aspect ratio
            with which it was traced.

    Returns:
        One line that says what was compared and the largest differences.

    Raises:
        ImportError: the package onnxruntime is not installed.
        ValueError: the file cannot be run, or the detections differ in number or label, or by more than BOX_TOLERANCE
            or SCORE_TOLERANCE.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises many types
        raise ValueError(f"onnxruntime cannot load {path}: {error}") from error
    sizes, count, largest = [], 0, (0.0, 0.0)
    for image in (part for whole in images for part in (whole, half(whole))):
        size, expected = f"{image.shape[1]}x{image.shape[2]}", detector([image])[0]
        try:
            outputs = session.run(OUTPUTS, {"image": image.numpy()})
        except Exception as error:  # onnxruntime raises many types
            raise ValueError(f"{path} fails on an image of {size} pixels: {error}") from error
        differences = largest_differences(expected, dict(zip(OUTPUTS, map(torch.from_numpy, outputs))))
        if differences[0] > BOX_TOLERANCE or differences[1] > SCORE_TOLERANCE:
            raise ValueError(
                f"{path} differs from torch on an image of {size} pixels: {len(expected['scores'])} and "
                f"{len(outputs[1])} detections, boxes by {differences[0]:.2g} pixels, scores by {differences[1]:.2g}"
            )
        sizes, count = [*sizes, size], count + len(expected["scores"])
        largest = tuple(map(max, largest, differences))
    return (
        f"equal in torch and onnxruntime {onnxruntime.__version__}: {count} detections on images of "
        f"{', '.join(dict.fromkeys(sizes))} pixels; boxes differ by at most {largest[0]:.1g} pixels, scores by "
        f"{largest[1]:.1g}"
    )


def half(image: Tensor) -> Tensor:
    """Return the upper or the left half of an image, the one that is not narrower."""
    height, width = image.shape[1:]
    return image[:, : height // 2 + 1] if height >= width else image[:, :, : width // 2 + 1]


def largest_differences(expected: dict[str, Tensor], found: dict[str, Tensor]) -> tuple[float, float]:
    """Return the largest differences of boxes (pixels) and scores between detections and the nearest of their label.

    Detections of almost equal scores may have another order. Another number of detections is infinitely far.
    """
    if len(expected["scores"]) != len(found["scores"]):
        return math.inf, math.inf
    if len(expected["scores"]) == 0:
        return 0.0, 0.0
    apart = torch.cdist(expected["boxes"].double(), found["boxes"].double(), p=math.inf)
    apart[expected["labels"][:, None] != found["labels"]] = math.inf
    distance, nearest = apart.min(dim=1)
    return distance.max().item(), (expected["scores"] - found["scores"][nearest]).abs().max().item()
