"""Pictures of a method's maps: that colors mean what the scale says, and eval.py --explain from end to end."""

import argparse
import json

import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision.transforms.functional import pil_to_tensor

import eval as evaluation_script
import kd.data
import train
from kd.checkpoint import load, load_model
from kd.explain import BAR, COLORS, GAP, LINE, TILE, colorize, draw_explanation, spread
from kd.shapes import Shapes

LABELED = {"boxes": torch.tensor([[4.0, 4.0, 30.0, 26.0]]), "labels": torch.tensor([1])}


def color(position: int) -> torch.Tensor:
    return torch.tensor(COLORS[position]) / 255


def draw(maps: dict[str, list[torch.Tensor]], target: dict | None = None) -> torch.Tensor:
    """An image of 32x48 pixels, black, at strides 8 and 16: tiles are five times as large, 160x240."""
    return draw_explanation(torch.zeros(3, 32, 48), target or {}, {1: "cat"}, maps, [8, 16], (32, 48))


def pixel(picture: torch.Tensor, row: int, column: int, x: float, y: float) -> torch.Tensor:
    """The color at a place of the network's input, in the tile of a row and column; column 0 is the image."""
    top, left = LINE + row * (LINE + 160 + GAP) + LINE, GAP + column * (240 + GAP)
    return picture[:, int(top + 5 * y), int(left + 5 * x)]


def test_size():
    one = {"a": [torch.rand(1, 4, 6), torch.rand(1, 2, 3)]}
    assert draw(one).shape == (3, LINE + LINE + 160 + GAP, GAP + 3 * (TILE + GAP))
    two = {**one, "b": one["a"]}
    assert draw(two).shape == (3, LINE + 2 * (LINE + 160 + GAP), GAP + 3 * (TILE + GAP))


def test_colors():
    """The first color at 0, the last at the top, one of six at each fifth, straight lines between; ever lighter."""
    values = torch.tensor([[0.0, 0.6, 3.0], [1.2, 0.3, 2.4]])
    colors = colorize(values, 3.0).movedim(0, 2) / 255
    assert_close(colors[0, 0], color(0))
    assert_close(colors[0, 1], color(1))
    assert_close(colors[0, 2], color(-1))
    assert_close(colors[1, 0], color(2))
    assert_close(colors[1, 1], (color(0) + color(1)) / 2, rtol=0, atol=1 / 255)
    assert_close(colorize(torch.zeros(2, 2), 0.0)[:, 0, 0] / 255, color(0))
    lightness = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in COLORS]
    assert lightness == sorted(lightness)


def test_scale_is_as_stated():
    """A maximum of 2 at row 1, column 4 of stride 8, so at x = 32, y = 8; 1 at row 1, column 2 of stride 16."""
    fine, coarse = torch.zeros(1, 4, 6), torch.zeros(1, 2, 3)
    fine[0, 1, 4], coarse[0, 1, 2] = 2.0, 1.0
    picture = draw({"a": [fine, coarse]})
    assert_close(pixel(picture, 0, 1, 32, 8), color(-1))
    assert_close(pixel(picture, 0, 1, 24, 8), color(0))
    assert_close(pixel(picture, 0, 2, 32, 16), (color(2) + color(3)) / 2, rtol=0, atol=1 / 255)  # half of the scale
    assert_close(pixel(picture, 0, 2, 0, 0), color(0))
    assert not pixel(picture, 0, 0, 20, 20).any()  # the image itself is black

    # The bar beside the row's name goes from the first color to the last.
    y, x = LINE + LINE // 2, GAP + 240 + GAP + 3 * GAP
    assert_close(picture[:, y, x], color(0))
    assert_close(picture[:, y, x + BAR[0] - 1], color(-1))


def test_teacher_and_student_share_a_scale():
    """Rows of one quantity stand together, whatever the order of the names; others have their own scale."""
    one = [torch.ones(1, 4, 6), torch.ones(1, 2, 3)]
    half = [level / 2 for level in one]
    picture = draw({"a teacher": one, "b": half, "a student": half})
    assert_close(pixel(picture, 0, 1, 20, 20), color(-1))
    assert_close(pixel(picture, 1, 1, 20, 20), (color(2) + color(3)) / 2, rtol=0, atol=1 / 255)
    assert_close(pixel(picture, 2, 1, 20, 20), color(-1))


def test_spread():
    """Each pixel has the nearest position's value: at stride 8, column 1 owns 4 <= x < 12, and the last the rest."""
    level = torch.arange(6.0).view(2, 3)
    covered = spread(level, 8, (16, 32), (16, 32))
    assert covered[0].tolist() == [0.0] * 4 + [1.0] * 8 + [2.0] * 20
    assert covered[:, 0].tolist() == [0.0] * 4 + [3.0] * 12
    assert torch.equal(spread(level, 8, (16, 32), (32, 64))[::2, ::2], covered)


def test_matrices():
    """Square, an entry a square, and none where there are no objects, nor on levels that have none."""
    matrix = torch.tensor([[[0.0, 1.0], [0.5, 0.0]]])
    picture = draw({"relation matrix": [matrix]})
    top, left = LINE + LINE, GAP + 240 + GAP
    assert_close(picture[:, top + 40, left + 120], color(-1))
    assert_close(picture[:, top + 120, left + 120], color(0))
    assert picture[:, top + 40, left + 161 :].min() == 1
    assert draw({"relation matrix": [torch.zeros(1, 0, 0)]})[:, top:, left:].min() == 1


