"""Token sequences from q* of two language models: exact, from caches, several tokens a round.

    policy, tokenizer = checkpoints.load(folder)
    result = generate(policy, policy, ids, teacher_ids, max_new_tokens=40, generator=0)
    tokenizer.decode(result.tokens[: result.lengths])

The law is the token-level one: each token is drawn from the geometric mean of the two next-token
laws, given the tokens so far. Its product over the positions is not the geometric mean of the two
laws of whole sequences. Every scheme draws from the same law; they differ in the forwards they
need. What proposes never decides: a draft is judged by `rules.verify` against q*, formed from
(policy, teacher) in this order whoever drafted.
"""

import operator
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations, takewhile
from typing import Any

import torch
from torch import Tensor

from .. import _quiet, rows_torch  # noqa: F401 - _quiet before transformers
from ..arguments import check_count, check_fixed_alpha
from ..result import STATUSES, Balance
from ..sampling import rules
from ..sampling.rules import NO_TOKEN, Chance, RowCoins
from . import planner as schemes
from .costs import Costs
from .diagnostics import TensorBalance
from .filters import FILTERED, MEMORYLESS, Processor, Shaping, shaping
from .kv_cache import Reader, bare, eval_mode
from .planner import Plan

SCHEMES = (*schemes.SCHEMES, "auto")
PROPOSERS = ("none", "policy", "teacher", "draft", "lookup")
PARENTS = ("policy", "teacher")

EQUAL_CHERNOFF = 1e-10
"""The Chernoff information, in nats, up to which two distributions are called one and the same."""

Prompts = Tensor | Sequence[Tensor]
Stop = Callable[[Tensor, Any], Any]


class EqualParentsWarning(UserWarning):
    """The parents had one and the same distribution wherever a token was drawn."""


@dataclass(frozen=True, slots=True)
class Forward:
    """One call of one model.

    Attributes:
        model: "policy", "teacher" or "draft"; "both" where one call served both parents.
        width: How many columns it read.
        rows: In how many rows of the batch, each parent's counted.
        seconds: What it took; on an accelerator, on the device.
    """

    model: str
    width: int
    rows: int
    seconds: float


@dataclass(frozen=True, slots=True)
class RoundTrace:
    """What led to one verification, and what came of it, summed over the rows of the batch.

    Attributes:
        scheme: The scheme that the round followed.
        gamma: The draft length that was planned.
        forwards: The forwards since the round before, the verifying ones last.
        drafted: Draft tokens that were put to the test or would have been.
        tested: Those that were: the accepted ones, and the first rejected one of a row; with
            `block_verification` all of them, so that accepted / tested is then no estimate of an
            acceptance probability.
        accepted: Those that were kept.
        emitted: New tokens.
        seconds: Wall time since the round before.
    """

    scheme: str
    gamma: int
    forwards: tuple[Forward, ...]
    drafted: int
    tested: int
    accepted: int
    emitted: int
    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """What was known where each token was drawn, and what each round took.

    One entry per position, shaped like the tokens. Where no token was drawn numbers are nan,
    statuses and proposers -1. Divergences are in nats, computed in the precision of the laws.

    Attributes:
        balance: alpha*, the Chernoff information, the status and the rest of the solution.
        alpha: The exponent that was used: alpha*, unless it was fixed. Shape (*positions).
        minus_log_partition: -log Z(alpha); at alpha* it is the Chernoff information. Shape
            (*positions).
        accept_policy: The acceptance probability of a token drafted by the policy, after the
            filters. Shape (*positions).
        accept_teacher: The same for a token drafted by the teacher. Shape (*positions).
        proposer: Who proposed a token there, as an index into `PROPOSERS`. Shape (*positions).
        accepted: Whether the proposal was kept. False where nobody proposed. Shape (*positions).
        rounds: The rounds in order.
        prefill: The forwards that read the prompts (all but their last tokens).
        costs: What forwards took, as the caller said or, with "auto", as was measured; None where
            neither is so.
    """

    balance: TensorBalance
    alpha: Tensor
    minus_log_partition: Tensor
    accept_policy: Tensor
    accept_teacher: Tensor
    proposer: Tensor
    accepted: Tensor
    rounds: tuple[RoundTrace, ...]
    prefill: tuple[Forward, ...]
    costs: Costs | None

    @property
    def acceptance_rate(self) -> float:
        """Accepted over tested drafts, nan if none was tested."""
        tested = sum(r.tested for r in self.rounds)
        return sum(r.accepted for r in self.rounds) / tested if tested else float("nan")

    @property
    def forwards(self) -> int:
        """Forwards of the parents after the prompts; a call that served both counts two."""
        return sum(1 + (f.model == "both") for f in self._calls if f.model != "draft")

    @property
    def model_calls(self) -> int:
        """Calls of any model after the prompts."""
        return len(self._calls)

    @property
    def tokens_per_forward(self) -> float:
        """New tokens per row and forward of a parent: 1/2 if both read every token."""
        rows = sum(f.rows for f in self._calls if f.model != "draft")
        return sum(r.emitted for r in self.rounds) / rows if rows else float("nan")

    @property
    def _calls(self) -> list[Forward]:
        return [forward for r in self.rounds for forward in r.forwards]


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """New tokens, how many there are, and what was known where each was drawn.

    Attributes:
        tokens: The new tokens only, `max_new_tokens` of them; a row that ended earlier is filled up
            with the token that ended it. Shape (*batch, new).
        lengths: How many tokens of each row were drawn, the one that ended it included. Shape
            (*batch).
        trace: What was known at each position; its entries have the shape of `tokens`.
    """

    tokens: Tensor
    lengths: Tensor
    trace: Trace


