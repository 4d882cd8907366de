"""What the rows of a batch ask of the draw, as tensors: the arguments of the operator `sample` beside the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from .sampling_row import SamplingRow
from .transfer import to_device


@dataclass(frozen=True)
class SamplingColumns:
    """Each [rows], as `kernels.sampling.sample_reference` takes them; a filter that no row uses may be None.

    greedy: no row has a temperature
    """

    temperature: torch.Tensor
    top_k: torch.Tensor | None
    top_p: torch.Tensor | None
    min_p: torch.Tensor | None
    seed: torch.Tensor
    index: torch.Tensor
    greedy: bool = False

    @classmethod
    def of(cls, rows: Sequence[SamplingRow], vocab_size: int, device: torch.device) -> SamplingColumns:
        """Those of the next draw of each row."""
        integers, floats = column_values(rows, vocab_size)
        seed, index, top_k = to_device(integers, torch.int64, device)
        temperature, top_p, min_p = to_device(floats, torch.float32, device)
        return cls(temperature, top_k, top_p, min_p, seed, index).used_by(rows)

    def used_by(self, rows: Sequence[SamplingRow]) -> SamplingColumns:
        """These columns for the rows; on a CPU without the filters that none of them uses.

        They cost a CPU a sort. A GPU gets all of them, as in a captured step: each set of filters would be another
        kernel, and whoever is first to ask for one would have everybody wait until it is compiled.
        """
        params = [row.params for row in rows]
        used = {}
        if self.temperature.device.type == "cpu":
            used["top_k"] = any(p.top_k for p in params)
            used["top_p"] = any(p.top_p < 1 for p in params)
            used["min_p"] = any(p.min_p for p in params)
        columns = {f.name: getattr(self, f.name) if used.get(f.name, True) else None for f in fields(self)}
        return SamplingColumns(**columns | {"greedy": all(p.temperature == 0 for p in params)})


def column_values(rows: Sequence[SamplingRow], vocab_size: int) -> tuple[list[list[int]], list[list[float]]]:
    """((seed, index, top_k), (temperature, top_p, min_p)) of the rows: what is off is so large or small that it is."""
    params = [row.params for row in rows]
    integers = [
        [row.seed for row in rows],
        [row.num_tokens - row.num_prompt for row in rows],
        [p.top_k or vocab_size for p in params],
    ]
    return integers, [[p.temperature for p in params], [p.top_p for p in params], [p.min_p for p in params]]
