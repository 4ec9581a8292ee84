"""CWD against its equations, its authors' numbers and arithmetic done by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from kd.methods.cwd import CWD, cwd_loss, log_distribution, response


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_matches_equation(fake_output, temperature):
    """Slow loops over every index."""
    for s, t in zip(fake_output(1).fpn, fake_output(2).fpn):
        N, C = s.shape[:2]
        loss = 0.0
        for n in range(N):
            for c in range(C):
                exponentials = [[math.exp(v / temperature) for v in x[n, c].flatten().tolist()] for x in (s, t)]
                P_s, P_t = ([v / sum(channel) for v in channel] for channel in exponentials)
                loss += sum(q * (math.log(q) - math.log(p)) for p, q in zip(P_s, P_t)) * temperature**2 / (N * C)
        assert_close(cwd_loss(s, t, temperature).item(), loss)


def test_matches_reference(reference):
    """Losses and gradients of the public code, whose inputs are random numbers of seed 0 in this order.

    Gradients are compared by their norms on each level, and one by one on the coarsest level.
    """
    generator, tolerance = torch.Generator().manual_seed(0), {"rtol": 1e-9, "atol": 1e-12}
    levels = []
    for side in (16, 8, 4):
        s, t = (torch.randn(2, 8, side, side, dtype=torch.float64, generator=generator) for _ in range(2))
        levels.append((s.requires_grad_(), 2 * t + 0.3))
    for case in reference["cwd"]["cases"].values():
        losses = [case["loss_weight"] * cwd_loss(s, t, case["temperature"]) for s, t in levels]
        assert_close([loss.item() for loss in losses], case["losses"], **tolerance)
        gradients = torch.autograd.grad(sum(losses), [s for s, _ in levels])
        assert_close([gradient.norm().item() for gradient in gradients], case["grad_norms"], **tolerance)
        assert_close(gradients[2][1].tolist(), case["grad_2"], **tolerance)


def test_hand_computed():
    """Two positions. The teacher's values ln 3 and 0 give 3/4 and 1/4, the student's equal ones 1/2 and 1/2.

    KL = 3/4 ln(3/2) + 1/4 ln(1/2) = 3/4 ln 3 - ln 2; with the sides swapped, ln 2 - 1/2 ln 3. In a second channel both
    agree, so the mean over channels is half. The response is twice the mean of 3/4, 1/4 and 1/2, 1/2.
    """
    teacher = torch.tensor([[math.log(3), 0.0], [5.0, 5.0]], dtype=torch.float64).view(1, 2, 1, 2)
    student = torch.full((1, 2, 1, 2), -2.0, dtype=torch.float64)
    assert_close(log_distribution(teacher, 1.0).exp().flatten().tolist(), [0.75, 0.25, 0.5, 0.5])
    assert_close(cwd_loss(student[:, :1], teacher[:, :1]).item(), 0.75 * math.log(3) - math.log(2))
    assert_close(cwd_loss(teacher[:, :1], student[:, :1]).item(), math.log(2) - 0.5 * math.log(3))
    assert_close(cwd_loss(student, teacher).item(), (0.75 * math.log(3) - math.log(2)) / 2)
    assert_close(response(teacher, 1.0).flatten().tolist(), [1.25, 0.75])
    # Values twice as large at temperature 2 give the same distributions, and the loss 2^2 times.
    assert_close(cwd_loss(2 * student, 2 * teacher, 2.0), 4 * cwd_loss(student, teacher))


def test_zero_at_teacher(fake_output):
    """Also for a constant added to any channel of any image, but not for another scale; never below 0."""
    s, t = fake_output(1).fpn[0], fake_output(2).fpn[0]
    shift = torch.randn(2, 4, 1, 1, dtype=torch.float64)
    assert cwd_loss(t, t) == 0
    assert_close(cwd_loss(t + shift, t).item(), 0.0, rtol=0, atol=1e-12)
    assert_close(cwd_loss(s + shift, t - shift), cwd_loss(s, t))
    assert cwd_loss(2 * t, t) > 0.01


def test_gradients(fake_output):
    """By finite differences; none to the teacher."""
    s, t = fake_output(1).fpn[1].requires_grad_(), fake_output(2).fpn[1].requires_grad_()
    assert torch.autograd.gradcheck(lambda s: cwd_loss(s, t, 2.0), s)
    cwd_loss(s, t).backward()
    assert t.grad is None


def test_edge_cases():
    """A level of one position costs nothing; large values do not overflow; bfloat16 is compared in float32."""
    one, other = torch.rand(2, 3, 1, 1, requires_grad=True), torch.rand(2, 3, 1, 1)
    assert cwd_loss(one, other) == 0
    large = torch.tensor([1e4, 0.0]).view(1, 1, 1, 2)
    assert_close(cwd_loss(-large, large).item(), 1e4)  # the student gives the teacher's position exp(-1e4)
    assert cwd_loss(large.bfloat16(), large).dtype == torch.float32


def test_normaliser(fake_output):
    """A mean over images: repeating the batch changes nothing, and two images give the mean of each alone."""
    s, t = fake_output(1).fpn[0], fake_output(2).fpn[0]
    once = cwd_loss(s, t)
    assert_close(cwd_loss(torch.cat([s, s]), torch.cat([t, t])), once)
    assert_close(sum(cwd_loss(s[n : n + 1], t[n : n + 1]) for n in range(2)) / 2, once)


@pytest.mark.parametrize("detector", ["fcos", "retinanet", "faster_rcnn"])
def test_weights_and_adapters(fake_output, detector):
    """The weight multiplies the sum over levels; without adapters there is nothing to train."""
    student, teacher = fake_output(1), fake_output(2)
    method = CWD(detector, 4, 4, (8, 16, 32))
    levels = list(zip(student.fpn, teacher.fpn))
    assert not list(method.parameters())
    assert_close(method(student, teacher, []), {"loss_cwd_fpn": 10 * sum(cwd_loss(s, t) for s, t in levels)})
    warm = CWD(detector, 4, 4, (8, 16, 32), loss_weight=5.0, temperature=4.0)
    assert_close(warm(student, teacher, [])["loss_cwd_fpn"], 5 * sum(cwd_loss(s, t, 4.0) for s, t in levels))
    assert len(list(CWD(detector, 4, 6, (8, 16, 32)).parameters())) == 6


def test_maps(fake_output):
    """The responses at the method's temperature, the student's adapted; their mean is 1."""
    student, teacher = fake_output(1), fake_output(2, C=6)
    method = CWD("fcos", 4, 6, (8, 16, 32), temperature=2.0).double()
    maps = method.maps(student, teacher, [])
    assert_close(maps["response teacher"], [response(t, 2.0) for t in teacher.fpn])
    adapted = [adapter(s) for adapter, s in zip(method.adapters, student.fpn)]
    assert_close(maps["response student"], [response(s, 2.0) for s in adapted])
    assert all(level.mean().sub(1).abs() < 1e-12 for levels in maps.values() for level in levels)


def test_errors(fake_output):
    output = fake_output(1)
    with pytest.raises(ValueError, match=r"\(2, 4, 4, 6\) and teacher \(2, 4, 2, 3\) must agree"):
        cwd_loss(output.fpn[0], output.fpn[1])
    with pytest.raises(ValueError, match=r"\[N, C, H, W\]"):
        cwd_loss(output.fpn[0][0], output.fpn[0][0])
