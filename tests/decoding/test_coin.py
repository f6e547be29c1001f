"""Coin drafting is exact, accepts what its theorem says, and leaves rows of a batch independent.

The enumeration of every scheme, filters and ends included, is in `test_decode_distributions.py`;
here is what only a coin can do wrong.
"""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from decoder_distributions import enumerated_distribution, expected_distribution, ways_to_decode
from sampling import FALSE_ALARM, p_value, smallest_detectable_tv
from scipy.special import log_softmax, rel_entr

import qstar
from qstar.decoding import coin
from qstar.decoding.costs import Costs, forwards_per_token
from qstar.decoding.enumeration import tiny_model
from qstar.decoding.generate import generate
from qstar.decoding.judging import Rule
from qstar.decoding.planner import Plan, Planner
from qstar.sampling import rules
from qstar.sampling.chance import RowCoins
from qstar.sampling.enumeration import every_outcome

EXACT = 1e-12
COSTS = Costs({1: 1.0}, {1: 1.0})
PROMPTS = torch.tensor([1]), torch.tensor([0, 1, 1])


def pair(vocab=2):
    return tiny.llama(1, vocab=vocab, sharpness=2.0), tiny.gpt2(2, vocab=vocab, sharpness=0.5)


def outcomes(length, *, rule=Rule, **options):
    """The probability of every outcome of a row alone. Shape (2,) * length."""
    distribution = np.zeros((2,) * length)
    options |= {"rule": rule, "max_new_tokens": length, "scheme": "coin"}
    for result, weight in every_outcome(ways_to_decode(*pair(), *PROMPTS, **options)):
        distribution[tuple(result.tokens.tolist())] += float(weight)
    return distribution


def error(length, **options):
    wanted = expected_distribution(pair(), PROMPTS, length, vocab=2).reshape((2,) * length)
    return np.abs(outcomes(length, **options) - wanted).max()


def test_a_row_alone_has_the_token_level_distribution():
    """Its first proposer is tossed for, too; and a parent may go on."""
    assert error(2, gamma=2) < EXACT


LEAVING = {  # what follows a round of coins, whatever the proposals that wait were drawn by
    "plain": Plan("plain", 0, "policy"),
    "lookup": Plan("lookup", 1, "policy"),
    "one-sided": Plan("one-sided", 1, "teacher"),
    "alternating": Plan("alternating", 1, "teacher"),
    "another coin": Plan("coin", 2, "teacher", (0.25, 0.6)),
}


@pytest.mark.parametrize("name", LEAVING)
def test_a_proposal_that_was_tossed_for_is_judged_whatever_comes_next(name, monkeypatch):
    """Where the coin said "stay" the mixture judged: where it did not, it has to judge as well."""
    plans = [Plan("coin", 2, "policy", (0.5, 0.5)), LEAVING[name]]
    monkeypatch.setattr(Planner, "plan", lambda self, evidence: plans[evidence.outstanding])
    distribution, result = enumerated_distribution(
        pair(), [PROMPTS], 2, vocab=2, scheme="auto", costs=COSTS
    )
    wanted = expected_distribution(pair(), PROMPTS, 2, vocab=2)
    assert np.abs(distribution[0] - wanted).max() < EXACT
    assert len(result.trace.rounds) > 1


class UnknownLimit(Rule):
    """A proposal that a limit made certain is judged as if it had been tossed for."""

    def judge(self, state, proposal, *rest):
        if proposal.weights is not None or proposal.by in ("policy", "teacher"):
            weights = proposal.weights or [[1.0] * count for count in proposal.counts]
            tossed = tuple(tuple(0.5 if w == 1 else w for w in row) for row in weights)
            proposal = replace(proposal, weights=tossed)
        return super().judge(state, proposal, *rest)


def test_a_limit_that_the_mixture_does_not_know_changes_the_distribution():
    assert error(2, gamma=1, rule=UnknownLimit) > 1e-3


