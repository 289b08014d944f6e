"""The way of the data on one rank: video -> frames -> features -> fewer tokens -> spread sequence -> prefill -> words.

read ─ encode ─ reduce          launch.watch      frames sharded over the ranks, a window at a time
splice                          launch.spread     kept rows move to the ranks that the layout names
prefill ─ decode                launch.generate   tokenring.attention, then tokenring.decode_attention; launch.experts,
                                                  launch.sparse
verify                          launch.verify     the same on one rank, if asked
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from launch.config import RunConfig
from launch.errors import ConfigError
from launch.experts import Experts, own_experts
from launch.generate import Answer, write
from launch.links import links_between
from launch.models import load
from launch.models.base import Adapter, Prompt, VisualPlan
from launch.preflight import cut_windows, method_of, planned_frames, refuse_blind
from launch.progress import Log
from launch.records import RankRecord
from launch.sparse import SparseRun
from launch.spread import Ownership, Part, spread
from launch.stages import Stages
from launch.verify import verify
from launch.video import FramePlan
from launch.watch import Kept, Watcher, Windows, with_cells
from token_reduction import Reducer
from token_reduction.reducers.mmtok import MMTok, clean_question
from tokenring import AttentionShape, Layout
from tokenring import plan as attention_plan
from tokenring.transport import Transport, connect, count_traffic

if TYPE_CHECKING:
    from moe.integrations.huggingface_loading import OwnExperts


def run(config: RunConfig, group: Any, log: Log) -> RankRecord:
    """One rank's part of `tokenring run`. Every rank calls it with the same configuration.

    Args:
        config: a checked configuration whose `engine.device` is settled.
        group: the process group of all ranks, or None for one rank.
        log: told what is being done; also the clock of the record.

    Raises:
        ConfigError: the input cannot be run on this many ranks; raised on every rank alike.
    """
    runtime = connect(group, timeout_seconds=config.engine.exchange_timeout_seconds)
    with torch.inference_mode():
        return _Run(config, group, runtime, Stages(log, config.engine.device)).record()


class _Run:
    """What the stages of one run share."""

    def __init__(self, config: RunConfig, group: Any, runtime: Transport, stages: Stages) -> None:
        self.config, self.runtime, self.stages = config, runtime, stages
        stages.log.stage("load")
        with stages.span("load"):
            self.adapter = _load(config, own_experts(config, runtime.rank))
            self.links = links_between(config, group)
            self.experts = Experts.spread(self.adapter, config, group, runtime, self.links)
            self.sparse = SparseRun(config) if config.attention.kind == "anchor" else None
            self.frames = planned_frames(config.video)
        self.started = stages.log.clock()

    def record(self) -> RankRecord:
        """Do it all."""
        adapter, stages, runtime = self.adapter, self.stages, self.runtime
        with count_traffic(runtime) as traffic, self.experts.counting() if self.experts else nullcontext():
            plan, cut, kept = self.watch()
            who, short, layout, part = self.splice(plan, kept)
            answer, cache = self.write(short, layout, part)
            sent = {peer: size for (_, peer), size in traffic.sent.items()}
        if self.experts is not None:
            self.experts.close()
        compared = self.verify(short, kept, who, layout, answer) if self.config.output.verify else None
        return RankRecord(
            schedule=self.sparse.path if self.sparse else self.schedule(layout),
            links=None if self.links is None else self.links.to_dict(),
            attention=None if self.sparse is None else self.sparse.record(),
            frames=plan.frames,
            tokens_before=plan.tokens,
            tokens_after=int(who.index.numel()),
            tokens_local=layout.length(runtime.rank),
            cache_bytes=cache.nbytes(),
            peak_bytes=max(stages.peak_bytes.values()),
            stage_peak_bytes=stages.peak_bytes,
            bytes_sent=sent,
            experts=None if self.experts is None else self.experts.record(),
            generated_ids=answer.ids,
            text=adapter.decode(answer.ids),
            seconds={**stages.seconds, "first_token": answer.first_token_at - self.started},
            events=stages.events,
            kept=with_cells(kept.samples, who.index, plan, self.seconds),
            verify=compared,
            warnings=[*self.input_warnings(plan, cut), *_context_warning(adapter, short, len(answer.ids))],
            notes=list(adapter.notes),
        )

    @property
    def seconds(self) -> list[float]:
        """Time of each frame."""
        return [ref.seconds for ref in self.frames.refs]

    def input_warnings(self, plan: VisualPlan, cut: Windows) -> list[str]:
        """What became of the input other than was asked."""
        result, kept, (_, budget) = [], sum(cut.counts), method_of(self.config.reduce)
        if budget.kind == "ratio" and kept > budget.value * plan.tokens + len(cut.counts):
            result.append(
                f"{self.config.reduce.spec} keeps {kept} of {plan.tokens} visual tokens ({kept / plan.tokens:.1%}), more than "
                "was asked: the method has a least number for each window; take a larger --window or another method"
            )
        if self.frames.other_sizes:
            height, width = self.frames.size
            others = ", ".join(self.frames.other_sizes)
            result.append(f"clips of other sizes are resized to {width}x{height}, the size of the first: {others}")
        return result

    def watch(self) -> tuple[VisualPlan, Windows, Kept]:
        """Frames to kept visual tokens."""
        self.stages.log.stage("watch")
        method, budget = method_of(self.config.reduce)
        refuse_blind(method, self.adapter.channels, self.adapter.name)
        plan = _visual_plan(self.adapter, self.frames)
        cut = cut_windows(plan, self.config.reduce, method, budget)
        seed = self.config.generate.seed
        question = question_rows(self.adapter, method, self.config.generate.prompt)
        watcher = Watcher(self.adapter, plan, self.frames, cut, method, seed, self.runtime, self.stages, question)
        return plan, cut, watcher.watch(self.runtime.rank, self.runtime.world)

    def splice(self, plan: VisualPlan, kept: Kept) -> tuple[Ownership, Prompt, Layout, Part]:
        """Text and kept tokens, spread by the layout."""
        self.stages.log.stage("prefill")
        world = self.runtime.world
        with self.stages.span("splice"):
            who = Ownership.agree(kept, self.runtime)
            short = self.adapter.prompt(self.config.generate.prompt, plan, self.seconds).keep(who.index)
            length = int(short.input_ids.numel())
            if length < world:
                raise ConfigError(
                    f"the sequence has {length} tokens for {world} ranks; give --nproc {length} or fewer, or keep more tokens"
                )
            make = self.sparse.layout if self.sparse else getattr(Layout, self.config.attention.layout)
            layout = make(length, world)
            part = spread(self.adapter, short, kept, who, layout, self.runtime)
        return who, short, layout, part

    def write(self, short: Prompt, layout: Layout, part: Part) -> tuple[Answer, Any]:
        """Prefill and decode over the ranks."""
        from tokenring.integrations.huggingface import SpreadCache, sequence_parallel

        cache = SpreadCache(layout, self.runtime)
        generate, keep = self.config.generate, self.config.output.verify
        spread_model = sequence_parallel(
            self.adapter.text_model, self.runtime, layout, self.config.attention.schedule, topology=self.links
        )
        with spread_model, self.sparse.prefill(self.adapter, short) if self.sparse else nullcontext():
            answer = write(
                self.adapter, part, layout, short.next_position, cache, generate, self.runtime, self.stages, keep=keep
            )
        return answer, cache

    def schedule(self, layout: Layout) -> str:
        """The schedule that prefill ran: what "auto" comes to for this model, layout and links."""
        model, dtype = self.adapter.text_model.config, getattr(torch, self.config.model.dtype)
        heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
        dim = getattr(model, "head_dim", None) or model.hidden_size // heads
        shape = AttentionShape(1, layout.total, layout.total, heads, kv_heads, dim, dtype=dtype)
        name = self.config.attention.schedule
        return attention_plan(name, world=layout.world, shape=shape, layout=layout, topology=self.links).schedule

    def verify(
        self, short: Prompt, kept: Kept, who: Ownership, layout: Layout, answer: Answer
    ) -> dict[str, Any] | None:
        """The same on one rank."""
        self.stages.log.stage("verify")
        generate, tolerance = self.config.generate, self.config.output.tolerance
        with self.stages.span("verify"):
            rows = (short, kept, who, layout, answer)
            return verify(self.adapter, *rows, generate, tolerance, self.runtime, self.sparse)


def question_rows(adapter: Adapter, method: Reducer, prompt: str) -> Tensor | None:
    """(m, hidden) input embeddings of the question's words, or None where the method looks at no text."""
    if "text" not in method.needs:
        return None
    words = clean_question(prompt) if isinstance(method, MMTok) else prompt
    ids = adapter.tokenizer(words, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ConfigError(f"reducer {method.name} looks at the question and generate.prompt is empty; give a --prompt")
    return adapter.embed(torch.tensor(ids, dtype=torch.int64))


def _load(config: RunConfig, own: OwnExperts | None) -> Adapter:
    try:
        return load(config.model.source, getattr(torch, config.model.dtype), config.engine.device, own)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _visual_plan(adapter: Adapter, frames: FramePlan) -> VisualPlan:
    try:
        return adapter.visual_plan(len(frames), *frames.size)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _context_warning(adapter: Adapter, short: Prompt, written: int) -> list[str]:
    last = max(int(short.positions.max()), short.next_position + written - 1)
    if last < adapter.context_length:
        return []
    return [
        f"positions reach {last}, above the {adapter.context_length} that the language model was trained for: expect worse "
        "text; take fewer frames (--fps, --frames) or a model with a longer context"
    ]
