"""The draw of the next token: temperature, top-k, top-p, min-p, and a random number that is a function of its place.

The draw is the Gumbel-max trick (Maddison et al. 2014, arXiv:1411.0030): argmax(logit + Gumbel noise) is distributed as
softmax(logits). The noise of token t in request's draw i is a hash of (seed, i, t), so a draw depends on nothing else:
not on the row, the batch or the step it falls in.
"""

from __future__ import annotations

from itertools import cycle, islice
from typing import Any

import torch
import triton

from .compiled import compiled
from .dependent_launch import dependent_launch
from .gumbel import gumbel_noise
from .op import Case, Cost, Implementation, Op, needs_gpu
from .sampling_draw import draw_kernel
from .sampling_summary import summarize_kernel


def sample_reference(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
    seed: torch.Tensor,
    index: torch.Tensor,
) -> torch.Tensor:
    """A token for each row: the largest logit where temperature is 0, else a draw from the filtered softmax.

    The filters apply in this order, each to what the one before has left: temperature; top_k, the k largest; top_p, the
    fewest largest whose probability reaches p (Holtzman et al. 2019, arXiv:1904.09751); min_p, those at least min_p
    times as likely as the likeliest (arXiv:2407.01082).

    logits [rows, vocab], taken as float32; temperature [rows] float32; top_k [rows] int64 (vocab: off), top_p [rows]
    float32 (1: off), min_p [rows] float32 (0: off), each None where no row uses it; seed, index [rows] int64
    → tokens [rows] int64, −1 for a row that holds NaN or whose largest logit is not finite
    """
    if logits.dtype.itemsize == 2:
        logits = logits.float()
    largest, greedy = logits.max(dim=-1)
    valid = largest.isfinite()
    drawn = temperature > 0
    scores = (logits - largest.unsqueeze(1)) / torch.where(drawn, temperature, 1).unsqueeze(1)
    if top_k is not None or top_p is not None:
        scores = _keep_top(scores, top_k, top_p)
    if min_p is not None:
        scores = scores.masked_fill(scores < min_p.log().unsqueeze(1), -torch.inf)
    token = (scores + gumbel_noise(seed, index, logits.shape[1])).argmax(dim=-1)
    return torch.where(valid, torch.where(drawn, token, greedy), -1)


def _keep_top(scores: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None) -> torch.Tensor:
    """scores with all but the top-k and then the top-p of each row at −inf."""
    ordered, tokens = scores.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        rank = torch.arange(scores.shape[1], device=scores.device)
        ordered = ordered.masked_fill(rank >= top_k.unsqueeze(1), -torch.inf)
    if top_p is not None:
        probability = ordered.softmax(dim=-1)
        before = probability.cumsum(dim=-1) - probability
        # The likeliest token stays whatever p is, and at 1 all do, though a sum may round to 1 before they end.
        dropped = (before >= top_p.unsqueeze(1)) & (top_p.unsqueeze(1) < 1)
        dropped[:, 0] = False
        ordered = ordered.masked_fill(dropped, -torch.inf)
    return torch.empty_like(scores).scatter_(1, tokens, ordered)


def compiled_sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
    seed: torch.Tensor,
    index: torch.Tensor,
) -> torch.Tensor:
    """`sample_reference` through torch.compile, which takes seconds for each set of filters, whatever the sizes."""
    return compiled(sample_reference, dynamic=True)(logits, temperature, top_k, top_p, min_p, seed, index)


