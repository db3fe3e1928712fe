"""What applying a changed cluster file will do, before it is done: from two Serve configs, without Ray."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

_MISSING = "(none)"


class Effect(StrEnum):
    """What a change costs, from the least to the most."""

    IN_PLACE = "in place"  # running replicas take it; no stream notices
    START = "starts"
    RESTART = "restarts the pool"  # replica by replica; streams move on to others, tokens delivered so far are kept
    STOP = "stops"
    NEW_CLUSTER = "needs a new cluster"  # nothing short of `down` and `up` does it


@dataclass(frozen=True, slots=True)
class Change:
    """One field of one application (a pool), or a whole application where `field` is empty."""

    application: str
    field: str
    before: Any
    after: Any
    effect: Effect


def plan(deployed: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[Change]:
    """The changes from one Serve config (app.serve_config) to another; empty where there are none."""
    changes = list(_listeners(deployed, wanted))
    before = {entry["name"]: entry for entry in deployed["applications"]}
    after = {entry["name"]: entry for entry in wanted["applications"]}
    for name in sorted(before.keys() | after.keys()):
        if name not in before:
            changes.append(Change(name, "", _MISSING, "running", Effect.START))
        elif name not in after:
            changes.append(Change(name, "", "running", _MISSING, Effect.STOP))
        else:
            changes.extend(_of_application(before[name], after[name]))
    return changes


def _listeners(deployed: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[Change]:
    """Serve's own ports and time limits. Port 0 in a file is any free one, so it asks for no change."""
    for part in ("http_options", "grpc_options"):
        if not deployed.get(part):  # Serve does not run yet
            continue
        before, after = _flat(deployed[part]), _flat(wanted[part])
        for field, value in after.items():
            is_free_port = field == "port" and value == 0
            if before.get(field) != value and not is_free_port:
                yield Change("router", f"{part}.{field}", before.get(field), value, Effect.NEW_CLUSTER)


def _of_application(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Change]:
    for part, effect in (("deployments", Effect.IN_PLACE), ("args", Effect.RESTART)):
        old, new = _flat(_part(before, part)), _flat(_part(after, part))
        for field in sorted(old.keys() | new.keys()):
            values = old.get(field, _MISSING), new.get(field, _MISSING)
            if values[0] != values[1]:
                yield Change(after["name"], field, *values, effect)
    for field in ("import_path", "route_prefix", "runtime_env"):
        if before.get(field) != after.get(field):
            yield Change(after["name"], field, before.get(field), after.get(field), Effect.RESTART)


def _part(entry: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = entry["deployments"][0] if part == "deployments" else entry.get(part) or {}
    return found


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by dotted path. The arguments' `pool.` is left out: a cluster file has none."""
    if not isinstance(value, Mapping) or not value:
        return {path.removeprefix("pool."): value} if path else {}
    return {
        leaf: inner
        for key, child in value.items()
        for leaf, inner in _flat(child, f"{path}.{key}" if path else str(key)).items()
    }
