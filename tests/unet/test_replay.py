"""What compiled runtimes keep between calls: recordings, texts, and when they must be let go."""

import contextlib
import threading
import time

import pytest
import torch

from dsd_fast.unet import cudagraph
from dsd_fast.unet.cudagraph import CudaGraph
from dsd_fast.unet.stream import HEADROOM
from dsd_fast.unet.weights import Weights
from tests.tiny import tiny_pipeline
from tests.unet.compiled import SCORE, TOKENS, TOLERANCE, Case, graphs, load_lora, run, same

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Again:
    """Records work by keeping it: a replay does it again and writes to the same tensors, as a CUDA graph does."""

    def __init__(self):
        self.records = self.replays = 0

    def record(self, work):
        self.records += 1
        output = work().clone()

        def replay():
            self.replays += 1
            for (_, target), (_, value) in zip(output.tensors(), work().tensors(), strict=True):
                target.copy_(value)

        return replay, output

    def turn(self):
        return contextlib.nullcontext()


class Recorded(Case):
    def __init__(self, unet=None):
        super().__init__("sd15", unet, backend="eager")
        self.plain, self.replayed = self.plans(features=["down-level0-repeat0-res-out"], scores=[SCORE])
        self.recorder = Again()
        self.replayed._runtime = CudaGraph(self.recorder)

    def check(self, request):
        with torch.no_grad():
            want = run(self.plain, request)
            got = run(self.replayed, request)
        same(got, want)
        return got


def test_replays_answer_requests_of_their_bucket_in_memory_of_their_own():
    case = Recorded()
    first = case.check(case.request(2, 3, 5))
    kept = first.clone()
    for latents, texts, rows in ((2, 4, 8), (2, 3, 5), (2, 3, 6)):
        case.check(case.request(latents, texts, rows, lengths=None))
    assert (case.recorder.records, case.recorder.replays) == (1, 4)
    same(first, kept, 0)
    case.check(case.request(3, 3, 5))
    case.check(case.request(2, 3, 5, lengths=[1, 2, 3]))
    assert case.recorder.records == 3
    with torch.inference_mode():
        run(case.replayed, case.request(2, 3, 5))
    case.check(case.request(2, 3, 5))
    assert case.recorder.records == 3


def test_replays_fill_an_output():
    case = Recorded()
    out = case.plain.empty_output(5, 16, 16)
    with torch.no_grad():
        assert run(case.replayed, case.request() | {"out": out}) is out
        same(out, run(case.plain, case.request()))


def test_texts_are_loaded_when_they_are_others_or_were_written_to():
    case = Recorded()
    request = case.request()
    states, options = request.pop("states"), request.pop("text")
    with torch.no_grad():
        text = case.plain.encode_text(states, **options)

        def both():
            same(case.replayed.run(text=text, **request), case.plain.run(text=text, **request))

        both()
        (recording,) = case.replayed._runtime._recordings.values()
        # While the texts stay, what was loaded is not written again.
        recording.inputs.text.k[SCORE].add_(1)
        spoiled = case.replayed.run(text=text, **request).scores[SCORE]
        assert float((spoiled - case.plain.run(text=text, **request).scores[SCORE]).abs().max()) > 1e-3
        text.k[SCORE].mul_(2)
        both()
        text = case.plain.encode_text(states.flip(0), **options)
        both()


class Texts(Recorded):
    """The plan as it is, compiled and replayed; and one request whose texts are encoded once."""

    def __init__(self):
        super().__init__()
        compiled = self.program.plan(scores=[SCORE]).compile("inductor")
        self.by_runtime = {"plain": self.plain, "inductor": compiled, "cudagraph": self.replayed}
        self.arguments = self.request()
        self.states = self.arguments.pop("states")
        del self.arguments["text"]

    def score(self, runtime, text, **change):
        return self.by_runtime[runtime].run(text=text, **(self.arguments | change)).scores[SCORE]

    def check_score(self, runtime, text, **change):
        want = self.score("plain", text, **change)
        got = self.score(runtime, text, **change)
        assert float((got - want).abs().max()) <= TOLERANCE * float(want.abs().max())


COMPILED = ["inductor", "cudagraph"]


@pytest.mark.parametrize("runtime", COMPILED)
def test_a_text_of_a_plan_with_more_layers_is_as_good_as_ones_own(runtime):
    case = Texts()
    larger = case.program.plan(scores=case.program.score_ids)
    with torch.no_grad():
        own, other = case.plain.encode_text(case.states), larger.encode_text(case.states.flip(0))
        for text in (own, other, own):
            case.check_score(runtime, text)
        # What is kept for a text is kept for its part.
        part = other.narrowed(case.plain.key_layers, case.plain.value_layers)
        assert part is other.narrowed(case.plain.key_layers, case.plain.value_layers)
        assert part.k[SCORE] is other.k[SCORE]
        assert list(part.k) == [SCORE]
    assert case.recorder.records == (runtime == "cudagraph")


