"""CuPy as far as fastadam's own programs need it: NumPy behind a wall, and a queue with events.

As in CuPy, nothing crosses between the memories by itself: ``asarray`` copies to the device, ``float`` and
``int`` copy a number back, all else is a TypeError. Stricter than CuPy, no function of NumPy takes a device
array (CuPy would take the call over), and none has a truth (CuPy would wait for the device).
"""

from __future__ import annotations

import sys
from time import perf_counter
from types import SimpleNamespace

import numpy as np

from fastadam import backends

UNARY = ("abs", "invert", "neg")
BINARY = ("add", "eq", "ge", "gt", "le", "lt", "matmul", "mul", "pow", "sub", "truediv")
REFLECTED = ("radd", "rmatmul", "rmul", "rsub", "rtruediv")
IN_PLACE = ("iadd", "imul", "isub", "itruediv")


class DeviceArray:
    """An array that NumPy cannot read."""

    __array_ufunc__ = None
    __hash__ = None

    def __init__(self, host, library):
        self.host, self.library = host, library

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def __array_function__(self, *_):
        return NotImplemented

    def __bool__(self):
        raise TypeError("this would wait for the device")

    def __float__(self):
        return float(self.library.read(self))

    def __int__(self):
        return int(self.library.read(self))

    def __len__(self):
        return len(self.host)

    def __getitem__(self, index):
        return self.library.wrap(self.host[unwrap(index)])

    def __setitem__(self, index, value):
        self.host[unwrap(index)] = unwrap(value)

    def __getattr__(self, name):
        if name.startswith("__"):  # such as __array_interface__: that of the array behind the wall
            raise AttributeError(name)
        self.library.attributes.add(name)
        return self.library.wrap(getattr(self.host, name))


def _operator(name):
    def operator(self, *others):
        return self.library.wrap(getattr(self.host, name)(*unwrap(others)))

    return operator


def _in_place(name):
    def operator(self, other):
        getattr(self.host, name)(unwrap(other))
        return self

    return operator


for _name in (*UNARY, *BINARY, *REFLECTED):
    setattr(DeviceArray, f"__{_name}__", _operator(f"__{_name}__"))
for _name in IN_PLACE:
    setattr(DeviceArray, f"__{_name}__", _in_place(f"__{_name}__"))


def unwrap(value):
    """What NumPy computes with; an array in CPU memory is refused."""
    if isinstance(value, DeviceArray):
        return value.host
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    if isinstance(value, (tuple, list)):
        return type(value)(unwrap(item) for item in value)
    return value


class FakeCuPy:
    """The module. It notes what is used of it, and how many numbers were read back."""

    def __init__(self):
        self.functions, self.attributes, self.reads = set(), set(), 0
        self._recorded = self._passed = 0
        self.cuda = SimpleNamespace(
            Device=lambda: SimpleNamespace(id=0),
            runtime=SimpleNamespace(getDeviceProperties=lambda _: {"name": b"Fake GPU"}),
            get_current_stream=lambda: SimpleNamespace(record=self._record),
            get_elapsed_time=self._elapsed,
        )

    def asarray(self, host):
        self.functions.add("asarray")
        return DeviceArray(np.array(host), self)

    def __getattr__(self, name):
        self.functions.add(name)
        return self.wrap(getattr(np, name))

    def wrap(self, value):
        if isinstance(value, (np.ndarray, np.generic)):
            return DeviceArray(np.asarray(value), self)
        if isinstance(value, tuple):
            return tuple(self.wrap(item) for item in value)
        if callable(value):
            return lambda *args, **kwargs: self.wrap(
                value(*unwrap(args), **{name: unwrap(item) for name, item in kwargs.items()})
            )
        return value

    def read(self, array):
        self.reads += 1
        self._passed = self._recorded
        return array.host

    def _record(self):
        self._recorded += 1
        number = self._recorded

        def synchronize():
            self._passed = max(self._passed, number)

        return SimpleNamespace(number=number, milliseconds=perf_counter() * 1e3, synchronize=synchronize)

    def _elapsed(self, start, end):
        if max(start.number, end.number) > self._passed:
            raise RuntimeError("cudaErrorNotReady: device not ready")
        return end.milliseconds - start.milliseconds


def install(monkeypatch, *modules):
    """Let this be CuPy, and steps of ``FusedAdam`` in these modules take its arrays; return it."""
    fake = FakeCuPy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(backends, "status", lambda: {"cpu": "ready", "cupy": "ready"})
    for module in modules:

        class OnDevice(module.FusedAdam):
            def step(self, flat_params, flat_grads):
                super().step(flat_params.host, flat_grads.host)

            def swap_ema(self, flat_params):
                super().swap_ema(flat_params.host)

        monkeypatch.setattr(module, "FusedAdam", OnDevice)
    return fake
