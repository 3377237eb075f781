"""One run: LoRA on every linear layer of the trunk, one objective, one seed."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trials.measures import Table, evaluate, logps_of, look, pair_logps, sample, scored_rows
from trials.pairs import Split, TokenPair, collate, load, order

import fastpref
from fastpref.objectives import MarginObjective
from fastpref.trl.packing import prepare_packing


@dataclass(frozen=True)
class Sizes:
    """How much is trained and looked at; the same for every objective.

    Args:
        prompt, response: the most tokens of each.
        steps, sweep_steps: of a run, and of a run that only chooses settings.
        batch: pairs a step.
        heldout, validation: pairs kept aside.
        prompts, drawn: held-out prompts answered after a run, and the most tokens of an answer.
        train: the most pairs to train on.
        seeds: of the runs; a sweep has the first.
    """

    prompt: int = 64
    response: int = 48
    steps: int = 40
    sweep_steps: int = 16
    batch: int = 4
    heldout: int = 100
    validation: int = 40
    prompts: int = 16
    drawn: int = 48
    train: int = 10**6
    seeds: tuple[int, ...] = (1, 2, 3)

    @classmethod
    def quick(cls) -> Sizes:
        return cls(
            prompt=64, response=24, steps=4, sweep_steps=2, batch=2, heldout=8, validation=4,
            prompts=2, drawn=8, train=16, seeds=(1, 2),
        )  # fmt: skip


class Bench:
    """The model, the pairs and their log-probabilities under it, made once for all runs."""

    def __init__(self, model: Path, data: Path, sizes: Sizes, cache: Path) -> None:
        self.sizes, self.directory = sizes, model
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        limits = ("prompt", "response", "train", "validation", "heldout")
        self.split: Split = load(
            data, self.tokenizer, **{name: getattr(sizes, name) for name in limits}
        )
        self.model = self._fresh(0)
        self.references = self._references(cache)

    def _fresh(self, seed: int) -> Any:
        """The checkpoint with new factors, B of them zero; the frozen weights are loaded once."""
        if hasattr(self, "model"):
            base = self.model.unload()
        else:
            base = AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32)
            base.config.use_cache = False
            prepare_packing(base, share=True)
        torch.manual_seed(seed)
        config = LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", exclude_modules=["lm_head"]
        )
        return get_peft_model(base, config)

    def _references(self, cache: Path) -> dict[str, list[tuple[float, float]]]:
        """Of every part of the split, under the checkpoint itself."""
        if not cache.exists():
            found = {name: logps_of(self.model, part, 8) for name, part in vars(self.split).items()}
            cache.write_text(json.dumps(found))
        return {
            name: [(chosen, rejected) for chosen, rejected in part]
            for name, part in json.loads(cache.read_text()).items()
        }

    def run(
        self,
        objective: MarginObjective,
        *,
        rate: float,
        steps: int,
        seed: int,
        judged_on: str,
        step_done: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Trains from the checkpoint, and looks at what that did.

        Args:
            rate: learning rate of AdamW, linear to 0.
            judged_on: the part of the split that is evaluated at the end; "heldout" is also asked
                for answers.
        """
        started = time.monotonic()
        self.model = self._fresh(seed)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        batch = self.sizes.batch
        taken = order(len(self.split.train), steps * batch, seed)
        seen: list[Table] = []
        for first in range(0, len(taken), batch):
            rows = taken[first : first + batch]
            table, loss = self._loss(objective, rows)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
            if not norm.isfinite():
                raise RuntimeError(f"{objective!r}: a gradient of norm {norm} at rate {rate}")
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            seen.append(table)
            step_done()
        judged: Sequence[TokenPair] = getattr(self.split, judged_on)
        result = {
            "objective": repr(objective),
            "rate": rate,
            "steps": steps,
            "seed": seed,
            "training": _joined(seen),
            judged_on: evaluate(self.model, objective, judged, self.references[judged_on], 8),
        }
        if judged_on == "heldout":
            prompts = judged[: self.sizes.prompts]
            result["drawn"] = sample(
                self.model, self.tokenizer, prompts, tokens=self.sizes.drawn, seed=seed
            )
        result["seconds"] = round(time.monotonic() - started, 1)
        return rounded(result)

    def _loss(self, objective: MarginObjective, rows: Sequence[int]) -> tuple[Table, torch.Tensor]:
        pairs = [self.split.train[row] for row in rows]
        batch = collate(pairs)
        ref_logps = torch.tensor([self.references["train"][row] for row in rows]).T.flatten()
        hidden, weight, targets, cu_seqlens = scored_rows(self.model, batch)
        out = fastpref.preference_loss(
            hidden,
            weight,
            targets,
            objective,
            cu_seqlens=cu_seqlens,
            ref_logps=ref_logps if objective.needs_reference else None,
            scores=batch.scores if objective.needs_scores else None,
        )
        found = pair_logps(out.logps, out.lengths, ref_logps, batch.scores)
        return look(objective, found), out.loss


def _joined(tables: Sequence[Table]) -> Table:
    """All pairs of a run in the order in which they were trained on."""
    return {name: [value for table in tables for value in table[name]] for name in tables[0]}


def rounded(value: Any) -> Any:
    """Four digits: enough for a picture, a third of the file."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def accuracy(table: Table) -> float:
    """Share of pairs whose margin is positive."""
    return statistics.mean(margin > 0 for margin in table["margin"])
