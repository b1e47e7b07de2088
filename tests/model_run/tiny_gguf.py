"""Writes a language model of half a megabyte: Llama's architecture, random weights, tokens that are bytes.

    python tiny_gguf.py FILE

It says nothing sensible, and says it deterministically: the same prompt gives the same text, another prompt
another. Run by the Python that has the `gguf` package (see `make test-model`), so nothing of egressd is here.
"""

from __future__ import annotations

import sys
from typing import Any

import gguf
import numpy

SEED = 7
LAYERS, WIDTH, HEADS, HIDDEN, CONTEXT = 2, 64, 4, 128, 4096
CONTROL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPACE = "\u2581"  # what SentencePiece writes for a space
TOKENS = [*CONTROL, *BYTES, SPACE]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def main(path: str) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(TOKENS))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    add_tokenizer(writer)
    for name, tensor in tensors():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: Any) -> None:
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.0] * len(TOKENS))
    writer.add_token_types([
        kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * len(BYTES), kinds.NORMAL,
    ])  # fmt: skip
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(TEMPLATE)


def tensors() -> Any:
    """Names as llama.cpp looks for them. What would not be printable has no weight: it is never likeliest."""
    random = numpy.random.default_rng(SEED)

    def noise(*shape: int) -> Any:
        return (random.standard_normal(shape) * 0.5).astype(numpy.float32)

    output = noise(len(TOKENS), WIDTH)
    printable = range(len(CONTROL) + 0x20, len(CONTROL) + 0x7F)
    output[[row for row in range(len(TOKENS)) if row not in printable]] = 0
    yield "token_embd.weight", noise(len(TOKENS), WIDTH)
    yield "output_norm.weight", numpy.ones(WIDTH, numpy.float32)
    yield "output.weight", output
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        yield block + "attn_norm.weight", numpy.ones(WIDTH, numpy.float32)
        yield block + "ffn_norm.weight", numpy.ones(WIDTH, numpy.float32)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            yield f"{block}{name}.weight", noise(WIDTH, WIDTH)
        yield block + "ffn_gate.weight", noise(HIDDEN, WIDTH)
        yield block + "ffn_up.weight", noise(HIDDEN, WIDTH)
        yield block + "ffn_down.weight", noise(WIDTH, HIDDEN)


if __name__ == "__main__":
    main(sys.argv[1])
