# SPDX-License-Identifier: Apache-2.0
"""Modules: `CombinerAttention`, which takes the place of ``torch.nn.MultiheadAttention``, `Decoder`, `OnlineRouting`.

Letters are those of `combiner.functional`, and E for the width of a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Self

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import decode
from ..alibi import alibi_slopes
from ..arguments import Array, as_integer, as_softcap, check_bool, choice_number
from ..composed import AnyPattern
from ..foreign_names import explains_foreign_names
from ..patterns import Dense, Factorization, Sparse, makes_plans, no_pattern
from ..plan import POOLINGS, Plan, Pooling
from .abstraction import DeepSets, regions_of
from .clustering import assign_clusters, update_centroids
from .functional import attention, attention_weights
from .masks import key_mask_of, says_causal
from .patterns import Routing, Selected
from .selection import select as select_regions
from .tensors import as_array, as_tensor, at_least_float32


class CombinerAttention(nn.Module):
    """Multi-head self-attention with ``torch.nn.MultiheadAttention``'s masks and state_dict, to take its place in
    ``torch.nn``'s Transformer layers too.

    `from_mha` makes one of a `MultiheadAttention`, with its weights, sizes and settings; with ``combiner.Dense()`` it
    is the same function. E is embed_dim, D = E / num_heads. Where it differs from `MultiheadAttention`:

    - `batch_first` has no default, where `MultiheadAttention` has False: a value that does not fit the data would
      attend over the batch without an error.
    - `need_weights` is False by default, not True: weights are `[L, L]`, and the output is computed without them. They
      are without dropout.
    - query, key and value are of one sequence, position by position: there is no cross-attention. The `multihead_attn`
      of a decoder layer stays a `MultiheadAttention`.
    - `attn_mask` can only make a call causal; the pattern decides everything else that a query sees.
    - A float `key_padding_mask` holds -inf for keys to leave out and 0 for others. A bias of keys is `key_bias`.
    - A query without any key, because all keys are left out, gives `out_proj`'s bias, not NaN.
    - There are no `kdim`, `vdim`, `add_bias_kv` and `add_zero_attn`. All arguments but the first three are keywords.
    - Nested tensors are refused, and PyTorch's fused inference kernels are not used.

    Parameters
    ----------
    embed_dim, num_heads : E, and Hq, which divides it.
    pattern : how attention is factorized, as in `attention`; or a module that returns a pattern when it is called with
        (key, key_mask), such as `OnlineRouting`.
    num_key_value_heads : Hk, which divides num_heads; num_heads by default.
    dropout : probability of zeroing an attention weight, in training.
    bias : whether the projections add a bias.
    batch_first : True for inputs `[B, L, E]`, False for `[L, B, E]`. `[L, E]` is one sequence in both cases.
    is_causal : True makes every call causal; otherwise each call says whether it is.
    abstraction : how a region's query and key come from its positions. None: the pattern's pooling. "max", "mean" or
        "sum": this pooling in its place. "deepsets": a learned `DeepSets`. A module: called with (query, key, regions,
        key_mask) as `DeepSets` is. Learned abstractions need a pattern with one plan for all heads, and torch.compile
        breaks its graph to make their `Regions`.
    select : how many regions each block of queries opens: those that score highest, as `select` of the projected query
        and key finds them, by learned abstractions if there are any. Scores are products alone, without biases. No
        gradient flows through the choice. None: no region is opened. A causal choice knows nothing of later positions.
    select_block : queries that choose together.
    softcap : as in `attention`.
    sink : True adds the parameter `sink`, `[Hq]`, with zeros at first: the logit of one more part of every query, whose
        value is 0. A module without it has the state_dict of `MultiheadAttention`.
    alibi : True adds the biases of ALiBi (`combiner.alibi_bias`), which are of causal calls without a sink.
    device, dtype : of the parameters.

    Raises
    ------
    TypeError : an object that is no pattern, such as a class; a dropout or softcap that is no number, a sink or alibi
        that is no bool.
    ValueError : sizes that do not divide one another, a dropout that is no probability, an abstraction that the pattern
        cannot have, a softcap that is not positive and finite, a sink beside ALiBi, `select` of a pattern that
        `Selected` does not take.

    Notes
    -----
    Time and memory are those of `combiner.torch.attention`, and O(B L E^2) for the projections.
    """

    in_proj_bias: nn.Parameter | None
    sink: nn.Parameter | None

    # torch.nn.TransformerEncoderLayer reads this before it takes a fused path for dense attention.
    _qkv_same_embed_dim = False

    @explains_foreign_names
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        pattern: AnyPattern | nn.Module,
        *,
        num_key_value_heads: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool,
        is_causal: bool = False,
        abstraction: Pooling | Literal["deepsets"] | nn.Module | None = None,
        select: int | None = None,
        select_block: int = 64,
        softcap: float | None = None,
        sink: bool = False,
        alibi: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        groups = num_heads if num_key_value_heads is None else num_key_value_heads
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads, both at least 1, got {embed_dim} and {num_heads}"
            )
        if groups < 1 or num_heads % groups:
            raise ValueError(f"num_heads must be a multiple of num_key_value_heads, got {num_heads} and {groups}")
        if not (isinstance(pattern, Plan | tuple | nn.Module) or makes_plans(pattern)):
            raise no_pattern(pattern, "a pattern such as combiner.Fixed(), a Plan or a module")
        if isinstance(dropout, bool) or not isinstance(dropout, int | float):
            raise TypeError(f"dropout must be a number, got {type(dropout).__name__}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be between 0 and 1, got {dropout}")
        check_bool("batch_first", batch_first)
        check_bool("is_causal", is_causal)
        check_bool("sink", sink)
        check_bool("alibi", alibi)
        if sink and alibi:
            raise ValueError(
                "sink must be False where alibi is True: the sink has no distance, so that the query's part of the "
                "biases would not cancel"
            )
        self.embed_dim, self.num_heads, self.num_key_value_heads = embed_dim, num_heads, groups
        self.head_dim = embed_dim // num_heads
        self.pattern, self.dropout, self.batch_first, self.is_causal = pattern, dropout, batch_first, is_causal
        self._sizes = [heads * self.head_dim for heads in (num_heads, groups, groups)]
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj_weight = nn.Parameter(torch.empty(sum(self._sizes), embed_dim, **options))
        self.register_parameter(
            "in_proj_bias", nn.Parameter(torch.empty(sum(self._sizes), **options)) if bias else None
        )
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **options)
        self.softcap, self.alibi = as_softcap(softcap), alibi
        self.register_parameter("sink", nn.Parameter(torch.empty(num_heads, **options)) if sink else None)
        self._slopes = alibi_slopes(num_heads).tolist()
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
        self.select = None if select is None else as_integer("select", select, 0, bits=31)
        self.select_block = as_integer("select_block", select_block, 1)
        if select is not None and not isinstance(pattern, nn.Module):
            base: Any = self.pattern
            Selected(base, torch.zeros(1, dtype=torch.int64)).as_numpy()  # refuses what it does not take
        self.reset_parameters()

    @classmethod
    def from_mha(
        cls,
        mha: nn.MultiheadAttention,
        pattern: AnyPattern | nn.Module,
        *,
        is_causal: bool = False,
        abstraction: Pooling | Literal["deepsets"] | nn.Module | None = None,
        select: int | None = None,
        select_block: int = 64,
        softcap: float | None = None,
        sink: bool = False,
        alibi: bool = False,
    ) -> Self:
        """The module that takes the place of `mha`: its sizes, weights (copied), bias, dropout, `batch_first`, dtype,
        device, whether it is training and which weights are.

        Parameters
        ----------
        mha : for self-attention: without `kdim`, `vdim`, `add_bias_kv` and `add_zero_attn`.
        pattern, is_causal, abstraction, select, select_block, softcap, sink, alibi : as in the class.

        Raises
        ------
        TypeError : an object that is no `MultiheadAttention`, or a subclass that computes another function, such as a
            quantized one.
        ValueError : a `MultiheadAttention` with a feature that this class does not have, named.
        """
        _check_mha(mha)
        made = cls(
            mha.embed_dim,
            mha.num_heads,
            pattern,
            dropout=mha.dropout,
            bias=mha.in_proj_bias is not None,
            batch_first=mha.batch_first,
            is_causal=is_causal,
            abstraction=abstraction,
            select=select,
            select_block=select_block,
            softcap=softcap,
            sink=sink,
            alibi=alibi,
            device=mha.in_proj_weight.device,
            dtype=mha.in_proj_weight.dtype,
        )
        for ours, theirs in zip(_projections(made), _projections(mha), strict=True):
            if theirs is not None:
                ours.requires_grad_(theirs.requires_grad).data.copy_(theirs.data)
        return made.train(mha.training)

    def reset_parameters(self) -> None:
        """Initializes the projections as `MultiheadAttention` does, and sinks with zeros."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        if self.sink is not None:
            nn.init.zeros_(self.sink)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool | None = None,
        *,
        key_bias: Tensor | None = None,
        cu_seqlens: npt.ArrayLike | Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The output and, where `need_weights`, the effective attention.

        Parameters
        ----------
        query : `[B, L, E]`, `[L, B, E]` or `[L, E]`.
        key, value : the same shape; query and key by default.
        key_padding_mask : `[B, L]` or `[L]`, True for keys to leave out (the opposite of key_mask); or floating-point,
            -inf for keys to leave out and 0 for others.
        need_weights : whether to return the weights, which take O(L^2) and are without dropout.
        attn_mask : PyTorch's causal mask, as ``nn.Transformer.generate_square_subsequent_mask(L)`` makes it: `[L, L]`,
            or `[n, L, L]` of such, True or -inf for keys after the query and False or 0 for others. It makes the call
            causal; so does `is_causal`, without a mask. A mask that hides nothing is accepted. The O(L^2) values are
            read, except in compiled code where `is_causal` is True.
        average_attn_weights : whether to return the mean of the weights over the heads.
        is_causal : True makes the call causal. None and False, which PyTorch's layers pass, leave it to the module and
            `attn_mask`.
        key_bias : `[B, Hk, L]` or `[B, Hq, L]` in either order of the inputs' axes, or what broadcasts to that, such as
            `[H, L]`, of the dtype of lse: added to the logits of each key, as in `attention`. None where `alibi`.
        cu_seqlens : integers `[N + 1]`, the boundaries of packed sequences, as in `attention`.

        Returns
        -------
        output : the shape of query.
        weights : None, or `[B, L, L]`, or `[B, Hq, L, L]` if not averaged.

        Raises
        ------
        TypeError : an argument that is no tensor, or has a wrong dtype.
        ValueError : a wrong shape; a mask with other values; key and value of another sequence than query; nested
            tensors; `alibi` in a call that is not causal; packed sequences where the abstraction is learned. Compiled
            code raises RuntimeError for a mask with other values.
        """
        length = self._check_sequences(query, key, value)
        is_causal = self._is_causal(is_causal, attn_mask, length)
        key_mask = key_mask_of(key_padding_mask)
        q, k, v = self._project(query, key, value)
        pattern = self.pattern(k, key_mask) if isinstance(self.pattern, nn.Module) else self.pattern
        options: dict[str, Any] = {"is_causal": is_causal, "key_mask": key_mask, "cu_seqlens": cu_seqlens}
        options |= self._terms(q, key_bias, is_causal)
        if self.abstraction is not None:
            if cu_seqlens is not None:
                raise ValueError(
                    "cu_seqlens must be None where the abstraction is learned: its regions are of one plan"
                )
            regions = regions_of(pattern, q.shape[-2], is_causal)
            options["region_query"], options["region_key"] = self.abstraction(q, k, regions, key_mask)
        if self.select is not None:
            pattern = self._select(q, k, pattern, **options)
        dropout_p = self.dropout if self.training else 0.0
        output = self._merge_heads(attention(q, k, v, pattern, dropout_p=dropout_p, **options))
        if not need_weights:
            return output, None
        weights = attention_weights(q, k, pattern, **options)
        return output, weights.mean(-3) if average_attn_weights else weights

    def decoder(self) -> Decoder:
        """A `Decoder`: attention token by token with this module's weights, for generation."""
        return Decoder(self)

    def extra_repr(self) -> str:
        pattern = "" if isinstance(self.pattern, nn.Module) else f", {self.pattern!r}"
        more: dict[str, Any] = {
            "select": self.select,
            "select_block": None if self.select is None else self.select_block,
        }
        more |= {"softcap": self.softcap, "sink": self.sink is not None or None, "alibi": self.alibi or None}
        said = "".join(f", {name}={x}" for name, x in more.items() if x is not None)
        return f"{self.embed_dim}, {self.num_heads}{pattern}, is_causal={self.is_causal}{said}"

    def _check_sequences(self, query: Tensor, key: Tensor | None, value: Tensor | None) -> int:
        """L, once the three tensors are checked to be of one sequence."""
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x is None and name != "query":
                continue
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
            if x.is_nested:
                raise ValueError(
                    f"{name} must be a padded tensor, with key_padding_mask, got a nested one: where a "
                    "torch.nn.TransformerEncoder made that, set its use_nested_tensor to False"
                )
            if x.ndim not in (2, 3):
                raise ValueError(f"{name} must have shape (B, L, E), (L, B, E) or (L, E), got {tuple(x.shape)}")
            if x.shape != query.shape:
                raise ValueError(
                    f"{name} must have query's shape {tuple(query.shape)}, got {tuple(x.shape)}: {_NO_CROSS_ATTENTION}"
                )
        # PyTorch's decoder layers call their multihead_attn, which is cross-attention, with one tensor as key and
        # value.
        if value is key and not (key is None or key is query or isinstance(self.pattern, Dense)):
            raise ValueError(
                f"key and value must be of query's sequence, got one tensor as both: {_NO_CROSS_ATTENTION}"
            )
        return query.shape[1 if self.batch_first and query.ndim == 3 else 0]

    def _is_causal(self, hint: bool | None, attn_mask: Tensor | None, length: int) -> bool:
        """Whether a call is causal: where the module, the hint or the mask says so."""
        is_said = self.is_causal or bool(hint)
        return is_said if attn_mask is None else says_causal(attn_mask, length, bool(hint)) or is_said

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

    def _terms(self, query: Tensor, key_bias: Tensor | None, is_causal: bool, first: int = 0) -> dict[str, Any]:
        """The terms of the logit, of the dtype that lse has for this query, `[..., Hq, L, D]`; `first` is the position
        of its first row."""
        dtype = at_least_float32(query.dtype)
        if self.alibi:
            if key_bias is not None:
                raise ValueError(
                    "key_bias must be None where alibi is True: add combiner.alibi_bias to it, and make the module "
                    "with alibi=False"
                )
            if not is_causal:
                raise ValueError("is_causal must be True where alibi is: other queries would prefer later keys")
            slopes = torch.tensor(self._slopes, dtype=torch.float64)
            key_bias = (slopes[:, None] * torch.arange(first, first + query.shape[-2])).to(dtype)
        return {
            "softcap": self.softcap,
            "key_bias": key_bias,
            "sink": None if self.sink is None else self.sink.to(dtype),
        }

    def _select(
        self,
        query: Tensor,
        key: Tensor,
        pattern: Any,
        *,
        is_causal: bool,
        key_mask: Tensor | None,
        cu_seqlens: Any,
        region_key: Tensor | None = None,
        **terms: Any,
    ) -> Selected:
        """The pattern with the regions opened that score highest."""
        block, count = self.select_block, self.select or 0
        options: dict[str, Any] = {"is_causal": is_causal, "key_mask": key_mask, "cu_seqlens": cu_seqlens}
        regions = select_regions(query, key, pattern, count, block=block, region_key=region_key, **options)
        return Selected(pattern, regions, block=block)

    def _merge_heads(self, out: Tensor) -> Tensor:
        rows = out.transpose(-3, -2).flatten(-2)
        if not self.batch_first and rows.ndim == 3:
            rows = rows.transpose(0, 1)
        return self.out_proj(rows)


