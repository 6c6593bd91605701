"""A network small enough to compile in a test, requests to it, and the comparison of answers."""

import torch
from diffusers import UNet2DConditionModel

from dsd_fast.unet import UNetProgram
from dsd_fast.unet.inductor import Inductor
from tests.tiny import CROSS_ATTENTION_DIM, POOLED_DIM, save_tiny_lora, trained_like

TOKENS = 11
# Convolutions are not bit-equal across batch sizes, and a bucket is another batch size.
TOLERANCE = 1e-5
SCORE = "down-level0-repeat0-vit-block0-cross"
FIRST_VIT = "down-level0-repeat0-vit-out"


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def small_unet(family, layers=2):
    """Two levels of one block each, with the family's projections, heads and embeddings."""
    common = {
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": CROSS_ATTENTION_DIM[family],
    }
    if family == "sdxl":
        unet = UNet2DConditionModel(
            **common,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, layers),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + POOLED_DIM,
        )
    else:
        unet = UNet2DConditionModel(
            **common,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=(2, 4) if family == "sd21" else 4,
            use_linear_projection=family == "sd21",
        )
    return trained_like(unet, 0).requires_grad_(False)


class Case:
    """A network, and requests of any P, M and B to it."""

    def __init__(self, family, unet=None, dtype=torch.float32, backend="aot_eager"):
        self.family, self.dtype = family, dtype
        self.unet = (small_unet(family) if unet is None else unet).to(dtype)
        self.program = UNetProgram(self.unet)
        self.program.inductor = Inductor(backend)

    def plans(self, **asked):
        """The same plan as it is and compiled."""
        return self.program.plan(**asked), self.program.plan(**asked).compile("inductor")

    def request(self, latents=2, texts=3, rows=5, size=(16, 16), **text):
        g = torch.Generator().manual_seed(latents + 10 * texts + 100 * rows)
        width = CROSS_ATTENTION_DIM[self.family]
        if self.family == "sdxl":
            text["pooled"] = torch.randn(texts, POOLED_DIM, generator=g).to(self.dtype)
        return {
            "latents": torch.randn(latents, 4, *size, generator=g).to(self.dtype),
            "timesteps": torch.randint(0, 1000, (latents,), generator=g),
            "states": torch.randn(texts, TOKENS, width, generator=g).to(self.dtype),
            "text": text,
            "latent_index": torch.randint(latents, (rows,), generator=g),
            "text_index": torch.randint(texts, (rows,), generator=g),
            "time_ids": torch.randint(0, 64, (latents, 6), generator=g).float() if self.family == "sdxl" else None,
        }


def run(plan, request):
    request = dict(request)
    text = plan.encode_text(request.pop("states"), **request.pop("text"))
    return plan.run(request.pop("latents"), request.pop("timesteps"), text, **request)


def same(got, want, tolerance=TOLERANCE):
    got, want = dict(got.tensors()), dict(want.tensors())
    assert list(got) == list(want)
    for name, value in want.items():
        assert got[name].shape == value.shape
        assert float((got[name] - value).abs().max()) <= tolerance * float(value.abs().max()), name


def load_lora(pipe, folder, name, seed):
    file = save_tiny_lora("sd15", folder, seed=seed)
    pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
