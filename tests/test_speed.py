"""Folding batch norm changes a teacher's speed, not its maps."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from kd.detectors import build_detector
from kd.detectors.backbone import build_backbone
from kd.run.speed import fold_batch_norm, speed_up_teacher


def norms(module: nn.Module) -> int:
    return sum(hasattr(part, "running_mean") for part in module.modules())


@pytest.mark.parametrize("backbone", ["r18", "tf_efficientnet_lite0", "mobilenetv3_small_100", "convnext_atto"])
def test_maps_stay(backbone):
    """Statistics unlike a new network's 0 and 1; no norm is left, and ConvNeXt, which has none, is served as well."""
    body, image = build_backbone(backbone, "fcos").body.eval(), torch.rand(1, 3, 64, 96)
    for module in body.modules():
        if hasattr(module, "running_mean"):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    folded = fold_batch_norm(body, image)
    assert norms(folded) == 0
    with torch.no_grad():
        for ours, expected in zip(folded(image), body(image)):
            assert_close(ours, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_autocast_would_round_the_same():
    """With weights kept in bfloat16, maps under autocast are the same to the last bit."""
    slow, fast = (build_detector("fcos", "test_resnet", 3, image_size=(64, 64)).eval() for _ in range(2))
    fast.load_state_dict(slow.state_dict())
    slow, fast = speed_up_teacher(slow), speed_up_teacher(fast, torch.bfloat16)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, maps = slow.backbone(image), fast.backbone(image)
    assert all(torch.equal(maps[name], expected[name]) for name in expected)


class Shuffled(nn.Module):
    """Computes in another order than it registers: the norm comes first."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.norm.running_mean.fill_(5)

    def forward(self, x):
        return [self.conv(self.norm(x))]


def test_what_cannot_be_folded_is_left():
    network = Shuffled().eval()
    assert fold_batch_norm(network, torch.rand(1, 3, 8, 8)) is network
