"""COCO's metrics of a detector on a data set, and those of CrowdHuman and VOC on their own data.

COCO's are scored by faster-coco-eval where it is installed, which returns the same numbers ten times as fast, else by
pycocotools.
"""

import contextlib
import io
import math
from collections import Counter

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from kd.crowdhuman_metrics import CROWDHUMAN_METRICS, crowdhuman_metrics
from kd.data import collate
from kd.run.signals import ignore_signals
from kd.voc_metrics import VOC_METRICS, voc_metrics

try:
    from faster_coco_eval import COCO
    from faster_coco_eval import COCOeval_faster as COCOeval
except ImportError:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

SCORER = COCO.__module__.split(".")[0]  # the package that scores

METRICS = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L", "AR1", "AR10", "AR100", "AR_S", "AR_M", "AR_L")

# What is computed besides, by the format of the data: functions of the same arguments as coco_metrics.
OTHER_METRICS = {"crowdhuman": crowdhuman_metrics, "voc": voc_metrics}

Detections = dict[int, dict[str, Tensor]]  # by image id: boxes [D, 4] xyxy pixels of the image, scores [D], labels [D]


def evaluate(
    detector: nn.Module,
    dataset: Dataset,
    device: torch.device,
    *,
    batch_size: int,
    workers: int = 0,
    limit: int | None = None,
    name: str = "detector",
) -> tuple[dict, Detections]:
    """Return COCO's numbers of a detector on a data set, and its detections.

    Under torchrun every process runs on its share of the images, and all return the numbers of the whole.

    Args:
        detector: a torchvision detector; it is left in eval mode.
        dataset: as `kd.data.open_dataset` returns it.
        device: where the detector is.
        batch_size: images at a time.
        workers: data loading processes.
        limit: evaluate on the first images only.
        name: shown on the progress bar.

    Returns:
        COCO's twelve numbers by name, as from `coco_metrics`, those of OTHER_METRICS for this data, and "AP_per_class",
        as from `ap_per_class`; and the detections.
    """
    grouped = distributed.is_available() and distributed.is_initialized()
    rank, world_size = (distributed.get_rank(), distributed.get_world_size()) if grouped else (0, 1)
    share = Subset(dataset, range(rank, min(limit or len(dataset), len(dataset)), world_size))
    loader = DataLoader(share, batch_size, num_workers=workers, collate_fn=collate, worker_init_fn=ignore_signals)
    detections = detect(detector, tqdm(loader, name, leave=False, disable=rank > 0, dynamic_ncols=True), device)
    if world_size > 1:
        shares = [{}] * world_size
        distributed.all_gather_object(shares, detections)
        detections = {image_id: found for share in shares for image_id, found in share.items()}
    evaluation = coco_evaluation(detections, dataset.coco(), dataset.categories)
    metrics = dict(zip(METRICS, evaluation.stats.tolist()))
    if dataset.format in OTHER_METRICS:
        metrics |= OTHER_METRICS[dataset.format](detections, dataset.coco(), dataset.categories)
    return {**metrics, "AP_per_class": ap_per_class(evaluation, dataset.categories)}, detections


@torch.inference_mode()
def detect(detector: nn.Module, loader: DataLoader, device: torch.device) -> Detections:
    """Run a detector in float32 over a loader of (images, targets); return its detections on the CPU."""
    detector.eval()
    detections = {}
    for images, targets in loader:
        outputs = detector([image.to(device) for image in images])
        for target, output in zip(targets, outputs):
            detections[target["image_id"]] = {key: value.cpu() for key, value in output.items()}
    return detections


def coco_metrics(detections: Detections, coco: dict, categories: dict[int, dict]) -> dict[str, float]:
    """Return COCO's twelve numbers, in 0..1, or -1 without objects of that size; arguments of `coco_evaluation`."""
    return dict(zip(METRICS, coco_evaluation(detections, coco, categories).stats.tolist()))


