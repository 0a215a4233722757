"""What is fuzzed: bytes from a stranger into a reader, which reads them or refuses them by a DeltamergeError.

Where the format's own reader is here, what both read is the same; it sees only what ours has read, which holds no code.

test_fuzz.py feeds the targets with hypothesis, fuzz_atheris.py with bytes that coverage guides.
"""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch
from zlib import crc32

import blake3
import gguf
import numpy as np
import pytest
import torch
import yaml
import zstandard
from conftest import load_tensors, make_checkpoint, write_json
from packed_files import CASES as PACKED
from running import make_plan, run
from safetensors.torch import load, save, save_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from deltamerge.apps.chain.live import load_delta
from deltamerge.apps.train.trainer import DeltaWriter as ChainWriter
from deltamerge.calibrate.rows.files import read as read_rows
from deltamerge.engine import kernels
from deltamerge.errors import DeltamergeError, RecipeError
from deltamerge.files.ownership import LOCK_NAME
from deltamerge.formats.components import RUNNING_SUM, RunningSum, read_running_sum
from deltamerge.formats.delta.manifest import Base
from deltamerge.formats.delta.steps import decode_tile, encode_tile
from deltamerge.formats.delta.tensor_writer import BaseTensor
from deltamerge.formats.delta.writer import ArtifactWriter
from deltamerge.formats.safetensors import read_header
from deltamerge.formats.torch_bin import read_torch_header
from deltamerge.formats.weight_files import shards_of, weight_source
from deltamerge.models.chain.folder import head
from deltamerge.models.chain.slime import SLIME
from deltamerge.models.checkpoint import INDEX, decoded, open_checkpoint
from deltamerge.models.delta_file import DeltaFile
from deltamerge.models.hub import open_model
from deltamerge.models.hub_client import (
    COMMIT,
    HASH,
    Bounds,
    check,
    check_range,
    header_by_ranges,
    read_listing,
    within,
)
from deltamerge.models.vocabulary_files import sentences
from deltamerge.recipe.file import TemplateFile, read_either, read_recipe
from deltamerge.run import hashes
from deltamerge.run.lock import Lock, verify
from deltamerge.tensors.dtypes import torch_dtype
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import TensorInfo

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
TENSORS = {"a": torch.ones(2, 3), "b": torch.arange(4), "c": torch.zeros(0, 2)}
WORDS = ("<pad>", "<s>", "</s>", "w0", "w1")
STEPPED = (np.arange(4096) * 40503 & 0xFFFF).astype(np.uint16)  # bits of bfloat16, of every exponent
BODY = bytes(sum(tensor.nbytes for tensor in TENSORS.values()))
WEIGHTS = save(TENSORS)


def saved(**how: Any) -> bytes:
    made = io.BytesIO()
    torch.save(TENSORS, made, **how)
    return made.getvalue()


TORCH = (saved(), saved(_use_new_zipfile_serialization=False))
LISTING = {
    "id": "org/model",
    "sha": "0" * 40,
    "siblings": [{"rfilename": name} for name in ("config.json", "model.safetensors", "onnx/config.json")],
}
HEAD = b"\n".join(
    [
        b"200",
        b"X-Repo-Commit: " + b"0" * 40,
        b'ETag: "' + b"0" * 40 + b'"',
        b"Content-Length: 2",
        b"X-Linked-Size: 2",
        b'X-Linked-ETag: "' + b"0" * 64 + b'"',
        b"Content-Encoding: identity",
    ]
)
SHARDED = torch.arange(42, dtype=torch.float32).reshape(6, 7)
SUM = RunningSum(("s/step-1", "s/step-2"), 3.0, "ema", 0.5, {"w": "BF16"})
PIECES = b"".join(
    b"\n%c\n%c%b\x15%b\x18%c" % (len(text) + 9, len(text), text, np.float32(-i).tobytes(), 1 + i)
    for i, text in enumerate((b"<unk>", b"a", "\u2581é".encode()))
)  # of a SentencePiece model: text, score, type
CALIBRATION = {"./a": {"objective": "output_change", "scope": "global", "search": "grid", "chosen": 0.5, "why": "best",
                       "value": 0.1, "plain": {"value": 0.2}, "forward_passes": 3, "sequences": 2, "path": [[1, 2]],
                       "q": {"layers.0.w": 0.5}}}  # fmt: skip
