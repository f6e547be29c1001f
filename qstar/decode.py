"""Token sequences from q* of two language models, one position at a time.

    policy, tokenizer = models.load("smollm2-135m-instruct-q4")
    result = generate(policy, policy, ids, teacher_ids, max_new_tokens=40, generator=0)
    tokenizer.decode(result.tokens[: result.lengths])

The law is the token-level one: each token is drawn from the geometric mean of the two next-token
laws, given the tokens so far. Its product over the positions is not the geometric mean of the two
laws of whole sequences.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .batched import solve_kl_symmetry
from .models import Stepper
from .result import STATUSES, Balance

TensorBalance = Balance[Tensor, Tensor, Tensor]

BLOCK_ENTRIES = 2**18
"""Rows times vocabulary that `measure` takes at a time: it bounds the memory, and fits a cache."""


@dataclass(frozen=True, slots=True)
class Trace:
    """The two parents at every position, and how the law between them was chosen there.

    One entry per position, shaped like the tokens it goes with. Where no token was drawn numbers
    are nan and statuses -1. Divergences are in nats, computed in float64 where the device has it.

    Attributes:
        balance: alpha*, the Chernoff information, the status and the rest of the solution.
        alpha: The exponent that was used: alpha*, unless it was fixed.
        minus_log_partition: -log Z(alpha); at alpha* it is the Chernoff information.
        minus_log_partition_half: -log Z(1/2), the Bhattacharyya distance of the parents. It is
            below the Chernoff information by KL(q* || q_1/2): what solving for alpha* buys.
        policy_to_teacher: KL(policy || teacher).
        teacher_to_policy: KL(teacher || policy).
        accept_policy: The acceptance probability of a token drafted by the policy if the output
            must follow q_alpha.
        accept_teacher: The same for a token drafted by the teacher.
        log_ratio_range: The largest minus the smallest of log policy - log teacher over the
            shared support, which bounds how far alpha* can be from 1/2.
    """

    balance: TensorBalance
    alpha: Float[Tensor, "*positions"]
    minus_log_partition: Float[Tensor, "*positions"]
    minus_log_partition_half: Float[Tensor, "*positions"]
    policy_to_teacher: Float[Tensor, "*positions"]
    teacher_to_policy: Float[Tensor, "*positions"]
    accept_policy: Float[Tensor, "*positions"]
    accept_teacher: Float[Tensor, "*positions"]
    log_ratio_range: Float[Tensor, "*positions"]


@dataclass(frozen=True, slots=True)
class Generation:
    """New tokens, how many there are, and what was known where each was drawn.

    Attributes:
        tokens: The new tokens only, `max_new_tokens` of them; a row that ended earlier is filled
            up with the token that ended it.
        lengths: How many tokens of each row were drawn, the one that ended it included.
        trace: What was known at each position; its entries have the shape of `tokens`.
    """

    tokens: Int[Tensor, "*batch new"]
    lengths: Int[Tensor, "*batch"]
    trace: Trace


def generate(
    policy: Any,
    teacher: Any,
    policy_ids: Int[Tensor, "*batch length"],
    teacher_ids: Int[Tensor, "*batch teacher_length"] | None = None,
    *,
    max_new_tokens: int,
    alpha: float | None = None,
    greedy: bool = False,
    generator: torch.Generator | int | None = None,
    eos_token_id: int | Sequence[int] | str | None = "policy",
    on_tokens: Callable[[Int[Tensor, "batch new"]], object] | None = None,
) -> Generation:
    """Draw tokens from q*, the KL-symmetric geometric mean of two language models.

    Both models read every token (two forwards a token), each after its own prompt and with its
    own key-value cache. They are put in eval mode and given back as they were. One uniform number
    per row and position, drawn on the CPU, decides a token, so that a seed means the same on
    every device. (Two devices can still part ways, where their logits differ by rounding and the
    number falls in between.)

    Args:
        policy: A causal language model of transformers.
        teacher: Another over the same vocabulary (`models.check_same_vocabulary`), or the policy
            itself under another prompt.
        policy_ids: The policy's prompt. One dimension for one sequence; two for a batch of
            prompts of equal length, without padding (nothing here tells padding from text).
        teacher_ids: The teacher's prompt, None for the policy's; it may have another length.
        max_new_tokens: The most tokens to draw for each row.
        alpha: The exponent on the policy. None solves for alpha* at each position; a number in
            [0, 1] fixes it (1 follows the policy, 0 the teacher).
        greedy: Take the most probable token in place of a draw.
        generator: A CPU generator, or a seed; None means torch's own CPU generator.
        eos_token_id: What ends a row: "policy" takes the policy's generation config's, None lets
            every row run on. Ids outside the vocabulary are ignored.
        on_tokens: Called with each block of new tokens as it comes, on the CPU.

    Returns:
        A `Generation` on the device of `policy_ids`.

    Raises:
        ValueError: An argument makes no sense, the vocabularies differ in size, the text would
            exceed a context window, a model answers nan, or the parents share no token at some
            position, so that q* does not exist there. The message says where.

    Source: the analysis, problem 1; its loop is replaced by a draw that is exact.
    """
    steppers = Stepper(policy), Stepper(teacher)
    _check_count(max_new_tokens)
    feeds = _check_prompts(steppers, policy_ids, teacher_ids, max_new_tokens)
    fixed = _check_alpha(alpha)
    source = _check_generator(generator)
    ends = _check_ends(eos_token_id, policy, steppers[0].vocab)

    batch = len(feeds[0])
    last = torch.zeros(batch, dtype=torch.long)
    running = torch.ones(batch, dtype=torch.bool)
    columns, traces = [], []
    with torch.no_grad(), _eval_mode(policy, teacher):
        for position in range(max_new_tokens):
            rows = [_widen(s.feed(ids)[:, -1]) for s, ids in zip(steppers, feeds, strict=True)]
            log_policy, log_teacher = rows[0], rows[1].to(rows[0].device)
            _check_numbers(log_policy, log_teacher, position)
            log_q, trace = _law(log_policy, log_teacher, fixed)
            _check_support(trace, running, position)
            if greedy:
                drawn = log_q.argmax(dim=-1)
            else:
                uniform = torch.rand(batch, dtype=torch.float64, generator=source)
                drawn = _inverse_cdf(log_q, uniform)
            last = torch.where(running, drawn.cpu(), last)  # this scheme waits on every token
            columns.append(last)
            traces.append(_where(running, trace))
            feeds = (last[:, None], last[:, None])
            if on_tokens is not None:
                on_tokens(last[:, None].clone())
            running = running & ~torch.isin(last, ends)
            if not running.any():
                break
    return _collect(columns, traces, ends, max_new_tokens, policy_ids)


def measure(
    log_policy: Float[Tensor, "*positions vocab"],
    log_teacher: Float[Tensor, "*positions vocab"],
    *,
    alpha: float | None = None,
) -> Trace:
    """What `generate` would report at positions where the parents have these laws.

    Args:
        log_policy: Log-probabilities of the policy, in any precision; computed in float64.
        log_teacher: The same for the teacher, of the same shape.
        alpha: None solves for alpha*; a number in [0, 1] fixes the exponent.

    Raises:
        ValueError: The shapes differ, or a row is not a distribution.
    """
    if log_policy.shape != log_teacher.shape or log_policy.ndim == 0:
        raise ValueError(
            f"log_policy and log_teacher must have one shape, vocabulary last: got "
            f"{tuple(log_policy.shape)} and {tuple(log_teacher.shape)}."
        )
    fixed = _check_alpha(alpha)
    *shape, vocab = log_policy.shape
    rows = max(1, BLOCK_ENTRIES // vocab)
    pairs = zip(
        log_policy.reshape(-1, vocab).split(rows),
        log_teacher.reshape(-1, vocab).split(rows),
        strict=True,
    )
    flat = concatenate([_law(_widen(p), _widen(r), fixed)[1] for p, r in pairs])
    return _map(lambda values: values[0].reshape(shape), flat)


def concatenate(traces: Sequence[Trace]) -> Trace:
    """One trace of all their positions, which must be along a single axis."""
    return _map(torch.cat, *traces)


def to_cpu(trace: Trace) -> Trace:
    """The same trace, ready for NumPy."""
    return _map(lambda values: values[0].cpu(), trace)


# --- The law at a position -----------------------------------------------------------------------


def _widen(log_p: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
    """The same laws in the widest type the device has, normalised in it."""
    wide = torch.float32 if log_p.device.type == "mps" else torch.float64
    return torch.log_softmax(log_p, dim=-1, dtype=wide)


def _law(
    log_policy: Float[Tensor, "batch vocab"],
    log_teacher: Float[Tensor, "batch vocab"],
    fixed: float | None,
) -> tuple[Float[Tensor, "batch vocab"], Trace]:
    """log q_alpha, and the pair it lies between."""
    balance = solve_kl_symmetry(log_policy, log_teacher)
    alpha = balance.alpha if fixed is None else torch.full_like(balance.alpha, fixed)
    shared = torch.isfinite(log_policy) & torch.isfinite(log_teacher)
    log_path = _log_path(log_policy, log_teacher, shared, alpha)
    log_partition = torch.logsumexp(log_path, dim=-1)
    half = _log_path(log_policy, log_teacher, shared, torch.full_like(alpha, 0.5))
    log_q = log_path - log_partition.unsqueeze(-1)
    log_ratio = torch.where(shared, log_policy - log_teacher, torch.nan)
    trace = Trace(
        balance=balance,
        alpha=alpha,
        minus_log_partition=-log_partition,
        minus_log_partition_half=-torch.logsumexp(half, dim=-1),
        policy_to_teacher=_kl(log_policy, log_teacher),
        teacher_to_policy=_kl(log_teacher, log_policy),
        accept_policy=torch.minimum(log_policy, log_q).exp().sum(dim=-1),
        accept_teacher=torch.minimum(log_teacher, log_q).exp().sum(dim=-1),
        log_ratio_range=log_ratio.nan_to_num(-torch.inf).amax(dim=-1)
        - log_ratio.nan_to_num(torch.inf).amin(dim=-1),
    )
    return log_q, trace


def _log_path(
    log_policy: Float[Tensor, "batch vocab"],
    log_teacher: Float[Tensor, "batch vocab"],
    shared: Tensor,
    alpha: Float[Tensor, " batch"],
) -> Float[Tensor, "batch vocab"]:
    weight = alpha.unsqueeze(-1)
    log_path = weight * log_policy + (1 - weight) * log_teacher  # 0 * -inf is nan: not shared
    return torch.where(shared, log_path, -torch.inf)


def _kl(
    log_p: Float[Tensor, "*batch vocab"], log_q: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(dim=-1).clamp(min=0.0)


def _inverse_cdf(
    log_q: Float[Tensor, "batch vocab"], uniform: Float[Tensor, " batch"]
) -> Int[Tensor, " batch"]:
    """One token per row: the first whose cumulative probability exceeds the row's uniform."""
    cumulative = log_q.exp().cumsum(dim=-1)
    total = cumulative.narrow(-1, -1, 1)
    at = uniform.to(cumulative).unsqueeze(-1) * total
    at = torch.minimum(at, torch.nextafter(total, torch.zeros_like(total)))  # below the total
    return torch.searchsorted(cumulative, at, right=True).squeeze(-1)  # never a token of no mass


