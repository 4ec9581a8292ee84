"""DRKD: "Dual Relation Knowledge Distillation for Object Detection", IJCAI 2023, https://arxiv.org/abs/2302.05637.

Compared position by position, feature maps let the background drown the objects, small ones first, and say nothing of
how the parts of an image relate. DRKD compares features after they were related. Pixels: a graph-reasoning unit (GloRe)
gathers a level's positions into d nodes, lets the nodes exchange information and spreads the result back. Instances:
the objects of an image, pooled to 3x3, attend to each other, so small ones profit from what they share with large ones.
A third term imitates the pooled objects as they are. With ||.|| the square root of a sum of squares:

    unit_l(x)   = x + norm(extend(mix_states(relu(v + mix_nodes(v))) nodes(x)))           v = states(x) nodes(x)^T
    relate_l(s) = s + extend(P g(s))      P = softmax over each row of (theta(s) phi(s)^T * filter(s)), [n, n]

    pixel    = l1 * sum_l       || adapter_l(unit_student_l(student_l)) - unit_teacher_l(teacher_l) ||
    relation = l2 * sum_{l<2,n} || adapter_l(relate_student_l(s_l[n]))  - relate_teacher_l(t_l[n])  ||
    instance = l3 * sum_{l<2,n} || adapter_l(s_l[n]) - t_l[n] ||           s_l[n], t_l[n]: image n's objects on level l

Norms are neither squared nor averaged, and run over each process's own images: the pixel norm grows with the root of
their number, the other two with the number, and the instance norm with the root of the objects in each. Units, the
teacher's too, and adapters train with the student and are dropped afterwards (instance units: 43 million parameters).
Both sides could agree on cancelling what is hard to match; only the instance term has a fixed target: watch all three.

Reference code: https://github.com/nizhenliang/Dual-Relation-Knowledge-Distillation at 78ea05b (two_stage.py, GloRe.py;
single_stage.py does not run). Where it is at odds with the paper or itself:
- The paper has a mean of squares for pixels and compares the matrices P (`relation="matrices"`, without a published
  weight); the code has norms, which its weights belong to, and compares related features. So does this file.
- The code makes the filter's layer anew at every step, so it is random and never trained. Here its 64 outputs belong to
  the objects in order of area, largest first, as in lines that the code has commented out; the 65th is not related.
- The code pools the boxes of all images from the first image of the batch. Here they are pooled from their own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torchvision.ops import roi_align

# (l1, l2, l3) of the reference code, for dense detectors partly in commented-out lines.
WEIGHTS = {"retinanet": (4e-3, 5e-3, 6e-3), "fcos": (4e-3, 5e-3, 6e-3), "faster_rcnn": (1e-3, 4e-3, 2.4e-3)}
NODES = (64, 64, 256, 256, 256)  # d of each level, finest first, reference code
MAX_RELATED = 64  # objects of an image, our reading


def largest_first(boxes: Tensor) -> Tensor:
    """Sort boxes [M, 4], xyxy, by area, largest first; equal areas keep their order."""
    return boxes[(boxes[:, 2:] - boxes[:, :2]).prod(dim=1).argsort(descending=True, stable=True)]


def pool_instances(features: Tensor, boxes: list[Tensor], stride: int) -> tuple[Tensor, ...]:
    """Pool each image's boxes [M, 4], xyxy pixels, M >= 0, from its own features of [N, C, H, W] to [M, C, 3, 3]."""
    if len(boxes) != len(features):
        raise ValueError(f"{len(boxes)} sets of boxes for the images of features {tuple(features.shape)}")
    features = at_least_float32(features)  # on the CPU, RoIAlign has no bfloat16
    boxes = [b.to(features) for b in boxes]
    return roi_align(features, boxes, output_size=3, spatial_scale=1 / stride).split([len(b) for b in boxes])


def frobenius_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Square root of the sum of squared differences; its gradient, also to the teacher's units, is 0 where it is 0."""
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must agree")
    return torch.linalg.vector_norm(at_least_float32(student) - at_least_float32(teacher))


