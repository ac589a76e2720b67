"""Checkpoints in Hugging Face's format: found, checked, read and written.

A checkpoint is a directory of config.json, safetensors and a tokenizer's files, local or the hub's.
Its tensors are streams of (name, full CPU tensor) in both directions, so that a sharded model is
filled and saved by the same functions, one tensor at a time. Names and layout are ours on this
side, the family's in the files: see MODULES and KEYS, which name Llama's for any other family.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf import Problems, open_regular, read_json
from hf.families import READERS, ModelConfig

Named = Iterable[tuple[str, Tensor]]  # a stream of (name, full CPU tensor)

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
OTHERS = {  # what is taken for a model, and what to do
    "adapter_config.json": "of a LoRA adapter, not of a model: load it and its base with peft, "
                           "merge_and_unload them, and save_pretrained the result",
    "*.gguf": "a GGUF file, for llama.cpp: take the safetensors that it was made from",
}  # fmt: skip
WANTED = [
    CONFIG, INDEX, "model*.safetensors", "tokenizer*", "special_tokens_map.json", "chat_template*",
    "generation_config.json", "adapter_config.json",
]
# Buffers that old checkpoints carry along.
EXTRA_KEYS = re.compile(r"\b(attn|attention)\.(masked_)?bias$|\brotary_emb\.inv_freq$")
FLOATS = "F64", "F32", "F16", "BF16"

# Our modules -> those of GPT-2, of GPT-NeoX, and of Llama and its line.
MODULES = {
    "embed": ("transformer.wte", "gpt_neox.embed_in", "model.embed_tokens"),
    "embed.positions": ("transformer.wpe", None, None),
    "blocks.{}": ("transformer.h.{}", "gpt_neox.layers.{}", "model.layers.{}"),
    "norm": ("transformer.ln_f", "gpt_neox.final_layer_norm", "model.norm"),
    "head": ("lm_head", "embed_out", "lm_head"),
    # in a block
    "attn_norm": ("ln_1", "input_layernorm", "input_layernorm"),
    "attn.q": ("attn.c_attn", "attention.query_key_value", "self_attn.q_proj"),
    "attn.k": ("attn.c_attn", "attention.query_key_value", "self_attn.k_proj"),
    "attn.v": ("attn.c_attn", "attention.query_key_value", "self_attn.v_proj"),
    "attn.q_norm": (None, None, "self_attn.q_norm"),
    "attn.k_norm": (None, None, "self_attn.k_norm"),
    "attn.o": ("attn.c_proj", "attention.dense", "self_attn.o_proj"),
    "mlp_norm": ("ln_2", "post_attention_layernorm", "post_attention_layernorm"),
    "mlp.gate": (None, None, "mlp.gate_proj"),
    "mlp.up": ("mlp.c_fc", "mlp.dense_h_to_4h", "mlp.up_proj"),
    "mlp.down": ("mlp.c_proj", "mlp.dense_4h_to_h", "mlp.down_proj"),
}
GPT2, GPT_NEOX, LLAMA = ({ours: names[i] for ours, names in MODULES.items()} for i in range(3))
GEMMA2 = LLAMA | {
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
PHI3 = LLAMA | dict.fromkeys(("attn.q", "attn.k", "attn.v"), "self_attn.qkv_proj")
PHI3 |= dict.fromkeys(("mlp.gate", "mlp.up"), "mlp.gate_up_proj")
KEYS = dict.fromkeys(READERS, LLAMA) | {
    "gpt2": GPT2, "gpt_neox": GPT_NEOX, "phi3": PHI3,
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2"), GEMMA2),
}  # fmt: skip
CONV1D = "attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down"  # GPT-2's are (in, out)


class Key(NamedTuple):
    """Where a parameter is in the files."""

    name: str
    part: int  # which of the tensor's parts it is: it may be fused with others
    rows: tuple[int, ...]  # of the parts, within a group
    groups: int  # all of q comes first, then k, then v; but in GPT-NeoX by head
    transposed: bool


def hf_key(config: ModelConfig, name: str) -> Key:
    """Where the parameter `name` is in the files of its family."""
    c, keys = config, KEYS[config.family]
    module, kind = name.rsplit(".", 1)
    number, module = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)", module).groups()
    path = f"{keys['blocks.{}'].format(number)}.{keys[module]}" if number else keys[module]
    sizes = {"attn.q": c.n_heads * c.head_size, "attn.k": c.n_kv_heads * c.head_size,
             "attn.v": c.n_kv_heads * c.head_size, "mlp.gate": c.hidden, "mlp.up": c.hidden}
    fused = [other for other in sizes if keys[other] == keys[module]] or [module]
    groups = c.n_heads if c.family == "gpt_neox" and len(fused) > 1 else 1
    rows = tuple(sizes.get(part, 0) // groups for part in fused)
    transposed = c.family == "gpt2" and kind == "weight" and module in CONV1D
    return Key(f"{path}.{kind}", fused.index(module), rows, groups, transposed)


def load_config(directory: str | Path, name: str = CONFIG) -> ModelConfig:
    """Read config.json. Raises ValueError where it is missing, broken or not supported."""
    file = Path(directory) / name
    if not file.is_file() or file.match("*.gguf"):
        for pattern, words in OTHERS.items():
            for found in file.parent.glob(pattern):
                raise ValueError(f"{found}: {words}")
    config, problems = read_json(file), Problems()
    with problems.collecting(f"{file}: "):
        return ModelConfig.from_hf(config)
    raise problems


def find_checkpoint(id_or_dir: str | Path, weights: bool = True) -> Path:
    """A local directory as it is, or the hub's files of an id, downloaded if they are not cached.

    Only the config, tokenizer files and safetensors are fetched. HF_HOME, HF_TOKEN, HF_HUB_OFFLINE
    mean what they mean to huggingface_hub. Raises ValueError that says what to do.
    """
    path = Path(id_or_dir)
    if path.is_file():
        load_config(path.parent, path.name)  # may say what it is
        raise ValueError(f"{path}: a file: expected the directory of a model")
    if path.is_dir():
        return path
    return snapshot(str(id_or_dir), "model", WANTED if weights else [CONFIG])


def snapshot(name: str, kind: str, patterns: list[str], revision: str | None = None) -> Path:
    """The folder with those files of a hub repository that match."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(
            name, repo_type=kind, revision=revision, allow_patterns=patterns
        ))  # fmt: skip
    except (
        errors.HfHubHTTPError, errors.HFValidationError, errors.LocalEntryNotFoundError,
    ) as error:  # fmt: skip
        local = "directory" if kind == "model" else "file"
        raise ValueError(
            f"{name}: neither a {local} nor a {kind} that the hub gives out "
            f"({type(error).__name__}): check the spelling; of a gated one accept its terms on the "
            f"hub and set HF_TOKEN; without a network, 'hf download --repo-type {kind} {name}' "
            "where there is one"
        ) from error
    except Exception as error:  # a full disk; a connection that is cut, of whichever library
        raise ValueError(f"{name}: cannot be downloaded: {type(error).__name__}: {error}") from None


