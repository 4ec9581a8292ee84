"""COCO's numbers on detections whose score is known."""

import copy
import signal

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kd import evaluation
from kd.data.shapes import Shapes
from kd.data.transforms import augmentation
from kd.evaluation import (
    METRICS,
    ap_per_class,
    coco_evaluation,
    coco_metrics,
    evaluate,
    format_classes,
    format_metrics,
)
from kd.tools.benchmark import random_detections


@pytest.fixture
def truth():
    dataset = Shapes(4, 0, 64)
    perfect = {}
    for index in range(4):
        target = dataset[index][1]
        boxes, labels = torch.as_tensor(target["boxes"]), target["labels"]
        perfect[index] = {"boxes": boxes, "labels": labels, "scores": torch.linspace(1, 0.5, len(labels))}
    return dataset, perfect


def test_perfect_detections(truth):
    dataset, perfect = truth
    metrics = coco_metrics(perfect, dataset.coco(), dataset.categories)
    assert tuple(metrics) == METRICS
    assert metrics["AP"] == metrics["AP50"] == metrics["AR100"] == pytest.approx(1)


def test_wrong_labels_and_no_detections(truth):
    dataset, perfect = truth
    wrong = {i: {**d, "labels": d["labels"] % 4 + 1} for i, d in perfect.items()}
    assert coco_metrics(wrong, dataset.coco(), dataset.categories)["AP"] < 0.3
    nothing = {i: {k: v[:0] for k, v in d.items()} for i, d in perfect.items()}
    metrics = coco_metrics(nothing, dataset.coco(), dataset.categories)
    assert metrics == {name: -1 if name in ("AP_L", "AR_L") else 0 for name in METRICS}  # pictures of 64x64 pixels


def test_boxes_moved_by_a_quarter(truth):
    """A box moved by a quarter of its width keeps IoU 0.75 / 1.25 = 0.6: found at the thresholds 0.5, 0.55 and (bounds
    of rounding) perhaps 0.6, so AP50 is 1, AP75 is 0 and AP is 0.2 or 0.3."""
    dataset, perfect = truth
    shifted = {}
    for index, found in perfect.items():
        boxes = found["boxes"].clone()
        boxes[:, 0::2] += 0.25 * (boxes[:, 2:3] - boxes[:, 0:1])
        shifted[index] = {**found, "boxes": boxes}
    metrics = coco_metrics(shifted, dataset.coco(), dataset.categories)
    assert metrics["AP50"] > 0.9 and metrics["AP75"] < 0.1 and 0.15 < metrics["AP"] < 0.35


def test_only_the_given_images_count(truth):
    """Half of the images, perfectly detected, are perfect; labels without a category are dropped."""
    dataset, perfect = truth
    half = {i: perfect[i] for i in (0, 1)}
    assert coco_metrics(half, dataset.coco(), dataset.categories)["AP"] == pytest.approx(1)
    unknown = {i: {**d, "labels": torch.full_like(d["labels"], 77)} for i, d in perfect.items()}
    assert coco_metrics(unknown, dataset.coco(), dataset.categories)["AP"] == 0


@pytest.mark.parametrize(("iscrowd", "AP50"), [(1, 1.0), (0, 51 / 101 / 3)])
def test_detections_in_a_crowd_do_not_count(iscrowd, AP50):
    """Two detections within a region, the more certain ones, and one of the only object beside it.

    In a crowd they are neither right nor wrong, and the crowd is not missed: precision 1 at recall 1. Were the region
    an object, both would be wrong (an IoU of 0.25) and it would be missed: precision 1/3 up to recall 1/2, on 51 of 101
    points of recall, 0.168.
    """
    box = torch.tensor([[10.0, 10, 30, 30], [30, 30, 50, 50], [60, 10, 70, 20]])
    found = {1: {"boxes": box, "scores": torch.tensor([0.9, 0.8, 0.7]), "labels": torch.ones(3, dtype=torch.int64)}}
    region = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 40, 40], "area": 1600, "iscrowd": iscrowd}
    thing = {"id": 2, "image_id": 1, "category_id": 1, "bbox": [60, 10, 10, 10], "area": 100, "iscrowd": 0}
    categories = [{"id": 1, "name": "thing"}]
    coco = {"images": [{"id": 1}], "annotations": [region, thing], "categories": categories}
    assert coco_metrics(found, coco, {1: categories[0]})["AP50"] == pytest.approx(AP50)


