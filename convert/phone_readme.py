# SPDX-License-Identifier: Apache-2.0
"""The README.md of a directory made for phones: what is in it, what it needs, and the lines that run it.

Nothing in it depends on when or where it was made.

Source of the lines: onnxruntime-genai's src/python, src/java and src/objectivec (ort_genai_objc.h), its
docs/Privacy.md; llama.cpp's tools/cli; llama-cpp-python's Llama.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..runtime.bundle import Bundle, BundleFile
from ..runtime.ram_model import overview
from ..runtime.spec import Backbone, ChatFormat
from . import phone_lines as lines
from .output import write_file

README = "README.md"
README_BYTES = 16 << 10  # at most, about
QUESTION, _LOOK = "What is the capital of France?", "Describe the image."

_GENAI = "genai_config.json"
_LAST_PLACEHOLDER = 200_011  # of genai's phi4mm processor: that of sound, a picture's is before it
_NO_PLACEHOLDERS = """
Its processor puts tokens 200010 and 200011 in their place, whatever the tokenizer says. This vocabulary lacks
them, so through that processor this model answers text only; the published models have them.
"""
_TURN: Mapping[ChatFormat, str] = {  # one question, as MODEL.md's "Text in" has it
    "phi4-mini": "<|user|>{}<|end|><|assistant|>",
    "phi4-mini-reasoning": "<|system|>Your name is Phi, an AI math expert developed by Microsoft.<|end|>"
    "<|user|>{}<|end|><|assistant|>",
    "phi4": "<|im_start|>user<|im_sep|>{}<|im_end|><|im_start|>assistant<|im_sep|>",
    "phi3.5": "<|user|>\n{}<|end|>\n<|assistant|>\n",
}
_NAMES: Mapping[Backbone, str] = {"gguf": "GGUF", "onnx": "ONNX"}
_MODES: Mapping[str, str] = {
    "language": "text",
    "vision": "text about a picture of 1344 × 896",
    "speech": "text about 30 s of speech",
    "vision_speech": "speech about a picture",
}


def write_readme(directory: Path, bundle: Bundle) -> BundleFile:
    """Write README.md beside the files of `bundle`, which are written.

    Raises:
        OutputError: it cannot be written.
    """
    return write_file(directory, README, readme(bundle, _genai_type(bundle)).encode("utf-8"))


def readme(bundle: Bundle, genai_type: str | None) -> str:
    """The text; `genai_type` is genai_config.json's, None where there is no such file."""
    parts = [_head(bundle), _content(bundle), _memory(bundle), _check(bundle), _rules(bundle)]
    if genai_type is not None:
        parts.append(_genai(bundle, multimodal=genai_type == "phi4mm"))
    if bundle.decoder is not None:
        parts.append(_llama(bundle, bundle.decoder))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _genai_type(bundle: Bundle) -> str | None:
    if not any(file.path == _GENAI for file in bundle.files):
        return None
    return str(json.loads(bundle.path(_GENAI).read_bytes())["model"]["type"])


def _head(bundle: Bundle) -> str:
    revision = f" at {bundle.source.revision}" if bundle.source.revision else ""
    return f"""\
# {bundle.name}, for phones

{bundle.source.name}{revision}, converted by {bundle.converter} with `--target phone`.
Licence: {bundle.licence}. Everything that it needs to answer is in this folder; nothing is fetched.
`bundle.json` describes it for programs.
"""


def _content(bundle: Bundle) -> str:
    size = {file.path: file.size for file in bundle.files}
    rows = []

    def row(what: str, kind: str, *files: str) -> None:
        together = sum(size[f] + size.get(f"{f}.data", 0) for f in files)
        rows.append(f"| {what} | {kind} | {together / 1e6:,.1f} | {', '.join(f'`{f}`' for f in files)} |")

    if bundle.decoder is not None:
        row("backbone, for llama.cpp", bundle.recipe, bundle.decoder)
        for name, adapter in sorted(bundle.adapters.items()):
            row(f"{name} adapter, for llama.cpp", f"{adapter.quant}, rank {adapter.rank}", adapter.file or "")
    if (onnx := bundle.onnx) is not None:
        kinds = ", ".join(f"{group} {kind}" for group, kind in sorted(onnx.quant.items()))
        row("backbone, for ONNX Runtime", kinds, onnx.model)
        for name, file in sorted(onnx.adapters.items()):
            rank = bundle.adapters[name].rank
            row(f"{name} adapter, for ONNX Runtime", f"{onnx.lora_quant}, rank {rank}", file)
    for name, encoder in sorted(bundle.encoders.items()):
        row(f"{name} encoder", encoder.quant, *encoder.graphs.values())
    table = "\n".join(rows)
    both = ""
    if len(bundle.backbones) == 2:
        both = "\nAn app needs one backbone: `--backbone onnx` and `--backbone gguf` write one alone.\n"
    return f"""\
## What is here

| part | type | MB | files, with their `.data` |
|---|---|---:|---|
{table}
{both}"""


