import io
import json
import tracemalloc

import pytest
import torch

from dsd_fast.jobs import read_tensors, stream_tensors, write_tensors
from tests.memory import peak_bytes


def test_tensors_and_what_was_said_about_them_come_back(tmp_path):
    shared = torch.arange(6.0).view(2, 3)
    tensors = {"a.x": shared, "a.y": shared.T, "b": torch.tensor(3)}
    file = tmp_path / "new" / "x.safetensors"
    write_tensors(file, tensors, {"step": 1, "names": ["é"]})
    found, about = read_tensors(file)
    assert about == {"step": 1, "names": ["é"]}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert read_tensors(file, "a.")[0].keys() == {"x", "y"}


def test_nothing_said_is_an_empty_mapping(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    write_tensors(tmp_path / "own.safetensors", {})
    assert read_tensors(tmp_path / "other.safetensors")[1] == {}
    assert read_tensors(tmp_path / "own.safetensors") == ({}, {})


def test_a_torn_temporary_file_is_not_the_file(tmp_path):
    file = tmp_path / "x.safetensors"
    write_tensors(file, {"a": torch.ones(2)}, {"step": 1})
    (tmp_path / ".x.safetensors.0123abcd.tmp").write_bytes(b"torn")
    with pytest.raises(RuntimeError, match="meta"):
        write_tensors(file, {"a": torch.ones(2, device="meta")})
    assert torch.equal(read_tensors(file)[0]["a"], torch.ones(2))
    assert {each.name for each in tmp_path.iterdir()} == {"x.safetensors", ".x.safetensors.0123abcd.tmp"}


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
]  # fmt: skip


def test_streamed_tensors_are_read_by_the_formats_own_reader(tmp_path):
    from safetensors.torch import load_file

    # Sizes that are no multiple of the next type's, and names in another order than the types.
    tensors = {f"{i % 3}.{i}": torch.arange(i + 3).to(dtype) for i, dtype in enumerate(DTYPES)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "strided": torch.arange(12.0).view(3, 4).T}
    tensors["channels"] = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    file = tmp_path / "x.safetensors"
    with file.open("wb") as stream:
        stream_tensors(stream, tensors, {"a": 1})
    found = load_file(file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert (
            torch.equal(found[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)) if tensor.ndim else True
        )
    assert found["scalar"] == 2.5
    # Each begins at a multiple of its element's size, so that a reader can use the file's memory as it is.
    size = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + size])
    assert size % 8 == 0
    assert all(header[name]["data_offsets"][0] % tensor.element_size() == 0 for name, tensor in tensors.items())
    assert read_tensors(file)[1] == {"a": 1}


def test_rows_are_stacked_as_torch_stacks_them(tmp_path):
    whole = torch.rand(5, 2, 3, 4).half()
    for name, value in (("rows", list(whole)), ("whole", whole)):
        with (tmp_path / name).open("wb") as stream:
            stream_tensors(stream, {"x": value, "y": torch.ones(3)}, {"n": 5})
    assert (tmp_path / "rows").read_bytes() == (tmp_path / "whole").read_bytes()
    assert torch.equal(read_tensors(tmp_path / "rows")[0]["x"], whole)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"tensors\['x'\]: got none, expected tensors of one shape and dtype"),
        ([torch.ones(2), torch.ones(3)], r"got \(2,\) torch.float32, \(3,\) torch.float32, expected"),
        ([torch.ones(2), torch.ones(2).half()], r"got \(2,\) torch.float16, \(2,\) torch.float32, expected"),
        (torch.ones(2, dtype=torch.complex128), r"tensors\['x'\] is torch.complex128, expected one of F64"),
    ],
)
def test_tensors_that_the_file_cannot_hold_are_refused(tmp_path, value, message):
    file = tmp_path / "x"
    with pytest.raises(ValueError, match=message), file.open("wb") as stream:
        stream_tensors(stream, {"x": value})
    assert file.read_bytes() == b""


def test_streaming_copies_no_row(tmp_path):
    rows = [torch.rand(1 << 20) for _ in range(4)]
    with (tmp_path / "x").open("wb") as stream:
        tracemalloc.start()
        stream_tensors(stream, {"x": rows})
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    # Python's own memory, where the format's own writer would make the file of 16 MiB; torch's is not traced.
    assert peak < 1 << 20
    assert peak_bytes(lambda: stream_tensors(io.BytesIO(), {"x": rows})) == 0
