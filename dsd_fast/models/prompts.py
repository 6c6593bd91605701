"""Prompts to the text states that a UNet attends to, as the stock pipelines compute them."""

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dsd_fast.kernels.common.transfer import upload
from dsd_fast.models.errors import ModelError

# Bounds the activations of the text encoders for long lists of prompts.
_PROMPTS_AT_ONCE = 256
# transformers keeps the padding of a call in the tokenizer, so that two threads would mix theirs.
_TOKENIZING = threading.RLock()

_HALF_PAIR = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, eq=False)
class PromptStates:
    """Encoded prompts: M texts of T tokens.

    Attributes:
        states: (M, T, E), what cross-attention sees; SDXL: both encoders' penultimate states side by side.
        pooled: (M, E2), SDXL's pooled state of the second encoder; None for other families.
        lengths: (M,) int64 on the CPU, real tokens of each prompt, start and end tokens included, padding not.
        token_ids: (M, T) int64 on the CPU, the first tokenizer's ids, padding included; 0 where a state is of no token.
        counts: (M, T) int64 on the CPU, how many equal states each stands for, 0 where there is none; None: each for
            itself. Attention to k equal keys is attention to one whose logit is larger by log k.
    """

    states: Tensor
    pooled: Tensor | None
    lengths: Tensor
    token_ids: Tensor
    counts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, rows: slice | Tensor) -> "PromptStates":
        """The prompts of a slice (views) or of a tensor of positions (copies)."""
        own = rows if isinstance(rows, slice) else upload(rows, self.states.device)
        pooled = None if self.pooled is None else self.pooled[own]
        counts = None if self.counts is None else self.counts[rows]
        return PromptStates(self.states[own], pooled, self.lengths[rows], self.token_ids[rows], counts)

    def to(self, device: torch.device | str) -> "PromptStates":
        """These prompts with the states on ``device``."""
        device = torch.device(device)
        pooled = None if self.pooled is None else upload(self.pooled, device)
        return PromptStates(upload(self.states, device), pooled, self.lengths, self.token_ids, self.counts)

    def followed_by(self, other: "PromptStates") -> "PromptStates":
        """These prompts and then those of ``other``, see :meth:`joined`."""
        return PromptStates.joined([self, other])

    @staticmethod
    def joined(parts: Sequence["PromptStates"]) -> "PromptStates":
        """The prompts of one or more parts in turn, of the same model, where the first part is.

        Where they have different numbers of states, the fewer are followed by some that stand for none.
        """
        device = parts[0].states.device
        width = max(part.states.shape[1] for part in parts)
        parts = [part.to(device)._widened(width) for part in parts]
        pooled = [part.pooled for part in parts if part.pooled is not None]
        counted = any(part.counts is not None for part in parts)
        return PromptStates(
            torch.cat([part.states for part in parts]),
            torch.cat(pooled) if len(pooled) == len(parts) else None,
            torch.cat([part.lengths for part in parts]),
            torch.cat([part.token_ids for part in parts]),
            torch.cat([part._counted() for part in parts]) if counted else None,
        )

    @property
    def key_bias(self) -> Tensor | None:
        """What is added to each key's logit, (M, T) float64 on the CPU, the logarithm of its count; None: nothing."""
        return None if self.counts is None else self.counts.to(torch.float64).log()

    @property
    def key_lengths(self) -> Tensor | None:
        """(M,) int64 on the CPU, states of each prompt up to the last that counts; None: all of each."""
        if self.counts is None or bool(self.counts[:, -1].all()):
            return None
        return (self.counts.ne(0) * torch.arange(1, self.counts.shape[1] + 1, device="cpu")).amax(1)

    def expanded(self) -> "PromptStates":
        """The same prompts with each state as often as it counts, as networks read them that know no counts.

        Raises:
            ValueError: prompts of different numbers of states.
        """
        if self.counts is None:
            return self
        totals = self.counts.sum(1)
        if len(totals) and int(totals.min()) != int(totals.max()):
            raise ValueError(
                f"counts: got prompts of {int(totals.min())} to {int(totals.max())} states, expected one number"
            )
        places = torch.arange(self.counts.shape[1], device="cpu").expand_as(self.counts)
        width = int(totals[0]) if len(totals) else self.counts.shape[1]
        place = places.flatten().repeat_interleave(self.counts.flatten()).view(len(self), width)  # (M, 77)
        row = torch.arange(len(self), device="cpu")[:, None]
        device = self.states.device
        states = self.states[upload(row, device), upload(place, device)]
        # Real states come first, and so do those that they stand for.
        real = torch.arange(self.counts.shape[1], device="cpu") < self.lengths[:, None]
        lengths = (self.counts * real).sum(1)
        return PromptStates(states, self.pooled, lengths, self.token_ids[row, place])

    def _counted(self) -> Tensor:
        return torch.ones_like(self.token_ids) if self.counts is None else self.counts

    def _widened(self, width: int) -> "PromptStates":
        more = width - self.states.shape[1]
        if not more:
            return self
        states, ids, counts = (
            torch.cat([x, x.new_zeros(len(self), more, *x.shape[2:])], dim=1)
            for x in (self.states, self.token_ids, self._counted())
        )
        return PromptStates(states, self.pooled, self.lengths, ids, counts)


def token_limit(tokenizers: Sequence[Any], text_encoders: Sequence[Any]) -> int:
    """The most tokens a prompt may have, start and end tokens included; all prompts are padded to it."""
    limits = [int(tokenizer.model_max_length) for tokenizer in tokenizers]
    limits += [int(encoder.config.max_position_embeddings) for encoder in text_encoders]
    return min(limits)


