"""Feature imitation against its equation and arithmetic done by hand."""

import pytest
import torch
from torch.testing import assert_close

from kd.methods.imitation import Imitation, imitation_loss, min_max_normalize


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("p", [1, 2])
def test_matches_equation(fake_output, p, normalize):
    """Slow loops over every index, minimum and maximum per image over channels and positions."""
    for s, t in zip(fake_output(1).fpn, fake_output(2).fpn):
        total, count = 0.0, 0
        for image_s, image_t in zip(s.flatten(1).tolist(), t.flatten(1).tolist()):
            for a, b in zip(image_s, image_t):
                if normalize:
                    a = (a - min(image_s)) / (max(image_s) - min(image_s))
                    b = (b - min(image_t)) / (max(image_t) - min(image_t))
                total, count = total + abs(a - b) ** p, count + 1
        assert_close(imitation_loss(s, t, p, normalize).item(), total / count)


def test_hand_computed():
    """Normalised, (0, 2, 4) is (0, 0.5, 1) and (1, 1, 2) is (0, 0, 1): l1 is 0.5 / 3, l2 is 0.25 / 3."""
    student, teacher = torch.tensor([0.0, 2, 4]).view(1, 3, 1, 1), torch.tensor([1.0, 1, 2]).view(1, 3, 1, 1)
    assert_close(imitation_loss(student, teacher, p=1).item(), 0.5 / 3)
    assert_close(imitation_loss(student, teacher, p=2).item(), 0.25 / 3)
    assert_close(imitation_loss(student, teacher, p=1, normalize=False).item(), 4 / 3)


def test_zero_at_teacher(fake_output):
    """With normalisation, also for any positive scale and any shift of an image's features."""
    t = fake_output(2).fpn[0]
    assert imitation_loss(t, t, normalize=False) == 0
    assert_close(imitation_loss(3 * t - 5, t).item(), 0.0)
    assert imitation_loss(3 * t - 5, t, normalize=False) > 1


def test_normaliser(fake_output):
    """A mean over images: repeating the batch changes nothing, and two images give the mean of each alone."""
    s, t = fake_output(1).fpn[0], fake_output(2).fpn[0]
    once = imitation_loss(s, t)
    assert_close(imitation_loss(torch.cat([s, s]), torch.cat([t, t])), once)
    assert_close(sum(imitation_loss(s[n : n + 1], t[n : n + 1]) for n in range(2)) / 2, once)


def test_constant_features():
    """They become 0, and gradients are not divided by an epsilon."""
    assert torch.equal(min_max_normalize(torch.full((2, 3, 1, 1), 7.0)), torch.zeros(2, 3, 1, 1))
    constant = torch.full((1, 2, 2, 2), 7.0, requires_grad=True)
    imitation_loss(constant, torch.rand(1, 2, 2, 2)).backward()
    assert constant.grad.abs().max() < 1


def test_weights_and_adapter(fake_output):
    """The weight multiplies the sum over levels; without an adapter there is nothing to train."""
    student, teacher = fake_output(1), fake_output(2)
    levels = sum(imitation_loss(s, t, p=1) for s, t in zip(student.fpn, teacher.fpn))
    for detector, weight in (("fcos", 4), ("retinanet", 4), ("faster_rcnn", 2)):
        method = Imitation(detector, 4, 4, (8, 16, 32), p=1)
        assert not list(method.parameters())
        assert_close(method(student, teacher, [])["loss_l1_fpn"], weight * levels)
    assert len(list(Imitation("fcos", 4, 4, (8, 16, 32), adapter=True).parameters())) == 6


@pytest.mark.parametrize("p", [1, 2])
def test_maps(fake_output, p):
    """The loss is the weighted sum of the maps' means, adapters included."""
    student, teacher = fake_output(1), fake_output(2, C=6)
    method = Imitation("fcos", 4, 6, (8, 16, 32), p=p).double()
    levels = method.maps(student, teacher, [])["difference"]
    assert all(level.min() >= 0 and level.max() <= 1 for level in levels)
    assert_close(method(student, teacher, [])[f"loss_l{p}_fpn"], 4 * sum(level.mean() for level in levels))


def test_errors(fake_output):
    output = fake_output(1)
    with pytest.raises(ValueError, match="must agree"):
        imitation_loss(output.fpn[0], output.fpn[1])
    with pytest.raises(ValueError, match="p must be 1 or 2"):
        imitation_loss(output.fpn[0], output.fpn[0], p=3)
