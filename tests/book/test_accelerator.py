"""The recorder of the accelerator, rehearsed on the CPU, and what its record says."""

import json
import subprocess
import sys
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from qstar_book.__main__ import main
from qstar_book.files import source_digest
from qstar_book.records import accelerator, decoding, solver

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "data" / "results" / "accelerator_h200.json"
NOT_RUN = {"decode shapes"}  # on any accelerator; the chapter says so


def q_at(rows, alpha):
    return np.exp(solver.log_geometric_mean(*rows, np.asarray(alpha, dtype=float)))


def test_the_yardstick_finds_the_reference_s_q_star():
    rows = solver.language_model_like_rows(rows=8, vocab=3000, seed=1)
    alpha, log_q = accelerator.newton(*(torch.from_numpy(x) for x in rows))
    expected = q_at(rows, solver.solve_kl_symmetry(*rows).alpha)
    assert 0.5 * np.abs(q_at(rows, alpha.numpy()) - expected).sum(-1).max() < 1e-5
    assert 0.5 * np.abs(log_q.exp().numpy() - expected).sum(-1).max() < 1e-5


def test_the_yardstick_with_no_step_is_caught():
    rows = solver.language_model_like_rows(rows=8, vocab=3000, seed=1)
    alpha, _ = accelerator.newton(*(torch.from_numpy(x) for x in rows), steps=0)
    expected = q_at(rows, solver.solve_kl_symmetry(*rows).alpha)
    assert 0.5 * np.abs(q_at(rows, alpha.numpy()) - expected).sum(-1).max() > 1e-2


def test_ways_that_take_turns_are_compared_with_the_first():
    calls = []
    ways = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = accelerator.take_turns(ways, CPU, rounds=5)
    assert found["a"]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert (
        found["b"]["ratio"]["low"] <= found["b"]["ratio"]["median"] <= found["b"]["ratio"]["high"]
    )
    assert calls[:4] == list("aabb")
    assert calls[4:] == list("abbaabbaab")


def test_a_synthetic_pair_has_the_acceptance_that_was_asked_for():
    policy, teacher, reached = accelerator.synthetic_pair("tiny", CPU, acceptance=0.8)
    assert abs(reached - 0.8) < 0.01
    assert not torch.equal(policy.lm_head.weight, teacher.lm_head.weight)


def test_a_forward_through_the_static_cache_is_one_over_the_whole_text():
    model = accelerator.random_model("tiny", CPU)
    text = accelerator._text(model.config.vocab_size, 20, CPU)
    read = accelerator._Static(model, text).reads(3)
    with torch.no_grad():
        whole = model(torch.cat([text, text[:3]])[None]).logits[0, -3:]
        for _ in range(2):  # the second forward must find the cache as the first one did
            assert (read() - whole).abs().max() < 1e-5


class InThisProcess:
    """What `OwnProcess` would give, without an import of torch: the stage runs here."""

    def __init__(self, function):
        self.function = function

    def call(self, given, *, limit_s):
        if limit_s < 1:
            raise RuntimeError(f"took longer than {limit_s} s")
        try:
            return json.loads(json.dumps(self.function(**given)))
        except OSError:
            raise RuntimeError(traceback.format_exc()) from None

    def end(self):
        pass


def test_a_stage_that_fails_says_so_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    def fails(device, *, quick):
        raise OSError("no model is there")

    stages = {"real": (fails, 60), "slow": (fails, 0.5), "machine": (accelerator.machine, 60)}
    monkeypatch.setattr(accelerator, "STAGES", stages)
    monkeypatch.setattr(accelerator, "OwnProcess", InThisProcess)
    out = tmp_path / "record.json"
    given = ["--device", "cpu", "--quick", "--out", str(out)]
    assert main(["record", "accelerator", *given]) == 0
    stages = json.loads(out.read_text())["stages"]
    assert stages["real"]["failed"].endswith("OSError: no model is there\n")
    assert stages["slow"]["failed"] == "took longer than 0.5 s"
    assert stages["machine"]["copy_gb_per_s"] > 0
    assert main(["record", "accelerator", *given, "--stages", "none"]) == 2
    assert "no stage none; the stages are real, slow, machine" in capsys.readouterr().err


def test_a_stage_that_might_end_too_late_waits_for_the_next_call(tmp_path, monkeypatch, capsys):
    ran = []

    def stage(name):
        return lambda device, *, quick: ran.append(name) or {"ran": name}

    stages = {
        "long": (stage("long"), 50),
        "dear": (stage("dear"), 90),
        "short": (stage("short"), 9),
    }
    monkeypatch.setattr(accelerator, "STAGES", stages)
    monkeypatch.setattr(accelerator, "OwnProcess", InThisProcess)
    out = tmp_path / "record.json"
    given = ["record", "accelerator", "--device", "cpu", "--out", str(out)]
    assert main([*given, "--limit", "60"]) == 0
    assert ran == ["long", "short"]
    assert "not run, for want of time: dear." in capsys.readouterr().err
    assert list(json.loads(out.read_text())["stages"]) == ["long", "short"]
    assert main([*given, "--limit", "100"]) == 0
    assert ran == ["long", "short", "dear"]
    made = json.loads(out.read_text())["stages"].values()
    assert {stage["source"] for stage in made} == {source_digest()}
    assert "not run" not in capsys.readouterr().err


