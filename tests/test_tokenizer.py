import codecs

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from microvllm.model.checkpoint import open_checkpoint
from microvllm.model.tokenizer import Tokenizer
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from .checkpoints import make_model, needs_smollm2, write_gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def stream(tokenizer, ids):
    """The text as a server sends it, piece by piece."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text = "".join(decoder.decode(tokenizer.token_bytes(token)) for token in ids) + decoder.decode(b"", final=True)
    return text.removeprefix(" ") if tokenizer.strips_leading_space else text


def byte_level_metadata(pre, merges=(), special=(), **changes):
    """A GGUF vocabulary: the 256 bytes, the merges' results, then (token, type) of `special`."""
    tokens = [*ALPHABET, *("".join(merge.split()) for merge in merges)]
    types = [NORMAL] * len(tokens) + [kind for _, kind in special]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, *(token for token, _ in special)],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": list(merges),
    }
    return metadata | {f"tokenizer.{key}": value for key, value in changes.items()}


def from_metadata(*args, **changes):
    return Tokenizer.from_gguf(byte_level_metadata(*args, **changes))


def pieces(tokenizer, text):
    return [tokenizer.token_bytes(token).decode(errors="replace") for token in tokenizer.encode(text)]


def sentencepiece(strip=True, fallback=True):
    """A vocabulary like Llama 2's: ▁ for the space, bytes for what it lacks."""
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "é",
        "▁a",
        "▁▁",
        "<x>",
    ]
    backend = Backend(
        models.BPE({token: i for i, token in enumerate(tokens)}, [("▁", "a"), ("▁", "▁")], byte_fallback=True)
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(
        [step for step, on in zip(steps, (True, fallback, True, strip), strict=True) if on]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.add_tokens(["<x>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def smollm2():
    return open_checkpoint("smollm2").tokenizer()


@pytest.fixture(scope="module")
def smollm2_bytes(smollm2):
    """The bytes that have a token of their own."""
    own = {smollm2.token_bytes(token) for token in range(smollm2.vocab_size)}
    return {byte for byte in range(256) if bytes([byte]) in own}


@needs_smollm2
class TestSmolLM2:
    def test_facts(self, smollm2):
        assert (smollm2.vocab_size, smollm2.eos_token_ids, smollm2.strips_leading_space) == (49152, {0, 2}, False)
        assert smollm2.encode("<|endoftext|><|im_start|><|im_end|>") == [0, 1, 2]
        assert smollm2.encode("") == []
        assert len(smollm2.encode("Hello")) == 1

    def test_digits_are_single_tokens(self, smollm2):
        assert pieces(smollm2, "in 12345 and 67") == ["in", " ", "1", "2", "3", "4", "5", " and", " ", "6", "7"]

    def test_bytes_of_tokens(self, smollm2):
        for text in ("Hello", " world", "\n", "é", " naïve"):
            assert b"".join(map(smollm2.token_bytes, smollm2.encode(text))) == text.encode()
        assert [smollm2.token_bytes(token) for token in (0, 1, 2, -1, 49152, 10**9)] == [b""] * 6

    def test_chat(self, smollm2):
        messages = [{"role": "user", "content": "Hi"}]
        text = (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        )
        assert smollm2.render_chat(messages) == text
        ids = smollm2.encode_chat(messages)
        assert ids == smollm2.encode(text)
        assert (ids.count(1), ids.count(2)) == (3, 2)
        assert smollm2.decode(ids) == text.replace("<|im_start|>", "").replace("<|im_end|>", "")

    @given(ids=st.lists(st.integers(0, 49151)))
    @settings(max_examples=300, deadline=None)
    def test_streamed_text_is_the_decoded_text(self, smollm2, ids):
        expected = smollm2._fast.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert smollm2.decode(ids) == expected
        assert stream(smollm2, ids) == expected

    @given(text=st.text(st.characters(exclude_categories=["Cs"])))
    @settings(max_examples=300, deadline=None)
    def test_round_trip(self, smollm2, smollm2_bytes, text):
        # SmolLM2 has no token for 21 bytes, and leaves them out of a text.
        assume(all(byte in smollm2_bytes for byte in text.encode()))
        ids = smollm2.encode(text)
        assert smollm2.spell(ids) == text
        if all(map(smollm2.token_bytes, ids)):  # it names no special token
            assert smollm2.decode(ids) == text


@pytest.mark.parametrize("text", ["\ud800", "a\udfff b"])
def test_refuses_lone_surrogates(text):
    tokenizer = from_metadata("gpt-2", **{"chat_template": "{{ messages[0].content }}"})
    with pytest.raises(ValueError, match="the text is not valid Unicode: surrogates not allowed"):
        tokenizer.encode(text)
    with pytest.raises(ValueError, match="a message's content is not valid Unicode"):
        tokenizer.encode_chat([{"role": "user", "content": text}])
    with pytest.raises(ValueError, match="the text must be a string, and it is bytes"):
        tokenizer.encode(b"abc")


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "a list of at least one message"),
        ("Hi", "a list of at least one message"),
        (["Hi"], "a message must have a role and a content and nothing else; got 'Hi'"),
        ([{"role": "user"}], "must have a role and a content"),
        ([{"role": "user", "content": "Hi", "tool_calls": 5}], "and nothing else"),
        ([{"role": "user", "content": None}], "a message's content must be a string, and it is NoneType"),
        ([{"role": 1, "content": ""}], "a message's role must be a string, and it is int"),
        ([{"role": "robot", "content": ""}], "the model's chat template refuses the messages: no robots"),
        ([{"role": "zero", "content": ""}], "the model's chat template refuses the messages: integer division"),
    ],
)
def test_refuses_malformed_messages(messages, message):
    template = (
        "{% if messages[0].role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
        "{% if messages[0].role == 'zero' %}{{ 1 // 0 }}{% endif %}{{ messages[0].content }}"
    )
    tokenizer = from_metadata("gpt-2", **{"chat_template": template})
    assert tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": "Hi"}])) == "Hi"
    with pytest.raises(ValueError, match=message):
        tokenizer.encode_chat(messages)


def test_refuses_chat_without_a_template():
    with pytest.raises(ValueError, match="the model has no chat template"):
        from_metadata("gpt-2").encode_chat([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    "pre, expected",
    [
        ("gpt-2", ["12", "12", "a"]),
        ("smollm", ["1", "2", "1", "2", "a"]),
        ("qwen2", ["1", "2", "1", "2", "a"]),
        ("llama-bpe", ["12", "1", "2", "a"]),
    ],
)
def test_pre_tokenizer_cuts_digits(pre, expected):
    tokenizer = from_metadata(pre, ["1 2"], **{"ggml.add_bos_token": False})
    assert pieces(tokenizer, "1212a") == expected


def test_pre_tokenizer_of_qwen2():
    tokenizer = from_metadata("qwen2", ["' S", "( a", ". Ċ", "Ċ Ċ"])
    assert pieces(tokenizer, "x'S(a") == ["x", "'S", "(a"]
    assert pieces(from_metadata("gpt-2", ["' S", "( a"]), "x'S(a") == ["x", "'", "S", "(", "a"]
    assert pieces(tokenizer, ".\n\n\n") == [".\n", "\n\n"]
    composed = tokenizer.encode("é")
    assert tokenizer.encode("e\u0301") == composed and tokenizer.decode(composed) == "é"  # NFC
    assert from_metadata("gpt-2").encode("e\u0301") != composed


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_a_file_older_than_the_key_has_the_pre_tokenizer_of_its_architecture(architecture):
    metadata = byte_level_metadata(None, ["1 2"]) | {"general.architecture": architecture}
    del metadata["tokenizer.ggml.pre"]
    if architecture == "llama":  # Llama 2 and 3, SmolLM and others
        with pytest.raises(ValueError, match=r"has no tokenizer\.ggml\.pre, and so not how a text is cut into words"):
            Tokenizer.from_gguf(metadata)
    else:
        assert pieces(Tokenizer.from_gguf(metadata), "12a") == ["1", "2", "a"]


def test_every_token_that_ends_a_text_is_known():
    special = [("<|endoftext|>", CONTROL), ("<|im_end|>", CONTROL), ("</s>", NORMAL), ("<|im_start|>", CONTROL)]
    assert from_metadata("qwen2", (), special, **{"ggml.eos_token_id": 257}).eos_token_ids == {256, 257}
    assert from_metadata("qwen2", (), special, **{"ggml.eom_token_id": 5}).eos_token_ids == {5, 256, 257}
    assert from_metadata("qwen2").eos_token_ids == set()


def test_llama3_takes_a_word_in_the_vocabulary_whole():
    special = [("abc", NORMAL), ("<s>", CONTROL)]
    bos = {"ggml.bos_token_id": 257}
    tokenizer = from_metadata("llama-bpe", (), special, **bos)
    assert tokenizer.encode("abc") == [257, 256]  # BOS without being told, as llama.cpp has it
    assert from_metadata("llama-bpe", (), special, **bos, **{"ggml.add_bos_token": False}).encode("abc") == [256]
    assert len(from_metadata("gpt-2", (), special, **bos).encode("abc")) == 3


def test_special_and_added_tokens():
    special = [
        ("<s>", CONTROL),
        ("</s>", CONTROL),
        ("<think>", USER_DEFINED),
        ("<a b é>", USER_DEFINED),
        ("[PAD]", UNUSED),
    ]
    ends = {"ggml.bos_token_id": 256, "ggml.eos_token_id": 257, "ggml.eot_token_id": 3, "ggml.add_bos_token": True}
    tokenizer = from_metadata("qwen2", (), special, **ends)
    assert tokenizer.eos_token_ids == {257, 3}
    assert tokenizer.vocab_size == 260
    assert tokenizer.encode("<think>x</s>") == [256, 258, ALPHABET.index("x"), 257]
    assert tokenizer.decode([256, 258, 259, 260, 257]) == "<think><a b é>"
    assert [tokenizer.token_bytes(token) for token in range(256, 261)] == [
        b"",
        b"",
        b"<think>",
        "<a b é>".encode(),
        b"",
    ]
    assert 260 not in tokenizer.encode("[PAD]")
    assert tokenizer._fast.decode([259, 257], skip_special_tokens=True) == "<a b é>"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ggml.model": "bert"}, "GGUF tokenizer 'bert' is not supported; supported are 'gpt2' and 'llama'"),
        (
            {"ggml.pre": "tekken"},
            "GGUF pre-tokenizer 'tekken' is not supported; supported are gpt-2, smollm, ",
        ),
        ({"ggml.pre": "default"}, "GGUF pre-tokenizer 'default' is not supported"),
        ({"ggml.merges": ["q z"]}, "the GGUF metadata's merges do not fit its tokens"),
        ({"ggml.merges": ["qz"]}, "the GGUF metadata's merges do not fit its tokens"),
        ({"ggml.token_type": [1]}, "256 tokens and 1 entries of token_type"),
        ({"ggml.eos_token_id": 256}, "tokenizer.ggml.eos_token_id is 256, and there are 256 tokens"),
        ({"ggml.add_bos_token": True}, "add_bos_token is set, and there is no tokenizer.ggml.bos_token_id"),
        ({"ggml.model": "llama", "ggml.add_space_prefix": False}, "without tokenizer.ggml.add_space_prefix"),
    ],
)
def test_refuses_metadata(changes, message):
    with pytest.raises(ValueError, match=message):
        from_metadata("gpt-2", **changes)


