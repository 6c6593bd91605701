"""report.html of `dsd-fast features` and `gate`, and the pictures beside it."""

import html
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dsd_fast as dsd
from dsd_fast.cli.features.pictures import Pictures
from dsd_fast.cli.job_report import files_of, sized
from dsd_fast.cli.options import ModelOptions
from dsd_fast.cli.report import lane
from dsd_fast.features.pca import picture
from dsd_fast.models.mini.scenes import EVAL_SEED, scene
from tests.cli.browser import BROWSER, Page
from tests.cli.test_report_in_browser import PROBE
from tests.repository.processes import run_python
from tests.repository.source import ROOT

LAYERS = ("up-level0-repeat0-res-out", "up-level1-upsampler-out")
COMMON = ["--layers", ",".join(LAYERS), "--timesteps", "50,300"]
HOSTILE = '<img src=x onerror=x()>&".png'


@pytest.fixture(scope="module")
def model():
    return dsd.load("mini")


@pytest.fixture
def loaded(model, monkeypatch):
    """The mini model as it is, loaded once for several commands, which leave it so."""
    monkeypatch.setattr(ModelOptions, "load", lambda _: model)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(scene(EVAL_SEED + number).image).save(folder / f"{number}.png")
    return folder


def code_of(page):
    (found,) = re.findall(r"<pre[^>]*><code>(.*?)</code></pre>", page, re.DOTALL)
    return html.unescape(found)


@pytest.mark.parametrize("layout", ["shards", "npy-layer", "npy-sample", "npy-aggregated"])
def test_the_code_on_the_page_reads_a_feature(cli, loaded, model, images, tmp_path, layout):
    (images / "a.png").write_bytes(b"no picture")
    done = cli("features", images, "--out", "out folder's", *COMMON, "--layout", layout, "--report")
    assert done.exit_code == 1, done.stderr
    page = Path("out folder's/report.html").read_text()
    code = code_of(page)
    assert len(code.split("\n\n")[1].splitlines()) <= 3
    run_python(
        ["-c", f"{code}\nimport numpy\nnumpy.save('found.npy', numpy.asarray(feature))"], cwd=tmp_path, path=[ROOT]
    )
    paths = [images / f"{number}.png" for number in range(3)]
    expected = dsd.FeatureExtractor(model, LAYERS, (50, 300)).extract(paths)[LAYERS[0]][0].numpy()
    found = np.load("found.npy", allow_pickle=False)
    if layout == "npy-aggregated":
        found = found[
            :, : expected.shape[1], :: found.shape[2] // expected.shape[2], :: found.shape[3] // expected.shape[3]
        ]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert "1 image could not be used" in page
    assert f"{images}/a.png is not a JPEG, PNG or WebP file" in page


def test_pictures_have_one_pca_for_each_layer_and_timestep(cli, loaded, model, images):
    command = ["features", images, "--out", "out", *COMMON, "--pool", "mean"]
    done = cli(*command, "--pictures", 2)
    assert done.exit_code == 0, done.stderr
    assert sorted(path.name for path in Path("out/pictures").iterdir()) == ["00000.png", "00001.png"]
    paths = [images / "0.png", images / "1.png"]
    extractor = dsd.FeatureExtractor(model, LAYERS, (50, 300))
    shown = list(Pictures(extractor).draw(paths, "", 0))
    features = extractor.extract(paths)
    for s, t in enumerate((50, 300)):
        for i, layer in enumerate(LAYERS):
            small = picture(features[layer][:, s])
            for n, each in enumerate(shown):
                large = np.asarray(each.rows[t][i]).astype(int)
                assert large.shape == (256, 256, 3)
                times = 256 // small.shape[1]
                # Colours of 8 bits, rounded after arithmetic in another order.
                assert np.abs(large[::times, ::times] - small[n]).max() <= 1
                assert (large == large[::times, ::times].repeat(times, 0).repeat(times, 1)).all()
    page = Path("out/report.html").read_text()
    assert page.count("<img ") == 2 * (1 + 2 * 2)
    assert f'alt="{LAYERS[1]} at t = 300 of {images}/1.png"' in page
    # With fewer pictures what was drawn before is gone; an image with too long a prompt has none.
    assert cli(*command, "--pictures", 1).exit_code == 0
    assert [path.name for path in Path("out/pictures").iterdir()] == ["00000.png"]
    Path("prompts.csv").write_text(f"image,prompt\n0,{'word ' * 40}\n1,a\n2,b\n")
    done = cli(*[part if part != "out" else "other" for part in command], "--pictures", 1, "--prompts", "prompts.csv")
    assert done.exit_code == 1
    assert [path.name for path in Path("other/pictures").iterdir()] == ["00001.png"]


