"""Which scheme the next round of a decode follows, and how many tokens it drafts.

Nothing here touches a model or a tensor. A planner is told what was observed (`Evidence`), predicts
the seconds per token of every scheme from it (`qstar.decoding.costs`), and names the cheapest. Its
choice never depends on a token that is proposed but not yet emitted: to drop such a proposal, or to
judge it, is then exact either way. (But for a proposal that a coin was tossed for: the round judges
it whatever is planned, `qstar.decoding.coin`.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from . import costs as cost
from .costs import OF_OTHERS, PARENTS, PROPOSING, SCHEMES, TURNS, Costs

Drafter = TypeVar("Drafter")

TOGETHER = ("plain", *OF_OTHERS)
"""The schemes in which both parents read the same tokens at once: one call can serve both."""

GAMMAS = (1, 2, 3, 4, 6, 8)
"""The draft lengths that are considered where a scheme is named and none is given."""

DRAFT_GAMMA = 4
"""The draft length of a draft model where neither a scheme nor a draft length is given."""

MEMORY = 0.98
"""How much of an observation's weight is left after the next one: about 50 tokens count."""

PRIOR = {"policy": 0.8, "teacher": 0.8, "coin": 0.9, "draft": 0.9}
"""What a drafter's acceptance is taken for before it is observed, at the weight of two tokens. The
draft model's is hopeful, for only a trial can tell; the others are observed whatever is decoded."""

GUESSES = {3: 0.5, 2: 0.5, 1: 0.3}
"""By how many of a text's last tokens a place is looked up where they stood before, the most first;
and what the acceptance of such a guess is taken for before it is observed, at that weight too."""

WORTH_A_LOOKUP = 0.2
"""The acceptance below which nothing is looked up: to read so poor a draft costs what it gains."""

STAYS = ((0.5, 0.5), (0.25, 0.75), (0.75, 0.25))
"""How the coins of "coin" may be weighted: each pair tosses for each token alike, whoever proposed
last. A parent that costs less than the other had better propose more often."""

COIN_GAMMA = 8
"""How many proposals may wait under "coin" where no draft length is given: a fair coin wants more
once in 128 times, and what a limit makes certain is no mixture."""

HOPE = 0.9
"""The acceptance of either parent that one call for both must beat, before any is observed; like
`PRIOR` for a target between the parents."""

STAY = 0.03
"""The relative gain below which outstanding proposals are not given up for another scheme."""

CAUTION = 0.1
"""The relative gain for which plain decoding is left where costs are learned, not told: what is
predicted from few forward passes and few acceptances is no better than that."""

REPAID = 1.5
"""What a trial that fails may lose, in tokens of plain decoding, before anything is learned of
them; the less is left to learn, the less."""

EQUAL_COSTS = Costs(policy={1: 1.0}, teacher={1: 1.0}, draft={1: 0.1})
"""What is assumed where nothing was measured: a forward costs the same at every width."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The next round.

    Attributes:
        scheme: One of `qstar.decoding.costs.SCHEMES`.
        gamma: Draft tokens; 0 for "plain", and for "coin" the most that may wait to be judged.
        drafter: "policy" or "teacher": who drafts, and who proposes afresh after a rejection.
        stay: For "coin": the probability that the policy, and that the teacher, goes on proposing
            after a proposal of its own; else the other one reads, judges and proposes.
    """

    scheme: str
    gamma: int
    drafter: str
    stay: tuple[float, float] | None = None