def test_ap_per_class():
    """One class is found, one is found on another place, one has no objects; their mean without the last is AP."""
    box = [10, 10, 20, 20]
    objects = [{"id": i, "image_id": 1, "category_id": i, "bbox": box, "area": 400, "iscrowd": 0} for i in (3, 5)]
    categories = {1: {"id": 5, "name": "found"}, 2: {"id": 3, "name": "missed"}, 3: {"id": 4, "name": "absent"}}
    coco = {"images": [{"id": 1}], "annotations": objects, "categories": list(categories.values())}
    boxes = torch.tensor([[10.0, 10, 30, 30], [60, 60, 80, 80]])
    found = {1: {"boxes": boxes, "scores": torch.tensor([0.9, 0.8]), "labels": torch.tensor([1, 2])}}
    evaluation = coco_evaluation(found, coco, categories)
    assert ap_per_class(evaluation, categories) == pytest.approx({"found": 1, "missed": 0, "absent": -1})
    assert evaluation.stats[0] == pytest.approx(0.5)
    categories[2]["name"] = "found"
    assert ap_per_class(evaluation, categories) == pytest.approx({"found (id 5)": 1, "found (id 3)": 0, "absent": -1})


def test_text_of_the_numbers():
    """Numbers without objects are named instead of printed as -1; classes fill columns of the given width."""
    metrics = {**dict.fromkeys(METRICS, 0.25), "AP_L": -1.0, "AR_L": -1.0, "AP_per_class": {}}
    line = format_metrics(metrics)
    assert line.startswith("AP 0.250  AP50 0.250") and line.endswith("AR_M 0.250  (no such objects: AP_L, AR_L)")
    assert "no such" not in format_metrics({name: abs(metrics[name]) for name in METRICS})
    AP = {"dog": 0.1, "bird": -1.0, "cat": 0.5, "person": 0.3, "cow": -1.0}
    assert format_classes(AP, width=40) == (
        "cat      0.500    dog      0.100\nperson   0.300\nno such objects: bird, cow"
    )
    assert format_classes(dict.fromkeys(["bird", "cow"], -1.0)) == "no such objects: bird, cow"
    many = format_classes({f"class {number}": number / 100 for number in range(80)})
    assert len(many.splitlines()) <= 20 and max(map(len, many.splitlines())) <= 100


def test_both_scorers_agree(monkeypatch):
    """Detections of every quality, in a crowd too: the numbers of faster-coco-eval are those of pycocotools."""
    faster = pytest.importorskip("faster_coco_eval")
    torch.manual_seed(0)
    detections, coco, categories = random_detections(images=20, each=50, boxes=7)
    for annotation in coco["annotations"][::5]:
        annotation["iscrowd"] = 1
    numbers, classes = [], []
    for truth, scorer in ((faster.COCO, faster.COCOeval_faster), (COCO, COCOeval)):
        monkeypatch.setattr(evaluation, "COCO", truth)
        monkeypatch.setattr(evaluation, "COCOeval", scorer)
        scored = coco_evaluation(detections, copy.deepcopy(coco), categories)
        numbers.append(dict(zip(METRICS, scored.stats.tolist())))
        classes.append(ap_per_class(scored, categories))
    assert classes[0] == pytest.approx(classes[1], abs=1e-12)
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-12) and 0 < numbers[1]["AP"] < numbers[1]["AP50"] < 1


def test_limit_and_batches(truth):
    """The first images only, whatever the batch size; the detector is left in eval mode."""
    dataset, perfect = truth
    dataset.transforms = augmentation(train=False)

    class Perfect(torch.nn.Module):
        seen = 0

        def forward(self, images):
            self.seen += len(images)
            return [perfect[index] for index in range(self.seen - len(images), self.seen)]

    detector = Perfect()
    metrics, detections = evaluate(detector, dataset, torch.device("cpu"), batch_size=2, limit=3)
    assert detector.seen == 3 and list(detections) == [0, 1, 2] and not detector.training
    assert metrics["AP"] == pytest.approx(1)


def test_a_signal_does_not_end_the_loading_processes(truth, monkeypatch):
    """Their parent finishes its evaluation, saves and ends them."""
    dataset, _ = truth

    def handlers(sample: dict) -> dict:
        return {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    dataset.transforms = lambda image, target: (torch.zeros(3, 8, 8), {**target, **handlers(target)})
    seen = []
    monkeypatch.setattr(evaluation, "detect", lambda detector, loader, device: seen.extend(t for _, t in loader))
    with pytest.raises(AttributeError):  # without detections
        evaluate(torch.nn.Identity(), dataset, torch.device("cpu"), batch_size=4, workers=1)
    ((target, *_),) = seen
    assert target[signal.SIGINT] == target[signal.SIGTERM] == signal.SIG_IGN
