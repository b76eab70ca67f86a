"""Nested containers: what is in them, by name, and the same containers around something else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def leaves(tree: object, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what is no dict, list or tuple, with its dotted name: keys, fields, and places in sequences."""
    children = _children(tree)
    if children is None:
        yield path, tree
        return
    for key, child in children:
        yield from leaves(child, f"{path}.{key}" if path else str(key))


def rebuild(tree: object, values: Iterator[Any]) -> Any:
    """Return the containers of a tree around other leaves, in the order of :func:`leaves`.

    Mappings of any kind become dicts.
    """
    children = _children(tree)
    if children is None:
        return next(values)
    new = [rebuild(child, values) for _, child in children]
    if isinstance(tree, Mapping):
        return dict(zip(tree, new, strict=True))
    if hasattr(tree, "_fields"):
        return type(tree)(*new)
    return tuple(new) if isinstance(tree, tuple) else new


def _children(tree: object) -> list[tuple[Any, Any]] | None:
    if isinstance(tree, Mapping):
        return list(tree.items())
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return list(zip(tree._fields, tree, strict=True))
    return list(enumerate(tree)) if isinstance(tree, (tuple, list)) else None
