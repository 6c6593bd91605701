"""Features while an ordinary generation runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dsd_fast.features.attention import KEY, AttentionTap
from dsd_fast.unet import UNetProgram

# What stock pipelines hand to the UNet and the plan takes too; anything else would be left out without a word.
_TAKEN = {
    "sample",
    "timestep",
    "encoder_hidden_states",
    "timestep_cond",
    "added_cond_kwargs",
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "return_dict",
}


class Background:
    """Watches the calls of a UNet, and at chosen ones runs the part that features need on the same inputs first.

    The network's own modules stay as they are but for a hook that sees the call come.

    Args:
        program: of the network that is watched.
        layers: ids of the features.
        attention: places whose maps make the feature "attn", see :class:`AttentionTap`.
        change: from a feature as the network has it to the one that is kept.
        calls: which calls count, the first being 1.

    Attributes:
        found: layer id, or "attn" → {call: feature}.
    """

    def __init__(
        self,
        program: UNetProgram,
        layers: Sequence[str],
        attention: Sequence[str],
        change: Callable[[str, Tensor], Tensor],
        calls: Iterable[int],
    ) -> None:
        program.check()
        self._program, self._layers, self._attention, self._change = program, layers, attention, change
        self._calls = frozenset(calls)
        self._count = 0
        self.found: dict[str, dict[int, Tensor]] = {name: {} for name in (*layers, *([KEY] if attention else []))}
        self._unet = program.unet
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
        sample, states = given["sample"], given["encoder_hidden_states"]
        tap = None
        if self._attention:
            # Of the generation's own size, which need not be that of the images.
            tap = AttentionTap(self._program, self._attention, tuple(sample.shape[-2:]), states.shape[1])
        plan = self._program.plan(features=self._layers, maps=() if tap is None else tap.ids)
        added = given.get("added_cond_kwargs") or {}
        down: Any = given.get("down_block_additional_residuals")
        mid: Any = given.get("mid_block_additional_residual")
        text = plan.encode_text(states, added.get("text_embeds"))
        out = plan.run(
            sample.to(self._program.dtype),
            given["timestep"],
            text,
            timestep_cond=given.get("timestep_cond"),
            time_ids=added.get("time_ids"),
            residuals=None if down is None else (down, mid),
            map_tokens=torch.arange(text.tokens, device="cpu"),
        )
        return out.features if tap is None else {**out.features, KEY: tap.gather(out)}
