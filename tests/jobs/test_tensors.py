import pytest
import torch

from dsd_fast.jobs import read_tensors, write_tensors


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
