"""The mixture with which a run starts."""

from __future__ import annotations

from typing import Any

from molora.attach import Mixture, attach
from molora.attach.saving import load_values
from molora.config.run import RunConfig
from molora.train.gather import gathered


def attached(config: RunConfig, model: Any) -> Mixture:
    """The run's mixture on `model`, with the values it starts from, and its frozen roles frozen.

    On the meta device there are no values, and none are read.

    Raises:
        ConfigError: allocations that do not fit the model's layers.
        AttachError: targets that do not fit the model, a frozen role that the mixture lacks.
        CheckpointError: `train.start_from` is damaged, or another mixture's.
    """
    mixture = attach(model, config.mixture, seed=config.seed)
    if config.train.start_from is not None and model.device.type != "meta":
        # under ZeRO-3 the base is divided by now, and what it lends to be trained with it
        with gathered(mixture.extras.trainable(), modifier_rank=0):
            load_values(mixture, config.train.start_from, gather=gathered)
    for role in config.train.freeze:
        mixture.freeze(role)
    return mixture
