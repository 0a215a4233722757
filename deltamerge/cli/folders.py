"""Commands on finished folders: verify, diff, push."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deltamerge.cli.layout import align, figure
from deltamerge.cli.options import AS_JSON, FILE, FOLDER, MODEL, PICKLES, WORKERS
from deltamerge.cli.output import say, say_json, tell
from deltamerge.errors import GO_ON, app, interruptible
from deltamerge.errors.shown import lines as one_a_line


@click.command("verify")
@click.argument("folder", type=FOLDER)
@click.option(
    "--base", type=MODEL, help="Check the base too: that a delta applies to it, or that the lock lists its files."
)
@WORKERS
@PICKLES
@AS_JSON
def verify(folder: Path, base: str | None, workers: int | None, pickles: bool, as_json: bool) -> None:
    """Check the output folder FOLDER against the hashes in its lock.

    For a chain or one of its versions, also checks that each version was made from its predecessor. For a store, checks
    each delta.
    """
    from deltamerge.engine.execute import default_workers
    from deltamerge.models.chain.folder import VERSION, is_chain
    from deltamerge.models.chain.publish import is_store
    from deltamerge.run.lock import verify as verify_folder

    workers = workers or default_workers()
    if is_store(folder):
        with app("chain"):
            from deltamerge.apps.chain.squash import verify_store

        deltas = verify_store(folder, base, workers, pickles=pickles)
        if as_json:
            say_json({"folder": str(folder), "deltas": deltas, "base": base})
            return
        for delta in deltas:
            tell(f"{folder / delta['name']}: {len(delta['files'])} files match the lock")
        if base is not None:
            tell(f"{folder}: applied to {base}, every delta gives the tensors it promises")
        return
    if (folder / VERSION).is_file() or is_chain(folder):
        with app("chain"):
            from deltamerge.apps.chain.squash import verify_chain

        versions = verify_chain(folder, base, workers, pickles=pickles)
        if as_json:
            say_json({"folder": str(folder), "versions": versions, "base": base})
            return
        files = sum(len(version["files"]) for version in versions)
        tell(f"{folder}: {len(versions)} versions, {files} files, each made from the result of the one before")
        if base is not None:
            tell(f"{folder}: applied to {base}, every version gives the tensors it promises")
        return
    names = verify_folder(folder, workers)
    about_base = None
    if base is not None:
        from deltamerge.run.apply import verify_base

        about_base = verify_base(folder, base, workers, pickles=pickles)
    if as_json:
        say_json({"folder": str(folder), "files": names, "base": about_base})
        return
    tell(f"{folder}: {len(names)} files match the lock")
    if about_base is not None:
        tell(f"{folder}: {about_base}")


@click.command("diff")
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
@WORKERS
@PICKLES
@AS_JSON
def diff(a: str, b: str, workers: int | None, pickles: bool, as_json: bool) -> None:
    """Compare two checkpoints, or two locks.

    A and B are folders or hub ids (one may be a delta of the other), or two recipe.lock files.
    """
    with app("inspect"):
        from deltamerge.apps.inspect.diff import diff as compare
    from deltamerge.engine.execute import default_workers

    found = compare(a, b, workers or default_workers(), pickles=pickles)
    say_json(found) if as_json else say(render_diff(found))


def render_diff(found: dict[str, Any]) -> str:
    """Return differences as an aligned table, or key by key."""
    if found["kind"] == "locks":
        lines = [f"{key}: {old} -> {new}" for key, (old, new) in found["changes"].items()]
        return one_a_line(lines or ["nothing differs"])
    rows: list[tuple[str, ...]] = [("tensor", "changed", "of", "max abs", "mean abs", "rel. norm")]
    for t in found["tensors"]:
        kinds = "" if t["a"] is None else f" ({t['a']} -> {t['b']})"
        numbers = (figure(t[key]) for key in ("max_abs", "mean_abs", "norm"))
        rows.append((t["name"] + kinds, f"{t['changed']:,}", f"{t['elements']:,}", *numbers))
    return one_a_line(
        [
            *(align(rows) if len(rows) > 1 else []),
            *(f"config.json: {key}: {old} -> {new}" for key, (old, new) in found["config"].items()),
            *(f"only in {found['b']}: {name}" for name in found["added"]),
            *(f"only in {found['a']}: {name}" for name in found["removed"]),
            *(f"tokenizers: {line}" for line in found["tokenizers"]),
            f"{len(found['tensors'])} tensors differ, {found['same']} are the same; {found['changed']:,} of "
            f"{found['elements']:,} entries changed, relative norm {figure(found['norm'])}",
        ]
    )


@click.command("push")
@click.argument("folder", type=FOLDER)
@click.argument("repository")
@click.option("--public", is_flag=True, help="Make the repository public. Default: private.")
@WORKERS
@AS_JSON
def push(folder: Path, repository: str, public: bool, workers: int | None, as_json: bool) -> None:
    """Publish the output folder FOLDER on the hub as REPOSITORY.

    Uploads weights, model card, recipe and lock. Log in first with `hf auth login`, or set HF_TOKEN. Run it again
    after an interruption: files that have arrived are not sent again.
    """
    from deltamerge.engine.execute import default_workers
    from deltamerge.run.publish import push as push_folder

    with interruptible(lambda _: f"files that have arrived on the hub stay there: {GO_ON}"):
        url = push_folder(folder, repository, public=public, workers=workers or default_workers())
    say_json({"folder": str(folder), "repository": repository, "url": url}) if as_json else tell(url)
