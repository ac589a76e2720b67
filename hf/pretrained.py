"""Checkpoints in Hugging Face's format: found, checked, read and written.

A checkpoint is a directory of config.json, safetensors and a tokenizer's files, local or the hub's.
Its tensors are streams of (name, full CPU tensor) in both directions, so that a sharded model is
filled and saved by the same functions, one tensor at a time. Names and layout are ours on this
side, the family's in the files; KEYS maps one to the other, and is where a new family enters the
names of its tensors. (What its config.json says is read in families.py.)
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf.families import READERS, ModelConfig, read_json

Named = Iterable[tuple[str, Tensor]]  # a stream of (name, full CPU tensor)

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "chat_template*",
    "generation_config.json",
)
# Buffers that old checkpoints carry along.
EXTRA_KEYS = re.compile(r"\b(attn|attention)\.(masked_)?bias$|\brotary_emb\.inv_freq$")
FLOATS = "F64", "F32", "F16", "BF16"

# --------------------------------------------------------------------------------------------------
# Names


class Key(NamedTuple):
    """Where a module's parameters are in the files."""

    name: str
    part: int | None = None  # 0, 1, 2: q, k or v of a fused tensor
    transposed: bool = False  # GPT-2's Conv1D holds (in, out)


# Our module -> theirs. Each brings along its `.weight` and, where it has one, its `.bias`.
GPT2_KEYS = {
    "embed": Key("transformer.wte"),
    "embed.positions": Key("transformer.wpe"),
    "blocks.{}.attn_norm": Key("transformer.h.{}.ln_1"),
    "blocks.{}.attn.q": Key("transformer.h.{}.attn.c_attn", part=0, transposed=True),
    "blocks.{}.attn.k": Key("transformer.h.{}.attn.c_attn", part=1, transposed=True),
    "blocks.{}.attn.v": Key("transformer.h.{}.attn.c_attn", part=2, transposed=True),
    "blocks.{}.attn.o": Key("transformer.h.{}.attn.c_proj", transposed=True),
    "blocks.{}.mlp_norm": Key("transformer.h.{}.ln_2"),
    "blocks.{}.mlp.up": Key("transformer.h.{}.mlp.c_fc", transposed=True),
    "blocks.{}.mlp.down": Key("transformer.h.{}.mlp.c_proj", transposed=True),
    "norm": Key("transformer.ln_f"),
    "head": Key("lm_head"),
}
NEOX_KEYS = {
    "embed": Key("gpt_neox.embed_in"),
    "blocks.{}.attn_norm": Key("gpt_neox.layers.{}.input_layernorm"),
    "blocks.{}.attn.q": Key("gpt_neox.layers.{}.attention.query_key_value", part=0),
    "blocks.{}.attn.k": Key("gpt_neox.layers.{}.attention.query_key_value", part=1),
    "blocks.{}.attn.v": Key("gpt_neox.layers.{}.attention.query_key_value", part=2),
    "blocks.{}.attn.o": Key("gpt_neox.layers.{}.attention.dense"),
    "blocks.{}.mlp_norm": Key("gpt_neox.layers.{}.post_attention_layernorm"),
    "blocks.{}.mlp.up": Key("gpt_neox.layers.{}.mlp.dense_h_to_4h"),
    "blocks.{}.mlp.down": Key("gpt_neox.layers.{}.mlp.dense_4h_to_h"),
    "norm": Key("gpt_neox.final_layer_norm"),
    "head": Key("embed_out"),
}
LLAMA_KEYS = {
    "embed": Key("model.embed_tokens"),
    "blocks.{}.attn_norm": Key("model.layers.{}.input_layernorm"),
    "blocks.{}.attn.q": Key("model.layers.{}.self_attn.q_proj"),
    "blocks.{}.attn.k": Key("model.layers.{}.self_attn.k_proj"),
    "blocks.{}.attn.v": Key("model.layers.{}.self_attn.v_proj"),
    "blocks.{}.attn.q_norm": Key("model.layers.{}.self_attn.q_norm"),
    "blocks.{}.attn.k_norm": Key("model.layers.{}.self_attn.k_norm"),
    "blocks.{}.attn.o": Key("model.layers.{}.self_attn.o_proj"),
    "blocks.{}.mlp_norm": Key("model.layers.{}.post_attention_layernorm"),
    "blocks.{}.mlp.gate": Key("model.layers.{}.mlp.gate_proj"),
    "blocks.{}.mlp.up": Key("model.layers.{}.mlp.up_proj"),
    "blocks.{}.mlp.down": Key("model.layers.{}.mlp.down_proj"),
    "norm": Key("model.norm"),
    "head": Key("lm_head"),
}
GEMMA2_KEYS = LLAMA_KEYS | {
    "blocks.{}.attn_post_norm": Key("model.layers.{}.post_attention_layernorm"),
    "blocks.{}.mlp_norm": Key("model.layers.{}.pre_feedforward_layernorm"),
    "blocks.{}.mlp_post_norm": Key("model.layers.{}.post_feedforward_layernorm"),
}
KEYS = dict.fromkeys(READERS, LLAMA_KEYS)
KEYS |= {"gpt2": GPT2_KEYS, "gpt_neox": NEOX_KEYS, "gemma2": GEMMA2_KEYS}


