"""Conversations to token ids and loss masks, by a template that the saved model takes along.

    turns = [("user", "Name a colour."), ("assistant", "Green.")]
    [(ids, has_loss)] = encode_conversations(tokenizer, "alpaca", [turns], max_length=512)

Only answers and the token that ends them carry loss. Control tokens are put in by id.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from hf.tokenizer import EOS, Encoded, Segment, Tokenizer, Turns, byte_spec, read_settings

CONTROL = re.compile(r"(<\|?\w+\|?>)")  # a control token within a template's own strings

ROLES = "system", "user", "assistant"
PREAMBLES = [  # Stanford Alpaca's, without and with an input
    f"Below is an instruction that describes a task{context}. "
    "Write a response that appropriately completes the request."
    for context in ("", ", paired with an input that provides further context")
]


@dataclass(frozen=True)
class Template:
    """A conversation is its turns, each `before[role]`, text, `end`, joined by `between`."""

    before: dict[str, str]
    between: str
    end: str  # a control token; EOS ends answers only, any other every turn
    preamble: bool = False  # opens with Alpaca's preamble unless there is a system turn
    merge_system: bool = False  # the model has no system role: its text opens the user's turn


TEMPLATES = {
    # Stanford Alpaca; with a newline after "Response:", as in alpaca-lora
    "alpaca": Template(
        {"system": "", "user": "### Instruction:\n", "input": "### Input:\n",
         "assistant": "### Response:\n"}, "\n\n", EOS, preamble=True,
    ),
    "plain": Template(dict.fromkeys(ROLES, ""), "\n", EOS),
    "chatml": Template({role: f"<|im_start|>{role}\n" for role in ROLES}, "\n", "<|im_end|>"),
    "llama3": Template(
        {role: f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ROLES},
        "", "<|eot_id|>",
    ),
    "gemma": Template(
        {"system": "<start_of_turn>user\n", "user": "<start_of_turn>user\n",
         "assistant": "<start_of_turn>model\n"}, "\n", "<end_of_turn>", merge_system=True,
    ),
}


def render(
    tokenizer: Tokenizer, template: str, turns: Turns, prompt: bool = False
) -> list[Segment]:
    """Segments (text or control token's id, has_loss); `prompt` opens one more answer. A single
    ("text", …) turn is a document. ValueError if the vocabulary lacks a token of the template."""
    style = TEMPLATES[template]
    segments = [(tokenizer.bos_id, False)] if tokenizer.add_bos else []
    if turns[0][0] == "text":
        return [*segments, (turns[0][1], True), (tokenizer.control(EOS), True)]

    def add(text: str) -> None:
        for n, piece in enumerate(CONTROL.split(text)):
            segments.append((tokenizer.control(piece) if n % 2 else piece, False))

    for n, (role, text) in enumerate(_fit(style, turns)):
        learned, answer = role == "assistant", role in ("assistant", "given")
        add(style.between * (n > 0) + style.before["assistant" if answer else role])
        # None: without loss too, but encoded apart from its prompt, as any answer is
        segments.append((text, learned if learned or not answer else None))
        if answer or style.end != EOS:
            segments.append((tokenizer.control(style.end), learned))
    if prompt:
        add(style.between + style.before["assistant"])
    return segments


def _fit(style: Template, turns: Turns) -> Turns:
    """The same conversation in roles that the template has."""
    if style.preamble and turns[0][0] != "system":
        with_input = any(role == "input" for role, _ in turns)
        turns = [("system", PREAMBLES[with_input]), *turns]
    out = []
    for role, text in turns:
        if role == "input" and "input" not in style.before:
            out[-1] = ("user", f"{out[-1][1]}\n{text}")
        elif role == "user" and out and out[-1][0] == "system" and style.merge_system:
            out[-1] = ("user", f"{out[-1][1]}\n\n{text}")
        else:
            out.append((role, text))
    return out


def encode_conversations(
    tokenizer: Tokenizer, template: str, conversations: list[Turns],
    max_length: int | None = None, prompt: bool = False,
) -> list[Encoded]:
    """(ids, has_loss) of each, cut to `max_length`, so that a truncated answer has no end token.

    The first id has no loss: nothing precedes it to predict it from. `prompt`: see `render`.
    """
    joint = tokenizer.codec.joint

    def kind(segment: Segment) -> tuple[bool, bool]:
        """Neighbours of one kind are encoded as one text, or taken over as ids."""
        return isinstance(segment[0], str), joint or segment[1]

    rendered = [render(tokenizer, template, turns, prompt) for turns in conversations]
    samples = [[(is_text, list(run)) for (is_text, _), run in groupby(segments, kind)]
               for segments in rendered]  # fmt: skip
    runs = [([(text, bool(loss)) for text, loss in run], n == 0)
            for s in samples for n, (is_text, run) in enumerate(s) if is_text]  # fmt: skip
    encoded = iter(tokenizer.codec.encode_runs(runs))
    out = []
    for sample in samples:
        ids, has_loss = [], []
        for is_text, run in sample:
            more_ids, more_loss = next(encoded) if is_text else zip(*run, strict=True)
            ids += more_ids
            has_loss += more_loss
        out.append((ids[:max_length], [False, *has_loss[1:max_length]]))
    return out


def render_prompt(tokenizer: Tokenizer, template: str, turns: Turns) -> list[int]:
    """Ids that end where the model is to answer."""
    return encode_conversations(tokenizer, template, [turns], prompt=True)[0][0]


def stop_ids(tokenizer: Tokenizer, template: str) -> list[int]:
    """Ids that end an answer in generation. ValueError if the vocabulary lacks the template's."""
    *_, (end, _) = render(tokenizer, template, [("user", ""), ("assistant", "")])
    return list(dict.fromkeys([end, *tokenizer.eos_ids]))


def chat_template(template: str, add_bos: bool = False) -> str:
    """Jinja source that renders messages as `render` does, for tokenizer_config.json."""
    style, source = TEMPLATES[template], "{{ bos_token }}" if add_bos else ""
    between, before = json.dumps(style.between), json.dumps(style.before)
    if style.preamble:
        source += (
            "{% if messages[0].role != 'system' %}"
            "{% set inputs = messages | selectattr('role', 'equalto', 'input') | list %}"
            f"{{% set preamble = {json.dumps(PREAMBLES)}[1 if inputs else 0] %}}"
            "{% set messages = [{'role': 'system', 'content': preamble}] + messages %}{% endif %}"
        )
    if style.merge_system:
        source += (
            "{% if messages[0].role == 'system' and messages[1:2] and messages[1].role == 'user' %}"
            "{% set text = messages[0].content + '\\n\\n' + messages[1].content %}"
            "{% set messages = [{'role': 'user', 'content': text}] + messages[2:] %}{% endif %}"
        )
    end = f"{{{{ {json.dumps(style.end)} }}}}"
    if style.end == EOS:
        end = "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    return source + (
        f"{{% set before = {before} %}}{{% for message in messages %}}"
        f"{{% if not loop.first %}}{{{{ {between} }}}}{{% endif %}}"
        f"{{{{ before[message.role] + message.content }}}}{end}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {between} + before['assistant'] }}}}{{% endif %}}"
    )


