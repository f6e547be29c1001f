"""What to say where a token was to be drawn and there was no distribution to draw it from."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .costs import PARENTS, other
from .judging import Rule
from .parents import Parents
from .state import Proposal, State


def check_emitted(
    parents: Parents,
    rule: Rule,
    state: State,
    proposal: Proposal,
    log_p: Mapping[str, Tensor],
    log_target: Tensor,
    seen: Mapping[str, Any],
    emitted: Sequence[Sequence[int]],
) -> None:
    """ValueError where an emitted token had no distribution: nan, or no token left.

    So it is with a draft that was judged and came from none, or was to follow none, even if it was
    not kept: a block that is judged as a whole would follow another distribution.

    `log_p` is what q* was formed from, by parent, `log_target` q* after the filters; `seen` is what
    the host knows of the round (`round.fetch`), whose `suspect` is true of every position where
    anything is wrong; `state` is from before it, and `emitted` has the new tokens of each row.
    """
    if not bool(seen["suspect"].any()):
        return
    nan = {name: log_rows.amax(-1).isnan().cpu() for name, log_rows in log_p.items()}
    nan["target"] = log_target.amax(-1).isnan().cpu()
    nan["draft"] = proposal.log_draft.amax(-1).isnan().cpu()
    for place, row in enumerate(state.rows):
        start, length = len(state.new[row]), len(emitted[place])
        if rule.blocks:  # what is judged as a whole depends on every draft
            length = max(length, proposal.counts[place])
        for name in PARENTS:
            at = _first(nan[name][place, :length])
            if at is not None:
                raise ValueError(_nan(parents, rule, state, name, start + at, row))
        at = _first(seen["undefined"][place, :length])
        if at is not None and rule.divisor is not None:
            log_parents = {name: log_p[name][place, at] for name in PARENTS}
            raise ValueError(_no_quotient(rule, rule.divisor, log_parents, start + at, row))
        at = _first(seen["disjoint"][place, :length])
        if at is not None and rule.disjoint == "raise":
            raise ValueError(
                f"policy and teacher share no token at new token {start + at}, row {row}: q* does "
                f"not exist there. Something (a filter, a mask on the logits) cut their supports "
                f"apart. Apply a filter to q* (filtered='target'), or pass disjoint='mixture' for "
                f"the even mixture at such positions."
            )
        at = _first(nan["target"][place, :length])
        if at is not None:
            raise ValueError(
                f"the filters leave no token at new token {start + at}, row {row}: a logits "
                f"processor banned all of them, or answered nan. Loosen it."
            )
        at = _first(nan["draft"][place, : min(length, proposal.counts[place])])
        if at is not None:
            name = "draft model" if proposal.by == "draft" else proposal.by
            raise ValueError(_nan(parents, rule, state, name, start + at, row))


def _first(signs: Tensor) -> int | None:
    found = signs.nonzero()
    return int(found[0]) if len(found) else None


def _no_quotient(rule: Rule, divisor: str, log_p: Mapping[str, Tensor], at: int, row: int) -> str:
    """What to say where guidance divides by a probability of zero."""
    guided = other(divisor)
    lost = (log_p[divisor] == -torch.inf) & (log_p[guided] > -torch.inf)
    if not bool(lost.any()):
        return (
            f"alpha={rule.alpha} overflows at new token {at}, row {row}: the log-probabilities, "
            f"times that, are beyond {log_p[guided].dtype}. Take an alpha nearer to [0, 1]."
        )
    likeliest = int(log_p[guided].masked_fill(~lost, -torch.inf).argmax())
    advice = (
        "Apply the filters to what is drawn from (filtered='target')"
        if rule.of_parents.steps
        else "Exclude such tokens from both (a logits processor that bans them, filtered='parents')"
    )
    return (
        f"the {divisor} excludes {int(lost.sum())} of the tokens that the {guided} may draw at new "
        f"token {at}, row {row} (the likeliest is token {likeliest}, of probability "
        f"{float(log_p[guided][likeliest].exp()):.3g}): with alpha={rule.alpha} the {divisor} is "
        f"divided by, and there is nothing to draw from. {advice}, or take an alpha in [0, 1]."
    )


def _nan(parents: Parents, rule: Rule, state: State, name: str, at: int, row: int) -> str:
    filtered = ", or a filter left no token there" if rule.filters.steps else ""
    cache = parents.caches.get("draft" if name == "draft model" else name)
    model = (cache or parents.caches["both"]).model
    return (
        f"the {name} answers nan at new token {at}, row {row}: its logits hold nan or +inf, or are "
        f"all -inf{filtered}. {_advice(model, len(state.new) > 1)}"
    )


def _advice(model: Any, batch: bool) -> str:
    """What to do about a model that answers nan, by what can be seen of it."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and weight.dtype.itemsize > 1 and weight.isnan().any():
            return f"Its weights hold nan ({name}): load it again, from a whole file."
    if model.dtype.itemsize < 4:
        return "Try wider weights (dtype=torch.float32)."
    if batch and getattr(model.config, "_attn_implementation", None) == "eager":
        return (
            "Load it with attn_implementation='sdpa': eager attention answers nan in float64 where "
            "the padding of a batch sees no token. Or take weights in float32."
        )
    return "Look for what broke the model: its weights are free of nan, and wide enough."
