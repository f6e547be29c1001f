"""Rollouts are of the target they claim, and what is learned from them is what is said."""

import json
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qstar.decoding.enumeration import tiny_model, token_level_distribution
from qstar_book.experiments import (
    distillation,
    dynamics,
    family,
    jobs,
    policy_gradient,
    rollouts,
    targets,
    tasks,
)
from qstar_book.experiments.rollouts import TARGETS, Questions, Rollouts

ALPHA = {"policy": 1.0, "teacher": 0.0, "half": 0.5}
PROMPTS = torch.tensor([0, 1]), torch.tensor([1, 0, 1])


@pytest.fixture
def untrained(monkeypatch):
    """The family's models, untrained: nothing is read from data/."""
    monkeypatch.setattr(family, "load", lambda name, **_: (family.new_model("300k", seed=3), None))


# --- Reading and drawing -------------------------------------------------------------------------


def test_padding_before_a_prompt_changes_nothing():
    model = family.new_model("300k", seed=1)
    prompts = [family.prompt_ids(text) for text in ("Q: Sort: 3 1\nA:", "A:", "Hint: x\nQ: y\nA:")]
    tokens = torch.tensor([[5, 6, 7], [8, 9, 1], [4, 4, 4]])
    with torch.no_grad():
        found = rollouts.log_distributions(model, prompts, tokens)
        for row, prompt, after in zip(found, prompts, tokens, strict=True):
            alone = model(torch.cat([prompt, after])[None], use_cache=False).logits[0, -4:-1]
            torch.testing.assert_close(row, alone.log_softmax(-1), atol=1e-5, rtol=0)


def drawn_target(target, monkeypatch, side=120):
    """The target of two tokens by a grid of all pairs of uniform numbers, and the rows."""
    pair = tiny_model(1), tiny_model(2)
    place = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    grid = torch.cartesian_prod(place, place).T[..., None]
    monkeypatch.setattr(torch, "rand", lambda *_, **__: grid)
    rows = side * side
    found = rollouts.sample(
        [(model, [prompt] * rows) for model, prompt in zip(pair, PROMPTS, strict=True)],
        target,
        end=99,
        max_new_tokens=2,
        generator=torch.Generator(),
    )
    shares = np.zeros((3, 3))
    np.add.at(shares, tuple(found.tokens.T.numpy()), 1 / rows)
    return pair, shares, found


def reads_both(name):
    """A target of `TARGETS` as one of (policy, teacher)."""
    whose, target = TARGETS[name]
    places = [("policy", "teacher").index(one) for one in whose]
    return lambda logs: target([logs[place] for place in places])


@pytest.mark.parametrize("name", ["policy", "teacher", "half", "mixture"])
def test_a_grid_of_uniform_numbers_draws_each_text_as_often_as_its_target_says(name, monkeypatch):
    pair, shares, found = drawn_target(reads_both(name), monkeypatch)
    expected = mixture_target(pair) if name == "mixture" else target_of(pair, ALPHA[name])
    assert np.abs(shares - expected).max() < 0.02  # two steps, each within 1/120
    said = found.log_target.sum(-1).double().exp().numpy()
    np.testing.assert_allclose(said, expected[tuple(found.tokens.T.numpy())], rtol=1e-4)
    others = [target_of(pair, alpha) for key, alpha in ALPHA.items() if key != name]
    assert min(np.abs(shares - other).max() for other in others) > 0.02  # the control


def target_of(pair, alpha):
    return token_level_distribution(*pair, *PROMPTS, length=2, alpha=alpha)


def mixture_target(pair):
    """Token by token: an even mixture after each prefix, from the parents' conditionals."""
    rows = []
    for alpha in (1.0, 0.0):
        joint = target_of(pair, alpha)
        rows.append((joint.sum(1), joint / joint.sum(1, keepdims=True)))
    first, then = ((one + other) / 2 for one, other in zip(*rows, strict=True))
    return first[:, None] * then