def trained_with(directory: Path) -> str:
    """The template of a model: by name where `save_tokenizer` has seen it, else the one whose
    control tokens its chat template has, else "alpaca"."""
    config = read_settings(directory, "tokenizer_config.json")
    if config.get("scalebio_template") in TEMPLATES:
        return config["scalebio_template"]
    jinja, file = str(config.get("chat_template")), directory / "chat_template.jinja"
    if file.is_file():
        jinja += file.read_text(encoding="utf-8")
    marks = {name: CONTROL.search(style.before["user"]) for name, style in TEMPLATES.items()}
    return next((name for name, mark in marks.items() if mark and mark[0] in jinja), "alpaca")


def save_tokenizer(tokenizer: Tokenizer, directory: str | os.PathLike, template: str) -> None:
    """Copy the tokenizer's files and write tokenizer_config.json with the template trained with."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {}
    if tokenizer.path is None:
        (directory / "tokenizer.json").write_text(json.dumps(byte_spec()), encoding="utf-8")
    else:
        config = read_settings(tokenizer.path, "special_tokens_map.json", "tokenizer_config.json")
        for name in ("tokenizer.json", "special_tokens_map.json"):
            if (tokenizer.path / name).is_file():
                shutil.copyfile(tokenizer.path / name, directory / name)
    names = {i: name for name, i in tokenizer.special.items()}
    ends = {"bos_token": names.get(tokenizer.bos_id), "eos_token": names.get(tokenizer.eos_id)}
    named = {key: name for key, name in ends.items() if name}
    config = named | {"tokenizer_class": "PreTrainedTokenizerFast"} | config
    config["chat_template"] = chat_template(template, tokenizer.add_bos)
    config["scalebio_template"] = template  # what evaluate.py takes where it is told nothing else
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
