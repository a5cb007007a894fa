"""Several processes: accelerate's own parser takes the shipped files, and two processes train one adapter."""

import argparse
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

from crab_edge.errors import InputError
from crab_edge.training.launch import NAMES, path
from tests.tiny_avuie import make_tiny_avuie
from tests.tiny_model import make_tiny_model_dir
from tests.training import adapt_worker

TYPES = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp": DistributedType.FSDP,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
}
COMMAND = ["-m", "crab_edge_apps.cli", "train", "crab-plus-7b", "--base", "BASE", "--data", "DATA"]


def parsed(name) -> argparse.Namespace:
    """What `accelerate launch` makes of a shipped file."""
    arguments = launch_command_parser().parse_args(["--config_file", str(path(name)), *COMMAND])
    arguments, _, precision_from_file = _validate_launch_command(arguments)
    assert precision_from_file and arguments.mixed_precision == "bf16"
    return arguments


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_takes_the_files(name):
    # Raises on keys that this version of accelerate doesn't know.
    config = load_config_from_file(str(path(name)))
    assert config.distributed_type == TYPES[name]
    assert (config.num_processes, config.mixed_precision, config.use_cpu) == (2, "bf16", False)
    arguments = parsed(name)
    assert arguments.module and arguments.training_script == "crab_edge_apps.cli"
    assert arguments.training_script_args == COMMAND[2:]
    known = vars(launch_command_parser().parse_args(COMMAND))
    parts = {**config.fsdp_config, **config.deepspeed_config}
    assert parts.keys() <= known.keys(), parts.keys() - known.keys()


def test_fsdp_shards_decoder_layers(tmp_path):
    from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni

    arguments = parsed("fsdp")
    assert hasattr(modeling_qwen2_5_omni, arguments.fsdp_transformer_layer_cls_to_wrap)
    env = prepare_multi_gpu_env(arguments)
    assert env["ACCELERATE_USE_FSDP"] == "true" and env["FSDP_VERSION"] == "2"
    assert env["FSDP_TRANSFORMER_CLS_TO_WRAP"] == "Qwen2_5OmniDecoderLayer"
    assert env["FSDP_ACTIVATION_CHECKPOINTING"] == "false"


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="choose one of ddp, fsdp, deepspeed_zero2"):
        path("ddp2")


RECIPE = """
kind = "adapter"
name = "two"
precision = "fp32"
[base]
path = "{base}"
quantise = 4
[data]
root = "{data}"
workers = 0
[adapter]
rank = 4
alpha = 8.0
[steps]
batch = 1
global_batch = 2
epochs = 1
lr = 1e-2
"""


def processes(count: int, recipe: Path, out: Path) -> list[dict]:
    """Train on `count` processes joined by gloo; what each gave."""
    out.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(count):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        env = {**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in own.items()}}
        command = [sys.executable, "-m", "tests.training.adapt_worker", str(recipe), str(out)]
        here = Path(__file__).parents[2]
        running.append(subprocess.Popen(command, env=env, cwd=here, stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=300)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * count, "\n".join(errors)
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(count)]


def test_two_processes_end_with_one_adapter_and_split_the_records(tmp_path):
    pytest.importorskip("bitsandbytes")
    base, _ = make_tiny_model_dir(tmp_path / "model", adapter=False)
    data = make_tiny_avuie(tmp_path / "data", stills=4)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(base=base, data=data))
    first, second = processes(2, recipe, tmp_path / "two")
    AcceleratorState._reset_state(reset_partial_state=True)
    (tmp_path / "one").mkdir()
    alone = adapt_worker.main(recipe, tmp_path / "one")
    assert (first["world"], second["world"], alone["world"]) == (2, 2, 1)
    # Each record once, half of them on each process, in the line that one process sees.
    assert len(first["seen"]) == len(second["seen"]) == 2
    assert sorted(first["seen"] + second["seen"]) == [0, 1, 2, 3]
    paired = zip(first["seen"], second["seen"], strict=True)
    assert alone["seen"] == [index for pair in paired for index in pair]
    assert first["weights"].keys() == second["weights"].keys() == alone["weights"].keys()
    assert any(w.any() for n, w in first["weights"].items() if "lora_B" in n)
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
        # Two forwards accumulated on one process are the same step.
        torch.testing.assert_close(weight, alone["weights"][name], atol=1e-5, rtol=1e-4, msg=name)
