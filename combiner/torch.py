# SPDX-License-Identifier: Apache-2.0
"""Combiner for PyTorch on the CPU: functions of tensors that autograd, torch.compile, torch.export and vmap know, and
modules.

`attention`, `attention_weights`, `summarize`, `attend`, `merge`, `assign_clusters` and `update_centroids` are
combiner's functions of tensors; `combiner.torch_ops` says what they have in common. `CombinerAttention` takes the place
of ``torch.nn.MultiheadAttention``. Letters as in `combiner.functional`, and E for the width of a model.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import combiner

from .patterns import AnyPattern, Factorization
from .plan import POOLINGS, Array, Plan, Pooling, choice_number
from .torch_ops import (
    Routing,
    Summary,
    as_array,
    as_tensor,
    assign_clusters,
    attend,
    attention,
    attention_weights,
    merge,
    summarize,
    update_centroids,
)

__all__ = [
    "CombinerAttention",
    "Decoder",
    "DeepSets",
    "OnlineRouting",
    "Regions",
    "Routing",
    "Summary",
    "assign_clusters",
    "attend",
    "attention",
    "attention_weights",
    "merge",
    "region_mean",
    "summarize",
    "update_centroids",
]


# ---- learned abstractions


class Regions(NamedTuple):
    """The positions below each region of a plan: those of region r are ``members[offsets[r]:offsets[r + 1]]``."""

    members: Tensor
    offsets: Tensor


_regions_of_plan: weakref.WeakKeyDictionary[Plan, Regions] = weakref.WeakKeyDictionary()


@torch.compiler.disable
def _regions(pattern: Any, length: int, is_causal: bool) -> Regions:
    plan = pattern if isinstance(pattern, Plan | tuple) else pattern.plan(length, is_causal)
    if not isinstance(plan, Plan):
        raise ValueError(f"pattern must make one plan for all heads where the abstraction is learned, got {pattern!r}")
    if plan not in _regions_of_plan:
        members = np.concatenate([np.zeros(0, np.int64), *plan.regions])
        offsets = np.cumsum([0, *map(len, plan.regions)], dtype=np.int64)
        _regions_of_plan[plan] = Regions(as_tensor(members), as_tensor(offsets))
    return _regions_of_plan[plan]


def region_mean(x: Tensor, regions: Regions, key_mask: Tensor | None = None) -> Tensor:
    """The mean of x over the unmasked members of each region, 0 where there is none.

    Parameters
    ----------
    x : `[..., H, L, F]`
    key_mask : bool `[..., L]`, True for positions that take part.

    Returns
    -------
    `[..., H, R, F]`; time O(total number of members), memory O(R).
    """

    def total(rows: Tensor) -> Tensor:
        """`[R, n]` of `[L, n]`"""
        return functional.embedding_bag(regions.members, rows, regions.offsets, mode="sum", include_last_offset=True)

    if key_mask is None:
        count = regions.offsets.diff().to(x.dtype).unsqueeze(-1)
    else:
        x = x.masked_fill(~key_mask[..., None, :, None], 0)
        L = key_mask.shape[-1]
        count = total(key_mask.reshape(-1, L).T.to(x.dtype)).T.reshape(*key_mask.shape[:-1], 1, -1, 1)
    rows = x.movedim(-2, 0)
    return total(rows.flatten(1)).unflatten(1, rows.shape[1:]).movedim(0, -2) / count.clamp(min=1)


class DeepSets(nn.Module):
    """Learned abstractions (section 3.3; Zaheer et al., "Deep Sets", NeurIPS 2017): rho(mean of phi(x) over a region).

    q_R comes from the queries of the region and k_R from its keys, with a phi, linear and GELU, and a linear rho each
    that all heads share.

    Parameters
    ----------
    dim : D.
    hidden_dim : features of phi(x); `dim` by default.
    """

    def __init__(
        self, dim: int, hidden_dim: int | None = None, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        hidden = dim if hidden_dim is None else hidden_dim
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query_phi, self.query_rho = nn.Linear(dim, hidden, **options), nn.Linear(hidden, dim, **options)
        self.key_phi, self.key_rho = nn.Linear(dim, hidden, **options), nn.Linear(hidden, dim, **options)

    def forward(
        self, query: Tensor, key: Tensor, regions: Regions, key_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """region_query `[..., Hq, R, D]` and region_key `[..., Hk, R, D]`."""
        region_query = self.query_rho(region_mean(functional.gelu(self.query_phi(query)), regions, key_mask))
        region_key = self.key_rho(region_mean(functional.gelu(self.key_phi(key)), regions, key_mask))
        return region_query, region_key


# ---- modules


class CombinerAttention(nn.Module):
    """Multi-head self-attention with ``torch.nn.MultiheadAttention``'s arguments, masks and state_dict.

    Weights of a `MultiheadAttention` of the same sizes load into it; with ``combiner.Dense()`` it is the same function.
    E is embed_dim, D = E / num_heads.

    Parameters
    ----------
    embed_dim, num_heads : E, and Hq, which divides it.
    pattern : how attention is factorised, as in `attention`; or a module that makes one when called with (key,
        key_mask), such as `OnlineRouting`.
    num_key_value_heads : Hk, which divides num_heads; num_heads by default.
    dropout : of the attention weights, in training.
    bias : whether the projections add one.
    batch_first : whether inputs are `[B, L, E]`; else `[L, B, E]`. `[L, E]` is one sequence in either case.
    is_causal : whether a position sees those up to itself only.
    abstraction : how a region's query and key come from its members': None as the pattern pools; "max", "mean" or "sum"
        in place of the pattern's pooling; "deepsets", learned by `DeepSets`; or a module called with (query, key,
        regions, key_mask) like it. Learned ones ask for a pattern with one plan for all heads; torch.compile breaks its
        graph to make its `Regions`.
    device, dtype : of the parameters.
    """

    # What torch.nn.TransformerEncoderLayer asks before it takes a short cut, which knows dense attention only.
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        pattern: AnyPattern | nn.Module,
        *,
        num_key_value_heads: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = True,
        is_causal: bool = False,
        abstraction: Pooling | Literal["deepsets"] | nn.Module | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        groups = num_heads if num_key_value_heads is None else num_key_value_heads
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        if groups < 1 or num_heads % groups:
            raise ValueError(f"num_heads must be a multiple of num_key_value_heads, got {num_heads} and {groups}")
        makes_plans = isinstance(pattern, Plan | tuple | nn.Module) or callable(getattr(pattern, "plan", None))
        if isinstance(pattern, type) or not makes_plans:
            kind = pattern.__name__ if isinstance(pattern, type) else type(pattern).__name__
            raise TypeError(f"pattern must be a pattern such as combiner.Fixed(), a Plan or a module, got {kind}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be between 0 and 1, got {dropout}")
        self.embed_dim, self.num_heads, self.num_key_value_heads = embed_dim, num_heads, groups
        self.head_dim = embed_dim // num_heads
        self.pattern, self.dropout, self.batch_first, self.is_causal = pattern, dropout, batch_first, is_causal
        self._sizes = [heads * self.head_dim for heads in (num_heads, groups, groups)]
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj_weight = nn.Parameter(torch.empty(sum(self._sizes), embed_dim, **options))
        self.in_proj_bias = nn.Parameter(torch.empty(sum(self._sizes), **options)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **options)
        if abstraction == "deepsets":
            abstraction = DeepSets(self.head_dim, **options)
        elif isinstance(abstraction, str):
            choice_number("abstraction", abstraction, (*POOLINGS[:3], "deepsets"))
            if not isinstance(pattern, Factorization):
                raise ValueError(f"abstraction must be None where the pattern has no pooling, got {abstraction!r}")
            pooling: Any = abstraction
            self.pattern, abstraction = dataclasses.replace(pattern, pooling=pooling), None
        if not (abstraction is None or isinstance(abstraction, nn.Module)):
            raise ValueError(f"abstraction must be None, a pooling, 'deepsets' or a module, got {abstraction!r}")
        if abstraction is not None and isinstance(pattern, nn.Module):
            raise ValueError(
                "abstraction must be None where pattern is a module, whose regions change from call to call"
            )
        self.abstraction = abstraction
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The projections as `MultiheadAttention` begins with them."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: None = None,
        average_attn_weights: bool = True,
        is_causal: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The output, and the effective attention if asked for.

        Parameters
        ----------
        query : `[B, L, E]`, `[L, B, E]` or `[L, E]`.
        key, value : the same shape; query and key by default.
        key_padding_mask : `[B, L]` or `[L]`, True for keys to leave out, the opposite of key_mask; or
            floating-point, of 0 and -inf alone.
        need_weights : whether to return the weights; O(L^2), and without dropout.
        attn_mask : None. What each query sees is the pattern's matter.
        average_attn_weights : whether these are the mean over the heads.
        is_causal : the module's by default; True makes one causal that is not. False where it is, is an error.

        Returns
        -------
        output : the shape of query.
        weights : None, or `[B, L, L]`, or `[B, Hq, L, L]` if not averaged.
        """
        if attn_mask is not None:
            raise ValueError("attn_mask must be None: for causality is_causal=True, for other supports another pattern")
        if self.is_causal and is_causal is False:
            raise ValueError("is_causal must be True or None: the module was made causal")
        is_causal = self.is_causal if is_causal is None else is_causal
        key_mask = self._key_mask(key_padding_mask)
        q, k, v = self._project(query, key, value)
        pattern = self.pattern(k, key_mask) if isinstance(self.pattern, nn.Module) else self.pattern
        options: dict[str, Any] = {"is_causal": is_causal, "key_mask": key_mask}
        if self.abstraction is not None:
            regions = _regions(pattern, q.shape[-2], is_causal)
            options["region_query"], options["region_key"] = self.abstraction(q, k, regions, key_mask)
        dropout_p = self.dropout if self.training else 0.0
        output = self._merge_heads(attention(q, k, v, pattern, dropout_p=dropout_p, **options))
        if not need_weights:
            return output, None
        weights = attention_weights(q, k, pattern, **options)
        return output, weights.mean(-3) if average_attn_weights else weights

    def decoder(self) -> Decoder:
        """Attention token by token with this module's weights, as generation wants it; see `Decoder`."""
        return Decoder(self)

    def extra_repr(self) -> str:
        pattern = "" if isinstance(self.pattern, nn.Module) else f", {self.pattern!r}"
        return f"{self.embed_dim}, {self.num_heads}{pattern}, is_causal={self.is_causal}"

    def _key_mask(self, key_padding_mask: Tensor | None) -> Tensor | None:
        if key_padding_mask is None or key_padding_mask.dtype == torch.bool:
            return None if key_padding_mask is None else ~key_padding_mask
        if not key_padding_mask.is_floating_point():
            raise TypeError(f"key_padding_mask must be bool, True for keys to leave out, got {key_padding_mask.dtype}")
        key_mask = key_padding_mask == 0
        if not (key_mask | key_padding_mask.isneginf()).all():
            raise ValueError("key_padding_mask must hold 0 and -inf alone where it is floating-point")
        return key_mask

    def _project(self, query: Tensor, key: Tensor | None, value: Tensor | None) -> list[Tensor]:
        """query, key and value by head, `[..., H, L, D]`."""
        key = query if key is None else key
        value = key if value is None else value
        if key is query and value is query:
            parts = functional.linear(query, self.in_proj_weight, self.in_proj_bias).split(self._sizes, -1)
        else:
            weights = self.in_proj_weight.split(self._sizes)
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.split(self._sizes)
            parts = tuple(map(functional.linear, (query, key, value), weights, biases))
        if not self.batch_first and query.ndim == 3:
            parts = tuple(x.transpose(0, 1) for x in parts)
        return [x.unflatten(-1, (-1, self.head_dim)).transpose(-3, -2) for x in parts]

    def _merge_heads(self, out: Tensor) -> Tensor:
        rows = out.transpose(-3, -2).flatten(-2)
        if not self.batch_first and rows.ndim == 3:
            rows = rows.transpose(0, 1)
        return self.out_proj(rows)