def encode_prompts(
    tokenizers: Sequence[Any], text_encoders: Sequence[Any], prompts: Sequence[str], clip_skip: int | None = None
) -> PromptStates:
    """See `Model.encode_prompts`."""
    check_clip_skip(text_encoders, clip_skip)
    if isinstance(prompts, str):
        raise ValueError("prompts is a str, expected a sequence of str")
    texts = list(prompts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"prompts[{index}] is of type {type(text).__name__}, expected str")
    if not texts:
        # transformers' encoders cannot run on no rows.
        return encode_prompts(tokenizers, text_encoders, [""], clip_skip)[:0]
    limit = token_limit(tokenizers, text_encoders)
    tokens = [tokenize(tokenizer, texts, limit) for tokenizer in tokenizers]
    chunks = (slice(start, start + _PROMPTS_AT_ONCE) for start in range(0, len(texts), _PROMPTS_AT_ONCE))
    states, pooled = zip(
        *(_encode(text_encoders, [(ids[chunk], mask[chunk]) for ids, mask in tokens], clip_skip) for chunk in chunks),
        strict=True,
    )
    return PromptStates(
        states=torch.cat(states),
        pooled=None if pooled[0] is None else torch.cat(pooled),
        lengths=torch.stack([mask.sum(dim=1) for _, mask in tokens]).amax(dim=0),
        token_ids=tokens[0][0],
    )


def check_clip_skip(text_encoders: Sequence[Any], clip_skip: int | None) -> None:
    """Refuses to leave out more layers than there are.

    Raises:
        ValueError: no integer from 0 to the layers of the shallowest encoder, or to one less for two encoders, of which
            the state before the last is taken anyway.
    """
    if clip_skip is None:
        return
    most = min(int(encoder.config.num_hidden_layers) for encoder in text_encoders) - (len(text_encoders) == 2)
    if isinstance(clip_skip, bool) or not isinstance(clip_skip, int) or not 0 <= clip_skip <= most:
        raise ValueError(f"clip_skip: got {clip_skip!r}, expected an integer from 0 to {most}")


def check_unicode(name: str, text: str) -> None:
    """Refuses what is no Unicode text, as a str that was decoded with "surrogateescape" may be.

    Raises:
        ValueError: by ``name``.
    """
    if _HALF_PAIR.search(text):
        raise ValueError(f"{name} has half of a surrogate pair, which is no text")


def tokenize(tokenizer: Any, texts: list[str], limit: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask of real tokens, both (M, limit) int64, learned tokens spelled out.

    Raises:
        ModelError: a text of more than `limit` tokens.
        ValueError: a text that :func:`check_unicode` refuses.
    """
    from diffusers.loaders import TextualInversionLoaderMixin

    for index, text in enumerate(texts):
        check_unicode(f"prompts[{index}]", text)
    with _TOKENIZING:
        # Spells a learned token of several vectors out into its several tokens, as stock pipelines do. They ask for the
        # added tokens at every word, of which a tokenizer makes a new table each time.
        asked = SimpleNamespace(tokenize=tokenizer.tokenize, added_tokens_encoder=tokenizer.added_tokens_encoder)
        texts = TextualInversionLoaderMixin().maybe_convert_prompt(texts, asked)
        encoded = as_tokens(tokenizer, texts, padding="max_length", max_length=limit, truncation=False)
    for index, mask in enumerate(encoded["attention_mask"]):
        if sum(mask) > limit:
            raise ModelError(
                f"prompts[{index}] has {sum(mask)} tokens, expected at most {limit}, start and end tokens included"
            )
    return torch.tensor(encoded["input_ids"], device="cpu"), torch.tensor(encoded["attention_mask"], device="cpu")


def as_tokens(tokenizer: Any, texts: str | list[str], **options: Any) -> Any:
    """What a tokenizer makes of texts, one thread at a time."""
    with _TOKENIZING:
        return tokenizer(texts, verbose=False, **options)


def _encode(
    text_encoders: Sequence[Any], tokens: list[tuple[Tensor, Tensor]], clip_skip: int | None
) -> tuple[Tensor, Tensor | None]:
    """States and pooled state of one chunk; SDXL is known by its second encoder."""
    two = len(text_encoders) == 2
    states, pooled = [], None
    for encoder, (ids, mask) in zip(text_encoders, tokens, strict=True):
        device = encoder.get_input_embeddings().weight.device
        # SDXL's pipeline never masks padding; that of SD 1.x and 2.x does where the encoder's config says so.
        masked = not two and getattr(encoder.config, "use_attention_mask", False)
        read = upload(mask, device) if masked else None
        hidden = two or bool(clip_skip)
        output = encoder(upload(ids, device), attention_mask=read, output_hidden_states=hidden)
        if two:
            states.append(output.hidden_states[-((clip_skip or 0) + 2)])
            pooled = output[0]
        elif not clip_skip:
            states.append(output[0])
        else:
            states.append(_final_norm(encoder)(output.hidden_states[-(clip_skip + 1)]))
    return torch.cat(states, dim=-1).to(text_encoders[-1].dtype), pooled


def _final_norm(encoder: Any) -> Any:
    """The layer norm at the end of a CLIPTextModel, which transformers has moved."""
    return getattr(encoder, "text_model", encoder).final_layer_norm
