"""Text to token ids and back, from a checkpoint's own tokenizer.json.

    tokenizer = load_tokenizer("path/to/checkpoint")
    ids = tokenizer.encode("Name a colour.")

Two codecs give the ids of the `tokenizers` library:

    byte-level BPE (GPT-2, GPT-NeoX, Llama-3, Qwen)        tiktoken
    the rest, SentencePiece above all (Llama-2, Gemma)      `tokenizers`, imported only if needed

Text is encoded as text: a record that spells "<|eot_id|>" gets the ids of those characters. Control
tokens enter through templates only (templates.py), by id. Nothing is ever downloaded.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tiktoken

from hf import JSON_BYTES, open_regular, read_json, tried

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Names to fall back on where no configuration file names the token.
KNOWN_BOS = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>")
KNOWN_EOS = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>")
TEMPLATE_TOKENS = (  # control tokens of the templates, whether or not the files call them special
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>",
)

BOS = "bos_token"
EOS = "eos_token"  # a template's word for the vocabulary's own end of text, whatever its name
# What a tokenizer is tried on.
TRIAL = ["Hello, world! It's 12:30.\n\n  def f(x):\treturn x", "é 中文 😀 e\u0301 \u200d \x00 <s>",
         *(character * 3000 + "!" for character in "a1 .\n")]  # fmt: skip
LONGEST = 10_000  # characters of a token
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
# (role, text); roles: system, user, input, assistant, given (an answer without loss), or one "text"
Turns = list[tuple[str, str]]
Segment = tuple[str | int, bool]  # (text or id, has_loss)
Run = tuple[list[Segment], bool]  # (texts encoded as one, whether they start the input)
Encoded = tuple[list[int], list[bool]]  # (ids, has_loss)


class BytePairCodec:
    """Byte-level BPE in tiktoken. `added` are ordinary tokens matched in the text before BPE."""

    # A prompt and its answer are encoded apart, as in generation, where the prompt is all there is.
    joint = False

    def __init__(self, ranks: dict[bytes, int], pattern: str, nfc: bool, added: dict[str, int]):
        # The look-ahead keeps a state for each character of the run, of which there is room for a
        # million. Without a bound a megabyte of spaces would end in a panic.
        pattern = pattern.replace(r"\s+(?!\S)", r"\s{1,100000}(?!\S)")
        self.encoding = tiktoken.Encoding(
            "checkpoint", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )
        # tiktoken panics where a byte of UTF-8 has no token; C0, C1 and all from F5 on are none.
        self.whole = all(bytes([b]) in ranks for b in range(0xF5) if b not in (0xC0, 0xC1))
        self.nfc, self.added = nfc, added
        longest_first = sorted(added, key=len, reverse=True)
        self.split = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if added else None
        self.bytes = {i: token for token, i in ranks.items()}
        self.bytes |= {i: token.encode() for token, i in added.items()}

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        # tiktoken's own batch call makes a task of each text, which costs more than encoding it
        size = max(64, -(-len(texts) // (os.cpu_count() or 1)))
        parts = [texts[n : n + size] for n in range(0, len(texts), size)]
        with ThreadPoolExecutor() as pool:
            return sum(pool.map(lambda part: [*map(self.encode, part)], parts), [])

    def encode_runs(self, runs: list[Run]) -> list[Encoded]:
        """The ids of each run, whose texts all have loss or all have none."""
        encoded = self.encode_batch(["".join(text for text, _ in run) for run, _ in runs])
        pairs = zip(encoded, runs, strict=True)
        return [(ids, [run[0][1]] * len(ids)) for ids, (run, _) in pairs]

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
    """Any other tokenizer.json, through the `tokenizers` library; see `_without_special`."""

    def __init__(self, spec: dict, special: dict[str, int], joint: bool):
        self.joint = joint  # apart, SentencePiece would put a space of its own before an answer
        source = json.dumps(_without_special(spec, special))
        # Metaspace may put a space before the very start of the input only, which text that follows
        # a control token is not, though it is encoded by itself here.
        inner = source.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
        try:
            import tokenizers
        except ImportError:
            raise ValueError("needs another library: pip install tokenizers") from None
        try:
            made = {text: tokenizers.Tokenizer.from_str(text) for text in {source, inner}}
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"the tokenizers library refuses it: {error}") from None
        self.tokenizer, self.inner = made[source], made[inner]
        self.special_ids = set(special.values())

    def encode_runs(self, runs: list[Run]) -> list[Encoded]:
        """The ids of each run. A token has loss if its last character belongs to an answer."""
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
        model["merges"] = [[a, b] for a, b in _merges(model) if a + b not in special]
    return {**spec, "model": model, "added_tokens": ordinary, "post_processor": None,
            "truncation": None, "padding": None}


@dataclass(eq=False)
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
    path: Path | None  # directory of the source files; None for the byte tokenizer
    rows: int | None  # of the model's embedding, as its config.json says
    chat: str | None  # the checkpoint's own chat template, in Jinja
    named: dict[str, str]  # what a template may name: {"bos_token": "<s>", …}
    control_pattern: re.Pattern  # any control token, with the spaces around it that some swallow

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, all of it as text, nothing added."""
        ids = self.encode_runs([([(text, False)], True)])[0][0]
        self.check(ids)
        return ids

    def encode_runs(self, runs: list[Run]) -> list[Encoded]:
        """The ids of each run, and which have loss. ValueError where the library gives up."""
        with self.one_line():
            return self.codec.encode_runs(runs)

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; control tokens and ids without a text are left out."""
        with self.one_line():
            return self.codec.decode(ids)

    @contextlib.contextmanager
    def one_line(self) -> Iterator[None]:
        """Make what tiktoken and `tokenizers` raise, a Rust panic too, which is no Exception, a
        ValueError that names the file."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"{self.path}/tokenizer.json: cannot do this text: {error}") from None

    def control(self, name: str) -> int:
        """Id of the control token `name`; ValueError if the vocabulary lacks it."""
        own = {EOS: self.eos_id, self.named.get(EOS): self.eos_id, self.named.get(BOS): self.bos_id}
        token_id = (own | self.special).get(name)
        if token_id is None:
            raise ValueError(f"{self.path}: the vocabulary lacks the control token {name}")
        return token_id

    def check(self, ids: Iterable[int]) -> None:
        """ValueError if an id has no row in the embedding: a vocabulary may have more than that."""
        if self.rows and self.rows < self.n_vocab and (top := max(ids, default=0)) >= self.rows:
            raise ValueError(f"the token {self.name(top)!r} has the id {top}: the embedding has "
                             f"only {self.rows} rows")  # fmt: skip

    def name(self, token_id: int) -> str:
        """How the vocabulary spells an id."""
        return {i: n for n, i in self.special.items()}.get(token_id) or self.decode([token_id])


