"""Tiny causal language models, made on the spot and seeded, for tests of decoding."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


def llama(seed, *, vocab=7, sharpness=1.0, window=64, eos=None, dtype=torch.float64):
    """RoPE, grouped queries, RMS norm. A LlamaConfig ends with token 2 unless told otherwise."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=window,
            initializer_range=0.5,
            bos_token_id=None,
            eos_token_id=eos,
            pad_token_id=None,
        )
    )
    return finished(model, sharpness, dtype)


def gpt2(seed, *, vocab=7, sharpness=1.0, window=64, eos=None, dropout=0.0, dtype=torch.float64):
    """Learned positions, layer norm. A GPT2Config ends with token 50256 unless told otherwise."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_inner=16,
            activation_function="relu",
            n_positions=window,
            initializer_range=0.5,
            bos_token_id=None,
            eos_token_id=eos,
            pad_token_id=None,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            tie_word_embeddings=False,
        )
    )
    return finished(model, sharpness, dtype)


def finished(model, sharpness, dtype):
    with torch.no_grad():
        model.get_output_embeddings().weight *= sharpness
    return model.to(dtype).eval()
