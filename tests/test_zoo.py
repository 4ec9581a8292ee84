"""torchvision's zoo by name: the same detectors, fetched safely, cut to other classes, with students that fit."""

import copy
import functools
import hashlib
import io
import json
import pickle
from functools import partial

import pytest
import torch
from timm.layers import freeze_batch_norm_2d
from torch.testing import assert_close
from torchvision.models import get_model, get_model_weights
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FrozenBatchNorm2d

import eval as evaluation_script
import train
from kd.detectors import (
    DETECTORS,
    ZOO,
    build_detector,
    build_zoo,
    check_pair,
    fetch_weights,
    fitting_arguments,
    inherit,
)
from kd.detectors.anchors import make_anchors
from kd.detectors.classes import match_classes
from kd.detectors.zoo import zoo_classes
from kd.features import forward_detector
from kd.run.checkpoint import load_model
from kd.run.weights import load_teacher

NAMES = ("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2", "fasterrcnn_resnet50_fpn_v2")
NAME = "fcos_resnet50_fpn"  # whose weights are fetched


build_once = functools.cache(partial(build_zoo, image_size=(64, 96)))


@pytest.mark.parametrize("name", NAMES)
def test_detections_equal_torchvisions(name):
    """Bit for bit, with random weights and statistics; RetinaNet V1 has frozen norm with eps = 0."""
    theirs = get_model(name, weights=None, weights_backbone=None, min_size=64, max_size=96)
    if not name.endswith("_v2"):
        theirs.backbone = freeze_batch_norm_2d(theirs.backbone)
        for module in theirs.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.eps = 0.0
    for key, buffer in theirs.named_buffers():
        if key.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
        elif key.endswith("running_mean"):
            buffer.normal_(0, 0.1)
    ours = build_once(name)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for model in (ours, theirs):
        (model.roi_heads if hasattr(model, "roi_heads") else model).score_thresh = 0.0
    images = [torch.rand(3, 70, 90), torch.rand(3, 60, 50)]
    with torch.no_grad():
        for found, expected in zip(ours(images), theirs.eval()(images)):
            assert len(found["scores"]) > 50
            assert all(torch.equal(found[key], value) for key, value in expected.items())


