"""DRKD against its equations and arithmetic done by hand. Its authors' code runs only inside their framework."""

import math

import pytest
import torch
from torch.testing import assert_close

from kd.methods.drkd import DRKD, InstanceUnit, PixelUnit, frobenius_distance, largest_first, pool_instances

STRIDES, NODES = (8, 16, 32), (3, 2, 2)


def make_method(student_channels: int = 4, teacher_channels: int = 4, **arguments) -> DRKD:
    return DRKD("fcos", student_channels, teacher_channels, STRIDES, nodes=NODES, **arguments).double()


def norm(x: list[float], y: list[float]) -> float:
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(x, y, strict=True)))


def linear(layer: torch.nn.Module, x: list[float]) -> list[float]:
    """A Linear layer or a 1x1 convolution on one vector."""
    bias = [0.0] * len(layer.weight) if layer.bias is None else layer.bias.tolist()
    return [b + sum(w * v for w, v in zip(row, x)) for row, b in zip(layer.weight.flatten(1).tolist(), bias)]


def softmax(x: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in x)
    return [math.exp(v) / total for v in x]


def slow_pixel_unit(unit: PixelUnit, maps: torch.Tensor) -> list[list[list[float]]]:
    """[N][HW][C] for maps [N, C, H, W], one index at a time."""
    x = maps.flatten(2).mT.tolist()  # [N][HW][C]
    before_norm = []
    for positions in x:
        states = [linear(unit.states, p) for p in positions]
        nodes = [linear(unit.nodes, p) for p in positions]
        S, d = len(states[0]), len(nodes[0])
        v = [[sum(states[p][s] * nodes[p][i] for p in range(len(x[0]))) for i in range(d)] for s in range(S)]
        h = [[a + b for a, b in zip(v[s], linear(unit.mix_nodes, v[s]))] for s in range(S)]
        z = [linear(unit.mix_states, [max(h[s][i], 0.0) for s in range(S)]) for i in range(d)]  # [d][S]
        y = [[sum(z[i][s] * p[i] for i in range(d)) for s in range(S)] for p in nodes]
        before_norm.append([linear(unit.extend, p) for p in y])
    output = [[list(p) for p in positions] for positions in x]
    for c in range(maps.shape[1]):
        values = [p[c] for positions in before_norm for p in positions]
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) + 1e-4)
        for n, positions in enumerate(before_norm):
            for p, value in enumerate(positions):
                output[n][p][c] += unit.norm.weight[c].item() * (value[c] - mean) / deviation + unit.norm.bias[c].item()
    return output


def slow_matrix(unit: InstanceUnit, s: list[list[float]]) -> list[list[float]]:
    theta, phi = [linear(unit.theta, v) for v in s], [linear(unit.phi, v) for v in s]
    logits = [[sum(a * b for a, b in zip(row, column)) for column in phi] for row in theta]
    weights = [softmax(linear(unit.filter, v)[: len(s)]) for v in s]
    return [softmax([f * w for f, w in zip(*rows)]) for rows in zip(logits, weights)]


def slow_relation(unit: InstanceUnit, s: list[list[float]]) -> list[list[float]]:
    g = [linear(unit.g, v) for v in s]
    output = []
    for v, row in zip(s, slow_matrix(unit, s)):
        gathered = [sum(p * g_j[k] for p, g_j in zip(row, g)) for k in range(len(g[0]))]
        output.append([a + b for a, b in zip(v, linear(unit.extend, gathered))])
    return output


def adapt_instances(adapter: torch.nn.Module, s: list[list[float]]) -> list[float]:
    """A 1x1 convolution on each of an instance's nine positions, all values in one list [n * C * 9]."""
    flat = []
    for v in s:
        positions = [linear(adapter, v[p::9]) for p in range(9)]
        flat += [position[c] for c in range(len(positions[0])) for position in positions]
    return flat


