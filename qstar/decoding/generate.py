"""Token sequences from q* of two language models: exact, from caches, several tokens a round.

    policy, tokenizer = checkpoints.load(folder)
    result = generate(policy, policy, ids, teacher_ids, max_new_tokens=40, generator=0)
    tokenizer.decode(result.tokens[: result.lengths])

The output distribution is the token-level one: each token is drawn from the geometric mean of the
two next-token distributions, given the tokens so far. (Their product over the positions is not the
geometric mean of the two distributions of whole sequences.) Every scheme draws from it; they differ
in the forward passes they need.

Guidance: with a fixed exponent outside [0, 1] one parent is divided by. For alpha > 1 the logarithm
of the target is log teacher + alpha (log policy - log teacher), normalised. That is classifier-free
guidance of strength alpha if the policy is a model under the whole prompt, and the teacher the same
model under less of it. Every scheme, filter and rule is the same, and as exact.

    generate(model, model, ids, ids_without_instructions, alpha=1.5, max_new_tokens=40)
"""

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _quiet  # noqa: F401 - before transformers
from ..sampling.chance import NO_TOKEN, Chance
from . import latency, planner
from .costs import PARENTS
from .eval_mode import eval_mode
from .inputs import Prompts
from .observations import Observations
from .options import SCHEMES, Setup, check
from .parents import Parents
from .round import Setting, decode_round
from .sampling_options import Sampling, shows_options
from .state import PROPOSERS, Step, tensor_on
from .trace import Generation, RoundTrace, Trace, assemble, parents_are_equal

__all__ = [
    "PARENTS",
    "PROPOSERS",
    "SCHEMES",
    "EqualParentsWarning",
    "Generation",
    "RoundTrace",
    "Trace",
    "decode",
    "generate",
]


class EqualParentsWarning(UserWarning):
    """The parents had one and the same distribution wherever a token was drawn."""


