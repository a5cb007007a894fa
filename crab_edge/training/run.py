"""A whole training run: tokenizer, audio tower, vision tower, base, adapter; each stage once, in any number
of calls.

OUT/state holds what resuming needs, OUT/base and OUT/adapter the results, OUT/log.jsonl and
OUT/metrics.json what was seen on the way. The same command continues a run that was killed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen2_5OmniThinkerConfig

from crab_edge.errors import InputError
from crab_edge.features import FeatureConfig
from crab_edge.model import (
    ILoRAConfig,
    adapted_layers,
    add_adapter,
    build,
    nano_config,
    save_adapter,
    save_base,
    special_ids,
    with_tokenizer,
)
from crab_edge.prompt import PromptBuilder
from crab_edge.training import validate
from crab_edge.training.audio_pretrain import AudioStageModule, audio_accuracy
from crab_edge.training.data import AudioBatches, LanguageBatches, VisionBatches, Vocabulary
from crab_edge.training.heads import class_prototypes
from crab_edge.training.language import (
    LanguageModule,
    centre_projections,
    fit_heads,
)
from crab_edge.training.loop import Run, Stage, finish, finished, plot_losses, run_stage
from crab_edge.training.recipe import LanguageStage, Recipe
from crab_edge.training.sources import Sources, open_sources, whisper_weights
from crab_edge.training.starts import initialise_decoder, initialise_vocabulary
from crab_edge.training.tokenizer import label_ids, number_ids, save_tokenizer, train_tokenizer
from crab_edge.training.vision_pretrain import VisionStageModule, initialise_tower, vision_accuracy

SYSTEM_PROMPT = "You see and hear."
TOKENIZER_SCENES = 250
FIRST_LOOKS = 24  # batches that the base stage's start is fitted to
_HELD_OUT = 1_000_000  # held-out scenes for the looks between stages, apart from those `evaluate` takes


class Trainer:
    """One run of one recipe in one folder."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        *,
        say: Callable[[str], None] = print,
        sources: Sources | None = None,
        run: Run | None = None,
    ) -> None:
        self.recipe, self.out, self.say = recipe, out, say
        out.mkdir(parents=True, exist_ok=True)
        _same_recipe(recipe, out)
        self.run = run or Run(
            out,
            precision=recipe.precision,
            workers=recipe.data.workers,
            checkpoint_s=60 * recipe.checkpoint_minutes,
            seed=recipe.seed,
        )
        self.sources = sources or open_sources(recipe.data, recipe.seed)
        self.vocabulary = Vocabulary(self.sources.labels)
        self.tokenizer_file = out / "tokenizer.json"
        self._tokenizer()
        self.thinker_config = _config(recipe, self.tokenizer_file)
        self.features = FeatureConfig(
            n_mels=self.thinker_config.audio_config.num_mel_bins, system_prompt=SYSTEM_PROMPT
        )
        self.builder = PromptBuilder(self.tokenizer_file, self.features)
        tokenizer = Tokenizer.from_file(str(self.tokenizer_file))
        self.numbers = number_ids(tokenizer)
        width = self.thinker_config.text_config.hidden_size
        self.prototypes: Tensor = class_prototypes(len(self.sources.labels), width)
        self.thinker = build(self.thinker_config, seed=recipe.seed)
        initialise_decoder(self.thinker.model.language_model, special_ids(self.thinker_config))
        self.labels = label_ids(tokenizer, self.sources.labels)
        initialise_vocabulary(self.thinker, self.labels, self.prototypes, self.numbers)

    def train(self) -> Path:
        """Run what isn't done yet; returns the folder."""
        if self.recipe.audio is not None:
            self._stage("audio", self._audio)
        if self.recipe.vision is not None:
            self._stage("vision", self._vision)
        self._stage("base", self._base)
        self._save_base()
        self._adapter()
        plot_losses(self.out)
        return self.out

    # One method a stage; each leaves the thinker as the next one needs it.

    def _stage(self, name: str, train: Callable[[], dict[str, float]]) -> None:
        done = finished(self.run, name)
        if done is not None:
            self.thinker.load_state_dict(done["thinker"])
            return
        self.say(f"stage {name}")
        self._seed(name)
        figures = train()
        self._metrics(name, figures)
        finish(self.run, name, {"thinker": self.thinker.state_dict()})

    def _seed(self, stage: str) -> None:
        """New heads are drawn alike whether the stages before ran in this process or another."""
        torch.manual_seed(self.recipe.seed + len(stage))

    def _audio(self) -> dict[str, float]:
        recipe, tower = self.recipe.audio, self.thinker.model.audio_tower
        assert recipe is not None
        if recipe.whisper:
            from crab_edge.model.whisper import load_whisper_encoder

            load_whisper_encoder(tower, whisper_weights(self.recipe.data.cache))
        module = AudioStageModule(tower, self.prototypes, recipe.freeze_layers)
        make = AudioBatches(self.sources.train, self.vocabulary, self.features, recipe.batch)
        figures = run_stage(Stage("audio", module, module.groups(), make, recipe), self.run)
        held_out = AudioBatches(self.sources.test, self.vocabulary, self.features, 8)
        steps = -(-recipe.validate_samples // 8)
        return figures | self._look(audio_accuracy, module, held_out, steps)

    def _vision(self) -> dict[str, float]:
        recipe = self.recipe.vision
        assert recipe is not None
        initialise_tower(self.thinker.model.visual)
        module = VisionStageModule(self.thinker.model.visual, self.prototypes)
        pictures = self.sources.train
        if recipe.collages:
            from crab_edge.training.collage import Collages, Mixed

            pictures = Mixed(Collages(pictures.catalogue, self.recipe.seed), pictures, recipe.collages)
        make = VisionBatches(pictures, self.vocabulary, self.features, recipe.batch)
        figures = run_stage(Stage("vision", module, module.groups(), make, recipe), self.run)
        held_out = VisionBatches(self.sources.test, self.vocabulary, self.features, 8)
        return figures | self._look(vision_accuracy, module, held_out, -(-recipe.validate_samples // 8))

    def _base(self) -> dict[str, float]:
        recipe = self.recipe.base
        module = self._language(self.thinker, recipe, recipe.train_projections)
        make = self._questions(recipe)
        looks = [make(step) for step in range(min(FIRST_LOOKS, recipe.steps))]
        centre_projections(module, looks[:4])
        fit_heads(module, looks)
        groups = module.base_groups(recipe.hold_clocks)
        figures = run_stage(Stage("base", module, groups, make, recipe), self.run)
        return figures | self._questions_look("base", module, recipe)

    def _adapter(self) -> None:
        if (self.out / "adapter" / "adapter_config.json").exists():
            return
        self.say("stage adapter")
        self._seed("adapter")
        recipe = self.recipe.adapter
        config = ILoRAConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            lora_dropout=recipe.dropout,
            num_experts=recipe.experts,
        )
        model = add_adapter(
            self.thinker, config, towers=recipe.towers or recipe.train_towers, seed=self.recipe.seed
        )
        module = self._language(model, recipe, False, train_towers=recipe.train_towers)
        asleep = [layer for name, layer in adapted_layers(model).items() if _in_tower(name)]
        asleep = [] if recipe.train_towers else asleep
        for layer in asleep:
            # As in the official file: wrapped, but never trained, so their experts stay exactly zero.
            layer.enable_adapters(False)
        stage = Stage("adapter", module, module.adapter_groups(), self._questions(recipe), recipe)
        figures = run_stage(stage, self.run)
        figures |= self._questions_look("adapter", module, recipe)
        for layer in asleep:
            layer.enable_adapters(True)
        self._metrics("adapter", figures)
        if self.run.main:
            temporary = self.out / "adapter.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            save_adapter(model, temporary)
            shutil.rmtree(self.out / "adapter", ignore_errors=True)
            temporary.rename(self.out / "adapter")
            (self.out / "state" / "adapter.pt").unlink(missing_ok=True)

    # Parts of the stages.

    def _language(
        self, model: nn.Module, recipe: LanguageStage, projections: bool, train_towers: bool = False
    ) -> LanguageModule:
        return LanguageModule(
            model,
            special_ids(self.thinker_config),
            self.numbers,
            prototypes=self.prototypes,
            labels=self.labels,
            auxiliary=recipe.auxiliary,
            auxiliary_layer=recipe.auxiliary_layer,
            soft_pixels=recipe.soft_numbers,
            pointing=recipe.pointing,
            train_projections=projections,
            train_towers=train_towers,
        )

    def _questions(self, recipe: LanguageStage, test: bool = False) -> LanguageBatches:
        still_steps = int(recipe.stills_first * recipe.steps)
        drills, crowded = (None, None) if test else self._drills(recipe)

        def kind(step: int) -> str:
            if not test and step < still_steps:
                count, still = step, True
            else:
                # Evenly spread: step k is a still when the running share passes an integer there.
                share = recipe.stills_share
                count = int(step * share)
                still = int((step + 1) * share) > count
            if not still:
                return "clip"
            share = 0.0 if crowded is None else recipe.crowded_share
            return "crowded" if int((count + 1) * share) > int(count * share) else "still"

        return LanguageBatches(
            self.sources.test if test else self.sources.train,
            (str(self.tokenizer_file), self.features),
            self.vocabulary,
            batch=1 if test else recipe.batch,
            stills_per_clip=recipe.stills_per_clip,
            questions=recipe.questions,
            kind=kind,
            seed=self.recipe.seed,
            drills=drills,
            crowded=crowded,
        )

    def _drills(self, recipe: LanguageStage) -> tuple[Any, Any]:
        """Further questions and crowded pictures, where the recipe wants them."""
        if not recipe.drills and not recipe.crowded_share:
            return None, None
        from crab_edge.training.collage import Collages
        from crab_edge.training.scenes import SceneSource
        from crab_edge.training.scenes.drills import Drills

        train = self.sources.train
        if not isinstance(train, SceneSource):
            raise InputError(
                f"recipe {self.recipe.name}: drills and crowded_share need data.source = 'open', "
                f"not {self.recipe.data.source!r}"
            )
        asked = Drills(train.vocabulary, recipe.drills) if recipe.drills else None
        return asked, Collages(train.catalogue, self.recipe.seed) if recipe.crowded_share else None

    def _look(self, look: Any, module: nn.Module, make: Any, steps: int) -> dict[str, float]:
        if not steps or not self.run.main:
            return {}
        figures = look(module, make, steps, self.run.accelerator.autocast, _HELD_OUT // 8)
        return {k: round(v, 2) for k, v in figures.items()}

    def _questions_look(self, name: str, module: LanguageModule, recipe: LanguageStage) -> dict[str, float]:
        count = recipe.validate_samples
        if not count or not self.run.main:
            return {}
        autocast = self.run.accelerator.autocast
        make = self._questions(recipe, test=True)
        figures = validate.teacher_forced(module, make, max(count // 2, 1), autocast, _HELD_OUT)
        said, examples = validate.generated(
            module, self.builder, self.vocabulary, self.sources.test, count, autocast
        )
        for example in examples:
            self.say("  " + example)
        self.run.log({"stage": name, "examples": examples})
        return {k: round(v, 2) for k, v in {**figures, **said}.items()}

    def _metrics(self, name: str, figures: dict[str, float]) -> None:
        self.say(f"{name}: " + ", ".join(f"{k} {v:g}" for k, v in figures.items()))
        self.run.log({"stage": name, "figures": figures})
        if self.run.main:
            path = self.out / "metrics.json"
            known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            known[name] = figures
            path.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")

    def _tokenizer(self) -> None:
        if self.tokenizer_file.exists():
            return
        texts = [SYSTEM_PROMPT, "system", "user", "assistant"]
        for index in range(TOKENIZER_SCENES):
            for scene in (self.sources.train.still(index), self.sources.train.clip(index)):
                texts += [t for s in scene.samples for t in (s.lead, s.instruction, s.answer)]
        tokenizer = train_tokenizer(texts, self.sources.labels, self.recipe.vocab_size)
        save_tokenizer(tokenizer, self.tokenizer_file)

    def _save_base(self) -> None:
        if self.run.main and not (self.out / "base" / "card.json").exists():
            card = {
                "name": self.recipe.name,
                "labels": list(self.sources.labels),
                "question_templates": self.sources.question_templates,
                "tasks": self.sources.tasks,
                "notes": {**self.sources.notes, "recipe": self.recipe.model_dump(mode="json")},
            }
            save_base(self.thinker, self.out / "base", self.tokenizer_file, self.features, card)


def _in_tower(name: str) -> bool:
    return "audio_tower." in name or "visual." in name


def _config(recipe: Recipe, tokenizer_file: Path) -> Qwen2_5OmniThinkerConfig:
    sizes = nano_config().to_dict()
    for part, changes in recipe.model.items():
        if part not in ("text_config", "vision_config", "audio_config"):
            raise InputError(
                f"recipe {recipe.name}: model.{part} isn't a part; use text_, vision_ or audio_config"
            )
        sizes[part].update(changes)
    for derived in ("layer_types", "head_dim"):
        # Derived from other sizes when absent; a copy of the old value would contradict them.
        if derived not in recipe.model.get("text_config", {}):
            sizes["text_config"].pop(derived, None)
    return with_tokenizer(Qwen2_5OmniThinkerConfig(**sizes), tokenizer_file)


def _same_recipe(recipe: Recipe, out: Path) -> None:
    """Refuse to continue another recipe's run; times and workers may change."""
    path = out / "recipe.json"
    new = recipe.model_dump(mode="json")
    if not path.exists():
        path.write_text(json.dumps(new, indent=2) + "\n", encoding="utf-8")
        return
    old = json.loads(path.read_text(encoding="utf-8"))
    for stages in (old, new):
        stages.pop("checkpoint_minutes", None)
        stages["data"].pop("workers", None)
        for stage in ("audio", "vision", "base", "adapter"):
            if stages.get(stage):
                stages[stage].pop("max_minutes", None)
    if old != new:
        changed = sorted(k for k in new if new[k] != old.get(k))
        raise InputError(
            f"{out} was begun with another recipe (they differ in {', '.join(changed)}): "
            "give another --out, or --fresh to start over"
        )


def start_over(out: Path) -> None:
    """Remove what a run left in `out`, and nothing else."""
    for name in ("state", "base", "adapter", "adapter.tmp"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("tokenizer.json", "recipe.json", "log.jsonl", "metrics.json", "losses.png"):
        (out / name).unlink(missing_ok=True)


def use_threads(count: int | None) -> None:
    """Threads for torch; None leaves its choice."""
    if count:
        torch.set_num_threads(count)
