"""``python -m bench.gpu_compare``: a step on a GPU beside other libraries', a copy and the roofline."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from bench import gpu, gpu_contest, gpu_measure, gpu_program, gpu_targets, harness
from bench.environment import Result
from bench.gpu_peers import ON_TENSORS
from bench.gpu_program import Program


def host_rows(times: harness.Measurement) -> list[dict[str, Any]]:
    """Return what a call costs the host, one row for each contender."""
    peers = {**gpu_contest.of_step().peers, **ON_TENSORS}
    has_torch = "torch_fused" in times.seconds
    return [
        {
            "peer": name,
            "label": peers[name].label,
            "size": gpu_measure.HOST_SIZE,
            "seconds": harness.Quartiles.of(seconds)._asdict(),
            "of_torch_fused": times.ratio(name, over="torch_fused")._asdict() if has_torch else None,
        }
        for name, seconds in times.seconds.items()
    ]


def _host(device: gpu.Device) -> Result:
    times, failed = gpu_measure.host_cost(device)
    targets = [{"work": "host", **row} for row in gpu_targets.of_host(times)]
    return {"host": host_rows(times), "host_failed": failed, "targets": targets}


def program() -> Program:
    """Return what is measured."""
    return Program("gpu", (gpu_contest.of_step(),), gpu_measure.SIZES, _host)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return 1 if a contender failed, 2 without a GPU."""
    return gpu_program.main(program(), "gpu_compare", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