def at_least_float32(x: Tensor) -> Tensor:
    """Lift half precision to float32, as under autocast; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class PixelRelation(nn.Module):
    """Global graph reasoning (GloRe) over one level."""

    def __init__(self, channels: int, nodes: int):
        super().__init__()
        self.states = nn.Conv2d(channels, 2 * nodes, 1)
        self.nodes = nn.Conv2d(channels, nodes, 1)
        self.mix_nodes = nn.Linear(nodes, nodes)  # the learned adjacency
        self.mix_states = nn.Linear(2 * nodes, 2 * nodes, bias=False)
        self.extend = nn.Conv2d(2 * nodes, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels, eps=1e-4)

    def forward(self, features: Tensor) -> Tensor:
        """Return [N, C, H, W] for features [N, C, H, W], at least float32."""
        x, norm = at_least_float32(features), self.norm
        with torch.autocast(x.device.type, enabled=False):  # v sums tens of thousands of positions
            nodes = self.nodes(x).flatten(2)  # [N, d, HW], no activation
            v = self.states(x).flatten(2) @ nodes.mT  # [N, 2d, d], not divided by HW
            v = (v + self.mix_nodes(v)).relu()
            y = (nodes.mT @ self.mix_states(v.mT)).mT  # [N, 2d, HW], in memory channels last, as x is in training
            y = self.extend(y.unflatten(2, x.shape[2:]))
            if y[:, 0].numel() > 1:
                return x + norm(y)
            # A single image's 1x1 level has no variance: use the running statistics and leave them as they are.
            return x + batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


class RelationMatrix(nn.Module):
    """How much each object of an image attends to each, P of the equation, for objects of `size` = 9C values.

    Takes all images at once, for each pass through a layer has millions of weights to read.
    """

    def __init__(self, size: int, relation_filter: bool = True):
        super().__init__()
        self.theta = nn.Linear(size, size // 2)
        self.phi = nn.Linear(size, size // 2)
        self.filter = nn.Linear(size, MAX_RELATED) if relation_filter else None

    def forward(self, instances: Sequence[Tensor]) -> list[Tensor]:
        """Return per image [n, n], rows sum to 1, at least float32, for its objects [n, C, 3, 3]."""
        counts = [len(s) for s in instances]
        if self.filter is not None and max(counts) > MAX_RELATED:
            raise ValueError(f"at most {MAX_RELATED} related objects of an image, not {max(counts)}")
        s = at_least_float32(torch.cat(instances)).flatten(1)
        with torch.autocast(s.device.type, enabled=False):  # the logits sum a thousand products and are not scaled
            logits = [theta @ phi.mT for theta, phi in zip(self.theta(s).split(counts), self.phi(s).split(counts))]
            if self.filter is not None:
                filters = self.filter(s).split(counts)
                logits = [x * w[:, : len(x)].softmax(dim=1) for x, w in zip(logits, filters)]
            return [x.softmax(dim=1) for x in logits]


class InstanceRelation(nn.Module):
    """Add to each object of an image what it gathers from all of them by their relation matrix."""

    def __init__(self, size: int, relation_filter: bool = True):
        super().__init__()
        self.matrix = RelationMatrix(size, relation_filter)
        self.g = nn.Linear(size, size // 2)
        self.extend = nn.Linear(size // 2, size)

    def forward(self, instances: Sequence[Tensor]) -> list[Tensor]:
        """Return per image [n, C, 3, 3] for its objects [n, C, 3, 3]."""
        counts = [len(s) for s in instances]
        values = self.g(torch.cat(instances).flatten(1)).split(counts)
        gathered = torch.cat([P @ g for P, g in zip(self.matrix(instances), values)])
        return [s + x.view_as(s) for s, x in zip(instances, self.extend(gathered).split(counts))]


class DRKD(nn.Module):
    """Distillation of relations between pixels and between objects, and of the objects' features.

    Args:
        detector: "retinanet", "fcos" or "faster_rcnn"; chooses the default weights.
        student_channels, teacher_channels: of the pyramid levels.
        strides: pixels per position, one per pyramid level, finest first.
        l1, l2, l3: weights of pixel relation, instance relation and instance imitation.
        relation: "features", or "matrices": squared differences of P, summed over its entries, levels and images.
        relation_filter: multiply P's logits by a learned softmax over each row.
        nodes: d of each level, finest first; there may be more than levels.
    """

    needs = ("fpn",)
    warmup = 0

    def __init__(
        self,
        detector: str,
        student_channels: int,
        teacher_channels: int,
        strides: tuple[int, ...],
        l1: float | None = None,
        l2: float | None = None,
        l3: float | None = None,
        relation: str = "features",
        relation_filter: bool = True,
        nodes: tuple[int, ...] = NODES,
    ):
        super().__init__()
        if relation not in ("features", "matrices"):
            raise ValueError(f'relation must be "features" or "matrices", not {relation!r}')
        if len(nodes) < len(strides):
            raise ValueError(f"{len(strides)} levels need as many nodes, not {tuple(nodes)}")
        weights = zip(("pixel", "relation", "instance"), (l1, l2, l3), WEIGHTS[detector])
        self.weights = {term: default if given is None else given for term, given, default in weights}
        self.relation, self.strides = relation, strides[:2]  # objects live on the two finest levels
        nodes, channels = nodes[: len(strides)], (student_channels, teacher_channels)
        unit = InstanceRelation if relation == "features" else RelationMatrix
        self.pixel_student, self.pixel_teacher = (nn.ModuleList(PixelRelation(C, d) for d in nodes) for C in channels)
        self.pixel_adapters = nn.ModuleList(nn.Conv2d(*channels, 1) for _ in strides)
        self.relation_student, self.relation_teacher = (
            nn.ModuleList(unit(9 * C, relation_filter) for _ in self.strides) for C in channels
        )
        if relation == "features":
            self.relation_adapters = nn.ModuleList(nn.Conv2d(*channels, 1) for _ in self.strides)
        self.instance_adapters = nn.ModuleList(nn.Conv2d(*channels, 1) for _ in self.strides)

    def forward(self, student, teacher, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return loss_drkd_pixel, loss_drkd_relation and loss_drkd_instance, weighted and summed over levels.

        Args:
            student: has fpn, a list over levels of [N, C, H, W].
            teacher: the same, constants.
            targets: per image, boxes [M, 4], xyxy pixels of the network input.
        """
        fpn_s, fpn_t = student.fpn, [x.detach() for x in teacher.fpn]
        units = zip(self.pixel_adapters, self.pixel_student, self.pixel_teacher, fpn_s, fpn_t)
        pixel_loss = sum(frobenius_distance(adapter(unit_s(s)), unit_t(t)) for adapter, unit_s, unit_t, s, t in units)
        relation_loss = instance_loss = 0  # images without boxes add 0 to both, and a gradient to every parameter
        boxes = [largest_first(target["boxes"]) for target in targets]
        for level, stride in enumerate(self.strides):
            pooled_s, pooled_t = (pool_instances(fpn[level], boxes, stride) for fpn in (fpn_s, fpn_t))
            for s, t in zip(pooled_s, pooled_t):  # [M, C, 3, 3] of one image
                instance_loss += frobenius_distance(self.instance_adapters[level](s), t)
            related_s = self.relation_student[level]([s[:MAX_RELATED] for s in pooled_s])
            related_t = self.relation_teacher[level]([t[:MAX_RELATED] for t in pooled_t])
            for s, t in zip(related_s, related_t):
                if self.relation == "features":
                    relation_loss += frobenius_distance(self.relation_adapters[level](s), t)
                else:
                    relation_loss += (s - t).square().sum()
        losses = zip(self.weights.items(), (pixel_loss, relation_loss, instance_loss))
        return {f"loss_drkd_{term}": weight * loss for (term, weight), loss in losses}

    def maps(self, student, teacher, targets) -> dict[str, list[Tensor]]:
        """Return "pixel change" [N, H, W], mean over channels of |unit(x) - x|, and "relation matrix" [N, n, n], P.

        Of each network and level, P of the two finest, objects in order of area, of which all images must have n.
        """
        maps, boxes = {}, [largest_first(target["boxes"])[:MAX_RELATED] for target in targets]
        for name, fpn in (("teacher", teacher.fpn), ("student", student.fpn)):
            pixel, relation = getattr(self, f"pixel_{name}"), getattr(self, f"relation_{name}")
            matrices = (unit.matrix if self.relation == "features" else unit for unit in relation)
            related = zip(matrices, (pool_instances(x, boxes, stride) for x, stride in zip(fpn, self.strides)))
            maps[f"pixel change {name}"] = [(unit(x) - x).abs().mean(dim=1) for unit, x in zip(pixel, fpn)]
            maps[f"relation matrix {name}"] = [torch.stack(P(instances)) for P, instances in related]
        return maps
