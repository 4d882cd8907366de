"""Runs a module's Gluon kernels for Hopper on a CPU, from their own source: who waits for whom, and what is read when.

Each part of a warp-specialised kernel is a thread; tiles are tensors, layouts are nothing. What runs on its own is as
unpunctual as the source allows: a copy by TMA into shared memory spoils its destination at once and arrives when
somebody waits for it, one out of it reads when that is waited for; a product reads its operands when it is waited for,
after a pause in which others run on. Shared memory begins as NaN. So what is read too early or overwritten too soon
gives wrong results, and what waits for nothing raises.

Not emulated: layouts, registers, fences, whatever the compiler does, the kernels before and after, programs side by
side. Only what our kernels call is there.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from microvllm.kernels import hopper

PATIENCE = 10.0
"""Seconds of waiting that are taken for a deadlock."""

_thread = threading.local()
_program = SimpleNamespace(id=0, count=1, failures=[])


def emulate(monkeypatch, module: ModuleType, multiprocessors: int) -> None:
    """Has the module's kernels run here, on tensors of the CPU, as on a GPU of so many multiprocessors."""
    for place in (module, hopper):
        for name, value in vars(place).items():
            if isinstance(getattr(value, "fn", None), Callable):
                function = value.fn
                monkeypatch.setattr(place, name, _Kernel(function) if name.endswith("_kernel") else function)
        for name, value in (_NAMES | {"multiprocessors": lambda device: multiprocessors}).items():
            if hasattr(place, name):
                monkeypatch.setattr(place, name, value)


def pretend_hopper(monkeypatch, module: ModuleType) -> None:
    """As if a CPU were an H100, as far as what the module's kernel refuses goes."""
    for place in (module, hopper):
        monkeypatch.setattr(place, "multiprocessors", lambda device: 132)


def half(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float16)


def plant(right: str, wrong: str, module: ModuleType, folder: Path) -> ModuleType:
    """The module of kernels with a mistake planted in its source; the changed source is left in the folder."""
    source = inspect.getsource(module)
    assert source.count(right) == 1
    path = folder / "planted.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("microvllm.kernels.planted", path)
    planted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted)
    return planted


class _Kernel:
    """A kernel whose programs run one after the other."""

    def __init__(self, function: Callable):
        self._function = function

    def __getitem__(self, grid: tuple[int]) -> Callable:
        def launch(*args, num_warps: int, maxnreg: int = 0, launch_pdl: bool = False, **constants) -> None:
            _program.count = grid[0]
            for _program.id in range(grid[0]):
                self._function(*(_Pointer(x.view(-1)) if torch.is_tensor(x) else x for x in args), **constants)

        return launch


