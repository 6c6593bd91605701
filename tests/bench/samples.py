"""Records made by hand."""

import copy

_SIDE = {
    "name": "at once",
    "batch": 8,
    "sizes": {"rows": 8},
    "median": 0.25,
    "p20": 0.2,
    "p80": 0.5,
    "repeats": 7,
    "flops": 4096,
    "bytes": None,
    "memory": 2_000_000,
    "matmul_share": 0.5,
    "copy_share": None,
}

_SPEED = {
    "schema": 1,
    "kind": "speed",
    "suite": "tiny",
    "case": "product/8",
    "name": "product/8",
    "group": "product",
    "ok": True,
    "reason": None,
    "command": "dsd-fast bench tiny --only product/8",
    "unit": "s",
    "item": "row",
    "items": 8,
    "accuracy": {"measure": "largest difference", "value": 1e-6, "tolerance": 1e-5, "oracle": "one by one"},
    "subject": _SIDE,
    "baseline": {**_SIDE, "name": "one by one", "batch": 1, "median": 1.0, "p20": 0.8, "p80": 1.5},
    "ratio": {"median": 4.0, "low": 3.5, "high": 4.5, "coverage": 0.984375},
    "peaks": {"dtype": "float32", "matmul_flops": 1e11, "copy_bytes": 1e10},
    "date": "2026-01-02T03:04:05Z",
    "machine": {"kind": "cpu", "name": "Processor", "cores": 2, "threads": 2, "driver": None, "load": 0.5},
    "environment": "",
    "versions": {
        "python": "3.11.0",
        "torch": "2.13.0",
        "triton": None,
        "diffusers": "0.42.1",
        "dsd_fast": "0.1.0",
        "mini": "01234567",
    },
    "commit": "0123456789abcdef",
    "dirty": False,
}

_SPEED_ONLY = ("unit", "items", "accuracy", "subject", "baseline", "ratio", "peaks")


def _named(name: str) -> dict:
    return {"case": name.partition(", ")[0], "name": name}


def speed(name: str = "product/8", median: float = 4.0, low: float = 3.5, high: float = 4.5, **changes) -> dict:
    """A passing record of speed."""
    made = copy.deepcopy(_SPEED)
    made |= {**_named(name), "ratio": {"median": median, "low": low, "high": high, "coverage": 0.984375}}
    return made | changes


def quality(name: str = "share, size = 1", value: float = 0.8, low: float = 0.7, high: float = 0.9, **changes) -> dict:
    """A passing record of quality."""
    made = {key: value for key, value in copy.deepcopy(_SPEED).items() if key not in _SPEED_ONLY}
    made |= {"kind": "quality", **_named(name), "group": "share", "value": value, "low": low, "high": high, "n": 100}
    made |= {"unit": "share", "chance": 0.5, "floor": None, "sizes": {"size": 1}, "seconds": 0.01, "item": "pair"}
    return made | changes


def grown() -> list[dict]:
    """Figures of two lines and a level, of the suite GROWTH."""
    figures = [("first", 4, 0.5), ("first", 2, 0.8), ("second, by half", 2, 0.9), ("before", 0, 0.3)]
    return [
        quality(
            f"some set: {line}, {size} of size",
            value,
            round(value - 0.1, 1),
            round(value + 0.1, 1),
            sizes={"size": size},
            group="growth",
            case="some",
        )
        for line, size, value in figures
    ]


def refused(name: str = "product/8") -> dict:
    """The record of a case whose result was wrong."""
    made = {key: value for key, value in copy.deepcopy(_SPEED).items() if key not in (*_SPEED_ONLY, "item")}
    return made | {"kind": "refused", **_named(name), "ok": False, "reason": "at once: largest difference is 1"}
