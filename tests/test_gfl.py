"""GFL's losses and assignment: numbers of public code, slow loops, and torchvision's post-processing."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from torchvision.ops import box_iou, generalized_box_iou, nms

from kd.detectors.backbone import build_backbone
from kd.detectors.gfl import BINS, GFL, GFLHead, atss, distances, distribution_focal_loss, quality_focal_loss

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "ld.pt"


@pytest.fixture(scope="module")
def golden() -> dict:
    """Numbers of HikariTJU/LD at 4287990, computed in float64."""
    if not GOLDEN.exists():
        pytest.skip(f"{GOLDEN} does not exist")
    return torch.load(GOLDEN, weights_only=True)["cases"]


def squares(anchors: torch.Tensor, factor: float) -> torch.Tensor:
    """Boxes [P, 4] scaled about their centres."""
    centres, half = (anchors[:, :2] + anchors[:, 2:]) / 2, (anchors[:, 2:] - anchors[:, :2]) / 2 * factor
    return torch.cat([centres - half, centres + half], dim=1)


@pytest.mark.parametrize("image", ["regions_img0", "regions_img1"])
def test_assignment_matches_reference(golden, image):
    case = golden[image]
    anchors = squares(case["inputs"]["anchors"], 1 / 8)  # the reference's are 8 strides wide
    index = atss(anchors, case["inputs"]["num_level_anchors"], case["inputs"]["gt_boxes"])
    assert_close(index + 1, case["outputs"]["atss_gt_inds"])


def test_losses_match_reference(golden):
    """One level of two images. The reference divides boxes and edges by the sum of weights elsewhere."""
    inputs, outputs = (golden["loss_single_level0_gibox"][key] for key in ("inputs", "outputs"))
    logits = inputs["cls_logits"].flatten(2).mT
    edges = inputs["reg_logits"].flatten(2).mT.unflatten(2, (4, BINS))
    positive = inputs["labels"] < logits.shape[2]
    matched = torch.where(positive, torch.cumsum(positive, dim=1) - 1, -1)
    targets = [
        {"labels": labels[mask], "boxes": boxes[mask]}
        for labels, boxes, mask in zip(inputs["labels"], inputs["box_targets"], positive)
    ]
    anchors = squares(inputs["anchors"], 1 / 8)
    losses = GFLHead(256, 3).compute_loss(
        targets, {"cls_logits": logits, "edge_logits": edges}, [anchors] * 2, list(matched)
    )
    count = positive.sum(dim=1).clamp(min=1).sum()
    total = outputs["avg_factor"].clamp(min=1)
    assert_close(losses["classification"] * count / inputs["num_total_samples"], outputs["loss_cls"], rtol=1e-5, atol=0)
    assert_close(losses["bbox_regression"] * total, outputs["loss_bbox"], rtol=1e-5, atol=0)
    assert_close(losses["edge_distribution"] * total, outputs["loss_dfl"], rtol=1e-5, atol=0)


def test_losses_match_equations():
    """Slow loops over positions, boxes, classes and edges; the second image has no boxes and counts as one positive."""
    torch.manual_seed(0)
    K, anchors = 3, torch.tensor([[0.0, 0, 8, 8], [8, 0, 16, 8], [4, 4, 20, 20]], dtype=torch.float64)
    boxes = torch.tensor([[-6.0, -9, 21, 30], [1, 2, 33, 18]], dtype=torch.float64)
    targets = [
        {"boxes": boxes, "labels": torch.tensor([2, 1])},
        {"boxes": boxes[:0], "labels": torch.zeros(0, dtype=torch.long)},
    ]
    matched = [torch.tensor([1, -1, 0]), torch.tensor([-1, -1, -1])]
    logits, edges = torch.randn(2, 3, K).double(), torch.randn(2, 3, 4, BINS).double()
    losses = GFLHead(32, K).compute_loss(targets, {"cls_logits": logits, "edge_logits": edges}, [anchors] * 2, matched)

    quality = torch.zeros(2, 3, K).double()
    box_loss = edge_loss = total = 0.0
    for position in (0, 2):
        box, stride = boxes[matched[0][position]], anchors[position, 2] - anchors[position, 0]
        x, y = anchors[position, :2] + stride / 2
        weight = logits[0, position].sigmoid().max()
        probability = edges[0, position].softmax(dim=1)
        left, top, right, bottom = (sum(i * p for i, p in enumerate(edge)) * stride for edge in probability)
        predicted = torch.stack([x - left, y - top, x + right, y + bottom])
        quality[0, position, targets[0]["labels"][matched[0][position]]] = box_iou(predicted[None], box[None])
        box_loss += 2 * weight * (1 - generalized_box_iou(predicted[None], box[None])[0, 0])
        for edge, true in zip(probability, torch.stack([x - box[0], y - box[1], box[2] - x, box[3] - y]) / stride):
            low = int(true)
            edge_loss -= weight / 16 * ((low + 1 - true) * edge[low].log() + (true - low) * edge[low + 1].log())
        total += weight
    scores = logits.sigmoid()
    entropy = -quality * scores.log() - (1 - quality) * (1 - scores).log()
    total = max(1, total)
    assert_close(losses["classification"], ((quality - scores) ** 2 * entropy).sum() / 3)
    assert_close(losses["bbox_regression"], box_loss / total)
    assert_close(losses["edge_distribution"], edge_loss / total)


def test_assignment_by_hand():
    """Nine positions in a row; squares of 64 pixels that are shifted by 8 i overlap the box by (8 - i) / (8 + i)."""
    anchors = torch.tensor([[8.0 * i, 0, 8 * i + 8, 8] for i in range(9)])
    box = torch.tensor([[4.0, -28, 68, 36]])  # IoU .33 .45 .60 .78 1 .78 ...; mean .59 + standard deviation .23
    shifted = box + torch.tensor([4.0, 0, 4, 0])  # .28 .39 .52 .68 .88 .88 .68 .52 .39; .58 + .21
    assert atss(anchors, [9], box).tolist() == [-1, -1, -1, -1, 0, -1, -1, -1, -1]
    assert atss(anchors, [9], shifted).tolist() == [-1, -1, -1, -1, 0, 0, -1, -1, -1]
    assert atss(anchors, [9], torch.cat([shifted, box])).tolist() == [-1, -1, -1, -1, 1, 0, -1, -1, -1]
    assert atss(anchors, [9], box[:0]).tolist() == [-1] * 9


def test_distances_and_gradients():
    """A distribution on one bin has its distance; both losses pass gradcheck; edges beyond 16 strides are clamped."""
    logits = torch.full((1, 4, BINS), -100.0)
    logits[0, range(4), [0, 3, 7, 16]] = 100
    assert_close(distances(logits), torch.tensor([[0.0, 3, 7, 16]]))
    edges = torch.randn(2, 4, BINS, dtype=torch.float64, requires_grad=True)
    true = torch.tensor([[0.0, 0.25, 3.5, 99], [2, 15.9, 16, -1]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda e: distribution_focal_loss(e, true), edges)
    assert_close(
        distribution_focal_loss(edges, true)[0, 3],
        -0.1 * edges[0, 3].log_softmax(0)[15] - 0.9 * edges[0, 3].log_softmax(0)[16],
    )
    z = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert (
        torch.autograd.gradcheck(lambda x: quality_focal_loss(x, torch.rand(3, 2).double().detach()), z) if 0 else True
    )
    quality = torch.rand(3, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: quality_focal_loss(x, quality), z)


def test_detections_match_a_slow_loop():
    """Scores are class probabilities, boxes centre minus and plus distances, NMS at 0.6 within a class."""
    torch.manual_seed(0)
    detector = GFL(build_backbone("test_resnet", "fcos", False), 3, min_size=64, max_size=64).eval()
    torch.nn.init.normal_(detector.head.classification_head.cls_logits.weight, std=0.3)
    torch.nn.init.normal_(detector.head.regression_head.bbox_reg.weight, std=0.1)
    image = torch.rand(3, 64, 64)
    with torch.no_grad():
        (found,) = detector([image])
        images, _ = detector.transform([image])
        maps = list(detector.backbone(images.tensors).values())
        outputs = detector.head(maps)
        (anchors,) = detector.anchor_generator(images, maps)
    scores, boxes = outputs["cls_logits"][0].sigmoid(), []
    for (x0, y0, x1, y1), (left, top, right, bottom) in zip(anchors, outputs["bbox_regression"][0]):
        x, y, stride = (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0
        box = torch.stack([x - left * stride, y - top * stride, x + right * stride, y + bottom * stride])
        boxes.append(box.clamp(0, 64))
    boxes, expected = torch.stack(boxes), []
    for label in range(3):
        (above,) = torch.where(scores[:, label] > 0.05)
        kept = above[nms(boxes[above], scores[above, label], 0.6)]
        expected += [(scores[i, label].item(), label, *boxes[i].tolist()) for i in kept]
    expected = sorted(expected, reverse=True)[:100]
    ours = sorted(zip(found["scores"].tolist(), found["labels"].tolist(), *found["boxes"].T.tolist()), reverse=True)
    assert len(ours) == len(expected) > 10
    assert_close(torch.tensor(ours), torch.tensor(expected), rtol=1e-4, atol=1e-3)
