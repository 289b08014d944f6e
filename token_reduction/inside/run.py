"""A decoder's layers under a policy: prefill that sheds rows, a cache per layer that stays sane, decoding on top of it.

    rows alive      0 1 2 3 4 5 6 7      layer 0   cache of 8 rows
    after layer 1   0 1 . 3 . 5 6 7      layer 2   cache of 6 rows: what left has no keys from here on
    decode          8 at its own position, each layer against its own cache

The next position is that of the full prompt. `Block` is all that is asked of a layer, so any decoder fits, whatever computes
its attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Protocol

import torch
from torch import Tensor

from token_reduction.inside.forms import Form
from token_reduction.inside.policy import LayerPolicy
from token_reduction.inside.probe import Probe
from token_reduction.inside.view import TEXT, VISUAL, Decision, Prompt, View

SCORES_AT_ONCE = 1 << 24
"""Attention scores that are held at a time."""


class Block(Protocol):
    """One decoder layer in two halves."""

    def project(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden (n, D), positions (P, n) -> rotated q (n, H, d), rotated k (n, Hk, d), v (n, Hk, d)."""
        ...

    def finish(self, hidden: Tensor, mixed: Tensor, share: Tensor) -> Tensor:
        """Residuals, output projection and feed-forward: hidden (n, D), mixed (n, H, d) -> (n, D).

        share: (n,) of the feed-forward's width that a row uses, its first units; 1 everywhere in the ordinary form.
        """
        ...


@dataclass(eq=False)
class LayerCache:
    """Keys and values (n, Hk, d) of one layer and the prompt rows they belong to (new rows count on)."""

    k: Tensor
    v: Tensor
    rows: Tensor


@dataclass(eq=False)
class Prefill:
    """What a prefill leaves behind.

    Attributes:
        hidden: (n, D) of the rows that reached the end; rows: (n,) which.
        caches: one per layer. alive: for each layer the rows that entered it.
        prompt: as given. next_position: (P, 1) of the next token, as in the unreduced prompt.
    """

    hidden: Tensor
    rows: Tensor
    caches: list[LayerCache]
    alive: list[Tensor]
    prompt: Prompt
    next_position: Tensor
    kinds: Tensor
    decisions: dict[int, Decision] = field(default_factory=dict)


@torch.no_grad()
def prefill(
    blocks: Sequence[Block], prompt: Prompt, policy: LayerPolicy | None = None, form: Form | None = None
) -> Prefill:
    """Run the prompt through all layers; rows leave as the policy says, and take the form's way.

    Attention is computed here in plain torch; `Probe` needs its q, k and lse only.
    """
    policy, form = policy or LayerPolicy(), form or Form()
    beyond = [layer for layer in policy.acts_after if not 0 <= layer < len(blocks)]
    if beyond:
        raise ValueError(
            f"the policy {policy.name} acts after layers {beyond}, and the model has layers 0 to {len(blocks) - 1}; "
            "give it layers of this model"
        )
    device = prompt.hidden.device
    alive, hidden = torch.arange(prompt.hidden.shape[0], device=device), prompt.hidden
    after = prompt.positions.amax(1, keepdim=True).amax(0, keepdim=True).expand(prompt.positions.shape[0], 1) + 1
    result = Prefill(hidden, alive, [], [], prompt, after, prompt.kinds.clone())
    notes: dict[str, Tensor] = {}
    planes = prompt.planes
    for layer, block in enumerate(blocks):
        hidden, cache, lse, q, asked = _layer(block, layer, prompt, alive, hidden, form)
        if planes is not None and layer < planes.shape[1]:
            hidden = hidden.clone()
            hidden[prompt.kinds[alive] == VISUAL] += planes[:, layer].to(hidden)
        result.alive.append(alive)
        result.caches.append(cache)
        here, probe = _at(hidden, alive, cache.rows), Probe(q, cache.k, lse, asked, cache.rows)
        ahead = _ahead(blocks, layer, prompt, cache.rows, here)
        view = View(layer, len(blocks), prompt, cache.rows, here, probe, cache.v, notes, ahead)
        decision = policy.after(view)
        if decision is not None:
            notes |= decision.notes
            result.decisions[layer] = decision
            planes = _planes(planes, prompt, view, alive, decision)
            alive, hidden = _shed(view, alive, hidden, decision)
    result.hidden, result.rows = hidden, alive
    return result


def _ahead(
    blocks: Sequence[Block], layer: int, prompt: Prompt, rows: Tensor, hidden: Tensor
) -> Callable[[], Probe] | None:
    if layer + 1 == len(blocks):
        return None

    def probe() -> Probe:
        q, k, _ = blocks[layer + 1].project(hidden, prompt.positions[:, rows])
        return Probe.of(q, k, rows)

    return probe


def _planes(planes: Tensor | None, prompt: Prompt, view: View, alive: Tensor, decision: Decision) -> Tensor | None:
    """Planes (v, layers, D) of the visual rows that go on."""
    if planes is None or decision.keep is None:
        return planes
    visual = alive[prompt.kinds[alive] == VISUAL]
    seen = torch.searchsorted(visual, view.alive[view.visual])
    planes, stays = planes.clone(), torch.ones_like(visual, dtype=torch.bool)
    if decision.matrix is not None:
        planes[seen[decision.keep]] = torch.einsum("mv,vld->mld", decision.matrix.to(planes.dtype), planes[seen])
    stays[seen] = False
    stays[seen[decision.keep]] = True
    return planes[stays]


