"""The command serve."""

from __future__ import annotations

import time
from pathlib import Path

import click

from deltamerge.cli.options import AS_JSON, FOLDER, MODEL, QUIET, WORKERS
from deltamerge.cli.output import say_json, tell
from deltamerge.errors import DeltamergeError, app

POLL = 0.3  # seconds between looks at a recipe


@click.command("serve")
@click.argument("recipe", type=MODEL)
@click.option("--vllm", "url", metavar="URL", required=True, help="The running server, such as http://localhost:8000.")
@click.option("--model", "folder", type=FOLDER, help="Model being served, a result of RECIPE. Default: its target.")
@click.option("--store", type=FOLDER, help="Folder for the changes, which the server must see. Default: MODEL-hot.")
@click.option("--watch", is_flag=True, help="Keep running: update the server whenever RECIPE is saved.")
@click.option("--undo", is_flag=True, help="Give the server the weights of MODEL again, exactly.")
@WORKERS
@AS_JSON
@QUIET
def command(
    recipe: str,
    url: str,
    folder: Path | None,
    store: Path | None,
    watch: bool,
    undo: bool,
    workers: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Update a running vLLM server to the edited RECIPE.

    Its model is a result of RECIPE before the edit. Only tensors that the edit changes are computed and sent. vLLM
    needs VLLM_SERVER_DEV_MODE=1, --weight-transfer-config '{"backend": "deltamerge"}', and the same file system.

    \b
    deltamerge serve merge.yaml --vllm http://localhost:8000
    deltamerge serve merge.yaml --vllm http://localhost:8000 --watch
    deltamerge serve merge.yaml --vllm http://localhost:8000 --undo
    """
    with app("serve"):
        from deltamerge.apps.serve.hot import HotServer, HotUpdate
    from deltamerge.recipe.file import read_recipe
    from deltamerge.run.plans import target_of

    if watch and undo:
        raise click.UsageError("--undo runs once: leave --watch out")
    path = Path(recipe)
    server = HotServer(url, folder or target_of(read_recipe(path), None), path, store=store, workers=workers)

    def say(done: HotUpdate) -> None:
        if as_json:
            say_json({"tensors": list(done.tensors), "of": done.of, "seconds": round(done.seconds, 3)})
        elif not quiet:
            what = "its own weights" if undo else f"{len(done.tensors)} of {done.of} tensors differ from its folder"
            tell(f"{url}: {what}, {done.seconds:.2f} s")

    seen = path.stat().st_mtime_ns
    say(server.undo() if undo else server.update())
    while watch:
        time.sleep(POLL)
        if (now := path.stat().st_mtime_ns) != seen:
            seen = now
            try:
                say(server.update())
            except DeltamergeError as error:
                tell(f"error: {error}")
