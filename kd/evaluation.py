"""COCO metrics, and pictures of detections beside the ground truth.

Scored by faster-coco-eval where it is installed, which gives the same numbers ten times as fast, else by pycocotools.
"""

import contextlib
import io

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.utils import draw_bounding_boxes, make_grid
from tqdm import tqdm

from kd.processes import gather, rank

try:
    from faster_coco_eval import COCO
    from faster_coco_eval import COCOeval_faster as COCOeval
except ImportError:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

SCORER = COCO.__module__.split(".")[0]  # the package that scores

TILE = 128  # pixels of a picture in samples.png, at least; small ones are enlarged

METRICS = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L", "AR1", "AR10", "AR100", "AR_S", "AR_M", "AR_L")


@torch.inference_mode()
def detect(detector: nn.Module, loader: DataLoader, device: torch.device, name: str) -> dict[int, dict[str, Tensor]]:
    """Run a detector over a data set in float32; return its detections on the CPU by image id.

    Args:
        detector: a torchvision detector; left in eval mode.
        loader: yields (images, targets) with image_id in every target.
        device: where the detector is.
        name: shown on the progress bar.
    """
    detector.eval()
    detections = {}
    for images, targets in tqdm(loader, f"evaluating {name}", leave=False, disable=rank() > 0, dynamic_ncols=True):
        outputs = detector([image.to(device) for image in images])
        for target, output in zip(targets, outputs):
            detections[target["image_id"]] = {key: value.cpu() for key, value in output.items()}
    return detections


def coco_metrics(detections: dict[int, dict[str, Tensor]], coco: dict, categories: dict[int, dict]) -> dict[str, float]:
    """Return COCO's twelve numbers, each in 0..1, or -1 where no ground truth has that size.

    Args:
        detections: boxes [D, 4] xyxy pixels of the original image, scores [D], labels [D] by image id. Only these
            images count, also those without detections.
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
    with contextlib.redirect_stdout(io.StringIO()):  # both print their progress
        truth = COCO()
        truth.dataset = coco
        truth.createIndex()
        if len(rows) == 0:  # loadRes refuses an empty list
            return dict.fromkeys(METRICS, 0.0)
        evaluation = COCOeval(truth, truth.loadRes(rows), "bbox")
        evaluation.params.imgIds = sorted(detections)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(METRICS, evaluation.stats.tolist()))


def evaluate(
    detector: nn.Module, loader: DataLoader, device: torch.device, name: str = "detector"
) -> tuple[dict[str, float], dict[int, dict[str, Tensor]]]:
    """Return COCO's twelve numbers of a detector on a data set, and its detections by image id.

    Under torchrun each process brings its share of the images; all get the numbers of the whole.

    Args:
        detector: a torchvision detector.
        loader: its data set offers coco() and categories.
        device: where the detector is.
        name: shown on the progress bar.
    """
    detections = detect(detector, loader, device, name)
    detections = {image_id: found for share in gather(detections) for image_id, found in share.items()}
    dataset = getattr(loader.dataset, "dataset", loader.dataset)  # a Subset holds its whole
    return coco_metrics(detections, dataset.coco(), dataset.categories), detections


def draw_samples(
    dataset: Dataset, rows: list[dict[int, dict[str, Tensor]]], count: int = 6, threshold: float = 0.3
) -> Tensor:
    """Draw the first images of a data set: a row with the ground truth, then one for each detector.

    Args:
        dataset: yields (image [3, h, w] in 0..1, target) and offers categories.
        rows: per detector what `detect` returned.
        count: number of images.
        threshold: detections with a lower score are left out.

    Returns:
        [3, H, W], values in 0..1.
    """
    shown = [dataset[index] for index in range(min(count, len(dataset)))]
    height, width = (max(image.shape[axis] for image, _ in shown) for axis in (1, 2))
    zoom = max(1, TILE // max(height, width))
    tiles = []
    for detections in (None, *rows):
        for image, target in shown:
            boxes, labels = target["boxes"], target["labels"]
            if detections is not None:
                found = detections[target["image_id"]]
                keep = found["scores"] >= threshold
                boxes, labels = found["boxes"][keep], found["labels"][keep]
            names = [dataset.categories.get(label, {"name": "?"})["name"] for label in labels.tolist()]
            colors = [f"hsl({137 * label % 360}, 90%, 55%)" for label in labels.tolist()]
            tile = (image * 255).to(torch.uint8)
            tile = nn.functional.pad(tile, (0, width - tile.shape[2], 0, height - tile.shape[1]))
            tile = tile.repeat_interleave(zoom, dim=1).repeat_interleave(zoom, dim=2)
            if names:
                tile = draw_bounding_boxes(tile, zoom * boxes, names, colors=colors, fill_labels=True)
            tiles.append(tile)
    return make_grid(tiles, nrow=len(shown)).float() / 255
