"""CrowdHuman's AP, MR^-2 and JI of persons at IoU 0.5.

Shao et al., CrowdHuman: A Benchmark for Detecting Human in a Crowd, 2018, https://arxiv.org/abs/1805.00123; JI is from
Chu et al., Detection in Crowded Scenes, CVPR 2020, https://arxiv.org/abs/2003.09163. Details are those of its code,
https://github.com/xg-chu/CrowdDet, lib/evaluate:

    AP = area under the curve of precision over recall, by trapezoids, from the most certain detection on      (1)
    MR^-2 = exp(mean_f log(miss rate at f false positives per image)), f = 0.01 .. 1                           (2)
    JI = max_t mean_images k / (m + n - k), with detections of a score above t = 0, 0.1, .. 0.9                (3)

Where:
    k: pairs in the matching of detections and persons with the highest sum of IoUs, each of them above 0.5
    n, m: detections and persons of an image, without those that are not matched and lie in an ignored box

A box lies in an ignored box if more than half of its area does. For (1) and (2) detections take persons by falling
score; one without a person does not count if it lies in an ignored box. A lower MR^-2 is better.

CrowdDet also counts persons outside of the image, as boxes of a pixel at its edge; `CocoFolder` leaves them out.
"""

import numpy as np
import torch
from torchvision.ops import box_iou

CROWDHUMAN_METRICS = ("CrowdHuman_AP", "CrowdHuman_MR", "CrowdHuman_JI")
THRESHOLD = 0.5  # of IoU, and of the part of an area that lies in an ignored box
FALSE_POSITIVES = (0.01, 0.0178, 0.0316, 0.0562, 0.1, 0.1778, 0.3162, 0.5623, 1.0)  # per image
LOWEST_SCORES = tuple(step / 10 for step in range(10))


def crowdhuman_metrics(detections: dict[int, dict], coco: dict, categories: dict[int, dict]) -> dict[str, float]:
    """Return CROWDHUMAN_METRICS in 0..1, or -1 without persons.

    Args:
        detections: by image id: boxes [D, 4] xyxy pixels, scores [D], labels [D]. Only these images count.
        coco: ground truth in COCO's format with a single category; crowd regions are the ignored boxes.
        categories: COCO category of each label.
    """
    size = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
    truth = {image_id: ([], []) for image_id in size}
    for thing in coco["annotations"]:
        x, y, w, h = thing["bbox"]
        truth[thing["image_id"]][thing["iscrowd"]].append((x, y, x + w, y + h))
    persons, scores, hits, indices = 0, [], [], []
    for image_id, found in detections.items():
        known = np.isin(found["labels"].numpy(), list(categories))
        score = found["scores"].double().numpy()[known]
        order = np.argsort(-score, kind="stable")
        boxes = clip(found["boxes"].double().numpy()[known][order], size[image_id])
        people, ignored = (clip(np.array(kind, dtype=float).reshape(-1, 4), size[image_id]) for kind in truth[image_id])
        iou = box_iou(torch.from_numpy(boxes), torch.from_numpy(people)).numpy()
        iou, in_ignored = np.where(iou > THRESHOLD, iou, 0), inside(boxes, ignored)
        persons += len(people)
        scores.append(score[order])
        hits.append(match(iou, in_ignored))
        indices.append(jaccard(iou, in_ignored, inside(people, ignored), score[order]))
    if persons == 0:
        return dict.fromkeys(CROWDHUMAN_METRICS, -1.0)
    hit = np.concatenate(hits)[np.argsort(-np.concatenate(scores), kind="stable")]
    hit = hit[~np.isnan(hit)]
    JI = (np.nansum(indices, axis=0) / np.isfinite(indices).sum(axis=0).clip(1)).max()  # (3)
    return dict(zip(CROWDHUMAN_METRICS, map(float, (*ap_and_mr(hit, persons, len(detections)), JI))))


