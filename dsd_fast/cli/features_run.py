"""An extraction: images through a FeatureExtractor into a job's folder, pictures and report.html."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsd_fast.cli.features_images import ImageFiles, read_prompts
from dsd_fast.cli.features_pca import fitted
from dsd_fast.cli.features_pictures import FOLDER, NAMES, Pictures, Shown, first_usable, save
from dsd_fast.cli.features_report import files_of, render
from dsd_fast.cli.files import replacing_files, writing
from dsd_fast.cli.results import versions
from dsd_fast.cli.terminal import CommandError, progress
from dsd_fast.features import FeatureExtractor, Technique
from dsd_fast.features.export import Exported, extract_to
from dsd_fast.jobs import JobError, read_index, read_manifest, replacing
from dsd_fast.jobs.lock import waiting
from dsd_fast.jobs.timeline import Timeline

if TYPE_CHECKING:
    from dsd_fast.models import Model
    from dsd_fast.models.controlnet import Control

# Errors in a summary; the index has all.
_ERRORS = 50


@dataclass(frozen=True)
class Request:
    """What a command asks for besides the extractor's settings.

    Attributes:
        images: files and folders.
        prompt, prompts: one for all, or the file with one each.
        seed: of the noise.
        components: of the PCA, or None.
        pca_images: that it is fitted to.
        pictures: of how many images pictures are written; implies the report.
        report: whether report.html is written.
        runtime: that the network is compiled for, or None.
        job: arguments of :func:`extract_to`: layout, shard_rows, retry_errors, worker, workers.
    """

    images: Sequence[Path]
    prompt: str = ""
    prompts: Path | None = None
    seed: int = 0
    components: int | None = None
    pca_images: int = 64
    pictures: int = 0
    report: bool = False
    runtime: str | None = None
    job: Mapping[str, Any] = field(default_factory=dict)


def run(
    load: Callable[[], Model],
    load_controls: Callable[[Model], Sequence[Control]],
    settings: Mapping[str, Any],
    technique: Mapping[str, Any],
    request: Request,
    out: Path,
) -> dict[str, Any]:
    """Extracts the features of all images; Ctrl-C ends it early, and the same command goes on.

    Args:
        load: gives the model.
        load_controls: gives its ControlNets.
        settings: arguments of :class:`FeatureExtractor`.
        technique: of :class:`Technique`, besides the ControlNets.
        out: folder of the results, made if missing.

    Returns:
        "complete"; "counts" of this run, or of the folder where it was interrupted; "folder", the counts of all runs;
        "errors", the first; "seconds" and "overlap" of this run.

    Raises:
        CommandError: `out` belongs to another job or cannot be written; images or prompts that are not there.
        ValueError: settings that do not fit the model.
    """
    files = ImageFiles(request.images, without=out)
    prompts = request.prompt if request.prompts is None else files.prompts(read_prompts(request.prompts))
    model = load()
    way = Technique(controls=tuple(load_controls(model)), **technique)
    extractor = FeatureExtractor(model, **settings, technique=way)
    pictures = Pictures(extractor) if request.pictures else None
    try:
        if request.components is not None:
            pca = fitted(extractor, files, prompts, request.seed, request.components, request.pca_images, out)
            extractor = FeatureExtractor(model, **settings, technique=way, pca=pca)
        if request.runtime is not None:
            extractor.compile(request.runtime)
        start = time.perf_counter()
        exported = _extract(extractor, files, prompts, request, out)
        seconds = time.perf_counter() - start
    except JobError as error:
        raise CommandError(f"--out {error}") from error
    summary = _summary(exported, len(files), out) | {"seconds": seconds}
    if exported is not None and (request.report or pictures is not None):
        # The last of several workers that end at once sees the rows of all.
        with writing(out), waiting(out, "report"):
            shown = [] if pictures is None else _draw(pictures, files, prompts, request, out)
            _report(summary | _summary(exported, len(files), out), extractor, pictures, shown, out)
    return summary


def _extract(
    extractor: FeatureExtractor, files: ImageFiles, prompts: str | Sequence[str], request: Request, out: Path
) -> Exported | None:
    """None after Ctrl-C."""
    workers = request.job.get("workers", 1)
    with progress("images") as display:
        # A share of the images that is about this worker's; how many they are shows at the end.
        task = display.add_task("features", total=-(-len(files) // workers), units=0)

        def show(done: int) -> None:
            display.update(task, completed=done, units=done)

        try:
            exported = extract_to(
                extractor, out, files, prompts, request.seed, names=files.names, progress=show, **request.job
            )
        except KeyboardInterrupt:
            return None
        display.update(task, total=exported.counts.inputs)
    return exported


def _summary(exported: Exported | None, images: int, out: Path) -> dict[str, Any]:
    import pyarrow.compute as pc

    index = read_index(out, ["name", "path", "status", "reason", "message"])
    errors = index.filter(pc.not_equal(index["status"], "ok"))
    folder = {"ok": len(index) - len(errors), "errors": len(errors)}
    if exported is None:
        counts = dict.fromkeys(("duplicates", "done", "done_errors", "elsewhere"), 0)
        counts = {"inputs": images, **folder, **counts, "not_reached": max(0, images - len(index))}
    else:
        counts = {**asdict(exported.counts), "not_reached": exported.counts.not_reached}
    return {
        "complete": exported is not None,
        "counts": counts,
        "folder": folder,
        "errors": errors.slice(0, _ERRORS).to_pylist(),
        "overlap": 0.0 if exported is None else exported.overlap,
    }


def _draw(
    pictures: Pictures, files: ImageFiles, prompts: str | Sequence[str], request: Request, out: Path
) -> list[Shown]:
    numbers, images, chosen = first_usable(pictures.model, files, prompts, request.pictures)
    with replacing_files(out / FOLDER, NAMES) as folder:
        shown = []
        for number, each in zip(numbers, pictures.draw(images, chosen, request.seed), strict=True):
            save(folder, number, each, pictures.layers)
            shown.append(each)
    return shown


def _report(
    summary: dict[str, Any],
    extractor: FeatureExtractor,
    pictures: Pictures | None,
    shown: Sequence[Shown],
    out: Path,
) -> None:
    settings = read_manifest(out)["settings"]
    settings["layers"] = ", ".join(settings["layers"])
    content = {
        **summary,
        "settings": settings,
        "versions": versions(),
        "shapes": {name: list(shape) for name, shape in extractor.shapes.items()},
        "files": files_of(out),
    }
    layers = () if pictures is None else pictures.layers
    with replacing(out / "report.html") as file:
        file.write(render(content, shown, layers, _timeline(out), _loading(settings["layout"], extractor, out)))


def _timeline(out: Path) -> Timeline:
    """Of the last run that wrote anything."""
    line = Timeline()
    files = sorted(out.glob("timeline*.json"), key=lambda file: file.stat().st_mtime)
    for span in json.loads(files[-1].read_bytes())["spans"] if files else ():
        line.add(span["name"], span["start"], span["end"])
    return line


def _loading(layout: str, extractor: FeatureExtractor, out: Path) -> str:
    """Python that reads a feature of the first image that has any."""
    layer, shape = extractor.layers[0], ("timesteps, " if len(extractor.timesteps) > 1 else "") + "channels, …"
    if layout == "shards":
        return (
            "from dsd_fast.jobs import read_index\nfrom safetensors.torch import load_file\n\n"
            f'row = next(row for row in read_index({str(out)!r}).to_pylist() if row["status"] == "ok")\n'
            f"features = load_file({str(out)!r} + f\"/shards/{{row['shard']}}.safetensors\")  # layer → rows\n"
            f'feature = features[{layer!r}][row["row"]]  # timesteps, channels, height, width'
        )
    index = read_index(out, ["name", "status"]).to_pylist()
    name = next((row["name"] for row in index if row["status"] == "ok"), "NAME")
    parts = {"npy-layer": [layer, name], "npy-sample": [name, layer]}.get(layout, [name])
    file = "/".join([str(out), *parts])
    return f"import numpy\n\nfeature = numpy.load({file + '.npy'!r})  # {shape}"
