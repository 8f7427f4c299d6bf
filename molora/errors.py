"""Every error molora raises on purpose. Each message says the rule, the value and the remedy."""


class MoLoRAError(Exception):
    """Root of molora's errors; the command line shows its message alone and exits with code 2."""


class ConfigError(MoLoRAError, ValueError):
    """A configuration that cannot mean anything: unknown key, impossible mix, wrong shape."""


class AttachError(MoLoRAError):
    """A mixture cannot be put on, or used with, this model."""


class CheckpointError(MoLoRAError):
    """A saved mixture is damaged, incomplete, or made for another base model."""


class BackendError(MoLoRAError):
    """A kernel backend was asked for something that it does not do."""


class DataError(MoLoRAError):
    """A data file or row that cannot be trained on."""


class TrainingError(MoLoRAError):
    """A run that cannot go on: numbers that are not finite, or processes that do not agree."""
