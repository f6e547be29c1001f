"""Pairs by name are what their names say, and the record of them is what a forward finds again."""

import json

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file
from tokenizers_of_all_kinds import byte_level

from qstar.rows import log_geometric_mean
from qstar.solve import solve_kl_symmetry
from qstar_book import shipped_model
from qstar_book.__main__ import main
from qstar_book.experiments import family, lora, lora_dynamics, pairs
from qstar_book.files import RefusedError
from qstar_book.records import corpus

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def model(seed, **options):
    chosen = {"vocab": len(byte_level()), "window": 512, "dtype": torch.float32} | options
    return tiny.llama(seed, **chosen)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two tiny chat models of one vocabulary, and an adapter of the first."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATE
    for seed, name in ((1, "one"), (2, "two")):
        model(seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    made = torch.Generator().manual_seed(0)
    (root / "adapter").mkdir()
    name = "base_model.model.model.layers.0.mlp.up_proj"
    shapes = {"lora_A": (2, 16), "lora_B": (24, 2)}
    weights = {
        f"{name}.{part}.weight": torch.randn(shape, generator=made)
        for part, shape in shapes.items()
    }
    save_file(weights, root / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    config["base_model_name_or_path"] = str(root / "one")
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return root


@pytest.fixture
def small(folders, monkeypatch):
    """The pairs of the shipped model, with a tiny model in its place."""
    load = shipped_model.load
    here = {shipped_model.DEFAULT: folders / "one"}
    monkeypatch.setattr(shipped_model, "load", lambda name=shipped_model.DEFAULT, **given: load(
        here.get(name, name), **given
    ))  # fmt: skip
    monkeypatch.setattr(corpus, "adapter_folder", lambda name: folders / "adapter")
    return folders


# --- Loading -------------------------------------------------------------------------------------


def test_two_folders_are_a_pair_that_is_asked_by_their_templates(folders):
    pair = pairs.load_pair(folders / "one", folders / "two")
    ours, its = pair.ask("Why?")
    assert pair.tokenizer.decode(ours) == "<user>Why?<assistant>"
    assert torch.equal(ours, its)
    assert not torch.equal(*(m.lm_head.weight for m in (pair.policy, pair.teacher)))


def test_a_fine_tune_is_merged_and_its_base_is_found(folders):
    pair = pairs.load_pair(folders / "one", folders / "adapter", dtype=torch.float64)
    up = [m.model.layers[0].mlp.up_proj.weight for m in (pair.policy, pair.teacher)]
    down = [m.model.layers[0].mlp.down_proj.weight for m in (pair.policy, pair.teacher)]
    assert not torch.equal(*up)
    assert torch.equal(*down)


def test_named_pairs_of_one_model_are_what_they_say(small):
    two = pairs.load_pair("smollm2/two-prompts")
    assert two.policy is two.teacher
    assert not two.synthetic
    assert not torch.equal(*two.ask("Why?")[:1], two.ask("Why?")[1])
    noised = pairs.load_pair("smollm2/noised-copy")
    assert noised.synthetic
    assert noised.policy is not noised.teacher
    assert torch.equal(*noised.ask("Why?"))
    tuned = pairs.load_pair("smollm2/lora-arithmetic")
    assert not tuned.synthetic
    assert tuned.questions == two.questions
    assert {kind for kind, _ in tuned.questions} == {"general", "arithmetic", "manual"}


def test_a_small_model_has_a_partner_and_a_hint(monkeypatch):
    monkeypatch.setattr(
        family, "load", lambda name, **_: (family.new_model(name).double(), family.tokenizer())
    )
    pair = pairs.load_pair("family/300k+1m")
    assert pair.policy.num_parameters() < pair.teacher.num_parameters()
    _, question = pair.questions[0]
    assert torch.equal(*pair.ask(question))
    hinted = pairs.load_pair("family/300k+hint")
    ours, its = hinted.ask(question)
    assert hinted.policy is hinted.teacher
    assert family.text_of(its.tolist()).startswith("Hint: 1")
    assert family.text_of(its.tolist()).endswith(family.text_of(ours.tolist()))


@pytest.mark.parametrize("name", ["smollm2/", "family/1m", "nonsense", "smollm2/lora-of-nobody"])
def test_an_unknown_name_is_refused_with_those_that_are_known(name, monkeypatch):
    monkeypatch.setattr(shipped_model, "load", lambda *_, **__: (model(1), byte_level()))
    with pytest.raises(RefusedError, match="no pair"):
        pairs.load_pair(name)


# --- Measuring -----------------------------------------------------------------------------------


def test_what_is_kept_of_a_position_is_what_numpy_computes():
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randn(6, 40, generator=generator).mul(2).log_softmax(-1) for _ in range(2)]
    found = pairs.compare(*rows)
    p, t = (row.double().log_softmax(-1).numpy() for row in rows)
    balance = solve_kl_symmetry(p, t)
    q = np.exp(log_geometric_mean(p, t, balance.alpha))
    mixture = (np.exp(p) + np.exp(t)) / 2
    expected = {
        "alpha": balance.alpha,
        "chernoff": balance.chernoff,
        "accept_policy": np.minimum(q, np.exp(p)).sum(-1),
        "accept_teacher": np.minimum(q, np.exp(t)).sum(-1),
        "accept_coin": np.minimum(q, mixture).sum(-1),
        "overlap": np.minimum(np.exp(p), np.exp(t)).sum(-1),
        "policy_to_teacher": (np.exp(p) * (p - t)).sum(-1),
        "teacher_to_policy": (np.exp(t) * (t - p)).sum(-1),
        "log_ratio_range": np.ptp(p - t, axis=-1),
    }
    assert tuple(found) == pairs.FIELDS == tuple(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name].numpy(), values, atol=1e-9, err_msg=name)


