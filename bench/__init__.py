"""How fast fastadam is, and beside whom.

From the root of the repository, with ``pip install -e ".[bench]"``:

- ``python -m bench.compare``: a step beside the steps of other libraries and the memory roofline;
- ``python -m bench.phase``: clip by norm, step, average and clear, beside PyTorch's calls and the roofline;
- ``python -m bench.storage``: a step by how its numbers are stored, beside our float32 step, the roofline and
  8-bit Adams of others; and the phase with a copy of the parameters;
- ``python -m bench.threshold``: the serial beside the parallel kernel, around ``kernels.cpu.PARALLEL_FROM``;
- ``python -m bench.scaling``: a step by number of threads;
- ``python -m bench.startup``: import and first step, in new processes;
- ``python -m bench.memory``: what a step allocates, and what each storage keeps;
- ``python -m bench.training``: the losses of networks trained with every storage of moments and parameters;
- ``python -m bench.gpu_compare``: a step on a GPU beside peers, a copy and the roofline;
- ``python -m bench.gpu_phase``: clip by norm, step, average and clear on a GPU, beside PyTorch's calls;
- ``python -m bench.gpu_launch``: a step on a GPU by launch, which sets the constants of ``kernels/grids.py``;
- ``python -m bench.gpu_torch``: ``fastadam.torch`` on a GPU beside PyTorch's Adam, on lists of tensors;
- ``python -m bench.report``: the tables of the README, from ``bench/results``;
- ``pytest bench``: a pytest-benchmark suite, to compare two versions of fastadam, with a GPU on that too.

``bash ci/gpu.sh`` runs what needs a GPU, on a machine with nothing to download from.

Below them: ``harness`` (clocks), ``contest`` (comparisons), ``peers``, ``phase_peers`` and ``storage_peers``
(contenders), ``oracle``, ``phase_oracle`` and ``storage_oracle`` (correctness before every timing),
``roofline``, ``phase_roofline`` and ``storage_traffic`` (the time that the memory traffic takes),
``storages`` (formats); for a GPU ``gpu_timer``, ``gpu_contest``, ``gpu_measure``, ``gpu_program``,
``gpu_peers`` and ``gpu_references``, ``gpu_phase_peers`` and ``gpu_phase_references``; for training
``training_storages``, ``networks``, ``transformer`` and ``language``.
"""
