"""Screenshots of the report's page in .pictures/: a phone and a desktop, light and dark, by Debian's chromium.

Of a real fine-tune in ../shared/data where it is there, else of the tests' tiny one: a calibrated run and its page.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / ".pictures"
SHARED = ROOT.parent.parent / "shared" / "data", ROOT.parent / "shared" / "data"
BROWSERS = "chromium", "chromium-browser", "google-chrome"
SIZES = {"phone": (390, 9000), "desktop": (1280, 4600)}
SCHEMES = {"light": 1, "dark": 0}  # blink's preferredColorScheme
RECIPE = """\
base_model: {base}
models: [{{model: {tune}, prune: {{method: dare, density: 0.1, q: {{objective: output_change, scope: layer}}}}}}]
calibration: {{data: rows.jsonl, length: 16, sequences: 12, seeds: 1}}
"""
WORDS = "a good film the story was awful and dull but one scene made me laugh i would see it again with my friends"


def main() -> None:
    """Make the pages and photograph them; says where they are."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit("no chromium: apt-get install chromium")
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, tune = models(folder)
        draw = random.Random(0)
        rows = (json.dumps({"text": " ".join(draw.choices(words(base), k=12))}) for _ in range(300))
        (folder / "rows.jsonl").write_text("\n".join(rows))
        (folder / "recipe.yaml").write_text(RECIPE.format(base=base, tune=tune))
        deltamerge(folder, "run", "recipe.yaml", "--out", "merged")
        few = ("--sequences", "12", "--length", "16", "--density", "0.1")
        seen = ("--base", base, "--calibration", "rows.jsonl", *few)
        for page, model in {"tuned": tune, "merged": "merged"}.items():
            deltamerge(folder, "inspect", model, *seen, "--report", OUT / f"{page}.html", "--force")
        for page in ("tuned", "merged"):
            for size, (width, height) in SIZES.items():
                for scheme, number in SCHEMES.items():
                    picture = OUT / f"{page}-{size}-{scheme}.png"
                    options = [
                        "--headless", "--no-sandbox", "--hide-scrollbars", f"--user-data-dir={folder}/chromium",
                        f"--blink-settings=preferredColorScheme={number}", f"--window-size={width},{height}",
                        f"--screenshot={picture}",
                    ]  # fmt: skip
                    command = [browser, *options, (OUT / f"{page}.html").as_uri()]
                    subprocess.run(command, check=True, capture_output=True, timeout=120)
                    print(picture)


def models(folder: Path) -> tuple[Path, Path]:
    """A base and a fine-tune of it."""
    for shared in SHARED:
        if (shared / "sentiment").is_dir():
            return shared / "base", shared / "sentiment"
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import tiny_bert_pair

    base, tune = tiny_bert_pair(folder, tokenizer=True)
    return Path(base), Path(tune)


def words(base: Path) -> list[str]:
    """Words that the model's tokenizer knows."""
    return WORDS.split() if any(base.is_relative_to(shared) for shared in SHARED) else [f"w{i}" for i in range(4, 94)]


def deltamerge(folder: Path, *arguments: str | Path) -> None:
    """Run a command in `folder`; what it says goes to stderr."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "deltamerge", *map(str, arguments)]
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
