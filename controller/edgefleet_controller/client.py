"""The operator's side of the HTTP API: receives ``operator.yaml``, hands on typed calls. Used by the command line and the demo."""

from __future__ import annotations

import base64
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml
from edgefleet_shared.artifact import Layout
from edgefleet_shared.errors import (
    EnvironmentProblem,
    InputError,
    ManifestError,
    NotFoundError,
    TransportError,
    from_dict,
)

Progress = Callable[[str, int, int], None]
# What the API answers, as JSON gives it.
Json = Any
TIMEOUT_S = 60.0
PIECE_BYTES = 1 << 20


class FleetClient:
    """Calls one controller; trusts only the fleet's CA.

    Args:
        home: holds ``operator.yaml``.

    Raises:
        NotFoundError: there is no ``operator.yaml``. ManifestError, EnvironmentProblem: it can't be used.
    """

    def __init__(self, home: Path) -> None:
        path = home / "operator.yaml"
        try:
            told = yaml.safe_load(path.read_text())
            # From this file's folder, unless it is absolute: a home may be moved, or restored elsewhere.
            url, token, ca = str(told["url"]), str(told["token"]), str(home / str(told["ca"]))
            trusted = ssl.create_default_context(cafile=ca)
        except FileNotFoundError as exc:
            if not path.exists():
                raise NotFoundError(f"there is no {path}", hint="fleet init makes it; or name --home") from exc
            raise EnvironmentProblem(
                f"{path} names a CA certificate that is not there: {ca}",
                hint="it is ca/ca.pem of the controller's home: let ca name it there",
            ) from exc
        except OSError as exc:  # ssl.SSLError is one
            raise EnvironmentProblem(f"{path}, or the CA certificate that it names, can't be used: {exc}") from exc
        except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as exc:
            raise ManifestError(f"{path} must give url, token and ca") from exc
        self.url = url
        self._http = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"},
            verify=trusted,
            timeout=TIMEOUT_S,
            trust_env=False,
        )

    def close(self) -> None:
        self._http.close()

    def status(self) -> Json:
        return self._call("GET", "/v1/status")

    def classes(self) -> Json:
        return self._call("GET", "/v1/classes")

    def put_class(self, manifest: dict[str, Any]) -> Json:
        return self._call("PUT", "/v1/classes", json=manifest)

    def metadata(self, name: str) -> bytes:
        """A file of the image repository. Raises NotFoundError."""
        return self._request("GET", f"/v1/repo/{name}").content

    def publish(self, files: dict[str, bytes]) -> None:
        """Hand in signed metadata; all of it is taken or none."""
        if files:
            self._call("POST", "/v1/repo", json={n: base64.b64encode(c).decode() for n, c in files.items()})

    def blob(self, digest: str) -> bytes:
        return self._request("GET", f"/v1/blobs/{digest}").content

    def has_blob(self, digest: str) -> bool:
        return self._send("HEAD", f"/v1/blobs/{digest}").status_code == 200

    def upload(self, layout: Layout, digests: list[str], progress: Progress = lambda *_: None) -> int:
        """Send the blobs that the controller lacks; returns how many bytes went."""
        sent = 0
        for number, digest in enumerate(digests):
            progress("uploading", number, len(digests))
            if self.has_blob(digest):
                continue
            path = layout.path(digest)
            self._call("PUT", f"/v1/blobs/{digest}", content=_pieces(path))
            sent += path.stat().st_size
        return sent

    def add_model(self, digest: str) -> Json:
        return self._call("POST", "/v1/models", json={"digest": digest})

    def add_agent(self, manifests: list[str]) -> Json:
        return self._call("POST", "/v1/agents", json={"manifests": manifests})

    def agents(self) -> Json:
        return self._call("GET", "/v1/agents")

    def models(self, model: str = "", version: str = "") -> Json:
        return self._call("GET", "/v1/models", params={"model": model, "version": version})

    def compile(self, model: str, version: str, device_class: str, *, despite_quality: bool) -> str:
        wish = {"device_class": device_class, "ship_despite_quality": despite_quality}
        return str(self._call("POST", f"/v1/models/{model}/{version}/compile", json=wish)["job"])

    def jobs(self, *, unfinished: bool = False) -> Json:
        return self._call("GET", "/v1/jobs", params={"unfinished": unfinished})

    def job(self, job: str) -> Json:
        return self._call("GET", f"/v1/jobs/{job}")

    def log(self, model: str, version: str, device_class: str) -> str:
        """What the toolchains printed when a version was last compiled for a class."""
        return self._request("GET", f"/v1/models/{model}/{version}/log", params={"device_class": device_class}).text

    def cancel_job(self, job: str) -> None:
        self._call("DELETE", f"/v1/jobs/{job}")

    def token(
        self, device_class: str, *, site: str = "", device: str = "", ttl_s: float = 3600.0, role: str = "device"
    ) -> str:
        wish = {"device_class": device_class, "site": site, "device": device, "ttl_s": ttl_s, "role": role}
        return str(self._call("POST", "/v1/tokens", json=wish)["token"])

    def devices(self) -> Json:
        return self._call("GET", "/v1/devices")

    def device(self, name: str) -> Json:
        return self._call("GET", f"/v1/devices/{name}")

    def revoke_device(self, name: str) -> Json:
        return self._call("DELETE", f"/v1/devices/{name}")

    def label_device(self, name: str, changes: dict[str, str | None]) -> Json:
        """Set labels of a board, or take them away (None); returns all that it has now."""
        return self._call("PATCH", f"/v1/devices/{name}/labels", json=changes)

    def workers(self) -> Json:
        return self._call("GET", "/v1/workers")

    def revoke_worker(self, name: str) -> Json:
        return self._call("DELETE", f"/v1/workers/{name}")

    def create_rollout(self, manifest: dict[str, Any]) -> Json:
        return self._call("POST", "/v1/rollouts", json={"manifest": manifest})

    def plan_rollout(self, manifest: dict[str, Any]) -> Json:
        return self._call("POST", "/v1/rollouts/plan", json={"manifest": manifest})

    def rollouts(self) -> Json:
        return self._call("GET", "/v1/rollouts")

    def rollout(self, name: str) -> Json:
        return self._call("GET", f"/v1/rollouts/{name}")

    def intend(self, name: str, kind: str) -> Json:
        return self._call("POST", f"/v1/rollouts/{name}/{kind}")

    def _call(self, method: str, path: str, **options: Any) -> Any:
        return self._request(method, path, **options).json()

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        answer = self._send(method, path, **options)
        if answer.is_success:
            return answer
        try:
            told = answer.json()
        except ValueError:
            told = {}
        if isinstance(told, dict) and "code" in told:
            raise from_dict(told)
        raise TransportError(f"the controller answered {answer.status_code} to {method} {path}: {answer.text[:300]}")

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            return self._http.request(method, path, **options)
        except ValueError as exc:  # a number that is none, a name that is no text: JSON can't hold it
            raise InputError(f"this can't be asked of the controller: {exc}") from exc
        except httpx.HTTPError as exc:
            raise TransportError(
                f"can't reach the controller at {self.url}: {exc}", hint="is fleet serve running?"
            ) from exc


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while piece := stream.read(PIECE_BYTES):
            yield piece
