"""A LoRA per task, by package peft: ``python -m examples.compose.train_experts``.

They are unlike on purpose, as adapters from several people are: ranks, scalings and the linears
that are adapted differ. They go to runs/compose/experts/, and none is trained twice.
"""

from __future__ import annotations

import argparse
import random
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.compose import suite
from examples.compose.suite import Example, UpperLayers

OUTPUT = Path("runs/compose/experts")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EVERY = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
EXPERTS: dict[str, dict[str, Any]] = {
    "language": {"r": 8, "lora_alpha": 16, "target_modules": EVERY},
    "noun_class": {"r": 16, "lora_alpha": 8, "use_rslora": True, "target_modules": EVERY},
    "python_module": {"r": 4, "lora_alpha": 8, "target_modules": EVERY},
    "sms_spam": {"r": 8, "lora_alpha": 32, "target_modules": ATTENTION},
    "signature": {"r": 16, "lora_alpha": 16, "target_modules": EVERY},
}
"""Expert, named as its task → arguments of `peft.LoraConfig`."""
EPOCHS = 2
BATCH = 8
LEARNING_RATE = 2e-3


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="few rows: that everything runs")
    parser.add_argument("--model", help="name or directory of another base model")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args(arguments)
    upper, tokenizer = load(args.model)
    rows = 16 if args.fast else None
    wanted = [name for name in EXPERTS if not (args.output / name).is_dir()]
    if not wanted:
        print(f"{args.output} has all experts; remove those that are to be trained again.")
        return
    examples = suite.load_examples(upper, tokenizer, "train", rows)
    for seed, name in enumerate(EXPERTS):
        if name in wanted:
            own = [example for example in examples if example.task == name]
            train_expert(upper, own, EXPERTS[name], args.output / name, seed=seed)


def load(model: str | None) -> tuple[UpperLayers, Any]:
    """The base model in bfloat16, of which the upper layers are run, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if model is None:
        from examples.assets import smollm2

        model = str(smollm2())
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    first = loaded.config.num_hidden_layers - suite.ADAPTED
    return UpperLayers(loaded, first), AutoTokenizer.from_pretrained(model)


def train_expert(
    upper: UpperLayers,
    examples: Sequence[Example],
    settings: dict[str, Any],
    directory: Path,
    *,
    seed: int,
) -> None:
    """Train one LoRA on its task's rows, and save it as package peft does."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    layers = range(len(upper.lower), len(upper.layers))
    config = LoraConfig(
        **settings,
        lora_dropout=0.05,
        layers_to_transform=list(layers),
        layers_pattern="layers",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about kernels that no CPU has
        adapted = get_peft_model(upper.model, config)
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    started = time.monotonic()
    adapted.train()

    def answers(part: list[int]) -> Tensor:
        batch = suite.collate([examples[i] for i in part])
        return suite.row_losses(upper.logits(batch), batch.targets_BK).mean()

    loss = fit(answers, len(examples), parameters, epochs=EPOCHS, rate=LEARNING_RATE, seed=seed)
    adapted.eval()
    directory.parent.mkdir(parents=True, exist_ok=True)
    adapted.save_pretrained(str(directory))
    adapted.unload()
    upper.model.requires_grad_(False)
    seconds = time.monotonic() - started
    print(f"{directory.name}: loss of the last ten steps {loss:.3f}, {seconds:.0f} s", flush=True)


def fit(
    loss_of: Callable[[list[int]], Tensor],
    examples: int,
    parameters: Sequence[torch.nn.Parameter],
    *,
    epochs: int,
    rate: float,
    seed: int,
) -> float:
    """AdamW with a linear decay; returns the mean loss of the last ten steps.

    Args:
        loss_of: numbers of the examples of a step → what is to be less.
        examples: how many there are.
        parameters: what is trained.
        rate: learning rate after three steps.
    """
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    drawn = random.Random(seed)
    steps = [
        order[start : start + BATCH]
        for order in (drawn.sample(range(examples), examples) for _ in range(epochs))
        for start in range(0, examples, BATCH)
    ]
    losses = []
    for number, part in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((number + 1) / 3, 1 - number / len(steps))
        loss = loss_of(part)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    last = losses[-10:]
    return sum(last) / len(last)


if __name__ == "__main__":
    main()
