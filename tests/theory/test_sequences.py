"""Whole sequences: closed forms against enumeration, and samplers whose distribution is known.

Sampling tests fail a correct sampler for one seed in a billion (`FALSE_ALARM`). Averages of numbers
in [0, 1] are held to the empirical Bernstein bound of Maurer and Pontil (2009), which holds for
every number of runs; each has a control that must fail.
"""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import CASES, number
from sampling import FALSE_ALARM, p_value
from scipy.special import log_softmax, logsumexp
from scipy.stats import binom

from qstar.families.montecarlo import sample_geometric_mean
from qstar.rows import kl, total_variation
from qstar.theory import particles
from qstar.theory.markov_chains import PerronPair, stationary
from qstar.theory.particles import ChainPair, TablePair, sample_token_level, smc
from qstar.theory.sequences import (
    SequenceDistribution,
    from_joint,
    look_ahead,
    markov_chain,
    sequence_level,
    token_level,
)


def logs(rows):
    return np.log(np.array(rows, dtype=float))


def random_pair(seed, *, length=3, vocab=3, scale=1.5):
    rng = np.random.default_rng(seed)
    return [
        SequenceDistribution(
            tuple(
                log_softmax(scale * rng.normal(size=(vocab,) * (t + 1)), axis=-1)
                for t in range(length)
            )
        )
        for _ in range(2)
    ]


def garden_path(split=3.0):
    """Both start alike; after token 0 they part for good, after token 1 they agree."""
    away = [log_softmax([split, -split]), log_softmax([-split, split])]
    policy, teacher = (
        SequenceDistribution((logs([0.5, 0.5]), np.stack([own, logs([0.5, 0.5])]))) for own in away
    )
    return policy, teacher


def flat(distribution):
    return distribution.log_joint.ravel()


# --- Identities, by enumeration ------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), alpha=st.floats(0.02, 0.98), length=st.integers(1, 4))
def test_the_two_means_differ_by_the_partition_functions_along_the_way(seed, alpha, length):
    policy, teacher = random_pair(seed, length=length)
    token, sequence = (
        token_level(policy, teacher, alpha),
        sequence_level(policy, teacher, alpha),
    )
    ratio = sequence.distribution.log_joint - token.distribution.log_joint
    np.testing.assert_allclose(
        ratio, token.log_correction - sequence.log_partition, rtol=0, atol=1e-11
    )
    mean = logsumexp(flat(token.distribution) + token.log_correction.ravel())
    np.testing.assert_allclose(mean, sequence.log_partition, rtol=0, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.1, 4))
def test_per_position_exponents_equalise_the_sequences_but_cost_the_gap(seed, scale):
    policy, teacher = random_pair(seed, scale=scale)
    token, sequence = token_level(policy, teacher), sequence_level(policy, teacher)
    for parent in (policy, teacher):
        np.testing.assert_allclose(
            kl(flat(token.distribution), flat(parent)), token.expected_sum, rtol=0, atol=1e-9
        )
    gap = kl(flat(token.distribution), flat(sequence.distribution))
    np.testing.assert_allclose(
        gap, token.expected_sum - sequence.balance.chernoff, rtol=0, atol=1e-9
    )
    assert token.expected_sum >= sequence.balance.chernoff - 1e-12


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), alpha=st.floats(0.02, 0.98))
def test_looking_ahead_turns_one_distribution_into_the_other(seed, alpha):
    policy, teacher = random_pair(seed, length=4, vocab=2)
    token, sequence = token_level(policy, teacher, alpha), sequence_level(policy, teacher, alpha)
    for own, ahead, whole in zip(
        token.distribution.log_next, look_ahead(token), sequence.distribution.log_next, strict=True
    ):
        np.testing.assert_allclose(log_softmax(own + ahead, axis=-1), whole, rtol=0, atol=1e-11)


def test_without_looking_ahead_the_distributions_differ():
    """The control of the identity above."""
    token, sequence = token_level(*garden_path(), 0.5), sequence_level(*garden_path(), 0.5)
    assert total_variation(flat(token.distribution), flat(sequence.distribution)) > 0.3


def test_the_token_level_distribution_can_be_arbitrarily_far():
    gaps, distances = [], []
    for split in (1, 3, 9, 27):
        token, sequence = token_level(*garden_path(split)), sequence_level(*garden_path(split))
        gaps.append(float(token.expected_sum - sequence.balance.chernoff))
        distances.append(
            float(total_variation(flat(token.distribution), flat(sequence.distribution)))
        )
    assert np.diff(gaps).min() > 0
    assert gaps[-1] > 10
    assert distances[-1] == pytest.approx(0.5, abs=1e-9)


