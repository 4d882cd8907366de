"""The draw of `sampling` on a GPU: two launches, no sort.

`summarize_kernel`, in sampling_summary.py, reads every logit once, spread over the GPU. It leaves what the second
launch needs of each chunk of a row: its largest logit and, as the row asks, its winner, or its share of the softmax's
sum and the largest logit of each group of neighbours.

`draw_kernel` has one program for each row. Where the row is greedy or has no filter, it compares the chunks' winners.
Else it lists the likeliest tokens: the w-th largest of the groups' maxima is a bound that at least w tokens reach, and
whatever reaches it sits in a group whose maximum does, so only those groups are read again. The tokens listed, a
hundred or so, are ranked by comparing each with each. Where they are many, passes over the list find the draw, and
where the filters may keep tokens that are not listed, passes over the row.

The score of a token is (logit − largest logit) / temperature, as in the reference. A token ranks before another if its
score is larger, or equal and its id smaller; what a filter keeps are the first tokens in this order. The Gumbel noise
is −log(E) with an exponential variate E = −log(1 − u), so the largest score + noise is the smallest E · exp(−score):
the tokens race (an exponential race), and the first one is drawn. A score below −88 makes its time infinite; such a
token never wins, because the likeliest one takes E < 17.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .base_two import LOG2_E
from .dependent_launch import wait_for_previous
from .gumbel import exponential, stream_of
from .sampling_summary import COLUMNS, filters, soonest

_INF = tl.constexpr(float("inf"))


@triton.jit
def _exp(score):
    return tl.exp2(score * LOG2_E)


@triton.jit
def _score(logit, largest, temperature):
    return tl.div_rn(logit - largest, temperature)


@triton.jit
def _scores(logits_ptr, token, vocab, largest, temperature):
    """The scores of tokens of one row; past its end, −inf."""
    return _score(tl.load(logits_ptr + token, mask=token < vocab, other=-_INF).to(tl.float32), largest, temperature)


@triton.jit
def _ordered(x):
    """float32 → int32 in the same order"""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _from_ordered(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize_on_alignment=COLUMNS)
def draw_kernel(
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
    group_list_ptr,
    token_list_ptr,
    score_list_ptr,
    drawn_ptr,
    stride_row,
    vocab,
    num_chunks,
    GROUP: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUPS: tl.constexpr,
    WANTED: tl.constexpr,
    RANKED: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program of LANES threads for each row.

    CHUNKS, GROUPS:  how many a row has, rounded up to powers of two; GROUPS and BLOCK are LANES or more
    WANTED:          how many tokens are listed, at least, where top_k does not say
    RANKED:          how many tokens are ranked, at most
    LISTED:          how many groups, and tokens, can be listed
    BLOCK:           logits of the row that are worked on at a time
    """
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    group = _lanewise(GROUPS, LANES)
    num_groups = tl.cdiv(vocab, GROUP)
    logits_ptr += row * stride_row
    place = row * num_chunks + chunk
    temperature, k, p, floor, filtered = filters(temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, row, vocab)
    stream = stream_of(seed_ptr, index_ptr, row)
    wait_for_previous(DEPENDENT)
    # All these are under way before anything waits for one of them; none reads what was not written.
    chunk_max = tl.load(chunk_max_ptr + place, mask=chunk < num_chunks, other=-_INF)
    used_groups = tl.where(filtered, num_groups, 0)
    group_max = tl.load(group_max_ptr + row * num_groups + group, mask=group < used_groups, other=-_INF)
    winner = tl.load(chunk_winner_ptr + place, mask=chunk < tl.where(filtered, 0, num_chunks), other=vocab)

    largest = tl.max(chunk_max)
    drawn = tl.full((), -1, tl.int32)
    if tl.abs(largest) < _INF:
        if filtered:
            group_list_ptr += row * LISTED
            token_list_ptr += row * LISTED
            score_list_ptr += row * LISTED
            total = tl.full((), 0.0, tl.float32)
            if (k > LISTED // 2) | (k >= vocab):
                chunk_sum = tl.load(chunk_sum_ptr + place, mask=chunk < num_chunks, other=0.0)
                total = tl.sum(chunk_sum * _exp(_score(chunk_max, largest, temperature)))
            wanted = tl.where(k <= LISTED // 2, k, WANTED)
            while (drawn < 0) & (wanted <= LISTED // 2):
                bound, reach, num_reaching = _bound(
                    chunk_max_ptr + row * num_chunks, num_chunks, chunk_max, group_max, largest, wanted, CHUNKS, RANKED
                )
                least = _score(bound, largest, temperature)
                count = tl.full((), LISTED + 1, tl.int32)
                if num_reaching <= LISTED:
                    tl.debug_barrier()  # the lists before these have been read
                    number, _ = _enumerate(group_max >= reach)
                    tl.store(group_list_ptr + number, group, mask=group_max >= reach)
                    tl.debug_barrier()  # what one thread has stored, others load
                    count = _list(
                        logits_ptr,
                        vocab,
                        largest,
                        temperature,
                        least,
                        group_list_ptr,
                        num_reaching,
                        token_list_ptr,
                        score_list_ptr,
                        GROUP,
                        LISTED,
                        BLOCK,
                        LANES,
                    )
                    tl.debug_barrier()
                mass = tl.full((), 0.0, tl.float32)
                if (k >= vocab) & (p < 1) & (count <= LISTED):
                    i = tl.arange(0, LISTED)
                    mass = tl.sum(_exp(tl.load(score_list_ptr + i, mask=i < count, other=-_INF)))
                # The filters keep the first tokens by rank, and the first are those listed. None is kept beyond them,
                # and the mass that top-p takes its share of is known, if
                # - the top k are listed, or all that have a probability: the mass is that of the k first listed; or
                # - top-k is off, so that the mass is the row's, and the tokens listed have top-p's share of it, so that
                #   it drops whatever ranks after them; or
                # - min-p drops whatever has a score below `least`, and top-p is off or top-k is, as before.
                top_k_listed = (k <= count) | (least == -_INF)
                top_p_listed = (k >= vocab) & (p < 1) & (mass >= p * total)
                min_p_listed = (floor >= least) & ((k >= vocab) | (p >= 1))
                if (count <= LISTED) & (top_k_listed | top_p_listed | min_p_listed):
                    lists = (token_list_ptr, score_list_ptr)
                    if count <= RANKED // 4:
                        drawn = _draw_ranked(lists, count, vocab, top_k_listed, total, k, p, floor, stream, RANKED // 4)
                    elif count <= RANKED:
                        drawn = _draw_ranked(lists, count, vocab, top_k_listed, total, k, p, floor, stream, RANKED)
                    else:
                        drawn = _search(
                            logits_ptr,
                            token_list_ptr,
                            count,
                            vocab,
                            largest,
                            temperature,
                            total,
                            k,
                            p,
                            floor,
                            stream,
                            LISTED,
                        )
                # A longer list is too long as well; or what it would add to the mass, each with less than `least`, is
                # too little for top-p, and there is no min-p for it to reach.
                no_other = (k >= vocab) & (p < 1) & (floor == -_INF)
                too_little = no_other & (mass + LISTED * _exp(least) < p * total)
                wanted = tl.where((count > LISTED) | too_little, LISTED, wanted * 4)
            if drawn < 0:
                drawn = _search(logits_ptr, None, vocab, vocab, largest, temperature, total, k, p, floor, stream, BLOCK)
        elif temperature > 0:
            score = _scores(logits_ptr, winner, vocab, largest, temperature)
            drawn, _ = soonest(exponential(stream, winner) * _exp(-score), winner)
        else:
            drawn = tl.min(tl.where(chunk_max == largest, winner, vocab))
    tl.store(drawn_ptr + row, drawn.to(tl.int64))


@triton.jit
def _bound(
    chunk_max_ptr, num_chunks, chunk_max, group_max, largest, wanted, CHUNKS: tl.constexpr, RANKED: tl.constexpr
):
    """(bound, reach, how many groups reach it): a logit that `wanted` tokens have or exceed, and not many more.

    reach is a little lower: every token with the score of `bound` reaches it. To have one score, two logits must be
    closer than two roundings of their distance to the largest, each of 2^−24 of it; reach leaves 2^−20.

    The first guess is the wanted-th largest chunk maximum. With fewer chunks it is the least, or −inf where not enough
    groups exceed that. If the likely tokens crowd in few chunks, it is too low and many more groups than wanted reach
    it: then bisection takes it higher.
    """
    as_large = tl.zeros((32, CHUNKS), tl.int32)
    for start in range(0, num_chunks, 32):
        chunk = start + tl.arange(0, 32)
        other = tl.load(chunk_max_ptr + chunk, mask=chunk < num_chunks, other=-_INF)
        as_large += (other[:, None] >= chunk_max[None, :]).to(tl.int32)
    bound = tl.max(tl.where(tl.sum(as_large, axis=0) >= tl.minimum(wanted, num_chunks), chunk_max, -_INF))
    if wanted > num_chunks:
        bound = tl.where(_count(group_max >= bound) >= wanted, bound, -_INF)
    reach = _reach(bound, largest)
    num_groups = _count(group_max >= reach)
    enough = tl.maximum(wanted * 3 // 2, 3 * RANKED // 16)
    if num_groups > enough:
        low = _ordered(bound).to(tl.int64)  # wanted groups have it or exceed it, or it is −inf
        high = _ordered(largest).to(tl.int64) + 1  # less than wanted do
        count = num_groups
        while (count > enough) & (high - low > 1):
            middle = (low + high) >> 1
            as_high = _count(group_max >= _from_ordered(middle.to(tl.int32)))
            if as_high >= wanted:
                low = middle
                count = as_high
            else:
                high = middle
        bound = _from_ordered(low.to(tl.int32))
        reach = _reach(bound, largest)
        num_groups = _count(group_max >= reach)
    return bound, reach, num_groups


@triton.jit
def _reach(bound, largest):
    return tl.maximum(bound - (largest - bound) * 2.0**-20, -3.4028234663852886e38)  # not −inf


@triton.jit
def _count(chosen):
    return tl.sum(tl.sum(chosen.to(tl.int32), axis=1))


@triton.jit
def _lanewise(SIZE: tl.constexpr, LANES: tl.constexpr):
    """0 … SIZE − 1 as [LANES, SIZE // LANES]: neighbours are in neighbouring threads, and a row is in one."""
    return tl.arange(0, LANES)[:, None] + tl.arange(0, SIZE // LANES)[None, :] * LANES


@triton.jit
def _enumerate(chosen):
    """A number for each that is chosen, row by row, and how many there are."""
    ones = chosen.to(tl.int32)
    of_row = tl.sum(ones, axis=1)
    return (tl.cumsum(of_row) - of_row)[:, None] + tl.cumsum(ones, axis=1) - ones, tl.sum(of_row)


@triton.jit
def _list(
    logits_ptr,
    vocab,
    largest,
    temperature,
    least,
    group_list_ptr,
    num_groups,
    token_list_ptr,
    score_list_ptr,
    GROUP: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Lists the tokens of the groups listed whose score is `least` or more and finite, in no order.

    Returns how many there are; if they are more than LISTED, the list is not complete.
    """
    count = tl.full((), 0, tl.int32)
    for start in range(0, num_groups * GROUP, BLOCK):
        i = start + _lanewise(BLOCK, LANES)
        group = tl.load(group_list_ptr + i // GROUP, mask=i < num_groups * GROUP, other=0)
        token = tl.where(i < num_groups * GROUP, group * GROUP + i % GROUP, vocab)
        score = _scores(logits_ptr, token, vocab, largest, temperature)
        listed = (score >= least) & (score > -_INF)
        number, found = _enumerate(listed)
        stored = listed & (count + number < LISTED)
        tl.store(token_list_ptr + count + number, token, mask=stored)
        tl.store(score_list_ptr + count + number, score, mask=stored)
        count += found
    return count


@triton.jit
def _draw_ranked(lists, count, vocab, top_k_listed, total, k, p, floor, stream, SIZE: tl.constexpr):
    """The draw from the `count` tokens listed, each compared with each, given that the filters keep no other.

    top_k_listed:  top-p takes its share of the mass of the k first listed, not of the row's, which is `total`
    SIZE:          `count` or more
    """
    token_list_ptr, score_list_ptr = lists
    i = tl.arange(0, SIZE)
    score = tl.load(score_list_ptr + i, mask=i < count, other=-_INF)
    token = tl.load(token_list_ptr + i, mask=i < count, other=vocab)
    step: tl.constexpr = 4096 // SIZE if SIZE > 128 else 32
    ranks = tl.zeros((step, SIZE), tl.int32)
    masses = tl.zeros((step, SIZE), tl.float32)
    for start in range(0, count, step):
        j = start + tl.arange(0, step)
        other = tl.load(score_list_ptr + j, mask=j < count, other=-_INF)
        other_token = tl.load(token_list_ptr + j, mask=j < count, other=vocab)
        tied = (other[:, None] == score[None, :]) & (other_token[:, None] < token[None, :])
        before = (other[:, None] > score[None, :]) | tied
        ranks += before.to(tl.int32)
        masses += tl.where(before, _exp(other)[:, None], 0.0)
    rank = tl.sum(ranks, axis=0)
    mass_before = tl.sum(masses, axis=0)
    mass = tl.where(top_k_listed, tl.sum(tl.where(rank < k, _exp(score), 0.0)), total)
    share = tl.where(p < 1, p * mass, _INF)
    kept = (rank < k) & (score >= floor) & ((mass_before < share) | (rank == 0))
    first, _ = soonest(tl.where(kept, exponential(stream, token) * _exp(-score), _INF), token)
    return first


@triton.jit
def _entries(logits_ptr, list_ptr, i, size, vocab, largest, temperature):
    """(tokens, scores) of a list, or without one of the row; past the end, scores are −inf."""
    token = i if list_ptr is None else tl.load(list_ptr + i, mask=i < size, other=vocab)
    return token, _scores(logits_ptr, token, vocab, largest, temperature)


@triton.jit
def _search(logits_ptr, list_ptr, size, vocab, largest, temperature, total, k, p, floor, stream, BLOCK: tl.constexpr):
    """The draw by passes over the `size` tokens of a list that holds whatever the filters keep, or over the row's: who
    wins the race of all tokens is drawn if the filters keep it.

    If they do not, they keep nothing that ranks after it either, and those that rank before it race again: each time
    about half of what is too much drops out.
    """
    if (k < vocab) & (p < 1):
        total = _mass_of_top(logits_ptr, list_ptr, size, vocab, largest, temperature, k, BLOCK)
    winner = tl.full((), 0, tl.int32) + vocab  # ranks after all
    its_score = tl.full((), -_INF, tl.float32)
    searching = True
    while searching:
        best = tl.full((BLOCK,), _INF, tl.float32)
        best_token = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, size, BLOCK):
            i = start + tl.arange(0, BLOCK)
            token, score = _entries(logits_ptr, list_ptr, i, size, vocab, largest, temperature)
            before = (score > its_score) | ((score == its_score) & (token < winner))
            time = exponential(stream, token) * _exp(-score)
            better = before & (score >= floor) & (time < best)
            best = tl.where(better, time, best)
            best_token = tl.where(better, token, best_token)
        winner, its_time = soonest(best, best_token)
        its_score = _scores(logits_ptr, winner, vocab, largest, temperature)
        searching = False
        if (k < vocab) | (p < 1):
            ranks = tl.zeros((BLOCK,), tl.int32)
            masses = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, size, BLOCK):
                i = start + tl.arange(0, BLOCK)
                token, score = _entries(logits_ptr, list_ptr, i, size, vocab, largest, temperature)
                before = (score > its_score) | ((score == its_score) & (token < winner))
                ranks += before.to(tl.int32)
                masses += tl.where(before, _exp(score), 0.0)
            rank = tl.sum(ranks)
            kept = (rank < k) & ((p >= 1) | (tl.sum(masses) < p * total) | (rank == 0))
            searching = (kept == 0) & (its_time < _INF)
    return winner


@triton.jit
def _mass_of_top(logits_ptr, list_ptr, size, vocab, largest, temperature, k, BLOCK: tl.constexpr):
    """Σ exp(score) over the first k of these tokens, by bisection for the k-th largest score."""
    low = _ordered(tl.full((), -_INF, tl.float32)).to(tl.int64)  # more than k tokens score this or more
    high = _ordered(tl.full((), 0.0, tl.float32)).to(tl.int64) + 1  # `count` ≤ k do, with a mass of `mass`
    count = tl.full((), 0, tl.int32)
    mass = tl.full((), 0.0, tl.float32)
    while (high - low > 1) & (count < k):
        middle = (low + high) >> 1
        bound = _from_ordered(middle.to(tl.int32))
        counts = tl.zeros((BLOCK,), tl.int32)
        masses = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, size, BLOCK):
            i = start + tl.arange(0, BLOCK)
            _, score = _entries(logits_ptr, list_ptr, i, size, vocab, largest, temperature)
            counts += (score >= bound).to(tl.int32)
            masses += tl.where(score >= bound, _exp(score), 0.0)
        reaching = tl.sum(counts)
        if reaching <= k:
            high = middle
            count = reaching
            mass = tl.sum(masses)
        else:
            low = middle
    return mass + (k - count).to(tl.float32) * _exp(_from_ordered(low.to(tl.int32)))
