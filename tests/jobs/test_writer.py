import threading
import time

import pytest

from dsd_fast.jobs import Timeline, Writer


def test_tasks_run_in_their_order_in_another_thread():
    done = []
    writer = Writer()
    for number in range(50):
        writer.put(lambda number=number: done.append((number, threading.current_thread().name)))
    writer.close()
    assert done == [(number, "dsd-write") for number in range(50)]
    writer.close()


def test_no_more_tasks_are_taken_than_may_wait():
    may_go, begun, taken = threading.Semaphore(0), threading.Semaphore(0), []

    def task():
        begun.release()
        may_go.acquire()

    def put():
        for number in range(6):
            writer.put(task)
            taken.append(number)

    writer = Writer(ahead=2)
    thread = threading.Thread(target=put)
    thread.start()
    for finished in range(6):
        begun.acquire()
        # One runs and two wait; the thread that puts is given the time to do wrong.
        time.sleep(0.01)
        assert len(taken) <= finished + 3
        may_go.release()
    thread.join()
    writer.close()


def test_the_first_error_comes_out_and_nothing_runs_after_it():
    done = []

    def fail():
        raise OSError("full")

    writer = Writer(ahead=3)
    writer.put(lambda: done.append(1))
    writer.put(fail)
    writer.put(lambda: done.append(2))
    with pytest.raises(OSError, match="full"):
        writer.close()
    assert done == [1]

    writer = Writer()
    writer.put(fail)
    with pytest.raises(OSError, match="full"):  # noqa: PT012
        # Soon, and it never waits for room that nobody makes.
        for _ in range(1000):
            writer.put(lambda: done.append(3))
            time.sleep(0.001)
    with pytest.raises(OSError, match="full"):
        writer.close()
    assert done.count(3) <= 1


def test_a_finished_tasks_rows_are_let_go():
    import gc
    import weakref

    class Rows(list):
        pass

    rows = Rows()
    gone = weakref.ref(rows)
    writer = Writer()
    writer.put(lambda rows=rows: rows.append(1))
    del rows
    deadline = time.monotonic() + 10
    while gone() is not None and time.monotonic() < deadline:
        time.sleep(0.001)
        gc.collect()
    assert gone() is None
    writer.close()


def test_at_least_one_task_may_wait():
    with pytest.raises(ValueError, match="ahead is 0, expected at least 1"):
        Writer(0)


def test_the_overlap_is_the_share_of_one_inside_the_other():
    timeline = Timeline()
    for start, end in ((0.0, 1.0), (2.0, 3.0), (5.0, 6.0)):
        timeline.add("compute", start, end)
    for start, end in ((0.5, 2.5), (4.0, 4.5), (5.5, 7.0)):
        timeline.add("write", start, end)
    # Of writing: 0.5 + 0.5 of 2, 0 of 0.5, 0.5 of 1.5.
    assert timeline.overlap("write", "compute") == pytest.approx(1.5 / 4)
    assert timeline.overlap("compute", "write") == pytest.approx(1.5 / 3)
    assert timeline.seconds("write") == pytest.approx(4)
    assert timeline.overlap("decode", "compute") == timeline.overlap("write", "decode") == 0
    for name, start, end in (("encode-0", 0, 2), ("encode-11", 1.5, 5), ("encode-x", 0, 9), ("encoded", 0, 9)):
        timeline.add(name, start, end)
    # Threads that do the same count together: 1 of 2 seconds, and 1 of 3.5.
    assert timeline.seconds("encode") == pytest.approx(5.5)
    assert timeline.overlap("encode", "compute") == pytest.approx(2 / 5.5)


def test_spans_that_follow_each_other_at_once_are_one(tmp_path):
    timeline = Timeline()
    for start, end in ((0.0, 1.0), (1.0005, 2.0), (2.1, 3.0)):
        timeline.add("compute", start, end)
    timeline.add("write", 0.5, 0.75)
    assert timeline.spans == [("compute", 0.0, 2.0), ("write", 0.5, 0.75), ("compute", 2.1, 3.0)]
    timeline.save(tmp_path / "timeline.json")
    assert (tmp_path / "timeline.json").read_text() == (
        '{"unit": "seconds", "spans": [{"name": "compute", "start": 0.0, "end": 2.0}, '
        '{"name": "write", "start": 0.5, "end": 0.75}, {"name": "compute", "start": 2.1, "end": 3.0}]}\n'
    )


def test_a_span_is_measured_also_when_its_block_raises():
    timeline = Timeline()

    def fail():
        with timeline.span("compute"):
            time.sleep(0.02)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    [(name, start, end)] = timeline.spans
    assert name == "compute"
    # A sleep is never shorter; a busy machine may make it much longer.
    assert start >= 0
    assert 0.02 <= end - start < 10