_NO_CROSS_ATTENTION = (
    "there is no cross-attention, because summaries are of positions that have a query, a key and a value each; leave "
    "a torch.nn.MultiheadAttention there"
)


def _projections(attention: CombinerAttention | nn.MultiheadAttention) -> list[Any]:
    """The parameters that both classes have."""
    return [attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight, attention.out_proj.bias]


def _check_mha(mha: nn.MultiheadAttention) -> None:
    """Refuses a module with features that `CombinerAttention` does not have."""
    if not isinstance(mha, nn.MultiheadAttention) or type(mha).forward is not nn.MultiheadAttention.forward:
        raise TypeError(f"mha must be a torch.nn.MultiheadAttention, got {type(mha).__module__}.{type(mha).__name__}")
    if not mha._qkv_same_embed_dim:
        raise ValueError(
            f"mha must have kdim and vdim of embed_dim, {mha.embed_dim}, got {mha.kdim} and {mha.vdim}: "
            f"{_NO_CROSS_ATTENTION}"
        )
    if mha.bias_k is not None or mha.bias_v is not None:
        raise ValueError("mha must have add_bias_kv=False, got True: its bias is a key that has no position")
    if mha.add_zero_attn:
        raise ValueError("mha must have add_zero_attn=False, got True: its zeros are a key that has no position")


