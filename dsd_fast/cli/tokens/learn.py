"""A learning run: classes through a ClassTokenLearner into a folder, pictures of them, and what the run was."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress import Progress, TaskID

from dsd_fast.class_tokens import ClassTokenLearner, TokenConfig, TokenUpdate
from dsd_fast.class_tokens.prompts import Prompts
from dsd_fast.cli.files import check_folder, writing
from dsd_fast.cli.images import ImageFiles
from dsd_fast.cli.results import versions, write_json
from dsd_fast.cli.terminal import CommandError, counted, printable, progress
from dsd_fast.cli.tokens.options import LearnRequest
from dsd_fast.cli.tokens.pictures import make_images, texts_of, write_sheets
from dsd_fast.cli.tokens.report import SHOWN, figure, loading, render
from dsd_fast.engine import LearnedTokens
from dsd_fast.engine.guides import guide_of
from dsd_fast.generation.grids import read_classes
from dsd_fast.jobs import JobError, locked, remove_stale, replacing
from dsd_fast.models import Model

HISTORY = "history.json"

# Running classes that have a bar of their own.
_BARS = 8


def run(request: LearnRequest, config: TokenConfig) -> dict[str, Any]:
    """Learns the tokens, and makes the pictures; what an earlier run of the same settings has left is gone on from.

    The model is loaded once the rest is known to be sound.

    Returns:
        The content of history.json: "tokens", a row of each with its "token", "class", what is known about it, and the
        "losses" and "accuracies" of its updates; "settings", "versions", "seconds".

    Raises:
        CommandError: `out` cannot be written, or another process writes to it; classes or files that are not there.
        KeyboardInterrupt: after Ctrl-C; the checkpoint is in `out`.
        ValueError: settings that are not allowed, or a folder of others.
    """
    out = request.out
    classes, images = _classes(request)
    # Refuses two classes of one token.
    Prompts(classes, config)
    targets = None if request.what.targets is None else _targets(request.what.targets)
    check_folder(out)
    request.source.check()
    request.memory.check(request.source.device)
    model, classifier, guide = request.source.load(), request.what.classifier, None
    if classifier is not None:
        offline = request.source.local_files_only
        guide = guide_of(classifier, model=model, classes=classes, local_files_only=offline)
    learner = ClassTokenLearner(model, guide, config, targets=targets)
    if request.memory.runtime is not None:
        learner.compile(request.memory.runtime)
    try:
        with writing(out):
            start = time.perf_counter()
            tokens = _learn(learner, classes, images, config, out)
            summary = {
                "command": "tokens learn",
                "settings": {
                    "model": model.name,
                    "revision": model.revision,
                    "device": str(model.device),
                    "dtype": str(model.dtype).removeprefix("torch."),
                    "classifier": classifier,
                    **asdict(config),
                },
                "versions": versions(),
                "seconds": time.perf_counter() - start,
                "tokens": [
                    {
                        "token": token,
                        "class": name,
                        **tokens.about[token],
                        "losses": learner.history[name].losses,
                        "accuracies": learner.history[name].accuracies,
                    }
                    for token, name in tokens.classes.items()
                ],
            }
            with locked(out):
                remove_stale(out / HISTORY)
                with replacing(out / HISTORY) as file:
                    write_json(file, summary)
            sheets = _pictures(request, model, tokens, config)
            if request.report:
                texts = [learned for _, learned in islice(texts_of(tokens, config).values(), 2)]
                with locked(out), replacing(out / "report.html") as file:
                    file.write(render(summary, sheets, loading(out, model.name, texts)))
    except JobError as error:
        raise CommandError(f"--out: {error}") from error
    return summary


def _classes(request: LearnRequest) -> tuple[list[str], dict[str, Sequence[Path]] | None]:
    """The classes' names, and with --data the images of each."""
    data = request.what.data
    if data is not None and not data.is_dir():
        raise CommandError(f"--data: {data} is no folder, expected one with a folder of images for each class")
    if request.names or request.what.classes is not None:
        names = read_classes(request.names or request.what.classes or [])
    else:
        assert data is not None
        names = read_classes(sorted(each.name for each in data.iterdir() if each.is_dir()))
    return names, None if data is None else {name: ImageFiles([_folder(data, name)]) for name in names}


def _folder(data: Path, name: str) -> Path:
    if name in (".", "..") or not (data / name).is_dir() or (data / name).parent != data:
        raise CommandError(f"--data: {data} has no folder {name!r}, expected one for each class")
    return data / name


def _targets(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise CommandError(f"--targets: {file} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise CommandError(f"--targets: {file} has a {type(found).__name__}, expected an object, class → output")
    return found


def _learn(
    learner: ClassTokenLearner,
    classes: Sequence[str],
    images: dict[str, Sequence[Path]] | None,
    config: TokenConfig,
    out: Path,
) -> LearnedTokens:
    with progress("updates") as display:
        bars = _Bars(display, len(classes), config.updates)
        tokens = learner.learn(classes, images=images, out=out, callback=bars)
        bars.end()
        return tokens


class _Bars:
    """A bar for all classes, one for each of the first that run, and a line for each that has ended."""

    def __init__(self, display: Progress, classes: int, updates: int) -> None:
        self.display, self.classes, self.updates = display, classes, updates
        self._all = display.add_task("classes", total=classes, units=0)
        self._own: dict[str, TaskID] = {}
        self._ended = self._updates = 0

    def __call__(self, update: TokenUpdate) -> None:
        """Shows an update of a class."""
        self._updates += 1
        said = f"loss {update.loss:.4f}" + ("" if update.accuracy is None else f", {update.accuracy:.0%} right")
        if update.ended is not None:
            self._ended += 1
            if update.name in self._own:
                self.display.remove_task(self._own.pop(update.name))
            line = f"{update.name}: {counted(update.update, 'update')}, {said} ({update.ended})"
            self.display.console.print(printable(line), style="dim", markup=False, highlight=False, soft_wrap=True)
        elif update.name in self._own or len(self._own) < _BARS:
            if update.name not in self._own:
                self._own[update.name] = self.display.add_task("", total=self.updates, units=0)
            text = escape(printable(f"  {update.name}, {said}"))
            self.display.update(self._own[update.name], completed=update.update, units=update.update, description=text)
        self.display.update(self._all, completed=self._ended, units=self._updates)

    def end(self) -> None:
        """Shows that all have ended, those of earlier runs too."""
        self.display.update(self._all, completed=self.classes)


def _pictures(request: LearnRequest, model: Model, tokens: LearnedTokens, config: TokenConfig) -> list[str]:
    """Makes the pictures, and of the first classes what the page shows."""
    count = request.pictures
    if not count:
        return []
    total = 2 * count * len(tokens)
    with progress("images") as display:
        task = display.add_task("pictures", total=total, units=0)

        def show(done: int) -> None:
            display.update(task, completed=done, units=done)

        make_images(model, tokens, config, count, request.out, show)
        show(total)
    shown: list[str] = []
    for sheet in write_sheets(tokens, config, count, request.out):
        if request.report and len(shown) < SHOWN:
            shown.append(figure(sheet))
    return shown
