"""What the pipeline asks of a video language model: one protocol for the demo and for every Hugging Face family.

    plan   = adapter.visual_plan(frames, height, width)           # once for the whole video: sizes and token grid
    tokens = adapter.prepare(run, plan, first=first)              # any run of frames, on any rank -> VisualTokens
    prompt = adapter.prompt("What happens?", plan, seconds)       # ids, -1 where a visual row goes, and positions
    short  = prompt.keep(kept)                                    # the same prompt with only these visual rows
    hidden = adapter.forward(splice(adapter, short.input_ids, x[kept]), short.positions)
    first_logits = adapter.logits(hidden[:, -1])                  # the next token goes to position prompt.next_position

Every row keeps the position it has in the unreduced prompt; nothing is renumbered.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from token_reduction import VisualTokens

if TYPE_CHECKING:
    from launch.models.expert_block import ExpertBlock, ExpertLayer

VISUAL = -1  # in Prompt.input_ids: a visual row goes here
NEWLINE = -2  # in Prompt.input_ids: a row the model learned for "end of video" and that no token id stands for


@dataclass(frozen=True, kw_only=True)
class VisualPlan:
    """How one whole video becomes visual tokens.

    >>> plan = VisualPlan(frames=5, frames_per_group=2, height=56, width=84, grid=(3, 2, 3))
    >>> plan.tokens, plan.tokens_per_group
    (18, 6)
    """

    frames: int
    """Frames of the video, before the last group is filled up."""
    frames_per_group: int
    """Frames that make one temporal position; runs of frames are cut at multiples of it."""
    height: int
    """Pixels a frame is resized to."""
    width: int
    grid: tuple[int, int, int]
    """(T, h, w): visual tokens after the model's own merging."""

    @property
    def tokens_per_group(self) -> int:
        """h * w."""
        return self.grid[1] * self.grid[2]

    @property
    def tokens(self) -> int:
        """T * h * w."""
        return self.grid[0] * self.tokens_per_group


@dataclass(frozen=True)
class Prompt:
    """A prompt with its positions.

    >>> prompt = Prompt(torch.tensor([7, -1, -1, -1, 8]), torch.arange(5)[None], 5)
    >>> short = prompt.keep(torch.tensor([0, 2]))
    >>> short.input_ids.tolist(), short.positions.tolist(), short.next_position
    ([7, -1, -1, 8], [[0, 1, 3, 4]], 5)
    """

    input_ids: Tensor
    """int64 (L,): token ids; -1 at each visual slot; -2 where the adapter puts its own learned row."""
    positions: Tensor
    """int64 (P, L): what each row's RoPE uses; P is 1, or 3 for M-RoPE (time, height, width)."""
    next_position: int
    """Position (on every axis) of the first generated token; the next one follows at + 1."""

    @property
    def visual_slots(self) -> Tensor:
        """int64 (N,): rows of the prompt that take visual row 0, 1, 2, ... of the video."""
        return (self.input_ids == VISUAL).nonzero().flatten()

    def keep(self, kept: Tensor) -> Prompt:
        """The prompt with only the visual rows `kept` (int64, ascending, counted over the whole video) and all its text."""
        slots = self.visual_slots
        if kept.numel() and (kept.min() < 0 or kept.max() >= slots.numel() or (kept.diff() <= 0).any()):
            raise ValueError(f"kept rows must ascend within 0 to {slots.numel() - 1}, the visual rows of the prompt")
        stays = self.input_ids != VISUAL
        stays[slots[kept]] = True
        return Prompt(self.input_ids[stays], self.positions[:, stays], self.next_position)


class Adapter(Protocol):
    """A video language model as the pipeline sees it. All methods run without gradients, batch 1."""

    name: str
    context_length: int
    """Positions the language model was trained for."""
    hidden_size: int
    position_axes: int
    """1, or 3 for M-RoPE."""
    planes: int
    """Extra planes per visual row (DeepStack layers); 0 where there are none."""
    channels: frozenset[str]
    """Optional channels that `prepare` can give to reducers."""
    notes: tuple[str, ...]
    """Sentences that every output about this model must carry."""
    eos_ids: frozenset[int]
    text_model: nn.Module
    """The transformers text model: what `sequence_parallel` is given."""

    def visual_plan(self, frames: int, height: int, width: int) -> VisualPlan:
        """Sizes and grid for a video of so many frames; ValueError where the model cannot take it."""

    def prepare(self, frames: Tensor, plan: VisualPlan, first: int = 0, channels: Collection[str] = ()) -> VisualTokens:
        """Encode frames first, first + 1, ... of the video.

        Args:
            frames: uint8 (F, H, W, 3). F is a multiple of plan.frames_per_group, or the run ends the video; then the last
                group is filled up by repeating the last frame, as the families do. F may be 0.
            plan: of the whole video.
            first: number of the first frame in the video, a multiple of plan.frames_per_group.
            channels: which of `self.channels` to add.

        Returns:
            VisualTokens of one item: x (N, hidden) as the language model embeds them; positions (1, N) row number in the
            whole video; `planes` (N, planes, hidden) where the model has any, always; and the channels asked for. The
            same numbers to the last bit however the video is cut into runs: groups are encoded one at a time.
        """

    def prompt(self, text: str, plan: VisualPlan, seconds: Sequence[float]) -> Prompt:
        """The whole, unreduced prompt around the video and `text`; `seconds` is the time of each of the plan's frames."""

    def embed(self, ids: Tensor) -> Tensor:
        """(n,) ids of a prompt, or generated ones, other than -1 -> (n, hidden)."""

    def forward(
        self,
        embeds: Tensor,
        positions: Tensor,
        cache: Any = None,
        planes: Tensor | None = None,
        visual_rows: Tensor | None = None,
    ) -> Tensor:
        """Rows (1, S, hidden) at positions (P, S) -> hidden states (1, S, hidden) after the last norm.

        Args:
            cache: a transformers Cache, or None.
            planes: (V, planes, hidden) of the visual rows among these, where the model has planes; not for later tokens.
            visual_rows: int64 (V,), ascending: which of the S rows are visual.
        """

    def alone(self) -> AbstractContextManager[None]:
        """Inside, `forward` talks to no other rank and computes what the model is defined to compute."""

    def spread_experts(self, block: ExpertBlock, keep_whole: bool) -> Sequence[ExpertLayer]:
        """Collective: leave this rank with its own experts of every layer; gives these layers, none where a model has none.

        Args:
            block: sizes and groups.
            keep_whole: whether `alone` will be used here.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., hidden) -> (..., vocabulary), float32 (float64 for a float64 model)."""

    def decode(self, ids: Sequence[int]) -> str:
        """Generated ids as text, special tokens left out."""


