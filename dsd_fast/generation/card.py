"""The data card of a folder of generated images, as the Hugging Face hub reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dsd_fast.jobs import storable

CARD = "dataset_card.md"

# Of the hub: upper bound → name.
_SIZES = {
    10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M",
    10**8: "10M<n<100M", 10**9: "100M<n<1B", 10**10: "1B<n<10B",
}  # fmt: skip
_MOST_CLASSES = 50

_ROWS = """from dsd_fast.jobs import read_index

rows = read_index(".", ["reason", "prompt"])
print(rows.slice(0, 3).to_pylist())
"""
_SNIPPETS = {
    "webdataset": {
        "webdataset": """from pathlib import Path

import webdataset

shards = Path("shards.txt").read_text().split()
samples = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode("pil")
sample = next(iter(samples))
print(sample["__key__"], sample["{format}"].size, sample["txt"], sample["cls"], sample["json"])
""",
        "datasets": """from pathlib import Path

from datasets import load_dataset

shards = Path("shards.txt").read_text().split()
images = load_dataset("webdataset", data_files=shards, split="train", streaming=True)
sample = next(iter(images))
print(sample["{format}"].size, sample["txt"], sample["cls"], sample["json"])
""",
        "pyarrow: the rows of the shards": """from pathlib import Path

import pyarrow.parquet as pq

rows = pq.read_table(sorted(map(str, Path().glob("[0-9]*.parquet"))))
print(rows.slice(0, 3).to_pylist())
""",
    },
    "parquet": {
        "datasets": """from pathlib import Path

from datasets import load_dataset

shards = Path("shards.txt").read_text().split()
images = load_dataset("parquet", data_files=shards, split="train", streaming=True)
sample = next(iter(images))
print(sample["image"].size, sample["text"], sample["cls"])
""",
        "pyarrow and Pillow": """import io
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

shards = Path("shards.txt").read_text().split()
sample = next(pq.ParquetFile(shards[0]).iter_batches(1)).to_pylist()[0]
print(Image.open(io.BytesIO(sample["image"]["bytes"])).size, sample["text"], sample["cls"])
""",
        "dsd_fast: all rows, with those that have no image": _ROWS,
    },
    "folder": {
        "datasets": """from datasets import load_dataset

images = load_dataset("imagefolder", data_dir="images", split="train", streaming=True)
sample = next(iter(images))
print(sample["image"].size, sample["text"])
""",
        "Pillow": """import json
from pathlib import Path

from PIL import Image

with Path("images/metadata.jsonl").open() as lines:
    sample = json.loads(next(lines))
print(Image.open(Path("images") / sample["file_name"]).size, sample["text"])
""",
        "dsd_fast: all rows, with those that have no image": _ROWS,
    },
}
_LEFT_OUT = {
    "webdataset": " From `json` datasets takes the names that the first samples have, and leaves out what only later "
    "ones say, as a negative prompt; the tables beside the shards have all.",
    "parquet": "",
    "folder": " From `metadata.jsonl` datasets takes the names that its first 10 MB have, and leaves out what only "
    "later lines say, as a negative prompt; the index has all.",
}


def card(settings: Mapping[str, Any], counts: Mapping[str, Any]) -> str:
    """Write a data card without times, equal for equal images.

    Args:
        settings: of the manifest.
        counts: as :func:`dsd_fast.generation.closing.close` gives them.
    """
    images = counts["images"]
    parts = [_header(settings, counts), "# Generated images\n"]
    marked = (
        "Each image says so in its metadata (XMP: IPTC's digital source type trainedAlgorithmicMedia, the model, the "
        "seed)."
        if settings.get("mark", True)
        else "The images carry no mark that says so."
    )
    parts.append(
        f"All {images} images are synthetic: a diffusion model made them from texts. {marked}\n\n"
        "No safety checker ran. Look at the images before you publish them or train on them.\n"
    )
    parts.append(f"## Counts\n\n{_counts(counts)}")
    if counts["classes"]:
        parts.append(f"## Balance of classes\n\n{_balance(counts['classes'])}")
    parts.append(
        "## Made with\n\nThe settings of `manifest.json`, by which, with the columns of its row, any image can be made "
        f"again (`dsd-fast generate --row ID --out DIR`):\n\n```json\n{_json(settings)}\n```\n"
    )
    if images:
        snippets = "\n".join(f"With {name}:\n\n```python\n{code}```\n" for name, code in loading(settings).items())
        parts.append(
            "## Loading\n\nIn this folder. On the Hugging Face hub this file is to be named README.md."
            f"{_LEFT_OUT[settings['layout']]}\n\n{snippets}"
        )
    return storable("\n".join(parts))


def loading(settings: Mapping[str, Any]) -> dict[str, str]:
    """Tell Python that reads an image inside the folder, by what it reads with."""
    return {name: code.replace("{format}", settings["format"]) for name, code in _SNIPPETS[settings["layout"]].items()}


def _header(settings: Mapping[str, Any], counts: Mapping[str, Any]) -> str:
    tasks = ["text-to-image", *(["image-classification"] if counts["classes"] else [])]
    size = next((name for bound, name in _SIZES.items() if counts["images"] < bound), "10B<n<100B")
    lines = ["---", "task_categories:", *(f"- {task}" for task in tasks), "size_categories:", f"- {size}"]
    lines += ["tags:", "- synthetic", "- dsd-fast"]
    if counts["images"]:
        lines += ["configs:", "- config_name: default", "  data_files:", "  - split: train"]
        lines.append(f'    path: "{_pattern(settings["layout"], counts["shards"])}"')
    return "\n".join([*lines, "---", ""])


def _pattern(layout: str, shards: Sequence[str]) -> str:
    if layout == "folder":
        return "images/**"
    ending = shards[0].rpartition(".")[2]
    return f"shards/*.{ending}" if "/" in shards[-1] else f"[0-9]*.{ending}"


def _counts(counts: Mapping[str, Any]) -> str:
    rows = [("rows", counts["rows"]), ("images", counts["images"])]
    rows += [(f"no image: {reason}", number) for reason, number in counts["errors"].items()]
    rows += [(f"tries rejected: {reason}", number) for reason, number in counts["rejected"].items()]
    if counts["near_duplicates"] is not None:
        rows.append(
            ("near-duplicates of another image of their class (near_duplicates.parquet)", counts["near_duplicates"])
        )
    return _table(("", "number"), rows)


def _balance(classes: Sequence[Mapping[str, Any]]) -> str:
    numbers = sorted(each["images"] for each in classes)
    text = (
        f"{len(classes)} classes, of which the smallest has {numbers[0]} images, the largest {numbers[-1]}, the middle "
        f"one {numbers[len(numbers) // 2]}.\n\n"
    )
    shown = classes
    if len(classes) > _MOST_CLASSES:
        shown = sorted(classes, key=lambda each: (each["images"], each["cls"], each["label"]))[:_MOST_CLASSES]
        text += f"The {_MOST_CLASSES} smallest:\n\n"
    rows = [("" if each["cls"] < 0 else each["cls"], each["label"], each["images"], each["errors"]) for each in shown]
    return text + _table(("cls", "class", "images", "rows without an image"), rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def _cell(value: Any) -> str:
    """Text that neither ends a cell nor is taken for HTML."""
    text = " ".join(str(value).split())
    for mark, safe in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("`", "\\`")):
        text = text.replace(mark, safe)
    return text


def _json(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True)