class Decoder:
    """`combiner.Decoder` with a module's weights: causal attention token by token, the same rows as the module's
    output.

    There is no dropout and there are no gradients. Each call reads the module's weights as they are then; only the
    sinks are copied when the decoder is made. A module that is not causal, or has a learned abstraction, a module for a
    pattern or a `select_block` other than 1, is a ValueError. A module that selects has all keys and values kept.

    Parameters
    ----------
    attention : a causal module with a pattern that `combiner.Decoder` takes.

    Notes
    -----
    The cost is that of `combiner.Decoder`, and O(E^2) for each token's projections.
    """

    def __init__(self, attention: CombinerAttention) -> None:
        if not attention.is_causal:
            raise ValueError("attention must be made with is_causal=True")
        if attention.abstraction is not None or isinstance(attention.pattern, nn.Module):
            raise ValueError(
                "attention must have a pattern of its own and abstraction None: others see all of the past"
            )
        if attention.select is not None and attention.select_block != 1:
            raise ValueError(
                f"attention must have select_block=1: each step chooses for itself, got {attention.select_block}"
            )
        sink = None if attention.sink is None else attention.sink.detach()
        sink = None if sink is None else as_array(sink.to(at_least_float32(sink.dtype)))
        self._attention = attention
        self._decoder = decode.Decoder(attention.pattern, softcap=attention.softcap, sink=sink, select=attention.select)

    @property
    def length(self) -> int:
        """The number of tokens so far."""
        return self._decoder.length

    @property
    def nbytes(self) -> int:
        """The bytes of the caches."""
        return self._decoder.nbytes

    @property
    def pattern(self) -> Factorization | Sparse:
        """The module's pattern."""
        return self._decoder.pattern

    @torch.no_grad()
    def prefill(self, x: Tensor) -> Tensor:
        """The module's output for the first tokens, any number of them: x `[B, n, E]`, `[n, B, E]` or `[n, E]`."""
        return self._run(self._decoder.prefill, x)

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """The module's output for the next tokens, one or more, with shapes as in `prefill`."""
        return self._run(self._decoder.step, x)

    def reset(self) -> None:
        """Forget all tokens."""
        self._decoder.reset()

    def __repr__(self) -> str:
        return f"<Decoder({self.pattern!r}) of length {self.length}>"

    def _run(self, method: Callable[..., Array], x: Tensor) -> Tensor:
        query, key, value = self._attention._project(x, None, None)
        bias = self._attention._terms(query, None, True, self.length)["key_bias"]
        out = method(*map(as_array, (query, key, value)), key_bias=as_array(bias))
        return self._attention._merge_heads(as_tensor(out))


