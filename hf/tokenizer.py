"""Text to token ids and back, from a checkpoint's own files.

    tokenizer = load_tokenizer("path/to/checkpoint")
    ids = tokenizer.encode("Name a colour.")

Two codecs give the ids of the `tokenizers` library:

    byte-level BPE (GPT-2, GPT-NeoX, Llama-3, Qwen)        tiktoken
    the rest, SentencePiece above all (Llama-2, Yi, Gemma)  `tokenizers`, imported only if needed

Text is encoded as text: a record that spells "<|eot_id|>" gets the ids of those characters. Control
tokens enter through templates only (templates.py), by id. Nothing is ever downloaded.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import tiktoken

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")

# Names to fall back on where no configuration file names the token.
KNOWN_BOS = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>")
TEMPLATE_TOKENS = (  # control tokens of the templates, whether or not the files call them special
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>",
)
KNOWN_EOS = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>")

EOS = "eos_token"  # a template's word for the vocabulary's own end of text, whatever its name
Turns = list[tuple[str, str]]  # (role, text); roles: system, user, input, assistant, or one "text"
Segment = tuple[str | int, bool]  # (text or id, has_loss)


# ---------------------------------------------------------------------------------------------
# Codecs: text without control tokens <-> ids


class BytePairCodec:
    """Byte-level BPE in tiktoken. `added` are ordinary tokens matched in the text before BPE."""

    kind = "tiktoken"

    def __init__(self, ranks: dict[bytes, int], pattern: str, nfc: bool, added: dict[str, int]):
        # The look-ahead keeps a state for each character of the run, of which there is room for a
        # million. Without a bound a megabyte of spaces would end in a panic.
        pattern = pattern.replace(r"\s+(?!\S)", r"\s{1,100000}(?!\S)")
        self.encoding = tiktoken.Encoding(
            "checkpoint", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )
        self.nfc = nfc
        self.added = added
        longest_first = sorted(added, key=len, reverse=True)
        self.split = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if added else None
        self.bytes = {i: token for token, i in ranks.items()}
        self.bytes.update({i: token.encode() for token, i in added.items()})

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        # One piece of work for each thread: tiktoken's own batch call makes one of each text, which
        # takes longer than encoding it.
        threads = min(os.cpu_count() or 1, -(-len(texts) // 64))
        if threads < 2:
            return [self.encode(text) for text in texts]
        size = -(-len(texts) // threads)
        parts = [texts[n : n + size] for n in range(0, len(texts), size)]
        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(lambda part: [*map(self.encode, part)], parts), [])

    def encode_runs(
        self, runs: list[tuple[list[Segment], bool]]
    ) -> list[tuple[list[int], list[bool]]]:
        """(ids, has_loss) of each run of texts between control tokens.

        A run is ([(text, has_loss), …], is it the start of the input). Texts that differ in loss
        are encoded apart, as in generation, where the prompt alone is what there is to encode.
        """
        by_loss = [groupby(run, itemgetter(1)) for run, _ in runs]
        runs = [[("".join(t for t, _ in same), loss) for loss, same in run] for run in by_loss]
        encoded = iter(self.encode_batch([text for run in runs for text, _ in run]))
        out = []
        for run in runs:
            ids, has_loss = [], []
            for _, loss in run:
                part = next(encoded)
                ids += part
                has_loss += [loss] * len(part)
            out.append((ids, has_loss))
        return out

    def encode(self, text: str) -> list[int]:
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        if not self.added:
            return self.encoding.encode_ordinary(text)
        ids = []
        for n, piece in enumerate(self.split.split(text)):
            ids += [self.added[piece]] if n % 2 else self.encoding.encode_ordinary(piece)
        return ids

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.bytes.get(i, b"") for i in ids).decode("utf-8", errors="replace")


class SentencePieceCodec:
    """Any other tokenizer.json, through the `tokenizers` library.

    Without its special tokens, so that they are not found in text; see `_without_special`.
    """

    kind = "tokenizers"

    def __init__(self, spec: dict, special: dict[str, int], path: Path):
        try:
            import tokenizers
        except ImportError:
            raise ValueError(
                f"{path}: this SentencePiece-style vocabulary needs a package that is not "
                "installed: pip install tokenizers"
            ) from None
        source = json.dumps(_without_special(spec, special))
        # Metaspace may put a space before the very start of the input only. Text that follows a
        # control token is not at the start, though it is encoded by itself here.
        inner = source.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(source)
            same = inner == source
            self.inner = self.tokenizer if same else tokenizers.Tokenizer.from_str(inner)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path}: the tokenizers library refuses it: {error}") from None
        self.special_ids = set(special.values())

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def encode_runs(
        self, runs: list[tuple[list[Segment], bool]]
    ) -> list[tuple[list[int], list[bool]]]:
        """As BytePairCodec's; but a prompt and its answer are one text, and the mask is by offsets.

        Apart, the answer would get a space of its own before it. A token has loss if its last
        character belongs to an answer.
        """
        out = [None] * len(runs)
        for tokenizer, wanted in ((self.tokenizer, True), (self.inner, False)):
            where = [n for n, (_, first) in enumerate(runs) if first == wanted]
            texts = ["".join(text for text, _ in runs[n][0]) for n in where]
            encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
            for n, e in zip(where, encoded, strict=True):
                of_char = [loss for text, loss in runs[n][0] for _ in text]
                # a token of no characters is a space put before those that follow
                last = [max(start, end - 1) for start, end in e.offsets]
                out[n] = e.ids, [of_char[at] for at in last]
        return out

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode([i for i in ids if i not in self.special_ids])


def _without_special(spec: dict, special: dict[str, int]) -> dict:
    """`spec` (a tokenizer.json) changed so that no text can become a special token."""
    ordinary = [t for t in spec.get("added_tokens") or [] if t["content"] not in special]
    model = dict(spec["model"])
    if isinstance(model.get("vocab"), dict):
        # The library numbers added tokens anew unless the vocabulary holds them.
        model["vocab"] = {**model["vocab"], **{t["content"]: t["id"] for t in ordinary}}
    if "merges" in model:
        pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"])
        model["merges"] = [[a, b] for a, b in pairs if a + b not in special]
    return {**spec, "model": model, "added_tokens": ordinary, "post_processor": None,
            "truncation": None, "padding": None}


# ---------------------------------------------------------------------------------------------
# The tokenizer


@dataclass
class Tokenizer:
    """A codec and the control tokens beside it. Made by `load_tokenizer` or `byte_tokenizer`."""

    codec: BytePairCodec | SentencePieceCodec
    special: dict[str, int]  # control tokens by name: never made from text
    bos_id: int | None
    eos_id: int | None
    add_bos: bool  # whether the model's inputs start with bos_id
    eos_ids: tuple[int, ...]  # all ids that end generation
    n_vocab: int  # highest id + 1
    fingerprint: str  # hash of everything that determines ids
    path: Path | None  # directory of the source files; None if made in memory
    spec: dict | None = field(default=None, repr=False)  # tokenizer.json if made in memory

    @property
    def kind(self) -> str:
        """The library that does the work: "tiktoken" or "tokenizers"."""
        return self.codec.kind

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, all of it as text, nothing added."""
        return self.codec.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, in parallel threads."""
        return self.codec.encode_batch(texts)

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; control tokens and ids without a text are left out."""
        return self.codec.decode(ids)

    def control(self, name: str) -> int:
        """Id of the control token `name`; ValueError if the vocabulary lacks it."""
        if name == EOS:
            if self.eos_id is None:
                raise ValueError(f"{self.path}: the vocabulary has no end-of-text token")
            return self.eos_id
        if name not in self.special:
            raise ValueError(f"{self.path}: the vocabulary lacks the control token {name}")
        return self.special[name]


