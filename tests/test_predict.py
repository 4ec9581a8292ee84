"""eval.py --predict: pictures and COCO results of image files without annotations."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageColor
from torch import nn

import eval as evaluation_script
from kd.detectors import build_detector
from kd.run.checkpoint import save_model
from kd.tools.predict import find_files, predict, read_photograph

CATEGORIES = {1: {"id": 7, "name": "cat"}, 2: {"id": 9, "name": "dog"}}


class Fixed(nn.Module):
    """Three detections, whatever the image; label 3 is of no category."""

    def __init__(self):
        super().__init__()
        self.parameter = nn.Parameter(torch.zeros(1))
        self.seen = []
        self.transform = SimpleNamespace(max_size=320)

    def forward(self, images):
        self.seen += images
        boxes = torch.tensor([[2.0, 4.0, 32.0, 24.0], [1.0, 1.0, 3.0, 4.5], [0.0, 0.0, 9.0, 9.0]])
        return [{"boxes": boxes, "labels": torch.tensor([2, 1, 3]), "scores": torch.tensor([0.9, 0.25, 0.8])}]


def save_image(path, mode="RGB", size=(40, 30), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 100, 50)).convert(mode).save(path, **options)


def test_results_and_pictures(tmp_path):
    """COCO's fields; all detections of known labels in the file, those above the threshold in the picture."""
    save_image(tmp_path / "photos" / "a.png")
    line = predict(Fixed(), CATEGORIES, [str(tmp_path / "photos")], tmp_path / "out")
    assert line == "1 images, 2 detections, 1 drawn (scores from 0.5)"
    assert json.loads((tmp_path / "out" / "detections.json").read_text()) == [
        {"image_id": "a.png", "category_id": 9, "bbox": [2, 4, 30, 20], "score": 0.9},
        {"image_id": "a.png", "category_id": 7, "bbox": [1, 1, 2, 3.5], "score": 0.25},
    ]
    with Image.open(tmp_path / "out" / "a.png") as picture:
        assert picture.size == (512, 384)  # 12.8 times as large
        dog, cat = (ImageColor.getrgb(f"hsl({137 * label % 360}, 100%, 60%)") for label in (2, 1))
        assert picture.getpixel((26, 200)) == dog and picture.getpixel((200, 200)) == (200, 100, 50)
        assert cat not in {color for _, color in picture.getcolors(1 << 16)}


def test_files_of_one_name_stay_apart(tmp_path):
    """In folders, subfolders and given one by one; a file given twice counts once."""
    for place in ("x/a.png", "x/sub/a.png", "y/a.png", "y/a.bmp"):
        save_image(tmp_path / place)
    paths = [str(tmp_path / "x"), str(tmp_path / "y" / "a.png"), str(tmp_path / "y" / "a.bmp"), str(tmp_path / "x")]
    detector = Fixed()
    line = predict(detector, CATEGORIES, paths, tmp_path / "out")
    names = ["x/a.png", "x/sub/a.png", "y/a.png", "y/a.bmp"]
    assert line.startswith("4 images, 8 detections, 4 drawn") and len(detector.seen) == 4
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert list(dict.fromkeys(result["image_id"] for result in results)) == names
    written = {file.relative_to(tmp_path / "out").as_posix() for file in (tmp_path / "out").rglob("*.*")}
    assert written == {*names, "detections.json"}
    assert list(find_files([str(tmp_path / "y" / "a.png")])) == ["a.png"]


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp", "a.tiff", "a.gif", "a.mpo", "A.JPG", "plain"])
def test_formats(tmp_path, name):
    """Each is read, and its picture has the same name; without a suffix it is a JPEG."""
    save_image(tmp_path / "in" / name, **({} if "." in name else {"format": "JPEG"}))
    predict(Fixed(), CATEGORIES, [str(tmp_path / "in" / name)], tmp_path / "out")
    with Image.open(tmp_path / "out" / name) as picture:
        assert picture.size == (512, 384)
        assert picture.format == {"a.png": "PNG", "a.webp": "WEBP", "a.bmp": "BMP", "a.tiff": "TIFF"}.get(
            name, "GIF" if name == "a.gif" else "JPEG"
        )


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "CMYK", "1", "I;16"])
def test_modes(tmp_path, mode):
    """All become RGB in 0..1; 16 bits are scaled."""
    if mode == "I;16":
        Image.new("I;16", (40, 30), 32768).save(tmp_path / "a.png")
    else:
        save_image(tmp_path / ("a.tiff" if mode == "CMYK" else "a.png"), mode)
    (path,) = tmp_path.iterdir()
    image = read_photograph(path)
    assert image.shape == (3, 30, 40) and image.dtype == torch.float32 and 0 < image.max() <= 1
    if mode == "I;16":
        assert image[0, 0, 0] == pytest.approx(0.5, abs=0.01)


