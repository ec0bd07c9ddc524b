# SPDX-License-Identifier: Apache-2.0
"""The items of `eval`: asked under a bar, kept in a folder that an interrupted run can go on in, reported."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from pocketphi.runtime.errors import InputError

from .values import to_json

if TYPE_CHECKING:
    from pocketphi.evaluate.items import Item, ItemFile
    from pocketphi.evaluate.journal import Answered
    from pocketphi.evaluate.likelihood_judge import LikelihoodJudge
    from pocketphi.evaluate.report import Report
    from pocketphi.evaluate.runner import Judge
    from pocketphi.runtime.engine import CompleteOptions, Model

Begin = Literal["new", "resume", "restart"]


@dataclass(frozen=True, slots=True)
class Work:
    """What is asked, how, and how it is scored."""

    items: ItemFile
    judge: Judge | LikelihoodJudge
    options: CompleteOptions
    settings: Mapping[str, Any]
    begin: Begin
    base: Path | None = None  # what kld compares with


def measure_items(
    opened: Callable[[Path | None], Model], work: Work, out: Path | None, as_json: bool
) -> None:
    """Ask, score, and print the report; with a folder, keep it there. `opened(None)` is the model of -m."""
    from pocketphi.evaluate.report import table
    from pocketphi.runtime.files import check_not_model, make_folder

    if out is not None:
        check_not_model(out)
        make_folder(out)
    with contextlib.ExitStack() as stack:
        models = [stack.enter_context(opened(None))]
        if work.base is not None:
            from pocketphi.evaluate.item_likelihood import check_base
            from pocketphi.runtime import bundle

            check_base(models[0].bundle, bundle.load(work.base))
            models.append(stack.enter_context(opened(work.base)))
        job = _job(models, work)
        found = _to_memory(models, work, job) if out is None else _to_files(models, work, job, out)
    typer.echo(to_json(found) if as_json else "\n".join(table(found)))


def _job(models: Sequence[Model], work: Work) -> dict[str, Any]:
    """All that the answers and scores depend on: to resume, each must be what it was."""
    from pocketphi.evaluate.provenance import of_this_process

    of_models: dict[str, Any] = {}
    for prefix, model in zip(("", "base_"), models, strict=False):
        manifest = model.bundle.to_json().encode("utf-8")
        of_models |= {
            f"{prefix}model": model.bundle.name,
            f"{prefix}recipe": model.bundle.recipe,
            f"{prefix}model_sha256": hashlib.sha256(manifest).hexdigest(),
            f"{prefix}backbone": model.engine["backbone"],
            f"{prefix}provider": model.engine["provider"],
            f"{prefix}cache_type": model.engine["kv_type"],
        }
    return {
        **of_models,
        "data": work.items.name,
        "data_bytes": work.items.n_bytes,
        "data_sha256": work.items.sha256,
        "media_sha256": _media_sha256(work.items),
        "metric": work.judge.metric.name,
        "normalizer": work.judge.normalizer,
        **work.settings,
        **of_this_process(),
    }


def _media_sha256(items: ItemFile) -> str:
    from pocketphi.evaluate.items import media_sha256
    from pocketphi.runtime.progress import CountBar

    with CountBar() as bar:
        bar.start(len(items.items), "media")
        return media_sha256(items.items, lambda: bar.advance(1, "media"))


def _to_memory(models: Sequence[Model], work: Work, job: Mapping[str, Any]) -> dict[str, Any]:
    done: dict[str, Answered] = {}
    try:
        for _, answer in _asked(models, work, done):
            done[answer.id] = answer
    except (KeyboardInterrupt, SystemExit):  # SystemExit: SIGTERM
        _note_interrupted(work, len(done), "with -o, --resume could go on from there")
        raise
    return _report(work, job, done).to_object()


def _to_files(models: Sequence[Model], work: Work, job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Into a journal that grows; the report appears when all is done."""
    from pocketphi.evaluate.journal import Journal, row
    from pocketphi.evaluate.report import markdown

    ids = [item.id for item in work.items.items]
    done = None if work.begin == "restart" else _earlier(work, folder, job, ids)
    if done is not None:
        typer.echo(f"{work.items.name}: its report is in {folder}: left as it is", err=True)
        return _report(work, job, done).to_object()
    with Journal(folder, job, ids, resume=work.begin == "resume") as journal:
        if work.begin == "resume":
            n = len(journal.done)
            how = f"goes on after {n} of {len(ids)} items" if journal.resumed else "nothing to resume, begun"
            typer.echo(f"{work.items.name}: {how}", err=True)
        try:
            for item, answer in _asked(models, work, journal.done):
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
    return found


def _asked(
    models: Sequence[Model], work: Work, done: Mapping[str, Answered]
) -> Iterator[tuple[Item, Answered]]:
    """Ask what is not done, under a bar."""
    from pocketphi.evaluate.item_likelihood import likelihoods
    from pocketphi.evaluate.likelihood_judge import LikelihoodJudge
    from pocketphi.evaluate.runner import answers
    from pocketphi.runtime.progress import CountBar

    model, items, left = models[0], work.items.items, dict(done)
    if isinstance(work.judge, LikelihoodJudge):
        found = likelihoods(model, items, base=models[1] if len(models) > 1 else None, done=left)
    else:
        found = answers(model, items, options=work.options, done=left)
    with CountBar() as bar:
        bar.start(len(items), work.items.name, done=len(done))
        for item, answer in found:
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
    from pocketphi.runtime.progress import CountBar

    rows = []
    with CountBar() as bar:
        bar.start(len(work.items.items), "scoring")
        for item in work.items.items:
            rows.append(work.judge.judge(item, done[item.id]))
            bar.advance(1, "scoring")
    return Report(work.judge, job, rows)


def _note_interrupted(work: Work, n: int, how: str) -> None:
    typer.echo(f"{work.items.name}: interrupted after {n} of {len(work.items.items)} items, {how}", err=True)
