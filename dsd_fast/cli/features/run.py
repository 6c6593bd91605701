"""An extraction: images through a FeatureExtractor into a job's folder, pictures and report.html."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsd_fast.cli.features.options import FeaturesRequest
from dsd_fast.cli.features.pca import fitted
from dsd_fast.cli.features.pictures import FOLDER, NAMES, Pictures, Shown, first_usable, save
from dsd_fast.cli.features.report import render
from dsd_fast.cli.files import check_folder, replacing_files, writing
from dsd_fast.cli.images import ImageFiles, read_prompts
from dsd_fast.cli.job_report import files_of, last_timeline
from dsd_fast.cli.results import versions
from dsd_fast.cli.terminal import CommandError, progress
from dsd_fast.features import FeatureExtractor, Technique
from dsd_fast.features.export import check_layout, extract_to
from dsd_fast.features.extraction import check_inversion
from dsd_fast.jobs import Exported, JobError, read_index, read_manifest, replacing
from dsd_fast.jobs.lock import waiting

# Errors in a summary; the index has all.
_ERRORS = 50


def run(request: FeaturesRequest, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Extracts the features of all images; Ctrl-C ends it early, and the same command goes on.

    Args:
        settings: arguments of :class:`FeatureExtractor`.

    Returns:
        "complete"; "counts" of this run, or of the folder where it was interrupted; "folder", the counts of all runs;
        "errors", the first; "seconds" and "overlap" of this run.

    Raises:
        CommandError: `out` belongs to another job or cannot be written; images or prompts that are not there.
        ValueError: settings that do not fit the model.
    """
    chosen, out = request.features, request.out
    files = ImageFiles(request.images, without=out)
    prompts = chosen.prompt if chosen.prompts is None else files.prompts(read_prompts(chosen.prompts))
    _check(request, settings)
    model = request.source.load()
    technique = Technique(controls=request.controls.load(model, request.source), **asdict(request.latents))
    extractor = FeatureExtractor(model, **settings, technique=technique)
    pictures = Pictures(extractor) if request.files.pictures else None
    try:
        if chosen.pca is not None:
            pca = fitted(extractor, files, prompts, chosen.seed, chosen.pca, chosen.pca_images, out)
            extractor = FeatureExtractor(model, **settings, technique=technique, pca=pca)
        request.memory.compiled(extractor)
        start = time.perf_counter()
        exported = _extract(extractor, files, prompts, request)
        seconds = time.perf_counter() - start
    except JobError as error:
        raise CommandError(f"--out {error}") from error
    summary = _summary(exported, len(files), out) | {"seconds": seconds}
    if exported is not None and (request.files.report or pictures is not None):
        # The last of several workers that end at once sees the rows of all.
        with writing(out), waiting(out, "report"):
            shown = [] if pictures is None else _draw(pictures, files, prompts, request)
            _report(summary | _summary(exported, len(files), out), extractor, pictures, shown, out)
    return summary


def _check(request: FeaturesRequest, settings: Mapping[str, Any]) -> None:
    """Refuses what needs no model to be refused."""
    request.source.check()
    request.memory.check(request.source.device)
    request.controls.check()
    technique = Technique(**asdict(request.latents))
    if technique.inversion:
        check_inversion(settings["draws"])
    check_layout(request.files.layout)
    check_folder(request.out)


def _extract(
    extractor: FeatureExtractor, files: ImageFiles, prompts: str | Sequence[str], request: FeaturesRequest
) -> Exported | None:
    """None after Ctrl-C."""
    job = request.files
    with progress("images") as display:
        # A share of the images that is about this worker's; how many they are shows at the end.
        task = display.add_task("features", total=-(-len(files) // job.workers), units=0)

        def show(done: int) -> None:
            display.update(task, completed=done, units=done)

        try:
            exported = extract_to(
                extractor,
                request.out,
                files,
                prompts,
                request.features.seed,
                names=files.names,
                layout=job.layout,
                shard_rows=job.shard_rows,
                worker=job.worker,
                workers=job.workers,
                retry_errors=job.retry_errors,
                progress=show,
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


def _draw(pictures: Pictures, files: ImageFiles, prompts: str | Sequence[str], request: FeaturesRequest) -> list[Shown]:
    numbers, images, own = first_usable(pictures.model, files, prompts, request.files.pictures)
    with replacing_files(request.out / FOLDER, NAMES) as folder:
        shown = []
        for number, each in zip(numbers, pictures.draw(images, own, request.features.seed), strict=True):
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
        file.write(render(content, shown, layers, last_timeline(out), _loading(settings["layout"], extractor, out)))


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
