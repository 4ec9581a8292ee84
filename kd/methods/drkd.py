"""DRKD: "Dual Relation Knowledge Distillation for Object Detection", IJCAI 2023, https://arxiv.org/abs/2302.05637.

Compared position by position, features are dominated by background, small objects hardly count, and relations between
the parts of an image are lost. DRKD relates features before it compares them. A graph reasoning unit (GloRe) relates
the positions of a level by projecting them to d nodes and back. Attention relates the objects of an image, pooled to
3x3, so that small ones profit from large ones. A third term imitates the pooled objects directly.

    pixel_unit(x) = x + norm(W_5 Z B)        B = W_1 x    V = (W_2 x) B^T    Z = W_4 relu(V + V W_3)                (1)
    instance_unit(s) = s + W_7 P (W_6 s)     P = softmax_j(theta(s) phi(s)^T * softmax_j(filter(s)))                (2)
    pixel    = pixel_weight    * sum_l       || adapter(pixel_unit_student(x_l)) - pixel_unit_teacher(y_l) ||       (3)
    relation = relation_weight * sum_{l,n}   || adapter(instance_unit_student(s)) - instance_unit_teacher(t) ||     (4)
    instance = instance_weight * sum_{l,n}   || adapter(s) - t ||                                                   (5)

Where:
    x_l, y_l are FPN features of student and teacher on level l, [C, HW]; s, t are the M objects of image n pooled
    from them, [M, 9C]. (3) sums over all levels, (4) and (5) over the two finest.
    theta, phi and filter are linear layers; softmax_j makes each row sum to 1.
    || . || is the root of a sum of squares, neither squared nor averaged, over the images of this process: (3) grows
    with the root of their number, (4) and (5) with their number and with the root of the objects in each.
    Units (the teacher's too) and adapters (1x1 convolutions) are trained with the student and dropped afterwards. Only
    (5) has a fixed target: (3) and (4) also fall where both units discard what differs.

Reference code: https://github.com/nizhenliang/Dual-Relation-Knowledge-Distillation at 78ea05b (two_stage.py, GloRe.py).
1. The paper has a mean of squares in (3) and compares the matrices P in (4). The published weights belong to the code,
   which this file follows. A third-party reading also averages squares in (5) and has no relu in (1).
2. The code pools all boxes from the first image, and re-creates the layer of the filter at every step, so it is never
   trained. Here its 64 outputs belong to the objects by decreasing area, as in lines that the code has commented out.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torchvision.ops import box_area, roi_align

# pixel_weight, relation_weight, instance_weight: reference code, for dense detectors partly in commented-out lines.
WEIGHTS = {**dict.fromkeys(("retinanet", "fcos", "gfl"), (4e-3, 5e-3, 6e-3)), "faster_rcnn": (1e-3, 4e-3, 2.4e-3)}
NODES = (64, 64, 256, 256, 256)  # d of each level, finest first: reference code
MAX_RELATED = 64  # objects of an image: our reading


def largest_first(boxes: Tensor) -> Tensor:
    """Return boxes [M, 4], xyxy, by decreasing area; equal areas keep their order."""
    return boxes[box_area(boxes).argsort(descending=True, stable=True)]


def pool_instances(features: Tensor, boxes: list[Tensor], stride: int) -> list[Tensor]:
    """Return the objects [M, C, 3, 3] of each image, for features [N, C, H, W] and boxes [M, 4] in xyxy pixels."""
    if len(boxes) != len(features):
        raise ValueError(f"{len(boxes)} sets of boxes for {len(features)} images")
    boxes = [b.to(features) for b in boxes]
    return list(roi_align(features, boxes, output_size=3, spatial_scale=1 / stride).split([len(b) for b in boxes]))


def frobenius_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the root of the sum of squared differences; its gradient is 0 where it is 0."""
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must agree")
    return torch.linalg.vector_norm(student - teacher)


