"""Where the tokens of an echoed prompt begin, with tokenizers that change a text before they cut it."""

from __future__ import annotations

import pytest
from microvllm.engine.server.logprobs import CompletionLogprobsWriter
from microvllm.model.tokenizer import Tokenizer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Tokens
from transformers import PreTrainedTokenizerFast

END = AddedToken("</s>", normalized=False, special=True)


def composing() -> Tokenizer:
    """Byte by byte, after NFC, as Qwen2's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokens(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokens.normalizer, tokens.decoder = normalizers.NFC(), decoders.ByteLevel()
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens.add_special_tokens([END])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=tokens))


def prepending() -> Tokenizer:
    """With a space before each piece of a text between special tokens, as Llama 2's."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "▁b"]
    merges = [("▁", "a"), ("▁", "b")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokens = Tokens(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokens.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    tokens.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    tokens.add_special_tokens([END, AddedToken("<s>", normalized=False, special=True)])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=tokens))


@pytest.mark.parametrize(
    "make, text, offsets",
    [
        (composing, "é</s>x</s>y", [0, 0, 1, 5, 6, 10]),
        (composing, "e\u0301</s>x</s>y", [0, 0, 2, 6, 7, 11]),  # two characters that the tokenizer makes one of
        (prepending, "a</s>b</s>a", [0, 1, 5, 6, 10]),
        (prepending, "</s>a", [0, 4]),
    ],
)
def test_a_special_token_begins_where_the_text_names_it(make, text, offsets):
    tokenizer = make()
    token_ids = tokenizer.encode(text)
    written = CompletionLogprobsWriter(tokenizer, prompt=text).write(token_ids, [None] * len(token_ids))
    assert written.text_offset == offsets


def test_one_that_the_tokenizer_has_added_takes_no_place():
    tokenizer = prepending()
    token_ids = [1, *tokenizer.encode("a<s>b")]  # behind a <s> that the text does not name
    written = CompletionLogprobsWriter(tokenizer, prompt="a<s>b").write(token_ids, [None] * len(token_ids))
    assert written.text_offset == [0, 0, 1, 4]
