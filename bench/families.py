"""Which model families train, on tiny random models: loss and all gradients beside stock TRL.

python bench/families.py    writes results/families.json and renews the table in ../README.md
"""

from __future__ import annotations

import copy
import json
import random
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl import DPOConfig, DPOTrainer

from fastpref.commands.benchmark.report import insert_tables
from fastpref.trl import PreferenceConfig, PreferenceTrainer

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "families.json"
COLUMNS: dict[str, dict[str, Any]] = {
    "padded": {},
    "padding_free": {"padding_free": True},
    "share_prompt": {"share_prompt": True},
}
BETA = 0.5
# Of float32, half the digits: a wrong scale, mask or position changes more, rounding less. What is
# smaller than that part of all gradients is noise, as of a key's bias, whose gradient is 0.
ALLOWED = torch.finfo(torch.float32).eps ** 0.5
VOCABULARY = 120
SPECIAL = ["<pad>", "<eos>", "<unk>", "<image>", "<begin>", "<end>"]
SPECIAL += ["<fake_token_around_image>", "<global-img>"]
IMAGE, BEGIN, END = (SPECIAL.index(name) for name in ("<image>", "<begin>", "<end>"))

# --- models -------------------------------------------------------------------------------------

TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
ROUTER = {"output_router_logits": True, "router_aux_loss_coef": 0.1, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16} | ROUTER
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
STATE = {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "shared_expert_intermediate_size": 16,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def text(model_type: str, **fields: Any) -> Callable[[], Any]:
    """A causal language model from its config."""

    def build() -> Any:
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**(TINY | fields)))

    return build


def vision(
    name: str, text_config: dict[str, Any], vision_type: str, **fields: Any
) -> Callable[[], Any]:
    """A vision-language model; the text config's `model_type` says which language model."""

    def build() -> Any:
        model_class = getattr(transformers, f"{name}ForConditionalGeneration")
        of_text = CONFIG_MAPPING[text_config["model_type"]](**(TINY | text_config))
        of_vision = CONFIG_MAPPING[vision_type](**VISION)
        config = model_class.config_class(text_config=of_text, vision_config=of_vision, **fields)
        return model_class(config)

    return build


FAMILIES: dict[str, Callable[[], Any]] = {
    "Llama 2, 3": text("llama"),
    "Llama 4": text(
        "llama4_text",
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=2,
        attention_chunk_size=8,
    ),
    "Qwen 2, 2.5": text("qwen2"),
    "Qwen 3": text("qwen3", head_dim=8),
    "Qwen 2 MoE": text("qwen2_moe", shared_expert_intermediate_size=16, **EXPERTS),
    "Qwen 3 MoE": text("qwen3_moe", head_dim=8, **EXPERTS),
    "Qwen 3 Next": text("qwen3_next", head_dim=8, **LINEAR, **EXPERTS),
    "Mistral": text("mistral", sliding_window=4),
    "Mixtral": text("mixtral", num_local_experts=4, **ROUTER),
    "Gemma": text("gemma", head_dim=8),
    "Gemma 2": text("gemma2", head_dim=8, **WINDOW),
    "Gemma 3": text("gemma3_text", head_dim=8, **WINDOW),
    "Cohere, Aya": text("cohere"),
    "Cohere 2": text("cohere2", **WINDOW),
    "Granite": text("granite", logits_scaling=4.0),
    "Phi 1, 2": text("phi"),
    "Phi 3, 4": text("phi3"),
    "GPT-2": text("gpt2", **GPT),
    "GPT-NeoX, Pythia": text("gpt_neox"),
    "GPT-OSS": text("gpt_oss", head_dim=8, num_local_experts=4, **WINDOW, **ROUTER),
    "OPT": text(  # whose dropout is a function, which TRL does not turn off
        "opt", ffn_dim=48, word_embed_proj_dim=16, init_std=0.2, dropout=0.0
    ),
    "OLMo 2": text("olmo2"),
    "SmolLM 3": text("smollm3"),
    "GLM 4": text("glm4", head_dim=8),
    "DeepSeek V3": text("deepseek_v3", **LATENT),
    "Falcon-H1": text("falcon_h1", lm_head_multiplier=0.3, mamba_d_ssm=32, mamba_n_heads=4),
    "Mamba 2": text("mamba2", **STATE),
    "LLaVA": vision("Llava", {"model_type": "llama"}, "clip_vision_model", image_token_index=IMAGE),
    "Gemma 3 vision": vision(
        "Gemma3",
        {"model_type": "gemma3_text", "head_dim": 8, **WINDOW},
        "siglip_vision_model",
        mm_tokens_per_image=4,
        image_token_id=IMAGE,
        boi_token_id=BEGIN,
        eoi_token_id=END,
    ),
    "Idefics 3": vision(
        "Idefics3",
        {"model_type": "llama"},
        "idefics3_vision",
        scale_factor=1,
        image_token_id=IMAGE,
    ),
}


