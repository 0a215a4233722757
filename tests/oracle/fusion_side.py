"""Runs in fusion-bench's environment, not ours: `python fusion_side.py FOLDER` merges the models a, b, c of FOLDER.

Leaves NAME.safetensors of every method that fusion-bench has, the deltas added to the base in float64. Of methods that
see rows it merges the Llamas a and b of FOLDER/rows, whose tokens are in tokens.safetensors there.
"""

import contextlib
import os
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
from fusion_bench.method.emr_merging.utils import emr_merge
from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
from fusion_bench.method.regmean.regmean import regmean_merging
from fusion_bench.method.regmean_plusplus import RegMeanAlgorithmForCLIPPlusPlus, RegMeanAlgorithmPlusPlus
from fusion_bench.method.singular_value_calibration.utils import (
    subspace_consistency_spectral_calibration,
    subspace_consistency_spectral_calibration_accelerated,
)
from fusion_bench.method.tall_mask.utils import generate_task_masks
from fusion_bench.method.task_singular_vector.utils import TSVM_utils
from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging
from fusion_bench.method.wudi.wudi import wudi_merging
from fusion_bench.modelpool import BaseModelPool
from fusion_bench.utils.state_dict_arithmetic import state_dict_mul, state_dict_sub, state_dict_sum
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

folder = Path(sys.argv[1])
base, *tunes = (load_file(folder / name / "model.safetensors") for name in ("base", "a", "b", "c"))
excluded = ["embed_tokens.weight", "lm_head.weight"]


def deltas() -> list[dict[str, torch.Tensor]]:
    return [state_dict_sub(tune, base) for tune in tunes]


def save(name: str, delta: dict[str, torch.Tensor]) -> None:
    merged = {key: (base[key].double() + value.detach().double()).contiguous() for key, value in delta.items()}
    save_file(merged, folder / f"{name}.safetensors")


def trimmed(density: float) -> dict[str, torch.Tensor]:
    """TIES of one tensor at a time, as fusion-bench trims whole models; it keeps one entry more than it is told to."""
    found = {}
    for key, value in base.items():
        flat = torch.stack([delta[key].flatten() for delta in deltas()])
        share = (int(density * value.numel()) - 0.5) / value.numel()
        found[key] = ties_merging(flat, reset_thresh=share, merge_func="mean").view(value.shape)
    return found


def masked() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Consensus of TALL masks, and the second task's model."""
    agreed, second = {}, {}
    for key, value in base.items():
        flat = torch.stack([delta[key].flatten() for delta in deltas()])
        tuned = torch.stack([tune[key].flatten() for tune in tunes])
        masks = generate_task_masks(flat, tuned, value.flatten(), tall_mask_lambda=0.4)
        agreed[key] = (flat.sum(0) * (masks.sum(0) >= 2)).view(value.shape)
        second[key] = (flat.sum(0) * masks[1]).view(value.shape)
    return agreed, second


def elected() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The second task's EMR model, rescaled by the paper's quotient of sums over the model and by theirs, of means."""
    unified, masks, rescalers = emr_merge(deltas())
    kept = {key: value * masks[key][1] for key, value in unified.items()}
    own = sum(value.abs().sum() for value in deltas()[1].values())
    ours = state_dict_mul(kept, float(own / sum(value.abs().sum() for value in kept.values())))
    return ours, state_dict_mul(kept, float(rescalers[1]))


def calibrated(delta: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """SVC of a merged delta's matrices but the excluded; its two forms agree to 1e-6."""
    found = dict(delta)
    for key in (key for key, value in delta.items() if value.dim() == 2 and key not in excluded):
        given = base[key].double(), [tune[key].double() for tune in tunes], base[key].double() + delta[key].double()
        forms = subspace_consistency_spectral_calibration, subspace_consistency_spectral_calibration_accelerated
        first, second = (form(*given, alpha=0.1) - base[key].double() for form in forms)
        assert (first - second).abs().max() < 1e-6
        found[key] = second
    return found


