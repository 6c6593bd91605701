"""A task of zero-shot learning: what is made for it, and how well each method does it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsd_fast.class_tokens.cdm import CategoryDiscriminator, encoder_of
from dsd_fast.class_tokens.learner import ClassTokenLearner
from dsd_fast.class_tokens.prompts import Prompts
from dsd_fast.class_tokens.zsl.classifiers import probabilities
from dsd_fast.class_tokens.zsl.config import ZslConfig
from dsd_fast.class_tokens.zsl.data import ZslData, drawn
from dsd_fast.class_tokens.zsl.features import Features, features_of
from dsd_fast.diffusion import CLEAN, scheduler_timesteps
from dsd_fast.engine.guides import guide_of
from dsd_fast.engine.templates import filled
from dsd_fast.engine.tokens import LearnedTokens
from dsd_fast.generation.export import generate_to
from dsd_fast.generation.files import IMAGES, image_path
from dsd_fast.generation.guides import AcceptClassifier
from dsd_fast.generation.rows import GenerateRow, row_id_of
from dsd_fast.generation.sampler import Sampler, to_uint8
from dsd_fast.generation.units import units_of
from dsd_fast.jobs import read_index, read_manifest, remove_stale, replacing, row_id

if TYPE_CHECKING:
    from dsd_fast.models import Model

# Classes whose images are shown as they come to be, and at how many steps.
_SHEETS, _COLUMNS = 12, 5

Probabilities = dict[tuple[str, str], NDArray[np.float64]]
"""(method, classifier) → (n, C) of a task's test images."""
Report = Callable[[str, int, int], None]
"""Called with a stage, how much of it is done, and how much there is."""


