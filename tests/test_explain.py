"""Pictures of a method's maps: colours mean what the scale says, and eval.py --explain from end to end."""

import json

import pytest
import torch
from PIL import Image, ImageChops
from torch.testing import assert_close
from torchvision.transforms.functional import pil_to_tensor

import eval as evaluation_script
import kd.data
import train
from kd.data import Shapes
from kd.run.checkpoint import load, load_model
from kd.run.weights import load_distiller
from kd.tools.explain import (
    BAR,
    COLORS,
    GAP,
    LINE,
    TILE,
    choose_levels,
    colorize,
    draw_explanation,
    interpolated,
    nearest,
)
from tests.conftest import write_coco

LABELED = {"boxes": torch.tensor([[4.0, 4.0, 30.0, 26.0]]), "labels": torch.tensor([1])}
H, ZOOM = 144, TILE / 48  # height of a tile, and its size relative to the image of 32x48 pixels


def color(position: int) -> torch.Tensor:
    return torch.tensor(COLORS[position]) / 255


def draw(maps: dict[str, list[torch.Tensor]], target: dict | None = None) -> torch.Tensor:
    """A black image of 32x48 pixels with maps at strides 8 and 16."""
    picture = draw_explanation(
        "run, image 1", torch.zeros(3, 32, 48), target or {}, {1: "cat"}, maps, (8, 16), (32, 48)
    )
    return pil_to_tensor(picture).float() / 255


def pixel(picture: torch.Tensor, row: int, column: int, x: float, y: float) -> torch.Tensor:
    """The colour at a place of the network's input, in the tile of a row and column; column 0 is the image."""
    top, left = LINE + row * (2 * LINE + H + GAP) + 2 * LINE, GAP + column * (TILE + GAP)
    return picture[:, int(top + ZOOM * y), int(left + ZOOM * x)]


def test_size():
    """A level takes two columns, interpolated and as cells."""
    one = {"a": [torch.rand(1, 4, 6), torch.rand(1, 2, 3)]}
    height = 2 * LINE + H + GAP
    assert draw(one).shape == (3, LINE + height, GAP + 5 * (TILE + GAP))
    assert draw({**one, "b": one["a"]}).shape == (3, LINE + 2 * height, GAP + 5 * (TILE + GAP))


def test_levels():
    """At most three, those with the largest range of values, finest first; a constant level shows nothing."""
    ranges = [0.5, 0.01, 0.3, 0.4, 0.2]
    levels = [torch.tensor([[[1.0, 1.0 + value]]]) for value in ranges]
    assert choose_levels(levels) == [0, 2, 3]
    assert choose_levels([torch.ones(1, 4, 4), torch.rand(1, 2, 2)]) == [1]
    assert choose_levels([torch.ones(1, 4, 4), torch.ones(1, 2, 2)]) == [0]


def test_colors():
    """The first colour at 0, the last at the top, one of six at each fifth, straight lines between; ever lighter."""
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
    assert_close(pixel(picture, 0, 2, 32, 8), color(-1))
    assert_close(pixel(picture, 0, 2, 24, 8), color(0))
    assert_close(pixel(picture, 0, 4, 32, 16), (color(2) + color(3)) / 2, rtol=0, atol=1 / 255)  # half of the scale
    assert not pixel(picture, 0, 0, 20, 20).any()  # the image itself is black
    assert pixel(picture, 0, 1, 32, 8).min() > 0.5 and not pixel(picture, 0, 1, 8, 24).any()  # over the image

    # The bar next to the row's name goes from the first colour to the last.
    y, line = LINE + LINE // 2, picture[:, LINE + LINE // 2].T
    last = [x for x in range(line.shape[0]) if torch.allclose(line[x], color(-1), atol=1e-3)][-1]
    assert_close(picture[:, y, last - BAR[0] + 1], color(0))


def test_teacher_and_student_share_a_scale():
    """Rows of one quantity are adjacent, whatever the order of the names; others have their own scale."""
    one = [torch.tensor([[[0.0, 1, 1], [1, 1, 1]]]), torch.zeros(1, 1, 1)]
    half = [level / 2 for level in one]
    picture = draw({"a teacher": one, "b": half, "a student": half})
    assert_close(pixel(picture, 0, 2, 10, 10), color(-1))
    assert_close(pixel(picture, 1, 2, 10, 10), (color(2) + color(3)) / 2, rtol=0, atol=1 / 255)
    assert_close(pixel(picture, 2, 2, 10, 10), color(-1))


def test_nearest():
    """Each pixel has the nearest position's value: at stride 8, column 1 owns 4 <= x < 12, and the last the rest."""
    level = torch.arange(6.0).view(2, 3)
    covered = nearest(level, 8, (16, 32), (16, 32))
    assert covered[0].tolist() == [0.0] * 4 + [1.0] * 8 + [2.0] * 20
    assert covered[:, 0].tolist() == [0.0] * 4 + [3.0] * 12
    assert torch.equal(nearest(level, 8, (16, 32), (32, 64))[::2, ::2], covered)


