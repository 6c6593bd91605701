"""A fit that was stopped, however it was, goes on to the same result."""

import json
import signal
from dataclasses import replace

import pytest
import torch

from dsd_fast.jobs import LockedError, read_tensors
from dsd_fast.matching.fitting.config import FitConfig
from dsd_fast.matching.fitting.files import LORA, MATCHER
from dsd_fast.training import CHECKPOINT
from tests.matching.fitting.parts import TEXTS, groups, matcher, pictures, pipeline
from tests.repository.processes import run_python
from tests.repository.source import ROOT

FIT = FitConfig(steps=3, batch_size=2, validate_every=2, save_every=0, warmup=0)


ALL = ("lora", "prompt", "heads")


def fit(folder, config=FIT, methods="heads", stop=None, own=None, **options):
    """Stops at a (step, whether it is a look)."""
    calls = []

    def callback(step, loss, record):
        calls.append(step)
        if stop == (step, record is not None):
            raise KeyboardInterrupt

    own = own or matcher(pipeline())
    history = own.fit(groups(), methods, config=config, out=folder, callback=callback, progress=False, **options)
    return own, history, calls


def contents(folder):
    return {file.name: file.read_bytes() if file.name != LORA else None for file in folder.iterdir()}


def test_killed_processes_go_on_as_if_they_had_not_been(tmp_path):
    """Killed after a step and a look, while a checkpoint takes its name, and while the result does."""
    done = run_python(["-m", "tests.matching.fitting.killing", tmp_path], cwd=ROOT, path=[ROOT])
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ends"] == [signal.SIGKILL] * 4 + [0, 0], done.stderr
    # Every byte, and nothing is left of the dead.
    assert found["killed"] == found["whole"]
    assert set(found["whole"]) == {".lock", CHECKPOINT, LORA, MATCHER}


@pytest.mark.parametrize("stop", [(0, True), (2, False), (3, True)], ids=str)
def test_an_interrupted_fit_goes_on(tmp_path, stop, whole):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, methods=ALL, stop=stop, validation=groups()[:1])
    step = read_tensors(tmp_path / CHECKPOINT)[1]["step"]
    assert step == stop[0]
    assert not (tmp_path / MATCHER).exists()
    own, history, calls = fit(tmp_path, methods=ALL, validation=groups()[:1])
    want, want_history, files = whole
    assert [call for call in calls if call <= step] in ([], [step])
    assert history == want_history
    assert contents(tmp_path) == files
    assert torch.equal(own.score(pictures(1), TEXTS), want)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    own, history, calls = fit(folder, methods=ALL, validation=groups()[:1])
    assert calls == [0, 1, 2, 2, 3, 3]
    return own.score(pictures(1), TEXTS), history, contents(folder)


def test_a_finished_fit_is_not_done_again(tmp_path):
    own, history, _ = fit(tmp_path)
    before = contents(tmp_path)
    again, same, none = fit(tmp_path)
    assert none == []
    assert same == history
    assert [(record.step, record.accuracy) for record in history.records] == [(2, None), (3, None)]
    assert history.best_step == 3
    assert contents(tmp_path) == before
    assert torch.equal(again.score(pictures(1), TEXTS), own.score(pictures(1), TEXTS))


def test_another_fit_is_refused_with_what_differs(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, stop=(2, False))
    before = contents(tmp_path)

    def refused(*names, **options):
        with pytest.raises(ValueError, match="choose another folder") as error:
            fit(tmp_path, **options)
        found = str(error.value).partition("differs in ")[2].partition(";")[0].split(", ")
        assert set(found) == set(names)

    refused("seed", "temperature", config=replace(FIT, seed=1, temperature=0.5))
    refused("steps", config=replace(FIT, steps=6))
    refused("methods", methods="prompt")
    refused("validation", validation=groups()[:1])
    refused("config.timesteps", "config.noise_weight", own=matcher(pipeline(), timesteps=[100], noise_weight=0.5))
    refused("weights", own=matcher(pipeline(seed=1)))
    refused("prediction_type", own=matcher(pipeline(prediction_type="v_prediction")))
    refused("model_dtype", "weights", own=matcher(pipeline(dtype=torch.float64)))
    other = matcher(pipeline())
    with pytest.raises(ValueError, match=r"differs in examples;"):
        other.fit(groups(1), "heads", config=FIT, out=tmp_path, progress=False)
    assert contents(tmp_path) == before


def test_what_changes_memory_and_time_alone_is_not_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, stop=(2, False))
    own = matcher(pipeline(), memory_budget=64_000_000)
    _, history, calls = fit(tmp_path, replace(FIT, save_every=100.0, micro_batch=1), own=own)
    assert calls == [2, 3, 3]
    assert history.steps == 3


def test_two_at_once_are_refused(tmp_path):
    refused = []

    def callback(step, loss, record):
        with pytest.raises(LockedError, match="another process"):
            fit(tmp_path)
        with pytest.raises(LockedError, match="another process"):
            matcher(pipeline()).save(tmp_path)
        refused.append(step)

    own = matcher(pipeline())
    own.fit(groups(), "heads", config=replace(FIT, steps=1), out=tmp_path, callback=callback, progress=False)
    assert refused
