"""The law of a decoder's tokens: what it should be, and what the very code that samples makes it.

`expected_law` computes the token-level law by forwards over whole texts and the NumPy reference.
`enumerated_law` runs `generate` once, in a batch that holds a row for every sequence of choices
that it can make: rows accept and reject differently, so that ragged acceptance is part of the test.
"""

import inspect
import itertools
from dataclasses import fields, replace
from functools import partial

import numpy as np
import torch
from scipy.special import log_softmax, logsumexp

import qstar
from qstar.decoding.generate import decode, generate
from qstar.decoding.options import check

MOST_ROWS = 40_000


def log_laws(model, prompt, depth, vocab):
    """log p(. | prompt, prefix) for every prefix of `depth` tokens, without any cache."""
    prefixes = torch.tensor(list(itertools.product(range(vocab), repeat=depth)), dtype=torch.long)
    texts = torch.cat([prompt.expand(len(prefixes), -1), prefixes.reshape(len(prefixes), -1)], 1)
    with torch.no_grad():
        logits = model(texts, use_cache=False).logits[:, -1, :vocab]
    return log_softmax(logits.double().numpy(), axis=-1), texts.numpy()


def filtered(log_law, texts=None, *, temperature=1.0, top_k=None, top_p=None, penalty=0.0):
    """The filters again, in NumPy: a penalty on the tokens of the text, then the usual three."""
    with np.errstate(divide="ignore", invalid="ignore"):
        if penalty:
            seen = (texts[..., None] == np.arange(log_law.shape[-1])).any(-2)
            log_law = log_law - penalty * seen
        log_law = log_softmax(log_law / temperature, axis=-1)
        if top_k is not None:
            kth = np.sort(log_law, axis=-1)[..., [-min(top_k, log_law.shape[-1])]]
            log_law = np.where(log_law < kth, -np.inf, log_law)
            log_law = log_law - logsumexp(log_law, axis=-1, keepdims=True)
        if top_p is not None:
            order = np.argsort(-log_law, axis=-1)
            law = np.take_along_axis(np.exp(log_law), order, -1)
            before = law.cumsum(-1) - law
            keep = np.zeros(law.shape, dtype=bool)
            np.put_along_axis(keep, order, before < top_p, -1)
            log_law = np.where(keep, log_law, -np.inf)
    return log_law - logsumexp(log_law, axis=-1, keepdims=True)


def penalise(strength, ids, scores):
    """The penalty as a processor of transformers."""
    seen = (ids[..., None] == torch.arange(scores.shape[-1])).any(-2)
    return torch.where(seen, scores - strength, scores)


def target_law(policy, teacher, alpha):
    """q_alpha by the reference; the even mixture where the parents share nothing."""
    with np.errstate(divide="ignore"):
        rows = []
        for p, r in zip(policy, teacher, strict=True):
            if not (np.isfinite(p) & np.isfinite(r)).any():
                rows.append(np.logaddexp(p, r) - np.log(2))
                continue
            at = qstar.solve_kl_symmetry(p, r).alpha if alpha is None else alpha
            rows.append(qstar.log_geometric_mean(p, r, at))
    return np.stack(rows)


def expected_law(models, prompts, length, *, vocab, alpha=None, where="target", **filters):
    """The probability of every outcome of `length` tokens, flattened."""
    log_joint = np.zeros(1)
    for depth in range(length):
        (policy, policy_texts), (teacher, teacher_texts) = (
            log_laws(model, prompt, depth, vocab)
            for model, prompt in zip(models, prompts, strict=True)
        )
        if where == "parents":
            policy = filtered(policy, policy_texts, **filters)
            teacher = filtered(teacher, teacher_texts, **filters)
        target = target_law(policy, teacher, alpha)
        if where == "target":
            target = filtered(target, policy_texts, **filters)
        log_joint = (log_joint[:, None] + target).ravel()
    law = np.exp(log_joint)
    np.testing.assert_allclose(law.sum(), 1.0, atol=1e-12)
    return law


def options_of(*, where="target", penalty=0.0, **filters):
    """The arguments of `generate` that ask for these filters."""
    processors = [partial(penalise, penalty)] if penalty else []
    return {"filtered": where, "logits_processor": processors, **filters}


