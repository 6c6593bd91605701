"""The exact savings, by counting what ran.

Rows are counted by hooks on the leaf modules that the program calls, FLOPs against diffusers' own forward and a hand
count. Each test also shows that it would notice the saving's absence.
"""

from collections import Counter

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch.utils.flop_counter import FlopCounterMode

from dsd_fast.unet import Plan, UNetProgram, execution
from dsd_fast.unet.stream import HEADROOM
from tests.memory import allocations
from tests.tiny import CROSS_ATTENTION_DIM, FAMILIES, POOLED_DIM, load_tiny_lora, tiny_pipeline, tiny_unet

SIZE, TOKENS = (16, 16), 77


def count_rows(unet, call):
    """Module path → rows that went through it, for convolutions and linear layers."""
    rows, handles = Counter(), []
    for path, module in unet.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            handles.append(
                module.register_forward_hook(lambda m, args, out, path=path: rows.update({path: len(args[0])}))
            )
    try:
        with torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    return rows


def request(family, latents, texts):
    g = torch.Generator().manual_seed(0)
    pooled = torch.randn(texts, POOLED_DIM, generator=g) if family == "sdxl" else None
    ids = torch.zeros(6) if family == "sdxl" else None
    return (
        torch.randn(latents, 4, *SIZE, generator=g),
        torch.randn(texts, TOKENS, CROSS_ATTENTION_DIM[family], generator=g),
        pooled,
        ids,
    )


def all_pairs(plan, family, latents, texts):
    z, states, pooled, ids = request(family, latents, texts)
    text = plan.encode_text(states, pooled=pooled)
    p, m = torch.meshgrid(torch.arange(latents), torch.arange(texts), indexing="ij")
    tokens = [0, 5] if plan.maps else None
    return plan.run(z, 500, text, latent_index=p.flatten(), text_index=m.flatten(), time_ids=ids, map_tokens=tokens)


# The layers that run before the first one that reads the text, by family: for SD 1.x and 2.x all up to the query of
# the first cross-attention, for SDXL, whose pooled text enters the time embedding, two convolutions.
FIRST = "down_blocks.0.attentions.0"
SHARED = {
    "sd15": [
        "conv_in",
        "down_blocks.0.resnets.0.conv1",
        "down_blocks.0.resnets.0.conv2",
        f"{FIRST}.proj_in",
        f"{FIRST}.transformer_blocks.0.attn1.to_q",
        f"{FIRST}.transformer_blocks.0.attn1.to_k",
        f"{FIRST}.transformer_blocks.0.attn1.to_v",
        f"{FIRST}.transformer_blocks.0.attn1.to_out.0",
        f"{FIRST}.transformer_blocks.0.attn2.to_q",
    ],
    "sdxl": ["conv_in", "down_blocks.0.resnets.0.conv1"],
}
SHARED["sd21"] = SHARED["sd15"]


def check_sharing(family):
    unet = tiny_unet(family)
    plan = UNetProgram(unet).plan(noise_pred=True)
    rows = count_rows(unet, lambda: all_pairs(plan, family, 2, 3))
    image = {k: v for k, v in rows.items() if "attn2.to_k" not in k and "attn2.to_v" not in k}
    network = {k: v for k, v in image.items() if "time_emb" not in k and "add_embedding" not in k}
    assert {k for k, v in network.items() if v == 2} == set(SHARED[family])
    assert {v for k, v in network.items() if k not in SHARED[family]} == {6}
    # The time embedding is made once per latent, and projected per row only where it reads the text.
    assert {v for k, v in image.items() if k.startswith("time_embedding")} == {2}
    assert {v for k, v in image.items() if "time_emb_proj" in k} == ({6} if family == "sdxl" else {2})


@pytest.mark.parametrize("family", FAMILIES)
def test_what_does_not_read_the_text_runs_once_per_latent(family):
    check_sharing(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_repeated_before_the_first_step_would_be_noticed(family, monkeypatch):
    start = execution.start

    def repeated_at_once(*args):
        state = start(*args)
        state.expand()
        return state

    monkeypatch.setattr(execution, "start", repeated_at_once)
    with pytest.raises(AssertionError):
        check_sharing(family)


def check_text_keys(family):
    unet = tiny_unet(family)
    plan = UNetProgram(unet).plan(noise_pred=True)
    rows = count_rows(unet, lambda: all_pairs(plan, family, 4, 3))
    projected = {k: v for k, v in rows.items() if "attn2.to_k" in k or "attn2.to_v" in k}
    assert len(projected) == 2 * len(plan.program.score_ids)
    assert set(projected.values()) == {3}


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_values_are_projected_once_per_text(family):
    check_text_keys(family)


def test_keys_projected_again_would_be_noticed(monkeypatch):
    run = Plan.run

    def projects_again(self, *args, **kwargs):
        self.encode_text(request("sd15", 1, 3)[1])
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Plan, "run", projects_again)
    with pytest.raises(AssertionError):
        check_text_keys("sd15")


