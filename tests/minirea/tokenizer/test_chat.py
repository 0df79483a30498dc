"""Chat templates: where they are found, what they may use, what they may not, and BOS exactly once."""

from __future__ import annotations

import base64
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors

from minirea.errors import InputError, MinireaError
from minirea.tokenizer import Tokenizer, load_tokenizer

PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}bot: {% endif %}"
)
WITH_BOS = "{{ bos_token }}" + PLAIN + "{{ eos_token }}"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": 'Say "é" & <hi>\n 🙂'}]
BOS = 256


def write(directory: Path, template: Any = None, bos: bool = True, **config: Any) -> Path:
    """A model directory whose tokenizer has a token per byte, <s> = 256 and </s> = 257."""
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = LibraryTokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>"} | config
    if template is not None:
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    return directory


def text_of(tokenizer: Tokenizer, **options: Any) -> str:
    return tokenizer.decode(tokenizer.encode_chat(MESSAGES, **options), skip_special_tokens=False)


EXPECTED = 'system: Be brief.\nuser: Say "é" & <hi>\n 🙂\nbot: '


class TestWhereTemplatesAreFound:
    def test_in_the_config(self, tmp_path: Path) -> None:
        tokenizer = load_tokenizer(write(tmp_path, PLAIN))
        assert tokenizer.has_chat_template
        assert text_of(tokenizer) == "<s>" + EXPECTED
        assert text_of(tokenizer, add_generation_prompt=False) == "<s>" + EXPECTED.removesuffix("bot: ")

    def test_the_default_of_several(self, tmp_path: Path) -> None:
        named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": PLAIN}]
        assert text_of(load_tokenizer(write(tmp_path, named))) == "<s>" + EXPECTED

    def test_in_a_file_which_comes_first(self, tmp_path: Path) -> None:
        (tmp_path / "chat_template.jinja").write_text(PLAIN, encoding="utf-8")
        assert text_of(load_tokenizer(write(tmp_path, "other"))) == "<s>" + EXPECTED

    def test_in_json_which_comes_last(self, tmp_path: Path) -> None:
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": PLAIN}))
        assert text_of(load_tokenizer(write(tmp_path))) == "<s>" + EXPECTED
        assert text_of(load_tokenizer(write(tmp_path, "other"))) == "<s>other"

    def test_nowhere(self, tmp_path: Path) -> None:
        tokenizer = load_tokenizer(write(tmp_path))
        assert not tokenizer.has_chat_template
        with pytest.raises(InputError, match=f"{tmp_path}: no chat template, expected chat_template.jinja"):
            tokenizer.encode_chat(MESSAGES)


@pytest.mark.parametrize("template", [PLAIN, WITH_BOS, "{{ messages[0].content }}"])
def test_bos_comes_once_and_nothing_follows(tmp_path: Path, template: str) -> None:
    ids = load_tokenizer(write(tmp_path, template)).encode_chat(MESSAGES)
    assert ids[0] == BOS and ids.count(BOS) == 1
    assert ids.count(257) == template.count("eos_token"), "the post-processor's EOS ends texts, not conversations"


def test_a_tekken_model_has_names_for_its_own_bos_and_eos(tmp_path: Path) -> None:
    vocab = [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode()} for i in range(256)]
    tekken = {"config": {"pattern": ".", "default_num_special_tokens": 20}, "vocab": vocab}
    (tmp_path / "tekken.json").write_text(json.dumps(tekken))
    (tmp_path / "chat_template.jinja").write_text(
        "{{ bos_token }}[INST]{{ messages[0].content }}[/INST]{{ eos_token }}"
    )
    ids = load_tokenizer(tmp_path).encode_chat([{"role": "user", "content": "A"}])
    assert ids == [1, 3, 20 + ord("A"), 4, 2]


def test_the_config_names_tokens_before_the_older_map(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "</s>", "pad_token": {"content": "x"}}))
    tokenizer = load_tokenizer(write(tmp_path, "{{ bos_token }}{{ pad_token }}"))
    assert text_of(tokenizer) == "<s>x"


