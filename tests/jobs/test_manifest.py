import json

import pytest

from dsd_fast.jobs import ManifestError, open_manifest, read_manifest, row_id

SETTINGS = {"model": "mini", "timesteps": (50, 200), "technique": {"prompt": "a cat", "controls": []}}


def test_the_manifest_is_written_once_and_then_compared(tmp_path):
    content = open_manifest(tmp_path, "features", SETTINGS)
    bare = {"kind": "features", "version": 1, "settings": {**SETTINGS, "timesteps": [50, 200]}}
    assert content == {**bare, "fingerprint": row_id(json.dumps(bare, sort_keys=True))}
    written = (tmp_path / "manifest.json").read_bytes()
    assert json.loads(written) == content == read_manifest(tmp_path)
    # Neither tuples nor the order of keys make a difference.
    assert open_manifest(tmp_path, "features", dict(reversed(SETTINGS.items()))) == content
    assert (tmp_path / "manifest.json").read_bytes() == written


def test_every_difference_is_named_with_both_values(tmp_path):
    open_manifest(tmp_path, "features", SETTINGS)
    other = {"timesteps": [50], "technique": {"prompt": "a dog" * 100, "controls": ["canny"]}, "seed": 1}
    with pytest.raises(ManifestError) as error:
        open_manifest(tmp_path, "generation", other)
    assert str(error.value) == (
        f"{tmp_path} holds results made otherwise: "
        'kind "features" there, "generation" now; '
        'model "mini" there, not set now; '
        "seed not set there, 1 now; "
        'technique.controls [] there, ["canny"] now; '
        f'technique.prompt "a cat" there, "{("a dog" * 100)[:78]}… now; '
        "timesteps [50, 200] there, [50] now; "
        "run with those settings, or choose another folder"
    )


def test_a_number_is_not_a_truth(tmp_path):
    open_manifest(tmp_path, "features", {"draws": 1})
    with pytest.raises(ManifestError, match="draws 1 there, true now"):
        open_manifest(tmp_path, "features", {"draws": True})


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, object()])
def test_settings_that_json_does_not_know_are_refused(tmp_path, value):
    with pytest.raises(ValueError, match=r"^settings: .*expected what JSON knows"):
        open_manifest(tmp_path, "features", {"seed": value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "manifest.json is no JSON"),
        (b"\xff\xff", "manifest.json is no JSON"),
        (b"[]", "manifest.json is no manifest"),
        (b'{"kind": "features"}', "manifest.json is no manifest"),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path, content, message):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ManifestError, match=message):
        open_manifest(tmp_path, "features", SETTINGS)
    assert (tmp_path / "manifest.json").read_bytes() == content


def test_a_folder_without_a_manifest_is_said_to_have_none(tmp_path):
    with pytest.raises(ManifestError, match=r"has no manifest\.json"):
        read_manifest(tmp_path)


def test_a_manifest_changed_by_hand_is_told(tmp_path):
    content = open_manifest(tmp_path, "features", SETTINGS)
    (tmp_path / "manifest.json").write_text(json.dumps({**content, "fingerprint": "0" * 32}))
    with pytest.raises(ManifestError, match="its manifest was changed by hand"):
        open_manifest(tmp_path, "features", SETTINGS)
