"""What a token from q* costs under each decoding scheme: seconds, or forwards.

A forward is one model over one block of positions; its width is how many. `Costs` holds what
forwards take on a machine, and the functions predict seconds per token from it and from the
acceptance probabilities of the drafters, taken to be independent from one position to the next. No
model and no tensor here: the decoder's choice of a scheme and the book's cost model are the same
few lines.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

from ..arguments import check_count

PARENTS = ("policy", "teacher")
SCHEMES = ("plain", "one-sided", "alternating", "coin", "lookup", "draft-model")
PROPOSING = (*PARENTS, "coin")
"""Whom a proposal may come from where parents propose: one of them, or either with even odds."""
TURNS = ("alternating", "coin")
"""The schemes in which the parents take turns: one proposes what the other goes on to judge."""
OF_OTHERS = ("lookup", "draft-model")
"""The schemes whose drafts are no parent's: both parents read them, and a token of q* follows."""
LONGEST = 8
"""The draft length up to which `expected_speedup` looks for the best."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What one forward of each model takes, by width.

    Attributes:
        policy: Width to seconds of one forward; at least width 1.
        teacher: The same for the teacher.
        draft: The same for a third model that drafts, if there is one.
        both: The same where one model is both parents: of a call that reads for both at once.
        overhead: Seconds per round outside the models. A round ends with a verification (in
            `plain` decoding with a token).

    Raises:
        ValueError: Width 1 is missing, a width is no positive integer, or a time is negative or
            not finite.
    """

    policy: Mapping[int, float]
    teacher: Mapping[int, float]
    draft: Mapping[int, float] | None = None
    both: Mapping[int, float] | None = None
    overhead: float = 0.0

    def __post_init__(self) -> None:
        for model in (*PARENTS, "draft", "both"):
            seconds = getattr(self, model)
            if seconds is not None:
                object.__setattr__(self, model, _checked_seconds(model, seconds))
        if not (math.isfinite(self.overhead) and self.overhead >= 0):
            raise ValueError(f"overhead must be seconds, finite and >= 0: got {self.overhead!r}.")

    def together(self) -> "Costs":
        """The costs where each call serves both parents: half of it is counted for either."""
        if self.both is None:
            raise ValueError("no call for both parents was measured: pass Costs(..., both=...).")
        half = {width: seconds / 2 for width, seconds in self.both.items()}
        return Costs(half, half, self.draft, None, self.overhead)

    def of(self, model: str, width: int) -> float:
        """Seconds of one forward of "policy", "teacher" or "draft" over `width` positions.

        Between measured widths the line through the two neighbours; beyond the last one the line
        through the last two, but never less than the last; with a single measured width, that.
        """
        if model not in (*PARENTS, "draft"):
            raise ValueError(f"model must be policy, teacher or draft: got {model!r}.")
        seconds: Mapping[int, float] | None = getattr(self, model)
        if seconds is None:
            raise ValueError("no draft model was measured: pass Costs(..., draft={1: seconds}).")
        width = check_count("width", width)
        widths = list(seconds)
        if width in seconds or len(widths) == 1:
            return seconds.get(width, seconds[widths[0]])
        right = min(bisect_right(widths, width), len(widths) - 1)
        low, high = widths[right - 1], widths[right]
        slope = (seconds[high] - seconds[low]) / (high - low)
        if width > high:
            slope = max(0.0, slope)
        return seconds[high] + slope * (width - high)


def plain(costs: Costs) -> float:
    """Seconds per token where both parents read every token."""
    return costs.of("policy", 1) + costs.of("teacher", 1) + costs.overhead


def one_sided(costs: Costs, drafter: str, gamma: int, acceptance: float) -> float:
    """Seconds per token where one parent always drafts and the other always verifies.

    A round is gamma forwards of width 1 of the drafter and one of width gamma of the verifier. At
    the position after the drafts only the verifier's distribution is known, not q*, so there is no
    bonus token: a round emits (1 - a^gamma) / (1 - a) tokens, of acceptance probability a.

    Args:
        costs: What a forward takes.
        drafter: "policy" or "teacher".
        gamma: Draft tokens per round, at least 1.
        acceptance: The acceptance probability of the drafter, in [0, 1].
    """
    gamma = check_count("gamma", gamma)
    verifier = other(drafter)
    round_s = gamma * costs.of(drafter, 1) + costs.of(verifier, gamma) + costs.overhead
    return round_s / _tokens(acceptance, gamma)