def coco_evaluation(detections: Detections, coco: dict, categories: dict[int, dict]) -> COCOeval:
    """Return the evaluation of detections, with its numbers summarised.

    Args:
        detections: only these images count, including those without detections.
        coco: ground truth in COCO's format.
        categories: COCO category of each label; detections of other labels are dropped.
    """
    boxes, scores, labels = (
        np.concatenate([found[name].double().numpy() for found in detections.values()])
        for name in ("boxes", "scores", "labels")
    )
    image_ids = np.repeat(list(detections), [len(found["scores"]) for found in detections.values()])
    known = np.isin(labels, list(categories))
    category_ids = [categories[label]["id"] for label in labels[known].tolist()]
    extents = boxes[:, 2:] - boxes[:, :2]
    rows = np.column_stack([image_ids, boxes[:, :2], extents, scores])[known]
    rows = np.column_stack([rows, category_ids])
    with contextlib.redirect_stdout(io.StringIO()):  # both packages print their progress
        truth = index(coco)
        found = truth.loadRes(rows) if len(rows) else index({**coco, "annotations": []})  # loadRes rejects no rows
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.imgIds = sorted(detections)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def index(coco: dict) -> COCO:
    """Return annotations in COCO's format as the scorer's object."""
    indexed = COCO()
    indexed.dataset = coco
    indexed.createIndex()
    return indexed


def ap_per_class(evaluation: COCOeval, categories: dict[int, dict]) -> dict[str, float]:
    """Return the AP of each class by its name, -1 for a class without objects; equal names are told apart by id.

    Args:
        evaluation: from `coco_evaluation`.
        categories: COCO category of each label.
    """
    # IoU thresholds x recalls x classes, of objects of any size and 100 detections; all -1 for a class without objects.
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    AP = dict(zip(evaluation.params.catIds, precision.mean(axis=(0, 1)).tolist()))
    times = Counter(category["name"] for category in categories.values())
    return {
        c["name"] if times[c["name"]] == 1 else f"{c['name']} (id {c['id']})": AP[c["id"]] for c in categories.values()
    }


def names_in(metrics: dict) -> list[str]:
    """Return the names of the numbers over all classes, in the order in which they are shown."""
    return [name for name in (*METRICS, *CROWDHUMAN_METRICS, *VOC_METRICS) if name in metrics]


def format_metrics(metrics: dict) -> str:
    """Return the numbers over all classes as one line, which ends with the names of those without objects."""
    absent = [name for name in names_in(metrics) if metrics[name] < 0]
    numbers = [f"{name} {metrics[name]:.3f}" for name in names_in(metrics) if name not in absent]
    return "  ".join([*numbers, *([f"(no such objects: {', '.join(absent)})"] if absent else [])])


def format_evaluation(metrics: dict) -> str:
    """Return the numbers over all classes, a line each, and the AP of each class."""
    names = names_in(metrics)
    width = max(6, *map(len, names))
    lines = [f"{n:{width}}{metrics[n]:8.3f}" if metrics[n] >= 0 else f"{n:{width}}  no such objects" for n in names]
    return "\n".join([*lines, "", "AP per class", format_classes(metrics["AP_per_class"])])


def format_classes(AP: dict[str, float], width: int = 100) -> str:
    """Return the AP of classes as columns of text, the best first; classes without objects form the last line.

    Args:
        AP: by class, from `ap_per_class`.
        width: of a line, in characters.
    """
    names = sorted((name for name in AP if AP[name] >= 0), key=lambda name: -AP[name])
    longest = max(map(len, names), default=0)
    cells = [f"{name:{longest}}{AP[name]:8.3f}" for name in names]
    rows = math.ceil(len(cells) / max(width // (longest + 12), 1))
    lines = ["    ".join(cells[row::rows]) for row in range(rows)]
    absent = [name for name in AP if AP[name] < 0]
    return "\n".join([*lines, *([f"no such objects: {', '.join(absent)}"] if absent else [])])
