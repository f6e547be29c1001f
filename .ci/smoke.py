"""Import the installed package and, asked to, decode once: `.ci/newest` runs it, unpinned.

python -P .ci/smoke.py [decode]
"""

import importlib
import importlib.metadata
import itertools
import pkgutil
import platform
import sys
from pathlib import Path

import numpy as np

import qstar
from qstar import families, gaussian
from qstar.families import experts

CHECKOUT = Path(__file__).resolve().parents[1]


def import_everything() -> list[str]:
    """Import every module; the names of those that need a package which is not installed."""
    out_of_reach = []
    for name in sorted(m.name for m in pkgutil.walk_packages(qstar.__path__, "qstar.")):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if str(error.name).split(".")[0] == "qstar":
                raise
            out_of_reach.append(name)
    return out_of_reach


def solve() -> None:
    log_policy, log_teacher = np.log([0.7, 0.2, 0.1]), np.log([0.2, 0.3, 0.5])
    balance = qstar.solve_kl_symmetry(log_policy, log_teacher)
    target = qstar.log_geometric_mean(log_policy, log_teacher, balance.alpha)
    distances = [qstar.kl(target, log_policy), qstar.kl(target, log_teacher)]
    np.testing.assert_allclose(distances, balance.chernoff, rtol=0, atol=1e-12)
    narrow, wide = gaussian.Gaussian(0.0, 1.0), gaussian.Gaussian(1.0, 4.0)
    one, other = (m.solve_kl_symmetry(narrow, wide) for m in (gaussian, families))
    np.testing.assert_allclose(one.alpha, other.alpha, rtol=0, atol=1e-9)
    assert experts.__name__ == "qstar.families.experts"


def decode() -> None:
    """Tokens from two tiny models, and alpha* of every token again from their whole text.

    By `generate`, from both kinds of caches, and through transformers.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from qstar.adapters.transformers import q_star
    from qstar.decoding import generate as decode

    def tiny(seed: int) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=32, num_hidden_layers=2, initializer_range=0.5, **sizes)
        return LlamaForCausalLM(config).double().eval()

    parents = tiny(0), tiny(1)
    ids = torch.tensor([[1, 2, 3]])
    asked = {"max_new_tokens": 12, "do_sample": True, "top_k": 0, "custom_generate": q_star}
    hooked = parents[0].generate(ids, teacher=parents[1], **asked)
    assert 3 < hooked.shape[1] <= 15  # it may end before
    kinds = itertools.product(("plain", "alternating"), ("dynamic", "static"))
    for scheme, kind in kinds:
        result = decode.generate(
            *parents,
            ids,
            ids,
            max_new_tokens=12,
            scheme=scheme,
            generator=0,
            eos_token_id=None,
            cache_implementation=kind,
        )
        text = torch.cat([ids, result.tokens], dim=1)
        with torch.no_grad():
            rows = [torch.log_softmax(m(text).logits[:, 2:-1], -1).numpy() for m in parents]
        whole = qstar.solve_kl_symmetry(*rows)
        found = result.trace.balance.alpha.numpy()
        np.testing.assert_allclose(found, whole.alpha, rtol=0, atol=1e-6)


def main(arguments: list[str]) -> None:
    here = Path(qstar.__file__).resolve()
    assert here.parents[1] != CHECKOUT, f"{here} is the checkout's, not an installed package"
    packages = ["numpy", "scipy"]
    out_of_reach = import_everything()
    solve()
    if "decode" in arguments:
        packages += ["torch", "transformers"]
        decode()
    else:
        print(f"Not imported, for want of packages that they need: {', '.join(out_of_reach)}.")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    works = ", ".join(["import", "solve", *arguments])
    print(f"Works: {works} (Python {platform.python_version()}, {versions}).")


if __name__ == "__main__":
    main(sys.argv[1:])
