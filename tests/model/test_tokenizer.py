"""The tokenizer gives what transformers' AutoTokenizer gives, without importing it."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omniserve.errors import ModelError, RequestError
from omniserve.model.tokenizer import Tokenizer

TinyLlama = Callable[..., Path]

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "The year 2024 had 366 days; 3.14159 and 1,000,000.",
    "  leading, and trailing  \n\n\ttabs",
    "naïve café — “quotes” … 漢字かな 한국어 🙂👩‍👩‍👧",
    "def f(x):\n    return x ** 2  # 42\n",
    "<|im_start|>user\nhi<|im_end|>\n",
    "don't I'LL we've",
    "\u0000\ufffd\u200b",
]
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "What is 2 + 2?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\n"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": " c "},
    ],
]


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Tokenizer:
    return Tokenizer(smollm2_path)


@pytest.fixture(scope="module")
def reference(smollm2_path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_path)


@pytest.mark.parametrize("text", TEXTS)
def test_texts_encode_and_decode_as_in_transformers(tokenizer: Tokenizer, reference: Any, text: str) -> None:
    ids = reference(text).input_ids
    assert tokenizer.encode(text) == ids
    assert (
        tokenizer.encode(text, add_special_tokens=False)
        == reference(text, add_special_tokens=False).input_ids
    )
    for skip in (True, False):
        assert tokenizer.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip)


# The vocabulary lacks some control bytes, and the bytes that start characters above U+3FFFF.
KNOWN_CHARACTERS = st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs", "Cc"])


@given(text=st.text(KNOWN_CHARACTERS, max_size=80))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_survives_encoding(tokenizer: Tokenizer, reference: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == reference(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_every_digit_is_a_token_of_its_own(tokenizer: Tokenizer) -> None:
    assert [tokenizer.decode([i]) for i in tokenizer.encode("x 90210")][-5:] == list("90210")


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chats_are_laid_out_as_in_transformers(
    tokenizer: Tokenizer, reference: Any, chat: list[dict[str, Any]], add_generation_prompt: bool
) -> None:
    expected = reference.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert tokenizer.apply_chat_template(chat, add_generation_prompt) == expected


TRICKY_TEMPLATE = """\
{%- for m in messages %}
    {%- if m.role == 'stop' %}{% break %}{% endif %}
    {% generation %}{{ bos_token }}{{ m | tojson }}{% endgeneration %}
    {%- if m.role == 'bad' %}{{ raise_exception('no ' + m.role) }}{% endif %}
{% endfor %}{{ eos_token }}{{ strftime_now('%Y') | length }}{{ tools is none }}"""


@pytest.fixture
def tricky(smollm2_path: Path, tmp_path: Path) -> Path:
    """A folder whose template uses every helper."""
    shutil.copy(smollm2_path / "tokenizer.json", tmp_path)
    settings = json.loads((smollm2_path / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    settings["bos_token"] = {"__type": "AddedToken", "content": settings["bos_token"], "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "chat_template.jinja").write_text(TRICKY_TEMPLATE)
    return tmp_path


def test_templates_find_the_helpers_they_know_from_transformers(tricky: Path) -> None:
    from transformers import AutoTokenizer

    chat = [{"role": "user", "content": "<é & '\">"}, {"role": "stop", "content": "x"}]
    expected = AutoTokenizer.from_pretrained(tricky).apply_chat_template(chat, tokenize=False)
    assert Tokenizer(tricky).apply_chat_template(chat, add_generation_prompt=False) == expected
    assert "<é &" in expected


def test_a_chat_that_the_template_refuses_is_a_bad_request(tricky: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"messages: .*no bad"):
        Tokenizer(tricky).apply_chat_template([{"role": "bad", "content": ""}])
    with pytest.raises(RequestError, match="messages"):
        tokenizer.apply_chat_template([{"role": "user", "content": None}])


def test_a_model_without_template_says_so(tricky: Path) -> None:
    (tricky / "chat_template.jinja").unlink()
    tokenizer = Tokenizer(tricky)
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match="no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])


def test_templates_cannot_reach_python(tricky: Path) -> None:
    (tricky / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(RequestError):
        Tokenizer(tricky).apply_chat_template([{"role": "user", "content": "hi"}])
    (tricky / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ModelError, match="cannot be compiled"):
        Tokenizer(tricky).apply_chat_template([])


@given(ids=st.lists(st.integers(0, 49151), max_size=40), skip=st.booleans())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_streamed_pieces_join_to_the_decoded_text(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    stream = tokenizer.stream(skip)
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids, skip)
    assert stream.finish() == ""


def test_half_a_character_is_never_streamed(tokenizer: Tokenizer) -> None:
    text = "🙂漢é👩‍👩‍👧"
    stream = tokenizer.stream()
    pieces = [stream.push(token_id) for token_id in tokenizer.encode(text)]
    assert len(pieces) > len([piece for piece in pieces if piece])
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_the_cut_off_tail_of_a_character_is_given_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🦜")[:-1]
    stream = tokenizer.stream()
    assert "".join(stream.push(i) for i in ids) == "a"
    assert stream.finish() == tokenizer.decode(ids)[1:] != ""


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer in the manner of Llama 2: words with a space mark, and a token for every byte."""
    import tokenizers
    from tokenizers import decoders, models

    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁hello", "▁wor", "ld", "é"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    folder = tmp_path_factory.mktemp("byte-fallback")
    tokenizer.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@given(words=st.lists(st.one_of(st.integers(257, 261), KNOWN_CHARACTERS), max_size=20))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_text_in_byte_tokens_streams_too(byte_fallback: Tokenizer, words: list[int | str]) -> None:
    ids: list[int] = []
    for word in words:
        ids += [word] if isinstance(word, int) else [byte + 1 for byte in word.encode()]
    stream = byte_fallback.stream()
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) + stream.finish() == byte_fallback.decode(ids)


@given(ids=st.lists(st.integers(0, 261), max_size=30))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_broken_bytes_never_stop_a_stream(byte_fallback: Tokenizer, ids: list[int]) -> None:
    stream = byte_fallback.stream()
    text = "".join(stream.push(token_id) for token_id in ids) + stream.finish()
    assert len(text) >= len(byte_fallback.decode(ids))


def test_facts_of_the_model(tokenizer: Tokenizer, tiny_llama: TinyLlama) -> None:
    assert (tokenizer.vocab_size, tokenizer.eos_token_ids) == (49152, (2,))
    tiny = Tokenizer(tiny_llama())
    assert (tiny.vocab_size, tiny.eos_token_ids) == (512, (257,))
    assert tiny.decode(tiny.encode("plain ünicode")) == "plain ünicode"


def test_end_of_text_falls_back_to_the_tokenizers_own(tricky: Path) -> None:
    assert Tokenizer(tricky).eos_token_ids == (2,)


def test_a_folder_without_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json: cannot be read"):
        Tokenizer(tmp_path)


def test_other_threads_run_while_a_long_text_is_tokenised(smollm2_path: Path) -> None:
    tokenizer = Tokenizer(smollm2_path)
    text = "The quick brown fox. " * 20_000
    number = len(tokenizer.encode(text[:21]))
    turns = 0
    found: list[list[int]] = []
    worker = threading.Thread(target=lambda: found.append(tokenizer.encode(text)))
    worker.start()
    while worker.is_alive():
        turns += 1
        time.sleep(0)
    assert turns > 100, "a thread that is held up gets a turn or two"
    assert len(found[0]) >= number * 20_000 * 0.8
