# SPDX-License-Identifier: Apache-2.0
"""`serve`: the model behind HTTP, for clients that speak to OpenAI's."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from pocketphi.runtime.errors import InputError

from .checks import a_path
from .options import (
    AnyKvType,
    BackboneOption,
    CtxSize,
    GpuLayers,
    MaxCrops,
    ModelDir,
    Provider,
    ProviderOption,
    Threads,
    Verbose,
)
from .values import builtin

_NEEDED = ("starlette", "uvicorn", "pydantic", "python_multipart", "websockets")
_KEYS_MAX_BYTES = 1 << 20
_KEY_MAX_CHARS = 512


def serve(
    model: ModelDir = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on. Another than this machine's own needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: a free one.")] = 8080,
    parallel: Annotated[int, typer.Option("--parallel", min=1, max=16, help="Requests that are answered at a time, each with --ctx-size tokens (4096).")] = 1,
    api_key: Annotated[str | None, typer.Option("--api-key", envvar="POCKETPHI_API_KEY", help="Key that clients have to send. Other users of this machine can see it: better is a file.")] = None,
    api_key_file: Annotated[Path | None, typer.Option("--api-key-file", parser=a_path, metavar="<path>", help="The same from a file, one in each line.")] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Let anybody who can reach --host ask without a key.")] = False,
    allow_host: Annotated[list[str] | None, typer.Option("--allow-host", help="A name that clients may call this server by, beside localhost, this machine's name and addresses; again for more.")] = None,
    allow_origin: Annotated[list[str] | None, typer.Option("--allow-origin", help="A site whose pages may ask: https://example.org; again for more.")] = None,
    allow_remote_media: Annotated[bool, typer.Option("--allow-remote-media", help="Get pictures from http and https addresses in requests, never from private networks.")] = False,
    queue: Annotated[int, typer.Option("--queue", min=1, max=100_000, help="Requests that may wait; one more is a 429.")] = 64,
    max_body: Annotated[int, typer.Option("--max-body", min=1, max=1024, help="MiB of one request.")] = 32,
    max_audio: Annotated[int, typer.Option("--max-audio", min=1, max=14_400, help="Seconds of sound in one request.")] = 1800,
    answer_time: Annotated[int, typer.Option("--answer-time", min=1, help="Seconds that the model may take over one request.")] = 600,
    grace: Annotated[int, typer.Option("--grace", min=0, max=3600, help="Seconds that requests have to finish when the server is told to stop.")] = 10,
    log_requests: Annotated[bool, typer.Option("--log-requests", help="Write the requests themselves to stderr.")] = False,
    ctx_size: CtxSize = 0, threads: Threads = None, gpu_layers: GpuLayers = 0, cache_type: AnyKvType = None,
    backbone: BackboneOption = None, provider: ProviderOption = Provider.cpu,
    max_crops: MaxCrops = 36, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Answer OpenAI's clients on this machine: /v1/chat/completions and more. Ctrl-C ends it."""
    for name in _NEEDED:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"pocketphi serve needs {name}: pip install 'pocketphi[serve]'")
    from pocketphi.serve.limits import Limits
    from pocketphi.serve.run import Settings, run

    keys = _keys(api_key, api_key_file)
    _log_to_stderr(verbose)
    settings = Settings(
        model=model or builtin(),
        host=host,
        port=port,
        keys=keys,
        no_auth=no_auth,
        hosts=allow_host or (),
        origins=allow_origin or (),
        remote_media=allow_remote_media,
        log_requests=log_requests,
        parallel=parallel,
        n_ctx=ctx_size,
        max_crops=max_crops,
        options={
            "n_threads": threads,
            "n_gpu_layers": gpu_layers,
            "kv_type": cache_type,
            "backbone": None if backbone is None else backbone.value,
            "provider": provider.value,
        },
        limits=Limits(
            queue=queue,
            body_bytes=max_body << 20,
            held_bytes=max(256, 2 * max_body) << 20,
            audio_s=max_audio,
            answer_s=answer_time,
            grace_s=grace,
        ),
    )
    run(settings)


def _keys(key: str | None, file: Path | None) -> list[str]:
    from pocketphi.runtime.files import read_text

    found = [] if key is None else [key]
    if file is not None:
        lines = read_text(file, max_bytes=_KEYS_MAX_BYTES).splitlines()
        found += [line.strip() for line in lines if line.strip()]
        if len(found) == (key is not None):
            raise InputError(f"{file}: holds no API key, expected one in each line")
    for one in found:
        if not (0 < len(one) <= _KEY_MAX_CHARS and one.isascii() and one.isprintable() and " " not in one):
            raise InputError(
                f"an API key is not 1 to {_KEY_MAX_CHARS} printable ASCII characters without spaces"
            )
    return found


def _log_to_stderr(verbose: bool) -> None:
    """Where it goes when the program starts: what decoders of pictures say is caught on its way to stderr."""
    stream = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace", buffering=1)
    logging.basicConfig(
        stream=stream, format="%(message)s", level=logging.DEBUG if verbose else logging.WARNING
    )
    logging.getLogger("pocketphi.serve").setLevel(logging.INFO)
    if verbose:
        logging.getLogger("asyncio").setLevel(logging.WARNING)
    else:  # it says of every request that the adapter changes
        logging.getLogger("pocketphi.runtime.engine").setLevel(logging.ERROR)
