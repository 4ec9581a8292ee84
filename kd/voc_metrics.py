"""PASCAL VOC's AP at IoU 0.5, averaged over classes: over 11 points of recall (2007) and as an area (since 2010).

Everingham et al., The PASCAL Visual Object Classes Challenge, IJCV 2010; VOCevaldet.m and VOCap.m of its development
kit. Detections of a class are taken by falling score. Each belongs to the object of its image and class with which it
has the highest IoU, found before or not. It is right if that IoU is at least 0.5 and the object was not found before,
it does not count if the object is difficult, and else it is wrong. Difficult objects need not be found.

COCO's AP50 differs: a detection may take the next best object, difficult ones are treated as crowd regions, and
precision is averaged over 101 points of recall.
"""

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

VOC_METRICS = ("VOC_AP50", "VOC07_AP50")  # area, 11 points
THRESHOLD = 0.5


def voc_metrics(detections: dict[int, dict[str, Tensor]], coco: dict, categories: dict[int, dict]) -> dict[str, float]:
    """Return VOC_METRICS in 0..1, or -1 without objects.

    Args:
        detections: by image id: boxes [D, 4] xyxy pixels, scores [D], labels [D]. Only these images count.
        coco: ground truth in COCO's format; crowd regions are the difficult objects.
        categories: COCO category of each label.
    """
    label_of = {category["id"]: label for label, category in categories.items()}
    things = defaultdict(list)
    for thing in coco["annotations"]:
        things[thing["image_id"], label_of[thing["category_id"]]].append(thing)
    counts = dict.fromkeys(categories, 0)  # of the objects that must be found
    scores, hits = ({label: [np.zeros(0)] for label in categories} for _ in range(2))
    for image_id, found in detections.items():
        for label in categories:
            own = things[image_id, label]
            counts[label] += sum(not thing["iscrowd"] for thing in own)
            chosen = found["labels"] == label
            if chosen.any():
                order = found["scores"][chosen].argsort(descending=True, stable=True)
                boxes = torch.tensor([thing["bbox"] for thing in own], dtype=torch.float64).reshape(-1, 4)
                boxes = box_convert(boxes, "xywh", "xyxy")
                difficult = np.array([thing["iscrowd"] for thing in own], dtype=bool)
                hits[label].append(match(found["boxes"][chosen][order].double(), boxes, difficult))
                scores[label].append(found["scores"][chosen][order].double().numpy())
    curves = []
    for label in categories:
        if counts[label]:
            order = np.argsort(-np.concatenate(scores[label]), kind="stable")
            hit = np.concatenate(hits[label])[order]
            hit = hit[~np.isnan(hit)]
            true = hit.cumsum()
            curves.append((true / counts[label], true / np.arange(1, len(hit) + 1)))
    means = [np.mean([ap(*curve) for curve in curves]) if curves else -1 for ap in (area, eleven_points)]
    return dict(zip(VOC_METRICS, map(float, means)))


def match(found: Tensor, boxes: Tensor, difficult: np.ndarray) -> np.ndarray:
    """Return for each detection 1 if it is right, 0 if it is wrong, NaN if it does not count.

    Args:
        found: detections [D, 4] of a class in an image, xyxy pixels, by falling score.
        boxes: objects [M, 4] of the class.
        difficult: which of them are [M].
    """
    hits = np.zeros(len(found))
    if len(boxes):
        taken = np.zeros(len(boxes), dtype=bool)
        best, index = box_iou(found, boxes).max(dim=1)
        for position in np.flatnonzero(best.numpy() >= THRESHOLD):
            thing = index[position]
            hits[position] = np.nan if difficult[thing] else not taken[thing]
            taken[thing] = True
    return hits


def area(recall: np.ndarray, precision: np.ndarray) -> float:
    """Return the area under the curve, after each precision was raised to the highest at its recall or above."""
    raised = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0) * raised).sum())


def eleven_points(recall: np.ndarray, precision: np.ndarray) -> float:
    """Return the mean over the recalls 0, 0.1, ..., 1 of the highest precision at that recall or above."""
    return float(np.mean([precision[recall >= point].max(initial=0) for point in np.arange(11) / 10]))