def test_independent_alike_tokens_have_no_gap():
    first, second = log_softmax([1.0, 0.2, -1.0]), log_softmax([-0.5, 0.4, 0.6])
    policy, teacher = (markov_chain(row, np.tile(row, (3, 1)), 4) for row in (first, second))
    token, sequence = token_level(policy, teacher), sequence_level(policy, teacher)
    np.testing.assert_allclose(
        flat(token.distribution), flat(sequence.distribution), rtol=0, atol=1e-9
    )


def test_independent_unlike_tokens_have_a_gap_only_through_their_exponents():
    rng = np.random.default_rng(0)
    rows = log_softmax(2 * rng.normal(size=(2, 3, 4)), axis=-1)
    policy, teacher = (
        SequenceDistribution(
            tuple(np.broadcast_to(row, (4,) * (t + 1)) for t, row in enumerate(own))
        )
        for own in rows
    )
    sequence = sequence_level(policy, teacher)
    fixed = token_level(policy, teacher, sequence.alpha)
    np.testing.assert_allclose(
        flat(fixed.distribution), flat(sequence.distribution), rtol=0, atol=1e-10
    )
    solved = token_level(policy, teacher)
    assert kl(flat(solved.distribution), flat(sequence.distribution)) > 1e-3


def test_a_distribution_survives_being_taken_apart():
    distribution, _ = random_pair(3, length=4)
    np.testing.assert_allclose(
        from_joint(distribution.log_joint).log_joint, distribution.log_joint, atol=1e-12
    )


def test_a_sequence_level_mean_exists_where_a_decoder_would_be_stuck():
    """After token 0 the parents share nothing, after token 1 they do."""
    policy = SequenceDistribution((logs([0.9, 0.1]), log_softmax([[0, -np.inf], [1, 0]], axis=-1)))
    teacher = SequenceDistribution((logs([0.9, 0.1]), log_softmax([[-np.inf, 0], [0, 1]], axis=-1)))
    with pytest.raises(ValueError, match=r"after the prefix \(0,\) \(token 1\)"):
        token_level(policy, teacher)
    sequence = sequence_level(policy, teacher)
    np.testing.assert_allclose(np.exp(sequence.distribution.log_next[0]), [0, 1], atol=1e-12)
    generator = np.random.default_rng(0)
    drawn = smc(
        TablePair(policy, teacher, 400),
        2,
        alpha=sequence.alpha,
        num_particles=400,
        generator=generator,
        resample_below=1.0,
    )
    assert (drawn.tokens[:, 0] == 1).all()
    with pytest.raises(ValueError, match="the token-level distribution does not exist"):
        sample_token_level(
            TablePair(policy, teacher, 400), 2, num_particles=400, generator=generator
        )


def test_particles_that_all_run_into_a_dead_end_estimate_zero():
    policy = SequenceDistribution(
        (logs([1 - 1e-12, 1e-12]), log_softmax([[0, -np.inf], [1, 0]], axis=-1))
    )
    teacher = SequenceDistribution(
        (logs([1 - 1e-12, 1e-12]), log_softmax([[-np.inf, 0], [0, 1]], axis=-1))
    )
    drawn = smc(
        TablePair(policy, teacher, 4),
        2,
        alpha=0.5,
        num_particles=4,
        generator=np.random.default_rng(0),
        resample_below=1.0,
    )
    assert drawn.log_partition == -np.inf
    assert not np.isnan(drawn.log_weights).any()


# --- The reference cases -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain():
    parameters = CASES["seq_markov_T3"]["parameters"]
    return tuple(
        markov_chain(logs(parameters[f"init_{p}"]), logs(parameters[f"trans_{p}"]), parameters["T"])
        for p in ("theta", "t")
    )


