"""A gate: techniques by themselves and together, measured, into the result's files and report.html."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsd_fast.cli.features_images import ImageFiles, read_prompts
from dsd_fast.cli.files import writing
from dsd_fast.cli.gate_report import render
from dsd_fast.cli.results import versions
from dsd_fast.cli.terminal import CommandError, progress, storable
from dsd_fast.features import FeatureExtractor, Technique
from dsd_fast.features.gate import gate
from dsd_fast.images import ImageError, load_image
from dsd_fast.jobs import replacing

if TYPE_CHECKING:
    from dsd_fast.models import Model
    from dsd_fast.models.controlnet import Control

# Of a result's files those that not every run writes.
_OPTIONAL = ("distances.parquet", "contact-sheet.png", "scores.png", "prompts.jsonl")


@dataclass(frozen=True)
class Parts:
    """What techniques are made of, besides ControlNets.

    Attributes:
        prompt, prompts, captioner: at most one: a text for all images, a file, or a model that writes them.
        quality: words after each caption; None: the official ones.
        adapters: "NAME=FILE" or "FILE" of LoRAs.
        denoise_from, denoise_steps, inversion: of :class:`Technique`.
        local_files_only: for the captioner.
    """

    prompt: str | None = None
    prompts: Path | None = None
    captioner: str | None = None
    quality: str | None = None
    adapters: Sequence[str] = ()
    denoise_from: int | None = None
    denoise_steps: int | None = None
    inversion: bool = False
    local_files_only: bool = False


def run(
    load: Callable[[], Model],
    load_controls: Callable[[Model], Sequence[Control]],
    settings: Mapping[str, Any],
    parts: Parts,
    asked: Mapping[str, Any],
    images: Sequence[Path],
    out: Path,
) -> dict[str, Any]:
    """Measures the techniques and writes the results.

    Args:
        load: gives the model.
        load_controls: gives its ControlNets.
        settings: arguments of :class:`FeatureExtractor`.
        asked: arguments of :func:`dsd_fast.features.gate.gate`.
        images: files and folders.
        out: folder of the results, made if missing.

    Returns:
        "result", "images" (how many were used), "errors" [(file, reason, message), …], "seconds", "verdict".

    Raises:
        CommandError: no technique, no image that can be used, or `out` cannot be written.
        ValueError: settings that do not fit the model.
    """
    files = ImageFiles(images, without=out)
    numbers, errors = _readable(files)
    if not numbers:
        raise CommandError(f"no image can be used; the first: {errors[0][2]}")
    used = [files[number] for number in numbers]
    texts: str | list[str] | None = parts.prompt
    if parts.prompts is not None:
        texts = files.prompts(read_prompts(parts.prompts), numbers)
    model = load()
    if parts.captioner is not None:
        texts = _captions(used, parts, model)
    chosen = _techniques(model, texts, tuple(load_controls(model)), parts)
    extractor = FeatureExtractor(model, **settings)
    start = time.perf_counter()
    with progress("images") as display:
        task = display.add_task("gate", total=len(used), units=0)

        def taken() -> Iterator[Path]:
            for number, path in enumerate(used):
                yield path
                display.update(task, completed=number + 1, units=number + 1)

        result = gate(extractor, taken(), chosen, **asked)
    summary = {
        "result": result,
        "images": len(used),
        "errors": errors,
        "seconds": time.perf_counter() - start,
        "verdict": _verdict([row["technique"] for row in result.rows() if row["take"]]),
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


def _readable(files: ImageFiles) -> tuple[list[int], list[tuple[str, str, str]]]:
    """Positions of the images that can be decoded, and the errors of the others."""
    numbers, errors = [], []
    for number, path in enumerate(files):
        try:
            load_image(path)
        except ImageError as error:
            errors.append((storable(str(path)), error.reason, storable(str(error))))
        else:
            numbers.append(number)
    return numbers, errors


def _captions(images: Sequence[Path], parts: Parts, model: Model) -> list[str]:
    from dsd_fast.features.captions import QUALITY, caption

    assert parts.captioner is not None
    try:
        return caption(
            images,
            parts.captioner,
            quality=QUALITY if parts.quality is None else parts.quality,
            model=model,
            device=model.device,
            local_files_only=parts.local_files_only,
        )
    except OSError as error:
        raise CommandError(f"--captioner {parts.captioner!r} cannot be read: {error}") from error


def _techniques(
    model: Model, prompts: str | Sequence[str] | None, controls: tuple[Control, ...], parts: Parts
) -> list[Technique]:
    """Each technique by itself, and all together where there are several."""
    # Loading makes a LoRA the active one, so each technique says which it wants.
    alone: dict[str, dict[str, Any]] = {}
    if prompts is not None:
        alone["prompt"] = {"prompts": prompts}
    if controls:
        alone["control" if len(controls) == 1 else f"{len(controls)} controls"] = {"controls": controls}
    names = []
    for each in parts.adapters:
        name, found, source = each.partition("=")
        if not found:
            name, source = Path(each).stem, each
        model.load_lora(source, name)
        alone[f"lora {name}"] = {"adapter": (name,)}
        names.append(name)
    if parts.denoise_from is not None:
        way = {"denoise_from": parts.denoise_from, "denoise_steps": parts.denoise_steps}
        alone[f"from t = {parts.denoise_from}"] = way
    elif parts.denoise_steps is not None:
        raise CommandError("--denoise-steps: given without --denoise-from")
    if parts.inversion:
        alone["inversion"] = {"inversion": True}
    if not alone:
        raise CommandError(
            "give a technique: --prompt, --prompts, --captioner, --control, --adapter, --denoise-from or --inversion"
        )
    plain = {"prompts": "", "adapter": ()}
    chosen = [Technique(name, **{**plain, **own}) for name, own in alone.items()]
    if parts.denoise_from is not None:
        # Both say how the latents are made.
        alone.pop("inversion", None)
    if len(alone) > 1:
        together = {key: value for own in alone.values() for key, value in own.items()}
        together |= {"adapter": tuple(names)}
        chosen.append(Technique(" + ".join(alone), **{**plain, **together}))
    return chosen


def _verdict(taken: Sequence[str]) -> str:
    if not taken:
        return "None of the techniques is worth taking."
    words = ", ".join(taken)
    return f"Worth taking, the best first: {words}." if len(taken) > 1 else f"Worth taking: {words}."


def _write_prompts(file: Path, images: Sequence[Path], prompts: Sequence[str]) -> None:
    with replacing(file) as stream:
        for path, prompt in zip(images, prompts, strict=True):
            row = {"image": storable(str(path)), "prompt": prompt}
            stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
