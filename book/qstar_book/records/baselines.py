"""Does solving for alpha* matter? q* against its rivals on recorded answers of a language model.

    qstar-book record baselines --out data/results/rivals.json

reads the answers of data/continuations.json, as `qstar_book.records.corpus.score` does, and writes
for each kind of pair and each position C, alpha*, and what every rival of q* costs beyond C.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray
from tqdm import tqdm

from qstar import rows
from qstar.solve import solve_kl_symmetry
from qstar.theory import mixtures

from .. import shipped_model
from ..files import write_json
from . import corpus as experiments
from . import made_with

LIKED = 10.0
"""A token is one-sided if one parent gives it more than so many times what the other gives it."""

DIGITS = 4
"""Significant digits of a recorded number."""

PLAIN, NESTED = ("chernoff", "alpha", "one_sided"), ("excess", "strayed", "forward")


@dataclass(frozen=True, slots=True, eq=False)
class Rivals:
    """q* and its rivals at every position of one kind of pair, in nats per token.

    Attributes:
        chernoff: C, which is what q* costs either parent. Shape (positions,).
        alpha: alpha*. Shape (positions,).
        one_sided: The mass of q* on tokens that one parent likes `LIKED` times more than the other.
            Shape (positions,).
        excess: Rival -> its larger divergence KL(q || parent), minus C. Shape (positions,).
        strayed: Rival -> KL(q* || q). Shape (positions,).
        forward: Distribution -> its larger forward divergence KL(parent || q), "q*" among them.
            Shape (positions,).
    """

    chernoff: ndarray
    alpha: ndarray
    one_sided: ndarray
    excess: Mapping[str, ndarray]
    strayed: Mapping[str, ndarray]
    forward: Mapping[str, ndarray]


def compare(log_policy: ndarray, log_teacher: ndarray) -> Rivals:
    """What q* and its rivals cost, position by position.

    The rivals: the geometric means at 0.5, 0.3 and 0.7 ("alpha 0.5" and so on), the arithmetic
    mixture with the weights alpha* and 1 - alpha* ("mixture alpha*"), the Jensen-Shannon midpoint
    ("midpoint"), and the mixtures that balance the reverse ("best mixture") and the forward
    divergences ("forward centre").

    Raises:
        ValueError: A row is not a normalised distribution, or the supports of a pair differ.
    """
    balance = solve_kl_symmetry(log_policy, log_teacher)
    log_q = rows.log_geometric_mean(log_policy, log_teacher, balance.alpha)
    rivals = {"q*": log_q}
    for alpha in (0.5, 0.3, 0.7):
        fixed = np.full(len(log_q), alpha)
        rivals[f"alpha {alpha:g}"] = rows.log_geometric_mean(log_policy, log_teacher, fixed)
    rivals["mixture alpha*"] = mixtures.log_mixture(log_policy, log_teacher, balance.alpha)
    rivals["midpoint"] = mixtures.log_mixture(log_policy, log_teacher, np.full(len(log_q), 0.5))
    rivals["best mixture"] = mixtures.reverse_mixture(log_policy, log_teacher)[1]
    rivals["forward centre"] = mixtures.forward_mixture(log_policy, log_teacher)[1]
    costs = {name: mixtures.cost(log_p, log_policy, log_teacher) for name, log_p in rivals.items()}
    one_sided = np.abs(rows.check_pair(log_policy, log_teacher).log_ratio) > np.log(LIKED)
    return Rivals(
        chernoff=balance.chernoff,
        alpha=balance.alpha,
        one_sided=(np.exp(log_q) * one_sided).sum(axis=-1),
        excess={name: costs[name].worse - balance.chernoff for name in rivals if name != "q*"},
        strayed={name: rows.kl(log_q, rivals[name]) for name in rivals if name != "q*"},
        forward={name: costs[name].worse_forward for name in rivals},
    )


def measure(
    model: Any,
    tokenizer: Any,
    corpus: experiments.Corpus,
    index: int,
    *,
    positions: int | None = None,
) -> dict[str, Rivals]:
    """`compare` at the first positions of one recorded answer (all, if None), by kind of pair."""
    pairs = experiments.read_pairs(model, tokenizer, corpus, index)
    return {
        kind: compare(*(log_p[:positions].double().log_softmax(-1).cpu().numpy() for log_p in pair))
        for kind, pair in pairs.items()
    }


def join(parts: Sequence[Rivals]) -> Rivals:
    """The positions of several answers, one after another."""
    return _from_tables(
        {
            name: np.concatenate([table[name] for table in map(_tables, parts)])
            for name in _tables(parts[0])
        }
    )


def _tables(rivals: Rivals) -> dict[str, ndarray]:
    """Every column of a `Rivals`, under one name: "chernoff", "excess: midpoint", ..."""
    plain = {name: getattr(rivals, name) for name in PLAIN}
    nested = {
        f"{table}: {name}": values
        for table in NESTED
        for name, values in getattr(rivals, table).items()
    }
    return plain | nested


def _from_tables(columns: Mapping[str, ndarray]) -> Rivals:
    nested: dict[str, dict[str, ndarray]] = {table: {} for table in NESTED}
    for label, values in columns.items():
        table, _, name = label.partition(": ")
        if name:
            nested[table][name] = values
    chernoff, alpha, one_sided = (columns[name] for name in PLAIN)
    return Rivals(chernoff, alpha, one_sided, **nested)


# --- The record ----------------------------------------------------------------------------------


def read(path: Path) -> tuple[dict[str, Rivals], dict[str, str]]:
    """(the rivals by kind of pair, how they were measured) of a record that `write` wrote."""
    record = json.loads(path.read_text(encoding="utf-8"))
    kinds = {
        kind: _from_tables({name: np.array(values) for name, values in columns.items()})
        for kind, columns in record["kinds"].items()
    }
    return kinds, record["made_by"]


def write(kinds: Mapping[str, Rivals], made_by: Mapping[str, str], path: Path) -> None:
    """Write a record as JSON, one column a line, complete or not at all."""
    entries = {
        kind: {
            name: [float(f"{value:.{DIGITS}g}") for value in values]
            for name, values in _tables(rivals).items()
        }
        for kind, rivals in kinds.items()
    }
    write_json(path, {"made_by": dict(made_by), "kinds": entries})


def command(*, out: Path) -> None:
    """`qstar-book record baselines`."""
    corpus = experiments.read_corpus(experiments.data_file("continuations.json"))
    model, tokenizer = shipped_model.load(corpus.model)
    parts: dict[str, list[Rivals]] = {}
    for index in tqdm(range(len(corpus.continuations)), "comparing", unit="answer"):
        for kind, rivals in measure(model, tokenizer, corpus, index).items():
            parts.setdefault(kind, []).append(rivals)
    read = {"model": corpus.model, "answers": "data/continuations.json"}
    made_by = read | made_with(model, "numpy")
    write({kind: join(found) for kind, found in parts.items()}, made_by, out)
    print(out)
