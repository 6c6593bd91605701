"""The principal components that `dsd-fast features --pca` keeps, fitted once for all runs and workers of a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dsd_fast.cli.features.pictures import first_usable
from dsd_fast.cli.files import writing
from dsd_fast.cli.images import ImageFiles
from dsd_fast.cli.terminal import CommandError
from dsd_fast.features import FeatureExtractor
from dsd_fast.features.pca import PCA
from dsd_fast.jobs import read_tensors, row_id, write_tensors
from dsd_fast.jobs.lock import waiting

FILE = "pca.safetensors"

_PARTS = ("mean", "components", "explained_variance")


def fitted(
    extractor: FeatureExtractor,
    files: ImageFiles,
    prompts: str | Sequence[str],
    seed: int,
    components: int,
    images: int,
    out: Path,
) -> dict[str, PCA]:
    """Gives the components of the folder; where there are none yet, they are fitted and kept there.

    Args:
        prompts: one, or one for each of the files.
        components: k.
        images: the first so many that can be used.

    Raises:
        CommandError: `out` cannot be written, or the components do not fit.
    """
    made_with = row_id(
        json.dumps([extractor.settings(), extractor.model.name, extractor.model.revision, components, images, seed]),
        prompts if isinstance(prompts, str) else row_id(*prompts[:images]),
    )
    with writing(out), waiting(out, "pca"):
        file = out / FILE
        if file.exists():
            found, about = read_tensors(file)
            if about.get("made_with") == made_with:
                return {name: PCA(*(found[f"{name}.{part}"] for part in _PARTS)) for name in extractor.layers}
        _, chosen, own = first_usable(extractor.model, files, prompts, images)
        try:
            pca = extractor.fit_pca(chosen, components, own, seed)
        except ValueError as error:
            raise CommandError(f"--pca: {error}") from error
        # Else what is in the folder belongs to its manifest, which refuses this job when it opens.
        if not (out / "manifest.json").exists():
            tensors = {f"{name}.{part}": getattr(each, part) for name, each in pca.items() for part in _PARTS}
            write_tensors(file, tensors, {"made_with": made_with})
    return pca
