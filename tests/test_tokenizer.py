"""Ids against `tokenizers`, templates against transformers, masks against the text."""

import functools
import itertools
import json
import random
import shutil
import sys
import unicodedata

import pytest

from hf import compiled
from hf.templates import (
    NAMES,
    TEMPLATES,
    encode_conversations,
    fingerprint,
    render_prompt,
    save_tokenizer,
    stop_ids,
)
from hf.tokenizer import TEMPLATE_TOKENS, BytePairCodec, byte_tokenizer, load_tokenizer
from model import from_pretrained, save_pretrained
from tests.cases import SIZES

hf = pytest.importorskip("tokenizers")

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")
CODE = """
def f(x):
\tif x:
            return {'a': [1, 22, 333, 4444]}  # deep indent
                                return   None\r\n\r\n    \r\n
"""
AWKWARD = [
    "", " ", "  ", "\n", "\r\n", "\t \n ", "a", " a", "a ", "don't DON'T I'll we'Ve", CODE,
    "👩‍👩‍👧 🇩🇪 ✊🏽 e\u0301 \u1112\u1161\u11ab o\u0308\u0323",
    "½ ² ٣ ௧௨ 12345678", "\0\x01\x7f\u200b\ufeff",
    *(" " * n + "x" for n in range(1, 30)), *("x" + " " * n for n in range(1, 60)),
    "ſ K 'ſ It'S", "\u2028\u2029\x85\u3000.",
]


# of Unicode 3.2: later versions are not known alike to every regular expression library
ASSIGNED = [
    chr(c) for c in range(0x30000)
    if unicodedata.ucd_3_2_0.category(chr(c)) not in ("Cn", "Cs", "Co")
]


def random_unicode(n_runs: int) -> str:
    """Runs of neighbouring characters, so that words form, of all of Unicode."""
    rng = random.Random(0)
    starts = [rng.randrange(rng.choice([500, 5000, len(ASSIGNED)])) for _ in range(n_runs)]
    return "".join(
        char for n in starts for char in rng.choices(ASSIGNED[n : n + 60], k=rng.randint(1, 12))
    )


@pytest.fixture(scope="module")
def texts(asset):
    """Samples of the English, German, Chinese and maths data, code, and awkward characters."""
    out = list(AWKWARD)
    for name in ("alpaca/stanford_alpaca_first12000_en.json",
                 "multilingual/alpaca/alpaca_12k_de_openai.json",
                 "multilingual/alpaca/alpaca_zh_first3000.json"):
        records = json.loads(asset(name).read_text(encoding="utf-8"))[::20]
        out += [r[key] for r in records for key in ("instruction", "input", "output")]
    lines = asset("scalebio/eval_math/math_test.jsonl").read_text(encoding="utf-8").splitlines()
    out += [json.loads(line)["solution"] for line in lines[::20]]
    noise = random_unicode(8000)
    return [*out, noise, *noise.split("e")]


# name: (file, goes through tiktoken, n_vocab, bos, eos)
VOCABULARIES = {
    "gpt2": ("tokenizers/gpt2/tokenizer.json", True, 50257, None, 50256),
    "llama3": ("tokenizers/llama3/tokenizer.json", True, 128256, 128000, 128001),
    "llama2": ("tokenizers/llama2/tokenizer.json", False, 32000, 1, 2),
    "gpt_neox": ("tokenizers/gpt-neox-20b/20B_tokenizer.json", True, 50277, None, 0),
    "stories": ("model/stories260K-hf/tokenizer.json", False, 512, 1, 2),
}


