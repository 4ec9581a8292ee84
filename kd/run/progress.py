"""The position of a run, its running losses and its checkpoints, so that the training loop can stay plain."""

import json
import math
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from tqdm import tqdm

from kd.data import collate, group_batches
from kd.distiller import TrainingError
from kd.run.checkpoint import restore, save
from kd.run.distributed import barrier, gather, mean_over_processes, rank, say, world_size
from kd.run.folder import cut_log
from kd.run.signals import StopSignal, ignore_signals

CHECKPOINT_MINUTES = 10.0  # between two checkpoints within an epoch


class Progress:
    """Count the steps of a run, average its losses, write its checkpoints and continue from them.

    Random numbers of a step follow from seed, step and process, so a run that was killed and continued ends with the
    same student as one that was not, on a CPU bit for bit.

    Args:
        folder: of the run.
        parts: what a checkpoint holds, by name: objects with state_dict and load_state_dict, among them "schedule" and
            "scaler".
        steps_per_epoch: of a full epoch.
        iterations: steps of the whole run; the last epoch may be shorter.
        seed: of the run.
        title: shown on the progress bar.

    Attributes:
        epoch: the current epoch, from 0.
        step: completed steps of this epoch.
        terms: names of the distillation losses.
    """

    def __init__(self, folder: Path, parts: dict, *, steps_per_epoch: int, iterations: int, seed: int, title: str):
        self.folder, self.parts, self.seed, self.title = folder, parts, seed, title
        self.steps_per_epoch, self.iterations = steps_per_epoch, iterations
        self.epoch = self.step = self.skipped = 0
        self.step_losses, self.losses, self.terms = [], Counter(), []  # losses: sums over the steps of this epoch
        self.signal, self.stopping, self.saved_at = StopSignal(), False, time.monotonic()

    @property
    def iteration(self) -> int:
        """Completed steps of the run."""
        return self.epoch * self.steps_per_epoch + self.step

    @property
    def epochs(self) -> int:
        """Number of epochs, counting a shorter last one."""
        return math.ceil(self.iterations / self.steps_per_epoch)

    @property
    def steps_in_epoch(self) -> int:
        """Number of steps of this epoch."""
        return min(self.steps_per_epoch, self.iterations - self.epoch * self.steps_per_epoch)

    def save(self) -> None:
        """Write checkpoint.pt."""
        if rank() == 0:
            position = {name: getattr(self, name) for name in ("epoch", "step", "skipped", "terms")}
            states = {name: part.state_dict() for name, part in self.parts.items()}
            save({**states, **position, "losses": dict(self.losses)}, self.folder / "checkpoint.pt")
        self.saved_at = time.monotonic()

    def resume(self) -> None:
        """Continue from checkpoint.pt.

        Raises:
            ValueError: the file is damaged or belongs to another run.
        """
        content = restore(self.parts, self.folder / "checkpoint.pt", self.epochs, self.steps_per_epoch)
        for name in ("epoch", "step", "skipped", "terms"):
            setattr(self, name, content[name])
        self.losses = Counter(content["losses"])
        if rank() == 0:
            cut_log(self.folder, self.epoch)
        say(f"continuing {self.folder} after {self.step} steps of epoch {self.epoch + 1}")

    def loader(self, dataset: Dataset, batch_size: int, workers: int, group_factor: int) -> DataLoader:
        """Return a loader of the batches that this process has left in the epoch.

        Args:
            dataset: the training set.
            batch_size: images per process.
            workers: data loading processes.
            group_factor: of `group_batches`.
        """
        dataset.epoch = self.epoch
        sampler = DistributedSampler(dataset, world_size(), rank(), seed=self.seed, drop_last=True)
        sampler.set_epoch(self.epoch)
        batches = group_batches(list(sampler), dataset.aspect_ratios, batch_size, group_factor)
        return DataLoader(
            dataset,
            batch_sampler=batches[self.step : self.steps_in_epoch],
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=ignore_signals,
        )

    def batches(self, loader: DataLoader) -> Iterator[tuple[list, list]]:
        """Yield the batches of a loader; save a checkpoint every CHECKPOINT_MINUTES and at the end.

        Seeds the random numbers of each step. After a signal, the process ends when the step is finished.
        """
        started_at, waited, images_done = time.monotonic(), 0.0, 0
        bar = tqdm(
            loader,
            f"{self.title}: epoch {self.epoch + 1} of {self.epochs}",
            initial=self.iteration,
            total=self.iterations,  # of the whole run, so that the time left is
            disable=rank() > 0,
            dynamic_ncols=True,
        )
        asked_at = time.monotonic()
        for images, targets in bar:
            waited += time.monotonic() - asked_at
            torch.manual_seed(int(np.random.SeedSequence([self.seed, self.iteration, rank()]).generate_state(1)[0]))
            self.image_ids = [target["image_id"] for target in targets]
            yield images, targets
            self.step += 1
            images_done += len(images)
            bar.set_postfix(loss=f"{self.loss:.3f}", lr=f"{self.parts['schedule'].get_last_lr()[0]:.1e}")
            if self.stopping:
                bar.close()
                self.leave()
            if time.monotonic() - self.saved_at >= 60 * CHECKPOINT_MINUTES:
                self.save()
            asked_at = time.monotonic()
        seconds = time.monotonic() - started_at
        self.speed = {
            "images_per_second": images_done * world_size() / seconds if images_done else None,
            "waiting_for_data": waited / seconds,
        }
        self.save()

    def add(self, detection: dict[str, Tensor], distillation: dict[str, Tensor]) -> None:
        """Add the losses of a batch, by name, to those of the step."""
        self.step_losses.append({name: loss.detach() for name, loss in {**detection, **distillation}.items()})
        self.terms = list(distillation)

    def end_step(self, norm: Tensor) -> None:
        """Add the losses of the step, averaged over its batches and processes, to those of the epoch.

        Call it before the optimizer step. With fp16, a gradient that is not finite is left to the scaler, which skips
        the step and lowers its scale.

        Args:
            norm: of the gradient.

        Raises:
            TrainingError: a loss or the norm is not finite. nonfinite.json gets all values and the images.
        """
        batches, self.step_losses = self.step_losses, []
        losses = {name: sum(batch[name] for batch in batches) / len(batches) for name in batches[0]}
        stop = norm.new_tensor(self.signal.number)
        values = mean_over_processes({**losses, "gradient norm": norm, "stop": stop})
        self.stopping = values.pop("stop") > 0
        if self.parts["scaler"].is_enabled():
            self.skipped += not math.isfinite(values.pop("gradient norm"))
        if not all(map(math.isfinite, values.values())):
            self.stop_at(values)
        self.losses.update({name: values[name] for name in losses})
        self.loss = sum(values[name] for name in losses)

    def stop_at(self, values: dict[str, float]) -> None:
        """Write nonfinite.json and raise TrainingError with what is not finite, where, and the last checkpoint."""
        image_ids = [image_id for share in gather(self.image_ids) for image_id in share]
        report = self.folder / "nonfinite.json"
        if rank() == 0:
            report.write_text(
                json.dumps({"iteration": self.iteration, "values": values, "image_ids": image_ids}, indent=1)
            )
        barrier()
        names = ", ".join(name for name, value in values.items() if not math.isfinite(value))
        checkpoint = self.folder / "checkpoint.pt"
        kept = f"the last good state is {checkpoint}" if checkpoint.exists() else "there is no checkpoint yet"
        raise TrainingError(
            f"{names} not finite at iteration {self.iteration}, images {image_ids}: all values are in {report}; {kept}"
        )

    def leave(self) -> None:
        """Save, print the command that continues the run, and end the process."""
        self.save()
        launcher = "python" if world_size() == 1 else "torchrun ..."
        command = shlex.join(sys.argv) + ("" if "--resume" in sys.argv else " --resume auto")
        say(f"stopped after step {self.iteration}, saved in {self.folder}. To continue:\n{launcher} {command}")
        barrier()
        sys.exit(128 + (self.signal.number or signal.SIGTERM))

    def end(self) -> None:
        """Wait for all processes, restore the signal handlers, and stop here if a signal came after the last step."""
        numbers = gather(self.signal.number)
        self.signal.release()
        if any(numbers):
            say(f"stopped; {self.folder} is finished. The same command does what follows, if anything")
            sys.exit(128 + max(numbers))

    def summary(self) -> dict:
        """Return the log line of the epoch: losses averaged over its steps, and its speed.

        ratio_to_detection is the size of each distillation loss relative to the sum of the detection losses, warm-up
        included. waiting_for_data is the part of the time, 0..1, in which the loop had no data. images_per_second is
        None where a resumed run had no step left.
        """
        means = {name: total / self.step for name, total in self.losses.items()}
        detection = sum(mean for name, mean in means.items() if name not in self.terms)
        return {
            "epoch": self.epoch + 1,
            "iteration": self.iteration,
            "losses": means,
            "ratio_to_detection": {name: means[name] / detection for name in self.terms},
            "lr": self.parts["schedule"].get_last_lr()[0],
            "skipped_steps": self.skipped,
            **self.speed,
            "memory_gb": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        }

    def next_epoch(self) -> None:
        """Move to the start of the next epoch."""
        self.epoch, self.step, self.skipped, self.losses = self.epoch + 1, 0, 0, Counter()
