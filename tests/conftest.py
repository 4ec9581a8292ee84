"""Shared fixtures: small random detector outputs, numbers computed with the authors' code, and a small data set."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import kd.data
from kd.data import Shapes

STRIDES = (8, 16, 32)  # of fake outputs


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def reference() -> dict:
    """Losses, gradients and key regions computed with public code; each part names its source."""
    return json.loads((Path(__file__).parent / "reference.json").read_text())


@pytest.fixture
def fake_output():
    """A function that makes a small random detector output in float64: three levels, the last of 1x1."""

    def make(
        seed: int, N: int = 2, C: int = 4, A: int = 2, K: int = 3, sizes=((4, 6), (2, 3), (1, 1))
    ) -> SimpleNamespace:
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def finish(*values: int):
            weight = randn(C, A * math.prod(values)) / C

            def rest_of_head(features, block, level):
                maps = torch.einsum("nchw,cv->nvhw", features.relu(), weight.to(features))
                return maps.to(features).unflatten(1, (A, *values))

            return rest_of_head

        def decode(regression, level):
            anchors = output.anchors[level]
            centre, sides = (anchors[:, :2] + anchors[:, 2:]) / 2, 10 * regression.exp()
            return torch.cat([centre - sides[:, :, :2], centre + sides[:, :, 2:]], dim=2)

        corners = [randn(N, A, 2, H, W).abs() * 20 for H, W in sizes]
        extents = [randn(N, A, 2, H, W).abs() * 20 + 1 for H, W in sizes]
        output = SimpleNamespace(
            fpn=[randn(N, C, H, W) for H, W in sizes],
            cls_tower=[[randn(N, C, H, W).relu() for _ in range(2)] for H, W in sizes],
            reg_tower=[[randn(N, C, H, W).relu() for _ in range(2)] for H, W in sizes],
            cls_logits=[randn(N, A, K, H, W) for H, W in sizes],
            bbox_regression=[randn(N, A, 4, H, W) for H, W in sizes],
            boxes=[torch.cat([low, low + extent], dim=2) for low, extent in zip(corners, extents)],
            anchors=[make_anchors(A, size, stride) for size, stride in zip(sizes, STRIDES)],
            cls_before_relu=[[randn(N, C, H, W) for _ in range(2)] for H, W in sizes],
            reg_before_relu=[[randn(N, C, H, W) for _ in range(2)] for H, W in sizes],
            edge_logits=[randn(N, A, 4, 5, H, W) for H, W in sizes],
            positive=[randn(N, A, H, W) > 0.5 for H, W in sizes],
            finish_cls=finish(K),
            finish_reg=finish(4),
            finish_edges=finish(4, 5),  # finish_reg of GFL
            decode=decode,
        )
        return output

    return make


def make_anchors(A: int, size: tuple[int, int], stride: int) -> torch.Tensor:
    """Anchors [A, 4, H, W] of a level, centred at (column, row) * stride."""
    H, W = size
    y, x = torch.meshgrid(torch.arange(H) * stride, torch.arange(W) * stride, indexing="ij")
    sides = stride * torch.arange(1, A + 1)[:, None, None].double()
    return torch.stack([x - sides, y - sides, x + sides, y + sides], dim=1)


@pytest.fixture
def targets():
    """Ground truth of two images in float64, xyxy pixels of a 32x48 input; the second image has no boxes."""
    return [
        {
            "boxes": torch.tensor([[4.0, 4.0, 30.0, 26.0], [10.0, 2.0, 44.0, 18.0]], dtype=torch.float64),
            "labels": torch.tensor([1, 2]),
        },
        {"boxes": torch.zeros(0, 4, dtype=torch.float64), "labels": torch.zeros(0, dtype=torch.long)},
    ]


@pytest.fixture
def few_shapes(monkeypatch):
    """Sixteen training and six validation pictures."""
    monkeypatch.setattr(kd.data, "SHAPES_TRAIN", 16)
    monkeypatch.setattr(kd.data, "SHAPES_VAL", 6)


@pytest.fixture
def coco_folder(tmp_path) -> Path:
    """Shapes as a folder in COCO's layout, eight pictures in each split."""
    root = tmp_path / "coco"
    for split, seed in (("train2017", 1), ("val2017", 0)):
        write_coco(Shapes(8, seed, 64), root / split, root / "annotations" / f"instances_{split}.json")
    return root


def write_coco(shapes: Shapes, images: Path, annotations: Path) -> None:
    """Write a data set of shapes as PNG files and a COCO instances file."""
    images.mkdir(parents=True)
    annotations.parent.mkdir(exist_ok=True)
    coco = shapes.coco()
    for image in coco["images"]:
        image["file_name"] = f"shapes-{image['id']}.png"
        Image.fromarray(shapes[image["id"]][0].permute(1, 2, 0).numpy()).save(images / image["file_name"])
    annotations.write_text(json.dumps(coco))
