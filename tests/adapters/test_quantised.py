"""Weights that are quantised as they are read: what is decoded is the quantised pair, exactly."""

import pytest
import tiny
import torch
from tokenizers_of_all_kinds import byte_level
from transformers import QuantoConfig

from qstar import generate, log_geometric_mean, solve_kl_symmetry
from qstar.adapters import checkpoints

SCHEMES = {
    "plain": {"scheme": "plain"},
    "one-sided": {"scheme": "one-sided", "drafter": "policy", "gamma": 3},
    "alternating": {"scheme": "alternating", "gamma": 2},
    "coin": {"scheme": "coin"},
    "lookup": {"scheme": "lookup", "gamma": 3},
}
PROMPT, TEACHER_PROMPT = torch.tensor([5, 6, 7, 5, 6]), torch.tensor([9, 5, 6])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("policy", 1), ("teacher", 2)):
        tiny.llama(seed, vocab=len(byte_level()), dtype=torch.float32).save_pretrained(root / name)
        byte_level().save_pretrained(root / name)
    return root / "policy", root / "teacher"


@pytest.fixture(scope="module")
def quantised(folders):
    return checkpoints.load_pair(*folders, quantization_config=QuantoConfig(weights="int8"))


def log_p(pair, tokens):
    """Both distributions of each token, by one forward over the whole text."""
    return [
        checkpoints.log_distributions(model, prompt, tokens)
        for model, prompt in ((pair.policy, PROMPT), (pair.teacher, TEACHER_PROMPT))
    ]


def farthest(found, expected):
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


def test_weights_are_quantised_as_they_are_read(folders, quantised):
    plain = checkpoints.load_pair(*folders)
    tokens = torch.tensor([8, 9, 10])
    apart = farthest(log_p(quantised, tokens), log_p(plain, tokens))
    assert 1e-4 < apart < 0.5
    layer = quantised.policy.model.layers[0].mlp.up_proj.weight
    assert layer.dequantize().unique().numel() <= 255 * layer.shape[0]
    assert type(layer).__name__ == "WeightQBytesTensor"


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_every_scheme_reads_the_quantised_pair_as_whole_texts_do(folders, quantised, scheme):
    out = generate(
        quantised.policy,
        quantised.teacher,
        PROMPT,
        TEACHER_PROMPT,
        max_new_tokens=16,
        generator=0,
        eos_token_id=None,
        **scheme,
    )

    def said(pair):
        ours, theirs = log_p(pair, out.tokens)
        mean = log_geometric_mean(ours, theirs, solve_kl_symmetry(ours, theirs).alpha)
        return [x.gather(-1, out.tokens[:, None])[:, 0] for x in (ours, theirs, mean)]

    trace = [getattr(out.trace, f"log_{name}") for name in ("policy", "teacher", "target")]
    assert farthest(trace, said(quantised)) < 1e-4
    assert farthest(trace, said(checkpoints.load_pair(*folders))) > 1e-3  # the control


def test_an_adapter_is_not_merged_into_quantised_weights(folders, tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        f'{{"base_model_name_or_path": "{folders[0]}", "r": 1, "lora_alpha": 1}}'
    )
    with pytest.raises(ValueError, match="merge it first, save the model, and load that"):
        checkpoints.load(tmp_path, quantization_config=QuantoConfig(weights="int8"))