def generate(
    policy: Any,
    teacher: Any,
    policy_ids: Prompts,
    teacher_ids: Prompts | None = None,
    *,
    max_new_tokens: int,
    scheme: str | None = None,
    gamma: int | None = None,
    alpha: float | None = None,
    greedy: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    logits_processor: Sequence[Processor] = (),
    filtered: str = "target",
    generator: torch.Generator | Chance | int | None = None,
    eos_token_id: int | Sequence[int] | str | None = "policy",
    stopping_criteria: Sequence[Stop] = (),
    shown_ids: Sequence[Tensor] | None = None,
    drafter: str | None = None,
    draft_model: Any = None,
    draft_ids: Prompts | None = None,
    block_verification: bool = False,
    disjoint: str | None = None,
    vocab: int | None = None,
    context_length: int | None = None,
    one_call: bool | None = None,
    costs: Costs | None = None,
    on_tokens: Callable[[Tensor], object] | None = None,
) -> Generation:
    """Draw tokens from q*, the KL-symmetric geometric mean of two language models.

    Each model reads its own prompt and keeps its own key-value cache; a model passed twice may
    have two prompts. The models are put in eval mode and given back as they were. Once a process
    each kind of model is tried before its cache is trusted
    (`qstar.decoding.kv_cache.Reader.check`); one that a cache would mislead is read anew for every
    token, with a warning. All schemes have the same law:

    - "plain": both parents read every token; the reference.
    - "one-sided": one parent drafts gamma tokens, the other verifies them in one forward.
    - "alternating": the verifier's own law at the next position, which costs nothing more, is the
      next proposal. With gamma = 1 never more forwards than "plain".
    - "lookup": what followed the last tokens earlier in the text, verified by both parents.
    - "draft-model": a third, cheaper model drafts, both parents verify.
    - "auto": measures what forwards of each width take, watches the acceptance, and goes on with
      whichever of all these promises the most tokens a second.

    Without `scheme` the arguments alone decide: "draft-model" with a draft model (gamma 4); else
    "plain" in one call where one model is both parents (unless `gamma` or one_call=False asks for
    turns); else "alternating" (gamma 1). A batch that may outgrow a sliding window is decoded by
    "plain", the one scheme that is exact there (for a batch; one row alone may follow any); asked
    for another scheme, or for a `gamma`, it is refused.

    A seed means the same on every machine, as long as the same choices are made. By default none
    hangs on a clock: only rounding in the logits can make another draw of the same seed, of the
    same law. A named scheme with gamma=None chooses its draft lengths by the acceptance that it has
    observed (and by `costs`, if given), "one-sided" without `drafter` and "alternating" after a
    rejection choose the drafter by the same. "auto" hangs on what it has measured: once per pair of
    models, so that calls within a process agree; pass its `trace.costs` on to agree across
    processes.

    Each row of a batch has randomness of its own: the first row's is `generator` itself, as if it
    were alone, another row's follows from the generator's state and the row's index. So a row's
    tokens do not hang on its neighbours (rounding apart) with "plain", nor with "one-sided",
    "lookup" and "draft-model" at a given `gamma` (and `drafter`). With "alternating", and wherever
    observed acceptance decides, who proposes how much does hang on them: with other neighbours the
    same seed is another draw of the same law.

    Memory: a cache takes 2 * layers * key-value heads * head size * bytes per number for each
    token, row and model; a round holds at most 16 blocks of rows * (gamma + 1) * vocabulary numbers
    (`memory_bytes`).

    Args:
        policy: A causal language model of transformers.
        teacher: Another over the same vocabulary (`checkpoints.check_same_vocabulary`), or the
            policy itself under another prompt.
        policy_ids: The policy's prompt. One dimension for one sequence; two for a batch of
            prompts of equal length; a list of one-dimensional tensors for a ragged batch.
        teacher_ids: The teacher's prompt, None for the policy's; it may have another length.
        max_new_tokens: The most tokens to draw for each row.
        scheme: One of `SCHEMES`; None decides by the other arguments (above).
        gamma: Draft tokens per round. None adapts a named scheme's to the acceptance that was
            observed, and to the costs.
        alpha: The exponent on the policy. None solves for alpha* at each position; a number in
            [0, 1] fixes it (1 follows the policy, 0 the teacher).
        greedy: Take the most probable token in place of a draw.
        temperature: Of the law that is drawn from; 1 leaves it as it is.
        top_k: Keep the most probable tokens of that law only, this many.
        top_p: Keep the fewest most probable tokens that together have this probability.
        logits_processor: Processors of transformers, functions of (ids, scores) alone; they see
            the policy's text and the log-probabilities of the law.
        filtered: "target" filters q*; "parents" filters the parents' laws before q* is formed,
            which can cut their supports apart (see `disjoint`), and lets processors see each
            parent's own text.
        generator: A CPU generator, or a seed; None means torch's own CPU generator.
        eos_token_id: What ends a row: "policy" takes the policy's generation config's, None lets
            every row run on. Ids outside the vocabulary are ignored.
        stopping_criteria: Criteria of transformers: called after each new token of a row with
            (ids, None), the ids being the policy's prompt and the new tokens so far.
        shown_ids: What processors and criteria see in place of the policy's prompts, one for each
            row: `qstar.adapters.transformers` shows the padding of a batch, which lengths are
            counted with there. Shape (length,).
        drafter: Who drafts in "one-sided": "policy" or "teacher"; None is the better one.
        draft_model: A third causal language model over the same vocabulary.
        draft_ids: Its prompt; None for the policy's.
        block_verification: Judge a round's drafts together (`rules.verify_block`): as exact,
            and never fewer tokens a round.
        disjoint: What to do where the parents share no token, so that q* does not exist: "raise",
            which loses what was drawn before, or "mixture" for their even mixture, the limit that
            smoothing gives; the trace's status says where. None is "raise", save where top-k or
            the like cuts the parents' supports apart (filtered="parents"): there it must be named.
        vocab: Use only the first this many ids, for models whose output layers are padded to
            different sizes. None expects equal sizes.
        context_length: The most tokens of a text, for each model, in place of what configurations
            say: rotary positions go on as far as one likes, a table of positions ends where it
            ends. None follows the configurations, scaled positions (linear, YaRN) included.
        one_call: Whether one model that is both parents reads both texts in one call, as two rows
            of a batch; it can then not draft for itself. None does so in the schemes that allow
            it ("plain", "lookup", "draft-model"), and in "auto" if that was measured to be faster.
        costs: What forwards take, for the choice of schemes and draft lengths. None measures it for
            "auto", and else assumes that a forward takes the same at every width, of either parent.
        on_tokens: Called after each round with its new tokens, on the CPU, one row each, -1 where a
            row has fewer. Shape (batch, new).

    Returns:
        A `Generation` on the device of the prompt.

    Raises:
        ValueError: An argument makes no sense, the vocabularies differ in size, the text would
            exceed a context window, a model's cache cannot take tokens back, two models are one set
            of weights, a model answers nan, or the parents share no token at some position. The
            message says where.

    Warns:
        EqualParentsWarning: The parents had one distribution wherever a token was drawn.

    Source: the analysis, problem 1; its loop is replaced by exact rules. Alternating proposals:
        Fu et al. (2025), "Fast large language model collaborative decoding via speculation",
        ICML (PMLR 267:17764).
    """
    policy, teacher, draft_model = bare(policy), bare(teacher), bare(draft_model)
    models = {"policy": policy, "teacher": teacher, "draft": draft_model}
    readers = {
        name: Reader(model, name=name, context_length=context_length)
        for name, model in models.items()
        if name != "draft" or model is not None
    }
    _check_weights({"policy": policy, "teacher": teacher, "draft model": draft_model})
    max_new_tokens = check_count("max_new_tokens", max_new_tokens)
    gamma = _check_scheme(scheme, gamma, drafter, draft_model, draft_ids, costs)
    _check_choice("filtered", filtered, FILTERED)
    size = _check_vocab(readers, vocab)
    prompts, single, device = _check_prompts(
        readers,
        size,
        max_new_tokens,
        {"policy": policy_ids, "teacher": teacher_ids, "draft": draft_ids},
    )
    longest = max(len(prompt) for rows in prompts.values() for prompt in rows) + max_new_tokens
    in_one_call = policy is teacher and one_call is not False
    paired = in_one_call and scheme in (None, *schemes.TOGETHER, "auto")
    for name, reader in readers.items():
        reader.check(longest, rows=len(prompts["policy"]) + (paired and name != "draft"))
    holed = _holed(readers, prompts, max_new_tokens)
    scheme, gamma = schemes.asked_for(
        scheme,
        gamma,
        in_one_call=in_one_call,
        has_draft=draft_model is not None,
        # Read anew for every token, a draft would be a reading of its own.
        plain_only=holed is not None or any(reader.rereads for reader in readers.values()),
    )
    if holed is not None and scheme != "plain":
        raise ValueError(
            f"the {holed}, and scheme={scheme!r} leaves holes in the cache of a batch whose texts "
            f"may outgrow that. Leave scheme and gamma out, or pass scheme='plain', which is exact "
            f"for a batch too; or decode its rows one at a time."
        )
    if one_call and (policy is not teacher or scheme not in (*schemes.TOGETHER, "auto")):
        raise ValueError(
            f"one_call needs one model as both parents, and a scheme in which both read the same "
            f"tokens at once ({', '.join(schemes.TOGETHER)}): got scheme={scheme!r} and "
            f"{'one model' if policy is teacher else 'two models'}."
        )
    filters = shaping(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        logits_processor=_check_callable("logits_processor", logits_processor),
        greedy=greedy,
    )
    law = _Law(
        alpha=check_fixed_alpha(alpha),
        shaping=filters,
        filtered=filtered,
        disjoint=_check_disjoint(disjoint, filters, filtered, size),
    )
    run = _Run(
        readers=readers,
        prompts=prompts,
        shown=_check_shown(shown_ids, prompts["policy"]),
        law=law,
        chance=_check_generator(generator, len(prompts["policy"])),
        vocab=size,
        max_new_tokens=max_new_tokens,
        ends=_check_ends(eos_token_id, policy, size),
        stopping_criteria=_check_callable("stopping_criteria", stopping_criteria),
        verify=rules.verify_block if block_verification else rules.verify,
        on_tokens=on_tokens,
    )
    with torch.no_grad(), eval_mode(policy, teacher, *([draft_model] if draft_model else [])):
        together = policy is teacher and (
            scheme in schemes.TOGETHER if one_call is None else one_call
        )
        if policy is teacher and scheme == "auto":
            if costs is None:
                costs = _measured_costs(run)
            together = schemes.together_is_faster(costs) if one_call is None else one_call
        elif costs is None and scheme == "auto":
            costs = _measured_costs(run)
        if together:
            run.read_together()
        run.start()
        planner = schemes.Planner(
            scheme=scheme,
            gamma=gamma,
            drafter=drafter,
            costs=costs,
            has_draft=draft_model is not None,
            batch=len(run.rows),
            together=together,
        )
        while run.rows:
            run.round(planner.plan(run.evidence()))
    if run.parents_are_equal():
        warnings.warn(
            "policy and teacher had one and the same distribution at every new token (Chernoff "
            "information 0), which q* then is too. For two different parents give one model two "
            "prompts, or load two models: adapters on one base, or one model passed twice, are one "
            "set of weights.",
            EqualParentsWarning,
            stacklevel=2,
        )
    return run.generation(planner.costs, single, device)


