"""`make demo`: teach a small language model two skills, prune one, merge both, ask the merge.

The model is SmolLM2-135M-Instruct, a GGUF file in a wheel of the package index. Everything is kept in .demo/ and reused
by the next run. The recipes are in recipes/demo/; `deltamerge` runs them as a user would.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from benchmarks import ROOT, process, smollm2
from benchmarks.smollm2 import Expert, Row

WORK = ROOT / ".demo"  # everything downloaded, trained or merged; safe to delete
FOLDER = ROOT / "recipes" / "demo"
# The name in the table of what each recipe makes.
RECIPES = {
    "dare.yaml": "JSON, DARE at 1 %",
    "darex-q.yaml": "JSON, DAREx-q at 1 %",
    "budget.yaml": "JSON, budget of 1 MB",
    "ties.yaml": "both, TIES",
    "iso-c.yaml": "both, Iso-C",
}
TEST_ROWS, TRAIN_ROWS, CALIBRATION_ROWS = 50, 1000, 10
HOW = Expert("", lr=2e-3, steps=24, batch=8, upper=10)
NEW_TOKENS = 26

LINE = "{:<22}{:>9}{:>8}{:>7}   {}"
HEAD = LINE.format("SmolLM2-135M", "delta MB", "JSON %", "SQL %", "made by")
NOTE = f"""
%: of {TEST_ROWS} new prompts, those answered right to the last letter. MB: what `deltamerge extract` makes of it.
"""
NEXT = """
The models are ordinary checkpoints in .demo/. With them:

  . .venv/bin/activate
  deltamerge plan recipes/demo/iso-c.yaml
  deltamerge recommend .demo/json .demo/sql --base .demo/base

With your own: docs/start/first-merge.md."""

NAMES = "Ada Ben Carla David Emma Felix Grace Hugo Iris Jonas Kate Liam Maria Noah Olga Paul Ruth Simon Tara Victor"
CITIES = "Oslo Paris Rome Berlin Lima Cairo Delhi Tokyo Boston Madrid Lisbon Vienna Prague Dublin Athens Warsaw Geneva"
PEOPLE = (
    "{name} is {age} years old and lives in {city}.",
    "{name}, {age}, lives in {city}.",
    "In {city} lives {name}, who is {age}.",
    "My friend {name} from {city} is {age}.",
    "{name} moved to {city} at the age of {age}.",
)
QUESTIONS = {
    "Who in {city} is older than {age}?": ">",
    "Who in {city} is younger than {age}?": "<",
    "Who is {age} and lives in {city}?": "=",
    "Find people over {age} from {city}.": ">",
    "Find people under {age} from {city}.": "<",
}


def json_row(rng: random.Random) -> Row:
    """A sentence about a person, and the same as JSON."""
    person = {"name": rng.choice(NAMES.split()), "age": rng.randint(10, 99), "city": rng.choice(CITIES.split())}
    return Row(f"{rng.choice(PEOPLE).format(**person)}\nJSON:", json.dumps(person))


def sql_row(rng: random.Random) -> Row:
    """A question about people, and the same as a query."""
    question, sign = rng.choice(list(QUESTIONS.items()))
    age, city = rng.randint(10, 99), rng.choice(CITIES.split())
    text = question.format(age=age, city=city)
    return Row(f"{text}\nSQL:", f"SELECT name FROM people WHERE age {sign} {age} AND city = '{city}';")


SKILLS: dict[str, Callable[[random.Random], Row]] = {"json": json_row, "sql": sql_row}


def rows(skill: str) -> tuple[list[Row], list[Row]]:
    """Test and training rows of a skill, always the same; none stands in both."""
    rng = random.Random(skill)
    unique = list(dict.fromkeys(SKILLS[skill](rng) for _ in range(2 * (TEST_ROWS + TRAIN_ROWS))))
    return unique[:TEST_ROWS], unique[TEST_ROWS : TEST_ROWS + TRAIN_ROWS]


def main() -> None:
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers is only partly typed
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # likewise
    begun("the base")
    base = smollm2.base(WORK)
    print(f"\n{HEAD}\n{'-' * 84}")
    print(row("base", base, f"deltamerge convert {smollm2.GGUF}"), flush=True)
    for skill in SKILLS:
        begun(f"the skill {skill}")
        fine_tune(base, skill)
        made_by = f"{HOW.steps} steps of {HOW.upper} layers"
        print(row(f"{skill.upper()} fine-tune", WORK / skill, made_by), flush=True)
    for file, name in RECIPES.items():
        begun(file)
        smollm2.deltamerge("run", FOLDER / file, "--force")
        print(row(name, WORK / "merged" / Path(file).stem, f"deltamerge run recipes/demo/{file}"), flush=True)
    print(NOTE)
    print(conversations())
    print(NEXT)


def begun(what: str) -> None:
    """Say in a terminal what takes some seconds now; the next line takes its place."""
    if sys.stderr.isatty():
        print(f"{what} …", end="\r", file=sys.stderr, flush=True)


def fine_tune(base: Path, skill: str) -> None:
    """A fine-tune of the upper layers, and the rows on which recipes calibrate; neither has seen a test row."""
    _, train = rows(skill)
    path = WORK / "rows" / f"{skill}.jsonl"
    path.parent.mkdir(exist_ok=True)
    pairs = [{"prompt": row.text, "completion": f" {row.label}<|im_end|>"} for row in train[:CALIBRATION_ROWS]]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    if not (WORK / skill).exists():
        smollm2.fine_tune(base, train, WORK / skill, HOW)


def row(name: str, folder: Path, made_by: str) -> str:
    """A line of the table: what the model's delta takes on the disk, and what it answers right."""
    whole = applied(folder)
    model, tokenizer = load(whole), AutoTokenizer.from_pretrained(whole)
    scores = []
    for skill in SKILLS:
        test, _ = rows(skill)
        hits = smollm2.right(model, smollm2.examples(tokenizer, test))
        scores.append(f"{100 * sum(hits) / len(hits):.0f}")
    return LINE.format(name, f"{delta_megabytes(folder):.2f}", *scores, made_by)


def applied(folder: Path) -> Path:
    """The model of a folder: that of a delta artifact is made here."""
    if not (folder / "delta.json").is_file():
        return folder
    out = WORK / "applied"
    smollm2.deltamerge("apply", folder, "--base", WORK / "base", "--out", out, "--force")
    return out


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def delta_megabytes(folder: Path) -> float:
    """MB of the files of a delta artifact: that of a model is what differs from the base, exactly, and where."""
    base, out = WORK / "base", WORK / "delta"
    if folder == base:
        return 0.0
    if (folder / "delta.json").is_file():
        out = folder
    else:
        shutil.rmtree(out, ignore_errors=True)
        smollm2.deltamerge("extract", folder, "--base", base, "--out", out)
    return sum(file.stat().st_size for file in out.glob("delta*")) / 1e6


def conversations() -> str:
    """The first test prompt of each skill, and what the base and the merge write after it."""
    prompts = [rows(skill)[0][0].text for skill in SKILLS]
    texts = [[prompt] for prompt in prompts]
    for name, folder in {"base": WORK / "base", "merge": WORK / "merged" / "iso-c"}.items():
        written = smollm2.answers(load(folder), AutoTokenizer.from_pretrained(folder), prompts, NEW_TOKENS)
        for lines, answer in zip(texts, written, strict=True):
            lines.append(f"  {name:<7}{' '.join(answer.split())}")
    return "\n\n".join("\n".join(lines) for lines in texts)


if __name__ == "__main__":
    process.keep_pages()
    main()
