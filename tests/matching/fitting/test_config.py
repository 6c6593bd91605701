import pytest

from dsd_fast.matching.fitting.config import LEARNING_RATES, METHODS, FitConfig, parse_methods

NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *((name, (0, -1, 1.5, True, "3", None)) for name in ("steps", "batch_size", "rank", "prompt_tokens")),
        ("validate_every", (0, 2.0)),
        ("warmup", (-1, 0.5)),
        ("micro_batch", (0, "all")),
        ("patience", (0, 1.0)),
        ("temperature", (0, -0.1, NAN, "warm")),
        ("clip_norm", (0.0, float("inf"))),
        ("margin", (-0.1, None)),
        ("weight_decay", (-1e-9, NAN)),
        ("save_every", (-1, "often")),
        ("lora_dropout", (-0.1, 1.0, 2)),
        ("seed", (-1, 2**32, 0.5, None)),
        ("loss", ("hinge", None)),
        ("schedule", ("cosine",)),
        ("attention", ("self", True)),
        ("autocast", ("float32", "half")),
        ("learning_rate", (0, -1e-4, NAN, "fast", {"lora": 0.0}, {"head": 1e-3})),
        ("timestep_range", ((5, 5), (9, 3), (-1, 5), (1, 2, 3), 7, ("0", "9"), (0.5, 9.5))),
    ],
)
def test_bad_values_are_refused_by_name(name, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name}: got "):
            FitConfig(**{name: value})


def test_rates_rise_and_fall():
    fit = FitConfig(steps=100, warmup=10, learning_rate={"lora": 1.0})
    assert [fit.rate("lora", step) for step in (0, 4, 9, 49, 50)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    assert [fit.rate("lora", step) for step in (75, 99)] == pytest.approx([0.5, 0.02])
    # A method that is not named has its own rate.
    assert fit.rate("heads", 20) == FitConfig().rate("heads", 20) == LEARNING_RATES["heads"]
    assert {FitConfig(learning_rate=0.5, warmup=0).rate(method, 0) for method in METHODS} == {0.5}


def test_the_official_recipe():
    fit = FitConfig.official(7)
    assert [fit.rate("lora", step) for step in range(7)] == [1e-4] * 7
    assert (fit.steps, fit.batch_size, fit.loss, fit.margin) == (7, 1, "margin", 0.1)
    assert (fit.shared_noise, fit.rank, fit.attention) == (False, 4, "all")
    assert (fit.weight_decay, fit.clip_norm) == (1e-2, 1.0)


def test_methods():
    assert parse_methods("prompt") == ("prompt",)
    assert parse_methods(["heads", "lora"]) == ("lora", "heads")
    for bad in ("lorax", [], ["lora", "lora"], ["lora", "all"]):
        with pytest.raises(ValueError, match=r"^method: got"):
            parse_methods(bad)