def memory_bytes(
    policy: Any, teacher: Any, *, batch: int = 1, length: int, gamma: int = 1
) -> dict[str, int]:
    """What decoding needs beside the weights, in bytes: "caches" and "laws".

    The caches hold 2 * layers * key-value heads * head size numbers for each token, row and
    parent. In a batch whose rows accept different numbers of drafts they can grow to twice that,
    before holes are squeezed out. The laws of a round (both parents', the target, and what is
    worked out from them, some of it in double precision) are at most 16 blocks of batch *
    (gamma + 1) * vocabulary numbers: 8 to 16 were counted, more with filters and with few rows.

    Args:
        policy: A causal language model of transformers.
        teacher: The other; the same one counts again, for its own cache.
        batch: Rows.
        length: Tokens of a text, the prompt's included.
        gamma: Draft tokens per round.
    """
    batch, length = check_count("batch", batch), check_count("length", length)
    gamma = check_count("gamma", gamma, least=0)
    policy, teacher, caches = bare(policy), bare(teacher), 0
    for model in (policy, teacher):
        text = model.config.get_text_config()
        heads = text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // heads
        kept = getattr(text, "num_key_value_heads", None) or heads
        caches += 2 * text.num_hidden_layers * kept * size * model.dtype.itemsize
    wide = max(4, policy.dtype.itemsize, teacher.dtype.itemsize)
    vocab = Reader(policy, name="policy").vocab
    return {
        "caches": caches * batch * length,
        "laws": 16 * batch * (gamma + 1) * vocab * wide,
    }


# --- The law at a position -----------------------------------------------------------------------

Laws = Tensor


@dataclass(frozen=True, slots=True)
class _Law:
    """How the target is made from the parents' laws, and a draft's law from its drafter's."""

    alpha: float | None
    shaping: Shaping
    filtered: str
    disjoint: str

    @property
    def of_parents(self) -> Shaping:
        """What is done to a parent's law before q* is formed."""
        return Shaping(self.shaping.steps) if self.filtered == "parents" else Shaping()

    @property
    def of_target(self) -> Shaping:
        """What is done to q*; and to what a draft is drawn from, which it should resemble."""
        if self.filtered == "parents":
            return Shaping(greedy=self.shaping.greedy)
        return self.shaping

    def between(self, log_policy: Laws, log_teacher: Laws) -> tuple[Laws, dict[str, Any]]:
        """log q_alpha at every position, and what the trace keeps of it."""
        balance = rows_torch.solve_kl_symmetry(log_policy, log_teacher, validate=False)
        alpha = balance.alpha
        if self.alpha is not None:
            alpha = torch.full_like(alpha, self.alpha)
        log_q = rows_torch.log_geometric_mean(log_policy, log_teacher, alpha)
        if self.alpha is None:
            minus_log_partition = balance.chernoff
        else:
            minus_log_partition = -rows_torch.log_partition(log_policy, log_teacher, alpha)
        if self.disjoint == "mixture":
            apart = balance.status == STATUSES.index("disjoint")
            halves = torch.logaddexp(log_policy, log_teacher).log_softmax(-1)
            log_q = torch.where(apart.unsqueeze(-1), halves, log_q)
        known = {"alpha": alpha, "minus_log_partition": minus_log_partition}
        return log_q, known | {f"balance.{k}": getattr(balance, k) for k in Balance.__slots__}


@dataclass(frozen=True, slots=True, eq=False)
class _Drafts:
    """Tokens that somebody proposed, row by row, and the laws they came from.

    `log_draft` is what the tokens were drawn from, after the filters; `log_parent` the law that
    goes into q*, where a parent drafted. Rows have `counts` real tokens; the rest is anything.
    """

    proposer: str
    tokens: Tensor
    log_draft: Laws
    log_parent: Laws | None
    counts: list[int]


