"""What the program would silently ignore or get wrong, refused by name.

The program calls a network's leaf modules itself. Whatever lives in the forward methods it goes around (attention
processors of other methods, FreeU, offload hooks, unusual block types) would have no effect, so it is an error.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from operator import contains, itemgetter
from typing import Any

from torch import nn
from torch.nn.modules import module as every_module

from dsd_fast.models.private import compiled_forward, uncompiled
from dsd_fast.models.tuners import is_wrapper
from dsd_fast.unet.flops import base_layer
from dsd_fast.unet.shipped import CALLS, is_shipped, of_library, reached, told
from dsd_fast.unet.weights import HOOKS, untouched

PLAIN_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor")

# Setting → what is supported, the default first; of a setting for each block, for each.
CONFIG: dict[str, tuple[Any, ...]] = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",),
    "class_embed_type": (None,),
    "cross_attention_norm": (None,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
}


# Class → what its forward reads and the program does not, as the supported configurations have it.
_ASSUMED: dict[str, dict[str, Any]] = {
    "UNet2DConditionModel": {"time_embed_act": None, "class_embedding": None, "encoder_hid_proj": None},
    "ResnetBlock2D": {"upsample": None, "downsample": None, "time_embedding_norm": "default", "skip_time_act": False},
    "Upsample2D": {"norm": None, "use_conv": True, "use_conv_transpose": False, "interpolate": True, "name": "conv"},
    "Transformer2DModel": {"is_input_continuous": True},
    "BasicTransformerBlock": {"norm_type": "layer_norm", "pos_embed": None, "only_cross_attention": False},
    "Attention": {
        **dict.fromkeys(("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k")),
        "residual_connection": False,
    },
}


def _kind(hooks: str) -> str:
    """Whether those are hooks of the forward or of the backward pass."""
    return hooks.split("_")[1]


_FREEU = ("s1", "s2", "b1", "b2")
_HOOKS_OF = itemgetter(*HOOKS)
_SILU = nn.SiLU.forward if is_shipped(nn.SiLU, "forward") else None
# Hooks on the modules of the whole process.
_EVERYWHERE = [(_kind(name), getattr(every_module, f"_global{name}")) for name in HOOKS]
_OFFLOADING = frozenset({"_hf_hook", "_diffusers_hook"})


class UnsupportedNetworkError(ValueError):
    """A network, or something attached to it, that the program cannot answer for."""


def check_architecture(unet: Any) -> None:
    """Refuse a network whose configuration the program does not know.

    Raises:
        UnsupportedNetworkError: names the setting, its value and what is supported.
    """
    known: Any = _classes("UNet2DConditionModel")
    if not isinstance(unet, known):
        raise UnsupportedNetworkError(f"unet: {told(unet)} is not supported, expected diffusers' UNet2DConditionModel")
    for key, allowed in CONFIG.items():
        values = unet.config.get(key, allowed[0])
        for value in values if isinstance(values, (list, tuple)) else [values]:
            if value not in allowed:
                expected = " or ".join(map(repr, allowed))
                raise UnsupportedNetworkError(f"unet.config.{key}: {value!r} is not supported, expected {expected}")
    widths = unet.config.cross_attention_dim
    if not isinstance(widths, int) and len(set(widths)) > 1:
        raise UnsupportedNetworkError(f"unet.config.cross_attention_dim: {widths} is not supported, expected one width")
    if getattr(unet, "hf_quantizer", None) is not None:
        raise UnsupportedNetworkError(
            "unet: quantised layers are not supported; load it in float32, float16 or bfloat16"
        )
    for path, module in unet.named_modules():
        _check_module(path or "unet", module)


def _check_module(path: str, module: nn.Module) -> None:
    if hasattr(module, "_hf_hook"):
        raise UnsupportedNetworkError(f"{path}: an offload hook of accelerate is attached; load the model without it")
    if hasattr(module, "_diffusers_hook"):
        raise UnsupportedNetworkError(
            f"{path}: a hook of diffusers (offloading, layerwise casting or caching) is attached; remove it"
        )
    weight = getattr(base_layer(module), "weight", None)
    if weight is None:
        return
    foreign = type(weight).__module__.partition(".")[0] != "torch"
    if foreign or not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        kind = f"{type(base_layer(module)).__name__} with a {type(weight).__name__} of {weight.dtype}"
        raise UnsupportedNetworkError(f"{path}: quantised layers are not supported, found {kind}")


class Bypassed:
    """The modules of a known network whose forward the program does not call, which must be diffusers' own.

    Attributes:
        modules: by path.

    Raises:
        UnsupportedNetworkError: names the module, and what it is or what is attached to it.
    """

    def __init__(self, unet: Any) -> None:
        self._unet = unet
        self._processors = plain_processors()
        # Where a class was first met, it, and its methods that a call reaches, as they are shipped.
        self._methods: list[tuple[str, type, str, Any]] = []
        for processor in self._processors:
            self._know_methods("unet", processor, processor, ("__call__",))
        self.modules: dict[str, Any] = {}
        for path, place, names in _places(unet):
            module = uncompiled(place)
            self._know(path, module, names)
            self.modules[path] = module
        self._attentions = [module for module in self.modules.values() if hasattr(module, "processor")]
        self._residual = [module._modules for module in self.modules.values() if hasattr(module, "nonlinearity")]
        self._own = [vars(module) for module in self.modules.values()]
        self._kinds = {path: type(module) for path, module in self.modules.items()}
        # The lists between the blocks too, so that no module that was put in place of another goes unseen.
        ways = {".".join(path.split(".")[:end]) for path in self.modules for end in range(1, path.count(".") + 2)}
        self._paths = sorted(ways - {"unet"})
        self._parts = [unet.get_submodule(path) for path in self._paths]
        splits = [path.rpartition(".") for path in self._paths]
        self._siblings = [(uncompiled(unet.get_submodule(parent))._modules, key) for parent, _, key in splits]
        self.check()

    def check(self) -> None:
        """Refuse what was replaced or attached since: cheap enough for every call."""
        if not self._processors.issuperset([type(attention.processor) for attention in self._attentions]):
            self._refuse_processor()
        for path, owner, name, function in self._methods:
            if getattr(owner, name) is not function:
                _refuse_method(path, owner, name)
        if [siblings.get(key) for siblings, key in self._siblings] != self._parts or (
            {path: type(module) for path, module in self.modules.items()} != self._kinds
        ):
            self._refuse_replaced()
        if any(chain.from_iterable(map(_HOOKS_OF, self._own))) or any(map(contains, self._own, repeat("forward"))):
            self._refuse_attached()
        if any(vars(block).get(key) for block in self._unet.up_blocks for key in _FREEU):
            self._refuse_freeu()
        for kind, hooks in _EVERYWHERE:
            for hook in hooks.values():
                if not of_library(hook):
                    raise UnsupportedNetworkError(
                        f"unet: a {kind} hook ({told(hook)}) is registered on all modules, also on those whose forward "
                        "the program does not call; remove it"
                    )
        if not _OFFLOADING.isdisjoint(vars(self._unet)):
            _check_module("unet", self._unet)

    @property
    def plainly_activated(self) -> bool:
        """Whether every residual block's activation is SiLU and nothing else."""
        activations = [block["nonlinearity"] for block in self._residual]
        plain = set(map(type, activations)) == {nn.SiLU} and _SILU is nn.SiLU.forward
        return plain and all(map(untouched, activations))

    def _know(self, path: str, module: Any, names: tuple[str, ...]) -> None:
        """Refuse a module that is not what one of diffusers' classes makes of a supported configuration."""
        stock = next((kind for kind in _classes(*names) if isinstance(module, kind)), None)
        if stock is None and is_wrapper(module):
            raise UnsupportedNetworkError(
                f"{path}: an adapter replaces the whole {type(module.original_module).__name__} (PEFT's "
                "modules_to_save), which the program would not see come and go; expected one that replaces layers in it"
            )
        if stock is None:
            expected = " or ".join(names)
            raise UnsupportedNetworkError(f"{path}: {told(module)} is not supported, expected diffusers' {expected}")
        begin = {"forward"}
        if stock.__name__ == "Attention":
            for processor in self._processors:
                begin.update(inspect.unwrap(processor.__call__).__code__.co_names)
        self._know_methods(path, type(module), stock, (*CALLS, *reached(stock, begin)))
        if stock.__name__ == "FeedForward" and type(module.net[0]) is _classes("GEGLU")[0]:
            # Which is called only where it has no kernel.
            self._know_methods(f"{path}.net.0", type(module.net[0]), type(module.net[0]), (*CALLS, "forward", "gelu"))
        for key, wanted in _ASSUMED.get(stock.__name__, {}).items():
            value = getattr(module, key, wanted)
            if value != wanted:
                shown = told(value) if isinstance(value, nn.Module) else repr(value)
                raise UnsupportedNetworkError(f"{path}.{key}: {shown} is not supported, expected {wanted!r}")

    def _know_methods(self, path: str, kind: type, stock: type, names: Iterable[str]) -> None:
        if any(known is kind for _, known, _, _ in self._methods):
            return
        for name in names:
            function = inspect.getattr_static(stock, name)
            if inspect.getattr_static(kind, name) is not function or not is_shipped(stock, name):
                _refuse_method(path, kind, name)
            self._methods.append((path, kind, name, getattr(kind, name)))

    def _refuse_processor(self) -> None:
        for path, module in self.modules.items():
            processor = getattr(module, "processor", None)
            if processor is not None and type(processor) not in self._processors:
                name = type(processor).__name__
                what = "an IP-Adapter is loaded" if name.startswith("IPAdapter") else "an attention processor is set"
                name = told(processor) if name in PLAIN_PROCESSORS else name
                raise UnsupportedNetworkError(f"{path}: {what} ({name}) that the program would ignore; remove it")

    def _refuse_replaced(self) -> None:
        places = zip(self._paths, self._parts, self._siblings, strict=True)
        replaced = [path for path, part, (siblings, key) in places if siblings.get(key) is not part]
        replaced += [path for path, module in self.modules.items() if type(module) is not self._kinds[path]]
        raise UnsupportedNetworkError(
            f"{replaced[0]}: the module, or its class, was replaced after the program had been made; make what has the "
            "program (a Matcher, a FeatureExtractor) anew"
        )

    def _refuse_freeu(self) -> None:
        for index, block in enumerate(self._unet.up_blocks):
            if any(vars(block).get(key) for key in _FREEU):
                raise UnsupportedNetworkError(f"up_blocks.{index}: FreeU is enabled; call disable_freeu() first")

    def _refuse_attached(self) -> None:
        for path, module in self.modules.items():
            hooks = [_kind(name) for name in HOOKS if vars(module)[name]]
            what = f"a {hooks[0]} hook is registered on" if hooks else ""
            if "forward" in vars(module) and not compiled_forward(module):
                what = "another forward was put on"
            if what:
                raise UnsupportedNetworkError(
                    f"{path}: {what} a module whose forward the program does not call; remove it"
                )