def test_boxes_are_drawn():
    maps = {"a": [torch.zeros(1, 4, 6), torch.zeros(1, 2, 3)]}
    plain, labeled = draw(maps), draw(maps, LABELED)
    for column in range(3):
        assert not torch.equal(pixel(plain, 0, column, 4, 15), pixel(labeled, 0, column, 4, 15))
        assert_close(pixel(plain, 0, column, 40, 30), pixel(labeled, 0, column, 40, 30))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a teacher and two students, and the validation pictures in COCO's layout."""
    root = tmp_path_factory.mktemp("runs")
    words = ["--student", "test_resnet", "--image-size", "64", "64", "--batch-size", "4", "--max-iterations", "2"]
    words += ["--device", "cpu", "--amp", "off"]
    distilled = ["--teacher", "test_resnet", "--teacher-weights", str(root / "teacher" / "model.pt")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kd.data, "SHAPES_TRAIN", 8)
        patch.setattr(kd.data, "SHAPES_VAL", 4)
        train.main(train.parse_args([*words, "--output", str(root / "teacher")]))
        for method, hyper_parameters in (("l2", ["--set", "adapter=True"]), ("pgd", [])):
            output = ["--method", method, *distilled, *hyper_parameters, "--output", str(root / method)]
            train.main(train.parse_args([*words, *output]))
    dataset = Shapes(4, 0, 64)
    coco = dataset.coco()
    (root / "images").mkdir()
    for image in coco["images"]:
        image["file_name"] = f"shapes-{image['id']}.png"
        Image.fromarray(dataset[image["id"]][0].permute(1, 2, 0).numpy()).save(root / "images" / image["file_name"])
    (root / "boxes.json").write_text(json.dumps(coco))
    return root


def explain(runs, method: str, *images: str, **options) -> None:
    arguments = {"val_images": runs / "images", "val_annotations": runs / "boxes.json", "teacher_weights": None}
    arguments = {**arguments, **options, "run": runs / method, "explain": images, "device": "cpu"}
    evaluation_script.explain(argparse.Namespace(**arguments))


def read(file) -> torch.Tensor:
    with Image.open(file) as picture:
        return pil_to_tensor(picture)


def test_by_id_and_by_file(runs, capsys):
    """A file of the validation set has its boxes, wherever it lies; another file has none."""
    known = runs / "images" / "shapes-2.png"
    explain(runs, "pgd", "2", str(known))
    assert capsys.readouterr().out.split() == [str(runs / "pgd" / f"explain-{name}.png") for name in ("2", "shapes-2")]
    by_id, by_file = (read(runs / "pgd" / f"explain-{name}.png") for name in ("2", "shapes-2"))
    assert by_id.shape == (3, LINE + 5 * (LINE + TILE + GAP), GAP + 6 * (TILE + GAP))
    assert torch.equal(by_id, by_file)

    with Image.open(known) as image:
        image.save(runs / "unknown.png")
        image.resize((80, 48)).save(runs / "shapes-2.png")
    explain(runs, "l2", str(runs / "unknown.png"), str(runs / "shapes-2.png"))
    assert read(runs / "l2" / "explain-unknown.png").shape == (3, 2 * LINE + TILE + GAP, GAP + 6 * (TILE + GAP))
    assert read(runs / "l2" / "explain-shapes-2.png").shape == (3, 2 * LINE + 144 + GAP, GAP + 6 * (TILE + GAP))
    with pytest.raises(ValueError, match="pgd looks at ground-truth boxes, which are not known for .*unknown.png"):
        explain(runs, "pgd", str(runs / "unknown.png"))


def test_the_built_in_shapes(runs):
    """They have ids and no files."""
    explain(runs, "pgd", "2")
    before = read(runs / "pgd" / "explain-2.png")
    explain(runs, "pgd", "2", val_images=None, val_annotations=None)
    assert torch.equal(read(runs / "pgd" / "explain-2.png"), before)


def test_the_method_is_the_trained_one(runs):
    """Adapters come from checkpoint.pt; model.pt does not have them."""
    settings = json.loads((runs / "l2" / "args.json").read_text())
    student, content = load_model(runs / "l2" / "model.pt")
    classes = content["categories"]
    method = evaluation_script.load_distiller(runs / "l2", settings, student, classes, None).method
    checkpoint = load(runs / "l2" / "checkpoint.pt")["distiller"]
    state = {f"method.{name}": value for name, value in method.state_dict().items()}
    assert len(state) == 10 and all(torch.equal(checkpoint[name], value) for name, value in state.items())
    assert not method.training and not student.training
    with pytest.raises(ValueError, match=r"(?s)checkpoint.pt do not fit.*adapters"):
        evaluation_script.load_distiller(runs / "l2", {**settings, "set": []}, student, classes, None)


def test_errors(runs):
    with pytest.raises(ValueError, match="teacher has no method to explain"):
        explain(runs, "teacher", "2")
    with pytest.raises(ValueError, match=r"7 is neither a file nor an image id.*0, 1, 2"):
        explain(runs, "l2", "7")
    with pytest.raises(ValueError, match=r"boxes.json is not an image"):
        explain(runs, "l2", str(runs / "boxes.json"))
    with pytest.raises(ValueError, match=r"teacher of .*l2 is not at gone.pt: give its file as --teacher-weights"):
        explain(runs, "l2", "2", teacher_weights="gone.pt")