# --- A run ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Run:
    """A decode under way: the texts so far, what each model has read, and what is proposed."""

    readers: dict[str, Reader]
    prompts: dict[str, list[list[int]]]
    shown: list[list[int]]  # the policy's prompts as processors and criteria see them
    law: _Law
    chance: Chance
    vocab: int
    max_new_tokens: int
    ends: frozenset[int]
    stopping_criteria: tuple[Stop, ...]
    verify: Callable[..., rules.Round]
    on_tokens: Callable[[Tensor], object] | None
    rows: list[int] = field(init=False)  # of the batch, those that are not finished
    done: set[int] = field(default_factory=set)  # those that are
    text: list[list[int]] = field(init=False)  # the new tokens of every row of the batch
    outstanding: _Drafts | None = None  # a parent's proposals that the other has not judged
    lookups: list[schemes.Lookup] = field(init=False)
    prefill: list[Forward] = field(default_factory=list)
    rounds: list[RoundTrace] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)
    observed: dict[str, tuple[float, float]] = field(default_factory=dict)
    timers: list["_Timer"] = field(default_factory=list)
    clock: float = 0.0

    def start(self) -> None:
        """Read the prompts."""
        batch = len(self.prompts["policy"])
        self.rows = list(range(batch))
        self.text = [[] for _ in self.rows]
        self.lookups = [schemes.Lookup(prompt) for prompt in self.prompts["policy"]]
        for name, reader in self.readers.items():
            prompts = [prompt for prompt, _ in self.texts_of(name)]
            begun = time.perf_counter()
            calls = reader.start(prompts)
            spent = (time.perf_counter() - begun) / max(1, calls)
            width = max(map(len, prompts)) - 1
            self.prefill += [Forward(name, width, len(prompts), spent)] * calls
        self.clock = time.perf_counter()

    def read_together(self) -> None:
        """Let the one model that is both parents read both texts as rows of one batch."""
        self.readers["both"] = self.readers.pop("policy").again()
        del self.readers["teacher"]

    def texts_of(self, name: str) -> list[tuple[list[int], list[int]]]:
        """(prompt, new tokens) of each row of a reader."""
        parents = PARENTS if name == "both" else (name,)
        return [(self.prompts[p][row], self.text[row]) for p in parents for row in self.rows]

    def evidence(self) -> schemes.Evidence:
        """What the choice of the next round may rest on: nothing about a token not yet emitted."""
        return schemes.Evidence(
            observed=dict(self.observed),
            remaining=max(self.remaining()),
            matched=sum(self.lookups[row].match() for row in self.rows) / len(self.rows),
            outstanding=self.outstanding is not None,
        )

    def remaining(self) -> list[int]:
        """How many tokens each running row may still get."""
        return [self.max_new_tokens - len(self.text[row]) for row in self.rows]

    def round(self, plan: Plan) -> None:
        """One round after the plan."""
        if plan.scheme != "alternating":
            self.discard()
        if plan.scheme == "alternating":
            if self.outstanding is None:
                self.outstanding = self.drafts_of(plan.drafter, plan.gamma, spare=0)
            self.take_turn(plan)
        elif plan.scheme == "one-sided":
            self.judge_one_sided(plan)
        else:
            drafts = None
            if plan.scheme == "lookup":
                drafts = self.looked_up(plan.gamma)
            elif plan.scheme == "draft-model":
                drafts = self.drafts_of("draft", plan.gamma, spare=1)
            self.judge_together(plan, drafts)

    def parents_are_equal(self) -> bool:
        """Whether they had one distribution wherever a token was drawn, and that matters."""
        if self.law.alpha in (0.0, 1.0) or self.law.of_parents.steps:
            return False
        for entry in self.log:
            chernoff = entry["known"]["balance.chernoff"]
            for place, length in enumerate(entry["lengths"]):
                if not bool((chernoff[place, :length] <= EQUAL_CHERNOFF).all()):
                    return False
        return True

    def choices(self, **counts: list[int]) -> Chance:
        """The source of the running rows' choices, of so many `coins` and `lots` of each row."""
        if isinstance(self.chance, RowCoins):
            return self.chance.only(self.rows, **counts)
        return self.chance

    def discard(self) -> None:
        """Forget proposals; exact, since nothing that led here depended on what they are."""
        self.outstanding = None

    # --- Reading

    def read(
        self,
        name: str,
        unread: list[list[int]],
        drafts: Tensor | None = None,
        counts: list[int] | None = None,
        positions: int = 1,
    ) -> Laws:
        """What `name` makes of the text: raw laws over the shared vocabulary."""
        reader = self.readers[name]
        width = max(map(len, unread)) + (0 if drafts is None else drafts.shape[-1])
        with _timed(self.timers, name, width, len(unread), reader.model.device):
            laws = reader.feed(unread, drafts, counts, positions=positions)
        if laws.shape[-1] > self.vocab:
            laws = laws[..., : self.vocab].log_softmax(-1)
        return laws.to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the laws meet: the policy's."""
        first = self.readers.get("policy") or self.readers["both"]
        device: torch.device = first.model.device
        return device

    def unread(self, name: str) -> list[list[int]]:
        """The emitted tokens that `name` has not read, at least one of each row."""
        reader = self.readers[name]
        texts = self.texts_of(name)
        reader.truncate([len(prompt) + len(new) - 1 for prompt, new in texts])
        return [
            (prompt + new)[read:] if read < len(prompt) else new[read - len(prompt) :]
            for (prompt, new), read in zip(texts, reader.lengths, strict=True)
        ]

    def texts(
        self, name: str, drafts: Tensor | None = None, counts: list[int] | None = None
    ) -> list[Tensor]:
        """The texts of the running rows as filters see them; empty if no filter looks."""
        if not self.law.shaping.reads_text:
            return []
        found = []
        prompts, device = self.shown if name == "policy" else self.prompts[name], self.device
        for place, row in enumerate(self.rows):
            ids = torch.tensor(prompts[row] + self.text[row], device=device)
            if drafts is not None and counts is not None:
                ids = torch.cat([ids, drafts[place, : counts[place]]])
            found.append(ids)
        return found

    def parent(self, name: str, raw: Laws, drafts: Tensor | None) -> Laws:
        """A parent's law as it goes into q*."""
        return self.law.of_parents(raw, self.texts(name), drafts)

    # --- Proposing

    def drafts_of(self, name: str, gamma: int, *, spare: int) -> _Drafts | None:
        """gamma tokens drawn from one model, which reads all of them but the last.

        Each row gets at most as many as it has room for, `spare` tokens apart; None if no row has.
        """
        limits = [min(gamma, left - spare) for left in self.remaining()]
        if max(limits) < 1:
            return None
        first = self.read(name, self.unread(name))
        return self.extend(name, first, None, [True] * len(self.rows), limits)

    def extend(
        self,
        name: str,
        raw: Laws | None,
        begun: tuple[Tensor, Laws, Laws] | None,
        has: list[bool],
        limits: list[int],
    ) -> _Drafts:
        """Draft on, from a law or from first tokens, up to each row's limit.

        Args:
            name: The drafting model.
            raw: The law of the first draft, from which it is still to be drawn; or
            begun: (token, log_draft, log_parent) of it, where rows that do not `has` a first draft
                have the last emitted token in its place.
            has: Which rows have a first draft.
            limits: How many drafts each row is to have at most.
        """
        steps: list[tuple[Tensor, Laws, Laws]] = [] if begun is None else [begun]
        while len(steps) < max(
            (limit + (not own) for own, limit in zip(has, limits, strict=True)), default=0
        ):
            if raw is None:
                last = steps[-1][0]
                made = len(steps)
                more = [
                    int(made < limit + (not own)) for own, limit in zip(has, limits, strict=True)
                ]
                raw = self.read(name, [[] for _ in self.rows], last.unsqueeze(-1), more)
            so_far = torch.stack([step[0] for step in steps], -1) if steps else None
            lots = [
                int(len(steps) < limit + (not own)) for own, limit in zip(has, limits, strict=True)
            ]
            steps.append(self.draw(name, raw, so_far, has, lots))
            raw = None
        tokens, log_draft, log_parent = (
            torch.cat([step[part].unsqueeze(1) for step in steps], 1)
            if part == 0
            else torch.cat([step[part] for step in steps], 1)
            for part in range(3)
        )
        if not all(has):
            own = torch.tensor(has, device=tokens.device)
            tokens = torch.where(own[:, None], tokens, tokens.roll(-1, 1))
            log_draft = torch.where(own[:, None, None], log_draft, log_draft.roll(-1, 1))
            log_parent = torch.where(own[:, None, None], log_parent, log_parent.roll(-1, 1))
        counts = [
            max(0, min(limit, len(steps) - (not own)))
            for own, limit in zip(has, limits, strict=True)
        ]
        widest = max(counts)
        return _Drafts(
            name,
            tokens[:, :widest],
            log_draft[:, :widest],
            log_parent[:, :widest] if name in PARENTS else None,
            counts,
        )

    def draw(
        self, name: str, raw: Laws, so_far: Tensor | None, has: list[bool], lots: list[int]
    ) -> tuple[Tensor, Laws, Laws]:
        """One draft token of each row from a law after the drafts so far: (token, its two laws).

        `lots` is 1 where the row can use it, else 0; the token is then anything.
        """
        log_parent, log_draft = raw, raw
        if self.law.shaping.steps or self.law.shaping.greedy:
            seen = self.texts(name), self.texts("policy")
            if so_far is not None and self.law.shaping.reads_text:
                # Where a row has no first draft, the first column is already in its text.
                tails = [so_far[i, (not own) :] for i, own in enumerate(has)]
                seen = tuple(  # type: ignore[assignment]
                    [torch.cat(pair) for pair in zip(text, tails, strict=True)] for text in seen
                )
            log_parent = self.law.of_parents(raw, seen[0]) if name in PARENTS else raw
            log_draft = self.law.of_target(log_parent, seen[1])
        token = self.choices(lots=lots).draw(log_draft).squeeze(-1)
        return token.clamp(min=0), log_draft, log_parent  # from no law, it is found out if judged

    def looked_up(self, gamma: int) -> _Drafts | None:
        """What followed each row's last tokens where they stood before; None if nothing did."""
        found = [
            list(takewhile(self.vocab.__gt__, self.lookups[row].propose(min(gamma, left - 1))))
            for row, left in zip(self.rows, self.remaining(), strict=True)
        ]
        widest = max(map(len, found))
        if widest == 0:
            return None
        padded = [tokens + [0] * (widest - len(tokens)) for tokens in found]
        tokens = torch.tensor(padded, device=self.device)
        log_draft = rules.log_point_mass(tokens, self.vocab, dtype=torch.float32)
        return _Drafts("lookup", tokens, log_draft, None, [len(tokens) for tokens in found])

    # --- Judging

    def judge_together(self, plan: Plan, drafts: _Drafts | None) -> None:
        """Both parents read the drafts of a third; q* is known at every one of them and beyond."""
        tokens, counts, positions = None, None, 1
        if drafts is not None and drafts.tokens.shape[-1] > 0:
            tokens, counts, positions = drafts.tokens, drafts.counts, drafts.tokens.shape[-1] + 1
        else:
            drafts = None
        if "both" in self.readers:
            twice = None if tokens is None else tokens.repeat(2, 1)
            laws = self.read("both", self.unread("both"), twice, counts and 2 * counts, positions)
            raw = list(laws.split(len(self.rows)))
        else:
            raw = [self.read(n, self.unread(n), tokens, counts, positions) for n in PARENTS]
        log_policy, log_teacher = (
            self.parent(name, laws, tokens) for name, laws in zip(PARENTS, raw, strict=True)
        )
        self.settle(plan, drafts, log_policy, log_teacher, None)

    def judge_one_sided(self, plan: Plan) -> None:
        """One parent drafts, the other reads all but the last draft: that is all it needs."""
        drafts = self.drafts_of(plan.drafter, plan.gamma, spare=0)
        assert drafts is not None
        assert drafts.log_parent is not None
        verifier = _other(plan.drafter)
        fed = drafts.tokens[:, :-1]
        counts = [max(0, count - 1) for count in drafts.counts]
        raw = self.read(
            verifier,
            self.unread(verifier),
            fed if fed.shape[-1] else None,
            counts if fed.shape[-1] else None,
            fed.shape[-1] + 1,
        )
        judged = self.parent(verifier, raw, drafts.tokens)
        pair = (drafts.log_parent, judged) if verifier == "teacher" else (judged, drafts.log_parent)
        self.settle(plan, drafts, *pair, None)

    def take_turn(self, plan: Plan) -> None:
        """The other parent judges what one proposed, and proposes what follows from its own law."""
        drafts = self.outstanding
        self.outstanding = None
        assert drafts is not None
        assert drafts.log_parent is not None
        verifier = _other(drafts.proposer)
        width = drafts.tokens.shape[-1]
        # The last draft of a row that is full with it need not be read: nothing follows it.
        counts = [
            min(count, left - 1)
            for count, left in zip(drafts.counts, self.remaining(), strict=True)
        ]
        fed = max(counts)
        raw = self.read(
            verifier,
            self.unread(verifier),
            drafts.tokens[:, :fed] if fed else None,
            counts if fed else None,
            fed + 1,
        )
        parent = self.parent(verifier, raw, drafts.tokens)
        at = torch.tensor([min(count, fed) for count in drafts.counts], device=self.device)
        index = at[:, None, None].expand(-1, 1, self.vocab)
        own = parent.gather(1, index)
        following = self.texts("policy", drafts.tokens, drafts.counts)
        log_next = self.law.of_target(own, following)
        judged = parent[:, :width]
        pair = (drafts.log_parent, judged) if verifier == "teacher" else (judged, drafts.log_parent)
        kept = self.settle(plan, drafts, *pair, log_next)
        if not self.rows:
            return
        alive, full, next_token = kept
        if any(full):
            place = torch.tensor(alive, device=self.device)
            begun = (
                next_token.index_select(0, place),
                log_next.index_select(0, place),
                own.index_select(0, place),
            )
            limits = [min(plan.gamma, left) for left in self.remaining()]
            # A row that was rejected rides along: it has one draft fewer.
            limits = [
                limit if has else min(plan.gamma - 1, limit)
                for has, limit in zip(full, limits, strict=True)
            ]
            self.outstanding = self.extend(verifier, None, begun, full, limits)

    def settle(
        self,
        plan: Plan,
        drafts: _Drafts | None,
        log_policy: Laws,
        log_teacher: Laws,
        log_next: Laws | None,
    ) -> tuple[list[int], list[bool], Tensor]:
        """Keep or replace the drafts, emit what is settled, and take the rest back.

        q* is known at as many positions as the parents' laws have. One more than the drafts: the
        last one gives every row a token beyond an accepted draft. As many as the drafts: after an
        accepted draft the row has no token of q*, but a proposal from `log_next`, if there is one.

        Returns:
            (which rows go on, which of those had all their drafts accepted, and each row's token
            after the accepted ones: emitted, or a proposal).
        """
        log_q, known = self.law.between(log_policy, log_teacher)
        batch, positions, vocab = log_q.shape
        tokens = log_q.new_zeros((batch, 0), dtype=torch.long)
        log_draft, counts, proposer = log_q.new_zeros((batch, 0, vocab)), [0] * batch, "none"
        if drafts is not None:
            tokens, log_draft, counts = drafts.tokens, drafts.log_draft, drafts.counts
            proposer = drafts.proposer
        gamma = tokens.shape[-1]
        texts = self.texts("policy")
        target = self.law.of_target(log_q, texts, tokens)
        exact = positions > gamma
        log_target = target
        drafted = torch.tensor(counts, device=self.device)
        if not exact:
            beyond = target[:, -1:] if log_next is None else log_next
            log_target = torch.cat([target, beyond], 1)
            here = torch.arange(gamma + 1, device=self.device) == drafted[:, None]
            log_target = torch.where(here[..., None], beyond, log_target)
        judged = self.verify(
            tokens,
            log_draft,
            log_target,
            drafted=drafted,
            generator=self.choices(coins=counts),
            check=False,
        )
        for name, laws in (("policy", log_policy), ("teacher", log_teacher)):
            shaped = self.law.of_target(laws, texts, tokens)
            known[f"accept_{name}"] = torch.minimum(shaped, target).exp().sum(-1).clamp(max=1)
        host = self._fetch(judged, tokens, log_draft, log_policy, log_teacher, target, known)
        return self._emit(plan, proposer, counts, exact, host, known, judged.next_token)

    def _fetch(
        self,
        judged: rules.Round,
        tokens: Tensor,
        log_draft: Laws,
        log_policy: Laws,
        log_teacher: Laws,
        target: Laws,
        known: dict[str, Any],
    ) -> dict[str, Any]:
        """All that the host must know of a round, in one transfer: the only wait for the device."""
        wide = {
            "accepted": judged.accepted.unsqueeze(-1),
            "tested": judged.tested.unsqueeze(-1),
            "next": judged.next_token.unsqueeze(-1),
            "tokens": tokens,
            "nan_draft": log_draft.amax(-1).isnan(),
            "nan_policy": log_policy.amax(-1).isnan(),
            "nan_teacher": log_teacher.amax(-1).isnan(),
            "nan_target": target.amax(-1).isnan(),
            "disjoint": known["balance.status"] == STATUSES.index("disjoint"),
            "accept_policy": known["accept_policy"],
            "accept_teacher": known["accept_teacher"],
        }
        flat = torch.cat([part.to(torch.float64) for part in wide.values()], -1).cpu()
        parts = dict(zip(wide, flat.split([p.shape[-1] for p in wide.values()], -1), strict=True))
        whole = ("accepted", "tested", "next", "tokens")
        return {k: part.long().tolist() if k in whole else part for k, part in parts.items()}

    def _emit(
        self,
        plan: Plan,
        proposer: str,
        counts: list[int],
        exact: bool,
        host: dict[str, Any],
        known: dict[str, Any],
        next_token: Tensor,
    ) -> tuple[list[int], list[bool], Tensor]:
        accepted = [kept for (kept,) in host["accepted"]]
        full = [a == c for a, c in zip(accepted, counts, strict=True)]
        starts = [len(self.text[row]) for row in self.rows]
        signs = ("nan_policy", "nan_teacher", "nan_draft", "nan_target", "disjoint")
        trouble = any(bool(host[name].any()) for name in signs)
        emitted: list[list[int]] = []
        for place, row in enumerate(self.rows):
            new = host["tokens"][place][: accepted[place]]
            if exact or not full[place]:
                new += host["next"][place]
            emitted.append(self._append(row, new))
            if trouble:
                # What is judged as a whole depends on every draft, else on those that were tested.
                length = len(emitted[-1])
                whole = self.verify is rules.verify_block
                judged = counts[place] if whole else length
                self._check(host, place, row, starts[place], length, proposer, judged)
        for name, reader in self.readers.items():
            settled = [start + kept for start, kept in zip(starts, accepted, strict=True)]
            prompts = [len(prompt) for prompt, _ in self.texts_of(name)]
            reader.truncate(
                [n + settled[i % len(settled)] for i, n in enumerate(prompts)]  # "both" has two
            )
        self._remember(plan, proposer, counts, host, known, starts, emitted)
        alive = [place for place, row in enumerate(self.rows) if row not in self.done]
        if len(alive) < len(self.rows):
            before, self.rows = len(self.rows), [self.rows[place] for place in alive]
            if alive:
                for name, reader in self.readers.items():
                    second = [before + place for place in alive] if name == "both" else []
                    reader.select(alive + second)
        return alive, [full[place] for place in alive], next_token

    def _append(self, row: int, new: list[int]) -> list[int]:
        """Add tokens to a row's text until something ends it; those that were added."""
        for i, token in enumerate(new):
            self.text[row].append(token)
            if self._ends(row):
                self.done.add(row)
                return new[: i + 1]
        return new

    def _ends(self, row: int) -> bool:
        """Whether the last token ends the row. Asked once of each: a criterion may count."""
        text = self.text[row]
        if len(text) >= self.max_new_tokens or text[-1] in self.ends:
            return True
        if not self.stopping_criteria:
            return False
        ids = torch.tensor([self.shown[row] + text], device=self.device)
        return any(bool(torch.as_tensor(stop(ids, None)).any()) for stop in self.stopping_criteria)

    def _check(
        self,
        host: dict[str, Any],
        place: int,
        row: int,
        at: int,
        length: int,
        proposer: str,
        judged: int,
    ) -> None:
        """Raise where an emitted token had no law: a model answered nan, or nothing was left.

        So does a draft that was judged and came from no law, even if it was not kept: a block that
        is judged as a whole would follow another law.
        """

        def no_nan(name: str, is_nan: Tensor) -> None:
            bad = is_nan.nonzero()
            if len(bad):
                filtered = ", or a filter left no token there" if self.law.shaping.steps else ""
                reader = self.readers.get("draft" if name == "draft model" else name)
                raise ValueError(
                    f"the {name} answers nan at new token {at + int(bad[0])}, row {row}: its "
                    f"logits hold nan or +inf, or are all -inf{filtered}. "
                    f"{_nan_advice((reader or self.readers['both']).model, len(self.text) > 1)}"
                )

        for name in PARENTS:
            no_nan(name, host[f"nan_{name}"][place, :length])
        apart = host["disjoint"][place, :length].nonzero()
        if len(apart) and self.law.disjoint == "raise":
            raise ValueError(
                f"policy and teacher share no token at new token {at + int(apart[0])}, row {row}: "
                f"q* does not exist there. Something (a filter, a mask on the logits) cut their "
                f"supports apart. Apply a filter to q* (filtered='target'), or pass "
                f"disjoint='mixture' for the even mixture at such positions."
            )
        empty = host["nan_target"][place, :length].nonzero()
        if len(empty):
            raise ValueError(
                f"the filters leave no token at new token {at + int(empty[0])}, row {row}: a "
                f"logits processor banned all of them, or answered nan. Loosen it."
            )
        drafter = "draft model" if proposer == "draft" else proposer
        no_nan(drafter, host["nan_draft"][place, :judged])

    def _remember(
        self,
        plan: Plan,
        proposer: str,
        counts: list[int],
        host: dict[str, Any],
        known: dict[str, Any],
        starts: list[int],
        emitted: list[list[int]],
    ) -> None:
        """Write the round down: for the trace, for the planner, and for whoever listens."""
        lengths = [len(new) for new in emitted]
        accepted = [kept for (kept,) in host["accepted"]]
        self.log.append(
            {
                "known": known,
                "rows": list(self.rows),
                "starts": starts,
                "lengths": lengths,
                "accepted": accepted,
                "counts": counts,
                "proposer": PROPOSERS.index(proposer),
            }
        )
        for row, new in zip(self.rows, emitted, strict=True):
            lookup = self.lookups[row]
            lookup.append(new)
            schemes.observe(self.observed, "lookup", lookup.right, lookup.tested)
            lookup.tested = lookup.right = 0
        tested = sum(count for (count,) in host["tested"])
        for name in PARENTS:
            values = host[f"accept_{name}"].tolist()
            seen = [x for row, n in zip(values, lengths, strict=True) for x in row[:n]]
            schemes.observe(self.observed, name, sum(seen), len(seen))
        if proposer == "draft":
            # Of a block that is judged as a whole, all drafts count as tested: not so here.
            looked_at = sum(min(kept + 1, n) for kept, n in zip(accepted, counts, strict=True))
            schemes.observe(self.observed, proposer, sum(accepted), looked_at)
        now = time.perf_counter()
        self.rounds.append(
            RoundTrace(
                scheme=plan.scheme,
                gamma=plan.gamma,
                forwards=tuple(timer.forward() for timer in self.timers),
                drafted=sum(counts),
                tested=tested,
                accepted=sum(accepted),
                emitted=sum(lengths),
                seconds=now - self.clock,
            )
        )
        self.timers, self.clock = [], now
        if self.on_tokens is not None and max(lengths) > 0:
            block = torch.full((len(self.text), max(lengths)), NO_TOKEN)
            for row, new in zip(self.rows, emitted, strict=True):
                block[row, : len(new)] = torch.tensor(new, dtype=torch.long)
            self.on_tokens(block)

    # --- The result

    def generation(self, costs: Costs | None, single: bool, device: torch.device) -> Generation:
        """The result in the shape and on the device of the prompt."""
        size = self.max_new_tokens
        filled = [text + [text[-1]] * (size - len(text)) for text in self.text]

        def shaped(values: Tensor) -> Tensor:
            return (values[0] if single else values).to(device)

        source, place, proposer, accepted = [], [], [], []
        offset = 0
        for entry in self.log:
            batch, positions = entry["known"]["alpha"].shape
            for i, row in enumerate(entry["rows"]):
                for j in range(entry["lengths"][i]):
                    source.append(offset + i * positions + j)
                    place.append(row * size + entry["starts"][i] + j)
                    proposer.append(entry["proposer"] if j < entry["counts"][i] else 0)
                    accepted.append(j < entry["accepted"][i])
            offset += batch * positions
        index = torch.tensor(place)

        def scattered(name: str) -> Tensor:
            values = torch.cat([entry["known"][name].reshape(-1) for entry in self.log]).cpu()
            floats = values.is_floating_point()
            nothing = torch.nan if floats else -(values.dtype != torch.bool)
            out = torch.full((len(filled) * size,), nothing, dtype=values.dtype)
            out[index] = values[torch.tensor(source)]
            return shaped(out.reshape(-1, size))

        def written(values: list[Any], nothing: Any, dtype: torch.dtype) -> Tensor:
            out = torch.full((len(filled) * size,), nothing, dtype=dtype)
            out[index] = torch.tensor(values, dtype=dtype)
            return shaped(out.reshape(-1, size))

        trace = Trace(
            balance=Balance(**{name: scattered(f"balance.{name}") for name in Balance.__slots__}),
            **{
                name: scattered(name)
                for name in ("alpha", "minus_log_partition", "accept_policy", "accept_teacher")
            },
            proposer=written(proposer, -1, torch.int8),
            accepted=written(accepted, False, torch.bool),
            rounds=tuple(self.rounds),
            prefill=tuple(self.prefill),
            costs=costs,
        )
        lengths = torch.tensor([len(text) for text in self.text])
        return Generation(shaped(torch.tensor(filled)), shaped(lengths), trace)