@pytest.fixture(scope="module")
def vocabulary(asset, tmp_path_factory):
    """vocabulary(name): a published tokenizer, from its tokenizer.json alone; or "stories" with the
    Metaspace of newer files, by its scheme, of which "first" puts a space before the start of the
    input only; or "chat", a small one with the control tokens of all templates, opened by <s>."""

    @functools.cache
    def load(name):
        directory = tmp_path_factory.mktemp(name)
        if name in VOCABULARIES:
            shutil.copyfile(asset(VOCABULARIES[name][0]), directory / "tokenizer.json")
        elif name == "chat":
            train_bpe(directory, LLAMA3_PATTERN, special=["<s>", "</s>", *TEMPLATE_TOKENS])
            config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
            (directory / "tokenizer_config.json").write_text(json.dumps(config))
        else:
            spec = json.loads(asset(VOCABULARIES["stories"][0]).read_text())
            spec["normalizer"] = None
            spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁",
                                     "prepend_scheme": name, "split": False}  # fmt: skip
            (directory / "tokenizer.json").write_text(json.dumps(spec))
        return load_tokenizer(directory)

    return load


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_match_tokenizers(name, vocabulary, texts):
    tokenizer, (_, in_tiktoken, n_vocab, bos, eos) = vocabulary(name), VOCABULARIES[name]
    reference = hf.Tokenizer.from_file(str(tokenizer.path / "tokenizer.json"))
    expected = [e.ids for e in reference.encode_batch(texts, add_special_tokens=False)]
    encoded = tokenizer.encode_runs([([(text, False)], True) for text in texts])
    for text, (ids, _), wanted in zip(texts, encoded, expected, strict=True):
        assert ids == wanted, repr(text[:200])
    assert isinstance(tokenizer.codec, BytePairCodec) == in_tiktoken
    assert (tokenizer.n_vocab, tokenizer.bos_id, tokenizer.eos_id) == (n_vocab, bos, eos)
    assert tokenizer.add_bos == (bos is not None)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_decode_inverts_encode_and_control_tokens_in_text_are_text(name, vocabulary):
    tokenizer = vocabulary(name)
    for text in AWKWARD:
        text = unicodedata.normalize("NFC", text)  # what GPT-NeoX makes of any text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    beyond = [tokenizer.eos_id, tokenizer.n_vocab + 5]
    assert tokenizer.decode([*tokenizer.encode("some text"), *beyond]) == "some text"
    assert tokenizer.special
    for token in tokenizer.special:
        for text in (token, f"a {token} b", token * 3):
            ids = tokenizer.encode(text)
            assert not set(ids) & set(tokenizer.special.values()), text
            assert tokenizer.decode(ids) == text


