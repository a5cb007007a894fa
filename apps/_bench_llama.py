"""Times a GGUF decoder in llama.cpp, with a LoRA adapter beside it or without, and prints one JSON line."""

from __future__ import annotations

import sys

import numpy as np
from crab_edge_apps._bench_timing import capacity, report

from crab_edge.memory import peak_bytes


def main() -> None:
    """Arguments: GGUF file, LoRA file or "-", threads, context, steps, prefill tokens."""
    model_path, lora_path = sys.argv[1:3]
    threads, context, steps, prefill = (int(value) for value in sys.argv[3:7])
    import llama_cpp

    before = peak_bytes()
    chunk = max(prefill, context)
    llama = llama_cpp.Llama(
        model_path,
        lora_path=None if lora_path == "-" else lora_path,
        n_ctx=capacity(context, steps, prefill),
        n_batch=chunk,
        n_ubatch=chunk,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    ids = np.random.default_rng(0).integers(0, llama.n_vocab(), chunk).tolist()

    def run(tokens: int, past: int) -> None:
        # What lies behind `n_tokens` is dropped from the cache before the tokens are evaluated.
        llama.n_tokens = past
        llama.eval(ids[:tokens])

    run(context, 0)
    report(
        lambda past: run(1, past),
        lambda tokens: run(tokens, 0),
        context=context,
        steps=steps,
        prefill=prefill,
        before=before,
    )


if __name__ == "__main__":
    main()