# --- data ---------------------------------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0, w1, …, one token each."""
    words = [*SPECIAL, *(f"w{i}" for i in range(VOCABULARY - len(SPECIAL)))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={
            "image_token": "<image>",
            "boi_token": "<begin>",
            "eoi_token": "<end>",
        },
    )


def processor(family: str) -> Any:
    """What makes tokens, and of an image pixels, for the family."""
    words = tokenizer()
    size = {"height": VISION["image_size"], "width": VISION["image_size"]}
    if family == "LLaVA":
        images = transformers.CLIPImageProcessor(size=size, do_center_crop=False)
        return transformers.LlavaProcessor(
            images,
            words,
            patch_size=VISION["patch_size"],
            vision_feature_select_strategy="default",
            image_token="<image>",
            num_additional_image_tokens=1,
        )
    if family == "Gemma 3 vision":
        images = transformers.Gemma3ImageProcessor(size=size)
        return transformers.Gemma3Processor(images, words, image_seq_length=4)
    if family == "Idefics 3":
        edge = {"longest_edge": VISION["image_size"]}
        images = transformers.Idefics3ImageProcessor(
            size=edge, max_image_size=edge, do_image_splitting=False
        )
        return transformers.Idefics3Processor(images, words, image_seq_len=4)
    return words


def pairs(image_token: str | None) -> list[dict[str, Any]]:
    """Three of random words and uneven lengths, with an image each where there is a token of it."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(VOCABULARY - len(SPECIAL))}" for _ in range(count))

    lengths = ((6, 4, 7), (3, 9, 2), (8, 1, 5))
    made: list[dict[str, Any]] = [
        {"prompt": words(prompt), "chosen": words(chosen), "rejected": words(rejected)}
        for prompt, chosen, rejected in lengths
    ]
    if image_token is not None:
        for pair in made:
            colour = tuple(draw.randrange(256) for _ in range(3))
            pair["prompt"] = f"{image_token} {pair['prompt']}"
            pair["images"] = [Image.new("RGB", (28, 28), colour)]
    return made


# --- comparison ---------------------------------------------------------------------------------

Step = tuple[float, dict[str, Tensor]]  # loss and gradients
OURS, STOCK = (PreferenceTrainer, PreferenceConfig), (DPOTrainer, DPOConfig)


def random_policy(build: Callable[[], Any]) -> tuple[Any, Any]:
    """A policy and a reference a little away from it, always the same."""
    torch.manual_seed(0)
    policy = build()
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return policy, reference


def make_trainer(
    kind: tuple[Any, Any], policy: Any, reference: Any, family: str = "", **options: Any
) -> Any:
    """A trainer of `kind`, (trainer, configuration), on copies of the models."""
    trainer_class, config_class = kind
    processing = processor(family)
    sees = not isinstance(processing, PreTrainedTokenizerFast)
    token = ("<begin>" if family == "Gemma 3 vision" else "<image>") if sees else None
    config = config_class(
        tempfile.gettempdir(),
        beta=BETA,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    return trainer_class(
        copy.deepcopy(policy),
        copy.deepcopy(reference),
        config,
        train_dataset=Dataset.from_list(pairs(token)),
        processing_class=processing,
    )


def step(trainer: Any) -> Step:
    """The trainer's loss of its whole data set, and its gradients."""
    loss = trainer.compute_loss(trainer.model.train(), _batch(trainer))
    loss.backward()
    return loss.item(), _gradients(trainer.model)


