"""The benchmark's instruments on steps whose cost is known."""

import pytest
import torch

from kd.features import DetectorOutput
from kd.tools import benchmark

CPU = torch.device("cpu")


def test_memory_is_the_peak():
    """1 MiB and 2 MiB at once, 4 MiB after they are gone: 4 MiB. What was there before does not count."""
    before = torch.zeros(2**20)

    def step():
        x = torch.zeros(2**18)
        y = torch.cat([x, x])
        del x, y
        before.new_zeros(2**20)

    assert benchmark.peak_memory(step, CPU) == pytest.approx(4 / 1024, rel=0.01)


def test_flops_are_those_of_products():
    """[3, 5] times [5, 7]: 2 * 105; its backward by both factors twice that."""
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    assert benchmark.count_flops(lambda: (a @ b).sum().backward()) == 3 * 2 * 105


def test_leaves_are_detached():
    weight = torch.ones(1, requires_grad=True)
    output = benchmark.as_leaves(DetectorOutput(fpn=[weight * torch.ones(1, 2, 3, 3)]))
    output.fpn[0].sum().backward()
    assert weight.grad is None and output.fpn[0].grad.sum() == 18 and output.cls_logits is None


def test_batches_are_as_asked_for():
    case = {"size": "40x60", "batch_size": 3, "boxes": 50, "classes": 4}
    images, targets = benchmark.random_batch(case, CPU)
    assert [image.shape for image in images] == [(3, 40, 60)] * 3 and len(targets) == 3
    boxes, labels = (torch.cat([target[name] for target in targets]) for name in ("boxes", "labels"))
    assert len(boxes) == 150 and boxes.min() >= 0 and (boxes[:, 2:].amax(dim=0) <= torch.tensor([60, 40])).all()
    assert (boxes[:, 2:] - boxes[:, :2]).min() > 0 and set(labels.tolist()) == {1, 2, 3}
    assert benchmark.sides_of("640") == (640, 640)


def test_photographs_open(tmp_path):
    folder = benchmark.write_photographs(tmp_path, count=2)
    image, target = folder[1]
    assert image.shape == (3, 480, 640) and len(target["boxes"]) == 1


def test_table(capsys):
    """A line for each method that serves the detector; without boxes too."""
    words = "--teacher test_resnet --student test_resnet --image-size 64x48 --batch-size 1 --repeats 1 --boxes 0 2"
    methods = "--detectors faster_rcnn --methods l2 pgd --device cpu"
    benchmark.main(benchmark.parse_args([*words.split(), *methods.split()]))
    header, *lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[:6] for line in lines] == [["l2", "faster_rcnn", "64x48", "1", n, "91"] for n in ("0", "2")]
    assert all(float(number) > 0 for line in lines for number in line.split()[6:])
