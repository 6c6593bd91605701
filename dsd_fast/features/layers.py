"""Which activations a request names: ids of the grammar, the official JSON files, or sets by name."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsd_fast.unet import UNetProgram

Layers = str | Sequence[str] | Mapping[str, bool] | os.PathLike[str]

SETS: dict[str, tuple[str, ...]] = {
    "practical-15": (
        "up-level1-repeat1-vit-block0-cross-q",
        "up-level1-repeat2-res-out",
        "up-level2-repeat1-vit-block0-cross-q",
        "up-level3-repeat0-vit-block0-self-k",
    ),
    "legacy-15": (
        "up-level0-upsampler-out",
        "up-level1-upsampler-out",
        "up-level2-upsampler-out",
        "up-level3-repeat2-vit-out",
    ),
    "practical-xl": (
        "up-level0-repeat0-vit-block7-out",
        "up-level0-repeat0-vit-block5-out",
        "up-level1-repeat0-vit-block0-cross-q",
        "up-level1-repeat0-vit-block0-out",
    ),
    "legacy-xl": ("up-level0-upsampler-out", "up-level1-upsampler-out", "up-level2-repeat2-res-out"),
    "pgv2": ("up-level0-repeat0-vit-block3-out",),
    "practical-mini": (
        "up-level1-repeat0-res-increment",
        "up-level1-repeat0-vit-out",
        "up-level1-repeat1-res-increment",
        "up-level1-upsampler-out",
    ),
}
"""Sets of layer ids by name.

Those of SD 1.5 and 2.1 ("15"), SDXL ("xl") and Playground v2 ("pgv2") are the official ones (Meng et al., arXiv
2410.03558 and 2410.06719, appendix B.1; configs of Darkbblue/generic-diffusion-feature). "practical-mini" was chosen
for the mini model in the same way, by what its layers are worth on scenes that nothing else is fitted or measured on.
"""

# Tried in turn for a name without a model: the first whose ids the network has.
_FAMILIES = {
    "practical": ("practical-15", "practical-xl", "practical-mini"),
    "legacy": ("legacy-15", "legacy-xl"),
}
# Shaped like the text; the official code drops them from whatever asks for them.
_DROPPED = ("cross-k", "cross-v")


def layer_set(name: str, program: UNetProgram) -> tuple[str, ...]:
    """The layer ids that a name stands for on a network.

    Args:
        name: of :data:`SETS`; "practical" or "legacy", the set of that kind that the network has; "all", every id.

    Raises:
        ValueError: an unknown name, or a set of another network.
    """
    if name == "all":
        return program.layer_ids
    known = set(program.layer_ids)
    if name in _FAMILIES:
        for each in _FAMILIES[name]:
            if known.issuperset(SETS[each]):
                return SETS[each]
        raise ValueError(f"layers: no set of the kind {name!r} fits this network; give layer ids")
    if name not in SETS:
        raise ValueError(
            f"layers: got {name!r}, expected one of {', '.join([*_FAMILIES, 'all', *SETS])}, a list of layer ids, "
            "or the content or path of an official JSON file"
        )
    missing = [each for each in SETS[name] if each not in known]
    if missing:
        raise ValueError(f"layers: {name!r} is for another network: this one has no {missing[0]!r}")
    return SETS[name]


def resolve_layers(layers: Layers, program: UNetProgram) -> tuple[str, ...]:
    """Layer ids in the order asked for.

    Args:
        layers: ids; a name (:func:`layer_set`); id → bool as the official JSON files have it, or the path of one. Ids
            "…cross-k" and "…cross-v" of such a mapping are dropped, as officially: they are shaped like the text.

    Raises:
        ValueError: an unknown or repeated id, a file that is no such JSON.
    """
    if isinstance(layers, os.PathLike):
        layers = read_layers(Path(layers))
    if isinstance(layers, str):
        return layer_set(layers, program)
    if isinstance(layers, Mapping):
        ids = [name for name, wanted in layers.items() if wanted and not name.endswith(_DROPPED)]
    else:
        ids = list(layers)
    # The plan looks at the ids themselves, and names the nearest ones.
    return tuple(ids)


def read_layers(file: Path) -> dict[str, bool]:
    """The content of an official JSON file of layers, id → whether it is wanted.

    Raises:
        ValueError: the file is no JSON object of booleans.
        OSError: the file cannot be read.
    """
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"layers: {file} is no JSON: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(value, bool) for value in found.values()):
        raise ValueError(f"layers: {file} is no object of layer ids and booleans")
    return found
