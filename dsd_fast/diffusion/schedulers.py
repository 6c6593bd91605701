"""A diffusers scheduler as it is: its class, its config and its own numbers, whatever of them was changed in place."""

import copy
import inspect
from collections.abc import Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from dsd_fast.kernels.common.host import as_tensor, ordinary

# What set_timesteps and steps write to, in any of diffusers' schedulers; and the config, which goes its own way.
_WALK = frozenset(
    {
        *("num_inference_steps", "timesteps", "prk_timesteps", "plms_timesteps", "custom_timesteps", "timestep_list"),
        *("sigmas", "sigmas_down", "sigmas_interpol", "sigmas_up", "sigma_data", "order_list", "noisiest_timestep"),
        *("ets", "counter", "cur_model_output", "cur_sample", "derivatives", "prev_derivative", "dt", "sample"),
        *("model_outputs", "lower_order_nums", "last_noise", "last_sample", "is_scale_input_called"),
        *("this_order", "this_corrector_order", "this_predictor_order", "noise_sampler"),
        *("_internal_dict", "_timesteps", "_step_index", "_begin_index"),
    }
)
# What is done here by one formula instead of a scheduler's own method.
_REPLACED = ("add_noise", "scale_model_input")

# A latent is nowhere cut off at 1, whatever a config without the entry would mean to a class.
_DPM = {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": False}
_SDE = {**_DPM, "algorithm_type": "sde-dpmsolver++"}
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {"use_karras_sigmas": False}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", _DPM),
    "dpm++2m-karras": ("DPMSolverMultistepScheduler", {**_DPM, "use_karras_sigmas": True}),
    "dpm++2m-sde": ("DPMSolverMultistepScheduler", _SDE),
    "dpm++2m-sde-karras": ("DPMSolverMultistepScheduler", {**_SDE, "use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {"use_karras_sigmas": False}),
    "lcm": ("LCMScheduler", {"clip_sample": False}),
}
"""The schedulers that sampling is tested with, by name: diffusers' class, and what its config says."""


@ordinary()
def named_scheduler(name: str, scheduler: Any) -> Any:
    """Make one of :data:`SAMPLERS` of a model's own scheduler: its betas, its prediction type, its spacing.

    Args:
        scheduler: a diffusers scheduler, left as it is.

    Raises:
        ValueError: another name; numbers that were changed in place, which a config cannot hand on.
    """
    import diffusers

    if name not in SAMPLERS:
        raise ValueError(f"scheduler: got {name!r}, expected one of {', '.join(SAMPLERS)}, or a diffusers scheduler")
    changed = changed_in_place(scheduler)
    if changed:
        raise ValueError(
            f"scheduler: {', '.join(sorted(changed))} of the model's {type(scheduler).__name__} changed in place, "
            f"which {name!r} would not have; expected None, or a diffusers scheduler that has it"
        )
    kind, settings = SAMPLERS[name]
    cls: Any = getattr(diffusers, kind)
    taken = inspect.signature(cls).parameters
    return cls.from_config({key: value for key, value in scheduler.config.items() if key in taken} | settings)


def check_draws(scheduler: Any, eta: float = 0.0) -> None:
    """Refuse a scheduler whose noise is not a row's own, and noise that it does not add.

    Args:
        eta: of DDIM, how much noise is asked for.

    Raises:
        ValueError: one that draws for a whole batch at once; ``eta`` for one that does not read it.
    """
    name = type(scheduler).__name__
    if hasattr(scheduler, "noise_sampler"):
        raise ValueError(
            f"scheduler: {name} draws the noise of a whole batch at once, so that a row depends on the others; "
            "expected one that takes a generator for each row"
        )
    if eta and "eta" not in inspect.signature(scheduler.step).parameters:
        raise ValueError(f"eta: got {eta}, which {name} does not read; expected 0")


def draws_noise(scheduler: Any, eta: float = 0.0) -> bool:
    """Tell whether a scheduler's steps draw noise from the generators that they are given; ``eta`` is DDIM's."""
    parameters = inspect.signature(scheduler.step).parameters
    if "generator" not in parameters:
        return False
    if "eta" in parameters:
        return bool(eta)
    if scheduler.config.get("algorithm_type") in ("dpmsolver", "dpmsolver++"):
        return False
    # Its noise is s_churn's alone, which nobody gives it.
    return "EulerDiscreteScheduler" not in (cls.__name__ for cls in type(scheduler).__mro__)


@ordinary()
def fresh_scheduler(scheduler: Any) -> Any:
    """Make a scheduler that does what the given one does, as if no timesteps had been set.

    What was changed on the object (ᾱ, the last ᾱ, the first σ) counts, for which making one from its config would not
    do.

    Args:
        scheduler: a diffusers scheduler, left as it is, or its config with "_class_name".

    Raises:
        ValueError: a config that names no scheduler class that diffusers has; a method that was replaced on the object.
    """
    if isinstance(scheduler, Mapping):
        return _from_config(scheduler)
    _check_methods(scheduler)
    stock = _stock(scheduler)
    fresh = copy.deepcopy(stock)
    memo: dict[int, Any] = {id(scheduler): fresh}
    for name, value in vars(scheduler).items():
        if name not in _WALK:
            vars(fresh)[name] = copy.deepcopy(value, memo)
    if not _walked(scheduler, stock) and "sigmas" in vars(scheduler):
        fresh.sigmas = copy.deepcopy(scheduler.sigmas)
    elif "sigmas" in vars(fresh) and "alphas_cumprod" in _changed(fresh, stock):
        _renew_sigmas(fresh, stock)
    return fresh


def changed_in_place(scheduler: Any) -> dict[str, Any]:
    """Tell what of a scheduler's own numbers its config does not give, by name."""
    return {name: vars(scheduler)[name] for name in _changed(scheduler, _stock(scheduler))}


def check_scheduler(scheduler: Any, alphas_cumprod: Tensor) -> None:
    """Refuse a scheduler for which ᾱ does not say how it noises.

    Args:
        alphas_cumprod: its ᾱ, (S,) float64.

    Raises:
        ValueError: a replaced method, an attribute that it never reads, numbers that contradict each other, or noise
            added by another rule than √ᾱ z₀ + √(1 − ᾱ) ε; by name.
    """
    kind, config = type(scheduler).__name__, scheduler.config
    _check_methods(scheduler)
    stock = _stock(scheduler)
    betas = config.get("trained_betas")
    steps = config.get("num_train_timesteps") if betas is None else len(betas)
    if steps not in (None, len(alphas_cumprod)):
        raise ValueError(
            f"scheduler: the {kind}'s alphas_cumprod has {len(alphas_cumprod)} entries, expected {steps} by its config"
        )
    for name, value in vars(scheduler).items():
        if name in config and name not in vars(stock) and not _same(value, config[name]):
            raise ValueError(
                f"scheduler: {name} = {value!r} was set on the {kind}, which reads its config's {config[name]!r}; use "
                f"scheduler.register_to_config({name}=…)"
            )
    changed = _changed(scheduler, stock) & {"alphas_cumprod", "sigmas"}
    if "sigmas" in vars(scheduler) and changed and not _walked(scheduler, stock) and not _agree(scheduler):
        raise ValueError(
            f"scheduler: the {kind}'s {' and '.join(sorted(changed))} changed in place, and its sigmas are not those "
            "of its alphas_cumprod; call its set_timesteps once, which makes them so"
        )
    for name in _REPLACED:
        method = getattr(type(scheduler), name, None)
        if method is None:
            continue
        # By the module that it was written in: a decorator may have given it another's name.
        module = method.__globals__["__name__"] if isinstance(method, FunctionType) else ""
        if not module.startswith("diffusers.") and not _noises_by_formula(scheduler, alphas_cumprod):
            raise ValueError(
                f"scheduler: the {kind}'s {name} is its own ({module or method!r}) and does not give "
                "√ᾱ z₀ + √(1 − ᾱ) ε with its alphas_cumprod, as noise is added here; expected a scheduler of diffusers"
            )


def _check_methods(scheduler: Any) -> None:
    for name, value in vars(scheduler).items():
        if callable(value) and callable(getattr(type(scheduler), name, None)):
            raise ValueError(
                f"scheduler: {name} was replaced on the {type(scheduler).__name__} itself, which a copy of it would "
                "share with it; expected a class of one's own with that method"
            )


def _walked(scheduler: Any, stock: Any) -> bool:
    """Whether timesteps have been set since a scheduler was made; ``stock`` is one as new."""
    return bool(vars(scheduler).get("num_inference_steps") != vars(stock).get("num_inference_steps"))


def _from_config(config: Mapping[str, Any]) -> Any:
    import diffusers

    name = config.get("_class_name")
    cls: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    if cls is None or diffusers.SchedulerMixin not in getattr(cls, "__mro__", ()):
        raise ValueError(f'scheduler config has "_class_name": {name!r}, expected the name of a diffusers scheduler')
    return cls.from_config(dict(config))


@ordinary()
def _stock(scheduler: Any) -> Any:
    """What the class makes of the config; of a class that takes what its config does not hold, a copy."""
    config = copy.deepcopy(scheduler.config)
    try:
        stock = type(scheduler).from_config(dict(config))
    except TypeError:
        return copy.deepcopy(scheduler)
    # A class of one's own may pass over what its arguments do not name.
    stock._internal_dict = config
    return stock


def _changed(scheduler: Any, stock: Any) -> set[str]:
    """The attributes that differ, those that a walk writes to aside; σ counts before one."""
    names = vars(scheduler).keys() - _WALK
    if "sigmas" in vars(scheduler) and not _walked(scheduler, stock):
        names.add("sigmas")
    return {name for name in names if not _same(vars(scheduler)[name], vars(stock).get(name))}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or hasattr(one, "__array__"):
        numbers = [as_tensor(each).detach().cpu() for each in (one, other) if hasattr(each, "__array__")]
        return len(numbers) == 2 and torch.equal(*(each.double() for each in numbers))
    # Of functions and helpers that a class makes for each of its objects, the kind.
    plain = isinstance(one, bool | int | float | str | list | tuple | dict | type(None))
    return bool(one == other) if plain else type(one) is type(other)


def _sigmas(alphas_cumprod: Any) -> Tensor:
    """σ = √((1 − ᾱ) / ᾱ), (S,) float64 on the CPU."""
    abar = as_tensor(alphas_cumprod).detach().cpu().double()
    return ((1 - abar) / abar).sqrt()


def _agree(scheduler: Any) -> bool:
    """Whether σ of all timesteps, in whatever order, are those of ᾱ; one of the end and repeated ones aside."""
    wanted, own = torch.unique(_sigmas(scheduler.alphas_cumprod)), as_tensor(scheduler.sigmas).detach().cpu()
    own = torch.unique(own.double())[-len(wanted) :]
    return own.shape == wanted.shape and torch.allclose(own, wanted, rtol=1e-3, atol=1e-6)


@ordinary()
def _renew_sigmas(fresh: Any, stock: Any) -> None:
    """Gives a scheduler as new the σ of its own ᾱ."""
    if fresh.num_inference_steps is not None:
        fresh.set_timesteps(fresh.num_inference_steps)
        return
    own, old = _sigmas(fresh.alphas_cumprod), as_tensor(stock.sigmas)
    # Some classes hold them from the last timestep to the first, some with one of the end behind.
    own = own.flip(0) if old[0] > old[len(own) - 1] else own
    fresh.sigmas = torch.cat([own.to(old.dtype), old[len(own) :]])


@ordinary()
def _noises_by_formula(scheduler: Any, alphas_cumprod: Tensor) -> bool:
    """Whether a scheduler makes what the UNet is given by √ᾱ z₀ + √(1 − ᾱ) ε, at a few timesteps."""
    fresh = fresh_scheduler(scheduler)
    clean = torch.linspace(-1, 1, 16, dtype=torch.float32, device="cpu").view(1, 1, 4, 4)
    noise = clean.flip(3).roll(1, 2)
    for t in (0, len(alphas_cumprod) // 2, len(alphas_cumprod) - 1):
        step = torch.tensor([t], device="cpu")
        abar = float(alphas_cumprod[t])
        try:
            own = fresh.scale_model_input(fresh.add_noise(clean, noise, step), step[0]).float()
        except Exception as error:
            raise ValueError(
                f"scheduler: the {type(fresh).__name__}'s own add_noise fails at timestep {t}: {error}"
            ) from error
        if not torch.allclose(own, abar**0.5 * clean + (1 - abar) ** 0.5 * noise, rtol=0, atol=1e-3):
            return False
    return True