def test_the_short_chain_has_its_published_numbers(chain):
    case = CASES["seq_markov_T3"]
    policy, teacher = chain
    token, sequence = token_level(*chain), sequence_level(*chain)
    fixed = token_level(*chain, sequence.alpha)
    q = flat(sequence.distribution)
    found = {
        "alpha_star": sequence.alpha,
        "chernoff_information": sequence.balance.chernoff,
        "kl_theta_t": kl(flat(policy), flat(teacher)),
        "kl_t_theta": kl(flat(teacher), flat(policy)),
        "token_level_expected_sum_C": token.expected_sum,
        "token_level_kl_to_theta": kl(flat(token.distribution), flat(policy)),
        "token_level_kl_to_t": kl(flat(token.distribution), flat(teacher)),
        "kl_tokenlevel_to_sequence_qstar": kl(flat(token.distribution), q),
        "tv_tokenlevel_vs_sequence": total_variation(flat(token.distribution), q),
        "tv_fixed_alpha_tokenlevel_vs_sequence": total_variation(flat(fixed.distribution), q),
        "alpha_init": token.alpha[0],
    }
    for name, value in found.items():
        assert float(value) == pytest.approx(number(case[name]), abs=2e-14), name
    np.testing.assert_allclose(token.alpha[1], np.array(case["alpha_states"], float), atol=1e-13)


@pytest.fixture(scope="module")
def perron():
    parameters = CASES["markov_rate"]["parameters"]
    return PerronPair(logs(parameters["trans_theta"]), logs(parameters["trans_t"]))


def test_the_long_chain_has_its_published_rates(perron):
    case = CASES["markov_rate"]
    balance = perron.solve()
    assert (balance.status, balance.converged) == ("interior", True)
    assert balance.alpha == pytest.approx(number(case["alpha_star"]), abs=1e-13)
    for rate in (balance.chernoff, balance.kl_to_policy, balance.kl_to_teacher):
        assert rate == pytest.approx(number(case["chernoff_information"]), abs=1e-14)
    assert perron.token_level_rate() == pytest.approx(number(case["token_level_rate"]), abs=1e-14)
    chain = np.exp(perron.log_transition(balance.alpha))
    np.testing.assert_allclose(chain, np.array(case["q_transition"], float), rtol=0, atol=1e-14)


# --- Markov chains -------------------------------------------------------------------------------


def random_chains(seed, *, states=3, scale=1.5):
    rng = np.random.default_rng(seed)
    return log_softmax(scale * rng.normal(size=(2, states, states)), axis=-1)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), states=st.integers(2, 6))
def test_doobs_chain_is_equally_far_from_both_chains_per_token(seed, states):
    policy, teacher = random_chains(seed, states=states)
    balance = PerronPair(policy, teacher).solve()
    chain = PerronPair(policy, teacher).log_transition(balance.alpha)
    weights = stationary(chain)
    for parent in (policy, teacher):
        assert weights @ kl(chain, parent) == pytest.approx(balance.chernoff, abs=1e-10)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), alpha=st.floats(0.05, 0.95))
def test_the_slope_of_the_perron_root_is_the_gap_of_the_rates(seed, alpha):
    pair = PerronPair(*random_chains(seed))
    step = 1e-5
    secant = (pair.log_partition(alpha + step) - pair.log_partition(alpha - step)) / (2 * step)
    assert pair.kl_gap(alpha) == pytest.approx(secant, abs=1e-7)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_token_level_rate_is_never_below_the_chernoff_rate(seed):
    pair = PerronPair(*random_chains(seed))
    assert pair.token_level_rate() >= pair.solve().chernoff - 1e-12


def test_products_of_matrices_are_enumeration_and_tend_to_the_perron_root():
    first = log_softmax(np.random.default_rng(5).normal(size=(2, 3)), axis=-1)
    transition = random_chains(5)
    pair = PerronPair(*transition)
    for length in (1, 2, 5):
        chains = [markov_chain(f, rows, length) for f, rows in zip(first, transition, strict=True)]
        whole = sequence_level(*chains, 0.4)
        found = pair.log_partition_of(*first, length, 0.4)
        assert found == pytest.approx(whole.log_partition, abs=1e-12)
    per_token = pair.log_partition_of(*first, 4001, 0.4) - pair.log_partition_of(*first, 4000, 0.4)
    assert per_token == pytest.approx(pair.log_partition(0.4), abs=1e-12)