def hf_key(config: ModelConfig, name: str) -> Key:
    """Where the parameter `name` is in the files of its family."""
    module, kind = name.rsplit(".", 1)
    number = re.search(r"\d+", module)
    template = re.sub(r"\d+", "{}", module)
    key = KEYS[config.family][template]
    path = key.name.format(number[0] if number else "")
    return Key(f"{path}.{kind}", key.part, key.transposed and kind == "weight")


def split(fused: Tensor, part: int, config: ModelConfig) -> Tensor:
    """q, k or v (rows, ...) out of a fused tensor (3 rows, ...): GPT-2 stores all of q, then all of
    k, then all of v; GPT-NeoX does so for each head."""
    groups = config.n_heads if config.family == "gpt_neox" else 1
    return fused.reshape(groups, 3, -1, *fused.shape[1:])[:, part].flatten(0, 1)


def fuse(parts: list[Tensor], config: ModelConfig) -> Tensor:
    """The inverse of `split`."""
    groups = config.n_heads if config.family == "gpt_neox" else 1
    return torch.stack([p.view(groups, -1, *p.shape[1:]) for p in parts], 1).flatten(0, 2)


# --------------------------------------------------------------------------------------------------
# Finding and reading


def load_config(directory: str | Path, name: str = CONFIG) -> ModelConfig:
    """Read config.json. Raises ValueError where it is missing, broken or not supported."""
    file = Path(directory) / name
    config = read_json(file)
    try:
        return ModelConfig.from_hf(config)
    except ValueError as error:
        lines = str(error).splitlines()
        raise ValueError("\n".join(f"{file}: {line}" for line in lines)) from None


def find_checkpoint(id_or_dir: str | Path, weights: bool = True) -> Path:
    """A local directory as it is, or the hub's files of an id, downloaded if they are not cached.

    Only the config, tokenizer files and safetensors are fetched. HF_HOME, HF_TOKEN, HF_HUB_OFFLINE
    mean what they mean to huggingface_hub. Raises ValueError that says what to do.
    """
    if Path(id_or_dir).is_dir():
        return Path(id_or_dir)
    from huggingface_hub import errors, snapshot_download

    wanted = [CONFIG, INDEX, "model*.safetensors", *TOKENIZER_FILES] if weights else [CONFIG]
    try:
        return Path(snapshot_download(str(id_or_dir), allow_patterns=wanted))
    except errors.GatedRepoError:
        reason = (f"is gated: accept its terms on https://huggingface.co/{id_or_dir}, then set "
                  "HF_TOKEN or run 'hf auth login'")
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        reason = ("is neither a directory nor a model on huggingface.co: check the spelling, and "
                  "set HF_TOKEN if it is private")
    except (errors.HfHubHTTPError, OSError) as error:
        reason = (f"is neither a directory nor in the cache, and the hub cannot be reached "
                  f"({type(error).__name__}): check the spelling, or run 'hf download {id_or_dir}' "
                  "where there is a network")
    raise ValueError(f"{id_or_dir}: {reason}")