def test_texts_whose_copying_was_interrupted_are_copied_again(monkeypatch):
    case = Texts()
    fill = cudagraph._fill

    def interrupted(target, value):
        fill(target, value)
        if value is other.k[SCORE]:
            raise KeyboardInterrupt

    with torch.no_grad():
        text, other = case.plain.encode_text(case.states), case.plain.encode_text(case.states.flip(0))
        case.check_score("cudagraph", text)
        monkeypatch.setattr(cudagraph, "_fill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            case.score("cudagraph", other)
        case.check_score("cudagraph", text)


def test_host_threads_take_turns():
    case = Texts()
    record = case.recorder.record

    def slow(work):
        replay, output = record(work)

        def wait_and_replay():
            time.sleep(0.02)
            replay()

        return wait_and_replay, output

    case.recorder.record = slow
    with torch.no_grad():
        text = case.plain.encode_text(case.states)
    latents = [case.arguments["latents"] * (1 + number) for number in range(4)]
    got = {}

    def answer(number):
        with torch.no_grad():
            got[number] = case.score("cudagraph", text, latents=latents[number])

    threads = [threading.Thread(target=answer, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert case.recorder.records == 1
    for number in range(4):
        with torch.no_grad():
            want = case.score("plain", text, latents=latents[number])
        assert float((got[number] - want).abs().max()) <= TOLERANCE * float(want.abs().max())


@pytest.mark.parametrize("runtime", COMPILED)
def test_a_run_in_inference_mode_spoils_no_later_one_with_gradients(runtime):
    case = Texts()
    with torch.no_grad():
        text = case.plain.encode_text(case.states)
    with torch.inference_mode():
        case.check_score(runtime, text)
    grads = []
    for name in ("plain", runtime):
        latents = case.arguments["latents"].clone().requires_grad_()
        case.score(name, text, latents=latents).sum().backward()
        grads.append(latents.grad)
    assert float((grads[0] - grads[1]).abs().max()) <= 1e-4 * float(grads[0].abs().max())


@pytest.mark.parametrize("runtime", COMPILED)
def test_writes_to_texts_made_in_inference_mode_are_seen(runtime):
    case = Texts()
    with torch.inference_mode():
        text = case.plain.encode_text(case.states)
        case.check_score(runtime, text)
        text.k[SCORE].mul_(2)
        case.check_score(runtime, text)


@pytest.mark.parametrize("runtime", [None, *COMPILED], ids=str)
def test_a_text_of_another_type_than_autocasts_is_refused_by_name(runtime):
    case = Texts()
    with torch.no_grad():
        text = case.plain.encode_text(case.states)
        case.score(runtime or "plain", text)
        message = r"text: got keys and values of torch.float32 on cpu, expected torch.bfloat16 on cpu"
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=message):
            case.score(runtime or "plain", text)


def test_recordings_for_as_many_texts_share_them():
    case = Texts()
    with torch.no_grad():
        text = case.plain.encode_text(case.states)
        for rows in (2, 4, 8):
            case.check_score("cudagraph", text, latent_index=[0] * rows, text_index=[2] * rows)
        inputs = [recording.inputs.text for recording in case.replayed._runtime._recordings.values()]
        assert len(inputs) == 3
        assert all(each is inputs[0] for each in inputs)
        case.check_score("cudagraph", case.plain.encode_text(case.states[:1].repeat(3, 1, 1)))


def test_a_budget_counts_the_copies_of_texts_that_runtimes_keep():
    case = Texts()
    with torch.no_grad():
        text = case.program.plan(scores=case.program.score_ids).encode_text(case.states)
        one = text.k[SCORE].nbytes // 3
        # Of the layers that run, as many texts as a bucket has.
        assert {name: plan.text_bytes(text) - text.nbytes for name, plan in case.by_runtime.items()} == {
            "plain": 0,
            "inductor": 4 * one,
            "cudagraph": 4 * one,
        }
        assert case.by_runtime["inductor"].text_bytes(text[:2]) == text[:2].nbytes
        row = HEADROOM["cpu"] * case.plain.run_bytes(1, 16, 16, TOKENS)
        for runtime, missing in (("plain", 0), ("inductor", 4 * one)):
            budget = text.nbytes + row + missing
            assert len(list(case.by_runtime[runtime].stream(text=text, **case.arguments, memory_budget=budget))) == 5
        with pytest.raises(ValueError, match=f"the texts' keys \\({text.nbytes + 4 * one:,} bytes\\)"):
            case.by_runtime["inductor"].stream(text=text, **case.arguments, memory_budget=text.nbytes + 4 * one)


def halve(module, args, output):
    return output * 0.5


def own_forward(module):
    module.forward = lambda x: halve(None, None, type(module).forward(module, x))
    return lambda: delattr(module, "forward")


TOUCHED = {
    "hook": lambda module: module.register_forward_hook(halve).remove,
    "pre-hook": lambda module: module.register_forward_pre_hook(lambda m, args: (args[0] * 0.5,)).remove,
    "own forward": own_forward,
}


@pytest.mark.parametrize("touch", TOUCHED)
@pytest.mark.parametrize("runtime", COMPILED)
def test_hooks_that_come_and_go_after_compiling_count(runtime, touch):
    case = Texts()
    with torch.no_grad():
        text = case.plain.encode_text(case.states)
        case.check_score(runtime, text)
        before, count = case.score(runtime, text), graphs()
        restore = TOUCHED[touch](case.unet.conv_in)
        case.check_score(runtime, text)
        assert float((case.score(runtime, text) - before).abs().max()) > 1e-3
        restore()
        assert torch.equal(case.score(runtime, text), before)
    assert graphs() == count
    assert case.recorder.records == (runtime == "cudagraph")


def test_a_backward_hook_sees_the_gradients_of_a_compiled_plan():
    case = Texts()
    latents = case.arguments["latents"].requires_grad_()
    text = case.plain.encode_text(case.states)
    case.score("inductor", text).sum().backward()
    seen = []
    case.unet.conv_in.register_full_backward_hook(lambda m, into, out: seen.append(out[0].shape))
    case.score("inductor", text, latents=latents).sum().backward()
    assert seen == [(2, 16, 16, 16)]


def test_weights_changed_in_place_are_seen_and_replaced_ones_recorded_anew():
    case = Recorded()
    request = case.request()
    first = case.check(request)
    weight = case.unet.conv_in.weight
    with torch.no_grad():
        weight.mul_(1.5)
    second = case.check(request)
    assert case.recorder.records == 1
    assert float((first.scores[SCORE] - second.scores[SCORE]).abs().max()) > 1e-4
    case.unet.conv_in.weight = torch.nn.Parameter(weight * 2, requires_grad=False)
    case.check(request)
    assert case.recorder.records == 2
    case.unet.double()
    case.unet.float()
    case.check(request)
    assert case.recorder.records == 3


def test_another_state_of_the_adapters_is_recorded_anew(tmp_path):
    pipe = tiny_pipeline("sd15")
    case = Recorded(pipe.unet)
    weights = Weights(pipe.unet)
    seen = [weights.signature()]
    case.check(case.request())
    for change in (
        lambda: load_lora(pipe, tmp_path, "a", 1),
        lambda: pipe.set_adapters("a", 0.5),
        pipe.disable_lora,
    ):
        change()
        seen.append(weights.signature())
        assert seen[-1] == weights.signature()
        case.check(case.request())
    assert len(set(seen)) == 4
    assert case.recorder.records == 4


def test_gradients_are_not_replayed():
    case = Recorded()
    request = case.request()
    request["states"].requires_grad_()
    run(case.replayed, request).scores[SCORE].sum().backward()
    assert case.recorder.records == 0
    assert request["states"].grad.any()
    case.unet.conv_in.requires_grad_(True)
    assert run(case.replayed, case.request()).scores[SCORE].requires_grad
    assert case.recorder.records == 0
    case.check(request)
    assert case.recorder.records == 1


def test_the_last_rows_of_a_stream_are_padded_into_a_recording_of_at_most_twice_as_many():
    case = Recorded()
    request = case.request(1, 3, 12, lengths=None)
    states, options = request.pop("states"), request.pop("text")
    with torch.no_grad():
        text = case.plain.encode_text(states, **options)
        budget = case.replayed.text_bytes(text) + HEADROOM["cpu"] * case.replayed.run_bytes(8, 16, 16, TOKENS)
        # Micro-batches of eight rows, the last ones of four and of two.
        for rows, records in ((12, 1), (10, 2)):
            chosen = request | {name: request[name][:rows] for name in ("latent_index", "text_index")}
            out = case.plain.empty_output(rows, 16, 16, tokens=TOKENS)
            case.replayed.stream(text=text, **chosen, out=out, memory_budget=budget)
            same(out, case.plain.run(text=text, **chosen))
            assert case.recorder.records == records
        # A run by itself is computed at its own size.
        case.replayed.run(text=text, **request | {"latent_index": [0] * 4, "text_index": [0] * 4})
        assert case.recorder.records == 3


def test_recordings_keep_the_room_that_they_were_made_for():
    case = Recorded()
    runtime = case.replayed._runtime
    assert (case.plain.room(7), case.replayed.room(7), case.replayed.room(8)) == (7, 7, 8)
    case.check(case.request())
    assert case.replayed.room(5) == 8
    runtime._recordings.clear()
    assert case.replayed.room(5) == 5
