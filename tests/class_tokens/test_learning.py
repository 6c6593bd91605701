"""The loop of classes, on losses that cost nothing."""

import math
from dataclasses import asdict, replace

import pytest
import torch

from dsd_fast.class_tokens import TokenConfig
from dsd_fast.class_tokens.learning import CHECKPOINT, Learning, Losses
from dsd_fast.class_tokens.optimiser import shortened

CONFIG = TokenConfig(updates=6, learning_rate=0.05, norm_clamp=None, stopping="never", keep="last", save_every=0)
NAMES = ("a", "b", "c", "d", "e")
WIDTH = 4


class Losing:
    """A loss for each class and update as told, a gradient of the class, the update and the vectors."""

    def __init__(self, losses=None, accuracies=None):
        self.losses, self.accuracies, self.asked = losses or {}, accuracies or {}, []

    def __call__(self, vectors, classes, updates):
        self.asked.append(list(zip(classes, updates, strict=True)))
        told = [
            [table.get(number, {}).get(update, default) for number, update in self.asked[-1]]
            for table, default in ((self.losses, 1.0), (self.accuracies, 0.0))
        ]
        gradients = [
            torch.stack([torch.sin(own[number] * (number + 2) + update) for number, update in self.asked[-1]])
            for own in vectors
        ]
        losses, accuracies = (torch.tensor(each, dtype=torch.float64) for each in told)
        gradients[0][losses.isinf()] = math.nan
        return Losses(losses, accuracies, accuracies, gradients)


def begin(vectors=1, encoders=1):
    random = torch.Generator().manual_seed(0)
    shape = (len(NAMES), vectors, WIDTH)
    return [torch.randn(shape, generator=random, dtype=torch.float64) for _ in range(encoders)]


def learning(losing=None, config=CONFIG, together=2, callback=None, folder=None, own=None, names=NAMES):
    own = own or begin()
    norms = [0.5] * len(own)
    return Learning(
        names,
        [each[None] for each in own],
        norms,
        losing or Losing(),
        config,
        together,
        callback,
        folder,
        {"is": "this"},
    )


def test_a_waiting_class_takes_the_place_of_one_that_ends():
    losing = Losing(accuracies={0: {0: 1.0}, 2: {2: 1.0}})
    run = learning(losing, replace(CONFIG, stopping="official", patience=9, updates=4))
    run.run()
    assert losing.asked == [
        [(0, 0), (1, 0)],
        [(1, 1), (2, 0)],
        [(1, 2), (2, 1)],
        [(1, 3), (2, 2)],
        [(3, 0), (4, 0)],
        [(3, 1), (4, 1)],
        [(3, 2), (4, 2)],
        [(3, 3), (4, 3)],
    ]
    assert [each.ended for each in run.histories] == ["accuracy", "updates", "accuracy", "updates", "updates"]
    assert [each.updates for each in run.histories] == [1, 4, 3, 4, 4]


def test_each_class_begins_as_what_it_loses_least_by(tmp_path):
    """Of what is no number least is lost by none; what was compared before an interrupt is not compared again."""
    starts = [torch.stack([each, 2 * each, 3 * each]) for each in begin(2, 2)]
    table = torch.tensor([[3.0, 1.0, 2.0, math.nan, 5.0], [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 3.0, 1.0, math.nan, 4.0]])
    asked, interrupted = [], []

    def compare(vectors, together):
        if len(asked) == 1 and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        asked.append(vectors)
        return table[len(asked) - 1]

    def made(folder, updates):
        config = replace(CONFIG, updates=updates)
        return Learning(NAMES, starts, [0.5] * 2, Losing(), config, 2, None, folder, {"is": "this"}, compare)

    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, 1).run()
    run = made(tmp_path, 1)
    run.run()
    assert [each.initial(last=True) for each in run.histories] == [1, 0, 2, 1, 2]
    assert all(torch.equal(a, b[n]) for n, given in enumerate(asked) for a, b in zip(given, starts, strict=True))
    for number, history in enumerate(run.histories):
        alone = learning(own=[each[history.initial(last=True)] for each in starts], config=replace(CONFIG, updates=1))
        alone.run()
        assert all(torch.equal(a, b) for a, b in zip(run.kept(number), alone.kept(number), strict=True))
    again = made(tmp_path, 1)
    again.run()
    assert len(asked) == 3
    assert again.histories == run.histories