def test_interpolated():
    """At a position its value, in the middle of two their mean, and the last value beyond the last position."""
    level = torch.tensor([[0.0, 4.0, 2.0]])
    smooth = interpolated(level, 8, (8, 32), (16, 64))  # two pixels of the picture per pixel of the input
    assert smooth.shape == (16, 64)
    for x, value in ((0, 0.125), (7, 1.875), (16, 3.9375), (24, 2.9375), (40, 2), (63, 2)):
        assert_close(smooth[5, x].item(), float(value))


def test_matrices():
    """Square, an entry a square, and nothing where there are no objects."""
    matrix = torch.tensor([[[0.0, 1.0], [0.5, 0.0]]])
    picture = draw({"relation matrix": [matrix]})
    top, left = LINE + 2 * LINE, GAP + TILE + GAP
    assert_close(picture[:, top + 36, left + 108], color(-1))
    assert_close(picture[:, top + 108, left + 108], color(0))
    assert draw({"relation matrix": [torch.zeros(1, 0, 0)]})[:, top:, left:].min() == 1


def test_boxes_are_drawn():
    maps = {"a": [torch.rand(1, 4, 6), torch.rand(1, 2, 3)]}
    plain, labeled = draw(maps), draw(maps, LABELED)
    for column in range(5):
        assert not torch.equal(pixel(plain, 0, column, 4.1, 15), pixel(labeled, 0, column, 4.1, 15))
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
    write_coco(Shapes(4, 0, 64), root / "images", root / "annotations" / "boxes.json")
    return root


def explain(runs, method: str, *images: str, **options) -> None:
    paths = {"val_images": runs / "images", "val_annotations": runs / "annotations" / "boxes.json"}
    words = [str(runs / method), "--explain", *images, "--device", "cpu"]
    for name, value in {**paths, **options}.items():
        words += [f"--{name.replace('_', '-')}", str(value)] if value else []
    evaluation_script.main(evaluation_script.parse_args(words))


def read(file) -> torch.Tensor:
    with Image.open(file) as picture:
        return pil_to_tensor(picture)


def test_by_id_and_by_file(runs, capsys):
    """A file of the validation set has its boxes, wherever it lies; another file has none."""
    known = runs / "images" / "shapes-2.png"
    explain(runs, "pgd", "2", str(known))
    assert capsys.readouterr().out.split() == [str(runs / "pgd" / f"explain-{name}.png") for name in ("2", "shapes-2")]
    by_id, by_file = (read(runs / "pgd" / f"explain-{name}.png") for name in ("2", "shapes-2"))
    assert by_id.shape[1] == LINE + 2 * (2 * LINE + TILE + GAP)
    assert torch.equal(by_id[:, LINE:], by_file[:, LINE:])  # the titles differ

    with Image.open(known) as image:
        image.save(runs / "unknown.png")
        ImageChops.invert(image).save(runs / "shapes-2.png")  # another picture of that name and size
    explain(runs, "l2", str(runs / "unknown.png"), str(runs / "shapes-2.png"))
    assert read(runs / "l2" / "explain-unknown.png").shape[1] == 3 * LINE + TILE + GAP
    for name in ("unknown.png", "shapes-2.png"):
        message = f"method pgd: ground-truth boxes are needed, and unknown for .*{name}"
        with pytest.raises(ValueError, match=message):
            explain(runs, "pgd", str(runs / name))


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
    method = load_distiller(runs / "l2", settings, student, classes, None).method
    checkpoint = load(runs / "l2" / "checkpoint.pt")["distiller"]
    state = {f"method.{name}": value for name, value in method.state_dict().items()}
    assert len(state) == 10 and all(torch.equal(checkpoint[name], value) for name, value in state.items())
    assert not method.training and not student.training
    with pytest.raises(ValueError, match=r"(?s)checkpoint.pt do not fit.*adapters"):
        load_distiller(runs / "l2", {**settings, "set": []}, student, classes, None)


def test_errors(runs):
    with pytest.raises(ValueError, match="teacher has no method to explain"):
        explain(runs, "teacher", "2")
    with pytest.raises(ValueError, match=r"7 is neither a file nor an image id.*0, 1, 2"):
        explain(runs, "l2", "7")
    with pytest.raises(ValueError, match=r"boxes.json is not an image"):
        explain(runs, "l2", str(runs / "annotations" / "boxes.json"))
    Image.new("RGB", (700, 2)).save(runs / "line.png")
    with pytest.raises(ValueError, match=r"line.png: 700x2 pixels"):
        explain(runs, "l2", str(runs / "line.png"))
    with pytest.raises(ValueError, match="two images of --explain have one name"):
        explain(runs, "l2", str(runs / "unknown.png"), str(runs / "images" / "unknown.jpg"))
    with pytest.raises(ValueError, match="built-in shapes: give --val-images and --val-annotations, or neither"):
        explain(runs, "l2", "2", val_annotations=None)
    with pytest.raises(ValueError, match=r"teacher of .*l2 is not at gone.pt: give its file as --teacher-weights"):
        explain(runs, "l2", "2", teacher_weights="gone.pt")