class Decoder:
    """`combiner.Decoder` for a module's weights: causal attention token by token, row by row what the module makes.

    Without dropout and without gradients. The weights are the module's when a method is called.

    Parameters
    ----------
    attention : causal, with a pattern that `combiner.Decoder` takes, without a learned abstraction.
    """

    def __init__(self, attention: CombinerAttention) -> None:
        if not attention.is_causal:
            raise ValueError("attention must be made with is_causal=True")
        if attention.abstraction is not None or isinstance(attention.pattern, nn.Module):
            raise ValueError(
                "attention must have a pattern of its own and abstraction None: others see all of the past"
            )
        self._attention = attention
        self._decoder = combiner.Decoder(attention.pattern)

    @torch.no_grad()
    def prefill(self, x: Tensor) -> Tensor:
        """The first tokens, any number of them: the module's output for x, in its layout."""
        return self._run(self._decoder.prefill, x)

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """The next tokens: one or more, in the layout of x."""
        return self._run(self._decoder.step, x)

    def reset(self) -> None:
        """Forget all tokens."""
        self._decoder.reset()

    def _run(self, method: Callable[..., Array], x: Tensor) -> Tensor:
        return self._attention._merge_heads(as_tensor(method(*map(as_array, self._attention._project(x, None, None)))))


