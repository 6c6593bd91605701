"""Prompts as the official feature extractor hands them around: text states, encoded once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from dsd_fast.models import Model, PromptStates
from dsd_fast.models.prompts import as_tokens, token_limit


class EncodedPrompt(NamedTuple):
    """One prompt, encoded; the tuple that the official `encode_prompt` returns. Nothing here reads the negative states.

    Attributes:
        prompt_embeds: (1, T, E).
        negative_prompt_embeds: (1, T, E), of the empty text.
        pooled_prompt_embeds: (1, E'), SDXL's pooled states, else None.
        negative_pooled_prompt_embeds: the same of the empty text.
    """

    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor | None
    negative_pooled_prompt_embeds: Tensor | None


@torch.no_grad()
def encode(model: Model, prompt: str) -> EncodedPrompt:
    """The states of a prompt, padded to the encoder's limit as by the stock pipeline.

    A prompt beyond the limit is cut between words into pieces within it, each with start and end tokens of its own, and
    their states are laid end to end; the pooled states are the first piece's. The official code decides by 70 words,
    pads nothing then, cuts between any two tokens, and leaves all but the first piece without a start token.

    Raises:
        ValueError: no str, or a word beyond the limit.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"prompt_str: got {type(prompt).__name__}, expected one str")
    # Of the class itself: the prompts of a conditioned model are names.
    found = Model.encode_prompts(model, _pieces(model, prompt))
    empty = Model.encode_prompts(model, [""])
    pooled = None if found.pooled is None else found.pooled[:1]
    return EncodedPrompt(found.states.flatten(0, 1)[None], empty.states.repeat(1, len(found), 1), pooled, empty.pooled)


def _pieces(model: Model, prompt: str) -> list[str]:
    """The prompt whole, or its words in as few pieces within the encoder's limit as they fit in, in order."""
    limit = token_limit(model.tokenizers, model.text_encoders)

    def fits(text: str) -> bool:
        return all(len(as_tokens(tokenizer, text)["input_ids"]) <= limit for tokenizer in model.tokenizers)

    if fits(prompt):
        return [prompt]
    pieces: list[str] = []
    for word in prompt.split():
        longer = f"{pieces[-1]} {word}" if pieces else word
        if pieces and fits(longer):
            pieces[-1] = longer
        else:
            pieces.append(word)
    return pieces


class Conditioned(Model):
    """A model whose prompts are names of states that its caller has encoded, asked for anew at each request."""

    _held: tuple[Tensor, Tensor | None]

    @classmethod
    def of(cls, model: Model) -> Conditioned:
        """The model's networks, by reference."""
        other = copy.copy(model)
        other.__class__ = cls
        assert isinstance(other, Conditioned)
        return other

    def hold(self, states: Tensor, pooled: Tensor | None) -> list[str]:
        """From now on prompts are these states; a name for each.

        Args:
            states: (M, T, E).
            pooled: (M, E'), or None.
        """
        self._held = states, pooled
        return [str(row) for row in range(len(states))]

    def encode_prompts(self, prompts: Sequence[str], clip_skip: int | None = None) -> PromptStates:
        """The states held under those names; no layer is left out of what is encoded."""
        rows = torch.tensor([int(name) for name in prompts], device="cpu")
        states, pooled = (
            None if each is None else each.to(self.device, self.dtype)[rows.to(self.device)] for each in self._held
        )
        assert states is not None
        tokens = states.shape[1]
        nothing = torch.zeros(len(rows), tokens, dtype=torch.int64, device="cpu")
        return PromptStates(states, pooled, torch.full((len(rows),), tokens, dtype=torch.int64, device="cpu"), nothing)

    def forget_encoders(self) -> None:
        """Lets go of the text encoders; what other parts ask of them is their configuration."""
        self.text_encoders = tuple(SimpleNamespace(config=encoder.config) for encoder in self.text_encoders)
