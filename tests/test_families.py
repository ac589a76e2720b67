"""What config.json says, in the words of transformers 4 and 5, and what of it is refused."""

import json
from pathlib import Path

import pytest
import torch

from hf.families import ModelConfig
from model import parameter_shapes
from tests.cases import CASES, GPT2_SIZES, SIZES

MODELS = json.loads(Path(__file__).with_name("models.json").read_text())
LLAMA, GPT2 = {"model_type": "llama"} | SIZES, {"model_type": "gpt2"} | GPT2_SIZES


@pytest.mark.parametrize("case", CASES)
def test_config_of_transformers_4_is_that_of_transformers_5(case, checkpoint):
    new = json.loads((checkpoint(case)[1] / "config.json").read_text())
    old = {key: value for key, value in new.items() if key not in ("layer_types", "dtype")}
    rope = dict(old.pop("rope_parameters", {}))
    if case.startswith("gemma3"):
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    if case.startswith("gpt_neox"):
        old["rotary_emb_base"] = old["rope_theta"] = rope["rope_theta"]
        old["rotary_pct"] = old["partial_rotary_factor"] = rope["partial_rotary_factor"]
    elif rope:
        old["rope_theta"], kind = rope.pop("rope_theta"), rope["rope_type"]
        old["partial_rotary_factor"] = rope.pop("partial_rotary_factor", 1.0)
        old["rope_scaling"] = None if kind == "default" else rope | {"type": kind}
    old["torch_dtype"] = "float16"
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)
    assert ModelConfig.from_hf(old).hf == old


def test_config_reads_token_ids_and_dropout_and_ignores_what_is_off_or_harmless():
    fields = {"num_local_experts": None, "use_mrope": False, "transformers_version": "4.40.0",
              "_attn_implementation_autoset": True, "_attn_implementation": "eager",
              "attn_implementation": "sdpa", "custom_pipelines": {"x": {}}, "custom_pipeline": "x",
              "max_sequence_length": 4096, "auto_map": {"AutoConfig": "x.Y"}}  # fmt: skip
    ids = {"eos_token_id": [3, 4], "bos_token_id": 1}
    config = ModelConfig.from_hf(LLAMA | fields | ids | {"attention_dropout": 0.1})
    assert config.eos_ids == (3, 4)
    assert config.ignored_dropout == ("attention_dropout",)
    assert ModelConfig.from_hf(LLAMA | fields) == ModelConfig.from_hf(LLAMA)


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["'dynamic'"]),
        ({"rope_scaling": {"type": "linear"}}, ["'linear'"]),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, ["'yarn'"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "long_factor": [1.0]}}, ["long_factor"]),
        ({"rope_scaling": {"type": "yarn", "factor": "2"}}, ["'yarn'"]),
        ({"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2.0}}, ["phi3"]),
        ({"model_type": "phi3", "attention_bias": True}, ["attention_bias"]),
        ({"model_type": "smollm3", "num_key_value_heads": 2, "no_rope_layers": [1]},
         ["no_rope_layers"]),
        ({"model_type": "smollm3", "use_sliding_window": True},
         ["num_key_value_heads", "use_sliding_window"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 0.7}}, ["mscale"]),
        ({"model_type": "gemma3_text", "head_dim": 8, "use_bidirectional_attention": True},
         ["use_bidirectional_attention"]),
        ({"model_type": "gemma3_text", "head_dim": 8, "rope_parameters": {"far": {"factor": 2}}},
         ["far"]),
        ({"logits_scaling": 2.0}, ["logits_scaling"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["'llama3'"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ["full_attention"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 1e4}}, ["rope_theta"]),
        ({"rope_scaling": {"rope_theta": 5.0}, "rope_parameters": {"factor": 2}}, ["only one"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"num_local_experts": 8, "hidden_act": "relu"}, ["num_local_experts", "hidden_act"]),
        ({"some_new_thing": 3, "hidden_size": "32"}, ["some_new_thing", "hidden_size"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads"]),
        ({"num_attention_heads": 5}, ["num_attention_heads"]),
        ({"model_type": "mamba"}, ["mamba"]),
        ({"rope_theta": "1e4", "rms_norm_eps": None}, ["rope_theta", "rms_norm_eps"]),
        ({"vocab_size": 10**30, "hidden_size": 2**40, "num_hidden_layers": 10**9,
          "rms_norm_eps": 1e-308, "bos_token_id": {"id": 1}, "eos_token_id": [1.5]},
         ["at most 1.67772e+07", "at most 1.04858e+06", "at most 1000", "above 1e-30",
          "bos_token_id = {'id': 1}: must be an id or ids", "eos_token_id = [1.5]: must be"]),
        ({"rope_parameters": [1]}, ["wrong type"]),
        ({"layer_types": 7}, ["layer_types"]),
        ({"rope_scaling": "linear"}, ["wrong type"]),
        ({"model_type": "qwen2", "sliding_window": "8"}, ["sliding_window"]),
        ({"eos_token_id": "</s>"}, ["eos_token_id"]),
        ({"sliding_window": 8}, ["sliding_window"]),
        ({"num_hidden_layers": None}, ["num_hidden_layers"]),
        ({"model_type": []}, ["model_type"]),
        ({"model_type": "gemma2", "head_dim": 8, "use_bidirectional_attention": True},
         ["use_bidirectional_attention"]),
        (GPT2 | SIZES, list(SIZES)[1:]),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
        (GPT2 | {"add_cross_attention": True}, ["add_cross_attention"]),
        (GPT2 | {"activation_function": "relu"}, ["activation_function"]),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, ["layer_types"]),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3}, ["sliding_window"]),
        ({"model_type": "gpt_neox", "rope_theta": 5.0}, ["rope_theta"]),
        ({"model_type": "gpt_neox", "rotary_pct": 0.15}, ["rotated"]),
        ({"model_type": "gpt_neox", "rotary_pct": 0.5,
          "rope_parameters": {"partial_rotary_factor": 0.25}}, ["rotary_pct"]),
    ],  # fmt: skip
)
def test_config_names_every_field_it_does_not_support(fields, named):
    with pytest.raises(ValueError) as error:
        ModelConfig.from_hf(fields if fields.get("model_type") == "gpt2" else LLAMA | fields)
    lines = str(error.value).splitlines()
    assert len(lines) == len(named)
    assert all(any(name in line for line in lines) for name in named)