def byte_tokenizer() -> Tokenizer:
    """The built-in model's vocabulary: 256 bytes, <bos>, <eos>. Saved, it is a tokenizer.json."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    names = {"<bos>": 256, "<eos>": 257}
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    text = [{"Sequence": {"id": letter, "type_id": 0}} for letter in "AB"]
    spec = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": name, "special": True, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False} for name, i in names.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "post_processor": {
            "type": "TemplateProcessing", "single": [bos, text[0]], "pair": [bos, *text],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [256], "tokens": ["<bos>"]}},
        },
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": _byte_of_char(), "merges": []},
    }
    return _from_spec(spec, Settings({}), path=None, fingerprint="bytes")


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a checkpoint directory; ValueError in one line if there is none to read.

    Reads tokenizer.json, or vocab.json + merges.txt (encoder.json + vocab.bpe), or Llama-3's
    tokenizer.model; which tokens open and end a text comes from the configuration files.
    """
    path = Path(path)
    settings = Settings.read(path)
    for names, load in (
        (("tokenizer.json",), _from_json),
        (("vocab.json", "merges.txt"), _from_vocab_and_merges),
        (("encoder.json", "vocab.bpe"), _from_vocab_and_merges),
        (("tokenizer.model",), _from_tiktoken_model),
    ):
        files = [path / name for name in names]
        if all(file.is_file() for file in files):
            contents = b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)
            try:
                return load(*files, settings, contents.hex())
            except (KeyError, TypeError, AttributeError, IndexError, UnicodeError) as error:
                raise ValueError(f"{files[0]}: not understood: {error!r}") from None
    raise ValueError(
        f"{path}: no tokenizer: expected tokenizer.json, vocab.json + merges.txt or tokenizer.model"
    )