def find_dataset(name: str, split: str | None, config: str | None, ends: tuple) -> list[Path]:
    """The files of a split [train] of a hub data set, in a configuration [default]: of the hub's
    own conversion to Parquet, or else those with one of the `ends` and a name with both. Raises
    ValueError, also where these are of several splits or configurations."""
    config, split, converted = config or "default", split or "train", "refs/convert/parquet"
    places = [(converted, [f"{config}/{part}{split}/*"]) for part in ("", "partial-")]
    said = [split, config][: 1 + (config != "default")]
    places += [(None, [f"*{'*'.join(order)}*{end}" for order in (said, said[::-1])])
               for end in ends]  # fmt: skip
    # Each as a word, which a number may follow. All that is in a folder of the split is one set.
    words = [re.compile(rf"(?<![^\W_]){re.escape(word)}(?![^\W\d_])") for word in said]
    inside = re.compile(rf"(.*(?<![^\W_]){re.escape(split)}/).*")
    number = re.compile(r"[-_.]?\d+(-of-\d+(-\w+)?)?(?=\.[^/]*$)")
    problems, near = Problems(), []
    for revision, patterns in places:
        try:
            folder = snapshot(name, "dataset", patterns, revision)
        except ValueError as error:
            if not _is_absent(error.__cause__):
                raise
            problems.add(str(error))
            continue
        # The cache may hold other files, which were asked for earlier.
        files = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*.*"))]
        near += (found := [f for f in files if any(fnmatch(f, pattern) for pattern in patterns)])
        wanted = [file for file in found if all(word.search(file) for word in words)]
        kinds = {inside.sub(r"\1", number.sub("", file)) for file in wanted}
        if len(kinds) > 1:
            raise ValueError(f"{name}: {', '.join(sorted(kinds))} fit split {split}: "
                             f"{name}:SPLIT[CONFIG] says which")  # fmt: skip
        if wanted:
            return [folder / file for file in wanted]
    raise ValueError(problems.lines[-1] if problems.count == len(places) else (
        f"{name}: no file is named after split {split} in configuration {config}"
        f"{': not ' * bool(near)}{', '.join(near[:5])}: {name}:SPLIT[CONFIG] asks for another"
    ))  # fmt: skip


