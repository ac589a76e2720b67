"""Model families: what Hugging Face's config.json says of a model.

The families of READERS, at the end of this file, differ in fields of one `ModelConfig`. What would
change the result and is not supported is refused by name.

To add a family: write a reader of its config.json here and enter it in READERS; where its tensors'
names are not Llama's, enter them in MODULES and KEYS of pretrained.py; add a small model to
tests/cases.py.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple

from hf import Problems


class Rope(NamedTuple):
    """How a block turns queries and keys by their positions; see model.rope_tables."""

    theta: float
    kind: str = "default"
    numbers: tuple[float, ...] = ()  # those that ROPES names for the kind


@dataclass(frozen=True)
class ModelConfig:
    """A model's sizes and peculiarities. The defaults are Llama's."""

    family: str  # model_type in config.json
    vocab: int
    width: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_size: int
    hidden: int  # width of the MLP's inner layer
    max_positions: int
    tied: bool  # the head's weight is the embedding's
    windows: tuple[int | None, ...]  # of each block: how many positions attention reaches back
    ropes: tuple[Rope | None, ...]  # of each block
    norm: str = "rms"  # or "layer", or "rms+1": RMSNorm that multiplies by 1 + weight
    norm_eps: float = 1e-6
    activation: str = "silu"
    gated: bool = True  # down(act(gate(x)) * up(x)) rather than down(act(up(x)))
    qkv_bias: bool = False
    out_bias: bool = False  # of attention's output projection
    mlp_bias: bool = False
    qk_norm: str = ""  # RMSNorm on q and k: of each "head" (Qwen3), or of "all" as one (OLMo-2)
    pre_norms: bool = True  # norms before attention and MLP
    post_norms: bool = False  # norms after them (Gemma-2, OLMo-2)
    parallel: bool = False  # attention and MLP both read the block's input (GPT-NeoX)
    learned_positions: bool = False  # instead of rotary ones (GPT-2)
    rotary: int = 0  # R
    score_scale: float = 1.0  # of q·k; by default in config.json, 1/√H
    score_cap: float | None = None  # s -> cap tanh(s / cap) on attention's scores (Gemma-2)
    logit_cap: float | None = None  # the same on the logits
    embed_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and MLP add to the residual stream (Granite)
    logit_scale: float = 1.0
    eos_ids: tuple[int, ...] = ()
    ignored_dropout: tuple[str, ...] = ()  # non-zero dropout fields, which this model leaves out
    hf: dict = field(default_factory=dict, compare=False, repr=False)  # config.json itself

    @classmethod
    def from_hf(cls, config: dict) -> ModelConfig:
        """Read config.json as transformers 4 or 5 write it. Raises Problems, a line for every
        field whose effect is not supported or not known."""
        f = Fields(config)
        family, _, eos = f.get("model_type"), f.ids("bos_token_id"), f.ids("eos_token_id")
        if {"flags", "versions"} <= config.keys():
            raise ValueError("is of a run: its model is in the directory model beside it")
        if not isinstance(family, str) or family not in READERS:
            raise ValueError(f"model_type = {family!r}: supported are {', '.join(READERS)}")
        try:
            values = READERS[family](f)
        except (TypeError, AttributeError, ValueError, LookupError) as error:
            raise Problems([*f.problems, f"a field is of the wrong type ({error})"]) from None
        for key, value in config.items():  # what nobody asked for may change the result
            if value and key not in f.read and not NO_EFFECT.fullmatch(key):
                f.problems.append(f"{key} = {value!r}: not supported")
        if problems := f.problems or f.clashes:
            raise Problems(problems)
        values = {"score_scale": values["head_size"] ** -0.5} | values
        dropout = tuple(k for k, v in config.items() if DROPOUT.search(k) and v)
        return cls(family, eos_ids=eos, ignored_dropout=dropout, hf=dict(config), **values)


DROPOUT = re.compile("dropout|pdrop")
ACTIVATIONS = "silu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"

# Keys without effect on a forward pass: bookkeeping, initialisation, generation and classification
# settings that transformers 2 to 5 wrote into config.json; and dropout, which is never applied.
NO_EFFECT = re.compile("|".join("""
    .*dropout.* .*pdrop.* _.* .*_token_id .*_version output_.* summary_.* unsloth_.* .*_penalty
    architectures attn_implementation auto_map cache_implementation chunk_size_feed_forward
    custom_pipelines? dtype torch_dtype finetuning_task gradient_checkpointing id2label label2id
    num_labels initializer_range is_decoder is_llama_config max_sequence_length model_max_length
    n_ctx name_or_path predict_special_tokens prefix pretraining_tp problem_type
    reorder_and_upcast_attn return_dict task_specific_params tokenizer_class
    transformers.js_config use_cache use_flash_attention_2
    bad_words_ids begin_suppress_tokens do_sample early_stopping max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences temperature top_k top_p
    typical_p
