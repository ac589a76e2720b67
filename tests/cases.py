"""Tiny models of every family, made by transformers, whose weights are large enough that every
norm, bias, soft cap, window and frequency changes the result."""

import numpy as np
import torch

SIZES = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
GPT2_SIZES = {"vocab_size": 67, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0,
        "original_max_position_embeddings": 16}  # fmt: skip
# name: class in transformers, its fields
CASES = {
    "gpt2": ("GPT2", GPT2_SIZES),
    "gpt2-untied": ("GPT2", GPT2_SIZES | {
        "tie_word_embeddings": False, "n_inner": 40, "activation_function": "gelu",
        "scale_attn_weights": False,
    }),
    "llama": ("Llama", SIZES | {"attention_bias": True, "mlp_bias": True}),
    "llama-3.1": ("Llama", SIZES | {
        "num_key_value_heads": 2, "head_dim": 12, "rope_parameters": LLAMA3,
        "tie_word_embeddings": True,
    }),
    "llama-yarn-scaled": ("Llama", SIZES | {"head_dim": 12, "rope_parameters": YARN | {
        "beta_fast": 6.0, "beta_slow": 0.5, "truncate": False, "attention_factor": 0.7,
    }}),
    "granite": ("Granite", SIZES | {
        "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True,
        "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2,
        "logits_scaling": 2.0, "tie_word_embeddings": True,
    }),
    "smollm3": ("SmolLM3", SIZES | {
        "num_key_value_heads": 2, "no_rope_layer_interval": 2, "rope_parameters": {
            "rope_type": "default", "rope_theta": 100.0,
        },
    }),
    "smollm3-untied": ("SmolLM3", SIZES | {
        "num_key_value_heads": 1, "no_rope_layers": [1, 0, 0], "tie_word_embeddings": False,
    }),
    "phi3": ("Phi3", SIZES | {"num_key_value_heads": 2, "sliding_window": 5}),
    "phi3-partial": ("Phi3", SIZES | {
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.75},
    }),
    "olmo2": ("Olmo2", SIZES | {"num_key_value_heads": 2}),
    "olmo2-biased": ("Olmo2", SIZES | {"attention_bias": True, "tie_word_embeddings": True}),
    "mistral": ("Mistral", SIZES | {"num_key_value_heads": 1, "sliding_window": 6}),
    "qwen2": ("Qwen2", SIZES | {
        "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 5,
        "max_window_layers": 1, "tie_word_embeddings": True,
    }),
    "qwen3": ("Qwen3", SIZES | {
        "num_key_value_heads": 2, "head_dim": 16, "attention_bias": True,
        "rope_parameters": YARN | {"original_max_position_embeddings": 4096},
    }),
    "gemma2": ("Gemma2", SIZES | {
        "num_key_value_heads": 2, "head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 7,
        "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0,
    }),
    "gemma2-untied": ("Gemma2", SIZES | {
        "num_key_value_heads": 4, "head_dim": 8, "attention_bias": True,
        "tie_word_embeddings": False, "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }),
    "gemma3": ("Gemma3Text", SIZES | {
        "num_key_value_heads": 2, "head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 7,
        "sliding_window_pattern": 2, "final_logit_softcapping": 4.0, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
        },
    }),
    "gemma3-untied": ("Gemma3Text", SIZES | {
        "num_key_value_heads": 1, "head_dim": 8, "attention_bias": True,
        "tie_word_embeddings": False,
    }),
    "gpt_neox": ("GPTNeoX", SIZES | {"rope_parameters": {"rope_theta": 100.0}}),
    "gpt_neox-sequential": ("GPTNeoX", SIZES | {
        "use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_fast",
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.5},
    }),
}  # fmt: skip


def make(case, directory):
    """transformers' model of a case, which also saves itself to `directory`."""
    import transformers

    name, fields = CASES[case]
    no_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = getattr(transformers, name + "Config")(**no_tokens | fields)
    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    theirs = getattr(transformers, name.removesuffix("Text") + suffix)(config).eval()
    theirs.set_attn_implementation("eager")  # Gemma-2's soft cap is in no other
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=rng))
            if p.dim() == 1 and key.endswith("weight") and not name.startswith("Gemma"):
                p.add_(1)
    theirs.save_pretrained(directory)
    return theirs


def batch(pad=3):
    """Tokens, the mask that transformers wants, and labels on the second half of each sample but
    the last, which has none. The first sample ends in padding."""
    rng = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 67, (4, 18), generator=rng)
    mask, labels = torch.ones_like(tokens), torch.full_like(tokens, -100)
    mask[0, 18 - pad :] = 0
    labels[:3, 9:] = tokens[:3, 9:]
    labels[1, 12:15] = -100
    return tokens, mask, labels.where(mask == 1, -100)


def example(dataset, i):
    """(tokens, labels) of a sample, which is stored with ~t where a token t has no loss."""
    stored = dataset.stored(i).astype("int64")
    return np.where(stored < 0, ~stored, stored), np.where(stored < 0, -100, stored)


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()