def _memory(bundle: Bundle) -> str:
    rows, contexts = [], list[int]()
    for engine in bundle.backbones:
        for mode, found in overview(bundle, engine, packed=False).items():
            cells, contexts = " | ".join(f"{n / 1e6:,.0f}" for n in found.values()), list(found)
            rows.append(f"| {_NAMES[engine]} | {_MODES[mode]} | {cells} |")
    table = "\n".join(rows)
    return f"""\
## Memory

MB to have free, estimated, by what a request has and by the tokens of the conversation:

| backbone | request | {" | ".join(f"{n:,} tokens" for n in contexts)} |
|---|---|{"---:|" * len(contexts)}
{table}

The numbers are of pocketphi on Linux with the engines' own kernels; an app has another program around them.
The ONNX cache is float32, the GGUF's float16. onnxruntime-genai loads all graphs and takes the whole cache of
`max_length` tokens when it starts: set it to what you need. `pocketphi plan .` says what a number is made of.
"""


def _check(bundle: Bundle) -> str:
    hashes = "\n".join(f"{f.sha256}  {f.path}" for f in sorted(bundle.files, key=lambda f: f.path))
    return f"""\
## Check the files

`pocketphi info . --check`, or `grep -E '^[0-9a-f]{{64}}  ' README.md | sha256sum -c`. `bundle.json` has this
file's own SHA-256 beside the same list:

```
{hashes}
```
"""


def _rules(bundle: Bundle) -> str:
    prompt = prompt_of(bundle).replace("\n", "\\n")
    stops = ", ".join(map(str, bundle.stop_ids))
    rules = ""
    if bundle.adapters:
        rules = """
| the conversation has | adapter | the speech encoder's projector |
|---|---|---|
| no media | none | – |
| pictures | vision | – |
| sound | speech | speech |
| both | vision, alone | vision |

The adapter acts on all tokens of the conversation. When it changes, the conversation has to be read again.
"""
    return f"""\
## Prompts{" and adapters" if rules else ""}

One question is `{prompt}`; an answer ends at one of the
tokens {stops}. What a user types must not become control tokens: an `<|end|>` in a question would end it.
{rules}"""


def prompt_of(bundle: Bundle, question: str = QUESTION) -> str:
    """One question as a prompt."""
    return _TURN[bundle.chat_format].format(question)


def _genai(bundle: Bundle, multimodal: bool) -> str:
    prompt = json.dumps(prompt_of(bundle), ensure_ascii=False)
    python = lines.PYTHON_MEDIA if multimodal else lines.PYTHON
    kotlin = lines.KOTLIN_MEDIA if multimodal else lines.KOTLIN
    objc = lines.OBJC_MEDIA if multimodal else lines.OBJC
    media, look = "", json.dumps(prompt_of(bundle, "<|image_1|>" + _LOOK), ensure_ascii=False)
    if multimodal:
        media = """
A picture is `<|image_1|>` in front of the question, sound `<|audio_1|>`; the adapter follows from that.
"""
        if bundle.text.vocab_size <= _LAST_PLACEHOLDER:
            media += _NO_PLACEHOLDERS
    elif bundle.adapters:
        media = """
This folder opens there as a text model. Pictures and sound need rows of embeddings from the encoders, which
pocketphi's own runtime puts into `decoder.onnx`.
"""
    text = f"""\
## onnxruntime-genai
{media}
Its official packages send events to Microsoft unless `ORT_DISABLE_TELEMETRY` is set before it starts.

Python (`pip install onnxruntime-genai`), in this folder:

```python
{python}```

Android, in Kotlin, with the AAR of its releases (`onnxruntime-genai-android`) and `onnxruntime-android`.
Files are opened by path: copy the folder from the assets to `filesDir` first. In Java the calls are the same.

```kotlin
{kotlin}```

iOS, in Objective-C, with the pods that its `build_and_assemble_apple_pods.py` makes; from Swift the same
classes, through a bridging header.

```objc
{objc}```
"""
    return text.replace("PROMPT", prompt).replace("LOOK", look)


def _llama(bundle: Bundle, decoder: str) -> str:
    prompt = prompt_of(bundle)
    shell = "$'" + prompt.replace("\n", "\\n") + "'"
    lora, media = next(iter(sorted(bundle.adapters.items())), None), ""
    if lora is not None and lora[1].file is not None:
        media = f"""
llama.cpp's own programs run this model's text only: they have neither its encoders nor its routing. For text
the adapters stay out. In an app, pictures and sound go through the encoders (`.onnx`, ONNX Runtime); their
rows of embeddings go in through `llama_batch.embd` in the place of tokens, with the adapter of the table
above for the whole conversation (`llama_adapter_lora_init`, `llama_set_adapters_lora`). `--lora` loads one:

```sh
llama-cli -m {decoder} --lora {lora[1].file}
```
"""
    n_ctx = min(4096, bundle.text.rope.original_context, bundle.text.context_length)
    return f"""\
## llama.cpp

```sh
llama-completion -m {decoder} -no-cnv --temp 0 -c {n_ctx} -n 128 -p {shell}
```

llama-cpp-python, in this folder:

```python
from llama_cpp import Llama

llama = Llama("{decoder}", n_ctx={n_ctx}, verbose=False)
answer = llama({json.dumps(prompt, ensure_ascii=False)}, max_tokens=128, temperature=0)
print(answer["choices"][0]["text"])
```
{_long_rope(bundle)}{media}"""


def _long_rope(bundle: Bundle) -> str:
    rope = bundle.text.rope
    if not rope.is_long_rope:
        return ""
    return f"""
llama.cpp chooses the RoPE table by the context it allocates, the reference by the conversation's length: keep
`-c` at {rope.original_context} or less for conversations that short, and above it for longer ones.
"""
