"""Gradient descent that can be killed, against the plain loop of torch."""

import math

import pytest
import torch
from torch.nn import Parameter

from dsd_fast.jobs import read_tensors
from dsd_fast.training import CHECKPOINT, Descent


def parameters():
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 2, 2, 2, generator=random, dtype=torch.float64)
    return {
        "weight": Parameter(weight.to(memory_format=torch.channels_last)),
        "bias": Parameter(torch.randn(3, generator=random, dtype=torch.float64)),
        "scale": Parameter(torch.tensor(0.5, dtype=torch.float64)),
    }


def parts(own, step, wrong=None):
    """The parts of a step's loss, which draw by its number alone."""
    x = torch.randn(4, 2, 2, 2, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    for part in x.split(3):
        y = own["scale"].exp() * (torch.einsum("ocij,ncij->no", own["weight"], part) + own["bias"])
        yield (y - part.sum((1, 2, 3))[:, None]).square().sum() * (math.nan if step == wrong else 1) / len(x)


def group(name):
    return "matrix" if name == "weight" else "vector"


def rate(group, step):
    return (0.1 if group == "matrix" else 0.02) / (step + 1)


def decay(group):
    return 0.3 if group == "matrix" else 0.0


def descent(folder=None, own=None, wrong=None, report=lambda *_: None, **options):
    own = own or parameters()

    def losses(step, backward):
        for part in parts(own, step, wrong):
            backward(part)

    settings = {"steps": 6, "clip_norm": 0.7, "betas": (0.8, 0.9), "validate_every": 2, "save_every": 0.0} | options
    return Descent(own, losses, group, rate, decay, folder=folder, fingerprint={}, report=report, **settings)


def test_steps_are_those_of_the_plain_loop():
    made, own = descent(average=0.4), parameters()
    # One call of the fused step for each group.
    assert len(made._optimizer.param_groups) == 2
    history = made.fit()
    groups = [{"params": [p], "weight_decay": decay(group(name)), "name": name} for name, p in own.items()]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.9), foreach=False)
    average, losses = {name: p.detach().clone() for name, p in own.items()}, []
    for step in range(6):
        for each in optimizer.param_groups:
            each["lr"] = rate(group(each["name"]), step)
        loss = sum(parts(own, step))
        optimizer.zero_grad()
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(own.values(), 0.7) > 0.7
        optimizer.step()
        losses.append(loss.item())
        kept = min(0.4, (step + 1) / (step + 10))
        average = {name: kept * average[name] + (1 - kept) * p.detach() for name, p in own.items()}
    tensors, values = made.state()
    for name, want in own.items():
        # Six steps of numbers near 1 in other orders of the same sums.
        torch.testing.assert_close(made.parameters[name], want, rtol=0, atol=1e-13)
        torch.testing.assert_close(tensors[f"ema.{name}"], average[name], rtol=0, atol=1e-13)
    assert [record.step for record in history.records] == [2, 4, 6]
    assert [record.loss for record in history.records] == pytest.approx(
        [sum(losses[place : place + 2]) / 2 for place in (0, 2, 4)], rel=1e-13
    )
    assert (history.steps, history.best_step, history.stopped_early, values["step"]) == (6, 6, False, 6)


@pytest.mark.parametrize("stop", [(2, False), (4, True)])
def test_an_interrupted_descent_goes_on_bit_for_bit(tmp_path, stop):
    def report(step, loss, record):
        if stop == (step, record is not None):
            raise KeyboardInterrupt

    options = {"average": 0.4, "validate": lambda: (None, 1.0)}
    whole = descent(tmp_path / "whole", **options).fit()
    with pytest.raises(KeyboardInterrupt):
        descent(tmp_path, report=report, save_every=100.0, **options).fit()
    assert read_tensors(tmp_path / CHECKPOINT)[1]["step"] == stop[0]
    again = descent(tmp_path, **options)
    assert again.fit() == whole
    assert (tmp_path / CHECKPOINT).read_bytes() == (tmp_path / "whole" / CHECKPOINT).read_bytes()
    # The fused step walks both by address.
    moments = again._optimizer.state[again.parameters["weight"]]
    assert moments["exp_avg"].stride() == again.parameters["weight"].stride()


def test_a_loss_that_is_no_number_leaves_the_state_before_its_step(tmp_path):
    descent(tmp_path / "before", average=0.4, steps=3, validate_every=10).fit()
    with pytest.raises(FloatingPointError, match="step 4: the loss is nan"):
        descent(tmp_path, average=0.4, steps=9, validate_every=10, wrong=3).fit()
    (kept, values), (want, _) = (read_tensors(folder / CHECKPOINT) for folder in (tmp_path, tmp_path / "before"))
    assert values["step"] == 3
    assert kept.keys() == want.keys()
    assert all(torch.equal(kept[name], want[name]) for name in kept)


def test_the_least_loss_is_the_best_where_nothing_is_counted():
    values, seen = iter([3.0, math.nan, 1.0, 1.0, 2.0]), []
    own = parameters()

    def validate():
        seen.append(own["weight"].detach().clone())
        return None, next(values)

    history = descent(own=own, steps=20, validate=validate, patience=2).fit()
    assert (history.best_step, history.steps, history.stopped_early) == (4, 8, True)
    assert torch.equal(own["weight"], seen[2])