class Rows:
    """What `regmean_merging` asks of a trainer."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens, self._train_batch_size = tokens, 1

    def get_train_dataloader(self) -> list[dict[str, torch.Tensor]]:
        return [{"input_ids": row[None]} for row in self.tokens]

    def _prepare_inputs(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return inputs


class Walk(RegMeanAlgorithmPlusPlus):
    """RegMean++ of a Llama's blocks. The form for CLIP cannot be made in 0.2.33, but sums inner products here."""

    fabric = SimpleNamespace(setup=lambda layer: layer)
    get_regmean_weights = RegMeanAlgorithmForCLIPPlusPlus.get_regmean_weights

    def on_regmean_start(self) -> None: ...

    def merge_embedding_layer(self, models_to_merge_dict):
        found = defaultdict(list)
        for model in models_to_merge_dict.values():
            for name, tensor in model.state_dict().items():
                if "layers" not in name:
                    found[name].append(tensor)
        return {name: torch.stack(some).mean(0) for name, some in found.items()}

    def get_input_for_first_layer(self, model, train_dataset):
        self.turn = model.model.rotary_emb
        return [model.model.embed_tokens(row[None]).detach() for row in train_dataset]

    def get_layers(self, model):
        return model.model.layers

    def update_merged_params_dict(self, merged_params_dict, new_merged_params, layer_idx):
        named = {f"model.layers.{layer_idx}.{key}": value for key, value in new_merged_params.items()}
        return merged_params_dict | named

    def layer_batches_forward(self, layer, batches_input):
        found = []
        for batch in batches_input:
            length = batch.shape[1]
            where = torch.arange(length)[None]
            causal = torch.full((length, length), torch.finfo(batch.dtype).min).triu(1)[None, None]
            made = layer(batch, attention_mask=causal, position_ids=where, position_embeddings=self.turn(batch, where))
            found.append((made[0] if isinstance(made, tuple) else made).detach())
        return found


class Pool(BaseModelPool):
    """The Llamas of FOLDER/rows as fusion-bench's algorithms ask for them."""

    def __init__(self, tokens: dict[str, torch.Tensor]) -> None:
        super().__init__(models=dict.fromkeys(("_pretrained_", *tokens)))
        self.tokens = tokens

    def load_model(self, model_name_or_config, *args, **kwargs):
        return llama({"_pretrained_": "base"}.get(model_name_or_config, model_name_or_config))

    def load_train_dataset(self, dataset_name, *args, **kwargs):
        return self.tokens[dataset_name]


def llama(name: str) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder / "rows" / name, dtype=torch.float32).eval()


def with_rows() -> None:
    tokens = load_file(folder / "rows" / "tokens.safetensors")
    made = regmean_merging([llama(name) for name in tokens], [Rows(some) for some in tokens.values()], [], [3, 3], 0.9)
    save_file({name: tensor.detach().contiguous() for name, tensor in made.items()}, folder / "regmean.safetensors")
    walk = Walk(num_regmean_examples=3, exclude_param_names_regex=[], reduce_non_diagonal_ratio=0.9,
                weight_transpose=True)  # fmt: skip
    merged = walk.run(Pool(tokens)).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in merged.items()}, folder / "regmean_plus.safetensors")


with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
    save("task_arithmetic", state_dict_mul(state_dict_sum(deltas()), 0.4))
    save("ties", trimmed(0.3))
    save("iso_c", state_dict_mul(iso_c(deltas(), "cpu", excluded), 0.9))
    save("iso_cts", iso_cts(deltas(), 0.8, "cpu", excluded))
    for name, dtype, change in (("tsv_m", torch.float32, dict), ("svc", torch.float64, calibrated)):
        given = [{key: value.to(dtype) for key, value in delta.items()} for delta in deltas()]
        save(name, change(TSVM_utils.compute_and_sum_svd_mem_reduction(given, excluded, torch.device("cpu"))))
    with_rows()
    save("wudi", wudi_merging(deltas(), "cpu", 300, excluded))
    for names, made in ((("consensus", "tall_masks"), masked()), (("emr", "emr_means"), elected())):
        for name, delta in zip(names, made, strict=True):
            save(name, delta)