def _other(parent: str) -> str:
    return PARENTS[1 - PARENTS.index(parent)]


# --- Time ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Timer:
    """A forward that is being timed: on the device where that has a clock of its own."""

    model: str
    width: int
    rows: int
    device: torch.device
    begun: Any = None
    ended: Any = None

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def forward(self) -> Forward:
        """What was timed. Asked only after the host has waited for the device anyway."""
        if self.device.type == "cuda":
            self.ended.synchronize()
            spent = self.begun.elapsed_time(self.ended) / 1000
        else:
            spent = self.ended - self.begun
        return Forward(self.model, self.width, self.rows, spent)


@contextmanager
def _timed(
    timers: list[_Timer], model: str, width: int, rows: int, device: torch.device
) -> Iterator[None]:
    timer = _Timer(model, width, rows, device)
    timer.begun = timer.mark()
    yield
    timer.ended = timer.mark()
    timers.append(timer)


MEASURED_WIDTHS = (1, 2, 3, 5, 9)
MEASURED_TIMES = 4
MEASURED_SECONDS = 2.0  # after which one forward of each kind must do

_COSTS: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], Costs]] = weakref.WeakKeyDictionary()
"""What was measured, by policy; so that a seed repeats within a process."""


def _measured_costs(run: _Run) -> Costs:
    """What forwards of each width take here, on the caches as they are; measured once."""
    policy = run.readers["policy"].model
    models = [reader.model for reader in run.readers.values()]
    # Layers that answer in another way (`qstar.decoding.packed`) take another time.
    swapped = ["forward" in vars(module) for model in models for module in model.modules()]
    # Weak references, for a later model may be given the address of one that is gone.
    kinds = [(weakref.ref(model), str(model.device), model.dtype) for model in models]
    key = (len(run.prompts["policy"]), sum(swapped), *kinds)
    kept = _COSTS.setdefault(policy, {})
    # A call for few tokens measures few widths, which must not be all that later calls know.
    if key not in kept or max(kept[key].policy) < max(_measured_widths(run.max_new_tokens)):
        run.start()
        runs = {"policy": run, "teacher": run, "draft": run}
        runs = {name: run for name in runs if name in run.readers}
        if run.readers["teacher"].model is policy:
            del runs["teacher"]
            runs["both"] = replace(run, readers={name: run.readers[name] for name in PARENTS})
            runs["both"].read_together()
            runs["both"].start()
        seconds = _seconds_by_width(runs)
        kept[key] = Costs(
            policy=seconds["policy"],
            teacher=seconds.get("teacher", seconds["policy"]),
            draft=seconds.get("draft"),
            both=seconds.get("both"),
        )
        run.prefill.clear()
    return kept[key]


