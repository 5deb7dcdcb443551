"""Our attention function: transformers' layer in, one call of `lcpatch_kernels.block_sparse` out.

It knows no method by name. The module's `LayerState` says which keys a row may see; the mask says where the real tokens
are; what stays dense goes to the implementation that the model had before.
"""

from __future__ import annotations

import sys
import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lcpatch_kernels import BlockSparseSpec

from .bounds import from_cu_seq_lens, from_positions, is_compact, split
from .layers import state_of
from .mask import expand, knows_no_documents, padding_of
from .sinks import merge_sinks, sink_scores
from .state import LayerState, dense_name, own_spec
from .watch import Call, ask, attend, take_layer

SHARD = "lcpatch_shard"
"""The keyword argument of a parallelized model's forward that says which tokens this rank holds."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer under its pattern, in the signature of transformers' `AttentionInterface`.

    Args:
        query: [B, H, T, D], rotated.
        key, value: [B, K, S, D], rotated, with the cache's part in front, not repeated for GQA.
        attention_mask: what our mask function returned: a compact mask, None, or another layer kind's own mask.
        scaling, dropout, softcap, s_aux: as transformers passes them; `s_aux` are per-head sink logits.
        position_ids: [1 or B, T]; restarts mark packed documents.
        cu_seq_lens_q: int32 [N + 1], the packed documents of a flattened row.

    Returns:
        `(out [B, T, H, D], None)`; contiguous, as transformers' own are: some models take a view of it.

    Raises:
        ValueError: dropout, a 4-D mask or a bias on a sparse layer; a pattern that needs the whole sequence at once
            given part of it.
    """
    state = state_of(module)
    shard = kwargs.pop(SHARD, None)
    if state is not None and state.parallel is not None:
        _refuse(module, state, None, dropout, {**kwargs, "sliding_window": None})
        out, lse = _over_ranks(module, state, query, key, value, scaling, softcap, shard)
        sinks = sink_scores(module, query, scaling, softcap, s_aux)
        return merge_sinks(module, out, lse, sinks).transpose(1, 2).contiguous(), None
    if shard is not None:
        raise ValueError(f"{SHARD} was given to a model that is not parallelized: its ranks would not see each other")
    spec = None if state is None else state.active_spec(module)
    layer = None if state is None else take_layer(state)
    if spec is None and layer is not None and layer.wants_dense(query):
        spec = state.own
    untouched = layer is None and state is not None and state.routed  # also where packed documents see each other
    bounds = None if untouched else _packed(query, key, attention_mask, position_ids, cu_seq_lens_q)
    if spec is None and (bounds is None or _isolates(state, module, attention_mask, cu_seq_lens_q)):
        passed_on = {"position_ids": position_ids, "cu_seq_lens_q": cu_seq_lens_q, **kwargs}
        options = {"scaling": scaling, "dropout": dropout, "softcap": softcap, "s_aux": s_aux, **passed_on}
        return _dense(module, query, key, value, attention_mask, state, options)
    if spec is None:  # packed rows that the dense implementation would let see each other
        window = kwargs.pop("sliding_window", None)
        spec = own_spec(query.shape[1], window) if state is None else state.own
        attention_mask = attention_mask if window is None else None  # the rule says the window, the bounds the padding
    _refuse(module, state, attention_mask, dropout, kwargs)
    if bounds is None and is_compact(attention_mask):
        bounds, _ = split(attention_mask)
    if state is not None:
        packed = bounds is not None and bounds.shape[1] > 1
        _check_length(state, spec, query.shape[2], key.shape[2], packed)
    if layer is not None:  # under autocast caches hold half-precision keys, rotary embeddings leave queries in fp32
        query = query.to(key.dtype)
    sinks = sink_scores(module, query, scaling, softcap, s_aux)
    call = Call(query, key, value, spec, bounds, scaling, softcap, "auto" if state is None else state.impl)
    if layer is not None and sinks is not None:
        call = call._replace(sinks=sinks.detach().logsumexp(-1))
    out, lse = attend(call) if layer is None else ask(layer, call)
    return merge_sinks(module, out, lse, sinks).transpose(1, 2).contiguous(), None


