"""How adapters stand for a call while other threads compute with the same networks, and who waits for whom."""

import contextlib
import os
import threading
import time
import warnings

import peft
import pytest
import torch
from torch import nn

from dsd_fast.models import tuners
from dsd_fast.models.tuners import LayerSetting, adapter_names, own_backward, setting, standing, tuner_layers

# Far more than any step here takes; only where something is wrong it is waited for.
LONG = 20.0


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)


def network():
    made = Small()
    for name in ("a", "b", "c"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.inject_adapter_in_model(peft.LoHaConfig(r=2, target_modules=["first", "second"]), made, name)
    return made


def wanted(made, name):
    return [LayerSetting(layer, [name], False, {}) for _, layer in tuner_layers(made)]


def active(made):
    (name,) = {tuple(each.active) for each in setting(made)}
    return name


class Threads:
    """Threads that are all joined, and whose errors are raised here."""

    def __init__(self):
        self.errors, self.threads = [], []

    def start(self, work, *arguments):
        def run():
            try:
                work(*arguments)
            except BaseException as error:
                self.errors.append(error)

        self.threads.append(threading.Thread(target=run, daemon=True))
        self.threads[-1].start()

    def join(self):
        for thread in self.threads:
            thread.join(LONG)
        assert not self.errors, self.errors
        assert not any(thread.is_alive() for thread in self.threads), "deadlock"


@pytest.fixture
def threads():
    every = Threads()
    yield every
    every.join()


def wait(event):
    assert event.wait(LONG)


def test_those_that_want_the_same_go_on_together_and_the_last_one_leaves_it_as_it_was(threads):
    made = network()
    before, barrier = active(made), threading.Barrier(3, timeout=LONG)

    def work():
        with standing(made, wanted(made, "b")):
            barrier.wait()
            assert active(made) == ("b",)
            barrier.wait()

    threads.start(work)
    threads.start(work)
    barrier.wait()
    assert active(made) == ("b",)
    barrier.wait()
    threads.join()
    assert active(made) == before


@pytest.mark.parametrize("other", ["c", None])
def test_those_that_want_something_else_wait(threads, other):
    made, inside, seen = network(), threading.Event(), []

    def work():
        inside.wait(LONG)
        with standing(made, None if other is None else wanted(made, other)):
            seen.append(active(made))

    standing_alone = active(made)
    threads.start(work)
    with standing(made, wanted(made, "b")):
        inside.set()
        time.sleep(0.05)
        assert not seen
        # A thread does not wait for itself, and as it stands is as the block around it has it.
        with standing(made), standing(made, wanted(made, "b")):
            assert active(made) == ("b",)
    threads.join()
    assert seen == [standing_alone if other is None else ("c",)]


def test_blocks_in_blocks_of_two_threads_need_no_order(threads):
    networks = [network(), network()]
    start = threading.Barrier(2, timeout=LONG)

    def work(first, second, outer, inner):
        for _ in range(20):
            with standing(first, wanted(first, outer)):
                with contextlib.suppress(threading.BrokenBarrierError):
                    start.wait(0.01)
                with standing(second, wanted(second, inner)), standing(first, wanted(first, inner)):
                    assert active(first) == active(second) == (inner,)
                assert active(first) == (outer,)

    threads.start(work, *networks, "a", "b")
    threads.start(work, *reversed(networks), "c", "a")
    threads.join()


def test_blocks_in_one_block_that_both_threads_share_come_one_after_the_other(threads):
    made, together = network(), threading.Barrier(2, timeout=LONG)
    before = active(made)

    def work(inner):
        with standing(made, wanted(made, "a")):
            together.wait()
            with standing(made, wanted(made, inner)):
                assert active(made) == (inner,)
            assert active(made) == ("a",)

    threads.start(work, "b")
    threads.start(work, "c")
    threads.join()
    assert active(made) == before


def test_after_an_error_and_in_another_thread_than_it_began_in_a_block_ends(threads):
    made = network()
    before = active(made)
    with pytest.raises(RuntimeError, match="inside"), standing(made, wanted(made, "b")):
        raise RuntimeError("inside")
    assert active(made) == before

    def held():
        with standing(made, wanted(made, "b")):
            yield

    generator = held()
    next(generator)
    threads.start(generator.close)
    threads.join()
    assert active(made) == before
    threads.start(lambda: standing(made, wanted(made, "c")).__enter__())
    threads.join()


@pytest.mark.parametrize("needed", [False, True], ids=["first come, first served", "unless it is waited for"])
def test_who_waits_is_not_overtaken_for_ever(threads, monkeypatch, needed):
    monkeypatch.setattr(tuners, "_PATIENCE", 0.2 if needed else LONG)
    made, order, queued, joined = network(), [], threading.Event(), threading.Event()

    def other():
        queued.set()
        with standing(made, wanted(made, "c")):
            order.append("other")

    def join():
        with standing(made, wanted(made, "b")):
            order.append("joined")
            joined.set()

    with standing(made, wanted(made, "b")):
        threads.start(other)
        wait(queued)
        time.sleep(0.05)
        threads.start(join)
        if needed:
            wait(joined)
        else:
            time.sleep(0.05)
    threads.join()
    assert order == (["joined", "other"] if needed else ["other", "joined"])


class Deep(torch.autograd.Function):
    """Its backward pass begins others inside, which torch does in further threads where they are too deep."""

    @staticmethod
    def forward(ctx, x, depth, work):
        ctx.depth, ctx.work = depth, work
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.depth:
            with torch.enable_grad():
                Deep.apply(torch.ones(1, requires_grad=True), ctx.depth - 1, ctx.work).sum().backward()
        else:
            ctx.work()
        return grad, None, None


def test_a_backward_pass_in_torchs_own_thread_is_its_callers(threads):
    made, seen = network(), []

    def again():
        with standing(made, wanted(made, "b")):
            seen.append((threading.get_ident(), active(made)))

    def work():
        own_backward()
        with standing(made, wanted(made, "a")):
            Deep.apply(torch.ones(1, requires_grad=True), 70, again).sum().backward()
            seen.append((threading.get_ident(), active(made)))

    threads.start(work)
    threads.join()
    assert [name for _, name in seen] == [("b",), ("a",)]
    assert seen[0][0] != seen[1][0]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_the_networks_as_they_stand(threads):
    made, inside, done = network(), threading.Event(), threading.Event()
    before = active(made)

    def work():
        with standing(made, wanted(made, "b")):
            inside.set()
            wait(done)

    threads.start(work)
    wait(inside)
    child = os.fork()
    if not child:
        right = False
        with contextlib.suppress(BaseException):
            with standing(made, wanted(made, "a")):
                right = active(made) == ("a",)
            right = right and active(made) == before
        os._exit(0 if right else 1)
    _, status = os.waitpid(child, 0)
    done.set()
    assert os.waitstatus_to_exitcode(status) == 0


def test_names_are_those_of_layers_wherever_they_were_put():
    made = nn.Sequential(Small(), Small())
    assert adapter_names(made) == set()
    # PEFT writes them down at the module that it was given.
    peft.inject_adapter_in_model(peft.IA3Config(target_modules=["first"], feedforward_modules=[]), made[0], "inner")
    assert adapter_names(made) == {"inner"}
    peft.inject_adapter_in_model(peft.LoHaConfig(r=2, target_modules=["second"]), made[1], "late")
    assert adapter_names(made) == {"inner", "late"}