def generate_by(rule, *models_and_prompts, **options):
    """`generate` with a rule of another class in place of its own: for a mistake."""
    asked = inspect.signature(generate).bind(*models_and_prompts, **options)
    asked.apply_defaults()
    setup = check(**asked.arguments)
    same = {field.name: getattr(setup.rule, field.name) for field in fields(setup.rule)}
    return decode(replace(setup, rule=rule(**same)))[0]


class EveryRow:
    """A `speculative.Chance` for a batch: each row follows a script of its own, all at once.

    Rows are `leaves` scripts for each of several prompts. A call with n options takes the next
    digit of the row's number in base n; the weight of the choice is multiplied up. A row that ends
    early ends alike for every way to go on, so its weight is shared among that many rows.
    """

    def __init__(self, prompts, leaves, length, end=None):
        self.leaf = torch.arange(leaves).repeat(prompts)
        self.weight = torch.ones(prompts * leaves, dtype=torch.float64)
        self.seen = torch.ones(prompts * leaves, dtype=torch.long)
        self.emitted = torch.zeros(prompts * leaves, dtype=torch.long)
        self.ended = torch.zeros(prompts * leaves, dtype=torch.bool)
        self.running = torch.ones(prompts * leaves, dtype=torch.bool)
        self.length, self.end = length, end
        self.options = 1

    def listen(self, block):
        """Called by `generate` after each round: who is still running?"""
        self.emitted += (block >= 0).sum(-1)
        self.running = self.emitted < self.length
        if self.end is not None:
            self.ended |= (block == self.end).any(-1)
            self.running &= ~self.ended

    def keep(self, log_probability):
        rows, choice, events = self._choose(log_probability.shape[1:], 2)
        kept = choice.reshape(len(rows), *events).bool()
        probability = log_probability.double().exp()
        chosen = torch.where(kept, probability, 1 - probability)
        self.weight[rows] *= chosen.reshape(len(rows), -1).prod(-1)
        return kept

    def draw(self, log_law):
        rows, choice, events = self._choose(log_law.shape[1:-1], log_law.shape[-1])
        token = choice.reshape(len(rows), *events)
        chosen = log_law.double().exp().gather(-1, token[..., None]).squeeze(-1)
        self.weight[rows] *= chosen.reshape(len(rows), -1).prod(-1)
        return token

    def _choose(self, events, options):
        rows = self.running.nonzero().squeeze(-1)
        digits = torch.zeros(len(rows), events.numel(), dtype=torch.long)
        for event in range(events.numel()):
            digits[:, event] = self.leaf[rows] // self.options % options
            self.options *= options
        self.seen[rows] = self.options
        return rows, digits, events


def ended_law(law, length, vocab, end):
    """The law of outcomes that stop at a token and are filled up with it."""
    stopped = np.zeros_like(law)
    for place, outcome in enumerate(itertools.product(range(vocab), repeat=length)):
        at = outcome.index(end) if end in outcome else length
        filled = outcome[:at] + (end,) * (length - at)
        stopped[np.ravel_multi_index(filled, (vocab,) * length)] += law[place]
    return stopped


def enumerated_law(models, prompts, length, *, vocab, end=None, rule=None, **options):
    """The law of every prompt's tokens, exactly, and the result of the run that gave it.

    Args:
        models: The parents.
        prompts: Pairs of prompts, one for each parent; each is one row of the answer.
        length: How many tokens.
        vocab: Outcomes of a token.
        end: The token that ends a row, if one does.
        rule: A class in place of the decoder's own `Rule`.
        options: What else `generate` is asked.
    """
    run = generate if rule is None else partial(generate_by, rule)
    leaves = 1
    while True:
        assert leaves * len(prompts) <= MOST_ROWS, f"{leaves} scripts are too many"
        chance = EveryRow(len(prompts), leaves, length, end)
        ids = [[pair[side] for pair in prompts for _ in range(leaves)] for side in range(2)]
        result = run(
            *models,
            *ids,
            max_new_tokens=length,
            generator=chance,
            eos_token_id=end,
            vocab=vocab,
            on_tokens=chance.listen,
            **options,
        )
        if chance.options <= leaves:
            break
        leaves = chance.options
    assert chance.options == leaves
    place = vocab ** torch.arange(length - 1, -1, -1)
    outcome = (result.tokens * place).sum(-1)
    law = torch.zeros(len(prompts), vocab**length, dtype=torch.float64)
    share = chance.weight * chance.seen / leaves
    prompt = torch.arange(len(prompts)).repeat_interleave(leaves)
    law.index_put_((prompt, outcome), share, accumulate=True)
    return law.numpy(), result
