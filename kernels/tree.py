"""The shape of the tree by which sums over a buffer are formed: :mod:`fastadam.kernels.norms` says how."""

CHUNK = 2048
"""Elements of a chunk."""

LANES = 32
"""Accumulators of a chunk: those of a warp, and of four 512-bit registers, as many as hide an addition."""
