"""The record of what decoding took: how it is made, how it is read, and the published one."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from qstar import rows_torch
from qstar.decoding import costs
from qstar.decoding import generate as decode
from qstar.decoding.enumeration import tiny_model
from qstar_book.__main__ import main
from qstar_book.experiments import pairs
from qstar_book.records import decoding, peers, rounds
from qstar_book.records.corpus import data_file
from qstar_book.records.decoding import (
    Cell,
    around_the_models,
    count_forwards,
    find_cell,
    measure_cell,
    speed_ratio,
)

TESTS = Path(__file__).parents[1]
PROMPTS = [
    (torch.tensor([0, 1, 2, 0, 1]), torch.tensor([2, 1])),
    (torch.tensor([1, 2, 2, 1, 2]), torch.tensor([1])),
]


@pytest.fixture(scope="module")
def cell():
    """A cell of a forgetful model: its acceptance is 1, or with another one always the same."""
    pair = [tiny_model(seed, vocab=6, forgetful=True) for seed in (1, 2)]
    wanted = Cell(
        "tiny",
        "as loaded",
        ("plain", "alternating 1", "alternating 2", "one-sided 4", "lookup 2", "auto"),
        new_tokens=20,
        seeds=3,
    )
    return measure_cell(wanted, *pair, PROMPTS, seed=5, width_rounds=2)


@pytest.fixture(scope="module")
def record():
    return json.loads(data_file("results/decoding_cpu.json").read_text(encoding="utf8"))


def test_every_way_answers_every_prompt_with_every_seed(cell):
    for way in ("plain", "alternating 1", "auto"):
        blocks = [(run["prompt"], run["seed"]) for run in cell["runs"] if run["way"] == way]
        assert sorted(blocks) == [(p, s) for p in (0, 1) for s in (5, 6, 7)]
    order = [run["way"] for run in cell["runs"]]
    assert len({order.index(way) for way in order}) == 6
    assert order[0] != order[6]  # another way begins
    assert all(run["tokens"] == 20 == len(run["chernoff"]) for run in cell["runs"])
    assert json.loads(json.dumps(cell))["widths"].keys() == {str(w) for w in cell["widths"]}


def test_rounds_add_up_to_their_run(cell):
    for run in cell["runs"]:
        rounds = [dict(zip(decoding.ROUND, r, strict=True)) for r in run["rounds"]]
        assert sum(r["emitted"] for r in rounds) == run["tokens"]
        for r in rounds:
            assert r["accepted"] <= r["tested"] <= r["drafted"]
            assert (r["proposer"] == "none") == (r["drafted"] == 0)


def test_alternating_with_one_proposal_is_counted_exactly(cell):
    count = count_forwards(cell, "alternating 1")
    runs = decoding.runs_of(cell, "alternating 1")
    rejections = [sum(r[5] == 0 for r in run["rounds"][:-1]) for run in runs]
    exact = sum(costs.expected_forwards_alternating(20, r) for r in rejections)
    assert count.forwards == exact
    assert count.tokens == 120
    assert abs(count.margin) < 1 / 20  # but for the last token of a run


def test_a_prediction_at_another_acceptance_misses(cell):
    """Negative control: the margin sees a wrong acceptance."""
    wrong = dict.fromkeys(costs.PARENTS, 0.2)
    assert abs(count_forwards(cell, "alternating 1", wrong).margin) > 0.2
    assert abs(count_forwards(cell, "one-sided 4", wrong).margin) > 0.2


def test_the_proposer_of_a_round_is_the_one_whose_law_was_judged(cell):
    """The rates by proposer estimate the two acceptance probabilities, which differ."""
    means = decoding.mean_acceptance(cell)
    tested, kept = {}, {}
    for run in decoding.runs_of(cell, "one-sided 4"):
        for r in run["rounds"]:
            tested[r[2]] = tested.get(r[2], 0) + r[4]
            kept[r[2]] = kept.get(r[2], 0) + r[5]
    assert set(tested) == {"policy"}
    rate = kept["policy"] / tested["policy"]
    assert abs(rate - means["policy"]) < 6 * math.sqrt(0.25 / tested["policy"])


def test_what_is_around_the_models_is_told_in_forwards_of_plain_decoding():
    runs = [
        {"way": way, "prompt": k, "seed": 0, "tokens": 10, "model_calls": 20, **spent}
        for k, spent in enumerate(
            [{"wall_s": 24.0, "model_s": 20.0}, {"wall_s": 28.0, "model_s": 20.0}]
        )
        for way in ("plain", "coin")
    ]
    for run in runs:
        run["wall_s"] += 5 * (run["way"] == "coin")  # which does not count
    assert around_the_models({"runs": runs}) == pytest.approx((0.4 + 0.8) / 2)


def test_a_speed_ratio_is_the_median_over_blocks_with_an_interval():
    runs = [
        {"way": way, "prompt": p, "seed": 0, "tokens": 10, "wall_s": seconds}
        for p in range(5)
        for way, seconds in (("plain", 2.0 + p), ("fast", 1.0))
    ]
    ratio = speed_ratio({"runs": runs[::-1]}, "fast")
    assert ratio.median == 4.0
    assert 2.0 <= ratio.low < 4.0 < ratio.high <= 6.0
    itself = speed_ratio({"runs": runs}, "plain")
    assert (itself.low, itself.high) == (1.0, 1.0)


def test_peers_decode_as_many_tokens_from_the_product():
    pair = [tiny_model(seed, vocab=6) for seed in (1, 2)]
    prompts = [(PROMPTS[0][0], PROMPTS[0][0])]
    ways = ("plain", *decoding.PEERS)
    wanted = Cell("tiny", "as loaded", ways, new_tokens=12)
    made = measure_cell(wanted, *pair, prompts, seed=0, width_rounds=1)
    found = {run["way"]: run for run in made["runs"]}
    assert {run["tokens"] for run in found.values()} == {12}
    # transformers reads the whole prompt to draw the first token: no forward after it.
    assert found["transformers plain"]["forwards"] == 22
    assert found["transformers assisted 2"]["forwards"] < 40


def test_where_the_time_of_a_round_goes_adds_up():
    pair = [tiny_model(seed, vocab=6) for seed in (1, 2)]
    solving = rows_torch.solve_kl_symmetry
    wanted = Cell("tiny", "as loaded", ("plain", "coin"), new_tokens=12, round=("plain", "coin"))
    made = measure_cell(wanted, *pair, PROMPTS, seed=0, width_rounds=1)
    assert rows_torch.solve_kl_symmetry is solving  # the clocks are off again
    for way, spent in made["round"].items():
        parts = ("models", "solving", "judging", "drawing", "rest")
        assert sum(spent[name] for name in parts) == pytest.approx(spent["round"])
        assert min(spent["models"], spent["solving"], spent["judging"], spent["rest"]) > 0
        assert (spent["drawing"] > 0) == (way == "coin")  # nobody drafts in plain decoding
    fixed = rounds.where_the_time_goes(*pair, PROMPTS, max_new_tokens=8, alpha=0.5, scheme="plain")
    assert fixed["solving"] == 0  # a fixed exponent is not solved for


def test_forwards_that_read_prompts_count_as_one_position():
    """Two ways that differ in nothing but what their prompts took are equally fast."""
    cell = {
        "widths": {"1": {"wall_s": 1.0}},
        "widths_of_teacher": {"1": {"wall_s": 3.0}},
        "runs": [
            {
                "way": way,
                "prompt": 0,
                "seed": 0,
                "tokens": 4,
                "model_s": 16.0 + extra,
                "begins": {"policy": 1.0 + extra / 2, "teacher": 3.0 + extra / 2},
            }
            for way, extra in (("plain", 8.0), ("fast", 20.0))
        ],
    }
    assert decoding.within_the_models(cell, "fast") == pytest.approx(1)
    assert speed_ratio(cell, "fast", clock="model_s").median < 1
    del cell["runs"][0]["begins"], cell["runs"][1]["begins"]  # an older record
    assert decoding.within_the_models(cell, "fast") == pytest.approx(24 / 36)


def test_a_peer_that_is_not_installed_is_left_out_and_said_so(monkeypatch):
    monkeypatch.setattr(peers, "version_of", lambda package: None)
    pair = [tiny_model(seed, vocab=6) for seed in (1, 2)]
    prompts = [(PROMPTS[0][0], PROMPTS[0][0])]
    wanted = Cell("tiny", "as loaded", ("plain", *decoding.OTHERS), new_tokens=4)
    made = measure_cell(wanted, *pair, prompts, seed=0, width_rounds=1)
    assert {run["way"] for run in made["runs"]} == {"plain"}
    assert made["peers"]["flashspec"] == {"missing": "flashspec is not installed"}


def test_a_peer_takes_its_turns_and_says_its_version(monkeypatch):
    class Half:
        """Decodes as `plain` does from the mean with one half."""

        def __init__(self, *pair, alone):
            self.pair = pair

        def decode(self, prompts, new_tokens, seed):
            made = decode.generate(
                *self.pair,
                *prompts,
                max_new_tokens=new_tokens,
                generator=seed,
                alpha=0.5,
                scheme="plain",
            )
            return {"tokens": int(made.lengths)}

    monkeypatch.setattr(peers, "version_of", lambda package: "9.9")
    monkeypatch.setattr(peers, "Flashspec", Half)
    pair = [tiny_model(seed, vocab=6) for seed in (1, 2)]
    prompts = [(PROMPTS[0][0], PROMPTS[0][0])]
    wanted = Cell("tiny", "as loaded", ("plain", "flashspec"), new_tokens=4, seeds=2)
    made = measure_cell(wanted, *pair, prompts, seed=0, width_rounds=1)
    order = [(run["way"], run["seed"]) for run in made["runs"]]
    assert order == [("plain", 0), ("flashspec", 0), ("flashspec", 1), ("plain", 1)]
    assert made["peers"] == {"flashspec": {"package": "flashspec", "version": "9.9"}}
    assert set(decoding.mean_acceptance(made)) == {"policy", "teacher", "coin"}


def test_the_temperature_of_a_cell_reaches_every_way(monkeypatch):
    asked = []

    def spied(function):
        def spy(*args, temperature=None, **options):
            asked.append(temperature)
            return function(*args, temperature=temperature, **options)

        return spy

    monkeypatch.setattr(decoding.decode, "generate", spied(decoding.decode.generate))
    monkeypatch.setattr(decoding.ProductModel, "generate", spied(decoding.ProductModel.generate))
    pair = [tiny_model(seed, vocab=6) for seed in (1, 2)]
    prompts = [(PROMPTS[0][0], PROMPTS[0][0])]
    ways = ("plain", *decoding.LONGER, *decoding.PEERS)
    wanted = Cell("tiny", "as loaded", ways, new_tokens=12, temperature=0.25)
    made = measure_cell(wanted, *pair, prompts, seed=0, width_rounds=1)
    assert made["temperature"] == 0.25
    assert asked == [0.25] * 2 * len(ways)  # each warms up once


def test_noise_is_multiplicative_seeded_and_spares_the_head():
    model = tiny_model(1)
    other, again = (decoding.noised(model, 0.1, seed=3) for _ in range(2))
    layer = "model.layers.0.mlp.up_proj.weight"
    first, second = model.get_parameter(layer), other.get_parameter(layer)
    assert torch.equal(second, again.get_parameter(layer))
    assert float((second / first).detach().std()) == pytest.approx(0.1, rel=0.2)
    head = "lm_head.weight"
    assert torch.equal(model.get_parameter(head), other.get_parameter(head))


# --- The published record ------------------------------------------------------------------------


def test_the_published_record_says_how_it_was_made(record):
    assert record["command"].startswith("qstar-book record decoding ")
    assert {"torch", "transformers", "numpy", "python"} <= record["versions"].keys()
    assert {"cpu", "cores", "threads", "waiting", "device"} <= record["machine"].keys()
    for cell in record["cells"]:
        assert len(cell["load"]) == 2
    for cell, wanted in zip(record["cells"], decoding.CELLS, strict=True):
        assert (cell["pair"], cell["layers"]) == (wanted.pair, wanted.layers)
        assert {run["way"] for run in cell["runs"]} == set(wanted.ways)


def test_every_pair_is_asked_under_the_prompts_of_its_kind():
    class Tokenizer:
        chat_template = "{{ messages }}"

        def apply_chat_template(self, messages, **_):
            return "".join(f"[{m['role']}: {m['content']}]" for m in messages)

        def __call__(self, text, **_):
            return SimpleNamespace(input_ids=list(text.encode()))

    def asked(pair):
        return [tuple(map(tuple, both)) for both in decoding.questions_of(pair, Tokenizer())]

    assert len(asked("two prompts")) == 6
    assert all(ours != its for ours, its in asked("two prompts"))
    assert len(asked("far copy")) == 4 == len(set(asked("far copy")))
    for adapter in decoding.ADAPTERS:
        assert len(asked(adapter)) == 6
    same = asked("lora-manual") + asked("noised copy") + asked(decoding.REPEATING)
    assert all(ours == its for ours, its in same)
    assert not set(asked(decoding.REPEATING)) & set(asked("noised copy"))


@pytest.mark.parametrize("pair", decoding.FAMILY)
def test_small_models_are_asked_what_the_table_of_pairs_asks_them(pair):
    """`records` may not import the experiments, so the questions are written down; they agree."""
    asked = pairs.load_pair(pair)
    expected = [asked.ask(question) for _, question in asked.questions]
    policy, teacher, tokenizer = decoding.models_of(pair, "none")
    assert [list(map(int, ours)) for ours, _ in decoding.questions_of(pair, tokenizer)] == [
        list(map(int, ours)) for ours, _ in expected
    ]
    for model, other in ((policy, asked.policy), (teacher, asked.teacher)):
        assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def test_named_pairs_are_measured_anew_and_the_others_kept(tmp_path, monkeypatch):
    out, measured = tmp_path / "record.json", []

    def measure(function, asked, **environment):
        measured.append(decoding.CELLS[asked["index"]])
        cell = {"pair": measured[-1].pair, "layers": measured[-1].layers}
        cell |= {"threads": asked["threads"], "made": len(measured)}
        return cell | decoding.made_now() if cell["pair"] in decoding.FAMILY else cell

    monkeypatch.setattr(decoding, "in_own_process", measure)
    given = ["record", "decoding", "--out", str(out)]
    assert main(given) == 0
    assert measured == [*decoding.CELLS]
    old = json.loads(out.read_text()) | {"date": "long ago"}
    del old["source"]
    out.write_text(json.dumps(old))
    assert main([*given, "--pairs", decoding.FAMILY[0], "--layers", "as loaded"]) == 0
    assert [cell.pair for cell in measured[len(decoding.CELLS) :]] == [decoding.FAMILY[0]]
    cells = json.loads(out.read_text())["cells"]
    assert [(c["pair"], c["layers"]) for c in cells] == [(c.pair, c.layers) for c in decoding.CELLS]
    assert {(c["date"], c["source"]) for c in cells if c["pair"] not in decoding.FAMILY} == {
        ("long ago", "not said")
    }
    anew = [cell["pair"] for cell in cells if cell["made"] > len(decoding.CELLS)]
    assert anew == [decoding.FAMILY[0]]
    assert {c["threads"] for c in cells if c["pair"] in decoding.FAMILY} == {1}
    assert {c["threads"] for c in cells if c["pair"] not in decoding.FAMILY} == {2}


def test_models_of_two_sizes_have_two_measured_costs():
    pair = [tiny.llama(1, vocab=6), tiny.gpt2(2, vocab=6)]
    wanted = Cell("tiny", "as loaded", ("plain",), new_tokens=3)
    made = measure_cell(wanted, *pair, PROMPTS[:1], seed=0, width_rounds=1)
    takes = decoding.measured_costs(json.loads(json.dumps(made)))
    assert takes.policy != takes.teacher
    assert takes.teacher == {w: spent["wall_s"] for w, spent in made["widths_of_teacher"].items()}


def test_an_unknown_pair_is_refused_with_those_that_are_known(tmp_path, capsys):
    given = ["record", "decoding", "--out", str(tmp_path / "x"), "--pairs", "strangers"]
    assert main(given) == 2
    assert (
        "the pairs are two prompts, noised copy, far copy, lora-manual" in capsys.readouterr().err
    )


def test_forwards_of_the_real_pair_are_within_3_percent_of_theory(record):
    """Every scheme, at the acceptance rates of its own runs, over 2,000 tokens and more."""
    real = find_cell(record, "two prompts", "packed")
    used = [way for way in decoding.OURS if decoding.runs_of(real, way)]
    counts = {way: count_forwards(real, way) for way in used}
    assert len(used) >= 7
    assert sum(count.tokens for count in counts.values()) >= 2_000
    assert {way: count.margin for way, count in counts.items() if abs(count.margin) > 0.03} == {}


def test_alternating_with_one_proposal_never_took_more_forwards_than_plain(record):
    for cell in record["cells"]:
        for run in decoding.runs_of(cell, "alternating 1"):
            rejected = sum(r[5] == 0 for r in run["rounds"][:-1])
            assert run["forwards"] == 1 + run["tokens"] + rejected <= 2 * run["tokens"]


def test_recorded_acceptances_respect_the_bound_of_the_chernoff_information(record):
    """C is of the parents as they are; where a temperature filters q* the bound is not of these."""
    plain = [cell for cell in record["cells"] if cell["temperature"] == 1]
    assert len(plain) == len(record["cells"]) - 1
    for cell in plain:
        for run in cell["runs"]:
            if run["way"] in decoding.OURS:
                bound = 1 - np.sqrt(np.array(run["chernoff"]) / 2)
                for parent in costs.PARENTS:
                    assert (np.array(run[f"accept_{parent}"]) >= bound - 1e-3).all()


def test_recorded_mixtures_are_kept_at_least_as_often_as_the_parents_on_average(record):
    for cell in record["cells"]:
        for run in [run for run in cell["runs"] if run["way"] in decoding.OURS]:
            mixed, *own = (np.array(run[f"accept_{name}"]) for name in ("coin", *costs.PARENTS))
            assert (mixed >= sum(own) / 2 - 1e-3).all()
        assert decoding.mean_acceptance(cell)["coin"] > max(map(np.mean, own))


def test_a_test_that_the_chapter_names_exists():
    """The table of features fills its column with tests; each of them is one."""
    chapter = json.loads(
        (TESTS.parent / "notebooks" / "speculative_decoding.ipynb").read_text(encoding="utf8")
    )
    prose = "".join("".join(c["source"]) for c in chapter["cells"] if c["cell_type"] == "markdown")
    named = set(re.findall(r"`(test_\w+)`", prose))
    text = "\n".join(path.read_text(encoding="utf8") for path in TESTS.rglob("test_*.py"))
    assert len(named) > 8
    assert {name for name in named if f"def {name}(" not in text} == set()


def test_the_proposers_of_a_record_are_the_decoders(record):
    named = {
        r[2] for cell in record["cells"] for run in cell["runs"] for r in run.get("rounds", [])
    }
    assert named <= set(decode.PROPOSERS)
