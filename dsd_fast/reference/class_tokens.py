"""Discriminative class tokens the official way (Schwartz et al. 2023, run.py of idansc/discriminative_class_tokens).

A token S* is learned for a class c of a classifier f. An update makes n images x_k of texts such as "A photo of S* c",
each from its own first noise, which is the same in every update, by the scheduler's steps with guidance:

    loss_k = −log softmax(f(x_k))_c,    ∂/∂S* of their mean, through the last K calls of the network alone

As in the official code an image costs a call of 1 row of the text encoder for its text and one for the empty text, 31
calls of 2 rows of the UNet where PNDM takes 30 steps, and one of the VAE's decoder; the UNet is called K times more in
the backward pass (`torch.utils.checkpoint`), and n images are made one after another. The gradient is that of the whole
table of the text encoder's input embeddings, zeroed but for the token's row, and AdamW goes over the whole table.
``batch_size=n, checkpointing=False`` makes an update's images side by side, the most that a user of the stock pipeline
has without writing an engine.

Deviations: texts are padded to the encoder's limit as wherever a pipeline reads them, not to their own length
(``padded=False``); other rows of the table stay as they are, where official AdamW decays them all
(``decay_vocabulary=True``); patience begins as given, and a bad update does not change the noise (``collapse=True``); a
latent is scaled as the scheduler asks, which PNDM does not; the order of the texts comes from (seed, update), the
noise from (seed, image). The networks keep their type: there is no mixed precision. Gradients are not clipped: the
official code clips what an update's earlier images have left, before it adds an image's own (``clip_before=1``; by its
float16 gradients are 65536 times as large then, which leaves next to nothing of all images but the last).

Letters: n images of an update, v vectors of the token, V rows of the table, E its width, C channels.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dsd_fast.reference.inputs import draw_noise, latent_shape, seeded, states_loss, tokenize, widened

__all__ = ["TEMPLATES", "Learned", "backward", "images", "learn", "new_optimizer", "noise_loss", "update", "with_token"]

TEMPLATES = ("A photo of {}", "a high resolution realistic image of {}", "A close-up photo of a {}")

Classifier = Callable[[Tensor], Tensor]


class Learned(NamedTuple):
    """What :func:`learn` found.

    Attributes:
        vectors: (v, E) of the update with the lowest loss, for each text encoder.
        losses: of each update, the mean of its images.
        accuracies: of each update, the share of its images that were right.
    """

    vectors: list[Tensor]
    losses: list[float]
    accuracies: list[float]


def with_token(pipe: Any, token: str = "newclas", initial: str = "a", vectors: int = 1) -> Any:
    """A stock pipeline on the same networks, but for copies of tokenizers and text encoders that know the token.

    Args:
        token: must be new. Of several vectors the others are token_1, token_2, …, as in diffusers.
        initial: the word that all vectors begin as; one token of the vocabulary.

    Raises:
        ValueError: a token that is there already, or an initial word of several tokens.
    """
    parts: dict[str, Any] = {}
    for number in ("", "_2") if hasattr(pipe, "text_encoder_2") else ("",):
        tokenizer = copy.deepcopy(getattr(pipe, f"tokenizer{number}"))
        encoder = copy.deepcopy(getattr(pipe, f"text_encoder{number}")).requires_grad_(False)
        first = tokenizer.encode(initial, add_special_tokens=False)
        if len(first) != 1:
            raise ValueError(f"initial: got {initial!r}, which has {len(first)} tokens, expected one token")
        names = [token, *(f"{token}_{place}" for place in range(1, vectors))]
        if tokenizer.add_tokens(names) != vectors:
            raise ValueError(f"token: got {token!r}, which the tokenizer has already")
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        table = encoder.get_input_embeddings().weight
        table.data[tokenizer.convert_tokens_to_ids(names)] = table.data[first[0]].clone()
        table.requires_grad_(True)
        parts |= {f"tokenizer{number}": tokenizer, f"text_encoder{number}": encoder}
    options = {"add_watermarker": False} if "tokenizer_2" in parts else {"requires_safety_checker": False}
    made = type(pipe)(**{**pipe.components, **parts}, **options)
    made.register_to_config(**{k: v for k, v in pipe.config.items() if k == "force_zeros_for_empty_prompt"})
    return made


def images(
    pipe: Any,
    texts: Sequence[str],
    latents: Tensor,
    *,
    steps: int = 30,
    guidance: float = 7.0,
    gradient_steps: int = 2,
    padded: bool = True,
    checkpointing: bool = True,
) -> Tensor:
    """Images of n texts made together, differentiable in the text encoders' input embeddings.

    Args:
        pipe: a StableDiffusionPipeline, or for padded texts a StableDiffusionXLPipeline; it is left as it is. A
            scheduler that draws noise does so by torch's own generator.
        latents: (n, C, h, w) standard normal noise to start from.
        guidance: above 1 there are unconditional rows, whose gradient counts as well.
        gradient_steps: K; the official test "step ≥ steps − 1" gives 2 with PNDM, which makes a call more than steps,
            and 1 with others.
        padded: texts have the encoder's limit; else those of one call that of the longest, the empty text too.
        checkpointing: whether the UNet is called again in the backward pass instead of keeping its activations.

    Returns:
        (n, 3, H, W) in [0, 1], in the VAE's type.

    Raises:
        ValueError: a text that is too long.
    """
    unet, scheduler = pipe.unet, type(pipe.scheduler).from_config(pipe.scheduler.config)
    free = guidance > 1
    states, added = _texts(pipe, list(texts), free, padded, latents.shape[-2:])
    scheduler.set_timesteps(steps, device=unet.device)
    latents = latents.to(unet.device, unet.dtype) * scheduler.init_noise_sigma

    def predict(rows: Tensor, t: Tensor, states: Tensor) -> Tensor:
        predicted: Tensor = unet(rows, t, states, added_cond_kwargs=added).sample
        return predicted

    for place, t in enumerate(scheduler.timesteps):
        with torch.set_grad_enabled(place >= len(scheduler.timesteps) - gradient_steps):
            rows = scheduler.scale_model_input(torch.cat([latents] * 2) if free else latents, t)
            if checkpointing and torch.is_grad_enabled():
                predicted = checkpoint(predict, rows, t, states, use_reentrant=False)
            else:
                predicted = predict(rows, t, states)
            if free:
                empty, given = predicted.chunk(2)
                predicted = empty + guidance * (given - empty)
            latents = scheduler.step(predicted, t, latents).prev_sample
    decoded = pipe.vae.decode(latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor).sample
    pixels: Tensor = (decoded / 2 + 0.5).clamp(0, 1)
    return pixels


def backward(
    pipe: Any,
    token: str,
    classifier: Classifier,
    texts: Sequence[str],
    target: int,
    latents: Tensor,
    *,
    batch_size: int = 1,
    clip_before: float | None = None,
    **made: Any,
) -> tuple[Tensor, Tensor]:
    """Adds the gradient of the mean loss of n images to that of the tables, where it is zero but in the token's rows.

    Args:
        pipe: of :func:`with_token`.
        classifier: (b, 3, H, W) images in [0, 1] → (b, outputs), with all that it does to images.
        target: the class's output.
        batch_size: images made together; 1 is official.
        clip_before: norm that the sum of the earlier images' gradients is clipped to before the next is added.
        texts, latents, made: of the n images, as for :func:`images`.

    Returns:
        Losses (n,), float32 at least, and which images were right (n,).
    """
    losses, right = [], []
    tables, others = [encoder.get_input_embeddings().weight for _, encoder in _encoders(pipe)], _others(pipe, token)
    for start in range(0, len(texts), batch_size):
        rows = slice(start, start + batch_size)
        outputs = widened(classifier(images(pipe, texts[rows], latents[rows], **made)))
        targets = torch.full((len(outputs),), target, device=outputs.device, dtype=torch.int64)
        loss = functional.cross_entropy(outputs, targets, reduction="none")
        if clip_before is not None:
            torch.nn.utils.clip_grad_norm_(tables, clip_before)
        # The networks' own parameters, which may ask for gradients, get none.
        slopes = torch.autograd.grad(loss.sum() / len(texts), tables)
        for table, slope, zero in zip(tables, slopes, others, strict=True):
            slope[zero] = 0
            table.grad = slope if table.grad is None else table.grad + slope
        losses.append(loss.detach())
        right.append(outputs.argmax(1) == target)
    return torch.cat(losses), torch.cat(right)


def new_optimizer(
    pipe: Any,
    learning_rate: float = 1.25e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 1e-2,
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """The official optimiser of the whole tables of a pipeline of :func:`with_token`."""
    tables = [encoder.get_input_embeddings().weight for _, encoder in _encoders(pipe)]
    return torch.optim.AdamW(tables, lr=learning_rate, betas=betas, weight_decay=weight_decay, eps=eps)


def update(
    pipe: Any,
    optimizer: torch.optim.Optimizer,
    token: str,
    *given: Any,
    decay_vocabulary: bool = False,
    **made: Any,
) -> tuple[Tensor, Tensor]:
    """One official update of the token.

    Args:
        optimizer: of :func:`new_optimizer`.
        decay_vocabulary: the official weight decay of all other rows of the tables, too.
        pipe, token, given, made: arguments of :func:`backward`.

    Returns:
        As :func:`backward`.
    """
    outcome = backward(pipe, token, *given, **made)
    tables = [encoder.get_input_embeddings().weight for _, encoder in _encoders(pipe)]
    before = [table.detach().clone() for table in tables]
    optimizer.step()
    optimizer.zero_grad()
    if not decay_vocabulary:
        with torch.no_grad():
            for table, others, kept in zip(tables, _others(pipe, token), before, strict=True):
                table[others] = kept[others]
    return outcome


def learn(
    pipe: DiffusionPipeline,
    classifier: Classifier,
    name: str,
    target: int,
    *,
    latents: Tensor | None = None,
    orders: Sequence[Sequence[int]] | None = None,
    token: str = "newclas",
    initial: str = "a",
    vectors: int = 1,
    templates: Sequence[str] = TEMPLATES,
    class_name: bool = True,
    count: int = 5,
    updates: int = 50,
    accuracy: float = 0.7,
    patience: int = 15,
    seed: int = 35,
    learning_rate: float = 1.25e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 1e-2,
    eps: float = 1e-8,
    batch_size: int = 1,
    first_patience: int | None = None,
    collapse: bool = False,
    **rest: Any,
) -> Learned:
    """The official loop for one class.

    Args:
        pipe: stock pipeline; it is left as it is.
        classifier, target: as for :func:`backward`.
        name: of the class; lower-cased and with blanks for "_" it follows the token in a text, if ``class_name``.
        latents: (count, C, h, w) first noise; drawn by (seed, image) if None.
        orders: of each update, the places in ``templates``, modulo their number, that its images take; drawn by
            (seed, update) if None. The official order is drawn without a seed.
        token, initial, vectors: as for :func:`with_token`.
        count: n.
        updates: at most. It ends after one in which more than ``accuracy`` of the images were right, or once more than
            ``patience`` of them, since the last one with a lower loss, were not better.
        first_patience: until the first lower loss, officially the default of the settings' class whatever is set.
        collapse: a loss of more than twice the lowest adds 1 to the seed of the noise.
        rest: of :func:`update`.
    """
    made = with_token(pipe, token, initial, vectors)
    optimizer = new_optimizer(made, learning_rate, betas, weight_decay, eps)
    lowest, left = 99999.0, patience if first_patience is None else first_patience
    best, losses, accuracies = _rows(made, token), [], []
    for number in range(updates):
        start = latents
        if start is None:
            start = torch.stack([draw_noise(seed, image, latent_shape(pipe)) for image in range(count)])
        order = orders[number] if orders is not None else _order(seed, number, count)
        texts = [templates[place % len(templates)].format(token) for place in order]
        if class_name:
            texts = [f"{text} {' '.join(name.lower().split('_'))}" for text in texts]
        found, right = update(made, optimizer, token, classifier, texts, target, start, batch_size=batch_size, **rest)
        loss, share = float(found.sum()), float(right.double().mean())
        losses.append(loss / count)
        accuracies.append(share)
        if collapse and loss > 2 * lowest:
            seed += 1
        if loss < lowest:
            lowest, left, best = loss, patience, _rows(made, token)
        else:
            left -= 1
        if share > accuracy or left < 0:
            break
    return Learned(best, losses, accuracies)


def noise_loss(pipe: Any, texts: Sequence[str], latents: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
    """The plain noise loss of n images with texts, (n,), as diffusers' script of textual inversion computes it.

    Gal et al. 2022; examples/textual_inversion/textual_inversion.py. Differentiable in the input embeddings.

    Args:
        latents: (n, C, h, w) of the images, scaled.
        timesteps: (n,).
        noise: (n, C, h, w).

    Raises:
        ValueError: a model that predicts neither the noise nor v.
    """
    states, added = _texts(pipe, list(texts), False, True, latents.shape[-2:])
    return states_loss(pipe, states, added, latents, timesteps, noise)


def _texts(
    pipe: Any, texts: list[str], free: bool, padded: bool, size: Sequence[int]
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """States of the unconditional rows, if any, and of the texts, and what SDXL's UNet reads besides."""
    for tokenizer, _ in _encoders(pipe):
        for text in texts:
            # Refuses one that is too long, which the pipeline would cut.
            tokenize(pipe, tokenizer, text)
    if padded:
        states, empty, *pooled = pipe.encode_prompt(
            texts, device=pipe.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=free
        )
    else:
        tokens = pipe.tokenizer([pipe.maybe_convert_prompt(text, pipe.tokenizer) for text in texts], padding="longest")
        length, device = len(tokens.input_ids[0]), pipe.text_encoder.device
        none = pipe.tokenizer([""] * len(texts), padding="max_length", max_length=length)
        states, empty = (pipe.text_encoder(torch.tensor(each.input_ids, device=device))[0] for each in (tokens, none))
        pooled = []
    dtype = pipe.unet.dtype
    both = torch.cat([empty, states]) if free else states
    if not pooled:
        return both.to(dtype), None
    height, width = (side * pipe.vae_scale_factor for side in size)
    ids = torch.tensor([height, width, 0, 0, height, width], device=pipe.unet.device, dtype=dtype)
    joined = torch.cat([pooled[1], pooled[0]]) if free else pooled[0]
    return both.to(dtype), {"text_embeds": joined.to(dtype), "time_ids": ids.repeat(len(both), 1)}