def train_bpe(directory, pattern=None, nfc=False, added=(), special=()):
    """A small byte-level BPE of the shape of Qwen2's and GPT-2's tokenizer.json."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    byte_level = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern:
        split = hf.pre_tokenizers.Split(hf.Regex(pattern), "isolated")
        byte_level = hf.pre_tokenizers.Sequence([split, byte_level])
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = hf.decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = hf.normalizers.NFC()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(special), show_progress=False,
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([CODE, "the quick brown fox's 123 " * 9, *AWKWARD], trainer)
    tokenizer.add_tokens(list(added))
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokenizer


CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]


# the last leaves characters unmatched, which tiktoken cannot express
@pytest.mark.parametrize("pattern", [None, LLAMA3_PATTERN, QWEN2_PATTERN, r"\w+"])
@pytest.mark.parametrize("nfc", [False, True])
def test_small_bpe_matches_tokenizers(pattern, nfc, tmp_path):
    added = ["    ", "  ", "<tool>", "<tool>x"]
    reference = train_bpe(tmp_path, pattern, nfc, added, CHAT)
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer.codec, BytePairCodec) == (pattern != r"\w+")
    for text in [*AWKWARD, random_unicode(1500), "a<tool>xy<tool>", "       <tool>  x"]:
        assert tokenizer.encode(text) == reference.encode(text).ids, repr(text[:200])


def test_a_vocabulary_that_lacks_a_byte_goes_through_tokenizers_in_the_way_of_its_kind(tmp_path):
    train_bpe(tmp_path, special=CHAT)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    del spec["model"]["vocab"]["\u0104"]  # byte 4
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(tmp_path)
    reference = hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert not isinstance(tokenizer.codec, BytePairCodec)
    for text in (*AWKWARD, "a\x04b"):
        assert tokenizer.encode(text) == reference.encode(text).ids
    turns = [("user", "Count."), ("assistant", "\n one")]
    ids, has_loss = encode_conversation(tokenizer, "plain", turns)
    prompt = render_prompt(tokenizer, "plain", turns[:1])
    assert ids[: len(prompt)] == prompt and has_loss.index(True) == len(prompt)


def test_megabyte_runs_are_encoded(vocabulary):
    tokenizer = vocabulary("gpt2")
    for text in ("a" * 1_000_000, " " * 1_000_000 + "x", "\n \t" * 300_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_configuration_files_name_the_ends(tmp_path):
    train_bpe(tmp_path, special=CHAT)

    def write(name, **content):
        (tmp_path / name).write_text(json.dumps(content))
        return load_tokenizer(tmp_path)

    ids = load_tokenizer(tmp_path).special
    assert load_tokenizer(tmp_path).eos_id == ids["<|endoftext|>"]
    plain = write("config.json", eos_token_id=70, bos_token_id=ids["<s>"])  # 70 is ordinary text
    assert (plain.eos_id, plain.bos_id) == (ids["<|endoftext|>"], ids["<s>"])
    stops = write("generation_config.json", eos_token_id=[ids["<|im_end|>"], ids["<s>"]])
    assert stops.eos_ids == (ids["<|im_end|>"], ids["<s>"])
    named = write("tokenizer_config.json", eos_token={"content": "<|im_end|>"}, bos_token="<s>")
    assert (named.eos_id, named.add_bos) == (ids["<|im_end|>"], False)
    added = write("tokenizer_config.json", bos_token="<s>", add_bos_token=True)
    assert added.add_bos and added.bos_id == ids["<s>"]
    assert added.fingerprint != named.fingerprint


def test_unusable_tokenizers_are_refused_in_one_line(tmp_path, vocabulary, monkeypatch):
    def refusal(directory):
        with pytest.raises(ValueError) as error:
            load_tokenizer(directory)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "tokenizer.json: missing; write it with" in refusal(tmp_path)
    model = '{"model": {"type": "BPE", "vocab": {"a": 0}}, "added_tokens": [{"id": 1}]}'
    for broken in ("{", "[]", "{}", '{"model": {"vocab": {}}}', model):
        (tmp_path / "tokenizer.json").write_text(broken)
        assert "tokenizer.json" in refusal(tmp_path)
    train_bpe(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 5}')
    assert "chat_template is int, not a text" in refusal(tmp_path)
    directory = vocabulary("stories").path
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "pip install tokenizers" in refusal(directory)


TURNS = [
    ("system", "Be brief."), ("user", "What is 2 + 2?\n"), ("assistant", "It is 4."),
    ("user", "And então? 你好"), ("assistant", "Überall 👍\nyes"),
]


def encode_conversation(tokenizer, template, turns, max_length=10_000):
    return encode_conversations(tokenizer, template, [turns], max_length)[0]


WITH_INPUT = [("user", "Translate."), ("input", "Guten Tag"), ("assistant", "Good day")]
CONVERSATIONS = [
    TURNS, TURNS[1:], TURNS[1:3], [("user", ""), ("assistant", "x")],
    [("system", "Greet."), ("assistant", "Hello")],
]  # fmt: skip


def as_messages(turns):
    return [{"role": role, "content": text} for role, text in turns]


def transformers_tokenizer(tokenizer, directory, template):
    transformers = pytest.importorskip("transformers")
    save_tokenizer(tokenizer, directory, template)
    return transformers.AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("template, name", [
    *((template, "chat") for template in TEMPLATES),
    ("alpaca", "gpt2"), *itertools.product(("alpaca", "plain"), ("llama2", "stories", "first")),
])  # fmt: skip
def test_templates_match_transformers_chat_template(template, name, vocabulary, tmp_path):
    tokenizer = vocabulary(name)
    reference = transformers_tokenizer(tokenizer, tmp_path, template)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    for turns in [*CONVERSATIONS, WITH_INPUT][: None if template == "alpaca" else -1]:
        messages = as_messages(turns)
        ids, _ = encode_conversation(tokenizer, template, turns)
        assert ids == reference.apply_chat_template(messages, return_dict=False)
        prompt = render_prompt(tokenizer, template, turns[:-1])
        assert prompt == reference.apply_chat_template(
            messages[:-1], add_generation_prompt=True, return_dict=False
        )
        assert ids[: len(prompt)] == prompt  # generation continues what training showed


@pytest.mark.parametrize("name", ["always", "first", "never", "llama2"])
def test_a_document_has_the_ids_of_transformers(name, vocabulary, tmp_path):
    tokenizer = vocabulary(name)
    reference = transformers_tokenizer(tokenizer, tmp_path, "plain")
    for text in ("Once upon a time", " twice", "\nthrice  x"):
        ids, _ = encode_conversation(tokenizer, "plain", [("text", text)])
        assert ids == [*reference(text)["input_ids"], tokenizer.eos_id]


# Chat templates as checkpoints have them, with marks around what is learned: a system turn that is
# there anyway, ends of turns of which the last has another after it, one text of two turns.
OWN = {
    "system": "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{{ '' }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "swallowing": "{% for m in messages %}\n  {%- if m.role == 'assistant' -%}\n"
    "{{ '<|gpt|>\n' }}{%- generation -%}{{ m.content | trim + '<|im_end|>\n' }}"
    "{%- endgeneration %}\n{%- else -%}{{ '<start_of_turn>' + m.role + '\n' + m.content }}"
    "{{ '<end_of_turn>\n' }}{%- endif %}"
    "{% if not tools and loop.index > 99 %}{% break %}{% endif %}{%- endfor %}"
    "{{ '<|gpt|>\n' if add_generation_prompt else eos_token }}",
    "joined": "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + "
    "m.content.strip() + ' [/INST]' }}{% elif m.role == 'assistant' %}{% generation %}"
    "{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endgeneration %}{% endif %}{% endfor %}",
}
SWALLOWS = "<|gpt|>", "<|im_end|>", "<end_of_turn>"  # what follows as space


@pytest.fixture
def with_template(vocabulary, tmp_path):
    """with_template(vocabulary's name, source): our tokenizer of it with its own chat template, and
    transformers'; "swallowing" has a token more, and some that take in the spaces behind them."""
    transformers = pytest.importorskip("transformers")

    def make(name, source, **config):
        base = vocabulary(name)
        spec = json.loads((base.path / "tokenizer.json").read_text())
        if "<|gpt|>" in source:
            spec["added_tokens"].append(spec["added_tokens"][0] | {"id": base.n_vocab,
                                                                   "content": "<|gpt|>"})
            for token in spec["added_tokens"]:
                token["rstrip"] = token["content"] in SWALLOWS
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
        config |= {"bos_token": "<s>", "eos_token": "</s>", "chat_template": source}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)

    return make