def _refuse_method(path: str, kind: type, name: str) -> None:
    function = inspect.getattr_static(kind, name)
    raise UnsupportedNetworkError(
        f"{path}: {kind.__module__}.{kind.__qualname__} has a {name} ({told(function)}) that is not diffusers' own and "
        "that the program would not call; put the library's class or method back"
    )


def plain_processors() -> frozenset[type]:
    """diffusers' attention processors that compute softmax(q kᵀ·scale) v and nothing else."""
    return frozenset(_classes(*PLAIN_PROCESSORS))


@functools.cache
def _classes(*names: str) -> tuple[type, ...]:
    """diffusers' classes of those names."""
    from diffusers.models import activations, attention, attention_processor, resnet, upsampling
    from diffusers.models.transformers import transformer_2d
    from diffusers.models.unets import unet_2d_blocks, unet_2d_condition

    attentions = (transformer_2d, attention, attention_processor, activations)
    rooms = (unet_2d_condition, unet_2d_blocks, resnet, upsampling, *attentions)
    return tuple(next(vars(room)[name] for room in rooms if name in vars(room)) for name in names)


def _places(unet: Any) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    """The modules whose forward the program does not call: path, module, and the classes that may stand there."""
    yield "unet", unet, ("UNet2DConditionModel",)
    for side in ("down", "up"):
        for number, block in enumerate(getattr(unet, f"{side}_blocks")):
            yield from _of_block(f"{side}_blocks.{number}", block, CONFIG[f"{side}_block_types"])
    if unet.mid_block is not None:
        yield from _of_block("mid_block", unet.mid_block, CONFIG["mid_block_type"])


def _of_block(path: str, block: Any, names: tuple[Any, ...]) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    yield path, block, tuple(name for name in names if name is not None)
    parts = {"resnets": "ResnetBlock2D", "upsamplers": "Upsample2D", "attentions": "Transformer2DModel"}
    for part, name in parts.items():
        for number, module in enumerate(getattr(block, part, None) or ()):
            if module is None:
                continue
            where = f"{path}.{part}.{number}"
            yield where, module, (name,)
            for index, inner in enumerate(module.transformer_blocks if part == "attentions" else ()):
                yield f"{where}.transformer_blocks.{index}", inner, ("BasicTransformerBlock",)
                for key, kind in (("attn1", "Attention"), ("attn2", "Attention"), ("ff", "FeedForward")):
                    yield f"{where}.transformer_blocks.{index}.{key}", getattr(inner, key), (kind,)