def _is_absent(error: Exception | None) -> bool:
    """Whether a snapshot was refused as there is no such branch, or no network to tell."""
    from huggingface_hub import errors

    # IncompleteSnapshotError, which older versions lack, is of a branch that is known.
    local = isinstance(error, errors.LocalEntryNotFoundError) and "Incomplete" not in repr(error)
    cause = error.__cause__ if local else error
    if isinstance(cause, errors.HfHubHTTPError):
        no_repository = isinstance(cause, errors.RepositoryNotFoundError)
        return getattr(cause.response, "status_code", 0) == 404 and not no_repository
    return local


def scan(directory: Path, config: ModelConfig) -> tuple[dict[str, tuple], list[str]]:
    """{full key: (file, key there, shape, dtype)} of the tensors of a directory, read from the
    headers alone; and the files' problems."""
    stored, problems, index = {}, [], {}
    # GPT-2's own files leave out the prefix of all keys but the head's.
    prefix = "transformer." if config.family == "gpt2" else ""
    files = [directory / WEIGHTS]
    if not files[0].exists():
        try:
            index = read_json(directory / INDEX)["weight_map"]
            files = sorted({directory / Path(name).name for name in index.values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return {}, [f"{directory}: has neither {WEIGHTS} nor an index of such files ({error}); "
                        "*.bin files, pickles that can run any code, are not opened: convert them"]
    for file in files:
        try:
            with open_regular(file), safe_open(file, "pt") as handle:
                for key in handle.keys():  # noqa: SIM118 (not a dict)
                    part = handle.get_slice(key)
                    full = key if key.startswith((prefix, "lm_head.")) else prefix + key
                    if index.get(key, file.name) == file.name:  # two files may hold a tensor
                        stored[full] = file, key, tuple(part.get_shape()), part.get_dtype()
        except (SafetensorError, OSError) as error:
            problems.append(f"{file}: missing, truncated or damaged ({error})")
    return stored, problems


def sizes(directory: Path) -> dict[str, int]:
    """Bytes of the files of weights, by name: they tell two versions of a model apart, mostly."""
    return {file.name: file.stat().st_size for file in directory.glob("*.safetensors")}


def check_weights(
    directory: Path, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """What keeps parameters of these names and shapes from being read, a line each."""
    stored, problems = scan(directory, config)
    if problems:
        return problems
    wanted = {}
    for name, shape in shapes.items():
        key = hf_key(config, name)
        if len(key.rows) > 1:
            shape = sum(key.rows) * key.groups, *shape[1:]
        wanted[key.name] = shape[::-1] if key.transposed else shape
    problems = [f"{directory}: {key} is missing" for key in wanted if key not in stored]
    head = KEYS[config.family]["head"] + ".weight"
    if config.tied and head in stored:
        wanted[head] = config.vocab, config.width
    for key, (file, _, shape, dtype) in stored.items():
        if key not in wanted:
            if not EXTRA_KEYS.search(key):
                problems.append(f"{file}: {key} is not a tensor of this model")
        elif shape != wanted[key]:
            problems.append(f"{file}: {key} has shape {shape}, config.json says {wanted[key]}")
        elif dtype not in FLOATS:
            problems.append(f"{file}: {key} is {dtype}; supported are {', '.join(FLOATS)}")
    return problems


def read_tensors(directory: Path, config: ModelConfig, names: Iterable[str]) -> Named:
    """Each parameter asked for, in the files' dtype, memory-mapped. Call check_weights first."""
    stored, _ = scan(directory, config)
    with ExitStack() as stack:
        files = {file for file, *_ in stored.values()}
        opened = {file: stack.enter_context(safe_open(file, "pt")) for file in files}
        for name in names:
            key = hf_key(config, name)
            file, key_there, *_ = stored[key.name]
            tensor = opened[file].get_tensor(key_there)
            tensor = tensor.T if key.transposed else tensor
            if len(key.rows) > 1:
                parts = tensor.unflatten(0, (key.groups, -1)).split(key.rows, dim=1)
                tensor = parts[key.part].flatten(0, 1)
            yield name, tensor


def to_hf(config: ModelConfig, tensors: Named) -> Named:
    """Tensors under our names -> under Hugging Face's, fused and transposed as they are."""
    waiting: dict[str, list[Tensor]] = {}
    for name, tensor in tensors:
        key = hf_key(config, name)
        if len(key.rows) > 1:
            waiting.setdefault(key.name, []).append(tensor.unflatten(0, (key.groups, -1)))
            if len(waiting[key.name]) < len(key.rows):
                continue
            tensor = torch.cat(waiting.pop(key.name), dim=1).flatten(0, 1)
        yield key.name, (tensor.T if key.transposed else tensor).contiguous()


def write_file(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file for whom the umask permits: the library makes one for its owner.
    OSError if there is no room."""
    file.touch()
    mode = file.stat().st_mode
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file}: {error}") from None
    file.chmod(mode)


def write_tensors(
    directory: str | Path, config: ModelConfig, tensors: Named, like: Named, max_bytes: float = 5e9
) -> None:
    """Write tensors, which come in the model's order, as safetensors files of at most `max_bytes`
    (or one tensor), with index and config.json. A file is written, and its tensors are let go, as
    soon as all are there. `like`: meta tensors of the same names, shapes and dtype."""
    empty = dict(to_hf(config, like))
    plan = split_torch_state_dict_into_shards(empty, max_shard_size=int(max_bytes))
    directory, waiting = Path(directory), defaultdict(dict)
    for key, tensor in to_hf(config, tensors):
        file = plan.tensor_to_filename[key]
        waiting[file][key] = tensor
        if len(waiting[file]) == len(plan.filename_to_tensors[file]):
            write_file(waiting.pop(file), directory / file)
    dtype = next(iter(empty.values())).dtype
    dtype_key = "dtype" if "dtype" in config.hf else "torch_dtype"
    written = {CONFIG: config.hf | {dtype_key: str(dtype).removeprefix("torch.")}}
    if plan.is_sharded:
        written[INDEX] = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    for name, content in written.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")


@contextmanager
def written_whole(directory: str | Path) -> Iterator[Path]:
    """A temporary directory beside `directory`, renamed to it once the block is through. Replaces
    an earlier model; raises ValueError for a directory that holds something else."""
    final = Path(directory)
    if final.exists() and any(final.iterdir()) and not (final / CONFIG).exists():
        raise ValueError(f"{final}: exists, and holds no model to replace")
    temporary, old = (final.with_name(f".{final.name}.{end}") for end in ("new", "old"))
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # the disk may be full
        raise
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old, ignore_errors=True)
