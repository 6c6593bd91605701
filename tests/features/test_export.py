"""Features of many images in a folder: what lies there, what is made again, and what is refused."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import dsd_fast as dsd
from dsd_fast.engine.items import COLUMNS, images_of_a_shard
from dsd_fast.features.export import _rows_of_a_shard, extract_to
from dsd_fast.features.export_layouts import aggregated
from dsd_fast.jobs import Counts, JobError, ManifestError, file_digest, read_index, read_tensors, row_id

# Of different sizes; early ones, so that the network's first steps are all that runs.
LAYERS = ("down-level0-repeat0-res-out", "down-level0-downsampler-out")
CHANNELS, SIDES = (48, 48), (16, 8)


@pytest.fixture(scope="module")
def model():
    return dsd.load("mini")


@pytest.fixture
def extractor(model):
    return dsd.FeatureExtractor(model, LAYERS, timesteps=(50, 200))


@pytest.fixture
def pictures(tmp_path):
    """Twelve images in files, of which the fourth is damaged."""
    return save_pictures(tmp_path / "pictures")


def save_pictures(folder):
    draw = np.random.default_rng(0)
    folder.mkdir()
    paths = [folder / f"p{number:02d}.png" for number in range(12)]
    for number, path in enumerate(paths):
        Image.fromarray(draw.integers(0, 256, (40 + number, 64, 3), np.uint8)).save(path)
    paths[3].write_bytes(paths[3].read_bytes()[:100])
    return paths


def features_of(folder):
    """Name → id → array, from the shards."""
    rows = read_index(folder).to_pylist()
    shards = {row["shard"] for row in rows}
    tensors = {shard: read_tensors(folder / "shards" / f"{shard}.safetensors") for shard in shards}
    return {
        row["name"]: {layer: value[row["row"]] for layer, value in tensors[row["shard"]][0].items()}
        for row in rows
        if row["status"] == "ok"
    }


def close(value, other):
    # Batches of other sizes: convolutions agree to 1e-5 of the largest activation, as DESIGN of the package has it.
    return torch.allclose(torch.as_tensor(value), other, rtol=0, atol=1e-5 * float(other.abs().max()))


def test_shards_hold_the_features_and_the_index_says_whose(extractor, pictures, tmp_path):
    done = extract_to(extractor, tmp_path / "out", pictures, "a picture", 3, shard_rows=5)
    assert done.counts == Counts(inputs=12, ok=11, errors=1)
    assert done.folder == tmp_path / "out"
    rows = read_index(tmp_path / "out").to_pylist()
    assert [row["name"] for row in rows] == [path.stem for path in pictures]
    for number, (row, path) in enumerate(zip(rows, pictures, strict=True)):
        assert row["id"] == row_id(file_digest(path), "a picture", "3", path.stem)
        assert {name: row[name] for name in COLUMNS} == {
            "path": str(path), "prompt": "a picture", "seed": 3, "height": 40 + number, "width": 64,
        }  # fmt: skip
        assert row["shard"] == rows[number // 5 * 5]["shard"]
    assert [row["row"] for row in rows] == [0, 1, 2, None, 3, 0, 1, 2, 3, 4, 0, 1]
    assert (rows[3]["status"], rows[3]["reason"]) == ("error", "truncated")
    assert rows[3]["message"] == f"{pictures[3]} ends before its last pixel"

    good = [path for path in pictures if path != pictures[3]]
    expected = extractor.extract(good, "a picture", 3)
    found = features_of(tmp_path / "out")
    assert list(found) == [path.stem for path in good]
    for number, path in enumerate(good):
        assert list(found[path.stem]) == sorted(LAYERS)
        for layer, channels, side in zip(LAYERS, CHANNELS, SIDES, strict=True):
            assert found[path.stem][layer].shape == (2, channels, side, side)
            assert close(found[path.stem][layer], expected[layer][number])
    file = next((tmp_path / "out" / "shards").iterdir())
    assert read_tensors(file)[1] == {"timesteps": [50, 200]}


@pytest.mark.parametrize("timesteps", [(50,), (50, 200)])
def test_official_layouts(model, pictures, tmp_path, timesteps):
    extractor = dsd.FeatureExtractor(model, LAYERS, timesteps=timesteps)
    paths = pictures[:3]
    expected = extractor.extract(paths)
    for layout in ("npy-layer", "npy-sample", "npy-aggregated"):
        done = extract_to(extractor, tmp_path / layout, paths, layout=layout, names=["a", "b/c", "d"])
        assert done.counts == Counts(inputs=3, ok=3)
        names = {file.relative_to(tmp_path / layout).as_posix() for file in (tmp_path / layout).rglob("*.npy")}
        assert (
            names
            == {
                "npy-layer": {f"{layer}/{name}.npy" for layer in LAYERS for name in ("a", "b/c", "d")},
                "npy-sample": {f"{name}/{layer}.npy" for layer in LAYERS for name in ("a", "b/c", "d")},
                "npy-aggregated": {"a.npy", "b/c.npy", "d.npy"},
            }[layout]
        )
        for number, name in enumerate(("a", "b/c", "d")):
            wanted = {
                layer: value[number] if len(timesteps) > 1 else value[number, 0] for layer, value in expected.items()
            }
            if layout == "npy-aggregated":
                array = np.load(tmp_path / layout / f"{name}.npy", allow_pickle=False)
                small = wanted[LAYERS[1]].repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
                assert close(array, torch.cat([wanted[LAYERS[0]], small], dim=-3))
                continue
            for layer in LAYERS:
                parts = (layer, name) if layout == "npy-layer" else (name, layer)
                array = np.load(tmp_path / layout / f"{parts[0]}/{parts[1]}.npy", allow_pickle=False)
                assert array.dtype == np.float32
                assert close(array, wanted[layer])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_in_files(model, pictures, tmp_path, dtype):
    extractor = dsd.FeatureExtractor(model, LAYERS, dtype=dtype)
    expected = extractor.extract(pictures[:1])
    extract_to(extractor, tmp_path / "shards", pictures[:1])
    extract_to(extractor, tmp_path / "all", pictures[:1], layout="npy-aggregated")
    for layer, value in features_of(tmp_path / "shards")["p00"].items():
        assert torch.equal(value, expected[layer][0])
    array = np.load(tmp_path / "all" / "p00.npy", allow_pickle=False)
    # NumPy has no bfloat16; float32 holds all of its numbers.
    assert array.dtype == (np.float16 if dtype == "float16" else np.float32)
    wanted = aggregated({layer: value[0, 0] for layer, value in expected.items()})
    assert torch.equal(torch.from_numpy(array), wanted.to(torch.from_numpy(array).dtype))


def test_a_second_call_extracts_nothing_and_more_images_are_added(extractor, pictures, tmp_path):
    out, seen = tmp_path / "out", []
    extract_to(extractor, out, pictures[:8], shard_rows=4, progress=seen.append)
    assert seen == [4, 8, 8]
    before = {file: file.read_bytes() for file in out.glob("*/*")}
    assert extract_to(extractor, out, pictures[:8]).counts == Counts(inputs=8, done=8, done_errors=1)
    assert {file: file.read_bytes() for file in out.glob("*/*")} == before
    assert extract_to(extractor, out, pictures).counts == Counts(inputs=12, ok=4, done=8, done_errors=1)
    assert len(features_of(out)) == 11


def test_a_mended_image_is_extracted_and_one_that_failed_is_tried_again_when_asked(extractor, pictures, tmp_path):
    out, missing = tmp_path / "out", tmp_path / "missing.png"
    counts = extract_to(extractor, out, [missing, *pictures[:2]], layout="npy-layer").counts
    assert counts == Counts(inputs=3, ok=2, errors=1)
    assert extract_to(extractor, out, [missing], layout="npy-layer").counts == Counts(inputs=1, done=1, done_errors=1)
    assert extract_to(extractor, out, [missing], layout="npy-layer", retry_errors=True).counts == Counts(
        inputs=1, errors=1
    )
    missing.write_bytes(pictures[5].read_bytes())
    assert extract_to(extractor, out, [missing], layout="npy-layer").counts == Counts(inputs=1, ok=1)
    assert (out / LAYERS[0] / "missing.npy").exists()


def test_any_kind_of_image_and_what_is_none(extractor, pictures, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    array = np.asarray(Image.open(pictures[0]))
    images = [
        array, Image.fromarray(array), torch.from_numpy(array.copy()).permute(2, 0, 1) / 255, None, tmp_path / "pipe",
        tmp_path, tmp_path / "missing", array, array,
    ]  # fmt: skip
    names = ["array", "pillow", "tensor", "none", "pipe", "folder", "missing", "again", "array"]
    done = extract_to(extractor, tmp_path / "out", iter(images), names=names)
    assert done.counts == Counts(inputs=9, ok=4, errors=4, duplicates=1)
    rows = {row["name"]: row for row in read_index(tmp_path / "out").to_pylist()}
    reasons = {name: row["reason"] for name, row in rows.items() if row["status"] == "error"}
    assert reasons == {"none": "unsupported-type", "pipe": "not-a-file", "folder": "is-directory", "missing": "missing"}
    found = features_of(tmp_path / "out")
    first = found["array"][LAYERS[0]]
    assert all(close(found[name][LAYERS[0]], first) for name in ("pillow", "tensor", "again"))
    assert (rows["array"]["path"], rows["array"]["height"], rows["array"]["width"]) == (None, 40, 64)


def test_a_prompt_that_is_no_text_is_its_own_error(extractor, pictures, tmp_path):
    prompts = ["a", "b \udcff", "c \ud800"]
    assert extract_to(extractor, tmp_path / "out", pictures[:3], prompts).counts == Counts(inputs=3, ok=1, errors=2)
    rows = read_index(tmp_path / "out").to_pylist()
    assert [row["reason"] for row in rows] == ["", "prompt-no-text", "prompt-no-text"]
    assert [row["prompt"] for row in rows] == ["a", "b \\udcff", "c \\ud800"]
    with pytest.raises(ValueError, match="prompts: the prompt has half of a surrogate pair"):
        extract_to(extractor, tmp_path / "one", pictures[:1], prompts[1])
    with pytest.raises(ValueError, match="name has half of a surrogate pair"):
        dsd.Technique("lora \udcff")


def test_every_image_may_have_its_prompt_and_one_too_long_is_its_own_error(model, pictures, tmp_path):
    layer = "mid-vit-block0-cross-q"
    extractor = dsd.FeatureExtractor(model, [layer])
    prompts = ["a red circle", "word " * 100, "a blue ring", "", ""]
    done = extract_to(extractor, tmp_path / "out", pictures[:5], prompts)
    assert done.counts == Counts(inputs=5, ok=3, errors=2)
    rows = read_index(tmp_path / "out").to_pylist()
    assert [row["prompt"] for row in rows] == prompts
    assert [row["reason"] for row in rows] == ["", "prompt-too-long", "", "truncated", ""]
    assert "the prompt has 402 tokens, expected at most" in rows[1]["message"]
    # Those that are left when some are done keep their own prompts, and a technique's go before the request's.
    given = dsd.FeatureExtractor(model, [layer], technique=dsd.Technique(prompts=prompts))
    assert extract_to(given, tmp_path / "out", pictures[:5], "none of them").counts.done == 5
    some = [prompts[i] for i in (0, 2, 4)]
    for number, path in enumerate(pictures[i] for i in (0, 2, 4)):
        alone = extractor.extract([path], some[number])
        assert close(features_of(tmp_path / "out")[path.stem][layer], alone[layer][0])
    extract_to(extractor, tmp_path / "later", [pictures[0]], [prompts[0]])
    extract_to(given, tmp_path / "later", pictures[:5], "none of them")
    for name, found in features_of(tmp_path / "later").items():
        assert close(found[layer], features_of(tmp_path / "out")[name][layer])


def test_a_prompt_of_all_that_is_too_long_is_refused_before_any_work(extractor, pictures, tmp_path):
    with pytest.raises(ValueError, match="prompts: the prompt has 402 tokens, expected at most"):
        extract_to(extractor, tmp_path / "out", pictures, "word " * 100)
    assert not (tmp_path / "out").exists()


def test_features_that_are_no_numbers_are_errors(model, pictures, tmp_path):
    extractor = dsd.FeatureExtractor(model, LAYERS, dtype="float16")
    weight = model.unet.conv_in.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            # Beyond what float16 holds.
            weight.mul_(1e6)
        done = extract_to(extractor, tmp_path / "out", pictures[:3])
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert done.counts == Counts(inputs=3, errors=3)
    assert set(read_index(tmp_path / "out")["reason"].to_pylist()) == {"not-finite"}
    assert not list((tmp_path / "out").glob("shards/*"))


def change_seed(extractor, options):
    return extractor, {**options, "seed": 1}


def change_prompt(extractor, options):
    return extractor, {**options, "prompts": "another"}


def change_layout(extractor, options):
    return extractor, {**options, "layout": "npy-layer"}


def change_timesteps(extractor, options):
    return dsd.FeatureExtractor(extractor.model, LAYERS, timesteps=(50,)), options


def change_technique(extractor, options):
    technique = dsd.Technique(denoise_from=210)
    return dsd.FeatureExtractor(extractor.model, LAYERS, timesteps=(50, 200), technique=technique), options


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_seed, "seed 0 there, 1 now"),
        (change_prompt, 'prompts "" there, "another" now'),
        (change_layout, 'layout "shards" there, "npy-layer" now'),
        (change_timesteps, r"timesteps \[50, 200\] there, \[50\] now"),
        (change_technique, "technique.denoise_from null there, 210 now"),
    ],
)
def test_a_folder_holds_one_kind_of_features(extractor, pictures, tmp_path, change, message):
    extract_to(extractor, tmp_path / "out", pictures[:1])
    other, options = change(extractor, {"prompts": "", "seed": 0})
    with pytest.raises(ManifestError, match=message):
        extract_to(other, tmp_path / "out", pictures[:1], **options)


def test_other_weights_are_refused_and_another_budget_is_not(extractor, pictures, tmp_path):
    out, model = tmp_path / "out", extractor.model
    extract_to(extractor, out, pictures[:1])
    less = dsd.FeatureExtractor(model, LAYERS, timesteps=(50, 200), memory_budget=16 << 20)
    assert extract_to(less, out, pictures[:1], shard_rows=1).counts.done == 1
    bias = model.unet.conv_in.bias
    before = bias.detach().clone()
    try:
        with torch.no_grad():
            bias[0] += 1
        with pytest.raises(ManifestError, match=r'weights "[0-9a-f]{32}" there, "[0-9a-f]{32}" now'):
            extract_to(extractor, out, pictures[:1])
    finally:
        with torch.no_grad():
            bias.copy_(before)
    assert json.loads((out / "manifest.json").read_text())["kind"] == "features"


def test_shards_begin_where_batches_begin(model):
    extractor = dsd.FeatureExtractor(model, LAYERS, memory_budget=16 * 2**20)
    most = extractor.images_at_once()
    assert most > 2
    for rows in (1, 2, most - 1, most, most + 1, most + 2, 2 * most, 3 * most - 1):
        together = images_of_a_shard(rows, most, extractor.size)
        assert together == max(count for count in range(1, most + 1) if rows % count == 0)


def test_a_shard_is_as_large_as_memory_allows(model):
    values = sum(channels * side**2 for channels, side in zip(CHANNELS, SIDES, strict=True))
    for budget, size in ((None, 64 * 2**20), (32 * 2**20, 2 * 2**20), (2 * 2**30, 64 * 2**20)):
        for timesteps in ([50], [50, 200, 500]):
            extractor = dsd.FeatureExtractor(model, LAYERS, timesteps, dtype="float16", memory_budget=budget)
            rows = _rows_of_a_shard(extractor)
            row = 2 * len(timesteps) * values
            assert size / 2 < rows * row <= size


def test_four_workers_extract_what_one_does(extractor, pictures, tmp_path):
    extract_to(extractor, tmp_path / "one", pictures, shard_rows=4)
    counts = [
        extract_to(extractor, tmp_path / "four", pictures, shard_rows=4, worker=worker, workers=4).counts
        for worker in range(4)
    ]
    assert sum(each.ok for each in counts) == 11
    assert all(each.inputs + each.elsewhere == 12 for each in counts)
    one, four = (
        {row.pop("id"): {key: row[key] for key in row if key not in ("shard", "row")} for row in rows}
        for rows in (read_index(tmp_path / name).to_pylist() for name in ("one", "four"))
    )
    assert one == four
    first, second = features_of(tmp_path / "one"), features_of(tmp_path / "four")
    assert first.keys() == second.keys()
    assert all(close(second[name][layer], value) for name, found in first.items() for layer, value in found.items())


def test_writing_goes_on_beside_computing(extractor, pictures, tmp_path):
    done = extract_to(extractor, tmp_path / "out", pictures, shard_rows=2)
    spans = json.loads((tmp_path / "out" / "timeline.json").read_text())["spans"]
    # Of six shards the writer has the first when the second is begun.
    assert {span["name"] for span in spans} == {"compute", "write"}
    assert 0 < done.overlap <= 1
    assert min(done.write_seconds, done.compute_seconds) > 0


def test_images_are_taken_as_they_are_needed(extractor, pictures, tmp_path):
    taken, ahead = 0, []

    def images():
        nonlocal taken
        for _ in range(10):
            for path in pictures:
                taken += 1
                yield path

    names = [str(number) for number in range(120)]
    dealt = []

    def progress(count):
        ahead.append(taken - count)
        dealt.append(count)

    extract_to(extractor, tmp_path / "out", images(), names=names, shard_rows=4, progress=progress)
    assert dealt[-1] == 120
    # 16 are read ahead and at most 16 decoded, one is on its way between them.
    assert max(ahead) <= 33


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "zip"}, "layout: got 'zip', expected one of shards, npy-layer"),
        ({"shard_rows": 0}, "shard_rows: got 0, expected at least 1"),
        ({"worker": 1}, "worker is 1, expected 0 to 0"),
        ({"names": ["a"]}, "names: got 1 for 12 images, expected one each"),
        ({"names": "abcdefghijkl"}, "names: got the str 'abcdefghijkl', expected a sequence"),
        ({"prompts": ["a"]}, "prompts: got 1 for 12 images, expected one each"),
        ({"prompts": [1] * 12}, r"prompts\[0\] is of type int, expected str"),
        ({"names": ["../a"] * 12, "layout": "npy-layer"}, "names: got '../a', expected a path below the folder"),
        ({"names": ["/a"] * 12, "layout": "npy-layer"}, "names: got '/a', expected a path below the folder"),
        ({"names": [""] * 12, "layout": "npy-layer"}, "names: got '', expected a path below the folder"),
        ({"names": ["a"] * 12, "layout": "npy-layer"}, "names: 'a' stands for several inputs"),
    ],
)
def test_arguments_that_do_not_fit_are_named(extractor, pictures, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        extract_to(extractor, tmp_path / "out", pictures, **options)
    assert read_index(tmp_path / "out").num_rows == 0


@pytest.mark.parametrize(
    ("settings", "technique", "options", "message"),
    [
        ({}, {}, {"seed": -1}, "seed: got -1, expected an integer from 0 to"),
        ({}, {}, {"seed": 2**32}, "seed: got 4294967296, expected"),
        ({}, {}, {"seed": 1.0}, "seed: got 1.0, expected"),
        ({}, {}, {"seed": True}, "seed: got True, expected"),
        ({}, {}, {"prompts": [""] * 11 + [1]}, r"prompts\[11\] is of type int, expected str"),
        ({}, {}, {"names": ["a", 1] * 6}, r"names\[1\] is of type int, expected str"),
        ({}, {"denoise_from": 199}, {}, "denoise_from"),
        ({"draws": 2}, {"inversion": True}, {}, "draws: got 2, expected 1"),
    ],
)
def test_a_request_that_cannot_work_leaves_the_folder_alone(
    model, pictures, tmp_path, settings, technique, options, message
):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        dsd.FeatureExtractor(
            model, LAYERS, timesteps=(50, 200), technique=dsd.Technique(**technique), **settings
        ).extract_to(out, pictures, **options)
    assert not out.exists()


def test_the_largest_seed_and_a_seed_of_numpy(extractor, pictures, tmp_path):
    assert extract_to(extractor, tmp_path / "out", pictures[:1], seed=np.uint32(2**32 - 1)).counts.ok == 1
    assert extract_to(extractor, tmp_path / "out", pictures[:1], seed=2**32 - 1).counts.done == 1


def test_every_file_that_cannot_be_read_has_its_row(extractor, tmp_path):
    missing = [tmp_path / folder / "x.png" for folder in "ab"]
    assert extract_to(extractor, tmp_path / "out", [*missing, missing[0]]).counts == Counts(
        inputs=3, errors=2, duplicates=1
    )
    assert read_index(tmp_path / "out")["path"].to_pylist() == [str(path) for path in missing]
    assert extract_to(extractor, tmp_path / "out", missing).counts == Counts(inputs=2, done=2, done_errors=2)


def test_attention_maps_are_not_put_beside_layers(model, pictures, tmp_path):
    name = next(each for each in dsd.FeatureExtractor(model, "all").layers if each.endswith("-map"))
    extractor = dsd.FeatureExtractor(model, [LAYERS[0], name])
    with pytest.raises(ValueError, match=rf"layout: got 'npy-aggregated', .* over tokens \({name}\); expected another"):
        extract_to(extractor, tmp_path / "out", pictures[:1], layout="npy-aggregated")
    assert not (tmp_path / "out").exists()
    assert extract_to(extractor, tmp_path / "out", pictures[:1], layout="npy-layer").counts.ok == 1


@pytest.mark.parametrize("images", ["a.png", b"a", 3])
def test_one_image_is_not_several(extractor, tmp_path, images):
    with pytest.raises(ValueError, match=r"images: got one .*, expected a sequence of images"):
        extract_to(extractor, tmp_path / "out", images)


def test_a_name_of_an_earlier_run_is_not_given_away(extractor, pictures, tmp_path):
    extract_to(extractor, tmp_path / "out", pictures[:2], layout="npy-layer")
    before = (tmp_path / "out" / LAYERS[0] / "p00.npy").read_bytes()
    odd = os.fsdecode(b"\xff")
    extract_to(extractor, tmp_path / "out", pictures[4:5], names=[odd], layout="npy-layer")
    for name in ("p00", "./p00", odd):
        with pytest.raises(ValueError, match=r"names: .* stands for several inputs"):
            extract_to(extractor, tmp_path / "out", pictures[2:3], names=[name], layout="npy-layer")
    assert (tmp_path / "out" / LAYERS[0] / "p00.npy").read_bytes() == before


def test_a_folder_in_the_way_of_a_file_is_one_sentence(extractor, pictures, tmp_path):
    (tmp_path / "out" / "p01.npy").mkdir(parents=True)
    with pytest.raises(JobError, match="out cannot be written: Is a directory; 1 row is safe, and the same command"):
        extract_to(extractor, tmp_path / "out", pictures[:3], layout="npy-aggregated", shard_rows=1)
    (tmp_path / "out" / "p01.npy").rmdir()
    assert extract_to(extractor, tmp_path / "out", pictures[:3], layout="npy-aggregated").counts.ok == 2


def test_the_technique_of_the_settings_is_told_without_its_prompts(extractor, pictures, tmp_path):
    extract_to(extractor, tmp_path / "out", pictures[:1], "a")
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    assert (settings["prompts"], settings["technique"]["prompts"]) == ("a", None)
    assert "memory_budget" not in settings
    named = replace(extractor.technique, prompts="a")
    given = dsd.FeatureExtractor(extractor.model, LAYERS, timesteps=(50, 200), technique=named)
    assert extract_to(given, tmp_path / "out", pictures[:1], "b").counts.done == 1
