"""PASCAL VOC: a devkit of six pictures, damaged files, and AP50 by hand and against slow loops."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import tensor

import eval as evaluation_script
import train
from kd.data import CocoFolder
from kd.data.coco import DataError
from kd.data.layouts import find_layout
from kd.data.voc import CLASSES
from kd.run.folder import annotations_hash
from kd.voc_metrics import VOC_METRICS, voc_metrics


def thing(name: str, corners, difficult=0, truncated=0, more="") -> str:
    names = ("xmin", "ymin", "xmax", "ymax")
    box = "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(names, corners))
    flags = f"<truncated>{truncated}</truncated><difficult>{difficult}</difficult>"
    return f"<object><name>{name}</name><pose>Left</pose>{flags}{more}<bndbox>{box}</bndbox></object>"


def sheet(*things: str, size=(60, 40)) -> str:
    width, height = size
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation><folder>VOC2007</folder>{size}<segmented>0</segmented>{''.join(things)}</annotation>"


PART = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
SHEETS = {
    "VOC2007": {
        "000005": sheet(thing("dog", (1, 1, 60, 40)), thing("cat", (5, 5, 20, 20), difficult=1)),
        "000007": sheet(thing("person", (11, 6, 30, 35.5), truncated=1, more=PART)),
        "000009": sheet(),
        "000001": sheet(thing("dog", (10, 10, 29, 29)), thing("dog", (31, 10, 50, 29), difficult=1)),
    },
    "VOC2012": {
        "2008_000002": sheet(thing("aeroplane", (1, 1, 30, 30))),
        "2008_000003": sheet(thing("tvmonitor", (1, 1, 30, 30))),
    },
}
LISTS = {
    "VOC2007": {"trainval": ("000005", "000007", "000009"), "test": ("000001",), "dog_trainval": ("000005  1",)},
    "VOC2012": {"trainval": ("2008_000002", "2008_000003"), "train": ("2008_000002",), "val": ("2008_000003",)},
}


@pytest.fixture
def devkit(tmp_path):
    """Six pictures of 60x40 pixels."""
    root = tmp_path / "data" / "VOCdevkit"
    rng = np.random.default_rng(0)
    for year, sheets in SHEETS.items():
        for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (root / year / folder).mkdir(parents=True)
        for name, text in sheets.items():
            (root / year / "Annotations" / f"{name}.xml").write_text(text)
            pixels = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / year / "JPEGImages" / f"{name}.jpg")
        for name, ids in LISTS[year].items():
            (root / year / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(ids) + "\n")
    return root


def test_both_years(devkit):
    """Corners count from 1: the dog covers its whole image. Parts are not read, difficult objects are crowd regions."""
    paths = find_layout(str(devkit.parent))
    dataset = CocoFolder(paths["train_images"], paths["train_annotations"])
    assert dataset.format == "voc" and dataset.num_classes == 21
    assert [c["name"] for c in dataset.categories.values()] == CLASSES == sorted(CLASSES)
    assert [image["file_name"] for image in dataset.images] == [
        *(f"VOC2007/JPEGImages/{name}.jpg" for name in ("000005", "000007", "000009")),
        *(f"VOC2012/JPEGImages/{name}.jpg" for name in ("2008_000002", "2008_000003")),
    ]
    targets = [dataset[index][1] for index in range(5)]
    assert [target["image_id"] for target in targets] == [1, 2, 3, 4, 5]
    assert [target["labels"].tolist() for target in targets] == [[12], [15], [], [1], [20]]
    assert targets[0]["boxes"].tolist() == [[0, 0, 60, 40]] and targets[1]["boxes"].tolist() == [[10, 5, 30, 35.5]]
    assert "left out: 1 crowd regions" in dataset.summary
    assert dataset.coco()["annotations"][1]["bbox"] == [4, 4, 16, 16]
    val = CocoFolder(paths["val_images"], paths["val_annotations"])
    assert len(val) == 1 and val[0][1]["boxes"].tolist() == [[9, 9, 29, 29]]


def test_hash_covers_every_file(devkit):
    """The lists and the XML files of both years; where they lie does not matter."""
    pattern = find_layout(str(devkit))["train_annotations"]
    before = annotations_hash(pattern)
    xml = devkit / "VOC2012" / "Annotations" / "2008_000003.xml"
    xml.write_text(xml.read_text().replace("30", "31"))
    changed = annotations_hash(pattern)
    xml.write_text(xml.read_text().replace("31", "30"))
    assert changed != before == annotations_hash(pattern)
    moved = devkit.rename(devkit.with_name("other [1]"))
    assert annotations_hash(find_layout(str(moved))["train_annotations"]) == before
    (moved / "VOC2007" / "ImageSets" / "Main" / "trainval.txt").write_text("000005\n000007\n")
    assert annotations_hash(find_layout(str(moved))["train_annotations"]) != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "000007.xml cannot be read: No such file"),
        ("<annotation>", "000007.xml is not XML: no element found"),
        ("404", "000007.xml is not XML: syntax error"),
        ("<?xml version='1.0' encoding='klingon'?><a/>", "000007.xml is not XML: unknown encoding"),
        (
            "<annotation></annotation>",
            "trainval.txt: invalid annotations (1): {}: size is not a width and a height above",
        ),
        (sheet(size=(0, 40)), "{}: size is not a width and a height above 0"),
        (
            sheet(thing("dog", (1, 1, 9, 9)), thing("yak", (1, 1, 9, 9))),
            "{}, object 2: name 'yak', difficult '0', xmin, ymin, xmax, ymax [1.0, 1.0, 9.0, 9.0]. Names are aeropl",
        ),
        (
            sheet(thing("dog", (1, "x", 9, 9))),
            "{}, object 1: name 'dog', difficult '0', xmin, ymin, xmax, ymax [1.0, None",
        ),
        (
            sheet(thing("dog", (1, "nan", 9, 9))),
            "{}, object 1: name 'dog', difficult '0', xmin, ymin, xmax, ymax [1.0, N",
        ),
        (
            sheet("<object><name>dog</name></object>"),
            "{}, object 1: name 'dog', difficult '0', xmin, ymin, xmax, ymax [No",
        ),
        (sheet("<object/>"), "{}, object 1: name ''"),
        (sheet(thing("dog", (1, 1, 9, 9), difficult="maybe")), "{}, object 1: name 'dog', difficult 'maybe'"),
        (sheet(size=(61, 40)), "(1): 'VOC2007/JPEGImages/000007.jpg': 60x40 pixels, but annotated as 61x40"),
    ],
)
def test_broken_annotations(devkit, text, message):
    xml = devkit / "VOC2007" / "Annotations" / "000007.xml"
    xml.unlink() if text is None else xml.write_text(text)
    with pytest.raises(DataError) as error:
        CocoFolder(devkit, devkit / "VOC2007" / "ImageSets" / "Main" / "trainval.txt")
    assert message.format(xml) in str(error.value)


def test_broken_lists_and_images(devkit):
    lists = devkit / "VOC2007" / "ImageSets" / "Main"
    with pytest.raises(
        DataError, match="one image ID .1.: line 1: '000005  1'. Give trainval.txt, not the list of a c"
    ):
        CocoFolder(devkit, lists / "dog_trainval.txt")
    with pytest.raises(DataError, match="absent.txt does not exist: give a list of images, VOC2007/ImageSets/Main/"):
        CocoFolder(devkit, lists / "absent.txt")
    (devkit / "trainval.txt").write_text("000005")
    with pytest.raises(DataError, match="trainval.txt is not in a folder ImageSets/Main"):
        CocoFolder(devkit, devkit / "trainval.txt")
    (devkit / "VOC2007" / "JPEGImages" / "000007.jpg").unlink()
    with pytest.raises(DataError, match="'VOC2007/JPEGImages/000007.jpg': file not found"):
        CocoFolder(devkit, lists / "trainval.txt")
    assert len(CocoFolder(devkit, lists / "trainval.txt", skip_bad_images=True)) == 2


def scene(things: list[tuple], found: list[tuple]) -> tuple[dict, dict, dict]:
    """Detections, ground truth and two categories, whose ids are not their labels.

    Args:
        things: (image, label, x, y, w, h, difficult) each.
        found: (image, label, x, y, w, h, score) each.
    """
    categories = {1: {"id": 7, "name": "a"}, 2: {"id": 3, "name": "b"}}
    coco = {"images": [], "annotations": [], "categories": list(categories.values())}
    for image, label, *bbox, difficult in things:
        category = categories[label]["id"]
        coco["annotations"].append({"image_id": image, "category_id": category, "bbox": bbox, "iscrowd": difficult})
    detections = {}
    for number in (1, 2, 3):
        rows = tensor([row[1:] for row in found if row[0] == number], dtype=torch.float64).reshape(-1, 6)
        boxes = torch.cat([rows[:, 1:3], rows[:, 1:3] + rows[:, 3:5]], dim=1)
        detections[number] = {"boxes": boxes, "scores": rows[:, 5], "labels": rows[:, 0].long()}
    return detections, coco, categories


def test_hand_computed():
    """Four objects of class a, one of them difficult; class b has a difficult object only, so it does not count.

    By falling score: right; within the difficult one, does not count; right, of an IoU of exactly 0.5; the first again,
    wrong; another label is no part of it; right. Of three objects: recall 1/3, 2/3, 2/3, 1; precision 1, 1, 2/3, 3/4.
    As an area 2/3 * 1 + 1/3 * 3/4 = 11/12. At the recalls 0 .. 0.6, seven of eleven, 1; at the other four 3/4: 10/11.
    """
    things = [
        *((1, 1, 0, 0, 20, 20, 0), (1, 1, 50, 0, 20, 20, 1), (2, 1, 0, 0, 20, 20, 0), (3, 1, 0, 0, 20, 20, 0)),
        (1, 2, 0, 50, 9, 9, 1),
    ]
    found = [
        *((1, 1, 0, 0, 20, 20, 0.9), (1, 1, 50, 0, 20, 20, 0.8), (1, 1, 52, 0, 20, 20, 0.75)),
        *((2, 1, 0, 0, 20, 10, 0.7), (1, 1, 1, 0, 20, 20, 0.6), (3, 2, 0, 0, 20, 20, 0.5), (3, 1, 0, 0, 20, 20, 0.4)),
    ]
    metrics = voc_metrics(*scene(things, found))
    assert tuple(metrics) == VOC_METRICS and tuple(metrics.values()) == pytest.approx((11 / 12, 10 / 11))


def test_the_nearest_object_decides():
    """A second detection whose nearest object was found is wrong, though another is near enough too.

    Objects from 0 to 20 and from 4 to 24; detections from 0 and from 1, of IoUs 19/21 and 17/23 to them: right, wrong.
    One of two objects, precision 1 up to recall 1/2: an area of 1/2; 6 of 11 points.
    """
    things = [(1, 1, 0, 0, 20, 20, 0), (1, 1, 4, 0, 20, 20, 0)]
    metrics = voc_metrics(*scene(things, [(1, 1, 0, 0, 20, 20, 0.9), (1, 1, 1, 0, 20, 20, 0.8)]))
    assert tuple(metrics.values()) == pytest.approx((1 / 2, 6 / 11))


def test_nothing():
    assert tuple(voc_metrics(*scene([], [(1, 1, 0, 0, 20, 20, 0.9)])).values()) == (-1, -1)
    assert tuple(voc_metrics(*scene([(1, 1, 0, 0, 20, 20, 0)], [])).values()) == (0, 0)


def slow_ap(things: list[tuple], found: list[tuple], label: int) -> tuple[float, float]:
    """AP of a class in loops over detections and recalls."""

    def iou(a, b):
        width, height = (min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
        both = max(width, 0) * max(height, 0)
        return both / (a[2] * a[3] + b[2] * b[3] - both)

    count = sum(row[1] == label and not row[6] for row in things)
    seen, curve, right, wrong = set(), [], 0, 0
    for image, _, *box, _ in sorted((row for row in found if row[1] == label), key=lambda row: -row[6]):
        own = [row for row in things if row[:2] == (image, label)]
        best = max(own, key=lambda row: iou(row[2:6], box), default=None)
        if best is None or iou(best[2:6], box) < 0.5:
            wrong += 1
        elif not best[6]:
            right, wrong = right + (best not in seen), wrong + (best in seen)
            seen.add(best)
        if right + wrong:
            curve.append((right / count, right / (right + wrong)))
    steps = [max((p for r, p in curve if r >= step / count - 1e-9), default=0) for step in range(1, count + 1)]
    points = [max((p for r, p in curve if r >= point / 10 - 1e-12), default=0) for point in range(11)]
    return sum(steps) / count, sum(points) / 11


@pytest.mark.parametrize("seed", range(6))
def test_matches_equation(seed):
    rng = np.random.default_rng(seed)

    def place():
        return (int(rng.integers(1, 4)), int(rng.integers(1, 3)), *rng.uniform(0, 60, 2), *rng.uniform(20, 40, 2))

    things = [(*place(), int(rng.random() < 0.2)) for _ in range(24)]
    found = [(*t[:2], *(np.array(t[2:6]) + rng.normal(0, 4, 4)), rng.random()) for t in things for _ in range(2)]
    found += [(*place(), rng.random()) for _ in range(10)]
    expected = np.mean([slow_ap(things, found, label) for label in (1, 2)], axis=0)
    assert tuple(voc_metrics(*scene(things, found)).values()) == pytest.approx(expected)


def test_trains_and_evaluates(devkit, tmp_path, capsys):
    """Both years; the numbers are logged and printed, a run can be resumed, and eval.py finds the data again."""
    words = ["--data", str(devkit.parent), "--student", "test_resnet", "--image-size", "64", "96", "--epochs", "1"]
    words += ["--batch-size", "2", "--device", "cpu", "--amp", "off", "--output", str(tmp_path / "run")]
    metrics = train.main(train.parse_args(words))
    (line,) = [json.loads(text) for text in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    printed = capsys.readouterr().out
    assert all(line[name] == metrics[name] and f"{name} {metrics[name]:.3f}" in printed for name in VOC_METRICS)
    assert math.isfinite(sum(line["losses"].values()))
    (tmp_path / "run" / "model.pt").unlink()
    train.main(train.parse_args([*words, "--resume"]))
    evaluation_script.main(evaluation_script.parse_args([str(tmp_path / "run"), "--device", "cpu"]))
    assert f"\nVOC07_AP50{metrics['VOC07_AP50']:8.3f}\n" in capsys.readouterr().out
