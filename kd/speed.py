"""What makes a step cheaper and leaves what it computes as it is."""

import copy
import ctypes
import platform

import torch
from timm.layers import FrozenBatchNormAct2d
from timm.layers.norm_act import BatchNormAct2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}  # --amp and the type of its autocast

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h

BATCH_NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d, BatchNormAct2d, FrozenBatchNormAct2d)


def keep_freed_memory() -> None:
    """Let the C library keep what freed tensors leave behind, for the whole process, in place of returning it.

    glibc gives every freed block of more than 32 MB back to the kernel, which hands it out again page by page, filled
    with zeros. From images of 640 pixels on, that is where a step on the CPU spends a quarter of its time. Does nothing
    without glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def speed_up_teacher(teacher: nn.Module, autocast: torch.dtype | None = None) -> nn.Module:
    """Return a teacher with its batch norm folded and channels last; what it computes stays.

    Args:
        teacher: in eval mode, on its device.
        autocast: type that it will be run in, None for float32. The weights of its body are then kept in that type:
            autocast would round them anew at every step. The teacher can no longer run without autocast.
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
    """Return a copy of a network that will not be trained, its batch norm folded into the convolutions before it.

    Which convolution a norm follows is read from the order of their registration. That is not always the order of
    computation, so both networks are run once: where they differ, the network is returned as it was.

    Args:
        network: in eval mode; returns a list of maps.
        image: [1, 3, h, w], to try it with.
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