@dataclass
class Settings:
    """What a checkpoint's configuration files say about its tokens."""

    names: dict  # tokenizer_config.json over special_tokens_map.json
    ids: dict = field(default_factory=dict)  # generation_config.json over config.json

    @classmethod
    def read(cls, path: Path) -> Settings:
        def read(name: str) -> dict:
            content = _read_json(path / name) if (path / name).is_file() else {}
            return {k: v for k, v in content.items() if v is not None}

        return cls(
            {**read("special_tokens_map.json"), **read("tokenizer_config.json")},
            {**read("config.json"), **read("generation_config.json")},
        )

    @property
    def added_tokens(self) -> list[dict]:
        decoder = self.names.get("added_tokens_decoder", {})
        return [{**token, "id": int(i)} for i, token in decoder.items()]

    def name(self, key: str) -> str | None:
        value = self.names.get(key)
        return value["content"] if isinstance(value, dict) else value

    def all_ids(self, key: str) -> list[int]:
        value = self.ids.get(key, [])
        return value if isinstance(value, list) else [value]

    def find(self, key: str, known: tuple[str, ...], vocab: dict, special: dict) -> int | None:
        """The id of `key` ("bos_token"): named, else configured by id, else of a known name."""
        name = self.name(key)
        if name is not None:
            return vocab.get(name)
        for i in self.all_ids(f"{key}_id"):
            # config.json often holds its class's default, an id of this vocabulary's ordinary text
            if i in special.values():
                return i
        return next((special[name] for name in known if name in special), None)


# ---------------------------------------------------------------------------------------------
# The formats


def _from_json(file: Path, settings: Settings, fingerprint: str) -> Tokenizer:
    spec = _read_json(file)
    if not isinstance(spec.get("model"), dict) or not spec["model"].get("vocab"):
        raise ValueError(f"{file}: not a tokenizer.json: it has no model with a vocabulary")
    return _from_spec(spec, settings, file.parent, fingerprint)