def ap_and_mr(hit: np.ndarray, persons: int, images: int) -> tuple[float, float]:
    """Return AP and MR^-2 from hit: 1 or 0, whether each detection is right, by falling score."""
    if len(hit) == 0:
        return 0.0, 1.0
    true, false = hit.cumsum(), (1 - hit).cumsum()
    recall, precision = true / persons, true / (true + false)
    AP = ((precision[1:] + precision[:-1]) / 2 * np.diff(recall)).sum()  # (1)
    first = np.searchsorted(false / images, FALSE_POSITIVES).clip(max=len(hit) - 1)
    with np.errstate(divide="ignore"):  # the logarithm of a miss rate of 0 makes MR 0
        return AP, np.exp(np.log(1 - recall[first]).mean())  # (2)


def match(iou: np.ndarray, in_ignored: np.ndarray) -> np.ndarray:
    """Return for each detection 1 if it is right, 0 if it is wrong, NaN if it does not count.

    Args:
        iou: of detections, by falling score, and persons [D, M]; 0 where it is at most THRESHOLD.
        in_ignored: whether each detection lies in an ignored box [D].
    """
    hits, iou = np.where(in_ignored, np.nan, 0.0), iou.copy()
    for row in range(len(iou)):
        if iou[row].any():
            hits[row] = 1
            iou[:, iou[row].argmax()] = 0  # the person is taken
    return hits


def jaccard(iou: np.ndarray, in_ignored: np.ndarray, person_in_ignored: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Return k / (m + n - k) of an image for each of LOWEST_SCORES, NaN where m = n = 0; see `match`."""
    owner, row, result = np.full(iou.shape[1], -1), 0, np.full(len(LOWEST_SCORES), np.nan)
    for index, lowest in reversed(list(enumerate(LOWEST_SCORES))):
        while row < len(score) and score[row] > lowest:
            add_row(owner, row, iou)
            row += 1
        matched = np.isin(np.arange(row), owner)
        k, n = matched.sum(), (matched | ~in_ignored[:row]).sum()
        m = ((owner >= 0) | ~person_in_ignored).sum()
        if m + n:
            result[index] = k / (m + n - k + 1e-6)  # the reference's epsilon
    return result


def add_row(owner: np.ndarray, row: int, weights: np.ndarray) -> None:
    """Add a row to a bipartite matching of the highest weight, and keep it the highest.

    The new matching differs by one alternating path: the row takes a column, its previous owner takes another one, and
    so on, until a column is free or an owner goes without. The best path is found as by Bellman and Ford.

    Args:
        owner: row of each column [M], -1 for none; is changed.
        row: a row that has not been added.
        weights: of pairs [D, M], 0 for those that are not allowed.
    """
    taken = np.flatnonzero(owner >= 0)
    lost = weights[owner[taken], taken]
    gain = np.where(weights[row] > 0, weights[row], -np.inf)  # of the best path to each column
    before = np.full(len(owner), -1)  # the column before it on that path
    for _ in taken:
        passed = weights[owner[taken]]
        paths = np.where(passed > 0, (gain[taken] - lost)[:, None] + passed, -np.inf)
        best = paths.max(axis=0)
        better = best > gain + 1e-9
        if not better.any():
            break
        before[better], gain[better] = taken[paths.argmax(axis=0)][better], best[better]
    gain[taken] -= lost  # the last owner goes without
    if len(gain) and gain.max() > 0:
        column = gain.argmax()
        while column >= 0:
            owner[column] = owner[before[column]] if before[column] >= 0 else row
            column = before[column]


def clip(boxes: np.ndarray, size: tuple[float, float]) -> np.ndarray:
    """Return boxes [B, 4], xyxy pixels, clipped to an image of (width, height); the left edge to width - 1 at most."""
    w, h = size
    return boxes.clip(0, (w - 1, h - 1, w, h))


def inside(boxes: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """Return whether each box [A, 4] has more than half of its area in one of the ignored boxes [B, 4]."""
    low, high = np.maximum(boxes[:, None, :2], ignored[:, :2]), np.minimum(boxes[:, None, 2:], ignored[:, 2:])
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return ((high - low).clip(0).prod(axis=2) > THRESHOLD * area[:, None]).any(axis=1)
