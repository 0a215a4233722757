"""Rows of reasoning-gym's tasks as JSON lines, written with the Python that has the package (Apache-2.0).

    PYTHON benchmarks/smollm2_rows.py FOLDER      FOLDER/TASK.PART.jsonl, {"text": prompt, "label": answer} each,
                                                  and story.txt, plain text that is in the public domain

A prompt is the question without its constant instructions, then "Answer:". Rows are a function of the task, the part
and the seed; what stands in the test part is in no other, what stands in validation not in train.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

# Of each task reasoning-gym's own name and parameters: the sizes that 135 M parameters learn in a few hundred steps.
NUMBERS = {"min_numbers": 3, "max_numbers": 6, "max_decimals": 0, "min_value": 0, "max_value": 99}
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "arithmetic": ("chain_sum", {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 1}),
    "sorting": ("number_sorting", NUMBERS),
    "reversal": ("word_sequence_reversal", {"min_words": 3, "max_words": 6}),
    "family": ("family_relationships", {}),
    "spelling": ("spell_backward", {"min_word_len": 3, "max_word_len": 6}),
    "needle": ("needle_haystack", {"min_num_statements": 3, "max_num_statements": 5}),
    "filtering": ("number_filtering", NUMBERS),
    "legs": ("leg_counting", {"min_animals": 1, "max_animals": 2, "max_instances": 6}),
    "friends": ("aiw", {"max_entities": 20}),
}
PARTS = {"test": (400, 103), "validation": (400, 102), "train": (12000, 101)}  # rows, seed


def rows(task: str, count: int, seed: int, taken: set[str]) -> list[dict[str, str]]:
    """`count` rows whose text is not `taken`, in the order in which they are generated."""
    import reasoning_gym  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not everywhere installed

    name, parameters = TASKS[task]
    found = []
    for entry in reasoning_gym.create_dataset(name, size=3 * count, seed=seed, **parameters):
        text = prompt(entry["question"])
        if text not in taken:
            found.append({"text": text, "label": answer(entry["answer"])})
        if len(found) == count:
            break
    return found


def prompt(question: str) -> str:
    """The question's own lines, without instructions that are the same in every question of its task."""
    text = re.sub(r"\nPlease follow the instruction below:.*", "", question, flags=re.S)
    text = re.sub(r"^.*(?=Reverse this list of words)|^Your task is .*(?=how many legs)", "", text, flags=re.S)
    text = re.sub(
        r"\s(Reply only with a name|Return the new list in the same format|Provide only the color.*)\.?$", "", text
    )
    text = re.sub(r"\['(.*)'\]", lambda found: found[1].replace("', '", ", "), text)
    text = re.sub(r"State the final answer to the following arithmetic problem: ", "", text)
    text = re.sub(r"(?<=\d)\.0\b", "", text)
    return f"{text.strip()}\nAnswer:"


def answer(text: str) -> str:
    """Lists of quoted numbers as plain lists."""
    return re.sub(r"(?<=\d)\.0\b", "", re.sub(r"[\[\]']", "", text)).strip() or "none"


def story() -> str:
    """`In the Year 2889` by Jules and Michel Verne, without what Project Gutenberg says of it."""
    from reasoning_gym.data import get_data_file_path  # type: ignore[import-not-found,import-untyped,unused-ignore]

    text = get_data_file_path("in_the_year_2889.txt").read_text(encoding="utf-8")
    found = re.search(r"\n(Little though they seem.*)\*\*\* END OF ", text, flags=re.S)
    assert found, "the story has another beginning"
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"(?<!\n)\n(?!\n)", " ", found[1])).strip()


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "story.txt").write_text(story(), encoding="utf-8")
    for task in TASKS:
        if all((folder / f"{task}.{part}.jsonl").exists() for part in PARTS):
            continue
        taken: set[str] = set()
        for part, (count, seed) in PARTS.items():
            found = rows(task, count, seed, taken)
            taken |= {row["text"] for row in found}
            lines = "".join(json.dumps(row) + "\n" for row in found)
            (folder / f"{task}.{part}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
