"""A loop of steps that can be killed at any moment and goes on as if it had not been.

Whatever a step draws is a function of a seed and of numbers that the loop's state has, so a checkpoint is that state.
"""

from __future__ import annotations

import json
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsd_fast.jobs import read_tensors, remove_stale, write_tensors

CHECKPOINT = "training.safetensors"


class Loop(ABC):
    """What is computed step by step.

    A subclass says what a step is and what its state is made of; :meth:`run` goes on from the folder's checkpoint,
    takes the steps and writes checkpoints. It changes the state only inside ``with self.changing():``.

    Args:
        folder: of the checkpoint, behind a lock of the caller's; None keeps none.
        fingerprint: what changes the result, by name; a checkpoint of another is refused.
        save_every: seconds between checkpoints; 0 saves after every step.
        file: name of the checkpoint.
    """

    def __init__(
        self, folder: Path | None, fingerprint: Mapping[str, Any], save_every: float, file: str = CHECKPOINT
    ) -> None:
        self._file = None if folder is None else folder / file
        self._fingerprint, self._save_every = as_json(fingerprint), save_every
        self._whole, self._saved = True, True

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether no step is left."""

    @abstractmethod
    def step(self) -> None:
        """Take one step."""

    @abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Give the state between two steps: tensors, and what JSON gives back as it is."""

    @abstractmethod
    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take back what :meth:`state` gave; the tensors are on the CPU."""

    def settle(self, *, report: bool) -> None:  # noqa: B027
        """Take in what steps have left under way, before their state is asked for; with ``report`` tell of it, too."""

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Stand around every change of the state: what is interrupted inside is lost back to the last checkpoint."""
        self._whole, self._saved = False, False
        yield
        self._whole = True

    def run(self) -> None:
        """Go on from the checkpoint, if there is one, to the end; what an exception interrupts is in the checkpoint.

        Raises:
            ValueError: the folder's checkpoint is one of another fingerprint, with the names of what differs; or is no
                file that a loop wrote.
            OSError: the folder cannot be read or written, or the disk is full.
        """
        self._resume()
        last = time.monotonic()
        try:
            while not self.done:
                self.step()
                if time.monotonic() - last >= self._save_every:
                    self._save(report=True)
                    last = time.monotonic()
        finally:
            self._save(report=False)

    def _save(self, *, report: bool) -> None:
        # Half a step would be taken twice.
        if not self._whole:
            return
        try:
            self.settle(report=report)
        finally:
            if self._file is not None and self._whole and not self._saved:
                tensors, values = self.state()
                write_tensors(self._file, tensors, {**values, "fingerprint": self._fingerprint})
                self._saved = True

    def _resume(self) -> None:
        if self._file is None or not self._file.parent.exists():
            return
        remove_stale(self._file)
        if not self._file.exists():
            return
        from safetensors import SafetensorError

        try:
            tensors, values = read_tensors(self._file)
        except SafetensorError as error:
            raise ValueError(f"out: {self._file} is no checkpoint ({error}); choose another folder") from error
        found, own = values.pop("fingerprint", {}), self._fingerprint
        other = sorted(key for key in {*found, *own} if found.get(key) != own.get(key))
        if other:
            raise ValueError(
                f"out: {self._file} is of another fit, which differs in {', '.join(other)}; choose another folder"
            )
        self.restore(tensors, values)


def as_json(value: Any) -> Any:
    """Give a value as JSON gives it back: tuples, ranges, arrays and their numbers as lists and numbers."""
    return json.loads(json.dumps(value, default=lambda x: x.tolist() if hasattr(x, "tolist") else list(x)))


def seed_of(*key: int) -> int:
    """Give a seed for torch's generator on the CPU, which knows 32 bits of it alone, from up to four numbers.

    Zeros at the end of the key make no difference.
    """
    return int(np.random.SeedSequence(key).generate_state(1)[0])


_RANDOM = threading.Lock()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators, the CPU's and the device's, inside the block; after it they are as they were.

    They are the process's: one training at a time has them.
    """
    with _RANDOM, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # Not torch.manual_seed: that seeds every device.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
