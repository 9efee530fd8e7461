"""Store URIs: taken apart and judged, without a network and without importing any client.

Owns: which schemes there are, and what a URI may hold. Leaves to others: options (options.py), opening (registry.py).
"""

from __future__ import annotations

import difflib
import posixpath
from dataclasses import dataclass
from urllib.parse import unquote

from orchestra.errors import ConfigError

# Scheme as written -> the store that opens it. Everything else is looked up among fsspec's protocols.
_SCHEMES = {
    "s3": "s3",
    "s3a": "s3",
    "s3n": "s3",
    "gs": "gs",
    "gcs": "gs",
    "az": "az",
    "azure": "az",
    "abfs": "az",
    "abfss": "az",
    "http": "http",
    "https": "http",
    "file": "file",
    "local": "file",
    "memory": "memory",
}
# Protocols of fsspec that are no place to keep data: they wrap another URI, or would lead back to us.
_REFUSED = {
    "orchestra": "orchestra cannot be its own under store",
    "blockcache": "orchestra is the cache",
    "cached": "orchestra is the cache",
    "filecache": "orchestra is the cache",
    "simplecache": "orchestra is the cache",
    "dir": "give the folder's own URI",
    "reference": "give the URI of the data",
    "generic": "give the URI of the data",
    "data": "it names bytes, not a store",
    "root": "give the URI of the data",
    "libarchive": "archives are not supported as stores: unpack it",
    "tar": "archives are not supported as stores: unpack it",
    "zip": "archives are not supported as stores: unpack it",
}
_BUCKET_KINDS = {"s3": "bucket", "gs": "bucket", "az": "container"}


@dataclass(frozen=True, slots=True)
class StoreUri:
    """A URI that passed: `kind` names the store, `root` is the path below the authority, "" or ending with "/"."""

    kind: str
    scheme: str
    authority: str
    root: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}/{self.root}"


def parse_uri(uri: str) -> StoreUri:
    """Return the parts of `uri`, or raise ConfigError with one line that says what is wrong and what is allowed."""
    _check_characters(uri)
    if uri.startswith("/"):
        return StoreUri("file", "file", "", _root_of(uri, uri))
    scheme, separator, rest = uri.partition("://")
    if not separator:
        raise ConfigError(
            f"{uri!r} is neither a store URI nor an absolute path: write SCHEME://... (s3://bucket/folder) or /folder"
        )
    if "::" in uri:
        raise ConfigError(
            f"{_shown(uri)}: chains of protocols ('::') are not supported: give the URI of the data itself"
        )
    kind = _kind_of(scheme.lower(), uri)
    authority, _, path = rest.partition("/")
    _check_authority(kind, authority, uri)
    if kind == "http":
        _check_http(rest, uri)
    if kind == "file":
        return _file_uri(authority, path, uri)
    shown_scheme = kind if kind in _BUCKET_KINDS else scheme.lower()
    return StoreUri(kind, shown_scheme, authority, _root_of(path, uri))


def check_uri(uri: str) -> None:
    """Return if `uri` may be mounted, else raise ConfigError with one line. No network, no client is imported."""
    parse_uri(uri)


def known_schemes() -> list[str]:
    """Return the schemes that a message offers: ours, without aliases."""
    return ["s3", "gs", "az", "http", "https", "file", "memory"]


def _shown(uri: str) -> str:
    """Return `uri` as an error may show it: without user and password, if it holds any."""
    scheme, separator, rest = uri.partition("://")
    authority, slash, path = rest.partition("/")
    if "@" in authority:
        authority = "***@" + authority.rpartition("@")[2]
    path = path.partition("?")[0] if scheme.lower() in ("http", "https") else path
    return repr(f"{scheme}{separator}{authority}{slash}{path}")


def _check_characters(uri: str) -> None:
    if not uri.strip():
        raise ConfigError("an empty text is not a store URI: write one such as s3://bucket/folder, or an absolute path")
    if not uri.isprintable():
        raise ConfigError(f"{uri!r}: a store URI may not hold control characters")


def _kind_of(scheme: str, uri: str) -> str:
    if scheme in _SCHEMES:
        return _SCHEMES[scheme]
    if scheme in _REFUSED:
        raise ConfigError(f"{_shown(uri)}: scheme {scheme!r} cannot be mounted: {_REFUSED[scheme]}")
    others = _fsspec_protocols()
    if scheme in others:
        return "fsspec"
    # Short names: one letter of two is half of it.
    near = difflib.get_close_matches(scheme, [*known_schemes(), *sorted(others)], n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        f"{_shown(uri)}: unknown scheme {scheme!r}: {hint}known are {', '.join(known_schemes())}"
        " and the protocols of fsspec"
    )


def _fsspec_protocols() -> set[str]:
    from fsspec.registry import available_protocols  # here, so that common schemes do not pay for the import

    return {name for name in available_protocols() if name not in _REFUSED and name not in _SCHEMES}


def _check_authority(kind: str, authority: str, uri: str) -> None:
    user, at, _ = authority.rpartition("@")
    # abfss://container@account... and sftp://user@host name no secret; a password never belongs into a URI.
    if ":" in user or (at and kind in ("s3", "gs", "http", "file", "memory")):
        raise ConfigError(
            f"{_shown(uri)}: a store URI may not hold a user or password: put them into the mount's options"
        )
    if kind in _BUCKET_KINDS and not authority:
        name = _BUCKET_KINDS[kind]
        raise ConfigError(f"{_shown(uri)}: the {name} is missing: write {kind}://{name.upper()}/folder")
    if kind == "http" and not authority:
        raise ConfigError(f"{_shown(uri)}: the host is missing: write http://HOST/folder")
    if kind in _BUCKET_KINDS and authority in (".", ".."):
        raise ConfigError(f"{_shown(uri)}: {authority!r} is no {_BUCKET_KINDS[kind]} name")


def _check_http(rest: str, uri: str) -> None:
    if "?" in rest or "#" in rest:
        raise ConfigError(
            f"{_shown(uri)}: an http store is a folder: leave out '?' and '#'"
            " (a token goes into the option bearer_token)"
        )
    if ".." in unquote(rest).split("/"):
        raise ConfigError(f"{_shown(uri)}: '..' is not allowed in a store URI")


def _file_uri(authority: str, path: str, uri: str) -> StoreUri:
    if authority not in ("", "localhost"):
        raise ConfigError(
            f"{_shown(uri)}: file:// wants an absolute path with three slashes: file:///{authority}/{path}"
        )
    if not path:
        raise ConfigError(f"{_shown(uri)}: the path is missing: write file:///absolute/folder")
    return StoreUri("file", "file", "", _root_of("/" + unquote(path), uri))


def _root_of(path: str, uri: str) -> str:
    if ".." in path.split("/"):
        raise ConfigError(f"{_shown(uri)}: '..' is not allowed in a store URI")
    if path.startswith("/"):  # a folder of this machine
        return posixpath.normpath(path).replace("//", "/").rstrip("/") + "/"
    root = path.rstrip("/")
    return root + "/" if root else ""
