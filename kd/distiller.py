"""Student, frozen teacher and method as one module whose forward returns the losses of a training step."""

import copy
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from kd.features import DetectorOutput, forward_detector

PATIENCE = 50  # steps; if the first epoch has fewer, a distillation loss may be zero throughout


class TrainingError(RuntimeError):
    """Training that must not go on. The message says what is wrong, where, and what to do."""


class Distiller(nn.Module):
    """Compute the detection losses of a student and, given a teacher and a method, the distillation losses.

    The teacher is a constant: always in eval mode, without gradients, and not part of this module's parameters,
    state_dict, `.train()` and `.to()`. Move it to the student's device first.

    Args:
        student: a detector from `kd.detectors.build_detector`.
        teacher: a trained detector that `kd.detectors.check_pair` accepts; None for plain training.
        method: called as method(student_output, teacher_output, targets), returns weighted scalar losses by name. Its
            `needs` lists the DetectorOutput attributes it reads. None for plain training.
        warmup: forward passes in training over which the distillation losses grow linearly to their full weight.

    Attributes:
        weights: factors of distillation losses by name; 1 for those that are not named.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        method: nn.Module | None = None,
        *,
        warmup: int = 0,
    ):
        super().__init__()
        if (teacher is None) != (method is None):
            raise ValueError("give both a teacher and a method, or neither")
        self.student = student
        self.method = method
        self.weights, self.warmup = {}, warmup
        self.register_buffer("iteration", torch.zeros((), dtype=torch.long))  # a resumed run continues its warm-up
        # Inside a tuple, the teacher is not registered as a submodule.
        self._teacher = (None if teacher is None else teacher.eval().requires_grad_(False),)

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher."""
        return self._teacher[0]

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the losses of one training step by name; minimise the sum of both dictionaries.

        Args:
            images: [3, h, w] each, values in 0..1, of any size.
            targets: for each image boxes [M, 4], xyxy pixels of the image, and labels [M], 1..K-1.

        Returns:
            torchvision's detection losses of the student, and the distillation losses loss_<method>_<term>, which are
            empty in plain training.
        """
        images, targets = self.student.transform(images, targets)
        if self.method is None:
            return forward_detector(self.student, images, targets)[1], {}

        teacher_output = self.run_teacher(images)  # first, while the student holds no activations yet
        student_output, detection = forward_detector(self.student, images, targets, self.method.needs)
        distillation = self.method(student_output, teacher_output, targets)
        growth = ((self.iteration + 1) / self.warmup).clamp(max=1) if self.warmup else 1
        if self.training:
            self.iteration += 1
        return detection, {name: growth * self.weights.get(name, 1) * loss for name, loss in distillation.items()}

    @torch.no_grad()
    def run_teacher(self, images: ImageList) -> DetectorOutput:
        """Return the teacher's outputs that the method needs, for images from the student's transform."""
        output, _ = forward_detector(self.teacher, self._as_teacher_input(images), needs=self.method.needs)
        return output

    def _as_teacher_input(self, images: ImageList) -> ImageList:
        """Normalise with the teacher's mean and std where they differ from the student's; padding stays 0."""
        ours, theirs = self.student.transform, self.teacher.transform
        if (ours.image_mean, ours.image_std) == (theirs.image_mean, theirs.image_std):
            return images
        values = images.tensors.new_tensor([ours.image_mean, ours.image_std, theirs.image_mean, theirs.image_std])
        mean_s, std_s, mean_t, std_t = values[:, :, None, None]
        tensors = torch.zeros_like(images.tensors)
        for output, image, (h, w) in zip(tensors, images.tensors, images.image_sizes):
            output[:, :h, :w] = (image[:, :h, :w] * std_s + mean_s - mean_t) / std_t
        return ImageList(tensors, images.image_sizes)


def check_terms(distiller: Distiller, images: list[Tensor], targets: list[dict[str, Tensor]]) -> list[str]:
    """Check on images with boxes that every distillation loss sends a gradient to the student.

    Runs in eval mode, so neither batch norm statistics nor the warm-up change. A single term may be zero for a reason,
    for example TID's weak area may be empty: check it again by `check_not_zero` after some training.

    Args:
        distiller: with a method.
        images: as for `Distiller.forward`.
        targets: likewise, with at least one box.

    Returns:
        The names of the terms that are zero on these images.

    Raises:
        TrainingError: all terms are zero, or one does not depend on the student: wrong weights, features of the wrong
            network or a detached tensor. The message names the term.
    """
    distiller.eval()
    images, targets = distiller.student.transform(images, targets)
    student_output, _ = forward_detector(distiller.student, images, targets, distiller.method.needs)
    losses = distiller.method(student_output, distiller.run_teacher(images), targets)
    distiller.train()

    zero = [name for name, loss in losses.items() if loss.item() == 0]
    if len(zero) == len(losses):
        raise TrainingError(f"{', '.join(zero)} is zero: teacher and student agree exactly, or nothing is compared")
    parameters = [p for p in distiller.student.parameters() if p.requires_grad]
    for name in losses.keys() - set(zero):
        loss = losses[name]
        if not loss.requires_grad:
            raise TrainingError(f"{name} = {loss.item():.4g} has no gradient: it does not depend on the student")
        relative = loss / loss.detach()  # the gradient of a tiny weight would underflow in half precision
        gradients = torch.autograd.grad(relative, parameters, retain_graph=True, allow_unused=True)
        if not any(g is not None and (g != 0).any() for g in gradients):
            raise TrainingError(f"{name} = {loss.item():.4g} sends no gradient to any parameter of the student")
    return zero


@torch.no_grad()
def measure_ratios(distiller: Distiller, batches: Iterable[tuple[list[Tensor], list[dict]]]) -> dict[str, Tensor]:
    """Measure each distillation loss relative to the detection losses, without weights, warm-up and training.

    Works on copies, because a forward in training mode changes the statistics of batch norm.

    Args:
        distiller: with a method.
        batches: images and targets as for `Distiller.forward`.

    Returns:
        The sum of each loss over the batches, divided by that of all detection losses; 0-dimensional.
    """
    student, method = copy.deepcopy((distiller.student, distiller.method))
    trial = Distiller(student, distiller.teacher, method).train()
    totals, total = Counter(), 0
    for images, targets in batches:
        detection, distillation = trial(images, targets)
        totals.update(distillation)
        total += sum(detection.values())
    return {name: value / total for name, value in totals.items()}


def check_not_zero(distillation: dict[str, float], steps: int) -> None:
    """Check after the first epoch that no distillation loss was zero all the time.

    Args:
        distillation: mean of each loss over the steps.
        steps: of the epoch; with fewer than PATIENCE nothing is checked.

    Raises:
        TrainingError: names the losses.
    """
    zero = [name for name, value in distillation.items() if value == 0]
    if zero and steps >= PATIENCE:
        raise TrainingError(
            f"{', '.join(zero)} was zero in all of {steps} steps: check the teacher. To leave a term out on purpose, "
            "give it a tiny weight such as 1e-9 instead of 0"
        )
