"""A quantised base below a mixture: Trainers know PEFT's adapters alone, and treat it otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from molora.errors import ConfigError

# On a quantised model without PEFT's mark transformers refuses to train; on one that says that it
# is loaded in some bits TRL rounds all that is trained to bfloat16.
_PRETENDED = {
    "_hf_peft_config_loaded": True,
    "is_loaded_in_4bit": False,
    "is_loaded_in_8bit": False,
}


@contextmanager
def known_as_adapted(model: Any) -> Iterator[None]:
    """Inside, Trainers take a quantised model for one that is not trained itself, and leave the
    dtype of what is trained.

    While they are made only: afterwards transformers and Accelerate have to know what it is.

    Raises:
        ConfigError: a kind of quantisation through which transformers cannot train.
    """
    if not getattr(model, "is_quantized", False):
        yield
        return
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_trainable:
        method = quantizer.quantization_config.quant_method
        raise ConfigError(
            f"the base is quantised by {getattr(method, 'value', method)}, through which "
            "transformers cannot train. Quantise it with bitsandbytes, in 4 or 8 bits, or load it "
            "as it is."
        )
    before = {name: vars(model).get(name) for name in _PRETENDED}
    vars(model).update(_PRETENDED)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                vars(model).pop(name)
            else:
                vars(model)[name] = value
