"""The engine: prompts in, text out."""

from __future__ import annotations

import copy
import itertools
import random
import sys
import time
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Many
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..kernels.kernel_set import KernelSet
from ..model.checkpoint import open_checkpoint
from ..model.grammar import Grammars
from ..model.loader import load_model, num_parameters
from ..model.logprobs import Logprobs
from ..model.qwen2 import LayerCache, Qwen2
from ..model.sampler import Sampler
from ..model.sampling_params import SamplingParams
from .cache_manager import KVCacheManager
from .config import EngineConfig
from .detokenizer import Detokenizer
from .kv_cache import allocate_cache, num_blocks_that_fit
from .model_graph import ModelGraphRunner
from .model_runner import ModelRunner, Step, StepResult
from .outputs import Generations, RequestError, RequestOutput, StepOutput, Timings, Usage
from .prompt import Prompt, encode, is_chat, one_or_several
from .scheduler import Batch, Scheduler
from .sequence import Sequence, Status
from .stats import EngineStats


@dataclass
class Request:
    """A sequence with what the scheduler does not know of it; `outbox` is where its StepOutputs go."""

    prompt: Prompt
    seq: Sequence
    detokenizer: Detokenizer | None
    outbox: deque[StepOutput]
    first_step_time: float | None = None
    first_token_time: float | None = None