def alternating(
    costs: Costs,
    gamma: int,
    accept_policy: float,
    accept_teacher: float,
    *,
    best_proposes: bool = True,
) -> float:
    """Seconds per token where the parents take turns at proposing.

    The verifier of a round reads the last emitted token and gamma proposals in one forward of width
    gamma + 1. If all are accepted its distribution after the last one proposes the next token at no
    cost, gamma - 1 forwards of width 1 extend that, and the other parent verifies. If one is
    rejected the residual token is emitted, and a parent drafts afresh with gamma forwards of width
    1. No token is ever a bonus: a round emits (1 - a^gamma) / (1 - a) tokens.

    Who proposes is a Markov chain with two states. From proposer X it passes to the other parent
    with probability s_X = a_X^gamma; after a rejection X itself proposes again (strict alternation
    of turns: the chain is in X in proportion to 1 / s_X, so that the worse drafter drafts more), or
    always the same, better, parent.

    Args:
        costs: What a forward takes.
        gamma: Proposals per round, at least 1.
        accept_policy: The acceptance probability of tokens that the policy proposes, in [0, 1].
        accept_teacher: The same for the teacher.
        best_proposes: After a rejection `best_proposer` proposes; otherwise the parent that was
            rejected.

    Source: derived here; for equal costs and acceptances the ratio to `plain` at gamma = 1 is
        2 / (2 - a).
    """
    if best_proposes:
        best = best_proposer(costs, gamma, accept_policy, accept_teacher)
        return _alternating(costs, gamma, (accept_policy, accept_teacher), best)
    return _alternating(costs, gamma, (accept_policy, accept_teacher), None)


def best_proposer(costs: Costs, gamma: int, accept_policy: float, accept_teacher: float) -> str:
    """Which parent had better propose after a rejection in `alternating`: fewer seconds per token.

    At equal costs that is the one with the higher acceptance probability; the policy if it makes
    no difference.
    """
    accepts = accept_policy, accept_teacher
    return min(PARENTS, key=lambda parent: _alternating(costs, gamma, accepts, parent))


def coin(
    costs: Costs,
    gamma: int,
    stay: tuple[float, float],
    accept_policy: float,
    accept_teacher: float,
    accept_coin: float,
) -> float:
    """Seconds per token where a coin decides which parent proposes (`qstar.decoding.coin`).

    A proposer X goes on with probability s_X, up to gamma tokens: its proposals have on average
    (1 - s^gamma) / (1 - s) of them, each a forward of width 1 but the first, which its reading of
    the other's proposals gave. Each token is judged against a mixture of the parents, whose
    acceptance is concave in the weight: between the policy's, the even mixture's and the teacher's
    the chords are taken, which promise too little rather than too much.

    Args:
        costs: What a forward takes.
        gamma: The most tokens that may wait to be judged, at least 1.
        stay: s of the policy and of the teacher, in [0, 1).
        accept_policy: The acceptance probability of tokens that the policy proposes, in [0, 1].
        accept_teacher: The same for the teacher.
        accept_coin: The same where an even coin chooses the proposer.

    Source: derived here; for equal costs, equal s, no limit and one acceptance a, the forwards per
        token are 1 + (1 - a) / (1 - s).
    """
    gamma = check_count("gamma", gamma)
    for acceptance in (accept_policy, accept_teacher, accept_coin):
        _tokens(acceptance, 1)  # checks it
    staying = dict(zip(PARENTS, stay, strict=True))
    for name, s in staying.items():
        if not 0 <= s < 1:
            raise ValueError(f"the {name} stays with a probability in [0, 1): got {s!r}.")

    def accept(name: str, weight: float) -> float:
        policy = weight if name == PARENTS[0] else 1 - weight
        end = accept_policy if policy > 0.5 else accept_teacher
        return accept_coin + (end - accept_coin) * abs(2 * policy - 1)

    lengths = {
        name: {k: s ** (k - 1) * (1 - s if k < gamma else 1) for k in range(1, gamma + 1)}
        for name, s in staying.items()
    }
    first = {name: accept(name, 1 - staying[other(name)]) for name in PARENTS}
    further = {name: accept(name, s) for name, s in staying.items()}
    afresh = (stay[0] + 1 - stay[1]) / 2
    return _turns(costs, lengths, first, further, dict.fromkeys(PARENTS, afresh))


