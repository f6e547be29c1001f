"""What a decode has seen of its drafters: what the choice of the next round rests on."""

from collections.abc import Sequence

from .costs import PROPOSING
from .planner import Evidence, Lookup, observe
from .state import Step


class Observations:
    """What a decode has seen of its drafters, tokens not yet emitted apart."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], *, looks_up: bool = True, alpha: float | None = None
    ) -> None:
        """Nothing yet but the prompts of all rows, if anything is to be looked up in them.

        `alpha` is the exponent if it is fixed.
        """
        self._alpha = alpha
        self._lookups = [Lookup(prompt) for prompt in prompts] if looks_up else []
        self._observed: dict[str, tuple[float, float]] = {}

    def evidence(self, rows: Sequence[int], remaining: int, *, outstanding: bool) -> Evidence:
        """What the choice of the next round may rest on."""
        return Evidence(
            observed=dict(self._observed),
            remaining=remaining,
            lookups=[self._lookups[row].expected() for row in rows] if self._lookups else (),
            outstanding=outstanding,
            alpha=self._alpha,
        )

    def look_up(self, rows: Sequence[int], most: Sequence[int]) -> list[list[int]]:
        """What followed each row's last tokens earlier in its text, at most so many tokens."""
        pairs = zip(rows, most, strict=True)
        return [self._lookups[row].propose(limit) for row, limit in pairs]

    def add(self, step: Step) -> None:
        """Take note of a round."""
        for row, fresh in zip(step.rows, step.emitted, strict=True) if self._lookups else ():
            self._lookups[row].append(fresh)
        for name in PROPOSING:
            observe(self._observed, name, sum(step.accept[name]), len(step.accept[name]))
        if step.proposer == "draft":
            # Of a block that is judged as a whole, all drafts count as tested: not so here.
            pairs = zip(step.accepted, step.counts, strict=True)
            looked_at = sum(min(kept + 1, count) for kept, count in pairs)
            observe(self._observed, "draft", sum(step.accepted), looked_at)
