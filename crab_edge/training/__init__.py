"""The training module: recipes, data, and the stages from open pictures and sounds to base and adapter.

Needs the extra `train`. `run.Trainer` is the whole run; `scenes` renders the data.
"""