def third(costs: Costs, gamma: int, acceptance: float, *, draft_forwards: int) -> float:
    """Seconds per token where something cheap drafts and both parents verify.

    Each parent reads the last emitted token and gamma drafts in one forward of width gamma + 1.
    Then q* itself is known after the last draft, and the token drawn there is exact: a round emits
    (1 - a^(gamma + 1)) / (1 - a) tokens.

    Args:
        costs: What a forward takes; its `draft` is needed if there are draft forwards.
        gamma: Draft tokens per round; 0 is plain decoding.
        acceptance: The acceptance probability of a draft, in [0, 1]. For a looked-up token it is
            q*'s own probability of that token, averaged over the positions where one is found.
        draft_forwards: Forwards of width 1 of the draft model per round: gamma, or 0 for a lookup.
    """
    gamma = check_count("gamma", gamma, least=0)
    draft_forwards = check_count("draft_forwards", draft_forwards, least=0)
    verify_s = sum(costs.of(parent, gamma + 1) for parent in PARENTS)
    draft_s = draft_forwards * costs.of("draft", 1) if draft_forwards else 0.0
    return (draft_s + verify_s + costs.overhead) / _tokens(acceptance, gamma + 1)


def forwards_per_token(
    scheme: str,
    gamma: int = 1,
    acceptance: float | tuple[float, float] = 0.0,
    *,
    best_proposes: bool = True,
    stay: float = 0.5,
) -> float:
    """Forwards of the parents per token: the cost where every forward costs the same, whatever
    its width. Those of a third draft model do not count.

    Args:
        scheme: One of `SCHEMES`.
        gamma: Draft tokens per round; ignored by "plain".
        acceptance: The acceptance probability of the drafter; for "alternating" also a pair, of
            the policy and of the teacher, and for "coin" that of the mixture. Ignored by "plain".
        best_proposes: As in `alternating`.
        stay: As in `coin`, of either parent.
    """
    unit = Costs(policy={1: 1.0}, teacher={1: 1.0})
    if scheme == "plain":
        return plain(unit)
    if scheme == "alternating":
        pair = acceptance if isinstance(acceptance, tuple) else (acceptance, acceptance)
        return alternating(unit, gamma, *pair, best_proposes=best_proposes)
    if isinstance(acceptance, tuple):
        raise ValueError(f"{scheme!r} has one drafter, so one acceptance: got {acceptance!r}.")
    if scheme == "one-sided":
        return one_sided(unit, "policy", gamma, acceptance)
    if scheme == "coin":
        return coin(unit, gamma, (stay, stay), acceptance, acceptance, acceptance)
    if scheme in OF_OTHERS:
        return third(unit, gamma, acceptance, draft_forwards=0)
    raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}: got {scheme!r}.")


