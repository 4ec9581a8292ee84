"""eval.py --export: an ONNX file of each detector gives torch's detections for images of any size."""

import json
import sys
from unittest.mock import Mock

import pytest
import torch

import eval as evaluation_script
import train
from kd.data import Shapes
from kd.data.transforms import augmentation
from kd.detectors import DETECTORS, build_detector
from kd.run.arguments import settle
from kd.run.checkpoint import save_model
from kd.run.folder import describe
from kd.tools.export import SingleImage, compare_onnx, export_onnx, largest_differences


def detector_with_detections(detector: str) -> torch.nn.Module:
    model = build_detector(detector, "test_resnet", 4, image_size=(64, 96)).eval()
    for part in (model, getattr(model, "roi_heads", model)):
        part.score_thresh = 0.005
    return model


@pytest.mark.parametrize("detector", DETECTORS)
def test_onnx_equals_torch(tmp_path, detector):
    """Outputs are named, in one order, and equal on sizes on which torchvision's own export is a pixel off."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = detector_with_detections(detector)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_onnx(model, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert [value.name for value in graph.input] == ["image"]
    assert [value.name for value in graph.output] == ["boxes", "scores", "labels"]
    sizes = ((64, 80), (123, 50), (75, 100))
    line = compare_onnx(model, tmp_path / "model.onnx", [torch.rand(3, *size) for size in sizes])
    assert line.startswith("equal in torch and onnxruntime ") and "0 detections" not in line.replace(
        "00 detections", ""
    )
    assert all(size in line for size in ("64x80", "64x41", "123x50", "62x50", "75x100", "75x51"))

    # The detector is as it was: the export works on a copy.
    assert not model.training and model.transform.fixed_size is None
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    with pytest.raises(ValueError, match="model.onnx differs from torch on an image of 64x80 pixels"):
        compare_onnx(model, tmp_path / "model.onnx", [torch.rand(3, 64, 80)])


def test_a_file_for_one_aspect_ratio_is_found(tmp_path):
    """MobileViT's number of patches becomes a constant of the file."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = build_detector("fcos", "mobilevit_xxs", 4, image_size=(64, 96)).eval()
    export_onnx(model, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="model.onnx fails on an image of 33x64 pixels"):
        compare_onnx(model, tmp_path / "model.onnx", [torch.rand(3, 64, 64)])
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ValueError, match="onnxruntime cannot load .*text.onnx"):
        compare_onnx(model, tmp_path / "text.onnx", [torch.rand(3, 64, 64)])


@pytest.mark.parametrize("detector", DETECTORS)
@torch.no_grad()
def test_single_image(detector):
    """Boxes, scores, labels for every detector, equal to torchvision's, also where its resize rounds down."""
    model = detector_with_detections(detector)
    for size in ((123, 50), (301, 95)):
        image = torch.rand(3, *size)
        expected = model([image])[0]
        assert len(expected["scores"]) > 0
        for name, value in zip(("boxes", "scores", "labels"), SingleImage(model)(image)):
            assert torch.equal(value, expected[name]), name


def test_largest_differences():
    """Of the nearest boxes of a label, in any order; another number of detections or another label is infinite."""
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 12.0], [20.0, 0.0, 30.0, 10.0]])
    expected = {"boxes": boxes, "scores": torch.tensor([0.9, 0.8, 0.7]), "labels": torch.tensor([1, 2, 1])}
    swapped = {name: value[[1, 0, 2]] for name, value in expected.items()}
    assert largest_differences(expected, swapped) == (0, 0)
    moved = {**swapped, "boxes": swapped["boxes"] + 0.25, "scores": swapped["scores"] - 0.125}
    assert largest_differences(expected, moved) == pytest.approx((0.25, 0.125))
    assert largest_differences(expected, {name: value[:2] for name, value in expected.items()})[0] == torch.inf
    assert largest_differences(expected, {**expected, "labels": torch.tensor([1, 1, 1])})[0] == torch.inf
    nothing = {name: value[:0] for name, value in expected.items()}
    assert largest_differences(nothing, nothing) == (0, 0)


@pytest.fixture
def run(tmp_path):
    """A folder with a model.pt alone."""
    arguments = {"detector": "fcos", "backbone": "test_resnet", "num_classes": 5, "image_size": (64, 64)}
    model, categories = build_detector(**arguments), Shapes(1, 0, 64, augmentation(train=False)).categories
    (tmp_path / "run").mkdir()
    save_model(model, {**arguments, "from_scratch": True}, categories, tmp_path / "run" / "model.pt")
    return tmp_path / "run"


def test_without_onnx(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    args = evaluation_script.parse_args([str(run), "--export", str(run / "student.onnx")])
    with pytest.raises(ValueError, match="needs the package onnx: pip install onnx onnxruntime"):
        evaluation_script.main(args)
    assert not (run / "student.onnx").exists()


def test_without_onnxruntime(run, monkeypatch, capsys):
    """The file is written, and it is said that it was not compared."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (run / "args.json").write_text("{}")
    written = Mock()
    monkeypatch.setattr(evaluation_script, "export_onnx", written)
    evaluation_script.main(evaluation_script.parse_args([str(run), "--export", "student.onnx"]))
    assert written.call_args.args[1] == "student.onnx"
    assert capsys.readouterr().out.splitlines() == [
        "student.onnx: image [3, height, width] in 0..1 -> boxes, scores, labels",
        "not compared with torch: that needs args.json of the run and pip install onnxruntime",
    ]


def test_command(run, few_shapes, capsys):
    """With args.json, the file is compared on images of the validation set."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    args = train.parse_args(["--device", "cpu", "--output", "elsewhere"])
    settle(args)
    (run / "args.json").write_text(json.dumps(describe(args)))
    evaluation_script.main(evaluation_script.parse_args([str(run), "--export", str(run / "student.onnx")]))
    assert "on images of 64x64, 33x64 pixels" in capsys.readouterr().out
