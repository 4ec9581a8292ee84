"""Transforms of (image, target), with reproducible random numbers."""

import numpy as np
import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2


def augmentation(train: bool) -> v2.Compose:
    """Return the transforms of (image, target): a horizontal flip when training, then floats in 0..1."""
    flip = [v2.RandomHorizontalFlip()] if train else []
    return v2.Compose(
        [*flip, v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True), v2.ToPureTensor()]
    )


def set_train_scales(transform: nn.Module, low: int, high: int, aspect_ratios: np.ndarray) -> str:
    """Let a detector's transform draw the short side of each training image from a range; evaluation keeps its own.

    Args:
        transform: torchvision's, with a single short side, and a long side that limits every draw.
        low: lowest short side, in pixels.
        high: highest.
        aspect_ratios: width / height of each training image.

    Returns:
        One line that says how many draws the long side limits.

    Raises:
        ValueError: it limits all of them.
    """
    (short,), longest = transform.min_size, transform.max_size
    elongation = np.maximum(aspect_ratios, 1 / aspect_ratios)
    if (low * elongation >= longest).all():
        raise ValueError(
            f"--multi-scale {low} {high} has no effect, because --image-size limits the long side to {longest} pixels: "
            "give a lower first number, or --image-size a larger second one"
        )
    free = np.floor(longest / elongation)  # the largest short side that is not limited
    limited = (high - free.clip(low - 1, high)).mean() / (high - low + 1)
    transform.min_size = (*(side for side in range(low, high + 1) if side != short), short)  # evaluation takes the last
    return f"short sides of {low} to {high} pixels in training; the long side {longest} limits {limited:.0%} of them"


def apply_seeded(transforms, image, target: dict, seed: int, epoch: int, index: int) -> tuple:
    """Apply transforms to a sample, with torch random numbers that depend on seed, epoch and index only.

    Neither the number of workers nor an interruption of the run changes them. The global generator keeps its state.

    Args:
        transforms: called on (image, target); None to skip.
        image: as the data set reads it.
        target: as the data set reads it.
        seed: of the run.
        epoch: counted from 0.
        index: of the sample in its data set.

    Returns:
        (image, target) as the transforms return them.
    """
    if transforms is None:
        return image, target
    key = [number % 2**32 for number in (seed, epoch, index)]  # SeedSequence rejects negative numbers
    mixed = int(np.random.SeedSequence(key).generate_state(1)[0])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mixed)  # torch.manual_seed would seed the GPUs too
        return transforms(image, target)