ROWS = {
    "jsonl": b'{"text": "a b", "label": 1}\n{"text": "c", "label": 0}\n',
    "csv": b'text,label\n"a, b",1\nc,0\n',
    "txt": "a b\nc é\n".encode(),
}


def make_valid_files(folder: Path) -> None:
    """Valid files of every kind: base, a, a delta, an output with its lock."""
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.w": torch.randn(6, 8, generator=generator).bfloat16() for i in range(3)} | {
        "ids": torch.arange(4)
    }
    make_checkpoint(folder / "base", base, shards=2)
    make_checkpoint(folder / "a", {n: t + 1 for n, t in base.items()}, shards=2)
    (folder / "r.yaml").write_text("base_model: ./base\nmodels: [{model: ./a, prune: {method: dare, density: 0.5}}]\n")
    run(folder / "r.yaml", folder / "out")
    (folder / "delta").mkdir()
    with ArtifactWriter(folder / "delta", Base(id="base")) as writer:
        for name, tensor in base.items():
            bits = tensor.reshape(-1).view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int64).numpy()
            code = "BF16" if tensor.dtype == torch.bfloat16 else "I64"
            old = BaseTensor(name, code, tuple(tensor.shape), lambda start, stop, bits=bits: bits[start:stop])
            out = writer.tensor(name, code, tuple(tensor.shape), old)
            new = bits.copy()
            new[::5] += 1
            out.write(0, new)
        writer.finish()

    make_chain(folder)
    make_components(folder)
    make_vocabularies(folder)
    make_adapter(folder / "lora")
    make_gguf(folder / "tiny.gguf")
    make_distributed(folder / "distributed")


def make_chain(folder: Path) -> None:
    """Two versions of ours, and one of slime's."""
    with ChainWriter(folder / "chain", base=folder / "base") as writer:
        for _ in range(2):
            writer.write(load_tensors(folder / "base"))
    version = folder / "slime" / "weight_v000001"
    version.mkdir(parents=True)
    said = {"version": "000001", "base_version": "000000", "delta_encoding": "xor", "compression_format": "zstd",
            "checksum_format": "blake3"}  # fmt: skip
    diff = torch.frombuffer(bytearray(zstandard.compress(bytes(32))), dtype=torch.uint8)
    checksum = blake3.blake3(np.arange(4, dtype=np.int64).tobytes()).hexdigest()
    save_file({"ids": diff}, version / "model-00000.safetensors", {"ids": checksum})
    write_json(version / INDEX, {"metadata": said, "weight_map": {"ids": "model-00000.safetensors"}})


