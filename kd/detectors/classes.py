"""Give a trained detector the classes of another data set, matched by name."""

import torch
from torch import nn

NEVER = -100.0  # logit of a class that is never predicted


def num_classes(detector: nn.Module) -> int:
    """Return the number of classes of a detector, background included."""
    if hasattr(detector, "roi_heads"):
        return detector.roi_heads.box_predictor.cls_score.out_features
    return detector.head.classification_head.num_classes


def match_classes(detector: nn.Module, known: dict[int, str], wanted: dict[int, str]) -> list[str]:
    """Rearrange the class outputs of a detector for the labels of a data set.

    Label 0, the background, keeps its output. A label without a class, such as the gaps in COCO's ids, or with a class
    that the detector does not know, gets weights 0 and the logit -100.

    Args:
        detector: is changed, unless it has these labels already.
        known: name of each label of the detector.
        wanted: name of each label of the data set.

    Returns:
        The wanted names that the detector does not know.
    """
    if known == wanted and num_classes(detector) == max(wanted) + 1:
        return []
    labels = {name: label for label, name in known.items()}
    rows = [0, *(labels.get(wanted.get(label)) for label in range(1, max(wanted) + 1))]
    classes = num_classes(detector)
    if hasattr(detector, "roi_heads"):
        predictor = detector.roi_heads.box_predictor
        take_classes(predictor.cls_score, rows, classes, NEVER)
        take_classes(predictor.bbox_pred, rows, classes, 0.0)
    else:
        head = detector.head.classification_head
        take_classes(head.cls_logits, rows, classes, NEVER, head.num_anchors)
        head.num_classes = len(rows)
    return sorted(set(wanted.values()) - labels.keys())


@torch.no_grad()
def take_classes(
    layer: nn.Conv2d | nn.Linear, rows: list[int | None], classes: int, empty: float, anchors: int = 1
) -> None:
    """Rearrange the outputs of a layer, which are ordered by anchor, then class, then value.

    Args:
        layer: with anchors * classes * values outputs; is changed.
        rows: for each new class the old one, None for an output of `empty` everywhere.
        classes: old number.
        empty: bias of new outputs.
        anchors: number of anchors per position.
    """
    for name, fill in (("weight", 0.0), ("bias", empty)):
        old = getattr(layer, name).view(anchors, classes, -1, *getattr(layer, name).shape[1:])
        new = old.new_full((anchors, len(rows), *old.shape[2:]), fill)
        for label, row in enumerate(rows):
            if row is not None:
                new[:, label] = old[:, row]
        setattr(layer, name, nn.Parameter(new.flatten(0, 2)))
    setattr(layer, "out_channels" if isinstance(layer, nn.Conv2d) else "out_features", len(layer.bias))
