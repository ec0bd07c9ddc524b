# SPDX-License-Identifier: Apache-2.0
"""One token below, on and above the length at which LongRoPE's tables change, read at once and grown into.

phi4-nano changes at 1,024 tokens. Phi-4-mini changes at 4,096, so a tiny member gets that number, and its
published context. The judge is llama.cpp as it comes, without our session, decoder and kernels: a context of
at most the original length reads with the short table, a larger one with the long table.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pocketphi import convert as converter
from pocketphi.runtime import bundle as bundles

from .. import tiny

EDGES = {"phi4-nano": 1024, "phi4-mini": 4096}
NEW = 2  # tokens written across the edge
Float32 = npt.NDArray[np.float32]

# In a process of its own: llama.cpp without our plug-in, and with an exact cache.
STOCK = """
import ctypes, sys
import llama_cpp
import numpy as np
path, size, out, *prompts = sys.argv[1:]
quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()
model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
params = llama_cpp.llama_context_default_params()
params.n_ctx, params.n_batch, params.n_ubatch = int(size), 512, 512
params.n_threads = params.n_threads_batch = 2
params.type_k = params.type_v = 0  # GGML_TYPE_F32
params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
context = llama_cpp.llama_init_from_model(model, params)
found = []
for prompt in prompts:
    ids = np.load(prompt)
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    for start in range(0, len(ids), 512):
        part = ids[start : start + 512]
        tokens = (llama_cpp.llama_token * len(part))(*part.tolist())
        assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, len(part))) == 0
    n = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    found.append(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (n,)).copy())
np.save(out, np.stack(found))
"""

# Ours: each prompt read fresh, then one conversation that is written across the edge.
OURS = """
import json, logging, sys
import numpy as np
from pathlib import Path
from pocketphi.runtime import Model
from pocketphi.runtime.parts import TokenSpan
folder, out, edge, new, *prompts = sys.argv[1:]
edge, new = int(edge), int(new)
notes = []
class Handler(logging.Handler):
    def emit(self, record): notes.append(record.getMessage())
logging.getLogger("pocketphi").addHandler(Handler())
ids = np.load(prompts[-1])
with Model(folder, kv_type="f32", n_threads=2) as model:
    fresh = np.stack([model.token_logits(np.load(p), 1)[0] for p in prompts])
    session = model._session
    session.reset()
    notes.clear()
    first = edge - 1
    grown = [session.read([TokenSpan(ids[:first])], adapter=None)[0]]
    before = len(notes)
    grown += [session.step(int(ids[first + n])) for n in range(new)]
np.savez(out, fresh=fresh, grown=np.stack(grown))
print(json.dumps([before, notes]))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Converted at F32, so that what differs is the reading alone."""
    root = tmp_path_factory.mktemp("edges")
    mini = tiny.write("phi4-mini", root / "mini-source")
    config = json.loads((mini / "config.json").read_text("utf-8"))
    config["original_max_position_embeddings"], config["max_position_embeddings"] = 4096, 131072
    (mini / "config.json").write_text(json.dumps(config), "utf-8")
    found = {}
    for name, source in (("phi4-nano", tiny.NANO), ("phi4-mini", mini)):
        found[name] = converter.convert(source, root / name, converter.Options(recipe="F32", name=name)).root
        assert bundles.load(found[name]).text.rope.original_context == EDGES[name]
    return found


def run(script: str, env: dict[str, str], *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], env=env, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("name", EDGES)
def test_below_on_and_above(name: str, folders: dict[str, Path], env: dict[str, str], tmp_path: Path) -> None:
    """Ours by length against stock with the table that this length needs; the other table gives something
    else."""
    edge, bundle = EDGES[name], bundles.load(folders[name])
    rng = np.random.default_rng(edge)
    ids = rng.integers(0, min(2800, bundle.text.vocab_size), edge - 1 + NEW, dtype=np.int32)
    prompts = []
    for n in range(edge - 1, edge + NEW):
        prompts.append(tmp_path / f"{n}.npy")
        np.save(prompts[-1], ids[:n])
    short, long = prompts[:2], prompts[2:]
    said: Any = json.loads(run(OURS, env, folders[name], tmp_path / "ours.npz", edge, NEW, *prompts))
    ours = np.load(tmp_path / "ours.npz")

    decoder = bundle.path(bundle.decoder)
    run(STOCK, env, decoder, edge, tmp_path / "short.npy", *short)
    run(STOCK, env, decoder, edge + 512, tmp_path / "long.npy", *long, short[-1])
    of_short, of_long = np.load(tmp_path / "short.npy"), np.load(tmp_path / "long.npy")
    wanted: Float32 = np.concatenate([of_short, of_long[: len(long)]])

    # Two orders of summing the same float32 terms, as test_session.py bounds them: logits below 32, noise
    # 5e-4.
    tolerance = 2e-3
    assert abs(ours["fresh"] - wanted).max() <= tolerance
    assert abs(ours["grown"] - wanted).max() <= tolerance
    assert abs(of_long[-1] - of_short[-1]).max() > 100 * tolerance, (
        "the tables must differ for this to prove anything"
    )
    before, notes = said
    assert (before, len([n for n in notes if f"passed {edge} tokens" in n])) == (0, 1), notes
