"""A timm feature extractor under torchvision's feature pyramid."""

import difflib
from functools import cache
from pathlib import Path

import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn.functional import relu
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

STRIDES = {**dict.fromkeys(("fcos", "gfl", "retinanet"), (8, 16, 32, 64, 128)), "faster_rcnn": (4, 8, 16, 32, 64)}
FPN_CHANNELS = 256
# Pretrained, these have torchvision's V1 weights, which the papers' detectors start from; timm's default weights of the
# same models are others.
SHORT_NAMES = {f"r{depth}": f"resnet{depth}.tv_in1k" for depth in (18, 34, 50, 101, 152)}


class Backbone(nn.Module):
    """A timm feature extractor followed by torchvision's FeaturePyramidNetwork.

    Args:
        body: a timm model created with features_only=True that returns one map per stride up to 32, finest first.
        strides: of the pyramid levels, in pixels, finest first.
        extra_blocks: torchvision's block that computes the levels above stride 32.

    Attributes:
        out_channels: channels of every level.
    """

    def __init__(self, body: nn.Module, strides: tuple[int, ...], extra_blocks: nn.Module):
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), FPN_CHANNELS, extra_blocks)
        self.strides = strides
        self.out_channels = FPN_CHANNELS
        self.channels_last = str(getattr(body, "output_fmt", "NCHW")).endswith("NHWC")

    def body_maps(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps of the body [N, C, H, W], finest first, for images [N, 3, h, w]."""
        maps = self.body(images)
        return [m.permute(0, 3, 1, 2).contiguous() for m in maps] if self.channels_last else maps

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the pyramid levels [N, 256, H, W], finest first, in float32 also under autocast.

        torchvision creates anchors in the dtype of these maps. In bfloat16 the anchors of an 800-pixel image would be
        rounded to multiples of 4 pixels.
        """
        levels = self.fpn({str(i): m for i, m in enumerate(self.body_maps(images))})
        return {name: at_least_float32(level) for name, level in levels.items()}


class CoarseLevels(LastLevelP6P7):
    """torchvision's P6 and P7, in float32 also under autocast.

    On CPUs with avx512_bf16, oneDNN 3.13 reads uninitialised memory for the weight gradient of a bfloat16 convolution
    with stride 2 on a map that is one position wide, such as P6 of a 64-pixel image. These levels are too small for
    the dtype to matter for speed.
    """

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Append P6 and P7 to the levels `p` and their names; `c` are the maps of the body."""
        p = [at_least_float32(level) for level in p]
        if torch.jit.is_scripting():  # its autocast takes a constant device; scripted detectors are not trained
            p6, p7 = self.coarser(p[-1])
        else:
            with torch.autocast(p[-1].device.type, enabled=False):
                p6, p7 = self.coarser(p[-1])
        return p + [p6, p7], names + ["p6", "p7"]

    def coarser(self, p5: Tensor) -> tuple[Tensor, Tensor]:
        """Return P6 and P7, [N, 256, H, W] each, from P5."""
        p6 = self.p6(p5)
        return p6, self.p7(relu(p6))


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32; keep float32 and float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def timm_name(backbone: str) -> str:
    """Return the timm model name of a backbone: r50 becomes resnet50.tv_in1k, a timm name is returned as it is.

    Raises:
        ValueError: timm has no such model; the message lists close matches.
    """
    name = SHORT_NAMES.get(backbone, backbone)
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, [*SHORT_NAMES, *timm.list_models()], n=5)
        hint = f"did you mean {', '.join(close)}?" if close else f"short names are {', '.join(SHORT_NAMES)}"
        raise ValueError(f"timm has no model named {backbone!r}; {hint}")
    return name


def build_backbone(backbone: str, detector: str, pretrained: bool | str = False) -> Backbone:
    """Build the feature extractor and pyramid of a detector; parameters that no level depends on are frozen.

    Args:
        backbone: a short name (r18, r50, ...) or a timm model name.
        detector: a key of STRIDES.
        pretrained: True loads ImageNet weights from timm's model hub, a path loads them from a timm state_dict.

    Raises:
        ValueError: the model does not exist, has no feature maps at the required strides, or its weights cannot be
            loaded.
    """
    name = timm_name(backbone)
    body_strides = [stride for stride in STRIDES[detector] if stride <= 32]
    body = create_body(name, feature_indices(name, body_strides, detector), pretrained)
    extra_blocks = LastLevelMaxPool() if detector == "faster_rcnn" else CoarseLevels(FPN_CHANNELS, FPN_CHANNELS)
    result = Backbone(body, STRIDES[detector], extra_blocks)
    check_maps(result, body_strides, name)
    depends = depends_on(name, tuple(body_strides))
    for key, parameter in body.named_parameters():
        if not depends.get(key, True):  # as in an HRNet without its map at stride 4; DistributedDataParallel would stop
            parameter.requires_grad_(False)
    return result


def feature_indices(name: str, strides: list[int], detector: str) -> tuple[int, ...]:
    """Return the indices of a timm model's deepest feature map at each stride.

    Raises:
        ValueError: the model has no features_only mode, or no map at one of the strides.
    """
    try:
        with torch.device("meta"):
            info = timm.create_model(name, features_only=True).feature_info
    except (RuntimeError, AssertionError, AttributeError, NotImplementedError) as error:
        raise ValueError(f"{name} cannot carry a pyramid: it has no features_only mode in timm ({error})") from error
    reductions = info.reduction()
    if not set(strides) <= set(reductions):
        raise ValueError(
            f"{name} has feature maps at strides {reductions}, but {detector} needs {strides}: choose a backbone with "
            "a feature hierarchy (a plain ViT has a single stride)"
        )
    return tuple(len(reductions) - 1 - reductions[::-1].index(stride) for stride in strides)


def any_size(name: str) -> dict[str, bool]:
    """Return the options with which a timm model takes images of any size; Swin has to be told.

    Its last stage then has no shifted windows, as in timm's classifiers of 224 or 256 pixels.
    """
    return {"strict_img_size": False} if name.startswith("swin") else {}


def create_body(name: str, indices: tuple[int, ...], pretrained: bool | str) -> nn.Module:
    """Create a timm feature extractor; arguments as in `build_backbone`.

    Raises:
        ValueError: the weights cannot be loaded or belong to another model.
    """
    file = pretrained if isinstance(pretrained, str) else None
    if file and not Path(file).is_file():
        raise ValueError(f"--pretrained {file}: no such file")
    overlay = {"file": file} if file else None
    options = {"features_only": True, "out_indices": indices, **any_size(name)}
    if not pretrained:
        return timm.create_model(name, **options)
    try:
        body = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except Exception as error:  # the hub, the file system and the unpickler raise different types
        raise ValueError(
            f"cannot load the pretrained weights of {name} from {file or 'the model hub'}: {error}. Give a local file "
            "with --pretrained FILE, or train from scratch without --pretrained"
        ) from error
    if file:  # timm loads feature extractors with strict=False, and stages.0.x may be called stages_0.x in the body
        held = {key.replace(".", "_") for key in timm.models.load_state_dict(file)}
        counters = "num_batches_tracked"  # of batch norm, which old files lack
        names = [k.removeprefix("model.").removeprefix("body.") for k in body.state_dict()]  # timm wraps some bodies
        missing = [k for k in names if k.replace(".", "_") not in held and not k.endswith(counters)]
        if missing:
            raise ValueError(
                f"{file} is not a checkpoint of timm's {name}: it lacks {len(missing)} tensors, first {missing[0]}"
            )
    return body


@torch.no_grad()
def check_maps(backbone: Backbone, strides: list[int], name: str) -> None:
    """Raise ValueError unless the body takes any image, and returns the maps that timm announces."""
    height, width = 64, 96
    training = backbone.training
    backbone.eval()
    try:
        shapes = [tuple(m.shape[1:]) for m in backbone.body_maps(torch.zeros(1, 3, height, width))]
    except (AssertionError, RuntimeError) as error:
        reason = f": {error}" if str(error) else ""
        raise ValueError(
            f"{name} does not take an image of {height}x{width} pixels, as a detector's may be{reason}"
        ) from error
    backbone.train(training)
    channels = backbone.body.feature_info.channels()
    expected = [(c, -(-height // s), -(-width // s)) for c, s in zip(channels, strides)]
    if shapes != expected:
        raise ValueError(
            f"{name} announces feature maps [C, H, W] of {expected} for a {height}x{width} image but returns {shapes}"
        )


def freeze_like_torchvision(body: nn.Module, backbone: str) -> nn.Module:
    """Freeze all batch norm and the layers up to stride 4, as torchvision does with pretrained backbones.

    These are the layers on which the map at stride 4 depends, or the coarsest before it.

    Args:
        body: as `create_body` returns it.
        backbone: its name.

    Returns:
        The body with frozen batch norm.
    """
    body = freeze_batch_norm_2d(body)
    early = depends_on(timm_name(backbone), (1, 2, 4))
    for name, parameter in body.named_parameters():
        if early.get(name, False):
            parameter.requires_grad_(False)
    return body


@cache
def depends_on(name: str, strides: tuple[int, ...]) -> dict[str, bool]:
    """Return for each parameter of a timm feature extractor, by name, whether a map at one of the strides needs it.

    Of several maps at a stride the deepest counts.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.device("meta"):
        body = timm.create_model(name, features_only=True, **any_size(name)).eval()
        maps = dict(zip(body.feature_info.reduction(), body(torch.zeros(1, 3, 64, 96))))
        sums = [m.sum() for stride, m in maps.items() if stride in strides]
        names, parameters = zip(*body.named_parameters())
        gradients = torch.autograd.grad(sums, parameters, allow_unused=True)
    return {key: gradient is not None for key, gradient in zip(names, gradients)}
