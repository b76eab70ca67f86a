"""Tensors of PyTorch that are views of flat buffers, and so are their gradients: `backward` writes there."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastadam.libraries import TORCH


class Tensor(NamedTuple):
    """A tensor, what errors call it, and views of the buffers for it and its gradient."""

    label: str
    given: Any
    view: Any
    grad: Any


class Attached:
    """Tensors that share the memory of flat buffers.

    Parameters
    ----------
    tensors : list of Tensor
        Their values are in the buffer already, or are copied in with :meth:`attach`.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors
        # What is looked at before each step: 0.3 us for a tensor.
        self._seen: list[tuple[Any, int, Any]] = []

    def attach(self) -> None:
        """Make the tensors and their gradients views; values that lie elsewhere are copied in.

        Raises
        ------
        ValueError
            If one has another shape, dtype or device now; nothing has changed then.
        """
        for tensor in self._tensors:
            _require_alike(tensor.label, tensor.given, tensor.view)
            if tensor.given.grad is not None:
                _require_alike(f"{tensor.label}.grad", tensor.given.grad, tensor.grad)
        self._seen = []
        for _, given, view, grad in self._tensors:
            if given.data_ptr() != view.data_ptr():
                view.copy_(given.detach())
                given.data = view
            if given.grad is None:
                grad.zero_()
            elif given.grad.data_ptr() != grad.data_ptr():
                grad.copy_(given.grad.detach())
            # An object of its own: Module.to gives the memory of another tensor to the one that it finds.
            own = grad.detach()
            given.grad = own
            self._seen.append((given, view.data_ptr(), own))

    def require(self) -> None:
        """Raise ValueError if a tensor or its gradient is no view any more."""
        for k, (given, address, grad) in enumerate(self._seen):
            if given.grad is not grad or given.data_ptr() != address:
                self._require_view(*self._tensors[k])

    @staticmethod
    def _require_view(label: str, given: Any, view: Any, grad: Any) -> None:
        for name, found, wanted in (("params", given, view), ("grads", given.grad, grad)):
            what = label if name == "params" else f"{label}.grad"
            if found is None:
                raise ValueError(
                    f"{what} must be a view of flat.{name}; got None. Clear gradients with flat.grads.zero_()"
                    " or FusedAdam(zero_grads=True), or call attach()."
                )
            if found.numel() and found.data_ptr() != wanted.data_ptr():
                raise ValueError(
                    f"{what} must be a view of flat.{name}; got other memory. Call attach() to copy it in."
                )


def _require_alike(label: str, tensor: Any, view: Any) -> None:
    ours, theirs = ((tuple(one.shape), TORCH.dtype(one), TORCH.place(one)) for one in (view, tensor))
    for wanted, found in zip(ours, theirs, strict=True):
        if wanted != found:
            raise ValueError(f"{label} must be {wanted}, as in the buffer; got {found}. Flatten again.")
