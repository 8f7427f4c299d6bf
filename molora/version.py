"""The version of molora, in one place that every package may import."""

VERSION = "0.1.0"
