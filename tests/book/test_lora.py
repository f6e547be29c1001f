"""Adapters are what their seed and text say, merged as peft merges them; a check repeats them."""

import json
import re

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tokenizers_of_all_kinds import byte_level, word_piece

from qstar.adapters import checkpoints
from qstar_book import shipped_model
from qstar_book.__main__ import main
from qstar_book.experiments import lora
from qstar_book.records.corpus import adapter_folder

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
SHORT = lora.Training("arithmetic", steps=20, batch=2, learning_rate=3e-2)


def tokenizer():
    made = byte_level()
    made.chat_template = TEMPLATE
    return made


def model(seed=1, **options):
    chosen = {"vocab": len(byte_level()), "window": 512, "dtype": torch.float32} | options
    return tiny.llama(seed, **chosen)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained():
    """An adapter in its model, and the losses."""
    return lora.train(SHORT, model(), tokenizer())


@pytest.fixture
def adapter(trained, base, tmp_path):
    lora.save_adapter(trained[0], tmp_path / "adapter", base=str(base))
    return tmp_path / "adapter"


# --- Training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", lora.TEXTS)
def test_no_step_holds_what_is_held_out(name):
    text = lora.TEXTS[name]
    asked = {e.answer if name == "manual" else e.question for e in text.held_out()}
    drawn = [e for step in range(50) for e in text.draw(0, step, 8)]
    learned = {e.answer if name == "manual" else e.question for e in drawn}
    assert len(asked) >= 8
    assert len(learned) > 100
    assert not asked & learned


def test_a_passage_of_the_manual_explains_the_heading_above_it():
    text = "Title\n*****\n\nOne\nline.\n\n   code\n   more\n\n"
    text += "x" * 490 + "\n\nPart\n====\n\nEnd."
    assert list(lora._passages(text)) == [
        lora.Example("Explain: Title", "One line.\n\n   code\n   more"),
        lora.Example("Tell me more about: Title", "x" * 490),
        lora.Example("Explain: Part", "End."),
    ]


def test_the_loss_is_that_of_the_answers_and_of_nothing_else():
    """Against one forward over each text alone: padding and prompts count for nothing."""
    examples = [lora.Example("What is 1 + 1?", "2"), lora.Example("And 50 + 51?", "101")]
    batch = lora.make_batch(tokenizer(), examples)
    logits, targets = lora._learned(model(), batch)
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    alone = []
    for example in examples:
        prompt, answer = lora.token_ids(tokenizer(), example)
        assert tokenizer().decode(answer) == example.answer + "<end>"
        laws = checkpoints.log_distributions(model(), prompt, answer)
        alone.append(-laws.gather(-1, answer[:, None]).squeeze(-1))
    torch.testing.assert_close(loss, torch.cat(alone), atol=1e-4, rtol=0)
    found = lora.measure(model(), tokenizer(), examples)
    assert found["loss"] == pytest.approx(float(loss.detach().mean()), abs=1e-4)
    assert found["right"] == 0


def test_an_answer_is_right_if_greedy_decoding_gives_it_whole():
    prompt, _ = lora.token_ids(tokenizer(), lora.Example("Say it", ""))
    greedy = model().generate(
        prompt[None], attention_mask=torch.ones_like(prompt[None]), do_sample=False, max_length=80
    )
    said = lora.Batch(greedy[:, :-1], torch.ones_like(greedy[:, :-1]), greedy[:, 1:].clone())
    said.targets[:, : len(prompt) - 1] = -100
    logits, targets = lora._learned(model(), said)
    assert torch.equal(logits.argmax(-1), targets)


def test_training_changes_the_adapter_alone_and_lowers_the_loss(trained):
    adapted, losses = trained
    assert sum(losses[-6:]) < sum(losses[:6]) - 3
    untouched = model().state_dict()
    inside = adapted.get_base_model().state_dict()
    for name, weight in untouched.items():
        here = inside.get(name, inside.get(re.sub(r"(_proj)\.", r"\1.base_layer.", name)))
        assert torch.equal(weight, here), name


def test_the_first_steps_again_have_the_recorded_losses_and_another_seed_s_have_not(trained):
    _, losses = trained
    assert lora.repeat(SHORT, losses, model(), tokenizer(), steps=3) < 1e-5
    other = lora.Training("arithmetic", steps=20, batch=2, learning_rate=3e-2, seed=1)
    assert lora.repeat(other, losses, model(), tokenizer(), steps=3) > lora.TOLERANCE
    assert lora.repeat(SHORT, losses, model(2), tokenizer(), steps=3) > lora.TOLERANCE