def test_a_row_ends_with_the_token_that_ends_it():
    model = tiny_model(1)
    drawn = rollouts.sample(
        [(model, [PROMPTS[0]] * 64)],
        TARGETS["policy"][1],
        end=2,
        max_new_tokens=5,
        generator=torch.Generator().manual_seed(0),
    )
    for row, real in zip(drawn.tokens.tolist(), drawn.drawn.tolist(), strict=True):
        length = row.index(2) + 1 if 2 in row else len(row)
        assert real == [place < length for place in range(len(row))]
    assert (drawn.log_target[~drawn.drawn] == 0).all()


def test_an_answer_is_right_if_it_is_the_answer_and_ends():
    answers = (torch.tensor([4, 5, 1]), torch.tensor([6, 1]))
    questions = Questions((), (), (), answers, 1)
    tokens = torch.tensor([[4, 5, 1, 1], [6, 1, 1, 1]])
    drawn = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    right = Rollouts(tokens, drawn, torch.zeros(2, 4)).right(questions)
    assert right.tolist() == [True, True]
    longer = Rollouts(tokens, torch.ones(2, 4).bool(), torch.zeros(2, 4)).right(questions)
    assert longer.tolist() == [False, False]
    other = Rollouts(tokens.flip(0), drawn.flip(0), torch.zeros(2, 4)).right(questions)
    assert other.tolist() == [False, False]


def test_the_first_tokens_of_a_batch_are_counted_row_by_row():
    drawn = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    assert distillation.first_tokens(drawn, 3).tolist() == [
        [True, True, False],
        [True, False, False],
    ]


# --- Learning ------------------------------------------------------------------------------------


def texts():
    """All texts of at most two tokens over three, of which 2 ends one."""
    tokens = torch.tensor([[2, 2], [0, 2], [0, 0], [0, 1], [1, 2], [1, 0], [1, 1]])
    return tokens, torch.tensor([[1, 0], *[[1, 1]] * 6]).bool()


def gradients(models, target, weighted, *, beta=0.3):
    """The expected step of rollouts from a target, over all texts, as one vector."""
    policy, reference = models
    tokens, drawn = texts()
    prompts = [PROMPTS[0]] * len(tokens)
    with torch.no_grad():
        both = [
            rollouts.log_distributions(m, [p] * len(tokens), tokens)
            for m, p in zip(models, PROMPTS, strict=True)
        ]
    rows = target(both).gather(-1, tokens[..., None]).squeeze(-1)
    log_target = torch.where(drawn, rows, 0.0)
    policy.zero_grad()
    for i in range(len(tokens)):
        one = slice(i, i + 1)
        questions = Questions((), tuple(prompts[one]), (), (torch.tensor([0, 2]),), 2)
        found = policy_gradient.objective(
            policy,
            reference,
            questions,
            Rollouts(tokens[one], drawn[one], log_target[one]),
            beta=beta,
            weighted=weighted,
        )
        (log_target[i].sum().exp() * found.value).backward()
    return torch.cat([x.grad.flatten() for x in policy.parameters()])


def test_weighted_rollouts_of_another_target_make_the_same_step_on_average():
    models = tiny_model(1), tiny_model(2)
    own = gradients(models, reads_both("policy"), weighted=False)
    weighted = gradients(models, reads_both("half"), weighted=True)
    torch.testing.assert_close(weighted, own, atol=2e-5, rtol=0)
    plain = gradients(models, reads_both("half"), weighted=False)
    assert (plain - own).abs().max() > 1e-2  # the control: without the weights it is another step


