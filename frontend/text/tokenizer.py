"""The tokenizer of a served model: text to ids, ids to text, chat to prompt.

A thin layer over the `tokenizers` library and the files of a Hugging Face model directory; torch
and transformers are never imported, so that a front end starts in a blink.

Invariants
- Immutable after loading, hence usable from several threads.
- `decode(ids)` is what an `IncrementalDetokenizer` yields for the same ids, piece by piece.
- What a prompt becomes is up to tokenizer.json alone; padding and truncation that it may ask for
  are switched off.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import tokenizers

from frontend.errors import PromptTooLongError
from frontend.text.chat_template import ChatTemplate, ChatTemplateError
from frontend.text.token_bytes import TokenBytes, TokenizerError, compile_decoder

_HUB_PATTERNS = ["tokenizer*", "special_tokens_map.json", "config.json", "generation_config.json"]
_HUB_PATTERNS += ["chat_template*"]
_FOREIGN_FORMATS = ("tokenizer.model", "tekken.json", "vocab.json")
"""What models bring that were never converted to tokenizer.json."""

_MAX_CHARS_WITH_GIL = 1024
"""Longer texts are encoded as a batch of one, during which other threads run."""


class Tokenizer:
    """Loaded from a model directory; see `Tokenizer.load` for hub ids."""

    def __init__(self, directory: Path) -> None:
        """Read tokenizer.json and, where they exist, the configuration files beside it.

        Raises TokenizerError if something is missing, damaged or unsupported.
        """
        self.directory = directory
        self._backend = _read_backend(directory)
        config = _read_json(directory / "tokenizer_config.json")
        special_tokens = _special_tokens(_read_json(directory / "special_tokens_map.json") | config)
        self.eos_token_ids = self._find_eos_token_ids(special_tokens.get("eos_token"))
        """Ids that end an output, the tokenizer's own first, then those of the generation
        configuration."""
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        self.longest_token_chars: int = max(map(len, self._backend.get_vocab()), default=0)
        """No token stands for more characters, so a text of more than this times the context's
        tokens cannot fit. (Added tokens that swallow the white space beside them do not count.)"""
        self._chat_template = _read_chat_template(directory, config, special_tokens)

        to_bytes, first_to_bytes = compile_decoder(json.loads(self._backend.to_str())["decoder"])
        added = self._backend.get_added_tokens_decoder()
        special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        id_to_token = self._backend.id_to_token
        self._tables = {
            skip: TokenBytes(to_bytes, id_to_token, special_ids if skip else ())
            for skip in (False, True)
        }
        self._first_tables = {
            skip: TokenBytes(first_to_bytes, id_to_token, special_ids if skip else ())
            for skip in (False, True)
            if first_to_bytes is not None
        }

    @classmethod
    def load(cls, model: str) -> Tokenizer:
        """Load from a directory, or from the Hugging Face hub if `model` is no directory.

        Raises TokenizerError.
        """
        directory = Path(model).expanduser()
        if directory.is_dir():
            return cls(directory)
        try:
            snapshot = huggingface_hub.snapshot_download(model, allow_patterns=_HUB_PATTERNS)
        except (OSError, ValueError) as error:
            # Both of the hub's roots: connection and cache errors, and ids that are none.
            raise TokenizerError(
                f"model {model!r} is neither a directory nor obtainable from the Hugging Face hub "
                f"({str(error).splitlines()[0]}); give the path of a model directory"
            ) from error
        return cls(Path(snapshot))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; rendered chat prompts go with `add_special_tokens=False`.

        Raises ValueError if `text` is no string of Unicode characters.
        """
        try:
            if len(text) > _MAX_CHARS_WITH_GIL:
                [encoding] = self._backend.encode_batch(
                    [text], add_special_tokens=add_special_tokens
                )
            else:
                encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        except TypeError:
            raise ValueError(
                f"text {text!r:.80} cannot be tokenized: give a str without lone surrogates"
            ) from None
        return list(encoding.ids)

    def check_fits(self, text: str, max_model_len: int) -> None:
        """Tell, without tokenizing it, that a text is too long for a context of so many tokens.

        Raises PromptTooLongError for one that surely is.
        """
        most = max_model_len * self.longest_token_chars
        if len(text) > most:
            raise PromptTooLongError(
                f"the prompt has {len(text)} characters, but the model's context of "
                f"max_model_len={max_model_len} tokens holds at most {most}; shorten the prompt"
            )

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; bytes that are no UTF-8 become U+FFFD."""
        table = self.bytes_table(skip_special_tokens=skip_special_tokens)
        pieces = [table[token_id] for token_id in token_ids]
        first_table = self.first_bytes_table(skip_special_tokens=skip_special_tokens)
        if first_table is not None:
            first = next((place for place, piece in enumerate(pieces) if piece), None)
            if first is not None:
                pieces[first] = first_table[token_ids[first]]
        return b"".join(pieces).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for, special tokens spelled out; may be part of a character."""
        return self._tables[False][token_id]

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text; U+FFFD stands for what is no character by itself."""
        return self._tables[False][token_id].decode("utf-8", "replace")

    def token_spelling(self, token_id: int) -> str:
        """How the vocabulary spells a token (`Ġworld`); empty for an id without token."""
        return self._backend.id_to_token(token_id) or ""

    def bytes_table(self, *, skip_special_tokens: bool) -> TokenBytes:
        """The bytes of any token that continues a text."""
        return self._tables[skip_special_tokens]

    def first_bytes_table(self, *, skip_special_tokens: bool) -> TokenBytes | None:
        """The bytes of a token that begins a text, for tokenizers where they differ."""
        return self._first_tables.get(skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: object,
    ) -> str:
        """The prompt text for `messages`, special tokens included (encode it without adding them
        again). With `continue_final_message` it ends where the last message's content does.

        Raises ChatTemplateError if the model has no template or its template refuses the messages.
        """
        if self._chat_template is None:
            raise ChatTemplateError(
                f"the model in {self.directory} has no chat template; send a plain prompt, "
                "or put a chat_template.jinja into its directory"
            )
        return self._chat_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **variables,
        )

    def _find_eos_token_ids(self, eos_token: str | None) -> tuple[int, ...]:
        found: list[int] = []
        if eos_token is not None and (eos_id := self._backend.token_to_id(eos_token)) is not None:
            found.append(eos_id)
        for name in ("generation_config.json", "config.json"):
            ids = _read_json(self.directory / name).get("eos_token_id")
            if ids is not None:
                found += ids if isinstance(ids, list) else [ids]
                break
        return tuple(dict.fromkeys(found))


def _read_backend(directory: Path) -> tokenizers.Tokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        foreign = next((name for name in _FOREIGN_FORMATS if (directory / name).is_file()), None)
        remedy = "copy the model's tokenizer files there, or name another directory for them"
        if foreign is not None:
            remedy = f"convert {foreign} by loading and saving it with transformers' AutoTokenizer"
        raise TokenizerError(f"no tokenizer.json in {directory}; {remedy}")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{path} cannot be read: {error}; download it again") from error
    backend.no_padding()
    backend.no_truncation()
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise TokenizerError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise TokenizerError(f"{path} must hold a JSON object, not {type(values).__name__}")
    return values


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the like by name; each is a string or an object with its `content`."""
    tokens = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens


def _read_chat_template(
    directory: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> ChatTemplate | None:
    """The template from chat_template.jinja or tokenizer_config.json; of several, the one named
    default."""
    try:
        source: object = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        source = config.get("chat_template")
    if isinstance(source, list):
        source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
    return ChatTemplate(source, special_tokens) if isinstance(source, str) else None