# --- Traces --------------------------------------------------------------------------------------


def _map(function: Callable[[list[Tensor]], Tensor], *traces: Trace) -> Trace:
    """A trace whose every field is the function of that field of all the traces."""

    def mapped(records: Sequence[Any], names: Iterable[str]) -> dict[str, Tensor]:
        return {name: function([getattr(record, name) for record in records]) for name in names}

    balance = Balance(**mapped([trace.balance for trace in traces], Balance.__slots__))
    return Trace(balance=balance, **mapped(traces, set(Trace.__slots__) - {"balance"}))


def _where(kept: Tensor, trace: Trace) -> Trace:
    """The trace at the rows that are kept; elsewhere what says that there is nothing."""

    def blank(fields: list[Tensor]) -> Tensor:
        (values,) = fields
        nothing = torch.nan if values.is_floating_point() else -(values.dtype != torch.bool)
        return values.where(kept.to(values.device), torch.full_like(values, nothing))

    return _map(blank, trace)


def _collect(
    columns: list[Tensor], traces: list[Trace], ends: Tensor, max_new_tokens: int, like: Tensor
) -> Generation:
    """The result in the shape and on the device of the prompt."""
    filled = columns + [columns[-1]] * (max_new_tokens - len(columns))
    tokens = torch.stack(filled, dim=-1)
    ended = torch.isin(tokens, ends)
    lengths = torch.where(ended.any(dim=-1), ended.int().argmax(dim=-1) + 1, max_new_tokens)
    unread = _where(torch.zeros(len(tokens), dtype=torch.bool), traces[0])
    traces = traces + [unread] * (max_new_tokens - len(traces))

    def shaped(values: Tensor) -> Tensor:
        return (values[0] if like.ndim == 1 else values).to(like.device)

    def stacked(values: list[Tensor]) -> Tensor:
        return shaped(torch.stack(values, dim=-1))

    return Generation(shaped(tokens), shaped(lengths), _map(stacked, *traces))


