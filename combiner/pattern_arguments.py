# SPDX-License-Identifier: Apache-2.0
"""Patterns as arguments: several of them, the plans that they make, and patterns written as text."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from . import patterns as _patterns
from .arguments import as_integer, check_bool
from .composed import AnyPattern, Mixture
from .patterns import Factorization, Routing, makes_plans, no_pattern
from .plan import Plan

Several: TypeAlias = "AnyPattern | Sequence[AnyPattern] | Mapping[str, AnyPattern]"
# The patterns that their parameters define, by name.
WRITTEN = {
    name: each
    for name, each in vars(_patterns).items()
    if isinstance(each, type) and issubclass(each, Factorization) and each not in (Factorization, Routing)
} | {"Mixture": Mixture}

DENSE = "dense"  # the name of dense attention's line beside patterns


def by_name(patterns: Several) -> dict[str, AnyPattern]:
    """Patterns by the names that they are shown under beside dense attention: those given in a dict, or what the
    patterns print.

    Raises
    ------
    TypeError : no pattern, a list of patterns, or a dict of them.
    ValueError : none at all, two of one name, or one of the name of dense attention's own line.
    """
    if isinstance(patterns, Mapping):
        named = {str(name): pattern for name, pattern in patterns.items()}
    else:
        is_one = not isinstance(patterns, list | tuple) or (patterns and all(isinstance(x, Plan) for x in patterns))
        several: Any = [patterns] if is_one else patterns
        named = {repr(pattern): pattern for pattern in several}
        if len(named) < len(several):
            raise ValueError(f"patterns must differ in what they print, or be a dict, got {list(map(repr, several))}")
    if not named:
        raise ValueError("patterns must be at least one, got none")
    if DENSE in named:
        raise ValueError(f"patterns must have other names than {DENSE!r}, which is that of dense attention")
    for pattern in named.values():
        is_plans = isinstance(pattern, tuple) and all(isinstance(each, Plan) for each in pattern)
        if not is_plans and not isinstance(pattern, Plan) and not makes_plans(pattern):
            raise no_pattern(pattern, "patterns such as combiner.Fixed()", name="patterns")
    return named


def plans_of(pattern: AnyPattern, length: int | None, is_causal: bool) -> Plan | tuple[Plan, ...] | Mixture:
    """The plan or plans of a pattern, or those given, after a check that they fit the other arguments.

    Raises
    ------
    TypeError, ValueError : an argument is of the wrong kind or value.
    """
    check_bool("is_causal", is_causal)
    plans: Any = pattern
    if not isinstance(pattern, Plan | tuple):
        if not makes_plans(pattern):
            raise TypeError(f"pattern must be a pattern or a Plan, got {type(pattern).__name__}")
        if length is None:
            raise TypeError("length must be given with a pattern, which has none of its own, got None")
        plans = pattern.plan(as_integer("length", length, 0), bool(is_causal))
    components = plans.patterns if isinstance(plans, Mixture) else [plans]
    each = [plan for part in components for plan in (part if isinstance(part, tuple) else (part,))]
    if not each:
        raise ValueError("pattern must make at least one plan, got none")
    for plan in each:
        if not isinstance(plan, Plan):
            raise TypeError(f"pattern must make a Plan, got {type(plan).__name__}")
        if length is not None and as_integer("length", length, 0) != plan.length:
            raise ValueError(f"length must be {plan.length}, the plan's, got {length}")
        if is_causal and not plan.is_causal:
            raise ValueError("is_causal must be False with a bidirectional plan as pattern, got True")
    return plans  # type: ignore[no-any-return]


def one_plan(pattern: AnyPattern, length: int | None, is_causal: bool) -> Plan:
    """The plan of a pattern that makes one.

    Raises
    ------
    TypeError, ValueError : an argument is of the wrong kind or value, or the pattern makes several plans.
    """
    plans = plans_of(pattern, length, is_causal)
    if isinstance(plans, Mixture):
        count = len(plans.patterns)
        raise ValueError(f"pattern must make one plan, got a Mixture of {count}: draw each of them, or use draw_heads")
    if isinstance(plans, tuple):
        raise ValueError(f"pattern must make one plan, got {len(plans)}: draw each of them, or use draw_heads")
    return plans


def plan_of_head(plans: Any, n: int) -> Any:
    """The plan, or mixture of plans, of the n-th key head of all batch entries."""
    if isinstance(plans, Mixture):
        return Mixture(*(plan_of_head(each, n) for each in plans.patterns))
    return plans[n] if isinstance(plans, tuple) else plans


def written_pattern(text: str) -> Any:
    """The pattern of a text as Python prints it, such as "Mixture(Fixed(64), LogSparse())" or "Fixed(64).sparse()".

    Raises
    ------
    ValueError : the text is no pattern, or one that its parameters do not define, as `Routing`.
    """
    try:
        found = read_expression(text, **WRITTEN)
    except (SyntaxError, TypeError, ValueError, AttributeError) as error:
        why = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(f"{text!r} must be a pattern such as Fixed(64), of {', '.join(WRITTEN)}: {why}") from None
    if not makes_plans(found):
        raise ValueError(f"{text!r} must be a pattern such as Fixed(64), of {', '.join(WRITTEN)}")
    return found


def read_expression(text: str, **names: Callable[..., Any]) -> Any:
    """The value of an expression of literals, calls of these names, and ``.sparse()``.

    Raises
    ------
    SyntaxError : the text is no expression.
    ValueError : it holds something else. TypeError and ValueError : what a call raises.
    """

    def read(node: ast.expr) -> Any:
        match node:
            case ast.Call(ast.Name(name), args, keywords) if name in names:
                return names[name](*map(read, args), **{str(each.arg): read(each.value) for each in keywords})
            case ast.Call(ast.Attribute(of, "sparse"), [], []):
                return read(of).sparse()
            case ast.Name(name) if name in names:
                raise ValueError(f"{name} must be called, as {name}(..)")
        try:
            return ast.literal_eval(node)
        except ValueError:
            raise ValueError(f"{ast.unparse(node)} is none of these, and no number or text") from None

    return read(ast.parse(text, mode="eval").body)
