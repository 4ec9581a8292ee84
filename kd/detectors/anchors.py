"""Anchors: torchvision's, the same at half their size for small images, and mmdetection's."""

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator

from kd.detectors.backbone import STRIDES

ANCHORS = ("torchvision", "half", "mmdet")
SIDE = {"fcos": 1, "gfl": 1, "retinanet": 4, "faster_rcnn": 8}  # of the smallest anchor of a level, in strides


class ExactAnchors(AnchorGenerator):
    """Anchors of which nothing is rounded, centred every stride pixels, as mmdetection places them.

    torchvision rounds half widths and half heights to pixels, and places anchors every (image size // map size) pixels:
    on an image of 320 pixels, P7 has positions every 106 pixels instead of 128.

    Args:
        sizes: for each level, square roots of the anchors' areas, in pixels.
        aspect_ratios: for each level, height / width.
        strides: of the levels, in pixels.
        offset: of the centres, in strides.
    """

    def __init__(
        self,
        sizes: tuple[tuple[float, ...], ...],
        aspect_ratios: tuple[tuple[float, ...], ...],
        strides: tuple[int, ...],
        offset: float = 0.0,
    ):
        super().__init__(sizes, aspect_ratios)
        self.strides = list(strides)
        self.cell_anchors = [cell + offset * stride for cell, stride in zip(self.cell_anchors, strides)]

    def generate_anchors(
        self,
        scales: list[float],
        aspect_ratios: list[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008, torchvision's signature
    ) -> Tensor:
        """Return the anchors of one position [A, 4], xyxy pixels around 0, in torchvision's order."""
        sides = torch.as_tensor(scales, dtype=dtype, device=device)
        roots = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()[:, None]
        widths, heights = (sides / roots).flatten(), (sides * roots).flatten()
        return torch.stack([-widths, -heights, widths, heights], dim=1) / 2

    def grid_anchors(self, grid_sizes: list[list[int]], strides: list[list[Tensor]]) -> list[Tensor]:
        """Return the anchors of each level [HWA, 4], xyxy pixels; `strides`, torchvision's, are not used."""
        anchors = []
        for size, stride, cell in zip(grid_sizes, self.strides, self.cell_anchors):
            y = torch.arange(size[0], device=cell.device) * stride
            x = torch.arange(size[1], device=cell.device) * stride
            y, x = torch.meshgrid(y, x, indexing="ij")
            centres = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
            anchors.append((centres + cell).reshape(-1, 4))
        return anchors


def make_anchors(detector: str, kind: str) -> AnchorGenerator:
    """Return the anchor generator of a detector.

    Args:
        detector: a key of STRIDES.
        kind: "torchvision"; "half" for half the size, which leaves FCOS and GFL as they are: their anchors stand for
            positions; or "mmdet" for ExactAnchors, with which FCOS's positions are half a stride further.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in ANCHORS:
        raise ValueError(f"unknown anchors {kind!r}: choose {', '.join(ANCHORS)}")
    strides, octaves = STRIDES[detector], 3 if detector == "retinanet" else 1
    side = SIDE[detector] / 2 if kind == "half" and SIDE[detector] > 1 else SIDE[detector]
    sizes = tuple(tuple(side * stride * 2 ** (k / octaves) for k in range(octaves)) for stride in strides)
    ratios = ((1.0,) if SIDE[detector] == 1 else (0.5, 1.0, 2.0),) * len(strides)
    if kind == "mmdet":
        return ExactAnchors(sizes, ratios, strides, offset=0.5 if detector == "fcos" else 0.0)
    return AnchorGenerator(tuple(tuple(map(int, level)) for level in sizes), ratios)
