"""A gate: techniques by themselves and together, measured, into the result's files and report.html."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsd_fast.cli.feature_options import LatentOptions
from dsd_fast.cli.files import check_folder, writing
from dsd_fast.cli.gate.options import GateRequest, PromptOptions
from dsd_fast.cli.gate.report import render
from dsd_fast.cli.images import ImageFiles, decoding_error, read_prompts
from dsd_fast.cli.results import versions
from dsd_fast.cli.terminal import CommandError, progress
from dsd_fast.features import FeatureExtractor, Technique
from dsd_fast.features.extraction import check_inversion
from dsd_fast.features.gate import gate
from dsd_fast.features.gate.guide import check_strength
from dsd_fast.features.shift import noised_timesteps
from dsd_fast.jobs import replacing, storable
from dsd_fast.models.lora import find_lora

if TYPE_CHECKING:
    from dsd_fast.models import Model
    from dsd_fast.models.controlnet import Control

# Of a result's files those that not every run writes.
_OPTIONAL = ("distances.parquet", "contact-sheet.png", "scores.png", "prompts.jsonl")


def run(request: GateRequest, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Measures the techniques and writes the results.

    Args:
        settings: arguments of :class:`FeatureExtractor`.

    Returns:
        "result", "images" (how many were used), "errors" [(file, reason, message), …], "seconds", "verdict".

    Raises:
        CommandError: no technique, no image that can be used, or `out` cannot be written.
        ValueError: settings that do not fit the model.
    """
    techniques, measure, out = request.techniques, request.measure, request.out
    _check(request, settings)
    files = ImageFiles(request.images, without=out)
    numbers, errors = [], []
    for number, path in enumerate(files):
        error = decoding_error(path)
        if error is None:
            numbers.append(number)
        else:
            errors.append((storable(str(path)), error.reason, storable(str(error))))
    if not numbers:
        raise CommandError(f"no image can be used; the first: {errors[0][2]}")
    used = [files[number] for number in numbers]
    texts: str | list[str] | None = techniques.prompts.prompt
    if techniques.prompts.prompts is not None:
        texts = files.prompts(read_prompts(techniques.prompts.prompts), numbers)
    model = request.source.load()
    if techniques.prompts.captioner is not None:
        texts = _captions(used, techniques.prompts, model, request.source.local_files_only)
    controls = techniques.controls.load(model, request.source)
    chosen = _techniques(model, texts, controls, techniques.adapter or (), techniques.latents)
    extractor = FeatureExtractor(model, **settings)
    start = time.perf_counter()
    with progress("images") as display:
        task = display.add_task("gate", total=len(used), units=0)

        def taken() -> Iterator[Path]:
            for number, path in enumerate(used):
                yield path
                display.update(task, completed=number + 1, units=number + 1)

        result = gate(
            extractor,
            taken(),
            chosen,
            seed=measure.seed,
            normalize=measure.normalize,
            anchor_timestep=measure.anchor_timestep,
            **asdict(request.guide),
        )
    summary = {
        "result": result,
        "images": len(used),
        "errors": errors,
        "seconds": time.perf_counter() - start,
        "verdict": verdict(result.rows()),
    }
    page = render(summary, [storable(str(path)) for path in used], versions())
    with writing(out):
        written = {file.name for file in result.save(out)}
        if isinstance(texts, list):
            _write_prompts(out / "prompts.jsonl", used, texts)
            written.add("prompts.jsonl")
        for name in _OPTIONAL:
            if name not in written:
                (out / name).unlink(missing_ok=True)
        with replacing(out / "report.html") as file:
            file.write(page)
    return summary


