"""What a plan answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsd_fast.kernels.common.transfer import Download, upload


@dataclass
class Output:
    """What a plan answers, one entry per requested row.

    Attributes:
        features: layer id → (B, C, h, w) in the network's type; a ``…-map`` id → (B, H, L, T).
        scores: score id → (B, H) float32 (float64 for a float64 network), natural logarithm.
        maps: map id → (B, n, h, w) of the same type, probabilities averaged over heads; of a self-attention n = h·w,
            map j being the probabilities of position j.
        noise_pred: (B, C, h, w), the model's output as diffusers gives it (v for v-models), or None.

    A value may share memory with another, or with the latents given (``unet-in``).
    """

    features: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    maps: dict[str, Tensor] = field(default_factory=dict)
    noise_pred: Tensor | None = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors with a name each, in a fixed order."""
        for kind in ("features", "scores", "maps"):
            for name, value in getattr(self, kind).items():
                yield f"{kind}[{name}]", value
        if self.noise_pred is not None:
            yield "noise_pred", self.noise_pred

    def check_rows(self, rows: int) -> None:
        """Refuse an output that is not for ``rows`` rows.

        Raises:
            ValueError: names a tensor of another number of rows.
        """
        for name, value in self.tensors():
            if len(value) != rows:
                raise ValueError(f"out: {name} has {len(value)} rows, expected {rows}")

    def cut(self, rows: int) -> Output:
        """The first ``rows`` rows, as views."""
        return self._map(lambda value: value[:rows])

    def clone(self) -> Output:
        """A copy that shares no memory with this one."""
        return self._map(torch.clone)

    def into(self, out: Output | None) -> Output:
        """``out``, filled with this one; this one where there is none.

        Raises:
            ValueError: as :meth:`fill`.
        """
        if out is None:
            return self
        out.fill([(None, self)])
        return out

    def _map(self, change: Callable[[Tensor], Tensor]) -> Output:
        return Output(
            features={name: change(value) for name, value in self.features.items()},
            scores={name: change(value) for name, value in self.scores.items()},
            maps={name: change(value) for name, value in self.maps.items()},
            noise_pred=None if self.noise_pred is None else change(self.noise_pred),
        )

    def fill(self, parts: Iterable[tuple[Tensor | None, Output]]) -> None:
        """Copy each (rows, output) of ``parts`` into those rows of this one; None: into all.

        Host memory gets the output of a device while the next part is made.

        Raises:
            ValueError: this one does not hold what an output does, or has not that many rows.
        """
        mine, waiting = dict(self.tensors()), None
        for rows, output in parts:
            values = dict(output.tensors())
            if mine.keys() != values.keys():
                raise ValueError(f"out: holds {', '.join(mine) or 'nothing'}, expected {', '.join(values)}")
            for name, value in values.items():
                shape = (len(mine[name] if rows is None else rows), *mine[name].shape[1:])
                if shape != value.shape:
                    raise ValueError(f"out: {name} has {shape} for these rows, expected {tuple(value.shape)}")
            # Of all rows there is no next part, and perhaps a gradient.
            here = {} if rows is None else {name: x for name, x in values.items() if mine[name].device.type == "cpu"}
            _write(mine, {name: value for name, value in values.items() if name not in here}, rows)
            download = Download(here)
            if waiting is not None:
                _write(mine, waiting[0].done(), waiting[1])
            waiting = (download, rows) if download.beside else None
            if waiting is None:
                _write(mine, download.done(), rows)
        if waiting is not None:
            _write(mine, waiting[0].done(), waiting[1])


def _write(targets: Mapping[str, Tensor], values: Mapping[str, Tensor], rows: Tensor | None) -> None:
    for name, value in values.items():
        target = targets[name]
        if rows is None:
            target.copy_(value)
        else:
            target.index_copy_(0, upload(rows, target.device), value.to(target.device, target.dtype))