def expected_speedup(
    acceptance: float | Mapping[str, float],
    costs: Costs,
    scheme: str,
    *,
    gamma: int | None = None,
    stay: tuple[float, float] = (0.5, 0.5),
) -> float:
    """How many times faster than `plain` a scheme is expected to be.

    Args:
        acceptance: The acceptance probability by proposer ("policy", "teacher", "coin", "draft",
            "lookup"), in [0, 1]; a number, of whoever proposes. Ignored by "plain".
        costs: What a forward takes.
        scheme: One of `SCHEMES`.
        gamma: Draft tokens per round, for "coin" the most that may wait; None for the best of 1 to
            `LONGEST`. "one-sided" lets the better parent draft.
        stay: As in `coin`.
    """
    everyone = (*PROPOSING, "draft", "lookup")
    accept = acceptance if isinstance(acceptance, Mapping) else dict.fromkeys(everyone, acceptance)

    def seconds(gamma: int) -> float:
        if scheme == "plain":
            return plain(costs)
        if scheme == "one-sided":
            return min(one_sided(costs, who, gamma, accept[who]) for who in PARENTS)
        if scheme == "alternating":
            return alternating(costs, gamma, accept["policy"], accept["teacher"])
        if scheme == "coin":
            return coin(costs, gamma, stay, *(accept[who] for who in PROPOSING))
        if scheme == "lookup":
            return third(costs, gamma, accept["lookup"], draft_forwards=0)
        if scheme == "draft-model":
            return third(costs, gamma, accept["draft"], draft_forwards=gamma)
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}: got {scheme!r}.")

    lengths = range(1, LONGEST + 1) if gamma is None else (gamma,)
    return plain(costs) / min(seconds(length) for length in lengths)


def expected_forwards_alternating(num_tokens: int, rejections: float) -> float:
    """Forwards that alternating with gamma = 1 takes for finitely many tokens, in the rounds.

    One to propose the first token, one to verify each, and one to propose afresh after each
    rejection: 1 + n + rejections. Exact, and not only on average.

    Args:
        num_tokens: How many tokens are emitted, at least 1.
        rejections: Rejections among the first num_tokens - 1 of them: after the last token nobody
            proposes. A mean number is fine: a mean comes back.
    """
    if num_tokens < 1 or not 0 <= rejections <= num_tokens - 1:
        raise ValueError(
            f"expected at least one token, and from 0 to num_tokens - 1 rejections before the "
            f"last: got {num_tokens!r} tokens and {rejections!r} rejections."
        )
    return 1 + num_tokens + rejections


def expected_forwards(
    scheme: str, num_tokens: int, gamma: int = 1, acceptance: float | tuple[float, float] = 0.0
) -> float:
    """Forwards of the parents that finitely many tokens take on average, in the rounds.

    Exact where the acceptance is the same at every position. The last rounds draft no more than
    there is room for, and after the last token nobody proposes; `forwards_per_token` leaves these
    ends out.

    Args:
        scheme: "plain", "one-sided" or "alternating".
        num_tokens: How many tokens are emitted, at least 1.
        gamma: Draft tokens per round; ignored by "plain".
        acceptance: The acceptance probability of the drafter; for "alternating" also a pair, of
            the policy and of the teacher. The better one proposes after a rejection.
    """
    gamma = check_count("gamma", gamma)
    num_tokens = check_count("num_tokens", num_tokens)
    pair = acceptance if isinstance(acceptance, tuple) else (acceptance, acceptance)
    accepts = dict(zip(PARENTS, pair, strict=True))
    for accept in pair:
        _tokens(accept, 1)  # checks it
    if scheme == "plain":
        return 2.0 * num_tokens
    if scheme == "alternating":
        unit = Costs(policy={1: 1.0}, teacher={1: 1.0})
        best = best_proposer(unit, gamma, *pair)
    elif scheme == "one-sided":
        if pair[0] != pair[1]:
            raise ValueError(f"{scheme!r} has one drafter, so one acceptance: got {acceptance!r}.")
        best = PARENTS[0]
    else:
        raise ValueError(f"scheme must be plain, one-sided or alternating: got {scheme!r}.")
    # Forwards still to come by the number of tokens that are left: with nothing drafted, and with
    # min(gamma, left) drafts of a parent waiting to be verified.
    afresh, waiting = [0.0], {parent: [0.0] for parent in PARENTS}
    for left in range(1, num_tokens + 1):
        drafts = min(gamma, left)
        for parent, accept in accepts.items():
            cut = (accept**kept * (1 - accept) * afresh[left - kept - 1] for kept in range(drafts))
            rest = left - drafts
            if scheme == "one-sided":
                beyond = afresh[rest]
            else:
                beyond = max(0, min(gamma, rest) - 1) + waiting[other(parent)][rest]
            waiting[parent].append(1 + math.fsum(cut) + accept**drafts * beyond)
        afresh.append(drafts + waiting[best][left])
    return afresh[num_tokens]