@pytest.mark.parametrize("key", ["tokens", "token_type", "merges"])
def test_names_the_missing_key(key):
    metadata = byte_level_metadata("gpt-2")
    del metadata[f"tokenizer.ggml.{key}"]
    with pytest.raises(ValueError, match=f"the GGUF metadata has no tokenizer.ggml.{key}"):
        Tokenizer.from_gguf(metadata)


class TestSentencePiece:
    def test_bytes(self):
        tokenizer = Tokenizer(sentencepiece())
        assert (tokenizer.strips_leading_space, tokenizer.eos_token_ids, tokenizer.vocab_size) == (True, {2}, 266)
        assert [tokenizer.token_bytes(token) for token in (0, 1, 2, 3, 258)] == [b"", b"", b"", b"\0", b"\xff"]
        assert [tokenizer.token_bytes(token) for token in range(259, 267)] == [
            b" ", b"a", b"b", "é".encode(), b" a", b"  ", b"<x>", b""
        ]  # fmt: skip
        assert tokenizer.decode(tokenizer.encode("a  a你<x>")) == "a  a你<x>"
        assert tokenizer.decode([264, 260]) == " a"  # one space is stripped, not two

    @pytest.mark.parametrize("strip", [True, False])
    @given(parts=st.lists(st.one_of(st.integers(256, 266), st.characters(exclude_categories=["Cs"]))))
    @settings(max_examples=200, deadline=None)
    def test_streamed_text_is_that_of_transformers(self, strip, parts):
        fast = sentencepiece(strip)
        tokenizer = Tokenizer(fast)
        ids = []
        for part in parts:  # byte tokens come as whole characters
            ids += [3 + byte for byte in part.encode()] if isinstance(part, str) else [part] * (part >= 259)
        expected = fast.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(ids) == stream(tokenizer, ids) == expected

    @given(ids=st.lists(st.integers(0, 270)))
    @settings(max_examples=200, deadline=None)
    def test_streamed_text_is_the_decoded_text_for_any_bytes(self, ids):
        tokenizer = Tokenizer(sentencepiece())
        assert stream(tokenizer, ids) == tokenizer.decode(ids)

    def test_bytes_that_are_not_utf8(self):
        tokenizer = Tokenizer(sentencepiece())
        cut = [3 + byte for byte in "é".encode() + "你".encode()[:2]]
        assert tokenizer.decode(cut) == "é\ufffd"
        assert tokenizer._fast.decode(cut) == "\ufffd" * 4  # tokenizers gives up the whole run

    def test_byte_tokens_are_text_without_the_fallback(self):
        assert Tokenizer(sentencepiece(fallback=False)).token_bytes(3 + 65) == b"<0x41>"

    def test_metaspace(self):
        fast = sentencepiece()
        for scheme, strips in (("always", True), ("first", True), ("never", False)):
            fast.backend_tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
            tokenizer = Tokenizer(fast)
            assert tokenizer.strips_leading_space == strips
            assert tokenizer.decode([263, 263]) == fast.decode([263, 263]) == ("a a" if strips else " a a")

    def test_gguf(self, tmp_path):
        fast = sentencepiece()
        tokens = fast.convert_ids_to_tokens(range(266))
        metadata = {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * 6 + [USER_DEFINED],
            "tokenizer.ggml.scores": [0.0] * 259 + [-9.0, -9.0, -9.0, -9.0, -1.0, -2.0, 0.0],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.chat_template": "{{ messages[0].content }}",
        }
        write_gguf(tmp_path / "m.gguf", make_model("llama", vocab_size=266), metadata=metadata)
        tokenizer = open_checkpoint(tmp_path / "m.gguf").tokenizer()
        ours = Tokenizer(fast)
        assert tokenizer.strips_leading_space and tokenizer.eos_token_ids == {2}
        assert [tokenizer.token_bytes(token) for token in range(266)] == [
            ours.token_bytes(token) for token in range(266)
        ]
        assert tokenizer.encode("a  a你b") == [1, *ours.encode("a  a你b")]
        assert tokenizer.encode_chat([{"role": "user", "content": "ab"}]) == ours.encode("ab")