""".split()))


class Fields:
    """config.json while it is read: remembers the keys asked for and collects problems; apart from
    them clashes between fields, which count only where each field is sound by itself."""

    def __init__(self, config: dict):
        self.config, self.read, self.problems, self.clashes = config, set(), [], []

    def get(self, key: str, default=None):
        """The value of a key, or `default` where the key is not there at all."""
        self.read.add(key)
        return self.config.get(key, default)

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer; `default` where it is missing or null."""
        value = self.get(key)
        return self.positive(key, default if value is None else value, (int,))

    def number(self, key: str, default: float, null: bool = False) -> float | None:
        """A positive number, or None where `null` permits it; `default` where it is missing."""
        value = self.get(key, default)
        return None if null and value is None else self.positive(key, value)

    def positive(self, key: str, value, kinds=(int, float)) -> float:
        """The value; or 1, and a problem, if it is no number of these kinds within its LIMITS."""
        above, most = LIMITS.get(key, (1e-30, 1e12) if float in kinds else (0, 2**20))
        if type(value) in kinds and above < value <= most:
            return value
        names = " or ".join(kind.__name__ for kind in kinds)
        self.problems.append(f"{key} = {value!r}: must be {names} above {above:g} and at most "
                             f"{most:g}")  # fmt: skip
        return 1

    def ids(self, key: str) -> tuple[int, ...]:
        """One id or several."""
        value = self.get(key)
        found = tuple(value) if isinstance(value, list) else () if value is None else (value,)
        if all(type(i) is int for i in found):
            return found
        self.problems.append(f"{key} = {value!r}: must be an id or ids")
        return ()

    def only(self, key: str, *allowed):
        """A value among `allowed`, the first of which stands for a missing key."""
        value = self.get(key, allowed[0])
        if value in allowed:
            return value
        self.problems.append(f"{key} = {value!r}: only {' or '.join(map(repr, allowed))}")
        return allowed[0]

    def bias(self, default: bool) -> dict:
        """Whether attention's projections have biases, where one field says so of all four."""
        bias = self.only("attention_bias", default, not default)
        return {"qkv_bias": bias, "out_bias": bias}

    def sizes(self, width: str, layers: str, heads: str, positions: str) -> dict:
        """The sizes under the names that a family gives them, with GPT-2's shape of attention."""
        D, n_layers, N = self.size(width), self.size(layers), self.size(heads)
        if D % N and not self.config.get("head_dim"):
            self.clashes.append(f"{width} = {D}: not a multiple of {heads} = {N}")
        return {
            "vocab": self.size("vocab_size"),
            "width": D,
            "n_layers": n_layers,
            "n_heads": N,
            "n_kv_heads": N,
            "head_size": max(D // N, 1),
            "max_positions": self.size(positions),
            "windows": (None,) * n_layers,
            "ropes": (None,) * n_layers,
        }

    def rope(self, values: dict, H: int, base: str, share: str, default: float = 1.0) -> dict:
        """How heads of size H are rotated, from the layout of transformers 4 or 5. `base` and
        `share` are the family's keys for theta and the rotated share of a head in version 4."""
        scaling, parameters = self.get("rope_scaling"), self.get("rope_parameters")
        if scaling and parameters:
            self.problems.append("rope_scaling and rope_parameters: only one of them may be there")
        rope, family = dict(scaling or parameters or {}), self.config.get("model_type")
        theta = rope.pop("rope_theta", None) or self.get(base) or THETAS.get(family, 10000.0)
        part = rope.pop("partial_rotary_factor", None) or self.get(share) or default
        self.only(base, theta, None)  # where version 5 kept the old key, the two agree
        self.only(share, part, None)
        theta, part = self.positive(base, theta), self.positive(share, part)
        if (rotary := int(H * part)) % 2:
            self.clashes.append(f"{rotary} rotated features in a head: must be even")
        made = Rope(theta, *self.scaled(rope, values["max_positions"]))
        return {"rotary": rotary, "ropes": (made,) * values["n_layers"]}

    def scaled(self, rope: dict, length: int) -> tuple[str, tuple[float, ...]]:
        """Kind and numbers of a Rope, from what is set beside theta in a model of `length`."""
        rest = dict(rope)
        kinds = {rest.pop(key, None) for key in ("rope_type", "type")} - {None, "default"}
        kind = next(iter(kinds), "default")
        takes = ROPES.get(kind, {})
        found = {key: rest.pop(key, None) or default for key, default in takes.items()}
        if ORIGINAL in takes:
            found[ORIGINAL] = self.get(ORIGINAL) or found[ORIGINAL] or length
        whole = kind != "yarn" or rest.pop("truncate", True)
        sound = all(type(x) in (int, float) and (x == 0 or 1e-6 < x < 1e12)
                    for x in found.values())  # fmt: skip
        if len(kinds) > 1 or kind not in ROPES or not sound or any(rest.values()):
            known = "; ".join(f"'{k}' {', '.join(names)}" for k, names in ROPES.items())
            self.problems.append(f"RoPE settings {rope}: supported are the types {known}")
            return "default", ()
        if kind == "yarn":
            size = found["attention_factor"] or 0.1 * math.log(max(found["factor"], 1)) + 1
            found |= {"attention_factor": size, "truncate": bool(whole)}
        return kind, tuple(found.values())

    def windows(self, window: int | None, sliding: list[bool]) -> tuple[int | None, ...]:
        """The window of each block, from layer_types, or from `sliding` where there is none."""
        types = self.get("layer_types")
        if types is not None:
            if len(types) != len(sliding) or set(types) - {"full_attention", "sliding_attention"}:
                self.clashes.append(f"layer_types = {types}: only 'full_attention' or "
                                    f"'sliding_attention' for each of {len(sliding)} blocks")
            sliding = [kind == "sliding_attention" for kind in types]
        if any(sliding) and not window:
            self.clashes.append("layer_types: 'sliding_attention' without a sliding_window")
        return tuple(window if s else None for s in sliding)


# Sizes and numbers of these names are above the first and up to the second; any other size is above
# 0 and up to 2^20, any other number above 10^-30 and up to 10^12.
LIMITS = dict.fromkeys(("n_layer", "num_hidden_layers"), (0, 1000)) | {
    "vocab_size": (0, 2**24), "n_positions": (0, 2**31), "max_position_embeddings": (0, 2**31),
    "rope_theta": (1, 1e12), "rotary_emb_base": (1, 1e12), "rope_local_base_freq": (1, 1e12),
    "partial_rotary_factor": (0, 1), "rotary_pct": (0, 1),
}  # fmt: skip
SIZES = "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"
ORIGINAL = "original_max_position_embeddings"  # by default the model's own length
THETAS = {"smollm3": 2_000_000.0, "gemma3_text": 1_000_000.0}  # where it is missing
# The fields of each kind of RoPE, with the values of those that may be missing or 0.
ROPES = {
    "default": {},
    "linear": {"factor": None},
    "llama3": {"factor": None, "low_freq_factor": None, "high_freq_factor": None, ORIGINAL: 0},
    "yarn": {"factor": None, ORIGINAL: 0, "beta_fast": 32, "beta_slow": 1, "attention_factor": 0},
}
# GPT-2 and GPT-NeoX have LayerNorms, and biases in an MLP without a gate.
PLAIN = {"norm": "layer", "gated": False, "mlp_bias": True}


def read_gpt2(f: Fields) -> dict:
    values = f.sizes("n_embd", "n_layer", "n_head", "n_positions")
    unscaled = {} if f.only("scale_attn_weights", True, False) else {"score_scale": 1.0}
    return values | PLAIN | unscaled | {
        "hidden": f.size("n_inner", 4 * values["width"]),
        "tied": f.only("tie_word_embeddings", True, False),
        "norm_eps": f.number("layer_norm_epsilon", 1e-5),
        "activation": f.only("activation_function", "gelu_new", *ACTIVATIONS),
        "qkv_bias": True,
        "out_bias": True,
        "learned_positions": True,
    }


def read_gpt_neox(f: Fields) -> dict:
    values = f.sizes(*SIZES)
    H = values["head_size"]
    rope = f.rope(values, H, "rotary_emb_base", "rotary_pct", 0.25)
    f.only("rope_theta", rope["ropes"][0].theta)  # also there in files of some versions
    f.only("partial_rotary_factor", rope["rotary"] / H)
    return values | PLAIN | rope | f.bias(True) | {
        "hidden": f.size("intermediate_size"),
        "tied": f.only("tie_word_embeddings", False, True),
        "norm_eps": f.number("layer_norm_eps", 1e-5),
        "activation": f.only("hidden_act", "gelu", *ACTIVATIONS),
        "parallel": f.only("use_parallel_residual", True, False),
    }


def read_llama_like(
    f: Fields, act="hidden_act", default="silu", tied=False, partial=False, eps=1e-6
) -> dict:
    """What the families from Llama on have in common. partial: not all of a head need be rotated"""
    values = f.sizes(*SIZES)
    N = values["n_heads"]
    H, K = f.size("head_dim", values["head_size"]), f.size("num_key_value_heads", N)
    if N % K:
        f.clashes.append(f"num_key_value_heads = {K}: does not divide num_attention_heads = {N}")
    rope = f.rope(values, H, "rope_theta", "partial_rotary_factor")
    if rope["rotary"] != H and not partial:
        f.clashes.append(f"partial_rotary_factor: only 1, not {rope['rotary']} of {H} features")
    return values | rope | {
        "head_size": H,
        "n_kv_heads": K,
        "hidden": f.size("intermediate_size"),
        "tied": f.only("tie_word_embeddings", tied, not tied),
        "norm_eps": f.number("rms_norm_eps", eps),
        "activation": f.only(act, default, *ACTIVATIONS),
    }


def read_llama(f: Fields, tied: bool = False) -> dict:
    values = read_llama_like(f, tied=tied)
    return values | f.bias(False) | {"mlp_bias": f.only("mlp_bias", False, True)}


def read_granite(f: Fields) -> dict:
    return read_llama(f) | {
        "embed_scale": f.number("embedding_multiplier", 1.0),
        "residual_scale": f.number("residual_multiplier", 1.0),
        "score_scale": f.number("attention_multiplier", 1.0),
        "logit_scale": 1 / f.number("logits_scaling", 1.0),
    }


def read_smollm3(f: Fields) -> dict:
    f.size("num_key_value_heads")
    f.only("use_sliding_window", False)
    f.read |= {"sliding_window", "max_window_layers"}  # which are then of no effect
    values, every = read_llama(f, tied=True), f.size("no_rope_layer_interval", 4)
    n_layers = values["n_layers"]
    turned = f.get("no_rope_layers") or [(i + 1) % every for i in range(n_layers)]  # 0: not
    if len(turned) < n_layers:
        f.clashes.append(f"no_rope_layers: has {len(turned)} entries for {n_layers} blocks")
    pairs = zip(values["ropes"], turned, strict=False)
    ropes = tuple(rope if turn else None for rope, turn in pairs)
    return values | {"windows": f.windows(None, [False] * n_layers), "ropes": ropes}


def read_phi3(f: Fields) -> dict:
    f.only("attention_bias", False)
    values = read_llama_like(f, partial=True, eps=1e-5)
    f.get(ORIGINAL)
    if values["ropes"][0].kind != "default":
        f.clashes.append("rope_scaling: of phi3 only the default is supported")
    window = f.number("sliding_window", None, null=True)
    return values | {"windows": (window,) * values["n_layers"]}


def read_olmo2(f: Fields) -> dict:
    values = read_llama_like(f, eps=1e-5)
    return values | f.bias(False) | {"qk_norm": "all", "pre_norms": False, "post_norms": True}


def read_mistral(f: Fields) -> dict:
    values = read_llama_like(f)
    window = f.number("sliding_window", 4096, null=True)
    return values | {"windows": (window,) * values["n_layers"]}


def read_qwen2(f: Fields) -> dict:
    values = read_llama_like(f)
    window, first = f.number("sliding_window", 4096, null=True), f.get("max_window_layers", 28)
    window = window if f.get("use_sliding_window") else None
    sliding = [window is not None and i >= first for i in range(values["n_layers"])]
    return values | {"windows": f.windows(window, sliding), "qkv_bias": True}


def read_qwen3(f: Fields) -> dict:
    f.size("head_dim")  # has a default of its own in transformers: better said than guessed
    return read_qwen2(f) | f.bias(False) | {"qk_norm": "head"}


def read_gemma2(f: Fields, every=2, score_cap=50.0, logit_cap=30.0) -> dict:
    """Every so many blocks one has no window."""
    f.size("head_dim")
    f.get("hidden_act")  # which transformers does not look at either
    values = read_llama_like(f, "hidden_activation", "gelu_pytorch_tanh", tied=True)
    window = f.number("sliding_window", 4096, null=True)
    f.only("sliding_window_size", window)
    return values | f.bias(False) | {
        "windows": f.windows(window, [(i + 1) % every > 0 for i in range(values["n_layers"])]),
        "norm": "rms+1",
        "post_norms": True,
        "score_scale": f.size("query_pre_attn_scalar", 256) ** -0.5,
        "score_cap": f.number("attn_logit_softcapping", score_cap, null=True),
        "logit_cap": f.number("final_logit_softcapping", logit_cap, null=True),
        "embed_scale": values["width"] ** 0.5,
    }


def read_gemma3(f: Fields) -> dict:
    f.only("attn_logit_softcapping", None)
    kinds = dict(f.get("rope_parameters") or {})  # version 5 has one for each kind of block
    full, near = (dict(kinds.pop(f"{kind}_attention", None) or {}) for kind in ("full", "sliding"))
    f.config = f.config | {"rope_parameters": full | kinds}
    values = read_gemma2(f, f.size("sliding_window_pattern", 6), None, None)
    theta = near.pop("rope_theta", None) or f.get("rope_local_base_freq") or 10000.0
    theta = f.positive("rope_local_base_freq", theta)
    rope = Rope(theta, *f.scaled(near, values["max_positions"]))
    pairs = zip(values["windows"], values["ropes"], strict=True)
    ropes = tuple(rope if window else far for window, far in pairs)
    return values | {"qk_norm": "head", "ropes": ropes}


READERS = {
    "gpt2": read_gpt2,
    "gpt_neox": read_gpt_neox,
    "llama": read_llama,
    "mistral": read_mistral,
    "qwen2": read_qwen2,
    "qwen3": read_qwen3,
    "gemma2": read_gemma2,
    "gemma3_text": read_gemma3,
    "phi3": read_phi3,
    "olmo2": read_olmo2,
    "granite": read_granite,
    "smollm3": read_smollm3,
}