def _alternating(
    costs: Costs, gamma: int, accepts: tuple[float, float], redrafter: str | None
) -> float:
    """Seconds per token if `redrafter` (None: the rejected proposer) drafts after a rejection."""
    length = {check_count("gamma", gamma): 1.0}
    accept = dict(zip(PARENTS, accepts, strict=True))
    chance = {name: 1.0 if (redrafter or name) == PARENTS[0] else 0.0 for name in PARENTS}
    return _turns(costs, dict.fromkeys(PARENTS, length), accept, accept, chance)


def _turns(
    costs: Costs,
    lengths: Mapping[str, Mapping[int, float]],
    first: Mapping[str, float],
    further: Mapping[str, float],
    policy_redrafts: Mapping[str, float],
) -> float:
    """Seconds per token where the parents judge each other's proposals.

    Args:
        costs: What a forward takes.
        lengths: By proposer, how probable it is that a proposal has so many tokens.
        first: By proposer, the acceptance probability of a proposal's first token.
        further: The same of the others.
        policy_redrafts: By proposer, how probable it is that after its rejection the policy drafts.
    """
    longest = {name: sum(k * p for k, p in lengths[name].items()) for name in PARENTS}
    tokens, seconds, leave = {}, {}, {}
    for proposer in PARENTS:
        for accept in (first[proposer], further[proposer]):
            _tokens(accept, 1)  # checks it
        verifier, policy = other(proposer), policy_redrafts[proposer]
        kept = {0: 1.0}  # the probability that so many tokens are all kept
        for k in range(1, max(lengths[proposer]) + 1):
            kept[k] = kept[k - 1] * (first if k == 1 else further)[proposer]
        all_kept = sum(p * kept[k] for k, p in lengths[proposer].items())
        tokens[proposer] = sum(
            p * math.fsum(kept[i] for i in range(k)) for k, p in lengths[proposer].items()
        )
        judge_s = sum(p * costs.of(verifier, k + 1) for k, p in lengths[proposer].items())
        next_s = all_kept * (longest[verifier] - 1) * costs.of(verifier, 1)
        for name, chance in zip(PARENTS, (policy, 1 - policy), strict=True):
            next_s += (1 - all_kept) * chance * longest[name] * costs.of(name, 1)
        seconds[proposer] = judge_s + next_s + costs.overhead
        redraws = policy if verifier == PARENTS[0] else 1 - policy
        leave[proposer] = all_kept + (1 - all_kept) * redraws
    # The chain is in X as often as it comes there from the other parent: in proportion to how
    # surely it leaves the other. Where it leaves neither, it stays where it began: say, in each
    # half of the time.
    weights = {parent: leave[other(parent)] for parent in PARENTS}
    if not any(weights.values()):
        weights = dict.fromkeys(PARENTS, 1.0)
    means = [sum(weights[parent] * of[parent] for parent in PARENTS) for of in (seconds, tokens)]
    return means[0] / means[1]


def _tokens(acceptance: float, most: int) -> float:
    """1 + a + ... + a^(most - 1), which is (1 - a^most) / (1 - a), at a = 1 too."""
    if not 0 <= acceptance <= 1:  # nan included
        raise ValueError(f"an acceptance probability lies in [0, 1]: got {acceptance!r}.")
    return math.fsum(acceptance**kept for kept in range(most))


def other(parent: str) -> str:
    """The policy's name for the teacher's, and the other way round; ValueError for any other."""
    if parent not in PARENTS:
        raise ValueError(f"a drafter must be policy or teacher: got {parent!r}.")
    return PARENTS[parent == "policy"]


def _checked_seconds(model: str, seconds: Mapping[int, float]) -> dict[int, float]:
    """Width to seconds in the order of the widths."""
    seconds = {check_count(f"{model}: a width", width): s for width, s in seconds.items()}
    if 1 not in seconds:
        raise ValueError(
            f"{model} must give the seconds of a forward of width 1 at least: got widths "
            f"{sorted(seconds)}."
        )
    for width, value in seconds.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(
                f"{model}: width {width} must take seconds, finite and >= 0: got {value!r}."
            )
    return dict(sorted(seconds.items()))
