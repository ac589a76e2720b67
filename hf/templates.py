"""Conversations to token ids and loss masks, by a template that the saved model takes along.

    turns = [("user", "Name a colour."), ("assistant", "Green.")]
    [(ids, has_loss)] = encode_conversations(tokenizer, "alpaca", [turns], max_length=512)

A template is Jinja that renders messages, as in tokenizer_config.json: one of TEMPLATES, or "own",
which came with the checkpoint. Only answers and the control token that ends them carry loss.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from hf import TODAY, Problems, compiled, read_json, tried
from hf.tokenizer import EOS, Encoded, Segment, Tokenizer, Turns, byte_spec, read_settings

CONTROL = re.compile(r"<\|?\w+\|?>")  # a control token within the source of TEMPLATES
HOLE = 0xF0000  # the first of the characters that stand for the texts of turns
ROLES = "system", "user", "assistant"
PREAMBLES = [  # Stanford Alpaca's, without and with an input
    f"Below is an instruction that describes a task{context}. "
    "Write a response that appropriately completes the request."
    for context in ("", ", paired with an input that provides further context")
]


def _source(before: dict[str, str], between: str, end: str = EOS, first: str = "") -> str:
    """The template of turns that are each `before[role]`, text, `end`, and joined by `between`. EOS
    ends answers only, any other `end` every turn; `first` is what comes first."""
    ended = f"{{{{ {json.dumps(end)} }}}}"
    if end == EOS:
        ended = "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    before, between = json.dumps(before), json.dumps(between)
    return first + (
        f"{{% set before = {before} %}}{{% for message in messages %}}"
        f"{{% if not loop.first %}}{{{{ {between} }}}}{{% endif %}}"
        f"{{{{ before[message.role] + message.content }}}}{ended}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{% if messages %}}{{{{ {between} }}}}{{% endif %}}"
        "{{ before['assistant'] }}{% endif %}"
    )


TEMPLATES = {
    # Stanford Alpaca; with a newline after "Response:", as in alpaca-lora
    "alpaca": _source(
        {"system": "", "user": "### Instruction:\n", "input": "### Input:\n",
         "assistant": "### Response:\n"}, "\n\n", first=(
            "{% if (messages[0] or {}).role != 'system' %}"
            "{% set inputs = messages | selectattr('role', 'equalto', 'input') | list %}"
            f"{{% set preamble = {json.dumps(PREAMBLES)}[1 if inputs else 0] %}}"
            "{% set messages = [{'role': 'system', 'content': preamble}] + messages %}{% endif %}"
        ),
    ),
    "plain": _source(dict.fromkeys(ROLES, ""), "\n"),
    "chatml": _source({role: f"<|im_start|>{role}\n" for role in ROLES}, "\n", "<|im_end|>"),
    "llama3": _source({role: f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ROLES},
                      "", "<|eot_id|>"),
    "gemma": _source(  # has no system role: its text opens the user's turn
        {"system": "<start_of_turn>user\n", "user": "<start_of_turn>user\n",
         "assistant": "<start_of_turn>model\n"}, "\n", "<end_of_turn>",
        "{% set all = namespace(them=[]) %}{% for message in messages %}"
        "{% if message.role == 'user' and all.them and all.them[-1].role == 'system' %}"
        "{% set text = all.them[-1].content + '\\n\\n' + message.content %}"
        "{% set all.them = all.them[:-1] + [{'role': 'user', 'content': text}] %}"
        "{% else %}{% set all.them = all.them + [message] %}{% endif %}"
        "{% endfor %}{% set messages = all.them %}",
    ),
}
OWN = "own"
NAMES = (*TEMPLATES, OWN)


def chat_template(tokenizer: Tokenizer, template: str | None) -> str:
    """The source of a template. ValueError if there is none, or no such token as it names."""
    if template == OWN and tokenizer.chat:
        return tokenizer.chat
    if template not in TEMPLATES:
        raise ValueError(f"{tokenizer.path or 'tiny'}: has no chat template: --template says how "
                         f"a conversation becomes text ({', '.join(TEMPLATES)})")  # fmt: skip
    source = TEMPLATES[template]
    for name in [*CONTROL.findall(source), *[EOS] * (EOS in source)]:
        tokenizer.control(name)
    return "{{ bos_token }}" * tokenizer.add_bos + source


def render(
    tokenizer: Tokenizer, template: str | None, turns: Turns, prompt: bool = False
) -> list[Segment]:
    """Segments (text or control token's id, has_loss); `prompt` opens one more answer. A single
    ("text", …) turn is a document. ValueError if the template cannot render the turns."""
    if turns[0][0] == "text":
        bos = [(tokenizer.bos_id, False)] * tokenizer.add_bos
        return [*bos, (turns[0][1], True), (tokenizer.control(EOS), True)]
    fit = []  # the same conversation in roles that the template has
    for role, text in turns:
        if role == "input" and template != "alpaca":
            fit[-1] = ("user", f"{fit[-1][1]}\n{text}")
        else:
            fit.append((role, text))
    if template == OWN:
        return _segments(tokenizer, OWN, tuple(fit), prompt)
    holes = tuple((role, chr(HOLE + n)) for n, (role, _) in enumerate(fit))
    texts = {HOLE + n: text for n, (_, text) in enumerate(fit)}
    return [(part.translate(texts) if isinstance(part, str) else part, has_loss)
            for part, has_loss in _skeleton(tokenizer, template, holes, prompt)]  # fmt: skip


def _segments(tokenizer: Tokenizer, template: str, turns: tuple, prompt: bool) -> list[Segment]:
    """See `render`. What a model has to say is what follows a prompt, up to a control token."""
    source, control = chat_template(tokenizer, template), tokenizer.control_pattern
    used = {char for _, text in turns for char in text}
    apart = next(c for c in map(chr, range(0xE000, 0x110000)) if c not in used)
    # What spells a control token is taken apart until it is text again.
    texts = [control.sub(lambda found: apart.join(found[0]), text) for _, text in turns]
    messages = [{"role": "assistant" if role == "given" else role, "content": text}
                for (role, _), text in zip(turns, texts, strict=True)]  # fmt: skip

    def rendered(n: int, prompt: bool) -> str:
        """The first n messages."""
        named = tokenizer.named | {"tools": None, "documents": None}
        named |= {"messages": messages[:n], "add_generation_prompt": prompt}
        text = compiled(source, trusted=template != OWN)(**named)
        return control.sub(lambda found: found[0].strip(), text)

    def answer(n: int) -> tuple[int, int] | None:
        """Where the answer n is in the whole, if what follows leaves it as it was said."""
        if template != OWN:  # where a text is a hole; and alpaca's preamble looks ahead
            start = whole.index(texts[n])
            return start, control.search(whole, start).end()
        before, after, text = rendered(n, True), rendered(n + 1, False), texts[n].strip()
        start, said = len(before), after.find(text, len(before))
        end = control.search(after, said + len(text))
        there = said >= 0 and end and not control.search(after, start, said)
        stays = there and after.startswith(before) and whole.startswith(after[: end.end()])
        return (start, end.end()) if stays else None

    try:
        whole, parts, at = rendered(len(turns), prompt), [], 0
        for n, (role, _) in enumerate(turns):
            if role in ("assistant", "given") and (found := answer(n)):
                # None: no loss, but encoded apart from its prompt, as any answer is
                parts += [(whole[at : found[0]], False),
                          (whole[slice(*found)], role == "assistant" or None)]  # fmt: skip
                at = found[1]
            elif role == "assistant" and not prompt:
                said = turns[n][1][:40]
                raise ValueError(f"turn {n + 1}, {said!r}, is not rendered alike with and without "
                                 "turns after it, or has no control token at its end")  # fmt: skip
    except Exception as error:  # a template may run into any
        if template != OWN:
            raise ValueError(f"template {template}: {error}") from None
        near = (name for name in ("chatml", "llama3", "gemma")
                if CONTROL.search(TEMPLATES[name])[0] in source)  # fmt: skip
        raise ValueError(f"the model's own chat template: {error}: take --template "
                         f"{next(near, 'alpaca')}") from None  # fmt: skip
    return [(tokenizer.control(piece), bool(loss)) if n % 2 else (piece.replace(apart, ""), loss)
            for text, loss in [*parts, (whole[at:], False)]
            for n, piece in enumerate(control.split(text))]  # fmt: skip


# Of a conversation with a character from HOLE on for each text: none of TEMPLATES looks at texts.
_skeleton = functools.lru_cache(maxsize=4096)(_segments)


def encode_conversations(
    tokenizer: Tokenizer, template: str | None, conversations: list[Turns],
    max_length: int | None = None, prompt: bool = False, numbers: Sequence[int] = (),
) -> list[Encoded]:
    """(ids, has_loss) of each, cut to `max_length`, so that a truncated answer has no end token.

    The first id has no loss: nothing precedes it to predict it from. `prompt`: see `render`, whose
    ValueError has a line for each of the `numbers` that fails, up to five.
    """
    joint, rendered, problems = tokenizer.codec.joint, [], Problems()

    def kind(segment: Segment) -> tuple[bool, bool]:
        """Neighbours of one kind are encoded as one text, or taken over as ids."""
        return isinstance(segment[0], str), joint or segment[1]

    for n, turns in enumerate(conversations):
        with problems.collecting(f"record {numbers[n]}: " if numbers else ""):
            rendered.append(render(tokenizer, template, turns, prompt))
        if problems.count == 5:  # the rest are likely of the same kind
            break
    problems.raise_if_any()
    samples = [[(is_text, list(run)) for (is_text, _), run in groupby(segments, kind)]
               for segments in rendered]  # fmt: skip
    # A document opens the input even after BOS, as `tokenizers` takes it.
    runs = [([(text, bool(loss)) for text, loss in run], n == 0 or turns[0][0] == "text")
            for s, turns in zip(samples, conversations, strict=True)
            for n, (is_text, run) in enumerate(s) if is_text]  # fmt: skip
    encoded = iter(tokenizer.encode_runs(runs))
    out = []
    for sample in samples:
        ids, has_loss = [], []
        for is_text, run in sample:
            more_ids, more_loss = next(encoded) if is_text else zip(*run, strict=True)
            ids += more_ids
            has_loss += more_loss
        out.append((ids[:max_length], [False, *has_loss[1:max_length]]))
    tokenizer.check(i for ids, _ in out for i in ids)
    return out


def render_prompt(tokenizer: Tokenizer, template: str | None, turns: Turns) -> list[int]:
    """Ids that end where the model is to answer."""
    return encode_conversations(tokenizer, template, [turns], prompt=True)[0][0]


def stop_ids(tokenizer: Tokenizer, template: str | None) -> list[int]:
    """Ids that end an answer in generation, the template's first. ValueError as of `render`."""
    turns = [("user", "?"), ("assistant", "!")]
    ask = functools.partial(encode_conversations, tokenizer, template, [turns])
    if template == OWN:
        tried(ask, tokenizer.path)
    *_, end = (i for i, learned in zip(*ask()[0], strict=True) if learned)
    return list(dict.fromkeys([end, *tokenizer.eos_ids]))


def fingerprint(tokenizer: Tokenizer, template: str | None) -> str:
    """Hash of everything that determines ids, beside the name of the template."""
    own = json.dumps([tokenizer.fingerprint, tokenizer.chat, tokenizer.named, str(TODAY)])
    return hashlib.sha256(own.encode()).hexdigest() if template == OWN else tokenizer.fingerprint


def trained_with(tokenizer: Tokenizer) -> tuple[str | None, str]:
    """The template of a checkpoint, if it has one, and how that is known."""
    settings = read_settings(tokenizer.path, "tokenizer_config.json") if tokenizer.path else {}
    if settings.get("scalebio_template") in NAMES:
        return settings["scalebio_template"], "which the model was trained with"
    if tokenizer.chat:
        asks = f"; today, for it, is {TODAY}" * ("strftime_now" in tokenizer.chat)
        return OWN, f"the chat template of the checkpoint{asks}"
    return None, "as the checkpoint has no chat template"


def save_tokenizer(tokenizer: Tokenizer, directory: str | os.PathLike, template: str) -> None:
    """Copy the tokenizer beside a saved model, and write down what other software has to know: the
    template, and the ids that end an answer, the template's first."""
    directory, source, config, generation = Path(directory), tokenizer.path, {}, {}
    directory.mkdir(parents=True, exist_ok=True)
    if source is None:
        (directory / "tokenizer.json").write_text(json.dumps(byte_spec()), encoding="utf-8")
    else:
        shutil.copyfile(source / "tokenizer.json", directory / "tokenizer.json")
        config = read_settings(source, "special_tokens_map.json", "tokenizer_config.json")
        generation = read_settings(source, "generation_config.json")
    jinja, ids = chat_template(tokenizer, template), stop_ids(tokenizer, template)
    config = tokenizer.named | {"tokenizer_class": "PreTrainedTokenizerFast"} | config
    config |= {"chat_template": jinja, "scalebio_template": template}
    eos = config["scalebio_eos_token"] = tokenizer.named.get(EOS)
    config[EOS] = eos if EOS in jinja else tokenizer.name(ids[0])  # which that would render
    stops = {"eos_token_id": ids if len(ids) > 1 else ids[0]}
    written = {"tokenizer_config.json": config, "generation_config.json": generation | stops}
    if (directory / "config.json").is_file():
        written["config.json"] = read_json(directory / "config.json") | stops
    for name, content in written.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
