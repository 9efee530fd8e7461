"""docs/semantics.md names the test of each of its claims; here its names are held to be true."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "semantics.md").read_text()
CLAIMS = re.findall(r"^(\d+)\. (.*?)(?=^\d+\. |^## |\Z)", PAGE, re.M | re.S)
PROOF = re.compile(r"`(tests/[\w/]+\.py)::(\w+|\*)`")


def names_of(path: Path) -> set[str]:
    """The names of a module's tests, Hypothesis machines (TestCase classes and their like) included."""
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_")
    }


def test_claims_are_numbered_in_order() -> None:
    """So that a claim can be cited by its number."""
    assert [int(number) for number, _ in CLAIMS] == list(range(1, len(CLAIMS) + 1))


@pytest.mark.parametrize(("number", "text"), CLAIMS, ids=[number for number, _ in CLAIMS])
def test_every_claim_has_a_proof_that_exists(number: str, text: str) -> None:
    """A claim without a test is a wish."""
    proofs = PROOF.findall(text)
    assert proofs, f"claim {number} names no test"
    for file, name in proofs:
        path = ROOT / file
        assert path.exists(), f"claim {number}: {file} is gone"
        assert name == "*" or name in names_of(path), f"claim {number}: {file} has no {name}"
