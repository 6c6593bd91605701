"""Small data files for the tests of their readers."""

import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

BINARY = "The question is asking about yes or no: "


def write(path, content):
    """The path, with text written as it is, line ends included."""
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_csv(path, rows, *, line_end="\n", mark=b""):
    """The path, with a header and a line for each dictionary."""
    stream = io.StringIO()
    # Left to itself, the module does not quote a line feed where lines end otherwise.
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator=line_end, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return write(path, mark + stream.getvalue().encode())


def write_jsonl(path, rows):
    return write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_json(path, value):
    return write(path, json.dumps(value))


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_table(folder, container, rows):
    """A table of one of the three kinds; lists in a CSV's cells as JSON."""
    path = folder / f"table.{container}"
    if container == "csv":
        rows = [{key: json.dumps(v) if isinstance(v, list) else v for key, v in row.items()} for row in rows]
        return write_csv(path, rows)
    return write_jsonl(path, rows) if container == "jsonl" else write_parquet(path, rows)


def refs(num_images, per_image=2):
    """The refs of as many images, two sentences each, as refs(google).p has them, numbered in their order."""
    return [
        {
            "ref_id": 10 * image + i,
            "image_id": 1000 + image,
            "ann_id": 0,
            "split": "val" if image % 5 == 4 else "train",
            "sentences": [
                {"raw": f"Thing {i} of {image}!", "sent": f"thing {i} of {image}", "sent_id": 0, "tokens": []},
                {"raw": f"Other {i} of {image}", "sent": f"other {i} of {image}", "sent_id": 0, "tokens": []},
            ],
        }
        for image in range(num_images)
        for i in range(per_image)
    ]


def write_refcocog(folder, items, name="refs(google).json"):
    """The folder of RefCOCOg, with the refs or pairs under ``name`` and the instances of images 1000 to 1099."""
    images = [{"id": 1000 + i, "file_name": f"COCO_train2014_{1000 + i:012d}.jpg", "height": 1} for i in range(100)]
    write_json(folder / "instances.json", {"images": images, "annotations": [], "categories": []})
    write_json(folder / name, items)
    return folder
