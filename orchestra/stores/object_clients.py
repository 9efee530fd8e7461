"""Builds obstore's clients from mount options: S3, GCS, Azure.

Owns: timeouts, pool and credentials of each client. Leaves to others: what is asked of them (object_store.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, S3Store

from orchestra.clock import Clock
from orchestra.config import FetchConfig
from orchestra.errors import ConfigError
from orchestra.stores.http_client import HttpSettings
from orchestra.stores.object_store import ObjectStoreStore
from orchestra.stores.options import (
    AZURE_ALIASES,
    AZURE_NAMES,
    GCS_ALIASES,
    GCS_NAMES,
    canonical_options,
    flag,
)
from orchestra.stores.s3_config import CredentialSource, S3Config, checked_endpoint, credential_source, resolve_s3
from orchestra.stores.s3_wire import S3Wire
from orchestra.stores.uri import StoreUri

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig, S3Credential

# retry.py owns retries: obstore's would hide attempts from the counts and stretch every deadline.
NO_RETRY: RetryConfig = {"max_retries": 0, "retry_timeout": timedelta(seconds=1)}
# What only the connection uses; the rest of the options goes to obstore's store.
_CLIENT_ONLY = ("allow_http", "allow_invalid_certificates", "ca_file", "proxy_url")


def client_options(given: Mapping[str, str], fetch: FetchConfig, *, allow_http: bool) -> ClientConfig:
    """Return timeouts by progress (`attempt_timeout_s` without a byte), and a pool that keeps every connection.

    The whole request may take as long as the deadline: 4 MiB on a slow link is progress, not a failure.
    """
    options: ClientConfig = {
        "allow_http": allow_http,
        "connect_timeout": timedelta(seconds=min(10.0, fetch.attempt_timeout_s)),
        "read_timeout": timedelta(seconds=fetch.attempt_timeout_s),
        "timeout": timedelta(seconds=fetch.deadline_s),
        "pool_max_idle_per_host": str(fetch.requests_max),
        "pool_idle_timeout": timedelta(seconds=60),
        "user_agent": "orchestra",
    }
    if flag(given, "allow_invalid_certificates"):
        options["allow_invalid_certificates"] = True
    if given.get("ca_file"):
        options["root_certificate"] = _read_ca(given["ca_file"])
    if given.get("proxy_url"):
        options["proxy_url"] = given["proxy_url"]
    return options


def _read_ca(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"option 'ca_file': cannot read {path!r}: {error.strerror}") from error


def open_s3(
    uri: StoreUri, options: Mapping[str, str], environment: Mapping[str, str], fetch: FetchConfig, clock: Clock
) -> ObjectStoreStore:
    """Return the store of an S3 bucket; nothing is asked yet."""
    config = resolve_s3(uri, options, environment)
    source = None if config.anonymous else credential_source(config)
    wire = None
    if config.anonymous or source is not None:
        wire = S3Wire(config, source, wire_settings(config, fetch), clock)
    return ObjectStoreStore(
        _s3_client(config, source, fetch, clock),
        store_id=config.store_id,
        label=config.label,
        root=config.root,
        wire=wire,
    )


def wire_settings(config: S3Config, fetch: FetchConfig) -> HttpSettings:
    """Return how s3_wire connects: as obstore does."""
    return HttpSettings(
        requests_max=fetch.requests_max,
        attempt_timeout_s=fetch.attempt_timeout_s,
        ca_file=config.ca_file,
        allow_invalid_certificates=config.allow_invalid_certificates,
        proxy_url=config.proxy_url,
    )


def _s3_client(config: S3Config, source: CredentialSource | None, fetch: FetchConfig, clock: Clock) -> S3Store:
    given = {
        "ca_file": config.ca_file,
        "proxy_url": config.proxy_url,
        "allow_invalid_certificates": str(config.allow_invalid_certificates),
    }
    settings: dict[str, Any] = {
        "region": config.region,
        "virtual_hosted_style_request": config.virtual_hosted,
        "skip_signature": config.anonymous,
        **config.obstore_only,
    }
    if "s3_express" not in config.obstore_only:
        settings["endpoint"] = config.bucket_url if config.virtual_hosted else config.service_url
    if config.request_payer:
        settings["request_payer"] = True
    try:
        return S3Store(
            config.bucket,
            config=settings,  # type: ignore[arg-type]  # a TypedDict built by name
            client_options=client_options(given, fetch, allow_http=config.allow_http),
            retry_config=NO_RETRY,
            credential_provider=None if source is None else _ObstoreCredentials(source, clock),
        )
    except (BaseError, ValueError, TypeError) as error:
        raise ConfigError(f"s3: {_first_line(error)}") from error


class _ObstoreCredentials:
    """Gives obstore the credentials that the wire uses.

    Also for a static key: obstore would add the session token of the environment to a key from the options.
    """

    def __init__(self, source: CredentialSource, clock: Clock) -> None:
        self._source = source
        self._clock = clock

    async def __call__(self) -> S3Credential:
        found = await self._source.credentials()
        return {
            "access_key_id": found.access_key_id,
            "secret_access_key": found.secret_access_key,
            "token": found.session_token or None,
            # Asked again before a role's credentials (an hour at least) run out.
            "expires_at": datetime.fromtimestamp(self._clock.wall_s(), UTC) + timedelta(minutes=10),
        }


def open_gcs(uri: StoreUri, options: Mapping[str, str], fetch: FetchConfig) -> ObjectStoreStore:
    """Return the store of a GCS bucket."""
    given = canonical_options("gs", options, names=GCS_NAMES, aliases=GCS_ALIASES)
    endpoint = checked_endpoint("gs", given.get("base_url", ""))
    settings = _settings(given)
    try:
        client = GCSStore(
            uri.authority,
            config=settings,  # type: ignore[arg-type]  # a TypedDict built by name
            client_options=client_options(given, fetch, allow_http=_plain_http(endpoint, given)),
            retry_config=NO_RETRY,
        )
    except (BaseError, ValueError, TypeError, OSError) as error:
        raise ConfigError(f"gs: {_first_line(error)}") from error
    return _object_store(client, uri, "", endpoint)


def open_azure(uri: StoreUri, options: Mapping[str, str], fetch: FetchConfig) -> ObjectStoreStore:
    """Return the store of an Azure container; `abfss://container@account.host/` names the account too."""
    given = canonical_options("az", options, names=AZURE_NAMES, aliases=AZURE_ALIASES)
    container, _, host = uri.authority.partition("@")
    if host:
        given.setdefault("account_name", host.partition(".")[0])
    endpoint = checked_endpoint("az", given.get("endpoint", ""))
    try:
        client = AzureStore(
            container,
            config=_settings(given),  # type: ignore[arg-type]  # a TypedDict built by name
            client_options=client_options(given, fetch, allow_http=_plain_http(endpoint, given)),
            retry_config=NO_RETRY,
        )
    except (BaseError, ValueError, TypeError) as error:
        raise ConfigError(f"az: {_first_line(error)}") from error
    return _object_store(client, uri, given.get("account_name", ""), endpoint, container=container)


def _settings(given: Mapping[str, str]) -> dict[str, Any]:
    settings: dict[str, Any] = {name: value for name, value in given.items() if name not in _CLIENT_ONLY}
    for name in ("skip_signature", "use_emulator", "use_azure_cli"):
        if name in settings:
            settings[name] = flag(given, name)
    return settings


def _plain_http(endpoint: str, given: Mapping[str, str]) -> bool:
    return endpoint.startswith("http://") or flag(given, "allow_http") or flag(given, "use_emulator")


def _object_store(
    client: GCSStore | AzureStore, uri: StoreUri, account: str, endpoint: str, *, container: str = ""
) -> ObjectStoreStore:
    name = f"{uri.kind}://{container or uri.authority}/{uri.root}"
    parts = [f"account={account}" if account else "", f"endpoint={endpoint}" if endpoint else ""]
    place = "&".join(part for part in parts if part)
    store_id = f"{name}?{place}" if place else name
    return ObjectStoreStore(client, store_id=store_id, label=store_id, root=uri.root)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
