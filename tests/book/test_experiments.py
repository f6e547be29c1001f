"""Generated tasks are right and held out; small models are what their seed says."""

import ast
import json
import re
from itertools import islice

import pytest
import torch

from qstar_book.experiments import family, tasks
from qstar_book.files import RefusedError
from qstar_book.records.corpus import data_file


def solved(item: tasks.Item) -> str:
    """The answer, found again from the prompt alone by other means."""
    asked, _, rest = item.prompt.partition(": ")
    match item.kind:
        case "sum" | "difference":
            return str(eval(compile(ast.parse(item.prompt[8:-1], mode="eval"), "", "eval")))
        case "copy":
            return rest
        case "reverse":
            return " ".join(rest.split()[::-1])
        case "sort":
            return " ".join(sorted(rest.split()))
        case "capitals":
            return rest.upper()
        case "json":
            name, age = re.fullmatch(r"name (\w+), age (\d+)", rest).groups()
            return json.dumps({"name": name, "age": int(age)})
        case "largest":
            found = dict(re.findall(r"([A-C])\) (\d+)", item.prompt))
            return max(found, key=lambda letter: int(found[letter]))
    raise AssertionError(f"no solution for {item.kind} ({asked})")


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_the_answer_is_right(kind):
    for item in tasks.items(kind, 50):
        assert item.answer == solved(item)
        assert item.correct(f" {item.answer}\nand more")
        assert not item.correct(item.answer + "0")
        assert item.kind == kind
        assert not item.choices or item.answer in item.choices


def test_no_training_document_holds_a_prompt_that_is_held_out():
    asked = {item.prompt for item in tasks.items(None, 400)}
    learned = {item.prompt for item in islice(tasks.stream((0, 1)), 5_000)}
    assert len(asked) == 400
    assert not asked & learned
    assert all(map(tasks.is_held_out, asked))
    again = {item.prompt for item in islice(tasks.stream((0, 1), held_out=True), 5_000)}
    assert asked & again  # the same draw finds them where they are not left out


def test_an_unknown_kind_and_too_many_items_are_refused():
    with pytest.raises(ValueError, match="kinds must be among"):
        next(tasks.stream(0, ["product"]))
    with pytest.raises(ValueError, match="different items"):
        tasks.items("json", 10_000)


def test_the_tokenizer_and_the_fast_road_agree_on_every_document():
    made = family.tokenizer()
    for item in tasks.items(None, 40):
        text = tasks.document(item, hint=item.answer)
        ids = family.prompt_ids(text)
        assert ids[0] == made.bos_token_id == 0
        assert made(text).input_ids == ids[1:].tolist()
        assert made.decode(ids[1:]) == text == family.text_of([*ids.tolist(), 1, 5])


def test_one_seed_gives_one_model_and_another_seed_another():
    told = family.Training("300k", steps=20, batch=4)
    runs = [
        family.train(family.Training(**vars_of(told, seed)), stop_after=2) for seed in (0, 0, 1)
    ]
    losses = [losses for _, losses in runs]
    assert losses[0] == losses[1] != losses[2]
    one, same, other = (torch.cat([x.flatten() for x in m.parameters()]) for m, _ in runs)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_few_steps_lower_the_loss_of_documents_that_are_held_out():
    training = family.Training("300k", steps=40, batch=8)
    _, losses = family.train(training, stop_after=25)
    assert sum(losses[-5:]) / 5 < losses[0] - 0.7


def test_a_trained_model_is_saved_and_loaded(tmp_path, monkeypatch):
    training = family.Training("300k", steps=2, batch=2)
    model, losses = family.train(training)
    family.save(model, tmp_path / "300k", training, losses)
    monkeypatch.setattr(family, "folder_of", lambda name: tmp_path / name)
    loaded, made = family.load("300k")
    ids = made("Q: What is 1 + 1?\nA:", return_tensors="pt").input_ids
    # Weights are kept in bfloat16.
    torch.testing.assert_close(loaded(ids).logits, model.float()(ids).logits)
    assert json.loads((tmp_path / "300k" / "training.json").read_text())["losses"]


@pytest.mark.parametrize(("seed", "holds"), [(None, True), (1, False)])
def test_the_first_losses_of_a_trained_model_are_the_recorded_ones(seed, holds):
    """Trained on a GPU; the first steps are made here. Another seed must fail."""
    recorded = json.loads((family.folder_of("300k") / "training.json").read_text())
    told = recorded["training"] | {"kinds": ()} | ({} if seed is None else {"seed": seed})
    _, losses = family.train(family.Training(**told), stop_after=2)
    gap = max(abs(a - b) for a, b in zip(losses, recorded["losses"][:2], strict=True))
    assert (gap <= family.TOLERANCE) is holds


@pytest.mark.parametrize("name", ["300k", "1m", "1m-numbers", "1m-words", "4m"])
def test_trained_models_answer_what_they_learned(name):
    """Copying is learned by all that saw it; a hint makes sums easy; what was not seen is not."""
    model, _ = family.load(name)
    asked = {kind: tasks.items(kind, 8) for kind in ("sum", "copy")}
    right = {
        kind: family.score(model, found, hinted=kind == "sum")["all"]
        for kind, found in asked.items()
    }
    assert (right["sum"] > 0.8) is (name != "1m-words")
    assert (right["copy"] > 0.8) is (name != "1m-numbers")


def test_a_model_that_was_never_trained_is_refused_by_name():
    with pytest.raises(RefusedError, match="qstar-book train family SIZE"):
        family.load("7b")


def test_pairs_of_trained_models_are_compared_as_recorded():
    """The recorded figures of one pair, from fewer documents: acceptance within a tenth."""
    recorded = json.loads(data_file("results/family_h200.json").read_text())["pairs"]
    key = "1m plain, 1m-words plain"
    found = family.compare(["1m", "1m-words"], documents=80, device="cpu")["pairs"][key]
    assert found["accept_policy"] == pytest.approx(recorded[key]["accept_policy"], abs=0.1)
    assert found["chernoff"] == pytest.approx(recorded[key]["chernoff"], rel=0.35)
    assert 0 < found["alpha_quantiles"][0] <= found["alpha_quantiles"][2] < 1


def vars_of(training: family.Training, seed: int) -> dict:
    return {"size": training.size, "steps": training.steps, "batch": training.batch, "seed": seed}
