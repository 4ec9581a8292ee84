"""SSIM against its equations in slow loops, a plain 2-D convolution, its invariances and arithmetic done by hand."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from kd.methods.ssim import SSIM, gaussian_mean, min_max_normalize, ssim_loss, ssim_map

C1, C2, C3 = 0.0001, 0.0009, 0.00045

# The window of the definition, width 11 and sigma 1.5, rounded to five decimals.
TAPS = [0.00103, 0.00760, 0.03600, 0.10936, 0.21301, 0.26601, 0.21301, 0.10936, 0.03600, 0.00760, 0.00103]


@pytest.mark.parametrize("normalize", ["image", "channel"])
@pytest.mark.parametrize("size, window", [((7, 6), 11), ((4, 6), 7), ((5, 2), 3), ((1, 5), 1), ((1, 1), 1)])
def test_matches_equation(size, window, normalize):
    """Slow loops over every index; `window` is what remains of 11 on a level of this size."""
    N, C, (H, W) = 2, 2, size
    student, teacher = torch.randn(2, N, C, H, W, dtype=torch.float64)

    def normalized(x):
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
    s, t = normalized(student), normalized(teacher)
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


def test_matches_full_window():
    """Luminance, contrast and structure from a full 11x11 window whose taps are good to 1e-5."""
    student, noise = torch.rand(2, 2, 3, 9, 8, dtype=torch.float64)
    teacher = (student + noise) / 2
    taps = torch.tensor(TAPS, dtype=torch.float64) / sum(TAPS)
    kernel = torch.outer(taps, taps)[None, None]

    def mean(x):
        x = torch.nn.functional.pad(x, (5, 5, 5, 5), mode="reflect")
        return torch.nn.functional.conv2d(x.flatten(0, 1)[:, None], kernel).view(student.shape)

    mu_s, mu_t = mean(student), mean(teacher)
    var_s, var_t = mean(student**2) - mu_s**2, mean(teacher**2) - mu_t**2
    cov, stds = mean(student * teacher) - mu_s * mu_t, (var_s * var_t).sqrt()
    luminance = (2 * mu_s * mu_t + C1) / (mu_s**2 + mu_t**2 + C1)
    contrast, structure = (2 * stds + C2) / (var_s + var_t + C2), (cov + C3) / (stds + C3)
    assert_close(ssim_map(student, teacher), luminance * contrast * structure, rtol=0, atol=2e-4)


def test_window():
    """An impulse becomes the outer product of the taps; fewer taps keep their shape and sum to 1."""
    impulse = torch.zeros(1, 1, 13, 13, dtype=torch.float64)
    impulse[..., 6, 6] = 1
    taps = torch.tensor(TAPS, dtype=torch.float64)
    assert_close(gaussian_mean(impulse, 11, 1.5)[0, 0, 1:-1, 1:-1], torch.outer(taps, taps), rtol=0, atol=1e-5)
    taps = taps[3:8] / taps[3:8].sum()
    assert_close(gaussian_mean(impulse, 5, 1.5)[0, 0, 4:-4, 4:-4], torch.outer(taps, taps), rtol=0, atol=1e-5)
    assert_close(gaussian_mean(torch.ones(1, 2, 5, 7), 11, 1.5), torch.ones(1, 2, 5, 7))


def test_hand_computed():
    """A 1x1 level leaves luminance; a 2x2 level has a window of three taps a, b, a.

    1x1, three channels 0, 1, 2 and 0, 4, 4, normalised to 0, 1/2, 1 and 0, 1, 1. Variances are 0, so ssim is luminance:
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


def test_zero_at_teacher(fake_output):
    """Equal maps cost nothing, nor do other scales and offsets of what is normalised together."""
    for features in fake_output(2).fpn:
        for normalize in ("image", "channel"):
            assert_close(ssim_loss(features, features, normalize).item(), 0.0)
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
    options = {"normalize": "channel", "window": 3, "sigma": 0.8}
    loss = SSIM("fcos", 4, 4, (8, 16, 32), loss_weight=1.0, **options)(student, teacher, [])["loss_ssim_fpn"]
    assert_close(loss, sum(ssim_loss(s, t, **options) for s, t in zip(student.fpn, teacher.fpn)))


def test_precision(fake_output):
    """Autocast does not change the loss of float32 maps, nor does the memory format."""
    student, teacher = fake_output(1).fpn[0].float(), fake_output(2).fpn[0].float()
    loss = ssim_loss(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ssim_loss(student, teacher) == loss
    channels_last = {"memory_format": torch.channels_last}
    assert_close(ssim_loss(student.contiguous(**channels_last), teacher.contiguous(**channels_last)), loss)


def test_constant_features():
    """They become 0; a single value per channel compares nothing."""
    assert min_max_normalize(torch.full((1, 2, 3, 3), 5.0)).abs().max() == 0
    single = torch.randn(2, 4, 1, 1, requires_grad=True)
    alone = ssim_loss(single, torch.randn(2, 4, 1, 1), "channel")
    alone.backward()
    assert alone == 0 and single.grad.abs().max() == 0


def test_maps(fake_output):
    """The loss is the weighted sum of the maps' means, adapters included."""
    student, teacher = fake_output(1), fake_output(2, C=6)
    method = SSIM("fcos", 4, 6, (8, 16, 32), normalize="channel").double()
    levels = method.maps(student, teacher, [])["dissimilarity"]
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
