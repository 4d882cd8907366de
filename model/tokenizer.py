"""Text to token ids and back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from . import gguf_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


class Tokenizer:
    """A Hugging Face fast tokenizer, with the bytes of each token so that text can be streamed.

    vocab_size:            one more than the highest token id
    eos_token_ids:         the tokens that end a text, as far as the tokenizer knows
    strips_leading_space:  `decode` drops one space at the start of the whole text, as SentencePiece does
    """

    def __init__(self, fast: PreTrainedTokenizerFast, eos_token_ids: Iterable[int] = ()):
        """ValueError if the tokenizer's decoder is neither byte-level nor SentencePiece's."""
        self._fast = fast
        self._decoder = _decoder_parts(fast.backend_tokenizer)
        self._byte_level = [part["type"] for part in self._decoder] == ["ByteLevel"]
        if not self._byte_level and not _is_sentencepiece(self._decoder):
            kinds = ", ".join(part["type"] for part in self._decoder) or "none"
            raise ValueError(
                f"the tokenizer's decoder ({kinds}) is not supported: it must be byte-level or SentencePiece"
            )
        self.strips_leading_space = any(
            part["type"] == "Strip" or (part["type"] == "Metaspace" and part["prepend_scheme"] != "never")
            for part in self._decoder
        )
        own_eos = () if fast.eos_token_id is None else (fast.eos_token_id,)
        self.eos_token_ids = frozenset((*own_eos, *eos_token_ids))

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer | None:
        """The tokenizer of a Hugging Face folder, None if it has no tokenizer files; ValueError if they are no good."""
        if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
            return None
        return cls(_from_pretrained(folder))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer in a GGUF file's metadata; ValueError names what is not supported."""
        return cls(gguf_tokenizer.build(metadata), gguf_tokenizer.eos_token_ids(metadata))

    @property
    def fast(self) -> PreTrainedTokenizerFast:
        """transformers' tokenizer, for libraries that take one."""
        return self._fast

    @property
    def vocab_size(self) -> int:
        return len(self._bytes)

    @property
    def special_tokens(self) -> dict[str, str | None]:
        """The texts of "bos_token", "eos_token" and "pad_token"; None where there is none."""
        return {name: getattr(self._fast, name) for name in ("bos_token", "eos_token", "pad_token")}

    def encode(self, text: str, *, max_tokens: int | None = None, add_special_tokens: bool = True) -> list[int]:
        """The text's token ids, after the special tokens that the model's texts begin with (BOS for Llama), if wanted.

        max_tokens: a text that has more, whatever its tokens, is refused before time is spent on it; others may pass
        ValueError if it is refused or not valid Unicode.
        """
        return self._encode(text, max_tokens, add_special_tokens=add_special_tokens)

    def encode_chat(self, messages: list[dict[str, str]], *, max_tokens: int | None = None) -> list[int]:
        """The conversation in the model's chat template, up to where the assistant's answer begins.

        messages: [{"role": "user", "content": "…"}, …].   ValueError if they are malformed, if the template refuses
        them, if there is no template, or as in `encode`.
        """
        return self._encode(self.render_chat(messages), max_tokens, add_special_tokens=False)

    def _encode(self, text: str, max_tokens: int | None, *, add_special_tokens: bool) -> list[int]:
        _require_unicode(text, "the text")
        if max_tokens is not None and len(text) > max_tokens * self._longest_token:
            raise ValueError(f"a text of {len(text)} characters is too long: it has more than {max_tokens} tokens")
        return self._fast.encode(text, add_special_tokens=add_special_tokens)

    @cached_property
    def _longest_token(self) -> int:
        """Bytes of the longest token as the vocabulary spells it: no token stands for more characters."""
        return max(len(token.encode()) for token in self._fast.get_vocab())

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        """The text that `encode_chat` encodes."""
        if not self._fast.chat_template:
            raise ValueError("the model has no chat template")
        if not isinstance(messages, list) or not messages:
            raise ValueError("messages must be a list of at least one message")
        for message in messages:
            if not isinstance(message, dict) or message.keys() != {"role", "content"}:
                raise ValueError(
                    f"a message must have a role and a content and nothing else; got {str(message)[:80]!r}"
                )
            for field, text in message.items():
                _require_unicode(text, f"a message's {field}")
        try:
            return self._fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program, and may fail in any way
            raise ValueError(f"the model's chat template refuses the messages: {error}") from error

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the tokens, special ones skipped and bytes that are not UTF-8 replaced by U+FFFD.

        It is the text of their `token_bytes`, so that what is streamed adds up to it. transformers differs from it
        where a run of SentencePiece's byte tokens is not UTF-8: it replaces the whole run.
        """
        return self._text(map(self.token_bytes, ids))

    def spell(self, ids: Iterable[int]) -> str:
        """As `decode`, with special tokens by their names."""
        return self._text(map(self.spelt_bytes, ids))

    def _text(self, parts: Iterable[bytes]) -> str:
        text = b"".join(parts).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.strips_leading_space else text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of UTF-8 that a token adds to a text; none for special tokens and ids outside the vocabulary."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def spelt_bytes(self, token_id: int) -> bytes:
        """As `token_bytes`, and of a special token its name."""
        return self.token_bytes(token_id) or self.token_name(token_id).encode()

    def token_name(self, token_id: int) -> str:
        """The token as the vocabulary spells it, such as "<|im_end|>" for a special one; empty outside of it."""
        return self._fast.convert_ids_to_tokens(token_id) or "" if 0 <= token_id < len(self._bytes) else ""

    @cached_property
    def _bytes(self) -> list[bytes]:
        backend = self._fast.backend_tokenizer
        vocabulary = backend.get_vocab(with_added_tokens=True)
        special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        table = [b""] * (1 + max(vocabulary.values()))
        to_bytes = _byte_level_bytes if self._byte_level else self._sentencepiece_bytes
        for token, token_id in vocabulary.items():
            if token not in special:
                table[token_id] = to_bytes(token)
        return table

    def _sentencepiece_bytes(self, token: str) -> bytes:
        byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
        if byte and {"type": "ByteFallback"} in self._decoder:
            return bytes.fromhex(byte[1])
        return token.replace("▁", " ").encode()


def _printable_bytes() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's bytes_to_unicode), and that byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _printable_bytes()


def _byte_level_bytes(token: str) -> bytes:
    """An added token may hold other characters, a space for one; then it is plain text, as in tokenizers' decoder."""
    if all(character in _BYTE_OF for character in token):
        return bytes(_BYTE_OF[character] for character in token)
    return token.encode()


def _decoder_parts(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """The decoder's steps in tokenizers' JSON."""
    if backend.decoder is None:
        return []
    decoder = json.loads(backend.decoder.__getstate__())
    return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]


def _is_sentencepiece(parts: list[dict[str, Any]]) -> bool:
    to_space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    others = ({"type": "ByteFallback"}, {"type": "Fuse"}, strip)

    def is_space(part: dict[str, Any]) -> bool:
        return part == to_space or (part["type"] == "Metaspace" and part["replacement"] == "▁")

    return any(map(is_space, parts)) and all(is_space(part) or part in others for part in parts)


def _require_unicode(text: str, what: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{what} must be a string, and it is {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is not valid Unicode: {error.reason} at character {error.start}") from None


def _from_pretrained(folder: Path) -> PreTrainedTokenizerFast:
    # Imported here: it takes over a second, for which what needs no text shall not wait.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        fast = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exceptions for a file that it cannot parse
        raise ValueError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    if not isinstance(fast, PreTrainedTokenizerFast):
        raise ValueError(f"the tokenizer in {folder} ({type(fast).__name__}) has no fast version")
    return fast