def _needs_inductor(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "Inductor compiles for a GPU"


MAX_VOCAB = 1 << 20
"""The second launch holds the maxima of a row's groups in registers."""


def _launch(vocab: int) -> dict[str, dict[str, int]]:
    """The constants of each launch and of both; their kernels say what they mean.

    They are no function of how many rows there are: sums then round alike in every batch.

    A list of up to RANKED tokens is ranked by comparing each with each, so one twice as long takes four times as long.
    WANTED is meant to hold the nucleus of a peaked distribution; where it does not, four times as many are listed. A
    group is one load of 8 tokens or more. With fewer than 3000 groups those with the best thousand tokens could be all
    of them; 8192 fit a program's registers. `python -m bench.tune sample` sweeps others, over peaked distributions.
    """
    padded = triton.next_power_of_2(vocab)
    chunk = max(512, padded // 64)
    most = max(1, vocab // 3000).bit_length() - 1  # log2 of the most tokens a group has if there are 3000 groups
    group = max(8, min(32, 1 << most), padded // 8192)
    warps = max(1, chunk // 1024)
    return {
        "both": {"GROUP": group},
        "summarize": {"CHUNK": chunk, "STEP": 256 * warps, "VECTOR": 8, "num_warps": warps},
        "draw": {"WANTED": 64, "RANKED": 512, "LISTED": 2048, "BLOCK": 4096, "num_warps": 16},
    }


def _check(logits: torch.Tensor, columns: dict[str, tuple[torch.Tensor | None, torch.dtype]]) -> None:
    if logits.dim() != 2 or logits.dtype not in OP.dtypes or (logits.numel() and logits.stride(1) != 1):
        raise ValueError(
            "logits are [rows, vocab] in float16, bfloat16 or float32 with contiguous rows, not "
            f"{list(logits.shape)} in {logits.dtype} with strides {logits.stride()}"
        )
    if not 0 < logits.shape[1] <= MAX_VOCAB:
        raise ValueError(f"vocab is 1 to {MAX_VOCAB}, not {logits.shape[1]}")
    for name, (column, dtype) in columns.items():
        if column is None:
            continue
        if column.shape != logits.shape[:1] or column.dtype != dtype or column.device != logits.device:
            raise ValueError(
                f"{name} is [{logits.shape[0]}] {dtype} on {logits.device}, not {list(column.shape)} {column.dtype} on "
                f"{column.device}"
            )


def top_k_top_p_sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
    seed: torch.Tensor,
    index: torch.Tensor,
) -> torch.Tensor:
    """As `sample_reference`, in two launches and without a sort. What a row asks for is read on the device.

    Sums of probabilities are rounded otherwise than the reference's, so a token that stands within some 1e-6 of top-p's
    edge may fall on its other side; ties of logits and scores are resolved exactly. ValueError for logits that are
    float64 or whose rows are not contiguous, a vocab over MAX_VOCAB, parameters of another shape, dtype or device.
    """
    floats, integers = torch.float32, torch.int64
    columns = {
        "temperature": (temperature, floats),
        "top_k": (top_k, integers),
        "top_p": (top_p, floats),
        "min_p": (min_p, floats),
        "seed": (seed, integers),
        "index": (index, integers),
    }
    _check(logits, columns)
    rows, vocab = logits.shape
    drawn = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return drawn
    launch = _launch(vocab)
    both, summarize, draw = launch["both"], launch["summarize"], launch["draw"]
    num_chunks, num_groups = triton.cdiv(vocab, summarize["CHUNK"]), triton.cdiv(vocab, both["GROUP"])

    def workspace(width: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(rows, width, dtype=dtype, device=logits.device)

    summary = (
        workspace(num_chunks, torch.float32),  # chunk_max
        workspace(num_chunks, torch.float32),  # chunk_sum
        workspace(num_chunks, torch.int32),  # chunk_winner
        workspace(num_groups, torch.float32),  # group_max
    )
    lists = (
        workspace(draw["LISTED"], torch.int32),  # group_list
        workspace(draw["LISTED"], torch.int32),  # token_list
        workspace(draw["LISTED"], torch.float32),  # score_list
    )
    parameters = [None if column is None else column.contiguous() for column, _ in columns.values()]
    sizes = {"stride_row": logits.stride(0), "vocab": vocab}
    dependent = dependent_launch(logits.device)
    summarize_kernel[(num_chunks, rows)](logits, *parameters, *summary, **sizes, **both, **summarize, **dependent)
    lanes = 32 * draw["num_warps"]
    draw_kernel[(rows,)](
        logits,
        *parameters,
        *summary,
        *lists,
        drawn,
        **sizes,
        num_chunks=num_chunks,
        CHUNKS=triton.next_power_of_2(num_chunks),
        GROUPS=max(lanes, triton.next_power_of_2(num_groups)),
        LANES=lanes,
        **both,
        **draw,
        **dependent,
    )
    return drawn


KINDS = {
    "greedy": (0.0, None, None, None),
    "temperature": (0.7, None, None, None),
    "top_k_top_p": (0.7, 50, 0.9, None),
    "top_p": (1.0, None, 0.9, None),
    "min_p": (1.0, None, None, 0.05),
    "all": (1.5, 1000, 0.8, 1e-3),
    "top_k": (1.5, 3, None, None),
}
"""What rows ask for: temperature, top_k, top_p, min_p."""


def make_inputs(
    rows: int,
    vocab: int,
    kind: str,
    shape: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> dict[str, Any]:
    """kind: one of KINDS, or "mixed": a row of each in turn

    shape:  "flat", normal logits;  "peaked", a language model's: a long tail and above it, far apart, some dozens;
            "ties", few different values;  "masked", a grammar's: all but some four are −inf;  "extremes", flat ones a
            third of which is −inf, in turn with rows that hold a NaN, a +inf or nothing but −inf

    No logits are chosen to put the edge of top-p on a token: rounding would decide which side it falls.
    """

    def random(*size: int) -> torch.Tensor:
        return torch.rand(*size, device=device, generator=generator)

    logits = torch.randn(rows, vocab, device=device, generator=generator)
    if shape == "peaked":
        high = min(64, vocab)
        places = torch.randint(vocab, (rows, high), device=device, generator=generator)
        logits = (2 * logits).scatter_(1, places, 10 + 10 * random(rows, high))
        logits = logits.bfloat16().float()  # as from a model in bfloat16: with ties
    elif shape == "ties":
        logits = (2 * logits).round()
    elif shape == "masked":
        kept = torch.randint(vocab, (rows, 4), device=device, generator=generator)
        logits = torch.full_like(logits, -torch.inf).scatter_(1, kept, logits[:, :4])
    elif shape == "extremes":
        logits[random(rows, vocab) < 1 / 3] = -torch.inf
        logits[1::4, vocab // 2] = torch.nan
        logits[2::4, vocab // 3] = torch.inf
        logits[3::4] = -torch.inf
    elif shape != "flat":
        raise ValueError(f"shape={shape!r} is none of flat, peaked, ties, masked, extremes")

    asked = list(islice(cycle(KINDS.values()), rows)) if kind == "mixed" else [KINDS[kind]] * rows

    def column(values: list, off: float, dtype: torch.dtype) -> torch.Tensor | None:
        if all(value is None for value in values):
            return None
        return torch.tensor([off if value is None else value for value in values], dtype=dtype, device=device)

    temperature, top_k, top_p, min_p = ([row[i] for row in asked] for i in range(4))
    seed = torch.randint(-(1 << 63), (1 << 63) - 1, (rows,), device=device, generator=generator)
    return {
        "logits": logits.to(dtype),
        "temperature": torch.tensor(temperature, dtype=torch.float32, device=device),
        "top_k": column(top_k, vocab, torch.int64),
        "top_p": column(top_p, 1.0, torch.float32),
        "min_p": column(min_p, 0.0, torch.float32),
        "seed": seed,
        "index": torch.randint(1000, (rows,), device=device, generator=generator),
    }


def cost(rows: int, vocab: int, kind: str, shape: str, *, itemsize: int) -> Cost:
    return Cost(read=rows * vocab * itemsize, written=rows * 8)


_QWEN2_VOCAB = 152064

OP = Op(
    "sample",
    reference=sample_reference,
    implementations={
        "triton": Implementation(top_k_top_p_sample, needs_gpu),
        "compiled": Implementation(compiled_sample, _needs_inductor),
    },
    inputs=make_inputs,
    cost=cost,
    cases=(
        *(Case(rows=3, vocab=2500, kind=kind, shape="flat") for kind in KINDS),
        *(Case(rows=2, vocab=4096, kind=kind, shape="peaked") for kind in ("top_k_top_p", "top_p", "min_p")),
        *(Case(rows=6, vocab=3001, kind="mixed", shape=shape) for shape in ("flat", "peaked", "ties", "masked")),
        Case(rows=12, vocab=3001, kind="mixed", shape="extremes"),
        Case(rows=4, vocab=20, kind="top_k_top_p", shape="flat"),
        Case(rows=6, vocab=1, kind="mixed", shape="flat"),
        Case(rows=8, vocab=300, kind="top_k", shape="flat"),
        Case(rows=0, vocab=100, kind="temperature", shape="flat"),
    ),
    large_cases=(
        *(Case(rows=rows, vocab=_QWEN2_VOCAB, kind="top_k_top_p", shape="peaked") for rows in (1, 8, 35, 128)),
        *(
            Case(rows=rows, vocab=_QWEN2_VOCAB, kind=kind, shape=shape)
            for kind, shape in (
                ("greedy", "peaked"),
                ("temperature", "peaked"),
                ("top_p", "peaked"),
                ("top_p", "flat"),
                ("min_p", "peaked"),
            )
            for rows in (1, 128)
        ),
        Case(rows=128, vocab=_QWEN2_VOCAB, kind="mixed", shape="peaked"),
    ),
)
