"""``python -m dsd_fast.compat.extract_feature``: the official script of that name, with its options and its files.

Of Darkbblue/generic-diffusion-feature. Besides the official ``.npy`` files the output folder holds a manifest and an
index of the images (:func:`dsd_fast.jobs.read_index`), by which the same command goes on where a stopped one left off
and refuses to mix results of other settings. An image that cannot be used is told at the end, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsd_fast.features import FeatureExtractor
    from dsd_fast.jobs import Exported

_PLACES = ("down_cross", "mid_cross", "up_cross", "down_self", "mid_self", "up_self")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: instead of the process's own.

    Returns:
        The exit code: 0, 1 for a failure or images that cannot be used, 130 for an interruption.
    """
    from dsd_fast.jobs import JobError

    parser = _parser()
    args = parser.parse_args(arguments)
    needed = () if args.show_all_layers else ("layer", "t", "input_dir")
    missing = [f"--{name}" for name in needed if getattr(args, name) is None]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    try:
        if args.show_all_layers:
            _show(_extractor(args))
            return 0
        # Before the model is loaded, which takes longer.
        files, prompt = _files(args), Path(args.prompt_file).read_text(encoding="utf-8")
        print("prompt:", prompt)
        return _report(_extract(_extractor(args), files, prompt, args), args.output_dir)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, NotImplementedError, OSError, JobError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dsd_fast.compat.extract_feature", description="UNet features of images into .npy files."
    )
    add = parser.add_argument
    add("--layer", help="JSON file of layer ids and booleans")
    add("--version", help="1-5, 2-1, xl (the default), pgv2 or mini; with --model it is found out")
    add("--model", help="instead of a version: mini, a folder in diffusers' layout, or a hub id")
    add(
        "--dtype",
        default="float16",
        choices=("float16", "bfloat16", "float32"),
        help="of the networks; features are float16",
    )
    add("--device", help="cuda where there is one, else cpu")
    add("--offline_lora", help="folder or hub id of a LoRA; without a file name a whole model")
    add("--offline_lora_filename", help="file of the LoRA")
    add("--feature_resize", type=int, default=1, help="features are that many times smaller")
    add("--control", nargs="+", help="ControlNets: canny, canny-xl")
    add("--attention", nargs="+", choices=_PLACES, help="attention maps to aggregate into the feature attn")
    add("--img_size", type=int, help="side in pixels; 1024, or with --model the model's own size")
    add("--batch_size", "-b", type=int, help="most images together; as many as memory allows")
    add("--t", type=int, help="timestep")
    add("--denoising_from", type=int, help="noise to this timestep and denoise down to --t")
    add("--use_ddim_inversion", action="store_true", help="invert the images to --t instead of adding noise")
    add("--seed", type=int, default=0, help="of the noise")
    add("--input_dir", help="pattern of image files, ** for any folders; quote it")
    add("--nested_input_dir", action="store_true", help="names begin with the name of the image's folder")
    add("--prompt_file", default="prompt.txt", help="text file that holds the prompt")
    add("--output_dir", default="./output/", help="folder to write")
    add("--aggregate_output", action="store_true", help="one file an image: all features, enlarged to the largest")
    add("--use_original_filename", action="store_true", help="name by the image's file, not by --split and number")
    add("--split", default="train", help="begins names that are not the images' own")
    add("--sample_name_first", action="store_true", help="<image>/<layer>.npy, not <layer>/<image>.npy")
    add("--show_all_layers", action="store_true", help="print layers and shapes, write layer_record.json, and end")
    return parser


def _extractor(args: argparse.Namespace) -> FeatureExtractor:
    """The engine with the official settings."""
    import torch

    from dsd_fast.compat.feature_extractor import official_layers
    from dsd_fast.compat.versions import check_family, load_controls, load_other, load_version, version_of
    from dsd_fast.features import FeatureExtractor, Technique
    from dsd_fast.models.processor import slow_on
    from dsd_fast.unet import UNetProgram

    for name in ("feature_resize", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: got {value}, expected at least 1")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    lora = args.offline_lora, args.offline_lora_filename
    if args.model is None:
        version, side = args.version or "xl", args.img_size or 1024
        model = load_version(version, device, args.dtype, *lora)
        size = (side, side)
    else:
        model = load_other(args.model, device, args.dtype, *lora)
        version = args.version or version_of(args.model, model)
        check_family(version, model)
        size = model.image_size if args.img_size is None else (args.img_size, args.img_size)
    slow = slow_on(model.dtype, model.device)
    if slow is not None:
        print(f"{slow} (--dtype float32)", file=sys.stderr)
    return FeatureExtractor(
        model,
        official_layers(None if args.show_all_layers else args.layer, UNetProgram(model.unet)),
        (args.t or 0,),
        attention=args.attention or (),
        official_timesteps=True,
        image_size=size,
        resize=args.feature_resize if args.feature_resize > 1 else None,
        dtype="float16",
        technique=Technique(
            controls=load_controls(args.control, version, model),
            denoise_from=args.denoising_from or None,
            inversion=args.use_ddim_inversion,
        ),
    )


def _show(extractor: FeatureExtractor) -> None:
    """Prints ids and shapes, and writes a file that names them all."""
    import torch

    from dsd_fast.jobs import replacing

    for name, shape in extractor.shapes.items():
        print(name, torch.Size(shape))
    with replacing(Path("layer_record.json")) as file:
        file.write(json.dumps(dict.fromkeys(extractor.shapes, True)).encode())


def _files(args: argparse.Namespace) -> list[str]:
    files = sorted(glob.glob(args.input_dir, recursive=True))
    if not files:
        raise ValueError(f"--input_dir: no file matches {args.input_dir!r}")
    return files


def _extract(extractor: FeatureExtractor, files: Sequence[str], prompt: str, args: argparse.Namespace) -> Exported:
    from dsd_fast.features.export import extract_to

    layout = "npy-sample" if args.sample_name_first else "npy-layer"
    with _progress(len(files)) as progress:
        return extract_to(
            extractor,
            args.output_dir,
            [Path(file) for file in files],
            prompt,
            args.seed,
            names=_names(files, args),
            layout="npy-aggregated" if args.aggregate_output else layout,
            shard_rows=args.batch_size,
            progress=progress,
        )


def _names(files: Sequence[str], args: argparse.Namespace) -> list[str]:
    """The official names of the files' images."""
    if not args.use_original_filename:
        return [f"{args.split}{number}" for number in range(len(files))]
    stems = [os.path.splitext(os.path.basename(file))[0] for file in files]
    if not args.nested_input_dir:
        return stems
    folders = [os.path.basename(os.path.dirname(file)) for file in files]
    return [os.path.join(folder, stem) for folder, stem in zip(folders, stems, strict=True)]


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None] | None]:
    """On a terminal, what is to be called with the number of images dealt with."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as shown:
        task = shown.add_task("images", total=total)
        yield lambda done: shown.update(task, completed=done)


def _report(exported: Exported, folder: str) -> int:
    """Says what became of the images; the exit code."""
    from dsd_fast.jobs import read_index

    counts = exported.counts
    print(f"{counts.ok} images written, {counts.done - counts.done_errors} were there, in {folder}")
    if not counts.errors + counts.done_errors:
        return 0
    table = read_index(folder, ["name", "status", "message"])
    for name, status, message in zip(*(table[key].to_pylist() for key in ("name", "status", "message")), strict=True):
        if status == "error":
            print(f"{name}: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
