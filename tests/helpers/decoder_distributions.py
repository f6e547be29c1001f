"""The distribution of a decoder's tokens: what it should be, and what the code that samples gives.

`expected_distribution` computes the token-level distribution by forwards over whole texts and the
NumPy reference. `enumerated_distribution` is `qstar.decoding.enumeration.decoder_distributions`, of
the decoder or of a mistaken one.
"""

import itertools
from dataclasses import fields, replace
from functools import partial

import numpy as np
import torch
from scipy.special import log_softmax, logsumexp

import qstar
from qstar.decoding.enumeration import decoder_distributions
from qstar.decoding.generate import decode
from qstar.decoding.options import check


def log_distributions(model, prompt, depth, vocab):
    """log p(. | prompt, prefix) for every prefix of `depth` tokens, without any cache."""
    prefixes = torch.tensor(list(itertools.product(range(vocab), repeat=depth)), dtype=torch.long)
    texts = torch.cat([prompt.expand(len(prefixes), -1), prefixes.reshape(len(prefixes), -1)], 1)
    with torch.no_grad():
        logits = model(texts, use_cache=False).logits[:, -1, :vocab]
    return log_softmax(logits.double().numpy(), axis=-1), texts.numpy()


def filtered(log_distribution, texts=None, *, temperature=1.0, top_k=None, top_p=None, penalty=0.0):
    """The filters again, in NumPy: a penalty on the tokens of the text, then the usual three."""
    with np.errstate(divide="ignore", invalid="ignore"):
        if penalty:
            seen = (texts[..., None] == np.arange(log_distribution.shape[-1])).any(-2)
            log_distribution = log_distribution - penalty * seen
        log_distribution = log_softmax(log_distribution / temperature, axis=-1)
        if top_k is not None:
            kth = np.sort(log_distribution, axis=-1)[..., [-min(top_k, log_distribution.shape[-1])]]
            log_distribution = np.where(log_distribution < kth, -np.inf, log_distribution)
            log_distribution = log_distribution - logsumexp(
                log_distribution, axis=-1, keepdims=True
            )
        if top_p is not None:
            order = np.argsort(-log_distribution, axis=-1)
            distribution = np.take_along_axis(np.exp(log_distribution), order, -1)
            before = distribution.cumsum(-1) - distribution
            keep = np.zeros(distribution.shape, dtype=bool)
            np.put_along_axis(keep, order, before < top_p, -1)
            log_distribution = np.where(keep, log_distribution, -np.inf)
    return log_distribution - logsumexp(log_distribution, axis=-1, keepdims=True)


def penalise(strength, ids, scores):
    """The penalty as a processor of transformers."""
    seen = (ids[..., None] == torch.arange(scores.shape[-1])).any(-2)
    return torch.where(seen, scores - strength, scores)


def target_distribution(policy, teacher, alpha):
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


def expected_distribution(models, prompts, length, *, vocab, alpha=None, where="target", **filters):
    """The probability of every outcome of `length` tokens, flattened."""
    log_joint = np.zeros(1)
    for depth in range(length):
        (policy, policy_texts), (teacher, teacher_texts) = (
            log_distributions(model, prompt, depth, vocab)
            for model, prompt in zip(models, prompts, strict=True)
        )
        if where == "parents":
            policy = filtered(policy, policy_texts, **filters)
            teacher = filtered(teacher, teacher_texts, **filters)
        target = target_distribution(policy, teacher, alpha)
        if where == "target":
            target = filtered(target, policy_texts, **filters)
        log_joint = (log_joint[:, None] + target).ravel()
    distribution = np.exp(log_joint)
    np.testing.assert_allclose(distribution.sum(), 1.0, atol=1e-12)
    return distribution


def options_of(*, where="target", penalty=0.0, **filters):
    """The arguments of `generate` that ask for these filters."""
    processors = [partial(penalise, penalty)] if penalty else []
    return {"filtered": where, "logits_processor": processors, **filters}


def ways_to_decode(*models_and_prompts, rule=None, eos_token_id=None, **options):
    """(where choices come from) -> the result; what is asked for is checked once for all of them.

    `rule` is a class in place of the decoder's own `Rule`: for a mistake.
    """
    setup = check(*models_and_prompts, eos_token_id=eos_token_id, **options)
    if rule is not None:
        same = {field.name: getattr(setup.rule, field.name) for field in fields(setup.rule)}
        setup = replace(setup, rule=rule(**same))
    return lambda chance: decode(replace(setup, chance=chance))[0]


def generate_by(rule, *models_and_prompts, generator, **options):
    return ways_to_decode(*models_and_prompts, rule=rule, **options)(generator)


def ended_distribution(distribution, length, vocab, end):
    """The distribution of outcomes that stop at a token and are filled up with it."""
    stopped = np.zeros_like(distribution)
    for place, outcome in enumerate(itertools.product(range(vocab), repeat=length)):
        at = outcome.index(end) if end in outcome else length
        filled = outcome[:at] + (end,) * (length - at)
        stopped[np.ravel_multi_index(filled, (vocab,) * length)] += distribution[place]
    return stopped


def enumerated_distribution(models, prompts, length, *, vocab, rule=None, **options):
    """The distribution of every prompt's tokens, flattened, and the result of the run that gave it.

    `rule` is a class in place of the decoder's own `Rule`.
    """
    if rule is not None:
        options["run"] = partial(generate_by, rule)
    distributions, result = decoder_distributions(models, prompts, length, vocab=vocab, **options)
    np.testing.assert_allclose(
        distributions.reshape(len(distributions), -1).sum(-1), 1.0, atol=1e-12
    )
    return distributions.reshape(len(distributions), -1), result