def _check(request: GateRequest, settings: Mapping[str, Any]) -> None:
    """Refuses what needs no model to be refused."""
    techniques, latents, guide = request.techniques, request.techniques.latents, request.guide
    if latents.denoise_from is None and latents.denoise_steps is not None:
        raise CommandError("--denoise-steps: given without --denoise-from")
    asked = (techniques.prompts.prompt, techniques.prompts.prompts, techniques.prompts.captioner)
    if all(each is None for each in (*asked, latents.denoise_from)) and not (
        techniques.controls.control or techniques.adapter or latents.inversion
    ):
        raise CommandError(
            "give a technique: --prompt, --prompts, --captioner, --control, --adapter, --denoise-from or --inversion"
        )
    if techniques.prompts.quality is not None and techniques.prompts.captioner is None:
        raise CommandError("--quality: given without --captioner")
    request.source.check()
    techniques.controls.check()
    for given in techniques.adapter or ():
        find_lora(given.partition("=")[2] or given, local_files_only=request.source.local_files_only)
    if latents.inversion:
        check_inversion(settings["draws"])
    noised_timesteps(settings["timesteps"])
    if guide.guide:
        check_strength(guide.strength, guide.steps)
    check_folder(request.out)


def _captions(images: Sequence[Path], options: PromptOptions, model: Model, local_files_only: bool) -> list[str]:
    from dsd_fast.features.captions import QUALITY, caption

    assert options.captioner is not None
    try:
        return caption(
            images,
            options.captioner,
            quality=QUALITY if options.quality is None else options.quality,
            model=model,
            device=model.device,
            local_files_only=local_files_only,
        )
    except OSError as error:
        raise CommandError(f"--captioner {options.captioner!r} cannot be read: {error}") from error


def _techniques(
    model: Model,
    prompts: str | Sequence[str] | None,
    controls: Sequence[Control],
    adapters: Sequence[str],
    latents: LatentOptions,
) -> list[Technique]:
    """Each technique by itself, and all together where there are several."""
    # Loading makes a LoRA the active one, so each technique says which it wants.
    alone: dict[str, dict[str, Any]] = {}
    if prompts is not None:
        alone["prompt"] = {"prompts": prompts}
    if controls:
        alone["control" if len(controls) == 1 else f"{len(controls)} controls"] = {"controls": controls}
    names = []
    for given in adapters:
        name, equals, source = given.partition("=")
        if not equals:
            name, source = storable(Path(given).stem), given
        model.load_lora(source, name)
        alone[f"lora {name}"] = {"adapter": (name,)}
        names.append(name)
    if latents.denoise_from is not None:
        way = {"denoise_from": latents.denoise_from, "denoise_steps": latents.denoise_steps}
        alone[f"from t = {latents.denoise_from}"] = way
    if latents.inversion:
        alone["inversion"] = {"inversion": True}
    plain = {"prompts": "", "adapter": ()}
    chosen = [Technique(name, **{**plain, **own}) for name, own in alone.items()]
    if latents.denoise_from is not None:
        # Both say how the latents are made.
        alone.pop("inversion", None)
    if len(alone) > 1:
        together = {key: value for own in alone.values() for key, value in own.items()}
        together |= {"adapter": tuple(names)}
        chosen.append(Technique(" + ".join(alone), **{**plain, **together}))
    return chosen


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """Says which techniques to take, or that none is, or of which more images may tell."""
    taken = [row["technique"] for row in rows if row["take"]]
    if not taken:
        unsure = [row["technique"] for row in rows if row["accepted"] is not False and row["score_gain_high"] > 0]
        if unsure:
            return f"None of the techniques is surely worth taking; more images may tell of {', '.join(unsure)}."
        return "None of the techniques is worth taking."
    words = ", ".join(taken)
    return f"Worth taking, the best first: {words}." if len(taken) > 1 else f"Worth taking: {words}."


def _write_prompts(file: Path, images: Sequence[Path], prompts: Sequence[str]) -> None:
    with replacing(file) as stream:
        for path, prompt in zip(images, prompts, strict=True):
            row = {"image": storable(str(path)), "prompt": prompt}
            stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
