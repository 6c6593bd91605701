"""An extraction: images through a FeatureExtractor into a job's folder, pictures and report.html."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from dsd_fast.cli import cluster
from dsd_fast.cli.features.options import FeaturesRequest
from dsd_fast.cli.features.pca import fitted
from dsd_fast.cli.features.pictures import FOLDER, NAMES, Pictures, Shown, first_usable, save
from dsd_fast.cli.features.report import render
from dsd_fast.cli.files import check_folder, replacing_files, writing
from dsd_fast.cli.images import ImageFiles, read_prompts
from dsd_fast.cli.job_report import files_of, hidden_share, last_timeline, summary
from dsd_fast.cli.results import versions
from dsd_fast.features import FeatureExtractor, Technique
from dsd_fast.features.export import check_layout, extract_to
from dsd_fast.features.extraction import check_inversion
from dsd_fast.jobs import index_shards, read_manifest, replacing
from dsd_fast.jobs.lock import waiting


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
    files, prompts = _inputs(request)
    make = partial(Features, request, settings)
    if request.workers.engine is None:
        make = partial(Features, request, settings, files, prompts)
    shown = request.files.report or request.files.pictures
    finish = Features.report if shown else None
    numbers = cluster.run(request.workers, make, request.out, total=len(files), unit="images", finish=finish)
    return _summary(numbers, len(files), request.out)


class Features:
    """The work of the command, with all that it needs loaded.

    Args:
        files, prompts: those of the request; found where not given.
    """

    def __init__(
        self,
        request: FeaturesRequest,
        settings: Mapping[str, Any],
        files: ImageFiles | None = None,
        prompts: str | Sequence[str] = "",
    ) -> None:
        chosen = request.features
        if files is None:
            files, prompts = _inputs(request)
        self.request, self.files, self.prompts = request, files, prompts
        _check(request, settings)
        model = request.source.load()
        technique = Technique(controls=request.controls.load(model, request.source), **asdict(request.latents))
        extractor = FeatureExtractor(model, **settings, technique=technique)
        self.pictures = Pictures(extractor) if request.files.pictures else None
        if chosen.pca is not None:
            pca = fitted(extractor, files, prompts, chosen.seed, chosen.pca, chosen.pca_images, request.out)
            extractor = FeatureExtractor(model, **settings, technique=technique, pca=pca)
        self.extractor = request.memory.compiled(extractor)

    def __call__(self, worker: int, workers: int, progress: Callable[[int], None], /) -> dict[str, float]:
        """Extracts one worker's images."""
        job = self.request.files
        exported = extract_to(
            self.extractor,
            self.request.out,
            self.files,
            self.prompts,
            self.request.features.seed,
            names=self.files.names,
            layout=job.layout,
            shard_rows=job.shard_rows,
            worker=worker,
            workers=workers,
            retry_errors=job.retry_errors,
            progress=progress,
        )
        hidden = exported.overlap * exported.write_seconds
        return {**asdict(exported.counts), "writing": exported.write_seconds, "writing_hidden": hidden}

    def report(self, numbers: Mapping[str, float]) -> None:
        """Draws the pictures, and writes report.html."""
        out = self.request.out
        # The last of several workers that end at once sees the rows of all.
        with writing(out), waiting(out, "report"):
            shown = [] if self.pictures is None else self._draw(self.pictures)
            settings = read_manifest(out)["settings"]
            settings["layers"] = ", ".join(settings["layers"])
            content = {
                **_summary(numbers, len(self.files), out),
                "settings": settings,
                "versions": versions(),
                "shapes": {name: list(shape) for name, shape in self.extractor.shapes.items()},
                "files": files_of(out),
            }
            layers = () if self.pictures is None else self.pictures.layers
            loading = _loading(settings["layout"], self.extractor, out)
            with replacing(out / "report.html") as file:
                file.write(render(content, shown, layers, last_timeline(out), loading))

    def _draw(self, pictures: Pictures) -> list[Shown]:
        numbers, images, own = first_usable(pictures.model, self.files, self.prompts, self.request.files.pictures)
        with replacing_files(self.request.out / FOLDER, NAMES) as folder:
            shown = []
            for number, each in zip(numbers, pictures.draw(images, own, self.request.features.seed), strict=True):
                save(folder, number, each, pictures.layers)
                shown.append(each)
        return shown


def _inputs(request: FeaturesRequest) -> tuple[ImageFiles, str | list[str]]:
    files = ImageFiles(request.images, without=request.out)
    chosen = request.features
    return files, chosen.prompt if chosen.prompts is None else files.prompts(read_prompts(chosen.prompts))


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


def _summary(numbers: Mapping[str, float] | None, images: int, out: Path) -> dict[str, Any]:
    return {**summary(numbers, images, out, ["name", "path"]), "overlap": hidden_share(numbers, "writing")}


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
    rows = (row for rows in index_shards(out, ["id", "name", "status"]) for row in rows.to_pylist())
    name = next((row["name"] for row in rows if row["status"] == "ok"), "NAME")
    parts = {"npy-layer": [layer, name], "npy-sample": [name, layer]}.get(layout, [name])
    file = "/".join([str(out), *parts])
    return f"import numpy\n\nfeature = numpy.load({file + '.npy'!r})  # {shape}"