# How many parameters a model has, and what its config.json on the hub says, but for bookkeeping and
# what tests/models.json has.
HUB = {
    "GPT-2": (124_439_808, {
        "activation_function": "gelu_new", "attn_pdrop": 0.1, "embd_pdrop": 0.1,
        "layer_norm_epsilon": 1e-05, "resid_pdrop": 0.1, "summary_activation": None,
        "summary_first_dropout": 0.1, "summary_use_proj": True}),
    "LLaMA-3-8B": (8_030_261_248, {  # the fields of 3.1
        "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "mlp_bias": False,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"}}),
    "LLaMA-3-70B": (70_553_706_496, {}),
    "Mistral-7B-v0.1": (7_241_732_096, {
        "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "sliding_window": 4096,
        "vocab_size": 32000}),
    "Qwen2.5-0.5B": (494_032_768, {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "max_window_layers": 24, "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "sliding_window": 32768,
        "tie_word_embeddings": True, "use_mrope": False, "vocab_size": 151936}),
    "Qwen-2.5-32B": (32_763_876_352, {}),
    "Yi-34B": (34_388_917_248, {"rope_scaling": None, "tie_word_embeddings": False}),
    "Gemma-2-9B": (9_241_705_984, {
        "attention_bias": False, "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "sliding_window_size": 4096}),
    "GPT-NeoX-20B": (20_554_567_680, {
        "attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0, "layer_norm_eps": 1e-05,
        "rotary_emb_base": 10000}),
    "Gemma-3-1B": (999_885_952, {
        "model_type": "gemma3_text", "attn_logit_softcapping": None, "head_dim": 256,
        "cache_implementation": "hybrid", "final_logit_softcapping": None,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
        "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26,
        "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
        "sliding_window_pattern": 6, "vocab_size": 262144}),
    "Phi-3-mini-4k": (3_821_079_552, {
        "model_type": "phi3", "attention_bias": False, "auto_map": {"AutoConfig": "phi3.Config"},
        "embd_pdrop": 0.0, "hidden_size": 3072, "intermediate_size": 8192, "sliding_window": 2047,
        "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "original_max_position_embeddings": 4096, "rope_scaling": None,
        "tie_word_embeddings": False, "vocab_size": 32064}),
    "OLMo-2-7B": (7_298_617_344, {
        "model_type": "olmo2", "hidden_size": 4096, "intermediate_size": 11008,
        "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "rope_theta": 500000, "tie_word_embeddings": False,
        "vocab_size": 100352}),
    "Granite-3.1-2B": (2_533_531_648, {
        "model_type": "granite", "attention_multiplier": 0.015625, "embedding_multiplier": 12.0,
        "hidden_size": 2048, "intermediate_size": 8192, "logits_scaling": 8.0,
        "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 40,
        "num_key_value_heads": 8, "residual_multiplier": 0.22, "rope_theta": 5000000.0,
        "tie_word_embeddings": True, "vocab_size": 49155}),
    "SmolLM3-3B": (3_075_098_624, {
        "model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008,
        "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536,
        "max_window_layers": 28, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9,
        "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4,
        "rope_theta": 5000000.0, "sliding_window": None, "use_sliding_window": False,
        "vocab_size": 128256}),
    "Qwen3-0.6B": (596_049_920, {
        "model_type": "qwen3", "head_dim": 128, "hidden_size": 1024, "intermediate_size": 3072,
        "max_position_embeddings": 40960, "max_window_layers": 28, "num_attention_heads": 16,
        "num_hidden_layers": 28, "num_key_value_heads": 8, "rope_theta": 1000000,
        "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False,
        "vocab_size": 151936}),
}  # fmt: skip
BOOKKEEPING = {
    "architectures": ["SomethingForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.02, "n_ctx": 1024, "predict_special_tokens": True, "pretraining_tp": 1,
    "summary_type": "cls_index", "torch_dtype": "float16", "transformers_version": "4.19.0.dev0",
    "task_specific_params": {"text-generation": {"max_length": 50}}, "use_cache": True,
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_published_models_have_their_published_number_of_parameters(name):
    n_parameters, fields = HUB[name]
    config = ModelConfig.from_hf(BOOKKEEPING | MODELS.get(name, {}) | fields)
    shapes = parameter_shapes(config).values()
    assert sum(torch.Size(shape).numel() for shape in shapes) == n_parameters
