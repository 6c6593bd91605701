import numpy as np
import pytest
from scipy.io import savemat

from dsd_fast.class_tokens.zsl.data import read_folders, readable
from dsd_fast.class_tokens.zsl.proposed import read_proposed

SEEN, UNSEEN = ("001.Brown_bear", "fox", "killer+whale", "otter"), ("seal", "zebra")


def touch(root, *files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(file.encode())


def cells(texts):
    return np.array([[text] for text in texts], object)


def places(*numbers):
    return np.array(numbers, np.uint16)[:, None]


def proposed(root, **changed):
    """Six classes of three images, two of which are learned from where the class is seen."""
    names = [*SEEN, *UNSEEN]
    paths = [f"/BS/xian/work/data/Animals//JPEGImages/{name}/{k}.jpg" for name in names for k in range(3)]
    touch(root / "images", *(path.split("Animals//")[1] for path in paths))
    matrices = {
        "res101": {
            "labels": places(*np.repeat(np.arange(1, 7), 3)).astype(float),
            "image_files": cells(paths),
            "features": np.zeros((3, 18)),
        },
        "att_splits": {
            "allclasses_names": cells(names),
            "trainval_loc": places(1, 2, 4, 5, 7, 8, 10, 11),
            "train_loc": places(1, 2, 4, 5),
            "val_loc": places(7, 8, 10, 11),
            "test_seen_loc": places(3, 6, 9, 12),
            "test_unseen_loc": places(*range(13, 19)),
        },
    }
    for name, values in matrices.items():
        values = {key: value for key, value in {**values, **changed}.items() if key in values and value is not None}
        savemat(root / f"{name}.mat", values)
    return root, root / "images"


def test_reads_the_proposed_splits(tmp_path):
    data = read_proposed(*proposed(tmp_path))
    assert data.names == ("Brown bear", "fox", "killer whale", "otter", "seal", "zebra")
    assert data.files[3:5] == ("JPEGImages/fox/0.jpg", "JPEGImages/fox/1.jpg")
    assert data.labels.tolist() == np.repeat(np.arange(6), 3).tolist()
    assert data.train.tolist() == [True, True, False] * 4 + [False] * 6
    assert data.seen.tolist() == [True] * 4 + [False] * 2
    assert data.validation == (2, 3)
    assert data.validated(None, 0).validation == (2, 3)
    task = data.held_out(0.5, 0)
    assert (task.names, task.seen.tolist()) == (data.names[:4], [True, True, False, False])


def test_the_proposed_splits_own_names_of_flo_come_from_a_file(tmp_path):
    folder, images = proposed(tmp_path, allclasses_names=None, val_loc=None)
    with pytest.raises(ValueError, match="no allclasses_names; expected a file of names"):
        read_proposed(folder, images)
    (tmp_path / "names.txt").write_text("rose\ntulip\niris\nlily\npoppy\nsunflower\n")
    data = read_proposed(folder, images, tmp_path / "names.txt")
    assert (data.names[0], data.unseen_names, data.validation) == ("rose", ["poppy", "sunflower"], ())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image_files": None}, "features alone are of no use"),
        ({"labels": None}, "labels is missing"),
        ({"labels": places(*range(18))}, "names: got 6 for labels from 0"),
        ({"labels": places(1, 2)}, "18 image_files for 2 labels"),
        ({"trainval_loc": places(1, 4, 7, 70)}, "trainval_loc has 1 to 70, expected 1 to 18"),
        ({"trainval_loc": places(1, 2, 3, 4, 7, 10)}, "image 3 is in several"),
        ({"test_unseen_loc": places(3, 13), "test_seen_loc": places(6, 9)}, "test_unseen_loc has images of 'Brown"),
        ({"allclasses_names": cells([*SEEN, *UNSEEN[:1], ""])}, "got '', expected names"),
        ({"image_files": cells(["/a/fox/0.jpg", *["x"] * 16, ""])}, "images are not below"),
        ({"test_seen_loc": places(3, 13), "test_unseen_loc": places(14, 16)}, "'seal', whose class is not in trainval"),
    ],
)
def test_refuses_proposed_splits_that_do_not_hold(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        read_proposed(*proposed(tmp_path, **changed))


def test_refuses_two_images_that_are_one_file(tmp_path):
    folder, images = proposed(tmp_path)
    paths = [f"/BS/a/{name}/{k}.jpg" for name in (*SEEN, *UNSEEN) for k in range(3)]
    paths[4] = "/BS/b/fox/0.jpg"
    savemat(folder / "res101.mat", {"labels": places(*np.repeat(np.arange(1, 7), 3)), "image_files": cells(paths)})
    with pytest.raises(ValueError, match=r"'/BS/a/fox/0\.jpg' and '/BS/b/fox/0\.jpg' are both .*fox/0\.jpg"):
        read_proposed(folder, images / "JPEGImages")


def test_says_which_images_are_not_there(tmp_path):
    folder, images = proposed(tmp_path)
    (images / "JPEGImages/fox/1.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 of 18 images are not below .*fox/1\.jpg"):
        read_proposed(folder, images)
    with pytest.raises(ValueError, match=r"res101\.mat does not exist"):
        read_proposed(images, images)
    (folder / "res101.mat").write_bytes(b"no matrix")
    with pytest.raises(ValueError, match="no MATLAB file"):
        read_proposed(folder, images)


def test_reads_folders_of_train_and_test(tmp_path):
    touch(tmp_path, *(f"train/{name}/a.png" for name in SEEN[:2]), "train/fox/deep/b.JPG", "train/fox/notes.txt")
    touch(tmp_path, *(f"val/{name}/a.png" for name in SEEN[2:]), *(f"test/{name}/c.webp" for name in SEEN + UNSEEN))
    data = read_folders(tmp_path)
    assert (data.names[0], data.unseen_names, data.validation) == ("Brown bear", ["seal", "zebra"], (2, 3))
    assert [file for file, own in zip(data.files, data.train, strict=True) if own] == [
        "train/001.Brown_bear/a.png",
        "train/fox/a.png",
        "train/fox/deep/b.JPG",
        "val/killer+whale/a.png",
        "val/otter/a.png",
    ]
    assert data.labels.tolist() == [0, 1, 1, 2, 3, 0, 1, 2, 3, 4, 5]


def test_reads_one_folder_with_unseen_classes_and_holds_images_out(tmp_path):
    touch(tmp_path, *(f"{name}/{k}.png" for name in SEEN + UNSEEN for k in range(10)))
    data = read_folders(tmp_path, UNSEEN, share=0.3)
    assert data.unseen_names == ["seal", "zebra"]
    assert np.bincount(data.labels[data.train], minlength=6).tolist() == [7, 7, 7, 7, 0, 0]
    again = read_folders(tmp_path, UNSEEN, share=0.3)
    np.testing.assert_array_equal(again.train, data.train)
    assert (read_folders(tmp_path, UNSEEN, share=0.3, seed=1).train != data.train).any()
    chosen = data.validated(2, 0)
    assert len(chosen.validation) == 2
    task = chosen.held_out(0.3, 0)
    assert task.unseen_names == [data.names[c] for c in chosen.validation]
    # Test images stay out of the task on which λ and γ are chosen.
    assert set(task.files) == {file for file, own in zip(data.files, data.train, strict=True) if own}
    assert np.bincount(task.labels[task.train]).max() == 5
    assert data.validated(["fox", "otter"], 0).validation == (1, 3)


@pytest.mark.parametrize(
    ("unseen", "validation", "message"),
    [
        (None, None, "unseen: .* has no folder train"),
        (("seal", "unicorn"), None, "no folder 'unicorn'"),
        (("seal",), None, "there are 1 unseen classes"),
        (UNSEEN, ("seal", "fox"), "validation: 'seal' is no seen class"),
        (UNSEEN, 3, "got 3 of 4 seen classes"),
        (UNSEEN, 1, "got 1 of 4 seen classes.*; or 0, without which λ is 0"),
        (UNSEEN, ("fox", "fox"), "got 1 of 4 seen classes"),
    ],
)
def test_refuses_folders(tmp_path, unseen, validation, message):
    touch(tmp_path, *(f"{name}/{k}.png" for name in SEEN + UNSEEN for k in range(2)))
    with pytest.raises(ValueError, match=message):
        read_folders(tmp_path, unseen).validated(validation, 0)


def test_names_as_texts_have_them():
    assert [readable(name) for name in ("001.Black_footed_Albatross", "grizzly+bear", "7", "3. __")] == [
        "Black footed Albatross", "grizzly bear", "7", "3. __"
    ]  # fmt: skip
    # Numbers that are parts of a name.
    assert [readable(name) for name in ("3.5_inch_disk", "Boeing_737.max")] == ["3.5 inch disk", "Boeing 737.max"]


def test_names_from_a_file_are_said_as_they_are(tmp_path):
    touch(tmp_path, *(f"data/{name}/{k}.png" for name in SEEN + UNSEEN for k in range(2)))
    (tmp_path / "names.txt").write_text("bear\nfox\n2.killer_whale\notter\nseal\nzebra\n")
    data = read_folders(tmp_path / "data", UNSEEN, tmp_path / "names.txt")
    assert data.validated(["2.killer_whale", "fox"], 0).validation == (1, 2)


def test_one_validation_class_of_the_data_set_itself_is_refused(tmp_path):
    touch(tmp_path, *(f"train/{name}/{k}.png" for name in SEEN[:3] for k in range(2)), "val/otter/0.png")
    touch(tmp_path, *(f"test/{name}/c.png" for name in SEEN + UNSEEN))
    with pytest.raises(ValueError, match="validation: got 1 of 4 seen classes"):
        read_folders(tmp_path).validated(None, 0)
