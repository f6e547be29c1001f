"""What is certain: the cases of `data/reference_cases.json`, and a solver with 60 digits."""

import json
from pathlib import Path

import mpmath
import numpy as np
from scipy.special import log_softmax

CASES = {
    case["id"]: case
    for case in json.loads(
        (Path(__file__).parents[2] / "data" / "reference_cases.json").read_text()
    )["cases"]
}


def cases(*families):
    """The ids of the reference cases of these families."""
    return [name for name, case in CASES.items() if case["family"] in families]


def number(text):
    """A decimal string of the file as float64; None stays None (undefined)."""
    return None if text is None else float(text)


def log_rows(name):
    """(log_policy, log_teacher) of a categorical case."""
    parameters = CASES[name]["parameters"]
    if "p_theta" in parameters and isinstance(parameters["p_theta"], list):
        with np.errstate(divide="ignore"):  # log 0 is -inf, and meant
            return tuple(
                np.log(np.array(parameters[side], dtype=float)) for side in ("p_theta", "p_t")
            )
    if isinstance(parameters.get("logits_theta"), list):
        return tuple(
            log_softmax(np.array(parameters[side], dtype=float))
            for side in ("logits_theta", "logits_t")
        )
    k = np.arange(50)
    if name == "cat50_zipf_1.0_vs_1.5_perm":
        return log_softmax(-np.log(k + 1.0)), log_softmax(-1.5 * np.log((7 * k) % 50 + 1.0))
    if name == "cat1000_logits":
        k = np.arange(1000)
        return (
            log_softmax(6 * np.sin(k / 3)),
            log_softmax(5 * np.sin(k / 3 + 0.4) + np.cos(k)),
        )
    raise KeyError(f"no recipe for the parameters of reference case {name}")


def exact_balance(log_policy, log_teacher):
    """(alpha*, C, q*) by bisection with 60 digits, from two rows of equal support as given.

    The rows are normalised again in mpmath, as the solvers do in their own precision.
    """
    with mpmath.workdps(60):
        p, r = ([mpmath.exp(float(x)) for x in row] for row in (log_policy, log_teacher))
        p, r = ([x / mpmath.fsum(row) for x in row] for row in (p, r))
        ratio = [mpmath.log(a / b) for a, b in zip(p, r, strict=True)]

        def path(alpha):
            return [a**alpha * b ** (1 - alpha) for a, b in zip(p, r, strict=True)]

        low, high = mpmath.mpf(0), mpmath.mpf(1)
        for _ in range(150):
            middle = (low + high) / 2
            falling = mpmath.fdot(path(middle), ratio) < 0
            low, high = (middle, high) if falling else (low, middle)
        z = mpmath.fsum(path(low))
        return float(low), float(-mpmath.log(z)), [float(x / z) for x in path(low)]