def test_matches_equation(fake_output, targets):
    """Slow loops over every index, written from the equations; pooling is checked by hand below."""
    method = make_method(2, 3, pixel_weight=2.0, relation_weight=3.0, instance_weight=5.0)
    for parameter in method.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    student, teacher = fake_output(1, C=2), fake_output(2, C=3)
    targets[1]["boxes"] = torch.tensor([[2.0, 3.0, 20.0, 21.0]], dtype=torch.float64)
    targets[0]["boxes"] = torch.cat([targets[0]["boxes"], torch.tensor([[8.0, 8.0, 12.0, 12.0]])])
    areas = [(b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (target["boxes"] for target in targets)]
    boxes = [target["boxes"][sorted(range(len(a)), key=lambda i: -a[i])] for target, a in zip(targets, areas)]

    pixel = related = instance = 0.0
    for level in range(3):
        s = slow_pixel_unit(method.pixel_student[level], student.fpn[level])
        t = slow_pixel_unit(method.pixel_teacher[level], teacher.fpn[level])
        adapted = [value for positions in s for p in positions for value in linear(method.pixel_adapters[level], p)]
        pixel += norm(adapted, [value for positions in t for p in positions for value in p])
    for level in range(2):
        pooled_s = pool_instances(student.fpn[level], boxes, STRIDES[level])
        pooled_t = pool_instances(teacher.fpn[level], boxes, STRIDES[level])
        for n in range(2):
            s, t = pooled_s[n].flatten(1).tolist(), pooled_t[n].flatten(1).tolist()
            instance += norm(adapt_instances(method.instance_adapters[level], s), sum(t, []))
            unit_s, unit_t = method.instance_student[level], method.instance_teacher[level]
            adapted = adapt_instances(method.relation_adapters[level], slow_relation(unit_s, s))
            related += norm(adapted, sum(slow_relation(unit_t, t), []))

    losses = method(student, teacher, targets)
    assert_close(losses["loss_drkd_pixel"].item(), 2 * pixel)
    assert_close(losses["loss_drkd_relation"].item(), 3 * related)
    assert_close(losses["loss_drkd_instance"].item(), 5 * instance)


def test_zero_at_teacher(fake_output, targets):
    """Equal features, equal units and adapters that copy cost nothing, with gradients of 0 instead of nan."""
    method = make_method()
    method.pixel_teacher.load_state_dict(method.pixel_student.state_dict())
    method.instance_teacher.load_state_dict(method.instance_student.state_dict())
    for name, parameter in method.named_parameters():
        if "adapters" in name:
            torch.nn.init.zeros_(parameter) if parameter.ndim == 1 else torch.nn.init.dirac_(parameter)
    student = fake_output(1)
    student.fpn = [level.requires_grad_() for level in student.fpn]
    losses = method(student, fake_output(1), targets)
    assert all(loss == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all((x.grad == 0).all() for x in (*student.fpn, *method.parameters()))


def test_hand_computed():
    double = {"dtype": torch.float64}
    # Pixel unit, one channel, one node, two states, two positions x = (1, 2). States (1, 2) and (-1, -2), nodes (1, 2),
    # so v = (1 + 4, -1 - 4) = (5, -5). Weight 1 and bias 1 over nodes: h = (5 + 5 + 1, -5 - 5 + 1), relu -> (11, 0).
    # Over states [[1, 0], [1, 1]]: (11, 11); times nodes: both states (11, 22); extended by (1, -1/2): (5.5, 11), with
    # mean 8.25 and deviations -+2.75. Norm weight 2 and bias 0.5: x + 0.5 -+ 2 * 2.75 / sqrt(2.75^2 + 1e-4).
    unit = PixelUnit(1, 1).double()
    for layer, weight, bias in (
        (unit.states, [1.0, -1.0], [0.0, 0.0]),
        (unit.nodes, [1.0], [0.0]),
        (unit.mix_nodes, [1.0], [1.0]),
        (unit.mix_states, [1.0, 0.0, 1.0, 1.0], None),
        (unit.extend, [1.0, -0.5], None),
        (unit.norm, [2.0], [0.5]),
    ):
        layer.weight.data.copy_(torch.tensor(weight, **double).view_as(layer.weight))
        if bias is not None:
            layer.bias.data.copy_(torch.tensor(bias, **double))
    step = 5.5 / math.sqrt(2.75**2 + 1e-4)
    expected = torch.tensor([[[[1.5 - step, 2.5 + step]]]], **double)
    assert_close(unit(torch.tensor([[[[1.0, 2.0]]]], **double)), expected)

    # One object relates to itself alone, P = 1, so the unit gives s + extend(g(s)), whatever theta, phi and filter are.
    relate, s = InstanceUnit(18).double(), torch.randn(1, 2, 3, 3, **double)
    assert_close(relate.matrices([s]), [torch.ones(1, 1, **double)])
    assert_close(relate([s])[0].flatten(1), s.flatten(1) + relate.extend(relate.g(s.flatten(1))))

    # RoIAlign of the map f(x, y) = x at stride 8, without half a pixel of shift: the box from 8 to 32 spans positions 1
    # to 4, its thirds have centres 1.5, 2.5, 3.5. The second image's map is larger by 10, its box goes from 4 to 28.
    ramp = torch.arange(6.0, **double).expand(1, 1, 5, 6)
    boxes = [torch.tensor([[x, 8.0, x + 24, 32.0]]) for x in (8.0, 4.0)]
    first, second = pool_instances(torch.cat([ramp, ramp + 10]), boxes, 8)
    assert_close(first[0, 0, 1], torch.tensor([1.5, 2.5, 3.5], **double))
    assert_close(second[0, 0, 1], torch.tensor([11.0, 12.0, 13.0], **double))

    # Areas 4, 9, 4, 0: ties stay in order.
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 3, 3], [5, 5, 9, 6], [1, 1, 1, 8]])
    assert_close(largest_first(boxes), boxes[[1, 0, 2, 3]])
    # sqrt(3^2 + 4^2), one norm over both images.
    assert frobenius_distance(torch.tensor([[3.0], [0.0]]), torch.tensor([[0.0], [4.0]])) == 5