def _at(hidden: Tensor, alive: Tensor, rows: Tensor) -> Tensor:
    return hidden[torch.searchsorted(alive, rows)]


def _layer(
    block: Block, layer: int, prompt: Prompt, alive: Tensor, hidden: Tensor, form: Form
) -> tuple[Tensor, LayerCache, Tensor, Tensor, Tensor]:
    """Hidden after the layer, its cache, lse, queries and the rows that asked."""
    visual = prompt.kinds[alive] == VISUAL
    given = form.given(layer, prompt)
    if given is not None:
        place = torch.cumsum((prompt.kinds == VISUAL).long(), 0) - 1
        hidden = torch.where(visual[:, None], given[place[alive].clamp_min(0)].to(hidden), hidden)
    passing = form.passing(layer, prompt, alive, hidden)
    through = torch.ones_like(visual) if passing is None else ~passing
    asks = through if given is None else through & ~visual
    rows, x = alive[through], hidden[through]
    q, k, v = block.project(x, prompt.positions[:, rows])
    ask = asks[through]
    allowed = form.mask(layer, prompt, rows[ask], rows, rows[ask][:, None] >= rows)
    mixed, lse = attend(q[ask], k, v, allowed, _cut(form, layer, q.shape[1], visual[through]), visual[through][ask])
    share = torch.where(visual[asks], form.ffn_share(layer), 1.0)
    out = hidden.clone()
    out[asks] = block.finish(hidden[asks], mixed, share)
    return out, LayerCache(k, v, rows), lse, q[ask], rows[ask]


def _cut(form: Form, layer: int, heads: int, visual: Tensor) -> Tensor | None:
    """(H, k) bool: what a head may not read after the softmax."""
    cut = form.cut_heads(layer, heads)
    return None if cut is None else cut.to(visual.device)[:, None] & visual


def attend(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, cut: Tensor | None = None, silent: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention (q, H, d) and its lse (H, q). cut: (H, k) columns zeroed after the softmax, without renormalising; the rows
    `silent` (q,) of heads with cut columns write nothing. Scores are made for some rows at a time."""
    each = max(1, SCORES_AT_ONCE // max(1, q.shape[1] * len(k)))
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
    runs = zip(q.split(each), allowed.split(each), repeat(None) if silent is None else silent.split(each))
    mixed, lse = zip(*(_attend(rows, k, v, pairs, cut, mute) for rows, pairs, mute in runs))
    return torch.cat(mixed), torch.cat(lse, 1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, cut: Tensor | None, silent: Tensor | None
) -> tuple[Tensor, Tensor]:
    logits = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    logits = logits.masked_fill(~allowed, -torch.inf)
    lse = logits.logsumexp(-1)
    weight = torch.exp(logits - lse[..., None])
    if cut is not None:
        weight = weight.masked_fill(cut[:, None], 0.0)
        weight = weight.masked_fill(cut.any(1)[:, None, None] & silent[None, :, None], 0.0)
    return torch.einsum("hqk,khd->qhd", weight, v), lse


def _shed(view: View, alive: Tensor, hidden: Tensor, decision: Decision) -> tuple[Tensor, Tensor]:
    """Rows and hidden states that go on."""
    if decision.keep is None:
        return alive, hidden
    visual = view.alive[view.visual]
    at = torch.searchsorted(alive, visual)
    hidden = hidden.clone()
    if decision.matrix is not None:
        hidden[at[decision.keep]] = (decision.matrix.to(hidden.dtype) @ hidden[at]).to(hidden.dtype)
    stays = torch.ones_like(alive, dtype=torch.bool)
    stays[at] = False
    stays[at[decision.keep]] = True
    return alive[stays], hidden[stays]


@torch.no_grad()
def decode(blocks: Sequence[Block], state: Prefill, hidden: Tensor, form: Form | None = None) -> Tensor:
    """One new text row (1, D) at `state.next_position` through all layers; the caches grow by it. Returns (1, D)."""
    form = form or Form()
    row = torch.tensor([len(state.kinds)], device=hidden.device)
    state.kinds = torch.cat([state.kinds, state.kinds.new_tensor([TEXT])])
    for layer, (block, cache) in enumerate(zip(blocks, state.caches, strict=True)):
        q, k, v = block.project(hidden, state.next_position)
        cache.k, cache.v, cache.rows = torch.cat([cache.k, k]), torch.cat([cache.v, v]), torch.cat([cache.rows, row])
        visual = state.kinds[cache.rows] == VISUAL
        allowed = torch.ones(1, len(cache.rows), dtype=torch.bool, device=hidden.device)
        mixed, _ = attend(q, cache.k, cache.v, allowed, _cut(form, layer, q.shape[1], visual), visual[-1:])
        hidden = block.finish(hidden, mixed, hidden.new_ones(1))
    state.next_position = state.next_position + 1
    return hidden
