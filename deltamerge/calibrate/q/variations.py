"""Variations of rows, new ones in each turn: without them learning fits a few rows by heart and no others.

A variation's target is the fine-tune's output for it, so it needs no label. Of a language model's row some tokens are
replaced by others that the fine-tune finds likely there. A substitute is drawn from its distribution of the next token
at the place before, in the row as it was given. Prompts are varied, or whole texts. Completions and special tokens
stay. A classifier's rows are mixed with others of their batch: tokens are replaced by theirs or by any others, and a
picture gets up to half of another. Half of the pictures are mirrored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deltamerge.calibrate.model.blocks import BlockModel
from deltamerge.calibrate.model.passes import COMPARED, BlockOutput, Inputs, Weights

MOST = 0.6  # the largest chance of a token to be replaced; each row of a variation has a chance of its own
PIXELS = "pixel_values"
MIXED = 0.5  # the largest share of another picture, and chance of a token to be replaced
ANY = 0.5  # share of replaced tokens that become any of the vocabulary, not another text's


@dataclass(frozen=True)
class Variations:
    """Batches of right-padded rows, and what their tokens may be replaced by.

    substitutes   for each batch token ids (turns, B, T); []: the rows are not varied
    special       token ids that stay
    """

    batches: Sequence[Inputs]
    substitutes: Sequence[Tensor]
    special: Tensor
    seed: int

    @classmethod
    def drawn(
        cls,
        model: BlockModel,
        tune: Weights,
        batches: Sequence[Inputs],
        *,
        turns: int,
        special: Tensor,
        seed: int,
    ) -> Variations:
        """Draw `turns` substitutes for each token by the fine-tune's weights, in one pass.

        Token ids in `special` are neither replaced nor drawn.
        """

        def draw(b: int, output: BlockOutput) -> Tensor:
            real = batches[b]["attention_mask"].bool()
            places = np.random.default_rng((seed, b)).random((int(real.sum()), turns), np.float32)
            assert output.scores is not None
            found = []
            for rows, logits in output.scores.take(lambda values: values[real.to(values.device)]).pieces():
                shares = logits.float().softmax(-1)
                shares[:, special[special < shares.shape[1]].to(shares.device)] = 0.0
                sums = shares.cumsum(-1)
                wanted = torch.from_numpy(places[rows]).to(sums.device) * sums[:, -1:]
                found.append(torch.searchsorted(sums, wanted, right=True).clamp_(max=sums.shape[1] - 1).cpu())
            drawn = torch.zeros(*real.shape, turns, dtype=torch.int64)
            drawn[real] = torch.cat(found)
            return drawn.roll(1, 1).movedim(-1, 0)

        return cls(batches, model.run(batches, [tune], draw)[0], special, seed)

    def turn(self, number: int) -> Sequence[Inputs]:
        """Return the batches with some tokens replaced by the substitutes of a turn."""
        if not self.substitutes:
            return self.batches
        draw = np.random.default_rng((self.seed, number))
        pairs = zip(self.batches, self.substitutes, strict=True)
        return [self._varied(batch, some[number], draw) for batch, some in pairs]

    def _varied(self, batch: Inputs, substitutes: Tensor, draw: np.random.Generator) -> Inputs:
        ids, real = batch["input_ids"], batch["attention_mask"].bool()
        compared = batch.get(COMPARED, real)
        is_text = (compared == real).all(1, keepdim=True)
        varies = real & ~torch.isin(ids, self.special) & (is_text | (compared.cumsum(1) == 0))
        varies[:, 0] = False  # nothing is before it
        chance = MOST * draw.random((len(ids), 1))
        replaced = torch.from_numpy(draw.random(tuple(ids.shape)) < chance) & varies
        return {**batch, "input_ids": torch.where(replaced, substitutes, ids)}


@dataclass(frozen=True)
class MixedRows:
    """Batches of texts or pictures (B, C, H, W), each to be mixed with others of its batch.

    words   token ids that texts have; others stay
    """

    batches: Sequence[Inputs]
    words: Tensor
    seed: tuple[int, ...]

    def turn(self, number: int) -> Sequence[Inputs]:
        """Return the batches of a turn. Rows that are neither, such as pictures in patches, stay as they are."""
        draw = np.random.default_rng((*self.seed, number))
        return [self._mixed(batch, draw) for batch in self.batches]

    def _mixed(self, batch: Inputs, draw: np.random.Generator) -> Inputs:
        if "input_ids" in batch:
            return {**batch, "input_ids": self._texts(batch["input_ids"], batch["attention_mask"].bool(), draw)}
        if {*batch} == {PIXELS} and batch[PIXELS].dim() == 4:
            return {PIXELS: self._pictures(batch[PIXELS], draw)}
        return batch

    def _texts(self, ids: Tensor, real: Tensor, draw: np.random.Generator) -> Tensor:
        mixed, varies = ids.clone(), real & torch.isin(ids, self.words)
        others, chance = ids[varies], MIXED * draw.random((len(ids), 1))
        taken = varies & torch.from_numpy(draw.random(tuple(ids.shape)) < chance)
        count = int(taken.sum())
        found = [some[torch.from_numpy(draw.integers(max(1, len(some)), size=count))] for some in (others, self.words)]
        mixed[taken] = torch.where(torch.from_numpy(draw.random(count) < ANY), found[1], found[0])
        return mixed

    def _pictures(self, pictures: Tensor, draw: np.random.Generator) -> Tensor:
        each = (len(pictures), 1, 1, 1)
        others = pictures[torch.from_numpy(draw.permutation(len(pictures)))]
        shares = torch.from_numpy(draw.random(each, np.float32)) * MIXED
        mixed = torch.lerp(pictures, others, shares.to(pictures.dtype))
        return torch.where(torch.from_numpy(draw.random(each) < 0.5), mixed.flip(-1), mixed)
