"""An ordinary checkpoint as output: shards of safetensors, plain or quantised, and the line that loads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from deltamerge.engine.backends import single_threaded
from deltamerge.engine.devices import pinned
from deltamerge.engine.execute import execute
from deltamerge.engine.worker import on_gpu
from deltamerge.errors.shown import code
from deltamerge.files.hashes import seal
from deltamerge.files.outbox import ROOM, SLAB, room_for
from deltamerge.formats.components import PIPELINE
from deltamerge.formats.safetensors import Writer
from deltamerge.outputs.output import Account, RunOutput, Weights, WriteJob
from deltamerge.plan.memory import Memory
from deltamerge.plan.outputs import OutputTensor
from deltamerge.plan.planner import Plan
from deltamerge.recipe.output_keys import Output
from deltamerge.tensors.lazy import NDArray
from deltamerge.tensors.lazy import numpy as np
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Node

if TYPE_CHECKING:
    from deltamerge.calibrate.values import Spooled
    from deltamerge.formats.quantised.writer import CodedWriter, Losses

WORKERS_AN_OUTPUT_HASHER = 8  # merging threads per hashing thread beyond the first


class CheckpointOutput(RunOutput):
    """A folder that loads as a model by itself."""

    hashes_as_read = True

    def memory(
        self, wanted: Output, tensors: tuple[OutputTensor, ...], workers: int, cap: int | None, *, weighed: bool
    ) -> Memory:
        """Return the memory of bytes on their way to the files, and of weights being computed."""
        most = room(workers, cap) + (workers + 1) * 2 * SLAB
        return Memory({"output": min(sum(tensor.nbytes for tensor in tensors), most)})

    def write(self, plan: Plan, job: WriteJob) -> Weights:
        """Write the shards, or some of them; see `RunOutput.write`."""
        mine = job.of(plan)
        with (
            job.values(plan) as known,
            job.merging(mine) as progress,
            single_threaded({"torch"} if _adjusts(mine) else ()),
            Reader(job.pieces) as reader,
            Writer(
                job.work.folder, plan.layout, files=job.files, journal=job.work.journal,
                room=room(plan.workers, plan.options.memory), hashers=1 + plan.workers // WORKERS_AN_OUTPUT_HASHER,
                allocate=pinned_memory(mine),
            ) as writer,
        ):  # fmt: skip
            coded = _coded(writer, mine, reader, job, known)
            sink = coded or writer
            execute(
                sorted(mine.tasks, key=lambda task: sink.where(task.name, task.offset)),
                reader,
                sink,
                device=plan.device,
                workers=plan.workers,
                tile_elements=plan.tile_elements,
                progress=progress,
                known=known,
                done=sink.has,
            )
            audit = writer.finish(keep=job.files is not None)
            losses = {} if coded is None else coded.losses()
        parts = {part.name for coding in mine.codings.values() for part in coding.parts}
        nonfinite = {name: count for name, count in audit.nonfinite.items() if name not in parts}
        sizes = {file.name: file.size for file in plan.layout.files}
        hashed = {name: {"hash": digest, "size": sizes[name]} for name, digest in audit.hashes.items()}
        seals = {name: seal(job.work.folder / name) for name in hashed}
        return Weights(plan, known, hashed, nonfinite, seals, QuantisedAccount(losses))

    def join(self, parts: Sequence[Mapping[str, Any]]) -> Account:
        """Return the quantisation errors of all parts."""
        losses = {name: tuple(sums) for part in parts for name, sums in part.get("losses", {}).items()}
        return QuantisedAccount(losses)

    def nbytes(self, plan: Plan, written: Mapping[str, Any]) -> int:
        """Return the bytes of the tensors."""
        return plan.nbytes

    def remarks(self, plan: Plan) -> tuple[str, ...]:
        """Return a note on weights that could not be quantised as asked."""
        return plan.left_plain

    def load_line(self, plan: Plan, folder: Path) -> str:
        """Return the line that loads the result in `folder`: of diffusers, sentence-transformers or transformers."""
        if (folder / "model_index.json").exists():
            return f'DiffusionPipeline.from_pretrained("{folder}")'
        if (folder / "modules.json").exists():
            return f'SentenceTransformer("{folder}")'
        if not plan.inputs.template.checkpoint.config:
            return f'load_file("{folder / plan.layout.files[0].name}")'
        kind = plan.config.get("_class_name")  # of diffusers
        if isinstance(kind, str) and kind.isidentifier():
            return f'{kind}.from_pretrained("{folder}")'
        architecture, head = architecture_of(plan.config), head_of(plan.config)
        known = architecture if architecture.isidentifier() and "auto_map" not in plan.config else "AutoModel"
        loader = head.loader if head is not None else None
        return f'{loader or known}.from_pretrained("{folder}")'

    def front_matter(self, plan: Plan) -> dict[str, object]:
        """Return the library that loads it, as the hub calls it."""
        template = plan.inputs.template.checkpoint
        if template.config_file == PIPELINE or "_class_name" in template.config:
            return {"library_name": "diffusers"}
        return {"library_name": "transformers" if template.is_simple else "sentence-transformers"}


OUTPUT = CheckpointOutput()


def room(workers: int, memory: int | None) -> int:
    """Return the bytes that may be on their way to the files; the minimum if memory is capped."""
    return room_for(workers) if memory is None else ROOM


def pinned_memory(plan: Plan) -> Callable[[int], NDArray[np.uint8]] | None:
    """Return a function that allocates memory for direct writes by a GPU. None: no tensor is computed on a GPU."""
    return pinned if any(on_gpu(task, plan.device) for task in plan.tasks) else None


# -- quantised weights


def _coded(writer: Writer, plan: Plan, reader: Reader, job: WriteJob, known: Mapping[Node, Any]) -> CodedWriter | None:
    """Return a writer that codes the quantised weights and passes the rest to `writer`.

    None: no weight is quantised.
    """
    if not plan.codings:
        return None
    from deltamerge.formats.quantised.writer import CodedWriter

    spooled = None if plan.moments is None else known[plan.moments]
    return CodedWriter(writer, plan.codings, reader, job.work.folder, partial(_moments, spooled))


def _moments(spooled: Spooled | None, name: str, matrix: int) -> NDArray[np.float64] | None:
    """Return the second moments of the inputs of a weight's matrix. None: they are not measured."""
    if spooled is None:
        return None
    from deltamerge.calibrate.values import of_layer

    return of_layer(spooled, name=name).read(matrix)


