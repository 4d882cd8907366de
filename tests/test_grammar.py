"""Texts that follow a JSON schema: which tokens may come, where the text ends, and in whose company it is drawn."""

from __future__ import annotations

import json
import sys

import jsonschema
import pytest
import torch
from microvllm import InferenceEngine, KernelSet, SamplingParams
from microvllm.model.grammar import Grammar, Grammars, masks
from microvllm.model.sampler import Sampler
from microvllm.model.sampling_params import MAX_SCHEMA_LENGTH
from microvllm.model.tokenizer import Tokenizer

from .small_engine import assert_at_rest, finish, poison, save_tokenizer
from .small_models import VOCAB_SIZE, Shape, make_model
from .test_sampler import Row
from .test_tokenizer import sentencepiece

EOS = "zz"
SCHEMAS = (
    {"type": "object"},
    {"type": "object", "properties": {"a": {"enum": ["x", "yy"]}, "b": {"type": "integer"}}, "required": ["b"]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    {"enum": [1, 12, None, "e\u00e9"]},
    {"$ref": "#/$defs/n", "$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 2}}},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tokens are bytes and two letters; one of these ends a text, and few are likely to."""
    folder = tmp_path_factory.mktemp("model")
    make_model(Shape(), folder)
    save_tokenizer(folder, eos=EOS)
    return folder


@pytest.fixture(scope="module")
def make_engine(folder):
    def make(**options):
        options = {"max_batch_size": 8, "num_blocks": 64, "block_size": 16} | options
        return InferenceEngine(folder, device="cpu", progress=False, **options)

    return make


@pytest.fixture(scope="module")
def shared_engine(make_engine):
    return make_engine()


@pytest.fixture
def engine(shared_engine):
    yield shared_engine
    assert_at_rest(shared_engine)


@pytest.fixture(scope="module")
def grammars(shared_engine):
    return shared_engine.grammars


@pytest.fixture(scope="module")
def encode(shared_engine):
    return shared_engine.tokenizer.encode


@pytest.fixture(scope="module")
def end(shared_engine):
    (token,) = shared_engine.tokenizer.eos_token_ids
    return token


def begin(grammars: Grammars, schema: dict) -> Grammar:
    return grammars.begin(json.dumps(schema))


def allowed(grammar: Grammar, vocab_size: int = VOCAB_SIZE) -> set[int]:
    packed = masks([grammar])[0]
    return {token for token in range(vocab_size) if packed[token // 8] >> (token % 8) & 1}


def valid(text: str, schema: dict) -> None:
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))


class TestMasks:
    def test_they_follow_the_text(self, grammars, encode, end):
        grammar = begin(grammars, {"enum": [1, 12]})
        assert allowed(grammar) == set(encode("1"))
        grammar.follow(encode("1"))
        assert allowed(grammar) == {*encode("2"), end} and not grammar.is_complete
        grammar.follow(encode("2"))
        assert allowed(grammar) == {end} and grammar.is_complete
        grammar.follow([end])  # as behind a step that was launched too many
        assert allowed(grammar) == {end} and grammar.error is None
        assert grammar.num_followed == 3

    def test_a_string_is_utf8_without_the_end_and_with_jsons_escapes(self, grammars, encode, end):
        grammar = begin(grammars, {"type": "string"})
        grammar.follow(encode('"'))
        inside = allowed(grammar)
        lead, continuation = encode("é")
        assert {*encode("a\\"), lead} <= inside and not {continuation, end} & inside
        grammar.follow(encode("\\"))
        assert set(encode("n")) <= allowed(grammar) and not set(encode("x")) & allowed(grammar)

    def test_texts_of_one_schema_go_different_ways(self, grammars, encode):
        one, other = begin(grammars, {"enum": ["a", "b"]}), begin(grammars, {"enum": ["a", "b"]})
        one.follow(encode('"a'))
        packed = masks([one, other])
        assert allowed(one) == set(encode('"')) == allowed(other)  # the quote that ends it, and the one that begins it
        assert (packed[0] == packed[1]).all()
        other.follow(encode('"'))
        assert allowed(other) == set(encode("ab")) != allowed(one)

    def test_blanks_are_bounded(self, grammars, encode):
        grammar, blank = begin(grammars, {"type": "object"}), encode(" ")
        grammar.follow(encode("{"))
        for _ in range(64):
            assert set(blank) <= allowed(grammar)
            grammar.follow(blank)
        assert allowed(grammar) == set(encode('"}'))

    def test_what_becomes_too_complex_allows_nothing_and_says_so(self, grammars, encode):
        schema = {"type": "integer", "multipleOf": 99991, "minimum": 3, "maximum": 10**12}
        grammar, other = begin(grammars, schema), begin(grammars, {"enum": [1]})
        grammar.follow(encode("7"))
        packed = masks([grammar, other])
        assert not packed[0].any() and packed[1].any()
        assert grammar.error.startswith('json_schema={"type": "integer"') and "too many" in grammar.error
        assert "<state>" not in grammar.error and other.error is None

    @pytest.mark.parametrize("strip", [True, False])
    def test_sentencepiece_tokens(self, strip):
        tokenizer = Tokenizer(sentencepiece(strip=strip))
        grammar = Grammars(tokenizer, tokenizer.eos_token_ids, tokenizer.vocab_size).begin('{"enum": ["a a", "b"]}')
        brace, a, blank_a = 3 + ord('"'), 260, 263
        assert allowed(grammar, tokenizer.vocab_size) == {brace}
        grammar.follow([brace, a])
        assert allowed(grammar, tokenizer.vocab_size) >= {blank_a}
        grammar.follow([blank_a, brace])
        assert allowed(grammar, tokenizer.vocab_size) == tokenizer.eos_token_ids
        assert tokenizer.decode([brace, a, blank_a, brace]) == '"a a"'

    def test_each_token_is_the_text_that_is_shown_for_it(self):
        """Otherwise a text that follows its schema token by token would not in characters."""
        engine = InferenceEngine("smollm2", num_blocks=4, block_size=16, max_model_len=64, progress=False)
        vocabulary, tokenizer = engine.grammars._vocabulary, engine.tokenizer
        others = [t for t in range(tokenizer.vocab_size) if vocabulary.decode_bytes([t]) != tokenizer.token_bytes(t)]
        assert others and all(vocabulary.is_special_token(t) and tokenizer.token_bytes(t) == b"" for t in others)


class TestDraw:
    @pytest.mark.parametrize("kernels", ["reference", "triton"])
    def test_rows_with_and_without_a_grammar(self, grammars, encode, end, kernels):
        set_ = KernelSet.reference() if kernels == "reference" else KernelSet.reference().replace(sample="triton")
        logits = torch.randn(6, VOCAB_SIZE, generator=torch.Generator().manual_seed(1))
        digits = set(encode("123456789-"))

        def row(temperature: float, schema: dict | None = None, seed: int = 0, **options) -> Row:
            params = SamplingParams(temperature=temperature, **options)
            grammar = None if schema is None else begin(grammars, schema)
            return Row(params, seed, stop_token_ids=frozenset([end]), grammar=grammar)

        integer = {"type": "integer", "minimum": -99, "maximum": -1}
        rows = [row(0.0), row(0.0, integer), row(1.0), row(1.0, {"enum": [1]}), row(5.0, {"type": "integer"}, seed=4)]
        rows.append(row(0.0, {"enum": [2]}, top_k=5, top_p=0.9, logit_bias={end: 100}, repetition_penalty=2.0))
        tokens, _ = Sampler(set_)(logits, rows).result()
        alone = [Sampler(set_)(logits[i : i + 1], [row]).result()[0][0] for i, row in enumerate(rows)]
        assert tokens == alone and tokens[0] == int(logits[0].argmax())
        assert tokens[1] == encode("-")[0] and tokens[3] == encode("1")[0] and tokens[5] == encode("2")[0]
        assert tokens[4] in digits | set(encode("0"))

    def test_the_end_comes_whatever_min_tokens_says_and_not_before_it_may(self, grammars, encode, end):
        logits = torch.zeros(2, VOCAB_SIZE)
        logits[:, end] = 9.0
        params = SamplingParams(min_tokens=50)
        rows = [Row(params, stop_token_ids=frozenset([end]), grammar=begin(grammars, {"enum": [1, 12]})) for _ in "ab"]
        for row, text in zip(rows, ("1", "12"), strict=True):
            row.grammar.follow(encode(text))
        assert Sampler(KernelSet.reference())(logits, rows).result()[0] == [encode("2")[0], end]

    def test_a_newest_token_that_only_the_device_knows_does_not_lift_the_mask(self, grammars, encode):
        seven = encode("7")[0]
        row = Row(SamplingParams(repetition_penalty=1.1), num_pending=1, grammar=begin(grammars, {"enum": [1]}))
        logits = torch.zeros(1, VOCAB_SIZE)
        logits[0, seven] = 50.0
        tokens = torch.tensor([seven])
        Sampler(KernelSet.reference()).settle(logits, tokens, [row], lambda: torch.tensor([seven]))
        assert tokens.tolist() == encode("1")


@pytest.fixture(scope="module", params=[False, True], ids=["in step", "a step behind"])
def either(request, make_engine):
    """An engine in step with its device, and one that is not."""
    return make_engine(async_scheduling=request.param)


def many(count: int) -> list[SamplingParams]:
    """Every third without a schema; the texts of some are cut off."""
    params = []
    for i in range(count):
        options = {"max_tokens": 20 + i % 40, "temperature": (0.0, 1.0, 3.0)[i % 3], "seed": i}
        if i % 4 == 1:
            options |= {"repetition_penalty": 1.2, "logprobs": 1}
        if i % 5:
            options["json_schema"] = SCHEMAS[i % len(SCHEMAS) - 1]
        params.append(SamplingParams(**options))
    return params


class TestEngine:
    @pytest.mark.parametrize("schema", SCHEMAS)
    @pytest.mark.parametrize("temperature", [0.0, 1.0, 4.0])
    def test_what_ends_by_itself_is_valid(self, either, schema, temperature):
        # The end is made likely, else the random model writes numbers and names without one.
        likely = {**dict.fromkeys(either.tokenizer.encode('}]",'), 15.0), **dict.fromkeys(either._eos_token_ids, 20.0)}
        outputs = either.generate(
            ["hello"] * 4,
            [
                SamplingParams(json_schema=schema, max_tokens=90, temperature=temperature, seed=seed, logit_bias=likely)
                for seed in range(4)
            ],
        )
        ended = [output for output in outputs if output.finish_reason == "stop"]
        assert ended and all(output.finish_reason in ("stop", "length") for output in outputs)
        for output in ended:
            valid(output.text, schema)
            assert output.token_ids[-1] in either._eos_token_ids
        assert_at_rest(either)

    @pytest.mark.parametrize("num_blocks", [64, 10], ids=["room", "preemption"])
    def test_in_step_or_a_step_behind_the_texts_are_equal(self, make_engine, num_blocks):
        outputs = []
        for behind in (False, True):
            engine = make_engine(async_scheduling=behind, num_blocks=num_blocks, max_prefill_tokens=24)
            outputs.append(engine.generate([f"number {i}" for i in range(30)], many(30)))
            assert bool(engine.stats().preemptions) == (num_blocks == 10)
            assert_at_rest(engine)
        in_step, behind = outputs
        assert [o.token_ids for o in in_step] == [o.token_ids for o in behind]
        assert [o.finish_reason for o in in_step] == [o.finish_reason for o in behind]
        assert {o.finish_reason for o in in_step} == {"stop", "length"}

    def test_a_text_without_a_schema_is_the_same_in_their_company(self, either):
        free = SamplingParams(max_tokens=30, temperature=1.0, seed=3)
        constrained = [SamplingParams(json_schema=schema, max_tokens=25) for schema in SCHEMAS]
        (alone,) = either.generate("hello", free)
        assert either.generate(["hello"] * 6, [free, *constrained])[0].token_ids == alone.token_ids

    def test_preempted_at_each_of_its_tokens(self, either):
        params = SamplingParams(json_schema=SCHEMAS[1], max_tokens=20, temperature=1.0, seed=5)
        (expected,) = either.generate("hello", params)
        for at in range(1, 20, 3):
            id_ = either.add_request("hello", params)

            def preempt(step, at=at, id_=id_):
                if step == at:
                    (seq,) = [seq for seq in either.scheduler.running if seq.id == id_]
                    either.scheduler.preempt(seq)

            if at < len(expected.token_ids):
                assert finish(either, preempt)[id_].token_ids == expected.token_ids
            else:
                either.abort(id_)
                either.step()
        assert_at_rest(either)

    def test_its_grammar_is_told_each_token_once(self, either, monkeypatch):
        told, follow = [], Grammar.follow

        def record(grammar, token_ids):
            told.append(token_ids)
            follow(grammar, token_ids)

        monkeypatch.setattr(Grammar, "follow", record)
        (output,) = either.generate("hello", json_schema={"type": "object"}, max_tokens=20)
        assert output.finish_reason == "length"
        assert told == [[], *([token] for token in output.token_ids[:-1])]

    def test_a_launch_that_is_interrupted_is_made_again(self, either, monkeypatch):
        options = {"json_schema": SCHEMAS[0], "max_tokens": 20}
        (whole,) = either.generate("hello", **options)
        stream = either.stream_generate("hello", **options)
        pairs = [next(stream), next(stream)]
        launch = either.runner.launch

        def interrupted(*args):
            launch(*args)
            raise KeyboardInterrupt

        monkeypatch.setattr(either.runner, "launch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            either.generate("b", max_tokens=2)
        monkeypatch.setattr(either.runner, "launch", launch)
        pairs += stream
        assert [token for token, _ in pairs] == whole.token_ids
        assert_at_rest(either)

    def test_it_can_be_aborted_and_streamed(self, either):
        options = {"json_schema": SCHEMAS[0], "max_tokens": 40}
        (whole,) = either.generate("hello", **options)
        assert "".join(text for _, text in either.stream_generate("hello", **options)) == whole.text
        left = either.stream_generate("hello", **options)
        next(left)
        left.close()
        finish(either)
        assert_at_rest(either)

    def test_stops_cut_it_off(self, engine):
        stopped = engine.generate("hello", json_schema={"const": {"a": "bcd"}}, max_tokens=40, stop="bc")[0]
        assert stopped.finish_reason == "stop" and stopped.text.endswith('"') and '"a"' in stopped.text
        (brace,) = engine.tokenizer.encode("{")
        stopped = engine.generate("hello", json_schema={"type": "object"}, stop_token_ids=[brace])[0]
        assert (stopped.finish_reason, stopped.token_ids, stopped.text) == ("stop", [brace], "")
        options = {"json_schema": {"type": "object"}, "stop_token_ids": [brace], "min_tokens": 5}
        nothing = engine.generate("hello", **options)[0]
        assert nothing.finish_reason == "error" and "nothing but a stop token before min_tokens=5" in nothing.error

    def test_log_probabilities_are_the_models(self, engine):
        (output,) = engine.generate("hello", json_schema={"const": "no"}, logprobs=1, max_tokens=20)
        assert output.text == '"no"' and output.finish_reason == "stop"
        token_ids = engine.tokenizer.encode("hello") + output.token_ids
        (again,) = engine.generate(token_ids, prompt_logprobs=1, max_tokens=1)
        own = again.prompt_logprobs[-len(output.token_ids) :]
        assert [e.logprob for e in output.logprobs] == pytest.approx([e.logprob for e in own], abs=1e-4)
        assert any(e.top[0][0] != e.token_id for e in output.logprobs)  # the schema took another than the likeliest

    def test_what_becomes_too_complex_fails_alone(self, either):
        schema = {"type": "integer", "multipleOf": 99991, "minimum": 3, "maximum": 10**12}
        failed, other = either.generate(["hello"] * 2, [SamplingParams(json_schema=schema), SamplingParams()])
        assert failed.finish_reason == "error" and failed.error.startswith("json_schema=")
        assert other.finish_reason == "length"
        assert_at_rest(either)

    @pytest.mark.parametrize("behind", [False, True])
    def test_logits_that_are_no_numbers_end_it(self, make_engine, behind):
        engine = make_engine(async_scheduling=behind)
        poison(engine, engine.tokenizer.encode("n")[0])
        failed, other = engine.generate(["a"] * 2, [SamplingParams(json_schema={"const": c}) for c in ("no", "yes")])
        assert (failed.text, failed.finish_reason) == ('"n', "error") and "not numbers" in failed.error
        assert (other.text, other.finish_reason) == ('"yes"', "stop")
        assert_at_rest(engine)


class TestRefusals:
    @pytest.mark.parametrize(
        "schema, message",
        [
            ("nope", "not valid"),
            ("[]", "Expecting object schema"),
            ("false", "Expecting object schema"),
            ({"type": "foo"}, "Invalid type: foo"),
            ({"not": {}}, 'Unimplemented keys: \\["not"\\]'),
            ({"$ref": "http://localhost/x"}, "not present"),
            ({"$ref": "#/$defs/none"}, "none"),
            ({"type": "string", "pattern": "(?=a)"}, "regex parse error"),
            ({"type": "string", "format": "zzz"}, "Unknown format"),
            ({"enum": []}, "Unsatisfiable"),
            ({"type": "string", "minLength": 2, "maxLength": 1}, "Unsatisfiable"),
            ('{"const": "\ud800"}', "not valid"),
        ],
    )
    def test_a_schema_that_cannot_be_followed(self, engine, schema, message):
        with pytest.raises(ValueError, match=f"^json_schema=.*{message}"):
            engine.generate("hello", json_schema=schema)

    @pytest.mark.parametrize(
        "schema, message",
        [
            (5, "must be a mapping"),
            ({"const": float("nan")}, "must be JSON"),
            ({"const": {1}}, "must be JSON"),
            ({"const": "a" * MAX_SCHEMA_LENGTH}, f"at most {MAX_SCHEMA_LENGTH}"),
        ],
    )
    def test_what_is_no_schema(self, schema, message):
        with pytest.raises(ValueError, match=f"^json_schema=.*{message}"):
            SamplingParams(json_schema=schema)

    def test_a_schema_too_deep(self, engine):
        deep: dict = {}
        for _ in range(sys.getrecursionlimit() * 2):
            deep = {"items": deep}
        with pytest.raises(ValueError, match=r"^json_schema="):
            SamplingParams(json_schema=deep)
        with pytest.raises(ValueError, match=r"^json_schema=.*recursion"):
            engine.generate("hello", json_schema='{"items":' * 5000 + "{}" + "}" * 5000)

    def test_it_has_an_end(self):
        with pytest.raises(ValueError, match=r"^ignore_eos=True"):
            SamplingParams(json_schema={}, ignore_eos=True)

    def test_what_the_checkpoint_lacks(self):
        fast = sentencepiece(fallback=False)
        for tokenizer, ends, lacks in (
            (None, [1], "a tokenizer"),
            (Tokenizer(fast), [], "an end-of-sequence token"),
            (Tokenizer(fast), [2], "a tokenizer that llguidance knows"),
        ):
            grammars = Grammars(tokenizer, ends, 266)
            grammars.load()
            with pytest.raises(ValueError, match=f"^json_schema={{}} needs {lacks}"):
                grammars.begin("{}")

    def test_without_llguidance_the_engine_says_what_to_install(self, shared_engine, monkeypatch):
        monkeypatch.setattr("microvllm.model.grammar.find_spec", lambda name: None)
        grammars = Grammars(shared_engine.tokenizer, [1], VOCAB_SIZE)
        with pytest.raises(ValueError, match=r"pip install micro-vllm\[server\]"):
            grammars.begin("{}")