@contextmanager
def _eval_mode(*models: Any) -> Iterator[None]:
    """Dropout off while inside; afterwards every module is in the mode it was in."""
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


# --- What can be wrong ---------------------------------------------------------------------------


def _check_count(max_new_tokens: int) -> None:
    if operator.index(max_new_tokens) < 1:
        raise ValueError(
            f"max_new_tokens must be at least 1: got {max_new_tokens}. Nothing would be drawn."
        )


def _check_prompts(
    steppers: tuple[Stepper, Stepper],
    policy_ids: Tensor,
    teacher_ids: Tensor | None,
    max_new_tokens: int,
) -> tuple[Int[Tensor, "batch length"], Int[Tensor, "batch teacher_length"]]:
    """Both prompts with a batch axis; ValueError if they cannot be read or leave no room."""
    policy, teacher = steppers
    if policy.vocab != teacher.vocab:
        raise ValueError(
            f"policy and teacher must share one vocabulary: the policy gives probabilities to "
            f"{policy.vocab} tokens, the teacher to {teacher.vocab}. Choose two models of one "
            f"family; models.check_same_vocabulary compares their tokenizers."
        )
    prompts = []
    given = {"policy": policy_ids, "teacher": policy_ids if teacher_ids is None else teacher_ids}
    for (name, ids), stepper in zip(given.items(), steppers, strict=True):
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
            kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"{name}_ids must be a tensor of token ids (int64): got {kind}.")
        if ids.ndim not in (1, 2) or ids.numel() == 0:
            raise ValueError(
                f"{name}_ids must hold at least one token, in one dimension or in two (a batch "
                f"of equal lengths): got shape {tuple(ids.shape)}. An empty prompt gives no first "
                f"law; start from the tokenizer's bos token."
            )
        if int(ids.min()) < 0 or int(ids.max()) >= stepper.vocab:
            raise ValueError(
                f"{name}_ids must lie in 0..{stepper.vocab - 1}, the {name}'s vocabulary: got "
                f"{int(ids.min())}..{int(ids.max())}."
            )
        # The last token drawn is not read any more.
        stepper.check_room(ids.shape[-1] + max_new_tokens - 1)
        prompts.append(ids if ids.ndim == 2 else ids[None])
    if given["policy"].ndim != given["teacher"].ndim or len(prompts[0]) != len(prompts[1]):
        raise ValueError(
            f"the two prompts must come in one batch: got shapes {tuple(given['policy'].shape)} "
            f"and {tuple(given['teacher'].shape)}."
        )
    return prompts[0], prompts[1]


