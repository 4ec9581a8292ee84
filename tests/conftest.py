"""What several tests share: the optional folder of reference numbers, photographs and weights, and fake outputs."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def golden():
    """A function that loads the numbers computed with an authors' own code, or skips where they are not at hand."""

    def load(name: str) -> dict:
        file = SHARED / "golden" / f"{name}.pt"
        if not file.is_file():
            pytest.skip(f"reference numbers are not at hand: {file}")
        return torch.load(file, weights_only=True)["cases"]

    return load


@pytest.fixture
def fake_output():
    """A function that makes a small random detector output in float64: three levels, the last of 1x1."""

    def make(
        seed: int, N: int = 2, C: int = 4, A: int = 2, K: int = 3, sizes=((4, 6), (2, 3), (1, 1))
    ) -> SimpleNamespace:
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        corners = [randn(N, A, 2, H, W).abs() * 20 for H, W in sizes]
        extents = [randn(N, A, 2, H, W).abs() * 20 + 1 for H, W in sizes]
        return SimpleNamespace(
            fpn=[randn(N, C, H, W) for H, W in sizes],
            cls_tower=[[randn(N, C, H, W).relu() for _ in range(2)] for H, W in sizes],
            reg_tower=[[randn(N, C, H, W).relu() for _ in range(2)] for H, W in sizes],
            cls_logits=[randn(N, A, K, H, W) for H, W in sizes],
            bbox_regression=[randn(N, A, 4, H, W) for H, W in sizes],
            boxes=[torch.cat([low, low + extent], dim=2) for low, extent in zip(corners, extents)],
            strides=[8 * 2**level for level in range(len(sizes))],
        )

    return make


@pytest.fixture
def targets():
    """Two images' ground truth in float64, xyxy pixels of a 32x48 input; the second image has no boxes."""
    return [
        {
            "boxes": torch.tensor([[4.0, 4.0, 30.0, 26.0], [10.0, 2.0, 44.0, 18.0]], dtype=torch.float64),
            "labels": torch.tensor([1, 2]),
        },
        {"boxes": torch.zeros(0, 4, dtype=torch.float64), "labels": torch.zeros(0, dtype=torch.long)},
    ]
