"""Each rule's output follows the target exactly: by enumerating the code first, then by sampling.

Every sampling test has a false-alarm probability of `sampling.FALSE_ALARM`; all of them together
stay below 1e-7. What they would miss is stated in `test_the_sampling_tests_see_small_errors`.
"""

import itertools
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from sampling import FALSE_ALARM, p_value, smallest_detectable_tv
from scipy.special import log_softmax
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from qstar import (
    acceptance_probability,
    log_geometric_mean,
    log_partition,
    solve_kl_symmetry,
    total_variation,
)
from qstar.sampling import picks, rules
from qstar.sampling.chance import NO_TOKEN, Coins, chance_of
from qstar.sampling.enumeration import (
    block_distribution,
    every_outcome,
    joint_distribution,
    pick_distribution,
    token_distribution,
)
from qstar.theory.acceptance import source_loop_distribution, tokens_per_round

EXACT = 1e-12
ROWS = 300_000
VOCAB = 6
GAMMA = 2

with np.errstate(divide="ignore"):
    PAIRS = {  # name -> (draft, target)
        "the source's three tokens": np.log([[0.7, 0.2, 0.1], [0.4396, 0.2916, 0.2688]]),
        "flat": log_softmax(np.random.default_rng(1).normal(size=(2, 4)), axis=-1),
        "sharp": log_softmax(8 * np.random.default_rng(2).normal(size=(2, 4)), axis=-1),
        "sharper still": log_softmax(50 * np.random.default_rng(3).normal(size=(2, 4)), axis=-1),
        "equal": np.log([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]),
        "a draft that lacks an outcome": np.log([[0.6, 0.4, 0, 0], [0.4, 0.3, 0.2, 0.1]]),
        "a draft that has one too many": np.log([[0.4, 0.3, 0.2, 0.1], [0.5, 0.5, 0, 0]]),
        "partly disjoint": np.log([[0.6, 0.4, 0.0], [0.0, 0.7, 0.3]]),
        "disjoint": np.log([[0.6, 0.4, 0, 0], [0, 0, 0.7, 0.3]]),
        "a looked-up draft": np.log([[0, 1.0, 0], [0.5, 0.3, 0.2]]),
        "two certainties": np.log([[0, 1.0, 0], [0, 1.0, 0]]),
    }


def distance(distribution, other):
    return 0.5 * np.abs(distribution - other).sum()


