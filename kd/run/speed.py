"""Optimisations that change results by no more than rounding."""

import copy
import ctypes
import platform

import torch
from timm.layers import FrozenBatchNormAct2d
from timm.layers.norm_act import BatchNormAct2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}  # --amp and the dtype of autocast

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h

BATCH_NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d, BatchNormAct2d, FrozenBatchNormAct2d)


def keep_freed_memory() -> None:
    """Make the C library keep the memory of freed tensors for the whole process; does nothing without glibc.

    glibc returns every freed block above 32 MB to the kernel, which zeroes it page by page when it is used again. With
    images of 640 pixels and more, a training step on the CPU spends a quarter of its time there.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def speed_up_teacher(teacher: nn.Module, autocast: torch.dtype | None = None) -> nn.Module:
    """Return a teacher in channels_last with batch norm folded into its convolutions.

    Args:
        teacher: in eval mode, on its device.
        autocast: the dtype it will run in, None for float32. The weights of its body are stored in that dtype, which
            saves autocast from rounding them at every step; the teacher then needs autocast to run.
    """
    body = teacher.backbone.body
    height, width = body.pretrained_cfg.get("input_size", (3, 224, 224))[1:]
    image = torch.rand(1, 3, height, width, device=next(teacher.parameters()).device)
    teacher.backbone.body = fold_batch_norm(body, image)
    if autocast:
        for module in teacher.backbone.body.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.to(autocast)
    return teacher.to(memory_format=torch.channels_last)


@torch.no_grad()
def fold_batch_norm(network: nn.Module, image: torch.Tensor) -> nn.Module:
    """Return a copy of a network with each batch norm folded into the convolution before it.

    The convolution is found by the order of registration, which is not always the order of computation. Both networks
    are therefore run once, and where they differ the network is returned unchanged.

    Args:
        network: in eval mode; returns a list of maps.
        image: [1, 3, h, w], to compare the two with.
    """
    folded = copy.deepcopy(network)
    for parent in list(folded.modules()):
        previous = None
        for name, child in list(parent.named_children()):
            if isinstance(previous, nn.Conv2d) and isinstance(child, BATCH_NORMS):
                previous.weight, previous.bias = fuse_conv_bn_weights(
                    previous.weight,
                    previous.bias,
                    child.running_mean,
                    child.running_var,
                    child.eps,
                    child.weight,
                    child.bias,
                )
                setattr(parent, name, getattr(child, "act", nn.Identity()))
            previous = child
    pairs = zip(network(image), folded(image))
    same = all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-3 * a.abs().max()) for a, b in pairs)
    return folded if same else network