def _encoders(pipe: Any) -> list[tuple[Any, Any]]:
    pairs = [(pipe.tokenizer, pipe.text_encoder)]
    return [*pairs, (pipe.tokenizer_2, pipe.text_encoder_2)] if hasattr(pipe, "text_encoder_2") else pairs


def _others(pipe: Any, token: str) -> list[Tensor]:
    """Which rows of each table are not the token's, (V,) bool."""
    masks = []
    for tokenizer, encoder in _encoders(pipe):
        table, names = encoder.get_input_embeddings().weight, [token]
        while f"{token}_{len(names)}" in tokenizer.added_tokens_encoder:
            names.append(f"{token}_{len(names)}")
        mask = torch.ones(len(table), dtype=torch.bool, device=table.device)
        mask[tokenizer.convert_tokens_to_ids(names)] = False
        masks.append(mask)
    return masks


def _rows(pipe: Any, token: str) -> list[Tensor]:
    """The token's rows, (v, E) of each table."""
    tables = (encoder.get_input_embeddings().weight.detach() for _, encoder in _encoders(pipe))
    return [table[~others] for table, others in zip(tables, _others(pipe, token), strict=True)]


def _order(seed: int, number: int, count: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=seeded(seed, number, 1), device="cpu").tolist()
    return order
