"""Student, frozen teacher and method as one module whose forward returns a dict of losses."""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from kd.features import DetectorOutput, forward_detector
from kd.timing import Stopwatch


class Distiller(nn.Module):
    """Compute a student's detection losses and, with a teacher and a method, its distillation losses.

    The teacher is a constant: always in eval mode, without gradients, and kept out of this module's parameters,
    state_dict, `.train()` and `.to()`; put it on the student's device first.

    Args:
        student: a torchvision detector made by `kd.detectors.build_detector`.
        teacher: a trained detector of the same kind, classes and anchors; None for plain training.
        method: called as method(student_output, teacher_output, targets), returns a dict of weighted scalar losses; its
            `needs` names what it reads. None for plain training.

    Attributes:
        stopwatch: knows the time of transform, student, teacher and method; may be replaced at any time.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None = None, method: nn.Module | None = None):
        super().__init__()
        if (teacher is None) != (method is None):
            raise ValueError("a teacher and a method go together: give both or neither")
        self.student = student
        self.method = method
        self.stopwatch = Stopwatch(next(student.parameters()).device)
        # In a tuple, nn.Module does not see the teacher.
        self._teacher = (None if teacher is None else teacher.eval().requires_grad_(False),)

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher."""
        return self._teacher[0]

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]], weight: float = 1.0) -> dict[str, Tensor]:
        """Return all losses of one training step by name; their sum is what to minimise.

        Args:
            images: [3, h, w] each, values in 0..1, any sizes.
            targets: per image boxes [M, 4], xyxy pixels of the image, and labels [M], 1..K-1.
            weight: factor of the method's losses, below 1 during a warm-up.

        Returns:
            torchvision's detection losses of the student and the method's losses, named loss_<method>_<term>.
        """
        part = self.stopwatch.part
        with part("transform"):
            images, targets = self.student.transform(images, targets)
        if self.method is None:
            with part("student"):
                return forward_detector(self.student, images, targets)[1]

        # The teacher first: what it computes on its way is freed before the student's activations begin to pile up.
        with part("teacher"), torch.no_grad():
            teacher_images = self._as_teacher_input(images)
            teacher_output, _ = forward_detector(self.teacher, teacher_images, needs=self.method.needs)
        with part("student"):
            student_output, losses = forward_detector(self.student, images, targets)
        with part("method"):
            terms = self.method(student_output, teacher_output, targets)
        return {**losses, **{name: weight * term for name, term in terms.items()}}

    @torch.no_grad()
    def outputs(self, images: ImageList) -> tuple[DetectorOutput, DetectorOutput]:
        """Return what the method reads of student and teacher on images that the student's transform returned."""
        needs = self.method.needs
        student_output, _ = forward_detector(self.student, images, needs=needs)
        teacher_output, _ = forward_detector(self.teacher, self._as_teacher_input(images), needs=needs)
        return student_output, teacher_output

    def _as_teacher_input(self, images: ImageList) -> ImageList:
        """Normalise the student's images with the teacher's mean and std where the two differ; padding stays 0."""
        ours, theirs = self.student.transform, self.teacher.transform
        if (ours.image_mean, ours.image_std) == (theirs.image_mean, theirs.image_std):
            return images
        values = images.tensors.new_tensor([ours.image_mean, ours.image_std, theirs.image_mean, theirs.image_std])
        mean_s, std_s, mean_t, std_t = values[:, :, None, None]
        tensors = torch.zeros_like(images.tensors)
        for output, image, (h, w) in zip(tensors, images.tensors, images.image_sizes):
            output[:, :h, :w] = (image[:, :h, :w] * std_s + mean_s - mean_t) / std_t
        return ImageList(tensors, images.image_sizes)


def check_pair(student: nn.Module, teacher: nn.Module) -> None:
    """Raise ValueError unless a teacher's outputs can stand beside a student's, position by position.

    Detector, number of classes, pyramid strides and anchors must agree; backbones and input normalisation need not.
    """
    differences = []
    for name, read in {
        "detector": lambda m: type(m).__name__,
        "number of classes (background included)": num_classes,
        "strides of the backbone's maps": lambda m: m.backbone.body_strides,
        "anchor sizes": lambda m: anchor_generator(m).sizes,
        "anchor aspect ratios": lambda m: anchor_generator(m).aspect_ratios,
    }.items():
        if read(student) != read(teacher):
            differences.append(f"{name}: student {read(student)}, teacher {read(teacher)}")
    if differences:
        raise ValueError("teacher and student do not fit. " + "; ".join(differences))


def inherit(student: nn.Module, teacher: nn.Module) -> None:
    """Start the student from the teacher's pyramid and heads: everything but the body of its backbone.

    PGD, FGD and others report results of students that start so.

    Raises:
        ValueError: a tensor has another shape or is missing; the first of them is named.
    """
    theirs = {name: value for name, value in teacher.state_dict().items() if not name.startswith("backbone.body.")}
    ours = {name: value for name, value in student.state_dict().items() if not name.startswith("backbone.body.")}
    for name in sorted(theirs.keys() | ours.keys()):
        shapes = [tuple(held[name].shape) if name in held else "none" for held in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"the student cannot inherit {name}: its shape is {shapes[0]}, the teacher's {shapes[1]}")
    student.load_state_dict(theirs, strict=False)  # strict but for the body, which the loop above made sure of


def anchor_generator(detector: nn.Module) -> nn.Module:
    """Return a detector's anchor generator, the RPN's for Faster R-CNN."""
    return detector.rpn.anchor_generator if hasattr(detector, "rpn") else detector.anchor_generator


def num_classes(detector: nn.Module) -> int:
    """Return K of a detector, background included."""
    if hasattr(detector, "roi_heads"):
        return detector.roi_heads.box_predictor.cls_score.out_features
    return detector.head.classification_head.num_classes


def check_terms(
    losses: dict[str, Tensor], terms: Collection[str], unproven: Collection[str], student: nn.Module
) -> list[str]:
    """Make sure that distillation losses reach the student; return the names of those that are still unproven.

    A single term may be zero on a batch for a reason (no position where the teacher beats the student, say), so it is
    to be looked at again on the next batch. All of them zero, or one without gradient, means that the method does not
    do its work: wrong weights, features of the wrong network, a detached tensor.

    Costs one backward pass per term; call it before the step's own backward.

    Args:
        losses: what Distiller returned, graph still alive.
        terms: names of the distillation losses.
        unproven: those of them to look at, at first all.
        student: the network that must receive gradients.

    Raises:
        RuntimeError: as above; names the term.
    """
    if all(losses[name].item() == 0 for name in terms):
        raise RuntimeError(f"{', '.join(terms)} is zero: teacher and student agree exactly, or nothing is compared")
    zero = [name for name in unproven if losses[name].item() == 0]
    parameters = [p for p in student.parameters() if p.requires_grad]
    for name in set(unproven) - set(zero):
        loss = losses[name]
        if not loss.requires_grad:
            raise RuntimeError(f"{name} = {loss.item():.4g} has no gradient: it does not depend on the student")
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        if not any(g is not None and (g != 0).any() for g in gradients):
            raise RuntimeError(f"{name} = {loss.item():.4g} sends no gradient to any parameter of the student")
    return zero
