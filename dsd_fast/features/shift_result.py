"""Content shift of images, as numbers, as a table and as a picture."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dsd_fast.metrics import bootstrap

if TYPE_CHECKING:
    from rich.table import Table

Floats = NDArray[np.float64]

# With more layers the numbers in a picture could not be read.
_WRITTEN = 40


@dataclass(frozen=True, eq=False)
class ShiftResult:
    """Content shift of N images under K techniques, at L layers and S timesteps.

    Attributes:
        techniques: K names.
        layers: L ids.
        timesteps: S, as the network is told them under the first technique.
        diffs: (K, L, S, N) float64, diff(F).
        anchor_diffs: (L, N) float64, diff of the anchor.
        anchor: name of the anchor's technique and its timestep, as the network is told it.
    """

    techniques: tuple[str, ...]
    layers: tuple[str, ...]
    timesteps: tuple[float, ...]
    diffs: Floats
    anchor_diffs: Floats
    anchor: tuple[str, float]

    @property
    def scores(self) -> Floats:
        """(K, L, S, N): Score of eq. 2; at most 1, higher is truer to the image.

        Raises:
            ValueError: an anchor without any shift.
        """
        if not (self.anchor_diffs > 0).all():
            layer = self.layers[int(np.argwhere(~(self.anchor_diffs > 0))[0][0])]
            raise ValueError(f"anchor: its feature {layer!r} has no content shift, so nothing can be told against it")
        anchor = self.anchor_diffs[None, :, None]
        return (anchor - self.diffs) / anchor

    def rows(self, confidence: float = 0.95) -> list[dict[str, Any]]:
        """A row for each technique, layer and timestep: "technique", "layer", "timestep", "score" (the mean over
        images), "low" and "high" (its bootstrap interval over images), "diff" (mean) and "images"."""
        scores = self.scores
        low, high = bootstrap(np.moveaxis(scores, -1, 0), lambda drawn: drawn.mean(0), confidence=confidence)
        mean, diffs = scores.mean(-1), self.diffs.mean(-1)
        return [
            {
                "technique": technique,
                "layer": layer,
                "timestep": timestep,
                "score": float(mean[k, i, s]),
                "low": float(low[k, i, s]),
                "high": float(high[k, i, s]),
                "diff": float(diffs[k, i, s]),
                "images": scores.shape[-1],
            }
            for k, technique in enumerate(self.techniques)
            for i, layer in enumerate(self.layers)
            for s, timestep in enumerate(self.timesteps)
        ]

    def table(self) -> Table:
        """The rows as a rich table: a line for each layer and timestep, a column for each technique."""
        from rich.table import Table
        from rich.text import Text

        # Text, not markup: a name may have brackets.
        table = Table("layer", "t", title=Text(f"content shift score, anchor {self.anchor[0]} at t = {self.anchor[1]}"))
        for technique in self.techniques:
            table.add_column(Text(technique), justify="right")
        rows = self.rows()
        lines = len(self.layers) * len(self.timesteps)
        for line in range(lines):
            cells = [f"{row['score']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" for row in rows[line::lines]]
            table.add_row(rows[line]["layer"], str(rows[line]["timestep"]), *map(Text, cells))
        return table

    def picture(self) -> bytes:
        """PNG file: mean scores as heat maps of layers × timesteps, one for each technique, on one scale.

        Raises:
            ImportError: matplotlib is not installed; says which extra brings it.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ImportError("pictures of scores need matplotlib: pip install 'dsd-fast[bench]'") from error
        mean = self.scores.mean(-1)
        lines, columns, panels = len(self.layers), len(self.timesteps), len(self.techniques)
        written = lines <= _WRITTEN
        size = (4.0 + panels * max(1.4, 0.5 * columns), max(2.4, 1.0 + lines * (0.3 if written else 0.12)))
        figure = Figure(figsize=size, layout="constrained", dpi=120)
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
        low, high = min(0.0, float(mean.min())), 1.0
        for panel, values, name in zip(axes, mean, self.techniques, strict=True):
            image = panel.imshow(values, vmin=low, vmax=high, cmap="viridis", aspect="auto")
            panel.set_title(name, fontsize=8, loc="left", parse_math=False)
            panel.set_yticks(range(lines), self.layers, fontsize=6)
            panel.set_xticks(range(columns), [f"{t}" for t in self.timesteps], fontsize=7)
            panel.set_xlabel("timestep", fontsize=7)
            for i, j in np.ndindex(lines, columns) if written else ():
                ink = "white" if values[i, j] < (low + high) / 2 else "black"
                panel.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=6, color=ink)
        bar = figure.colorbar(image, ax=list(axes))
        bar.set_label(f"score, 0 = {self.anchor[0]} at t = {self.anchor[1]}", fontsize=7, parse_math=False)
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Software": None})
        return out.getvalue()