@pytest.mark.parametrize("name, source", [("chat", "system"), ("chat", "swallowing"),
                                          ("llama2", "joined")])  # fmt: skip
def test_own_template_gives_the_ids_and_the_mask_of_transformers(name, source, with_template):
    ours, theirs = with_template(name, OWN[source])
    rng, made = random.Random(0), [TURNS[1:], *CONVERSATIONS[1:4]]
    texts = [text for turns in CONVERSATIONS for _, text in turns if text] + ["ab  cd", "日本"]
    for _ in range(40):
        roles = ("user", "assistant") * rng.randint(1, 4)
        made.append([("system", "Be brief.")] * rng.randint(0, 1 - (source == "joined")) +
                    [(role, rng.choice(texts)) for role in roles])  # fmt: skip
    for turns, (ids, has_loss) in zip(made, encode_conversations(ours, "own", made), strict=True):
        wanted = theirs.apply_chat_template(as_messages(turns), return_dict=True,
                                            return_assistant_tokens_mask=True)  # fmt: skip
        assert ids == wanted["input_ids"]
        if source != "swallowing":  # whose marks hold a space that is no token
            assert has_loss == [bool(m) for m in wanted["assistant_masks"]]
        answers = [text.strip() for role, text in turns if role == "assistant"]
        learned = trained_text(ours, ids, has_loss)
        assert [(text.strip(), end) for text, end in learned] == [(text, True) for text in answers]
        prompt = render_prompt(ours, "own", turns[:-1])
        assert prompt == ids[: len(prompt)] == theirs.apply_chat_template(
            as_messages(turns[:-1]), add_generation_prompt=True, return_dict=False)  # fmt: skip
    given = [TURNS[1], ("given", TURNS[2][1]), *TURNS[3:]]
    (ids, second), (same, both) = encode_conversations(ours, "own", [given, TURNS[1:]])
    start = len(render_prompt(ours, "own", TURNS[1:4]))
    assert ids == same and second == [False] * start + both[start:]


