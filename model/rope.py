"""Rotary frequencies and their scalings, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RopeConfig:
    """The angle of pair i at position p is p · inverse_frequency[i]; a scaling changes them for longer texts.

    scaling:            "none"; "linear" (Chen et al. 2023, arXiv:2306.15595); "llama3" (Llama 3.1's, by wavelength);
                        "yarn" (Peng et al. 2023, arXiv:2309.00071)
    factor:             by how much the context is stretched
    original_length:    tokens the model was pretrained on, for llama3 and yarn
    attention_factor:   what cos and sin are multiplied by (yarn's temperature)
    divisors:           llama3 as GGUF files hold it: a divisor for each frequency, in place of its numbers
    """

    theta: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    divisors: tuple[float, ...] | None = None

    def inverse_frequencies(self, head_dim: int) -> torch.Tensor:
        """[head_dim / 2] float32"""
        exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        frequency = 1.0 / (self.theta**exponent)
        if self.divisors is not None:
            return frequency / torch.tensor(self.divisors)
        if self.scaling == "linear":
            return frequency / self.factor
        if self.scaling == "llama3":
            return self._llama3(frequency)
        if self.scaling == "yarn":
            return self._yarn(frequency, head_dim)
        assert self.scaling == "none", self.scaling
        return frequency

    def table(self, head_dim: int, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) of the positions 0 … length − 1, each [length, head_dim / 2] float32."""
        angle = torch.outer(torch.arange(length).float(), self.inverse_frequencies(head_dim))
        cos, sin = angle.cos() * self.attention_factor, angle.sin() * self.attention_factor
        return cos.to(device), sin.to(device)

    def _llama3(self, frequency: torch.Tensor) -> torch.Tensor:
        """Wavelengths under original/high stay, those over original/low are stretched, between them it is blended."""
        turns = self.original_length * frequency / (2 * math.pi)
        keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        keep = keep.clamp(0, 1)
        return keep * frequency + (1 - keep) * frequency / self.factor

    def _yarn(self, frequency: torch.Tensor, head_dim: int) -> torch.Tensor:
        """Pairs that turn more than beta_fast times within the original length stay, those under beta_slow stretch."""

        def pair_that_turns(times: float) -> float:
            return head_dim * math.log(self.original_length / (times * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        span = high - low if high != low else 0.001
        stretched = ((torch.arange(head_dim // 2).float() - low) / span).clamp(0, 1)
        return frequency / self.factor * stretched + frequency * (1 - stretched)