def test_equal_chains_and_one_sided_transitions_have_their_statuses():
    rows = random_chains(1)[0]
    equal = PerronPair(rows, rows).solve()
    assert (equal.status, equal.alpha, equal.chernoff) == ("degenerate_all", 0.5, 0.0)
    whole = logs([[0.6, 0.4], [0.5, 0.5]])
    with np.errstate(divide="ignore"):  # log 0 is -inf, and meant
        cut = logs([[0.6, 0.4], [1.0, 0.0]])
    for pair, status, end in (((cut, whole), "boundary_0", 0), ((whole, cut), "boundary_1", 1)):
        balance = PerronPair(*pair).solve()
        assert (balance.status, balance.alpha) == (status, end)
        kept = np.array([[0.6, 0.4], [0.5, 0.0]])  # what the wider chain keeps of itself
        rate = -np.log(np.linalg.eigvals(kept).real.max())
        assert balance.chernoff == pytest.approx(rate, abs=1e-12)
        assert max(balance.kl_to_policy, balance.kl_to_teacher) == pytest.approx(rate, abs=1e-12)


# --- Sequential Monte Carlo: the distribution of the very code, by enumeration -------------------


class Script:
    """Every run of `smc` with its probability: draws and resamplings are made in all ways."""

    def __init__(self, monkeypatch):
        self.path, self.script, self.weight = [], [], 1.0
        monkeypatch.setattr(particles, "draw_tokens", self.draw)
        real = particles._systematic
        monkeypatch.setattr(particles, "_systematic", lambda w, _: self.resample(w, real))

    def choose(self, probabilities):
        index = self.script[len(self.path)] if len(self.path) < len(self.script) else 0
        self.path.append((index, len(probabilities)))
        self.weight *= probabilities[index]
        return index

    def draw(self, log_rows, generator):
        return np.array([self.choose(np.exp(row)) for row in log_rows])

    def resample(self, log_weights, real):
        """The comb moves with one uniform; between two teeth nothing changes."""
        w = np.exp(log_weights - logsumexp(log_weights))
        edges = np.unique(np.r_[0.0, (len(w) * w.cumsum()) % 1.0, 1.0])
        middle, lengths = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
        return real(log_weights, middle[self.choose(lengths)])

    def runs(self, run):
        while True:
            self.path, self.weight = [], 1.0
            outcome = run()
            yield outcome, self.weight
            while self.path and self.path[-1][0] + 1 == self.path[-1][1]:
                self.path.pop()
            if not self.path:
                return
            self.script = [i for i, _ in self.path[:-1]] + [self.path[-1][0] + 1]


