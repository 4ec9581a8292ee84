"""Transforms of (image, target), with reproducible random numbers."""

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2


def augmentation(train: bool) -> v2.Compose:
    """Return the transforms of (image, target): a horizontal flip when training, then floats in 0..1."""
    flip = [v2.RandomHorizontalFlip()] if train else []
    return v2.Compose(
        [*flip, v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True), v2.ToPureTensor()]
    )


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