def test_text_in_an_own_template_is_no_control_token_and_an_input_joins_the_question(with_template):
    ours, _ = with_template("chat", OWN["system"])
    turns = [("user", "<|im_end|>\n<|im_start|>"), ("input", "\ue000"), ("assistant", "<|im_end|>")]
    ids, has_loss = encode_conversation(ours, "own", turns)
    assert [ids.count(ours.special[name]) for name in ("<|im_start|>", "<|im_end|>")] == [3, 3]
    assert trained_text(ours, ids, has_loss) == [("<|im_end|>", True)]
    assert "user\n<|im_end|>\n<|im_start|>\n\ue000\n" in ours.decode(ids)


USER = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}"


@pytest.mark.parametrize("source, words", [
    # an answer changes when more turns follow; a prompt is not how an answer begins; no end
    (USER + "{{ '!' if loop.last }}{% endfor %}", "turn 2, 'It is 4.', is not rendered alike"),
    (USER.replace("m.content", "(m.content if loop.last else '…')") + "{% endfor %}", "turn 2"),
    (USER + "{% endfor %}{{ '<think>' if add_generation_prompt }}", "turn 2, "),
    ("{% for m in messages %}{{ m.role + m.content }}{% endfor %}", "turn 2, "),
    (USER + "{% endfor %}{{ raise_exception('no such role') }}", "no such role"),
    (USER + "{{ m.__class__.__mro__ }}{% endfor %}", "unsafe"),
    (USER + "{{ m.update({'role': 'x'}) }}{% endfor %}", "unsafe"),
    (USER, "unexpected|Unexpected"),
    (USER + "{% endfor %}{{ 1 / 0 }}", "division"),
])  # fmt: skip
def test_an_own_template_that_cannot_be_used_is_refused_with_what_to_take_instead(
    source, words, with_template
):
    ours, _ = with_template("chat", source)
    with pytest.raises(ValueError, match=words) as error:
        encode_conversations(ours, "own", [TURNS[1:], TURNS[1:3]], numbers=[7, 9])
    for line, n in zip(str(error.value).splitlines(), (7, 9), strict=True):
        assert line.startswith(f"record {n}: ") and line.endswith(
            "take --template chatml" if "im_start" in source else "take --template alpaca")


def test_what_tokenizer_config_says_of_a_token_goes_before_tokenizer_json(with_template):
    source = OWN["swallowing"].replace("<|gpt|>", "<start_of_turn>model")
    kinds, prints = {}, set()
    for rstrip in (False, True):
        (base, _), decoder = with_template("chat", source), {}
        for name in ("<|im_end|>", "<end_of_turn>"):
            decoder[base.special[name]] = {"content": name, "rstrip": rstrip, "special": True}
        ours, theirs = with_template("chat", source, added_tokens_decoder=decoder)
        kinds[rstrip] = encode_conversations(ours, "own", [TURNS[1:]])[0][0]
        wanted = theirs.apply_chat_template(as_messages(TURNS[1:]), return_dict=False)
        assert kinds[rstrip] == wanted
        prints |= {base.fingerprint, ours.fingerprint}
    assert len(kinds[True]) < len(kinds[False]) and len(prints) == 2


def test_an_old_sandbox_renders_our_own_templates_alone(with_template, monkeypatch):
    ours, _ = with_template("chat", OWN["system"])
    compiled.cache_clear()
    monkeypatch.setattr("jinja2.__version__", "3.1.4")
    assert encode_conversation(ours, "chatml", TURNS)[0]
    with pytest.raises(ValueError, match="own chat template: the sandbox of jinja2 before"):
        encode_conversation(ours, "own", TURNS)


def test_the_own_template_decides_about_ids_and_a_date_is_always_the_same(with_template):
    ours, _ = with_template("chat", OWN["system"])
    assert fingerprint(ours, "plain") == ours.fingerprint != fingerprint(ours, "own")
    dated, _ = with_template("chat", "{{ strftime_now('%d %b %Y') }}" + OWN["system"])
    assert dated.fingerprint == ours.fingerprint and fingerprint(dated, "own") != fingerprint(
        ours, "own")  # fmt: skip
    assert dated.decode(render_prompt(dated, "own", TURNS[:2])).startswith("01 Jan 2025")
    (ours.path / "tokenizer_config.json").unlink()
    for template in ("own", None):
        with pytest.raises(ValueError, match="has no chat template: --template says"):
            render_prompt(load_tokenizer(ours.path), template, TURNS[:2])


