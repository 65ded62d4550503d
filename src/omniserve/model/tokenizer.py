"""Text to token ids and back, and chat templates, on the `tokenizers` library alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, cast

import tokenizers
from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers.decoders import DecodeStream

from omniserve.errors import ModelError, RequestError
from omniserve.model.families import read_model_config

# Names under which tokenizer_config.json keeps the special tokens that templates may use.
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """The tokenizer of one model folder: tokenizer.json, tokenizer_config.json, chat_template.jinja.

    Equal to what transformers' AutoTokenizer gives for the same files. Safe to share between threads.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{path / 'tokenizer.json'}: cannot be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        settings = _read_settings(path / "tokenizer_config.json")
        self._special_tokens = _special_tokens(settings)
        self._template_source = _chat_template(path, settings)
        self._template: Template | None = None
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.eos_token_ids: tuple[int, ...] = self._eos_token_ids(path)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; with the tokens that the model wants around every prompt, if asked."""
        # The library lets other threads run during a batch, not during a single text.
        (encoded,) = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        return encoded.ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def stream(self, skip_special_tokens: bool = True) -> DetokenizerStream:
        """A detokeniser that takes ids one at a time."""
        return DetokenizerStream(self._tokenizer, skip_special_tokens)

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: n tokens never stand for more than n times as many."""
        return max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)))

    @property
    def has_chat_template(self) -> bool:
        return self._template_source is not None

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **extra: Any
    ) -> str:
        """The prompt text of a chat. `messages` are mappings with `role` and `content`; `extra` are further
        template variables. The text already holds its special tokens: encode it with
        `add_special_tokens=False`. Raises RequestError when the model has no template or it refuses the chat.
        """
        if self._template is None:
            if self._template_source is None:
                raise RequestError("messages", "this model has no chat template; send a plain prompt instead")
            self._template = _compile(self._template_source)
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                **{"tools": None, "documents": None} | self._special_tokens | extra,
            )
        except (
            Exception
        ) as error:  # templates are programs: besides TemplateError they raise TypeError and others
            raise RequestError("messages", f"the model's chat template refuses them: {error}") from error

    def _eos_token_ids(self, path: Path) -> tuple[int, ...]:
        """From generation_config.json or config.json; else the tokenizer's own end-of-text token."""
        if (path / "config.json").is_file() and (ids := read_model_config(path).eos_token_ids):
            return ids
        token = self._special_tokens.get("eos_token")
        token_id = None if token is None else self._tokenizer.token_to_id(token)
        return () if token_id is None else (token_id,)


class NoTokenizer(Tokenizer):
    """Of a model without tokenizer files: prompts must be token ids, and texts are empty."""

    def __init__(self, path: Path) -> None:
        config = read_model_config(path)
        self._template_source = None
        self._template = None
        self.vocab_size = config.vocab_size
        self.eos_token_ids = config.eos_token_ids

    @property
    def longest_token(self) -> int:
        return 1

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        raise RequestError("prompt", "this model has no tokenizer; send token ids instead of text")

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return ""

    def stream(self, skip_special_tokens: bool = True) -> DetokenizerStream:
        return _SilentStream()


def load_tokenizer(path: Path, is_required: bool = True) -> Tokenizer:
    """The tokenizer of a model folder; one that knows no text where there is none and none is required."""
    if is_required or (path / "tokenizer.json").is_file():
        return Tokenizer(path)
    return NoTokenizer(path)


class DetokenizerStream:
    """Turns ids into text piece by piece. The pieces, `finish()` included, join to `decode` of all ids.

    One exception: tokenizers with byte tokens turn a whole run of bytes into U+FFFD when a later one makes it
    invalid. What was given out before then stays as it was.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._ids: list[int] = []
        self._num_chars = 0

    def push(self, token_id: int) -> str:
        """Text that became certain with this token; empty while a character is incomplete."""
        self._ids.append(token_id)
        try:
            piece = self._stream.step(self._tokenizer, token_id) or ""
        except Exception:  # what the library raises when a run of bytes became invalid
            piece = self._restart()
        self._num_chars += len(piece)
        return piece

    def _restart(self) -> str:
        """The text not given out yet; the stream goes on behind it."""
        self._stream = DecodeStream(self._ids, skip_special_tokens=self._skip_special_tokens)
        return self._decoded()[self._num_chars :]

    def finish(self) -> str:
        """What is left when no more tokens come: an incomplete character, as U+FFFD. Empty mostly."""
        text = self._decoded()
        rest = text[self._num_chars :]
        self._num_chars = max(self._num_chars, len(text))
        return rest

    def _decoded(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=self._skip_special_tokens)


class _SilentStream(DetokenizerStream):
    def __init__(self) -> None:
        pass

    def push(self, token_id: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Name -> token text; tokens are written as strings or as objects with `content`."""
    values = {name: settings.get(name) for name in _SPECIAL_TOKENS}
    return {
        name: value["content"] if isinstance(value, dict) else value
        for name, value in values.items()
        if value is not None
    }


def _chat_template(path: Path, settings: Mapping[str, Any]) -> str | None:
    """chat_template.jinja if there is one, else the entry of tokenizer_config.json (one, or a named list)."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words for training: here, its body."""

    tags = {"generation"}  # noqa: RUF012 (declared so by the base class)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(source: str) -> Template:
    """Jinja as transformers sets it up, which is what template authors test against: a sandbox that cannot
    change what it is given, block trimming, loop controls, and three helpers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise ModelError(f"chat template cannot be compiled: {error}") from error


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; jinja's own filter escapes HTML, which would put escapes into prompts."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