def test_a_class_that_is_not_seen_begins_anew(tmp_path):
    """As the next in its order, with an optimiser as new, until it is seen or there is none left."""
    starts = [torch.stack([each, 2 * each, 3 * each]) for each in begin(2)]
    losses = iter(torch.tensor([[1.0] * 5, [3.0] * 5, [2.0] * 5]))
    seen = {0: {2: 0.5}, 1: {3: 0.5, 5: 0.5, 7: 0.5}, 2: {0: 0.5, 1: 0.5, 2: 0.5, 3: 0.5, 4: 0.5, 5: 0.5, 6: 0.5}}
    config, folder = replace(CONFIG, updates=8, initial=("a", "b", "c"), restart_after=2, keep="last"), {"is": "this"}

    def compare(vectors, together):
        return next(losses)

    run = Learning(NAMES, starts, [0.5], Losing(accuracies=seen), config, 2, None, tmp_path, folder, compare)
    run.run()
    assert [each.begun for each in run.histories] == [
        [[0, 0], [2, 2], [5, 1]],
        [[0, 0], [2, 2]],
        [[0, 0]],
        [[0, 0], [2, 2], [4, 1]],
        [[0, 0], [2, 2], [4, 1]],
    ]
    # The second start of the second class, by hand.
    vectors = starts[0][2, 1].clone()
    moments = torch.zeros(2, *vectors.shape, dtype=vectors.dtype)
    for update in range(2, 8):
        gradient = torch.sin(vectors * 3 + update)
        moments = torch.stack([0.9 * moments[0] + 0.1 * gradient, 0.999 * moments[1] + 0.001 * gradient**2])
        mean, square = moments[0] / (1 - 0.9 ** (update - 1)), moments[1] / (1 - 0.999 ** (update - 1))
        vectors = vectors * (1 - config.learning_rate * config.weight_decay)
        vectors = vectors - config.learning_rate * mean / (square.sqrt() + config.eps)
    assert torch.allclose(run.kept(1)[0], vectors, rtol=1e-10, atol=1e-12)


def test_a_class_that_began_anew_tells_what_is_kept_of_it_and_has_the_patience_of_a_new_one():
    """One that has ended does not begin again, and of an earlier beginning's best update that one's words are told."""
    starts = [torch.stack([each, 2 * each]) for each in begin()]
    losses = {0: {0: 0.5, 2: 0.9, 4: 0.8, 5: 0.7}, 1: {3: 0.1}}

    def made(**settings):
        config = replace(CONFIG, initial=("a", "b"), restart_after=2, keep="best", **settings)
        compare = lambda vectors, together: torch.tensor([float(torch.equal(vectors[0], starts[0][1]))] * 5)  # noqa: E731
        run = Learning(NAMES, starts, [0.5], Losing(losses), config, 2, None, None, {}, compare)
        run.run()
        return run.histories

    assert [each.begun for each in made(updates=2)] == [[[0, 0]]] * 5
    histories = made(updates=6)
    assert [each.begun for each in histories] == [[[0, 0], [2, 1]]] * 5
    assert [each.initial(last=False) for each in histories] == [0, 1, 0, 0, 0]
    assert [each.initial(last=True) for each in histories] == [1] * 5
    patient = made(updates=7, stopping="official", patience=2)
    assert [(each.updates, each.ended) for each in patient] == [(7, "updates"), (7, "patience"), *[(6, "patience")] * 3]


