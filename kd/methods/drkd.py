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

Norms are neither squared nor averaged. The pixel norm runs over the whole batch and grows with the square root of its
size; the other two are sums over images and grow with their number, and the instance norm also with the square root of
the objects in an image. Each process takes norms and batch statistics over its own share, so what matters is the number
of images per process, not of processes.

Units and adapters train with the student and are dropped afterwards (the instance units alone: 43 million parameters at
256 channels). That includes the teacher's units: only its features are constants. Both sides could therefore agree on
cancelling what is hard to match; the instance term alone has a fixed target, so watch the three side by side.

Reference code: https://github.com/nizhenliang/Dual-Relation-Knowledge-Distillation at 78ea05b (two_stage.py, GloRe.py;
single_stage.py does not run). Where it is at odds with the paper or itself:
- The paper has a mean of squares for pixels and compares the matrices P (`relation="matrices"`, without a published
  weight); the code has norms, which its weights belong to, and compares related features. So does this file.
- The code makes the filter's layer anew at every step, so it is random and never trained. Here it has 64 outputs, of
  which n objects use the first n. To give the outputs a meaning, objects are ordered by area, largest first, as in
  lines that the code has commented out; beyond 64, the smallest have no relations, with or without filter.
- The code pools every image's boxes from the first image of the batch. Here they are pooled from their own.
"""

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
    """Pool each image's boxes from its own map to [M, C, 3, 3], in the boxes' order.

    Args:
        features: one level [N, C, H, W], at least float32 (on the CPU, RoIAlign has no bfloat16).
        boxes: per image [M, 4], xyxy pixels of the network input; M = 0 is legal.
        stride: pixels per position.

    Raises:
        ValueError: not one set of boxes per image.
    """
    if len(boxes) != len(features):
        raise ValueError(f"{len(boxes)} sets of boxes for the images of features {tuple(features.shape)}")
    boxes = [b.to(features) for b in boxes]
    return roi_align(features, boxes, output_size=3, spatial_scale=1 / stride).split([len(b) for b in boxes])


def frobenius_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Square root of the sum of squared differences over all dimensions; its gradient is 0, not nan, where it is 0.

    The teacher's side is not detached, because it went through trainable units.

    Raises:
        ValueError: shapes do not agree.
    """
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
        self.mix_nodes = nn.Conv1d(nodes, nodes, 1)  # the learned adjacency
        self.mix_states = nn.Conv1d(2 * nodes, 2 * nodes, 1, bias=False)
        self.extend = nn.Conv2d(2 * nodes, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels, eps=1e-4)

    def forward(self, features: Tensor) -> Tensor:
        """Return [N, C, H, W] for features [N, C, H, W], at least float32."""
        x = at_least_float32(features)
        with torch.autocast(x.device.type, enabled=False):  # v sums tens of thousands of positions
            nodes = self.nodes(x).flatten(2)  # [N, d, HW], no activation
            v = self.states(x).flatten(2) @ nodes.mT  # [N, 2d, d], not divided by HW
            v = v + self.mix_nodes(v.mT).mT
            y = self.mix_states(v.relu()) @ nodes  # [N, 2d, HW]
            y = self.extend(y.unflatten(2, x.shape[2:]))
            norm = self.norm
            if y[:, 0].numel() > 1:
                return x + norm(y)
            # A single image's 1x1 level has no variance: use the running statistics and leave them as they are.
            return x + batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


