"""Where an S3 mount points and with what credentials, settled once so that both of our clients agree.

Owns: options, the AWS_* environment, defaults, and the credential chain. Leaves to others: requests (object_store.py,
s3_wire.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol
from urllib.parse import urlsplit

from orchestra.errors import AccessDeniedError, ConfigError
from orchestra.stores.options import S3_ALIASES, S3_NAMES, canonical_options, flag
from orchestra.stores.sigv4 import Credentials
from orchestra.stores.uri import StoreUri

# Handed to obstore only: they change how it finds or sends credentials.
_OBSTORE_ONLY = frozenset(
    {
        "role_arn",
        "role_session_name",
        "web_identity_token_file",
        "container_credentials_relative_uri",
        "container_credentials_full_uri",
        "container_authorization_token_file",
        "imdsv1_fallback",
        "metadata_endpoint",
        "sts_endpoint",
        "s3_express",
        "sse_customer_key_base64",
    }
)


@dataclass(frozen=True, slots=True)
class S3Config:
    """A bucket and how to reach it. `credentials` None and not `anonymous` means: find them (`CredentialSource`)."""

    bucket: str
    root: str
    endpoint: str  # "" for AWS itself
    region: str
    credentials: Credentials | None = field(repr=False)
    anonymous: bool
    request_payer: bool
    virtual_hosted: bool
    allow_http: bool
    allow_invalid_certificates: bool
    ca_file: str
    proxy_url: str = field(repr=False)
    obstore_only: Mapping[str, str] = field(repr=False)

    @property
    def store_id(self) -> str:
        """The bucket's name in the whole world, without secrets; the same through either client."""
        place = f"?endpoint={self.endpoint}" if self.endpoint else ""
        return f"s3://{self.bucket}/{self.root}{place}"

    @property
    def label(self) -> str:
        """The store as an error names it."""
        return f"s3://{self.bucket}/{self.root}" + (f" at {self.endpoint}" if self.endpoint else "")

    @property
    def service_url(self) -> str:
        """The endpoint, of AWS too."""
        if self.endpoint:
            return self.endpoint
        domain = "amazonaws.com.cn" if self.region.startswith("cn-") else "amazonaws.com"
        return f"https://s3.{self.region}.{domain}"

    @property
    def bucket_url(self) -> str:
        """The URL of the bucket: path style, or the bucket before the host."""
        if not self.virtual_hosted:
            return f"{self.service_url}/{self.bucket}"
        scheme, _, rest = self.service_url.partition("://")
        return f"{scheme}://{self.bucket}.{rest}"


def resolve_s3(uri: StoreUri, options: Mapping[str, str], environment: Mapping[str, str]) -> S3Config:
    """Return the settled configuration; options win over the environment. Raises ConfigError."""
    given = canonical_options("s3", options, names=S3_NAMES, aliases=S3_ALIASES)
    endpoint = (
        given.get("endpoint") or environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL") or ""
    )
    credentials = _credentials(given, environment)
    return S3Config(
        bucket=uri.authority,
        root=uri.root,
        endpoint=checked_endpoint("s3", endpoint),
        region=given.get("region")
        or environment.get("AWS_REGION")
        or environment.get("AWS_DEFAULT_REGION")
        or "us-east-1",
        credentials=credentials,
        anonymous=flag(given, "skip_signature"),
        request_payer=flag(given, "request_payer"),
        virtual_hosted=flag(given, "virtual_hosted_style_request"),
        allow_http=endpoint.lower().startswith("http://") or flag(given, "allow_http"),
        allow_invalid_certificates=flag(given, "allow_invalid_certificates"),
        ca_file=given.get("ca_file", ""),
        proxy_url=given.get("proxy_url", ""),
        obstore_only={name: value for name, value in given.items() if name in _OBSTORE_ONLY},
    )


def _credentials(given: Mapping[str, str], environment: Mapping[str, str]) -> Credentials | None:
    key, secret = given.get("access_key_id", ""), given.get("secret_access_key", "")
    if bool(key) != bool(secret):
        missing = "secret (secret_access_key)" if key else "key (access_key_id)"
        raise ConfigError(f"s3: option {missing} is missing: give both key and secret, or neither")
    for text in (key, secret, given.get("session_token", "")):
        if not text.isprintable() or text != text.strip():
            raise ConfigError("s3: option key, secret or token holds a space or line break at an end: remove it")
    if key:
        # The environment's session token belongs to the environment's key and would spoil this one.
        return Credentials(key, secret, given.get("session_token", ""))
    key, secret = environment.get("AWS_ACCESS_KEY_ID", ""), environment.get("AWS_SECRET_ACCESS_KEY", "")
    return Credentials(key, secret, environment.get("AWS_SESSION_TOKEN", "")) if key and secret else None


def checked_endpoint(kind: str, endpoint: str) -> str:
    """Return the endpoint without a trailing slash; ConfigError unless it is a bare http(s) URL."""
    if not endpoint:
        return ""
    try:
        parts = urlsplit(endpoint)
        bad_port = parts.port == 0
    except ValueError:
        raise ConfigError(f"{kind}: option endpoint_url: expected a URL such as http://127.0.0.1:9000") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or bad_port:
        raise ConfigError(f"{kind}: option endpoint_url: expected a URL such as http://127.0.0.1:9000")
    if parts.username or parts.password:
        raise ConfigError(
            f"{kind}: option endpoint_url may not hold a user or password: use the options key and secret"
        )
    return endpoint.rstrip("/")


class CredentialSource(Protocol):
    """Gives credentials that are valid now."""

    async def credentials(self) -> Credentials:
        """Return them, asking the machine's chain if they ran out. Raises AccessDeniedError."""
        ...

    def ready(self) -> Credentials | None:
        """Return them if nobody has to be asked."""
        ...


class StaticCredentials:
    """The credentials of the options or the environment."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    async def credentials(self) -> Credentials:
        return self._credentials

    def ready(self) -> Credentials | None:
        return self._credentials


class BotocoreCredentials:
    """The chain of botocore: profiles, SSO, web identity, container and instance roles; refreshed by it."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._found: Any = None

    async def credentials(self) -> Credentials:
        # In a thread: the chain may ask a metadata server and block.
        credentials = await asyncio.to_thread(self._ask)
        if credentials is None:
            raise AccessDeniedError(
                f"no AWS credentials for {self._label}: give the options key and secret, set AWS_ACCESS_KEY_ID and"
                " AWS_SECRET_ACCESS_KEY, or anon = true for a public bucket"
            )
        return credentials

    def ready(self) -> Credentials | None:
        found = self._found
        is_old = getattr(found, "refresh_needed", None)  # those that never run out have no such method
        return None if found is None or (is_old is not None and is_old()) else _frozen(found)

    def _ask(self) -> Credentials | None:
        self._found = found = _botocore_session().get_credentials()
        return None if found is None else _frozen(found)


def _frozen(found: Any) -> Credentials:
    frozen = found.get_frozen_credentials()
    return Credentials(frozen.access_key, frozen.secret_key, frozen.token or "")


@lru_cache(maxsize=1)
def _botocore_session() -> Any:
    import botocore.session

    return botocore.session.get_session()


def credential_source(config: S3Config) -> CredentialSource | None:
    """Return where both clients take credentials from; None leaves it to obstore alone (then s3_wire is not used).

    That is so with options that only obstore reads, and without botocore (extra `s3`).
    """
    if config.credentials is not None:
        return StaticCredentials(config.credentials)
    if config.obstore_only:
        return None
    try:
        import botocore.session  # noqa: F401 - asks whether it is installed
    except ImportError:
        return None
    return BotocoreCredentials(config.label)