def _measured_widths(max_new_tokens: int) -> list[int]:
    return [width for width in MEASURED_WIDTHS if width <= max_new_tokens]


def _seconds_by_width(runs: dict[str, _Run]) -> dict[str, dict[int, float]]:
    """The least time of a forward of each reader and width; what was read for it is taken back.

    They take turns, so that what else the machine does for a while falls on all of them, and of
    each the least counts: a time that something disturbed is never shorter.
    """
    spent: dict[str, dict[int, float]] = {name: {} for name in runs}
    unread = {name: run.unread(name) for name, run in runs.items()}
    lengths = {name: list(run.readers[name].lengths) for name, run in runs.items()}
    begun = time.perf_counter()
    for turn in range(MEASURED_TIMES + 1):
        if turn > 1 and time.perf_counter() - begun > MEASURED_SECONDS:
            break
        for name, run in runs.items():
            reader, rows = run.readers[name], len(lengths[name])
            for width in _measured_widths(run.max_new_tokens)[: None if turn else 1]:
                drafts = torch.zeros(rows, width - 1, dtype=torch.long, device=run.device)
                timers: list[_Timer] = []
                with _timed(timers, name, width, rows, reader.model.device):
                    reader.feed(unread[name], drafts, positions=width)
                reader.truncate(lengths[name])
                if turn > 0:  # the first one warms up
                    taken = timers[0].forward().seconds
                    spent[name][width] = min(taken, spent[name].get(width, taken))
    return spent


