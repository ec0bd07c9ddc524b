# SPDX-License-Identifier: Apache-2.0
"""Turns what the user named into a checkpoint directory: a folder, or with consent a Hugging Face repository.

The network is used only with `from_hub`, only when the local cache lacks a file, and only for the
files that are read: weights as safetensors, configuration, tokenizer, template, licence. Code and
pickles are never fetched.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..runtime.errors import CheckpointError, InputError
from ..runtime.spec import ADAPTER_NAMES
from .checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    INDEX,
    SINGLE,
    TOKENIZER,
    read_weight_map,
    refuse_non_directory,
)
from .source_file import quoted, read_json_object, shown

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./-]{0,127}")
_WANTED = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|(pre)?processor_config"
    r"|model\.safetensors\.index)\.json|chat_template\.jinja|model[A-Za-z0-9_.-]*\.safetensors"
    r"|LICEN[CS]E(\.txt|\.md)?|(vision|speech)-lora/adapter_(config\.json|model\.safetensors)"
)
_TIMEOUT_S = 10.0  # for the server's first answer; a download that stalls has huggingface_hub's own limit


def resolve(
    source: str, *, from_hub: bool, revision: str | None, offline: bool = False
) -> tuple[Path, str, str | None]:
    """Find the checkpoint that `source` names.

    Args:
        source: a directory; with `from_hub` a repository, "organisation/name".
        from_hub: look in the local Hugging Face cache, and fetch what it lacks.
        revision: branch, tag or commit; only with `from_hub`, None is the main branch.
        offline: never use the network (also the variable HF_HUB_OFFLINE).

    Returns:
        Directory, name, and commit where it is known. A folder inside the cache has its repository's
        name and commit, any other its own name and None.

    Raises:
        InputError: not a repository's name, a bad revision, a needless flag, huggingface_hub is missing.
        CheckpointError: no such directory or repository, incomplete, or the network failed.
    """
    if from_hub:
        return _from_hub(source, revision, offline)
    if revision is not None:
        raise InputError(f"revision {quoted(revision)} needs --from-hub: a directory has no revisions")
    if offline:
        raise InputError("--offline needs --from-hub: a directory is never fetched")
    if not source:  # an unset shell variable, say; Path("") would be the current directory
        raise InputError("the checkpoint's name is empty, expected a directory")
    path = Path(source)
    if _REPOSITORY.fullmatch(source) and not path.exists():
        raise CheckpointError(f"{source}: no such directory; to take it from the hub, add --from-hub")
    refuse_non_directory(path)
    try:
        return path, *_identity(path)
    except OSError as exc:  # the working directory, removed meanwhile, has a "." and no name
        raise CheckpointError(f"{source}: cannot be opened: {exc.strerror}") from None


def _identity(directory: Path) -> tuple[str, str | None]:
    """Name and commit; the cache's folders are models--<organisation>--<name>/snapshots/<commit>."""
    real = directory.resolve()
    match = re.fullmatch("models--(.+?)--(.+)", real.parent.parent.name)
    if match and real.parent.name == "snapshots":
        return f"{match[1]}/{match[2]}", real.name
    return real.name, None


def _from_hub(repository: str, revision: str | None, offline: bool) -> tuple[Path, str, str | None]:
    if not _REPOSITORY.fullmatch(repository) or "--" in repository or ".." in repository:
        raise InputError(f"{quoted(repository)} is not a hub repository, expected organisation/name")
    wanted = "main" if revision is None else revision
    if not _REVISION.fullmatch(wanted) or ".." in wanted:
        raise InputError(f"{quoted(wanted)} is not a revision, expected a branch, tag or commit")
    try:
        import huggingface_hub as hub
    except ImportError:
        raise InputError("--from-hub needs huggingface_hub: pip install 'pocketphi[hub]'") from None
    directory = _find_cached(hub, repository, wanted)
    missing = "" if directory is None else _first_missing(directory)
    if directory is None or missing:
        if offline or hub.constants.HF_HUB_OFFLINE:
            found = f"lacks {missing} in" if missing else f"revision {wanted} is not in"
            raise CheckpointError(f"{repository}: {found} the local cache, and the network is off")
        directory = _fetch(hub, repository, wanted)
    return directory, repository, directory.name


def _find_cached(hub: Any, repository: str, revision: str) -> Path | None:
    """The cache's folder for a revision, complete or not. Never touches the network."""
    try:
        # One pattern, for some releases compare the folder with all that was ever listed of the repository.
        found = hub.snapshot_download(
            repository, revision=revision, local_files_only=True, allow_patterns=[CONFIG]
        )
    except (OSError, ValueError):  # what LocalEntryNotFoundError is
        return None
    return Path(found)


def _first_missing(directory: Path) -> str:
    """Name of a file that conversion needs and the folder lacks, or ""; a partial download has some."""
    needed = [CONFIG, TOKENIZER]
    if (directory / INDEX).is_file():
        needed += sorted(set(read_weight_map(directory / INDEX).values()))
    else:
        needed.append(SINGLE)
    if (directory / CONFIG).is_file():
        kind = read_json_object(directory / CONFIG, 4 << 20).get("model_type")
        if kind == "phi4_multimodal":  # this layout alone keeps its adapters outside the model's shards
            needed += [f"{n}-lora/{f}" for n in ADAPTER_NAMES for f in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    return next((name for name in needed if not (directory / name).is_file()), "")


def _fetch(hub: Any, repository: str, revision: str) -> Path:
    """Download the wanted files of one commit into the cache and return its folder."""
    where = f"{repository}: cannot be fetched from the hub"
    try:
        # Each call has a time limit. snapshot_download's listing has none and waits for ever.
        commit = hub.model_info(repository, revision=revision, timeout=_TIMEOUT_S)
        names = sorted(f.rfilename for f in commit.siblings or () if _WANTED.fullmatch(f.rfilename))
        if not {CONFIG, TOKENIZER} <= set(names) or not {INDEX, SINGLE} & set(names):
            raise CheckpointError(f"{repository}: lacks {CONFIG}, {TOKENIZER} or safetensors weights")
        for name in names:
            hub.hf_hub_download(repository, name, revision=commit.sha, etag_timeout=_TIMEOUT_S)
        # Asked for by branch, one file more records in the cache which commit the branch stands for.
        hub.hf_hub_download(repository, CONFIG, revision=revision, etag_timeout=_TIMEOUT_S)
    except CheckpointError:
        raise
    except Exception as exc:  # the client lets errors of several libraries through
        raise CheckpointError(f"{where}: {_explain(exc)}") from None
    directory = _find_cached(hub, repository, commit.sha)
    missing = CONFIG if directory is None else _first_missing(directory)
    if directory is None or missing:
        raise CheckpointError(f"{where}: {missing} is still missing afterwards")
    return directory


def _explain(exc: Exception) -> str:
    known = {
        "GatedRepoError": "it is gated: accept its terms on the hub and log in with `hf auth login`",
        "RepositoryNotFoundError": "no such repository, or it is private",
        "RevisionNotFoundError": "no such revision",
    }
    lines = [line for line in str(exc).splitlines() if line.strip()]
    text = f"{type(exc).__name__}: {lines[0] if lines else 'no reason given'}"
    return known.get(type(exc).__name__, shown(text[:200]))