def make_gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"block_count": 1, "attention.head_count": 2, "embedding_length": 32}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    kind = gguf.GGMLQuantizationType.Q8_0
    for name in ("token_embd", "blk.0.attn_q", "blk.0.attn_k"):
        writer.add_tensor(f"{name}.weight", gguf.quantize(np.ones((4, 32), np.float32), kind), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_distributed(folder: Path) -> None:
    """A checkpoint of torch.distributed in two files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = dcp.FileSystemWriter(folder, thread_count=2, sync_files=False)
        dcp.save({"model": {"a": SHARDED, "b": SHARDED.bfloat16()}}, storage_writer=writer, no_dist=True)
    write_json(folder / "config.json", {"model_type": "test"})


def make_components(folder: Path) -> None:
    """A pipeline of two components."""
    for part in ("unet", "vae"):
        make_checkpoint(folder / "pipeline" / part, {"w.weight": torch.ones(2, 3)})
    (folder / "pipeline" / "scheduler").mkdir()
    write_json(folder / "pipeline" / "scheduler" / "scheduler_config.json", {})
    listed = {part: ["diffusers", "X"] for part in ("unet", "vae", "scheduler")}
    write_json(folder / "pipeline" / "model_index.json", {"_class_name": "P", "safety_checker": [None, None], **listed})


def make_vocabularies(folder: Path) -> None:
    """Three models with tokenizers that differ, and a recipe that unites them."""
    generator = torch.Generator().manual_seed(1)
    for name, more in (("words", ()), ("words_a", ("w2", "<tool>")), ("words_b", ("w3",))):
        words = [*WORDS, *more]
        embedding = {"model.embed_tokens.weight": torch.randn(len(words), 4, generator=generator)}
        make_checkpoint(folder / name, embedding, config={"model_type": "test", "vocab_size": len(words)})
        for file, value in assets(words).items():
            write_json(folder / name / file, value)
    models = "[{model: ./words_a, parameters: {weight: 0.5}}, {model: ./words_b, parameters: {weight: 0.5}}]"
    head = "merge_method: linear\nbase_model: ./words\ntokenizer_source: union\nchat_template: auto\n"
    (folder / "words.yaml").write_text(f"{head}models: {models}\n")


def assets(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What lies beside the weights of a model, by file."""
    matching = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": word, **matching} for i, word in enumerate(words) if word.startswith("<")]
    vocabulary = {word: i for i, word in enumerate(words)}
    return {
        "tokenizer.json": {
            "version": "1.0",
            "added_tokens": added,
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": {"type": "TemplateProcessing", "special_tokens": {"<s>": {"id": "<s>", "ids": [1]}}},
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<pad>"},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": {"content": "</s>", **matching},
            "additional_special_tokens": ["<pad>"],
            "added_tokens_decoder": {str(entry["id"]): entry for entry in added},
            "chat_template": [{"name": "default", "template": "{{ messages }}"}],
        },
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}},
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 0},
    }


def make_adapter(folder: Path) -> None:
    """A LoRA, and beside it the model of one layer that it is of."""
    folder.mkdir()
    make_checkpoint(folder.with_name("lora_base"), {"layers.0.w.weight": torch.ones(6, 8)})
    pair = {"lora_A": torch.ones(2, 8), "lora_B": torch.ones(6, 2)}
    tensors = {f"base_model.model.layers.0.w.{part}.weight": tensor for part, tensor in pair.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {}, "target_modules": ["w"], "bias": "none"}
    write_json(folder / "adapter_config.json", config)


def tolerates(call: Callable[[], Any]) -> None:
    """The call ends well or with an error of ours that prints."""
    try:
        call()
    except DeltamergeError as error:
        said = str(error)
    else:
        return
    assert said


def values(tensors: Mapping[str, TensorInfo]) -> dict[str, torch.Tensor]:
    """The values of tensors, but for those that are large."""
    made = {}
    with Reader() as reader, np.errstate(all="ignore"):
        for name, info in tensors.items():
            if info.nbytes < 1 << 20:
                raw = torch.empty(info.nbytes, dtype=torch.uint8)
                reader.read_into(info, 0, raw.numpy())
                made[name] = raw.view(torch_dtype(info.dtype)).view(info.shape)
    return made


# What official readers raise for bytes that ours reads (a pickle's frame beyond its end): torch.distributed's is no
# Exception.
REFUSALS: tuple[type[BaseException], ...] = (Exception, CheckpointException)


