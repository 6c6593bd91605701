"""What the tests of the attention operators share: both written out in plain torch, and problems of every kind."""

import torch

INF = float("inf")


def written_out(q, k, v, *, heads, index=None, length=None, bias=None, mask=None, scale=None, mean=False):
    """Materialised attention in plain torch: the truth when the inputs are float64."""
    b, positions, width = q.shape
    index = torch.arange(b, device=q.device) if index is None else index
    d = width // heads
    s, v = _logits(q, k, v, heads, index, length, bias, d**-0.5 if scale is None else scale)
    seen = s if mask is None else s.masked_fill(~mask[index][:, None, None, :], -INF)
    lse = torch.logsumexp(seen, -1)
    score = (lse.mean(-1) if positions else lse.sum(-1)) if mean else lse
    if v is None:
        return None, score
    # A row without keys has output 0 where softmax has NaN.
    p = torch.where((s == -INF).all(-1, keepdim=True), torch.zeros_like(s), torch.softmax(s, -1))
    return (p @ v).transpose(1, 2).reshape(b, positions, width), score


def maps_written_out(q, k, tokens, index, length, bias, *, heads, scale):
    """Token maps in plain torch."""
    s, _ = _logits(q, k, None, heads, index, length, bias, scale)
    p = torch.where((s == -INF).all(-1, keepdim=True), torch.zeros_like(s), torch.softmax(s, -1)).mean(1)
    return p.gather(-1, tokens[:, None, :].expand(-1, q.shape[1], -1)).transpose(1, 2)


def _logits(q, k, v, heads, index, length, bias, scale):
    k, v = (None if x is None else x[index] for x in (k, v))
    b, tokens, width = k.shape
    d = width // heads
    add = torch.zeros(b, tokens, dtype=q.dtype, device=q.device) if bias is None else bias[index].to(q.dtype)
    if length is not None:
        add = add.masked_fill(torch.arange(tokens, device=q.device) >= length[index][:, None], -INF)
    q, k, v = (None if x is None else x.reshape(b, x.shape[1], heads, d).transpose(1, 2) for x in (q, k, v))
    hidden = (add == -INF)[:, None, :, None]
    k, v = (None if x is None else torch.where(hidden, torch.zeros_like(x), x) for x in (k, v))
    return q @ k.transpose(-1, -2) * scale + add[:, None, None, :], v


def largest_logit(q, k, bias, heads, scale):
    """The largest |S| of any query and any key that counts."""
    if not q.numel() or not k.numel():
        return 0.0
    q, k = (x.double().unflatten(2, (heads, -1)) for x in (q, k))
    s = torch.einsum("blhd,mthd->blhmt", q, k).abs() * abs(q.shape[-1] ** -0.5 if scale is None else scale)
    return float(s.max()) + (0.0 if bias is None else float(bias[bias > -INF].abs().max()))


def draw(g, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def options(
    g, rows, positions, texts, tokens, heads, width, *, index=True, output=True, mean=False, masked=False,
    limited=False, biased=False, scale=None, dtype=torch.float32,
):  # fmt: skip
    """Leaves q, k, v, bias (None where not chosen) and the other arguments of :func:`attend`."""
    c = heads * width
    q, k, v = draw(g, rows, positions, c, dtype=dtype), draw(g, texts, tokens, c, dtype=dtype), None
    if output:
        v = draw(g, texts, tokens, c, dtype=dtype)
    bias = None
    if biased:
        bias = draw(g, texts, tokens)
        bias[:, tokens // 2 :: 5] = -INF
    length = torch.randint(1, tokens + 1, (texts,), generator=g) if limited and tokens else None
    mask = torch.rand(texts, tokens, generator=g) > 0.4 if masked else None
    if mask is not None:
        mask[:, 0] = True
    chosen = torch.randint(texts, (rows,), generator=g) if index else None
    rest = {"heads": heads, "index": chosen, "length": length, "mask": mask, "scale": scale, "mean": mean}
    return [q, k, v, bias], rest


def attend(operator, q, k, v, bias, *, index, length, mask, **rest):
    """The operator, or :func:`written_out`, on what :func:`options` gives; the results that there are."""
    if operator is written_out:
        result = written_out(q, k, v, index=index, length=length, bias=bias, mask=mask, **rest)
    else:
        result = operator(q, k, v, text_index=index, text_length=length, key_bias=bias, score_mask=mask, **rest)
    return tuple(x for x in result if x is not None)


def gradients(call, leaves, seed):
    """The results of ``call`` and, of a random combination of them, the gradients of the leaves, in order."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in leaves]
    results = call(*leaves)
    g = torch.Generator().manual_seed(seed)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x) for x in results]
    loss = sum((w * x.masked_fill(x.isinf(), 0.0)).sum() for w, x in zip(weights, results, strict=True))
    grads = torch.autograd.grad(loss, [x for x in leaves if x is not None], allow_unused=True)
    return [x.detach() for x in results] + [torch.zeros(()) if x is None else x for x in grads]
