"""Parameters by dotted path, such as `language_model.norm.scale`, and the same as nested dicts."""

from collections.abc import Callable, Iterable
from typing import Any

import jax


def dotted(path: Iterable[object]) -> str:
    """Joins the keys of a path in a tree of Flax: ("norm", "scale") -> "norm.scale"."""
    return ".".join(map(str, path))


def flatten(tree: dict[str, Any], convert: Callable[[Any], Any] = lambda leaf: leaf) -> dict[str, Any]:
    """Turns nested dicts into one dict by path; converts each leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: not isinstance(node, dict))
    return {dotted(key.key for key in path): convert(leaf) for path, leaf in leaves}


def unflatten(leaves: dict[str, Any]) -> dict[str, Any]:
    """Turns a dict by path into nested dicts: the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