@shows_options
def generate(
    policy: Any,
    teacher: Any,
    policy_ids: Prompts,
    teacher_ids: Prompts | None = None,
    *,
    sampling: Sampling | None = None,
    generator: torch.Generator | Chance | int | None = None,
    draft_model: Any = None,
    draft_ids: Prompts | None = None,
    shown_ids: Sequence[Tensor] | None = None,
    on_tokens: Callable[[Tensor], object] | None = None,
    **options: Any,
) -> Generation:
    """Draw tokens from q*, the KL-symmetric geometric mean of two language models.

    Each model reads its own prompt; a model passed twice may have two. The models are put in eval
    mode and given back as they were. Once a process each kind of model is tried before its cache is
    trusted (`qstar.decoding.cache_check`). All schemes have the same output distribution:

    - "plain": both parents read every token; the reference.
    - "one-sided": one parent drafts gamma tokens, the other verifies them in one forward.
    - "alternating": a proposal from the verifier's own distribution at the next position, which
      costs nothing more, is the next draft. With gamma = 1 never more forwards than "plain".
    - "coin": a coin decides which parent proposes next; q* judges the mixture of both, which is
      kept more often than either (`qstar.decoding.coin`). For one row: a batch would wait for its
      most stubborn coin.
    - "lookup": what followed the last tokens earlier in the text, verified by both parents.
    - "draft-model": a third, cheaper model drafts, both parents verify.
    - "auto": begins plainly, watches the acceptance and what forward passes take, and goes on with
      whichever of all these promises the most tokens a second. Where one model is both parents, a
      first call for at least `latency.COMPARED_FROM` tokens compares one call for both with two.

    Without `scheme` the arguments alone decide: "draft-model" with a draft model (gamma 4); else
    "plain" in one call where one model is both parents (unless `gamma` or one_call=False asks for
    turns); else "alternating" (gamma 1). A batch that may outgrow a sliding window is decoded by
    "plain", the one scheme that is exact there (for a batch; one row alone may follow any); asked
    for another scheme, or for a `gamma`, it is refused.

    A seed means the same on every machine, rounding in the logits apart. What is left open (the
    gamma of a named scheme, `stay`, `drafter`, who drafts after a rejection) is chosen by the
    acceptance observed so far, and by `costs` if given. "auto" hangs on the time that forward
    passes take. It learns this from the first `latency.SETTLED` of them of a pair of models, and a
    seed repeats within a process from then on; pass a `trace.costs` on as `costs`, and it does so
    from the first token, in every process.

    Each row of a batch has randomness of its own: the first row's is `generator` itself, another's
    follows from its state and the row's index. So a row's tokens do not hang on its neighbours,
    unless who proposes how much does: with "alternating", and where observed acceptance decides.

    Memory: a cache takes 2 * layers * key-value heads * head size * bytes per number for each
    token, row and model, up to twice that in a batch whose rows accept different numbers of drafts.
    A static cache (the default on an accelerator, where a model allows it) takes that for the
    longest text and 16 tokens more, rounded up by a quarter at most; up to `captured.IDLE_AT_MOST`
    of a model stay for its next call, until `qstar.decoding.captured.forget(model)`. A round holds
    at most 16 blocks of rows * (gamma + 1) * vocabulary numbers.

    Args:
        policy: A causal language model of transformers.
        teacher: Another over the same vocabulary (`checkpoints.check_same_vocabulary`), or the
            policy itself under another prompt.
        policy_ids: The policy's prompt. One dimension for one sequence; two for a batch of
            prompts of equal length; a list of one-dimensional tensors for a ragged batch.
        teacher_ids: The teacher's prompt, None for the policy's; it may have another length.
        sampling: What is drawn, and how.
        generator: A CPU generator, or a seed; None means torch's own CPU generator.
        draft_model: A third causal language model over the same vocabulary.
        draft_ids: Its prompt; None for the policy's.
        shown_ids: What processors and criteria see in place of the policy's prompts, one for each
            row: `qstar.adapters.transformers` shows the padding of a batch, which lengths are
            counted with there. Shape (length,).
        on_tokens: Called after each round with its new tokens, on the CPU, one row each, -1 where a
            row has fewer. Shape (batch, new).
        options: In place of `sampling`, its fields by their names (`Sampling` says what they mean).

    Returns:
        A `Generation` on the device of the prompt.

    Raises:
        TypeError: An option is no field of `Sampling`.
        ValueError: An argument makes no sense, the models do not fit each other or the text, a
            model answers nan, or there is no q* at some position. The message says where.

    Warns:
        EqualParentsWarning: The parents had one distribution wherever a token was drawn.

    Source: the analysis, problem 1; its loop is replaced by exact rules. Alternating proposals:
        Fu et al. (2025), "Fast large language model collaborative decoding via speculation",
        ICML (PMLR 267:17764). Guidance: Sanchez et al. (2023), "Stay on topic with classifier-free
        guidance", arXiv:2306.17806.
    """
    setup = check(
        policy,
        teacher,
        policy_ids,
        teacher_ids,
        sampling=sampling,
        generator=generator,
        draft_model=draft_model,
        draft_ids=draft_ids,
        shown_ids=shown_ids,
        on_tokens=on_tokens,
        **options,
    )
    result, steps = decode(setup)
    matters = setup.rule.alpha not in (0.0, 1.0) and not setup.rule.of_parents.steps
    if matters and parents_are_equal(steps):
        warnings.warn(
            "policy and teacher had one and the same distribution at every new token (Chernoff "
            "information 0), which q* then is too. For two different parents give one model two "
            "prompts, or load two models: adapters on one base, or one model passed twice, are one "
            "set of weights.",
            EqualParentsWarning,
            stacklevel=2,
        )
    return result


