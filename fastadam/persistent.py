"""What an optimizer is made of besides its steps: state dicts, checkpoints, copies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import fields
from os import PathLike
from typing import Any, ClassVar, Self

from fastadam import clocks, precision
from fastadam.accumulation import Accumulator
from fastadam.hyperparameters import Hyperparameters, Schedule
from fastadam.last_step import LastStep
from fastadam.loss_scale import DynamicLossScale
from fastadam.progress import Progress
from fastadam.rows import require_fields
from fastadam.segments import Segment, Segments
from fastadam.state import State, plain, require_keys


class Persistent(ABC):
    """Gives, takes and forgets all that an optimizer knows."""

    _hyperparameters: Hyperparameters
    _segments: Segments | None
    _state: State
    _accumulator: Accumulator
    _backend: str | None
    _capturable: bool
    _IMPLIED: ClassVar[Mapping[str, object]] = {}
    """Hyperparameters that the class itself has set."""
    lr: Any
    segments: Any

    @property
    @abstractmethod
    def last_step(self) -> LastStep | None:
        """What the last step did."""

    @abstractmethod
    def _use(self, segments: Segments) -> None:
        """Step segments from now on."""

    @abstractmethod
    def _replace_state(self, state: State, accumulator: Accumulator) -> None:
        """Go on from another state."""

    def reset(self) -> None:
        """Forget all steps: drop the moments and the step counter, keep the hyperparameters.

        A CUDA graph that holds a step must be captured again.
        """
        self._replace_state(State(), Accumulator())

    def state_dict(self) -> dict[str, Any]:
        """Return all that a bit-exact resume needs.

        Returns
        -------
        dict
            The hyperparameters, ``"step"`` (int) and, once a step was taken, a copy of each moment, shape
            (n,), in CPU memory whatever the backend. Plain arrays and numbers:
            ``numpy.savez(file, **opt.state_dict())`` stores it, and any backend resumes from it.

            ``"segments"``, where there are any, is a float64 array with a row for each: start, stop, lr,
            weight_decay, betas[0], betas[1], eps, frozen; NaN for what it does not set. Of a callable ``lr``
            there is the value of the last step.
        """
        values = self._hyperparameters.to_dict()
        if self._hyperparameters.KIND != "adam":  # which came first, and is not named
            values["rule"] = self._hyperparameters.KIND
        if callable(self.lr):
            values["lr"] = float(self.lr(max(self._state.step, 1)))
        if self._segments is not None and self._segments.given:
            values["segments"] = self._segments.to_array(max(self._state.step, 1))
        return {**values, **self._state.to_dict(), **self._accumulator.to_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the hyperparameters, the segments, the moments and the step counter.

        ``state_dtype`` and ``master_params`` stay those of the optimizer: moments are converted, exactly or
        to the nearest, and masters that are not in it begin with the parameters of the next step.

        A callable ``lr`` stays: the optimizer's own, and that of a segment if one of the same elements is
        loaded. Where ``state_dict`` has no segments, there are none afterwards.

        The moments go to the device of the parameters with the next step. A CUDA graph that holds a step must
        be captured again.

        Parameters
        ----------
        state_dict : mapping
            What :meth:`state_dict` returned, or ``numpy.load`` of a file made of it. It is copied.

        Raises
        ------
        TypeError
            If it is not a mapping, or a value has a wrong type or dtype.
        ValueError
            If a key is missing or unknown, a value out of its range, or a moment of another size than the
            present state's; :meth:`reset` first to load a state of another size or dtype.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a mapping; got {type(state_dict).__name__}.")
        entries = dict(state_dict)
        kind, h = plain(entries.pop("rule", "adam")), self._hyperparameters
        if kind != h.KIND:
            raise ValueError(
                f"state_dict['rule'] must be {h.KIND!r} for a {type(self).__name__}; got {kind!r}."
            )
        names = h.names()
        require_keys(entries, h.OWN)  # the others may be None, or newer
        values = {name: plain(entries.pop(name)) for name in names if name in entries}
        if callable(self.lr):
            values["lr"] = self.lr
        said = precision.state_dtype("state_dtype", values.get("state_dtype", "float32"))
        master = precision.master_params("master_params", values.get("master_params"))
        if master not in {None, h.master_params}:
            raise ValueError(
                f"state_dict['master_params'] must be {h.master_params!r}, the optimizer's own; got"
                f" {master!r}. Make the optimizer with it."
            )
        values["state_dtype"], values["master_params"] = h.state_dtype, h.master_params
        array = entries.pop("segments", None)
        loaded = Segments(()) if array is None else Segments.from_array(array, self.segments)
        hyperparameters = type(h)(**values)
        self.require_implied(hyperparameters)
        require_fields(loaded, hyperparameters)
        if self._capturable:
            clocks.require_possible(hyperparameters, loaded)
        accumulator = Accumulator.from_dict(entries)
        kinds = {"said": hyperparameters.formats(said), "wanted": hyperparameters.formats()}
        state = State.from_dict(entries, hyperparameters.state, self._state, **kinds)
        self._hyperparameters = hyperparameters
        self._use(loaded)
        self._replace_state(state, accumulator)

    def save(
        self,
        path: str | PathLike[str],
        *,
        params: object = None,
        loss_scale: DynamicLossScale | None = None,
        extra: Any = None,
        progress: Progress = None,
    ) -> None:
        """Write a checkpoint from which :meth:`load` resumes bit for bit: ``docs/checkpoints.md``.

        A safetensors file, every byte under a checksum, that takes the place of the old one at once: whoever
        opens ``path`` finds one of them, whole, whenever the process is killed. Nothing is copied on the CPU.

        Parameters
        ----------
        path : path
            The file.
        params : array_like, optional
            The parameters, in CPU memory, to be kept beside the state.
        loss_scale : DynamicLossScale, optional
            To be kept, too.
        extra : optional
            Whatever JSON can hold: epochs, the state of a random generator.
        progress : None, bool or callable, default None
            None shows a bar from 1 GiB on, in a terminal with rich; True always. Or it is called with bytes,
            those done and all.

        Raises
        ------
        TypeError, ValueError, ImportError
            If an argument is not what it must be.
        OSError
            If the file cannot be written; the old one stays.
        """
        from fastadam import saving

        saving.save(self, path, params=params, loss_scale=loss_scale, extra=extra, show=progress)

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        *,
        lr: float | Schedule | None = None,
        segments: Iterable[Segment] | None = None,
        backend: str | None = None,
        capturable: bool = False,
        params: object = None,
        loss_scale: DynamicLossScale | None = None,
        shard: tuple[int, int] | None = None,
        progress: Progress = None,
    ) -> Self:
        """Return the optimizer that :meth:`save` has written; a call that raises has changed nothing.

        Parameters
        ----------
        path : path
            The file.
        lr, segments : optional
            In place of those in the file. They must be given where one was a function other than those of
            :mod:`fastadam.schedules`: no file can hold it.
        backend, capturable
            As for the class; the file does not know them.
        params : array_like, optional
            Gets the parameters that were saved, in place.
        loss_scale : DynamicLossScale, optional
            Gets the loss scale that was saved, in place.
        shard : tuple of int, optional
            Load elements ``start`` up to, without, ``stop`` of the buffer alone; with moments in 8 bits,
            multiples of 128.
        progress
            As for :meth:`save`.

        Raises
        ------
        TypeError, ValueError, ImportError
            If an argument is not what it must be; if the file is damaged, something else, of a newer version,
            or has not what is asked for.
        OSError
            If it cannot be read.
        """
        from fastadam import resuming

        opt: Self = resuming.load(
            cls,
            path,
            lr=lr,
            segments=segments,
            params=params,
            loss_scale=loss_scale,
            shard=shard,
            show=progress,
            options={"backend": backend, "capturable": capturable},
        )
        return opt

    @classmethod
    def require_implied(cls, hyperparameters: Hyperparameters) -> None:
        """Raise ValueError unless hyperparameters are such as the class has."""
        for name, value in cls._IMPLIED.items():
            found = getattr(hyperparameters, name)
            if found != value:
                raise ValueError(f"{name} must be {value} for a {cls.__name__}; got {found}.")

    def __getstate__(self) -> dict[str, Any]:
        # Modules and kernels are not copied; a deep copy has its moments in CPU memory until its first step.
        nothing = dict.fromkeys(("_coefficients", "_segmented", "_prepared", "_kernels", "_scratch"))
        last = self.last_step
        return {**self.__dict__, **nothing, "_last": None if last is None else last._done}

    def __repr__(self) -> str:
        h = self._hyperparameters
        defaults = {field.name: field.default for field in fields(h)}
        values = {
            name: getattr(h, name)
            for name in h.names()
            if (name in h.OWN or getattr(h, name) != defaults[name]) and name not in self._IMPLIED
        }
        if self._backend is not None:
            values["backend"] = self._backend
        if self._capturable:
            values["capturable"] = True
        arguments = [f"{name}={value!r}" for name, value in values.items()]
        if self.segments:
            arguments.append(f"segments=<{len(self.segments)}>")
        return f"{type(self).__name__}({', '.join(arguments)})"
