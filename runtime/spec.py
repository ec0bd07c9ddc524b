# SPDX-License-Identifier: Apache-2.0
"""What the Phi-4 family looks like: the numbers that shape a decoder, and their names everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Family = Literal["phi4-multimodal", "phi3"]
"""phi4-multimodal: a backbone with adapters and encoders. phi3: a Phi3ForCausalLM text model."""

ChatFormat = Literal["phi4-mini", "phi4-mini-reasoning", "phi4", "phi3.5"]
"""How a conversation becomes tokens; `prompt.py` holds one function for each."""

RopeTable = Literal["short", "long"]
"""Which LongRoPE frequency factors a sequence is rotated with; its length decides, see `RopeSpec.table`."""

AdapterName = Literal["vision", "speech"]

Backbone = Literal["gguf", "onnx"]
"""What the decoder's weights are stored as, and so which engine runs them: llama.cpp or ONNX Runtime."""

MANIFEST = "bundle.json"  # the file that makes a folder a model directory
BACKBONE_DATA = "model.onnx.data"  # what the graphs of the ONNX backbone share, beside them
CHAT_FORMATS: tuple[ChatFormat, ...] = ("phi4-mini", "phi4-mini-reasoning", "phi4", "phi3.5")
ADAPTER_NAMES: tuple[AdapterName, ...] = ("vision", "speech")

IMATRIX_SUMS, IMATRIX_COUNTS = ".in_sum2", ".counts"
"""What follows a weight's name in a file of importances: Σ x² by column, and the number of tokens."""

SPLIT_PATTERNS: Mapping[str, str] = MappingProxyType(
    {
        "gpt-4o": (
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
            r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        "dbrx": (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
    }
)
"""llama.cpp's pre-tokeniser name -> the regex that cuts text into words, as it stands in `tokenizer.json`.

gpt-4o is OpenAI's o200k_base (the Phi-4-mini family), dbrx is cl100k_base (Phi-4 14B).
"""


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding with optional LongRoPE factors.

    Source: `_compute_longrope_parameters` and `longrope_frequency_update` in transformers'
    modeling_rope_utils.
    """

    dims: int  # rotated dimensions of each head, even; the rest of the head passes through
    theta: float
    original_context: int  # tokens; the short table serves sequences up to and including this
    attention_factor: float  # multiplies cos and sin of both tables; 1.0 without LongRoPE
    short_factor: tuple[float, ...] | None  # [dims / 2], None without LongRoPE
    long_factor: tuple[float, ...] | None

    @property
    def is_long_rope(self) -> bool:
        """Whether there are two tables to choose from."""
        return self.long_factor is not None

    def table(self, n_tokens: int) -> RopeTable:
        """The table for a whole sequence of `n_tokens`: its final length decides, never a chunk's."""
        return "long" if self.is_long_rope and n_tokens > self.original_context else "short"


@dataclass(frozen=True, slots=True)
class TextSpec:
    """The decoder's shape. Names follow llama.cpp: `n_` counts, `d_` widths."""

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int  # rows of the embedding; the tokenizer may name fewer ids
    context_length: int  # tokens the model was trained for
    rms_eps: float
    tied_head: bool  # the output head is the embedding
    rope: RopeSpec

    @property
    def d_q(self) -> int:
        """Rows of the query projection."""
        return self.n_heads * self.head_dim

    @property
    def d_kv(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.n_kv_heads * self.head_dim

    @property
    def kv_values_per_token(self) -> int:
        """Numbers the KV cache keeps for one token over all layers (K and V together)."""
        return 2 * self.n_layers * self.d_kv
