"""The first launch of the draw: the largest logit of each chunk of a row, its winner, or what a filter asks of it."""

from __future__ import annotations

import triton
import triton.language as tl

from .base_two import LOG2_E
from .dependent_launch import allow_next, wait_for_previous
from .gumbel import GAMMA, exponential, exponential_at, stream_of, uniform_at

_INF = tl.constexpr(float("inf"))
COLUMNS = ["temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "seed_ptr", "index_ptr"]
"""What rows ask for. Where these begin in memory depends on how many rows there are: no reason to compile again."""


@triton.jit
def soonest(time, token):
    """The token with the least time, of equals the one with the least id, and that time, in one reduction."""
    first = tl.min((time.to(tl.int32, bitcast=True).to(tl.int64) << 32) | token.to(tl.int64))  # time ≥ 0
    return (first & 0x7FFFFFFF).to(tl.int32), (first >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def filters(temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, row, vocab):
    """(temperature, k, p, the least score by min-p, whether the row is drawn and filtered)"""
    temperature = tl.load(temperature_ptr + row)
    k = tl.full((), 0, tl.int32) + vocab
    p = tl.full((), 1.0, tl.float32)
    floor = tl.full((), -_INF, tl.float32)
    if top_k_ptr is not None:
        k = tl.minimum(tl.maximum(tl.load(top_k_ptr + row), 1), vocab).to(tl.int32)
    if top_p_ptr is not None:
        p = tl.load(top_p_ptr + row)
    if min_p_ptr is not None:
        min_p = tl.load(min_p_ptr + row)
        floor = tl.where(min_p > 0, tl.log(tl.where(min_p > 0, min_p, 1.0)), -_INF)
    return temperature, k, p, floor, (temperature > 0) & ((k < vocab) | (p < 1) | (floor > -_INF))


@triton.jit
def _vector_max(logit):
    """The largest logit of each row of [vectors, at most 8], +inf where it holds a NaN.

    tl.max passes over a NaN, and asking each logit for one costs more than the maximum.
    """
    for _ in tl.static_range(3):
        if logit.shape[1] > 1:
            left, right = tl.split(tl.reshape(logit, (logit.shape[0], logit.shape[1] // 2, 2)))
            logit = tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)
    vector_max = tl.reshape(logit, (logit.shape[0],))
    return tl.where(vector_max == vector_max, vector_max, _INF)


@triton.jit
def _weights(logits_ptr, vector, vocab, largest, scale, VECTOR: tl.constexpr):
    """exp(−score) of the tokens of vectors that begin at `vector`, the score in base 2: (logit − largest) · scale."""
    token = vector[:, None] + tl.arange(0, VECTOR)[None, :]
    logit = tl.load(logits_ptr + token, mask=token < vocab, other=-_INF).to(tl.float32)
    return tl.exp2((largest - logit) * scale)


@triton.jit
def _race(
    logits_ptr,
    start,
    vocab,
    largest,
    scale,
    stream,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The token with the least time E · exp(−score) of the chunk that begins at token `start`.

    E = −log(1 − u) is u or more, so u · exp(−score) bounds a time from below at half its cost. The vector with the
    least bound is timed. It has the winner if no other's bound is within the least time; else all are timed. That is
    as rare as the winner is unlikely: E is about u + u²/2, and u about the winner's share of the chunk's probability.
    """
    LANES: tl.constexpr = STEP // VECTOR
    vector = start + tl.arange(0, LANES) * VECTOR
    # One sum of 64 bits a token, where a product would take several instructions.
    of_vector = stream + (vector + 1).to(tl.uint64) * GAMMA
    within = tl.arange(0, VECTOR).to(tl.uint64) * GAMMA
    of_step: tl.constexpr = STEP * GAMMA % 2**64

    state = of_vector
    least = tl.full((LANES,), _INF, tl.float32)  # of the bounds of a lane's vectors; then the least but that one
    second = tl.full((LANES,), _INF, tl.float32)
    its_vector = vector
    for step in range(0, CHUNK, STEP):
        weight = _weights(logits_ptr, vector + step, vocab, largest, scale, VECTOR)
        bound = tl.min(uniform_at(state[:, None] + within[None, :]) * weight, axis=1)
        its_vector = tl.where(bound < least, vector + step, its_vector)
        second = tl.minimum(second, tl.maximum(bound, least))
        least = tl.minimum(bound, least)
        state += of_step

    first, _ = soonest(least, its_vector)
    token = first + tl.arange(0, VECTOR)
    logit = tl.load(logits_ptr + token, mask=token < vocab, other=-_INF).to(tl.float32)
    winner, time = soonest(exponential(stream, token) * tl.exp2((largest - logit) * scale), token)
    reach = time * (1 + 2.0**-20)  # more than rounding may take away
    rivals = tl.sum((least <= reach).to(tl.int32) + (second <= reach).to(tl.int32), axis=0)
    if (rivals > 1) & (time < _INF):
        winner = _race_in_full(logits_ptr, vector, vocab, largest, scale, of_vector, CHUNK, STEP, VECTOR)
    return winner


@triton.jit
def _race_in_full(
    logits_ptr,
    vector,
    vocab,
    largest,
    scale,
    state,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """As `_race`, with the time of every token. vector: where those of the first step begin; state: of these tokens"""
    within = tl.arange(0, VECTOR).to(tl.uint64) * GAMMA
    of_step: tl.constexpr = STEP * GAMMA % 2**64
    first_time = tl.full((STEP // VECTOR, VECTOR), _INF, tl.float32)
    first_token = tl.zeros((STEP // VECTOR, VECTOR), tl.int32)
    for step in range(0, CHUNK, STEP):
        weight = _weights(logits_ptr, vector + step, vocab, largest, scale, VECTOR)
        time = exponential_at(state[:, None] + within[None, :]) * weight
        token = (vector + step)[:, None] + tl.arange(0, VECTOR)[None, :]
        first_token = tl.where(time < first_time, token, first_token)
        first_time = tl.minimum(time, first_time)
        state += of_step
    winner, _ = soonest(first_time, first_token)
    return winner


@triton.jit(do_not_specialize_on_alignment=COLUMNS)
def summarize_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    index_ptr,
    chunk_max_ptr,
    chunk_sum_ptr,
    chunk_winner_ptr,
    group_max_ptr,
    stride_row,
    vocab,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    VECTOR: tl.constexpr,
    GROUP: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program for each (chunk, row). A NaN counts as +inf: a row with either has no draw.

    STEP:    tokens that race at a time, where the chunk has more than there are registers for
    VECTOR:  neighbours that one thread loads at once and reduces before it asks another thread
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    place = row * tl.num_programs(0) + chunk
    logits_ptr += row * stride_row
    vector = chunk * CHUNK + tl.arange(0, CHUNK // VECTOR) * VECTOR  # the first token of each
    token = vector[:, None] + tl.arange(0, VECTOR)[None, :]
    # Before `allow_next`: the second launch reads the parameters while this one runs, so they must be there by then.
    wait_for_previous(DEPENDENT)
    logit = tl.load(logits_ptr + token, mask=token < vocab, other=-_INF).to(tl.float32)
    temperature, _, _, _, filtered = filters(temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, row, vocab)
    stream = stream_of(seed_ptr, index_ptr, row)
    allow_next(DEPENDENT)

    vector_max = _vector_max(logit)
    chunk_max = tl.max(vector_max, axis=0)
    tl.store(chunk_max_ptr + place, chunk_max)
    # Scores in base 2, relative to the chunk and rounded otherwise than `_score`: enough for a sum, and for the winner
    # of a chunk but where two come in within 1e-6. The bounds keep infinity − infinity and 0 · infinity away.
    largest = tl.where(tl.abs(chunk_max) < _INF, chunk_max, 0.0)
    scale = LOG2_E / tl.maximum(temperature, 2.0**-100)
    if filtered:
        groups: tl.constexpr = CHUNK // GROUP
        group = chunk * groups + tl.arange(0, groups)
        group_max = tl.max(tl.reshape(vector_max, (groups, GROUP // VECTOR)), axis=1)
        num_groups = tl.cdiv(vocab, GROUP)
        tl.store(group_max_ptr + row * num_groups + group, group_max, mask=group < num_groups)
        tl.store(chunk_sum_ptr + place, tl.sum(tl.sum(tl.exp2((logit - largest) * scale), axis=1), axis=0))
    elif temperature > 0:
        winner = _race(logits_ptr, chunk * CHUNK, vocab, largest, scale, stream, CHUNK, STEP, VECTOR)
        tl.store(chunk_winner_ptr + place, winner)
    else:
        # The first vector with the largest logit, which is read again: fewer comparisons than of each logit.
        first = tl.min(tl.where(vector_max == chunk_max, vector, vocab), axis=0)
        its_token = first + tl.arange(0, VECTOR)
        its_logit = tl.load(logits_ptr + its_token, mask=its_token < vocab, other=-_INF).to(tl.float32)
        tl.store(chunk_winner_ptr + place, tl.min(tl.where(its_logit == chunk_max, its_token, vocab), axis=0))
