"""A small, fast LLM inference engine whose GPU kernels are written in Triton and can be swapped one at a time."""

from .engine.engine import InferenceEngine
from .engine.lab.compare import compare
from .engine.lab.comparison import Comparison
from .engine.outputs import Generations, RequestOutput
from .engine.stats import EngineStats
from .kernels.kernel_set import KernelSet
from .model.sampling_params import SamplingParams

__all__ = [
    "Comparison",
    "EngineStats",
    "Generations",
    "InferenceEngine",
    "KernelSet",
    "RequestOutput",
    "SamplingParams",
    "compare",
]
