"""Imports run one way, engine → model → kernels, and the scheduler knows no tensors."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("kernels", "model", "engine")  # each may import itself and those before it
NO_TORCH = [f"engine/{name}.py" for name in ("cache_manager", "policy", "scheduler", "sequence", "waiting_queue")]
FILES = sorted(path.relative_to(ROOT).as_posix() for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def imports(path: str, source: str) -> list[tuple[str, bool]]:
    """All that a file imports, wherever in it: (full dotted name, whether the import is relative).

    What `from … import …` names may be a module too, so it is listed as one.
    """
    package, found = ["microvllm", *path.split("/")[:-1]], []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            folder = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join(folder + ([node.module] if node.module else []))
            found += [(name, node.level > 0) for name in (module, *(f"{module}.{alias.name}" for alias in node.names))]
    return found


def faults(path: str, source: str) -> list[str]:
    """What is wrong with a file's imports."""
    layer = path.split("/")[0]
    above = [f"microvllm.{name}" for name in LAYERS[LAYERS.index(layer) + 1 :]]
    wrong = []
    for name, relative in imports(path, source):
        if any(f"{name}.".startswith(f"{other}.") for other in above):
            wrong.append(f"{layer} imports {name}")
        if not relative and name.split(".")[0] in ("microvllm", "bench", "tests", *LAYERS):
            wrong.append(f"{name} is not relative")
    return wrong


def reached(path: str) -> set[str]:
    """The packages that importing a file of ours brings in, through our own files too, the root's aside."""
    seen, left = set(), [path]
    while left:
        current = left.pop()
        for name, _ in imports(current, (ROOT / current).read_text()):
            own = name.removeprefix("microvllm.").replace(".", "/") + ".py"
            if name not in seen and name.startswith("microvllm.") and (ROOT / own).is_file():
                left.append(own)
            seen.add(name)
    return {name.split(".")[0] for name in seen}


@pytest.mark.parametrize("path", FILES)
def test_imports_run_one_way_and_are_relative(path):
    assert faults(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize("path", NO_TORCH)
def test_scheduling_reaches_no_torch(path):
    assert reached(path).isdisjoint({"torch", "triton", "transformers", "numpy"})


@pytest.mark.parametrize(
    "path, source, fault",
    [
        ("kernels/x.py", "from ..model.config import ModelConfig", "kernels imports microvllm.model.config"),
        ("kernels/x.py", "def f():\n    from ..engine import scheduler", "kernels imports microvllm.engine.scheduler"),
        ("kernels/x.py", "from .. import model", "kernels imports microvllm.model"),
        ("model/x.py", "from ..engine.sequence import Sequence", "model imports microvllm.engine.sequence"),
        ("engine/server/x.py", "from microvllm.model import config", "microvllm.model is not relative"),
        ("engine/x.py", "import kernels.rotary", "kernels.rotary is not relative"),
    ],
)
def test_the_checker_sees_a_fault(path, source, fault):
    assert fault in faults(path, source)


@pytest.mark.parametrize(
    "path, source",
    [
        ("model/x.py", "import torch\nfrom ..kernels.kernel_set import KernelSet\nfrom .config import ModelConfig"),
        ("engine/server/x.py", "from ...model.config import ModelConfig\nfrom ..engine import InferenceEngine"),
        ("kernels/x.py", "from transformers.models import qwen2\nfrom .op import Op"),
    ],
)
def test_the_checker_lets_good_imports_pass(path, source):
    assert faults(path, source) == []


def test_what_reaches_torch_is_seen():
    assert "torch" in reached("engine/model_runner.py")


def test_importing_the_package_touches_no_gpu_compiles_no_kernel_and_is_quick(tmp_path):
    program = "import sys, torch, microvllm; assert not torch.cuda.is_initialized()"
    program += "; assert 'transformers' not in sys.modules"  # over a second, for tokenizers alone
    cache = tmp_path / "triton"
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "TRITON_CACHE_DIR": str(cache)})
    assert not cache.exists()
