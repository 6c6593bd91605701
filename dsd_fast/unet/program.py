"""The UNet as a program of named steps; a request is a cut through it, a :class:`~dsd_fast.unet.plan.Plan`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from dsd_fast.unet.network import Network
from dsd_fast.unet.plan import Plan


class UNetProgram(Network):
    """The steps of a diffusers UNet2DConditionModel, in execution order, to be cut where a request ends.

    The network is never changed: no hook, no processor, no copy of a weight. For the attributes see :class:`Network`.

    Args:
        unet: a UNet2DConditionModel of the SD 1.x, 2.x or SDXL kind, with or without adapters.

    Raises:
        UnsupportedNetworkError: what the program would ignore or get wrong, by name.
    """

    def plan(
        self,
        features: Sequence[str] = (),
        scores: Sequence[str] = (),
        maps: Sequence[str] = (),
        noise_pred: bool = False,
        pool: str | float = "mean",
        adapter: str | Sequence[str] | None = None,
        enter: str | None = None,
    ) -> Plan:
        """A cut through the program: what to tap, and nothing after the last tap runs.

        Args:
            features: layer ids whose values are returned.
            scores: score ids whose log-sum-exp over the text's keys is returned.
            maps: map ids whose attention maps, averaged over heads, are returned: of a cross-attention those of chosen
                tokens, of a self-attention those of all positions that are attended to.
            noise_pred: whether the model's output is returned.
            pool: how a score is pooled over positions: "mean", "max", or a temperature τ > 0 for
                τ·log mean exp(score/τ).
            adapter: names of the adapters active during the plan's calls, PEFT's of any kind; () for none; None leaves
                the network as it stands at each call. Calls of several threads see nothing of each other's.
            enter: one of :attr:`entries`. The steps before it run no further than the skip connections that the rest
                uses, and each run is given the activation of that id in ``kept``: what it was at an earlier timestep
                differs little (Ma et al. 2023, "DeepCache: Accelerating Diffusion Models for Free"). A ControlNet's
                residuals are added where they were; None: the whole network up to the last tap.

        Raises:
            ValueError: an unknown id (with the nearest legal ones), nothing asked for, or nothing of what runs after
                ``enter``; a bad ``pool`` or ``adapter``.
        """
        for name, ids, legal in (
            ("features", features, self.layer_ids),
            ("scores", scores, self.score_ids),
            ("maps", maps, self.map_ids),
        ):
            _check_ids(name, ids, legal)
        if not (features or scores or maps or noise_pred):
            raise ValueError("plan: nothing is asked for; give features, scores, maps or noise_pred=True")
        if pool not in ("mean", "max") and not (isinstance(pool, (int, float)) and pool > 0):
            raise ValueError(f"pool: got {pool!r}, expected 'mean', 'max' or a temperature > 0")
        if enter is not None:
            _check_ids("enter", [enter], self.entries)
            self._check_entry(enter, {"features": features, "scores": scores, "maps": maps}, noise_pred)
        self.check()
        return Plan(self, tuple(features), tuple(scores), tuple(maps), noise_pred, pool, enter, adapter)

    def _check_entry(self, enter: str, asked: Mapping[str, Sequence[str]], noise_pred: bool) -> None:
        head, _, rest = self.entered(enter)
        before, after = ({step.name for step in steps} for steps in (head, rest))
        for name, ids in asked.items():
            for given in ids:
                if given not in before | after:
                    raise ValueError(f"{name}: {given!r} is not computed where the network is entered at {enter!r}")
        if not noise_pred and not any(given in after for ids in asked.values() for given in ids):
            raise ValueError(f"enter: nothing is asked for that comes after {enter!r}")


def _check_ids(name: str, ids: Sequence[str], legal: Sequence[str]) -> None:
    if isinstance(ids, str):
        raise ValueError(f"{name}: got the string {ids!r}, expected a sequence of ids")
    for given in ids:
        if given not in legal:
            near = ", ".join(difflib.get_close_matches(str(given), legal, n=3, cutoff=0.0))
            raise ValueError(f"{name}: unknown id {given!r}; the nearest of the {len(legal)} legal ids are {near}")
    if len(set(ids)) != len(ids):
        raise ValueError(f"{name}: an id is given twice")