class _Pointer:
    def __init__(self, memory: torch.Tensor, at=0):
        self._memory, self._at = memory, torch.as_tensor(at)
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset) -> _Pointer:
        return _Pointer(self._memory, self._at + offset)

    def places(self, mask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        at, mask = torch.broadcast_tensors(self._at, torch.as_tensor(mask))
        inside = (at >= 0) & (at < len(self._memory))
        assert (inside | ~mask).all(), f"{at[mask & ~inside][0]} is outside of {len(self._memory)} elements"
        return self._memory, at.long(), mask


class _Registers(torch.Tensor):
    """What a product gives, and all that is computed of it: Gluon's `split` is not PyTorch's."""

    type = SimpleNamespace(layout=None)

    def split(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.unbind(-1)


class _Shared:
    """Tiles [count, parts, rows, width], where rows are cut into parts of up to 64 elements, one behind the other."""

    def __init__(self, memory: torch.Tensor, shape: list[int]):
        self.memory, self.shape, self.dtype = memory, shape, memory.dtype

    def index(self, i) -> _Tile:
        return _Tile(self.memory[int(i)])


class _Tile:
    def __init__(self, memory: torch.Tensor):
        parts, rows, width = memory.shape
        self.memory, self.shape, self.dtype = memory, [rows, parts * width], memory.dtype

    def load(self, layout=None) -> torch.Tensor:
        return self.memory.transpose(0, 1).reshape(self.shape).clone()

    def store(self, value: torch.Tensor) -> None:
        self.memory.copy_(value.reshape(self.shape[0], len(self.memory), -1).transpose(0, 1))

    def slice(self, first: int, rows: int) -> _Tile:
        return _Tile(self.memory[:, first : first + rows])

    def reshape(self, shape: list[int]) -> _Tile:
        return self

    def permute(self, order: tuple[int, int]) -> SimpleNamespace:
        return SimpleNamespace(load=lambda: self.load().T)


class _Barrier:
    """An mbarrier: its phase ends when all have arrived, and all bytes that were announced."""

    def __init__(self):
        self.changed, self.phase, self.bytes, self.coming = threading.Condition(), 0, 0, []

    def init(self, count: int) -> None:
        self.count = self.missing = count

    def arrive(self, announced: int = 0) -> None:
        with self.changed:
            self.missing -= 1
            self.bytes += announced
            assert self.missing >= 0, "more arrive than the barrier counts"
            self._end_phase()

    def send(self, copy: Callable[[], int]) -> None:
        with self.changed:
            self.coming.append(copy)
            self.changed.notify_all()

    def wait(self, phase) -> None:
        end = time.monotonic() + PATIENCE
        with self.changed:
            while self.phase == int(phase):
                while self.coming:
                    self.bytes -= self.coming.pop(0)()
                    self._end_phase()
                if self.phase == int(phase):
                    assert not _program.failures and time.monotonic() < end, "nobody comes"
                    self.changed.wait(0.1)

    def _end_phase(self) -> None:
        if self.missing == self.bytes == 0:
            self.phase, self.missing = self.phase ^ 1, self.count
            self.changed.notify_all()


def _load(desc: _Descriptor, corner: list, barrier: _Barrier, tile: _Tile) -> None:
    box, rest = [], []
    for first, size, length in zip(map(int, corner), desc.block_type.shape, desc.base.shape, strict=True):
        box.append(slice(max(first, 0), max(first + size, 0)))
        rest.append(slice(max(-first, 0), max(min(first + size, length) - first, 0)))

    def copy() -> int:
        value = torch.zeros(desc.block_type.shape, dtype=desc.dtype)
        value[tuple(rest)] = desc.base[tuple(box)]
        tile.store(value.view(tile.shape))
        return desc.block_type.nbytes

    tile.store(torch.full(tile.shape, math.nan))
    barrier.send(copy)


def _store(desc: _Descriptor, corner: list, tile: _Tile) -> None:
    """Reads the tile when that is waited for."""

    def copy() -> None:
        box = tuple(slice(int(first), int(first) + size) for first, size in zip(corner, tile.shape, strict=True))
        inside = desc.base[box]
        inside.copy_(tile.load()[tuple(map(slice, inside.shape))])

    _thread.stores.append(copy)


def _store_wait(pending: int) -> None:
    while len(_thread.stores) > pending:
        _thread.stores.pop(0)()


class _Descriptor:
    def __init__(self, base: torch.Tensor, shape: list[int]):
        self.base, self.dtype, self.layout = base, base.dtype, None
        self.block_type = SimpleNamespace(shape=shape, nbytes=math.prod(shape) * base.element_size())


def _mma(a, b, acc, use_acc: bool = True, is_async: bool = False) -> SimpleNamespace:
    """A product that has no value yet, and can be no more than another's acc before it is waited for."""
    assert is_async

    def multiply() -> torch.Tensor:
        left = a if torch.is_tensor(a) else a.load()
        return (left.float() @ b.load().float() + (_known(acc) if use_acc else 0)).as_subclass(_Registers)

    product = SimpleNamespace(multiply=multiply)
    _thread.products.append(product)
    return product


def _known(x):
    return getattr(x, "value", x)


def _mma_wait(pending: int, deps: tuple | list):
    while len(_thread.products) > pending:
        time.sleep(0.0005)
        product = _thread.products.pop(0)
        product.value = product.multiply()
    known = tuple(map(_known, deps))
    return known if len(known) > 1 else known[0]


def _warp_specialize(parts: list[tuple[Callable, tuple]], warps: list[int], registers: list[int]) -> None:
    def run(function: Callable, args: tuple) -> None:
        _thread.products, _thread.stores = [], []
        try:
            function(*args)
            assert not _thread.products and not _thread.stores, "a product or a store was not waited for"
        except BaseException as error:
            _program.failures.append(error)

    _program.failures = []
    threads = [threading.Thread(target=run, args=part) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if _program.failures:
        raise _program.failures[0]


def _allocate(dtype: torch.dtype, shape: list[int], layout: str | None) -> _Shared | SimpleNamespace:
    if layout == "mbarrier":
        barriers = [_Barrier() for _ in range(shape[0])]
        return SimpleNamespace(index=lambda i: barriers[int(i)])
    return _shared(torch.full([math.prod(shape)], math.nan, dtype=dtype), shape)


def _shared(memory: torch.Tensor, shape: list[int]) -> _Shared:
    width = min(shape[-1], 64)
    return _Shared(memory.view(shape[0], shape[-1] // width, math.prod(shape[1:-1]), width), shape)


def _gl_load(pointer: _Pointer, mask=True, other=0) -> torch.Tensor:
    memory, at, mask = pointer.places(mask)
    return torch.where(mask, memory[torch.where(mask, at, 0)], torch.as_tensor(other, dtype=memory.dtype))


def _gl_store(pointer: _Pointer, value: torch.Tensor, mask=True) -> None:
    memory, at, mask = pointer.places(mask)
    memory[at[mask]] = value[mask]


def _tensors(function: Callable) -> Callable:
    return lambda *args: function(*map(torch.as_tensor, args))


def _nothing(*args, **options) -> None:
    """A layout, a fence, or the wait for the kernel before, which is over."""


_GL = SimpleNamespace(
    int64=torch.int64,
    float32=torch.float32,
    program_id=lambda axis: _program.id,
    num_programs=lambda axis: _program.count,
    num_warps=lambda: 4,
    static_range=range,
    arange=lambda first, end, layout: torch.arange(first, end),
    zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
    zeros_like=torch.zeros_like,
    full_like=torch.full_like,
    where=_tensors(torch.where),
    minimum=_tensors(torch.minimum),
    maximum=_tensors(torch.maximum),
    exp=torch.exp,
    exp2=torch.exp2,
    max=lambda x, axis: x.amax(axis),
    sum=lambda x, axis: x.sum(axis),
    load=_gl_load,
    store=_gl_store,
    convert_layout=lambda x, layout, assert_trivial=False: x,
    allocate_shared_memory=_allocate,
    warp_specialize=_warp_specialize,
    BlockedLayout=_nothing,
    SliceLayout=_nothing,
    DotOperandLayout=_nothing,
    NVMMADistributedLayout=_nothing,
    NVMMASharedLayout=SimpleNamespace(get_default_for=_nothing),
)

_NAMES = {
    "gl": _GL,
    "mbarrier": SimpleNamespace(
        MBarrierLayout=lambda: "mbarrier",
        init=lambda barrier, count: barrier.init(count),
        expect=lambda barrier, announced: barrier.arrive(announced),
        arrive=lambda barrier, pred=True: barrier.arrive() if pred else None,
        wait=lambda barrier, phase: barrier.wait(phase),
    ),
    "warpgroup_mma": _mma,
    "warpgroup_mma_wait": _mma_wait,
    "fence_async_shared": _nothing,
    "gdc_launch_dependents": _nothing,
    "gdc_wait": _nothing,
    "TensorDescriptor": SimpleNamespace(from_tensor=lambda base, shape, layout: _Descriptor(base, shape)),
    "load": _load,
    "store": _store,
    "tma": SimpleNamespace(store_wait=_store_wait),
    "boxes": lambda tensor, rows, columns: _Descriptor(tensor, [rows, columns]),
    "_view": lambda shared, dtype, shape, layout: _shared(shared.memory.view(-1), shape),
}
