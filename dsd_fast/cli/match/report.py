"""What `dsd-fast match` shows people: heat maps as files, and report.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsd_fast.cli.heatmaps import save, shown
from dsd_fast.cli.report import Card, card, cards, errors, page, paragraph, section, settings
from dsd_fast.cli.terminal import counted
from dsd_fast.images import ImageError, load_image
from dsd_fast.images.overlay import enlarged
from dsd_fast.matching import Matcher

# Images, and words of an image's captions together, on the page; the files have all.
SHOWN, _WORDS = 50, 24


class MatchReport:
    """Collects the first images for the page, and writes the heat maps of all.

    Args:
        folder: of the heat maps.
        matcher: that scores, for the heat maps.
        heatmaps: of how many of each image's best captions.

    Attributes:
        stopped: whether no more heat maps are drawn.
    """

    def __init__(self, folder: Path, matcher: Matcher, heatmaps: int) -> None:
        self.folder, self.matcher, self.heatmaps = folder, matcher, heatmaps
        self.stopped = False
        self._cards: list[str] = []

    def add(
        self, index: int, source: Path, path: str, ranked: Sequence[dict[str, Any]], lowest: float, highest: float
    ) -> None:
        """Adds one scored image; the entries of `ranked` with heat maps get their files' names as "heatmap".

        Args:
            index: of the image in the run.
            source: the file.
            path: its name as it is written into results.
            ranked: its best captions, best first.
            lowest, highest: of all its scores.
        """
        wanted = len(self._cards) < SHOWN
        mapped = [] if self.stopped else ranked[: self.heatmaps]
        if not wanted and not mapped:
            return
        try:
            image = load_image(source)
        except ImageError:
            # It was there when it was scored, so the scores stand.
            self._cards += [card(Card(path, None, ranked, lowest, highest))] if wanted else []
            return
        every = self.matcher.heatmaps(image, [row["caption"] for row in mapped]) if mapped else []
        maps, room = [], _WORDS
        for rank, (row, own) in enumerate(zip(mapped, every, strict=True), start=1):
            row["heatmap"] = save(self.folder, index, rank, image, path, row["caption"], own)
            if wanted:
                maps.append(shown(image, row["caption"], own, room))
                room -= len(maps[-1].words)
        if wanted:
            self._cards.append(card(Card(path, enlarged(image), ranked, lowest, highest, maps)))

    def page(self, summary: Mapping[str, Any]) -> bytes:
        """Makes report.html of a run: of its "settings", "versions", "counts", "complete" and the first "errors"."""
        counts, chosen = summary["counts"], summary["settings"]
        scored = counts["scored"]
        lead = [
            f"{counted(scored, 'image')} scored with {counted(counts['captions'], 'caption')} by {chosen['model']}. "
            "A higher score is a better match."
        ]
        if not summary["complete"]:
            left = f"{counted(counts['not_reached'], 'image')} not reached"
            lead.append(f"Interrupted: {left if counts['not_reached'] else 'heat maps are missing'}.")
        if counts["errors"]:
            lead.append(f"{counted(counts['errors'], 'image')} could not be scored; the reasons are at the end.")
        what = "Bars go from the lowest score of an image, over all captions, to its highest."
        if self.heatmaps:
            what += (
                " A heat map is the share of the cross-attention at each place that goes to a word, the mean over"
                " timesteps, heads and layers."
            )
        parts = []
        if scored:
            parts.append(section("Best captions", paragraph(what), cards(self._cards, scored)))
        if counts["errors"]:
            parts.append(
                errors(
                    "Not scored",
                    "Images that could not be scored",
                    summary["errors"],
                    counts["errors"],
                    "results.json",
                )
            )
        parts.append(settings({**chosen, "layers": ", ".join(chosen["layers"]), **summary["versions"]}))
        return page("Which caption describes the image?", lead, parts)
