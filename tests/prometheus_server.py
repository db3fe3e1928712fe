"""A real Prometheus that scrapes given addresses every second."""

from __future__ import annotations

import math
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import yaml

IS_INSTALLED = shutil.which("prometheus") is not None


class Prometheus:
    """Runs from construction to `close`."""

    def __init__(self, folder: Path, targets: Mapping[str, str]) -> None:
        """targets: addresses by pool."""
        scraped = [{"targets": [address], "labels": {"pool": pool}} for pool, address in targets.items()]
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
            "scrape_configs": [{"job_name": "tandem-serve", "static_configs": scraped}],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = f"127.0.0.1:{listener.getsockname()[1]}"
        self._url = f"http://{address}/api/v1/query"
        command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb"]
        with (folder / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Series that have a value now. Raises what Prometheus says of a query that it does not understand."""
        try:
            answer = httpx.get(self._url, params={"query": expression}, timeout=10)
        except httpx.TransportError:  # not up yet
            return []
        if answer.status_code == 503:
            return []
        assert answer.status_code == 200, (expression, answer.text)
        result = answer.json()["data"]["result"]
        return [series for series in result if math.isfinite(float(series["value"][1]))]

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)