def test_answers_are_drawn_from_q_star_and_read_again(folders):
    pair = pairs.load_pair(folders / "one", folders / "two")
    answers = pairs.draw_answers(pair, max_new_tokens=6, seed=0)
    record = {"answers": answers}
    assert len(answers) == 9
    assert max(pairs.largest_gaps(pair, record, 9).values()) < 1e-3
    swapped = pairs.load_pair(folders / "two", folders / "one")
    assert pairs.largest_gaps(swapped, record, 9)["alpha"] > 1e-2
    general = pairs.positions_of(record, "chernoff", "general")
    assert len(general) == sum(len(a["tokens"]) for a in answers if a["kind"] == "general")


def test_the_command_asks_pairs_and_two_models(small, tmp_path):
    given = ["record", "pairs", "--threads", "1", "--max-new-tokens", "2"]
    given += ["--out", str(tmp_path / "record.json")]
    assert main([*given, "--names", "smollm2/two-prompts", "smollm2/lora-manual"]) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    one, two = record["pairs"].values()
    assert 2 * one["memory_bytes"] == two["memory_bytes"]
    both = ["--policy", str(small / "one"), "--teacher", str(small / "two")]
    assert main([*given, *both, "--dtype", "float64", "--attn-implementation", "eager"]) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    (found,) = record["pairs"].values()
    assert found["policy"]["weights_bytes"] == 8 * found["policy"]["parameters"]
    assert main([*given, *both[:2]]) == 2


# --- Public models, which were not run -----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("meta-llama/Meta-Llama-3-8B", 8_030_261_248),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("mistralai/Mistral-7B-v0.1", 7_241_732_096),
    ],
)
def test_a_configuration_gives_as_many_weights_as_its_model_has(name, published):
    """The counts that the hub shows for the safetensors files."""
    assert pairs.expected_sizes(pairs.PUBLIC[name])["parameters"] == published


def test_rows_of_output_layers_tell_pairs_that_cannot_be():
    same = [pairs.expected_of(*pair)["same_rows"] for pair in pairs.NOT_RUN]
    assert same == [True, True, False, True]


# --- The records ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record():
    return json.loads(corpus.data_file("results/pairs_cpu.json").read_text(encoding="utf8"))


def test_the_record_holds_every_pair_and_respects_every_bound(record):
    assert tuple(record["pairs"]) == pairs.NAMES
    for name, found in record["pairs"].items():
        fields = {field: pairs.positions_of(found, field) for field in pairs.FIELDS}
        assert len(fields["alpha"]) == sum(len(a["tokens"]) for a in found["answers"])
        chernoff = fields["chernoff"]
        for parent in ("policy", "teacher"):
            kept = fields[f"accept_{parent}"]
            assert (kept >= 1 - np.sqrt(chernoff / 2) - 1e-6).all(), name
            assert (kept >= fields["overlap"] - 1e-6).all(), name
            assert (fields["accept_coin"] >= np.minimum(kept, 1) / 2).all(), name
        both = (fields["accept_policy"] + fields["accept_teacher"]) / 2
        assert (fields["accept_coin"] >= both - 1e-6).all(), name
        assert found["synthetic"] == (name == "smollm2/noised-copy")


