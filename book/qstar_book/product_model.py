"""Two language models as one whose logits are log q*: the baseline that transformers can sample.

    product = ProductModel(policy, teacher)
    product.generate(ids, do_sample=True)                               # two forwards a token
    with drafting(policy, gamma=4):
        product.generate(ids, do_sample=True, assistant_model=policy)   # speculative
    product.generate(ids, do_sample=True, prompt_lookup_num_tokens=4)   # n-grams of the text

All of it is transformers' own code but for one forward, so it is what a careful user could have
without `qstar.generate`: a peer to compare speeds with, and an independent implementation to test
against. It knows one prompt for both parents, and assisted decoding knows one row at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from qstar.rows_torch import log_geometric_mean, solve_kl_symmetry

_KNOWN = {field.name for field in fields(CausalLMOutputWithPast)}
CACHE = "cache" if "cache" in _KNOWN else "past_key_values"
"""What transformers calls a model's cache, which a forward takes and gives back."""


class ProductConfig(PreTrainedConfig):
    """What `generate` must know of a product: its vocabulary, and the layers of its cache."""

    model_type = "qstar_product"
    vocab_size: int = 0
    num_hidden_layers: int = 0
    layer_types: list[str] | None = None


class ProductModel(PreTrainedModel, GenerationMixin):
    """Two causal language models as one: its logits are log q_alpha, normalised.

    Both parents read every token after the same prompt. One cache holds the policy's layers and
    then the teacher's, so that whatever crops, reorders or repeats it treats both alike. The
    parents are shared, not copied, and put into eval mode. Where they share no token, or a model
    answers nan, a forward raises.

    Its generation config takes the policy's special tokens (ids outside the vocabulary are left
    out) and no other default, neither the policy's nor the top_k=50 of transformers:
    `do_sample=True` draws from q_alpha itself. (To a greedy call transformers remarks that it
    ignores top_k.)

    Args:
        policy: A causal language model of transformers, with full attention in every layer.
        teacher: Another one, with the same vocabulary and on the same device.
        alpha: The exponent on the policy. None solves for alpha* at each position; a number in
            [0, 1] fixes it.

    Raises:
        ValueError: The two models are one, have another vocabulary or device, or keep caches that
            are not plain lists of keys and values.

    Source: the geometric mean as in the analysis, problem 1; its speculative forms are those of
        transformers (Leviathan et al., 2023; prompt lookup).
    """

    main_input_name = "input_ids"
    _supports_sdpa = True  # of its own it has no attention

    def __init__(self, policy: Any, teacher: Any, *, alpha: float | None = None):
        configs = [model.config.get_text_config(decoder=True) for model in (policy, teacher)]
        _check_parents(policy, teacher, configs)
        if alpha is not None and not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be None or a number in [0, 1]: got {alpha!r}.")
        layers = [config.num_hidden_layers for config in configs]
        vocab = _vocab(policy)
        super().__init__(
            ProductConfig(
                vocab_size=vocab,
                num_hidden_layers=sum(layers),
                layer_types=["full_attention"] * sum(layers),
                is_encoder_decoder=False,
            )
        )
        self.generation_config = GenerationConfig(
            **{name: _inside(policy, name, vocab) for name in SPECIAL_TOKENS},
            temperature=1.0,
            top_k=0,
            top_p=1.0,
        )
        self.policy, self.teacher, self.alpha = policy, teacher, alpha
        self._layers: list[int] = layers
        self.eval()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        cache: DynamicCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """log q_alpha after each of the last `logits_to_keep` tokens; after all of them for 0.

        The cache is given by the name that transformers knows it by: `cache` since 5.24.

        Raises:
            ValueError: q_alpha does not exist at a position, or something was asked for that a
                product has not (hidden states, attentions, losses).
        """
        asked = sorted(name for name, value in others.items() if value and name != "return_dict")
        if asked:
            raise ValueError(f"a product of two models has no {', '.join(asked)}: leave them out.")
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        rows = []
        for parent, view in zip((self.policy, self.teacher), self._views(cache), strict=True):
            options: dict[str, Any] = {CACHE: view, "use_cache": view is not None}
            if parent._supports_logits_to_keep():
                options["logits_to_keep"] = logits_to_keep
            logits = parent(
                input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **options,
            ).logits
            wide = torch.promote_types(logits.dtype, torch.float32)
            rows.append(logits[:, -logits_to_keep:].log_softmax(-1, dtype=wide))
        answer: dict[str, Any] = {"logits": self._log_q(*rows), CACHE: cache}
        return CausalLMOutputWithPast(**answer)

    def _log_q(self, log_policy: Tensor, log_teacher: Tensor) -> Tensor:
        if self.alpha is None:
            alpha = solve_kl_symmetry(log_policy, log_teacher, validate=False).alpha
        else:
            alpha = log_policy.new_full(log_policy.shape[:-1], self.alpha)
        log_q = log_geometric_mean(log_policy, log_teacher, alpha)
        nowhere = log_q[..., 0].isnan()  # a row is nan as a whole or not at all
        if bool(nowhere.any()):
            row, position = nowhere.nonzero()[0].tolist()
            raise ValueError(
                f"q* does not exist after position {position} of row {row} of this forward: a "
                f"model answered nan, or policy and teacher share no token."
            )
        return log_q

    def _views(self, cache: DynamicCache | None) -> tuple[DynamicCache | None, DynamicCache | None]:
        """The policy's and the teacher's part of one cache, each counted from its layer 0.

        The layers are shared: what a parent appends to its part is appended to the whole.
        """
        if cache is None:
            return None, None
        first, second = self._layers
        if not cache.layers:
            cache.layers.extend(DynamicLayer() for _ in range(first + second))
        if {type(layer) for layer in cache.layers} != {DynamicLayer} or (
            len(cache.layers) != first + second
        ):
            raise ValueError(
                f"a product of two models needs a DynamicCache of its own, with {first + second} "
                f"plain layers ({first} of the policy, {second} of the teacher): got "
                f"{type(cache).__name__} with {len(cache.layers)} layers. Leave "
                f"{CACHE} and cache_implementation out."
            )
        parts = DynamicCache(), DynamicCache()
        parts[0].layers, parts[1].layers = cache.layers[:first], cache.layers[first:]
        return parts


