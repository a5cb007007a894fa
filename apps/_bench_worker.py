"""Times one decoder graph and prints one JSON line.

A process of its own for each graph: two live sessions disturb each other.
"""

from __future__ import annotations

import sys

import numpy as np
from crab_edge_apps._bench_timing import capacity, report

from crab_edge.memory import peak_bytes

_CACHE_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def main() -> None:
    """Arguments: graph, threads, context, steps, prefill tokens."""
    graph = sys.argv[1]
    threads, context, steps, prefill = (int(value) for value in sys.argv[2:6])
    import onnxruntime as ort

    before = peak_bytes()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    slots = capacity(context, steps, prefill)
    binding = session.io_binding()
    hidden = 0
    rng = np.random.default_rng(0)
    for entry in session.get_inputs():
        if entry.name == "inputs_embeds":
            hidden = entry.shape[-1]
        if entry.name.startswith("past."):
            shape = [slots if isinstance(size, str) else size for size in entry.shape]
            cache = ort.OrtValue.ortvalue_from_numpy(
                rng.normal(0, 0.5, shape).astype(_CACHE_TYPES[entry.type])
            )
            binding.bind_ortvalue_input(entry.name, cache)
            binding.bind_ortvalue_output(entry.name.replace("past", "present"), cache)
    binding.bind_output("logits")

    def run(tokens: int, past: int) -> None:
        total = past + tokens
        positions = np.broadcast_to(np.arange(past, total), (3, 1, tokens))
        binding.bind_cpu_input("inputs_embeds", embeds[:, :tokens])
        binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions, dtype=np.int64))
        binding.bind_cpu_input("seqlens_k", np.array([total - 1], np.int32))
        binding.bind_cpu_input("total_sequence_length", np.array([total], np.int32))
        session.run_with_iobinding(binding)

    embeds = rng.normal(0, 1, (1, prefill, hidden)).astype(np.float32)
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