@pytest.mark.parametrize("template", NAMES)
def test_the_saved_model_stops_in_transformers(template, with_template, tmp_path):
    """A base whose own end is </s>, where it is told so three times, and which samples."""
    import torch
    import transformers

    base, _ = with_template("chat", OWN["swallowing"].replace(" else eos_token", ""))
    end = {"bos_token_id": base.bos_id, "eos_token_id": base.eos_id}
    sizes = SIZES | {"vocab_size": base.n_vocab, "max_position_embeddings": 512}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **end))
    model.generation_config.update(**end, top_k=7, do_sample=True)
    model.save_pretrained(base.path)
    save_pretrained(from_pretrained(base.path), tmp_path / "out")
    save_tokenizer(load_tokenizer(base.path), tmp_path / "out", template)

    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer.apply_chat_template(as_messages(TURNS[1:2]), add_generation_prompt=True,
                                           return_tensors="pt", return_dict=False)  # fmt: skip
    ids, has_loss = encode_conversation(load_tokenizer(base.path), template, TURNS[1:3])
    answer = [i for i, learned in zip(ids, has_loss, strict=True) if learned]
    assert prompt[0].tolist() == ids[: len(prompt[0])]

    def say_it(so_far, scores):  # what a model that has learned it says, and then anything
        forced = torch.full_like(scores, -torch.inf)
        at = so_far.shape[1] - prompt.shape[1]
        forced[:, answer[at] if at < len(answer) else 5] = 0
        return forced

    said = saved.generate(prompt, max_new_tokens=99, logits_processor=[say_it])[0, prompt.shape[1]:]
    assert said.tolist() == answer and saved.generation_config.top_k == 7
    stops = list(dict.fromkeys([answer[-1], base.eos_id]))
    for name in ("config.json", "generation_config.json"):
        told = json.loads((tmp_path / "out" / name).read_text())["eos_token_id"]
        assert (told if isinstance(told, list) else [told]) == stops
    assert tokenizer.eos_token_id == answer[-1]
    again = load_tokenizer(tmp_path / "out")
    assert (again.eos_id, again.fingerprint) == (base.eos_id, base.fingerprint)  # of texts
    assert fingerprint(again, template) == fingerprint(base, template)
    assert encode_conversation(again, template, TURNS) == encode_conversation(base, template, TURNS)
    save_tokenizer(again, tmp_path / "third", "alpaca")
    third = transformers.AutoTokenizer.from_pretrained(tmp_path / "third")
    assert third.eos_token_id == base.eos_id


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_empty_texts_are_no_tokens(scheme, vocabulary):
    assert encode_conversation(vocabulary(scheme), "plain", [("text", "")])[0] == [1, 2]


@pytest.mark.parametrize("turns, with_input, question", [
    (WITH_INPUT[:2], ", paired with an input that provides further context",
     "Translate.\n\n### Input:\nGuten Tag"),
    (WITH_INPUT[:1], "", "Translate."),
])  # fmt: skip
def test_alpaca_prompts_are_stanfords(turns, with_input, question):
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(render_prompt(tokenizer, "alpaca", turns)) == (
        f"Below is an instruction that describes a task{with_input}. Write a response that "
        "appropriately completes the request.\n\n"
        f"### Instruction:\n{question}\n\n### Response:\n"
    )


def trained_text(tokenizer, ids, has_loss):
    """The maximal stretches with loss, as text, and whether each has an end token."""
    stretches = itertools.groupby(zip(ids, has_loss, strict=True), lambda pair: pair[1])
    trained = [[i for i, _ in run] for loss, run in stretches if loss]
    return [(tokenizer.decode(run), run[-1] in tokenizer.special.values()) for run in trained]


@pytest.mark.parametrize("template", TEMPLATES)
def test_loss_is_on_answers_and_their_ends_only(template, vocabulary):
    tokenizer = vocabulary("chat")
    sample = encode_conversation(tokenizer, template, TURNS)
    expected = [(text, True) for role, text in TURNS if role == "assistant"]
    assert trained_text(tokenizer, *sample) == expected
    if template != "alpaca":  # an input joins the question
        joined = [("user", "Translate.\nGuten Tag"), WITH_INPUT[2]]
        with_input = encode_conversation(tokenizer, template, WITH_INPUT)
        assert with_input == encode_conversation(tokenizer, template, joined)