def splice(adapter: Adapter, ids: Tensor, x: Tensor) -> Tensor:
    """Rows of a prompt (1, n, hidden): text from the embedding table, the visual rows `x` in order where ids are -1."""
    visual = ids == VISUAL
    if int(visual.sum()) != x.shape[0]:
        raise ValueError(
            f"the prompt's rows have {int(visual.sum())} visual slots and {x.shape[0]} visual rows were given"
        )
    rows = torch.empty(ids.numel(), x.shape[1], dtype=x.dtype, device=x.device)
    rows[visual.to(x.device)] = x
    text = adapter.embed(ids[~visual])
    rows[~visual.to(x.device)] = text.to(x.dtype)
    return rows[None]


def check_run(plan: VisualPlan, frames: int, first: int, asked: Collection[str], known: frozenset[str]) -> None:
    """Refuse a run of frames, or a channel, that `prepare` cannot take."""
    if first % plan.frames_per_group or first < 0 or first + frames > plan.frames:
        raise ValueError(
            f"frames {first} to {first + frames - 1}: a run starts at a multiple of {plan.frames_per_group} and ends "
            f"within the video's {plan.frames} frames"
        )
    if frames % plan.frames_per_group and first + frames != plan.frames:
        raise ValueError(
            f"{frames} frames from {first}: only the last run may be no multiple of {plan.frames_per_group} frames"
        )
    unknown = sorted(set(asked) - known)
    if unknown:
        raise ValueError(
            f"this model gives no {unknown[0]}; it gives {', '.join(sorted(known)) or 'no optional channel'}: choose a reducer "
            "that does without"
        )


class TextSide:
    """Embedding, forward, logits and decoding for any transformers text model: the half that all adapters share."""

    def __init__(self, text_model: nn.Module, head: nn.Module, tokenizer: Any, eos: Any, position_axes: int) -> None:
        self.text_model, self.head, self.tokenizer = text_model, head, tokenizer
        self.position_axes = position_axes
        self.planes = 0
        self.layers: list[Any] = []
        """Layers with experts, once they are spread."""
        self.hidden_size = int(text_model.config.hidden_size)
        self.context_length = int(text_model.config.max_position_embeddings)
        ends = [eos] if isinstance(eos, int) else list(eos or ())
        self.eos_ids = frozenset(int(i) for i in [*ends, tokenizer.eos_token_id] if i is not None)
        self.table = text_model.get_input_embeddings().weight.detach()

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """See Adapter."""
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.table.shape[0]):
            raise ValueError(f"ids must lie within 0 to {self.table.shape[0] - 1}; visual rows have no embedding")
        return self.text_model.get_input_embeddings()(ids.to(self.table.device))

    @torch.no_grad()
    def forward(
        self,
        embeds: Tensor,
        positions: Tensor,
        cache: Any = None,
        planes: Tensor | None = None,
        visual_rows: Tensor | None = None,
    ) -> Tensor:
        """See Adapter."""
        if (planes is None) != (visual_rows is None) or (planes is not None and planes.shape[1] != self.planes):
            raise ValueError(f"this model takes {self.planes} planes per visual row, given together with visual_rows")
        positions = positions.to(embeds.device)
        # Without a cache and a mask transformers takes gaps in the positions, which a reduced prompt has, for the edges of
        # packed documents.
        mask = None if cache is not None else torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        out = self.text_model(
            inputs_embeds=embeds,
            position_ids=positions if self.position_axes == 1 else positions[:, None],
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
            **self._plane_arguments(embeds, planes, visual_rows),
        )
        return out.last_hidden_state

    def alone(self) -> AbstractContextManager[None]:
        """See Adapter. Attention is told by others where it runs; what experts do is told here."""
        from launch.models import mixture

        return mixture.alone(self.layers)

    def spread_experts(self, block: ExpertBlock, keep_whole: bool) -> Sequence[ExpertLayer]:
        """See Adapter."""
        from launch.models import mixture

        self.layers = mixture.spread(self.text_model, block, keep_whole)
        return self.layers

    def _plane_arguments(self, embeds: Tensor, planes: Tensor | None, visual_rows: Tensor | None) -> dict[str, Any]:
        assert planes is None or self.planes == 0
        return {}

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """See Adapter."""
        logits = self.head(hidden)
        return logits if logits.dtype == torch.float64 else logits.float()

    def decode(self, ids: Sequence[int]) -> str:
        """See Adapter."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)
