"""Mount options of the object stores: both spellings, and who understands which.

Owns: names, aliases, and the ConfigError for a name nobody knows. Leaves to others: what an option does.

Values are texts, as the configuration file and `--option k=v` give them.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from orchestra.errors import ConfigError

# fsspec's (s3fs, gcsfs, adlfs) spelling -> obstore's.
S3_ALIASES = {
    "key": "access_key_id",
    "aws_access_key_id": "access_key_id",
    "username": "access_key_id",
    "secret": "secret_access_key",
    "aws_secret_access_key": "secret_access_key",
    "password": "secret_access_key",
    "token": "session_token",
    "aws_session_token": "session_token",
    "endpoint_url": "endpoint",
    "aws_endpoint_url": "endpoint",
    "aws_endpoint": "endpoint",
    "region_name": "region",
    "aws_region": "region",
    "default_region": "region",
    "anon": "skip_signature",
    "requester_pays": "request_payer",
}
S3_NAMES = frozenset(
    {
        "access_key_id",
        "secret_access_key",
        "session_token",
        "endpoint",
        "region",
        "skip_signature",
        "request_payer",
        "virtual_hosted_style_request",
        "allow_http",
        "allow_invalid_certificates",
        "ca_file",
        "proxy_url",
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
# Only s3fs (botocore) has these: a mount that uses one is served by s3fs.
S3FS_NAMES = frozenset(
    {"profile", "client_kwargs", "config_kwargs", "s3_additional_kwargs", "use_ssl", "cache_regions"}
)

GCS_ALIASES = {"service_account_path": "service_account", "project": "", "anon": "skip_signature"}
GCS_NAMES = frozenset(
    {
        "service_account",
        "service_account_key",
        "application_credentials",
        "base_url",
        "bearer_token",
        "skip_signature",
        "allow_http",
        "allow_invalid_certificates",
        "ca_file",
        "proxy_url",
    }
)
AZURE_ALIASES = {
    "account_url": "endpoint",
    "sas_token": "sas_key",
    "anon": "skip_signature",
    "bearer_token": "token",
}
AZURE_NAMES = frozenset(
    {
        "account_name",
        "account_key",
        "client_id",
        "client_secret",
        "tenant_id",
        "authority_host",
        "sas_key",
        "token",
        "endpoint",
        "use_emulator",
        "use_azure_cli",
        "msi_endpoint",
        "object_id",
        "msi_resource_id",
        "federated_token_file",
        "skip_signature",
        "allow_http",
        "allow_invalid_certificates",
        "ca_file",
        "proxy_url",
    }
)
HTTP_NAMES = frozenset({"bearer_token", "user", "password", "ca_file", "allow_invalid_certificates", "proxy_url"})
# S3, GCS and Azure: `client = "fsspec"` serves the mount through s3fs, gcsfs or adlfs instead. Not HTTP: fsspec's does
# not quote names, knows no times and takes an index page for a file.
CLIENT_NAMES = ("obstore", "fsspec")

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


def canonical_options(
    kind: str, options: Mapping[str, str], *, names: Iterable[str], aliases: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return `options` under the names of `names`; an unknown name or two spellings of one raise ConfigError."""
    known, spelled = frozenset(names), aliases or {}
    found: dict[str, str] = {}
    for name, value in options.items():
        if name == "client" and kind in ("s3", "gs", "az"):
            continue  # read by chosen_client
        target = spelled.get(name, name)
        if target not in known:
            raise ConfigError(_unknown(kind, name, [*known, *spelled]))
        if target in found:
            raise ConfigError(f"{kind}: option {name!r} is given twice (another spelling of {target!r}): keep one")
        found[target] = value
    return found


def _unknown(kind: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
    return f"{kind}: unknown option {name!r}: {hint}"


def flag(options: Mapping[str, str], name: str, default: bool = False) -> bool:
    """Return the yes or no of an option."""
    text = str(options.get(name, "")).strip().lower()
    if not text:
        return default
    if text in _TRUE or (name == "request_payer" and text == "requester"):
        return True
    if text in _FALSE:
        return False
    raise ConfigError(f"option {name!r}: expected true or false, got {options[name]!r}")


def chosen_client(options: Mapping[str, str]) -> str:
    """Return the option `client`: "obstore" (default) or "fsspec"."""
    client = options.get("client", "obstore")
    if client not in CLIENT_NAMES:
        raise ConfigError(f"option 'client': expected {' or '.join(CLIENT_NAMES)}, got {client!r}")
    return client


def needs_s3fs(options: Mapping[str, str]) -> bool:
    """Return whether an S3 mount is served by s3fs: an option that only it has, or `client = "fsspec"`."""
    return chosen_client(options) == "fsspec" or any(name in S3FS_NAMES for name in options)


def literal(name: str, text: str) -> Any:
    """Return what an option's text means to a Python library: a JSON value where it reads as one, else the text.

    An option named `*_kwargs` must be a JSON object.
    """
    try:
        value = json.loads(text)
    except ValueError:
        lowered = text.strip().lower()
        value = {"true": True, "false": False}.get(lowered, text)
    if name.endswith("_kwargs") and not isinstance(value, dict):
        raise ConfigError(f'option {name!r}: expected a JSON object such as {{"connect_timeout": 5}}')
    # A number that came as text may be an account name of digits: only clear scalars and objects are converted.
    return value if isinstance(value, (bool, dict, list)) else _number_or_text(name, value, text)


def _number_or_text(name: str, value: Any, text: str) -> Any:
    if isinstance(value, int) and name in ("port", "timeout", "retries"):
        return value
    return text
