"""PKD against its equation, its authors' numbers and arithmetic done by hand."""

import pytest
import torch
from torch.testing import assert_close

from kd.methods.pkd import LOSS_WEIGHT, PKD, decorrelation, pkd_loss, standardize


def test_matches_equation(fake_output):
    """Slow loops over every index; and one minus the correlation of each channel, times (P - 1) / P."""
    for s, t in zip(fake_output(1).fpn, fake_output(2).fpn):
        N, C, H, W = s.shape
        P = N * H * W
        loss = correlation_loss = 0.0
        for c in range(C):
            channels = [x[:, c].flatten().tolist() for x in (s, t)]
            standard = []
            for values in channels:
                mean = sum(values) / P
                std = (sum((v - mean) ** 2 for v in values) / (P - 1)) ** 0.5
                standard.append([(v - mean) / (std + 1e-6) for v in values])
            loss += sum((a - b) ** 2 / 2 for a, b in zip(*standard)) / (P * C)
            r = torch.corrcoef(torch.tensor(channels, dtype=torch.float64))[0, 1].item()
            correlation_loss += (1 - r) * (P - 1) / P / C
        assert_close(pkd_loss(s, t).item(), loss)
        assert_close(pkd_loss(s, t).item(), correlation_loss, rtol=0, atol=1e-4)


def test_matches_reference(reference):
    """Loss and gradients of the public code, whose inputs are random numbers of seed 0 in this order.

    The inputs of another method come first. Gradients are compared by their norms on each level, and one by one on the
    coarsest level.
    """
    case, generator = reference["pkd"], torch.Generator().manual_seed(0)
    sizes = [(2, 8, side, side) for side in (16, 8, 4)]

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    for size in sizes:
        randn(*size), randn(*size)
    student = [randn(*size).requires_grad_() for size in sizes]
    teacher = [3 * randn(*size) for size in sizes]
    loss = LOSS_WEIGHT["faster_rcnn"] * sum(pkd_loss(s, t) for s, t in zip(student, teacher))
    loss.backward()
    tolerance = {"rtol": 1e-9, "atol": 1e-12}
    assert_close(loss.item(), case["loss"], **tolerance)
    assert_close([s.grad.norm().item() for s in student], case["grad_norms"], **tolerance)
    assert_close(student[2].grad[1].tolist(), case["grad_2"], **tolerance)


def test_hand_computed():
    """Two values 0 and 2 have mean 1 and unbiased standard deviation sqrt(2): they become -+ 1 / sqrt(2).

    The same pattern costs nothing; turned round, both positions differ by sqrt(2), and half the squares are 1. With
    the biased standard deviation, 1, they would be 2. The mean of two such channels is 1/2.
    """
    rise = torch.tensor([0.0, 2], dtype=torch.float64).view(1, 1, 1, 2)
    both, turned = torch.cat([rise, rise], dim=1), torch.cat([rise, 10 - rise], dim=1)
    tolerance = {"rtol": 1e-5, "atol": 1e-9}
    assert_close(standardize(rise).flatten().tolist(), [-(0.5**0.5), 0.5**0.5], **tolerance)
    assert_close(decorrelation(10 - rise, rise).flatten().tolist(), [1.0, 1.0], **tolerance)
    assert_close(pkd_loss(turned, both).item(), 0.5, **tolerance)
    # Statistics are those of the batch: two images of one position are the same two values.
    images = rise.view(2, 1, 1, 1)
    assert_close(decorrelation(10 - images, images).flatten().tolist(), [1.0, 1.0], **tolerance)


def test_zero_at_teacher(fake_output):
    """Also for any positive scale and any shift of a channel, but not for a negative scale."""
    t = fake_output(2).fpn[0]
    scale, shift = torch.rand(1, 4, 1, 1).double() + 0.5, torch.randn(1, 4, 1, 1).double()
    assert pkd_loss(t, t) == 0
    assert_close(pkd_loss(scale * t + shift, t).item(), 0.0, rtol=0, atol=1e-9)
    assert_close(pkd_loss(-t, t).item(), 2 * 47 / 48, rtol=1e-5, atol=0)  # (1 - r) (P - 1) / P with P = 2 * 4 * 6


