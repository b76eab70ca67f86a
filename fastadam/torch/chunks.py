"""Steps on the host of parameters that live elsewhere, in chunks: copies of others run meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastadam.torch.bundles import Bundle
from fastadam.torch.copies import Copies
from fastadam.torch.options import Options
from fastadam.torch.tensors import in_order_of, lies_like

_LINE = 64
"""Bytes: pieces of a buffer start at multiples of it, as tensors of PyTorch do."""


def flat(tensor: Tensor) -> Tensor:
    """Return the elements of a tensor without gaps in their order in memory, as a view."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def flat_like(tensor: Tensor, param: Tensor) -> Tensor:
    """Return the elements of a tensor in the order in memory of those of a parameter; a view if it can be."""
    plain = lies_like(tensor, param) and not tensor.is_neg() and not tensor.is_conj()
    return flat(tensor if plain else in_order_of(tensor, param))


class Hosted(NamedTuple):
    """What the host has of one parameter: all flat, in the order in memory of the parameter."""

    param: Tensor  # where it lives
    grad_dtype: torch.dtype
    master: Tensor
    states: list[Tensor]
    group: int
    kind: object  # chunks are of one kind
    copies: Copies


class Piece(NamedTuple):
    """A part of a parameter."""

    parameter: int  # its place in the list of those to be stepped
    start: int
    stop: int


def cut(sizes: Sequence[int], kinds: Sequence[object], chunk: int) -> list[list[Piece]]:
    """Cut parameters into chunks of at most so many elements, each of one kind."""
    chunks: list[list[Piece]] = []
    order: dict[object, list[int]] = {}
    for k, kind in enumerate(kinds):
        order.setdefault(kind, []).append(k)
    for of_kind in order.values():
        room = 0
        for k in of_kind:
            start = 0
            while start < sizes[k]:
                if not room:
                    chunks.append([])
                    room = chunk
                stop = min(sizes[k], start + room)
                chunks[-1].append(Piece(k, start, stop))
                room -= stop - start
                start = stop
    return chunks


