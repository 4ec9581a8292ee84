"""Files of a run: written atomically, read without executing anything."""

import zipfile
from pathlib import Path

import torch
from torch import nn

from kd.detectors import build_detector
from kd.distiller import TrainingError
from kd.run.contents import check_model, check_parts, first_three, is_state_dict, is_whole, not_finite
from kd.run.files import whole

# What a checkpoint holds beside the states of its parts: see `kd.run.progress.Progress`.
POSITION = {"epoch": int, "step": int, "skipped": int, "terms": list, "losses": dict}


def save(content: dict, path: Path) -> None:
    """Write `content` to `path`; a crash leaves the old file or the new one.

    Raises:
        TrainingError: a tensor is not finite.
        OSError: the file cannot be written, for example because the disk is full.
    """
    names = list(not_finite(content))
    if names:
        raise TrainingError(
            f"{path} is not written, because training has diverged: {first_three(names)} are not finite. Lower --lr, "
            "or check the data"
        )
    with whole(path) as file:
        torch.save(content, file)


def load(path: str | Path) -> dict:
    """Read tensors and plain values from `path` to the CPU.

    torch does not compare the checksums of its files, zipfile does. Files of torch before 1.6 have none.

    Raises:
        ValueError: the file does not exist, is damaged, or contains other objects, which are never unpickled.
    """
    path = Path(path)
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"cannot read the checkpoint {path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        damaged = None
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        content = torch.load(path, map_location="cpu", weights_only=True) if damaged is None else None
    except OSError as error:
        raise ValueError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    except Exception as error:  # the unpickler raises many types, and advises to switch weights_only off
        raise ValueError(
            f"{path} is not a checkpoint that can be loaded safely: it is damaged, of another format, or contains more "
            "than tensors and plain values. Copy or download it again, or store its state_dict alone"
        ) from error
    if damaged:
        raise ValueError(f"{path} is damaged: the checksum of {damaged} differs. Copy or download it again")
    return content


def restore(parts: dict[str, object], path: Path, epochs: int, steps_per_epoch: int) -> dict:
    """Load into each part the state saved under its name; return the content of the file.

    Args:
        parts: objects with load_state_dict.
        path: of a file that `Progress.save` wrote.
        epochs: of the run.
        steps_per_epoch: of the run.

    Raises:
        ValueError: the file cannot be loaded, lacks something, or does not fit the run.
    """
    content = load(path)
    check_parts(content, dict.fromkeys(parts, dict) | POSITION, path, "is not a checkpoint of this run")
    epoch, step = content["epoch"], content["step"]
    if not is_whole(epoch, 0, epochs - 1) or not is_whole(step, 0, steps_per_epoch):
        raise ValueError(
            f"{path} is not a checkpoint of this run: epoch {epoch}, step {step} is not among {epochs} epochs of "
            f"{steps_per_epoch} steps"
        )
    losses = content["losses"]
    if not all(type(value) is float for value in losses.values()) or not all(t in losses for t in content["terms"]):
        raise ValueError(f"{path} is not a checkpoint of this run: its losses and terms do not belong together")
    for name, part in parts.items():
        restore_part(name, part, content[name], path)
    return content


def restore_part(name: str, part: object, state: dict, path: Path) -> None:
    """Load the state of a network, an optimizer, a schedule or a scaler.

    Raises:
        ValueError: the state belongs to another one.
    """
    if isinstance(part, nn.Module):
        return load_strictly(part, state, path)
    saved, ours = ({key: type(value) for key, value in s.items()} for s in (state, part.state_dict()))
    try:
        if saved != ours:
            raise ValueError("it has other keys or types")
        part.load_state_dict(state)
        for parameter, values in part.state.items() if isinstance(part, torch.optim.Optimizer) else ():
            if any(value.dim() and value.shape != parameter.shape for value in values.values()):
                raise ValueError("tensors have other shapes than the parameters")
    except Exception as error:  # optimizers raise many types
        raise ValueError(f"{path} is not a checkpoint of this run: its {name} does not fit ({error})") from error


def save_model(detector: nn.Module, arguments: dict, categories: dict[int, dict], path: Path) -> None:
    """Write a detector and what is needed to build it again.

    Mean and std of its input are added to the arguments: timm may change them with a model's default weights.

    Args:
        detector: the student (or teacher) without the method's adapters.
        arguments: of `build_detector`, with from_scratch and without pretrained.
        categories: COCO category of each label.
        path: of the file.
    """
    named = {label: {"id": category["id"], "name": category["name"]} for label, category in categories.items()}
    arguments = arguments | normalisation(detector)
    save({"model": detector.state_dict(), "arguments": arguments, "categories": named}, path)


def normalisation(detector: nn.Module) -> dict[str, list[float]]:
    """Return the arguments of `build_detector` that give another detector the mean and std of this one's input."""
    return {name: list(getattr(detector.transform, name)) for name in ("image_mean", "image_std")}


def load_model(path: str | Path) -> tuple[nn.Module, dict]:
    """Build the detector in a file of `save_model`, and load its weights strictly.

    Returns:
        The detector in eval mode, and the content of the file.

    Raises:
        ValueError: the file is of another kind, or its weights do not fit.
    """
    content = load(path)
    return build_saved(content, path), content


def build_saved(content: object, path: str | Path) -> nn.Module:
    """Build the detector of a model.pt in eval mode; errors as for `load_model`."""
    check_model(content, path)
    detector = build_detector(**content["arguments"])
    load_strictly(detector, content["model"], path)
    return detector.eval()


def load_strictly(network: nn.Module, state_dict: dict, path: str | Path) -> None:
    """Load a state_dict of which every tensor must fit.

    Raises:
        ValueError: names the file and the first missing, unexpected, misshapen or not finite tensors.
    """
    fault = f"the weights in {path} do not fit the {type(network).__name__}"
    if not is_state_dict(state_dict):
        raise ValueError(f"{fault}: they are not tensors with names")
    try:
        network.load_state_dict(state_dict, strict=True)
    except RuntimeError as error:
        shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
        faults = [f"missing {name}" for name in shapes if name not in found]
        faults += [f"unexpected {name}" for name in found if name not in shapes]
        faults += [f"{name} is {found[name]}, not {s}" for name, s in shapes.items() if found.get(name, s) != s]
        raise ValueError(f"{fault}: {first_three(faults or [str(error)])}") from error
    names = list(not_finite(network.state_dict()))
    if names:
        raise ValueError(f"the weights in {path} are damaged: {first_three(names)} are not finite")
