# SPDX-License-Identifier: Apache-2.0
"""How XLA divides a custom call between devices: along batch entries and heads, which are computed independently.

Every axis of an array has a *label*: the number of a leading axis, which all arrays share; HEADS or KEY_HEADS; or None
where every device holds the whole axis (positions, regions, features). A *division* maps labels to the mesh axes that
divide them. With grouped heads, Hq = Hk * G, the mesh axes that divide the heads of keys divide those of queries too.
Further mesh axes divide the queries' heads only where each part has one key head; the gradients of that key head are
then summed over the parts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule, custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .arrays import Shape

HEADS, KEY_HEADS = "heads", "key heads"
Label: TypeAlias = int | str | None
Labels: TypeAlias = tuple[Label, ...]
Division: TypeAlias = dict[Label, tuple[str, ...]]
Starts: TypeAlias = Mapping[Label, Any]  # the number of a part's first entry, by label; empty for the whole


def partitioned(
    run: Callable[[Any, Sequence[jax.Array], Starts], Sequence[jax.Array]],
    label: Callable[[Any, Sequence[Shape]], list[Labels]],
) -> Callable[..., Sequence[jax.Array]]:
    """`run` as a function of (operation, *operands) that XLA divides between devices.

    Parameters
    ----------
    run : (operation, operands, starts) -> results, for all entries or for a part of them. An operation is static and
        hashable.
    label : (operation, shapes) -> the labels of the operands, then of the results.
    """

    def whole(operation: Any, *operands: jax.Array) -> Sequence[jax.Array]:
        return run(operation, operands, {})

    def divide(operation: Any, mesh: Mesh, arrays: Sequence[Any]) -> tuple[Mesh, Division, list[Labels], list[Any]]:
        """The division of operands and results, their labels and their shardings."""
        if mesh.empty:  # within jax.shard_map over some axes of a mesh, JAX does not give the mesh here
            mesh = Mesh(np.array(sorted(arrays[0].sharding.device_set, key=lambda device: device.id)), ("device",))
        shapes = [x.shape for x in arrays]
        labels = label(operation, shapes)
        specs = [getattr(getattr(x, "sharding", None), "spec", PartitionSpec()) for x in arrays]
        division = find_division(labels, shapes, specs, mesh.shape)
        return mesh, division, labels, [NamedSharding(mesh, _spec(each, division)) for each in labels]

    def partition(operation: Any, mesh: Mesh, given: Sequence[Any], results: Sequence[Any]) -> tuple[Any, ...]:
        mesh, division, labels, shardings = divide(operation, mesh, (*given, *results))
        of_operands, of_results = labels[: len(given)], labels[len(given) :]
        of_queries = division.get(HEADS, ())[len(division.get(KEY_HEADS, ())) :]  # each part has the one key head

        def part(*operands: jax.Array) -> list[jax.Array]:
            sizes = _sizes(of_operands, [x.shape for x in operands])
            divided = (name for name in sizes if division.get(name))
            starts = {name: jax.lax.axis_index(division[name]) * sizes[name] for name in divided}
            done = zip(run(operation, operands, starts), of_results, strict=True)
            return [jax.lax.psum(x, of_queries) if of_queries and KEY_HEADS in each else x for x, each in done]

        return mesh, part, shardings[len(given) :], tuple(shardings[: len(given)])

    def infer(operation: Any, mesh: Mesh, given: Sequence[Any], results: Sequence[Any]) -> list[Any]:
        return divide(operation, mesh, (*given, *results))[3][len(given) :]

    def rule(operation: Any, mesh: Mesh, given: Sequence[Any], results: Sequence[Any]) -> SdyShardingRule:
        shapes = [tuple(x.shape) for x in (*given, *results)]
        return _sharding_rule(label(operation, shapes), shapes, len(given))

    function = custom_partitioning(whole, static_argnums=(0,))
    function.def_partition(partition, infer_sharding_from_operands=infer, sharding_rule=rule)
    return function


def varying(x: jax.Array) -> frozenset[Any]:
    """Within jax.shard_map, the mesh axes that x varies over, where JAX knows them (check_vma)."""
    kind = getattr(jax.typeof(x), "manual_axis_type", None)  # from JAX 0.10 on
    return frozenset() if kind is None else kind.varying


def type_results(
    results: Sequence[jax.ShapeDtypeStruct], operands: Sequence[jax.Array], labels: Sequence[Labels]
) -> list[jax.ShapeDtypeStruct]:
    """The results as JAX types them: varying over mesh axes, and divided along explicit ones, as the operands are."""
    kinds = [jax.typeof(x) for x in operands]
    mesh = kinds[0].sharding.mesh
    if mesh.empty:
        return list(results)
    shapes = [x.shape for x in operands] + [x.shape for x in results]
    specs = [kind.sharding.spec for kind in kinds] + [PartitionSpec()] * len(results)
    division = find_division(labels, shapes, specs, mesh.shape)
    return [
        _typed(x, operands[0], NamedSharding(mesh, _spec(each, division)))
        for x, each in zip(results, labels[len(operands) :], strict=True)
    ]


def type_alike(x: jax.Array) -> jax.ShapeDtypeStruct:
    """The type of x, as its gradient has it."""
    plain = jax.ShapeDtypeStruct(x.shape, x.dtype)
    kind = jax.typeof(x)
    return plain if kind.sharding.mesh.empty else _typed(plain, x, kind.sharding)


def _typed(result: jax.ShapeDtypeStruct, like: jax.Array, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    more = {"manual_axis_type": jax.typeof(like).manual_axis_type} if varying(like) else {}
    return jax.ShapeDtypeStruct(result.shape, result.dtype, sharding=sharding, **more)


def _spec(labels: Labels, division: Division) -> PartitionSpec:
    return PartitionSpec(*(division.get(name) or None for name in labels))


def find_division(
    labels: Sequence[Labels], shapes: Sequence[Shape], specs: Sequence[PartitionSpec], sizes: Mapping[str, int]
) -> Division:
    """The division of all arrays: each label is divided as in the first array that is divided along it, evenly.

    Parameters
    ----------
    specs : the present division of each array.
    sizes : sizes of the mesh axes.
    """
    division: Division = {}
    used: set[str] = set()
    for each, shape, spec in zip(labels, shapes, specs, strict=True):
        for name, size, axes in zip(each, shape, spec, strict=False):  # a spec may be shorter
            name = HEADS if name == KEY_HEADS else name
            if name is None or name in division or axes is None or axes is PartitionSpec.UNCONSTRAINED:
                continue
            wanted = (axes,) if isinstance(axes, str) else axes
            division[name] = _even((axis for axis in wanted if axis not in used), size, sizes)
            used.update(division[name])
    if HEADS in division:
        of = _sizes(labels, shapes)
        key_heads = of.get(KEY_HEADS, of[HEADS])
        division[KEY_HEADS] = _even(division[HEADS], key_heads, sizes)
        if math.prod(sizes[axis] for axis in division[KEY_HEADS]) != key_heads:
            division[HEADS] = division[KEY_HEADS]
    return division


def _even(axes: Iterable[str], size: int, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The first mesh axes, as many as divide `size` evenly."""
    taken: tuple[str, ...] = ()
    for axis in axes:
        size, rest = divmod(size, sizes[axis])
        if rest:
            break
        taken += (axis,)
    return taken


def _sizes(labels: Sequence[Labels], shapes: Sequence[Shape]) -> dict[Label, int]:
    """The size of every label."""
    arrays = zip(labels, shapes, strict=True)
    return {name: size for each, shape in arrays for name, size in zip(each, shape, strict=True)}


def _sharding_rule(labels: Sequence[Labels], shapes: Sequence[Shape], operands: int) -> SdyShardingRule:
    """The rule for Shardy, which divides axes that share a factor alike.

    A factor with several sizes (heads) has the smallest. An axis without a label has a factor of its own, so that its
    division does not spread.
    """
    one_key_head = _sizes(labels, shapes).get(KEY_HEADS) == 1
    own = itertools.count()

    def factor(name: Label) -> str:
        if name is None or (name == KEY_HEADS and one_key_head):
            return f"own{next(own)}"
        return "heads" if name in (HEADS, KEY_HEADS) else f"axis{name}"

    mappings = [ArrayMapping(*map(factor, each)) for each in labels]
    return SdyShardingRule(tuple(mappings[:operands]), tuple(mappings[operands:]))