def _over_ranks(
    module: nn.Module,
    state: LayerState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    softcap: float | None,
    shard: Any,
) -> tuple[Tensor, Tensor]:
    """The layer's attention over all ranks' tokens. Masks say nothing here: the shard knows padding and packing.

    Keys come without a past, or with that of the chunks before, which the shard then knows of.
    """
    if query.shape[2] != key.shape[2] and not getattr(shard, "has_past", False):
        raise ValueError("a parallelized model takes no cache; leave its context before generating")
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    spec = state.active_spec(module) or state.own
    call = Call(query, key, value, spec, None, scaling, softcap, state.impl)
    return state.parallel.attend(module.layer_idx, call, shard)


def _packed(
    query: Tensor, key: Tensor, mask: Any, position_ids: Tensor | None, cu_seq_lens: Tensor | None
) -> Tensor | None:
    """Bounds of packed documents that the mask does not tell of; None where there are none."""
    if query.shape[2] == 1 or query.shape[2] != key.shape[2]:
        return None
    if cu_seq_lens is not None and query.shape[0] == 1:
        return from_cu_seq_lens(cu_seq_lens)
    if position_ids is None or position_ids.dim() != 2:
        return None
    if knows_no_documents(mask):
        mask = padding_of(mask)
    if not (mask is None or is_compact(mask)):
        return None
    if mask is not None and split(mask)[0].shape[1] > 1:
        return None  # it tells of them already
    return from_positions(position_ids, mask, query.shape[0])


def _isolates(state: LayerState | None, module: nn.Module, mask: Any, cu_seq_lens: Tensor | None) -> bool:
    """Whether the dense implementation keeps packed documents apart itself: flash attention does, by `cu_seq_lens`."""
    return cu_seq_lens is not None and "flash" in _dense_of(state, module)


def _dense_of(state: LayerState | None, module: nn.Module) -> str:
    return dense_name(getattr(module, "config", None)) if state is None else state.dense


def _dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    state: LayerState | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Exactly what the layer did before it was patched."""
    name = _dense_of(state, module)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    if is_compact(mask):
        mask = expand(mask, name, query.shape[2], key.shape[2], query.dtype, module.config)
    given = {k: v for k, v in options.items() if v is not None or k == "scaling"}
    return function(module, query, key, value, mask, **given)


def _refuse(module: nn.Module, state: LayerState | None, mask: Any, dropout: float, kwargs: dict[str, Any]) -> None:
    """Nothing that the op cannot do is dropped in silence."""
    what = f"layer {getattr(module, 'layer_idx', '?')} ({(state and state.method) or 'packed documents'})"
    if dropout:
        raise ValueError(
            f"{what}: attention dropout {dropout} is not supported under a pattern; set attention_dropout to 0 in the "
            "config and on the attention modules, or lcpatch.remove(model)"
        )
    if mask is not None and not is_compact(mask):
        raise ValueError(
            f"{what}: a {type(mask).__name__} mask of shape {list(getattr(mask, 'shape', []))} cannot be combined with "
            "a pattern; pass a 2-D attention_mask [batch, tokens] (1 = token, 0 = pad), or position_ids that restart"
        )
    for name in ("position_bias", "head_mask", "cache"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{what}: {name} is not supported under a pattern; lcpatch.remove(model) to use it")
    if kwargs.get("sliding_window") is not None:
        raise ValueError(
            f"{what} has a sliding window of its own, {kwargs['sliding_window']}; patch full-attention layers"
        )
    if kwargs.get("output_attentions") and not torch.compiler.is_compiling():
        _warn("output_attentions=True: no weights are returned, a pattern's kernel never holds them")


def _check_length(state: LayerState, spec: BlockSparseSpec, num_queries: int, num_keys: int, packed: bool) -> None:
    if spec is state.spec and state.follows_length and num_queries != num_keys:
        raise ValueError(
            f"{state.method}: a group_ratio is a share of the whole sequence, but {num_queries} queries came with "
            f"{num_keys} keys; give a fixed group_size, as in lcpatch.apply(model, {state.method!r}, group_size=1024)"
        )
    if torch.compiler.is_compiling() or state.max_positions is None or num_keys <= state.max_positions:
        return
    if packed:  # positions restart in every document, so the row's length says nothing
        return
    _warn(
        f"the sequence is longer than the {state.max_positions} positions this model was trained for; without RoPE "
        "scaling (config.rope_parameters) its quality collapses there, patched or not"
    )


@lru_cache(maxsize=64)
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)