def test_orientation(tmp_path):
    """EXIF orientation 6: the left column of the stored picture is the top row."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", (40, 30))
    picture.paste("white", (0, 0, 8, 30))
    picture.save(tmp_path / "a.jpg", exif=exif)
    image = read_photograph(tmp_path / "a.jpg")
    assert image.shape == (3, 40, 30) and image[:, :6].min() > 0.9 and image[:, 12:].max() < 0.1


def test_files_that_are_not_images(tmp_path):
    """In a folder they are skipped and counted, damaged ones too; given by name they are errors."""
    save_image(tmp_path / "in" / "good.jpg", size=(200, 150))
    (tmp_path / "in" / "cut.jpg").write_bytes((tmp_path / "in" / "good.jpg").read_bytes()[:700])
    (tmp_path / "in" / "notes.txt").write_text("no image")
    save_image(tmp_path / "in" / "page.eps")
    save_image(tmp_path / "in" / "rule.png", size=(700, 2))  # 320 pixels wide, less than one would be left in height
    line = predict(Fixed(), CATEGORIES, [str(tmp_path / "in")], tmp_path / "out")
    assert line.startswith("1 images, 2 detections, 1 drawn")
    assert "skipped 4 files, the first: " in line and "cut.jpg is not an image that can be read: " in line

    def error(*names: str, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            predict(Fixed(), CATEGORIES, [str(tmp_path / name) for name in names], tmp_path / "out")

    error("in/good.jpg", "in/notes.txt", match=r"notes.txt is not an image that can be read: cannot identify")
    error("in/rule.png", match=r"rule.png: 700x2 pixels would have no height or width left .* long side of 320")
    error("absent.jpg", match=r"absent.jpg is neither a file nor a folder")
    (tmp_path / "empty").mkdir()
    error("empty", match="empty holds no file")
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    error("empty", match="empty holds no image that can be read; the first file: .*notes.txt")
    for place in ("out", "out/good.jpg"):
        error(place, match="pictures are written to .*out and would overwrite images there")


def test_from_a_model_alone(tmp_path, capsys):
    """Neither args.json nor a data set is needed; the file has what the detector returns, but for the background."""
    arguments = {"detector": "fcos", "backbone": "test_resnet", "num_classes": 3, "image_size": (64, 64)}
    model = build_detector(**arguments).eval()
    nn.init.zeros_(model.head.classification_head.cls_logits.bias)  # scores from the threshold of 0.05
    (tmp_path / "run").mkdir()
    save_model(model, {**arguments, "from_scratch": True}, CATEGORIES, tmp_path / "run" / "model.pt")
    save_image(tmp_path / "a.png", size=(60, 50))
    words = [str(tmp_path / "run"), "--predict", str(tmp_path / "a.png"), "--score-threshold", "1", "--device", "cpu"]
    evaluation_script.main(evaluation_script.parse_args(words))
    results = json.loads((tmp_path / "run" / "predictions" / "detections.json").read_text())
    with torch.no_grad():
        expected = model([read_photograph(tmp_path / "a.png")])[0]
    scores = expected["scores"][expected["labels"] > 0].tolist()
    assert scores and [result["score"] for result in results] == pytest.approx(scores, abs=1e-5)
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        f"1 images, {len(results)} detections, 0 drawn (scores from 1)",
        str(tmp_path / "run" / "predictions"),
    ]
