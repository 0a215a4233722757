"""Variations of a language model's rows: some tokens are replaced by others that the fine-tune finds likely there.

Without variations, learning fits a few rows by heart and no others. A substitute is drawn from the fine-tune's
distribution of the next token at the place before, in the row as it was given. Prompts are varied, or whole texts.
Completions and special tokens stay. A variation's target is the fine-tune's output for it, so it needs no label.
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
        special: Sequence[int],
        seed: int,
    ) -> Variations:
        """Draw `turns` substitutes for each token by the fine-tune's weights, in one pass.

        Token ids in `special` are neither replaced nor drawn.
        """
        fixed = torch.tensor(special, dtype=torch.int64)

        def draw(b: int, output: BlockOutput) -> Tensor:
            real = batches[b]["attention_mask"].bool()
            places = np.random.default_rng((seed, b)).random((int(real.sum()), turns), np.float32)
            assert output.scores is not None
            found = []
            for rows, logits in output.scores.take(lambda values: values[real.to(values.device)]).pieces():
                shares = logits.float().softmax(-1)
                shares[:, fixed[fixed < shares.shape[1]].to(shares.device)] = 0.0
                sums = shares.cumsum(-1)
                wanted = torch.from_numpy(places[rows]).to(sums.device) * sums[:, -1:]
                found.append(torch.searchsorted(sums, wanted, right=True).clamp_(max=sums.shape[1] - 1).cpu())
            drawn = torch.zeros(*real.shape, turns, dtype=torch.int64)
            drawn[real] = torch.cat(found)
            return drawn.roll(1, 1).movedim(-1, 0)

        return cls(batches, model.run(batches, [tune], draw)[0], fixed, seed)

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
