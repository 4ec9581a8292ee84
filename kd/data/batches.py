"""Batches of images, and of their indices."""

import numpy as np


def collate(batch: list[tuple]) -> tuple[list, list]:
    """Return the images and the targets of a batch as two lists; images may differ in size."""
    images, targets = zip(*batch)
    return list(images), list(targets)


def group_batches(indices: list[int], aspect_ratios: np.ndarray, batch_size: int, factor: int) -> list[list[int]]:
    """Divide indices into batches of similar aspect ratio, which need less padding.

    Their number does not depend on the ratios, so all processes have the same: images that are left in their group form
    the last batches together. The last indices are dropped if they do not fill a batch, whatever their ratios.

    Args:
        indices: of a data set, in random order.
        aspect_ratios: width / height of each image of the data set.
        batch_size: images in a batch.
        factor: number of groups between ratios 1/2 and 1, and between 1 and 2, as in torchvision's references; 0 for a
            single group.
    """
    indices = indices[: len(indices) // batch_size * batch_size]
    edges = 2 ** np.linspace(-1, 1, 2 * factor + 1) if factor else []
    waiting, batches = {}, []
    for index, group in zip(indices, np.digitize(aspect_ratios[indices], edges).tolist()):
        batch = waiting.setdefault(group, [])
        batch.append(index)
        if len(batch) == batch_size:
            batches.append(waiting.pop(group))
    rest = [index for group in sorted(waiting) for index in waiting[group]]
    return batches + [rest[start : start + batch_size] for start in range(0, len(rest), batch_size)]
