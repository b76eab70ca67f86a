"""The tree of kernels/norms.py as its definition says: in Python floats, and in NumPy for large buffers."""

from __future__ import annotations

import numpy as np


def literal_chunk(terms, width=32, fold=None):
    lanes = [0.0] * width
    for i, term in enumerate(terms):
        lanes[i % width] += term
    return (fold or literal_fold)(lanes)


def literal_fold(lanes):
    for width in (16, 8, 4, 2, 1):
        for lane in range(width):
            lanes[lane] += lanes[lane + width]
    return lanes[0]


def literal_tree(terms, chunk=2048, **options):
    while True:
        terms = [
            literal_chunk(terms[start : start + chunk], **options) for start in range(0, len(terms), chunk)
        ]
        if len(terms) <= 1:
            return terms[0] if terms else 0.0


def literal_sum(grads, **options):
    return literal_tree([float(x) * float(x) for x in grads], **options)


def array_partials(terms):
    """The partial sums of many chunks: NumPy adds arrays of lanes, one row after the other."""
    count = -(-terms.size // 2048)
    rows = np.zeros(count * 2048)
    rows[: terms.size] = terms
    rows = rows.reshape(count, 64, 32)
    lanes = np.zeros((count, 32))
    for row in range(64):
        lanes += rows[:, row]
    for width in (16, 8, 4, 2, 1):
        lanes = lanes[:, :width] + lanes[:, width:]
    return lanes[:, 0]


def array_tree(terms):
    """The same tree for large buffers."""
    terms = np.asarray(terms)
    while terms.size > 1:
        terms = array_partials(terms)
    return float(terms[0]) if terms.size else 0.0


def array_sum(grads):
    with np.errstate(all="ignore"):
        return array_tree(np.square(grads, dtype=np.float64))
