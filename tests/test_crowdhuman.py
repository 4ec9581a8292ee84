"""CrowdHuman: its annotation files, and AP, MR^-2 and JI against slow loops, arithmetic and its authors' code."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import tensor

import eval as evaluation_script
import train
from kd.crowdhuman_metrics import CROWDHUMAN_METRICS, add_row, crowdhuman_metrics
from kd.data import CocoFolder
from kd.data.coco import DataError
from kd.data.crowdhuman import read_crowdhuman
from kd.data.shapes import Shapes

CATEGORIES = {1: {"id": 1, "name": "person"}}


def person(*fbox, tag="person", **extra) -> dict:
    return {"tag": tag, "fbox": list(fbox), "hbox": [0, 0, 1, 1], "head_attr": {}, "extra": {"box_id": 0, **extra}}


@pytest.fixture
def write(tmp_path):
    """A function that writes lines and their images of 40x30 pixels; returns annotations and images."""

    def to_disk(*lines) -> tuple:
        (tmp_path / "Images").mkdir(exist_ok=True)
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        for line in lines:
            if isinstance(line, dict) and "ID" in line:
                Image.new("RGB", (40, 30)).save(tmp_path / "Images" / f"{line['ID']}.jpg")
        (tmp_path / "x.odgt").write_text("\n".join(texts))
        return tmp_path / "x.odgt", tmp_path / "Images"

    return to_disk


def test_every_kind_of_entry(write):
    """Ignored and masks are crowd regions; heads without a body are left out; a file may be turned by its EXIF."""
    boxes = [
        person(2, 3, 10, 8),
        person(2, 3, 11, 8, ignore=0),
        person(2, 3, 12, 8, ignore=1),
        person(2, 3, 13, 8, tag="mask", ignore=1),
        person(2, 3, 14, 8, tag="mask"),
        {"tag": "person", "hbox": [1, 1, 4, 4], "head_attr": {"ignore": 0}},
        person(-5, 20, 20, 30),
        person(60, 20, 20, 30),
        person(2, 3, 0, 8),
        {"tag": "person", "fbox": [1, 1, 4.5, 4]},
    ]
    file, images = write({"ID": "1,a", "gtboxes": boxes}, "", {"ID": "3,b", "gtboxes": []})
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 50)).save(images / "3,b.jpg", exif=exif)
    coco = read_crowdhuman(file, images)
    assert coco["categories"] == [CATEGORIES[1]]
    assert coco["images"] == [
        {"id": 1, "file_name": "1,a.jpg", "width": 40, "height": 30},
        {"id": 3, "file_name": "3,b.jpg", "width": 50, "height": 30},
    ]
    assert [(a["bbox"][2], a["iscrowd"]) for a in coco["annotations"]] == [
        *((10, 0), (11, 0), (12, 1), (13, 1), (14, 1), (20, 0), (20, 0), (0, 0), (4.5, 0))
    ]
    dataset = CocoFolder(images, file)
    assert dataset.format == "crowdhuman" and [image["id"] for image in dataset.images] == [1, 3]
    assert dataset[0][1]["boxes"].tolist()[2] == [0, 20, 15, 30] and len(dataset[0][1]["boxes"]) == 4
    assert "left out: 3 crowd regions, 2 boxes without area" in dataset.summary
    assert len(dataset[1][1]["boxes"]) == 0 and dataset[1][0].shape == (3, 30, 50)


GOOD = {"ID": "a", "gtboxes": [person(1, 1, 5, 5)]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "x.odgt, line 2 is not JSON: Expecting property name"),
        ("7", 'x.odgt, line 2 is not {"ID": text, "gtboxes": [...]}: 7. Correct'),
        ({"ID": "b"}, "x.odgt, line 2 is not"),
        ({"ID": 7, "gtboxes": []}, "x.odgt, line 2 is not"),
        ({"ID": "b", "gtboxes": [7]}, "x.odgt: invalid boxes (1): line 2, box 0: 7 is not a JSON object"),
        ({"ID": "b", "gtboxes": [{"fbox": [1, 2, 3, 4]}]}, "line 2, box 0: tag is None, not a text"),
        ({"ID": "b", "gtboxes": [person(1, 1, 5, 5), person(1, 2, "3", 4)]}, "line 2, box 1: fbox is [1, 2, '3', 4], "),
        ({"ID": "b", "gtboxes": [person(1, 2, 3)]}, "line 2, box 0: fbox is [1, 2, 3], not [x, y, width, height]"),
        ({"ID": "b", "gtboxes": [person(1, 2, 3, math.nan)]}, "line 2, box 0: fbox is [1, 2, 3, nan]"),
        ({"ID": "b", "gtboxes": [{"tag": "person"}]}, "line 2, box 0: fbox is None"),
        ({"ID": "b", "gtboxes": [person(1, 2, 3, 4, ignore="1")]}, "line 2, box 0: extra is {'box_id': 0, 'ignore'"),
        ({"ID": "b", "gtboxes": [{**person(1, 2, 3, 4), "extra": 1}]}, "line 2, box 0: extra is 1"),
    ],
)
def test_broken_files(write, line, message):
    file, images = write(GOOD, line)
    with pytest.raises(DataError) as error:
        read_crowdhuman(file, images)
    assert message in str(error.value)


def test_bad_images(write):
    """Named with their line, or left out."""
    file, images = write(GOOD, {"ID": "gone", "gtboxes": []}, {"ID": "text", "gtboxes": [person(1, 1, 5, 5)]})
    (images / "gone.jpg").unlink()
    (images / "text.jpg").write_text("404")
    with pytest.raises(DataError, match=r"\(2\): line 2, 'gone.jpg': file not found, line 3, 'text.jpg': not a JPEG"):
        CocoFolder(images, file)
    assert len(CocoFolder(images, file, skip_bad_images=True)) == 1


def scene(*images: tuple[list, list]) -> tuple[dict, dict]:
    """Detections and ground truth of images of 100x100 pixels.

    Args:
        images: boxes (x, y, w, h, ignored) and detections (x, y, w, h, score) of each.
    """
    coco = {"images": [], "annotations": [], "categories": [CATEGORIES[1]]}
    detections = {}
    for number, (boxes, found) in enumerate(images, start=1):
        coco["images"].append({"id": number, "width": 100, "height": 100})
        for *bbox, ignored in boxes:
            coco["annotations"].append({"image_id": number, "category_id": 1, "bbox": bbox, "iscrowd": ignored})
        rows = tensor(found, dtype=torch.float64).reshape(-1, 5)
        xyxy = torch.cat([rows[:, :2], rows[:, :2] + rows[:, 2:4]], dim=1)
        detections[number] = {"boxes": xyxy, "scores": rows[:, 4], "labels": torch.ones(len(rows), dtype=torch.int64)}
    return detections, coco


def test_hand_computed():
    """Three images, four persons.

    1: two persons, one detection on the first (0.9), one on nothing (0.8).
    2: two persons and an ignored box: a detection of the first (0.7), again the first (0.6), and one in the ignored box
       (0.95), which does not count.
    3: nobody, one detection (0.35).

    By falling score: right, wrong, right, wrong, wrong. Recall 1/4, 1/4, 2/4, 2/4, 2/4; precision 1, 1/2, 2/3, 2/4,
    2/5. AP: only the third adds width: 1/4 * (1/2 + 2/3) / 2 = 7/48.

    False positives per image 0, 1/3, 1/3, 2/3, 1. The rates 0.01 .. 0.3162, seven of the nine, are first reached at
    1/3, with a miss rate of 3/4; 0.5623 at 2/3 and 1 at 1, with 1/2. MR = (3/4)^(7/9) (1/2)^(2/9).

    JI with a score above 0.3: 1/(2 + 2 - 1), 1/(2 + 2 - 1), 0/(0 + 1 - 0), with a mean of 2/9. Above 0.4 the third
    image has neither persons nor detections and does not count: 1/3. Above 0.6: 1/3, 1/(2 + 1 - 1): 5/12. Above 0.7:
    1/3, 0: 1/6. Above 0.8: 1/2, 0: 1/4. Above 0.9: 0.
    """
    first = ([(0, 0, 20, 20, 0), (50, 50, 20, 20, 0)], [(0, 0, 20, 20, 0.9), (70, 0, 20, 20, 0.8)])
    second = (
        [(0, 0, 20, 20, 0), (70, 70, 20, 20, 0), (30, 30, 30, 30, 1)],
        [(0, 0, 20, 20, 0.7), (0, 0, 20, 19, 0.6), (30, 30, 10, 10, 0.95)],
    )
    metrics = crowdhuman_metrics(*scene(first, second, ([], [(0, 0, 9, 9, 0.35)])), CATEGORIES)
    assert tuple(metrics) == CROWDHUMAN_METRICS
    assert metrics == pytest.approx(
        {
            "CrowdHuman_AP": 7 / 48,
            "CrowdHuman_MR": 0.75 ** (7 / 9) * 0.5 ** (2 / 9),
            "CrowdHuman_JI": 5 / 12,
        },
        abs=1e-6,
    )


@pytest.mark.parametrize(
    ("boxes", "found", "expected"),
    [
        ([(0, 0, 20, 20, 0)], [], (0, 1, 0)),
        ([(0, 0, 20, 20, 1)], [(0, 0, 20, 20, 0.9)], (-1, -1, -1)),
        ([(0, 0, 20, 20, 0)], [(0, 0, 20, 20, 0.9)], (0, 0, 1)),  # a curve of one point has no area
        # IoU 0.5 exactly is too little
        ([(0, 0, 20, 20, 0)], [(0, 0, 20, 10, 0.9)], (0, 1, 0)),
        # A person of which more than half is ignored need not be found in JI, but in AP; half counts
        ([(0, 0, 20, 20, 0), (50, 0, 9, 9, 0), (50, 0, 9, 5, 1)], [(0, 0, 20, 20, 0.9)], (0, 0.5, 1)),
        ([(0, 0, 20, 20, 0), (50, 0, 10, 10, 0), (50, 0, 10, 5, 1)], [(0, 0, 20, 20, 0.9)], (0, 0.5, 0.5)),
        # Clipped: outside of the image, a left edge becomes 99
        ([(-10, 0, 20, 20, 0)], [(0, 0, 10, 20, 0.9)], (0, 0, 1)),
        ([(90, 0, 40, 20, 0)], [(90, 0, 10, 20, 0.9)], (0, 0, 1)),
        ([(99, 0, 1, 20, 0)], [(99.7, 0, 9, 20, 0.9)], (0, 0, 1)),
        # A curve that ends before the first rate counts with its end: two of three persons; AP is 1/3 wide and 1 high
        ([(x, 0, 9, 9, 0) for x in (0, 20, 40)], [(0, 0, 9, 9, 0.9), (20, 0, 9, 9, 0.8)], (1 / 3, 1 / 3, 2 / 3)),
        # A score of 0.9 is not above 0.9
        ([(0, 0, 20, 20, 0)], [(0, 0, 20, 20, 0.95), (50, 0, 20, 20, 0.9)], (0, 0, 1)),
    ],
)
def test_edge_cases(boxes, found, expected):
    metrics = crowdhuman_metrics(*scene((boxes, found)), CATEGORIES)
    assert tuple(metrics.values()) == pytest.approx(expected, abs=1e-5)


def test_only_known_labels_and_given_images():
    detections, coco = scene(([(0, 0, 20, 20, 0)], [(0, 0, 20, 20, 0.9)]), ([(0, 0, 20, 20, 0)], []))
    del detections[2]
    assert crowdhuman_metrics(detections, coco, CATEGORIES)["CrowdHuman_JI"] == pytest.approx(1, abs=1e-5)
    detections[1]["labels"] += 1
    assert crowdhuman_metrics(detections, coco, CATEGORIES)["CrowdHuman_MR"] == 1


def random_scene(seed: int) -> tuple[dict, dict]:
    """Thirty images of 640x480 with up to 29 boxes, some ignored, and detections near most of them and elsewhere."""
    rng, W, H = np.random.default_rng(seed), 640, 480
    coco, detections = {"images": [], "annotations": [], "categories": [CATEGORIES[1]]}, {}
    for number in range(30):
        boxes, found = [], []
        for _ in range(rng.integers(1, 30)):
            size = rng.uniform(20, 120), rng.uniform(40, 250)
            corner = rng.uniform(-20, W - 30), rng.uniform(-20, H - 50)
            boxes.append([float(round(value)) for value in (*corner, *size)])
            is_mask, is_ignored = rng.random() <= 0.1, rng.random() < 0.1
            ignored = int(is_mask or is_ignored)
            coco["annotations"].append({"image_id": number, "category_id": 1, "bbox": boxes[-1], "iscrowd": ignored})
        for box in boxes:
            for _ in range(rng.integers(0, 3)):
                x, y, w, h = np.array(box) + rng.normal(0, 6, 4) * np.array([1, 1, 2, 2])
                found.append((x, y, max(w, 5), max(h, 5), rng.uniform(0.05, 1)))
        for _ in range(rng.integers(0, 6)):
            found.append((rng.uniform(0, 500), rng.uniform(0, 300), 80, 150, rng.uniform(0.05, 0.6)))
        coco["images"].append({"id": number, "width": W, "height": H})
        rows = tensor(found, dtype=torch.float64).reshape(-1, 5)
        xyxy = torch.cat([rows[:, :2], rows[:, :2] + rows[:, 2:4]], dim=1)
        detections[number] = {"boxes": xyxy, "scores": rows[:, 4], "labels": torch.ones(len(rows), dtype=torch.int64)}
    return detections, coco


def test_matches_reference():
    """Numbers of CrowdDet's lib/evaluate on this scene, to four digits: mmdetection's AP and MR are the same.

    At most 255 of the 435 persons have a detection of IoU above 0.5, so no AP is above 0.59.
    """
    metrics = crowdhuman_metrics(*random_scene(0), CATEGORIES)
    assert {name: round(value, 4) for name, value in metrics.items()} == {
        "CrowdHuman_AP": 0.4184,
        "CrowdHuman_MR": 0.9335,
        "CrowdHuman_JI": 0.4135,
    }


def clipped(box, size):
    (x1, y1, x2, y2), (W, H) = box, size
    return min(max(x1, 0), W - 1), min(max(y1, 0), H - 1), min(max(x2, 0), W), min(max(y2, 0), H)


def overlap(a, b) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def area(a) -> float:
    return (a[2] - a[0]) * (a[3] - a[1])


def iou(a, b) -> float:
    return overlap(a, b) / (area(a) + area(b) - overlap(a, b))


def best_pairs(weights: list[list[float]]) -> tuple[float, int]:
    """The highest sum of weights of any matching, and its number of pairs, by recursion over the rows."""
    if not weights:
        return 0.0, 0
    options = [best_pairs(weights[1:])]
    for column, weight in enumerate(weights[0]):
        if weight > 0:
            rest = [[w if c != column else 0 for c, w in enumerate(row)] for row in weights[1:]]
            total, count = best_pairs(rest)
            options.append((total + weight, count + 1))
    return max(options)


def slow_metrics(detections: dict, coco: dict) -> tuple[float, float, float]:
    """AP, MR^-2 and JI in loops over boxes. Pairs are counted in JI, and who is unmatched follows from trying."""
    size = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
    people, ignored = {i: [] for i in size}, {i: [] for i in size}
    for a in coco["annotations"]:
        x, y, w, h = a["bbox"]
        (ignored if a["iscrowd"] else people)[a["image_id"]].append(clipped((x, y, x + w, y + h), size[a["image_id"]]))
    found = {
        i: sorted(
            ((score, clipped(box, size[i])) for score, box in zip(d["scores"].tolist(), d["boxes"].tolist())),
            reverse=True,
        )
        for i, d in detections.items()
    }
    total, marks = sum(len(people[i]) for i in found), []
    for i, boxes in found.items():
        free = list(people[i])
        for score, box in boxes:
            best = max(free, key=lambda one: iou(box, one), default=None)
            if best is not None and iou(box, best) > 0.5:
                free.remove(best)
                marks.append((score, 1))
            elif not any(overlap(box, one) / area(box) > 0.5 for one in ignored[i]):
                marks.append((score, 0))
    marks.sort(reverse=True)
    curve, right = [], 0
    for count, (_, mark) in enumerate(marks, start=1):
        right += mark
        curve.append((right / total, right / count, (count - right) / len(found)))
    AP = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(curve))
    missed = []
    for rate in (0.01, 0.0178, 0.0316, 0.0562, 0.1, 0.1778, 0.3162, 0.5623, 1.0):
        missed.append(1 - next((point[0] for point in curve if point[2] >= rate), curve[-1][0]))
    MR = math.exp(sum(map(math.log, missed)) / 9) if min(missed) > 0 else 0.0

    means = []
    for lowest in np.arange(10) / 10:
        ratios = []
        for i, boxes in found.items():
            boxes = [box for score, box in boxes if score > lowest]
            weights = [[iou(box, one) if iou(box, one) > 0.5 else 0 for one in people[i]] for box in boxes]
            highest, k = best_pairs(weights)
            # A box is matched if without it the best sum is lower: the sums of random boxes differ.
            n = sum(
                best_pairs(weights[:r] + weights[r + 1 :])[0] < highest - 1e-9
                or not any(overlap(box, one) / area(box) > 0.5 for one in ignored[i])
                for r, box in enumerate(boxes)
            )
            m = sum(
                best_pairs([row[:c] + row[c + 1 :] for row in weights])[0] < highest - 1e-9
                or not any(overlap(one, other) / area(one) > 0.5 for other in ignored[i])
                for c, one in enumerate(people[i])
            )
            if n or m:
                ratios.append(k / (n + m - k + 1e-6))
        means.append(sum(ratios) / max(len(ratios), 1))
    return AP, MR, max(means)


@pytest.mark.parametrize("seed", range(8))
def test_matches_equation(seed):
    """Few large boxes in small images, so that persons, detections and ignored boxes overlap."""
    rng = np.random.default_rng(seed)

    def box(*last):
        return (*rng.uniform(-20, 70, 2), *rng.uniform(25, 60, 2), *last)

    def image():
        boxes = [box(int(rng.random() < 0.3)) for _ in range(rng.integers(0, 6))]
        found = [(*(np.array(b[:4]) + rng.normal(0, 5, 4)), rng.uniform(0, 1)) for b in boxes for _ in range(2)]
        return boxes, found[:7] + [box(rng.uniform(0, 1)) for _ in range(rng.integers(0, 3))]

    detections, coco = scene(*(image() for _ in range(6)))
    metrics = crowdhuman_metrics(detections, coco, CATEGORIES)
    assert tuple(metrics.values()) == pytest.approx(slow_metrics(detections, coco), abs=1e-9)


def test_matching_has_the_highest_weight():
    """After each row, the sum of the matching is that of the best of all, also where many are equal."""
    for seed in range(300):
        rng = np.random.default_rng(seed)
        D, M = rng.integers(1, 6, 2)
        weights = np.where(rng.random((D, M)) < 0.6, rng.random((D, M)), 0)
        weights = np.round(4 * weights) / 4 if seed % 3 == 0 else weights
        owner = np.full(M, -1)
        for row in range(D):
            add_row(owner, row, weights)
            pairs = [(r, c) for c, r in enumerate(owner.tolist()) if r >= 0]
            assert len({r for r, _ in pairs}) == len(pairs) and all(weights[pair] > 0 for pair in pairs)
            best, _ = best_pairs(weights[: row + 1].tolist())
            assert sum(weights[pair] for pair in pairs) == pytest.approx(best)


def test_trains_and_evaluates(tmp_path, capsys):
    """The three numbers are printed and logged by train.py, and printed by eval.py."""
    root = tmp_path / "crowd"
    (root / "Images").mkdir(parents=True)
    for split, seed in (("train", 1), ("val", 0)):
        lines = []
        shapes = Shapes(4, seed, 64)
        for index in range(len(shapes)):
            image, target = shapes[index]
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / "Images" / f"{split},{index}.jpg")
            boxes = [person(x1, y1, x2 - x1, y2 - y1) for x1, y1, x2, y2 in target["boxes"].tolist()]
            lines.append(json.dumps({"ID": f"{split},{index}", "gtboxes": boxes}))
        (root / f"annotation_{split}.odgt").write_text("\n".join(lines))
    words = ["--data", str(root), "--student", "test_resnet", "--image-size", "64", "64", "--max-iterations", "2"]
    words += ["--device", "cpu", "--amp", "off", "--output", str(tmp_path / "run")]
    metrics = train.main(train.parse_args(words))
    (line,) = [json.loads(text) for text in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    printed = capsys.readouterr().out
    for name in CROWDHUMAN_METRICS:
        assert line[name] == metrics[name] and 0 <= metrics[name] <= 1 and f"{name} {metrics[name]:.3f}" in printed
    evaluation_script.main(evaluation_script.parse_args([str(tmp_path / "run"), "--device", "cpu"]))
    assert f"\nCrowdHuman_MR{metrics['CrowdHuman_MR']:8.3f}\n" in capsys.readouterr().out
