"""The texts of a request: their states, and the keys and values that a plan's cross-attentions read."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from dsd_fast.kernels.common.transfer import upload
from dsd_fast.models.prompts import PromptStates
from dsd_fast.unet import Plan, TextKV
from dsd_fast.unet.stream import default_budget


class Texts:
    """M encoded texts and, as number M, the unconditional one if there is one.

    Keys and values that fit a budget together are made once for each plan and kept.

    Args:
        states: of the M texts, on any device; a request of very many holds them in host memory.
        unconditional: the absent text, M = 1.
        vectors: (n, E) learned vectors that follow the tokens of each text but the unconditional one, or None.
        scored: keys that count in scores: "all", or "real", begin, words, end and learned vectors without padding.
    """

    def __init__(
        self,
        states: PromptStates,
        unconditional: PromptStates | None = None,
        *,
        vectors: Tensor | None = None,
        scored: str = "all",
    ) -> None:
        self.states, self.unconditional = states, unconditional
        self._vectors, self._scored = vectors, scored
        self._kept: dict[Plan, TextKV] = {}

    def __len__(self) -> int:
        """Count the texts, M; the unconditional one is not among them."""
        return len(self.states)

    @property
    def tokens(self) -> int:
        """Keys of each text: its tokens, padding included, and the learned vectors."""
        width = max(int(each.states.shape[1]) for each in (self.states, self.unconditional) if each is not None)
        return width + (0 if self._vectors is None else len(self._vectors))

    def fits(self, plan: Plan, size: tuple[int, int], memory_budget: int | None) -> bool:
        """Tell whether the keys of all texts are held at once; see :meth:`groups`."""
        return self._known(plan) is not None or self._at_once(plan, size, memory_budget) >= self._count

    @cached_property
    def _apart(self) -> tuple[Texts, Texts] | None:
        """The texts, and the unconditional one, by themselves, where it has more states and they would be padded."""
        if self.unconditional is None or self.unconditional.states.shape[1] <= self.states.states.shape[1]:
            return None
        bare = Texts(self.unconditional, scored=self._scored)
        return Texts(self.states, vectors=self._vectors, scored=self._scored), bare

    def chosen(self, numbers: Tensor | None = None) -> PromptStates:
        """Give the states of texts by ascending numbers, all of them by default, the unconditional one last."""
        states, last = self.states, self.unconditional
        if numbers is not None:
            last = last if len(numbers) and int(numbers[-1]) == len(self) else None
            states = states[numbers[: len(numbers) - (last is not None)]]
        return states if last is None else states.followed_by(last)

    def keys(self, plan: Plan, numbers: Tensor | None = None) -> TextKV:
        """Make the keys and values of texts by ascending numbers for a plan's layers; differentiable."""
        states = self.chosen(numbers)
        bare = len(states) - int(self.unconditional is not None and (numbers is None or int(numbers[-1]) == len(self)))
        device, dtype = plan.program.device, plan.program.dtype
        values = upload(states.states, device, dtype)
        count, length, _ = values.shape
        real = torch.arange(length, device="cpu") < states.lengths[:, None]
        lengths, bias = states.key_lengths, states.key_bias
        if self._vectors is not None:
            # What stands for no state is then no end, and the bias alone hides it.
            added, lengths = len(self._vectors), None
            values = torch.cat([values, upload(self._vectors, device, dtype).expand(count, -1, -1)], dim=1)
            real = torch.cat([real, real.new_ones(count, added)], dim=1)
            bias = None if bias is None else torch.cat([bias, bias.new_zeros(count, added)], dim=1)
            if bare < count:
                lengths = torch.tensor([length + added] * bare + [length] * (count - bare), device="cpu")
        pooled = None if states.pooled is None else upload(states.pooled, device, dtype)
        scored = real if self._scored == "real" else None
        return plan.encode_text(values, pooled=pooled, key_bias=bias, score_mask=scored, lengths=lengths)

    def groups(
        self, plan: Plan, text_of: Tensor, size: tuple[int, int], memory_budget: int | None
    ) -> Iterator[tuple[TextKV | None, Tensor, Tensor]]:
        """Yield the rows of each group of texts whose keys and values take half the budget and leave a row room.

        Args:
            plan: whose layers read them; one that stops before any text is read has one group without keys.
            text_of: (B,) int64 on the CPU, the number of each row's text.
            size: (h, w) of the latents.
            memory_budget: bytes, see :meth:`Plan.stream`.

        Yields:
            (keys and values of the group's texts, numbers of its rows, and for each of those its text in the group).
        """
        every = torch.arange(len(text_of), device="cpu")
        if not plan.reads_text:
            yield None, every, text_of
            return
        if self.fits(plan, size, memory_budget):
            keys = self._known(plan)
            if keys is None:
                # What is kept may meet gradients later.
                with torch.inference_mode(False), torch.no_grad():
                    keys = self._kept[plan] = self.keys(plan)
            yield keys, every, text_of
            return
        if self._apart is not None:
            for texts, first in zip(self._apart, (0, len(self)), strict=True):
                own = torch.nonzero((text_of >= len(self)) == (first > 0)).flatten()
                if len(own):
                    for keys, rows, local in texts.groups(plan, text_of[own] - first, size, memory_budget):
                        yield keys, own[rows], local
                # They would take room that the others' rows are told they have.
                texts._kept.clear()
            return
        at_once = self._at_once(plan, size, memory_budget)
        used, place = torch.unique(text_of, return_inverse=True)
        for start in range(0, len(used), at_once):
            rows = torch.nonzero((place >= start) & (place < start + at_once)).flatten()
            with torch.no_grad():
                keys = self.keys(plan, used[start : start + at_once])
            yield keys, rows, place[rows] - start

    def _known(self, plan: Plan) -> TextKV | None:
        """Keys and values that were made for a plan, or for another of its network whose layers are also its own."""
        if plan not in self._kept:
            for other, keys in tuple(self._kept.items()):
                if other.program is plan.program and _covers(keys, plan):
                    self._kept[plan] = keys
        return self._kept.get(plan)

    @property
    def _count(self) -> int:
        return len(self) + int(self.unconditional is not None)

    def _at_once(self, plan: Plan, size: tuple[int, int], memory_budget: int | None) -> int:
        return texts_held(plan, size, self.tokens, memory_budget)


def _covers(keys: TextKV, plan: Plan) -> bool:
    """Whether a plan reads those keys and values as its own: of its layers, under its adapters."""
    with plan.active():
        now = plan.signatures()
    made = keys.signature or {}
    return set(plan.value_layers) <= keys.v.keys() and all(made.get(name) == state for name, state in now.items())


def texts_held(plan: Plan, size: tuple[int, int], tokens: int, memory_budget: int | None) -> int:
    """Tell how many texts' keys and values take half the budget and leave a row of (h, w) latents room, one at least.

    Args:
        tokens: keys of each text.
        memory_budget: bytes, see :meth:`Plan.stream`.
    """
    program = plan.program
    names = (*plan.key_layers, *plan.value_layers)
    width: int = sum(program.attention(name).inner_dim for name in names)
    budget = default_budget(program.device) // 2
    if memory_budget is not None:
        budget = min(memory_budget // 2, memory_budget - plan.run_bytes(1, *size, tokens))
    return max(1, budget // max(1, width * tokens * program.dtype.itemsize))