def test_no_bos_where_encode_puts_none(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path, PLAIN, bos=False))
    assert BOS not in tokenizer.encode_chat(MESSAGES)
    assert load_tokenizer(write(tmp_path, WITH_BOS, bos=False)).encode_chat(MESSAGES)[0] == BOS


LOOP = "{% for m in messages %}"
TEMPLATES = {
    "bos": WITH_BOS,
    "blocks are trimmed": "{{ bos_token }}\n  {% if messages %}\n  x\n  {% endif %}\n y",
    "loop controls": "{{ bos_token }}"
    + LOOP
    + "{% if loop.index == 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "tojson": "{{ bos_token }}{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "namespace": "{{ bos_token }}{% set ns = namespace(n=0) %}"
    + LOOP
    + "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "undefined names": "{{ bos_token }}{{ no }}{{ pad_token }}{% if tools is none %}n{% endif %}",
    "generation": "{{ bos_token }}{% generation %}{{ messages[0].content }}{% endgeneration %}",
    "date": "{{ bos_token }}{{ strftime_now('%% plain %%') }}",
    "macro": "{{ bos_token }}{% macro f(m) %}[{{ m['content'] | trim }}]{% endmacro %}{{ f(messages[1]) }}",
    "slices": "{{ bos_token }}{% for m in messages[1:] %}{{ m.content.split('\n')[-1].strip().upper() }}{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_ids_equal_transformers(tmp_path: Path, name: str, add_generation_prompt: bool) -> None:
    directory = write(tmp_path, TEMPLATES[name], unk_token="<s>")
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    expected = theirs.apply_chat_template(
        MESSAGES, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
    )
    assert load_tokenizer(directory).encode_chat(MESSAGES, add_generation_prompt) == expected


def test_the_date_is_todays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datetime

    import minirea.tokenizer.chat

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Clock:
            return cls(2024, 7, 23, tzinfo=tz)

    monkeypatch.setattr(minirea.tokenizer.chat, "datetime", Clock)
    tokenizer = load_tokenizer(write(tmp_path, "{{ strftime_now('%d %b %Y') }}", bos=False))
    assert tokenizer.decode(tokenizer.encode_chat(MESSAGES)) == "23 Jul 2024"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('touch ' ~ messages[0].content) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__ }}",
        "{% set x = messages.clear() %}",
        "{{ '%s'.__class__.format('{0.__class__}', 1) }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(999999999) %}{% endfor %}",
    ],
)
def test_hostile_templates_get_nothing(tmp_path: Path, template: str) -> None:
    tokenizer = load_tokenizer(write(tmp_path, template))
    with contextlib.suppress(InputError):  # some attempts fail, others come to nothing
        text = tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": str(tmp_path / "owned")}]))
        assert "class" not in text and "module" not in text
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "the chat template fails: roles must alternate"),
        ("{% if %}", "the chat template fails: Expected an expression"),
        ("{{ messages[9].content.strip() }}", "the chat template fails: list object has no element 9"),
        ("{{ 1 / 0 }}", "the chat template fails: division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "the chat template fails: maximum recursion depth"),
    ],
)
def test_a_template_that_fails_is_one_line(tmp_path: Path, template: str, message: str) -> None:
    tokenizer = load_tokenizer(write(tmp_path, template))
    with pytest.raises(InputError) as caught:
        tokenizer.encode_chat(MESSAGES)
    assert f"{tmp_path}/tokenizer_config.json: {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (7, "chat_template is 7, expected a template"),
        ([{"name": "rag", "template": "x"}], 'expected a template, or a list of named ones with a "default"'),
        ([1, {}], "expected a template"),
    ],
)
def test_a_template_of_the_wrong_type(tmp_path: Path, template: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_tokenizer(write(tmp_path, template))


def test_a_template_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"chat_template.jinja: cannot be read"):
        load_tokenizer(write(tmp_path))


@pytest.mark.parametrize(
    "messages", [[], ["hi"], [{"role": "user"}], [{"role": "user", "content": None}], [{"role": 1, "content": "x"}]]
)
def test_malformed_messages(tmp_path: Path, messages: Any) -> None:
    tokenizer = load_tokenizer(write(tmp_path, PLAIN))
    with pytest.raises(MinireaError, match="expected"):
        tokenizer.encode_chat(messages)
