"""checkpoint.pt: a run continues from its own, and refuses others."""

import pytest
import torch
from torch import nn

from kd.run.checkpoint import restore, save


def make_parts(size: int = 2) -> dict:
    """A network, an optimizer, a schedule and a scaler after one step."""
    network = nn.Linear(size, 2)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=12)
    network(torch.ones(1, size)).sum().backward()
    optimizer.step()
    schedule.step()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return {"distiller": network, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}


@pytest.fixture
def checkpoint() -> tuple[dict, dict]:
    """The parts of a run of three epochs of four steps, and the content of its checkpoint after one step."""
    parts = make_parts()
    states = {name: part.state_dict() for name, part in parts.items()}
    position = {"epoch": 0, "step": 1, "skipped": 0, "terms": ["loss_a"], "losses": {"loss_a": 0.5}}
    return parts, {**states, **position}


def test_restore(tmp_path, checkpoint):
    """Each part gets its state back, and what else was saved is returned."""
    trained, content = checkpoint
    save(content, tmp_path / "checkpoint.pt")
    fresh = make_parts()
    assert restore(fresh, tmp_path / "checkpoint.pt", 3, 4)["losses"] == {"loss_a": 0.5}
    assert torch.equal(fresh["distiller"].weight, trained["distiller"].weight)
    assert fresh["schedule"].last_epoch == 1


@pytest.mark.parametrize(
    "name", ["distiller", "optimizer", "schedule", "scaler", "epoch", "step", "skipped", "terms", "losses"]
)
def test_a_checkpoint_without_a_part(tmp_path, checkpoint, name):
    """Or with one of another type."""
    parts, content = checkpoint
    for value, words in ((None, f"{name} has type NoneType"), ("x", f"{name} has type str"), (..., f"it lacks {name}")):
        changed = {key: value if key == name else old for key, old in content.items()}
        torch.save({key: v for key, v in changed.items() if v is not ...}, tmp_path / "checkpoint.pt")
        with pytest.raises(ValueError, match=f"is not a checkpoint of this run: {words}"):
            restore(parts, tmp_path / "checkpoint.pt", 3, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epoch": 99}, "epoch 99, step 1 is not among 3 epochs of 4 steps"),
        ({"epoch": -1}, "epoch -1, step 1 is not among"),
        ({"epoch": True}, "epoch has type bool"),
        ({"step": 10**9}, "epoch 0, step 1000000000 is not among"),
        ({"optimizer": make_parts(3)["optimizer"].state_dict()}, "its optimizer does not fit .*other shapes"),
        ({"optimizer": {"state": {}, "param_groups": []}}, "its optimizer does not fit .*parameter groups"),
        ({"optimizer": {}}, "its optimizer does not fit .*other keys or types"),
        ({"schedule": {}}, "its schedule does not fit .*other keys or types"),
        ({"scaler": {"scale": 1.0}}, "its scaler does not fit .*other keys or types"),
        ({"distiller": make_parts(3)["distiller"].state_dict()}, r"do not fit the Linear: weight is \(2, 3\)"),
        ({"distiller": {}}, "do not fit the Linear: missing weight, missing bias"),
        ({"losses": {"loss_a": "x"}}, "its losses and terms do not belong together"),
        ({"terms": [7]}, "its losses and terms do not belong together"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_run(tmp_path, checkpoint, changes, message):
    parts, content = checkpoint
    torch.save({**content, **changes}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=message):
        restore(parts, tmp_path / "checkpoint.pt", 3, 4)
