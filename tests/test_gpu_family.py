"""On a real GPU: every rule of the family has the CPU's bits, in graphs as well."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_family import FAMILY, IN_8_BITS, Pair, case_id, problem, some_cases, step_in_8_bits
from gpu_libraries import assert_same, of_backend
from gpu_libraries import problem as plain_problem

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

SIZES = [75, 100_003]
SOME = some_cases(2)
"""Each is compiled, which takes seconds: of each rule one. The stand-ins have all of them."""


@pytest.mark.parametrize("case", SOME, ids=case_id)
def test_bits_of_the_cpu(backend, rng, case):
    library = of_backend(backend)
    for size in SIZES:
        params, gradients = problem(rng, case, size)
        pair = Pair(case, params, library.put, backend=backend)
        for grads in gradients:
            pair.step(grads, there=library.get)


@pytest.mark.parametrize("rule", ["nadam", "sgd", "adagrad", "rmsprop-centered-momentum"])
def test_replays(backend, rng, rule):
    """The tables of what changes from step to step are the GPU's."""
    library = of_backend("cupy")
    params, gradients = plain_problem(rng, 4099, steps=6)
    cpu, device = FAMILY[rule](backend="cpu"), FAMILY[rule](backend=backend, capturable=True)
    copied, buffer, sent = params.copy(), library.put(params), library.put(gradients[0])
    library.synchronize()
    stream = library.stream()
    with library.on(stream):
        device.step(buffer, sent)
        library.synchronize()
        stream.begin_capture()
        device.step(buffer, sent)
        graph = stream.end_capture()
        cpu.step(copied, gradients[0])
        for k, grads in enumerate(gradients[1:]):
            device.lr = cpu.lr = 0.01 * (k + 1)
            library.fill(sent, grads)
            graph.launch(stream)
            cpu.step(copied, grads)
    assert_same(library, (device, buffer), (cpu, copied))


@pytest.mark.parametrize("rule", ["nadam", "radam"])
def test_moments_in_8_bits(backend, rng, rule):
    library = of_backend(backend)
    params, gradients = plain_problem(rng, 4099)
    cpu, device = (FAMILY[rule](state_dtype="8bit", backend=name) for name in ("cpu", backend))
    copied, buffer = params.copy(), library.put(params)
    for grads in gradients:
        cpu.step(copied, grads)
        device.step(buffer, library.put(grads))
    np.testing.assert_array_equal(library.get(buffer), copied)


@pytest.mark.parametrize("case", IN_8_BITS, ids=case_id)
def test_states_in_8_bits(backend, rng, case):
    library = of_backend(backend)
    for size in (300, SIZES[-1]):
        step_in_8_bits(rng, case, library.put, size, backend=backend, there=library.get)