class OnlineRouting(nn.Module):
    """A pattern for `CombinerAttention` that follows the keys: `Routing` by centroids that move with every batch.

    The centroids, a set of unit vectors for each key head, are a buffer: they begin at random, take no gradients, and
    move in training as the Routing Transformer's do (Roy et al., TACL 2021). A position's cluster depends on its own
    key alone, so that causal attention stays causal.

    Parameters
    ----------
    clusters : their number, at most the length of what is attended.
    num_key_value_heads, head_dim : Hk and D of the attention.
    decay : of the centroids, as in `combiner.update_centroids`.
    pooling, size_bias : as in `combiner.Routing`.
    """

    centroids: Tensor

    def __init__(
        self,
        clusters: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        decay: float = 0.999,
        pooling: Pooling = "max",
        size_bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.decay, self.pooling, self.size_bias = decay, pooling, size_bias
        first = torch.randn(num_key_value_heads, clusters, head_dim, device=device, dtype=dtype)
        self.register_buffer("centroids", functional.normalize(first, dim=-1))

    def forward(self, key: Tensor, key_mask: Tensor | None = None) -> Routing:
        """The clusters of key `[..., Hk, L, D]`; in training centroids move after that, but not with masked keys."""
        x = key.detach().to(self.centroids.dtype)
        clusters = assign_clusters(x, self.centroids.expand(*x.shape[:-3], -1, -1, -1))
        if self.training:
            if key_mask is not None:
                x = x.masked_fill(~key_mask[..., None, :, None], 0)  # rows without a direction move nothing
            rows, ids = x.movedim(-3, 0).flatten(1, -2), clusters.movedim(-2, 0).flatten(1)
            self.centroids.copy_(update_centroids(self.centroids, rows, ids, decay=self.decay))
        return Routing(clusters, self.pooling, self.size_bias)

    def extra_repr(self) -> str:
        return f"{self.centroids.shape[1]}, decay={self.decay}, pooling={self.pooling!r}, size_bias={self.size_bias}"
