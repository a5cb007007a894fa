"""Times one decoder graph and prints one JSON line.

A process of its own for each graph: two live sessions disturb each other.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import numpy as np


def main() -> None:
    """Arguments: graph, threads, context, steps, prefill tokens."""
    graph = sys.argv[1]
    threads, context, steps, prefill = (int(value) for value in sys.argv[2:6])
    import onnxruntime as ort

    before = _peak_bytes()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    loaded = _peak_bytes() - before
    capacity = max(context + steps + 16, prefill)
    binding = session.io_binding()
    hidden = 0
    rng = np.random.default_rng(0)
    for entry in session.get_inputs():
        if entry.name == "inputs_embeds":
            hidden = entry.shape[-1]
        if entry.name.startswith("past."):
            shape = [capacity if isinstance(size, str) else size for size in entry.shape]
            cache = ort.OrtValue.ortvalue_from_numpy(rng.normal(0, 0.5, shape).astype(np.float32))
            binding.bind_ortvalue_input(entry.name, cache)
            binding.bind_ortvalue_output(entry.name.replace("past", "present"), cache)
    binding.bind_output("logits")

    def run(tokens: int, past: int) -> float:
        total = past + tokens
        positions = np.broadcast_to(np.arange(past, total), (3, 1, tokens))
        binding.bind_cpu_input("inputs_embeds", rng.normal(0, 1, (1, tokens, hidden)).astype(np.float32))
        binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions, dtype=np.int64))
        binding.bind_cpu_input("seqlens_k", np.array([total - 1], np.int32))
        binding.bind_cpu_input("total_sequence_length", np.array([total], np.int32))
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        return time.perf_counter() - start

    for _ in range(5):
        run(1, context)
    decode = [run(1, context + step) for step in range(steps)]
    run(prefill, 0)
    prefills = [run(prefill, 0) for _ in range(3)]
    print(
        json.dumps(
            {
                "decode_s": statistics.median(decode),
                "prefill_s": statistics.median(prefills),
                "loaded_bytes": loaded,
                "peak_bytes": _peak_bytes(),
            }
        )
    )


def _peak_bytes() -> int:
    # VmHWM, because ru_maxrss starts at what the parent had when it forked.
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