class Stored(NamedTuple):
    """A tensor in a file, as its header describes it."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


def scan(directory: Path, config: ModelConfig) -> tuple[dict[str, Stored], list[str]]:
    """The tensors of a directory by key, read from the headers alone, and the files' problems."""
    stored, problems, index = {}, [], {}
    # GPT-2's own files leave out the prefix of all keys but the head's.
    prefix = "transformer." if config.family == "gpt2" else ""
    if (directory / WEIGHTS).exists():
        files = [directory / WEIGHTS]
    elif (directory / INDEX).exists():
        try:
            index = read_json(directory / INDEX)["weight_map"]
            files = sorted({directory / name for name in index.values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return {}, [f"{directory / INDEX}: not an index of safetensors files ({error!r})"]
    elif next(directory.glob("*.bin"), None):
        return {}, [f"{directory}: has its weights in *.bin only, and opening a pickle can run any "
                    "code; ask for, or convert to, safetensors"]
    else:
        return {}, [f"{directory}: has neither {WEIGHTS} nor {INDEX}"]
    for file in files:
        try:
            with safe_open(file, "pt") as handle:
                for key in handle.keys():  # noqa: SIM118 (not a dict)
                    part = handle.get_slice(key)
                    if index.get(key, file.name) == file.name:
                        full = key if key.startswith((prefix, "lm_head.")) else prefix + key
                        stored[full] = Stored(file, key, tuple(part.get_shape()), part.get_dtype())
        except FileNotFoundError:
            problems.append(f"{file}: missing, but {INDEX} names it")
        except (SafetensorError, OSError) as error:
            problems.append(f"{file}: truncated or damaged ({error})")
    return stored, problems


def check_weights(
    directory: Path, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """What keeps parameters of these names and shapes from being read, a line each. Reads the
    files' headers alone."""
    stored, problems = scan(directory, config)
    if problems:
        return problems
    wanted = {}
    for name, shape in shapes.items():
        key = hf_key(config, name)
        shape = shape if key.part is None else (3 * shape[0], *shape[1:])
        wanted[key.name] = shape[::-1] if key.transposed else shape
    source = directory / (WEIGHTS if (directory / WEIGHTS).exists() else INDEX)
    problems = [f"{source}: {key} is missing" for key in wanted if key not in stored]
    head = KEYS[config.family]["head"].name + ".weight"
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
    """Each parameter asked for, in the files' dtype.

    The tensors lie in memory-mapped files: copy what is to be kept. Call check_weights first.
    """
    stored, _ = scan(directory, config)
    with ExitStack() as stack:
        files = {entry.file for entry in stored.values()}
        opened = {file: stack.enter_context(safe_open(file, "pt")) for file in files}
        for name in names:
            key = hf_key(config, name)
            entry = stored[key.name]
            tensor = opened[entry.file].get_tensor(entry.key)
            tensor = tensor.T if key.transposed else tensor
            yield name, tensor if key.part is None else split(tensor, key.part, config)


# --------------------------------------------------------------------------------------------------
# Writing


def to_hf(config: ModelConfig, tensors: Named) -> Named:
    """Tensors under our names -> under Hugging Face's, fused and transposed as they are."""
    waiting: dict[str, list[Tensor]] = {}
    for name, tensor in tensors:
        key = hf_key(config, name)
        if key.part is not None:
            parts = waiting.setdefault(key.name, [])
            assert len(parts) == key.part, "q, k and v come one after another, as in the model"
            parts.append(tensor)
            if len(parts) < 3:
                continue
            tensor = fuse(waiting.pop(key.name), config)
        yield key.name, (tensor.T if key.transposed else tensor).contiguous()


def write_tensors(
    directory: str | Path | None, config: ModelConfig, tensors: Named, max_bytes: float = 5e9
) -> None:
    """Write tensors, which come in the model's order, as safetensors files of at most `max_bytes`
    (or one tensor), with index and config.json. Holds one file's tensors at a time.

    directory   None: take all pairs and write none, on a rank that gathers along with the others
    """
    if directory is None:
        for _ in tensors:
            pass
        return
    directory, files, total = Path(directory), [], 0
    for batch in batches(to_hf(config, tensors), max_bytes):
        save_file(batch, directory / f"{len(files)}.part", metadata={"format": "pt"})
        files.append(list(batch))
        total += sum(tensor.nbytes for tensor in batch.values())
        dtype = next(iter(batch.values())).dtype
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    if len(files) == 1:
        names = [WEIGHTS]
    else:
        weight_map = {key: name for name, keys in zip(names, files, strict=True) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for i, name in enumerate(names):
        (directory / f"{i}.part").rename(directory / name)
    dtype_key = "dtype" if "dtype" in config.hf else "torch_dtype"
    raw = config.hf | {dtype_key: str(dtype).removeprefix("torch.")}
    (directory / CONFIG).write_text(json.dumps(raw, indent=2) + "\n")


def batches(tensors: Named, max_bytes: float) -> Iterator[dict[str, Tensor]]:
    """Cut a stream of tensors into dicts of at most `max_bytes`, or of one tensor."""
    batch: dict[str, Tensor] = {}
    for key, tensor in tensors:
        if batch and sum(t.nbytes for t in batch.values()) + tensor.nbytes > max_bytes:
            yield batch
            batch.clear()  # in place: the caller holds it too
        batch[key] = tensor
    yield batch


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
