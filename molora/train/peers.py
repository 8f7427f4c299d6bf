"""The processes of one launch: how they find each other, and what they tell each other before
anything is trained."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import DistError, PrefixStore, Store, TCPStore

from molora.errors import TrainingError
from molora.train.place import Place, find_place

START_SECONDS = "MOLORA_START_SECONDS"
"""Environment variable: longest wait for all processes to come, 60 if not set."""

_SHOWN = 8
_met: list[Peers] = []


class Peers:
    """All processes of a launch.

    Args:
        place: where this one stands.
        store: what all of them can write to; None for one process.
    """

    def __init__(self, place: Place, store: Store | None) -> None:
        self.place = place
        self.rank, self.size = place.rank, place.size
        self.store = store
        self._exchanges = 0

    def agree(
        self,
        facts: Mapping[str, Any],
        *,
        what: str,
        seconds: float | None = None,
        setting: str = START_SECONDS,
    ) -> None:
        """Raise TrainingError unless every process holds the same facts.

        Collective.

        Args:
            facts: plain data, mappings and lists in it included.
            what: completes "the processes do not have the same …".
            seconds: longest wait for the others; that of the start if not given.
            setting: what sets this wait.
        """
        wait = start_seconds() if seconds is None else seconds
        everyone = self.exchange(dict(_leaves(facts, "")), seconds=wait, setting=setting)
        first, differences = everyone[0], []
        for rank, theirs in enumerate(everyone):
            for key in sorted(first.keys() | theirs.keys()):
                if first.get(key) != theirs.get(key):
                    differences.append(
                        f"- {key}: {theirs.get(key)!r} on rank {rank}, {first.get(key)!r} on rank 0"
                    )
        if differences:
            more = [f"- and {len(differences) - _SHOWN} more"] if len(differences) > _SHOWN else []
            listed = "\n".join(differences[:_SHOWN] + more)
            raise TrainingError(f"the processes do not have the same {what}:\n{listed}")

    def exchange(
        self, facts: dict[str, Any], *, seconds: float, setting: str = START_SECONDS
    ) -> list[dict[str, Any]]:
        """The facts of every rank, in order. Collective.

        Raises:
            TrainingError: naming the ranks that told nothing in time.
        """
        if self.store is None:
            return [facts]
        self._exchanges += 1
        keys = [f"told/{self._exchanges}/{rank}" for rank in range(self.size)]
        try:
            self.store.set(keys[self.rank], json.dumps(facts))
            self.store.wait(keys, timedelta(seconds=seconds))
            return [json.loads(value) for value in self.store.multi_get(keys)]
        except (DistError, RuntimeError) as error:
            raise self._missing(keys, seconds, setting) from error

    def _missing(self, keys: list[str], seconds: float, setting: str) -> TrainingError:
        where = f"{self.place.address}:{self.place.port}"
        try:
            assert self.store is not None
            absent = [str(rank) for rank, key in enumerate(keys) if not self.store.check([key])]
        except (DistError, RuntimeError):
            return TrainingError(
                f"rank 0 at {where} went away while the others waited. Look at what it wrote."
            )
        came = self.size - len(absent)
        shown = ", ".join(absent[:_SHOWN]) + (", …" if len(absent) > _SHOWN else "")
        return TrainingError(
            f"{came} of {self.size} processes came within {seconds:.0f} s; not rank {shown}. Look "
            "at what they wrote, and whether every machine was given the same number of processes "
            f"and the same address of rank 0, here {where}. {setting} sets the wait."
        )

    def first_to_say(self, message: str) -> bool:
        """Whether no other process has said this message, so that it is told once."""
        if self.store is None:
            return True
        name = hashlib.sha256(message.encode()).hexdigest()
        try:
            return bool(self.store.add(f"said/{name}", 1) == 1)
        except (DistError, RuntimeError):
            return True

    def leave(self, *, patience: float = 3.0) -> None:
        """Before an end with an error: rank 0 stays until the others had their say, since what
        they ask lives in it."""
        if self.store is None:
            return
        try:
            left = self.store.add("left", 1)
            ends = time.monotonic() + patience
            while self.rank == 0 and left < self.size and time.monotonic() < ends:
                time.sleep(0.05)
                left = self.store.add("left", 0)
        except (DistError, RuntimeError):
            return


def start_seconds() -> float:
    """Longest wait for all processes to come."""
    return float(os.environ.get(START_SECONDS, "60"))


def meet() -> Peers:
    """The processes of this launch, all of which have come. Collective at the first call.

    Raises:
        TrainingError: a port in use, a rank that did not come, or that two processes claim.
    """
    if not _met:
        place = find_place()
        seconds = start_seconds()
        store = _open_store(place, seconds) if place.size > 1 else None
        _met.append(Peers(place, store))
        _check_arrivals(_met[0], seconds)
    return _met[0]


def say(message: str) -> bool:
    """Whether this process is the one to tell an error; call it before ending with one."""
    if not _met:
        return True
    first = _met[0].first_to_say(message)
    _met[0].leave()
    return first


def _open_store(place: Place, seconds: float) -> Store:
    if dist.is_initialized():  # the caller's own
        return PrefixStore("molora", dist.distributed_c10d._get_default_store())
    # torchrun's own process serves the store already
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    where = f"{place.address}:{place.port}"
    try:
        store = TCPStore(
            place.address,
            place.port,
            is_master=place.rank == 0 and not served,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (DistError, RuntimeError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error):
            raise TrainingError(
                f"port {place.port} is in use on this machine, so the processes cannot meet at "
                f"{where}. Another run may be there: give this one another port, such as "
                f"--master_port {place.port + 1} for deepspeed, or MASTER_PORT."
            ) from error
        raise TrainingError(
            f"rank {place.rank} cannot reach rank 0 at {where} within {seconds:.0f} s. Look at "
            "what rank 0 wrote, and whether MASTER_ADDR is its address and the port is open."
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"molora/{attempt}", store)


def _check_arrivals(peers: Peers, seconds: float) -> None:
    if peers.store is None:
        return
    if peers.store.add(f"rank/{peers.rank}", 1) > 1:
        raise TrainingError(
            f"two processes say that they are rank {peers.rank} of {peers.size} at "
            f"{peers.place.address}:{peers.place.port}. Every process needs a rank of its own, and "
            "every run a port of its own."
        )
    here = {"host": socket.gethostname(), "processes": peers.size}
    for rank, theirs in enumerate(peers.exchange(here, seconds=seconds)):
        if theirs["processes"] != peers.size:
            raise TrainingError(
                f"rank {rank} on {theirs['host']} was told of {theirs['processes']} processes, "
                f"rank {peers.rank} on {here['host']} of {peers.size}. Start every machine with "
                "the same numbers."
            )


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Dotted path → value of everything that is no container."""
    if isinstance(value, Mapping | list | tuple) and value:
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