@pytest.mark.parametrize("below", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("seed", [2, 3])
def test_smc_with_two_particles_is_unbiased_exactly(monkeypatch, below, seed):
    """Estimate times weighted particles averages to Z_seq Q, over every run there is."""
    policy, teacher = random_pair(seed, length=3, vocab=2, scale=4)
    sequence = sequence_level(policy, teacher, 0.3)
    script = Script(monkeypatch)
    mean, total, resampled = np.zeros((2, 2, 2)), 0.0, 0
    run = lambda: smc(  # noqa: E731
        TablePair(policy, teacher, 2),
        3,
        alpha=0.3,
        num_particles=2,
        generator=np.random.default_rng(0),
        resample_below=below,
    )
    for drawn, weight in script.runs(run):
        contribution = weight * np.exp(drawn.log_partition + drawn.log_weights)
        np.add.at(mean, tuple(drawn.tokens.T), contribution)
        total += weight
        resampled += any(drawn.resampled)
    assert total == pytest.approx(1, abs=1e-12)
    assert (resampled > 0) == (below > 0)
    expected = np.exp(sequence.distribution.log_joint + sequence.log_partition)
    np.testing.assert_allclose(mean, expected, rtol=0, atol=1e-12)


def test_the_comb_copies_each_particle_as_often_as_its_weight_says():
    log_w = np.log([0.05, 0.5, 0.45])
    uniforms = (np.arange(20_000) + 0.5) / 20_000
    counts = np.mean(
        [np.bincount(particles._systematic(log_w, u), minlength=3) for u in uniforms], axis=0
    )
    np.testing.assert_allclose(counts, 3 * np.exp(log_w), rtol=0, atol=1e-3)
    assert particles._systematic(np.array([0.0, -np.inf]), 1 - 2**-53).tolist() == [0, 0]


# --- Sampling, with stated odds ------------------------------------------------------------------

RUNS = 3_000


def mean_is(values, expected, *, comparisons=1):
    """Whether averages of numbers in [0, 1] fit what is expected; wrong once in 1e9 at most."""
    values, expected = np.asarray(values), np.asarray(expected)
    count = len(values)
    log_odds = math.log(4 * comparisons / FALSE_ALARM)
    variance = values.var(axis=0, ddof=1)
    margin = np.sqrt(2 * variance * log_odds / count) + 7 * log_odds / (3 * (count - 1))
    return bool((np.abs(values.mean(axis=0) - expected) <= margin).all())


def measure(drawn, shape, *, estimate):
    distribution = np.zeros(shape)
    np.add.at(distribution, tuple(drawn.tokens.T), np.exp(drawn.log_weights))
    return distribution * np.exp(drawn.log_partition) if estimate else distribution


@pytest.fixture(scope="module")
def runs():
    """SMC on a pair whose two means are far apart, five particles each."""
    policy, teacher = garden_path(2.0)
    generator = np.random.default_rng(7)
    found = [
        smc(
            TablePair(policy, teacher, 5),
            2,
            alpha=0.5,
            num_particles=5,
            generator=generator,
            resample_below=0.9,
        )
        for _ in range(RUNS)
    ]
    return policy, teacher, found


def test_smc_estimates_the_partition_function_without_bias(runs):
    policy, teacher, found = runs
    exact = math.exp(sequence_level(policy, teacher, 0.5).log_partition)
    assert any(drawn.resampled[1] for drawn in found)
    assert mean_is([math.exp(drawn.log_partition) for drawn in found], exact)
    assert not mean_is([math.exp(drawn.log_partition) for drawn in found], 1.1 * exact)


def test_forgetting_one_weight_is_caught(runs):
    """The control: log Z of the last prefix left out."""
    policy, teacher, found = runs
    exact = math.exp(sequence_level(policy, teacher, 0.5).log_partition)
    wrong = [math.exp(drawn.log_partitions[:, 0].mean()) for drawn in found]
    assert not mean_is(wrong, exact)


def test_weighted_particles_follow_the_sequence_level_distribution(runs):
    policy, teacher, found = runs
    sequence = sequence_level(policy, teacher, 0.5)
    values = [measure(drawn, (2, 2), estimate=True) for drawn in found]
    expected = np.exp(sequence.distribution.log_joint + sequence.log_partition)
    assert mean_is(values, expected, comparisons=4)


def test_particles_without_their_weights_follow_another_distribution(runs):
    """The control: plain token-level draws are not from Q."""
    policy, teacher, _ = runs
    sequence = sequence_level(policy, teacher, 0.5)
    generator = np.random.default_rng(8)
    drawn = sample_token_level(
        TablePair(policy, teacher, RUNS), 2, num_particles=RUNS, alpha=0.5, generator=generator
    )
    cells = drawn.tokens @ [2, 1]
    assert p_value(cells, np.exp(flat(sequence.distribution))) < FALSE_ALARM
    assert (
        p_value(cells, np.exp(flat(token_level(policy, teacher, 0.5).distribution))) > FALSE_ALARM
    )


def test_token_level_draws_with_solved_exponents_follow_their_distribution():
    policy, teacher = random_pair(11, length=2, scale=1.0)
    token = token_level(policy, teacher)
    drawn = sample_token_level(
        TablePair(policy, teacher, 20_000),
        2,
        num_particles=20_000,
        generator=np.random.default_rng(1),
    )
    cells = drawn.tokens @ [3, 1]
    assert p_value(cells, np.exp(flat(token.distribution))) > FALSE_ALARM
    assert p_value(cells, np.exp(flat(policy))) < FALSE_ALARM
    np.testing.assert_allclose(drawn.log_policy, policy.log_density(drawn.tokens), atol=1e-12)
    np.testing.assert_allclose(drawn.log_teacher, teacher.log_density(drawn.tokens), atol=1e-12)


def test_a_chain_run_as_a_chain_or_as_tables_gives_the_same_particles(chain, perron):
    parameters = CASES["seq_markov_T3"]["parameters"]
    first = [logs(parameters[f"init_{p}"]) for p in ("theta", "t")]
    options = {"alpha": 0.4, "num_particles": 50, "resample_below": 1.0}
    ours, tables = (
        smc(pair, 3, generator=np.random.default_rng(4), **options)
        for pair in (ChainPair(*first, perron, 50), TablePair(*chain, 50))
    )
    assert any(ours.resampled)
    np.testing.assert_array_equal(ours.tokens, tables.tokens)
    np.testing.assert_allclose(ours.log_weights, tables.log_weights, atol=1e-12)
    assert ours.log_partition == pytest.approx(tables.log_partition, abs=1e-12)


@pytest.fixture(scope="module")
def rejected():
    policy, teacher = garden_path(2.0)
    generator = np.random.default_rng(9)
    draws = sample_geometric_mean(policy, teacher, 0.5, 20_000, generator=generator)
    return policy, teacher, draws


def test_rejection_of_whole_sequences_draws_the_sequence_level_distribution(rejected):
    policy, teacher, draws = rejected
    sequence = sequence_level(policy, teacher, 0.5)
    cells = draws.points @ [2, 1]
    assert p_value(cells, np.exp(flat(sequence.distribution))) > FALSE_ALARM
    share = math.exp(sequence.log_partition)
    low, high = binom.interval(1 - FALSE_ALARM, draws.num_proposals, share)
    assert low <= draws.num_accepted <= high


def test_accepting_without_the_test_or_token_by_token_is_caught(rejected):
    """The controls: the proposal itself, and the token-level distribution."""
    policy, teacher, draws = rejected
    distribution = np.exp(flat(sequence_level(policy, teacher, 0.5).distribution))
    generator = np.random.default_rng(10)
    halves = [parent.sample(10_000, generator=generator) for parent in (policy, teacher)]
    assert p_value(np.concatenate(halves) @ [2, 1], distribution) < FALSE_ALARM
    low, _ = binom.interval(
        1 - FALSE_ALARM,
        draws.num_proposals,
        1.1 * math.exp(sequence_level(policy, teacher, 0.5).log_partition),
    )
    assert draws.num_accepted < low


def test_at_alpha_star_the_share_that_is_kept_is_exp_minus_c(chain):
    sequence = sequence_level(*chain)
    draws = sample_geometric_mean(
        *chain, sequence.alpha, 20_000, generator=np.random.default_rng(3)
    )
    share = math.exp(-float(sequence.balance.chernoff))
    low, high = binom.interval(1 - FALSE_ALARM, draws.num_proposals, share)
    assert low <= draws.num_accepted <= high


# --- What can be wrong ---------------------------------------------------------------------------


def test_mistakes_are_named():
    policy, teacher = random_pair(0)
    with pytest.raises(ValueError, match=r"expected shape \(3, 3\) at t = 1, got \(3,\)"):
        SequenceDistribution((policy.log_next[0], policy.log_next[0]))
    with pytest.raises(ValueError, match="at least one token"):
        SequenceDistribution(())
    with pytest.raises(ValueError, match="sums to 3"):
        SequenceDistribution((np.zeros(3),))
    with pytest.raises(ValueError, match="square transition matrix"):
        markov_chain(logs([0.5, 0.5]), logs([[1.0]]), 3)
    with pytest.raises(ValueError, match="distributions of the same sequences"):
        token_level(policy, random_pair(0, length=2)[0])
    with pytest.raises(ValueError, match="its probabilities sum to 2"):
        from_joint(logs([1.0, 1.0]))
    with pytest.raises(ValueError, match="an irreducible matrix"), np.errstate(divide="ignore"):
        PerronPair(logs([[1.0, 0.0], [0.5, 0.5]]), logs([[0.5, 0.5], [0.5, 0.5]]))
    with pytest.raises(ValueError, match="must be square"):
        PerronPair(logs([[1.0]] * 2), logs([[1.0]] * 2))
    generator = np.random.default_rng(0)
    pair = TablePair(policy, teacher, 4)
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\]: got 2"):
        smc(pair, 3, alpha=2, num_particles=4, generator=generator)
    with pytest.raises(ValueError, match="the pair holds 4 particles, not 5"):
        smc(pair, 3, alpha=0.5, num_particles=5, generator=generator)
    with pytest.raises(ValueError, match=r"got 0, 4 and 0\.5"):
        smc(pair, 0, alpha=0.5, num_particles=4, generator=generator)


def test_a_distribution_draws_what_its_density_says():
    distribution, other = random_pair(2, scale=0.7)
    drawn = distribution.sample(20_000, generator=np.random.default_rng(0)) @ [9, 3, 1]
    assert p_value(drawn, np.exp(flat(distribution))) > FALSE_ALARM
    assert p_value(drawn, np.exp(flat(other))) < FALSE_ALARM
    everything = np.array(list(itertools.product(range(3), repeat=3)))
    np.testing.assert_allclose(distribution.log_density(everything), flat(distribution), atol=1e-14)
