"""Checkpoints of mmdetection: what our detector computes from one, against the same layers written out by hand.

The conversion was also compared with mmdetection 3.3 itself: the same maps, boxes and detections up to rounding.
"""

import math
import re

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.models import resnet50
from torchvision.models.detection.image_list import ImageList

from kd.detectors import build_detector, check_pair, describe_mmdet, fitting_arguments, inherit, load_mmdet
from kd.detectors.mmdet import AlignedPooler
from kd.features import forward_detector
from kd.run.weights import load_teacher

CLASSES = ("cat", "dog", "cow")
HEADS = {"retinanet": ("retina_cls", "retina_reg"), "fcos": ("conv_cls", "conv_reg"), "gfl": ("gfl_cls", "gfl_reg")}
SIZE = (64, 96)  # P7 is not a multiple of its stride


def random_layer(weights: dict, name: str, out: int, channels: int, kernel: int = 3, bias: float | None = 0.0) -> None:
    """Add a convolution, or with kernel 0 a linear layer, that keeps the scale of its input."""
    shape = (out, channels, kernel, kernel) if kernel else (out, channels)
    weights[f"{name}.weight"] = torch.randn(shape) * math.prod(shape[1:]) ** -0.5
    if bias is not None:
        weights[f"{name}.bias"] = bias + 0.1 * torch.randn(out)


@pytest.fixture(scope="module")
def body():
    """A ResNet-50 by the names that mmdetection shares with torchvision."""
    network = resnet50(weights=None).eval()
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
    return network


def make_checkpoint(detector: str, body: torch.nn.Module) -> dict:
    """A checkpoint of random weights under mmdetection's names."""
    torch.manual_seed(0)
    weights = {f"backbone.{name}": value for name, value in body.state_dict().items() if not name.startswith("fc.")}
    widths = (256, 512, 1024, 2048)[0 if detector == "faster_rcnn" else 1 :]
    for level, width in enumerate(widths):
        random_layer(weights, f"neck.lateral_convs.{level}.conv", 256, width, 1)
        random_layer(weights, f"neck.fpn_convs.{level}.conv", 256, 256)
    if detector == "faster_rcnn":
        random_layer(weights, "rpn_head.rpn_conv", 256, 256)
        random_layer(weights, "rpn_head.rpn_cls", 3, 256, 1)
        random_layer(weights, "rpn_head.rpn_reg", 12, 256, 1)
        random_layer(weights, "roi_head.bbox_head.shared_fcs.0", 1024, 256 * 49, 0)
        random_layer(weights, "roi_head.bbox_head.shared_fcs.1", 1024, 1024, 0)
        random_layer(weights, "roi_head.bbox_head.fc_cls", 4, 1024, 0)
        random_layer(weights, "roi_head.bbox_head.fc_reg", 12, 1024, 0)
        return {"meta": {"CLASSES": CLASSES}, "state_dict": weights}
    random_layer(weights, "neck.fpn_convs.3.conv", 256, 2048 if detector == "retinanet" else 256)
    random_layer(weights, "neck.fpn_convs.4.conv", 256, 256)
    bias = 0.0 if detector == "retinanet" else None
    for tower in ("cls_convs", "reg_convs"):
        for block in range(4):
            random_layer(weights, f"bbox_head.{tower}.{block}.conv", 256, 256, bias=bias)
            if detector != "retinanet":
                weights[f"bbox_head.{tower}.{block}.gn.weight"] = 0.5 + torch.rand(256)
                weights[f"bbox_head.{tower}.{block}.gn.bias"] = 0.1 * torch.randn(256)
    anchors = 9 if detector == "retinanet" else 1
    logits, deltas = HEADS[detector]
    random_layer(weights, f"bbox_head.{logits}", 3 * anchors, 256)
    random_layer(weights, f"bbox_head.{deltas}", 4 * (17 if detector == "gfl" else anchors), 256)
    if detector != "retinanet":
        weights |= {f"bbox_head.scales.{level}.scale": 0.5 + torch.rand(()) for level in range(5)}
    if detector == "fcos":
        random_layer(weights, "bbox_head.conv_centerness", 1, 256)
    if detector == "gfl":
        weights["bbox_head.integral.project"] = torch.arange(17.0)
    return {"meta": {"CLASSES": CLASSES}, "state_dict": weights}


