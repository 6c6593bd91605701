"""A tiny suite: products of small matrices."""

import torch

from dsd_fast.bench import Case, Context, Figure, Group, Quality, Side, Suite, Work


def product(add: float = 0.0, rows: int = 8, tolerance: float = 1e-5) -> Work:
    """Rows times a matrix, one by one or at once; `add` makes the second side wrong."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(rows, 16, generator=generator), torch.randn(16, 16, generator=generator)
    return Work(
        sides=[
            Side("one by one", lambda: torch.stack([row @ b for row in a]), 1, {"rows": rows}),
            Side("at once", lambda: a @ b + add, rows, {"rows": rows}, bytes=4 * (2 * rows * 16 + 16 * 16)),
        ],
        difference=lambda result, right: float((result - right).abs().max()),
        tolerance=tolerance,
        accuracy="largest difference",
        oracle_name="one by one",
        item="row",
        items=rows,
    )


def ladder(context: Context) -> Work:
    """Three rungs against an oracle of its own."""
    work = product()
    double = Side("in two halves", lambda: torch.cat([work.sides[1].run()[:4], work.sides[0].run()[4:]]), 4)
    return Work(
        sides=[work.sides[0], double, work.sides[1]],
        difference=work.difference,
        tolerance=work.tolerance,
        accuracy=work.accuracy,
        oracle=work.sides[0].run,
        oracle_name="one by one",
        item="row",
        items=8,
    )


def fail(context: Context) -> Work:
    raise RuntimeError("no such /folder/here")


def suite(**changes) -> Suite:
    """Speed, a wrong result, an error, a ladder and figures; `changes` puts others there, or none."""
    cases = {
        "product/8": Case("product/8", "product", lambda context: product()),
        "product/4": Case("product/4", "product", lambda context: product(rows=4)),
        "wrong": Case("wrong", "product", lambda context: product(add=1.0)),
        "error": Case("error", "product", fail),
        "ladder": Case("ladder", "ladder", ladder),
        "share": Quality("share", "share", lambda context: shares()),
    }
    groups = [
        Group("product", "Products of matrices", plot="latency"),
        Group("ladder", "A ladder", plot="waterfall"),
        Group("share", "Shares", plot="quality", x="size"),
        Group("empty", "Nothing yet", plot="latency"),
    ]
    return Suite("tiny", groups, [case for case in (cases | changes).values() if case])


def shares() -> list[Figure]:
    """Two points of one line."""
    rest = {"chance": 0.5, "item": "pair"}
    return [
        Figure.share(f"share, size = {size}", right, 100, sizes={"size": size}, seconds=size / 100, **rest)
        for size, right in ((1, 60), (2, 80))
    ]


GROWTH = Suite(
    "growth",
    [Group("growth", "Shares by size", plot="growth", x="size", wide=True)],
    [Quality("some", "growth", lambda context: shares())],
)
