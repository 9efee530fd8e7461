"""The proof between nodes: what is accepted, everything that is refused, and that the secret shows nowhere."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

import pytest
from multidict import CIMultiDict

from orchestra.clock import ManualClock
from orchestra.cluster.proof import (
    FROM,
    MAC,
    NONCE,
    SKEW_MAX_S,
    TIME,
    TO,
    ProofChecker,
    ProofSigner,
    read_secret,
    sign,
)
from orchestra.errors import ConfigError, ProofError, from_wire, http_status_of, to_wire

SECRET = b"correct horse battery staple"
PATH = "/v1/peer/extents/00112233445566778899aabbccddeeff/0?x=1"
NOW_S = 1_000_000


def _headers(**changes: str) -> dict[str, str]:
    """Headers of a good request of node-a to node-b, its range among them."""
    made = sign(SECRET, "GET", PATH, "bytes=0-99", NOW_S, "nonce-0001", "node-a", "node-b")
    return {**made, "Range": "bytes=0-99", **changes}


def _checker(**more: int) -> ProofChecker:
    return ProofChecker(SECRET, "node-b", ManualClock(NOW_S), **more)


def test_a_signed_request_is_accepted_and_names_its_sender() -> None:
    """What one node signed for another passes there, with the header names in any case, as HTTP allows."""
    assert _checker().check("GET", PATH, _headers()) == "node-a"
    in_lower_case = {name.lower(): value for name, value in _headers().items()}
    assert _checker().check("GET", PATH, CIMultiDict(in_lower_case)) == "node-a"


def test_the_proof_is_an_hmac_that_anybody_can_compute() -> None:
    """The MAC is HMAC-SHA256 over the documented lines: another language can sign."""
    lines = ["orchestra request proof 1", "GET", PATH, "bytes=0-99", "1000000", "nonce-0001", "node-a", "node-b"]
    text = "\n".join([*lines, hashlib.sha256(b"").hexdigest()])
    assert _headers()[MAC] == hmac.new(SECRET, text.encode(), "sha256").hexdigest()


@pytest.mark.parametrize("missing", [FROM, TO, TIME, NONCE, MAC])
def test_a_request_without_one_of_the_headers_is_refused(missing: str) -> None:
    """Each header is needed."""
    headers = _headers()
    del headers[missing]
    with pytest.raises(ProofError, match="no proof"):
        _checker().check("GET", PATH, headers)


@pytest.mark.parametrize(
    "changes",
    [
        {FROM: "node-c"},
        {TIME: "1000001"},
        {TIME: "-1"},
        {TIME: "9" * 400},
        {NONCE: "nonce-0002"},
        {NONCE: "short"},
        {NONCE: "n" * 65},
        {MAC: "0" * 64},
        {MAC: "\udcff"},
        {"Range": "bytes=0-100"},
        {"Range": ""},
    ],
)
def test_a_changed_header_is_refused(changes: dict[str, str]) -> None:
    """No header can be changed or exchanged after signing, whatever stands in it."""
    with pytest.raises(ProofError):
        _checker().check("GET", PATH, _headers(**changes))


def test_another_method_path_or_body_is_refused() -> None:
    """The proof of one request is none of another."""
    for method, path, body in (("POST", PATH, b""), ("GET", PATH + "0", b""), ("GET", PATH, b"{}")):
        with pytest.raises(ProofError, match="not signed"):
            _checker().check(method, path, _headers(), body)


def test_a_body_is_covered() -> None:
    """A signed body passes as it is and not otherwise."""
    headers = sign(SECRET, "POST", "/v1/x", "", NOW_S, "nonce-0001", "node-a", "node-b", b'{"a":1}')
    with pytest.raises(ProofError, match="not signed"):
        _checker().check("POST", "/v1/x", headers, b'{"a":2}')
    assert _checker().check("POST", "/v1/x", headers, b'{"a":1}') == "node-a"


def test_a_request_signed_for_another_node_is_refused() -> None:
    """What was overheard on the way to one node cannot be sent to another."""
    with pytest.raises(ProofError, match="signed for node-b, and this node is node-c"):
        ProofChecker(SECRET, "node-c", ManualClock(NOW_S)).check("GET", PATH, _headers())


def test_another_secret_is_refused() -> None:
    """A node of another cluster, or with last year's secret, is told what to compare."""
    with pytest.raises(ProofError, match="compare secret_file"):
        ProofChecker(SECRET + b"!", "node-b", ManualClock(NOW_S)).check("GET", PATH, _headers())


@pytest.mark.parametrize("skew_s", [-SKEW_MAX_S, SKEW_MAX_S])
def test_clocks_may_differ_by_five_minutes_and_not_by_more(skew_s: int) -> None:
    """Both ways: at the limit a request passes, one second later it is refused with the difference."""
    assert ProofChecker(SECRET, "node-b", ManualClock(NOW_S + skew_s)).check("GET", PATH, _headers())
    beyond = ManualClock(NOW_S + skew_s + (1 if skew_s > 0 else -1))
    with pytest.raises(ProofError, match=r"differ by 301 s \(at most 300\): set them"):
        ProofChecker(SECRET, "node-b", beyond).check("GET", PATH, _headers())


