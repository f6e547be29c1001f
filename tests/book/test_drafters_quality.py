"""Targets made of two models are what they are called; draft lengths do what they claim."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from qstar.decoding.enumeration import decoder_distributions, tiny_model, token_level_distribution
from qstar.decoding.generate import decode, generate
from qstar.decoding.options import check
from qstar.decoding.planner import Plan
from qstar.theory.acceptance import source_loop_distribution
from qstar_book.experiments import drafters, family, quality, targets, tasks
from qstar_book.records.corpus import data_file

PAIR = tiny_model(1), tiny_model(2)
READERS = tuple(targets.Reader(model, None, None) for model in PAIR)
PROMPTS = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([2, 1, 0, 1])


def rows_of(seed, *, rows=50, vocab=7):
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(2, rows, vocab, generator=generator, dtype=torch.float64) * 2
    return made.log_softmax(-1)


def by_rule(name):
    """`generate`, with another target in place of q_alpha."""

    def run(*given, **options):
        setup = check(*given, **options)
        return decode(replace(setup, rule=targets.TARGETS[name]))[0]

    return run


def next_by_next(name):
    """The target of two tokens, by forwards over whole texts."""
    joint = np.zeros((3, 3))
    texts = list(np.ndindex(3, 3))
    prompts = tuple([p] * 9 for p in PROMPTS)
    seen = targets.read(READERS, prompts, [list(t) for t in texts], targets=[name])
    for text, reading in zip(texts, seen, strict=True):
        joint[text] = math.exp(reading[name].sum())
    return joint


def test_what_is_read_of_all_texts_is_the_token_level_target():
    for name, alpha in (("q*", None), ("half", 0.5), ("policy", 1.0), ("guided policy", 1.5)):
        expected = token_level_distribution(*PAIR, *PROMPTS, length=2, alpha=alpha)
        assert np.abs(next_by_next(name) - expected).max() < 1e-12, name


@pytest.mark.parametrize("options", [{"scheme": "plain"}, {"scheme": "alternating", "gamma": 2}])
def test_the_decoder_draws_from_the_mixture_where_that_is_the_rule(options):
    found, _ = decoder_distributions(PAIR, [PROMPTS], 2, run=by_rule("mixture"), **options)
    policy, teacher = (
        token_level_distribution(*PAIR, *PROMPTS, length=1, alpha=alpha) for alpha in (1.0, 0.0)
    )
    assert np.abs(found[0] - next_by_next("mixture")).max() < 1e-12
    assert np.abs(found[0].sum(1) - (policy + teacher) / 2).max() < 1e-12
    assert np.abs(found[0] - next_by_next("q*")).max() > 1e-3  # the control


def test_the_source_loop_is_drawn_as_its_closed_form_says():
    log_policy, log_teacher = rows_of(0)
    loop, _ = targets.TARGETS["source loop"].mix(log_policy, log_teacher)
    log_q, _ = targets.TARGETS["q*"].mix(log_policy, log_teacher)
    expected = source_loop_distribution(log_policy.numpy(), log_q.numpy(), targets.CANDIDATES)
    assert np.abs(loop.exp().numpy() - expected).max() < 1e-12
    assert np.abs(log_q.exp().numpy() - expected).max() > 1e-2
    same, _ = targets.TARGETS["source loop"].mix(log_policy, log_policy)
    assert np.abs((same - log_policy).numpy()).max() < 1e-12
    found, _ = decoder_distributions(PAIR, [PROMPTS], 2, run=by_rule("source loop"), scheme="plain")
    assert np.abs(found[0] - next_by_next("source loop")).max() < 1e-12


def test_draft_lengths_chosen_from_outside_leave_the_target_alone():
    third = tiny_model(3)

    def choose(evidence, steps):
        last = steps[-1].emitted[0][-1] if steps else 0
        return Plan("draft-model", 1 + (last + len(steps)) % 2, "policy")

    def run(*given, **options):
        return decode(check(*given, **options), choose=choose)[0]

    options = {"scheme": "draft-model", "draft_model": third}
    found, _ = decoder_distributions(PAIR, [PROMPTS], 3, run=run, **options)
    assert np.abs(found[0] - token_level_distribution(*PAIR, *PROMPTS, length=3)).max() < 1e-12
    exchanged = token_level_distribution(*PAIR, *PROMPTS[::-1], length=3)
    assert np.abs(found[0] - exchanged).max() > 1e-3


def test_a_replayed_draft_is_kept_as_often_as_a_live_one():
    """False alarm below 1e-9: six standard errors, on a seed that is fixed."""
    draft, rows = tiny_model(3), 2_000
    begin = torch.tensor([0])
    made = generate(
        *PAIR,
        [begin] * rows,
        scheme="draft-model",
        draft_model=draft,
        gamma=2,
        max_new_tokens=3,
        generator=0,
    )
    live = made.trace.accepted[:, :2].all(-1).double()
    seen = drafters.acceptances(READERS, {"third": draft}, made.tokens.tolist())
    replayed = np.array([trace["kept third"][:2].prod() for trace in seen])
    gap = live.mean() - replayed.mean()
    error = math.sqrt((live.var() + replayed.var()) / rows)
    assert abs(gap) < 6 * error
    back = np.array([(trace["third"][:2] ** 2).prod() for trace in seen])
    assert abs(live.mean() - back.mean()) > 6 * error  # one that keeps too few is found out


def test_a_replay_counts_rounds_and_drafts():
    trace = {"kept x": np.array([1.0, 1, 0, 1, 1, 1]), "chernoff": np.zeros(6)}
    costs = drafters.stated(0.1)
    luck = np.full(6, 0.5)
    spent, rounds, drafts = drafters.replay(trace, "x", drafters.RULES["fixed 2"], costs, luck)
    assert (rounds, drafts) == (2, 4)  # two kept and one on top, twice: all on top of a kept pair
    assert spent == pytest.approx(4 * 0.1 + 2 * 2)
    _, rounds, drafts = drafters.replay(trace, "x", drafters.RULES["fixed 4"], costs, luck)
    assert (rounds, drafts) == (2, 8)  # two kept, the third rejected and replaced; then three kept


def test_no_rule_is_cheaper_than_the_oracle_of_one_round_on_certain_drafts():
    generator = np.random.default_rng(0)
    traces = [
        {"kept x": generator.integers(2, size=30).astype(float), "chernoff": np.full(30, 0.1)}
        for _ in range(20)
    ]
    found = drafters.compare_lengths(traces, "x", drafters.stated(0.3), replays=1, seed=0)
    means = {rule: np.mean(spent) for rule, spent in found.items()}
    assert min(means, key=means.get) == "oracle", means


def test_the_two_sample_test_keeps_its_level_and_finds_other_texts():
    generator = np.random.default_rng(0)
    p = [
        quality.two_sample(
            *generator.integers(5, size=(2, 3, 20)), permutations=99, generator=generator
        )
        for _ in range(200)
    ]
    assert np.mean(np.array(p) <= 0.1) < 0.1 + 6 * math.sqrt(0.1 * 0.9 / 200)
    first, second = quality.codes([[[1]] * 20, [[2]] * 20], [[[3]] * 20, [[2]] * 20])
    told = {"permutations": 99, "generator": generator}
    assert quality.two_sample(first, first, **told) == 1
    assert quality.two_sample(first, second, **told) == 0.01
    assert quality.power(first, second, 1.0, level=0.01, rounds=5, **told) == 1
    assert quality.power(first, first, 1.0, level=0.01, rounds=5, **told) == 0


def test_each_two_sample_test_has_a_plain_sample_of_its_own(monkeypatch):
    """Two that shared one would be small together."""
    drawn = []

    def draw(pair, prompts, target, *, seed, scheme="plain", **options):
        drawn.append((target, scheme, seed))
        return [[seed % 7]] * len(prompts[0])

    nothing = {"q*": np.zeros(1), "source loop": np.zeros(1)}
    monkeypatch.setattr(targets, "draw", draw)
    monkeypatch.setattr(
        targets, "read", lambda pair, prompts, texts, targets: [nothing] * len(texts)
    )
    reader = targets.Reader(None, lambda item: torch.tensor([1]), None, str)
    small = quality.Quality({}).quick()
    items = tasks.items(None, 8, 0)[:2]
    found = quality.compare_samplers((reader, reader), None, items, small)
    others = [way for way in quality.SPECULATIVE if "draft" not in way]
    assert list(found["ways"]) == others
    assert len({seed for *_, seed in drawn}) == len(drawn) == 2 * (len(others) + 1)
    assert [target for target, *_ in drawn].count("source loop") == 1
    assert drawn[::2] == [("q*", "plain", seed) for *_, seed in drawn[::2]]


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_wrong_choices_are_wrong_and_of_the_same_form(kind):
    for item in tasks.items(kind, 20):
        right, *wrong = quality.choices(item)
        assert item.correct(right)
        assert 2 <= len(wrong) <= 3
        assert len({right, *wrong}) == len(wrong) + 1
        assert not any(map(item.correct, wrong))
        assert all(len(x) >= len(right) - 1 for x in wrong)


def test_a_draft_model_comes_nearer_to_q_star_by_each_objective():
    pair = tuple(targets.Reader(family.new_model("300k", seed=seed), None, None) for seed in (1, 2))
    texts = drafters.documents(pair, 8, seed=0, max_new_tokens=12)
    learned = drafters.lessons(pair, texts)
    start = family.new_model("300k", seed=0)
    told = {"steps": 25, "batch": 8, "seed": 0}
    before = drafters.acceptances(pair, {"start": start}, texts)
    for objective in ("kl", "tv"):
        model, losses = drafters.train_drafter(start, learned, objective, **told)
        assert losses[-1] < losses[0]
        after = drafters.acceptances(pair, {"x": model}, texts)
        gain = [np.mean(b["x"]) - np.mean(a["start"]) for a, b in zip(before, after, strict=True)]
        assert np.mean(gain) > 0, objective
    _, again = drafters.train_drafter(start, learned, "tv", **told)
    assert again == losses
    with pytest.raises(ValueError, match="objective must be one of"):
        drafters.train_drafter(start, learned, "js", **told)


def test_losses_are_what_they_are_called():
    log_target, log_draft = rows_of(3)
    drawn = torch.zeros(50, dtype=torch.long)
    kl = (log_target.exp() * (log_target - log_draft)).sum(-1)
    tv = (log_target.exp() - log_draft.exp()).abs().sum(-1) / 2
    assert torch.allclose(drafters.loss_of("kl", log_draft, log_target, drawn), kl)
    assert torch.allclose(drafters.loss_of("tv", log_draft, log_target, drawn), tv)
    sampled = drafters.loss_of("sampled", log_draft, log_target, drawn)
    assert torch.allclose(sampled, -log_draft[:, 0])


def test_a_difference_is_called_by_its_interval_and_by_every_seed():
    def record(*gaps):
        near = [0.4 + 0.01 * (-1) ** i for i in range(30)]
        told = [{"policy": [0.4] * 30, "q*": [x + gap for x in near]} for gap in gaps]
        return {"pairs": {"x": [{"scores": {"right": scores}} for scores in told]}}

    verdicts = [
        quality.difference(record(*gaps), "x", "q*", "policy").verdict
        for gaps in ((0.1, 0.2), (-0.1, -0.2), (0.3, -0.1), (0.0, 0.0))
    ]
    assert verdicts == ["better", "worse", "within noise", "within noise"]


def test_draws_of_every_seed_say_by_item_what_their_means_say(tmp_path, monkeypatch):
    """So that intervals over items can be had of perplexity and diversity."""
    ends = {name: family.new_model("300k", seed=seed) for seed, name in enumerate("abc")}
    monkeypatch.setattr(family, "load", lambda name, **_: (ends[name], None))
    small = replace(quality.Quality({"x": [("a", "b"), ("a", "c")]}).quick(), max_new_tokens=6)
    found = quality.measure(small, device="cpu", draws_only=True)
    assert [(of["policy"], of["teacher"]) for of in found["drawn"]["x"]] == [("a", "b"), ("a", "c")]
    for of in found["drawn"]["x"]:
        for target, told in of["draws"].items():
            by_item = told["by_item"]
            assert len(by_item["tokens"]) == small.drawn_items
            assert np.mean(by_item["distinct"]) == pytest.approx(told["distinct"])
            for other, nats in told["nats"].items():
                total = sum(by_item["nats"][other]) / sum(by_item["tokens"])
                assert total == pytest.approx(nats, abs=1e-4)
                found_for = quality.perplexity(of["draws"], target, other)
                assert found_for["low"] <= found_for["mean"] <= found_for["high"]
                assert found_for["mean"] == pytest.approx(math.exp(nats), rel=1e-3)
    by_item = {"tokens": [1, 3], "nats": {"teacher": [0.0, 3 * math.log(4)]}}
    by_hand = quality.perplexity({"q*": {"by_item": by_item}}, "q*", "teacher")
    expected = {"mean": 4 ** (3 / 4), "low": 1.0, "high": 4.0}  # of tokens, not of items
    assert by_hand == pytest.approx(expected)


def test_the_recorded_scores_of_a_shown_model_are_those_that_it_has():
    """Two items, read again; a policy that took the teacher's place would be found out."""
    record = json.loads(data_file("results/quality_shown_cpu.json").read_text(encoding="utf8"))
    was = record["pairs"]["shown"][0]["scores"]["right"]
    items = tasks.items(None, len(record["kinds"]), record["configuration"]["seed"])
    chosen = [100, 300]
    pair = targets.of_pair(targets.EXAMPLES, device="cpu")
    found = quality.score_suite(pair, [items[i] for i in chosen])["right"]
    for target, values in found.items():
        assert values == pytest.approx([was[target][i] for i in chosen], rel=2e-2, abs=1e-5)
    assert min(found["teacher"]) > 10 * max(found["policy"])
