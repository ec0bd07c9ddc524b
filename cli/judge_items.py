# SPDX-License-Identifier: Apache-2.0
"""The items of `eval`: asked under a bar, kept in a folder that an interrupted run can go on in, reported."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from pocketphi.runtime.errors import InputError

from .values import to_json

if TYPE_CHECKING:
    from pocketphi.evaluate.items import Item, ItemFile
    from pocketphi.evaluate.journal import Answered
    from pocketphi.evaluate.report import Report
    from pocketphi.evaluate.runner import Judge
    from pocketphi.runtime.engine import CompleteOptions, Model

Begin = Literal["new", "resume", "restart"]


@dataclass(frozen=True, slots=True)
class Work:
    """What is asked, how, and how it is scored."""

    items: ItemFile
    judge: Judge
    options: CompleteOptions
    settings: Mapping[str, Any]
    begin: Begin


def measure_items(opened: Callable[[], Model], work: Work, out: Path | None, as_json: bool) -> None:
    """Ask, score, and print the report; with a folder, keep it there."""
    from pocketphi.evaluate.report import table
    from pocketphi.runtime.files import make_folder

    if out is not None:
        make_folder(out)
    with opened() as model:
        job = _job(model, work)
        report = _to_memory(model, work, job) if out is None else _to_files(model, work, job, out)
    found = report.to_object()
    typer.echo(to_json(found) if as_json else "\n".join(table(found)))


def _job(model: Model, work: Work) -> dict[str, Any]:
    """All that the answers and scores depend on: to resume, each must be what it was."""
    return {
        "model": model.bundle.name,
        "recipe": model.bundle.recipe,
        "model_sha256": hashlib.sha256(model.bundle.to_json().encode("utf-8")).hexdigest(),
        "data": work.items.name,
        "data_bytes": work.items.n_bytes,
        "data_sha256": work.items.sha256,
        "metric": work.judge.metric.name,
        "normalizer": work.judge.normalizer,
        **work.settings,
    }


def _to_memory(model: Model, work: Work, job: Mapping[str, Any]) -> Report:
    done: dict[str, Answered] = {}
    try:
        for _, answer in _asked(model, work, done):
            done[answer.id] = answer
    except (KeyboardInterrupt, SystemExit):  # SystemExit: SIGTERM
        _note_interrupted(work, len(done), "with -o, --resume could go on from there")
        raise
    return _report(work, job, done)


def _to_files(model: Model, work: Work, job: Mapping[str, Any], folder: Path) -> Report:
    """Into a journal that grows; the report appears when all is done."""
    from pocketphi.evaluate.journal import Journal, row
    from pocketphi.evaluate.report import markdown

    ids = [item.id for item in work.items.items]
    done = None if work.begin == "restart" else _earlier(work, folder, job, ids)
    if done is not None:
        typer.echo(f"{work.items.name}: its report is in {folder}: left as it is", err=True)
        return _report(work, job, done)
    with Journal(folder, job, ids, resume=work.begin == "resume") as journal:
        if work.begin == "resume":
            n = len(journal.done)
            how = f"goes on after {n} of {len(ids)} items" if journal.resumed else "nothing to resume, begun"
            typer.echo(f"{work.items.name}: {how}", err=True)
        try:
            for item, answer in _asked(model, work, journal.done):
                journal.add(answer, work.judge.judge(item, answer).details())
        except (KeyboardInterrupt, SystemExit):
            kept = f"kept in {journal.path}; the same command with --resume goes on from there"
            _note_interrupted(work, len(journal.done), kept)
            raise
        report = _report(work, job, journal.done)
        rows = [row(one.answer, one.details()) for one in report.rows]
        found = report.to_object()
        text = json.dumps(found, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
        journal.finish(rows, text, markdown(found))
    return report


def _asked(model: Model, work: Work, done: Mapping[str, Answered]) -> Iterator[tuple[Item, Answered]]:
    """Ask what is not done, under a bar."""
    from pocketphi.evaluate.runner import answers
    from pocketphi.runtime.progress import CountBar

    with CountBar() as bar:
        bar.start(len(work.items.items), work.items.name, done=len(done))
        for item, answer in answers(model, work.items.items, options=work.options, done=dict(done)):
            yield item, answer
            bar.advance(1, item.id)


def _earlier(
    work: Work, folder: Path, job: Mapping[str, Any], ids: list[str]
) -> Mapping[str, Answered] | None:
    """The answers of an earlier run that did it all. One that was interrupted is not thrown away unasked."""
    from pocketphi.evaluate.journal import finished, unfinished

    try:
        reached = unfinished(folder, job, ids)
        if work.begin == "resume":
            return finished(folder, job, ids)
    except InputError as exc:
        raise InputError(f"{exc}; --restart begins anew") from None
    if reached is not None:
        raise InputError(
            f"{folder}: was interrupted after {reached} of {len(ids)} items: "
            "--resume goes on, --restart begins anew"
        )
    return None


def _report(work: Work, job: Mapping[str, Any], done: Mapping[str, Answered]) -> Report:
    """Scores in the order of the data."""
    from pocketphi.evaluate.report import Report

    return Report(work.judge, job, [work.judge.judge(item, done[item.id]) for item in work.items.items])


def _note_interrupted(work: Work, n: int, how: str) -> None:
    typer.echo(f"{work.items.name}: interrupted after {n} of {len(work.items.items)} items, {how}", err=True)