def byte_tokenizer() -> Tokenizer:
    """The built-in model's tokenizer: 256 bytes, <bos>, <eos>."""
    return _from_spec(byte_spec(), {}, path=None, fingerprint="bytes")


def byte_spec() -> dict:
    """The tokenizer.json of `byte_tokenizer`."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    options = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    text = [{"Sequence": {"id": letter, "type_id": 0}} for letter in "AB"]
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": name, "special": True, **options}
                         for i, name in ((256, "<bos>"), (257, "<eos>"))],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "post_processor": {
            "type": "TemplateProcessing", "single": [bos, text[0]], "pair": [bos, *text],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [256], "tokens": ["<bos>"]}},
        },
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": _byte_of_char(), "merges": []},
    }


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a checkpoint directory; ValueError in one line if there is none to read."""
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{file}: missing; write it with transformers' save_pretrained")
    spec = read_json(file)
    settings = read_settings(
        file.parent, "special_tokens_map.json", "tokenizer_config.json",  # tokens by name
        "config.json", "generation_config.json",  # tokens by id
    )
    fingerprint = hashlib.sha256(file.read_bytes()).hexdigest()
    jinja = file.parent / "chat_template.jinja"
    if jinja.exists():
        with open_regular(jinja) as opened:
            settings["chat_template"] = opened.read(JSON_BYTES).decode(errors="surrogateescape")
    make = functools.partial(_from_spec, spec, settings, file.parent, fingerprint)
    tried(functools.partial(_try_out, make), file)
    return make()