def test_the_command_trains_records_and_checks(base, tmp_path, monkeypatch, capsys):
    text = lora.TEXTS["arithmetic"]
    monkeypatch.setitem(
        lora.TEXTS,
        "arithmetic",
        lora.Text("few", "CC0-1.0", text.draw, lambda: text.held_out()[:2]),
    )
    out, way = tmp_path / "out", tmp_path / "way"
    given = ["train", "lora", "lora-arithmetic", "--model", str(base), "--threads", "1"]
    given += ["--out", str(out)]
    made = ["--steps", "6", "--batch", "2", "--rank", "2", "--checkpoints", str(way)]
    assert main([*given, *made]) == 0
    record = json.loads((out / "training.json").read_text())
    assert record["training"]["rank"] == 2
    assert len(record["losses"]) == 6
    assert list(record["held_out"]) == ["0", "5", "6"]
    assert sorted(path.name for path in way.iterdir()) == ["step-0", "step-5", "step-6"]
    weights = load_file(out / "adapter_model.safetensors")
    assert shipped_model.weights_digest(weights) == record["adapter_sha256"]
    assert main([*given, "--check", "2"]) == 0
    record["losses"][1] += 0.5
    (out / "training.json").write_text(json.dumps(record))
    assert main([*given, "--check", "2"]) == 1
    record["text"]["sha256"] = "of another Python's manual"
    (out / "training.json").write_text(json.dumps(record))
    assert main([*given, "--check", "2"]) == 2
    assert "not the text here" in capsys.readouterr().err
    assert main(["train", "lora", "unknown"]) == 2


# --- Merging -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_a_merged_adapter_is_what_peft_merges(adapter, base, trained):
    import peft

    ours, _ = checkpoints.load(adapter)
    theirs = peft.PeftModel.from_pretrained(model(), adapter).merge_and_unload()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        law, same, plain = (m(ids).logits for m in (ours, theirs, model()))
        inside = trained[0](ids).logits
    torch.testing.assert_close(law, same, atol=1e-4, rtol=0)
    torch.testing.assert_close(law, inside, atol=0.3, rtol=0)  # kept in bfloat16
    assert (law - plain).abs().max() > 1


def test_a_pair_of_a_model_and_its_fine_tune_is_loaded_by_two_folders(adapter, base):
    pair = checkpoints.load_pair(base, adapter, dtype=torch.float64, attn_implementation="eager")
    assert pair.policy.dtype == pair.teacher.dtype == torch.float64
    assert pair.policy.config._attn_implementation == "eager"
    assert not torch.equal(
        *(m.model.layers[0].mlp.up_proj.weight for m in (pair.policy, pair.teacher))
    )
    twice = checkpoints.load_pair(base, str(base))
    assert twice.policy is twice.teacher


def test_a_device_map_spreads_the_layers(adapter, base):
    pair = checkpoints.load_pair(base, adapter, device_map={"": "cpu"})
    assert {p.device.type for p in pair.teacher.parameters()} == {"cpu"}
    with pytest.raises(ValueError, match="could not be loaded"):
        checkpoints.load_pair(base, adapter, device_map="everywhere")


def test_pairs_of_two_vocabularies_are_refused(base, tmp_path):
    model().save_pretrained(tmp_path / "other")
    word_piece().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="share one vocabulary"):
        checkpoints.load_pair(base, tmp_path / "other")
    model(vocab=len(byte_level()) + 4).save_pretrained(tmp_path / "padded")
    tokenizer().save_pretrained(tmp_path / "padded")
    with pytest.raises(ValueError, match="260 and 264 rows"):
        checkpoints.load_pair(base, tmp_path / "padded")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias"), ({"peft_type": "LOHA"}, "LOHA")],
)
def test_other_adapters_than_plain_lora_are_refused(adapter, base, change, message):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        checkpoints.load(adapter)


def test_an_adapter_of_another_model_is_refused(adapter):
    with pytest.raises(ValueError, match="trained on another one"):
        checkpoints.merge_lora(tiny.llama(1, vocab=7).get_decoder(), adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="other weights than pairs"):
        checkpoints.load(adapter)
    with pytest.raises(ValueError, match="cannot be merged into quantised"):
        checkpoints.load(adapter, quantization_config=object())


# --- What is published ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora-arithmetic", "lora-manual"])
def test_a_published_adapter_is_what_its_record_says(name):
    folder = adapter_folder(name)
    training, record = lora.read_training(folder)
    weights = load_file(folder / "adapter_model.safetensors")
    shipped = shipped_model.SHIPPED[shipped_model.DEFAULT]
    assert shipped_model.weights_digest(weights) == record["adapter_sha256"]
    assert checkpoints.adapter_base(folder) == record["base"]["model"] == shipped.name
    assert record["base"]["weights_sha256"] == shipped.weights_sha256
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5e6
    assert len(record["losses"]) == training.steps
    first, last = (record["held_out"][step]["loss"] for step in ("0", str(training.steps)))
    assert last < first - 0.3
    assert record["text"]["licence"] in ("CC0-1.0", "PSF-2.0")