@pytest.mark.parametrize("decoder, name", [(decoders.WordPiece(), "WordPiece"), (None, "none")])
def test_refuses_another_decoder(decoder, name):
    fast = sentencepiece()
    fast.backend_tokenizer.decoder = decoder
    with pytest.raises(ValueError, match=f"the tokenizer's decoder .{name}. is not supported"):
        Tokenizer(fast)


class TestFolder:
    def test_loads_what_transformers_saved(self, tmp_path):
        fast = sentencepiece()
        fast.chat_template = "{{ messages[0].content }}"
        fast.save_pretrained(tmp_path)
        tokenizer = Tokenizer.from_folder(tmp_path)
        assert tokenizer.encode("ab a") == fast.encode("ab a")
        assert (tokenizer.eos_token_ids, tokenizer.strips_leading_space) == ({2}, True)
        assert tokenizer.encode_chat([{"role": "user", "content": "ab"}]) == fast.encode("ab")

    def test_without_files(self, tmp_path):
        assert Tokenizer.from_folder(tmp_path) is None

    def test_refuses_a_corrupt_file(self, tmp_path):
        sentencepiece().save_pretrained(tmp_path)
        (tmp_path / "tokenizer.json").write_text("{")
        with pytest.raises(ValueError, match=f"the tokenizer in {tmp_path} cannot be loaded"):
            Tokenizer.from_folder(tmp_path)


def test_added_tokens_that_look_like_bytes_decode_as_in_tokenizers():
    fast = from_metadata("gpt-2")._fast
    fast.add_tokens([AddedToken("né", special=False), AddedToken("n é", special=False)])
    tokenizer = Tokenizer(fast)
    assert tokenizer.decode([256]) == fast.decode([256]) == "n\ufffd"
    assert tokenizer.decode([257]) == fast.decode([257]) == "n é"


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(smollm2):
    longest = max(len(token) for token in smollm2._fast.get_vocab())
    assert len(smollm2.encode("a" * longest, max_tokens=2)) > 2  # it may pass: only its tokens tell
    for encode in (
        smollm2.encode,
        lambda text, **options: smollm2.encode_chat([{"role": "user", "content": text}], **options),
    ):
        with pytest.raises(ValueError, match="is too long: it has more than 2 tokens"):
            encode("é" * longest * 5, max_tokens=2)


def test_a_token_is_named_as_the_vocabulary_spells_it(smollm2):
    assert smollm2.token_name(2) == "<|im_end|>" and smollm2.token_bytes(2) == b""
    assert smollm2.token_name(-1) == smollm2.token_name(10**9) == ""