def test_the_page_says_what_there_is(cli, loaded, images):
    command = ["features", images, "--out", "out", *COMMON, "--shard-rows", 1, "--report", "--workers", 2, "--worker"]
    assert [cli(*command, worker).exit_code for worker in range(2)] == [0, 0]
    # The last of the workers sees what all have made.
    page = Path("out/report.html").read_text()
    assert "3 images with features of mini: 2 layers at 2 timesteps." in page
    assert f'<tr><th scope="row">{LAYERS[1]}</th><td class="number">96 × 16 × 16</td></tr>' in page
    assert re.search(r"\d+% of the writing went on while features were computed", page)
    for name in ("compute", "write"):
        assert re.search(rf'<th scope="row">{name}</th><td><svg class="lane".*?<rect class="dot"', page)
    sizes = [file.stat().st_size for file in Path("out/shards").iterdir()]
    assert len(sizes) == 3
    cells = f'</th><td class="number">3</td><td class="number">{sized(sum(sizes))}</td>'
    assert f'<tr><th scope="row">shards/*.safetensors{cells}' in page


def test_sizes_and_files(tmp_path):
    assert [sized(count) for count in (0, 999, 1000, 1_234_567, 123_456_789)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "1.2 MB",
        "123 MB",
    ]
    for name, count in (("a/1.npy", 5), ("a/b/2.npy", 7), ("report.html", 9), (".lock", 0), ("manifest.json", 2)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(count))
    assert files_of(tmp_path) == [("a/*.npy", 2, 12), ("manifest.json", 1, 2)]


def test_spans_on_a_line():
    drawn = re.findall(r'<rect class="dot" x="([\d.]+)" y="0" width="([\d.]+)"', lane([(0, 1), (1.001, 2), (3, 3)], 4))
    # What is closer than a thousandth is one; an instant can be seen.
    assert drawn == [("0.0", "500.0"), ("750.0", "1.0")]
    assert '<rect class="dot"' not in lane([(0, 0)], 0)


@pytest.mark.skipif(
    BROWSER is None, reason="no browser: none of chromium, chromium-browser and google-chrome is installed"
)
@pytest.mark.parametrize(("command", "width", "scheme"), [("features", 390, "dark"), ("gate", 1280, "light")])
def test_the_page_is_shown_whole(cli, loaded, images, tmp_path, command, width, scheme):
    (images / HOSTILE).write_bytes(b"no picture")
    (images / "0.png").rename(images / f"0{HOSTILE}")
    chosen = (
        ["--pictures", 3] if command == "features" else ["--prompt", "a red ring", "--steps", 2, "--denoise-from", 301]
    )
    done = cli(command, "in", "--out", "out", *COMMON, *chosen)
    assert done.exit_code == 1, done.stderr
    with Page(Path("out/report.html").resolve(), tmp_path / "profile", width=width, scheme=scheme) as shown:
        seen = shown.value(PROBE)
    assert shown.complaints == []
    assert min(seen["images"]) > 0
    assert all(seen["alts"])
    assert (seen["overflow"], seen["wide"]) == (0, [])
    assert (seen["scripts"], seen["handlers"]) == (0, 0)
    # No column so narrow that its words fall apart into letters.
    assert max(seen["rows"]) < 240
    assert f"0{HOSTILE}" in seen["text"]
