"""The language-model loss of a sequence that is spread over ranks.

    loss = (1 / n) sum over ranks, rows of -log softmax(logits)[label],   n = labels that are not ignored, over all ranks

Every rank gets the same value. Its gradient is that of this rank's own terms, so parameter gradients are to be *summed* over the
group (a mean over ranks of unlike length would weigh tokens unlike).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenring.transport import connect


def cross_entropy(logits: Tensor, labels: Tensor, group: Any = None, ignore_index: int = -100) -> Tensor:
    """Mean cross-entropy over the global token count. Collective.

    Args:
        logits: (B, S_local, V), this rank's rows.
        labels: int64 (B, S_local), already shifted: `layout.shard_labels(labels, rank)`.
        group: ProcessGroup, 1-D DeviceMesh, LocalGroup, or None.
        ignore_index: labels that count for nothing.

    Returns:
        A scalar, float32 (float64 for float64); 0 where no rank has a label that counts.

    >>> cross_entropy(torch.zeros(1, 2, 4), torch.tensor([[1, -100]]))
    tensor(1.3863)
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} must be (batch, rows, vocabulary) and (batch, rows)"
        )
    runtime = connect(group)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    own = torch.nn.functional.cross_entropy(
        wide.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction="sum"
    )
    counted = (labels != ignore_index).sum().to(torch.float64)
    parts = runtime.all_gather(torch.stack([own.detach().double(), counted])[None], same_shape=True, control=True)
    total, count = torch.cat(parts).sum(dim=0).unbind()
    share = own / count.clamp_min(1).to(own.dtype)
    return share + ((total / count.clamp_min(1)).to(own.dtype) - share.detach())