@contextmanager
def drafting(assistant: Any, gamma: int) -> Iterator[None]:
    """Let a model draft gamma tokens a round as an `assistant_model`, inside a `with` block.

    transformers reads that from the assistant's generation config. Its own defaults would draft up
    to 20 tokens, and stop where the assistant is unsure of one.
    """
    if gamma < 1:
        raise ValueError(f"gamma must be a number of draft tokens, 1 or more: got {gamma!r}.")
    settings = {
        "num_assistant_tokens": gamma,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    config = assistant.generation_config
    before = {name: getattr(config, name) for name in settings}
    try:
        config.update(**settings)
        yield
    finally:
        config.update(**before)


SPECIAL_TOKENS = "bos_token_id", "eos_token_id", "pad_token_id"


def _inside(model: Any, name: str, vocab: int) -> int | list[int] | None:
    """The ids of a special token of the model that are in the vocabulary; None without any."""
    ids = getattr(model.generation_config, name, None)
    if isinstance(ids, list | tuple):
        return [i for i in ids if 0 <= i < vocab] or None
    return ids if ids is not None and 0 <= ids < vocab else None


def _vocab(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


def _check_parents(policy: Any, teacher: Any, configs: list[Any]) -> None:
    if policy is teacher:
        raise ValueError(
            "policy and teacher are one model, and here both read one prompt, so that q* would be "
            "the model itself. One model under two prompts is what qstar.generate does."
        )
    if _vocab(policy) != _vocab(teacher):
        raise ValueError(
            f"policy and teacher must share one vocabulary: the policy gives probabilities to "
            f"{_vocab(policy)} tokens, the teacher to {_vocab(teacher)}."
        )
    if policy.device != teacher.device:
        raise ValueError(
            f"policy and teacher must be on one device: got {policy.device} and {teacher.device}."
        )
    for name, model, config in zip(("policy", "teacher"), (policy, teacher), configs, strict=True):
        kinds = {type(layer) for layer in DynamicCache(config=config).layers}
        if model.config.is_encoder_decoder or kinds != {DynamicLayer}:
            raise ValueError(
                f"both parents must be decoders with full attention in every layer, whose caches "
                f"roll back exactly: the {name} ({type(model).__name__}) keeps "
                f"{', '.join(sorted(kind.__name__ for kind in kinds))}."
            )