def agree(ours: Mapping[str, torch.Tensor], official: Callable[[], Mapping[str, Any]]) -> None:
    """What the format's own reader reads of these names has the same values; it may refuse what ours reads."""
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            theirs = official()
    except REFUSALS:
        return
    assert REFUSALS or ours.keys() & theirs.keys()
    for name, tensor in ours.items():
        if isinstance(other := theirs.get(name), torch.Tensor) and other.layout == torch.strided:
            assert tensor.dtype == other.dtype, name
            assert tensor.shape == other.shape, name
            assert torch.equal(bits(tensor), bits(other)), name


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def read_as_any(path: Path, *, mergekit_exact: bool = False) -> None:
    """Read a recipe; where it leaves values open, a few of the recipes that it stands for: a run refuses it itself."""
    file = read_either(path, mergekit_exact=mergekit_exact)
    if isinstance(file, TemplateFile):
        for values in islice(file.template.examples(), 3):
            assert file.file(values).output.recipe.model_dump() == file.recipe(values).model_dump()
        with pytest.raises(RecipeError, match="not one value"):
            read_recipe(path, mergekit_exact=mergekit_exact)


@dataclass(frozen=True)
class Targets:
    """The readers, over copies in `scratch` of the valid files in `place`."""

    place: Path
    scratch: Path
    seldom: bool = False  # one merge in five is run, the others are only planned

    def _runs(self, data: bytes) -> bool:
        return not self.seldom or crc32(data) % 5 == 0

    def fresh(self, name: str) -> Path:
        """A fresh copy of one of the valid folders."""
        shutil.rmtree(self.scratch / name, ignore_errors=True)
        return Path(shutil.copytree(self.place / name, self.scratch / name))

    @cached_property
    def _kept(self) -> dict[str, Path]:
        return {name: self.fresh(name) for name in ("a", "delta", "out", "chain", "slime")}

    @cached_property
    def _planned(self) -> Any:
        plan = make_plan(self.place / "r.yaml")
        return plan, hashes.describe_inputs(plan, 1)

    def recipe(self, data: bytes) -> None:
        """A recipe, as every command reads it, beside the folders of the series that recipes name."""
        path = self.scratch / "r.yaml"
        path.write_bytes(data)
        for step in ("step-9", "step-10"):
            (self.scratch / "models" / "run" / step).mkdir(parents=True, exist_ok=True)
        tolerates(lambda: read_as_any(path))
        tolerates(lambda: read_as_any(path, mergekit_exact=True))

    def header(self, data: bytes) -> None:
        """A file; or the text of a header, its length put before it and its tensors behind."""
        if data.startswith(b"{"):
            data = len(data).to_bytes(8, "little") + data + BODY
        path = self.scratch / "x.safetensors"
        path.write_bytes(data)
        tolerates(lambda: read_header(path))

    def gguf(self, data: bytes) -> None:
        path = self.scratch / "x.gguf"
        path.write_bytes(data)

        def official() -> dict[str, torch.Tensor]:
            stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
            pairs = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
            found = {ours: stored[theirs] for ours, theirs in pairs.items() if theirs in stored}
            made = {name: gguf.dequantize(tensor.data, tensor.tensor_type) for name, tensor in found.items()}
            return {name: torch.from_numpy(array.copy()).float() for name, array in made.items()}

        def read() -> None:
            found = values(decoded(open_checkpoint(path)).tensors)
            agree({name: torch.where(t.isnan(), torch.nan, t).float() for name, t in found.items()}, without_nan)

        def without_nan() -> dict[str, torch.Tensor]:
            return {name: torch.where(t.isnan(), torch.nan, t) for name, t in official().items()}

        tolerates(read)

    def torch_file(self, data: bytes) -> None:
        """A file of torch; or the pickle in one, whose archive is put around it. What is read lies in the file."""
        if data.startswith(b"\x80\x02}"):
            made = io.BytesIO()
            with zipfile.ZipFile(made, "w") as archive:
                archive.writestr("archive/data.pkl", data)
                archive.writestr("archive/version", b"3\n")
                for key, tensor in enumerate(TENSORS.values()):
                    archive.writestr(f"archive/data/{key}", bytes(tensor.nbytes))
            data = made.getvalue()
        path = self.scratch / "x.bin"
        path.write_bytes(data)

        def read() -> None:
            tensors = read_torch_header(path).tensors
            for info in tensors.values():
                assert 0 <= info.begin <= info.begin + info.nbytes <= len(data)
            agree(values(tensors), lambda: torch.load(path, map_location="cpu", weights_only=True))

        tolerates(read)

    def model_index(self, data: bytes) -> None:
        """The list of a pipeline's components, merged to the end: nothing is written outside of the output."""
        (self._pipeline / "model_index.json").write_bytes(data)
        out = self.scratch / "listed"
        (self.scratch / "listed.yaml").write_text("merge_method: passthrough\nmodels: [{model: ./pipeline}]\n")
        tolerates(lambda: make_plan(self.scratch / "listed.yaml"))
        if self._runs(data):
            before = {path for path in self.scratch.rglob("*") if not path.is_relative_to(out)}
            tolerates(lambda: run(self.scratch / "listed.yaml", out, force=True, workers=1))
            assert {path for path in self.scratch.rglob("*") if not path.is_relative_to(out)} == before

    @cached_property
    def _pipeline(self) -> Path:
        return self.fresh("pipeline")

    def index(self, data: bytes) -> None:
        (self._kept["a"] / INDEX).write_bytes(data)
        tolerates(lambda: open_checkpoint(self._kept["a"]))

    def delta(self, data: bytes, file: str = "delta.json") -> None:
        """The manifest, and what is stored of the tensors that it describes."""
        folder = self._kept["delta"]
        (folder / file).write_bytes(data)

        def read() -> None:
            delta = DeltaFile.open(folder)
            for entry in delta.entries.values():
                if not entry.has_steps and (entry.size < 1 << 16 or entry.index is not None):
                    sum(len(positions) for positions in entry.positions())
            if all(entry.size < 1 << 16 for entry in delta.entries.values()):
                list(delta.patches(self.place / "base"))

        tolerates(read)
        (folder / file).write_bytes((self.place / "delta" / file).read_bytes())

    def version(self, data: bytes) -> None:
        """version.json of the second version of a chain."""
        path = self._kept["chain"] / "000002" / "version.json"
        path.write_bytes(data)
        state = load_tensors(self.place / "base")
        before = {name: tensor.clone() for name, tensor in state.items()}

        def read() -> None:
            head(path.parents[1])
            load_delta(path.parent).apply_(state)

        tolerates(read)
        assert all(torch.equal(state[name], before[name]) for name in before)  # the two versions change nothing

    def slime(self, data: bytes) -> None:
        """The index of a version that slime wrote."""
        path = self._kept["slime"] / "weight_v000001" / INDEX
        path.write_bytes(data)
        tolerates(lambda: SLIME.over(path.parent, open_checkpoint(self.place / "base"), "x"))

    def arrays(self, data: bytes) -> None:
        self.delta(data, "delta.safetensors")

    def steps(self, data: bytes) -> None:
        """A tile of steps, over a base of every exponent: kernels and numpy read the same of it, or refuse it both."""
        stored, found = np.frombuffer(data, np.uint8), []
        for native in (kernels.native(), None):

            def read() -> None:
                found.append(decode_tile(stored, STEPPED, "BF16"))

            with patch.object(kernels, "native", lambda native=native: native):
                tolerates(read)
        assert len(found) in (0, 2)
        for a, b in zip(*found, strict=True) if found else ():
            assert np.array_equal(a, b)

    def lock(self, data: bytes) -> None:
        path = self._kept["out"] / LOCK_NAME
        path.write_bytes(data)
        plan, inputs = self._planned
        tolerates(lambda: verify(path.parent, 1))
        tolerates(lambda: Lock.read(path).check_inputs(inputs))
        tolerates(lambda: Lock.read(path).calibrated(plan))

    def rows(self, data: bytes) -> None:
        """Calibration rows; the first byte is the kind of file."""
        kind = list(ROWS)[data[0] % len(ROWS)] if data else "txt"
        path = self.scratch / f"rows.{kind}"
        path.write_bytes(data[1:])
        label = None if kind == "txt" else "label"
        tolerates(lambda: read_rows(path.name, folder=self.scratch, text="text", label=label))

    def _beside(self, name: str, file: str, data: bytes) -> None:
        """A file beside the weights of a model whose vocabulary is merged to the end."""
        (self._united / name / file).write_bytes(data)
        try:
            tolerates(lambda: make_plan(self._united / "words.yaml"))
            if self._runs(data):
                tolerates(lambda: run(self._united / "words.yaml", self.scratch / "united", force=True, workers=1))
        finally:
            shutil.copyfile(self.place / name / file, self._united / name / file)

    @cached_property
    def _united(self) -> Path:
        for name in ("words", "words_a", "words_b"):
            self.fresh(name)
        shutil.copy(self.place / "words.yaml", self.scratch)
        return self.scratch

    def tokenizer(self, data: bytes) -> None:
        self._beside("words_a", "tokenizer.json", data)

    def tokenizer_config(self, data: bytes) -> None:
        self._beside("words_a", "tokenizer_config.json", data)

    def special_tokens(self, data: bytes) -> None:
        self._beside("words", "special_tokens_map.json", data)

    def generation(self, data: bytes) -> None:
        self._beside("words", "generation_config.json", data)

    def config(self, data: bytes) -> None:
        self._beside("words", "config.json", data)

    def adapter(self, data: bytes) -> None:
        """The config of a LoRA, which is merged to the end."""
        folder = self._lora
        (folder / "adapter_config.json").write_bytes(data)
        (self.scratch / "l.yaml").write_text("merge_method: passthrough\nmodels: [{model: ./lora_base+./lora}]\n")
        tolerates(lambda: make_plan(self.scratch / "l.yaml"))
        if self._runs(data):
            tolerates(lambda: run(self.scratch / "l.yaml", self.scratch / "adapted", force=True, workers=1))

    @cached_property
    def _lora(self) -> Path:
        self.fresh("lora_base")
        return self.fresh("lora")

    def factors(self, data: bytes) -> None:
        """The weights of a LoRA, read as merged."""
        (self._lora / "adapter_model.safetensors").write_bytes(data)

        def read() -> None:
            made = values(open_model("lora_base+lora", self.scratch, weights=False).tensors)["layers.0.w.weight"]
            found = {name.split(".lora_")[1][0]: tensor.double() for name, tensor in load(data).items()}
            wanted = 1 + 2 * (found["B"] @ found["A"])
            fits = torch.isclose(made.double(), wanted, rtol=1e-5, atol=1e-5, equal_nan=True)
            assert (fits | ~(wanted.abs() < 1e38)).all()

        with np.errstate(all="ignore"):
            tolerates(read)

    @cached_property
    def _distributed(self) -> Path:
        return self.fresh("distributed")

    def distributed(self, data: bytes, file: str = ".metadata") -> None:
        """A file of a checkpoint of torch.distributed."""
        folder = self._distributed
        (folder / file).write_bytes(data)

        def official() -> dict[str, torch.Tensor]:
            state: dict[str, Any] = {}
            reader = dcp.FileSystemReader(folder)
            _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
            return state.get("model", state)

        tolerates(lambda: agree(values(open_checkpoint(folder).tensors), official))
        shutil.copyfile(self.place / "distributed" / file, folder / file)

    def shard(self, data: bytes) -> None:
        self.distributed(data, "__0_0.distcp")

    def packed(self, data: bytes) -> None:
        """The weights of a quantised checkpoint; the first byte is the scheme. Kernels and numpy read the same."""
        name = list(PACKED)[data[0] % len(PACKED)] if data else "awq"
        self._quantised(data[1:], json.dumps(self._packed[name].config).encode())

    def quantisation(self, data: bytes) -> None:
        """What a config says of how weights are quantised; the first byte is the scheme of the weights."""
        name = list(PACKED)[data[0] % len(PACKED)] if data else "awq"
        self._quantised(save(self._packed[name].tensors), data[1:])

    @cached_property
    def _packed(self) -> dict[str, Any]:
        return {name: make() for name, make in PACKED.items()}

    def _quantised(self, weights: bytes, settings: bytes) -> None:
        folder = self.scratch / "quantised"
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").write_bytes(weights)
        (folder / "config.json").write_bytes(b'{"model_type": "llama", "quantization_config": %b}' % settings)
        found = []
        for native in (kernels.native(), None):

            def read() -> None:
                found.append(values(decoded(open_checkpoint(folder)).tensors))

            with patch.object(kernels, "native", lambda native=native: native):
                tolerates(read)
        assert len(found) in (0, 2)
        if found:
            agree(found[0], lambda: found[1])

    def running_sum(self, data: bytes) -> None:
        (self.scratch / RUNNING_SUM).write_bytes(data)

        def read() -> None:
            said = read_running_sum(self.scratch)
            assert said is not None
            assert math.isfinite(said.total)
            json.dumps(said.describe(), allow_nan=False)

        tolerates(read)

    def diffs(self, data: bytes) -> None:
        """The weights of a version that slime wrote: a diff of zstd, whose result has a checksum."""
        version = self._kept["slime"] / "weight_v000001"
        (version / "model-00000.safetensors").write_bytes(data)
        base = open_checkpoint(self.place / "base")

        def read() -> None:
            found, old = values(SLIME.over(version, base, "x").tensors), values(base.tensors)
            assert all(torch.equal(bits(found[name]), bits(old[name])) for name in old)  # its diff is of zeros

        tolerates(read)

    def pieces(self, data: bytes) -> None:
        """A SentencePiece model."""
        tolerates(lambda: all(math.isnan(score) or kind >= 0 for _, score, kind in sentences(data, self.scratch)))

    def listing(self, data: bytes) -> None:
        """What the hub says of a repository, whose files are then named as a model's."""

        def read() -> None:
            commit, names = read_listing(data, None)
            assert COMMIT.fullmatch(commit)
            assert not any(set("/\\\0\n") & set(name) or name in ("", ".", "..") for name in names)
            shards_of({"a": weight_source(names)}, names)

        tolerates(read)

    def ranges(self, data: bytes) -> None:
        """An answer to a range request: a line with its Content-Range, and the bytes."""
        said, _, body = data.partition(b"\n")

        def fetch(first: int, last: int) -> tuple[bytes, int]:
            return check_range(body[first : last + 1], said.decode("latin-1"), first, last)

        tolerates(lambda: header_by_ranges(fetch, self.scratch / "x.safetensors"))

    def head(self, data: bytes) -> None:
        """The head of an answer to HEAD, as lines; what passes can name nothing outside of the cache."""
        from huggingface_hub.utils import get_session

        client = get_session()
        library = sys.modules[type(client).__module__.partition(".")[0]]
        status, *lines = data.split(b"\n")
        pairs = [
            (key, value.strip()) for key, colon, value in (line.partition(b":") for line in lines) if colon and key
        ]
        code = int(status) if status.isdigit() and 200 <= int(status[:4]) < 600 else 200
        request = library.Request("HEAD", "https://huggingface.co/org/model/resolve/main/config.json")

        def read() -> None:
            answer = library.Response(code, headers=pairs, request=request)
            bounds = Bounds(1000)
            within(bounds, lambda: check(answer), whole=False)
            etag = answer.headers.get("X-Linked-ETag") or answer.headers.get("ETag")
            if code < 300 and etag is not None:
                assert HASH.fullmatch(etag.lstrip("W/").strip('"'))
            assert COMMIT.fullmatch(answer.headers.get("X-Repo-Commit", "0" * 40))
            assert bounds.size is None or bounds.size <= 1000

        tolerates(read)

    def seeds(self, name: str) -> list[bytes]:
        """Valid bytes for the target `name`."""
        lock = yaml.safe_load((self.place / "out" / LOCK_NAME).read_bytes())
        known: dict[str, Callable[[], list[bytes]]] = {
            "recipe": lambda: [path.read_bytes() for path in RECIPES],
            "header": lambda: [save(TENSORS), save(TENSORS)[8 : -len(BODY)]],
            "gguf": lambda: [(self.place / "tiny.gguf").read_bytes()],
            "index": lambda: [(self.place / "a" / INDEX).read_bytes()],
            "delta": lambda: [(self.place / "delta" / "delta.json").read_bytes()],
            "arrays": lambda: [(self.place / "delta" / "delta.safetensors").read_bytes()],
            "version": lambda: [(self.place / "chain" / "000002" / "version.json").read_bytes()],
            "slime": lambda: [(self.place / "slime" / "weight_v000001" / INDEX).read_bytes()],
            "steps": lambda: [
                encode_tile(STEPPED, np.arange(0, 4096, n), STEPPED[::n] ^ np.uint16(bits), "BF16").tobytes()
                for n, bits in ((100, 1), (5, 3), (1, 0x8001))
            ],
            "lock": lambda: [yaml.safe_dump({**lock, "calibration": CALIBRATION}).encode()],
            "tokenizer": lambda: [(self.place / "words_a" / "tokenizer.json").read_bytes()],
            "tokenizer_config": lambda: [(self.place / "words_a" / "tokenizer_config.json").read_bytes()],
            "special_tokens": lambda: [(self.place / "words" / "special_tokens_map.json").read_bytes()],
            "generation": lambda: [(self.place / "words" / "generation_config.json").read_bytes()],
            "config": lambda: [(self.place / "words" / "config.json").read_bytes()],
            "adapter": lambda: [(self.place / "lora" / "adapter_config.json").read_bytes()],
            "listing": lambda: [json.dumps(LISTING).encode()],
            "ranges": lambda: [b"bytes 0-%d/%d\n%b" % (len(WEIGHTS) - 1, len(WEIGHTS), WEIGHTS)],
            "head": lambda: [HEAD, HEAD.replace(b"200", b"302") + b"\nLocation: https://cdn.example/x"],
            "torch_file": lambda: [*TORCH, zipfile.ZipFile(io.BytesIO(TORCH[0])).read("archive/data.pkl")],
            "model_index": lambda: [(self.place / "pipeline" / "model_index.json").read_bytes()],
            "factors": lambda: [(self.place / "lora" / "adapter_model.safetensors").read_bytes()],
            "distributed": lambda: [(self.place / "distributed" / ".metadata").read_bytes()],
            "shard": lambda: [(self.place / "distributed" / "__0_0.distcp").read_bytes()],
            "packed": lambda: [bytes([i]) + save(one.tensors) for i, one in enumerate(self._packed.values())],
            "quantisation": lambda: [
                bytes([i]) + json.dumps(one.config).encode() for i, one in enumerate(self._packed.values())
            ],
            "running_sum": lambda: [json.dumps(SUM.describe()).encode()],
            "diffs": lambda: [(self.place / "slime" / "weight_v000001" / "model-00000.safetensors").read_bytes()],
            "pieces": lambda: [PIECES],
            "rows": lambda: [bytes([i]) + data for i, data in enumerate(ROWS.values())],
        }
        return known[name]()


NAMES = (
    "recipe", "header", "gguf", "index", "delta", "arrays", "steps", "version", "slime", "lock", "rows", "tokenizer",
    "tokenizer_config", "special_tokens", "generation", "config", "adapter", "listing", "ranges", "head",
    "torch_file", "model_index", "factors", "distributed", "shard", "packed", "quantisation", "running_sum", "diffs",
    "pieces",
)  # fmt: skip
JSON = (
    "tokenizer", "tokenizer_config", "special_tokens", "generation", "config", "adapter", "listing", "running_sum",
)  # fmt: skip
