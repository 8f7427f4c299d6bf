"""The step of MoE-PEFT 2.0.2 (TUDB-Labs), measured as step_cost.py measures molora's.

It does not run under transformers 5, so its figures are relative to the frozen base of its own
environment, and this script runs there:

    python3 -m venv peers
    peers/bin/pip install torch transformers==4.46.3 'huggingface_hub<1' 'datasets<4' accelerate \
        evaluate scikit-learn sentencepiece tiktoken einops pydantic pyyaml safetensors
    peers/bin/pip install --no-deps moe-peft==2.0.2      # it asks for an older torch
    PYTHONPATH=. peers/bin/python benchmarks/peers.py    # options as of step_cost.py

Of molora only what reads no model is imported. Nothing has an auxiliary loss, and experts have no
dropout; a plain LoRA, which MixLoRA puts on the attention, refuses dropout 0 and has 0.05. The
method lora has the rank of all experts together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from step_cost import (
    EXPERTS,
    IMPLEMENTATIONS,
    PROJECTIONS,
    RANK,
    TOP_K,
    Sizes,
    arguments,
    base_model,
    measure,
)
from torch import Tensor, nn

METHODS = ("lora", "loramoe", "mola", "mixlora")


def adapter_fields(method: str) -> dict[str, Any]:
    """What MoE-PEFT's configuration file of an adapter says."""
    fields = {
        "name": "peer",
        "task_name": "casual",
        "peft_type": method.upper(),
        "r": EXPERTS * RANK if method == "lora" else RANK,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "target_modules": PROJECTIONS,
    }
    if method != "lora":
        fields |= {"routing_strategy": method, "num_experts": EXPERTS, "top_k": TOP_K}
    return fields


class Peer(nn.Module):
    """MoE-PEFT's model, called as one of transformers; its parameters are the adapter's."""

    def __init__(self, sizes: Sizes, method: str) -> None:
        super().__init__()
        from moe_peft.adapters import lora_config_factory
        from moe_peft.model import LLMModel
        from moe_peft.models import from_pretrained

        base = from_pretrained(
            base_model(sizes), attn_impl="eager", use_sliding_window=False, device="cpu"
        )
        config = lora_config_factory(adapter_fields(method))
        config.adapter_name = "peer"
        self.model = [LLMModel(base)]  # in a list: its parameters are not this module's
        self.model[0].init_adapter(config)
        for linear in self.model[0].modules():
            for name, adapter in getattr(linear, "loras_", {}).items():
                if name.startswith("moe."):
                    adapter.dropout_.p = 0.0
        self.weights = list(self.model[0].get_adapter_weight_dict("peer").values())
        for weight in self.weights:
            weight.requires_grad_(True)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return iter(self.weights)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        """MoE-PEFT's output, with the language model's `loss`."""
        from moe_peft.common import LLMBatchConfig, LLMModelInput

        batch = LLMModelInput(
            batch_configs_=[LLMBatchConfig("peer", 0, len(input_ids))],
            batch_tokens_=input_ids.tolist(),
            batch_labels_=labels.tolist(),
            batch_masks_=[[1] * len(row) for row in input_ids],
            output_router_logits_=False,
            gradient_checkpoint_="none",
        )
        return self.model[0](batch)[0]


def builder(method: str) -> Callable[[Sizes], nn.Module]:
    return lambda sizes: Peer(sizes, method)


def main() -> None:
    methods, sizes, runs = arguments(__doc__, METHODS)
    names = {f"moe-peft-{method}": method for method in methods}
    IMPLEMENTATIONS.update({name: builder(method) for name, method in names.items()})
    for cost in measure(list(names), sizes, runs, lora=None):
        print(json.dumps(asdict(cost)), flush=True)


if __name__ == "__main__":
    main()
