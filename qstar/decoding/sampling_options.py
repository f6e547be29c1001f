"""What is drawn, and how: the options that all ways to decode have in common.

`qstar.generate`, the hook of `qstar.adapters.transformers` and the class of `qstar.adapters.chat`
take these by name, and hand on one `Sampling`.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, TypeVar

from torch import Tensor

from .costs import Costs
from .filters import Processor

Stop = Callable[[Tensor, Any], Any]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The options of a decode, all but the models, their prompts and the generator.

    Only `max_new_tokens` must be said. Whether the options make sense is checked where they are
    used, together with the models (`qstar.decoding.options.check`); `dataclasses.replace` changes
    some of them. Which schemes there are, and which one is followed unless told, stands at
    `qstar.generate`.

    Attributes:
        max_new_tokens: The most tokens to draw for each row.
        scheme: One of `qstar.decoding.options.SCHEMES`; None decides by the other arguments.
        gamma: Draft tokens per round; for "coin", the most proposals that may wait to be judged.
            None adapts a named scheme's to the acceptance that was observed, and to the costs.
        stay: For "coin": the probability, at least 0 and below 1, that a parent goes on proposing
            after a proposal of its own. None lets the planner choose, for each parent its own.
        drafter: Who drafts in "one-sided": "policy" or "teacher"; None is the better one.
        block_verification: Judge a round's drafts together (`rules.verify_block`): as exact, and
            never fewer tokens a round.
        alpha: The exponent on the policy. None solves for alpha* at each position; a number fixes
            it (1 follows the policy, 0 the teacher). Outside [0, 1] it is guidance: for alpha > 1
            the policy, away from the teacher, and for alpha < 0 the teacher, away from the policy.
            With one model under two prompts this is its classifier-free guidance, of strength alpha
            for the policy's prompt. Nothing that the guided parent excludes is drawn. Where the
            parent with the negative exponent excludes a token that the other one may draw, there is
            nothing to draw from, and a ValueError says where.
        greedy: Take the most probable token in place of a draw.
        temperature: Of the distribution that is drawn from; 1 leaves it as it is.
        top_k: Keep the most probable tokens of that distribution only, this many.
        top_p: Keep the fewest most probable tokens that together have this probability.
        logits_processor: Processors of transformers, functions of (ids, scores) alone; they see the
            policy's text and the log-probabilities of that distribution.
        filtered: "target" filters q*; "parents" filters the parents' distributions before q* is
            formed, which can cut their supports apart (see `disjoint`), and lets processors see
            each parent's own text.
        disjoint: What to do where the parents share no token, so that q* does not exist: "raise",
            which loses what was drawn before, or "mixture" for their even mixture, the limit that
            smoothing gives; the trace's status says where. None is "raise", save where top-k or the
            like cuts the parents' supports apart (filtered="parents"): there it must be named. With
            guidance there is no such limit, and "mixture" is refused.
        eos_token_id: What ends a row: an id, or several; "policy" takes the policy's generation
            config's, None lets every row run on. Ids outside the vocabulary are ignored.
        stopping_criteria: Criteria of transformers: called after each new token of a row with
            (ids, None), the ids being the policy's prompt and the new tokens so far.
        vocab: Use only the first this many ids, for models whose output layers are padded to
            different sizes. None expects equal sizes.
        context_length: The most tokens of a text, for each model, in place of what configurations
            say: rotary positions go on as far as one likes, a table of positions ends where it
            ends. None follows the configurations, scaled positions (linear, YaRN) included.
        cache_implementation: "static" reads each model over a cache of fixed size, whose forwards
            are captured once and replayed on an accelerator (`qstar.decoding.captured`); "dynamic"
            over one that grows. None is "static" on an accelerator, for models that allow it.
        one_call: Whether one model that is both parents reads both texts in one call, as two rows
            of a batch; it can then not draft for itself. None does so in the schemes that allow it
            ("plain", "lookup", "draft-model"), and in "auto" unless turns were seen to be faster.
        costs: What forward passes take, for the choice of schemes and draft lengths. None lets
            "auto" learn it (`qstar.decoding.latency`), and else assumes that a forward pass takes
            the same at every width, of either parent.
    """

    max_new_tokens: int | None = None
    scheme: str | None = None
    gamma: int | None = None
    stay: float | None = None
    drafter: str | None = None
    block_verification: bool = False
    alpha: float | None = None
    greedy: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    logits_processor: Sequence[Processor] = ()
    filtered: str = "target"
    disjoint: str | None = None
    eos_token_id: int | Sequence[int] | str | None = "policy"
    stopping_criteria: Sequence[Stop] = ()
    vocab: int | None = None
    context_length: int | None = None
    cache_implementation: str | None = None
    one_call: bool | None = None
    costs: Costs | None = None


def check_names(names: Iterable[str], others: Collection[str] = ()) -> None:
    """Raise TypeError for a name that is no field of `Sampling`, and none of some others."""
    known = [*(field.name for field in fields(Sampling)), *others]
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise TypeError(
                f"there is no option {name!r}. {hint}The options are the fields of qstar.Sampling: "
                f"{', '.join(known)}."
            )


def shows_options(function: F, but: Collection[str] = ()) -> F:
    """The function, whose signature names the options (`but` some) that its last argument takes.

    For `help`, and for transformers, which hands a callable only what its signature names.
    """
    own = inspect.signature(function)
    *given, last = own.parameters.values()
    named = [p for name, p in inspect.signature(Sampling).parameters.items() if name not in but]
    rest = [last] if but else []  # then it takes other things too
    function.__signature__ = own.replace(parameters=[*given, *named, *rest])  # type: ignore[attr-defined]
    return function
