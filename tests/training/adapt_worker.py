"""One of several processes that train a tiny adapter: `python -m tests.training.adapt_worker RECIPE OUT`."""

import os
import sys
from pathlib import Path

import torch

from crab_edge.training import adapt, adapt_loop, checkpoint
from crab_edge.training.adapt_recipe import open_recipe
from crab_edge.training.avuie import AvuieScenes, train_lists
from crab_edge.training.loop import Run
from crab_edge.training.records import RecordBatches


def main(recipe_file: Path, out: Path) -> dict:
    """Train; what this process ended with: its adapter, the records that it saw, the number of processes."""
    recipe = open_recipe(recipe_file)
    records = AvuieScenes(train_lists(recipe.data))
    accelerator = adapt.open_accelerator(recipe)
    run = Run(out, workers=0, seed=recipe.seed, accelerator=accelerator)
    module, _ = adapt.build_module(recipe, run)
    base = Path(recipe.base.path)
    builder = (str(base / "tokenizer.json"), adapt._checked(recipe, base))
    make = RecordBatches(records, builder, batch=recipe.steps.batch, seed=recipe.seed)
    seen = []

    def watched(number):
        seen.extend(make.indices(number))
        return make(number)

    schedule = adapt_loop.plan(recipe.steps, len(records), accelerator.num_processes)
    module, _ = adapt_loop.train(module, watched, recipe.steps, schedule, run, lambda *_: None)
    weights = {n: checkpoint.whole(p) for n, p in checkpoint.trainable(module).items()}
    accelerator.end_training()
    return {"weights": weights, "seen": seen, "world": accelerator.num_processes}


if __name__ == "__main__":
    torch.set_num_threads(1)
    ended = main(Path(sys.argv[1]), Path(sys.argv[2]))
    torch.save(ended, Path(sys.argv[2]) / f"rank{os.environ['RANK']}.pt")
