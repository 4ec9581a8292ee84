"""The explicit forward follows torchvision's to the last bit, and computes no more than it is asked for."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils._pytree import tree_map
from torchvision.ops import box_iou

from kd.detectors import DETECTORS, STRIDES, build_detector
from kd.features import forward_detector

IMAGES = (50, 70), (64, 48)


@pytest.fixture
def batch():
    """Two images of different, non-square sizes; the second has no boxes."""
    images = [torch.rand(3, *size) for size in IMAGES]
    targets = [
        {"boxes": torch.tensor([[5.0, 5.0, 30.0, 35.0], [10.0, 15.0, 50.0, 45.0]]), "labels": torch.tensor([1, 2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)},
    ]
    return images, targets


@pytest.mark.parametrize("detector", DETECTORS)
def test_losses_equal_torchvision(batch, detector):
    images, targets = batch
    model = build_detector(detector, "test_resnet", 4, image_size=(48, 64))
    torch.manual_seed(1)  # the samplers of Faster R-CNN draw
    expected = model(images, targets)
    torch.manual_seed(1)
    _, losses = forward_detector(model, *model.transform(images, targets))
    assert list(losses) == list(expected)
    for name, loss in expected.items():
        assert torch.equal(losses[name], loss), name
        assert torch.isfinite(loss)


@pytest.mark.parametrize("detector", DETECTORS)
def test_autocast_ends_with_the_head(batch, detector, monkeypatch):
    """Under autocast the losses are torchvision's for a head that returns float32; the towers compute in bfloat16."""
    images, targets = batch
    model = build_detector(detector, "test_resnet", 4, image_size=(48, 64))
    head = model.rpn.head if detector == "faster_rcnn" else model.head
    forward = head.forward
    monkeypatch.setattr(head, "forward", lambda features: tree_map(torch.Tensor.float, forward(features)))
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        expected = model(images, targets)
        torch.manual_seed(1)
        output, losses = forward_detector(model, *model.transform(images, targets), needs=("cls_tower",))
    for name, loss in expected.items():
        assert torch.equal(losses[name], loss), name
    assert output.cls_tower[0][0].dtype == torch.bfloat16
    for levels in (output.fpn, output.cls_logits, output.bbox_regression, output.anchors, output.boxes):
        assert all(level.dtype == torch.float32 for level in levels)


@pytest.mark.parametrize("detector", DETECTORS)
def test_thin_boxes_under_autocast(detector):
    """A box of 0.2 pixels at pixel 600, where bfloat16 has steps of 4, has a regression target."""
    model = build_detector(detector, "test_resnet", 4, image_size=(640, 640))
    target = {"boxes": torch.tensor([[600.3, 600.3, 600.5, 630.0]]), "labels": torch.tensor([1])}
    with torch.autocast("cpu", torch.bfloat16):
        _, losses = forward_detector(model, *model.transform([torch.rand(3, 640, 640)], [target]))
    assert all(torch.isfinite(loss) for loss in losses.values()), losses


@pytest.mark.parametrize("detector", DETECTORS)
def test_boxes_equal_torchvision_decoding(batch, detector, monkeypatch):
    """Our boxes of a whole level are those that torchvision decodes, before it clips and selects."""
    model = build_detector(detector, "test_resnet", 4, image_size=(48, 64)).eval()
    images, _ = model.transform(batch[0])
    with torch.no_grad():
        output, _ = forward_detector(model, images, needs=("boxes",))
        if detector == "faster_rcnn":
            seen = {}
            keep = type(model.rpn).filter_proposals

            def spy(rpn, proposals, *args):
                seen["proposals"] = proposals
                return keep(rpn, proposals, *args)

            monkeypatch.setattr(type(model.rpn), "filter_proposals", spy)
            model.rpn(images, model.backbone(images.tensors))
            expected = seen["proposals"]
        else:
            features = list(model.backbone(images.tensors).values())
            deltas = model.head(features)["bbox_regression"]
            anchors = torch.stack(model.anchor_generator(images, features))
            decode = model.box_coder.decode if detector in ("fcos", "gfl") else model.box_coder.decode_single
            expected = decode(deltas.reshape(-1, 4), anchors.reshape(-1, 4)).reshape(len(deltas), -1, 4)
    ours = torch.cat([level.permute(0, 3, 4, 1, 2).flatten(1, 3) for level in output.boxes], dim=1)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("detector", DETECTORS)
