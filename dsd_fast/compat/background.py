"""Features while an ordinary generation runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dsd_fast.unet import Plan

# What stock pipelines hand to the UNet and the plan takes too; anything else would be left out without a word.
_TAKEN = {
    "sample",
    "timestep",
    "encoder_hidden_states",
    "added_cond_kwargs",
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "return_dict",
}


class Background:
    """Watches the calls of a UNet, and at chosen ones runs a plan on the same inputs first.

    The network's own modules stay as they are but for a hook that sees the call come.

    Args:
        plan: of the network that is watched; gives the features.
        change: from a feature as the plan gives it to the one that is kept.
        calls: which calls count, the first being 1.

    Attributes:
        found: layer id → {call: feature}.
    """

    def __init__(self, plan: Plan, change: Callable[[str, Tensor], Tensor], calls: Iterable[int]) -> None:
        self._plan, self._change = plan, change
        self._calls = frozenset(calls)
        self._count = 0
        self.found: dict[str, dict[int, Tensor]] = {name: {} for name in plan.features}
        self._unet = plan.program.unet
        self._signature = inspect.signature(self._unet.forward)
        self._handle: Any = None
        self.watch()

    def watch(self) -> None:
        """Begins, or goes on."""
        if self._handle is None:
            self._handle = self._unet.register_forward_pre_hook(self._called, with_kwargs=True)

    def stop(self) -> None:
        """Leaves the network as it was before."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The network without the hook, with which no plan would run."""
        watching = self._handle is not None
        self.stop()
        try:
            yield
        finally:
            if watching:
                self.watch()

    def _called(self, unet: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._count += 1
        if self._count not in self._calls:
            return
        given = self._signature.bind(*args, **kwargs).arguments
        for name, value in given.items():
            if name not in _TAKEN and value is not None and value != {}:
                raise ValueError(f"{name}: the UNet was called with it, and background extraction would ignore it")
        with self.suspended(), torch.no_grad():
            features = self._features(given)
        for name, value in features.items():
            self.found[name][self._count] = self._change(name, value)

    def _features(self, given: Mapping[str, Any]) -> Mapping[str, Tensor]:
        plan, sample = self._plan, given["sample"]
        added = given.get("added_cond_kwargs") or {}
        down: Any = given.get("down_block_additional_residuals")
        mid: Any = given.get("mid_block_additional_residual")
        text = plan.encode_text(given["encoder_hidden_states"], added.get("text_embeds"))
        out = plan.run(
            sample.to(plan.program.dtype),
            given["timestep"],
            text,
            time_ids=added.get("time_ids"),
            residuals=None if down is None else (down, mid),
        )
        return out.features