def _adjusts(plan: Plan) -> bool:
    """Tell whether codes are chosen or measured by torch."""
    return any(coding.rounding is not None for coding in plan.codings.values())


@dataclass(frozen=True)
class QuantisedAccount(Account):
    """The quantisation error of each weight; empty if no weight is quantised."""

    losses: Losses

    def record(self) -> dict[str, Any]:
        """Return the content for a part's record."""
        return {"losses": self.losses} if self.losses else {}

    def describe(self) -> dict[str, Any]:
        """Return the errors, for the lock."""
        return {"quantization": errors_of(self.losses)} if self.losses else {}

    def card(self, plan: Plan) -> list[str]:
        """Return a section on the errors of quantised weights."""
        if not self.losses:
            return []
        said = errors_of(self.losses)
        worst = max(said["tensors"], key=lambda name: said["tensors"][name])
        text = f"{len(self.losses)} weights are quantised: relative error {said['relative_error']:.3g} of the merge in"
        lines = [f"{text} float32, at most {said['tensors'][worst]:.3g} ({code(worst)}).", ""]
        if "outputs" in said:
            outputs = said["outputs"]
            lines += [
                f"The layers' outputs on the calibration rows: relative error {outputs['relative_error']:.3g}, "
                f"with the nearest codes {outputs['nearest']:.3g}.",
                "",
            ]
        for where, share in (("the merged delta", said), ("what it changes in the outputs", said.get("outputs", {}))):
            if "delta" in share:
                kept, along = share["delta"]["share"], share["delta"]["projection"]
                lines += [f"Of {where} {kept:.3g} survives (squared cosine; projection {along:.3g}).", ""]
        return ["## Quantisation", "", *lines]