def test_a_tiny_training_is_followed_from_its_start_to_its_end(small, tmp_path):
    weights = shipped_model.load()[0], byte_level()
    weights[1].chat_template = TEMPLATE

    training = lora.Training("arithmetic", steps=4, batch=2, learning_rate=2e-2)
    out = tmp_path / "lora-arithmetic"

    def keep(step, adapted):
        if step in (0, 2, 4):
            lora.save_adapter(adapted, out / f"step-{step}", base=str(small / "one"))

    lora.train(training, *weights, on_step=keep)
    given = lora.make_batch(weights[1], lora.TEXTS["arithmetic"].held_out()[:2])
    texts = {"held out": [(given.ids[0, :5], given.ids[0, 5:9])]}
    steps = lora_dynamics.follow(out, texts)
    assert [step["step"] for step in steps] == [0, 2, 4]
    first, last = (step["pairs"] for step in (steps[0], steps[-1]))
    assert max(first["from the start"]["held out"]["chernoff"]) < 1e-9
    assert max(last["to the end"]["held out"]["chernoff"]) < 1e-9
    assert first["to the end"]["held out"]["chernoff"] == pytest.approx(
        last["from the start"]["held out"]["chernoff"], rel=1e-3, abs=1e-9
    )
    assert min(last["from the start"]["held out"]["largest_log_ratio"]) > 1e-4
    with pytest.raises(RefusedError, match="two steps or more"):
        lora_dynamics.follow(tmp_path, texts)


def test_the_recorded_fine_tunes_leave_their_start_and_reach_their_end():
    file = corpus.data_file("results/lora_dynamics.json")
    runs = json.loads(file.read_text(encoding="utf8"))["runs"]
    assert set(runs) == {"lora-manual", "lora-arithmetic"}
    for run in runs.values():
        steps = {step["step"]: step["pairs"] for step in run["steps"]}
        assert list(steps) == [0, 5, 10, 20, 40, 80, 100]
        for kind, texts in run["texts"].items():
            positions = sum(len(text["tokens"]) for text in texts)
            left, reached = (
                [np.mean(steps[n][way][kind]["chernoff"]) for n in steps]
                for way in ("from the start", "to the end")
            )
            assert left[0] == reached[-1] == 0
            assert max(reached) == reached[0] == pytest.approx(left[-1], rel=1e-3)
            assert reached == sorted(reached, reverse=True)
            for pair in (x for step in steps.values() for x in step.values()):
                found = {field: np.array(values) for field, values in pair[kind].items()}
                assert all(len(values) == positions for values in found.values())
                # The log-ratio's range is at most twice its largest absolute value.
                spread = np.maximum(2 * found["largest_log_ratio"], 1e-6)
                bound = np.log(np.expm1(spread) / spread) / spread - 0.5
                assert (np.abs(found["alpha"] - 0.5) <= bound + 1e-3).all()
                least = np.minimum(found["policy_to_teacher"], found["teacher_to_policy"])
                assert (found["chernoff"] <= least + 1e-6).all()


def test_an_interval_draws_whole_answers_again():
    """Tokens of an answer are no evidence of each other: equal ones do not narrow it."""

    def answers(*each):
        return {"answers": [{"positions": {"x": values}} for values in each]}

    short = pairs.mean_of(answers([0.0], [1.0], [1.0], [0.0]), "x")
    long = pairs.mean_of(answers([0.0] * 50, [1.0] * 50, [1.0] * 50, [0.0] * 50), "x")
    assert short == long
    assert short["mean"] == 0.5
    assert (short["low"], short["high"]) == (0.0, 1.0)
    same = pairs.mean_of(answers([0.2, 0.4], [0.3, 0.3]), "x")
    assert list(same.values()) == pytest.approx([0.3] * 3)
    weighted = pairs.mean_of(answers([0.0], [1.0, 1.0, 1.0]), "x")
    assert weighted["mean"] == 0.75  # of tokens, not of answers