def _from_spec(spec: dict, settings: Settings, path: Path | None, fingerprint: str) -> Tokenizer:
    """Tokenizer of the content of a tokenizer.json."""
    added = {t["content"]: t for t in [*settings.added_tokens, *(spec.get("added_tokens") or [])]}
    vocab = spec["model"]["vocab"]
    if isinstance(vocab, list):  # Unigram: [piece, score]
        vocab = {piece: i for i, (piece, _) in enumerate(vocab)}
    vocab = {**vocab, **{name: token["id"] for name, token in added.items()}}
    special = _special_tokens(added.values(), vocab, settings)
    ordinary = {name: token for name, token in added.items() if name not in special}
    recipe = _byte_pair_recipe(spec, added, ordinary.values())
    if recipe:
        codec = BytePairCodec(*recipe, {name: token["id"] for name, token in ordinary.items()})
    else:
        codec = SentencePieceCodec(spec, special, path / "tokenizer.json")
    single = (spec.get("post_processor") or {}).get("processors", [spec.get("post_processor")])
    opens = {
        item["SpecialToken"]["id"]
        for processor in single if processor
        for item in processor.get("single", []) if "SpecialToken" in item
    }
    return _assemble(codec, vocab, special, settings, opens, path, fingerprint,
                     spec if path is None else None)


def _byte_pair_recipe(spec: dict, added: dict, ordinary) -> tuple | None:
    """(ranks, pattern, nfc) for tiktoken, or None if it cannot express this tokenizer.json."""
    model = spec["model"]
    pattern = _split_pattern(spec.get("pre_tokenizer") or {})
    normalizer = spec.get("normalizer")
    plain = not any(model.get(key) for key in (
        "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"
    ))
    strips = any(t.get(key) for t in ordinary for key in ("lstrip", "rstrip", "single_word"))
    # files of early library versions have no type
    if model.get("type", "BPE") != "BPE" or not plain or not pattern or strips:
        return None
    if normalizer not in (None, {"type": "NFC"}):
        return None
    merges = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
    vocab = {token: i for token, i in model["vocab"].items() if token not in added}
    ranks = _ranks(vocab, merges, keep_all=model.get("ignore_merges", False))
    return ranks and (ranks, pattern, normalizer is not None)


def _split_pattern(pre_tokenizer: dict) -> str | None:
    """The regular expression that cuts text before BPE, where ByteLevel comes after it."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    byte_level = steps[-1]
    if byte_level.get("type") != "ByteLevel" or byte_level.get("add_prefix_space"):
        return None
    if len(steps) == 1:
        return GPT2_PATTERN if byte_level.get("use_regex", True) else None
    split = steps[0]
    pattern = split.get("pattern", {}).get("Regex", "")
    isolated = split.get("behavior") == "Isolated" and not split.get("invert")
    # `tokenizers` keeps what the pattern does not match, tiktoken loses it. The patterns that end
    # like this one, those of GPT-2's line, match every character.
    whole = pattern.endswith(r"|\s+(?!\S)|\s+")
    only = len(steps) == 2 and not byte_level.get("use_regex", True)
    return pattern if only and isolated and whole else None


def _ranks(vocab: dict[str, int], merges: list, keep_all: bool = False) -> dict[bytes, int] | None:
    """Token bytes -> id, or None where ids do not grow in the order of the merges.

    tiktoken merges the pair whose union has the lowest id; `tokenizers` the pair listed first.
    """
    byte_of = _byte_of_char()
    merged = dict.fromkeys(a + b for a, b in merges)  # in order; several pairs may give one token
    ids = [vocab.get(token, -1) for token in merged]
    if ids != sorted(ids) or ids[:1] == [-1]:
        return None
    ranks = {}
    for token, i in vocab.items():
        if not all(char in byte_of for char in token):
            return None
        if keep_all or len(token) == 1 or token in merged:
            ranks[bytes(byte_of[char] for char in token)] = i
    return ranks


def _from_vocab_and_merges(
    vocab_file: Path, merges_file: Path, settings: Settings, fingerprint: str
) -> Tokenizer:
    """GPT-2's own format. It has no pattern: the class in tokenizer_config.json tells which."""
    kind = settings.names.get("tokenizer_class", "GPT2Tokenizer").removesuffix("Fast")
    patterns = {"GPT2Tokenizer": GPT2_PATTERN, "Qwen2Tokenizer": QWEN2_PATTERN}
    if kind not in patterns:
        raise ValueError(
            f"{vocab_file}: cannot tell how {kind} splits text: save a tokenizer.json beside it"
        )
    vocab = _read_json(vocab_file)
    lines = merges_file.read_text(encoding="utf-8").splitlines()
    merges = [line.split() for line in lines if line and not line.startswith("#version")]
    if not all(len(pair) == 2 for pair in merges):
        raise ValueError(f"{merges_file}: a line is not a pair of tokens")
    ranks = _ranks(vocab, merges)
    if ranks is None:
        raise ValueError(f"{vocab_file}: ids are not in the order of {merges_file.name}")
    added = settings.added_tokens
    vocab = {**vocab, **{token["content"]: token["id"] for token in added}}
    special = _special_tokens(added, vocab, settings)
    ordinary = {t["content"]: t["id"] for t in added if t["content"] not in special}
    codec = BytePairCodec(ranks, patterns[kind], kind == "Qwen2Tokenizer", ordinary)
    return _assemble(codec, vocab, special, settings, set(), vocab_file.parent, fingerprint)


