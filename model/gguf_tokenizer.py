"""The tokenizer in a GGUF file's metadata, built with tokenizers.

transformers converts it too, in 6 s, without some pre-tokenizers, and with or without BOS depending on its version.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import tokenizers
from gguf.constants import TokenType
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

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
    "gpt-2": _BYTE_LEVEL,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTE_LEVEL]),
    "qwen2": _words(_QWEN2_WORDS),
    "llama-bpe": _words(_LLAMA3_WORDS),
}
_OF_ARCHITECTURE = {"qwen2": "qwen2", "qwen3": "qwen2"}
"""Of files that were written before there was such a key; where an architecture has had several, none is taken."""

_ENDS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "</s>")
"""Control tokens that end a text or a turn whether a key names them or not: a file names one, and a model may know two
(llama.cpp, src/llama-vocab.cpp)."""


def eos_token_ids(metadata: Mapping[str, Any]) -> frozenset[int]:
    """The tokens that end a text or a turn."""
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    named = {metadata[key] for key in keys if key in metadata}
    tokens, types = (metadata.get(f"tokenizer.ggml.{name}", []) for name in ("tokens", "token_type"))
    known = {tokens.index(end) for end in _ENDS if end in tokens}
    return frozenset(named | {token for token in known if types[token : token + 1] == [TokenType.CONTROL]})


def build(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer with its special tokens and chat template; ValueError names what is missing or not supported."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"GGUF tokenizer {kind!r} is not supported; supported are 'gpt2' and 'llama'")
    tokens, types = _of_each_token(metadata, "tokens", "token_type")
    backend = _byte_level(metadata) if kind == "gpt2" else _sentencepiece(metadata)
    for token, its_kind in zip(tokens, types, strict=True):
        if its_kind in (TokenType.CONTROL, TokenType.UNKNOWN):
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif its_kind == TokenType.USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False)])

    bos, eos = (_token_named(metadata, tokens, name) for name in ("bos_token_id", "eos_token_id"))
    begins_with_bos = kind == "llama" or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    if metadata.get("tokenizer.ggml.add_bos_token", begins_with_bos):
        if bos is None:
            raise ValueError("tokenizer.ggml.add_bos_token is set, and there is no tokenizer.ggml.bos_token_id")
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, backend.token_to_id(bos))]
        )
    template = metadata.get("tokenizer.chat_template")
    # Imported here: it takes over a second, for which what needs no text shall not wait.
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, chat_template=template)


def _byte_level(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Byte-pair encoding of bytes, by merges."""
    pre = metadata.get("tokenizer.ggml.pre") or _OF_ARCHITECTURE.get(metadata.get("general.architecture"))
    if pre is None:
        raise ValueError("the GGUF metadata has no tokenizer.ggml.pre, and so not how a text is cut into words")
    if pre not in _PRE_TOKENIZERS:
        raise ValueError(f"GGUF pre-tokenizer {pre!r} is not supported; supported are {', '.join(_PRE_TOKENIZERS)}")
    tokens, types = _of_each_token(metadata, "tokens", "token_type")
    if "tokenizer.ggml.merges" not in metadata:
        raise ValueError("the GGUF metadata has no tokenizer.ggml.merges")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {
        token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != TokenType.UNUSED
    }
    # Llama 3 takes a whole word that is in the vocabulary as it is, whatever its merges.
    backend = _byte_pair_encoding(vocabulary, merges, ignore_merges=pre == "llama-bpe")
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre]
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """SentencePiece's byte-pair encoding of characters: what makes the token of the highest score merges first."""
    if not metadata.get("tokenizer.ggml.add_space_prefix", True):
        raise ValueError("a SentencePiece tokenizer without tokenizer.ggml.add_space_prefix is not supported")
    tokens, types, scores = _of_each_token(metadata, "tokens", "token_type", "scores")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token, kind, score in zip(tokens, types, scores, strict=True):
        if kind == TokenType.NORMAL:
            halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
            merges += [(score, pair) for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
    merges.sort(key=lambda merge: -merge[0])
    unknown = _token_named(metadata, tokens, "unknown_token_id")
    backend = _byte_pair_encoding(
        vocabulary, [pair for _, pair in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def _byte_pair_encoding(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], **options: Any
) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **options))
    except Exception as error:  # tokenizers has no class of its own for it
        raise ValueError(f"the GGUF metadata's merges do not fit its tokens: {error}") from error


def _of_each_token(metadata: Mapping[str, Any], *names: str) -> list[list]:
    """The metadata's lists that have an entry a token."""
    for name in names:
        if f"tokenizer.ggml.{name}" not in metadata:
            raise ValueError(f"the GGUF metadata has no tokenizer.ggml.{name}")
    lists = [metadata[f"tokenizer.ggml.{name}"] for name in names]
    for name, entries in zip(names, lists, strict=True):
        if len(entries) != len(lists[0]):
            raise ValueError(f"the GGUF metadata has {len(lists[0])} tokens and {len(entries)} entries of {name}")
    return lists


def _token_named(metadata: Mapping[str, Any], tokens: list[str], name: str) -> str | None:
    token_id = metadata.get(f"tokenizer.ggml.{name}")
    if token_id is not None and token_id >= len(tokens):
        raise ValueError(f"tokenizer.ggml.{name} is {token_id}, and there are {len(tokens)} tokens")
    return None if token_id is None else tokens[token_id]
