"""RefCOCOg: its refs as JSON, negatives by seed, the official training pairs, and pickles, which are refused."""

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from dsd_fast.matching import Group, official_split, read_groups
from tests.matching.datasets.files import refs, write, write_json, write_refcocog


@pytest.mark.parametrize("format", [None, "refcocog"])
@pytest.mark.parametrize("by_folder", [True, False])
def test_each_sentence_is_a_group(format, by_folder, tmp_path):
    items = refs(12)
    write_refcocog(tmp_path, items)
    source = tmp_path if by_folder else tmp_path / "refs(google).json"
    groups = read_groups(source, format, images="train2014")
    sentences = [(ref, sentence["raw"]) for ref in items for sentence in ref["sentences"]]
    assert len(groups) == len(sentences) == 48
    spoken = {text: ref["image_id"] for ref, text in sentences}
    for group, (ref, text) in zip(groups, sentences, strict=True):
        assert [str(image) for image in group.images] == [f"train2014/COCO_train2014_{ref['image_id']:012d}.jpg"]
        assert (group.texts[0], group.label, group.category) == (text, 0, ref["split"])
        assert len(set(group.texts)) == 10
        assert all(spoken[negative] != ref["image_id"] for negative in group.texts[1:])
    # Every sentence is a negative of another somewhere.
    assert set().union(*(group.texts[1:] for group in groups)) == set(spoken)


def test_the_seed_and_the_content_draw(tmp_path):
    folder = write_refcocog(tmp_path, refs(12))
    groups = read_groups(folder)
    assert read_groups(folder) == groups
    assert read_groups(folder, seed=0, limit=5) == groups[:5]
    other = read_groups(folder, seed=1)
    assert [group.texts[0] for group in other] == [group.texts[0] for group in groups]
    assert all(a.texts[1:] != b.texts[1:] and a.id != b.id for a, b in zip(groups, other, strict=True))
    # Nor does the order of the refs matter: a group keeps its negatives.
    (tmp_path / "other").mkdir()
    turned = read_groups(write_refcocog(tmp_path / "other", refs(12)[::-1]), images=folder)
    assert {group.id: group for group in turned} == {group.id: group for group in groups}


def test_negatives_are_drawn_as_defined(tmp_path):
    items = refs(12)
    groups = read_groups(write_refcocog(tmp_path, items), seed=3)
    for group, item in zip(groups[::2], items, strict=True):
        key = json.dumps([3, str(item["image_id"]), group.texts[0]]).encode()
        generator = random.Random(int.from_bytes(hashlib.sha256(key).digest(), "big"))
        drawn = []
        while len(drawn) < 9:
            ref = items[int(generator.random() * len(items))]
            text = ref["sentences"][int(generator.random() * len(ref["sentences"]))]["raw"]
            if ref["image_id"] != item["image_id"] and text not in drawn:
                drawn.append(text)
        assert list(group.texts[1:]) == drawn


def test_texts_said_of_the_same_image_are_no_negatives(tmp_path):
    items = refs(6, per_image=1)
    # Said of image 0, and of the others too: nine sentences that are not remain for image 0, more for others.
    for item in items:
        item["sentences"].append({"raw": "the dog"})
    groups = read_groups(write_refcocog(tmp_path, items, "some.json").joinpath("some.json"))
    assert len(groups) == 18
    assert all("the dog" not in group.texts[1:] for group in groups)
    assert all(len(set(group.texts)) == 10 for group in groups)


def test_sentences_without_a_raw_text_and_refs_without_a_split(tmp_path):
    items = refs(12)
    for item in items:
        del item["split"]
        for sentence in item["sentences"]:
            del sentence["raw"]
    groups = read_groups(write_refcocog(tmp_path, items))
    assert (groups[0].texts[0], groups[0].category) == ("thing 0 of 0", "")


def test_images_by_template_instead_of_instances(tmp_path):
    file = write_json(tmp_path / "refs(google).json", refs(12))
    group = read_groups(file, image_name="COCO_train2014_{:012d}.jpg", limit=1)[0]
    assert group.images == (tmp_path / "COCO_train2014_000000001000.jpg",)
    with pytest.raises(
        ValueError, match=r"instances\.json, which names the images, is not beside it; or give image_name"
    ):
        read_groups(file)


def test_the_official_parts_of_the_official_counts():
    # As many sentences as RefCOCOg has: 95,010 with ten candidates each, 950,100 pairs.
    groups = [Group((Path("a.jpg"),), tuple("abcdefghij"), id=name) for name in "abcdefghij"] * 9_501
    assert sum(len(group.texts) for group in groups) == 950_100
    train = official_split(groups, "refcocog", "train")
    evaluation = official_split(groups, "refcocog", "evaluation")
    assert (len(train), len(evaluation)) == (4_750, 90_260)
    assert sum(len(group.texts) for group in train) == 47_500
    assert sum(len(group.texts) for group in evaluation) == 902_600
    assert train + evaluation == groups