def errors_of(losses: Losses) -> dict[str, Any]:
    """Return ‖x − stored‖ / ‖x‖ of all quantised weights together and of each, where x is the merge in float32.

    Four digits do not depend on the machine.
    """
    from deltamerge.formats.quantised.writer import relative_error

    tensors = {name: _rounded(relative_error([sums])) for name, sums in losses.items()}
    found: dict[str, Any] = {"relative_error": _rounded(relative_error(losses.values())), "tensors": tensors}
    full = {name: sums for name, sums in losses.items() if len(sums) > 2}  # of a rounding, which measures more
    if not full:
        return found
    from deltamerge.formats.quantised.feedback import SquareSums, total

    sums = total(list(full.values()))
    found |= _of_delta(sums.lost, sums.delta, sums.written)
    if sums.norm_outputs:
        found["outputs"] = {
            "relative_error": _rounded((sums.lost_outputs / sums.norm_outputs) ** 0.5),
            "nearest": _rounded((sums.nearest_outputs / sums.norm_outputs) ** 0.5),
            **_of_delta(sums.lost_outputs, sums.delta_outputs, sums.written_outputs),
        }
        if unseen := [name for name, own in full.items() if not SquareSums(*own).norm_outputs]:
            found["unseen"] = unseen
    return found


def _of_delta(lost: float, delta: float, written: float) -> dict[str, Any]:
    """Return the part of a delta Δ that survives in the stored Q, from ‖W − Q‖², ‖Δ‖² and ‖Q − base‖².

    projection   ⟨Q − base, Δ⟩ / ‖Δ‖²
    share        ⟨Q − base, Δ⟩² / (‖Q − base‖² ‖Δ‖²): the share of Q − base that is the delta; the rest is noise
    """
    if not delta:
        return {}
    along = (written + delta - lost) / 2
    share = along * along / (written * delta) if written else 0.0
    return {"delta": {"projection": _rounded(along / delta), "share": _rounded(min(1.0, share))}}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


# -- heads


class ModelHead(NamedTuple):
    """A head: the task as the hub calls it, and the class of transformers that loads it; None: the model's own."""

    task: str
    loader: str | None


# By the end of an architecture's name.
HEADS = {
    "ForCausalLM": ModelHead("text-generation", "AutoModelForCausalLM"),
    "LMHeadModel": ModelHead("text-generation", "AutoModelForCausalLM"),
    "ForSequenceClassification": ModelHead("text-classification", "AutoModelForSequenceClassification"),
    "ForTokenClassification": ModelHead("token-classification", "AutoModelForTokenClassification"),
    "ForQuestionAnswering": ModelHead("question-answering", "AutoModelForQuestionAnswering"),
    "ForMaskedLM": ModelHead("fill-mask", "AutoModelForMaskedLM"),
    "ForImageClassification": ModelHead("image-classification", "AutoModelForImageClassification"),
    "ForImageTextToText": ModelHead("image-text-to-text", None),
    "ForSpeechSeq2Seq": ModelHead("automatic-speech-recognition", None),
}


def architecture_of(config: Mapping[str, Any]) -> str:
    """Return the class that config.json names; "" if it names none."""
    return str((config.get("architectures") or [""])[0])


def head_of(config: Mapping[str, Any]) -> ModelHead | None:
    """Return the head of a model by its class. None: the class does not tell."""
    architecture = architecture_of(config)
    return next((head for ending, head in HEADS.items() if architecture.endswith(ending)), None)
