"""Roles of a mixture's parameters in learning rates and freezing."""

from __future__ import annotations

from typing import Literal

Role = Literal["experts", "A", "B", "router", "other"]
"""experts are A and B; other are declared modules and token rows."""
