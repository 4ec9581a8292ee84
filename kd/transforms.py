"""Transforms of (image, target), and random numbers that a run can be repeated with."""

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
    """Apply transforms to an item, with random numbers that depend on seed, epoch and index alone.

    So neither the number of workers nor the place where a run was interrupted changes what is drawn. torch's random
    numbers are meant; the state of its generator is left as it was.

    Args:
        transforms: called on (image, target); None for none.
        image: as the data set reads it.
        target: likewise.
        seed: of the run.
        epoch: counted from 0.
        index: of the item in its data set.

    Returns:
        What the transforms return, (image, target).
    """
    if transforms is None:
        return image, target
    key = [number % 2**32 for number in (seed, epoch, index)]  # SeedSequence takes no negative numbers
    mixed = int(np.random.SeedSequence(key).generate_state(1)[0])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mixed)  # torch.manual_seed would seed the GPUs too
        return transforms(image, target)
