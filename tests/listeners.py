"""Which TCP ports a cluster's processes listen on, as the kernel tells and as docs/security.md does."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

_DOCUMENT = Path(__file__).parents[1] / "docs" / "security.md"
_LISTEN = "0A"


class Listener(NamedTuple):
    """One row of the document: who, on which port (a setting, or any), reachable from where."""

    process: str
    port: str
    address: str


def documented() -> set[Listener]:
    """The rows under "What listens where"."""
    section = _DOCUMENT.read_text(encoding="utf-8").split("\n## What listens where\n")[1].split("\nServe ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    return {
        Listener(
            process.split(" (")[0].strip("`"),
            re.sub(r" \(\d+\)$", "", port).strip("`"),
            "loopback" if "loopback" in address or address == "`router.host`" else address,
        )
        for process, port, address, _ in rows
    }


def found(pids: Iterable[int], settings: Mapping[int, str]) -> set[Listener]:
    """What listens, in the document's words. `settings` names the ports that are not any."""
    return {
        Listener(*_words(_title(pid), settings.get(port), address)) for pid in pids for address, port in listeners(pid)
    }


def _words(title: str, setting: str | None, address: str) -> tuple[str, str, str]:
    ip = ipaddress.ip_address(address)
    where = "loopback" if ip.is_loopback else "every address" if ip.is_unspecified else address
    who = re.match(r"ray::(ProxyActor|ServeReplica)", title)
    if setting == "drafter":
        return "ServeReplica:…drafter", "any free one", where
    if who is None or (where == "loopback" and setting is None):  # what every worker of Ray's has
        return "Ray's own", "any free ones", where
    return who[1], setting or "any free one", where


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def listeners(pid: int) -> set[tuple[str, int]]:
    """(address, port) of every listening socket of a process; empty once it is gone."""
    links = []
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # a file that is closed meanwhile
                links.append(os.readlink(link))
        tables = [Path(f"/proc/{pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
    except OSError:
        return set()
    inodes = {match[1] for link in links if (match := re.fullmatch(r"socket:\[(\d+)\]", link))}
    lines = [line.split() for table in tables for line in table.splitlines()[1:]]
    return {_address(fields[1]) for fields in lines if fields[3] == _LISTEN and fields[9] in inodes}


def _address(text: str) -> tuple[str, int]:
    """From the kernel's hex: words of four bytes, each in the machine's (little-endian) order."""
    address, port = text.split(":")
    words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
    ip = ipaddress.ip_address(b"".join(words))
    return str(getattr(ip, "ipv4_mapped", None) or ip), int(port, 16)