class InferenceEngine:
    """Continuous batching of a language model over a paged KV cache. Not for several threads at once.

    model_path:      a Hugging Face folder, a .gguf file, the known name "smollm2", or a hub name "owner/model"
    max_batch_size:  requests that run at once
    kernels:         what computes each operator; None takes the preferred kernels of the device
    options:         the other fields of EngineConfig, by name

    ValueError says what is wrong with the checkpoint or an option.
    """

    def __init__(
        self, model_path: str | Path, max_batch_size: int = 32, *, kernels: KernelSet | None = None, **options: Any
    ):
        known = [f.name for f in fields(EngineConfig)]
        for name in options:
            if name not in known:
                raise ValueError(f"unknown option {name}={options[name]!r}; the options are {', '.join(known)}")
        config = self.config = EngineConfig(max_batch_size=max_batch_size, **options)
        device = self.device = config.resolve_device()
        checkpoint = open_checkpoint(model_path, config.load_format)
        self.model_config = checkpoint.config
        self.max_model_len = config.max_model_len or checkpoint.config.max_length
        if self.max_model_len > checkpoint.config.max_length:
            raise ValueError(
                f"max_model_len={self.max_model_len} must be at most the model's {checkpoint.config.max_length}"
            )
        self.kernels = self._usable(KernelSet.default(device) if kernels is None else kernels)
        dtype = config.resolve_dtype(checkpoint.config.dtype, device)
        self.tokenizer = checkpoint.tokenizer()
        model = load_model(
            checkpoint,
            self.kernels,
            device=device,
            dtype=dtype,
            max_length=self.max_model_len,
            load_format=config.load_format,
            progress=config.progress,
        )
        self._eos_token_ids = checkpoint.config.eos_token_ids
        if self.tokenizer is not None:
            self._eos_token_ids |= self.tokenizer.eos_token_ids
        self.grammars = Grammars(self.tokenizer, self._eos_token_ids, self.model_config.vocab_size)
        with self.its_gpu():
            self._assemble(model)
        if config.progress:
            gib = num_parameters(model.config) * dtype.itemsize / 2**30
            num_blocks = self.cache_manager.num_blocks
            cache_gib = num_blocks * config.block_size * model.config.kv_bytes_per_token(dtype) / 2**30
            print(
                f"{checkpoint.name}: {gib:.2f} GiB of {str(dtype).removeprefix('torch.')} weights on {device}, "
                f"{num_blocks} cache blocks of {config.block_size} tokens ({cache_gib:.2f} GiB)",
                f"kernels: {self.kernels}",
                sep="\n",
                file=sys.stderr,
            )

    def with_kernels(self, kernels: KernelSet, *, enforce_eager: bool | None = None) -> InferenceEngine:
        """Another engine with the same options on the same weights, which take no memory again; its cache does.

        ValueError for kernels that cannot run on its device or read a weight in another layout than this engine's.
        """
        other = copy.copy(self)
        other.kernels = self._usable(kernels)
        if enforce_eager is not None:
            other.config = replace(self.config, enforce_eager=enforce_eager)
        with self.its_gpu():
            other._assemble(self.runner.model.with_kernels(kernels))
        return other

    def _usable(self, kernels: KernelSet) -> KernelSet:
        """The same; ValueError where it is no KernelSet, or one that cannot run on the engine's device."""
        if not isinstance(kernels, KernelSet):
            raise ValueError(f"kernels={kernels!r} must be a KernelSet, such as KernelSet.default().replace(…)")
        kernels.check_device(self.device)
        return kernels

    def its_gpu(self) -> AbstractContextManager:
        """Makes the engine's GPU the current one, on which Triton launches; nothing on a CPU."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _assemble(self, model: Qwen2) -> None:
        """All that an engine has of its own around the weights."""
        config, dtype, device = self.config, model.embedding.dtype, self.device
        sampler = Sampler(self.kernels)
        num_blocks = config.num_blocks or num_blocks_that_fit(model, sampler, config, dtype)
        cache = allocate_cache(model.config, model.config.num_layers, num_blocks, config.block_size, dtype, device)
        self.runner = self._make_runner(model, sampler, cache)
        self.cache_manager = KVCacheManager(num_blocks, config.block_size, prefix_caching=config.enable_prefix_caching)
        self.scheduler = Scheduler(
            self.cache_manager,
            config.make_policy(),
            max_batch_size=config.max_batch_size,
            max_prefill_tokens=config.max_prefill_tokens,
            interleaved_prefill_tokens=config.interleaved_prefill_tokens,
            age_bound=config.age_bound,
        )
        self._ids = itertools.count()
        self._seeds = random.Random(config.seed)
        self._requests: dict[int, Request] = {}
        self._async = device.type == "cuda" if config.async_scheduling is None else config.async_scheduling
        self._launched: Step | None = None  # while the host is a step behind
        self._outbox: deque[StepOutput] = deque()

    def _make_runner(self, model: Qwen2, sampler: Sampler, cache: list[LayerCache]) -> ModelRunner:
        batch_size = self.config.max_batch_size
        if self.device.type == "cpu" or self.config.enforce_eager:
            return ModelRunner(model, sampler, cache, batch_size)
        return ModelGraphRunner(model, sampler, cache, batch_size, progress=self.config.progress)

    # --- whole answers ---

    def generate(
        self,
        prompts: Prompt | Many[Prompt],
        params: SamplingParams | Many[SamplingParams] | None = None,
        **options: Any,
    ) -> Generations:
        """Completes prompts, all together; the outputs are in the order of the prompts.

        prompts:  texts, lists of token ids, or chats; or one of these
        params:   for all of them or one each; or, instead, the fields of SamplingParams by name
        ValueError, and nothing is generated, where a prompt or an option cannot be served. A request that fails later
        has finish_reason "error".
        """
        prompts = one_or_several(prompts)
        if not isinstance(params, (list, tuple)):
            each = [self._params(params, options)] * len(prompts)
        elif len(params) == len(prompts):
            each = [self._params(p, options) for p in params]
        else:
            raise ValueError(f"{len(prompts)} prompts need as many params, or one for all; there are {len(params)}")
        outbox: deque[StepOutput] = deque()
        prepared = [self._prepare(prompt, p, outbox, streamed=False) for prompt, p in zip(prompts, each, strict=True)]
        outputs: dict[int, RequestOutput] = {}
        bar = tqdm(total=len(prepared), unit="request", delay=2, disable=None if self.config.progress else True)
        try:
            for request in prepared:
                self.add(request)
            while len(outputs) < len(prepared):
                self._step()
                for event in self._drain(outbox):
                    if event.output is not None:
                        outputs[event.request_id] = event.output
                        bar.update()
        finally:
            bar.close()
            for request in prepared:
                self.abort(request.seq.id)
        return Generations(outputs[request.seq.id] for request in prepared)

    def stream_generate(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Any
    ) -> Iterator[tuple[int, str]]:
        """Yields (token id, text piece) for each token as it is made; the pieces, some of them empty, join to the text.

        The iterator returns the RequestOutput. ValueError, at once, where the prompt or an option cannot be served;
        RequestError where the request fails. Closing it aborts the request.
        """
        outbox: deque[StepOutput] = deque()
        return self._stream(self._prepare(prompt, self._params(params, options), outbox), outbox)

    def _stream(self, request: Request, outbox: deque[StepOutput]) -> Iterator[tuple[int, str]]:
        self.add(request)
        try:
            while True:
                while outbox:  # others may step the engine, and add to it, while the caller has what was yielded
                    event = outbox.popleft()
                    if event.token_id is not None:
                        yield event.token_id, event.text
                    if event.output is not None:
                        if event.output.error:
                            raise RequestError(event.output.error)
                        return event.output
                self._step()
        finally:
            self.abort(request.seq.id)

    # --- step by step, for a server ---

    def add_request(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> int:
        """Takes a request in and returns its id; ValueError where it cannot be served."""
        return self.add(self.prepare(prompt, params, **options))

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        prompt_ids: list[int] | None = None,
        **options: Any,
    ) -> Request:
        """A request that has been checked and not yet begun; ValueError where it cannot be served.

        Encoding a long prompt takes a while: this, and `encode`, may be called in another thread than the steps.

        prompt_ids: what `encode` has given for the prompt, where it was called
        """
        return self._prepare(prompt, self._params(params, options), self._outbox, prompt_ids=prompt_ids)

    def encode(self, prompt: Prompt, *, add_special_tokens: bool = True) -> list[int]:
        """The prompt's token ids; ValueError where it is no prompt, or clearly too long a text.

        add_special_tokens: whether a text's tokens come after those that the model's texts begin with
        """
        return encode(prompt, self.tokenizer, self.max_model_len, add_special_tokens=add_special_tokens)

    def add(self, request: Request) -> int:
        """Takes in what `prepare` gave and returns its id."""
        request.seq.id, request.seq.arrival_time = next(self._ids), time.monotonic()
        self.scheduler.add(request.seq)
        self._requests[request.seq.id] = request
        return request.seq.id

    def step(self) -> list[StepOutput]:
        """One step of everything that runs → what became of the requests of `add_request` since the last call."""
        if self.has_work:
            self._step()
        return self._drain(self._outbox)

    def abort(self, request_id: int) -> bool:
        """Ends a request, whatever its state, and frees its blocks; False where it has ended already."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self.scheduler.finish(request.seq, "abort")
        self._finish(request, None, "")
        return True

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def stats(self) -> EngineStats:
        return EngineStats.of(self.scheduler)

    # --- its own steps ---

    @staticmethod
    def _params(params: SamplingParams | None, options: dict[str, Any]) -> SamplingParams:
        if params is None:
            return SamplingParams.of(**options)
        if options:
            raise ValueError(f"give params or options, not both: {', '.join(options)} came beside params")
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params must be SamplingParams, not {params!r}")
        return params

    def _prepare(
        self,
        prompt: Prompt,
        params: SamplingParams,
        outbox: deque[StepOutput],
        *,
        prompt_ids: list[int] | None = None,
        streamed: bool = True,
    ) -> Request:
        """A request that has been checked and not yet begun."""
        vocab_size = self.model_config.vocab_size
        params.check_tokens(vocab_size)
        if params.stop and self.tokenizer is None:
            raise ValueError(f"stop={params.stop!r} needs a tokenizer, and this checkpoint has none")
        if prompt_ids is None:
            prompt_ids = self.encode(prompt)
        if not prompt_ids:
            raise ValueError(f"prompt {prompt!r} is empty: it has no tokens")
        if len(prompt_ids) >= self.max_model_len:
            raise ValueError(
                f"a prompt of {len(prompt_ids)} tokens is too long: with a token to generate it must be at most "
                f"max_model_len={self.max_model_len}"
            )
        for token in prompt_ids:
            if not isinstance(token, int) or not 0 <= token < vocab_size:
                raise ValueError(f"token id {token!r} of the prompt must be an integer from 0 to {vocab_size - 1}")
        ends = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            ends |= self._eos_token_ids
        seq = Sequence(
            -1,  # until it arrives: ids rise in the order of arrival
            prompt_ids,
            params,
            max_length=min(len(prompt_ids) + params.max_tokens, self.max_model_len),
            seed=self._seeds.getrandbits(63) if params.seed is None else params.seed,
            stop_token_ids=frozenset(token for token in ends if token < vocab_size),
            streamed=streamed,
            grammar=None if params.json_schema is None else self.grammars.begin(params.json_schema),
        )
        self.scheduler.check(seq)
        detokenizer = self.tokenizer and Detokenizer(self.tokenizer, params.stop, goes_on=not is_chat(prompt))
        return Request(prompt, seq, detokenizer, outbox)

    def _step(self) -> None:
        with self.its_gpu():
            self._compute()

    def _compute(self) -> None:
        """Launches the next step. Then its tokens are taken in, or, a step behind, those of the step before, so that
        the device never waits for the host to have read them.
        """
        previous, step = self._launched, None
        now = time.monotonic()
        batch = self.scheduler.schedule(now)
        for chunk in batch.chunks:
            request = self._requests[chunk.seq.id]
            if request.first_step_time is None:
                request.first_step_time = now
        assert batch or previous, "requests wait and none can be served"
        if batch:
            step = self.runner.launch(batch, previous)
        due = previous if self._async else step
        # The books come after the wait: where that is interrupted, they know of no step whose tokens nobody has read,
        # and the next call makes this one again.
        result = None if due is None else due.result()
        if batch:
            self.scheduler.advance(batch)
        if self._async:
            self._launched = step
        if due is not None:
            self._take_in(due.batch, result)
        if not self.has_work:
            self._launched = None  # nobody waits for what a step has computed that was launched too many

    def _take_in(self, batch: Batch, result: StepResult) -> None:
        """Enters what a step has computed, and sends it on."""
        taken = self.scheduler.update(batch, result.tokens)
        for chunk in batch.chunks:
            if (entries := result.prompt_logprobs.get(chunk.seq.id)) is not None:
                # In their place: a preempted sequence computes its prompt again.
                chunk.seq.prompt_logprobs[chunk.start :] = entries
        now = time.monotonic()
        for i in taken:
            seq, token, logprobs = batch.sampled[i], result.tokens[i], result.logprobs[i]
            request = self._requests[seq.id]
            if token < 0:
                self._finish(request, None, "")
                continue
            if request.first_token_time is None:
                request.first_token_time = now
            if logprobs is not None:
                seq.logprobs.append(logprobs)
            piece = self._detokenize(request, token)
            if seq.status is Status.FINISHED:
                self._finish(request, token, piece, logprobs)
            else:
                request.outbox.append(StepOutput(seq.id, token, piece, logprobs))

    def _detokenize(self, request: Request, token: int) -> str:
        """The text that the token completes; ends the request at a stop string."""
        seq = request.seq
        if request.detokenizer is None or seq.finish_reason == "stop":  # the token that ends a text is not shown
            return ""
        may_stop = seq.num_generated >= seq.params.min_tokens
        piece, stopped = request.detokenizer.push(token, look_for_stop=may_stop)
        if stopped:
            self.scheduler.finish(seq, "stop")
        return piece

    def _finish(self, request: Request, token: int | None, piece: str, logprobs: Logprobs | None = None) -> None:
        """Sends a request's last event, with its output."""
        seq, now = request.seq, time.monotonic()
        del self._requests[seq.id]
        if request.detokenizer is not None:
            piece += request.detokenizer.finish()
        moments = (request.first_step_time, request.first_token_time, now)
        output = RequestOutput(
            request_id=seq.id,
            prompt=request.prompt,
            text=request.detokenizer.text if request.detokenizer is not None else "",
            token_ids=seq.output_ids,
            finish_reason=seq.finish_reason,
            usage=Usage(seq.num_prompt, seq.num_generated, min(seq.num_cached or 0, seq.num_prompt)),
            timings=Timings(*(None if moment is None else moment - seq.arrival_time for moment in moments)),
            logprobs=seq.logprobs if seq.params.logprobs is not None else None,
            prompt_logprobs=[None, *seq.prompt_logprobs] if seq.params.prompt_logprobs is not None else None,
            error=seq.error,
        )
        request.outbox.append(StepOutput(seq.id, token, piece, logprobs, output))

    @staticmethod
    def _drain(outbox: deque[StepOutput]) -> list[StepOutput]:
        events = list(outbox)
        outbox.clear()
        return events
