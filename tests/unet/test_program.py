"""Every answer of the program against diffusers' own forward."""

import hashlib

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from dsd_fast.unet import TextKV, UNetProgram
from tests.tiny import CROSS_ATTENTION_DIM, FAMILIES, POOLED_DIM, SHAPES, tiny_unet, trained_like

TOLERANCE = 1e-5
TOKENS = 11


def close(got, want, tolerance=TOLERANCE):
    """Largest difference relative to the largest value."""
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= tolerance * float(want.abs().max())


class Case:
    """A network and random inputs: P latents, M texts, rows that mix them."""

    def __init__(self, family, size=(16, 16), latents=2, texts=3, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.unet, family = tiny_unet(family), SHAPES.get(family, (family,))[0]
        self.family = family
        self.unet.requires_grad_(False)
        self.program = UNetProgram(self.unet)
        self.latents = torch.randn(latents, 4, *size, generator=g)
        self.times = torch.tensor([17, 800, 431, 3][:latents])
        self.states = torch.randn(texts, TOKENS, CROSS_ATTENTION_DIM[family], generator=g)
        self.pooled = torch.randn(texts, POOLED_DIM, generator=g) if family == "sdxl" else None
        self.ids = torch.randint(0, 64, (latents, 6), generator=g).float() if family == "sdxl" else None
        width = self.unet.config.time_cond_proj_dim
        self.guidance = None if width is None else torch.randn(latents, width, generator=g)
        self.latent_index = torch.tensor([0, 1, 1, 0, 1])
        self.text_index = torch.tensor([2, 0, 1, 1, 2])

    def diffusers(self, **kwargs):
        """Row by row expanded, through UNet2DConditionModel.forward."""
        added = None
        if self.family == "sdxl":
            added = {"text_embeds": self.pooled[self.text_index], "time_ids": self.ids[self.latent_index]}
        return self.unet(
            self.latents[self.latent_index],
            self.times[self.latent_index],
            self.states[self.text_index],
            timestep_cond=None if self.guidance is None else self.guidance[self.latent_index],
            added_cond_kwargs=added,
            **kwargs,
        ).sample

    def run(self, plan, **kwargs):
        text = plan.encode_text(self.states, pooled=self.pooled)
        return plan.run(
            self.latents,
            self.times,
            text,
            latent_index=self.latent_index,
            text_index=self.text_index,
            timestep_cond=self.guidance,
            time_ids=self.ids,
            **kwargs,
        )


@pytest.fixture(params=FAMILIES)
def case(request):
    return Case(request.param)


def hooked(unet, call):
    """Every layer id's value, read by hooks on diffusers' own modules while ``call`` runs."""
    values, handles = {}, []

    def keep(name, module, inputs=False):
        def hook(module, args, output):
            values[name] = args[0] if inputs else output[0] if isinstance(output, tuple) else output

        handles.append(module.register_forward_hook(hook))

    keep("unet-in", unet.conv_in, inputs=True)
    keep("unet-after-conv-in", unet.conv_in)
    keep("unet-out", unet.conv_out)

    def unit(prefix, resnet, vit):
        keep(f"{prefix}-res-increment", resnet.conv2)
        keep(f"{prefix}-res-out", resnet)
        if vit is not None:
            transformer(f"{prefix}-vit", vit)

    def transformer(prefix, vit):
        keep(f"{prefix}-out", vit)
        for k, block in enumerate(vit.transformer_blocks):
            b = f"{prefix}-block{k}"
            keep(f"{b}-out", block)
            for name in "qkv":
                keep(f"{b}-self-{name}", getattr(block.attn1, f"to_{name}"))
            keep(f"{b}-cross-q", block.attn2.to_q)
            keep(f"{b}-cross-k", block.attn2.to_k)
            keep(f"{b}-ffn-inner", block.ff.net[0])

    for part, stages in (("down", unet.down_blocks), ("up", unet.up_blocks)):
        for level, block in enumerate(stages):
            vits = getattr(block, "attentions", None) or [None] * len(block.resnets)
            for repeat, (resnet, vit) in enumerate(zip(block.resnets, vits, strict=True)):
                unit(f"{part}-level{level}-repeat{repeat}", resnet, vit)
            for module in getattr(block, "downsamplers", None) or ():
                keep(f"down-level{level}-downsampler-out", module)
            for module in getattr(block, "upsamplers", None) or ():
                keep(f"up-level{level}-upsampler-out", module)
    if unet.mid_block is not None:
        for repeat, resnet in enumerate(unet.mid_block.resnets):
            unit(f"mid-repeat{repeat}", resnet, None)
        for vit in unet.mid_block.attentions:
            transformer("mid-vit", vit)
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return values


def logits(values, block, kind, attention):
    q, k = values[f"{block}-{kind}-q"], values[f"{block}-{kind}-k"]
    q, k = (x.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for x in (q, k))
    return q @ k.transpose(-1, -2) * attention.scale


@pytest.mark.parametrize(
    ("family", "size"),
    [(family, size) for family in FAMILIES for size in ((16, 16), (13, 11), (9, 24))]
    + [(shape, (16, 16)) for shape in SHAPES]
    + [("tiny-sd", (13, 11)), ("ssd-1b", (9, 24))],
    ids=str,
)
@pytest.mark.newest
def test_every_layer_score_and_the_output_equal_diffusers(family, size):
    case = Case(family, size)
    values = hooked(case.unet, case.diffusers)
    program = case.program
    plan = program.plan(features=program.layer_ids, scores=program.score_ids, noise_pred=True)
    out = case.run(plan)
    assert list(out.features) == list(program.layer_ids)
    for name in program.layer_ids:
        got = out.features[name]
        if name.endswith("-map"):
            block, kind = name.removesuffix("-map").rsplit("-", 1)
            module = program.attention(f"{block}-cross")
            want = torch.softmax(logits(values, block, kind, module), -1)
        else:
            want = values[name]
            if want.ndim == 3:
                want = want.transpose(1, 2).unflatten(-1, got.shape[-2:])
        close(got, want)
    for name in program.score_ids:
        want = torch.logsumexp(logits(values, name.removesuffix("-cross"), "cross", program.attention(name)), -1).mean(
            -1
        )
        close(out.scores[name], want)
        assert out.scores[name].dtype == torch.float32
    close(out.noise_pred, values["unet-out"])


def test_ids_of_the_reference_grammar():
    """197 on SD 1.5 and 612 on SDXL, as the official configuration files list them."""
    sd15 = UNetProgram(tiny_unet("sd15"))
    assert len(sd15.layer_ids) == 197
    assert len(sd15.score_ids) == 16
    assert sd15.layer_ids[:3] == ("unet-in", "unet-after-conv-in", "down-level0-repeat0-res-increment")
    sdxl = UNet2DConditionModel(
        block_out_channels=(32, 32, 32),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )
    program = UNetProgram(sdxl)
    assert len(program.layer_ids) == 612
    assert len(program.score_ids) == 70


def test_each_layer_alone_equals_the_same_layer_among_all(case):
    program = case.program
    everything = case.run(program.plan(features=program.layer_ids, scores=program.score_ids))
    for name in program.layer_ids[:: 7 if case.family == "sdxl" else 3]:
        torch.testing.assert_close(
            case.run(program.plan(features=[name])).features[name], everything.features[name], rtol=0, atol=0
        )
    for name in program.score_ids[::2]:
        close(case.run(program.plan(scores=[name])).scores[name], everything.scores[name])


def test_a_row_alone_equals_the_row_in_a_batch(case):
    plan = case.program.plan(scores=case.program.score_ids[-1:], noise_pred=True)
    together = case.run(plan)
    text = plan.encode_text(case.states, pooled=case.pooled)
    for row, (p, m) in enumerate(zip(case.latent_index.tolist(), case.text_index.tolist(), strict=True)):
        alone = plan.run(
            case.latents[p : p + 1],
            case.times[p : p + 1],
            text[m : m + 1],
            time_ids=None if case.ids is None else case.ids[p],
        )
        close(alone.noise_pred[0], together.noise_pred[row])
        close(alone.scores[case.program.score_ids[-1]][0], together.scores[case.program.score_ids[-1]][row])


def test_without_indices_row_latent_and_text_go_together(case):
    plan = case.program.plan(noise_pred=True)
    case.latent_index = torch.arange(2)
    case.text_index = torch.tensor([0, 1])
    text = plan.encode_text(case.states[:2], pooled=None if case.pooled is None else case.pooled[:2])
    got = plan.run(case.latents, case.times, text, time_ids=case.ids)
    close(got.noise_pred, case.diffusers())


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.newest
def test_controlnet_residuals_are_those_of_diffusers(family):
    case = Case(family)
    net = trained_like(ControlNetModel.from_unet(case.unet, conditioning_embedding_out_channels=(8, 16)), 5)
    image = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    added = None
    if family == "sdxl":
        added = {"text_embeds": case.pooled[case.text_index], "time_ids": case.ids[case.latent_index]}
    with torch.no_grad():
        down, mid = net(
            case.latents[case.latent_index],
            case.times[case.latent_index],
            case.states[case.text_index],
            image,
            added_cond_kwargs=added,
            return_dict=False,
        )
    want = case.diffusers(down_block_additional_residuals=list(down), mid_block_additional_residual=mid)
    plan = case.program.plan(noise_pred=True)
    got = case.run(plan, residuals=(list(down), mid))
    close(got.noise_pred, want)
    assert float((want - case.diffusers()).abs().max()) > 1e-2


def test_masks_weights_and_lengths_equal_the_texts_written_out():
    case = Case("sd15")
    plan = case.program.plan(scores=case.program.score_ids, noise_pred=True)
    lengths = [5, TOKENS, 1]
    got = plan.run(
        case.latents,
        case.times,
        plan.encode_text(case.states, lengths=lengths),
        latent_index=case.latent_index,
        text_index=case.text_index,
    )
    mask = torch.arange(TOKENS) < torch.tensor(lengths)[:, None]
    want = case.diffusers(encoder_attention_mask=mask[case.text_index])
    close(got.noise_pred, want)
    bias = torch.zeros(3, TOKENS).masked_fill(~mask, float("-inf"))
    biased = plan.run(
        case.latents,
        case.times,
        plan.encode_text(case.states, key_bias=bias),
        latent_index=case.latent_index,
        text_index=case.text_index,
    )
    for (_, a), (_, b) in zip(got.tensors(), biased.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    scored = plan.run(
        case.latents,
        case.times,
        plan.encode_text(case.states, score_mask=mask),
        latent_index=case.latent_index,
        text_index=case.text_index,
    )
    close(scored.noise_pred, case.diffusers())
    first = case.program.score_ids[0]
    close(scored.scores[first], got.scores[first])


def test_gradients_of_texts_latents_and_weights_are_those_of_diffusers(case):
    case.unet.double().requires_grad_(True)
    case.latents, case.states = case.latents.double().requires_grad_(), case.states.double().requires_grad_()
    case.pooled = None if case.pooled is None else case.pooled.double()
    leaves = {"latents": case.latents, "states": case.states} | dict(case.unet.named_parameters())
    weight = torch.randn(5, 4, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    want = torch.autograd.grad((case.diffusers() * weight).sum(), leaves.values())
    got = torch.autograd.grad((case.run(case.program.plan(noise_pred=True)).noise_pred * weight).sum(), leaves.values())
    scale = max(float(g.abs().max()) for g in want)
    for name, a, b in zip(leaves, got, want, strict=True):
        # Float64, so that only a wrong formula can differ; keys that softmax cancels have gradients near zero.
        assert float((a - b).abs().max()) <= 1e-12 * scale, name


@pytest.mark.newest
def test_gradients_flow_through_scores():
    case = Case("sd15")
    case.states.requires_grad_()
    name = case.program.score_ids[3]
    values = {}
    handle = [
        module.register_forward_hook(lambda m, a, o, key=key: values.__setitem__(key, o))
        for key, module in (("q", case.program.attention(name).to_q), ("k", case.program.attention(name).to_k))
    ]
    case.diffusers()
    for h in handle:
        h.remove()
    q, k = (x.unflatten(-1, (4, -1)).transpose(1, 2) for x in (values["q"], values["k"]))
    lse = torch.logsumexp(q @ k.transpose(-1, -2) * case.program.attention(name).scale, -1).mean((1, 2))
    want = torch.autograd.grad(lse.square().sum(), case.states)[0]
    got = case.run(case.program.plan(scores=[name])).scores[name].mean(1)
    close(torch.autograd.grad(got.square().sum(), case.states)[0], want, 2e-5)


def test_pooling_of_scores():
    case = Case("sd15")
    name = case.program.score_ids[2]
    values = hooked(case.unet, case.diffusers)
    lse = torch.logsumexp(logits(values, name.removesuffix("-cross"), "cross", case.program.attention(name)), -1)
    positions = torch.tensor(float(lse.shape[-1]))
    for pool, want in (
        ("mean", lse.mean(-1)),
        ("max", lse.amax(-1)),
        (0.5, 0.5 * (torch.logsumexp(lse / 0.5, -1) - positions.log())),
    ):
        close(case.run(case.program.plan(scores=[name], pool=pool)).scores[name], want)


def test_maps_of_chosen_tokens():
    case = Case("sd15")
    name = case.program.score_ids[4]
    plan = case.program.plan(maps=[name], features=[f"{name}-map"])
    tokens = torch.tensor([[0, 3], [1, 1], [2, 10], [4, 5], [9, 0]])
    out = case.run(plan, map_tokens=tokens)
    whole = out.features[f"{name}-map"].mean(1)
    want = whole.gather(-1, tokens[:, None, :].expand(-1, whole.shape[1], -1)).transpose(1, 2)
    close(out.maps[name].flatten(2), want)


@pytest.mark.parametrize("last", [True, False], ids=["last", "on"])
def test_maps_of_self_attentions_are_the_mean_of_whole_maps(case, last):
    # The first is computed once per latent, before the text; the other once per row.
    first = next(name for name in case.program.map_ids if name.endswith("-self"))
    later = [name for name in case.program.map_ids if name.endswith("-self")][-1]
    plan = case.program.plan(
        maps=[first, later], features=[f"{name}-map" for name in (first, later)], noise_pred=not last
    )
    out = case.run(plan)
    for name in (first, later):
        whole = out.features[f"{name}-map"].mean(1).transpose(1, 2)
        assert out.maps[name].shape[:2] == whole.shape[:2]
        close(out.maps[name].flatten(2), whole)
    height, width = case.latents.shape[-2:]
    filled = case.run(plan, out=plan.empty_output(5, height, width, tokens=TOKENS))
    assert all(torch.equal(filled.maps[name], out.maps[name]) for name in out.maps)
    if last:
        assert plan.steps[-1].name == later
    else:
        close(out.noise_pred, case.diffusers())


def test_float64_and_bfloat16_networks():
    case = Case("sd15")
    case.unet.double()
    case.latents, case.states = case.latents.double(), case.states.double()
    plan = case.program.plan(scores=case.program.score_ids[:1], noise_pred=True)
    exact = case.run(plan)
    close(exact.noise_pred, case.diffusers(), 1e-13)
    assert exact.scores[case.program.score_ids[0]].dtype == torch.float64
    case.unet.to(torch.bfloat16)
    case.latents, case.states = case.latents.bfloat16(), case.states.bfloat16()
    ours = float((case.run(plan).noise_pred.double() - exact.noise_pred).abs().max())
    theirs = float((case.diffusers().double() - exact.noise_pred).abs().max())
    assert ours <= 2 * theirs


def test_a_plan_without_text_dependence_needs_no_text():
    case = Case("sd15")
    plan = case.program.plan(features=["down-level0-repeat0-vit-block0-cross-q"])
    assert plan.boundary == len(plan.steps)
    got = plan.run(case.latents, case.times, None, latent_index=[1, 0, 1])
    assert got.features["down-level0-repeat0-vit-block0-cross-q"].shape == (3, 16, 16, 16)


def test_the_network_is_left_as_it_was(case):
    def state():
        digest = hashlib.sha256()
        for name, value in sorted(case.unet.state_dict().items()):
            digest.update(name.encode() + value.numpy().tobytes())
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in case.unet.modules()]
        return digest.hexdigest(), hooks, [id(p) for p in case.unet.attn_processors.values()], case.unet.training

    before = state()
    case.run(case.program.plan(features=case.program.layer_ids, noise_pred=True))
    assert state() == before


def test_output_is_filled_in_place():
    case = Case("sd15")
    plan = case.program.plan(
        features=["mid-vit-out", "unet-out"],
        scores=case.program.score_ids[:2],
        maps=case.program.score_ids[:1],
        noise_pred=True,
    )
    want = case.run(plan, map_tokens=[1, 2])
    out = plan.empty_output(5, 16, 16, tokens=TOKENS, map_tokens=2)
    assert case.run(plan, map_tokens=[1, 2], out=out) is out
    for (a, got), (b, true) in zip(out.tensors(), want.tensors(), strict=True):
        assert a == b
        torch.testing.assert_close(got, true, rtol=0, atol=0)


def test_texts_slice_and_concatenate():
    case = Case("sd15")
    plan = case.program.plan(noise_pred=True)
    text = plan.encode_text(case.states, lengths=[3, 4, 5], score_mask=torch.ones(3, TOKENS, dtype=torch.bool))
    assert len(text) == 3
    assert text.nbytes > 0
    joined = TextKV.concat([text[2:], text[[1]], text[:1]])
    assert joined.lengths.tolist() == [5, 4, 3]
    for name in plan.key_layers:
        torch.testing.assert_close(joined.k[name], text.k[name].flip(0), rtol=0, atol=0)
    other = case.program.plan(scores=case.program.score_ids[:1]).encode_text(case.states)
    with pytest.raises(ValueError, match="different layers"):
        TextKV.concat([text, other])
    with pytest.raises(ValueError, match="lengths is given for some"):
        TextKV.concat([text, plan.encode_text(case.states)])
    further = case.program.plan(features=["down-level0-repeat0-vit-block0-ffn-inner"])
    for asked in (plan, further):
        with pytest.raises(ValueError, match="encoded by a plan that does not run"):
            asked.run(case.latents, case.times, other, latent_index=[0], text_index=[0])


def test_scales_that_published_models_leave_at_one():
    """The settings of a network that divide, centre or pad."""
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=[24, 24],
        attention_head_dim=4,
        norm_num_groups=8,
        center_input_sample=True,
        downsample_padding=0,
        mid_block_scale_factor=1.7,
    )
    trained_like(unet, 0)
    for block in (*unet.down_blocks, *unet.up_blocks):
        for resnet in block.resnets:
            resnet.output_scale_factor = 1.3
        for vit in getattr(block, "attentions", ()):
            vit.transformer_blocks[0].attn2.rescale_output_factor = 0.8
    g = torch.Generator().manual_seed(0)
    latents, states = torch.randn(2, 4, 16, 16, generator=g), torch.randn(2, TOKENS, 24, generator=g)
    with torch.no_grad():
        plan = UNetProgram(unet).plan(noise_pred=True)
        close(plan.run(latents, 9, plan.encode_text(states)).noise_pred, unet(latents, 9, states).sample)


def test_maps_heed_masks_weights_and_lengths():
    case = Case("sd15")
    name = case.program.score_ids[4]
    plan = case.program.plan(maps=[name], features=[f"{name}-map"])
    g = torch.Generator().manual_seed(2)
    bias, lengths = torch.randn(3, TOKENS, generator=g), [5, TOKENS, 8]
    text = plan.encode_text(case.states, key_bias=bias, lengths=lengths)
    index = {"latent_index": case.latent_index, "text_index": case.text_index}
    out = plan.run(case.latents, case.times, text, map_tokens=[0, 4], **index)
    k = text.k[name][case.text_index].unflatten(-1, (4, -1)).transpose(1, 2)
    beyond = torch.arange(TOKENS) >= torch.tensor(lengths)[:, None]
    added = bias.masked_fill(beyond, float("-inf"))[case.text_index][:, None, None]
    # Masked texts change what comes before this layer too, so its queries are read under the same texts.
    again = case.program.plan(features=[f"{name}-q"])
    text_again = again.encode_text(case.states, key_bias=bias, lengths=lengths)
    q = again.run(case.latents, case.times, text_again, **index).features[f"{name}-q"]
    q = q.flatten(2).transpose(1, 2).unflatten(-1, (4, -1)).transpose(1, 2)
    want = torch.softmax(q @ k.transpose(-1, -2) * case.program.attention(name).scale + added, -1)
    close(out.features[f"{name}-map"], want)
    close(out.maps[name].flatten(2), want.mean(1)[..., [0, 4]].transpose(1, 2))


def test_slices_carry_all_that_belongs_to_a_text():
    case = Case("sdxl")
    g = torch.Generator().manual_seed(2)
    plan = case.program.plan(scores=case.program.score_ids[:1])
    given = {
        "pooled": case.pooled,
        "key_bias": torch.randn(3, TOKENS, generator=g),
        "score_mask": torch.rand(3, TOKENS, generator=g) > 0.5,
        "lengths": torch.tensor([3, 4, 5]),
    }
    text = plan.encode_text(case.states, **given)
    for part in (TextKV.concat([text[2:], text[[1]], text[:1]]), text[torch.tensor([2, 1, 0])]):
        for name, value in given.items():
            torch.testing.assert_close(getattr(part, name), value.flip(0), rtol=0, atol=0)
    with pytest.raises(TypeError, match="slice or a list"):
        text[0]


def test_a_row_without_keys_gives_no_gradient_under_any_pooling():
    for pool in ("mean", "max", 0.5):
        case = Case("sd15")
        case.states.requires_grad_()
        plan = case.program.plan(scores=["down-level0-repeat0-vit-block0-cross"], pool=pool)
        bias = torch.zeros(3, TOKENS)
        bias[0] = float("-inf")
        text = plan.encode_text(case.states, key_bias=bias)
        score = plan.run(case.latents, 5, text, latent_index=[0, 1], text_index=[0, 1]).scores[plan.scores[0]]
        assert (score[0] == float("-inf")).all()
        grad = torch.autograd.grad(score[1].sum(), case.states)[0]
        assert grad.isfinite().all()
        assert not grad[0].any()
        assert grad[1].any()