def test_gradients(fake_output, targets):
    """By finite differences for both levels; every parameter is trained, the units of the teacher too."""
    sizes = ((2, 3), (1, 2))
    method = DRKD("fcos", 2, 2, (16, 32), nodes=(2, 1)).double()
    student, teacher = fake_output(1, C=2, sizes=sizes), fake_output(2, C=2, sizes=sizes)

    def losses(*levels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        student.fpn = levels
        return tuple(method(student, teacher, targets).values())

    assert torch.autograd.gradcheck(losses, [level.requires_grad_() for level in student.fpn])
    unit = InstanceUnit(9).double()
    instances = [torch.randn(n, 1, 3, 3, dtype=torch.float64, requires_grad=True) for n in (3, 0, 2)]
    assert torch.autograd.gradcheck(lambda *images: tuple(unit.matrices(list(images))), instances)

    method = make_method()
    sum(method(fake_output(1), fake_output(2), targets).values()).backward()
    trained = {name.split(".")[0] for name, p in method.named_parameters() if p.grad.abs().max() > 0}
    assert trained == {name for name, _ in method.named_children()}
    for unit in (*method.instance_student, *method.instance_teacher):
        assert all(parameter.grad.abs().max() > 0 for parameter in unit.parameters())


@pytest.mark.parametrize("count", [0, 1, 2, 100])
def test_number_of_objects(fake_output, count):
    """Any number of boxes in a single image, whose last level of 1x1 has one value per channel."""
    method = make_method(4, 6)
    student, teacher = fake_output(1, N=1), fake_output(2, N=1, C=6)
    corners = torch.rand(count, 2, dtype=torch.float64) * 20
    boxes = torch.cat([corners, corners + torch.rand(count, 2, dtype=torch.float64) * 20], dim=1)
    losses = method(student, teacher, [{"boxes": boxes}])
    assert all(torch.isfinite(loss) for loss in losses.values()) and losses["loss_drkd_pixel"] > 0
    for term in ("relation", "instance"):
        assert (losses[f"loss_drkd_{term}"] > 0) == (count > 0)
    assert method.pixel_student[-1].norm.running_mean.abs().max() == 0  # a single value leaves the statistics alone

    sum(losses.values()).backward()  # without boxes too, every parameter has a gradient
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
    if count == 100:  # the 64 largest are related; all are imitated
        fewer = method(student, teacher, [{"boxes": largest_first(boxes)[:64]}])
        assert_close(fewer["loss_drkd_relation"], losses["loss_drkd_relation"])
        assert fewer["loss_drkd_instance"] < losses["loss_drkd_instance"]


def test_autocast_is_off(fake_output, targets):
    """Autocast changes nothing: the long sums of the units stay in float32."""
    method, student, teacher = make_method().float(), fake_output(1), fake_output(2)
    student.fpn, teacher.fpn = [x.float() for x in student.fpn], [x.float() for x in teacher.fpn]
    once = method(student, teacher, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(method(student, teacher, targets), once, rtol=0, atol=0)


def test_normaliser(fake_output, targets):
    """A repeated batch: sqrt(2) times the pixel norm, twice the sums over images; four copies of each box: sqrt(4)."""
    method, student, teacher = make_method(), fake_output(1), fake_output(2)
    once = method(student, teacher, targets)
    student.fpn, teacher.fpn = ([torch.cat([x, x]) for x in output.fpn] for output in (student, teacher))
    twice = method(student, teacher, targets * 2)
    for term, factor in (("pixel", math.sqrt(2)), ("relation", 2), ("instance", 2)):
        assert_close(twice[f"loss_drkd_{term}"], factor * once[f"loss_drkd_{term}"])
    targets[0]["boxes"] = targets[0]["boxes"].repeat(4, 1)
    assert_close(method(student, teacher, targets * 2)["loss_drkd_instance"], 2 * twice["loss_drkd_instance"])


def test_maps(fake_output, targets):
    """How far the teacher's pixel unit moves each position, and the matrices that relate its objects, largest first."""
    method = make_method(4, 6).eval()
    student, teacher = fake_output(1, N=1), fake_output(2, N=1, C=6)
    maps = method.maps(student, teacher, targets[:1])
    for level in range(3):
        moved = method.pixel_teacher[level](teacher.fpn[level]) - teacher.fpn[level]
        assert_close(maps["pixel change"][level], moved.abs().sum(dim=1) / 6)
    assert [matrix.shape for matrix in maps["relation matrix"]] == [(1, 2, 2), (1, 2, 2)]
    for matrix in maps["relation matrix"]:
        assert_close(matrix.sum(dim=2), torch.ones(1, 2, dtype=torch.float64))
    turned = [{key: values.flip(0) for key, values in targets[0].items()}]
    assert_close(method.maps(student, teacher, turned)["relation matrix"], maps["relation matrix"])


def test_default_weights():
    """Of the reference code, in the order of the equations, and the number of nodes of each level."""
    for detector, weights in (("fcos", [4e-3, 5e-3, 6e-3]), ("faster_rcnn", [1e-3, 4e-3, 2.4e-3])):
        with torch.device("meta"):
            method = DRKD(detector, 8, 8, (8, 16, 32, 64, 128))
        assert method.weights == weights
        assert [unit.nodes.out_channels for unit in method.pixel_teacher] == [64, 64, 256, 256, 256]


def test_errors(fake_output, targets):
    method, output = make_method(), fake_output(1)
    with pytest.raises(ValueError, match="must agree"):
        frobenius_distance(output.fpn[0], output.fpn[1])
    with pytest.raises(ValueError, match="must agree"):
        method(output, fake_output(2, N=1), targets)
    with pytest.raises(ValueError, match="1 sets of boxes for 2 images"):
        method(output, output, targets[:1])
    with pytest.raises(ValueError, match="3 levels"):
        DRKD("fcos", 4, 4, STRIDES, nodes=(2, 2))
