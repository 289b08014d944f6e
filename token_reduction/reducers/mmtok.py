"""MMTok: tokens that cover the question and the picture at once.

    P = softmax_rows(cos(Z, X) / t_text) / m          question words over tokens
    Q = softmax_rows(cos(V, V) / t_vision) / n        picture over itself
    greedy: gain_j = sum_i max(C_ij - best_i, 0),     C = [P; alpha Q]

Source: MMTok, "Multimodal Coverage Maximization for Efficient Inference of VLMs", method section.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from token_reduction.batch import Batch, Selection
from token_reduction.exact import unit_rows
from token_reduction.options import POSITIVE, Limits, Range
from token_reduction.reducers.facility import chosen
from token_reduction.selectors.cover import Cover, cosines, fits
from token_reduction.selectors.coverage import greedy
from token_reduction.unit_reducer import UnitReducer

_FORMATS = (
    "answer the question using a single word or phrase.",
    "answer with the option's letter from the given choices directly.",
)
_STOP = frozenset(
    "a an the am is are was were be been being do does did has have had can could will would shall should may might must i you he she "
    "it we they me him her us them my your his its our their this that these those what which who whom whose when where why how "
    "in on at of to from by for with about into over under between through".split()
)


def clean_question(question: str) -> str:
    """The question without its answer format and without words that name nothing in a picture; as it is where nothing is left.

    >>> clean_question("What is the color of the bus on the left? Answer the question using a single word or phrase.")
    'color bus left?'
    """
    text = question
    for sentence in _FORMATS:
        at = text.lower().find(sentence)
        text = text if at < 0 else text[:at] + text[at + len(sentence) :]
    words = [word for word in text.split() if word.lower().strip(".,;:!?\"'") not in _STOP]
    return " ".join(words) or question


@dataclass(frozen=True, kw_only=True)
class MMTok(UnitReducer):
    """Keep k tokens of each item by greedy coverage of `text` (m, D: the question's input embeddings, cleaned) and vision.

    Args:
        alpha: weight of the picture against the question.
        vision_temperature, text_temperature: t_vision, t_text. The released inner function says 0.01 for the text where
            its constructor says 0.02: variant "released" takes 0.01 unless told otherwise, the others 0.02.

    V is the channel `patches`, the features before the projector, or x where there is none; X and the text share a space.
    `clean_question` gives the words of a question that the published method embeds. Scores: the gain of a kept token, 0 for the others.
    """

    alpha: float = 0.5
    vision_temperature: float = 0.2
    text_temperature: float | None = None
    limits: ClassVar[Limits] = {"alpha": Range(0), "vision_temperature": POSITIVE, "text_temperature": POSITIVE}
    name: ClassVar[str] = "mmtok"
    needs: ClassVar[frozenset[str]] = frozenset({"text"})
    wants: ClassVar[frozenset[str]] = frozenset({"patches"})
    cost: ClassVar[str] = "O(n^2 D) time, O(n D) memory"
    source: ClassVar[str] = "MMTok, multimodal coverage maximization"
    form: ClassVar[str] = "authors'"
    flat: ClassVar[bool] = True

    def work(self, item: tuple[int, int, int], count: int, width: int) -> float:
        return float(item[0] * item[1] * item[2]) ** 2 * width

    def select(self, batch: Batch, count: int) -> Sequence[Selection]:
        n = batch.x.shape[1]
        if len(batch.x) > 1 and not fits(n):
            return batch.one_by_one(lambda one: self.select(one, count))
        q = batch.units()
        alike = cosines(batch.units("patches") if "patches" in batch.channels else q)

        def kernel(js: Tensor, columns: slice) -> Tensor:
            return torch.exp_((alike(js, columns) - 1) / self.vision_temperature).float().double()

        # Entries are near alpha/n^2 and at most alpha/n, which 30 bits must hold.
        bits = min(40, 30 + math.floor(math.log2(n / max(self.alpha, 1e-6))))
        above = self.words(q, batch.texts)
        cover = Cover(kernel, q.new_zeros(q.shape[:2]), 0.0, above=above, share=self.alpha, bits=bits)
        return chosen(*greedy(cover, count), cover)

    def words(self, q: Tensor, texts: Sequence[Tensor]) -> Tensor:
        """(B, m, n) P of each unit; rows of 0, which nothing covers, below a text of fewer than m words."""
        temperature = self.text_temperature or (0.01 if self.variant == "released" else 0.02)
        p = q.new_zeros(len(q), max(len(text) for text in texts), q.shape[1])
        for rows, own, text in zip(p, q, texts):
            rows[: len(text)] = torch.softmax(unit_rows(text.to(q.device)) @ own.mT / temperature, -1) / len(text)
        return p
