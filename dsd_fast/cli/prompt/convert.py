"""A conversion: images through an ImagePromptConverter into a job's folder, pictures and report.html."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from dsd_fast.cli import cluster
from dsd_fast.cli.files import check_folder, writing
from dsd_fast.cli.images import ImageFiles
from dsd_fast.cli.job_report import files_of, hidden_share, last_timeline, summary
from dsd_fast.cli.prompt.options import ConvertRequest
from dsd_fast.cli.prompt.pictures import Sheet, write_sheets
from dsd_fast.cli.prompt.report import figures, render
from dsd_fast.cli.results import versions
from dsd_fast.engine.image_prompts import ImagePrompt
from dsd_fast.image_prompt import ImagePromptConfig
from dsd_fast.jobs import index_shards, read_manifest, replacing
from dsd_fast.jobs.lock import waiting
from dsd_fast.jobs.store import OK


def run(request: ConvertRequest, config: ImagePromptConfig) -> dict[str, Any]:
    """Converts all images; Ctrl-C ends it early, and the same command goes on.

    Returns:
        "complete"; "counts" of this run, or of the folder where it was interrupted; "folder", the counts of all runs;
        "errors", the first; "seconds" and "overlap" of this run.

    Raises:
        CommandError: `out` belongs to another job or cannot be written; images or prompts that are not there.
        ValueError: settings that do not fit the model.
    """
    files = ImageFiles(request.images, without=request.out)
    texts = request.texts.texts(files)
    make = partial(Conversion, request, config)
    if request.workers.engine is None:
        make = partial(Conversion, request, config, files, texts)
    shown = request.pictures.report or request.pictures.pictures
    finish = Conversion.show if shown else None
    numbers = cluster.run(request.workers, make, request.out, total=len(files), unit="images", finish=finish)
    return _summary(numbers, len(files), request.out)


class Conversion:
    """The work of the command, with all that it needs loaded.

    Args:
        files, texts: those of the request; found where not given.
    """

    def __init__(
        self,
        request: ConvertRequest,
        config: ImagePromptConfig,
        files: ImageFiles | None = None,
        texts: str | Sequence[str] = "",
    ) -> None:
        if files is None:
            files = ImageFiles(request.images, without=request.out)
            texts = request.texts.texts(files)
        self.request, self.files, self.texts = request, files, texts
        # Of the machine that computes, which with Ray is another one.
        request.source.check()
        check_folder(request.out)
        self.sampling = request.pictures.sampling()
        self.converter = request.source.load_converter(config)

    def __call__(self, worker: int, workers: int, progress: Callable[[int], None], /) -> dict[str, float]:
        """Converts one worker's images."""
        request = self.request
        exported = self.converter.convert_to(
            request.out,
            self.files,
            self.texts,
            alpha=request.alpha,
            names=self.files.names,
            shard_rows=request.files.shard_rows,
            worker=worker,
            workers=workers,
            retry_errors=request.files.retry_errors,
            progress=progress,
        )
        hidden = exported.overlap * exported.write_seconds
        return {**asdict(exported.counts), "writing": exported.write_seconds, "writing_hidden": hidden}

    def show(self, numbers: Mapping[str, float]) -> None:
        """Makes the pictures, and writes report.html."""
        request, out = self.request, self.request.out
        # The last of several workers that end at once sees the rows of all.
        with writing(out), waiting(out, "report"):
            shown = figures(self._sheets())
            if request.pictures.report:
                content = {
                    **_summary(numbers, len(self.files), out),
                    "settings": read_manifest(out)["settings"],
                    "versions": versions(),
                    "files": files_of(out),
                }
                with replacing(out / "report.html") as file:
                    file.write(render(content, shown, last_timeline(out), _loading(request, self.converter.model.name)))

    def _sheets(self) -> Iterator[Sheet]:
        chosen, out = self.request.pictures, self.request.out
        rows = (row for rows in index_shards(out, ["id", "path", "prompt", "status"]) for row in rows.to_pylist())
        first = list(islice((row for row in rows if row["status"] == OK), chosen.pictures))
        if not first:
            return iter(())
        sides = [(self.converter.model, ImagePrompt.load(out)[: len(first)])]
        paths, texts = [Path(row["path"]) for row in first], [row["prompt"] for row in first]
        return write_sheets(out, paths, texts, sides, self.sampling, chosen.variations)


def _summary(numbers: Mapping[str, float] | None, images: int, out: Path) -> dict[str, Any]:
    return {**summary(numbers, images, out, ["name", "path"]), "overlap": hidden_share(numbers, "writing")}


def _loading(request: ConvertRequest, name: str) -> str:
    """Python that makes an image of each prompt."""
    tuned, model = request.source.tuned, f"dsd.load({name!r})"
    if tuned is not None:
        model = f"dsd.ImagePromptConverter.load({str(tuned)!r}, {model}).model"
    return (
        f"import dsd_fast as dsd\n\nmodel = {model}\nprompts = dsd.ImagePrompt.load({str(request.out)!r})\n"
        "for image in dsd.generate(model, prompts):\n    image.show()"
    )