# One position: the distribution of every rule, from the code that samples.


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("num_candidates", [0, 1, 2, 3])
@pytest.mark.parametrize("name", PAIRS)
def test_accept_or_redraw_emits_the_target(name, num_candidates, replacement):
    log_draft, log_target = PAIRS[name]
    rule = partial(picks.accept_or_redraw, replacement=replacement)
    distribution, _ = pick_distribution(
        rule, picks.draw_candidates, log_draft, log_target, num_candidates, replacement=replacement
    )
    np.testing.assert_allclose(distribution, np.exp(log_target), rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", PAIRS)
def test_one_candidate_is_accepted_with_one_minus_the_total_variation(name):
    log_draft, log_target = PAIRS[name]
    _, accepted = pick_distribution(
        picks.accept_or_redraw, picks.draw_candidates, log_draft, log_target, 1, replacement=True
    )
    assert abs(accepted - acceptance_probability(log_draft, log_target)) < EXACT
    assert abs(accepted - (1 - total_variation(log_draft, log_target))) < EXACT


def test_candidates_without_replacement_are_accepted_more_often():
    """The values of the source's three-token example, by two independent derivations."""
    log_draft, log_target = PAIRS["the source's three tokens"]
    accepted = {}
    for replacement in (True, False):
        rule = partial(picks.accept_or_redraw, replacement=replacement)
        _, accepted[replacement] = pick_distribution(
            rule, picks.draw_candidates, log_draft, log_target, 2, replacement=replacement
        )
    draft, target = np.exp(log_draft), np.exp(log_target)
    first = np.minimum(draft, target).sum()
    residual = np.maximum(target - draft, 0) / (1 - first)
    second = np.minimum(draft, residual).sum()
    assert abs(accepted[True] - (1 - (1 - first) * (1 - second))) < EXACT
    # Without replacement a rejected first candidate is the over-drafted token, here the first one.
    assert draft[0] > target[0]
    assert (draft[1:] < target[1:]).all()
    left = np.array([0, draft[1], draft[2]]) / (1 - draft[0])
    second = np.minimum(left, residual).sum()
    assert abs(accepted[False] - (1 - (1 - first) * (1 - second))) < EXACT
    assert accepted[False] > accepted[True] + 0.09


@pytest.mark.parametrize("num_candidates", [0, 1, 2, 3])
@pytest.mark.parametrize("name", PAIRS)
def test_von_neumann_with_a_last_resort_emits_the_target(name, num_candidates):
    log_draft, log_target = PAIRS[name]
    distribution, accepted = pick_distribution(
        picks.von_neumann,
        picks.draw_candidates,
        log_draft,
        log_target,
        num_candidates,
        replacement=True,
    )
    np.testing.assert_allclose(distribution, np.exp(log_target), rtol=0, atol=EXACT)
    with np.errstate(divide="ignore", invalid="ignore"):
        bound = np.nanmax(np.exp(log_target) / np.exp(log_draft))
    assert abs(accepted - (1 - (1 - 1 / bound) ** num_candidates)) < EXACT


@pytest.mark.parametrize("num_candidates", [1, 2, 3, 4])
@pytest.mark.parametrize("name", [name for name in PAIRS if name != "disjoint"])
def test_the_source_loop_has_the_derived_biased_distribution(name, num_candidates):
    log_draft, log_target = PAIRS[name]
    distribution, _ = pick_distribution(
        picks.source_loop,
        picks.draw_candidates,
        log_draft,
        log_target,
        num_candidates,
        replacement=True,
    )
    expected = source_loop_distribution(log_draft, log_target, num_candidates)
    np.testing.assert_allclose(distribution, expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("num_candidates", [1, 2, 3])
def test_the_source_loop_without_replacement_has_the_distribution_of_ordered_subsets(
    num_candidates,
):
    """Independent of the code: a sum over ordered subsets, each drawn without replacement."""
    log_draft, log_target = PAIRS["the source's three tokens"]
    draft, target = np.exp(log_draft), np.exp(log_target)
    keep = np.minimum(1, target / draft)
    expected = np.zeros(3)
    for subset in itertools.permutations(range(3), num_candidates):
        mass, left = 1.0, 1.0
        for token in subset:
            mass, left = mass * draft[token] / left, left - draft[token]
        for token in subset:
            expected[token] += mass * keep[token]
            mass *= 1 - keep[token]
        expected += mass * target
    distribution, _ = pick_distribution(
        picks.source_loop,
        picks.draw_candidates,
        log_draft,
        log_target,
        num_candidates,
        replacement=False,
    )
    np.testing.assert_allclose(distribution, expected, rtol=0, atol=EXACT)
    assert distance(distribution, target) > 0.08


@pytest.mark.parametrize("num_candidates", [1, 2, 3])
def test_candidates_without_replacement_have_the_distribution_of_ordered_subsets(num_candidates):
    draft = np.array([0.5, 0.3, 0.2, 0.0])
    with np.errstate(divide="ignore"):
        log_draft = torch.tensor(np.log(draft))
    seen = {}
    for tokens, weight in every_outcome(
        lambda chance: picks.draw_candidates(
            log_draft, num_candidates, replacement=False, generator=chance
        )
    ):
        key = tuple(tokens.tolist())
        seen[key] = seen.get(key, 0.0) + float(weight)
    for subset, mass in seen.items():
        expected, left = 1.0, 1.0
        for position, token in enumerate(subset):
            repeated = token in subset[:position]
            expected *= 0.0 if repeated or token == NO_TOKEN else draft[token] / left
            left -= 0.0 if repeated else draft[token]
        assert abs(mass - expected) < EXACT
    assert abs(sum(seen.values()) - 1) < EXACT


@pytest.mark.parametrize("alpha", ["solved", 0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "name", ["flat", "sharp", "equal", "partly disjoint", "a draft that lacks an outcome"]
)
def test_the_envelope_keeps_tokens_of_the_geometric_mean(name, alpha):
    """Kept with probability Z(alpha), which at alpha* is exp(-C); no M and no Z went in."""
    log_policy, log_teacher = PAIRS[name]
    balance = solve_kl_symmetry(log_policy, log_teacher)
    alpha = float(balance.alpha) if alpha == "solved" else alpha
    distribution = token_distribution(
        lambda chance: (
            picks.envelope(
                torch.tensor(log_policy),
                torch.tensor(log_teacher),
                torch.tensor(alpha, dtype=torch.float64),
                generator=chance,
            ).token
        ),
        len(log_policy),
    )
    log_target = log_geometric_mean(log_policy, log_teacher, alpha)
    kept = np.exp(log_partition(log_policy, log_teacher, alpha))
    np.testing.assert_allclose(distribution, kept * np.exp(log_target), rtol=0, atol=EXACT)
    if alpha == float(balance.alpha):
        assert abs(distribution.sum() - np.exp(-balance.chernoff)) < EXACT


def test_the_envelope_is_exact_for_whole_sequences():
    """It then samples the sequence-level geometric mean, which is not the token-level one."""
    rng = np.random.default_rng(4)
    policy, teacher = (
        [log_softmax(1.5 * rng.normal(size=(3,) * (i + 1)), axis=-1) for i in range(2)]
        for _ in range(2)
    )
    log_policy, log_teacher = (
        torch.tensor(np.log(joint_distribution(p))) for p in (policy, teacher)
    )
    alpha = torch.tensor(0.3, dtype=torch.float64)
    log_mixture = torch.logaddexp(alpha.log() + log_policy, (1 - alpha).log() + log_teacher)
    kept = (
        (log_mixture + picks.log_envelope_acceptance(log_policy, log_teacher, alpha)).exp().numpy()
    )
    joint = log_policy.numpy().ravel(), log_teacher.numpy().ravel()
    sequence = np.exp(log_geometric_mean(*joint, 0.3))
    token = joint_distribution(
        [log_geometric_mean(p, t, 0.3) for p, t in zip(policy, teacher, strict=True)]
    )
    np.testing.assert_allclose(kept.ravel() / kept.sum(), sequence, rtol=0, atol=EXACT)
    assert distance(token.ravel(), sequence) > 1e-2


# A round: the joint distribution of the block.


@dataclass(frozen=True)
class Tree:
    """Conditional log-probabilities that depend on every earlier token."""

    policy: list
    teacher: list
    target: list


def random_tree(seed, *, vocab=3, gamma=2, alpha=None, scale=1.5, holes=False):
    rng = np.random.default_rng(seed)

    def conditionals():
        logits = [scale * rng.normal(size=(vocab,) * (i + 1)) for i in range(gamma + 1)]
        if holes:  # a top-k of each row: supports differ, and always meet in one outcome
            for row in logits:
                row[..., 0] += 50
                row[row < np.sort(row, axis=-1)[..., [-2]]] = -np.inf
                row[..., 0] -= 50
        return [log_softmax(row, axis=-1) for row in logits]

    policy, teacher = conditionals(), conditionals()
    target = [
        log_geometric_mean(p, t, solve_kl_symmetry(p, t).alpha if alpha is None else alpha)
        for p, t in zip(policy, teacher, strict=True)
    ]
    return Tree(policy, teacher, target)


@pytest.mark.parametrize("rule", [rules.verify, rules.verify_block])
@pytest.mark.parametrize("drafter", ["policy", "teacher"])
@pytest.mark.parametrize("alpha", [None, 0.3])
@pytest.mark.parametrize(("vocab", "gamma"), [(4, 0), (5, 1), (4, 2), (3, 3), (2, 4)])
def test_a_round_emits_the_joint_distribution_of_the_target(rule, drafter, alpha, vocab, gamma):
    tree = random_tree(gamma, vocab=vocab, gamma=gamma, alpha=alpha)
    distribution, accepted, tested = block_distribution(
        rule, getattr(tree, drafter)[:gamma], tree.target
    )
    np.testing.assert_allclose(distribution, joint_distribution(tree.target), rtol=0, atol=EXACT)
    assert abs(accepted.sum() - 1) < EXACT
    assert accepted @ np.arange(gamma + 1) <= tested + EXACT


@pytest.mark.parametrize("rule", [rules.verify, rules.verify_block])
@pytest.mark.parametrize("seed", range(10))
def test_a_round_respects_supports(rule, seed):
    tree = random_tree(seed, vocab=4, gamma=2, holes=True)
    distribution, *_ = block_distribution(rule, tree.policy[:2], tree.target)
    expected = joint_distribution(tree.target)
    assert (expected == 0).any()
    assert distribution[expected == 0].sum() == 0
    np.testing.assert_allclose(distribution, expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("rule", [rules.verify, rules.verify_block])
@pytest.mark.parametrize("drafted", [0, 1, 2, 3])
def test_rows_may_draft_less_than_gamma(rule, drafted):
    tree = random_tree(7, vocab=3, gamma=3)
    distribution, accepted, tested = block_distribution(
        rule, tree.policy[:3], tree.target, drafted=drafted
    )
    np.testing.assert_allclose(distribution, joint_distribution(tree.target), rtol=0, atol=EXACT)
    shorter = block_distribution(rule, tree.policy[:drafted], tree.target[: drafted + 1])
    np.testing.assert_allclose(accepted[: drafted + 1], shorter[1], rtol=0, atol=EXACT)
    assert accepted[drafted + 1 :].sum() == 0
    assert abs(tested - shorter[2]) < EXACT


@pytest.mark.parametrize("rule", [rules.verify, rules.verify_block])
def test_what_pads_a_shorter_draft_is_never_read(rule):
    tree = random_tree(7, vocab=4, gamma=3)
    log_draft, log_target = (
        torch.tensor(np.stack([row.reshape(-1, 4)[0] for row in distributions])).repeat(200, 1, 1)
        for distributions in (tree.policy[:3], tree.target)
    )
    tokens = rules.draw(log_draft, generator=torch.Generator().manual_seed(0))
    drafted = torch.arange(200) % 4
    padding = torch.arange(3) >= drafted[:, None]
    beyond = torch.arange(4) > drafted[:, None]
    plain, padded = (
        rule(*distributions, drafted=drafted, generator=torch.Generator().manual_seed(1))
        for distributions in (
            (tokens, log_draft, log_target),
            (
                tokens.masked_fill(padding, NO_TOKEN),
                log_draft.masked_fill(padding[..., None], torch.nan),
                log_target.masked_fill(beyond[..., None], torch.nan),
            ),
        )
    )
    assert torch.equal(plain.tokens, padded.tokens)


@pytest.mark.parametrize("rule", [rules.verify, rules.verify_block])
def test_a_round_in_single_precision_is_exact_to_single_precision(rule):
    tree = random_tree(8, vocab=4, gamma=2)
    distribution, *_ = block_distribution(rule, tree.policy[:2], tree.target, dtype=torch.float32)
    np.testing.assert_allclose(distribution, joint_distribution(tree.target), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", [rules.verify, rules.verify_block])
def test_a_draft_equal_to_the_target_is_kept_whole(rule):
    tree = random_tree(9, vocab=3, gamma=3)
    distribution, accepted, tested = block_distribution(rule, tree.policy[:3], tree.policy)
    np.testing.assert_allclose(distribution, joint_distribution(tree.policy), rtol=0, atol=EXACT)
    np.testing.assert_allclose(accepted, [0, 0, 0, 1], rtol=0, atol=EXACT)
    assert abs(tested - 3) < EXACT


@pytest.mark.parametrize("seed", range(20))
def test_a_block_accepts_at_least_as_many_as_its_tokens_one_by_one(seed):
    tree = random_tree(seed, vocab=3, gamma=3)
    by_token, by_block = (
        block_distribution(rule, tree.policy[:3], tree.target)[1]
        for rule in (rules.verify, rules.verify_block)
    )
    more = (np.cumsum(by_token) - np.cumsum(by_block))[:-1]  # P(at least i), for every i
    assert (more >= -EXACT).all()
    assert more.sum() > 1e-4, "no gain at all: the example would not tell the two rules apart"


def test_one_draft_token_is_verified_the_same_by_both_rules():
    tree = random_tree(3, vocab=4, gamma=1)
    by_token, by_block = (
        block_distribution(rule, tree.policy[:1], tree.target)[1]
        for rule in (rules.verify, rules.verify_block)
    )
    np.testing.assert_allclose(by_token, by_block, rtol=0, atol=EXACT)


def test_block_verification_reproduces_its_paper_s_example():
    """Two coins, two drafts: 10/9 accepted tokens one by one, 11/9 as a block (Sun et al.)."""
    draft, target = np.log([2 / 3, 1 / 3]), np.log([1 / 3, 2 / 3])
    distributions = [
        [np.broadcast_to(row, (2,) * (i + 1)) for i in range(3)] for row in (draft, target)
    ]
    means = [
        block_distribution(rule, distributions[0][:2], distributions[1])[1] @ np.arange(3)
        for rule in (rules.verify, rules.verify_block)
    ]
    np.testing.assert_allclose(means, [10 / 9, 11 / 9], rtol=0, atol=EXACT)


@pytest.mark.parametrize("gamma", [1, 2, 4])
def test_accepted_over_tested_is_the_acceptance_probability_and_over_drafted_is_not(gamma):
    draft, target = np.log([0.6, 0.4]), np.log([0.3, 0.7])
    probability = float(acceptance_probability(draft, target))
    distributions = [
        [np.broadcast_to(row, (2,) * (i + 1)) for i in range(gamma + 1)] for row in (draft, target)
    ]
    _, accepted, tested = block_distribution(
        rules.verify, distributions[0][:gamma], distributions[1]
    )
    mean_accepted = accepted @ np.arange(gamma + 1)
    assert abs(mean_accepted / tested - probability) < EXACT
    assert abs(1 + mean_accepted - tokens_per_round(probability, gamma)) < EXACT
    if gamma > 1:
        assert mean_accepted / gamma < probability - 0.05  # drafts that were never tested


# Sampling: the same rules with real randomness.


def sample_blocks(rule, draft, target, *, seed, rows=ROWS, drafted=None):
    """One round per row from the given conditionals, completed by the target: block numbers."""
    generator = torch.Generator().manual_seed(seed)
    vocab, gamma = len(target[0]), len(draft)
    flat = {
        name: [torch.tensor(distribution).reshape(-1, vocab) for distribution in distributions]
        for name, distributions in (("draft", draft), ("target", target))
    }
    prefix = torch.zeros(rows, dtype=torch.int64)
    tokens, log_draft, log_target = [], [], []
    for position in range(gamma):
        log_draft.append(flat["draft"][position][prefix])
        log_target.append(flat["target"][position][prefix])
        tokens.append(rules.draw(log_draft[-1], generator=generator))
        prefix = prefix * vocab + tokens[-1]
    log_target.append(flat["target"][gamma][prefix])
    round_ = rule(
        torch.stack(tokens, -1),
        torch.stack(log_draft, -2),
        torch.stack(log_target, -2),
        generator=generator,
        drafted=drafted,
    )
    block = torch.zeros(rows, dtype=torch.int64)
    for position in range(gamma + 1):
        fresh = rules.draw(flat["target"][position][block], generator=generator)
        emitted = round_.tokens[:, position]
        block = block * vocab + torch.where(position <= round_.accepted, emitted, fresh)
    return block, round_


@pytest.mark.parametrize("rule", [rules.verify, rules.verify_block])
@pytest.mark.parametrize("drafter", ["policy", "teacher"])
@pytest.mark.parametrize("alpha", [None, 0.3])
def test_sampled_blocks_follow_the_target(rule, drafter, alpha):
    tree = random_tree(11, vocab=VOCAB, gamma=GAMMA, alpha=alpha, scale=1.0)
    blocks, _ = sample_blocks(rule, getattr(tree, drafter)[:GAMMA], tree.target, seed=0)
    assert p_value(blocks, joint_distribution(tree.target)) > FALSE_ALARM


@pytest.mark.parametrize("rule", [rules.verify, rules.verify_block])
def test_sampled_blocks_of_ragged_drafts_follow_the_target(rule):
    tree = random_tree(12, vocab=VOCAB, gamma=GAMMA, scale=1.0)
    drafted = torch.arange(ROWS) % (GAMMA + 1)
    blocks, round_ = sample_blocks(rule, tree.policy[:GAMMA], tree.target, seed=1, drafted=drafted)
    assert (round_.accepted <= drafted).all()
    for count in range(GAMMA + 1):
        assert p_value(blocks[drafted == count], joint_distribution(tree.target)) > FALSE_ALARM


def test_sampled_acceptance_rate_estimates_the_acceptance_probability():
    draft, target = np.log([0.6, 0.4]), np.log([0.3, 0.7])
    distributions = [
        [np.broadcast_to(row, (2,) * (i + 1)) for i in range(4)] for row in (draft, target)
    ]
    _, round_ = sample_blocks(rules.verify, distributions[0][:3], distributions[1], seed=2)
    tested = int(round_.tested.sum())
    rate = int(round_.accepted.sum()) / tested
    probability = float(acceptance_probability(draft, target))
    # 6.2 standard errors: false alarm below 1e-9.
    assert abs(rate - probability) < 6.2 * np.sqrt(probability * (1 - probability) / tested)


def sampled_picks(rule, log_draft, log_target, num_candidates, *, replacement, seed):
    generator = torch.Generator().manual_seed(seed)
    draft, target = (
        torch.tensor(distribution).expand(ROWS, -1) for distribution in (log_draft, log_target)
    )
    candidates = picks.draw_candidates(
        draft, num_candidates, replacement=replacement, generator=generator
    )
    return rule(candidates, draft, target, generator=generator).token


SINGLE = {
    "one candidate": (picks.accept_or_redraw, 1, True),
    "three with replacement": (picks.accept_or_redraw, 3, True),
    "three without": (partial(picks.accept_or_redraw, replacement=False), 3, False),
    "von Neumann": (picks.von_neumann, 3, True),
}


@pytest.mark.parametrize("name", SINGLE)
def test_sampled_picks_follow_the_target(name):
    rule, num_candidates, replacement = SINGLE[name]
    log_draft, log_target = PAIRS["flat"]
    drawn = sampled_picks(
        rule, log_draft, log_target, num_candidates, replacement=replacement, seed=3
    )
    assert p_value(drawn, np.exp(log_target)) > FALSE_ALARM


def test_sampled_tries_of_the_envelope_follow_the_geometric_mean():
    log_policy, log_teacher = PAIRS["flat"]
    balance = solve_kl_symmetry(log_policy, log_teacher)
    pick = picks.envelope(
        torch.tensor(log_policy).expand(ROWS, -1),
        torch.tensor(log_teacher).expand(ROWS, -1),
        torch.full((ROWS,), float(balance.alpha), dtype=torch.float64),
        generator=torch.Generator().manual_seed(4),
    )
    distribution = np.exp(log_geometric_mean(log_policy, log_teacher, balance.alpha))
    assert p_value(pick.token[pick.accepted], distribution) > FALSE_ALARM
    kept = np.exp(-balance.chernoff)
    assert p_value(pick.accepted.long(), [1 - kept, kept]) > FALSE_ALARM


def test_the_sampling_tests_see_small_errors():
    """With certainty 1 - 1e-6: 0.017 in total variation of the joint, 0.011 at one position."""
    assert smallest_detectable_tv(ROWS, VOCAB ** (GAMMA + 1)) < 0.017
    assert smallest_detectable_tv(ROWS // (GAMMA + 1), VOCAB ** (GAMMA + 1)) < 0.029  # ragged
    assert smallest_detectable_tv(ROWS, 4) < 0.011


# Negative controls: the mistakes that public code makes, each seen by both kinds of test.


class KeepsAfterARejection:
    """A `Chance` under which a draft kept after a rejected one still counts."""

    def __init__(self, chance):
        self.chance = chance_of(chance)

    def keep(self, log_probability):
        kept = self.chance.keep(log_probability)
        return kept.sort(dim=-1, descending=True).values

    def draw(self, log_distribution):
        return self.chance.draw(log_distribution)


def top_two(distribution):
    return distribution.masked_fill(
        distribution < distribution.topk(2).values[..., -1:], -torch.inf
    ).log_softmax(-1)


def with_bonus_of(tree):
    """The verifier's distribution in the target's last row."""

    def rule(tokens, log_draft, log_target, **options):
        last = torch.tensor(tree.teacher[GAMMA])[tuple(tokens.unbind(-1))]
        log_target = torch.cat([log_target[..., :-1, :], last[..., None, :]], -2)
        return rules.verify(tokens, log_draft, log_target, **options)

    return rule


def judged_by(change):
    """A round that judges the draft by another distribution than the one that drew it."""

    def rule(tokens, log_draft, log_target, **options):
        return rules.verify(tokens, change(log_draft), log_target, **options)

    return rule


def keeping_after_a_rejection(tokens, log_draft, log_target, *, generator, **options):
    return rules.verify(
        tokens, log_draft, log_target, generator=KeepsAfterARejection(generator), **options
    )


def swapped(tree):
    """q formed from (drafter, verifier) where (policy, teacher) was meant."""
    return [log_geometric_mean(t, p, 0.3) for p, t in zip(tree.policy, tree.teacher, strict=True)]


def redraws_from_the_target(monkeypatch):
    monkeypatch.setattr(rules, "_log_excess", lambda log_draft, log_target: log_target)


def adds_an_epsilon(monkeypatch):
    def log_ratio(log_draft, log_target):
        return (log_target.exp() / (log_draft.exp() + 0.02)).clamp(max=1).log()

    for module in (rules, picks):
        monkeypatch.setattr(module, "log_acceptance", log_ratio)


CONTROLS = {  # name -> (what is patched, the rule given the tree)
    "redraws from the target instead of the residual": (redraws_from_the_target, None),
    "adds an epsilon in the ratio": (adds_an_epsilon, None),
    "the draft lies about its distribution": (
        None,
        lambda tree: judged_by(lambda distribution: distribution.flip(-1)),
    ),
    "the ratio's draft is tempered, the drawn one is not": (
        None,
        lambda tree: judged_by(lambda distribution: (0.7 * distribution).log_softmax(-1)),
    ),
    "one cached draft row stands for all": (
        None,
        lambda tree: judged_by(
            lambda distribution: distribution[..., :1, :].expand_as(distribution)
        ),
    ),
    "the bonus token is the verifier's": (None, with_bonus_of),
    "a rejected draft does not end the round": (None, lambda tree: keeping_after_a_rejection),
}


@pytest.fixture(params=CONTROLS)
def wrong_rule(request, monkeypatch):
    patch, make = CONTROLS[request.param]
    tree = random_tree(11, vocab=VOCAB, gamma=GAMMA, alpha=0.3, scale=1.0)
    if patch:
        patch(monkeypatch)
    return tree, make(tree) if make else rules.verify


def test_enumeration_finds_every_control_wrong(wrong_rule):
    tree, rule = wrong_rule
    distribution, *_ = block_distribution(rule, tree.policy[:GAMMA], tree.target)
    bias = distance(distribution, joint_distribution(tree.target))
    assert bias > smallest_detectable_tv(ROWS, VOCAB ** (GAMMA + 1))


def test_sampling_finds_every_control_wrong(wrong_rule):
    tree, rule = wrong_rule
    blocks, _ = sample_blocks(rule, tree.policy[:GAMMA], tree.target, seed=0)
    assert p_value(blocks, joint_distribution(tree.target)) < FALSE_ALARM


def test_roles_swapped_at_a_fixed_alpha_are_found():
    tree = random_tree(11, vocab=VOCAB, gamma=GAMMA, alpha=0.3, scale=1.0)
    blocks, _ = sample_blocks(rules.verify, tree.policy[:GAMMA], swapped(tree), seed=0)
    assert p_value(blocks, joint_distribution(tree.target)) < FALSE_ALARM


@pytest.mark.parametrize("replacement", [True, False])
def test_the_source_loop_is_found(replacement):
    log_draft, log_target = PAIRS["the source's three tokens"]
    drawn = sampled_picks(
        picks.source_loop, log_draft, log_target, 2, replacement=replacement, seed=5
    )
    assert p_value(drawn, np.exp(log_target)) < FALSE_ALARM


def test_a_draft_filtered_after_it_was_drawn_is_refused():
    """Judged by its own top two, a draft from the whole vocabulary shows tokens of no mass."""
    log_draft = torch.tensor(random_tree(11, vocab=VOCAB).policy[0]).expand(64, 1, VOCAB)
    log_target = torch.tensor(random_tree(12, vocab=VOCAB).policy[0]).expand(64, 2, VOCAB)
    generator = torch.Generator().manual_seed(0)
    tokens = rules.draw(log_draft, generator=generator)
    with pytest.raises(ValueError, match="has no mass under log_draft, so it was not drawn from"):
        rules.verify(tokens, top_two(log_draft), log_target, generator=generator)


# Chance, edges and errors.


def draw_in_order(coins, log_p):
    return coins.draw(log_p)


def draw_in_parallel(coins, log_p):
    return coins._draw_in_parallel(log_p.double().exp())  # as on an accelerator


DRAWS = (draw_in_order, draw_in_parallel)


@pytest.mark.parametrize("draw", DRAWS)
def test_a_draw_reaches_exactly_the_tokens_with_mass(draw, monkeypatch):
    with np.errstate(divide="ignore"):
        log_distribution = torch.tensor(np.log([0.0, 0.25, 0.0, 0.5, 0.25, 0.0]))
    ends = torch.tensor([0.0, 0.25 - 2**-54, 0.25, 0.5, 0.75, 1 - 2**-53], dtype=torch.float64)
    monkeypatch.setattr(Coins, "_uniform", lambda self, like, lots: ends)
    coins = Coins(torch.Generator())
    assert draw(coins, log_distribution.expand(6, -1)).tolist() == [1, 1, 3, 3, 4, 4]


@pytest.mark.parametrize("draw", DRAWS)
def test_from_a_row_without_mass_or_with_nan_there_is_no_token(draw):
    rows = torch.tensor([[-torch.inf] * 3, [0.0, torch.nan, -1.0], [0.0, -torch.inf, -torch.inf]])
    coins = Coins(torch.Generator().manual_seed(0))
    assert draw(coins, rows).tolist() == [NO_TOKEN, NO_TOKEN, 0]


def test_both_ways_to_draw_draw_the_same(monkeypatch):
    """In order, as on a CPU, and in parallel. Numbers off by a thousandth draw other tokens."""
    torch.manual_seed(0)
    logits = torch.randn(2000, 257) * torch.logspace(-1, 2, 2000)[:, None]
    logits[torch.rand(logits.shape) < 0.3] = -torch.inf
    log_p = logits.log_softmax(-1)
    uniform = torch.rand(2000, dtype=torch.float64)
    monkeypatch.setattr(Coins, "_uniform", lambda self, like, lots: uniform)
    coins = Coins(torch.Generator())
    drawn = draw_in_order(coins, log_p)
    assert torch.equal(drawn, draw_in_parallel(coins, log_p))
    assert bool((log_p.gather(-1, drawn[:, None]) > -torch.inf).all())
    shifted = torch.searchsorted(log_p.double().exp().cumsum(-1), uniform[:, None] + 1e-3)
    assert not torch.equal(drawn, shifted.squeeze(-1))


def test_rare_tokens_of_a_single_precision_row_are_reached(monkeypatch):
    log_distribution = torch.tensor(
        [0.0, -40.0], dtype=torch.float32
    )  # 4e-18: below any float32 uniform
    uniform = torch.tensor([1 - 2**-53], dtype=torch.float64)
    monkeypatch.setattr(Coins, "_uniform", lambda self, like, lots: uniform)
    coins = Coins(torch.Generator())
    assert coins.draw(log_distribution[None]).tolist() == [0]
    log_distribution = torch.tensor([0.0, -30.0], dtype=torch.float32)  # 9e-14
    assert coins.draw(log_distribution[None]).tolist() == [1]


def test_certainties_are_certain(monkeypatch):
    monkeypatch.setattr(
        Coins,
        "_uniform",
        lambda self, like, lots: torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64),
    )
    coins = Coins(torch.Generator())
    assert coins.keep(torch.zeros(2)).tolist() == [True, True]
    assert coins.keep(torch.full((2,), -torch.inf)).tolist() == [False, False]
    assert coins.keep(torch.full((2,), torch.nan)).tolist() == [False, False]


def test_a_draft_that_runs_out_of_outcomes_says_so():
    with np.errstate(divide="ignore"):
        log_draft = torch.tensor(np.log([[1.0, 0, 0], [0.5, 0.5, 0]]))
    candidates = picks.draw_candidates(
        log_draft, 3, replacement=False, generator=torch.Generator().manual_seed(0)
    )
    assert candidates[0].tolist() == [0, NO_TOKEN, NO_TOKEN]
    assert sorted(candidates[1].tolist()) == [NO_TOKEN, 0, 1]
    careless = torch.multinomial(log_draft[0].exp(), 2)  # no error, and an impossible token
    assert log_draft[0][careless[1]] == -torch.inf


def test_a_rejection_in_one_row_changes_nothing_in_the_others():
    tree = random_tree(13, vocab=VOCAB, gamma=GAMMA)
    generator = torch.Generator().manual_seed(0)
    log_draft = torch.tensor(np.stack([row.reshape(-1, VOCAB)[0] for row in tree.policy[:GAMMA]]))
    log_target = torch.tensor(np.stack([row.reshape(-1, VOCAB)[0] for row in tree.target]))
    log_draft, log_target = log_draft.repeat(50, 1, 1), log_target.repeat(50, 1, 1)
    tokens = rules.draw(log_draft, generator=generator)
    never = log_target.clone()  # row 0 rejects everything
    never[0, :, :] = rules.log_point_mass((tokens[0, 0] + 1) % VOCAB, VOCAB, dtype=torch.float64)
    for rule in (rules.verify, rules.verify_block):
        plain, other = (
            rule(tokens, log_draft, distribution, generator=torch.Generator().manual_seed(1))
            for distribution in (log_target, never)
        )
        assert other.accepted[0] == 0
        assert torch.equal(plain.tokens[1:], other.tokens[1:])
        assert torch.equal(plain.accepted[1:], other.accepted[1:])


def test_the_tokens_of_a_round_line_up():
    tree = random_tree(14, vocab=VOCAB, gamma=GAMMA)
    generator = torch.Generator().manual_seed(0)
    log_draft, log_target = (
        torch.tensor(np.stack([row.reshape(-1, VOCAB)[0] for row in distributions])).repeat(
            5, 40, 1, 1
        )
        for distributions in (tree.policy[:GAMMA], tree.target)
    )
    tokens = rules.draw(log_draft, generator=generator)
    round_ = rules.verify(tokens, log_draft, log_target, generator=generator)
    assert round_.tokens.shape == (5, 40, GAMMA + 1)
    assert set(round_.accepted.unique().tolist()) == {0, 1, 2}
    for index in np.ndindex(5, 40):
        accepted = int(round_.accepted[index])
        row = round_.tokens[index].tolist()
        assert row[:accepted] == tokens[index][:accepted].tolist()
        assert row[accepted] == round_.next_token[index]
        assert row[accepted + 1 :] == [NO_TOKEN] * (GAMMA - accepted)
        assert round_.tested[index] == min(accepted + 1, GAMMA)


def test_a_seed_gives_the_same_round_again():
    tree = random_tree(15, vocab=VOCAB, gamma=GAMMA)
    first, again, other = (
        sample_blocks(rules.verify, tree.policy[:GAMMA], tree.target, seed=seed, rows=100)[0]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_looked_up_token_is_kept_with_the_target_s_own_probability():
    log_target = np.log([0.5, 0.3, 0.2])
    log_draft = rules.log_point_mass(torch.tensor([1]), 3, dtype=torch.float64)[0].numpy()
    _, accepted = pick_distribution(
        picks.accept_or_redraw, picks.draw_candidates, log_draft, log_target, 1, replacement=True
    )
    assert abs(accepted - 0.3) < EXACT


@pytest.mark.parametrize("rule", [rules.verify, rules.verify_block])
def test_a_round_runs_on_an_accelerator_without_waiting_for_it(rule):
    """Fake CUDA tensors raise on mixed devices and on every read by the host."""
    generator = torch.Generator().manual_seed(0)
    with FakeTensorMode():
        tokens = torch.zeros(3, 2, dtype=torch.int64, device="cuda")
        log_draft = torch.zeros(3, 2, 7, device="cuda").log_softmax(-1)
        log_target = torch.zeros(3, 3, 7, device="cuda").log_softmax(-1)
        drafted = torch.ones(3, dtype=torch.int64, device="cuda")
        round_ = rule(tokens, log_draft, log_target, drafted=drafted, generator=generator)
        assert {field.device.type for field in (round_.tokens, round_.accepted, round_.tested)} == {
            "cuda"
        }
        with pytest.raises(DataDependentOutputException):  # the control: a host read
            rule(tokens, log_draft, log_target, generator=generator, check=True)


def test_single_position_rules_run_on_an_accelerator_without_waiting_for_it():
    generator = torch.Generator().manual_seed(0)
    with FakeTensorMode():
        distribution = torch.zeros(3, 7, device="cuda").log_softmax(-1)
        for replacement in (True, False):
            candidates = picks.draw_candidates(
                distribution, 2, replacement=replacement, generator=generator
            )
            pick = picks.accept_or_redraw(
                candidates, distribution, distribution, replacement=replacement, generator=generator
            )
            assert pick.token.device.type == "cuda"
        assert picks.von_neumann(
            candidates, distribution, distribution, generator=generator
        ).token.is_cuda
        alpha = torch.full((3,), 0.5, device="cuda")
        assert picks.envelope(distribution, distribution, alpha, generator=generator).token.is_cuda


BAD = {
    "logits": (
        lambda d, t: (d + 1, t),
        r"log_draft must hold normalised log-probabilities: row \(0, 0\) sums to 2\.718",
    ),
    "nan": (lambda d, t: (d, t * torch.nan), r"log_target must hold .* sums to nan"),
    "half": (lambda d, t: (d.half(), t), r"needs log_draft in float32 or float64: got .*float16"),
    "no bonus row": (
        lambda d, t: (d, t[:, :-1]),
        r"expected log_draft \(3, 2, 5\) and log_target \(3, 3, 5\), got",
    ),
    "two vocabularies": (lambda d, t: (d[..., :4].log_softmax(-1), t), r"expected log_draft"),
}


@pytest.mark.parametrize("rule", [rules.verify, rules.verify_block])
@pytest.mark.parametrize("name", BAD)
def test_bad_distributions_are_refused(rule, name):
    spoil, message = BAD[name]
    log_draft, log_target = spoil(
        torch.zeros(3, 2, 5).log_softmax(-1), torch.zeros(3, 3, 5).log_softmax(-1)
    )
    tokens = torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        rule(tokens, log_draft, log_target, generator=torch.Generator())


def test_bad_drafts_are_refused():
    log_draft, log_target = (
        torch.zeros(3, 2, 5).log_softmax(-1),
        torch.zeros(3, 3, 5).log_softmax(-1),
    )
    tokens = torch.zeros(3, 2, dtype=torch.int64)
    verify = partial(rules.verify, generator=torch.Generator())
    with pytest.raises(ValueError, match=r"index into the vocabulary of 5: entry \(0, 0\) is 9"):
        verify(tokens + 9, log_draft, log_target)
    with pytest.raises(ValueError, match=r"drafted must lie between 0 and gamma = 2"):
        verify(tokens, log_draft, log_target, drafted=torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match=r"drafted counts .* expected shape \(3,\), got \(2,\)"):
        verify(tokens, log_draft, log_target, drafted=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"one row of the draft and one of the target per row"):
        picks.accept_or_redraw(tokens, log_draft, log_target[:, :2], generator=torch.Generator())
    with pytest.raises(ValueError, match=r"has no mass under log_draft"):
        picks.accept_or_redraw(
            torch.tensor([1]),
            rules.log_point_mass(torch.tensor(0), 5),
            torch.zeros(5).log_softmax(-1),
            generator=torch.Generator(),
        )
