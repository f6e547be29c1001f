"""Two packages that sample a product of two models, beside which the decoder is timed.

    pip install genlm-control==0.4.1
    pip install --no-deps flashspec==0.3.1

The book does not install them. `records.decoding` measures their ways where they are there, and
says of each way that it left out which package it wants.

genlm-control draws whole texts of a mean of two models by sequential Monte Carlo; a single particle
without resampling is drawn token by token, from the geometric mean with a fixed exponent, here one
half. It has no alpha*, and no drafts. flashspec decodes speculatively from one model: the product
(`product_model.ProductModel`), for which the policy and what stands in the text propose, by its own
strategy; or the policy alone, four tokens at a time.
"""

import asyncio
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qstar.rows_torch import log_geometric_mean

from ..product_model import ProductModel

PACKAGES = {
    "genlm-control, one half": "genlm-control",
    "flashspec": "flashspec",
    "flashspec, model drafts": "flashspec",
}
"""The ways, and the packages that they want."""


def of(
    way: str, policy: Any, teacher: Any, tokenizer: Any, prompts: Sequence[Tensor]
) -> tuple[Any, dict[str, Any]]:
    """(what decodes by one of these ways, what is said of it); None if its package is not there.

    Args:
        way: A key of `PACKAGES`.
        policy: A causal language model.
        teacher: Another, or the same.
        tokenizer: Of both.
        prompts: Both parents' token ids, after which distributions are compared. Shape (length,).
    """
    package = PACKAGES[way]
    if (found := version_of(package)) is None:
        return None, {"missing": f"{package} is not installed"}
    said: dict[str, Any] = {"package": package, "version": found}
    if package == "flashspec":
        return Flashspec(policy, teacher, alone=way.endswith("model drafts")), said
    mean = Genlm(policy, teacher, tokenizer)
    return mean, said | {"differs_by": mean.differs_by(prompts)}


def version_of(package: str) -> str | None:
    """The installed version of a package, if it is."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Genlm:
    """One sequence of the geometric mean of two models, with one half for the exponent.

    Args:
        policy: A causal language model.
        teacher: Another, or the same.
        tokenizer: Of both.
    """

    def __init__(self, policy: Any, teacher: Any, tokenizer: Any):
        from genlm.backend.llm import AsyncTransformer
        from genlm.control import PromptedLLM

        # A batch of one query: a forward pass begins at once, and does not wait for others.
        served = {id(m): AsyncTransformer(m, tokenizer, batch_size=1) for m in (policy, teacher)}
        self.served = [served[id(m)] for m in (policy, teacher)]
        words = self.served[0].byte_vocab
        said = [word.byte_string for word in words]
        # Some token must end its texts. This one is reserved, and next to never drawn.
        self.end = next(x for x in said if x.startswith(b"<") and said.count(x) == 1)
        self.ids = [word.token_id for word in words if word.byte_string != self.end]
        self.maps = [  # which take a tenth of a second to make
            PromptedLLM(model, eos_byte_strings=[self.end]).token_maps for model in self.served
        ]

    def decode(self, prompts: Sequence[Tensor], new_tokens: int, seed: int) -> dict[str, Any]:
        """How many tokens were drawn, and how far its first distribution is from ours."""
        torch.manual_seed(seed)
        np.random.seed(seed)  # which it draws from
        return asyncio.run(self._decode([prompt.tolist() for prompt in prompts], new_tokens))

    async def _decode(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        from genlm.control import direct_token_sampler

        for model in self.served:
            model.clear_cache()
        for model, prompt in zip(self.served, prompts, strict=True):
            model.cache_kv(prompt)
        mean = self._mean(prompts)
        drawn = await direct_token_sampler(mean).smc(
            n_particles=1,
            ess_threshold=0,
            max_tokens=new_tokens + 1,
            # Without a distribution after the last token, which would be one more than is needed.
            terminate_when=lambda drawn: len(drawn) == new_tokens,
        )
        (text,) = drawn.contexts
        return {"tokens": len(text) - 1}  # its last one is a mark

    def _mean(self, prompts: list[list[int]]) -> Any:
        from genlm.control import Ensemble, PromptedLLM

        potentials = [
            PromptedLLM(model, prompt_ids=prompt, token_maps=maps)
            for model, prompt, maps in zip(self.served, prompts, self.maps, strict=True)
        ]
        return Ensemble(*potentials, op="prod", a=0.5)

    def differs_by(self, prompts: Sequence[Tensor]) -> float:
        """Its distribution of the first token against ours: the largest gap of log q, in nats."""
        models = [served.model for served in self.served]
        with torch.no_grad():
            rows = [
                model(prompt[None]).logits[0, -1].double().log_softmax(-1)
                for model, prompt in zip(models, prompts, strict=True)
            ]
        half = rows[0].new_full((), 0.5)
        ours = log_geometric_mean(rows[0], rows[1], half)

        async def first() -> Any:
            return await self._mean([prompt.tolist() for prompt in prompts]).logw_next([])

        found = torch.as_tensor(np.asarray(asyncio.run(first()).weights, dtype=float))
        return float((found[:-1].log_softmax(-1) - ours[self.ids].log_softmax(-1)).abs().max())


class Flashspec:
    """Speculative decoding of the product by flashspec.

    Args:
        policy: A causal language model, which drafts.
        teacher: Another.
        alone: The policy drafts four tokens at a time; else a lookup proposes, too, and how many is
            up to the strategy that flashspec chooses by itself.
    """

    def __init__(self, policy: Any, teacher: Any, *, alone: bool = False):
        from flashspec import BanditConfig, FlashSpecConfig, SamplingConfig, SpeculativeEngine
        from flashspec.engine.hf_drafter import HuggingFaceDrafter
        from flashspec.engine.verifier import TargetModel

        device = policy.device
        drafter = HuggingFaceDrafter("policy", device, model=policy)
        product = TargetModel("product", device, model=ProductModel(policy, teacher))

        def engine(seed: int) -> Any:
            sampling = SamplingConfig(seed=seed)
            chosen: dict[str, Any] = {"sampling": sampling, "device": str(device)}
            if alone:
                chosen |= {"drafter_strategy": "bandit", "bandit": BanditConfig(n_arms=1)}
            config = FlashSpecConfig(**chosen, eos_token_ids=())
            return SpeculativeEngine(config, [drafter], product)

        self.engine, self.caches = engine, (drafter._kv, product._kv)

    def decode(self, prompts: Sequence[Tensor], new_tokens: int, seed: int) -> dict[str, Any]:
        """How many tokens were drawn."""
        policy_ids, teacher_ids = prompts
        assert torch.equal(policy_ids, teacher_ids), "a product reads one prompt"
        found = self.engine(seed).generate(policy_ids[None], max_new_tokens=new_tokens)
        assert all(cache.enabled for cache in self.caches), "flashspec reads without its caches"
        return {"tokens": int(found.n_tokens_generated)}