class PixelUnit(nn.Module):
    """Global graph reasoning over the positions of a level, (1)."""

    def __init__(self, channels: int, nodes: int):
        super().__init__()
        self.states = nn.Conv2d(channels, 2 * nodes, 1)  # W_2
        self.nodes = nn.Conv2d(channels, nodes, 1)  # W_1
        self.mix_nodes = nn.Linear(nodes, nodes)  # W_3, the learned adjacency
        self.mix_states = nn.Linear(2 * nodes, 2 * nodes, bias=False)  # W_4
        self.extend = nn.Conv2d(2 * nodes, channels, 1, bias=False)  # W_5
        self.norm = nn.BatchNorm2d(channels, eps=1e-4)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, C, H, W] for features [N, C, H, W]."""
        B = self.nodes(x).flatten(2)  # [N, d, HW]
        V = self.states(x).flatten(2) @ B.mT  # [N, 2d, d], not divided by HW
        Z = self.mix_states((V + self.mix_nodes(V)).relu().mT)  # [N, d, 2d]
        y = self.extend((B.mT @ Z).mT.unflatten(2, x.shape[2:]))  # [N, C, H, W]
        norm, training = self.norm, self.training and y[:, 0].numel() > 1  # one 1x1 map alone has no variance
        return x + batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, training, eps=norm.eps)


class InstanceUnit(nn.Module):
    """Attention among the objects of an image, (2), for all images at once: its millions of weights are read once."""

    def __init__(self, size: int):  # 9C values of an object
        super().__init__()
        self.theta = nn.Linear(size, size // 2)
        self.phi = nn.Linear(size, size // 2)
        self.filter = nn.Linear(size, MAX_RELATED)
        self.g = nn.Linear(size, size // 2)  # W_6
        self.extend = nn.Linear(size // 2, size)  # W_7

    def matrices(self, instances: list[Tensor]) -> list[Tensor]:
        """Return P [M, M] of each image, for its objects [M, C, 3, 3], M <= MAX_RELATED; rows sum to 1."""
        counts = [len(s) for s in instances]
        s = torch.cat(instances).flatten(1)
        parts = zip(*(layer(s).split(counts) for layer in (self.theta, self.phi, self.filter)))
        return [(theta @ phi.T * f[:, : len(theta)].softmax(dim=1)).softmax(dim=1) for theta, phi, f in parts]

    def forward(self, instances: list[Tensor]) -> list[Tensor]:
        """Return [M, C, 3, 3] of each image, for its objects [M, C, 3, 3]."""
        counts = [len(s) for s in instances]
        values = self.g(torch.cat(instances).flatten(1)).split(counts)
        gathered = self.extend(torch.cat([P @ g for P, g in zip(self.matrices(instances), values)])).split(counts)
        return [s + x.view_as(s) for s, x in zip(instances, gathered)]


class DRKD(nn.Module):
    """Distillation of relations between pixels and between objects, and of the features of objects.

    Args:
        detector: "retinanet", "fcos", "gfl" or "faster_rcnn"; chooses the default weights.
        student_channels, teacher_channels: of the FPN.
        strides: of the levels, in pixels, finest first.
        pixel_weight, relation_weight, instance_weight: of (3), (4) and (5).
        nodes: d of each level, finest first, at least one per level.

    Example::

        sizes = [(40, 60), (20, 30)]  # of the levels
        student = SimpleNamespace(fpn=[torch.rand(2, 64, *size) for size in sizes])
        teacher = SimpleNamespace(fpn=[torch.rand(2, 64, *size) for size in sizes])
        target = {"boxes": torch.tensor([[20.0, 30, 90, 80], [100, 40, 200, 160]])}
        losses = DRKD("fcos", 64, 64, strides=(8, 16))(student, teacher, [target, target])  # {"loss_drkd_pixel": ...}
    """

    needs = ("fpn",)
    warmup = 0

    def __init__(
        self,
        detector: str,
        student_channels: int,
        teacher_channels: int,
        strides: tuple[int, ...],
        *,
        pixel_weight: float | None = None,
        relation_weight: float | None = None,
        instance_weight: float | None = None,
        nodes: tuple[int, ...] = NODES,
    ):
        super().__init__()
        if len(nodes) < len(strides) or min(nodes) < 1:
            raise ValueError(f"{len(strides)} levels need as many nodes, 1 or more each, not {tuple(nodes)}")
        given = (pixel_weight, relation_weight, instance_weight)
        self.weights = [default if g is None else g for g, default in zip(given, WEIGHTS[detector])]
        self.strides, nodes = strides[:2], nodes[: len(strides)]  # objects are pooled from the two finest levels
        channels = student_channels, teacher_channels
        self.pixel_student, self.pixel_teacher = (nn.ModuleList(PixelUnit(C, d) for d in nodes) for C in channels)
        self.pixel_adapters = nn.ModuleList(nn.Conv2d(*channels, 1) for _ in strides)
        self.instance_student, self.instance_teacher = (
            nn.ModuleList(InstanceUnit(9 * C) for _ in self.strides) for C in channels
        )
        self.relation_adapters = nn.ModuleList(nn.Conv2d(*channels, 1) for _ in self.strides)
        self.instance_adapters = nn.ModuleList(nn.Conv2d(*channels, 1) for _ in self.strides)

    def forward(self, student, teacher, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return loss_drkd_pixel, loss_drkd_relation and loss_drkd_instance, weighted and summed over levels.

        Args:
            student: has fpn, a list over levels of [N, C, H, W].
            teacher: the same, constants.
            targets: for each image boxes [M, 4], xyxy pixels of the resized image.
        """
        dtype = torch.promote_types(teacher.fpn[0].dtype, torch.float32)
        fpn_s, fpn_t = [x.to(dtype) for x in student.fpn], [y.detach().to(dtype) for y in teacher.fpn]
        with torch.autocast(fpn_s[0].device.type, enabled=False):  # V sums tens of thousands of positions
            units = zip(self.pixel_adapters, self.pixel_student, self.pixel_teacher, fpn_s, fpn_t, strict=True)
            pixel = sum(frobenius_distance(adapter(unit_s(x)), unit_t(y)) for adapter, unit_s, unit_t, x, y in units)
            relation, instance = self.instance_losses(fpn_s, fpn_t, [largest_first(t["boxes"]) for t in targets])
        losses = {"loss_drkd_pixel": pixel, "loss_drkd_relation": relation, "loss_drkd_instance": instance}
        return {name: weight * loss for (name, loss), weight in zip(losses.items(), self.weights)}

    def instance_losses(self, fpn_s: list[Tensor], fpn_t: list[Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the sums over levels and images in (4) and (5); an image without objects adds 0."""
        relation = instance = 0
        for level, stride in enumerate(self.strides):
            objects_s, objects_t = (pool_instances(fpn[level], boxes, stride) for fpn in (fpn_s, fpn_t))
            for s, t in zip(objects_s, objects_t):  # [M, C, 3, 3] of one image
                instance += frobenius_distance(self.instance_adapters[level](s), t)
            related_s = self.instance_student[level]([s[:MAX_RELATED] for s in objects_s])
            related_t = self.instance_teacher[level]([t[:MAX_RELATED] for t in objects_t])
            for s, t in zip(related_s, related_t):
                relation += frobenius_distance(self.relation_adapters[level](s), t)
        return relation, instance

    def maps(self, student, teacher, targets) -> dict[str, list[Tensor]]:
        """Return maps of the teacher by name, a list over levels.

        "pixel change", [N, H, W], is the mean over channels of |pixel_unit(y) - y|. "relation matrix" is P [N, n, n] on
        the two finest levels, objects by decreasing area; all images must have the same number n.
        """
        boxes = [largest_first(target["boxes"])[:MAX_RELATED] for target in targets]
        objects = [pool_instances(y, boxes, stride) for y, stride in zip(teacher.fpn, self.strides)]
        return {
            "pixel change": [(unit(y) - y).abs().mean(dim=1) for unit, y in zip(self.pixel_teacher, teacher.fpn)],
            "relation matrix": [torch.stack(unit.matrices(t)) for unit, t in zip(self.instance_teacher, objects)],
        }
