"""A run of zero-shot learning, with its progress, into report.html."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from dsd_fast.class_tokens.zsl import ZslConfig, run_zsl
from dsd_fast.cli.files import check_folder, writing
from dsd_fast.cli.options import exact_products, quiet_transformers
from dsd_fast.cli.results import versions
from dsd_fast.cli.terminal import CommandError, progress
from dsd_fast.cli.zsl.report import Pair, render
from dsd_fast.generation.files import IMAGES, image_path
from dsd_fast.jobs import JobError, read_index, replacing

# Classes on the page, and pairs of images of each.
_CLASSES, _PAIRS, _SIDE = 12, 2, 192


def run(config: ZslConfig) -> dict[str, Any]:
    """Does all stages that are not done, and writes the page.

    Raises:
        CommandError: the folder cannot be written, or has other results; a package that is not installed.
        ValueError: data or settings that do not fit.
        KeyboardInterrupt: after Ctrl-C.
    """
    check_folder(config.out)
    quiet_transformers()
    exact_products()
    stages: dict[str, Any] = {}
    with writing(config.out), progress("items") as display:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = display.add_task(stage, total=total, units=0)
            display.update(stages[stage], completed=done, units=done)

        try:
            results = run_zsl(config, report=report)
        except (JobError, ImportError) as error:
            raise CommandError(str(error)) from error
        with replacing(config.out / "report.html") as file:
            file.write(render({**results, "versions": versions()}, pairs(config.out, results["images"])))
    return results


def pairs(out: Path, folders: Mapping[str, str]) -> dict[str, list[Pair]]:
    """Gives of the first classes images of the same noise without and with the token."""
    there = {name: out / folder for name, folder in folders.items() if (out / folder).is_dir()}
    if len(there) < len(folders):
        return {}
    rows: dict[str, dict[tuple[str, int], str]] = {}
    for name, folder in there.items():
        index = read_index(folder, ["label", "seed", "status"]).to_pylist()
        rows[name] = {(row["label"], row["seed"]): row["id"] for row in index if row["status"] == "ok"}
    found: dict[str, list[Pair]] = {}
    for label, seed in rows["token"]:
        if (label, seed) not in rows["plain"] or (label not in found and len(found) == _CLASSES):
            continue
        if len(found.setdefault(label, [])) < _PAIRS:
            shown = [_small(there[name] / IMAGES / image_path(rows[name][label, seed], label, "png")) for name in rows]
            found[label].append(Pair(seed, **dict(zip(rows, shown, strict=True))))
    return found


def _small(file: Path) -> Image.Image:
    with Image.open(file) as image:
        image.thumbnail((_SIDE, _SIDE))
        return image.convert("RGB")