def test_a_nonce_is_accepted_once() -> None:
    """The same request again is refused for as long as its time would be accepted, and the same nonce of another
    sender is another nonce."""
    clock = ManualClock(NOW_S - SKEW_MAX_S)
    checker = ProofChecker(SECRET, "node-b", clock)
    checker.check("GET", PATH, _headers())
    for _ in range(2 * SKEW_MAX_S):
        clock.advance(1)
        with pytest.raises(ProofError, match="came before"):
            checker.check("GET", PATH, _headers())
    other = sign(SECRET, "GET", PATH, "", NOW_S, "nonce-0001", "node-c", "node-b")
    assert checker.check("GET", PATH, other) == "node-c"


def test_a_refused_request_leaves_no_nonce() -> None:
    """Who lacks the secret can neither fill the memory nor use up another's nonce."""
    checker = _checker()
    for number in range(100):
        with pytest.raises(ProofError):
            checker.check("GET", PATH, _headers(**{MAC: f"{number:064x}"}))
    assert checker.nonce_count == 0
    assert checker.check("GET", PATH, _headers()) == "node-a"


def test_nonces_are_forgotten_when_their_time_is_over() -> None:
    """An hour of requests takes the memory of five minutes."""
    clock = ManualClock(NOW_S)
    signer, checker = ProofSigner(SECRET, "node-a", clock), ProofChecker(SECRET, "node-b", clock)
    for _ in range(3600):
        checker.check("GET", PATH, signer.headers("GET", PATH, "node-b"))
        clock.advance(1)
    assert checker.nonce_count == SKEW_MAX_S + 1


def test_memory_for_nonces_is_bounded_and_forgets_no_replay() -> None:
    """Over the bound the oldest requests are refused as too old: none of them is accepted a second time."""
    clock = ManualClock(NOW_S)
    signer, checker = ProofSigner(SECRET, "node-a", clock), _checker_at(clock, nonces_max=10)
    sent = []
    for _ in range(40):
        sent.append(signer.headers("GET", PATH, "node-b"))
        checker.check("GET", PATH, sent[-1])
        assert checker.nonce_count <= 10
        clock.advance(1)
    for headers in sent:
        with pytest.raises(ProofError, match=r"came before|too old"):
            checker.check("GET", PATH, headers)


def _checker_at(clock: ManualClock, **more: int) -> ProofChecker:
    return ProofChecker(SECRET, "node-b", clock, **more)


def test_a_signer_uses_each_nonce_once() -> None:
    """Two signers of one node (a restart) and many requests of one have no nonce in common."""
    clock = ManualClock(NOW_S)
    signers = [ProofSigner(SECRET, "node-a", clock) for _ in range(2)]
    nonces = [signer.headers("GET", PATH, "node-b")[NONCE] for signer in signers for _ in range(100)]
    assert len(set(nonces)) == 200


def test_a_line_break_cannot_move_a_field_into_another() -> None:
    """A path with a line break is neither signed nor accepted."""
    with pytest.raises(ProofError, match="line break"):
        sign(SECRET, "GET", "/v1\nbytes=0-1", "", NOW_S, "nonce-0001", "node-a", "node-b")
    with pytest.raises(ProofError):
        _checker().check("GET", PATH, _headers(**{FROM: "node-a\nnode-b"}))


def test_the_secret_shows_nowhere() -> None:
    """Neither a checker, a signer, headers nor an error say the secret or the MAC that would have been right."""
    checker, signer = _checker(), ProofSigner(SECRET, "node-a", ManualClock(NOW_S))
    good = _headers()[MAC]
    with pytest.raises(ProofError) as refusal:
        checker.check("GET", PATH, _headers(**{MAC: "0" * 64}))
    for shown in (repr(checker), repr(signer), str(refusal.value), repr(refusal.value)):
        assert SECRET.decode() not in shown
        assert good not in shown
    assert SECRET.decode() not in str(signer.headers("GET", PATH, "node-b"))


def test_a_refusal_is_status_401_and_survives_the_wire() -> None:
    """The sender learns why it was refused."""
    error = ProofError("why")
    assert http_status_of(error) == 401
    assert isinstance(from_wire(to_wire(error)), ProofError)


def test_a_secret_is_read_less_the_line_end(tmp_path: Path) -> None:
    """What `base64 > file` wrote is the secret without its line end."""
    assert read_secret(_file(tmp_path, b"c2VjcmV0c2VjcmV0\n")) == b"c2VjcmV0c2VjcmV0"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620, 0o602])
def test_a_secret_that_others_can_use_is_refused(tmp_path: Path, mode: int) -> None:
    """Any right of group or others is refused, with the command that mends it."""
    path = _file(tmp_path, SECRET, mode)
    with pytest.raises(ConfigError, match=rf"{path} can be used by others \(mode {mode:04o}\): chmod 600 {path}"):
        read_secret(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "is empty"), (b" \n", "is empty"), (b"fifteen bytes..", "holds 15 bytes"), (b"x" * 5000, "4096")],
)
def test_an_empty_short_or_huge_secret_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    """What is no secret is refused in one line that names the file and repeats nothing of it."""
    path = _file(tmp_path, content)
    with pytest.raises(ConfigError, match=says) as refusal:
        read_secret(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert "fifteen" not in str(refusal.value)


def test_a_missing_secret_or_one_that_is_no_file_is_refused(tmp_path: Path) -> None:
    """No file, a folder, and a pipe (which would never end) are each one line."""
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_secret(tmp_path / "missing")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ConfigError, match="is not a file"):
            read_secret(path)


def _file(folder: Path, content: bytes, mode: int = 0o600) -> Path:
    path = folder / "secret"
    path.write_bytes(content)
    path.chmod(mode)
    return path