# --- What can be wrong ---------------------------------------------------------------------------


def _check_weights(models: dict[str, Any]) -> None:
    """ValueError where two models that are not one object are one set of weights.

    An adapter changes its base in place, and so all models that wrap it: they would all answer
    alike. Models that share some weights (their embeddings, say), or that read the same weights by
    different configs, are different models.
    """
    given = {name: model for name, model in models.items() if model is not None}
    weights = {name: _weights(model) for name, model in given.items()}
    for one, other in combinations(given, 2):
        if (
            given[one] is not given[other]
            and weights[one]
            and weights[one] == weights[other]
            and _settings(given[one]) == _settings(given[other])
        ):
            raise ValueError(
                f"{one} and {other} are two objects over one set of weights, so that both answer "
                f"alike (an adapter changes its base in place, for all that hold the base). For "
                f"two models load the base model a second time, for an adapter of its own. For "
                f"one model pass one object twice; in an adapted model's own generate that is "
                f"model.get_base_model()."
            )


def _weights(model: Any) -> set[tuple[Any, ...]]:
    """Where a model's parameters and kept buffers lie in memory."""
    found = set()
    for module in model.modules():
        kept = {k: v for k, v in module._buffers.items() if k not in _passing(module)}
        for tensor in (*module._parameters.values(), *kept.values()):
            try:
                address = 0 if tensor is None else tensor.data_ptr()
            except (RuntimeError, NotImplementedError):  # a tensor without memory of its own
                address = id(tensor)
            if address:
                found.add((str(tensor.device), address, tuple(tensor.shape)))
    return found


def _passing(module: Any) -> set[str]:
    """The names of buffers that are worked out anew where a model is loaded."""
    return getattr(module, "_non_persistent_buffers_set", set())


def _settings(model: Any) -> Any:
    config = getattr(model, "config", None)
    to_dict = getattr(config, "to_dict", None)
    return config if to_dict is None else to_dict()


def _holed(
    readers: dict[str, Reader], prompts: dict[str, list[list[int]]], max_new_tokens: int
) -> str | None:
    """The first model that holes in its cache may mislead, and what it does, if there is any.

    The holes are where the rejected drafts of a batch were; a window must not reach them.

    A cache holds no more than the longest text and one forward, of the tokens that its row has
    not read and of its drafts: at most max_new_tokens of either.
    """
    if len(prompts["policy"]) == 1 or max_new_tokens == 1:  # a last token is not drafted for
        return None
    for name, reader in readers.items():
        longest = max(map(len, prompts[name]))
        if reader.slides(longest + 3 * max_new_tokens):
            return f"{'draft model' if name == 'draft' else name} {reader.minds_holes}"
    return None


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}: got {value!r}.")


def _check_scheme(
    scheme: str | None,
    gamma: int | None,
    drafter: str | None,
    draft_model: Any,
    draft_ids: Any,
    costs: Costs | None,
) -> int | None:
    """The draft length as an int, once what was asked for fits together."""
    if scheme is not None:
        _check_choice("scheme", scheme, SCHEMES)
    if gamma is not None:
        try:
            gamma = check_count("gamma", gamma)
        except ValueError as error:
            raise ValueError(
                f"{error} It counts the draft tokens of a round: None adapts it, scheme='plain' "
                f"drafts nothing."
            ) from None
        if scheme == "plain":
            raise ValueError(f"scheme='plain' drafts nothing: leave gamma out (got {gamma}).")
    if drafter is not None:
        _check_choice("drafter", drafter, PARENTS)
        if scheme != "one-sided":
            raise ValueError(
                f"drafter says who drafts with scheme='one-sided': got drafter={drafter!r} with "
                f"scheme={scheme!r}."
            )
    if draft_model is None:
        if scheme == "draft-model":
            raise ValueError(
                "scheme='draft-model' needs draft_model, a third causal language model."
            )
        if draft_ids is not None:
            raise ValueError("draft_ids are read by a draft model: pass draft_model=... too.")
    elif scheme in (None, "draft-model", "auto") and costs is not None and costs.draft is None:
        raise ValueError(
            "costs say nothing of the draft model: pass Costs(..., draft={1: seconds}), or leave "
            "costs out."
        )
    return gamma