def _try_out(make: Callable[[], Tokenizer]) -> None:
    """Make a tokenizer and encode some texts. In tiktoken and `tokenizers`, which are Rust, a file
    can end the process, fill the memory or run for ever."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    codec = make().codec
    for first in (True, False):
        runs = codec.encode_runs([([(text, True)], first) for text in TRIAL])
        for text, (ids, _) in zip(TRIAL, runs, strict=True):
            if codec.decode(ids) != text and isinstance(codec, BytePairCodec) and not codec.nfc:
                raise ValueError("its pattern does not match all text")


def read_settings(path: Path, *files: str) -> dict:
    """What those of the files that exist say, nulls aside; a later file goes before an earlier."""
    found = [read_json(path / name) for name in files if (path / name).is_file()]
    return {k: v for content in found for k, v in content.items() if v is not None}


def _from_spec(spec: dict, settings: dict, path: Path | None, fingerprint: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json's content and of what the configuration files say."""
    vocab, added = _vocabulary(spec, settings)
    beside = [token for token in added.values() if token not in (spec.get("added_tokens") or [])]
    spec = spec | {"added_tokens": [*added.values()]}
    named = {key: settings.get(f"{key}_token") for key in ("bos", "eos", "unk", "pad")}
    # What ends a text stays that where a template has another end for answers: see save_tokenizer.
    named["eos"] = settings.get("scalebio_eos_token", named["eos"])
    named = {k: v["content"] if isinstance(v, dict) else v for k, v in named.items()}
    control = {name for name, token in added.items() if token.get("special")}
    control |= {*named.values(), *KNOWN_BOS, *KNOWN_EOS, *TEMPLATE_TOKENS} - {None}
    special = {name: vocab[name] for name in sorted(control) if name in vocab}
    codec = _byte_pair_codec(spec, added, special)
    if codec:  # "</s>" may be an ordinary token of code
        special = {name: i for name, i in special.items() if i not in codec.bytes}
    if not codec or not codec.whole:
        codec = SentencePieceCodec(spec, special, joint=not codec)

    def configured(key: str) -> list[int]:
        """Ids given in config.json, whose default may be an id of ordinary text here."""
        value = settings.get(f"{key}_token_id", [])
        return [i for i in (value if isinstance(value, list) else [value]) if i in special.values()]

    def find(key: str, known: tuple[str, ...]) -> int | None:
        """The id of the token that is named, else of one configured, else of a known name."""
        if named[key] is not None:
            return vocab.get(named[key])
        return next(iter([*configured(key), *(special[n] for n in known if n in special)]), None)

    bos_id, eos_id = find("bos", KNOWN_BOS), find("eos", KNOWN_EOS)
    last = spec.get("post_processor") or {}
    pieces = [p for step in last.get("processors", [last]) for p in step.get("single", [])]
    opens = [vocab.get(p["SpecialToken"]["id"]) for p in pieces if "SpecialToken" in p]
    add_bos = bool(settings.get("add_bos_token", bos_id in opens) and bos_id is not None)
    stops = [eos_id] * (eos_id in special.values()) + configured("eos")
    n_vocab, rows = max(vocab.values()) + 1, settings.get("vocab_size")
    identity = [fingerprint, bos_id, eos_id, add_bos, special]
    identity += [rows] * (rows is not None and rows < n_vocab) + [beside] * bool(beside)
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    chat = settings.get("chat_template")
    if isinstance(chat, list):  # of several, each with a name
        chat = {each["name"]: each["template"] for each in chat}.get("default")
    if not isinstance(chat, str | None):
        raise ValueError(f"chat_template is {type(chat).__name__}, not a text")
    of_id, ends = {i: name for name, i in vocab.items()}, {"bos": bos_id, "eos": eos_id}
    named |= {key: of_id[i] for key, i in ends.items() if i is not None}
    pattern = _control_pattern({*special, named["bos"], named["eos"]} - {None}, added)
    named = {f"{key}_token": name for key, name in named.items() if name is not None}
    return Tokenizer(codec, special, bos_id, eos_id, add_bos, tuple(dict.fromkeys(stops)), n_vocab,
                     fingerprint, path, rows, chat, named, pattern)


def _control_pattern(names: set[str], added: dict[str, dict]) -> re.Pattern:
    """Any of these, the longest first, with the spaces around it that it swallows."""
    parts = []
    for name in sorted(names, key=len, reverse=True):
        before, after = (added.get(name, {}).get(key) for key in ("lstrip", "rstrip"))
        parts.append(r"\s*" * bool(before) + re.escape(name) + r"\s*" * bool(after))
    return re.compile(f"({'|'.join(parts) or '(?!)'})")