class Run:
    """What the tasks of a run share.

    Attributes:
        config, model, report: as given.
        data: of the images that can be used.
        encoder: of their features.
        features: (N, D) of the data's images.
        place: file → its row of the features.
        clip: (N, C) logits of CLIP's zero-shot classification; None where it is no baseline.
        errors: what is wrong with other images.
        repeated: test images that are training images, too.
    """

    def __init__(self, config: ZslConfig, data: ZslData, model: Model, report: Report) -> None:
        self.config, self.model, self.report = config, model, report
        # Refuses a model without a CLIP, and names that it does not read, before anything is computed.
        guide = guide_of("clip", model=model, classes=data.names, templates=config.cdm.templates)
        self.encoder = encoder_of(config.cdm, model, local_files_only=config.local_files_only)
        files, digests = [data.root / file for file in data.files], data.digests()
        features, errors = self.made(files, digests, "real")
        good = [number for number in range(len(files)) if number not in errors]
        self.data, self.features, self.errors = data.of(good), features[good], list(errors.values())
        learned = {digests[number] for number in good if data.train[number]}
        self.repeated = [data.files[i] for i in good if not data.train[i] and digests[i] in learned]
        self.place = {file: number for number, file in enumerate(self.data.files)}
        self.clip: NDArray[np.float32] | None = None
        if "clip" in config.baselines:
            self.clip = self.made(files, digests, "clip", guide.of_images, guide.settings())[0][good]

    def made(
        self,
        files: Sequence[Path],
        digests: Sequence[str],
        name: str,
        make: Features | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> tuple[NDArray[np.float32], dict[int, str]]:
        """Features of images, by the encoder unless said otherwise."""
        make, settings = (self.encoder.of_images, self.encoder.settings()) if make is None else (make, settings)
        about, folder = row_id(json.dumps(settings, sort_keys=True)), self.config.out / "features" / name

        def told(done: int) -> None:
            self.report(f"features: {name}", done, len(files))

        return features_of(files, digests, make, about, folder, told)


@dataclass(frozen=True)
class Generated:
    """Features of a method's images: (n, D), their classes (n,), and which of its class each is (n,)."""

    features: NDArray[np.float32]
    labels: NDArray[np.intp]
    turns: NDArray[np.intp]


class Task:
    """A data set's task, and what is made for it in a folder."""

    def __init__(self, run: Run, name: str, data: ZslData) -> None:
        self.run, self.name, self.data, self.folder = run, name, data, run.config.out / name
        rows = [run.place[file] for file in data.files]
        self.features, self.labels = run.features[rows], data.labels[~data.train]
        self.clip = None if run.clip is None else run.clip[rows][:, [run.data.names.index(each) for each in data.names]]

    @cached_property
    def discriminator(self) -> CategoryDiscriminator:
        data, run = self.data, self.run
        seen = np.flatnonzero(data.seen)
        labels = np.searchsorted(seen, data.labels[data.train])
        run.report(f"{self.name}: discriminator", 0, 1)
        made = CategoryDiscriminator.fit(
            run.encoder,
            self.features[data.train],
            labels,
            [data.names[c] for c in seen],
            run.model,
            run.config.cdm,
            out=self.folder / "cdm",
        )
        run.report(f"{self.name}: discriminator", 1, 1)
        return made

    def tokens(self, gamma: float) -> LearnedTokens:
        """Tokens of the unseen classes."""
        names, run = self.data.unseen_names, self.run
        config = replace(run.config.tokens, gamma=gamma)
        learner = ClassTokenLearner(run.model, self.discriminator.guide(names), config)
        stage, ended = f"{self.name}: tokens, γ = {gamma:g}", 0

        def callback(update: Any) -> None:
            nonlocal ended
            ended += update.ended is not None
            run.report(stage, ended, len(names))

        run.report(stage, 0, len(names))
        return learner.learn(names, out=self.folder_of_tokens(gamma), callback=callback)

    def folder_of_tokens(self, gamma: float) -> Path:
        return self.folder / f"tokens-{gamma:g}"

    def folder_of_images(self, method: str, gamma: float | None = None) -> Path:
        return self.folder / (f"images-{method}" if gamma is None else f"images-{method}-{gamma:g}")

    def generated(self, method: str, gamma: float | None = None) -> Generated:
        """Images of the unseen classes, and their features."""
        run, config, names, rows = self.run, self.run.config, self.data.unseen_names, self._rows(method)
        model = run.model if gamma is None else run.model.with_tokens(self.tokens(gamma))
        folder = self.folder_of_images(method, gamma)
        accept = None
        if config.accept is not None:
            accept = AcceptClassifier(self.discriminator.guide(names), names, config.accept)
        stage, total = f"{self.name}: images, {folder.name}", config.per_class * len(names)
        generate_to(
            Sampler(model, config.generate),
            rows,
            folder,
            accept=accept,
            per_class=config.per_class,
            max_tries=config.max_tries,
            layout="folder",
            progress=lambda done: run.report(stage, done, total),
        )
        # In their order; of the settings of the configuration alone, where the folder has other rows too.
        units = [(row_id_of(unit.attempt(0)), unit) for unit in units_of(rows, config.per_class)]
        made = {row["id"] for row in read_index(folder, ["id", "status"]).to_pylist() if row["status"] == "ok"}
        units = [(name, unit) for name, unit in units if name in made]
        classes = np.flatnonzero(~self.data.seen)
        labels = np.array([classes[unit.row.cls or 0] for _, unit in units], np.intp)
        lacking = sorted({*classes.tolist()} - {*labels.tolist()})
        if lacking:
            raise ValueError(
                f"accept: {folder} has no image of {self.data.names[lacking[0]]!r}, expected a lower value"
            )
        files = [folder / IMAGES / image_path(name, unit.row.label, "png") for name, unit in units]
        of = read_manifest(folder)["fingerprint"]
        features, _ = run.made(files, [row_id(of, name) for name, _ in units], f"{self.name}-{folder.name}")
        turns = np.zeros(len(labels), np.intp)
        for c in classes:
            turns[labels == c] = np.arange((labels == c).sum())
        return Generated(features, labels, turns)

    def _rows(self, method: str) -> list[GenerateRow]:
        """What images of the unseen classes are made of: the token's texts, or a baseline's."""
        config, names = self.run.config, self.data.unseen_names
        prompts = Prompts(names, config.tokens)

        def texts(number: int) -> list[str]:
            if method == "ensemble":
                return [filled(template, names[number]) for template in config.ensemble]
            return prompts.plain(number) if method == "plain" else prompts.every(number)

        return [
            GenerateRow(text, config.seed, label=name, cls=number)
            for number, name in enumerate(names)
            for text in texts(number)
        ]

    def sheets(self, gamma: float) -> list[dict[str, Any]]:
        """Draw how an image of each of the first classes comes to be, of the same noise without and with the token.

        Returns:
            {"class", "file" (below the run's folder), "times"} each: a picture of what the network takes the image for
            at each of these timesteps, and at −1 of the image, from left to right; above without the token, below with.
        """
        run, of = self.run, read_manifest(self.folder_of_images("token", gamma))["fingerprint"]
        sampler = Sampler(run.model.with_tokens(LearnedTokens.load(self.folder_of_tokens(gamma))), run.config.generate)
        times = [*scheduler_timesteps(sampler.model.new_scheduler(), run.config.generate.steps), CLEAN]
        columns = np.unique(np.linspace(0, len(times) - 1, _COLUMNS).round().astype(int)).tolist()
        units = (units_of(self._rows(method), 1) for method in ("plain", "token"))
        pairs = [[sampler.resolve(unit.attempt(0)) for unit in pair] for pair in zip(*units, strict=True)][:_SHEETS]
        found = []
        for number, rows in enumerate(pairs):
            run.report(f"{self.name}: steps", number, len(pairs))
            name = self.data.unseen_names[number]
            # Of other images another file.
            file = self.folder / "steps" / image_path(row_id(of, *map(row_id_of, rows)), name, "png")
            if not file.is_file():
                latents = sampler.predicted(rows)[1][columns].transpose(0, 1).flatten(0, 1)  # (2 · columns, C, h, w)
                pixels = to_uint8(sampler.engine.decode_latents(latents))  # (2 · columns, H, W, 3)
                lines = pixels.view(2, len(columns), *pixels.shape[1:]).transpose(1, 2)  # (2, H, columns, W, 3)
                sheet = lines.flatten(2, 3).flatten(0, 1)  # (2 · H, columns · W, 3)
                file.parent.mkdir(parents=True, exist_ok=True)
                remove_stale(file)
                with replacing(file) as stream:
                    Image.fromarray(sheet.cpu().numpy()).save(stream, "PNG")
            told = file.relative_to(run.config.out).as_posix()
            found.append({"class": name, "file": told, "times": [times[column] for column in columns]})
        run.report(f"{self.name}: steps", len(pairs), len(pairs))
        return found

    def scores(self, method: str, made: Generated, most: int | None = None) -> Probabilities:
        """Of classifiers that learn from seen classes' real images and the first generated ones of the unseen ones."""
        data, few = self.data, made.turns < (most or np.inf)
        known = np.concatenate([self.features[data.train], made.features[few]])
        labels = np.concatenate([data.labels[data.train], made.labels[few]])
        return {
            (method, kind): probabilities(kind, known, labels, len(data.names), self.features[~data.train])
            for kind in self.run.config.classifiers
        }

    def baselines(self) -> Probabilities:
        """The methods beside the tokens, in the same terms."""
        found: Probabilities = {}
        for method in self.run.config.baselines:
            if method == "clip":
                assert self.clip is not None
                logits = self.clip[~self.data.train].astype(np.float64)
                odds = np.exp(logits - logits.max(1, keepdims=True))
                found[method, "zero-shot"] = odds / odds.sum(1, keepdims=True)
            elif method == "real":
                found |= self._real()
            else:
                found |= self.scores(method, self.generated(method))
        return found

    def _real(self) -> Probabilities:
        """Of real images of the unseen classes, half of which are learned from while the other half is tested."""
        data, test = self.data, np.flatnonzero(~self.data.train)
        unseen = ~data.seen[self.labels]
        if np.bincount(self.labels[unseen], minlength=len(data.names))[~data.seen].min() < 2:
            return {}
        first = drawn([data.files[i] for i in test], self.labels, 0.5, self.run.config.seed)

        def learned(half: NDArray[np.bool_]) -> Probabilities:
            turns = np.zeros(half.sum(), np.intp)
            return self.scores("real", Generated(self.features[test[half]], self.labels[half], turns))

        return crossed(learned, first, unseen)


def crossed(
    learned: Callable[[NDArray[np.bool_]], Probabilities], first: NDArray[np.bool_], unseen: NDArray[np.bool_]
) -> Probabilities:
    """Give probabilities of test images, (n, C), by what has not learned from them.

    Args:
        learned: gives those of all test images by what has learned from some of them.
        first: (n,) the first half.
        unseen: (n,) images of unseen classes, which alone are learned from: others are judged by both halves.
    """
    one, other = learned(first & unseen), learned(~first & unseen)
    weight = np.where(unseen, first, 0.5)[:, None]
    return {key: (1 - weight) * one[key] + weight * other[key] for key in one}