def test_the_soft_value_is_the_mean_reward_of_q_star_token_by_token():
    """Of a checkpoint and the optimum of its regularised reward; of another teacher it is not."""
    from qstar.rows import log_geometric_mean
    from qstar.solve import solve_kl_symmetry

    rng, away = np.random.default_rng(0), []
    for beta in (0.05, 0.3, 2.0):
        rows = rng.normal(size=(4, 6)) * 2
        rows -= np.logaddexp.reduce(rows, axis=-1, keepdims=True)
        right = rng.integers(6, size=4)
        chance = math.exp(rows[range(4), right].sum())
        best = policy_gradient.log_optimum(rows, right, beta)
        tilted = chance * math.exp(1 / beta) / (1 - chance + chance * math.exp(1 / beta))
        assert math.exp(best[range(4), right].sum()) == pytest.approx(tilted, abs=1e-12)
        alpha = solve_kl_symmetry(rows, best).alpha
        mean = math.exp(log_geometric_mean(rows, best, alpha)[range(4), right].sum())
        soft = float(policy_gradient.soft_value(np.array(chance), beta))
        assert mean == pytest.approx(soft, abs=1e-9)
        half = math.exp(log_geometric_mean(rows, best, np.full(4, 0.5))[range(4), right].sum())
        away.append(abs(half - soft))
    assert max(away) > 1e-2  # the control: a fixed exponent has another mean reward


# --- Runs ----------------------------------------------------------------------------------------


def test_one_seed_is_one_run_and_every_way_gets_as_many_tokens(untrained):
    told = vars_of(
        distillation.Distillation(prompts=4, tokens=24, max_new_tokens=8, kinds=("sort",))
    )
    for way in ("policy", "q*"):
        runs = [
            distillation.run(config=told, way=way, seed=seed, device="cpu", stop_after=1)
            for seed in (0, 0, 1)
        ]
        losses = [run["steps"][0]["loss"] for run in runs]
        assert losses[0] == losses[1] != losses[2]
        assert all(run["steps"][0]["tokens"] <= 24 for run in runs)


def test_what_is_true_before_the_first_step_is_found_once(untrained, monkeypatch):
    small = {"steps": 1, "evaluations": 1, "held_out": 4, "prompts": 2, "tokens": 8}
    told = distillation.Distillation(**small, max_new_tokens=6, kinds=("sort",))
    looked = []
    real = distillation.evaluate
    monkeypatch.setattr(distillation, "_BEFORE", {})
    monkeypatch.setattr(
        distillation, "evaluate", lambda *given: looked.append(given) or real(*given)
    )
    runs = [
        distillation.run(config=vars_of(told), way="policy", seed=seed, device="cpu")
        for seed in (0, 1)
    ]
    starts = [run["curve"][0] for run in runs]
    assert starts[0] == starts[1]
    assert runs[0]["curve"][1] != runs[1]["curve"][1]
    assert len(looked) == 3, "once before, and at either end"
    assert len(starts[0]["chances"]) == 4
    assert np.mean(starts[0]["chances"]) == pytest.approx(starts[0]["right_chance"], rel=1e-6)
    distillation.run(config=vars_of(replace(told, held_out=5)), way="policy", seed=0, device="cpu")
    assert len(looked) == 5, "other questions are asked anew"


def test_a_policy_gradient_run_says_what_its_weights_are_worth(untrained):
    told = vars_of(policy_gradient.PolicyGradient(prompts=4, max_new_tokens=6, kinds=("sort",)))
    own, other = (
        policy_gradient.run(config=told, way=way, seed=0, device="cpu", stop_after=1)["steps"][0]
        for way in ("policy", "q*, weighted")
    )
    assert own["effective"] == pytest.approx(1, abs=1e-6)
    assert other["effective"] < 1


def test_checkpoints_near_their_end_step_by_step(untrained):
    config = dynamics.Dynamics(
        "300k", steps=3, batch=2, seeds=1, documents=2, kept=4, kinds=("sort",)
    )
    (run,) = dynamics.record(config)["runs"]
    assert [entry["step"] for entry in run["steps"]] == [0, 1, 2, 3]
    apart = [entry["end"]["chernoff"] for entry in run["steps"][:-1]]
    assert apart == sorted(apart, reverse=True)
    assert "end" not in run["steps"][-1]
    assert all("other" in entry for entry in run["steps"])


def square(*, x):
    return x * x


def test_runs_come_in_order_and_stop_when_it_is_late():
    given = [{"x": x} for x in range(3)]
    assert list(jobs.each(square, given)) == [(0, 0), (1, 1), (2, 4)]
    assert list(jobs.each(square, given, limit_s=-1)) == []