def _vocabulary(spec: dict, settings: dict) -> tuple[dict[str, int], dict[str, dict]]:
    """All tokens by name with their ids, and what is said of those added to the model's own."""
    added = {t["content"]: t for t in spec.get("added_tokens") or []}
    for i, token in settings.get("added_tokens_decoder", {}).items():  # as in transformers
        name = token["content"]
        plain = {"id": int(i), "content": name, **dict.fromkeys(FLAGS, False)}
        said = {key: value for key, value in token.items() if key in FLAGS}
        added[name] = plain | added.get(name, {}) | said
    vocab = spec["model"]["vocab"]
    if isinstance(vocab, list):  # Unigram: [piece, score]
        vocab = {piece: i for i, (piece, _) in enumerate(vocab)}
    own, vocab = vocab, vocab | {name: token["id"] for name, token in added.items()}
    if wrong := [(name, i) for name, i in vocab.items()
                 if type(i) is not int or not 0 <= i < 2**31 or len(name) > LONGEST
                 or not (name or name in own)]:
        raise ValueError(f"not a token and its id: {wrong[0]!r:.200}")
    if len(set(own.values())) < len(own):
        raise ValueError("two tokens have one id")
    return vocab, added


def _byte_pair_codec(spec: dict, added: dict, special: dict) -> BytePairCodec | None:
    """The tokenizer.json in tiktoken, or None if that cannot express it."""
    model, normalizer = spec["model"], spec.get("normalizer")
    pattern = _split_pattern(spec.get("pre_tokenizer") or {})
    ordinary = {name: token for name, token in added.items() if name not in special}
    options = "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"
    beyond = any(model.get(key) for key in (*options, "byte_fallback"))
    beyond |= any(t.get(k) for t in ordinary.values() for k in ("lstrip", "rstrip", "single_word"))
    beyond |= normalizer not in (None, {"type": "NFC"})
    # files of early library versions have no type
    if model.get("type", "BPE") != "BPE" or beyond or not pattern:
        return None
    vocab = {token: i for token, i in model["vocab"].items() if token not in added}
    ranks = _ranks(vocab, _merges(model), model.get("ignore_merges", False))
    ids = {name: token["id"] for name, token in ordinary.items()}
    return BytePairCodec(ranks, pattern, normalizer is not None, ids) if ranks else None


def _merges(model: dict) -> list[list[str]]:
    """The pairs to merge, which early versions of the library wrote as "a b"."""
    return [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]


def _split_pattern(pre_tokenizer: dict) -> str | None:
    """The regular expression that cuts text before BPE, where ByteLevel comes after it."""
    *before, byte_level = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    if byte_level.get("type") != "ByteLevel" or byte_level.get("add_prefix_space"):
        return None
    if byte_level.get("use_regex", True):
        return None if before else GPT2_PATTERN
    split = before[0] if len(before) == 1 else {}
    pattern = split.get("pattern", {}).get("Regex", "")
    isolated = split.get("behavior") == "Isolated" and not split.get("invert")
    # `tokenizers` keeps what the pattern does not match, tiktoken loses it. The patterns that end
    # like this one, those of GPT-2's line, match every character.
    return pattern if isolated and pattern.endswith(r"|\s+(?!\S)|\s+") else None


def _ranks(vocab: dict[str, int], merges: list, keep_all: bool) -> dict[bytes, int] | None:
    """Token bytes -> id, or None where ids do not grow in the order of the merges: tiktoken merges
    the pair whose union has the lowest id, `tokenizers` the one listed first."""
    byte_of = _byte_of_char()
    merged = dict.fromkeys(a + b for a, b in merges)  # in order; several pairs may give one token
    ids = [vocab.get(token, -1) for token in merged]
    if ids != sorted(ids) or ids[:1] == [-1] or set("".join(vocab)) - byte_of.keys():
        return None
    kept = vocab if keep_all else {t: i for t, i in vocab.items() if len(t) == 1 or t in merged}
    return {bytes(byte_of[char] for char in token): i for token, i in kept.items()}


@functools.cache
def _byte_of_char() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones as themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