class _Chunk:
    """Pieces that are stepped by one call, from gradients in one buffer; it may write a copy to another."""

    def __init__(self, pieces: list[Piece], hosted: Sequence[Hosted]) -> None:
        self.pieces = pieces
        first = hosted[pieces[0].parameter]
        self.copies, self.grad_dtype, self.dtype = first.copies, first.grad_dtype, first.param.dtype
        self.has_copy = first.master.dtype != self.dtype
        self.of_grads = self._places(self.grad_dtype.itemsize)
        self.of_copy = self._places(self.dtype.itemsize if self.has_copy else 0)

    def _places(self, itemsize: int) -> list[int]:
        """Return the byte where each piece begins, and the end."""
        sizes = [-(-(p.stop - p.start) * itemsize // _LINE) * _LINE for p in self.pieces]
        return np.cumsum([0, *sizes]).tolist()  # type: ignore[no-any-return]

    def close(self, hosted: Sequence[Hosted], grads: Tensor, copy: Tensor) -> None:
        """Form the bundle, with its gradients and its copy in these buffers."""

        def views(buffer: Tensor, places: list[int], dtype: torch.dtype) -> list[Tensor]:
            return [
                buffer[at : at + (p.stop - p.start) * dtype.itemsize].view(dtype)
                for at, p in zip(places[:-1], self.pieces, strict=True)
            ]

        def parts(of: Callable[[Hosted], Tensor]) -> list[Tensor]:
            return [of(hosted[p.parameter])[p.start : p.stop] for p in self.pieces]

        self.grads = views(grads, self.of_grads, self.grad_dtype)
        masters = parts(lambda h: h.master)
        states = [
            parts(lambda h, k=k: h.states[k])  # type: ignore[misc]
            for k in range(len(hosted[self.pieces[0].parameter].states))
        ]
        groups = [hosted[p.parameter].group for p in self.pieces]
        out = views(copy, self.of_copy, self.dtype) if self.has_copy else None
        self.bundle = Bundle(masters, self.grad_dtype, states, groups, out)
        self._sent = list(zip(parts(lambda h: flat(h.param)), out or masters, strict=True))

    def fetch(self, grads: Sequence[Tensor]) -> Any:
        parts = [grads[p.parameter][p.start : p.stop] for p in self.pieces]
        return self.copies.fetch(list(zip(self.grads, parts, strict=True)))

    def send(self) -> Any:
        return self.copies.send(self._sent)


class Chunks:
    """Parameters that are stepped together, and two buffers by turns for what is under way.

    Parameters
    ----------
    hosted : list of Hosted
        Of each parameter.
    size : int
        Most elements of a chunk.

    Raises
    ------
    ValueError
        If parameters share memory.
    """

    def __init__(self, hosted: list[Hosted], size: int) -> None:
        self._where = [(h.param.data_ptr(), h.param.stride()) for h in hosted]
        self.hosted = hosted
        _require_disjoint([h.param for h in hosted])
        pieces = cut([h.param.numel() for h in hosted], [h.kind for h in hosted], size)
        self._chunks = [_Chunk(each, hosted) for each in pieces]
        self._copies = list({id(h.copies): h.copies for h in hosted}.values())
        of_grads = max((c.of_grads[-1] for c in self._chunks), default=0)
        of_copy = max((c.of_copy[-1] for c in self._chunks), default=0)
        self._under_way: list[Callable[[], None]] = []
        turns = min(2, len(self._chunks))
        memory = self._copies[0]
        buffers = [[memory.empty(n, torch.uint8) for n in (of_grads, of_copy)] for _ in range(turns)]
        for k, chunk in enumerate(self._chunks):
            chunk.close(hosted, *buffers[k % 2])

    def holds(self) -> bool:
        """Return whether the parameters lie where they did."""
        return self._where == [(h.param.data_ptr(), h.param.stride()) for h in self.hosted]

    def plan(
        self, grads: Sequence[Tensor], options: Sequence[Options], steps: Sequence[int], grad_scale: object
    ) -> Callable[[], None]:
        """Return the call that steps everything. What could fail is done here.

        Parameters
        ----------
        grads : list of Tensor
            Of each parameter, where it lives.
        options : sequence of Options
            Of each group.
        steps : list of int
            The number of this step of each parameter.
        grad_scale
            What the gradients are divided by.

        Raises
        ------
        TypeError, ValueError
            If an option or the scale is out of its range.
        """
        calls = []
        for chunk in self._chunks:
            ready = chunk.bundle.ready(list(chunk.grads))
            assert ready is not None  # buffers of our own
            of_pieces = np.array([steps[p.parameter] for p in chunk.pieces], np.int64)
            calls.append(chunk.bundle.plan(ready, options, of_pieces, grad_scale))
        in_order = [flat_like(g, h.param) for g, h in zip(grads, self.hosted, strict=True)]

        def call() -> None:
            self._run(calls, in_order)

        return call

    def _run(self, calls: list[Callable[[], None]], grads: list[Tensor]) -> None:
        """Step chunk k while gradients of k + 1 come, and parameters of k - 1 go.

        Gradients fill the buffer that was stepped from last; a copy is written when that of two chunks before
        has gone, and anything when all of the step before has.
        """
        chunks = self._chunks
        for wait in self._under_way:
            wait()
        for copies in self._copies:
            copies.begin()
        fetched = [chunk.fetch(grads) for chunk in chunks[:1]]
        sent: list[Callable[[], None]] = []
        self._under_way = sent
        interrupt: BaseException | None = None
        for k, (chunk, call) in enumerate(zip(chunks, calls, strict=True)):
            if k + 1 < len(chunks):
                fetched.append(chunks[k + 1].fetch(grads))
            chunk.copies.wait(fetched[k])
            if k >= 2:
                sent[k - 2]()
            try:
                call()
            except BaseException as caught:  # of a signal handler (Ctrl-C): raised when all were stepped
                interrupt = caught
            sent.append(partial(chunk.copies.wait, chunk.send()))
        for copies in self._copies:
            copies.end()
        if interrupt is not None:
            raise interrupt


def _require_disjoint(params: list[Tensor]) -> None:
    def place(param: Tensor) -> tuple[str, int]:
        return str(param.device), param.data_ptr()

    in_order = sorted((param for param in params if param.numel()), key=place)
    for one, other in pairwise(in_order):
        end = one.data_ptr() + one.numel() * one.itemsize
        if one.device == other.device and other.data_ptr() < end:
            raise ValueError(
                f"params must not share memory; got it between those of shapes {tuple(one.shape)} and"
                f" {tuple(other.shape)}."
            )