def falls_short(*, config, way, seed, device):
    """A run that ends best at the rate 2."""
    assert (way, device) == ("policy", "cpu")
    return {"curve": [{"x": 0.0}, {"x": seed - abs(config["learning_rate"] - 2)}]}


def test_every_way_gets_the_rate_at_which_the_policy_ends_best():
    told = {"rates": (1, 2, 4), "seeds": 5, "learning_rate": 9}
    found = jobs.best_rate(falls_short, told, quantity="x", device="cpu")
    assert (found["rate"], found["seed"]) == (2, 5)
    assert [curve[-1]["x"] for curve in found["curves"]] == [4, 5, 3]


@dataclass(frozen=True)
class Small:
    """A configuration of `compare`."""

    ways: tuple[str, ...] = ("policy", "q*")
    seeds: int = 1
    steps: int = 3
    rates: tuple[float, ...] = ()
    learning_rate: float = 1.0


def test_more_runs_join_those_of_a_record(tmp_path, monkeypatch):
    """Nothing is made twice, what made the first is kept, and other runs do not mix with them."""
    made = []

    def one(*, config, way, seed, device):
        made.append((way, seed))
        return {"way": way, "seed": seed, "curve": [{"x": -abs(config["learning_rate"] - 2)}]}

    def record(config, *, held=None, processes, limit_s, keep, progress, device):
        told = {"config": vars(config) | {}, **jobs.held_of(held, "scan", "runs")}
        return jobs.compare(told, one, quantity="x", device=device, keep=keep)

    out = tmp_path / "record.json"

    def write(config, **more):
        return jobs.write(record, config, out=out, device="cpu", processes=1, limit_s=None, **more)

    with pytest.raises(jobs.RefusedError, match="does not exist"):
        write(Small(), more=True)
    for rates in (), (1.0, 2.0):
        write(Small(rates=rates))
        first = json.loads(out.read_text())
        del first["source"]  # as older records
        out.write_text(json.dumps(first))
        made.clear()
        write(Small(rates=rates, seeds=2), more=True)
        new = 2 if rates else 1  # seed 1 was used for the rates
        assert made == [("policy", new), ("q*", new)]
        held = json.loads(out.read_text())
        assert [(r["way"], r["seed"]) for r in held["runs"]] == [
            ("policy", 0),
            ("policy", new),
            ("q*", 0),
            ("q*", new),
        ]
        assert held["config"]["learning_rate"] == (2 if rates else 1)
        assert held["earlier"][0]["date"] == first["date"]
        with pytest.raises(jobs.RefusedError, match="steps 3, not 4"):
            write(Small(rates=rates, seeds=2, steps=4), more=True)
        with pytest.raises(jobs.RefusedError, match=r"has 2 seeds .* not for 1"):
            write(Small(rates=rates), more=True)


def test_the_rate_that_was_found_is_the_one_of_the_runs(monkeypatch):
    """In both experiments: the record's configuration is that of its runs."""
    for module, config in (
        (distillation, distillation.Distillation(seeds=1, ways=("policy",), rates=(1.0, 2.0))),
        (policy_gradient, policy_gradient.PolicyGradient(seeds=1, rates=(1.0, 2.0))),
    ):
        rates = []

        def run(*, config, way, seed, device, rates=rates):
            rates.append(config["learning_rate"])
            end = {"right_chance": rates[-1], "objective": rates[-1]}
            return {"way": way, "seed": seed, "curve": [end]}

        monkeypatch.setattr(module, "run", run)
        monkeypatch.setattr(distillation, "costs", lambda *_, **__: {})
        monkeypatch.setattr(policy_gradient, "values", lambda *_: {})
        record = module.record(config)
        assert record["config"]["learning_rate"] == record["scan"]["rate"] == 2
        assert rates == [1, 2] + [2] * len(config.ways)