def by_hand(detector: str, weights: dict[str, Tensor], maps: list[Tensor]) -> tuple[list, list, list]:
    """mmdetection's FPN levels, logits and boxes [HWA, 4], from the maps of the body."""

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = weights[f"{name}.weight"]
        return F.conv2d(x, weight, weights.get(f"{name}.bias"), stride, padding=weight.shape[-1] // 2)

    last = len(maps) - 1
    laterals = [conv(f"neck.lateral_convs.{level}.conv", x) for level, x in enumerate(maps)]
    for level in reversed(range(last)):
        laterals[level] = laterals[level] + F.interpolate(laterals[level + 1], size=laterals[level].shape[-2:])
    fpn = [conv(f"neck.fpn_convs.{level}.conv", x) for level, x in enumerate(laterals)]
    if detector == "faster_rcnn":
        fpn.append(fpn[-1][:, :, ::2, ::2])
        towers = [(conv("rpn_head.rpn_conv", x).relu(),) * 2 for x in fpn]
        logits, deltas = "rpn_head.rpn_cls", "rpn_head.rpn_reg"
    else:
        fpn.append(conv("neck.fpn_convs.3.conv", maps[-1] if detector == "retinanet" else fpn[-1], stride=2))
        before = fpn[-1].relu() if detector == "fcos" else fpn[-1]
        fpn.append(conv("neck.fpn_convs.4.conv", before, stride=2))
        towers = []
        for x in fpn:
            outputs = []
            for tower in ("cls_convs", "reg_convs"):
                y = x
                for block in range(4):
                    name = f"bbox_head.{tower}.{block}"
                    y = conv(f"{name}.conv", y)
                    if detector != "retinanet":
                        y = F.group_norm(y, 32, weights[f"{name}.gn.weight"], weights[f"{name}.gn.bias"])
                    y = y.relu()
                outputs.append(y)
            towers.append(outputs)
        logits, deltas = (f"bbox_head.{name}" for name in HEADS[detector])
    boxes = []
    for level, (_, tower) in enumerate(towers):
        output = conv(deltas, tower)[0]  # [4A, H, W]
        stride = 2 ** (level + (2 if detector == "faster_rcnn" else 3))
        if detector == "fcos":
            output = (weights[f"bbox_head.scales.{level}.scale"] * output).exp()
        if detector == "gfl":  # the means of distributions over 0..16 strides
            edges = (weights[f"bbox_head.scales.{level}.scale"] * output).unflatten(0, (4, 17)).softmax(dim=1)
            output = stride * sum(bin * edges[:, bin] for bin in range(17))
        boxes.append(decode(detector, output, stride))
    return fpn, [conv(logits, tower) for tower, _ in towers], boxes


def decode(detector: str, output: Tensor, stride: int) -> Tensor:
    """Boxes [HWA, 4] of one level from what its regression layer gives, [4A, H, W], in slow loops."""
    boxes = []
    for row in range(output.shape[1]):
        for column in range(output.shape[2]):
            values = output[:, row, column].view(-1, 4).tolist()
            if detector in ("fcos", "gfl"):
                offset = 0.5 if detector == "fcos" else 0
                x, y = (column + offset) * stride, (row + offset) * stride
                boxes += [[x - left, y - top, x + right, y + bottom] for left, top, right, bottom in values]
                continue
            scales = [4 * 2 ** (third / 3) for third in range(3)] if detector == "retinanet" else [8]
            shapes = [(s * stride / r**0.5, s * stride * r**0.5) for r in (0.5, 1.0, 2.0) for s in scales]
            for (width, height), (dx, dy, dw, dh) in zip(shapes, values):
                x, y = column * stride + dx * width, row * stride + dy * height
                w, h = (side * math.exp(min(d, math.log(1000 / 16))) / 2 for side, d in ((width, dw), (height, dh)))
                boxes.append([x - w, y - h, x + w, y + h])
    return torch.tensor(boxes)


@pytest.mark.parametrize("detector", ["retinanet", "fcos", "gfl", "faster_rcnn"])
@torch.no_grad()
def test_matches_the_layers_by_hand(detector, body):
    """Levels, logits and boxes; a student fits, and inherits what means the same in torchvision."""
    content = make_checkpoint(detector, body)
    assert describe_mmdet(content) == (detector, "resnet50")
    teacher, names = load_mmdet(content, SIZE)
    assert names == {1: "cat", 2: "dog", 3: "cow"}
    images = ImageList(torch.randn(1, 3, *SIZE), [SIZE])
    output, _ = forward_detector(teacher, images, needs=("fpn", "cls_logits", "boxes"))
    fpn, logits, boxes = by_hand(detector, content["state_dict"], teacher.backbone.body_maps(images.tensors))
    for level in range(5):
        assert_close(output.fpn[level], fpn[level], rtol=1e-4, atol=1e-4)
        known = output.cls_logits[level] if detector == "faster_rcnn" else output.cls_logits[level][:, :, 1:]
        assert_close(known.flatten(1, 2), logits[level], rtol=1e-4, atol=1e-4)
        found = output.boxes[level][0].permute(2, 3, 0, 1).reshape(-1, 4)
        assert_close(found, boxes[level], rtol=1e-3, atol=1e-2)
    if detector == "faster_rcnn":  # mmdetection's background is the last class, and has no box
        head, regions = "roi_head.bbox_head.fc", torch.randn(5, 1024)
        scores, deltas = teacher.roi_heads.box_predictor(regions)
        theirs = [
            F.linear(regions, *(content["state_dict"][f"{head}_{name}.{kind}"] for kind in ("weight", "bias")))
            for name in ("cls", "reg")
        ]
        assert_close(scores[:, [1, 2, 3, 0]], theirs[0])
        assert_close(deltas[:, 4:], theirs[1])
    else:
        assert all((level[:, :, 0] == -100).all() for level in output.cls_logits)

    student = build_detector(detector, "test_resnet", 4, image_size=SIZE, **fitting_arguments(teacher, detector))
    check_pair(student, teacher, ("fpn", "cls_tower", "cls_logits", "boxes"))
    left = {name.removesuffix(".weight").removesuffix(".bias") for name in inherit(student, teacher)}
    expected = {f"backbone.fpn.inner_blocks.{level}.0" for level in range(4 if detector == "faster_rcnn" else 3)}
    if detector in ("retinanet", "gfl"):  # no ReLU before P7
        expected |= {"backbone.fpn.extra_blocks.p7"}
    if detector == "retinanet":  # from another map
        expected |= {"backbone.fpn.extra_blocks.p6"}
    if detector == "fcos":
        expected |= {"head.regression_head.bbox_reg", "head.regression_head.bbox_ctrness"}
    assert left == expected


@torch.no_grad()
def test_fcos_detects_with_the_centre_ness_of_the_class_tower(body):
    """The best score is the root of class times centre-ness at the position of its box."""
    content = make_checkpoint("fcos", body)
    teacher, _ = load_mmdet(content, SIZE)
    image = torch.rand(3, *SIZE)
    images = teacher.transform([image])[0]
    _, logits, boxes = by_hand("fcos", content["state_dict"], teacher.backbone.body_maps(images.tensors))
    output, _ = forward_detector(teacher, images, needs=("cls_tower",))
    weight, bias = (content["state_dict"][f"bbox_head.conv_centerness.{kind}"] for kind in ("weight", "bias"))
    scores = []
    for tower, level in zip(output.cls_tower, logits):
        centerness = F.conv2d(tower[-1], weight, bias, padding=1)
        scores.append((level.sigmoid() * centerness.sigmoid())[0].flatten(1).mT)
    scores, boxes = torch.cat(scores).sqrt(), torch.cat(boxes)
    (found,) = teacher([image])
    best, label = divmod(scores.flatten().argmax().item(), 3)
    assert_close(found["scores"][0], scores.max(), rtol=1e-4, atol=1e-5)
    assert found["labels"][0] == label + 1
    limits = torch.tensor([SIZE[1], SIZE[0]] * 2)
    assert_close(found["boxes"][0], boxes[best].clamp(min=0).minimum(limits), rtol=1e-3, atol=1e-2)


def test_caffe_weights_see_bgr_with_their_own_strides_and_mean(body):
    """Of a constant image, the first layer's weights for red, green and blue are those of the checkpoint, reversed."""
    content = make_checkpoint("fcos", body)
    teacher, _ = load_mmdet(content, SIZE)
    assert teacher.transform.image_mean == pytest.approx([122.7717 / 255, 115.9465 / 255, 102.9801 / 255])
    assert teacher.transform.image_std == [1 / 255] * 3
    first = teacher.backbone.body.conv1
    image = torch.tensor([10.0, 20.0, 30.0]).view(1, 3, 1, 1).expand(1, 3, 9, 9)  # red, green, blue
    theirs = F.conv2d(image.flip(1), content["state_dict"]["backbone.conv1.weight"], stride=2, padding=3)
    assert_close(first(image), theirs)
    blocks = [teacher.backbone.body[f"layer{stage}"][0] for stage in (2, 3, 4)]
    strides = [(block.conv1.stride, block.conv2.stride) for block in blocks]
    assert strides == [((2, 2), (1, 1))] * 3


def test_regions_are_pooled_aligned():
    """On a level that holds the x coordinate of its pixels' centres, each cell of a region pools its own centre."""
    x = (torch.arange(40.0) + 0.5).expand(1, 1, 30, 40)  # in strides
    levels = {str(i): x * 4 * 2**i for i in range(4)}  # in pixels
    boxes = [torch.tensor([[20.0, 16.0, 90.0, 72.0], [40.0, 24.0, 40.0 + 140.0, 24.0 + 140.0]]), torch.empty(0, 4)]
    pooled = AlignedPooler()(levels, boxes, [])
    assert pooled.shape == (2, 1, 7, 7)
    for region, (left, _, right, _) in zip(pooled, boxes[0].tolist()):
        centres = left + (torch.arange(7) + 0.5) * (right - left) / 7
        assert_close(region[0], centres.expand(7, 7), rtol=0, atol=1e-3)


def test_refusals_name_the_reason(body):
    """Other families, other settings and other parts; files of other kinds are none of mmdetection's."""
    assert describe_mmdet({"model": {}}) is None and describe_mmdet({"state_dict": {"conv.weight": 0}}) is None
    content = make_checkpoint("retinanet", body)
    weights = content["state_dict"]
    atss = {re.sub("retina_", "atss_", name): value for name, value in weights.items()}
    with pytest.raises(
        ValueError,
        match="not one of mmdetection's retinanet, fcos, gfl, faster_rcnn on resnet50, resnet101, resnext101",
    ):
        describe_mmdet({"state_dict": atss})
    config = "style='pytorch'\n_base_\nstyle='caffe'"
    with pytest.raises(ValueError, match="a retinanet of mmdetection with settings .* give one of pytorch style"):
        load_mmdet({"state_dict": weights, "meta": {"config": config}}, SIZE)
    with pytest.raises(ValueError, match="(?s)retinanet of mmdetection with other parts than its zoo's: .*conv_offset"):
        deformable = {**weights, "backbone.layer3.0.conv2.conv_offset.weight": torch.zeros(1)}
        load_mmdet({**content, "state_dict": deformable}, SIZE)
    with pytest.raises(ValueError, match="(?s)other parts than its zoo's: .*cls_logits.weight"):
        load_mmdet({"state_dict": weights}, SIZE)  # without names, the classes are COCO's


def test_a_file_is_recognised(body, tmp_path):
    """By its names, as a checkpoint or a state_dict; the detector is cut to the classes of the data."""
    content = make_checkpoint("retinanet", body)
    torch.save(content, tmp_path / "checkpoint.pth")
    data = ({1: {"name": "cow"}, 2: {"name": "hen"}}, SIZE)
    teacher = load_teacher(tmp_path / "checkpoint.pth", "retinanet", "r50", *data, "l2")  # reads features alone
    features = torch.randn(1, 256, 2, 3)
    weight, bias = (content["state_dict"][f"bbox_head.retina_cls.{kind}"] for kind in ("weight", "bias"))
    logits = teacher.head.classification_head.cls_logits(features).unflatten(1, (9, 3))
    assert_close(logits[:, :, 1], F.conv2d(features, weight, bias, padding=1).unflatten(1, (9, 3))[:, :, 2])
    assert (logits[:, :, [0, 2]] == -100).all()

    with pytest.raises(ValueError, match="does not know the classes hen, whose predictions frs reads"):
        load_teacher(tmp_path / "checkpoint.pth", "retinanet", "r50", *data, "frs")
    with pytest.raises(ValueError, match="pth cannot be used: it contains a retinanet, but --detector is fcos"):
        load_teacher(tmp_path / "checkpoint.pth", "fcos", "r50", *data)
    with pytest.raises(ValueError, match="checkpoint.pth contains a resnet50, but --teacher is r101"):
        load_teacher(tmp_path / "checkpoint.pth", "retinanet", "r101", *data)
    torch.save(content["state_dict"], tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="(?s)weights.pth cannot be used: .*cls_logits.weight"):  # COCO has 80 classes
        load_teacher(tmp_path / "weights.pth", "retinanet", "r50", *data)
