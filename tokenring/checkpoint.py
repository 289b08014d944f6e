"""Activation checkpointing that keeps what attention gave: the recomputed block sends nothing.

A checkpointed block runs again in the backward pass, and so would its attention: every transfer a second time. With
`save_attention` the block keeps (out, lse) of each attention, (Dv + 1 or 2) numbers a row and head, and recomputes the rest.

    checkpoint(block, x, use_reentrant=False)                                # every transfer of the forward twice
    checkpoint(block, x, use_reentrant=False, context_fn=save_attention)     # once
"""

from __future__ import annotations

from typing import Any

import torch

from tokenring import operators


def save_attention() -> tuple[Any, Any]:
    """For `context_fn` of `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`: attention is kept, the rest recomputed.

    It sees attention over process groups, meshes and one rank. Over a LocalGroup, which has no name, attention is recomputed
    like everything else.

    >>> from torch.utils.checkpoint import checkpoint
    >>> from tokenring import attention
    >>> x = torch.randn(1, 6, 2, 8, requires_grad=True)
    >>> checkpoint(lambda x: attention(x, x, x).sin(), x, use_reentrant=False, context_fn=save_attention).shape
    torch.Size([1, 6, 2, 8])
    """
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    return create_selective_checkpoint_contexts(attention_operators())


def attention_operators() -> list[Any]:
    """The operators that a checkpoint policy of your own must save: `if op in attention_operators(): return MUST_SAVE`.

    >>> attention_operators()
    [<OpOverload(op='tokenring.attention', overload='default')>]
    """
    assert operators.attention is not None
    return [torch.ops.tokenring.attention.default]
