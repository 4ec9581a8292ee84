"""COCO's metrics of a detector on a data set.

Scored by faster-coco-eval where it is installed, which returns the same numbers ten times as fast, else by pycocotools.
"""

import contextlib
import io

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from kd.data import collate

try:
    from faster_coco_eval import COCO
    from faster_coco_eval import COCOeval_faster as COCOeval
except ImportError:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

SCORER = COCO.__module__.split(".")[0]  # the package that scores

METRICS = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L", "AR1", "AR10", "AR100", "AR_S", "AR_M", "AR_L")

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
) -> tuple[dict[str, float], Detections]:
    """Return COCO's twelve numbers of a detector on a data set, and its detections.

    Under torchrun every process runs on its share of the images, and all return the numbers of the whole.

    Args:
        detector: a torchvision detector; it is left in eval mode.
        dataset: as `kd.data.open_dataset` returns it.
        device: where the detector is.
        batch_size: images at a time.
        workers: data loading processes.
        limit: evaluate on the first images only.
        name: shown on the progress bar.
    """
    grouped = distributed.is_available() and distributed.is_initialized()
    rank, world_size = (distributed.get_rank(), distributed.get_world_size()) if grouped else (0, 1)
    share = Subset(dataset, range(rank, min(limit or len(dataset), len(dataset)), world_size))
    loader = DataLoader(share, batch_size, num_workers=workers, collate_fn=collate)
    detections = detect(detector, tqdm(loader, name, leave=False, disable=rank > 0, dynamic_ncols=True), device)
    if world_size > 1:
        shares = [{}] * world_size
        distributed.all_gather_object(shares, detections)
        detections = {image_id: found for share in shares for image_id, found in share.items()}
    return coco_metrics(detections, dataset.coco(), dataset.categories), detections


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
    """Return COCO's twelve numbers, in 0..1, or -1 without ground truth of that size; all 0 without detections.

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
        truth = COCO()
        truth.dataset = coco
        truth.createIndex()
        if len(rows) == 0:  # loadRes rejects an empty list
            return dict.fromkeys(METRICS, 0.0)
        evaluation = COCOeval(truth, truth.loadRes(rows), "bbox")
        evaluation.params.imgIds = sorted(detections)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(METRICS, evaluation.stats.tolist()))