def test_gradients(fake_output):
    """By finite differences; none to the teacher."""
    s, t = fake_output(1).fpn[1].requires_grad_(), fake_output(2).fpn[1].requires_grad_()
    assert torch.autograd.gradcheck(lambda s: pkd_loss(s, t), s)
    pkd_loss(s, t).backward()
    assert t.grad is None


@pytest.mark.filterwarnings("error")
def test_edge_cases(fake_output):
    """A constant channel becomes 0; a single value has no correlation, costs nothing and has no gradient."""
    t, constant = fake_output(2).fpn[0], torch.full((2, 4, 4, 6), 2.0, dtype=torch.float64)
    assert not standardize(constant).any()
    assert_close(pkd_loss(constant, t).item(), 47 / 48 / 2, rtol=1e-5, atol=0)
    dead = torch.randn(2, 3, 50, 60)
    dead[:, 0] = 5.123  # mean and value differ by rounding, which 1e-6 would enlarge
    assert not standardize(dead)[:, 0].any()
    dead.requires_grad_()
    pkd_loss(dead, torch.randn(2, 3, 50, 60)).backward()
    assert not dead.grad[:, 0].any() and dead.grad[:, 1].any()
    one = torch.rand(1, 4, 1, 1).requires_grad_()
    loss = pkd_loss(one, torch.rand(1, 4, 1, 1))
    loss.backward()
    assert loss == 0 and not one.grad.any()


def test_normaliser(fake_output):
    """A mean over the batch: repeating it changes (P - 1) / P only. Statistics are not those of each image."""
    s, t = fake_output(1).fpn[0], fake_output(2).fpn[0]
    once, twice = pkd_loss(s, t), pkd_loss(torch.cat([s, s]), torch.cat([t, t]))
    assert_close(twice / (95 / 96), once / (47 / 48), rtol=1e-5, atol=0)
    one_by_one = sum(pkd_loss(s[n : n + 1], t[n : n + 1]) for n in range(2)) / 2
    assert (once - one_by_one).abs() > 1e-3


def test_weights_and_levels(fake_output):
    """The weight multiplies the sum over the four finest levels; without adapters there is nothing to train."""
    sizes = ((4, 6), (2, 3), (2, 2), (1, 2), (1, 1))
    student, teacher = fake_output(1, sizes=sizes), fake_output(2, sizes=sizes)
    levels = sum(pkd_loss(s, t) for s, t in zip(student.fpn[:4], teacher.fpn[:4]))
    for detector, weight in (("fcos", 10), ("retinanet", 10), ("faster_rcnn", 6)):
        method = PKD(detector, 4, 4, (8, 16, 32, 64, 128))
        assert not list(method.parameters())
        assert_close(method(student, teacher, []), {"loss_pkd_fpn": weight * levels})
    assert_close(PKD("fcos", 4, 4, (8,) * 5, loss_weight=0.5)(student, teacher, [])["loss_pkd_fpn"], 0.5 * levels)
    assert len(list(PKD("fcos", 4, 6, (8, 16, 32, 64, 128)).parameters())) == 8


def test_maps(fake_output):
    """The loss is the weighted sum of the maps' means, adapters included."""
    student, teacher = fake_output(1), fake_output(2, C=6)
    method = PKD("fcos", 4, 6, (8, 16, 32)).double()
    levels = method.maps(student, teacher, [])["decorrelation"]
    assert_close(method(student, teacher, [])["loss_pkd_fpn"], 10 * sum(level.mean() for level in levels))


def test_errors(fake_output):
    output = fake_output(1)
    with pytest.raises(ValueError, match=r"\(2, 4, 4, 6\) and teacher \(2, 4, 2, 3\) must agree"):
        pkd_loss(output.fpn[0], output.fpn[1])
    with pytest.raises(ValueError, match=r"\[N, C, H, W\]"):
        pkd_loss(output.fpn[0][0], output.fpn[0][0])