def test_the_official_training_pairs(tmp_path):
    pairs = [[i // 10, f"text {i}", 1000 + i // 10, int(i % 10 == 0)] for i in range(30)]
    folder = write_refcocog(tmp_path, pairs, "refcoco_train_data.json")
    groups = read_groups(folder / "refcoco_train_data.json", images="train2014")
    assert [group.texts for group in groups] == [tuple(f"text {10 * i + j}" for j in range(10)) for i in range(3)]
    assert [str(group.images[0]) for group in groups] == [
        f"train2014/COCO_train2014_{1000 + i:012d}.jpg" for i in range(3)
    ]
    for change, message in (
        (pairs[:25], "got 25 pairs, expected a multiple of 10"),
        ([*pairs[:5], [0, "x", 1000, 1], *pairs[6:]], r"item 6: got .*, expected \[sentence id, text, image id, 0\]"),
        ([*pairs[:5], [0, "x", 1001, 0], *pairs[6:]], "item 1: the 10 pairs from here have several images"),
        ([*pairs[:5], [0, "x"], *pairs[6:]], "item 6: got"),
        (pairs[1:], r"item 1: got .*, expected \[sentence id, text, image id, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            read_groups(write_json(tmp_path / "p.json", change), "refcocog", image_name="{}.jpg")


def broken(**changes):
    items = refs(12)
    items[2] = {key: value for key, value in {**items[2], **changes}.items() if value is not None}
    return items


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], r"got \[\], expected a list of refs"),
        ({"refs": []}, "got {'refs': .*, expected a list of refs"),
        (["x"], "item 1: got 'x', expected an object with ref_id, image_id and sentences"),
        (broken(ref_id=None), "item 3: got .*, expected an object with ref_id"),
        (broken(image_id="1000"), "item 3: got .*, expected an object with ref_id"),
        (broken(ref_id=0), "item 3: the ref_id 0 is there more than once"),
        (broken(sentences=None), "item 3: got sentences None, expected a list"),
        (broken(sentences=[]), r"item 3: got sentences \[\], expected a list of at least one"),
        (broken(sentences=["x"]), "item 3: got the sentence 'x', expected an object with raw or sent"),
        (broken(sentences=[{"raw": ""}]), "item 3: got the sentence .* expected an object with raw or sent"),
        (broken(image_id=7), r"item 3: .*instances\.json has no image 7"),
        (
            refs(3, per_image=2),
            "item 1: the file has 8 other sentences of other images to draw from, expected 9 or more",
        ),
    ],
)
def test_wrong_refs_are_named(items, message, tmp_path):
    with pytest.raises(ValueError, match=r"refs\(google\)\.json[,:] " + message):
        read_groups(write_refcocog(tmp_path, items), "refcocog")


@pytest.mark.parametrize("instances", [[], {"images": 3}, {"images": [{"id": "1", "file_name": "x"}]}, {"images": [3]}])
def test_wrong_instances_are_named(instances, tmp_path):
    folder = write_refcocog(tmp_path, refs(12))
    write_json(folder / "instances.json", instances)
    with pytest.raises(ValueError, match=r"instances\.json[,:] .*expected"):
        read_groups(folder)


@pytest.mark.parametrize(
    "name", ["refs(google).p", "refcoco_train_data.pkl", "x.pickle", "refs(google).json", "x.jsonl"]
)
def test_pickles_are_not_loaded(name, tmp_path):
    mark = tmp_path / "loaded"
    # The pickle of a call, open(mark, "w"), in the oldest protocol: loading it leaves the file behind.
    file = write(tmp_path / name, f"cbuiltins\nopen\n(V{mark}\nVw\ntR.")
    with pytest.raises(ValueError, match=r"is a pickle; loading a pickle can run any code|not JSON"):
        read_groups(file)
    assert not mark.exists()


def test_the_advice_on_a_pickle_converts_it(tmp_path):
    folder = write_refcocog(tmp_path, [], "unused.json")
    write_json(folder / "plain.json", refs(12))
    pickling = "import json, pickle; pickle.dump(json.load(open('plain.json')), open('refs(google).p', 'wb'))"
    subprocess.run([sys.executable, "-c", pickling], check=True, cwd=folder)
    with pytest.raises(ValueError, match="If you trust the file, convert it yourself") as caught:
        read_groups(folder)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 3
    subprocess.run(
        [sys.executable, "-c", "\n".join(line.removeprefix("    ") for line in lines)], check=True, cwd=folder
    )
    assert len(read_groups(folder)) == 48
