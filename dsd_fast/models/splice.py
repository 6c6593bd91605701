"""Texts whose learned tokens are a tensor of the caller's, in place of vectors of the encoder's table."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsd_fast.kernels.common.transfer import upload
from dsd_fast.models.private import private
from dsd_fast.models.prompts import as_tokens
from dsd_fast.models.tokens import POOLED, knowing, pool_at_end, vocabulary

if TYPE_CHECKING:
    from dsd_fast.models.bundle import Model


class Splice:
    """A view of a model whose texts may name tokens that are being learned; the model stays as it is.

    Gal et al. 2022, "An Image is Worth One Word", where the vectors are the only variable. The gradient is that of the
    tokens' rows alone: the vocabulary's table has none.

    Args:
        model: from :func:`dsd_fast.load` or :func:`dsd_fast.from_pipeline`.
        tokens: token → how many vectors it has; a prompt's token counts as so many.
        pooled: see :meth:`dsd_fast.models.Model.with_tokens`.

    Attributes:
        model: the view; :meth:`dsd_fast.models.Model.encode_prompts` of it is differentiable in what :meth:`put` put.
        rows: token → its rows of the banks.

    Raises:
        ModelError: a name that a tokenizer knows already or that could be mixed up with another.
        ValueError: no tokens, a token without vectors, or another ``pooled``.
    """

    def __init__(self, model: Model, tokens: Mapping[str, int], pooled: str = "stock") -> None:
        if not tokens or min(tokens.values()) < 1:
            raise ValueError(f"tokens: got {dict(tokens)}, expected at least one, of at least one vector each")
        if pooled not in POOLED:
            raise ValueError(f"pooled: got {pooled!r}, expected one of {', '.join(POOLED)}")
        self.rows, self._count = {}, 0
        for token, count in tokens.items():
            self.rows[token] = slice(self._count, self._count + count)
            self._count += count
        self._given = model
        self.model = copy.copy(model)
        self.model.tokenizers = tuple(knowing(tokenizer, tokens) for tokenizer in model.tokenizers)
        self.model.text_encoders = tuple(map(private, model.text_encoders))
        self._tables = []
        for given, tokenizer, encoder in zip(
            model.tokenizers, self.model.tokenizers, self.model.text_encoders, strict=True
        ):
            table = _Spliced(vocabulary(encoder, len(given)).weight, len(given), self._count)
            encoder.set_input_embeddings(table)
            self._tables.append(table)
            if pooled == "end":
                pool_at_end(encoder, tokenizer)

    @property
    def widths(self) -> tuple[int, ...]:
        """E of each text encoder."""
        return tuple(int(table.weight.shape[1]) for table in self._tables)

    def put(self, *banks: Tensor) -> None:
        """Let the tokens' vectors be those of (n, E) tensors, one for each text encoder, n the vectors of all tokens.

        Raises:
            ValueError: another number of banks, or one of another shape or type.
        """
        if len(banks) != len(self._tables):
            raise ValueError(f"banks: got {len(banks)} for {len(self._tables)} text encoders, expected one for each")
        for number, (bank, table, width) in enumerate(zip(banks, self._tables, self.widths, strict=True)):
            if bank.shape != (self._count, width) or not bank.is_floating_point():
                raise ValueError(
                    f"banks[{number}]: got {tuple(bank.shape)} {bank.dtype}, expected floats ({self._count}, {width})"
                )
            table.bank = (upload(bank, table.weight.device),)

    def initial(self, token: str, words: str) -> tuple[Tensor, ...]:
        """Give the (v, E) float32 vectors that a token begins as, on the CPU, for each text encoder.

        The vocabulary's for the words: where they are as many tokens as the token has vectors, one each; else their
        mean.

        Raises:
            ValueError: words that are no token.
        """
        count = self.rows[token].stop - self.rows[token].start
        result = []
        for tokenizer, table in zip(self._given.tokenizers, self._tables, strict=True):
            ids = as_tokens(tokenizer, words, add_special_tokens=False)["input_ids"]
            if not ids:
                raise ValueError(f"initial: got {words!r}, which has no token, expected words")
            vectors = table.weight.detach()[torch.tensor(ids, device=table.weight.device)].float().cpu()
            result.append(vectors if len(ids) == count else vectors.mean(0, keepdim=True).repeat(count, 1))
        return tuple(result)

    def vocabulary_norms(self) -> tuple[float, ...]:
        """Give the mean norm of the vocabulary's vectors, for each text encoder."""
        return tuple(float(table.weight.detach()[: table.first].float().norm(dim=1).mean()) for table in self._tables)


class _Spliced(nn.Module):
    """An encoder's table of V vectors, and behind them those of a bank.

    Attributes:
        bank: (n, E), numbers that are none until there are others; in a tuple, because a Parameter would become one of
            the module's.
    """

    def __init__(self, weight: Tensor, first: int, count: int) -> None:
        super().__init__()
        self.weight, self.first = weight, first
        self.bank = (torch.full((count, weight.shape[1]), torch.nan, dtype=weight.dtype, device=weight.device),)

    def forward(self, ids: Tensor) -> Tensor:
        """Look (M, T) token ids up: (M, T, E)."""
        known = F.embedding(ids.clamp(max=self.first - 1), self.weight)
        numbers = ids - self.first
        learned = F.embedding(numbers.clamp(min=0), self.bank[0].to(self.weight.dtype))
        return torch.where((numbers < 0)[..., None], known, learned)
