"""A small real folder of pictures, drawn instead of generated."""

from pathlib import Path

import numpy as np

from dsd_fast.generation.encoding import Encoder
from dsd_fast.generation.files import KIND, writer_of
from dsd_fast.generation.rows import COLUMNS, GenerateRow, columns, row_id_of
from dsd_fast.jobs import Job

COUNT = 11
SIZE = (24, 40)
MODEL = "a <model> & its \x00name"
# Labels that no file system, pattern or table takes as they are; and none.
LABELS = ["cat", '../"tree" frog | [a]*?', "__pycache__", None]
TEXTS = ["a cat", "日本 <b>🙂</b>", 'quotes " and\nlines\x0b', ""]
EXTRA = {"clip": "binary", "tries": "string"}
BAD = {4, 9}


def rows() -> list[GenerateRow]:
    """Of four classes, one of them none; the first ones leave more to the configuration than the last ones."""
    return [
        GenerateRow(
            TEXTS[number % 4],
            seed=2**64 - 1 - number if number > 6 else number,
            negative_prompt="blurred" if number > 5 else None,
            strength=0.5 if number > 5 else None,
            image=Path("start.png") if number > 5 else None,
            label=LABELS[number % 4],
            cls=number % 4 if LABELS[number % 4] else None,
        )
        for number in range(COUNT)
    ]


def picture(number: int) -> np.ndarray:
    """Smooth, so that lossy formats keep it nearly."""
    height, width = np.mgrid[: SIZE[0], : SIZE[1]]
    return (
        np.stack([height * 5 + number, width * 3, height + width + 20 * number], axis=-1).clip(0, 255).astype(np.uint8)
    )


def vector(number: int) -> bytes:
    """Near to that of the number 8 earlier in the same class, and to no other."""
    values = np.zeros(16, np.float16)
    values[number % 8] = 3
    values[15] = 0.1 * (number // 8)
    return values.tobytes()


def identity(number: int) -> str:
    row = rows()[number]
    return row_id_of(row, ["file"] * len(row.sources))


def run(folder: Path, layout="webdataset", format="png", numbers=range(COUNT), bad=BAD, mark=True, **options) -> None:
    """Fills the folder; what is bad is an error after two rejected tries."""
    settings = {"model": MODEL, "layout": layout, "format": format, "mark": mark, "near_duplicates": 0.99}
    kinds = {**COLUMNS, **EXTRA}
    options = {"shard_rows": 3, "write": writer_of(layout, format, kinds), "columns": kinds, **options}
    all_rows = rows()
    with (
        Job(folder, KIND, settings, **options) as job,
        Encoder(format, mark=mark, about={"model": MODEL}, timeline=job.timeline, threads=2) as encoder,
    ):
        for number in job.pending(numbers, identity):
            id, about = identity(number), {**columns(all_rows[number]), "tries": "", "clip": None}
            if number in bad:
                about["tries"] = '[{"reason": "rejected", "score": 0.1}, {"reason": "near-duplicate"}]'
                job.fail(id, f"n{number}", "not-accepted", f"{number} was never accepted", **about)
            else:
                about["clip"] = vector(number)
                sample = encoder.submit(picture(number), {"id": id, "name": f"n{number}", **about})
                job.put(id, f"n{number}", sample, **about)