def check_batching(family, budget=None):
    """All rows of a request that fits go through the network in one call of each module."""
    unet = tiny_unet(family)
    plan = UNetProgram(unet).plan(noise_pred=True)
    z, states, pooled, ids = request(family, 4, 3)
    with torch.no_grad():
        text = plan.encode_text(states, pooled=pooled)
    index = torch.arange(4).repeat_interleave(3)
    options = {"latent_index": index, "text_index": torch.arange(3).repeat(4), "time_ids": ids}
    if budget:
        options["memory_budget"] = text.nbytes + HEADROOM["cpu"] * plan.run_bytes(budget, *SIZE, TOKENS)
    calls = Counter()
    handle = unet.conv_out.register_forward_hook(lambda m, args, out: calls.update([len(args[0])]))
    list(plan.stream(z, 500, text, **options))
    handle.remove()
    assert calls == {12: 1}


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_all_latents_and_texts_are_one_batch(family):
    check_batching(family)


def test_rows_in_smaller_batches_would_be_noticed():
    with pytest.raises(AssertionError):
        check_batching("sd15", budget=5)


def check_early_stop(family):
    unet = tiny_unet(family)
    program = UNetProgram(unet)
    order = list(count_rows(unet, lambda: all_pairs(program.plan(noise_pred=True), family, 1, 1)))
    for name, last in {
        "unet-after-conv-in": "conv_in",
        "mid-repeat0-res-increment": "mid_block.resnets.0.conv2",
        "mid-vit-block0-self-q": "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
        "up-level1-repeat1-vit-block0-cross-q": "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_q",
        "up-level1-upsampler-out": "up_blocks.1.upsamplers.0.conv",
        "unet-out": "conv_out",
    }.items():
        ran = count_rows(unet, lambda name=name: all_pairs(program.plan(features=[name]), family, 1, 1))
        keys = [k for k in order if "attn2.to_k" in k or "attn2.to_v" in k]
        path = [k for k in order if k not in keys and not k.startswith(("time_embedding", "add_embedding"))]
        done = [k for k in ran if k not in keys and not k.startswith(("time_embedding", "add_embedding"))]
        assert done == path[: path.index(last) + 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_after_the_last_tap_runs(family):
    check_early_stop(family)


def test_steps_after_the_last_tap_would_be_noticed(monkeypatch):
    plan = UNetProgram.plan
    monkeypatch.setattr(UNetProgram, "plan", lambda self, **kwargs: plan(self, **(kwargs | {"noise_pred": True})))
    with pytest.raises(AssertionError):
        check_early_stop("sd15")


def test_the_last_score_needs_no_values_and_no_projection():
    unet = tiny_unet("sd15")
    program = UNetProgram(unet)
    name = "mid-vit-block0-cross"
    ran = count_rows(unet, lambda: all_pairs(program.plan(scores=[name]), "sd15", 1, 1))
    block = "mid_block.attentions.0.transformer_blocks.0"
    assert f"{block}.attn2.to_k" in ran
    assert not {f"{block}.attn2.to_v", f"{block}.attn2.to_out.0", f"{block}.ff.net.2"} & set(ran)
    assert f"{block}.attn2.to_v" in count_rows(
        unet, lambda: all_pairs(program.plan(scores=[name], features=["mid-vit-out"]), "sd15", 1, 1)
    )


def test_skip_connections_that_no_step_uses_are_not_kept():
    program = UNetProgram(tiny_unet("sd15"))
    pushes = sum(1 for step in program.steps if step.pushes)
    assert len(program.plan(noise_pred=True).kept_skips) == pushes == 12
    assert program.plan(features=["mid-vit-out"]).kept_skips == frozenset()
    assert program.plan(features=["up-level0-upsampler-out"]).kept_skips == frozenset({9, 10, 11})


def test_scoring_allocates_nothing_of_size_heads_positions_tokens():
    unet = tiny_unet("sd15")
    program = UNetProgram(unet)
    plan = program.plan(scores=program.score_ids, noise_pred=True)
    text = plan.encode_text(torch.zeros(1, TOKENS, CROSS_ATTENTION_DIM["sd15"]))
    z = torch.zeros(1, 4, 72, 72)
    whole = 4 * 72 * 72 * TOKENS * 4
    with torch.no_grad():
        assert max(allocations(lambda: plan.run(z, 0, text))) < whole
    with_map = program.plan(features=["down-level0-repeat0-vit-block0-cross-map"])
    with torch.no_grad():
        assert max(allocations(lambda: with_map.run(z, 0, text))) >= whole


def counted(unet, family, rows):
    """FLOPs of diffusers' forward with materialised attention, which torch's counter sees whole."""
    unet.set_attn_processor(AttnProcessor())
    z, states, pooled, ids = request(family, rows, rows)
    added = {"text_embeds": pooled, "time_ids": ids.expand(rows, 6)} if family == "sdxl" else None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(z, 500, states, added_cond_kwargs=added)
    return counter.get_total_flops()


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_of_the_whole_equal_the_count_of_diffusers(family):
    unet = tiny_unet(family)
    plan = UNetProgram(unet).plan(noise_pred=True)
    size = {"height": SIZE[0], "width": SIZE[1], "tokens": TOKENS}
    assert plan.flops(latents=3, texts=3, rows=3, **size) == counted(unet, family, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_of_shared_and_early_plans_are_what_runs(family):
    unet = tiny_unet(family)
    program = UNetProgram(unet)
    full = counted(unet, family, 1)
    for plan in (
        program.plan(noise_pred=True),
        program.plan(features=["up-level0-repeat1-res-increment", "mid-vit-block0-cross-map"]),
        program.plan(scores=program.score_ids[:3]),
        program.plan(features=["down-level1-repeat0-vit-block0-self-map"]),
        program.plan(maps=program.score_ids[:2]),
        program.plan(maps=["mid-vit-block0-self"]),
        program.plan(maps=["mid-vit-block0-self"], features=["up-level0-repeat0-res-out"]),
    ):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            all_pairs(plan, family, 2, 3)
        got = plan.flops(latents=2, texts=3, rows=6, height=SIZE[0], width=SIZE[1], tokens=TOKENS)
        assert got - unseen(plan, 2, 6) == counter.get_total_flops()
        assert got < 6 * full


def unseen(plan, latents, rows):
    """FLOPs of the CPU's fused self-attention, which torch's counter takes for none."""
    total = 0
    for index, step in enumerate(plan.steps):
        if step.name.endswith("-self") and not plan.wants[index].last:
            height, width = plan.program.sizes(*SIZE)[step.level]
            inner = plan.program.attention(step.name.replace("-self", "-cross")).inner_dim
            total += (latents if index < plan.boundary else rows) * 4 * (height * width) ** 2 * inner
    return total


def test_flops_of_a_first_block_by_hand():
    small = UNet2DConditionModel(
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=48,
        attention_head_dim=8,
    )
    plan = UNetProgram(small).plan(features=["down-level0-repeat0-res-out"])
    area = 16 * 16
    by_hand = 2 * area * 9 * (4 * 32 + 32 * 32 + 32 * 32)
    time = 2 * (32 * 128 + 128 * 128) + 2 * 128 * 32
    assert plan.flops(latents=1, texts=1, rows=5, height=16, width=16, tokens=77) == by_hand + time


def test_active_lora_counts(tmp_path):
    pipe = tiny_pipeline("sd15")
    plain = UNetProgram(pipe.unet).plan(noise_pred=True)
    size = {"latents": 1, "texts": 1, "rows": 1, "height": 16, "width": 16, "tokens": 77}
    before = plain.flops(**size)
    load_tiny_lora(pipe, "sd15", tmp_path, rank=2)
    program = UNetProgram(pipe.unet)
    adapted = program.plan(noise_pred=True)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        all_pairs(adapted, "sd15", 1, 1)
    assert adapted.flops(**size) - unseen(adapted, 1, 1) == counter.get_total_flops()
    assert adapted.flops(**size) > before
    assert program.plan(noise_pred=True, adapter=()).flops(**size) == before
