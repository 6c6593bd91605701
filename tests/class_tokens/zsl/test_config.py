import re
from pathlib import Path

import pytest

from dsd_fast.class_tokens import TokenConfig
from dsd_fast.class_tokens.zsl import ZslConfig
from dsd_fast.class_tokens.zsl.config import TOKENS
from dsd_fast.class_tokens.zsl.run import read_data
from tests.repository.source import ROOT


def read(folder, text):
    file = folder / "run.toml"
    file.write_text(text)
    return ZslConfig.read(file)


def test_reads_tables_lists_and_paths_from_the_files_folder(tmp_path):
    config = read(
        tmp_path,
        'out = "made"\nimages = "/data"\nunseen = "unseen.txt"\nvalidation = ["fox", "otter"]\ngammas = [0.5, 0.9]\n'
        '[tokens]\nimages = 3\ntemplates = ["a {}"]\n[cdm]\nwidths = []\n[generate]\nimage_size = [64, 64]\n',
    )
    assert (config.out, config.images, config.unseen) == (tmp_path / "made", Path("/data"), tmp_path / "unseen.txt")
    assert (config.validation, config.gammas, config.cdm.widths) == (("fox", "otter"), (0.5, 0.9), ())
    # What a table does not say is the paper's, not the official learner's.
    assert (config.tokens.images, config.tokens.stopping, config.tokens.gradient_steps) == (3, "gamma", 1)
    assert (TOKENS.stopping, TokenConfig().stopping) == ("gamma", "official")
    assert config.generate.image_size == (64, 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "run.toml: out is missing"),
        ("out = 3\nimages = 'b'", "out: got 3"),
        ("out = 'a'\nimages = 'b'\nper_clas = 3", "per_clas: there is no such setting; 'per_class' may be meant"),
        ("out = 'a'\nimages = 'b'\n[tokens]\nstep = 3", "tokens.step: there is no such setting; 'steps'"),
        ("out = 'a'\nimages = 'b'\n[tokens]\nsteps = 0", "tokens.steps: got 0, expected an integer of at least 1"),
        ("out = 'a'\nimages = 'b'\ncdm = 3", r"cdm: got 3, expected a table, \[cdm\]"),
        ("out = 'a'\nimages = 'b'\nclassifiers = ['svm']", "classifiers: got .*, expected some of softmax, gaussian"),
        ("out = 'a'\nimages = 'b'\nclassifiers = []", "classifiers"),
        ("out = 'a'\nimages = 'b'\nensemble = ['a']", 'ensemble: .*one "{}" or'),
        ("out = 'a'\nimages = 'b'\nensemble = ['a {} in {place}']", 'ensemble: .*one "{}" or'),
        ("out = 'a'\nimages = 'b'\ntokens = {loss = 'noise', stopping = 'never'}", "tokens.loss: got 'noise'"),
        ("out = 'a'\nimages = 'b'\nproposed = 'c'\nunseen = ['d']", "unseen: given with proposed"),
        ("out = 'a'\nimages = 'b'\ngammas = [0.5]\ntokens = {stopping = 'never'}", "gammas: given where .* 'never'"),
        ("out = 'a'\nimages = 'b'\ngammas = [0.5, 0.9]\nvalidation = 0", "gammas: got 2 without validation classes"),
        ("out = ", "no TOML"),
    ],
)
def test_refuses_by_name(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)
    with pytest.raises(ValueError, match="does not exist"):
        ZslConfig.read(tmp_path / "other.toml")


def test_the_document_and_the_examples_are_of_these_settings():
    folders, proposed = (ZslConfig.read(ROOT / "examples" / f"zsl-{name}.toml") for name in ("folders", "proposed"))
    assert (folders.proposed, proposed.proposed) == (None, ROOT / "examples/xlsa17/data/AWA2")
    lines = (
        (ROOT / "docs/zsl.md").read_text().split("| setting | what | default |")[1].split("\n\n")[0].splitlines()[2:]
    )
    listed = [name for line in lines for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert sorted([*listed, "cdm", "tokens", "generate"]) == sorted(ZslConfig.__dataclass_fields__)


def test_refuses_a_run_before_anything_is_computed(tmp_path):
    for name in "abcdef":
        for k in range(1 + (name < "c")):
            (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "images" / name / f"{k}.png").touch()
    unseen = ("e", "f")
    with pytest.raises(ValueError, match=r"out: .* is in images, whose folders are classes"):
        read_data(ZslConfig(tmp_path / "images" / "out", tmp_path / "images", unseen=unseen))
    # Of the other two seen classes no image can be held out.
    with pytest.raises(ValueError, match="no test images of seen classes"):
        read_data(ZslConfig(tmp_path / "out", tmp_path / "images", unseen=unseen, validation=("a", "b")))
