"""Tensors on a CUDA device that one launch steps: those of a model, of whichever groups, of one dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fastadam.kernels import device_tensors
from fastadam.kernels.device_tensors import Tables
from fastadam.torch import queues
from fastadam.torch.bundles import Bundle, Integers
from fastadam.torch.options import Options
from fastadam.torch.queues import Queue, Sent


class DeviceBundle(Bundle):
    """Parameters and states on a CUDA device, and the call that queues their step on its current stream.

    Gradients are there, too. What a step sends to the device is a row of coefficients for each group, and the
    addresses of all tensors if one has changed. Nothing waits for the device.

    Parameters
    ----------
    params, grad_dtype, states, groups
        As for :class:`fastadam.torch.bundles.Bundle`.

    Raises
    ------
    ImportError
        If CuPy is missing.
    ValueError
        If parameters or states share memory.
    """

    def __init__(
        self,
        params: list[Tensor],
        grad_dtype: torch.dtype,
        states: list[list[Tensor]],
        groups: Sequence[int],
    ) -> None:
        super().__init__(params, grad_dtype, states, groups)
        self._device = params[0].device
        self._queue: Queue = queues.queue_for(self._device)
        self._pieces = device_tensors.pieces(self._units)
        self._sent = [Sent(self._queue) for _ in range(3)]

    def plan(
        self,
        grads: list[Tensor],
        options: Sequence[Options],
        steps: Integers,
        grad_scale: object = None,
    ) -> Callable[[], None]:
        """Return the call that queues the step. All that could fail is done here, but the launch.

        Parameters
        ----------
        grads, options, steps, grad_scale
            As for :meth:`fastadam.torch.bundles.Bundle.plan`.

        Raises
        ------
        RuntimeError
            If the current stream is being captured in a CUDA graph.
        TypeError, ValueError
            If an option or the scale is out of the range of the dtype.
        """
        work, update = self._work(options, steps, grad_scale)
        backend, stream, device = self._queue.backend, self._queue.stream(), self._device.index
        if backend.is_capturing(stream, device):
            raise RuntimeError(
                f"step must be outside of the capture of a CUDA graph; got one on {self._device}. Its"
                " coefficients come from the host: take fastadam.FusedAdam(capturable=True) on a flat buffer."
            )
        if not len(self._pieces):
            return grads.clear
        of_pieces, of_places, of_rows = self._sent
        tables = Tables(
            of_pieces.address(self._pieces, stream, fixed=True),
            len(self._pieces),
            of_places.address(work.places, stream),
            of_rows.address(work.coefficients, stream),
        )
        take = device_tensors.plan(backend, work, update, tables, device, stream)
        return partial(_queue, take, grads)


def _queue(take: Callable[[], None], grads: list[Tensor]) -> None:
    take()
    grads.clear()  # copies of other orders are behind the step now, should their memory be handed out again