def _check_callable(name: str, functions: Any) -> tuple[Any, ...]:
    """Functions as a tuple; ValueError before anything is read with them."""
    if callable(functions) and not isinstance(functions, Sequence):
        raise ValueError(f"{name} holds functions, in a list: got {functions!r} alone.")
    for function in functions:
        if not callable(function):
            raise ValueError(f"{name} must hold functions: got {function!r}.")
    return tuple(functions)


def _check_disjoint(disjoint: str | None, filters: Shaping, filtered: str, vocab: int) -> str:
    """What to do without a q*; ValueError where nobody said and filters make it to be expected."""
    if disjoint is not None:
        _check_choice("disjoint", disjoint, ("raise", "mixture"))
        return disjoint
    cut = [type(step).__name__ for step in filters.steps if _cuts(step, vocab)]
    if filtered == "parents" and cut:
        raise ValueError(
            f"{', '.join(cut)} on the parents can leave them without a shared token, where q* does "
            f"not exist. Apply it to q* (filtered='target'), or say what is to be done there: "
            f"disjoint='mixture' draws from their even mixture, disjoint='raise' stops and loses "
            f"what was drawn."
        )
    return "raise"


def _cuts(step: Any, vocab: int) -> bool:
    """Whether a filter takes improbable tokens away, be they what the other parent keeps."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    if isinstance(step, TopKLogitsWarper):
        return bool(step.top_k < vocab)
    if isinstance(step, TopPLogitsWarper):
        return bool(step.top_p < 1)
    return isinstance(step, MEMORYLESS) and not isinstance(step, TemperatureLogitsWarper)


def _nan_advice(model: Any, batch: bool) -> str:
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


def _check_vocab(readers: dict[str, Reader], vocab: int | None) -> int:
    """How many token ids the laws are over."""
    sizes = {name: reader.vocab for name, reader in readers.items()}
    if vocab is not None:
        shared = check_count("vocab", vocab)
        if shared > min(sizes.values()):
            raise ValueError(
                f"vocab is how many ids all models share, from 1 to {min(sizes.values())}: got "
                f"{vocab}."
            )
        return shared
    for name, size in sizes.items():
        if size != sizes["policy"]:
            raise ValueError(
                f"policy and {name} must share one vocabulary: the policy gives probabilities to "
                f"{sizes['policy']} tokens, the {name} to {size}. Choose models of one family "
                f"(checkpoints.check_same_vocabulary compares their tokenizers); if only the "
                f"padding of their output layers differs, pass vocab=len(tokenizer)."
            )
    return sizes["policy"]


def _check_prompts(
    readers: dict[str, Reader],
    vocab: int,
    max_new_tokens: int,
    given: dict[str, Prompts | None],
) -> tuple[dict[str, list[list[int]]], bool, torch.device]:
    """Each model's prompts as lists, whether they came without a batch axis, and their device."""
    prompts, batched_axes = {}, {}
    for name, reader in readers.items():
        ids: Any = given["policy"] if given[name] is None else given[name]
        rows: list[Any] = list(ids) if isinstance(ids, list | tuple) and ids else [ids]
        for row in rows:
            if not isinstance(row, Tensor) or row.dtype not in (torch.int64, torch.int32):
                kind = row.dtype if isinstance(row, Tensor) else type(ids).__name__
                raise ValueError(
                    f"{name}_ids must be a tensor of token ids (int64), or a list of such tensors "
                    f"of one dimension: got {kind}."
                )
        axes = 2 if rows[0] is not ids else rows[0].ndim
        if rows[0] is ids and axes == 2:
            rows = list(rows[0])
        if any(row.ndim != 1 for row in rows) or not rows or any(row.numel() == 0 for row in rows):
            shape = tuple(ids.shape) if isinstance(ids, Tensor) else [tuple(r.shape) for r in rows]
            raise ValueError(
                f"{name}_ids must hold at least one token per row, in one dimension, in two (a "
                f"batch of equal lengths), or as a list of one-dimensional tensors: got shape "
                f"{shape}. An empty prompt gives no first law; start from the tokenizer's bos "
                f"token."
            )
        low, high = min(int(row.min()) for row in rows), max(int(row.max()) for row in rows)
        if low < 0 or high >= reader.vocab:
            raise ValueError(
                f"{name}_ids must lie in 0..{reader.vocab - 1}, the {name}'s vocabulary: got "
                f"{low}..{high}."
            )
        # The last token drawn is not read any more.
        reader.check_room(max(len(row) for row in rows) + max_new_tokens - 1)
        whole = isinstance(ids, Tensor) and axes == 2
        prompts[name] = ids.tolist() if whole else [row.tolist() for row in rows]
        batched_axes[name] = axes
        if name == "policy":
            device = rows[0].device
    for name in readers:
        if batched_axes[name] != batched_axes["policy"] or len(prompts[name]) != len(
            prompts["policy"]
        ):
            raise ValueError(
                f"the prompts must come in one batch: got {len(prompts['policy'])} rows in "
                f"{batched_axes['policy']} dimensions for the policy, {len(prompts[name])} in "
                f"{batched_axes[name]} for the {name}."
            )
    return prompts, batched_axes["policy"] == 1, device


def _check_shown(shown_ids: Sequence[Tensor] | None, prompts: list[list[int]]) -> list[list[int]]:
    """The prompts as outsiders see them, row by row."""
    if shown_ids is None:
        return prompts
    shown = [row.tolist() for row in shown_ids]
    if len(shown) != len(prompts):
        raise ValueError(
            f"shown_ids must have a row for each of the policy's prompts: got {len(shown)} rows "
            f"for {len(prompts)}."
        )
    return shown


def _check_generator(generator: torch.Generator | Chance | int | None, rows: int) -> Chance:
    if generator is None:
        return RowCoins.of(torch.default_generator, rows)
    if isinstance(generator, torch.Generator):
        if generator.device.type != "cpu":
            raise ValueError(
                f"generator must live on the CPU (it serves models on any device): got one on "
                f"{generator.device}. Use torch.Generator() or pass a seed."
            )
        return RowCoins.of(generator, rows)
    if isinstance(generator, Chance):
        return generator
    try:
        seeded = torch.Generator().manual_seed(operator.index(generator))
    except (TypeError, RuntimeError, ValueError):  # no integer, or one of more than 64 bits
        raise ValueError(
            f"generator must be a seed (an integer of 64 bits), a torch.Generator or None: got "
            f"{generator!r}."
        ) from None
    return RowCoins.of(seeded, rows)


def _check_ends(
    eos_token_id: int | Sequence[int] | str | None, policy: Any, vocab: int
) -> frozenset[int]:
    """The ids that end a row, those of them that the vocabulary has."""
    given: Any = eos_token_id
    if isinstance(given, str) and given == "policy":
        config = getattr(policy, "generation_config", None)
        given = getattr(config, "eos_token_id", None)
    if isinstance(given, str):
        raise ValueError(
            f'eos_token_id must be an id, several, None or "policy" (what the policy\'s generation '
            f"config says): got {given!r}. Look a token's id up in the tokenizer."
        )
    given = given.tolist() if hasattr(given, "tolist") else given
    ids = [] if given is None else given if isinstance(given, Sequence) else [given]
    try:
        return frozenset(id_ for id_ in map(operator.index, ids) if 0 <= id_ < vocab)
    except TypeError:
        raise ValueError(f"eos_token_id must be ids, whole numbers: got {given!r}.") from None
