"""MGD against its equations, its authors' numbers and arithmetic done by hand."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from kd.methods.mgd import MGD, draw_mask, generation_error


def blocks(method: MGD, level: int) -> list[nn.Module]:
    return [method.adapters[level], method.generation_blocks[level]]


def slow_conv3x3(x: list, conv: nn.Conv2d) -> list:
    """Of one image, lists [C][H][W], with zeros around it."""
    (H, W), weight = (len(x[0]), len(x[0][0])), conv.weight.tolist()
    return [
        [
            [
                bias
                + sum(
                    weight[c][k][i][j] * x[k][y + i - 1][z + j - 1]
                    for k in range(len(x))
                    for i in range(3)
                    for j in range(3)
                    if 0 <= y + i - 1 < H and 0 <= z + j - 1 < W
                )
                for z in range(W)
            ]
            for y in range(H)
        ]
        for c, bias in enumerate(conv.bias.tolist())
    ]


def test_matches_equation(fake_output):
    """Slow loops over every index, for masks drawn with the same seed."""
    student, teacher = fake_output(1), fake_output(2)
    method = MGD("retinanet", 4, 4, (8, 16, 32)).double()
    torch.manual_seed(7)
    loss = method(student, teacher, [])["loss_mgd_fpn"]
    torch.manual_seed(7)
    total = 0.0
    for level, (s, t) in enumerate(zip(student.fpn, teacher.fpn)):
        N, C, H, W = s.shape
        keep = torch.rand(N, 1, H, W, dtype=torch.float64) <= 0.35
        first, _, second = method.generation_blocks[level]
        for n in range(N):
            x = [
                [[s[n, c, y, z].item() * keep[n, 0, y, z].item() for z in range(W)] for y in range(H)] for c in range(C)
            ]
            x = [[[max(v, 0.0) for v in row] for row in channel] for channel in slow_conv3x3(x, first)]
            generated = torch.tensor(slow_conv3x3(x, second), dtype=torch.float64)
            squares = [(g - v) ** 2 for g, v in zip(generated.flatten().tolist(), t[n].flatten().tolist())]
            total += sum(squares) / N
    assert_close(loss.item(), 2e-5 * total)


def test_matches_reference(reference):
    """Losses and gradients of the public code, whose parameters and inputs are random numbers of seed 0 in this order.

    Its masks are those of seeds 0, 1 and 2. Gradients of features are compared by their norms on each level, and one by
    one on the coarsest level; those of parameters by their norms, and of biases one by one.
    """
    generator, tolerance = torch.Generator().manual_seed(0), {"rtol": 1e-9, "atol": 1e-12}

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    for case in reference["mgd"]["cases"].values():
        method = MGD("retinanet", case["student_channels"], 8, (8, 16, 32)).double()
        student, losses = [], []
        for level, side in enumerate((16, 8, 4)):
            for module in blocks(method, level):
                for parameter in module.parameters():
                    parameter.data = 0.2 * randn(*parameter.shape)
            s, t = randn(2, case["student_channels"], side, side).requires_grad_(), randn(2, 8, side, side)
            torch.manual_seed(level)
            adapter, generate = blocks(method, level)
            error = generation_error(adapter(s), t, draw_mask(t, method.mask_ratio), generate)
            student.append(s)
            losses.append(method.alpha * error.sum() / len(error))
        sum(losses).backward()
        assert_close([loss.item() for loss in losses], case["losses"], **tolerance)
        assert_close([s.grad.norm().item() for s in student], case["grad_norms"], **tolerance)
        assert_close(student[2].grad[1].tolist(), case["grad_2"], **tolerance)
        for level, norms in enumerate(case["grad_parameter_norms"]):
            gradients = {}
            for name, module in zip(("align.", "generation."), blocks(method, level)):
                gradients |= {name + key: parameter.grad for key, parameter in module.named_parameters()}
            assert_close({name: gradient.norm().item() for name, gradient in gradients.items()}, norms, **tolerance)
        biases = {name: gradients[name].tolist() for name in case["grad_biases_2"]}
        assert_close(biases, case["grad_biases_2"], **tolerance)


def test_hand_computed(fake_output):
    """Generation blocks that return what they see: kept positions cost (s - t)^2, erased ones t^2.

    s is 3 and t is 1 on two channels: 2 * 4 = 8 where kept, 2 * 1 = 2 where erased. With two images of two positions,
    three of them kept, the loss is alpha * (3 * 8 + 2) / 2 = 13 alpha on each level.
    """
    student, teacher = (torch.full((2, 2, 1, 2), value, dtype=torch.float64) for value in (3.0, 1.0))
    mask = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64).view(2, 1, 1, 2)
    error = generation_error(student, teacher, mask, nn.Identity())
    assert error.tolist() == [[[8.0, 2.0]], [[8.0, 8.0]]]

    method = MGD("fcos", 2, 2, (8, 16), alpha=0.1)
    method.generation_blocks = nn.ModuleList([nn.Identity(), nn.Identity()])
    method.draw_masks = lambda teacher: [mask, mask]
    outputs = fake_output(1), fake_output(2)
    outputs[0].fpn, outputs[1].fpn = [student] * 2, [teacher] * 2
    assert_close(method(*outputs, [])["loss_mgd_fpn"].item(), 2 * 0.1 * 13)


def test_mask():
    """One draw per image and position for all channels, 0 with probability mask_ratio; the seed repeats it."""
    features = torch.zeros(50, 3, 10, 10)
    mask = draw_mask(features, 0.65)
    assert mask.shape == (50, 1, 10, 10) and set(mask.unique().tolist()) == {0.0, 1.0}
    assert abs(mask.mean() - 0.35) < 5 * (0.35 * 0.65 / 5000) ** 0.5  # five standard deviations of 5000 draws
    assert not torch.equal(mask[0], mask[1]) and not torch.equal(draw_mask(features, 0.65), mask)
    torch.manual_seed(0)
    assert torch.equal(draw_mask(features, 0.65), mask)  # each test starts with seed 0
    assert draw_mask(features, 0.0).all()


def test_seed_repeats_step(fake_output):
    """A step that is seeded again has the same loss and gradients, another step has not; also in eval mode."""
    student, teacher = fake_output(1), fake_output(2)
    method = MGD("fcos", 4, 4, (8, 16, 32)).double()
    student.fpn[0].requires_grad_()

    def step(seed: int) -> tuple[float, torch.Tensor]:
        torch.manual_seed(seed)
        loss = method(student, teacher, [])["loss_mgd_fpn"]
        return loss.item(), torch.autograd.grad(loss, student.fpn[0])[0]

    (loss, gradient), (again, gradient_again), (other, _) = step(3), step(3), step(4)
    assert loss == again != other and torch.equal(gradient, gradient_again)
    method.eval()
    assert step(3)[0] == loss


def test_gradients(fake_output):
    """None where positions are erased and out of reach of the others; none to the teacher."""
    s, t = fake_output(1).fpn[0].requires_grad_(), fake_output(2).fpn[0].requires_grad_()
    mask = torch.zeros(2, 1, 4, 6, dtype=torch.float64)
    mask[0, 0, 1, 2] = 1
    generation_error(s, t, mask, nn.Conv2d(4, 4, 3, padding=1).double()).sum().backward()
    assert t.grad is None
    assert torch.equal(s.grad != 0, mask.bool().expand_as(s))


def test_normaliser(fake_output):
    """A sum over channels and positions, a mean over images: repeating the batch and its masks changes nothing."""
    student, teacher = fake_output(1), fake_output(2)
    method = MGD("fcos", 4, 4, (8, 16, 32)).double()
    masks = method.draw_masks(teacher)
    method.draw_masks = lambda teacher: masks
    once = method(student, teacher, [])["loss_mgd_fpn"]
    errors = method.errors(student, teacher, masks)
    assert_close(once, 2e-5 * sum(error.sum() for error in errors) / 2)

    twice_s, twice_t = fake_output(1), fake_output(2)
    for output in (twice_s, twice_t):
        output.fpn = [torch.cat([level, level]) for level in output.fpn]
    method.draw_masks = lambda teacher: [torch.cat([mask, mask]) for mask in masks]
    assert_close(method(twice_s, twice_t, [])["loss_mgd_fpn"], once)


@pytest.mark.parametrize(
    "detector, alpha, mask_ratio, levels", [("fcos", 2e-5, 0.65, 5), ("faster_rcnn", 5e-7, 0.45, 4)]
)
def test_weights_and_levels(fake_output, detector, alpha, mask_ratio, levels):
    """Defaults of the detectors; Faster R-CNN compares four levels; adapters only where channels differ."""
    sizes = ((4, 6), (2, 3), (2, 2), (1, 2), (1, 1))
    student, teacher = fake_output(1, sizes=sizes), fake_output(2, sizes=sizes)
    method = MGD(detector, 4, 4, (8, 16, 32, 64, 128)).double()
    assert (method.alpha, method.mask_ratio) == (alpha, mask_ratio)
    assert len(list(method.parameters())) == 4 * levels
    assert len(list(MGD(detector, 4, 6, (8, 16, 32, 64, 128)).parameters())) == 6 * levels
    torch.manual_seed(1)
    loss = method(student, teacher, [])["loss_mgd_fpn"]
    torch.manual_seed(1)
    errors = method.maps(student, teacher, [])["generation error"]
    assert len(errors) == levels
    assert_close(loss, alpha * sum(error.sum() for error in errors) / 2)


def test_maps(fake_output):
    """The mask, and the errors that belong to it."""
    student, teacher = fake_output(1), fake_output(2, C=6)
    method = MGD("fcos", 4, 6, (8, 16, 32)).double()
    maps = method.maps(student, teacher, [])
    masks = [mask[:, None] for mask in maps["mask"]]
    assert_close(maps["generation error"], method.errors(student, teacher, masks))


def test_errors(fake_output):
    with pytest.raises(ValueError, match="mask_ratio must be at least 0 and below 1, not 1.0"):
        MGD("fcos", 4, 4, (8, 16, 32), mask_ratio=1.0)
    s, t = fake_output(1).fpn[:2]
    with pytest.raises(ValueError, match=r"\(2, 4, 4, 6\) and teacher \(2, 4, 2, 3\) must agree"):
        generation_error(s, t, torch.ones(2, 1, 4, 6), nn.Identity())
    with pytest.raises(ValueError, match=r"mask \(2, 4, 4, 6\) must be \[N, 1, H, W\]"):
        generation_error(s, s, torch.ones(2, 4, 4, 6), nn.Identity())
