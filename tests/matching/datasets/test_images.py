"""Images embedded in Parquet files, as Hugging Face data sets hold them."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from dsd_fast.images import load_image
from dsd_fast.matching import read_groups
from tests.matching.datasets.files import write_parquet


def encoded(shade, kind="PNG"):
    stream = io.BytesIO()
    Image.new("RGB", (5, 3), (shade, 0, 255 - shade)).save(
        stream, kind, **({"lossless": True} if kind == "WEBP" else {})
    )
    return stream.getvalue()


def shade(source):
    image = load_image(source)
    assert image.size == (5, 3)
    return int(np.asarray(image)[0, 0, 0])


def winoground(*pairs):
    return [
        {"caption_0": "x", "caption_1": "y", "image_0": a, "image_1": b, "collapsed_tag": "Both", "id": i}
        for i, (a, b) in enumerate(pairs)
    ]


def embedded(data, path=None):
    return {"bytes": data, "path": path}


def test_they_are_decoded_at_once(tmp_path):
    rows = winoground((embedded(encoded(10), "a.png"), embedded(encoded(20, "WEBP"))), (embedded(None, "c.png"),) * 2)
    groups = read_groups(write_parquet(tmp_path / "t.parquet", rows), images=tmp_path)
    assert groups[0].paired
    assert all(isinstance(image, Image.Image) for image in groups[0].images)
    assert [shade(image) for image in groups[0].images] == [10, 20]
    # A structure without bytes names a file.
    assert groups[1].images == (tmp_path / "c.png",) * 2


def test_equal_bytes_are_one_image(tmp_path):
    """Whoever tells images apart by the object knows that two rows show the same one."""
    rows = [{"image": embedded(encoded(n)), "texts": ["x", "y"], "label": 0} for n in (10, 10, 20)]
    groups = read_groups(write_parquet(tmp_path / "t.parquet", rows))
    assert groups[0].images[0] is groups[1].images[0]
    assert [shade(group.images[0]) for group in groups] == [10, 10, 20]


def test_they_are_written_where_one_says(tmp_path):
    first, second = encoded(10), encoded(20, "JPEG")
    rows = winoground((embedded(first), embedded(second)), (embedded(second), embedded(first)))
    file = write_parquet(tmp_path / "t.parquet", rows)
    folder = tmp_path / "new" / "images"
    groups = read_groups(file, extract=folder, check=True)
    names = [f"{hashlib.sha256(first).hexdigest()[:32]}.png", f"{hashlib.sha256(second).hexdigest()[:32]}.jpg"]
    assert groups[0].images == tuple(folder / name for name in names)
    assert groups[1].images == groups[0].images[::-1]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert [path.read_bytes() for path in groups[0].images] == [first, second]
    # Read again, what is there stays; a file cut short is made whole.
    before = (folder / names[0]).stat().st_mtime_ns
    (folder / names[1]).write_bytes(second[:10])
    assert read_groups(file, extract=folder) == groups
    assert (folder / names[0]).stat().st_mtime_ns == before
    assert (folder / names[1]).read_bytes() == second


def test_plain_tables_embed_images_too(tmp_path):
    rows = [
        {"images": [embedded(encoded(10)), embedded(encoded(20)), embedded(encoded(30))], "text": "x", "label": 2},
        {"images": [embedded(encoded(10)), embedded(encoded(20))], "text": "x", "label": 1},
    ]
    groups = read_groups(write_parquet(tmp_path / "t.parquet", rows))
    assert [[shade(image) for image in group.images] for group in groups] == [[10, 20, 30], [10, 20]]
    (group,) = read_groups(
        write_parquet(tmp_path / "t.parquet", [{"image": encoded(40), "texts": ["x", "y"], "label": 0}])
    )
    assert shade(group.images[0]) == 40
    # The bytes count for the id, not how they are kept.
    (kept,) = read_groups(tmp_path / "t.parquet", extract=tmp_path / "images")
    assert kept.id == group.id
    digest = hashlib.sha256(encoded(40)).hexdigest()
    assert kept.id == hashlib.sha256(f'[["{digest}"], ["x", "y"], 0]'.encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GIF89a" + b"\0" * 40, "row 2: an embedded image is not JPEG, PNG or WebP"),
        (encoded(10)[:20], "row 2: an embedded image has a damaged header"),
        (encoded(10)[:60], "row 2: an embedded image cannot be used .truncated."),
        (b"", "row 2, column 'image': .* expected an image's file name, or its bytes"),
        (None, "row 2, column 'image': .* expected an image's file name, or its bytes"),
    ],
)
def test_what_is_no_image_is_named_by_row(data, message, tmp_path):
    rows = [{"image": embedded(bytes_), "texts": ["x", "y"], "label": 0} for bytes_ in (encoded(10), data)]
    with pytest.raises(ValueError, match=message):
        read_groups(write_parquet(tmp_path / "t.parquet", rows))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    rows = [{"image": encoded(10), "texts": ["x", "y"], "label": 0}]
    with pytest.raises(OSError, match="file"):
        read_groups(write_parquet(tmp_path / "t.parquet", rows), extract=tmp_path / "file")
