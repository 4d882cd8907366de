"""Text to token ids and back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from gguf.constants import TokenType
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")

# How each `tokenizer.ggml.pre` cuts a text into words before the merges (llama.cpp, src/llama-vocab.cpp).
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_WORDS = _QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)


def _words(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_PRE_TOKENIZERS = {
    "default": _BYTE_LEVEL,
    "gpt-2": _BYTE_LEVEL,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTE_LEVEL]),
    "qwen2": _words(_QWEN2_WORDS),
    "llama-bpe": _words(_LLAMA3_WORDS),
}


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
    def from_gguf(cls, path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer in a GGUF file's metadata; ValueError names what is not supported."""
        kind = metadata.get("tokenizer.ggml.model")
        if kind == "gpt2":
            return cls(_byte_level_from_gguf(metadata), gguf_eos_token_ids(metadata))
        if kind == "llama":
            if not metadata.get("tokenizer.ggml.add_space_prefix", True):
                raise ValueError("a SentencePiece tokenizer without tokenizer.ggml.add_space_prefix is not supported")
            return cls(_from_pretrained(path.parent, gguf_file=path.name), gguf_eos_token_ids(metadata))
        raise ValueError(f"GGUF tokenizer {kind!r} is not supported; supported are 'gpt2' and 'llama'")

    @property
    def vocab_size(self) -> int:
        return len(self._bytes)

    def encode(self, text: str) -> list[int]:
        """The text's token ids, after the special tokens that the model's texts begin with (BOS for Llama).

        ValueError if `text` is not valid Unicode.
        """
        _require_unicode(text, "the text")
        return self._fast.encode(text)

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """The conversation in the model's chat template, up to where the assistant's answer begins.

        messages: [{"role": "user", "content": "…"}, …].   ValueError if they are malformed, if the template refuses
        them, or if there is no template.
        """
        return self._fast.encode(self.render_chat(messages), add_special_tokens=False)

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
        except jinja2.TemplateError as error:
            raise ValueError(f"the model's chat template refuses the messages: {error}") from error

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the tokens, special ones skipped and bytes that are not UTF-8 replaced by U+FFFD.

        It is the text of their `token_bytes`, so that what is streamed adds up to it. transformers differs from it
        where a run of SentencePiece's byte tokens is not UTF-8: it replaces the whole run.
        """
        text = b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.strips_leading_space else text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of UTF-8 that a token adds to a text; none for special tokens and ids outside the vocabulary."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

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


def gguf_eos_token_ids(metadata: Mapping[str, Any]) -> frozenset[int]:
    """The tokens that end a text or a turn, by a GGUF file's metadata."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    return frozenset(metadata[key] for key in keys if key in metadata)


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


def _from_pretrained(folder: Path, **source: str) -> PreTrainedTokenizerFast:
    try:
        fast = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **source)
    except Exception as error:  # tokenizers raises bare Exceptions for a file that it cannot parse
        raise ValueError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    if not isinstance(fast, PreTrainedTokenizerFast):
        raise ValueError(f"the tokenizer in {folder} ({type(fast).__name__}) has no fast version")
    return fast


def _byte_level_from_gguf(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Built with tokenizers itself: transformers' converter takes 6 s and does not know every pre-tokenizer."""
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        raise ValueError(f"GGUF pre-tokenizer {pre!r} is not supported; supported are {', '.join(_PRE_TOKENIZERS)}")
    for key in ("tokens", "token_type", "merges"):
        if f"tokenizer.ggml.{key}" not in metadata:
            raise ValueError(f"the GGUF metadata has no tokenizer.ggml.{key}")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    if len(tokens) != len(types):
        raise ValueError(f"the GGUF metadata has {len(tokens)} tokens and {len(types)} token types")
    vocabulary = {
        token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != TokenType.UNUSED
    }
    try:
        # Llama 3 takes a whole word that is in the vocabulary as it is, whatever its merges.
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # tokenizers has no class of its own for it
        raise ValueError(f"the GGUF metadata's merges do not fit its tokens: {error}") from error
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre]
    backend.decoder = decoders.ByteLevel()
    for kind, add in ((TokenType.CONTROL, backend.add_special_tokens), (TokenType.USER_DEFINED, backend.add_tokens)):
        marked = [token for token, its_kind in zip(tokens, types, strict=True) if its_kind == kind]
        add([AddedToken(token, normalized=False, special=kind == TokenType.CONTROL) for token in marked])

    def token_named(key: str) -> str | None:
        token_id = metadata.get(f"tokenizer.ggml.{key}")
        if token_id is not None and token_id >= len(tokens):
            raise ValueError(f"tokenizer.ggml.{key} is {token_id}, and there are {len(tokens)} tokens")
        return None if token_id is None else tokens[token_id]

    bos, eos = token_named("bos_token_id"), token_named("eos_token_id")
    if metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        if bos is None:
            raise ValueError("tokenizer.ggml.add_bos_token is set, and there is no tokenizer.ggml.bos_token_id")
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, vocabulary[bos])]
        )
    template = metadata.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, chat_template=template)