class OnlineRouting(nn.Module):
    """A pattern for `CombinerAttention`: `Routing` by centroids that follow the keys in training.

    The centroids, a set of unit vectors for each key head, are a buffer: they begin at random, have no gradients, and
    move with every training batch as the Routing Transformer's do (Roy et al., TACL 2021). A position's cluster depends
    on its own key alone, so that causal attention stays causal.

    Parameters
    ----------
    clusters : the number of clusters.
    num_key_value_heads, head_dim : Hk and D of the attention.
    decay : of the centroids, as in `combiner.update_centroids`.
    pooling, size_bias : as in `combiner.Routing`.
    device, dtype : of the centroids.
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
        """The `Routing` of key's clusters, `[..., Hk, L, D]`. In training, unmasked keys then move the centroids."""
        x = key.detach().to(self.centroids.dtype)
        clusters = assign_clusters(x, self.centroids.expand(*x.shape[:-3], -1, -1, -1))
        if self.training:
            if key_mask is not None:
                x = x.masked_fill(~key_mask[..., None, :, None], 0)  # rows of zeros move no centroid
            rows, ids = x.movedim(-3, 0).flatten(1, -2), clusters.movedim(-2, 0).flatten(1)
            self.centroids.copy_(update_centroids(self.centroids, rows, ids, decay=self.decay))
        return Routing(clusters, self.pooling, self.size_bias)

    def extra_repr(self) -> str:
        return f"{self.centroids.shape[1]}, decay={self.decay}, pooling={self.pooling!r}, size_bias={self.size_bias}"