PLAIN = Plan("plain", 0, PARENTS[0])


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a choice may rest on.

    Attributes:
        observed: By drafter, the discounted sum of acceptances and the weight of that sum.
        remaining: How many tokens the row that has most to go may still get.
        lookups: Of each row, the acceptance that is expected of what would be looked up now; 0
            where there is nothing. Empty if nothing is ever looked up.
        outstanding: Whether proposals of a parent wait to be judged.
        alpha: The exponent on the policy if it is fixed.
    """

    observed: Mapping[str, tuple[float, float]]
    remaining: int
    lookups: Sequence[float]
    outstanding: bool
    alpha: float | None = None

    def acceptance(self, drafter: str) -> float:
        """The acceptance probability of a drafter, as far as it was observed."""
        return after(self.observed.get(drafter, (0.0, 0.0)), self._prior(drafter))

    def _prior(self, drafter: str) -> float:
        if self.alpha is None or 0 <= self.alpha <= 1 or drafter not in PROPOSING:
            return PRIOR[drafter]
        parents = {name: beyond(PRIOR[name], name, self.alpha) for name in PARENTS}
        return parents.get(drafter, sum(parents.values()) / 2)


def beyond(acceptance: float, parent: str, alpha: float | None) -> float:
    """What an acceptance that is taken for granted halfway between the parents comes to elsewhere.

    Outside [0, 1] all that a parent lacks of the other lies on one side, and so does the target:
    the nearer parent keeps more of its drafts than the other one, and than any mixture of both. To
    first order in the log-ratio, what is rejected grows with the distance in alpha.

    Args:
        acceptance: For a target halfway.
        parent: Who drafts.
        alpha: The exponent on the policy; None, and all of [0, 1], is taken for halfway.
    """
    if alpha is None or 0 <= alpha <= 1:
        return acceptance
    away = abs(alpha - (parent == PARENTS[0]))
    return max(0.0, 1 - (1 - acceptance) * away / 0.5)


def after(seen: tuple[float, float], prior: float) -> float:
    """An acceptance probability after the sum and the weight of what was seen of it."""
    total, weight = seen
    return min(1.0, (total + 2 * prior) / (weight + 2))


def observe(
    observed: dict[Drafter, tuple[float, float]], drafter: Drafter, total: float, count: int
) -> None:
    """Add `count` acceptances that sum to `total`, and discount what was observed before."""
    had, weight = observed.get(drafter, (0.0, 0.0))
    kept = MEMORY**count
    observed[drafter] = (had * kept + total, weight * kept + count)


def asked_for(
    scheme: str | None, gamma: int | None, *, in_one_call: bool, has_draft: bool, plain_only: bool
) -> tuple[str, int | None]:
    """The scheme and draft length of a call: as named, else by a rule that measures nothing.

    Args:
        scheme: What the caller named; None for the rule.
        gamma: The same for the draft length.
        in_one_call: Whether one call may read for both parents.
        has_draft: Whether there is a draft model.
        plain_only: Whether drafts would leave holes that some model cannot read around.
    """
    if scheme == "auto" and plain_only:
        return "plain", None
    if scheme is not None:
        return scheme, gamma
    if gamma is None and (plain_only or (in_one_call and not has_draft)):
        return "plain", None
    if has_draft:
        return "draft-model", DRAFT_GAMMA if gamma is None else gamma
    return "alternating", 1 if gamma is None else gamma


class Planner:
    """Chooses among the plans that a caller's `scheme` and `gamma` leave open.

    Where nothing is known of what forwards cost, plans are made as if one took the same at every
    width (`EQUAL_COSTS`).
    """

    def __init__(
        self,
        *,
        scheme: str,
        gamma: int | None = None,
        drafter: str | None = None,
        costs: Costs | None = None,
        has_draft: bool = False,
        batch: int = 1,
        together: bool = False,
        stay: float | None = None,
        blocks: bool = False,
    ) -> None:
        """Take the caller's wishes; None is free. `together`: one call serves both parents."""
        self._together = together
        self.learn(costs)
        self._schemes = [scheme] if scheme != "auto" else list(TOGETHER if together else SCHEMES)
        unwanted = {"draft-model"} if not has_draft else set()
        if scheme == "auto" and (blocks or batch > 1):
            # The drafts of a coin are no block; and a batch would wait for its most stubborn coin.
            unwanted.add("coin")
        self._schemes = [name for name in self._schemes if name not in unwanted]
        self._gammas = GAMMAS if gamma is None else (gamma,)
        self._most_waiting = COIN_GAMMA if gamma is None else gamma
        self._stays = STAYS if stay is None else ((stay, stay),)
        self._drafters = PARENTS if drafter is None else (drafter,)
        self._alone = batch == 1

    def learn(self, costs: Costs | None, *, caution: float = 0.0, repaid: float = 0.0) -> None:
        """Go by these costs from now on.

        Plain decoding is left only for a relative gain of at least `caution`, which comes to
        `repaid` tokens by the end of the text.
        """
        self._caution, self._repaid = caution, repaid
        self._costs = EQUAL_COSTS if costs is None else costs
        if self._together and self._costs.both is not None:
            self._costs = self._costs.together()

    def plan(self, evidence: Evidence) -> Plan:
        """The plan with the fewest predicted seconds per token."""
        plans = self._plans(evidence)
        if len(plans) == 1:
            return plans[0]
        predicted = {plan: self.predict(plan, evidence) for plan in plans}
        best = min(predicted, key=lambda plan: predicted[plan])
        needed = max(self._caution, self._repaid / evidence.remaining)
        if PLAIN in predicted and predicted[best] > (1 - needed) * predicted[PLAIN]:
            best = PLAIN
        if evidence.outstanding and best.scheme not in TURNS:
            ongoing = [plan for plan in predicted if plan.scheme in TURNS]
            if ongoing:
                stay = min(ongoing, key=lambda plan: predicted[plan])
                if predicted[stay] <= (1 + STAY) * predicted[best]:
                    return stay
        return best

    def predict(self, plan: Plan, evidence: Evidence) -> float:
        """Seconds per token of a plan, if the acceptance stays what it was observed to be."""
        accept = {name: evidence.acceptance(name) for name in PRIOR}
        if plan.scheme == "plain":
            return cost.plain(self._costs)
        if plan.scheme == "one-sided":
            return cost.one_sided(self._costs, plan.drafter, plan.gamma, accept[plan.drafter])
        if plan.scheme == "alternating":
            pair = accept["policy"], accept["teacher"]
            return cost.alternating(self._costs, plan.gamma, *pair, best_proposes=self._alone)
        if plan.stay is not None:
            accepts = accept["policy"], accept["teacher"], accept["coin"]
            return cost.coin(self._costs, plan.gamma, plan.stay, *accepts)
        if plan.scheme == "lookup":
            # Rows for which nothing is found get one token, for the same forward.
            of_rows = [
                1 / cost.third(self._costs, plan.gamma, expected, draft_forwards=0)
                for expected in evidence.lookups or [0.0]
            ]
            return len(of_rows) / sum(of_rows)
        if plan.scheme == "draft-model":
            return cost.third(self._costs, plan.gamma, accept["draft"], draft_forwards=plan.gamma)
        raise NotImplementedError(f"what a round of {plan.scheme!r} costs")

    def _plans(self, evidence: Evidence) -> list[Plan]:
        plans = []
        accept = evidence.acceptance("policy"), evidence.acceptance("teacher")
        for scheme in self._schemes:
            if scheme == "plain":
                plans.append(PLAIN)
                continue
            if scheme == "coin":
                best = max(PARENTS, key=evidence.acceptance)
                plans += [Plan(scheme, self._most_waiting, best, stay) for stay in self._stays]
                continue
            # A token of the target's own follows a third's drafts: that many fewer can be used.
            most = evidence.remaining - (scheme in OF_OTHERS)
            for gamma in dict.fromkeys(max(1, min(gamma, most)) for gamma in self._gammas):
                if scheme == "one-sided":
                    plans += [Plan(scheme, gamma, drafter) for drafter in self._drafters]
                elif scheme == "alternating":
                    best = cost.best_proposer(self._costs, gamma, *accept)
                    plans.append(Plan(scheme, gamma, best))
                elif scheme == "draft-model" or len(self._schemes) == 1 or any(evidence.lookups):
                    plans.append(Plan(scheme, gamma, "policy"))
        return plans


