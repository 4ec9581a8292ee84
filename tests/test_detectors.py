"""Detectors are torchvision's own classes on any timm backbone, and their files travel."""

import copy
from functools import partial

import pytest
import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import nn
from torch.testing import assert_close
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet, fcos_resnet50_fpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

from kd.detectors import DETECTORS, build_detector, check_pair, inherit, timm_name
from kd.detectors.classes import match_classes
from kd.run.checkpoint import load_model, save, save_model
from kd.run.weights import load_torchvision

BACKBONES = (
    "mobilenetv3_small_100",
    "efficientnet_lite0",
    "convnext_atto",
    "swin_tiny_patch4_window7_224",
    "hrnet_w18_small",  # whose map at stride 4 is not used
    "test_resnet",
)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_backbones_run_forward_and_backward(backbone):
    model = build_detector("fcos", backbone, 3, image_size=(96, 160))
    target = {"boxes": torch.tensor([[20.0, 30.0, 120.0, 90.0]]), "labels": torch.tensor([1])}
    losses = model([torch.rand(3, 96, 160)], [target])
    sum(losses.values()).backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert len(frozen) == (21 if backbone == "hrnet_w18_small" else 0)
    assert model.transform.image_mean == list(timm.get_pretrained_cfg(backbone).mean)
    model.eval()
    features = model.backbone(torch.zeros(1, 3, 96, 160))
    assert [tuple(f.shape[2:]) for f in features.values()] == [(12, 20), (6, 10), (3, 5), (2, 3), (1, 2)]


def test_built_without_gradients():
    """Whoever only predicts may build a detector with frozen layers in inference mode."""
    with torch.inference_mode():
        build_detector("fcos", "test_resnet", 3, from_scratch=False)


@pytest.mark.parametrize(
    ("backbone", "frozen"),
    [
        ("resnet18", {"conv1", "layer1"}),
        ("rexnet_100", {"stem", "features_0", "features_1", "features_2"}),
        ("vgg11_bn", {"features_0", "features_4", "features_8", "features_11"}),
        ("xception41", {"stem_0", "stem_1", "blocks_0", "blocks_1"}),
        ("swin_tiny_patch4_window7_224", {"patch_embed", "layers_0"}),
    ],
)
def test_frozen_layers(backbone, frozen):
    """Up to stride 4, whatever timm calls them; no batch norm is left to train."""
    body = build_detector("fcos", backbone, 3, from_scratch=False).backbone.body
    assert {name.split(".")[0] for name, p in body.named_parameters() if not p.requires_grad} == frozen
    assert not any(isinstance(module, nn.BatchNorm2d) for module in body.modules())


def test_refusals_name_the_reason(tmp_path):
    with pytest.raises(ValueError, match="stride"):
        build_detector("fcos", "vit_tiny_patch16_224", 3)
    with pytest.raises(ValueError, match="visformer_tiny (does not take an image of 64x96 pixels|cannot carry)"):
        build_detector("fcos", "visformer_tiny", 3)
    with pytest.raises(ValueError, match="did you mean.*resnet50"):
        build_detector("fcos", "resnett50", 3)
    with pytest.raises(ValueError, match="retinanet"):
        build_detector("retinnet", "r18", 3)
    with pytest.raises(ValueError, match="image size"):
        build_detector("fcos", "r18", 3, image_size=(800, 400))
    with pytest.raises(ValueError, match="num_classes"):
        build_detector("fcos", "r18", 1)
    with pytest.raises(ValueError, match="no such file"):
        build_detector("fcos", "r18", 3, pretrained=str(tmp_path / "absent.pth"))


def test_pretrained_weights_from_a_file(tmp_path):
    """All of the body is loaded, norm and stem are frozen, and a file of another model is refused."""
    source = timm.create_model("test_resnet")
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    model = build_detector("faster_rcnn", "test_resnet", 3, pretrained=str(tmp_path / "weights.pth"))
    for name, value in model.backbone.body.state_dict().items():
        assert_close(value, source.state_dict()[name])
    model.train()
    before = {name: value.clone() for name, value in model.backbone.body.named_buffers()}
    model.backbone(torch.randn(2, 3, 64, 64))
    assert before and all(torch.equal(before[n], b) for n, b in model.backbone.body.named_buffers())
    frozen = {name.split(".")[0] for name, p in model.backbone.body.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "layer1"}

    old = {name: value for name, value in source.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth")  # as torch before 0.4.1 wrote them
    build_detector("fcos", "test_resnet", 3, pretrained=str(tmp_path / "old.pth"))
    wrapped = timm.create_model("twins_pcpvt_small").state_dict()  # timm wraps its features
    torch.save(wrapped, tmp_path / "wrapped.pth")
    body = build_detector("fcos", "twins_pcpvt_small", 3, pretrained=str(tmp_path / "wrapped.pth")).backbone.body
    assert all(torch.equal(value, wrapped[name.removeprefix("model.")]) for name, value in body.state_dict().items())
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not a checkpoint of timm's test_resnet"):
        build_detector("fcos", "test_resnet", 3, pretrained=str(tmp_path / "other.pth"))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match="cannot load the pretrained weights of test_resnet from .*text.pth"):
        build_detector("fcos", "test_resnet", 3, pretrained=str(tmp_path / "text.pth"))