KINDS = {  # of one position: whether it is exact, and whether it keeps what the theorem promises
    "the mixture": (True, True),
    "the proposer's own distribution": (True, False),
    "kept by its own, redrawn by the mixture": (False, False),
    "a coin that looks at the proposal": (False, True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_position_is_exact_if_what_judges_is_what_was_drawn_from(kind):
    """Every choice of the rule. To judge by the proposer alone is exact, too, and keeps less."""
    rows = log_softmax(np.random.default_rng(1).normal(size=(2, 4)) * 2, axis=-1)
    q = qstar.log_geometric_mean(*rows, qstar.solve_kl_symmetry(*rows).alpha)
    log_p, log_r, log_q = map(torch.tensor, (*rows, q))
    mixture, fair = coin.log_even_mixture(log_p, log_r), torch.tensor(0.5).double().log()

    def program(chance):
        own, others = (log_p, log_r) if chance.keep(fair) else (log_r, log_p)
        token = chance.draw(own)
        if kind.startswith("a coin") and token == 0:  # "no, let the other one": tossed too late
            token = chance.draw(others)
        judge = own if "own" in kind else mixture
        kept = chance.keep(rules.log_acceptance(judge, log_q)[token])
        redraw = rules.log_residual(mixture if "redrawn" in kind else judge, log_q)
        return (token if kept else chance.draw(redraw)), bool(kept)

    found, kept = np.zeros(4), 0.0
    for (token, accepted), weight in every_outcome(program):
        found[int(token)] += float(weight)
        kept += float(weight) * accepted
    exact, best = KINDS[kind]
    off = np.abs(found - np.exp(q)).max()
    assert off < EXACT if exact else off > 1e-3
    promised = float(torch.minimum(mixture, log_q).exp().sum())
    if exact:
        assert kept == pytest.approx(promised, abs=1e-12) if best else kept < promised - 0.01


class OneCoin(RowCoins):
    """The tosses of every second row are those of the row before it."""

    def keep(self, log_probability):
        kept = super().keep(log_probability)
        if (log_probability == np.log(0.5)).all():
            kept[1::2] = kept[::2]
        return kept

    def only(self, rows, **counts):
        return OneCoin(tuple(self.streams[row] for row in rows), **counts)


def opposed():
    """Two models of two tokens that favour one each, nine to one, whatever came before."""
    models = [tiny_model(seed, vocab=2, forgetful=True) for seed in (1, 2)]
    for model, favour in zip(models, (0, 1), strict=True):
        with torch.no_grad():
            state = model.model(torch.tensor([[0]])).last_hidden_state[0, 0]
            odds = torch.tensor([0.9, 0.1] if favour == 0 else [0.1, 0.9], dtype=state.dtype).log()
            model.lm_head.weight.copy_(odds[:, None] * state / state.square().sum())
    return models


@pytest.mark.parametrize("tied", [False, True])
def test_rows_are_independent_and_one_coin_for_two_would_tie_them(tied):
    """Under one coin each row is exact by itself, and the second tokens of two rows agree."""
    pairs, chance = 1600, OneCoin if tied else RowCoins
    result = generate(
        *opposed(),
        torch.zeros(2 * pairs, 1, dtype=torch.long),
        max_new_tokens=2,
        generator=chance(RowCoins.of(torch.Generator().manual_seed(0), 2 * pairs).streams),
        eos_token_id=None,
        scheme="coin",
    )
    second = result.tokens[:, 1].reshape(pairs, 2).numpy()
    for row in range(2):
        assert p_value(second[:, row], [0.5, 0.5]) > FALSE_ALARM
    joint = p_value(second @ [2, 1], [0.25] * 4)
    assert joint < 1e-12 if tied else joint > FALSE_ALARM
    assert smallest_detectable_tv(pairs, 4) < 0.15


def test_the_mixture_is_accepted_as_the_theorem_says():
    """At least exp(-C - d), d the coin's divergence from alpha*, and the coin's average."""
    rng, alone = np.random.default_rng(0), 0.0
    for _ in range(300):
        vocab, sharp = int(rng.integers(2, 200)), rng.uniform(0.05, 6)
        rows = log_softmax(sharp * rng.normal(size=(2, 20, vocab)), axis=-1)
        balance = qstar.solve_kl_symmetry(*rows)
        q = np.exp(qstar.log_geometric_mean(*rows, balance.alpha))
        p, r = np.exp(rows)
        for weight in (balance.alpha[:, None], 0.5, rng.uniform(size=(20, 1))):
            own = np.minimum(q, p).sum(-1), np.minimum(q, r).sum(-1)
            mixed = np.minimum(q, weight * p + (1 - weight) * r).sum(-1)
            w = np.broadcast_to(weight, (20, 1))[:, 0]
            assert (mixed >= w * own[0] + (1 - w) * own[1] - 1e-12).all()
            apart = rel_entr(balance.alpha, w) + rel_entr(1 - balance.alpha, 1 - w)
            assert (mixed >= np.exp(-balance.chernoff - apart) - 1e-12).all()
        alone = min(alone, float((np.minimum(q, p).sum(-1) - np.exp(-balance.chernoff)).min()))
    assert alone < -1e-2  # what is promised for the mixture is not true of one parent


@pytest.mark.parametrize("stay", [0.0, 0.3, 0.5])
def test_the_coins_stay_as_often_as_they_say(stay):
    """Exactly, with limits of their own; and what the limit makes certain is said to be."""
    most, seen = (2, 0, 1), {}
    for tosses, weight in every_outcome(lambda chance: coin.toss(chance, most, stay)):
        for row, more in enumerate(tosses.more):
            seen[row, more] = seen.get((row, more), 0.0) + float(weight)
            assert tosses.after[row] == (1.0 if more == most[row] else 1 - stay)
    wanted = {
        (row, k): stay**k * (1 - stay if k < limit else 1)
        for row, limit in enumerate(most)
        for k in range(limit + 1)
    }
    assert {k: v for k, v in seen.items() if v} == pytest.approx(
        {k: v for k, v in wanted.items() if v}, abs=1e-13
    )


def test_forwards_are_what_the_cost_model_says():
    """One acceptance everywhere: 1 + (1 - a) / (1 - s) forwards a token, ends apart."""
    models = [tiny_model(seed, vocab=6, forgetful=True) for seed in (1, 2)]
    runs = [
        generate(*models, torch.tensor([1]), max_new_tokens=40, generator=seed, scheme="coin").trace
        for seed in range(12)
    ]
    accept = float(runs[0].accept_coin[0])
    assert all(torch.allclose(run.accept_coin, run.accept_coin[:1]) for run in runs)
    forwards = np.array([run.forwards / 40 for run in runs])
    odds = 6 * forwards.std(ddof=1) / np.sqrt(len(runs))  # one in a billion
    predicted = forwards_per_token("coin", 8, accept)
    without_limit = forwards_per_token("coin", 60, accept, stay=0.3)
    assert without_limit == pytest.approx(1 + (1 - accept) / 0.7, abs=1e-12)
    assert abs(forwards.mean() - predicted) < odds + 1 / 40
    assert 0.5 < accept < 0.95
    assert predicted + odds + 1 / 40 < forwards_per_token("plain")


def test_the_trace_says_with_which_weight_a_parent_proposed():
    trace = generate(*pair(), PROMPTS[0], max_new_tokens=30, generator=3, scheme="coin").trace
    assert {r.scheme for r in trace.rounds} == {"coin"}
    proposed = trace.proposer > 0
    assert (trace.weight[proposed] == 0.5).double().mean() > 0.9
    assert trace.weight[~proposed].isnan().all()
    assert {1, 2} <= set(trace.proposer.tolist())
    plain = generate(*pair(), PROMPTS[0], max_new_tokens=5, generator=3, scheme="alternating").trace
    assert set(plain.weight[plain.proposer > 0].tolist()) == {1.0}


def test_a_coin_is_no_block():
    with pytest.raises(ValueError, match="scheme='coin' judges token by token"):
        generate(*pair(), PROMPTS[0], max_new_tokens=4, scheme="coin", block_verification=True)


def test_a_greedy_coin_takes_the_same_tokens():
    """There a coin buys nothing: a draft is right or it is not, whoever made it."""
    options = {"max_new_tokens": 12, "greedy": True, "eos_token_id": None}
    tokens = [
        generate(*pair(5), PROMPTS[0], scheme=scheme, generator=0, **options).tokens.tolist()
        for scheme in ("plain", "coin")
    ]
    assert tokens[0] == tokens[1]