class RelationMatrix(nn.Module):
    """How much each object of an image attends to each: P of the equation.

    Args:
        size: values of an object, C * 9.
        relation_filter: multiply the logits by a learned softmax over each row before P's own softmax.
    """

    def __init__(self, size: int, relation_filter: bool = True):
        super().__init__()
        self.theta = nn.Linear(size, size // 2)
        self.phi = nn.Linear(size, size // 2)
        self.filter = nn.Linear(size, MAX_RELATED) if relation_filter else None

    def forward(self, instances: Tensor) -> Tensor:
        """Return [n, n], rows sum to 1, at least float32, for one image's objects [n, C, 3, 3].

        Raises:
            ValueError: n exceeds the filter's outputs.
        """
        if self.filter is not None and len(instances) > MAX_RELATED:
            raise ValueError(f"at most {MAX_RELATED} related objects, not {tuple(instances.shape)}")
        s = at_least_float32(instances).flatten(1)
        with torch.autocast(s.device.type, enabled=False):  # the logits sum a thousand products and are not scaled
            logits = self.theta(s) @ self.phi(s).mT
            if self.filter is not None:
                logits = logits * self.filter(s)[:, : len(s)].softmax(dim=1)
            return logits.softmax(dim=1)


class InstanceRelation(nn.Module):
    """Add to each object of an image what it gathers from all of them by their relation matrix."""

    def __init__(self, size: int, relation_filter: bool = True):
        super().__init__()
        self.matrix = RelationMatrix(size, relation_filter)
        self.g = nn.Linear(size, size // 2)
        self.extend = nn.Linear(size // 2, size)

    def forward(self, instances: Tensor) -> Tensor:
        """Return [n, C, 3, 3] for one image's objects [n, C, 3, 3]."""
        gathered = self.extend(self.matrix(instances) @ self.g(instances.flatten(1)))
        return instances + gathered.view_as(instances)


class DRKD(nn.Module):
    """Distillation of relations between pixels and between objects, and of the objects' features.

    Args:
        detector: "retinanet", "fcos" or "faster_rcnn"; chooses the default weights.
        student_channels: channels of the student's pyramid levels.
        teacher_channels: channels of the teacher's.
        strides: pixels per position, one per pyramid level, finest first.
        l1: weight of the pixel relation.
        l2: weight of the instance relation.
        l3: weight of the instance imitation.
        relation: "features", norms of related features; or "matrices", squared differences of P, summed over its
            entries, levels and images.
        relation_filter: see `RelationMatrix`.
        nodes: d of each level, finest first; what exceeds the number of levels is cut off.

    Raises:
        ValueError: an unknown relation, or fewer nodes than levels.
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
        weights = zip((l1, l2, l3), WEIGHTS[detector])
        self.l1, self.l2, self.l3 = (default if given is None else given for given, default in weights)
        self.relation, self.strides = relation, strides[:2]  # objects live on the two finest levels

        def each(levels, unit, *sizes) -> nn.ModuleList:
            return nn.ModuleList(unit(*sizes) for _ in levels)

        self.pixel_student = nn.ModuleList(PixelRelation(student_channels, d) for _, d in zip(strides, nodes))
        self.pixel_teacher = nn.ModuleList(PixelRelation(teacher_channels, d) for _, d in zip(strides, nodes))
        self.pixel_adapters = each(strides, nn.Conv2d, student_channels, teacher_channels, 1)
        unit = InstanceRelation if relation == "features" else RelationMatrix
        self.relation_student = each(self.strides, unit, student_channels * 9, relation_filter)
        self.relation_teacher = each(self.strides, unit, teacher_channels * 9, relation_filter)
        if relation == "features":
            self.relation_adapters = each(self.strides, nn.Conv2d, student_channels, teacher_channels, 1)
        self.instance_adapters = each(self.strides, nn.Conv2d, student_channels, teacher_channels, 1)

    def forward(self, student, teacher, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return loss_drkd_pixel, loss_drkd_relation and loss_drkd_instance, weighted and summed over levels.

        Images without boxes are not skipped but computed with n = 0: they add 0, and every parameter has a gradient,
        zeros if need be, on every process, as DistributedDataParallel expects.

        Args:
            student: has fpn, a list over levels of [N, C, H, W].
            teacher: the same, constants.
            targets: per image, boxes [M, 4], xyxy pixels of the network input.
        """
        fpn_s = [at_least_float32(level) for level in student.fpn]
        fpn_t = [at_least_float32(level.detach()) for level in teacher.fpn]
        pixel_loss = relation_loss = instance_loss = 0
        for level, adapter in enumerate(self.pixel_adapters):
            related_s, related_t = self.pixel_student[level](fpn_s[level]), self.pixel_teacher[level](fpn_t[level])
            pixel_loss += frobenius_distance(adapter(related_s), related_t)

        boxes = [largest_first(target["boxes"]) for target in targets]
        for level, stride in enumerate(self.strides):
            instances_s = pool_instances(fpn_s[level], boxes, stride)
            instances_t = pool_instances(fpn_t[level], boxes, stride)
            for s, t in zip(instances_s, instances_t):  # [M, C, 3, 3] of one image
                instance_loss += frobenius_distance(self.instance_adapters[level](s), t)
                related_s = self.relation_student[level](s[:MAX_RELATED])
                related_t = self.relation_teacher[level](t[:MAX_RELATED])
                if self.relation == "features":
                    relation_loss += frobenius_distance(self.relation_adapters[level](related_s), related_t)
                else:
                    relation_loss += (related_s - related_t).square().sum()
        return {
            "loss_drkd_pixel": self.l1 * pixel_loss,
            "loss_drkd_relation": self.l2 * relation_loss,
            "loss_drkd_instance": self.l3 * instance_loss,
        }