def _from_tiktoken_model(file: Path, settings: Settings, fingerprint: str) -> Tokenizer:
    """Llama-3's tokenizer.model: a line per token, base64 and rank; control tokens come after."""
    try:
        lines = [line.split() for line in file.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError:
        raise ValueError(
            f"{file}: a binary SentencePiece model cannot be read: save a tokenizer.json beside it "
            "(transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR))"
        ) from None
    if len(ranks) != 128_000:
        raise ValueError(
            f"{file}: {len(ranks)} tokens; of this format only Llama-3's (128000) is known: "
            "save a tokenizer.json beside it"
        )
    named = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id",
             9: "eot_id"}
    reserved = (f"reserved_special_token_{n}" for n in range(256))
    special = {f"<|{named.get(n) or next(reserved)}|>": 128_000 + n for n in range(256)}
    codec = BytePairCodec(ranks, LLAMA3_PATTERN, nfc=False, added={})
    return _assemble(codec, special, special, settings, {"<|begin_of_text|>"}, file.parent,
                     fingerprint)


def _special_tokens(added, vocab: dict[str, int], settings: Settings) -> dict[str, int]:
    """Control tokens: those the files call special, and those that a template uses."""
    names = {token["content"] for token in added if token.get("special")}
    names |= {settings.name(key) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    names |= {*KNOWN_BOS, *KNOWN_EOS, *TEMPLATE_TOKENS}
    return {name: vocab[name] for name in sorted(names - {None}) if name in vocab}


def _assemble(codec, vocab, special, settings, opens, path, fingerprint, spec=None) -> Tokenizer:
    """`opens`: the names of tokens that the tokenizer's post-processor puts before a text."""
    if isinstance(codec, BytePairCodec):  # "</s>" may be an ordinary token of code
        special = {name: i for name, i in special.items() if i not in codec.bytes}
    bos_id = settings.find("bos_token", KNOWN_BOS, vocab, special)
    eos_id = settings.find("eos_token", KNOWN_EOS, vocab, special)
    add_bos = settings.names.get("add_bos_token", bos_id in {vocab.get(name) for name in opens})
    add_bos = bool(add_bos and bos_id is not None)
    stops = [eos_id, *settings.all_ids("eos_token_id")]
    eos_ids = tuple(dict.fromkeys(i for i in stops if i in special.values()))
    identity = json.dumps([fingerprint, bos_id, eos_id, add_bos, special])
    if isinstance(codec, BytePairCodec):
        n_vocab = max([*codec.bytes, *special.values()]) + 1
    else:
        n_vocab = max(vocab.values()) + 1
    return Tokenizer(codec, special, bos_id, eos_id, add_bos, eos_ids, n_vocab,
                     hashlib.sha256(identity.encode()).hexdigest(), path, spec)


@functools.cache
def _byte_of_char() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones as themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: not a JSON object")
    return content