def decode(
    setup: Setup,
    *,
    choose: Callable[[planner.Evidence, Sequence[Step]], planner.Plan] | None = None,
) -> tuple[Generation, list[Step]]:
    """Round after round until every row has ended: the tokens, and what each round did.

    Args:
        setup: What was asked for, checked (`options.check`).
        choose: The next round's plan, of the setup's scheme, in place of the planner's: from the
            evidence and the rounds so far, so from emitted tokens only.
    """
    models = {id(cache.model): cache.model for cache in setup.caches.values()}
    with torch.no_grad(), eval_mode(*models.values()):
        learned = None
        if setup.scheme == "auto" and setup.sampling.costs is None:
            learned = latency.learned(setup.caches, len(setup.state.rows))
        together = _reads_in_one_call(setup, learned)
        parents = Parents(setup.caches, vocab=setup.vocab, together=together)
        observations = Observations(
            setup.state.prompts["policy"],
            looks_up=setup.scheme in ("lookup", "auto"),
            alpha=setup.rule.alpha,
        )
        planned = planner.Planner(
            scheme=setup.scheme,
            gamma=setup.gamma,
            drafter=setup.sampling.drafter,
            stay=setup.sampling.stay,
            costs=setup.sampling.costs,
            has_draft="draft" in setup.caches,
            batch=len(setup.state.rows),
            together=together,
            blocks=setup.rule.blocks,
        )
        if learned is not None:
            _tell_costs(planned, learned)
        to = Setting(parents, setup.rule, setup.chance, observations.look_up, _ends(setup))
        state = setup.state
        steps: list[Step] = []
        prefill = parents.start(state)
        begun = time.perf_counter()
        while state.rows:
            evidence = observations.evidence(
                state.rows, max(state.left()), outstanding=state.pending is not None
            )
            if choose is not None:
                plan = choose(evidence, steps)
            elif learned is not None and learned.costs() is None:
                plan = planner.PLAIN  # tells what either parent takes, the prompt apart
            else:
                plan = planned.plan(evidence)
            state, step = decode_round(to, state, plan)
            steps.append(step)
            observations.add(step)
            if learned is not None:
                learned.add(step.forwards)
                _tell_costs(planned, learned)
            _tell(setup, step)

    def shaped(values: Tensor) -> Tensor:
        return (values[0] if setup.single else values).to(setup.device)

    costs = setup.sampling.costs if learned is None else learned.costs()
    result = assemble(
        steps, state.new, state.limit, begun, prefill=prefill, costs=costs, shaped=shaped
    )
    return result, steps


def _reads_in_one_call(setup: Setup, learned: latency.Learned | None) -> bool:
    """Whether one call serves both parents; compared with two if "auto" needs it."""
    if setup.caches["policy"].model is not setup.caches["teacher"].model:
        return False
    if setup.sampling.one_call is not None:
        return setup.sampling.one_call
    if setup.scheme != "auto":
        return setup.scheme in planner.TOGETHER
    costs = setup.sampling.costs
    if learned is not None:
        if setup.state.limit >= latency.COMPARED_FROM:
            learned.compare(Parents(setup.caches, vocab=setup.vocab), setup.state)
        costs = learned.costs()
    return costs is None or planner.together_is_faster(costs, setup.rule.alpha)


def _tell_costs(planned: planner.Planner, learned: latency.Learned) -> None:
    repaid = planner.REPAID * learned.left
    planned.learn(learned.costs(), caution=planner.CAUTION, repaid=repaid)


def _ends(setup: Setup) -> Callable[[int, Sequence[int]], bool]:
    """Whether a row's last token ends it. To be asked once of each: a criterion may count."""
    device = setup.caches["policy"].device
    criteria = setup.stopping_criteria

    def ends(row: int, new: Sequence[int]) -> bool:
        if new[-1] in setup.ends:
            return True
        if not criteria:
            return False
        ids = tensor_on(device, [[*setup.state.shown[row], *new]])
        return any(bool(torch.as_tensor(s(ids, None)).any()) for s in criteria)

    return ends


def _tell(setup: Setup, step: Step) -> None:
    """Pass a round's tokens on to whoever listens."""
    longest = max(map(len, step.emitted))
    if setup.on_tokens is None or longest == 0:
        return
    block = torch.full((len(setup.state.new), longest), NO_TOKEN)
    padded = [[*fresh, *[NO_TOKEN] * (longest - len(fresh))] for fresh in step.emitted]
    block[list(step.rows)] = torch.tensor(padded)
    setup.on_tokens(block)
