"""How learning went, class by class, and when a class has learned enough."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dsd_fast.class_tokens.config import TokenConfig


@dataclass(frozen=True)
class TokenUpdate:
    """One update of one class.

    Attributes:
        name: of the class.
        update: its number, from 1.
        loss: mean over the update's images.
        accuracy: share of the images that the guide takes for the class; None with the noise loss.
        probability: of the class, mean over the images; None with the noise loss.
        norm: of the token's longest vector after the update, as a multiple of the vocabulary's mean norm.
        clamped: share of the token's vectors that the norm clamp holds.
        ended: why the class is not learned further, see :class:`ClassHistory`; None: it is.
    """

    name: str
    update: int
    loss: float
    accuracy: float | None
    probability: float | None
    norm: float
    clamped: float
    ended: str | None


@dataclass
class ClassHistory:
    """What became of a class.

    Attributes:
        losses, accuracies, probabilities: of each update, see :class:`TokenUpdate`; the latter two are empty with the
            noise loss.
        best_update: the one with the lowest loss, from 1; 0 before there is any.
        begun: of each time that it began the updates before, and the place of its words among those that it may begin
            as.
        ended: "accuracy", "patience", "gamma", "updates", or "not-finite": a loss or gradient that is no number, whose
            update was not made.
    """

    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    best_update: int = 0
    begun: list[list[int]] = field(default_factory=list)
    ended: str | None = None

    @property
    def updates(self) -> int:
        """Updates made."""
        return len(self.losses)

    @property
    def since(self) -> list[float]:
        """Losses of the updates since it last began."""
        return self.losses[self.begun[-1][0] if self.begun else 0 :]

    def initial(self, last: bool) -> int:
        """Give the place of the words that led to what is kept, the last or the best update's."""
        number = self.updates if last else self.best_update
        return [place for before, place in self.begun if before < max(number, 1)][-1]

    def summary(self, last: bool) -> dict[str, Any]:
        """Tell in short, as JSON; of the last or the best update loss, accuracy and probability, None without one."""
        number = self.updates if last else self.best_update
        told = {
            name: own[number - 1] if number and own else None
            for name, own in (("loss", self.losses), ("accuracy", self.accuracies), ("probability", self.probabilities))
        }
        return {"updates": self.updates, "ended": self.ended, "best_update": self.best_update, **told}

    def add(self, loss: float, accuracy: float | None, probability: float | None) -> bool:
        """Add an update; tells whether its loss is the lowest so far."""
        best = not self.best_update or loss < self.losses[self.best_update - 1]
        self.losses.append(loss)
        if accuracy is not None and probability is not None:
            self.accuracies.append(accuracy)
            self.probabilities.append(probability)
        if best:
            self.best_update = self.updates
        return best

    def overlooked(self, config: TokenConfig) -> bool:
        """Tell whether the guide has not seen the class for so long that it is to begin anew."""
        most = config.restart_after
        return most is not None and len(self.since) >= most and not any(self.accuracies[-most:])

    def why_ended(self, config: TokenConfig) -> str | None:
        """Tell which stopping rule the last update met, or None."""
        if config.stopping == "official" and self.accuracies[-1] > config.accuracy:
            return "accuracy"
        if config.stopping == "official" and len(since := self.since) - since.index(min(since)) - 1 > config.patience:
            return "patience"
        if config.stopping == "gamma" and self.probabilities[-1] >= config.gamma:
            return "gamma"
        return "updates" if self.updates >= config.updates else None


Callback = Callable[[TokenUpdate], None]