class Malicious:
    """Pickles to a call."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A function that publishes a file at a URL that needs no network, and returns where torch.hub will keep it."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "web").mkdir()

    def publish(content: bytes, hashed: bytes | None = None, name: str = NAME):
        sha = hashlib.sha256(content if hashed is None else hashed).hexdigest()
        file = tmp_path / "web" / f"{name}-{sha[:8]}.pth"
        file.write_bytes(content)
        monkeypatch.setattr(get_model_weights(name).COCO_V1.value, "url", file.as_uri())
        return tmp_path / "hub" / "checkpoints" / file.name

    return publish


def test_fetching(published, tmp_path):
    """Downloaded once, by torch.hub; then the file is enough."""
    torch.save({"weight": torch.arange(3.0)}, tmp_path / "weights.pth")
    kept = published((tmp_path / "weights.pth").read_bytes())
    assert_close(fetch_weights(NAME), {"weight": torch.arange(3.0)})
    (tmp_path / "web" / kept.name).unlink()
    assert_close(fetch_weights(NAME), {"weight": torch.arange(3.0)})


def test_a_damaged_file_is_refused(published, tmp_path):
    """When it is downloaded and when it is there already."""
    kept = published(b"damaged", hashed=b"whole")
    with pytest.raises(ValueError, match=f"invalid hash value.*Download file://.*{kept.name} to {kept.parent}"):
        fetch_weights(NAME)
    assert not kept.exists()
    kept.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"{kept} is damaged: .* not {kept.stem[-8:]}. Delete it"):
        fetch_weights(NAME)


def test_without_network_the_error_says_where_the_file_belongs(published, tmp_path):
    kept = published(b"")
    (tmp_path / "web" / kept.name).unlink()
    with pytest.raises(ValueError, match=f"cannot load the weights of {NAME}: .*Download file://.* to {kept.parent}$"):
        fetch_weights(NAME)


def test_code_in_a_published_file_is_not_executed(published, tmp_path):
    published(pickle.dumps({"weight": Malicious(tmp_path / "executed")}, protocol=2))
    with pytest.raises(ValueError, match=f"cannot load the weights of {NAME}: Weights only load failed"):
        fetch_weights(NAME)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("detector", DETECTORS)
def test_classes_are_matched_by_name(detector):
    """Outputs of the classes in common stay what they were, at the labels of the data; others are never predicted."""
    teacher = build_detector(detector, "test_resnet", 4, image_size=(64, 96)).eval()
    known = {1: "cat", 2: "dog", 3: "cow"}
    cut, same = copy.deepcopy(teacher), copy.deepcopy(teacher)
    assert match_classes(same, known, known) == []
    assert all(torch.equal(value, same.state_dict()[key]) for key, value in teacher.state_dict().items())
    assert match_classes(cut, known, {1: "hen", 2: "cow", 4: "cat", 5: "owl"}) == ["hen", "owl"]

    if detector == "faster_rcnn":
        regions = torch.randn(5, 1024)
        before, after = (model.roi_heads.box_predictor(regions) for model in (teacher, cut))
        scores, deltas = before[0], before[1].view(5, 4, 4)
        assert_close(after[0][:, [0, 2, 4]], scores[:, [0, 3, 1]])
        assert_close(after[0][:, [1, 3, 5]], torch.full((5, 3), -100.0))
        assert_close(after[1].view(5, 6, 4)[:, [2, 4]], deltas[:, [3, 1]])
    else:
        images = ImageList(torch.randn(2, 3, 64, 96), [(64, 96)] * 2)
        before, after = (forward_detector(model, images, needs=("cls_logits",))[0] for model in (teacher, cut))
        for old, new in zip(before.cls_logits, after.cls_logits):
            assert_close(new[:, :, [0, 2, 4]], old[:, :, [0, 3, 1]])
            assert (new[:, :, [1, 3, 5]] == -100).all()
    with torch.no_grad():
        (found,) = cut([torch.rand(3, 64, 96)])
    assert not set(found["labels"].tolist()) - {0, 2, 4}
    check_pair(build_detector(detector, "test_resnet", 6, image_size=(64, 96)), cut, ("fpn", "cls_logits"))


def test_labels_of_the_zoo():
    """COCO's 80 classes keep their ids."""
    classes = zoo_classes(NAME)
    assert len(classes) == 80 and (classes[1], classes[90]) == ("person", "toothbrush") and 12 not in classes


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("retinanet_resnet50_fpn_v2", {"anchors": "torchvision", "tower_norm": True, "giou": True}),
        ("fasterrcnn_resnet50_fpn_v2", {"anchors": "torchvision"}),
    ],
)
def test_a_student_fits_its_teacher(name, expected):
    """Small images keep the teacher's anchors, and RetinaNet V2 hands on its towers and its box loss."""
    teacher = build_once(name)
    assert fitting_arguments(teacher, ZOO[name]) == expected and fitting_arguments(teacher, "fcos") == {}
    build = partial(build_detector, ZOO[name], "test_resnet", 91, image_size=(64, 96), from_scratch=False)
    heads = ("cls_tower", "cls_logits", "boxes")
    with pytest.raises(ValueError, match="anchor sizes"):
        check_pair(build(), teacher, heads)
    student = build(**expected)
    check_pair(student, teacher, heads)
    assert fitting_arguments(student, ZOO[name]) == expected
    left = inherit(student, teacher)
    if name.startswith("fasterrcnn"):  # other heads; batch norm of the pyramid is folded
        assert {part.split(".")[0] for part in left} == {"backbone", "rpn", "roi_heads"}
        features = torch.randn(1, 256, 8, 8)
        for ours, theirs in zip(student.backbone.fpn.layer_blocks, teacher.backbone.fpn.layer_blocks):
            assert_close(ours(features), theirs(features))
        return
    # other widths of the body's maps; P6 is computed from another map, and P7 from P6
    coarse = [f"extra_blocks.{level}.{kind}" for level in ("p6", "p7") for kind in ("weight", "bias")]
    laterals = [f"inner_blocks.{level}.0.weight" for level in range(3)]
    assert left == [f"backbone.fpn.{name}" for name in (*laterals, *coarse)]
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    images = ImageList(torch.randn(1, 3, 64, 96), [(64, 96)])
    losses = forward_detector(student, images, [target])[1]
    assert 0 <= losses["bbox_regression"] <= 2  # GIoU's range


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("detector", DETECTORS)
def test_exact_anchors(detector):
    """By hand: side, ratio and centre of the anchors at one position; they script like torchvision's."""
    model = build_detector(detector, "test_resnet", 3, image_size=(64, 96), anchors="mmdet")
    assert fitting_arguments(model, detector)["anchors"] == "mmdet"
    generator = make_anchors(detector, "mmdet")
    stride = generator.strides[1]
    sizes = [(5, 7), (3, 4), (2, 2), (1, 1), (1, 1)]  # the image is no multiple of the stride
    maps = [torch.zeros(1, 8, H, W) for H, W in sizes]
    image = ImageList(torch.zeros(1, 3, 5 * generator.strides[0] - 3, 7 * generator.strides[0] - 3), [(1, 1)])
    (anchors,) = generator(image, maps)
    per_position = generator.num_anchors_per_location()[0]
    level = anchors.split([H * W * per_position for H, W in sizes])[1].view(3, 4, per_position, 4)
    if detector == "fcos":  # one stride wide around its centre
        expected = torch.tensor([[3.0, 2.0, 4.0, 3.0]]) * stride
    elif detector == "gfl":  # around its corner
        expected = torch.tensor([[2.5, 1.5, 3.5, 2.5]]) * stride
    else:
        factors = [4 * 2 ** (k / 3) for k in range(3)] if detector == "retinanet" else [8]
        half = [(s * stride / ratio**0.5 / 2, s * stride * ratio**0.5 / 2) for ratio in (0.5, 1, 2) for s in factors]
        x, y = 3 * stride, 2 * stride
        expected = torch.tensor([[x - w, y - h, x + w, y + h] for w, h in half])
    assert_close(level[2, 3], expected)
    assert_close(torch.jit.script(generator)(image, maps), [anchors])