@pytest.mark.parametrize("template, name", [
    *((template, "chat") for template in TEMPLATES), ("alpaca", "llama2"), ("plain", "llama2"),
])  # fmt: skip
def test_a_given_answer_has_the_same_ids_and_no_loss(template, name, vocabulary):
    tokenizer = vocabulary(name)
    turns = [("user", "Count."), ("assistant", "\n one"), ("user", "On."), ("assistant", " two")]
    ids, has_loss = encode_conversation(tokenizer, template, turns)
    same, second = encode_conversation(tokenizer, template, [*turns[:1], ("given", turns[1][1]),
                                                             *turns[2:]])  # fmt: skip
    assert same == ids and all(type(loss) is bool for loss in second)
    start = len(render_prompt(tokenizer, template, turns[:3]))
    assert second == [False] * start + has_loss[start:] and any(has_loss[:start])


@pytest.mark.parametrize("answer", ["4", " 4", "Größe", "👍🏽 ok", "▁x", "x  ", "\nx", "e\u0301"])
@pytest.mark.parametrize("template", ["alpaca", "plain"])
def test_sentencepiece_masks_are_never_off_by_one(template, answer, vocabulary):
    tokenizer = vocabulary("llama2")
    question = [("user", "Was ist 2 + 2 ")]
    turns = [*question, ("assistant", answer), ("user", "ö"), ("assistant", answer)]
    ids, has_loss = encode_conversation(tokenizer, template, turns)
    trained = trained_text(tokenizer, ids, has_loss)
    # decoding a part of a text loses the space before it, and ▁ is how the vocabulary spells spaces
    assert [(text.strip(), end) for text, end in trained] == 2 * [(answer.strip(" ▁\n"), True)]
    prompt = render_prompt(tokenizer, template, question)
    assert ids[: len(prompt)] == prompt
    assert has_loss.index(True) == len(prompt)


def test_truncated_answers_have_no_end_and_documents_loss_everywhere_but_first(vocabulary):
    tokenizer, turns = vocabulary("chat"), [("user", "Count."), ("assistant", "one two three four")]
    ids, has_loss = encode_conversation(tokenizer, "chatml", turns)
    assert ids[-1] == tokenizer.special["<|im_end|>"] and has_loss[-1]
    for cut in range(1, len(ids)):
        part = encode_conversation(tokenizer, "chatml", turns, cut)
        assert part == (ids[:cut], has_loss[:cut])
    first = encode_conversation(byte_tokenizer(), "plain", [("user", ""), ("assistant", "x")], 1)
    assert first[1] == [False]
    document = encode_conversation(byte_tokenizer(), "alpaca", [("text", "abc")])
    assert document == ([256, *b"abc", 257], [False, True, True, True, True])


def test_stop_ids_are_the_templates_and_the_vocabularys_and_a_missing_one_is_named(vocabulary):
    end, stop = (vocabulary("chat").special[name] for name in ("</s>", "<|im_end|>"))
    assert stop_ids(vocabulary("chat"), "plain") == [end]
    assert stop_ids(vocabulary("chat"), "chatml") == [stop, end]
    for template, name in ("chatml", "<.im_"), ("llama3", "<."), ("gemma", "<start_of_turn>"):
        for use in (stop_ids, functools.partial(encode_conversation, turns=TURNS)):
            with pytest.raises(ValueError, match=f"lacks the control token {name}"):
                use(byte_tokenizer(), template)


def test_byte_tokenizer_saved_opens_in_transformers_with_the_same_ids(tmp_path):
    tokenizer = byte_tokenizer()
    reference = transformers_tokenizer(tokenizer, tmp_path, "plain")
    again = load_tokenizer(tmp_path)
    for text in [*AWKWARD, random_unicode(400)]:
        assert tokenizer.encode(text) == again.encode(text) == list(text.encode())
        assert reference(text)["input_ids"] == [256, *text.encode()]
    for name in ("special", "bos_id", "eos_id", "add_bos", "eos_ids", "n_vocab"):
        assert getattr(again, name) == getattr(tokenizer, name)
    ids, _ = encode_conversation(tokenizer, "plain", TURNS)
    assert ids == reference.apply_chat_template(as_messages(TURNS), return_dict=False)