def test_strides_and_shapes(detector):
    """On an input that every stride divides, strides times map sizes are the input, and anchors lie on the grid."""
    model = build_detector(detector, "test_resnet", 4, image_size=(256, 384)).eval()
    images, _ = model.transform([torch.rand(3, 256, 384)])
    with torch.no_grad():
        output, _ = forward_detector(model, images, needs=("boxes", "cls_logits"))
    assert model.backbone.strides == STRIDES[detector]
    for level, stride in enumerate(model.backbone.strides):
        N, C, H, W = output.fpn[level].shape
        assert (N, C, H * stride, W * stride) == (1, 256, 256, 384)
        A, K = output.cls_logits[level].shape[1:3]
        expected = {"fcos": (1, 4), "gfl": (1, 4), "retinanet": (9, 4), "faster_rcnn": (3, 1)}
        assert output.cls_logits[level].shape[1:3] == expected[detector]
        assert output.boxes[level].shape == (1, A, 4, H, W)
        centre = (output.anchors[level][:, :2] + output.anchors[level][:, 2:]) / 2
        assert_close(centre[:, 0], (torch.arange(W) * float(stride)).expand(A, H, W))
        assert_close(centre[:, 1], (torch.arange(H) * float(stride))[:, None].expand(A, H, W))


@pytest.mark.parametrize("detector", DETECTORS)
def test_only_what_is_needed_is_computed(batch, detector):
    model = build_detector(detector, "test_resnet", 4, image_size=(48, 64)).eval()
    images, _ = model.transform(batch[0])
    ran = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))

    def modules_run(*needs: str) -> str:
        ran.clear()
        with torch.no_grad():
            forward_detector(model, images, needs=needs)
        return " ".join(ran)

    assert "head" not in modules_run("fpn") and "rpn" not in modules_run("fpn")
    if detector != "faster_rcnn":
        assert "regression_head" not in modules_run("fpn", "cls_logits")
        assert "classification_head" not in modules_run("reg_tower")
        assert "bbox_ctrness" not in modules_run("boxes", "cls_logits")
    assert "roi_heads" not in modules_run("boxes", "cls_logits")


@pytest.mark.parametrize("detector", DETECTORS)
@torch.no_grad()
def test_towers_are_kept_if_needed(batch, detector):
    """They are computed on the way to logits and boxes, and kept only if a method asks for them; so in training."""
    model = build_detector(detector, "test_resnet", 4, image_size=(48, 64)).eval()
    images, targets = model.transform(*batch)
    output, _ = forward_detector(model, images, needs=("cls_logits", "boxes"))
    assert output.cls_tower is None and output.reg_tower is None and output.cls_logits and output.boxes
    output, _ = forward_detector(model, images, needs=("cls_tower", "boxes"))
    assert output.cls_tower and output.reg_tower is None
    output, losses = forward_detector(model.train(), images, targets, needs=("reg_tower",))
    assert losses and output.cls_tower is None and output.reg_tower


def test_towers_are_the_blocks_of_the_head(batch):
    """The last block, passed to the last convolution, gives the logits; dense heads have four blocks, the RPN one."""
    for detector, blocks in (("fcos", 4), ("retinanet", 4), ("faster_rcnn", 1)):
        model = build_detector(detector, "test_resnet", 4, image_size=(48, 64)).eval()
        images, _ = model.transform(batch[0])
        with torch.no_grad():
            output, _ = forward_detector(model, images, needs=("cls_tower", "reg_tower"))
            head = model.rpn.head if detector == "faster_rcnn" else model.head.classification_head
            for tower, logits in zip(output.cls_tower, output.cls_logits):
                assert len(tower) == blocks and all((block >= 0).all() for block in tower)
                assert torch.equal(head.cls_logits(tower[-1]), logits.flatten(1, 2))
        assert all(len(tower) == blocks for tower in output.reg_tower)


@pytest.mark.parametrize("detector", DETECTORS)
def test_positives(batch, detector):
    """Those of the detector's own assignment, which overlap a box; without targets nothing is assigned."""
    model = build_detector(detector, "test_resnet", 4, image_size=(48, 64))
    images, targets = model.transform(*batch)
    output, _ = forward_detector(model, images, targets)
    assert [level.shape for level in output.positive] == [level[:, :, 0].shape for level in output.cls_logits]
    found = 0
    for positive, anchors in zip(output.positive, output.anchors):
        assert positive.dtype == torch.bool and not positive[1].any()  # the second image has no boxes
        chosen = anchors.movedim(1, -1)[positive[0]]
        assert (box_iou(chosen, targets[0]["boxes"]).amax(dim=1) > 0).all()
        found += len(chosen)
    assert found >= 2
    assert forward_detector(model.eval(), images, needs=("positive",))[0].positive is None