def test_each_stage_fits_into_one_call_and_took_less_than_it_may(stages):
    for name, (_, limit) in accelerator.STAGES.items():
        took = stages[name]["took_s"] if name not in NOT_RUN else 0
        assert 1.3 * took <= limit <= accelerator.LIMIT_S, name


@pytest.mark.parametrize("name", accelerator.STAGES)
def test_every_stage_runs_at_small_size_without_an_accelerator(name):
    found = accelerator.run_stage(name=name, device="cpu", quick=True)
    assert "failed" not in found
    for cell in found.get("cells", []):
        assert {run["tokens"] for run in cell["runs"]} == {cell["new_tokens"]}
    json.dumps(found, allow_nan=False)  # a record can hold it


def test_the_command_needs_no_tool_of_the_book():
    """A machine that is lent for its GPU has torch, transformers and SciPy, and no more."""
    absent = "papermill nbformat nbclient jupyter_client jsonschema matplotlib gguf IPython"
    code = f"""
import sys
sys.modules.update(dict.fromkeys({absent.split()!r}))  # importing one of them raises
from qstar_book.__main__ import main
sys.exit(main(["record", "accelerator", "--device", "cpu", "--out", "none", "--stages", "none"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.startswith("qstar-book: no stage none; the stages are machine, solver")
    assert done.returncode == 2


# --- The record ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stages():
    return json.loads(RECORD.read_text(encoding="utf8"))["stages"]


def test_every_stage_was_recorded(stages):
    assert set(accelerator.STAGES) == set(stages) | NOT_RUN
    assert not NOT_RUN & set(stages)
    assert not {name: found["failed"] for name, found in stages.items() if "failed" in found}


def test_on_the_device_the_decoder_s_distribution_is_exact(stages):
    """To the rounding of the weights: one of the configurations is in float32."""
    errors = {name: x["largest_error"] for name, x in stages["laws"].items() if isinstance(x, dict)}
    narrow = {name for name in errors if "float32" in name}
    assert (len(errors), len(narrow)) == (12, 1)
    assert max(errors[name] for name in narrow) < 1e-5
    assert max(errors[name] for name in errors.keys() - narrow) < 1e-12


def test_on_the_device_a_seed_draws_the_tokens_of_the_cpu(stages):
    kinds = [x for x in stages["seeds"].values() if isinstance(x, dict)]
    assert [x["same"] for x in kinds] == [x["texts"] for x in kinds] == [10, 10, 10]


def test_captured_forwards_give_the_logits_of_those_that_are_not(stages):
    for shape in ("1B", "7B"):
        widths = stages["forwards"][shape]["widths"].values()
        assert [entry["captured_differs_by"] for entry in widths] == [0.0] * 5


def test_on_the_device_the_solvers_found_q_star(stages):
    cells = [x for x in stages["solver"].values() if isinstance(x, dict)]
    assert len(cells) == 6
    assert all(cell["converged"] == 1.0 for cell in cells)
    assert max(max(cell["worst_tv"].values()) for cell in cells) < 3e-6
    assert all(cell["fused"] and cell["failed"] == {} for cell in cells)


def test_every_way_answered_every_prompt_of_a_pair_that_says_whether_it_is_synthetic(stages):
    several, beside = stages["decode synthetic"]["cells"]
    apart, real = stages["decode apart"]["cells"], stages["decode real"]["cells"]
    assert {run["way"] for run in several["runs"]} == set(accelerator.CAPTURED_WAYS)
    assert {run["way"] for run in beside["runs"]} == set(accelerator.SLOW_WAYS)
    pairs = [cell["pair"] for cell in (several, beside, *apart)]
    named = ("7B shape, 0.9", "7B shape, 0.95", "7B shape, 0.8", "7B shape, 0.6", "1B shape, 0.9")
    assert pairs == [named[0], *named]
    assert [cell["synthetic"] for cell in real] == [False, True]
    for cell in (several, beside, *apart, *real):
        blocks = Counter(run["way"] for run in cell["runs"])
        assert len(set(blocks.values())) == 1
        assert {run["tokens"] for run in cell["runs"]} == {cell["new_tokens"]}
        assert list(cell["widths"]) == [str(width) for width in decoding.WIDTHS]
    for cell in (several, beside, *apart):
        assert cell["synthetic"]
        asked = float(cell["pair"].split(", ")[1])
        assert abs(cell["acceptance_reached"] - asked) < 0.01


def test_a_fine_tune_is_no_synthetic_pair(stages):
    cells = stages["decode pairs"]["cells"]
    assert tuple(cell["pair"] for cell in cells) == decoding.ADAPTERS
    assert not any(cell["synthetic"] for cell in cells)


def test_a_round_of_drafts_is_spent_in_the_models(stages):
    ways = stages["round"]["ways"]
    assert set(ways) == {"7B, plain", "7B, alternating 1", "7B, coin"}
    rest = {name: 1 - x["model_ms"] / x["wall_ms"] for name, x in ways.items()}
    assert min(rest.values()) > 0
    assert max(rest["7B, alternating 1"], rest["7B, coin"]) <= 0.15