def test_anchors_differ_from_torchvisions():
    """Equal sizes do not make a pair: the positions differ."""
    small = {"image_size": (64, 96)}
    pair = [build_detector("faster_rcnn", "test_resnet", 3, anchors=kind, **small) for kind in ("torchvision", "mmdet")]
    with pytest.raises(ValueError, match="anchors: student AnchorGenerator, teacher ExactAnchors"):
        check_pair(*pair, ("fpn", "boxes"))
    check_pair(*pair, ("fpn",))
    with pytest.raises(ValueError, match="unknown anchors 'full': choose torchvision, half, mmdet"):
        build_detector("fcos", "test_resnet", 3, anchors="full")


def test_one_flag(published, coco_folder, tmp_path, monkeypatch, capsys):
    """A COCO teacher for a data set of persons is fetched and cut; its student fits, trains, and loads again."""
    for file in (coco_folder / "annotations").iterdir():
        coco = json.loads(file.read_text())
        coco["categories"] = [{"id": 7, "name": "person"}]
        for annotation in coco["annotations"]:
            annotation["category_id"] = 7
        file.write_text(json.dumps(coco))
    name, weights = "retinanet_resnet50_fpn_v2", io.BytesIO()
    whole = build_once(name)
    torch.save(whole.state_dict(), weights)
    published(weights.getvalue(), name=name)

    run, machine = tmp_path / "run", ("--device", "cpu")
    words = ["--method", "frs", "--teacher", name, "--student", "test_resnet", "--inherit", "--data", str(coco_folder)]
    words += ["--image-size", "64", "96", "--max-iterations", "1", "--amp", "off", "--output", str(run), *machine]
    train.main(train.parse_args(words))
    printed = capsys.readouterr().out
    assert f"teacher {name} from torchvision: AP" in printed
    assert "the student takes from its teacher: anchors torchvision, tower_norm True, giou True\n" in printed
    assert "except: backbone.fpn.inner_blocks.0.0.weight" in printed and "extra_blocks.p7.bias\n" in printed

    teacher = load_teacher(None, "retinanet", name, {1: {"name": "person"}}, (64, 96), "frs")
    images = ImageList(torch.randn(1, 3, 64, 96), [(64, 96)])
    before, after = (forward_detector(model, images, needs=("cls_logits",))[0] for model in (whole, teacher))
    for old, new in zip(before.cls_logits, after.cls_logits):
        assert_close(new, old[:, :, [0, 1]])

    student, content = load_model(run / "model.pt")
    assert content["arguments"]["anchors"] == "torchvision"
    head = RetinaNetHead(256, 9, 2, norm_layer=partial(torch.nn.GroupNorm, 32))
    sizes = {"min_size": 64, "max_size": 96, "detections_per_img": 100}
    plain = RetinaNet(copy.deepcopy(student.backbone), 2, head=head, **sizes).eval()
    plain.load_state_dict(content["model"], strict=True)
    plain.transform.image_mean, plain.transform.image_std = student.transform.image_mean, student.transform.image_std
    with torch.no_grad():
        (found,), (expected,) = (model([images.tensors[0].sigmoid()]) for model in (student, plain))
    assert all(torch.equal(found[key], value) for key, value in expected.items())

    def evaluate(*words):
        evaluation_script.main(evaluation_script.parse_args([*map(str, words), *machine]))

    evaluate(run, "--explain", "1")
    assert (run / "explain-1.png").is_file()
    monkeypatch.setitem(evaluation_script.COCO_RECIPE, "image_size", (64, 96))
    capsys.readouterr()
    with pytest.raises(ValueError, match=f"{name} needs a validation set: give --data"):
        evaluate(name)
    evaluate(name, "--data", coco_folder)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-2:]] == ["AP", "person"]
