"""The reference cases that are not rows, as pairs of distributions of `qstar.families`."""

import re

import numpy as np
from reference import CASES

from qstar.families import (
    Bernoulli,
    Beta,
    Binomial,
    Cauchy,
    Dirichlet,
    Exponential,
    Gamma,
    Gaussian,
    GaussianMixture,
    Geometric,
    Laplace,
    Logistic,
    NegativeBinomial,
    Pareto,
    Poisson,
    Rayleigh,
    StudentT,
    Uniform,
    VonMises,
    Weibull,
)

NAMED = {  # how the cases of family `mixed` spell a distribution; N has a variance
    "N": lambda mean, variance: Gaussian(mean, variance),
    "Cauchy": Cauchy,
    "Laplace": Laplace,
    "Logistic": Logistic,
    "Exponential": Exponential,
    "Exp": Exponential,
    "Gamma": Gamma,
    "Uniform": Uniform,
    "U": Uniform,
    "Beta": Beta,
    "Poisson": Poisson,
}
MAKERS = {  # family -> a distribution from its parameters, suffixes _theta and _t taken off
    "gaussian": lambda g: Gaussian(floats(g["mu"]), floats(g["cov"])),
    "poisson": lambda g: Poisson(float(g["lambda"])),
    "bernoulli": lambda g: Bernoulli(float(g["p"])),
    "binomial": lambda g: Binomial(int(g["n"]), float(g["p"])),
    "geometric": lambda g: Geometric(float(g["p"])),
    "negative_binomial": lambda g: NegativeBinomial(float(g["r"]), float(g["p"])),
    "exponential": lambda g: Gamma(float(g["shape"]), float(g["rate"])),
    "gamma": lambda g: Gamma(float(g["shape"]), float(g["rate"])),
    "beta": lambda g: Beta(float(g["a"]), float(g["b"])),
    "dirichlet": lambda g: Dirichlet(floats(g["alpha"])),
    "weibull": lambda g: Weibull(float(g["shape"]), float(g["scale"])),
    "rayleigh": lambda g: Rayleigh(float(g["scale"])),
    "pareto": lambda g: Pareto(float(g["alpha"]), float(g["xmin"])),
    "laplace": lambda g: Laplace(float(g["loc"]), float(g["scale"])),
    "cauchy": lambda g: Cauchy(float(g["loc"]), float(g["scale"])),
    "logistic": lambda g: Logistic(float(g["loc"]), float(g["scale"])),
    "student_t": lambda g: StudentT(float(g["nu"]), float(g.get("loc", 0)), float(g["scale"])),
    "von_mises": lambda g: VonMises(float(g["kappa"]), float(g["mu"])),
    "mixed": lambda g: named(g["distribution"]),
    "gaussian_mixture_1d": lambda g: GaussianMixture(
        floats(g["distribution"]["w"]),
        [
            Gaussian(float(mean), float(variance))
            for mean, variance in zip(
                g["distribution"]["mu"], g["distribution"]["var"], strict=True
            )
        ],
    ),
}
MAKERS |= {f"gaussian_{dimension}": MAKERS["gaussian"] for dimension in ("1d", "2d", "nd")}
NAMES = [name for name, case in CASES.items() if case["family"] in MAKERS]


def floats(strings):
    return np.array(strings, dtype=float)


def named(text):
    """A distribution from a string like `N(0,1)`."""
    name, arguments = re.fullmatch(r"(\w+)\((.*)\)", text.replace(" ", "")).groups()
    return NAMED[name](*map(float, arguments.split(",")))


def pair(name):
    """(policy, teacher) of a reference case."""
    case = CASES[name]
    return tuple(MAKERS[case["family"]](side(case["parameters"], end)) for end in ("theta", "t"))


def side(parameters, end):
    """One parent's parameters, and those that both share."""
    found = {}
    for key, value in parameters.items():
        if key == end:
            found["distribution"] = value
        elif key.endswith(f"_{end}"):
            found[key.removesuffix(f"_{end}")] = value
        elif not key.endswith(("_theta", "_t")) and key not in ("theta", "t"):
            found[key] = value
    return found