def together_is_faster(costs: Costs, alpha: float | None = None) -> bool:
    """Whether one call for both parents beats taking turns, at the acceptance that is hoped for."""
    if costs.both is None:
        return False
    hopes = [beyond(HOPE, name, alpha) for name in PARENTS]
    turns = [cost.alternating(costs, gamma, *hopes) for gamma in GAMMAS]
    return cost.plain(costs.together()) <= min(turns)


class Lookup:
    """What followed a text's last tokens where they stood in it before: of three, two or one.

    Every emitted token tells how often the guess by so many tokens is right, whether or not it was
    proposed. Over tokens drawn from q* this estimates the acceptance of a first draft.

    Attributes:
        text: The prompt, and what was emitted.
        guesses: As `GUESSES`.
        observed: By size, the discounted sum of right guesses about emitted tokens, and its weight.
    """

    def __init__(self, text: Sequence[int], guesses: Mapping[int, float] = GUESSES) -> None:
        """Index a text, which counts as a prompt: nothing is learned from it."""
        self.text: list[int] = []
        self.guesses = guesses
        self._after: dict[tuple[int, ...], int] = {}
        self.observed: dict[int, tuple[float, float]] = {}
        self.append(text)
        self.observed.clear()

    def append(self, tokens: Sequence[int]) -> None:
        """Add emitted tokens, and note which of them would have been guessed."""
        for token in tokens:
            if found := self._find():
                size, place = found
                observe(self.observed, size, self.text[place] == token, 1)
            for size in self.guesses:
                if len(self.text) >= size:
                    self._after[tuple(self.text[-size:])] = len(self.text)
            self.text.append(token)

    def expected(self) -> float:
        """The acceptance that is expected of the first token that `propose` would give; 0 of none.

        None is given where a guess of this kind was right less often than `WORTH_A_LOOKUP`.
        """
        found = self._find()
        if found is None:
            return 0.0
        size, _ = found
        expected = after(self.observed.get(size, (0.0, 0.0)), self.guesses[size])
        return expected if expected >= WORTH_A_LOOKUP else 0.0

    def propose(self, gamma: int) -> list[int]:
        """Up to gamma tokens, if any are worth it. A repetition is taken to go on."""
        found = self._find()
        if found is None or not self.expected():
            return []
        drafts: list[int] = []
        for i in range(found[1], found[1] + gamma):
            drafts.append(self.text[i] if i < len(self.text) else drafts[i - len(self.text)])
        return drafts

    def _find(self) -> tuple[int, int] | None:
        """By how many tokens a place was found, and where it is."""
        for size in self.guesses:
            if len(self.text) >= size and tuple(self.text[-size:]) in self._after:
                return size, self._after[tuple(self.text[-size:])]
        return None
