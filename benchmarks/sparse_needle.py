"""A sentence hidden at 10 depths of a text, and what sparse prefill leaves of the answer that dense prefill leads to.

    hay[:at] | the sentence | hay[at:] | a question that ends where the digits start

The question ends there because whether this small model answers with a number at all hangs by a thread, dense too. Of each digit
the margin is the logit of what dense attention writes above the best other, after the same digits before it: sparse prefill writes
the same where no margin is below zero. The margins of dense attention say how decided its answer is.

Keys and values of hay[:at] are those of the plain text: they are computed once for all depths, up to the edge of a group, since
chunks that end at groups give what one call gives.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.language_model import Model
from sparse_attn import AnchorConfig, TunedConfig
from sparse_attn.cost import resolved
from sparse_attn.integrations.huggingface import sparse_prefill
from sparse_attn.stats import Stats

CODE = "48213"
SENTENCE = f"\nThe secret code of the blue house is {CODE}.\n"
QUESTION = "\nQuestion: what is the secret code of the blue house?\nAnswer: The secret code of the blue house is "
DIGITS = len(CODE)
"""Each is a token."""
DEPTHS = 10
Row = dict[str, Any]


class Prompts:
    """Prompts of `total` tokens, sentence and question included, and the groups that cut them."""

    def __init__(self, model: Model, total: int) -> None:
        self.sentence, self.question = (model.tokens(text).input_ids for text in (SENTENCE, QUESTION))
        self.hay = model.ids("reference", total - len(self.sentence) - len(self.question))[0].tolist()
        self.total = total

    def at(self, depth: int) -> Tensor:
        """(1, tokens), the sentence at `depth` tenths."""
        at = len(self.hay) * depth // DEPTHS
        return torch.tensor([self.hay[:at] + self.sentence + self.hay[at:] + self.question])

    def shared(self, depth: int, rows: int) -> int:
        """How many of its first tokens are the plain text's and whole groups of `rows`."""
        at = len(self.hay) * depth // DEPTHS
        return at - at % rows

    def grouped(self, config: AnchorConfig | TunedConfig) -> AnchorConfig | TunedConfig:
        """A configuration with the whole prompt's groups, which its chunks would not choose."""
        if isinstance(config, TunedConfig):
            return replace(config, layers={n: self.grouped(c) for n, c in config.layers.items()})
        block, step = resolved(config, self.total)
        return replace(config, block=block, step=step)


def group_rows(config: AnchorConfig | TunedConfig | None) -> int:
    """Chunks of so many rows are whole groups in every layer."""
    if config is None:
        return 1
    layers = config.layers.values() if isinstance(config, TunedConfig) else [config]
    return math.lcm(*(layer.block * layer.step for layer in layers))


def asked(
    model: Model, prompts: Prompts, config: AnchorConfig | TunedConfig | None, answers: list[Tensor]
) -> list[Row]:
    """For each depth what is said, the margins of `answers` (none yet: of what is said) and the density; None: dense attention."""
    cache, done, pairs, rows = DynamicCache(), 0, 0.0, []
    config = None if config is None else prompts.grouped(config)
    for depth in range(DEPTHS):
        ids, edge = prompts.at(depth), prompts.shared(depth, group_rows(config))
        with nullcontext({}) if config is None else sparse_prefill(model.model, config) as calls:
            if edge > done:
                model.model.model(ids[:, done:edge], past_key_values=cache, use_cache=True)
                pairs, done = pairs + computed(calls, done, edge), edge
            logits = followed(model, ids[:, done:], copy.deepcopy(cache), answers[depth] if answers else None)
            whole = pairs + computed(calls, done, ids.shape[1])
        said = logits.argmax(-1)
        wanted = answers[depth] if answers else said
        others = logits.scatter(1, wanted[:, None], -torch.inf).amax(1)
        margins = (logits.gather(1, wanted[:, None])[:, 0] - others).tolist()
        row = {"said": model.tokens.decode(said), "margins": [round(x, 3) for x in margins], "tokens": said}
        rows.append(row | ({} if config is None else {"density": whole / causal(0, ids.shape[1])}))
    return rows


def followed(model: Model, ids: Tensor, cache: DynamicCache, answer: Tensor | None) -> Tensor:
    """(DIGITS, vocabulary): logits of what follows the prompt, and each digit of an answer; of the likeliest where none is given."""

    def call(tokens: Tensor, last: int) -> Tensor:
        return model.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=last).logits[0]

    told = call(ids, 1)
    if answer is not None:
        return torch.cat([told, call(answer[None, :-1], DIGITS - 1)])
    for _ in range(DIGITS - 1):
        told = torch.cat([told, call(told[-1:].argmax(-1, keepdim=True), 1)])
    return told


def causal(first: int, last: int) -> int:
    """Pairs of rows first..last-1 and the keys up to their own."""
    return sum(range(first + 1, last + 1))


def computed(calls: Mapping[int, Stats], first: int, last: int) -> float:
    """Of these pairs, how many the last prefill computed, mean over layers."""
    return causal(first, last) * sum(stats.density for stats in calls.values()) / max(1, len(calls))


def needle(model: Model, length: int, configs: Mapping[str, AnchorConfig | TunedConfig]) -> Row:
    """Every configuration beside dense attention, at each depth."""
    prompts = Prompts(model, length)
    dense = asked(model, prompts, None, [])
    rows = [{"depth": n / DEPTHS, "dense": shown(row)} for n, row in enumerate(dense)]
    print("dense", [(row["said"], min(row["margins"])) for row in dense], flush=True)
    found: Row = {"dense finds it": sum(row["said"] == CODE for row in dense), "same as dense": {}, "least margin": {}}
    found["least margin"]["dense"] = min(min(row["margins"]) for row in dense)
    for name, config in configs.items():
        mine = asked(model, prompts, config, [row["tokens"] for row in dense])
        for row, told in zip(rows, mine):
            row[name] = shown(told)
        found["same as dense"][name] = sum(a["said"] == b["said"] for a, b in zip(mine, dense))
        found["least margin"][name] = min(min(row["margins"]) for row in mine)
        print(name, [(row["said"], min(row["margins"]), round(row["density"], 3)) for row in mine], flush=True)
    print({"length": length} | found, flush=True)
    return {"length": length} | found | {"rows": rows}


def shown(row: Row) -> Row:
    """A row without its tokens' numbers."""
    return {name: value for name, value in row.items() if name != "tokens"}