def test_pretrained_without_the_hub_is_a_clear_error(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no connection to the hub")

    monkeypatch.setattr("timm.models._builder.load_pretrained", unreachable)
    with pytest.raises(ValueError, match="--pretrained FILE"):
        build_detector("fcos", "test_resnet", 3, pretrained=True)


class PlainBackbone(nn.Module):
    """What a user of torchvision would write by hand."""

    def __init__(self, out_indices: tuple[int, ...], extra_blocks: nn.Module, frozen: bool):
        super().__init__()
        body = timm.create_model("resnet18", features_only=True, out_indices=out_indices)
        self.body = freeze_batch_norm_2d(body) if frozen else body
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), 256, extra_blocks)
        self.out_channels = 256

    def forward(self, images):
        return self.fpn({str(i): m for i, m in enumerate(self.body(images))})


@pytest.mark.parametrize("from_scratch", [True, False])
@pytest.mark.parametrize("detector", ["fcos", "retinanet", "faster_rcnn"])
def test_state_dict_fits_the_plain_torchvision_class(tmp_path, detector, from_scratch):
    arguments = dict(detector=detector, backbone="r18", num_classes=4, image_size=(64, 96), from_scratch=from_scratch)
    ours = build_detector(**arguments).eval()
    save_model(ours, arguments, {1: {"id": 7, "name": "cat"}}, tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt", weights_only=True)

    sizes = {"min_size": 64, "max_size": 96}
    if detector == "faster_rcnn":
        anchors = AnchorGenerator(tuple((16 * 2**i,) for i in range(5)), ((0.5, 1.0, 2.0),) * 5)
        backbone = PlainBackbone((1, 2, 3, 4), LastLevelMaxPool(), not from_scratch)
        plain = FasterRCNN(backbone, 4, rpn_anchor_generator=anchors, rpn_post_nms_top_n_test=200, **sizes)
    else:
        backbone = PlainBackbone((2, 3, 4), LastLevelP6P7(256, 256), not from_scratch)
        if detector == "fcos":
            plain = FCOS(backbone, 4, score_thresh=0.05, **sizes)
        else:
            scales = tuple(tuple(int(16 * 2 ** (i + j / 3)) for j in range(3)) for i in range(5))
            norm = partial(nn.GroupNorm, 32) if from_scratch else None
            anchors = AnchorGenerator(scales, ((0.5, 1.0, 2.0),) * 5)
            head = RetinaNetHead(256, 9, 4, norm_layer=norm)
            plain = RetinaNet(backbone, 4, anchor_generator=anchors, head=head, detections_per_img=100, **sizes)
    plain.load_state_dict(content["model"], strict=True)

    image = torch.rand(3, 70, 90)
    again, content = load_model(tmp_path / "model.pt")
    with torch.no_grad():
        expected, loaded, by_hand = ours([image]), again([image]), plain.eval()([image])
    for key, value in expected[0].items():
        assert torch.equal(value, loaded[0][key])
        assert torch.equal(value, by_hand[0][key])
    assert content["categories"] == {1: {"id": 7, "name": "cat"}}


def test_torchvision_checkpoint_fits(tmp_path):
    """torchvision's own FCOS with the published checkpoint's frozen norm gives the same detections from our class."""
    theirs = freeze_batch_norm_2d(fcos_resnet50_fpn(weights=None, weights_backbone=None)).eval()
    save(theirs.state_dict(), tmp_path / "fcos.pth")
    ours = load_torchvision(tmp_path / "fcos.pth", "fcos", "r50", 91, (800, 1333))
    ours.score_thresh = theirs.score_thresh = 0.0
    theirs.transform.min_size = ours.transform.min_size = (64,)
    image = [torch.rand(3, 64, 96)]
    with torch.no_grad():
        for key, value in theirs(image)[0].items():
            assert_close(ours(image)[0][key], value)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated", "ignore:.*always returns a .Losses, Detections")
@pytest.mark.parametrize(
    "detector, backbone",
    [*((d, "test_resnet") for d in ("fcos", "retinanet", "faster_rcnn")), ("fcos", "mobilenetv2_100")],
)
def test_scripted(detector, backbone):
    """torch.jit.script compiles each detector, and the detections are equal.

    The image has the size of the network's input: torchvision's resize may differ by a pixel in TorchScript.
    """
    model = build_detector(detector, backbone, 4, image_size=(64, 96)).eval()
    for part in (model, getattr(model, "roi_heads", model)):
        part.score_thresh = 0.0
    image = [torch.rand(3, 64, 80)]
    with torch.no_grad():
        (expected,), (_, (detections,)) = model(image), torch.jit.script(model)(image)
    assert detections.keys() == expected.keys() and len(expected["scores"]) > 9
    for key, value in expected.items():
        assert torch.equal(detections[key], value), key


def test_check_pair():
    """All that a method reads must correspond; FPN features alone need only the same strides."""
    heads, small = ("fpn", "cls_logits"), {"image_size": (64, 96)}
    student, other = (build_detector("fcos", name, 3, **small) for name in ("test_resnet", "mobilenetv3_small_100"))
    check_pair(student, other, heads)
    retinanet = build_detector("retinanet", "test_resnet", 3, **small)
    with pytest.raises(ValueError, match="detector: student FCOS, teacher RetinaNet"):
        check_pair(student, retinanet, heads)
    check_pair(student, retinanet, ("fpn",))
    with pytest.raises(ValueError, match="number of classes.*student 3, teacher 4"):
        check_pair(student, build_detector("fcos", "test_resnet", 4, **small), heads)
    with pytest.raises(ValueError, match="anchor sizes"):
        check_pair(retinanet, build_detector("retinanet", "test_resnet", 3, image_size=(800, 1333)), heads)
    square = build_detector("retinanet", "test_resnet", 3, **small)
    square.anchor_generator.aspect_ratios = ((1.0,),) * 5
    with pytest.raises(ValueError, match="anchor aspect ratios"):
        check_pair(retinanet, square, heads)
    with pytest.raises(ValueError, match=r"strides: student \(8, 16, 32, 64, 128\), teacher \(4, 8, 16, 32, 64\)"):
        check_pair(student, build_detector("faster_rcnn", "test_resnet", 3, **small), ("fpn",))


@pytest.mark.parametrize("detector", DETECTORS)
def test_inherit(detector):
    """FPN and heads become the teacher's, the body stays; lateral convolutions of other channels are left and named."""
    student, teacher = (build_detector(detector, "test_resnet", 3, image_size=(64, 96)) for _ in range(2))
    before = copy.deepcopy(student.state_dict())
    assert inherit(student, teacher) == []
    for name, value in student.state_dict().items():
        expected = before if name.startswith("backbone.body.") else teacher.state_dict()
        assert torch.equal(value, expected[name]), name

    other = build_detector(detector, "mobilenetv3_small_100", 3, image_size=(64, 96))
    before, levels = copy.deepcopy(other.state_dict()), 4 if detector == "faster_rcnn" else 3
    left = inherit(other, teacher)
    assert left == [f"backbone.fpn.inner_blocks.{level}.0.weight" for level in range(levels)]
    for name, value in other.state_dict().items():
        expected = before if name in left or name.startswith("backbone.body.") else teacher.state_dict()
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("detector", DETECTORS)
def test_inherit_from_a_teacher_without_a_class(detector):
    """The scores of that class stay the student's, as a logit of -100 would never be learnt away; all else is taken."""
    student, teacher = (build_detector(detector, "test_resnet", 4, image_size=(64, 96)) for _ in range(2))
    assert match_classes(teacher, {1: "cat", 2: "dog", 3: "cow"}, {1: "cow", 2: "horse", 3: "cat"}) == ["horse"]
    before = copy.deepcopy(student.state_dict())
    (left,) = inherit(student, teacher)
    layer, _, words = left.partition(" ")
    assert words == "for classes that the teacher does not know"
    after, theirs = student.state_dict(), teacher.state_dict()
    for name in (f"{layer}.weight", f"{layer}.bias"):
        ours, taken, expected = (state[name].unflatten(0, (-1, 4)) for state in (before, after, theirs))
        assert torch.equal(taken[:, 2], ours[:, 2]) and torch.equal(taken[:, [0, 1, 3]], expected[:, [0, 1, 3]]), name
    assert after[f"{layer}.bias"].min() > -10
    assert all(torch.equal(after[name], theirs[name]) for name in after if name.startswith("backbone.fpn."))


def test_short_names_are_the_papers_weights():
    """Pretrained, r50 means torchvision's V1 weights; the architecture is timm's resnet50 all the same."""
    assert timm_name("r50") == "resnet50.tv_in1k" and timm_name("resnet50") == "resnet50"
    for depth in (18, 34, 50, 101, 152):
        config = timm.get_pretrained_cfg(timm_name(f"r{depth}"))
        assert config.tag == "tv_in1k" and "pytorch/vision" in config.origin_url