def test_curves_are_of_the_seeds_that_every_way_has():
    runs = [
        {"way": way, "seed": seed, "curve": [{"x": 10 * seed + i} for i in range(2)]}
        for way, seed in (("policy", 0), ("q*", 0), ("policy", 1), ("policy", 2), ("q*", 2))
    ]
    record = {"config": {"ways": ["policy", "q*"], "seeds": 3}, "runs": runs}
    for values in rollouts.curves(record, "x").values():
        assert values.tolist() == [[0, 1], [20, 21]]
    found = rollouts.over_seeds([1.0, 2.0, 3.0])
    assert found["mean"] == 2
    assert found["high"] - 2 == pytest.approx(4.302652729911275 / math.sqrt(3))


class Letters:
    """A tokenizer of letters with a chat template, as far as `of_chat` needs one."""

    chat_template = "a template"
    eos_token_id = 0

    def apply_chat_template(self, messages, **_):
        turns = [f"<{message['role']}>{message['content']}" for message in messages]
        return "".join(turns) + "<assistant>"

    def __call__(self, text, **_):
        return SimpleNamespace(input_ids=[ord(letter) for letter in text])

    def convert_tokens_to_ids(self, token):
        return 0

    def decode(self, tokens, *, skip_special_tokens):
        return "".join(chr(token) for token in tokens if token or not skip_special_tokens)


def test_a_hint_is_the_answer_or_worked_examples_of_the_same_kind():
    items = tasks.items("capitals", 12, "a test")

    def says(rows):
        return ["".join(map(chr, row.tolist())) for row in rows]

    known = rollouts.of_chat(Letters(), hint="answer")(items)
    shown = rollouts.of_chat(Letters(), hint="examples")(items)
    assert says(known.plain) == says(shown.plain)
    for item, plain, told, taught in zip(
        items, says(known.plain), says(known.hinted), says(shown.hinted), strict=True
    ):
        assert item.answer in told
        assert item.answer not in plain
        assert item.answer not in taught, "worked examples do not hold the answer"
        turns = taught.split("<user>")
        assert len(turns) == 1 + rollouts.SHOWN + 1
        assert turns[-1] == plain.split("<user>")[1] == f"{item.prompt}<assistant>"
        for turn, example in zip(turns[1:], rollouts.examples_of(item), strict=False):
            assert turn == f"{example.prompt}<assistant>{example.answer}"
            assert example.kind == "capitals"
            assert not tasks.is_held_out(example.prompt)
            assert example.answer == example.prompt.removeprefix("In capitals: ").upper()
    again = rollouts.of_chat(Letters(), hint="examples")(items)
    assert says(again.hinted) == says(shown.hinted)


def test_a_pair_that_is_scored_can_be_shown_worked_examples(monkeypatch):
    """As in the rollouts: the same prompts, and answers that end as a chat's do."""
    model, items = object(), tasks.items("copy", 3, "a test")
    monkeypatch.setattr(targets.shipped_model, "load", lambda **_: (model, Letters()))
    policy, teacher = targets.of_pair(targets.EXAMPLES, device="cpu")
    assert policy.model is teacher.model is model
    shown = rollouts.of_chat(Letters(), hint="examples")(items)
    for place, item in enumerate(items):
        assert torch.equal(policy.ask(item), shown.plain[place])
        assert torch.equal(teacher.ask(item), shown.hinted[place])
        assert teacher.say(item.answer) == shown.answers[place].tolist()
        assert item.correct(policy.write(teacher.say(item.answer)))


def test_unknown_hints_are_refused():
    with pytest.raises(ValueError, match="hint must be among answer, examples; got 'answers'"):
        rollouts.of_chat(Letters(), hint="answers")
    with pytest.raises(ValueError, match="a model of the family reads the answer; got 'examples'"):
        distillation.Distillation(hint="examples")
    distillation.Distillation(model=distillation.SMOLLM2, hint="examples")  # the control


def test_unknown_ways_are_refused():
    with pytest.raises(ValueError, match="ways must be among"):
        distillation.Distillation(ways=("q",))
    with pytest.raises(ValueError, match="ways must be among"):
        policy_gradient.PolicyGradient(ways=("policy, weighed",))


def vars_of(config):
    from dataclasses import asdict

    return asdict(config)
