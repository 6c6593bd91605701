"""What an operation allocates, from the events of torch's CPU allocator."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def allocations(call: Callable[[], object]) -> list[int]:
    """Bytes allocated (positive) and freed (negative) while ``call`` runs, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        call()
    events = [event for event in p.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes alive at once."""
    live = peak = 0
    for size in allocations(call):
        live += size
        peak = max(peak, live)
    return peak
