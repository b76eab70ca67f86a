"""The demo: handwritten digits, a network in NumPy or CuPy, and all of an optimizer's work in one call.

The call clips the gradient by its norm, takes a step of AdamW with the learning rate of a schedule, and
follows the weights with an average. The data come with scikit-learn: the test set of "Optical Recognition of
Handwritten Digits" (UCI). With the default settings, about 98 % of the digits held back for the test are
recognised, after a second or two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fastadam import schedules
from fastadam.adam import AdamHyperparameters, FusedAdam
from fastadam.buffers import Array
from fastadam.coefficients import Coefficients
from fastadam.demo_model import MLP
from fastadam.devices import CPU, Device
from fastadam.warming import warmup

SIZES = (64, 200, 10)
"""8 x 8 pixels, hidden units, digits."""

BATCH = 32
TEST_SHARE = 0.2

OPTIMIZER: dict[str, Any] = {
    "weight_decay": 0.01,
    "decoupled_weight_decay": True,
    "max_grad_norm": 1.0,
    "ema_decay": 0.99,
}
"""What :class:`FusedAdam` is asked for, besides the learning rate."""

WARM_SHARE, FINAL_SHARE = 0.05, 0.01
"""Of all steps, those in which the learning rate rises; of its height, what it falls to then."""

SMALLEST_LR = 1e-30
"""But for 0: so that its shares, too, are within float32."""


@dataclass(frozen=True)
class Settings:
    """What a user may choose.

    Parameters
    ----------
    seed : int, default 0
        Of the split, the first weights and the batches; in [0, 2**32).
    epochs : int, default 100
        Passes over the training digits, at least 1.
    lr : float, default 3e-3
        Highest learning rate: 0, or at least 1e-30 and within float32.

    Raises
    ------
    ValueError
        If one is out of its range.
    """

    seed: int = 0
    epochs: int = 100
    lr: float = 3e-3

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32); got {self.seed}.")
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1; got {self.epochs}.")
        Coefficients(
            AdamHyperparameters(self.lr, **OPTIMIZER), np.dtype(np.float32)
        )  # raises what a step would
        if 0 < self.lr < SMALLEST_LR:
            raise ValueError(f"lr must be 0 or at least {SMALLEST_LR}; got {self.lr}.")

    def schedule(self, steps_per_epoch: int) -> schedules.Schedule:
        """Return the learning rate of each step: a straight rise, then half a cosine."""
        steps = self.epochs * steps_per_epoch
        warm = max(1, round(WARM_SHARE * steps))
        fall = schedules.cosine(self.lr, max(1, steps - warm), FINAL_SHARE * self.lr)
        return schedules.linear_warmup(fall, warm)


class Digits(NamedTuple):
    """Images of shape (n, 64), float32 in [0, 1], and labels of shape (n,), of NumPy or of CuPy."""

    train_images: Array
    test_images: Array
    train_labels: Array
    test_labels: Array


class Epoch(NamedTuple):
    """How one epoch ended."""

    loss: float
    """Mean of the training loss over its batches."""

    accuracy: float
    """Share of the test digits that are recognised, in [0, 1]."""

    averaged_accuracy: float
    """The same with the average of the weights in their place."""


@dataclass(frozen=True, eq=False)
class Result:
    """What a training gave.

    Parameters
    ----------
    epochs : tuple of Epoch
        In their order.
    params : ndarray, shape (n,)
        The trained parameters, where they were trained.
    steps : int
        Optimizer steps taken.
    lr : Schedule
        Learning rate of each step.
    train_seconds : float
        Time of all batches, tests of the accuracy and compilation excluded.
    step_seconds : float
        Time of the optimizer steps among it.
    """

    epochs: tuple[Epoch, ...]
    params: Array
    steps: int
    lr: schedules.Schedule
    train_seconds: float
    step_seconds: float

    @property
    def accuracy(self) -> float:
        """Share of the test digits that are recognised in the end, in [0, 1]."""
        return self.epochs[-1].accuracy

    @property
    def averaged_accuracy(self) -> float:
        """The same with the average of the weights in their place."""
        return self.epochs[-1].averaged_accuracy

    @property
    def step_share(self) -> float:
        """Share of the training time that the optimizer took, in [0, 1]."""
        return self.step_seconds / self.train_seconds

    @property
    def steps_per_second(self) -> float:
        """Batches per second of training: gradient and optimizer step."""
        return self.steps / self.train_seconds


def load_digits(seed: int) -> Digits:
    """Return the digits, split so that both parts have the same share of each.

    Raises
    ------
    ImportError
        If scikit-learn is missing.
    """
    try:
        from sklearn import datasets, model_selection
    except ModuleNotFoundError as error:
        raise ImportError('the demo needs scikit-learn. pip install "fastadam[demo]"') from error
    images, labels = datasets.load_digits(return_X_y=True)
    return Digits(
        *model_selection.train_test_split(
            (images / 16).astype(np.float32), labels, test_size=TEST_SHARE, stratify=labels, random_state=seed
        )
    )


def train(
    settings: Settings,
    digits: Digits,
    on_epoch: Callable[[Epoch], object] | None = None,
    device: Device = CPU,
) -> Result:
    """Train the network.

    Parameters
    ----------
    settings : Settings
        The same settings give the same parameters, bit for bit, on the same machine and device; and the same
        first weights and batches on every device.
    digits : Digits
        What :func:`load_digits` returned for the seed of the settings.
    on_epoch : callable, optional
        Called after each epoch.
    device : Device, default CPU
        Where all arrays are and all is computed; only the three numbers of each :class:`Epoch` leave it.

    Returns
    -------
    Result
    """
    from threadpoolctl import threadpool_limits

    rng = np.random.default_rng(settings.seed)
    model = MLP(SIZES, rng, xp=device.xp)
    digits = Digits(*(device.xp.asarray(array) for array in digits))
    lr = settings.schedule(-(-len(digits.train_labels) // BATCH))
    # Matrices this small gain nothing from the threads of BLAS, and lose much where the cores are busy.
    # A learning rate that is too high shows as a loss of NaN: warnings would only break the progress bar.
    with threadpool_limits(limits=1, user_api="blas"), np.errstate(over="ignore", invalid="ignore"):
        # Compile everything before the clock starts: on a GPU, that is each operation of the network too.
        if device is CPU:
            warmup(**OPTIMIZER)
        else:
            other_rng = np.random.default_rng(settings.seed)
            rehearsal = MLP(SIZES, other_rng, xp=device.xp)
            _train_epoch(rehearsal, FusedAdam(lr, **OPTIMIZER), digits, other_rng, device)

        optimizer = FusedAdam(lr, **OPTIMIZER)
        epochs = []
        train_seconds = step_seconds = 0.0
        for _ in range(settings.epochs):
            loss, seconds, seconds_in_step = _train_epoch(model, optimizer, digits, rng, device)
            train_seconds += seconds
            step_seconds += seconds_in_step

            accuracy = _accuracy(model, digits, device)
            optimizer.swap_ema(model.flat_params)
            epochs.append(Epoch(loss, accuracy, _accuracy(model, digits, device)))
            optimizer.swap_ema(model.flat_params)
            if on_epoch is not None:
                on_epoch(epochs[-1])
    return Result(tuple(epochs), model.flat_params, optimizer.state.step, lr, train_seconds, step_seconds)


def _accuracy(model: MLP, digits: Digits, device: Device) -> float:
    return float(device.xp.mean(model.predict(digits.test_images) == digits.test_labels))


def _train_epoch(
    model: MLP, optimizer: FusedAdam, digits: Digits, rng: np.random.Generator, device: Device
) -> tuple[float, float, float]:
    """Step once with each batch; return the mean loss, the seconds of it all, and those of the steps."""
    losses: list[Any] = []
    steps = []
    start = device.mark()
    order = device.xp.asarray(rng.permutation(len(digits.train_labels)))
    for first in range(0, len(order), BATCH):
        batch = order[first : first + BATCH]
        losses.append(model.loss_and_grads(digits.train_images[batch], digits.train_labels[batch]))
        before = device.mark()
        optimizer.step(model.flat_params, model.flat_grads)
        steps.append((before, device.mark()))
    end = device.mark()  # nothing waits for a GPU before this
    loss = float(device.xp.mean(device.xp.stack(losses), dtype=np.float64))
    return loss, device.seconds(start, end), sum(device.seconds(*marks) for marks in steps)
