"""I-LoRA, the operator: the same mathematics once per way of running it.

`reference` is numpy in float64; `torch_layer`, `torch_tuner`, `torch_register` are the PEFT method (extra
`train`); `onnx_functions` holds the two ONNX operators (extra `export`); `torch_ops` are torch operators on
low-bit weights, over the Triton kernels of `triton_*` on CUDA (extra `cuda`). Nothing is imported here: the
runtime has neither torch nor onnx.
"""