def _check_alpha(alpha: float | None) -> float | None:
    if alpha is None:
        return None
    if not 0 <= float(alpha) <= 1:
        raise ValueError(
            f"alpha is the exponent on the policy and must lie in [0, 1]: got {alpha}. None "
            f"solves for alpha* at each position."
        )
    return float(alpha)


def _check_generator(generator: torch.Generator | int | None) -> torch.Generator | None:
    if generator is None:
        return None
    if isinstance(generator, torch.Generator):
        if generator.device.type != "cpu":
            raise ValueError(
                f"generator must live on the CPU (it serves models on any device): got one on "
                f"{generator.device}. Use torch.Generator() or pass a seed."
            )
        return generator
    return torch.Generator().manual_seed(operator.index(generator))


def _check_ends(
    eos_token_id: int | Sequence[int] | str | None, policy: Any, vocab: int
) -> Int[Tensor, " ends"]:
    """The ids that end a row, those of them that the vocabulary has."""
    given: Any = eos_token_id
    if given == "policy":
        config = getattr(policy, "generation_config", None)
        given = getattr(config, "eos_token_id", None)
    if isinstance(given, str):
        raise ValueError(
            f'eos_token_id must be an id, several, None or "policy" (what the policy\'s generation '
            f"config says): got {given!r}. Look a token's id up in the tokenizer."
        )
    ids = [] if given is None else given if isinstance(given, Sequence) else [given]
    return torch.tensor([id_ for id_ in map(operator.index, ids) if 0 <= id_ < vocab]).long()


def _check_numbers(log_policy: Tensor, log_teacher: Tensor, position: int) -> None:
    for name, log_p in (("policy", log_policy), ("teacher", log_teacher)):
        bad = torch.isnan(log_p).any(dim=-1)
        if bad.any():
            raise ValueError(
                f"the {name} answers nan at new token {position}, row {int(bad.int().argmax())}: "
                f"its logits hold nan or +inf, or are all -inf. Try wider weights "
                f"(dtype=torch.float32), or look for what broke the model."
            )


def _check_support(trace: Trace, running: Tensor, position: int) -> None:
    disjoint = (trace.balance.status == STATUSES.index("disjoint")).cpu() & running
    if disjoint.any():
        raise ValueError(
            f"policy and teacher share no token at new token {position}, row "
            f"{int(disjoint.int().argmax())}: q* does not exist there. Something (a filter, a "
            f"mask on the logits) cut their supports apart; apply it to q* instead."
        )