def test_a_step_is_that_of_torch():
    """AdamW after clipping, classes apart, in float64: a step rounds each number a few times."""
    config = replace(CONFIG, clip_norm=0.7, weight_decay=0.1, eps=1e-3, betas=(0.8, 0.9))
    run = learning(config=config, own=begin(2, 2))
    run.run()
    losing = Losing()
    for number in range(len(NAMES)):
        parameters = [each[number].clone().requires_grad_() for each in begin(2, 2)]
        options = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps, "weight_decay": 0.1}
        adam = torch.optim.AdamW(parameters, **options)
        for update in range(config.updates):
            full = [torch.stack([p.detach()] * len(NAMES)) for p in parameters]
            for p, gradient in zip(parameters, losing(full, [number], [update]).gradients, strict=True):
                p.grad = gradient[0]
            assert torch.nn.utils.clip_grad_norm_(parameters, 0.7) > 0.7
            adam.step()
        for p, own in zip(parameters, run.kept(number), strict=True):
            assert torch.allclose(own, p, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("keep", ["best", "after-best", "last"])
def test_what_is_kept(keep):
    losses = {0: dict(enumerate([3.0, 2.0, 2.5, 2.0, 4.0, 9.0]))}
    seen = []

    class Seeing(Losing):
        def __call__(self, vectors, classes, updates):
            seen.append(vectors[0][0].clone())
            return super().__call__(vectors, classes, updates)

    run = learning(Seeing(losses), replace(CONFIG, keep=keep), own=[each[:1] for each in begin()], names=("a",))
    run.run()
    assert run.histories[0].best_update == 2
    assert run.histories[0].summary(last=keep == "last")["loss"] == (9.0 if keep == "last" else 2.0)
    want = {"best": seen[1], "after-best": seen[2]}
    if keep == "last":
        assert not any(torch.equal(run.kept(0)[0], each) for each in seen)
    else:
        assert torch.equal(run.kept(0)[0], want[keep])


@pytest.mark.parametrize("wrong", [math.nan, math.inf], ids=["loss", "gradient"])
def test_a_class_whose_numbers_are_none_ends_with_what_it_had(wrong):
    alone, events = learning(names=("a",), own=[each[:1] for each in begin()], config=replace(CONFIG, updates=2)), []
    alone.run()
    run = learning(Losing({0: {2: wrong}}), callback=events.append)
    run.run()
    assert [each.ended for each in run.histories] == ["not-finite"] + ["updates"] * 4
    assert run.histories[0].updates == 2
    assert torch.equal(run.kept(0)[0], alone.kept(0)[0])
    ended = next(event for event in events if event.ended == "not-finite")
    assert (ended.name, ended.update) == ("a", 3)
    others = learning()
    others.run()
    assert all(torch.equal(run.kept(number)[0], others.kept(number)[0]) for number in range(1, 5))


def test_vectors_are_held_at_the_clamp():
    events = []
    run = learning(config=replace(CONFIG, norm_clamp=1.2, updates=3), own=begin(2, 2), callback=events.append)
    run.run()
    for number in range(len(NAMES)):
        norms = torch.cat([own.norm(dim=-1) for own in run.kept(number)]) / 0.5
        assert norms.max() <= 1.2 * (1 + 1e-12)
        last = [event for event in events if event.name == NAMES[number]][-1]
        assert last.norm == pytest.approx(float(norms.max()), rel=1e-12)
        assert last.clamped == pytest.approx(float((norms > 1.2 * (1 - 1e-9)).double().mean()))
    assert {event.clamped for event in events} >= {1.0}
    # A longer word that a token begins as is held by nothing.
    longer, held = (torch.tensor([[length, 0.0]], dtype=torch.float64) for length in (0.7, 0.6))
    assert run.about([longer, held]) == (pytest.approx(1.4), 0.5)
    assert torch.equal(shortened(torch.zeros(2, 3), 1.0), torch.zeros(2, 3))


def plain(losses, accuracies, config):
    """The official code's rule, as its loop has it."""
    lowest, left = 99999.0, config.patience
    for number, (loss, share) in enumerate(zip(losses, accuracies, strict=True), start=1):
        if loss < lowest:
            lowest, left = loss, config.patience
        else:
            left -= 1
        if share > config.accuracy:
            return number, "accuracy"
        if left < 0:
            return number, "patience"
        if number == config.updates:
            return number, "updates"
    raise AssertionError


def test_the_official_rule_ends_where_the_official_loop_does():
    random = torch.Generator().manual_seed(3)
    ends = set()
    for _ in range(60):
        losses = (torch.rand(12, generator=random).double() * 9 - torch.arange(12)).round().tolist()
        accuracies = ((torch.rand(12, generator=random).double() * 7.7).round() / 10).tolist()
        config = replace(CONFIG, stopping="official", patience=3, updates=10)
        run = learning(
            Losing({0: dict(enumerate(losses))}, {0: dict(enumerate(accuracies))}),
            config,
            own=[each[:1] for each in begin()],
            names=("a",),
        )
        run.run()
        ended = run.histories[0].updates, run.histories[0].ended
        assert ended == plain(losses, accuracies, config)
        ends.add(ended[1])
    assert ends == {"accuracy", "patience", "updates"}


def test_gamma_ends_at_the_mean_probability():
    run = learning(Losing({}, {0: {0: 0.6, 1: 0.75, 2: 0.9}}), replace(CONFIG, stopping="gamma", gamma=0.75, updates=5))
    run.run()
    assert [(each.updates, each.ended) for each in run.histories[:2]] == [(2, "gamma"), (5, "updates")]


def test_an_interrupted_learning_goes_on_to_the_same_bits(tmp_path):
    """At every update of every class in turn; what others would draw from is the update's number alone."""
    losing = Losing(accuracies={1: {2: 1.0}})
    config = replace(CONFIG, stopping="official", updates=4, patience=9, keep="best")
    whole = learning(losing, config, folder=tmp_path / "whole")
    whole.run()
    for stop in range(1, 11):
        folder = tmp_path / str(stop)
        done = []

        def callback(event, done=done, stop=stop):
            done.append(event)
            if len(done) == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            learning(Losing(accuracies={1: {2: 1.0}}), config, folder=folder, callback=callback).run()
        again = learning(Losing(accuracies={1: {2: 1.0}}), config, folder=folder)
        again.run()
        assert [asdict(each) for each in again.histories] == [asdict(each) for each in whole.histories]
        assert (folder / CHECKPOINT).read_bytes() == (tmp_path / "whole" / CHECKPOINT).read_bytes()
    other = learning(Losing(accuracies={1: {2: 1.0}}), config, together=3, folder=tmp_path / "1")
    other.run()
    assert other.done


def test_another_number_together_goes_on_as_well(tmp_path):
    def stop(event):
        if event.update == 2 and event.name == "b":
            raise KeyboardInterrupt

    whole = learning(together=5)
    whole.run()
    with pytest.raises(KeyboardInterrupt):
        learning(folder=tmp_path, together=3, callback=stop).run()
    again = learning(config=replace(CONFIG, together=1), folder=tmp_path)
    again.run()
    for number in range(len(NAMES)):
        assert torch.allclose(again.kept(number)[0], whole.kept(number)[0], rtol=1e-12, atol=0)


def test_as_many_go_on_together_as_began(tmp_path):
    """However much memory is free now, so that the sums are the same."""
    with pytest.raises(KeyboardInterrupt):
        learning(folder=tmp_path, together=3, callback=lambda event: _interrupt()).run()
    losing = Losing()
    learning(losing, folder=tmp_path, together=1).run()
    assert losing.asked[0] == [(0, 1), (1, 1), (2, 1)]


def _interrupt():
    raise KeyboardInterrupt


def test_a_checkpoint_of_another_learning_is_refused(tmp_path):
    learning(folder=tmp_path).run()
    other = learning(folder=tmp_path)
    other._fingerprint = {"is": "that"}
    with pytest.raises(ValueError, match="differs in is; choose another folder"):
        other.run()
