"""Checkpoints of torch.distributed.checkpoint: what torch writes is read, and nothing else."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_checkpoint, write_json
from running import make_plans, run
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from deltamerge.errors import InputError
from deltamerge.formats.dcp import covers, from_chunks
from deltamerge.models.checkpoint import open_checkpoint
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import viewed
from deltamerge.tensors.views import in_memory

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "vocab_size": 6}


class Chunked(DefaultSavePlanner):
    """Saves 2-D tensors in blocks of 3 rows and 5 columns, as ranks of a mesh of two dimensions would."""

    def create_local_plan(self):
        plan = super().create_local_plan()
        items = [piece for item in plan.items for piece in self.pieces(item)]
        self.plan = type(plan)(items, planner_data=plan.planner_data)
        return self.plan

    def pieces(self, item):
        data = item.tensor_data
        if data is None or len(data.size) != 2 or "norm" in item.index.fqn:
            return [item]
        found = []
        for i in range(0, data.size[0], 3):
            for j in range(0, data.size[1], 5):
                sizes = (min(3, data.size[0] - i), min(5, data.size[1] - j))
                chunk = torch_metadata.ChunkStorageMetadata(torch.Size((i, j)), torch.Size(sizes))
                index = torch_metadata.MetadataIndex(item.index.fqn, torch.Size((i, j)), len(found))
                written = TensorWriteData(chunk, data.properties, data.size)
                found.append(WriteItem(index, WriteItemType.SHARD, tensor_data=written))
        return found

    def resolve_data(self, item):
        if item.type != WriteItemType.SHARD:
            return super().resolve_data(item)
        whole, chunk = self.state_dict[item.index.fqn], item.tensor_data.chunk
        (i, j), (m, n) = chunk.offsets, chunk.sizes
        return whole[i : i + m, j : j + n].contiguous()

    def create_global_plan(self, plans):
        self.dedup_save_to_lowest_rank = False
        return super().create_global_plan(plans)


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "model.embed_tokens.weight": torch.randn(6, 12, generator=draw).bfloat16(),
        "model.layers.0.mlp.up_proj.weight": torch.randn(7, 11, generator=draw),
        "model.norm.weight": torch.randn(12, generator=draw).half(),
        "model.layers.0.mask": torch.tensor([True, False, True]),
    }


def save(state: dict, folder: Path, *, planner=None, files: int = 1) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = dcp.FileSystemWriter(folder, thread_count=files, sync_files=False)
        dcp.save(state, storage_writer=writer, planner=planner, no_dist=True)
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    found = open_checkpoint(folder)
    made = {}
    with Reader() as reader:
        for name, info in found.tensors.items():
            dtype = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16, "BOOL": torch.bool}[info.dtype]
            made[name] = torch.empty(info.shape, dtype=dtype)
            reader.read_into(info, 0, made[name].view(torch.uint8).numpy())
    return made


def nested(model: dict) -> dict:
    optimizer = {"state": {"exp_avg": torch.ones(4)}, "param_groups": [{"lr": 0.1}]}
    return {"model": model, "optimizer": optimizer, "step": 7, "rng": torch.zeros(3)}


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("wrap", [dict, nested, lambda model: {"app": nested(model)}])
def test_what_torch_saves_is_read(tmp_path, wrap, chunked):
    model = tensors()
    folder = save(wrap(model), tmp_path / "d", planner=Chunked() if chunked else None, files=2)
    assert len(list(folder.glob("*.distcp"))) == 2
    found = read(folder)
    assert found.keys() == model.keys()
    assert all(torch.equal(found[name], value) for name, value in model.items())


def test_any_range_of_a_tensor_in_chunks_is_read():
    """Blocks of every kind of cut, read by ranges that end anywhere; the chunks are tensors in memory."""
    draw = np.random.default_rng(1)

    for shape, cut in (
        ((9,), (4,)),
        ((5, 6), (2, 6)),
        ((5, 6), (5, 4)),
        ((4, 3, 5), (3, 2, 5)),
        ((3, 4, 5), (3, 4, 2)),
    ):
        whole = draw.integers(0, 2**31, shape, dtype=np.uint32)
        chunks, offsets_of = [], []
        for first in np.ndindex(*[-(-n // c) for n, c in zip(shape, cut, strict=True)]):
            offsets = tuple(f * c for f, c in zip(first, cut, strict=True))
            block = np.ascontiguousarray(whole[tuple(slice(o, o + c) for o, c in zip(offsets, cut, strict=True))])
            chunks.append(in_memory("chunk", "F32", block.shape, memoryview(block).cast("B")))
            offsets_of.append(offsets)
        assert covers(shape, [(o, chunk.shape) for o, chunk in zip(offsets_of, chunks, strict=True)])
        assert len(chunks) == 1 or not covers(shape, [(offsets_of[0], chunk.shape) for chunk in chunks])
        together = viewed(from_chunks, chunks, shape, "F32", offsets=tuple(offsets_of), path=Path())
        for _ in range(30):
            start, stop = sorted(draw.integers(0, whole.size + 1, 2).tolist())
            out = bytearray((stop - start) * 4)
            with Reader() as reader:
                reader.read_into(together, start, out)
            assert bytes(out) == whole.reshape(-1)[start:stop].tobytes()


def test_config_and_tokenizer_come_from_the_run_or_the_base(tmp_path):
    model = tensors()
    for step in (1, 2):
        save(nested(tensors(step)), tmp_path / "run" / f"step-{step}", planner=Chunked())
        make_checkpoint(tmp_path / "plain" / f"step-{step}", tensors(step), config=CONFIG)
    make_checkpoint(tmp_path / "base", model, config=CONFIG)
    recipe = "merge_method: linear\nmodels: {}/step-*\n"
    (tmp_path / "plain.yaml").write_text(recipe.format("plain"))
    (tmp_path / "based.yaml").write_text(recipe.format("run") + "base_model: base\n")
    run(tmp_path / "plain.yaml")
    run(tmp_path / "based.yaml")
    write_json(tmp_path / "run" / "config.json", CONFIG)
    (tmp_path / "sibling.yaml").write_text(recipe.format("run"))
    run(tmp_path / "sibling.yaml", tmp_path / "run" / "average")
    for out in (tmp_path / "based-merged", tmp_path / "run" / "average"):
        for name in ("model.safetensors", "config.json"):
            assert (out / name).read_bytes() == (tmp_path / "plain-merged" / name).read_bytes()


class Evil:
    def __reduce__(self):
        return (print, ("called",))


def test_what_is_no_checkpoint_of_a_model_is_refused_by_name(tmp_path, capsys):
    folder = save(nested(tensors()), tmp_path / "d", planner=Chunked())
    metadata, data = folder / ".metadata", folder / "__0_0.distcp"
    good, bytes_ = metadata.read_bytes(), data.read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(InputError, match=match):
            open_checkpoint(folder)

    metadata.unlink()
    refused("the save did not end|no .metadata")
    for cut in range(0, len(good), 37):
        metadata.write_bytes(good[:cut])
        refused(r"\.metadata: ")
    metadata.write_bytes(good + b"x")
    refused("bytes behind its pickle")
    metadata.write_bytes(pickle.dumps(Evil()))
    refused("builtins.print")
    for foreign in (7, {"a": 1}, [1]):
        metadata.write_bytes(pickle.dumps(foreign))
        refused("no metadata")
    assert capsys.readouterr().out == ""
    root = pickle.loads(good)
    key = next(index for index in root.storage_data if "up_proj" in index.fqn)
    info = root.storage_data.pop(key)
    metadata.write_bytes(pickle.dumps(root))
    refused(r"its chunk at \[0, 0\] lies nowhere")
    info.transform_descriptors = ["zstd"]
    root.storage_data[key] = info
    metadata.write_bytes(pickle.dumps(root))
    refused("transformed")
    info.transform_descriptors, info.relative_path = None, "../__0_0.distcp"
    metadata.write_bytes(pickle.dumps(root))
    refused("lacks '../__0_0.distcp'")
    info.relative_path = "__0_0.distcp"
    chunks = root.state_dict_metadata["model.model.layers.0.mlp.up_proj.weight"].chunks
    dropped = chunks.pop()
    metadata.write_bytes(pickle.dumps(root))
    refused("overlap or leave holes")
    chunks.append(dropped)
    twice = {name.replace("model.", "ema.", 1): value for name, value in root.state_dict_metadata.items()}
    root.state_dict_metadata = {name: value for name, value in twice.items() if name.startswith(("ema", "opt"))}
    root.planner_data = {name: tuple(name.split(".", 1)) for name in root.state_dict_metadata}
    root.planner_data[next(iter(root.planner_data))] = ("other", "x")
    metadata.write_bytes(pickle.dumps(root))
    refused("several state dicts")
    metadata.write_bytes(good)
    for cut in (0, 100, len(bytes_) // 2, len(bytes_) - 1):
        data.write_bytes(bytes_[:cut])
        refused("truncated")
    data.write_bytes(bytes(len(bytes_)))
    refused("__0_0.distcp")
    data.unlink()
    refused("lacks '__0_0.distcp'|no safetensors")
    write_json(folder / "config.json", CONFIG)
    data.write_bytes(bytes_)
    (tmp_path / "r.yaml").write_text("merge_method: linear\nmodels: [d]\n")
    assert make_plans(tmp_path / "r.yaml")[0].outputs


def test_a_changed_byte_is_read_or_refused(tmp_path):
    """Nothing but an InputError leaves the reader, whatever one or two bytes of its files say."""
    folder = save(nested(tensors()), tmp_path / "d", planner=Chunked())
    draw, refused = np.random.default_rng(3), 0
    for name in (".metadata", "__0_0.distcp"):
        good = (folder / name).read_bytes()
        for _ in range(60):
            changed = bytearray(good)
            for at in draw.integers(0, len(good), draw.integers(1, 3)):
                changed[at] = draw.integers(0, 256)
            (folder / name).write_bytes(changed)
            try:
                read(folder)
            except InputError:
                refused += 1
            except KeyError:  # a dtype that `read` does not know
                refused += 1
        (folder / name).write_bytes(good)
    assert refused > 30
