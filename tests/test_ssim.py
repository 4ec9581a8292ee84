"""SSIM against its equations in slow loops, a plain 2-D convolution, its invariances and arithmetic done by hand."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from kd.methods.ssim import SSIM, blur, ssim_loss, ssim_map, stretch

C1, C2, C3 = 0.0001, 0.0009, 0.00045

# The window of the definition, width 11 and sigma 1.5, rounded to five decimals.
TAPS = [0.00103, 0.00760, 0.03600, 0.10936, 0.21301, 0.26601, 0.21301, 0.10936, 0.03600, 0.00760, 0.00103]

ABLATIONS = [exponents for exponents in itertools.product((0, 1), repeat=3) if any(exponents)]


def random_maps(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two maps in 0..1 that have something in common, in float64."""
    student, noise = torch.rand(2, *shape, dtype=torch.float64)
    return student, (student + noise) / 2


def components(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Luminance, contrast and structure from a full 11x11 window, for maps of at least 6x6."""
    taps = torch.tensor(TAPS, dtype=torch.float64) / sum(TAPS)
    kernel = torch.outer(taps, taps)[None, None]

    def mean(x):
        x = torch.nn.functional.pad(x, (5, 5, 5, 5), mode="reflect")
        return torch.nn.functional.conv2d(x.flatten(0, 1)[:, None], kernel).view(student.shape)

    mu_s, mu_t = mean(student), mean(teacher)
    var_s, var_t = mean(student**2) - mu_s**2, mean(teacher**2) - mu_t**2
    cov, stds = mean(student * teacher) - mu_s * mu_t, (var_s * var_t).sqrt()
    return (
        (2 * mu_s * mu_t + C1) / (mu_s**2 + mu_t**2 + C1),
        (2 * stds + C2) / (var_s + var_t + C2),
        (cov + C3) / (stds + C3),
    )


@pytest.mark.parametrize("normalize", ["image", "channel"])
@pytest.mark.parametrize("size, window", [((7, 6), 11), ((4, 6), 7), ((5, 2), 3), ((1, 5), 1), ((1, 1), 1)])
def test_matches_equation(size, window, normalize):
    """Slow loops over every index; `window` is what is left of 11 on a level of this size."""
    N, C, (H, W) = 2, 2, size
    student, teacher = torch.randn(2, N, C, H, W, dtype=torch.float64)

    def stretched(x):
        x = x.tolist()
        for n in range(N):
            for group in [range(C)] if normalize == "image" else [[c] for c in range(C)]:
                values = [v for c in group for row in x[n][c] for v in row]
                low, high = min(values), max(values)
                for c in group:
                    x[n][c] = [[(v - low) / (high - low) if high > low else 0.0 for v in row] for row in x[n][c]]
        return x

    def mirrored(i, size):
        return -i if i < 0 else 2 * (size - 1) - i if i >= size else i

    half = window // 2
    bell = {
        (i, j): math.exp(-(i * i + j * j) / (2 * 1.5**2))
        for i in range(-half, half + 1)
        for j in range(-half, half + 1)
    }
    total = sum(bell.values())
    s, t = stretched(student), stretched(teacher)
    expected = 0.0
    for n, c, y, x in itertools.product(range(N), range(C), range(H), range(W)):
        seen = [
            (
                weight / total,
                s[n][c][mirrored(y + i, H)][mirrored(x + j, W)],
                t[n][c][mirrored(y + i, H)][mirrored(x + j, W)],
            )
            for (i, j), weight in bell.items()
        ]
        mu_s, mu_t = sum(w * a for w, a, _ in seen), sum(w * b for w, _, b in seen)
        var_s = sum(w * (a - mu_s) ** 2 for w, a, _ in seen)
        var_t = sum(w * (b - mu_t) ** 2 for w, _, b in seen)
        cov = sum(w * (a - mu_s) * (b - mu_t) for w, a, b in seen)
        luminance = (2 * mu_s * mu_t + C1) / (mu_s**2 + mu_t**2 + C1)
        contrast = (2 * math.sqrt(var_s * var_t) + C2) / (var_s + var_t + C2)
        structure = (cov + C3) / (math.sqrt(var_s * var_t) + C3)
        expected += (1 - luminance * contrast * structure) / 2 / (N * C * H * W)
    assert_close(ssim_loss(student, teacher, normalize).item(), expected)


@pytest.mark.parametrize("alpha, beta, gamma", ABLATIONS)
def test_components(alpha, beta, gamma):
    """Every ablation against a full 11x11 window, and 0 switches a component off. The taps are good to 1e-5."""
    student, teacher = random_maps(2, 3, 9, 8)
    luminance, contrast, structure = components(student, teacher)
    expected = torch.ones_like(student)
    for component, exponent in ((luminance, alpha), (contrast, beta), (structure, gamma)):
        expected = expected * component if exponent else expected
    ours = ssim_map(student, teacher, alpha=alpha, beta=beta, gamma=gamma)
    assert_close(ours, expected, rtol=0, atol=2e-4)


def test_exponents():
    """Any alpha and beta, whole gamma; the product of components is the closed form."""
    student, teacher = random_maps(1, 2, 7, 7)
    teacher = 1 - teacher  # structure is mostly negative
    luminance, contrast, structure = (
        ssim_map(student, teacher, 11, 1.5, *one) for one in ((1, 0, 0), (0, 1, 0), (0, 0, 1))
    )
    assert structure.mean() < -0.3
    assert_close(ssim_map(student, teacher), luminance * contrast * structure)
    assert_close(ssim_map(student, teacher, 11, 1.5, 0.5, 1.5, 3), luminance**0.5 * contrast**1.5 * structure**3)


def test_window():
    """An impulse is blurred to the outer product of the taps; fewer of them keep their shape and sum to 1."""
    impulse = torch.zeros(1, 1, 13, 13, dtype=torch.float64)
    impulse[..., 6, 6] = 1
    taps = torch.tensor(TAPS, dtype=torch.float64)
    assert_close(blur(impulse, 11, 1.5)[0, 0, 1:-1, 1:-1], torch.outer(taps, taps), rtol=0, atol=1e-5)
    taps = taps[3:8] / taps[3:8].sum()
    assert_close(blur(impulse, 5, 1.5)[0, 0, 4:-4, 4:-4], torch.outer(taps, taps), rtol=0, atol=1e-5)
    assert_close(blur(torch.ones(1, 2, 5, 7), 11, 1.5), torch.ones(1, 2, 5, 7))


def test_zero_at_teacher(fake_output):
    """Equal maps cost nothing, nor do other scales and offsets of what is stretched together."""
    for features in fake_output(2).fpn:
        for normalize in ("image", "channel"):
            assert_close(ssim_loss(features, features, normalize).item(), 0.0)
            assert_close(ssim_loss(features, features, normalize, alpha=1, beta=1, gamma=2).item(), 0.0)
    features = fake_output(2).fpn[0]
    per_image = torch.tensor([3.0, 0.2], dtype=torch.float64).view(2, 1, 1, 1)
    per_channel = torch.tensor([1.0, 2.0, 5.0, 0.3], dtype=torch.float64).view(1, 4, 1, 1)
    for moved in (3 * features - 7, per_image * features + per_image):
        assert_close(ssim_loss(moved, features).item(), 0.0)
        assert_close(ssim_loss(features, moved).item(), 0.0)
    assert_close(ssim_loss(per_channel * features - per_channel, features, "channel").item(), 0.0)
    assert ssim_loss(per_channel * features, features) > 1e-3


def test_range():
    """Independent noise costs about one half, its mirror image more, and nothing more than 1."""
    student, teacher = torch.rand(2, 1, 8, 24, 24, dtype=torch.float64)
    assert abs(ssim_loss(student, teacher) - 0.5) < 0.01
    assert 0.9 < ssim_loss(-teacher, teacher) <= 1
    assert (ssim_map(student, teacher).abs() <= 1).all()


def test_hand_computed():
    """A 1x1 level leaves luminance; a 2x2 level has a window of three taps a, b, a.

    1x1, three channels 0, 1, 2 and 0, 4, 4, stretched to 0, 1/2, 1 and 0, 1, 1. Variances are 0, so ssim is luminance:
    1 in the outer channels, (2 * 1/2 + C1) / (1/4 + 1 + C1) = 1.0001 / 1.2501 in the middle one.

    2x2, rows 0 1 against rows 1 0. Across, the mirrored neighbours of 0 are 1 and 1; down, all values are equal.
    At the left, mu_s = 2a and mu_t = b with 2a + b = 1; values are 0 or 1, so var_s = 2a - 4a^2 = 2ab = var_t, and as
    student * teacher is 0, cov = -2ab. The right mirrors the left.
    """
    student, teacher = torch.tensor([[0.0, 1, 2], [0, 4, 4]], dtype=torch.float64).view(2, 1, 3, 1, 1)
    assert_close(ssim_loss(student, teacher).item(), (1 - 1.0001 / 1.2501) / 3 / 2)

    student = torch.tensor([[0.0, 1], [0, 1]], dtype=torch.float64)[None, None]
    side = math.exp(-1 / (2 * 1.5**2))
    a, b = side / (1 + 2 * side), 1 / (1 + 2 * side)
    luminance = (4 * a * b + C1) / (4 * a * a + b * b + C1)
    structure = (-2 * a * b + C3) / (2 * a * b + C3)
    assert_close(ssim_loss(student, 1 - student).item(), (1 - luminance * structure) / 2)
    assert_close(ssim_loss(student, 1 - student, alpha=0, beta=0).item(), (1 - structure) / 2)
    assert_close(ssim_loss(student, 1 - student, beta=0, gamma=0).item(), (1 - luminance) / 2)
    assert_close(ssim_loss(student, 1 - student, alpha=0, gamma=0).item(), 0.0)


def test_gradients(fake_output):
    student, teacher = fake_output(1), fake_output(2)
    features = student.fpn[1].clone().requires_grad_()
    for options in ({}, {"normalize": "channel"}, {"alpha": 0.5, "beta": 2, "gamma": 3}, {"alpha": 0, "gamma": 0}):
        assert torch.autograd.gradcheck(lambda f, o=options: ssim_loss(f, teacher.fpn[1], **o), features)

    constants = [f.requires_grad_() for f in teacher.fpn]
    for adapter in (False, True):
        features = [f.clone().requires_grad_() for f in student.fpn]
        method = SSIM("fcos", 4, 4, (8, 16, 32), adapter=adapter).double()
        method(SimpleNamespace(fpn=features), teacher, [])["loss_ssim_fpn"].backward()
        assert all(f.grad.abs().max() > 0 for f in features)
        assert all(t.grad is None for t in constants)
        assert len(list(method.parameters())) == (6 if adapter else 0)
        assert all(p.grad is not None for p in method.parameters())


def test_edge_cases(fake_output, targets):
    method = SSIM("faster_rcnn", 4, 6, (8, 16, 32)).double()  # channels may differ, then there is an adapter
    loss = method(fake_output(1, N=1), fake_output(2, N=1, C=6), targets[1:])["loss_ssim_fpn"]
    assert torch.isfinite(loss) and loss > 0

    # Constant maps and channels have finite values and slopes, of the size of any other.
    for normalize, ablation, dtype in itertools.product(("image", "channel"), (1, 2), (torch.float32, torch.float64)):
        student, teacher = fake_output(1).fpn[0].to(dtype), fake_output(2).fpn[0].to(dtype)
        student[:, 1] = 0.7
        student[1] = -2.0
        student.requires_grad_()
        loss = ssim_loss(student, teacher, normalize, gamma=ablation)
        loss.backward()
        assert loss.dtype == dtype and torch.isfinite(student.grad).all() and student.grad.abs().max() < 10
    assert stretch(torch.full((1, 2, 3, 3), 5.0)).abs().max() == 0
    single = fake_output(1).fpn[2].requires_grad_()
    alone = ssim_loss(single, fake_output(2).fpn[2], "channel")  # one value per channel says nothing
    alone.backward()
    assert alone == 0 and single.grad.abs().max() == 0

    student, teacher = fake_output(1).fpn[0].float(), fake_output(2).fpn[0].float()
    loss = ssim_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert ssim_loss(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32
    method = SSIM("fcos", 4, 4, (8,), adapter=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ssim_loss(student, teacher) == loss
        assert method.adapters[0](student).dtype == torch.bfloat16
        half = method(SimpleNamespace(fpn=[student]), SimpleNamespace(fpn=[teacher]), targets)["loss_ssim_fpn"]
    assert half.dtype == torch.float32 and torch.isfinite(half)
    channels_last = {"memory_format": torch.channels_last}
    assert_close(ssim_loss(student.contiguous(**channels_last), teacher.contiguous(**channels_last)), loss)


def test_normaliser(fake_output):
    """A mean over images: repeating the batch changes nothing, and images split one by one. A sum over levels."""
    student, teacher = fake_output(1), fake_output(2)
    s, t = student.fpn[0], teacher.fpn[0]
    once = ssim_loss(s, t)
    assert_close(ssim_loss(torch.cat([s, s]), torch.cat([t, t])), once)
    assert_close(sum(ssim_loss(s[n : n + 1], t[n : n + 1]) for n in range(2)) / 2, once)
    for detector, weight in (("retinanet", 4.0), ("fcos", 4.0), ("faster_rcnn", 2.0)):
        loss = SSIM(detector, 4, 4, (8, 16, 32))(student, teacher, [])["loss_ssim_fpn"]
        assert_close(loss, weight * sum(ssim_loss(s, t) for s, t in zip(student.fpn, teacher.fpn)))
    options = {"normalize": "channel", "alpha": 0, "beta": 2, "gamma": 1, "window": 3, "sigma": 0.8}
    loss = SSIM("fcos", 4, 4, (8, 16, 32), loss_weight=1.0, **options)(student, teacher, [])["loss_ssim_fpn"]
    assert_close(loss, sum(ssim_loss(s, t, **options) for s, t in zip(student.fpn, teacher.fpn)))


def test_maps(fake_output):
    """The loss is the weighted sum of the maps' means, adapters included."""
    student, teacher = fake_output(1), fake_output(2, C=6)
    method = SSIM("fcos", 4, 6, (8, 16, 32), normalize="channel", beta=2).double()
    levels = method.maps(student, teacher, [])["dissimilarity"]
    assert [level.shape for level in levels] == [level[:, 0].shape for level in teacher.fpn]
    assert all(level.min() >= 0 and level.max() <= 1 for level in levels)
    assert_close(method(student, teacher, [])["loss_ssim_fpn"], 4 * sum(level.mean() for level in levels))


def test_errors(fake_output):
    fpn = fake_output(1).fpn
    with pytest.raises(ValueError, match="must agree"):
        ssim_loss(fpn[0], fpn[1])
    with pytest.raises(ValueError, match="must agree"):
        ssim_map(fpn[0][0], fpn[0][0])
    with pytest.raises(ValueError, match="normalize"):
        ssim_loss(fpn[0], fpn[0], "batch")
    for window in (0, 4):
        with pytest.raises(ValueError, match="odd"):
            ssim_map(fpn[0], fpn[0], window=window)
    for exponents in ((1, 1, 0.5), (-1, 1, 1), (0, 0, 0)):
        with pytest.raises(ValueError, match="gamma"):
            ssim_map(fpn[0], fpn[0], 11, 1.5, *exponents)