def own_step(trainer: Any, policy: Any, reference: Any) -> Step:
    """DPO of the models' own logits, for the trainer's batch and with its router loss."""
    batch = _batch(trainer)
    scored = batch.pop("completion_mask")[:, 1:].bool()
    if trainer.aux_loss_enabled:
        batch["output_router_logits"] = True

    def margins(outputs: Any) -> Tensor:
        logps = outputs.logits[:, :-1].log_softmax(-1)
        of_targets = logps.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        chosen, rejected = (of_targets * scored).sum(1).chunk(2)
        return chosen - rejected

    outputs = policy.eval()(**batch, use_cache=False)
    with torch.no_grad():
        of_reference = margins(reference.eval()(**batch, use_cache=False))
    loss = -torch.nn.functional.logsigmoid(BETA * (margins(outputs) - of_reference)).mean()
    if trainer.aux_loss_enabled:
        balance = outputs.aux_loss
        if balance is None:  # it gives router logits alone
            config, mask = policy.config.get_text_config(), batch["attention_mask"]
            sizes = config.num_local_experts, config.num_experts_per_tok
            balance = load_balancing_loss_func(outputs.router_logits, *sizes, mask)
        loss = loss + trainer.router_aux_loss_coef * balance
    loss.backward()
    return loss.item(), _gradients(policy)


def _batch(trainer: Any) -> dict[str, Any]:
    return dict(trainer.data_collator([dict(row) for row in trainer.train_dataset]))


def _gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def difference(ours: Step, theirs: Step) -> float:
    """The largest relative one, of the loss and of each parameter's gradient.

    Raises:
        RuntimeError: other parameters have gradients.
    """
    (loss, found), (expected_loss, expected) = ours, theirs
    if found.keys() != expected.keys():
        raise RuntimeError(f"gradients of other parameters: {sorted(found.keys() ^ expected)}")
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    differences = [abs(loss - expected_loss) / abs(expected_loss)]
    for name, gradient in expected.items():
        size = max(gradient.norm(), ALLOWED * whole)
        differences.append(((found[name] - gradient).norm() / size).item())
    return torch.tensor(differences).max().item()  # NaN if any is


def compare(family: str) -> dict[str, Any]:
    """Each column's largest relative difference, or why the trainer refuses it.

    From stock TRL; from the models' own logits where TRL does not run, or differs from those.
    """
    policy, reference = random_policy(FAMILIES[family])
    found: dict[str, Any] = {"family": family, "model": type(policy).__name__}
    steps = {}
    for column, options in COLUMNS.items():
        try:
            trainer = make_trainer(OURS, policy, reference, family, **options)
        except ValueError as refusal:
            found[column] = {"refused": str(refusal)}
        else:
            steps[column] = step(trainer)
    if not steps:
        return found
    own = own_step(trainer, copy.deepcopy(policy), copy.deepcopy(reference))
    try:
        expected = step(make_trainer(STOCK, policy, reference, family))
        if not (off := difference(expected, own)) <= ALLOWED:
            raise RuntimeError(f"{off:.1g} from the model's own logits")
    except Exception as reason:  # whatever stops TRL
        expected, found["without TRL"] = own, f"{type(reason).__name__}: {reason}"
    for column, ours in steps.items():
        found[column] = {"difference": difference(ours, expected)}
    return found


# --- results ------------------------------------------------------------------------------------


def markdown(results: dict[str, Any]) -> str:
    """The README's table."""
    lines = [["", *COLUMNS, "largest difference", ""], [*["---"] * 4, "---:", "---"]]
    for found in results["families"]:
        columns = {name: found[name] for name in COLUMNS}
        notes = dict.fromkeys(
            each["refused"].split(": ", 1)[-1].removeprefix(f"{name} ")
            for name, each in columns.items()
            if "refused" in each
        )
        if "without TRL" in found:
            notes["TRL fails: beside its own logits"] = None
        differences = [each["difference"] for each in columns.values() if "difference" in each]
        largest = f"{max(differences):.0e}" if differences else ""
        cells = [*map(_verdict, columns.values()), largest]
        lines.append([found["family"], *cells, "; ".join(notes)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _verdict(column: dict[str, Any]) -> str:
    if "refused" in column:
        return "refused"
    return "works" if column["difference"] <= ALLOWED else "differs"


def main() -> None:
    torch.set_num_threads(1)  # more only wait for each other
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    packages = ("torch", "transformers", "trl")
    results: dict[str, Any] = {
        "versions": {package: version(package) for package in packages},
        "allowed": ALLOWED,
        "families": [],
    }
    for family in FAMILIES:
        found = compare(family)
        print(json.dumps(found), flush=True)
        results["families"].append(found)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    readme = ROOT / "README.md"
    readme.write_text(insert_tables(readme.read_text(), {"families": markdown(results)}))


if __name__ == "__main__":
    main()
